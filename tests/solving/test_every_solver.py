"""Every solver of diffrax goes through ``solve`` on fixed steps, with the numbers and gradients of ``diffeqsolve``.

The explicit ones are in the battery (``helpers/battery.py``); here are the rest: implicit ones, split terms, Langevin
solvers, wrapped ones. ``pytest -s`` prints the table.
"""

import dataclasses
import functools
import inspect

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from helpers.battery import CASES as BATTERY
from helpers.stats import assert_mean, assert_variance

import sdeflow as sf

pytestmark = [pytest.mark.usefixtures("x64_module"), pytest.mark.slow]

KNOTS = np.array([0.0, 0.1, 0.3, 0.45, 0.8, 1.0])


def _ode(theta):
    return sf.ODE(_stiff(theta))


def _stiff(theta):
    return lambda t, y, args: -3 * args * (y - jnp.cos(theta * t)) - theta * jnp.sin(y[::-1])


def _split(theta):
    slow = lambda t, y, args: theta * jnp.sin(2 * t + y[::-1])
    stiff = lambda t, y, args: -4 * args * y * (1 + y**2)
    return dfx.MultiTerm(dfx.ODETerm(slow), dfx.ODETerm(stiff))


def _symplectic(theta):
    position = dfx.ODETerm(lambda t, v, args: v * theta)
    velocity = dfx.ODETerm(lambda t, x, args: -args * jnp.sin(x))
    return (position, velocity)


def _noise(shape, area):
    return sf.paths.GridBrownian(_grid(), shape, key=jax.random.key(2), levy_area=area)


def _grid():
    return sf.grids.through(KNOTS, 1.0)


def _oscillator(theta):
    # The friction of a unit step lies on either side of where the solvers turn to Taylor series.
    return sf.equations.UnderdampedLangevin(
        lambda x: theta * jnp.sum(jnp.cosh(x)), friction=0.6 * theta, temperature=0.5 + theta
    )


def _raw_oscillator(theta):
    path = _noise((2,), dfx.SpaceTimeTimeLevyArea)
    gradient = lambda x, args: args * jnp.sin(x) + x
    return dfx.MultiTerm(
        dfx.UnderdampedLangevinDriftTerm(jnp.asarray(1.4), jnp.asarray(0.3) * theta, gradient),
        dfx.UnderdampedLangevinDiffusionTerm(jnp.asarray(1.4), jnp.asarray(0.3) * theta, path),  # pyright: ignore
    )


def _multiplicative(theta):
    return sf.SDE(
        lambda t, y, args: -args * y + jnp.cos(theta * t),
        lambda t, y, args: 0.3 + 0.2 * jnp.sin(theta * y + t),
        interpretation="ito",
    )


# name -> solver, equation or terms, kind of start, Levy area of the path (None: no path, or it is within the terms).
TABLE = {
    "Dopri5": (dfx.Dopri5(), _ode, "plane", None),
    "ImplicitEuler": (dfx.ImplicitEuler(), _ode, "plane", None),
    "Kvaerno3": (dfx.Kvaerno3(), _ode, "plane", None),
    "Kvaerno4": (dfx.Kvaerno4(), _ode, "plane", None),
    "Kvaerno5": (dfx.Kvaerno5(), _ode, "plane", None),
    "KenCarp3": (dfx.KenCarp3(), _split, "plane", None),
    "KenCarp4": (dfx.KenCarp4(), _split, "plane", None),
    "KenCarp5": (dfx.KenCarp5(), _split, "plane", None),
    "Sil3": (dfx.Sil3(), _split, "plane", None),
    "SemiImplicitEuler": (dfx.SemiImplicitEuler(), _symplectic, "pair", None),
    "ALIGN": (dfx.ALIGN(0.1), _oscillator, "pair", dfx.SpaceTimeTimeLevyArea),
    "ShOULD": (dfx.ShOULD(0.1), _oscillator, "pair", dfx.SpaceTimeTimeLevyArea),
    "QUICSORT": (dfx.QUICSORT(0.1), _oscillator, "pair", dfx.SpaceTimeTimeLevyArea),
    "ALIGN-raw": (dfx.ALIGN(0.1), _raw_oscillator, "pair", None),
    "ShOULD-raw": (dfx.ShOULD(0.1), _raw_oscillator, "pair", None),
    "QUICSORT-raw": (dfx.QUICSORT(0.1), _raw_oscillator, "pair", None),
    "HalfSolver-Kvaerno3": (dfx.HalfSolver(dfx.Kvaerno3()), _ode, "plane", None),
    "DiagonalMilstein": (sf.solvers.DiagonalMilstein(), _multiplicative, "plane", dfx.BrownianIncrement),
}
LIGHT = ("ImplicitEuler", "Kvaerno3", "Sil3", "SemiImplicitEuler", "ALIGN", "DiagonalMilstein")
NAMES = [pytest.param(name, marks=[] if name in LIGHT else pytest.mark.slow) for name in TABLE]


