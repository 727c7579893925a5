"""The walk backwards in time, solver by solver: one table of errors, printed by ``pytest -s``.

Forwards the numbers are those of ``diffeqsolve``: `test_walk_is_diffeqsolve` and `test_every_solver` compare values and
gradients, solver by solver. Backwards they are compared with a closed form, since there diffrax itself is wrong for
stochastic Runge-Kutta solvers.
"""

import functools
from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_every_solver as every
from helpers.battery import CASES, levy_area_of

import sdeflow as sf

pytestmark = [pytest.mark.usefixtures("x64_module"), pytest.mark.slow]

KNOTS = np.linspace(0.0, 1.0, 9)
HALF = dfx.HalfSolver(dfx.EulerHeun())


def _half_equation(theta):
    drift = lambda t, y, args: -args * y + theta * jnp.sin(2 * t + y[::-1])
    return sf.SDE(drift, lambda t, y, args: 0.3 + 0.2 * jnp.cos(theta * y + args * t), interpretation="stratonovich")


def _tree():
    return dfx.VirtualBrownianTree(0.0, 1.0, 2.0**-7, (2,), key=jax.random.key(3))


def _half(ours):
    """States and gradients of half steps on a tree, which knows the halves."""

    def loss(y0, args, theta):
        if ours:
            ys = sf.solve(_half_equation(theta), y0, KNOTS, args=args, path=_tree(), solver=HALF).ys
        else:
            ys = dfx.diffeqsolve(
                _half_equation(theta).terms(_tree()), HALF, 0.0, 1.0, None, y0, args, max_steps=8,
                saveat=dfx.SaveAt(t0=True, steps=True), stepsize_controller=dfx.StepTo(jnp.asarray(KNOTS)),
            ).ys  # fmt: skip
        return (jnp.cos(jnp.arange(ys.size, dtype=ys.dtype)).reshape(ys.shape) * ys**2).sum(), ys

    start = (jnp.array([0.3, 0.7]), jnp.array(0.7), jnp.array(1.1))
    grads, ys = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*start)
    return ys, grads


def _solver(name) -> Any:
    if name == "HalfSolver-EulerHeun":
        return HALF
    return every.TABLE[name][0] if name in every.TABLE else CASES[name].solver


# ---- Backwards: y' = -y from 1 at t = 1 is e at t = 0, and back again. ----

# The order of each solver, which bounds its error on 40 steps; 0 where the closed form is another one.
ORDERS = {
    "Euler": 1, "Euler-operator": 1, "EulerHeun": 1, "ItoMilstein": 1, "StratonovichMilstein": 1, "SEA": 1,
    "ImplicitEuler": 1, "SemiImplicitEuler": 1, "DiagonalMilstein": 1, "HalfSolver-EulerHeun": 1, "Sil3": 2,
}  # fmt: skip
DECAY = ("KenCarp3", "KenCarp4", "KenCarp5", "Sil3")


def _decay(name, ts, y0):
    """The end of y' = -y on 40 steps in the direction of ``ts``, whatever terms the solver wants; None if none fit."""
    solver, kwargs = _solver(name), {"grid": sf.grids.through(ts, (ts[1] - ts[0]) / 40)}
    ode = dfx.ODETerm(lambda t, y, args: -y)
    if name in DECAY:
        half = dfx.ODETerm(lambda t, y, args: -y / 2)
        return sf.solve(dfx.MultiTerm(half, half), y0, ts, solver=solver, **kwargs).final
    stochastic = name in CASES and CASES[name].noise != "none" or name in ("DiagonalMilstein", "HalfSolver-EulerHeun")
    if not stochastic:
        return sf.solve(ode, y0, ts, solver=solver, **kwargs).final
    # A noise of no size: what is seen is the drift.
    quiet = sf.SDE(lambda t, y, args: -y, lambda t, y, args: jnp.zeros_like(y), additive=True)
    tree = dfx.VirtualBrownianTree(0.0, 1.0, 2.0**-9, (), key=jax.random.key(0), levy_area=levy_area_of(solver))
    return sf.solve(quiet, y0, ts, solver=solver, path=tree, **kwargs).final


def _linear_oscillator(name, ts, y0):
    """Friction 1, curvature 1, next to no noise: x(t) of x'' = -x - x' is known."""
    equation = sf.equations.UnderdampedLangevin(lambda x: (x**2).sum() / 2, friction=1.0, temperature=1e-24)
    area = dfx.SpaceTimeTimeLevyArea
    tree = dfx.VirtualBrownianTree(0.0, 1.0, 2.0**-9, y0[0].shape, key=jax.random.key(0), levy_area=area)
    grid = sf.grids.through(ts, (ts[1] - ts[0]) / 40)
    return sf.solve(equation, y0, ts, solver=_solver(name), path=tree, grid=grid).final


