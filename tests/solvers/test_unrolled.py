"""The stages written out are diffrax's own step: value, error, interpolation and the solver's next state."""

import functools
from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import sdeflow as sf
from sdeflow.paths._rows import RowPath
from sdeflow.solvers._unrolled import UnrolledERK, UnrolledSRK, unrolled
from sdeflow.walking import prepare_solver

ERK = ("Heun", "Midpoint", "Ralston", "Bosh3", "Dopri5", "Tsit5")
ADDITIVE = ("ShARK", "SRA1", "SEA")
GENERAL = ("SPaRK", "GeneralShARK", "SlowRK")
FSAL = ("Bosh3", "Dopri5", "Tsit5")
TIMES = (0.1, 0.35, 0.55)
TOLERANCE = {"float64": 1e-13, "float32": 2e-6}


class _Dear(dfx.ODETerm):
    """A field that says it is dear: solvers must ask for its product with the control alone."""

    def is_vf_expensive(self, t0, t1, y, args):
        return True


def _field(t, y, args):
    return {"a": -y["a"] + args * jnp.sin(3 * t + y["b"]), "b": y["a"].sum() * jnp.cos(t) - y["b"] ** 2}


def _path(solver, i, shape, dtype):
    """The noise of step i, the same in every precision."""
    needed = getattr(solver, "minimal_levy_area", dfx.BrownianIncrement)
    areas = (dfx.BrownianIncrement, dfx.SpaceTimeLevyArea, dfx.SpaceTimeTimeLevyArea)
    area = next(a for a in areas if issubclass(a, needed))
    h = TIMES[i + 1] - TIMES[i]
    rng = np.random.default_rng(i)
    draw = lambda scale: jax.tree.map(
        lambda s: jnp.asarray(scale * np.sqrt(h) * rng.normal(size=s), dtype), shape, is_leaf=lambda s: type(s) is tuple
    )
    fields = {"W": draw(1.0), "H": draw(12**-0.5), "K": draw(720**-0.5)}
    names = ("W", "H", "K")[: 1 + areas.index(area)]
    dt = jax.tree.map(lambda w: jnp.asarray(h, dtype), fields["W"])
    return RowPath(jnp.asarray(TIMES[i], dtype), jnp.asarray(TIMES[i + 1], dtype), area(dt=dt, **{n: fields[n] for n in names}), area)  # fmt: skip


def _terms(kind, solver, i, dtype):
    tree = {"a": (2,), "b": ()}
    if kind in ("ode", "dear"):
        return dfx.ODETerm(_field) if kind == "ode" else _Dear(_field)
    if kind == "additive":
        size = lambda t, y, args: {"a": jnp.stack([jnp.cos(args * t), 0.3 * args]), "b": 1 + t**2}
        return sf.SDE(_field, size, additive=True).terms(_path(solver, i, tree, dtype))
    if kind == "diagonal":
        size = lambda t, y, args: {"a": 0.3 * jnp.cos(args * y["a"] + t), "b": 0.5 * jnp.sin(y["b"])}
        return sf.SDE(_field, size, interpretation="stratonovich").terms(_path(solver, i, tree, dtype))

    # Three noises on a plane, as an operator.
    def operator(t, y, args):
        return lx.MatrixLinearOperator(0.4 * jnp.stack([jnp.cos(args * y), jnp.sin(y + t), 0.3 * y], axis=1))

    drift = lambda t, y, args: jnp.sin(y[::-1] + t)
    if kind == "operator, additive":
        constant = lambda t, y, args: lx.MatrixLinearOperator(jnp.cos(t + jnp.arange(6.0, dtype=y.dtype)).reshape(2, 3))
        return sf.SDE(drift, constant, additive=True).terms(_path(solver, i, (3,), dtype))
    if kind == "operator of diffrax":
        return dfx.MultiTerm(dfx.ODETerm(drift), dfx.ControlTerm(operator, _path(solver, i, (3,), dtype)))
    return sf.SDE(drift, operator, interpretation="stratonovich").terms(_path(solver, i, (3,), dtype))


def _start(kind, dtype):
    if "operator" in kind:
        return jnp.array([0.3, -0.7], dtype)
    return {"a": jnp.array([0.3, -0.7], dtype), "b": jnp.array(0.4, dtype)}


@functools.cache
def _two_steps(name, kind, dtype):
    """Two steps by either solver, the second with and without a jump before it, in one program."""
    solver = getattr(dfx, name)()
    straight: Any = unrolled(solver)
    assert isinstance(straight, UnrolledERK if name in ERK else UnrolledSRK)

    def run(stepper, y, args, jump):
        first, second = (_terms(kind, solver, i, dtype) for i in (0, 1))
        t = jnp.asarray(TIMES, dtype)
        # A row answers for its own ends alone.
        ends = [_ends(x) if isinstance(x, dfx.MultiTerm) else (t[i], t[i + 1]) for i, x in enumerate((first, second))]
        state = stepper.init(first, *ends[0], y, args)
        out1 = stepper.step(first, *ends[0], y, args, state, False)
        out2 = stepper.step(second, *ends[1], out1[0], args, out1[3], jump)
        middle = stepper.interpolation_cls(t0=ends[1][0], t1=ends[1][1], **out2[2])
        seen = (middle.evaluate(t[1] + 0.07), middle.evaluate(t[1] + 0.15))
        assert out1[4] is dfx.RESULTS.successful
        return [(y1, error, state) for y1, error, _, state, _ in (out1, out2)], seen

    both = lambda *x: (run(straight, *x), run(solver, *x))
    with jax.enable_x64(dtype == "float64"):
        args = (_start(kind, dtype), jnp.array(1.3, dtype))
        program = jax.jit(both)
        return program(*args, jnp.array(False)), program(*args, jnp.array(True))