def _starts(kind):
    y0 = jnp.array([0.3, -0.7])
    if kind == "pair":
        y0 = (y0, jnp.array([0.2, 0.4]))
    return y0, jnp.array(1.3), jnp.array(0.8)


def _weighted(ys):
    return sum((jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) * x**2).sum() for x in jax.tree.leaves(ys))


def _with_tolerances(solver):
    """What ``solve`` is to give implicit solvers on fixed steps, written out."""
    if isinstance(solver, dfx.HalfSolver):
        return dfx.HalfSolver(_with_tolerances(solver.solver))
    if not isinstance(solver, dfx.AbstractImplicitSolver):
        return solver
    return dataclasses.replace(solver, root_finder=optx.Newton(rtol=1e-8, atol=1e-10, norm=optx.rms_norm))


def _moving(name):
    """Which of y0, args and theta the solution depends on."""
    return (0, 2) if TABLE[name][1] is _oscillator else (0, 1, 2)


@functools.cache
def _ours(name):
    solver, build, kind, area = TABLE[name]

    def loss(y0, args, theta):
        kwargs = {"path": _noise((2,), area)} if area else {}
        sol = sf.solve(build(theta), y0, KNOTS, args=args, solver=solver, grid=_grid(), **kwargs)
        return _weighted(sol.ys), sol.ys

    return jax.jit(jax.value_and_grad(loss, argnums=_moving(name), has_aux=True))(*_starts(kind))


@functools.cache
def _theirs(name):
    solver, build, kind, area = TABLE[name]

    def loss(y0, args, theta):
        terms = build(theta)
        if isinstance(terms, sf.equations.AbstractEquation):
            terms = terms.terms(_noise((2,), area) if area else None)
        sol = dfx.diffeqsolve(
            terms, _with_tolerances(solver), 0.0, 1.0, None, y0, args, saveat=dfx.SaveAt(t0=True, steps=True),
            stepsize_controller=dfx.StepTo(jnp.asarray(KNOTS)), max_steps=5,
            adjoint=dfx.ForwardMode(),
        )  # fmt: skip
        return _weighted(sol.ys), sol.ys

    if isinstance(solver, dfx.HalfSolver):
        # diffrax looks for the root finder of the wrapped solver in the wrapper, and fails: one step after the other.
        def loss(y0, args, theta):
            terms, inner = build(theta).terms(), _with_tolerances(solver)
            ys, state = [y0], inner.init(build(theta).terms(), KNOTS[0], KNOTS[1], y0, args)
            for a, b in zip(KNOTS[:-1], KNOTS[1:]):
                y1, _, _, state, _ = inner.step(terms, jnp.asarray(a), jnp.asarray(b), ys[-1], args, state, False)
                ys.append(y1)
            return _weighted(jnp.stack(ys)), jnp.stack(ys)

        return jax.jit(jax.value_and_grad(loss, argnums=_moving(name), has_aux=True))(*_starts(kind))
    grads, ys = jax.jit(jax.jacfwd(loss, argnums=_moving(name), has_aux=True))(*_starts(kind))
    return (_weighted(ys), ys), grads


def _gap(a, b):
    pairs = [(np.asarray(x), np.asarray(y)) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]
    assert all(np.isfinite(x).all() and np.isfinite(y).all() for x, y in pairs)
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs)