def _pendulum(ts, y0):
    """x' = v, v' = -x, whose first component is the cosine: split methods know no decay."""
    terms = (dfx.ODETerm(lambda t, v, args: v), dfx.ODETerm(lambda t, x, args: -x))
    grid = sf.grids.through(ts, (ts[1] - ts[0]) / 40)
    return sf.solve(terms, y0, ts, solver=dfx.SemiImplicitEuler(), grid=grid).final


def _oscillation(t):
    w = np.sqrt(3) / 2
    x = np.exp(-t / 2) * (np.cos(w * t) + np.sin(w * t) / (2 * w))
    v = -np.exp(-t / 2) * np.sin(w * t) / w
    return x, v


@functools.cache
def _backwards(name):
    """The relative errors at t = 0, and after the way back to t = 1."""
    if isinstance(_solver(name), dfx.AbstractFosterLangevinSRK):
        start = tuple(jnp.array([x]) for x in _oscillation(1.0))
        begin = _linear_oscillator(name, [1.0, 0.0], start)
        end = _linear_oscillator(name, [0.0, 1.0], begin)
        return tuple(
            max(float(np.abs(a[0] - b)) for a, b in zip(found, _oscillation(t))) for found, t in ((begin, 0), (end, 1))
        )
    if name == "SemiImplicitEuler":
        begin = _pendulum([1.0, 0.0], (jnp.cos(1.0), -jnp.sin(1.0)))
        end = _pendulum([0.0, 1.0], begin)
        return abs(float(begin[0]) - 1), abs(float(end[0]) / np.cos(1.0) - 1)
    begin = _decay(name, [1.0, 0.0], jnp.array(1.0))
    end = _decay(name, [0.0, 1.0], begin)
    return abs(float(begin) / np.e - 1), abs(float(end) - 1)


NAMES = [*CASES, *(n for n in every.TABLE if not n.endswith("-raw")), "HalfSolver-EulerHeun"]
# The pairs on which it rests that a walk is diffrax's own loop.
PAIRS = (
    "Euler", "Heun", "Midpoint", "EulerHeun", "ItoMilstein", "ReversibleHeun", "ReversibleHeun-ode", "ShARK", "SRA1",
    "SEA", "SPaRK", "GeneralShARK", "SlowRK", "HalfSolver-EulerHeun", "Tsit5", "Bosh3", "Dopri8", "LeapfrogMidpoint",
    "ImplicitEuler", "Kvaerno3", "Kvaerno5", "HalfSolver-Tsit5",
)  # fmt: skip
SPLIT = ("KenCarp3", "KenCarp4", "KenCarp5", "Sil3", "SemiImplicitEuler", "ALIGN", "ShOULD", "QUICSORT")


def test_the_table_of_all_solvers():
    assert len(PAIRS) == 22
    assert {*PAIRS, *SPLIT} <= set(NAMES)
    print(f"\n{'solver':22} {'t = 1 to 0':>11} {'and back':>9}")
    wrong = []
    for name in NAMES:
        there, back = _backwards(name)
        print(f"{name:22} {there:11.1e} {back:9.1e}")
        # 1/2 and 1/3 of h are the constants of orders one and two, with room for unstable ones.
        limit = {1: 2e-2, 2: 1e-3}[min(ORDERS.get(name, 2), 2)]
        if not (there <= limit and back <= 2 * limit):
            wrong.append(f"{name} is off backwards")
    assert not wrong


def test_half_steps_on_a_tree_have_values_and_gradients_of_diffeqsolve():
    (ys, grads), (ys_r, grads_r) = _half(True), _half(False)
    assert every._gap(ys, ys_r) <= 1e-12
    assert every._gap(grads, grads_r) <= 1e-12


@pytest.mark.parametrize("name", ["SRA1", "ShARK", "SPaRK", "SEA"])
def test_diffrax_itself_is_wrong_backwards_for_stochastic_runge_kutta_solvers(name):
    # As long as this holds, it is right that a walk does not mirror time.
    solver = _solver(name)
    tree = dfx.VirtualBrownianTree(0.0, 1.0, 2.0**-9, (), key=jax.random.key(0), levy_area=levy_area_of(solver))
    quiet = sf.SDE(lambda t, y, args: -y, lambda t, y, args: jnp.zeros_like(y), additive=True)
    sol = dfx.diffeqsolve(quiet.terms(tree), solver, 1.0, 0.0, -1 / 40, jnp.array(1.0))
    ours = _decay(name, [1.0, 0.0], jnp.array(1.0))
    print(f"{name}: e is 2.718, ours {float(ours):.3f}, diffrax's {float(sol.ys[0]):.3f}")
    assert abs(float(sol.ys[0]) - np.exp(-1)) < 0.03
    assert abs(float(ours) / np.e - 1) < 2e-2