def _ends(terms):
    path = terms.terms[1].control
    return path.left, path.right


def _equal(ours, theirs, dtype):
    ours, theirs = jax.tree.flatten(ours), jax.tree.flatten(theirs)
    assert ours[1] == theirs[1]
    for a, b in zip(ours[0], theirs[0]):
        assert a.dtype == b.dtype
        assert np.isfinite(b).all()
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE[dtype] * max(1.0, np.abs(np.asarray(b)).max()))


_KINDS = {name: ("ode", "diagonal", "operator") for name in ("Heun", "Midpoint", "Ralston")}
_KINDS |= {name: ("ode", "dear") for name in FSAL} | {name: ("additive", "operator, additive") for name in ADDITIVE}
_KINDS |= {name: ("diagonal", "operator") for name in GENERAL} | {"Bosh3": ("ode", "dear", "operator of diffrax")}
_OFTEN = {("Tsit5", "ode"), ("SPaRK", "operator"), ("ShARK", "additive"), ("Heun", "diagonal")}
CASES = [
    pytest.param(name, kind, dtype, marks=[] if (name, kind) in _OFTEN and dtype == "float64" else pytest.mark.slow)
    for name, kinds in _KINDS.items()
    for kind in kinds
    for dtype in TOLERANCE
]


@pytest.mark.parametrize(("name", "kind", "dtype"), CASES)
def test_a_step_written_out_is_the_step_of_diffrax(name, kind, dtype):
    for ours, theirs in _two_steps(name, kind, dtype):
        _equal(ours, theirs, dtype)
        states = [state for *_, state in theirs[0]]
        keeps = name in FSAL and kind != "dear"
        assert all((state is not None) == keeps for state in states)


def test_a_jump_matters_where_a_slope_is_kept_and_nowhere_else():
    # The same number of a state, and another slope: only a solver that is told of the jump evaluates it afresh.
    solver: Any = dfx.Tsit5()
    straight: Any = unrolled(solver)
    with jax.enable_x64(True):
        y, term = jnp.array(1.0), dfx.ODETerm(lambda t, y, args: jnp.where(t < 0.5, 1.0, -20.0) * y)
        stale = (jnp.asarray(False), jnp.array(1.0))
        step = lambda s, jump: s.step(term, jnp.array(0.5), jnp.array(0.6), y, None, stale, jump)[0]
        for flag in (False, True):
            np.testing.assert_allclose(step(straight, flag), step(solver, flag), rtol=0, atol=1e-13)
            traced = jax.jit(lambda jump: step(straight, jump))(jnp.array(flag))
            # Stages of order one cancel to 0.04.
            np.testing.assert_allclose(traced, step(straight, flag), rtol=0, atol=1e-13)
        assert abs(float(step(straight, True) - step(straight, False))) > 1e-3


def test_every_tableau_that_is_small_enough_is_written_out_and_no_other():
    for name in (*ERK, *ADDITIVE, *GENERAL):
        assert unrolled(getattr(dfx, name)()) is not None
    for name in ("Euler", "EulerHeun", "Dopri8", "Kvaerno3", "KenCarp3", "ReversibleHeun", "ImplicitEuler"):
        assert unrolled(getattr(dfx, name)()) is None


@pytest.mark.parametrize("kind", ["lax", "checkpointed", "bounded"])
def test_a_loop_that_the_user_chose_stays_diffrax_s_loop(kind):
    for solver in (dfx.Tsit5(scan_kind=kind), dfx.ShARK(scan_kind=kind), dfx.Dopri8(scan_kind=kind)):
        assert unrolled(solver) is None
        assert prepare_solver(solver) is solver
    half: Any = prepare_solver(dfx.HalfSolver(dfx.Heun(scan_kind=kind)))
    assert type(half.solver) is dfx.Heun
    assert half.solver.scan_kind == kind


def test_a_user_s_own_step_of_a_tableau_is_not_overruled():
    class Mine(dfx.Heun):
        def step(self, *args):
            return super().step(*args)

    assert unrolled(Mine()) is None


def test_a_path_without_the_area_that_is_needed_is_refused_by_name():
    straight: Any = unrolled(dfx.ShARK())
    solver = dfx.Heun()
    terms = _terms("additive", solver, 0, "float32")
    with pytest.raises(ValueError, match=r"ShARK needs levy_area=diffrax\..*build the path with that levy_area"):
        straight.step(terms, *_ends(terms), _start("additive", "float32"), 1.0, None, False)