@pytest.mark.parametrize("name", NAMES)
def test_solve_equals_diffeqsolve_in_value_and_gradient(name):
    ((_, ys), grads), ((_, ys_r), grads_r) = _ours(name), _theirs(name)
    value, gradient = _gap(ys, ys_r), _gap(grads, grads_r)
    print(f"{name:22} value {value:8.1e}   gradient {gradient:8.1e}")
    assert value < 1e-12
    assert gradient < 1e-12
    assert all(np.abs(np.asarray(g)).min() > 1e-4 for g in jax.tree.leaves(grads)), (
        "a gradient that is nought proves nothing"
    )


def test_no_solver_of_diffrax_is_forgotten():
    def concrete(cls):
        return inspect.isclass(cls) and issubclass(cls, dfx.AbstractSolver) and not cls.__name__.startswith("Abstract")

    every = {name for name, cls in vars(dfx).items() if concrete(cls)}
    tried = {type(solver).__name__ for solver, *_ in TABLE.values()} | {
        type(c.solver).__name__ for c in BATTERY.values()
    }
    assert every <= tried


# Fixed steps know no tolerances, so an implicit solver is given some: its answer must not depend on which.
@pytest.mark.parametrize("name", ["ImplicitEuler", pytest.param("Kvaerno5", marks=pytest.mark.slow)])
def test_the_tolerances_of_fixed_steps_are_tight_enough(name):
    solver, build, kind, _ = TABLE[name]
    y0, args, theta = _starts(kind)
    tight = dataclasses.replace(solver, root_finder=optx.Newton(1e-13, 1e-13, norm=optx.rms_norm))
    exact = sf.solve(build(theta), y0, KNOTS, args=args, solver=tight).ys
    np.testing.assert_allclose(_ours(name)[0][1], exact, rtol=0, atol=1e-7)


def test_implicit_euler_is_the_closed_form():
    sol = sf.solve(
        sf.ODE(lambda t, y, r: -r * y), jnp.array(2.0), [0.0, 1.0], args=50.0, dt0=0.1, solver=dfx.ImplicitEuler()
    )
    np.testing.assert_allclose(sol.final, 2.0 * 6.0**-10, rtol=1e-6)


# In float32 the residual of a stiff stage is rounded to far more than any tolerance that suits its root.
@pytest.mark.parametrize("name", ["ImplicitEuler", "Kvaerno3", pytest.param("Kvaerno5", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_stiff_equations_are_solved_at_every_size_of_the_state(name, dtype):
    solver = getattr(dfx, name)()
    solve = lambda rate, rest, y0: sf.solve(
        sf.ODE(lambda t, y, args: -args[0] * (y - args[1])), y0, [0.0, 1.0], dt0=0.1, solver=solver,
        args=(jnp.asarray(rate, dtype), jnp.asarray(rest, dtype)), throw=False,
    )  # fmt: skip
    for size in (1e-6, 1.0, 1e4):
        sol = solve(50.0, 0.0, jnp.array([1.0, 100.0], dtype) * size)
        assert sf.is_okay(sol.result), size
        np.testing.assert_array_less(np.abs(sol.final), 1e-4 * size)
    for rest in (1.0, 100.0, 1e4):
        sol = solve(500.0, rest, jnp.array([rest + 1], dtype))
        assert sf.is_okay(sol.result), rest
        # What is left of the start after ten steps is less than 1e-10.
        np.testing.assert_allclose(sol.final, rest, rtol=8 * np.finfo(dtype).eps, atol=1e-10)


# y' = 0.3 + y^2 by implicit Euler with steps of one half: y = b + h (0.3 + y^2) soon has no real root.
def _rootless(throw, solver=None):
    return sf.solve(
        sf.ODE(lambda t, y, args: 0.3 + y**2), jnp.array(0.2), np.linspace(0.0, 3.0, 7),
        solver=dfx.ImplicitEuler() if solver is None else solver, throw=throw,
    )  # fmt: skip


def test_a_step_without_a_root_ends_the_path_and_is_reported():
    # Newton's method finds every root that there is.
    sol = _rootless(throw=False, solver=dfx.ImplicitEuler(root_finder=optx.Newton(1e-9, 1e-9, norm=optx.rms_norm)))
    assert not sf.is_okay(sol.result)
    assert sol.result == sf.RESULTS.nonlinear_divergence or sol.result == sf.RESULTS.nonlinear_max_steps_reached
    ys, b = np.asarray(sol.ys), 0.2
    roots = [b]
    while 1 - 2 * (b + 0.15) >= 0:
        # The smaller root of h y^2 - y + b + 0.3 h = 0 with h = 1/2.
        b = 1 - np.sqrt(1 - 2 * (b + 0.15))
        roots.append(b)
    assert 1 < len(roots) < 7
    np.testing.assert_allclose(ys[: len(roots)], roots, rtol=1e-5)
    assert np.isnan(ys[len(roots) :]).all()
    assert np.isnan(sol.final)
    assert sol.last == ys[len(roots) - 1]
    np.testing.assert_allclose(sol.stats["time_reached"], (len(roots) - 1) / 2)
    with pytest.raises(sf.SolveError, match="(?i)nonlinear"):
        _rootless(throw=True)


def test_the_failed_step_is_that_of_diffeqsolve():
    solver = _with_tolerances(dfx.ImplicitEuler())
    theirs = dfx.diffeqsolve(
        dfx.ODETerm(lambda t, y, args: 0.3 + y**2), solver, 0.0, 3.0, None, jnp.array(0.2), throw=False, max_steps=6,
        stepsize_controller=dfx.StepTo(jnp.linspace(0.0, 3.0, 7)), saveat=dfx.SaveAt(t0=True, steps=True),
    )  # fmt: skip
    ours = _rootless(throw=False)
    assert sf.RESULTS.promote(theirs.result) == ours.result
    reached = np.isfinite(theirs.ys)
    assert 1 < reached.sum() < 7
    same = np.asarray(theirs.ys)[reached] == np.asarray(ours.ys)[reached]
    # Diffrax saves the failed trial as its last state; before it all states agree.
    assert same[:-1].all()


def test_in_a_batch_only_the_path_without_a_root_fails():
    run = lambda c: sf.solve(
        sf.ODE(lambda t, y, c: c + c * y**2), jnp.array(0.2), np.linspace(0.0, 1.0, 3), args=c, solver=dfx.ImplicitEuler(),
        throw=False,
    )  # fmt: skip
    sol = jax.jit(jax.vmap(run))(jnp.array([0.1, 3.0, 0.2]))
    assert np.asarray(sf.is_okay(sol.result)).tolist() == [True, False, True]
    alone = run(jnp.array(0.1))
    np.testing.assert_allclose(sol.final[0], alone.final, rtol=1e-8)


def _rate_of(c):
    return sf.solve(
        sf.ODE(lambda t, y, c: c + c * y**2), jnp.array(0.2), np.linspace(0.0, 1.0, 3), args=c, throw=False,
        solver=dfx.ImplicitEuler(root_finder=optx.Newton(1e-12, 1e-12, norm=optx.rms_norm)),
    )  # fmt: skip


def _root(c, b):
    """One implicit step of length one half: the smaller root of c/2 y^2 - y + b + c/2 = 0."""
    return (1 - jnp.sqrt(1 - 2 * c * (b + c / 2))) / c


@pytest.mark.parametrize("what", ["final", "last"])
def test_a_path_that_ended_early_keeps_its_last_state_and_has_no_gradient(what):
    # With this rate the first step has a root and the next has none.
    solved = lambda c: (lambda sol: (getattr(sol, what), (sol.last, sf.is_okay(sol.result))))(_rate_of(c))
    (_, (last, okay)), grad = jax.jit(jax.value_and_grad(solved, has_aux=True))(jnp.array(0.75))
    assert not okay
    np.testing.assert_allclose(last, _root(0.75, 0.2), rtol=1e-10)
    assert np.isnan(grad)


def test_in_a_batch_a_path_that_ended_early_harms_no_other():
    rates = jnp.array([0.1, 0.75, 0.3, 3.0])
    total = lambda c: (lambda sol: (sol.final.sum(), sol))(jax.vmap(_rate_of)(c))
    (_, sol), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(rates)
    okay = np.asarray(sf.is_okay(sol.result))
    assert okay.tolist() == [True, False, True, False]
    assert np.isnan(np.asarray(sol.final)[~okay]).all()
    assert np.isnan(np.asarray(grads)[~okay]).all()
    # Two roots, one, two, and none at all.
    twice = lambda c: _root(c, _root(c, 0.2))
    exact = [twice, lambda c: _root(c, 0.2), twice, lambda c: 0.2 + 0 * c]
    np.testing.assert_allclose(sol.last, [f(c) for f, c in zip(exact, rates)], rtol=1e-9)
    for i in np.flatnonzero(okay):
        np.testing.assert_allclose(grads[i], jax.grad(exact[i])(rates[i]), rtol=1e-8, atol=1e-12)


@functools.cache
def _half(path_of):
    equation = sf.SDE(
        lambda t, y, args: jnp.zeros_like(y),
        lambda t, y, args: jnp.ones_like(y),
        interpretation="stratonovich",
        additive=True,
    )

    def final(key):
        sol = sf.solve(
            equation,
            jnp.zeros(8),
            [0.0, 1 / 16],
            solver=dfx.HalfSolver(dfx.EulerHeun()),
            path=path_of(key),
            throw=False,
        )
        return sol.final, sf.is_okay(sol.result)

    return jax.jit(jax.vmap(final))(jax.random.split(jax.random.key(0), 1000))


def test_half_steps_on_a_tree_have_the_variance_of_the_whole_step():
    final, okay = _half(lambda key: dfx.VirtualBrownianTree(0.0, 1 / 16, 1 / 256, (8,), key=key))
    assert okay.all()
    assert_mean(final, 0.0)
    assert_variance(final, 1 / 16, 0.0)


def test_half_steps_on_noise_that_knows_no_halves_are_refused():
    grid = sf.grids.uniform(0.0, 1 / 16, 1)
    with pytest.raises(ValueError, match="HalfSolver asks for halves of its steps, which a GridBrownian does not know"):
        _half(lambda key: sf.paths.GridBrownian(grid, (8,), key=key))


def test_half_steps_with_a_key_walk_a_tree_and_have_the_variance_of_the_whole_step():
    equation = sf.SDE(
        lambda t, y, args: jnp.zeros_like(y), lambda t, y, args: jnp.ones_like(y), additive=True
    )  # fmt: skip
    solver = dfx.HalfSolver(dfx.EulerHeun())
    run = lambda key: sf.solve(equation, jnp.zeros(8), [0.0, 1 / 16], dt0=1 / 32, solver=solver, key=key)
    final = jax.jit(jax.vmap(lambda key: run(key).final))(jax.random.split(jax.random.key(0), 1000))
    assert_mean(final, 0.0)
    assert_variance(final, 1 / 16, 0.0)
    assert "noise: VirtualBrownianTree, as HalfSolver asks for halves" in repr(run(jax.random.key(0)))


# Raw terms carry a path of their own, whose grid need not be that of the steps.
@pytest.mark.parametrize("dt0", [0.2, 0.05])
def test_raw_terms_whose_noise_lies_on_another_grid_are_never_given_its_rows(dt0):
    path = sf.paths.GridBrownian(sf.grids.uniform(0.0, 1.0, 10), (3,), key=jax.random.key(0))
    equation = sf.SDE(lambda t, y, args: -y, lambda t, y, args: jnp.ones_like(y), additive=True)
    with pytest.raises(ValueError, match="knows the steps of its own grid"):
        sf.solve(equation.terms(path), jnp.zeros(3), [0.0, 1.0], dt0=dt0, solver=dfx.Euler(), throw=False)


def test_raw_terms_on_the_grid_of_their_noise_are_the_equation():
    path = sf.paths.GridBrownian(sf.grids.uniform(0.0, 1.0, 10), (3,), key=jax.random.key(0))
    equation = sf.SDE(lambda t, y, args: -y, lambda t, y, args: jnp.ones_like(y), additive=True)
    raw = sf.solve(equation.terms(path), jnp.zeros(3), [0.0, 1.0], dt0=0.1, solver=dfx.Euler()).final
    ours = sf.solve(equation, jnp.zeros(3), [0.0, 1.0], path=path, solver=dfx.Euler()).final
    np.testing.assert_allclose(raw, ours, rtol=1e-12)
