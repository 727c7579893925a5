"""One changed argument: ``adjoint=DiscreteAdjoint()`` in a user's own ``diffeqsolve`` gives diffrax's numbers.

Every way of saving, every kind of constant step, every path, both directions of time. The reference is the same call
with diffrax's forward mode, which takes every path.
"""

from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdeflow as sf

pytestmark = pytest.mark.usefixtures("x64_module")

OURS = sf.adjoints.DiscreteAdjoint()


def _drift(t, y, args):
    return -args * y + jnp.sin(3 * t + y[::-1])


def _diffusion(t, y, args):
    return 0.3 + 0.2 * jnp.cos(args * y + t)


def _tree(t0=0.0, t1=1.0, area=dfx.BrownianIncrement):
    return dfx.VirtualBrownianTree(min(t0, t1), max(t0, t1), 1e-4, (2,), jax.random.key(4), levy_area=area)


def _grid_path(t0=0.0, t1=1.0, dt0=0.125, area=dfx.BrownianIncrement):
    return sf.paths.GridBrownian(sf.grids.through([t0, t1], dt0), (2,), key=jax.random.key(4), levy_area=area)


def _unsafe():
    return dfx.UnsafeBrownianPath((2,), jax.random.key(4))


ODE = sf.ODE(_drift).terms()


def _sde(path):
    return sf.SDE(_drift, _diffusion, interpretation="stratonovich").terms(path)


class Call(NamedTuple):
    """The arguments of a ``diffeqsolve`` call."""

    terms: Any
    solver: Any
    t0: float = 0.0
    t1: float = 1.0
    dt0: float | None = 0.125
    saveat: Any = dfx.SaveAt(t1=True)
    controller: Any = dfx.ConstantStepSize()
    max_steps: int = 64


OFF, ON = np.array([0.03, 0.4, 0.41, 0.99]), np.array([0.0, 0.125, 0.5, 1.0])
KNOTS = np.array([0.0, 0.1, 0.15, 0.6, 1.0])
SUBS = {
    "ends": dfx.SubSaveAt(t0=True, t1=True, fn=lambda t, y, args: {"t": t, "y": y * args}),
    "some": (dfx.SubSaveAt(ts=OFF), dfx.SubSaveAt(steps=2, t1=True)),
}
# Made when they are needed, in the precision that is then in force.
CALLS = {
    "ode, the end": lambda: Call(ODE, dfx.Tsit5()),
    "ode, all steps and both ends": lambda: Call(ODE, dfx.Heun(), saveat=dfx.SaveAt(t0=True, t1=True, steps=True)),
    "ode, every third step": lambda: Call(ODE, dfx.Heun(), saveat=dfx.SaveAt(t0=True, t1=True, steps=3)),
    "ode, every second step and the end, saved once": lambda: Call(
        ODE, dfx.Euler(), saveat=dfx.SaveAt(t1=True, steps=2)
    ),
    "ode, times off the steps": lambda: Call(ODE, dfx.Tsit5(), saveat=dfx.SaveAt(ts=OFF)),
    "ode, times on the steps and both ends": lambda: Call(ODE, dfx.Bosh3(), saveat=dfx.SaveAt(t0=True, t1=True, ts=ON)),
    "ode, a tree of what to save": lambda: Call(ODE, dfx.Heun(), saveat=dfx.SaveAt(subs=SUBS)),
    "ode, a function of what to save": lambda: Call(
        ODE, dfx.Tsit5(), saveat=dfx.SaveAt(ts=OFF, fn=lambda t, y, args: t * y.sum() + args)
    ),
    "ode, steps that do not divide": lambda: Call(ODE, dfx.Tsit5(), dt0=0.3, saveat=dfx.SaveAt(ts=OFF, t1=True)),
    "ode, one step longer than the whole": lambda: Call(ODE, dfx.Heun(), dt0=2.0, saveat=dfx.SaveAt(ts=OFF, steps=0)),
    "ode, more steps than one chunk": lambda: Call(ODE, dfx.Euler(), dt0=0.021, saveat=dfx.SaveAt(ts=OFF, t0=True)),
    "ode, given steps": lambda: Call(
        ODE, dfx.Heun(), dt0=None, controller=dfx.StepTo(KNOTS), saveat=dfx.SaveAt(ts=OFF, t1=True)
    ),
    "ode, too few steps allowed, all steps": lambda: Call(
        ODE, dfx.Heun(), dt0=0.1, max_steps=4, saveat=dfx.SaveAt(t0=True, t1=True, steps=3)
    ),
    "ode, too few steps allowed, times": lambda: Call(
        ODE, dfx.Heun(), dt0=0.1, max_steps=4, saveat=dfx.SaveAt(t0=True, t1=True, ts=OFF)
    ),
    "ode, too few given steps": lambda: Call(
        ODE, dfx.Heun(), dt0=None, controller=dfx.StepTo(KNOTS), max_steps=2, saveat=dfx.SaveAt(ts=OFF, t1=True)
    ),
    "ode backwards, times": lambda: Call(
        ODE, dfx.Tsit5(), 1.0, 0.0, -0.15, saveat=dfx.SaveAt(t0=True, ts=OFF[::-1], fn=lambda t, y, args: t * y)
    ),
    "ode backwards, given steps": lambda: Call(
        ODE, dfx.Heun(), 1.0, 0.0, None, controller=dfx.StepTo(KNOTS[::-1]), saveat=dfx.SaveAt(steps=2, t1=True)
    ),
    "ode, history": lambda: Call(ODE, dfx.LeapfrogMidpoint(), saveat=dfx.SaveAt(ts=OFF, t1=True, solver_state=True)),
    "sde on a tree": lambda: Call(_sde(_tree()), dfx.Heun(), dt0=0.3, saveat=dfx.SaveAt(ts=OFF, t1=True)),
    "sde on a tree, areas": lambda: Call(_sde(_tree(area=dfx.SpaceTimeLevyArea)), dfx.SPaRK(), dt0=0.3),
    "sde on a grid": lambda: Call(_sde(_grid_path()), dfx.EulerHeun(), saveat=dfx.SaveAt(t0=True, steps=True)),
    "sde on a grid, times off": lambda: Call(_sde(_grid_path()), dfx.ReversibleHeun(), saveat=dfx.SaveAt(ts=OFF)),
    "sde on an unsafe path": lambda: Call(_sde(_unsafe()), dfx.Heun(), saveat=dfx.SaveAt(ts=ON, t1=True)),
    "sde, given steps on a tree": lambda: Call(
        _sde(_tree()), dfx.Midpoint(), dt0=None, controller=dfx.StepTo(KNOTS), saveat=dfx.SaveAt(steps=True)
    ),
    "sde backwards on a tree": lambda: Call(
        _sde(_tree(1.0, 0.0)), dfx.ReversibleHeun(), 1.0, 0.0, -0.125, saveat=dfx.SaveAt(ts=OFF[::-1])
    ),
    "sde backwards on a grid": lambda: Call(
        _sde(_grid_path(1.0, 0.0, -0.125)), dfx.EulerHeun(), 1.0, 0.0, -0.125, saveat=dfx.SaveAt(steps=True)
    ),
    "sde backwards on an unsafe path": lambda: Call(_sde(_unsafe()), dfx.EulerHeun(), 1.0, 0.0, -0.125),
    "negative times": lambda: Call(ODE, dfx.Tsit5(), -2.0, -1.0, 0.3, saveat=dfx.SaveAt(ts=OFF - 2.0, t1=True)),
    "no time at all": lambda: Call(ODE, dfx.Tsit5(), 0.5, 0.5, 0.3, saveat=dfx.SaveAt(t0=True, t1=True)),
    "no time at all, times": lambda: Call(ODE, dfx.Tsit5(), 0.5, 0.5, 0.3, saveat=dfx.SaveAt(ts=np.full(2, 0.5))),
}
DEFAULT = {
    "ode, a tree of what to save",
    "ode, more steps than one chunk",
    "ode, too few steps allowed, times",
    "ode backwards, times",
    "sde on a tree",
    "sde on a grid",
    "sde backwards on an unsafe path",
    "no time at all, times",
}
GRADIENTS = {
    "ode, times off the steps": False,
    "ode, too few steps allowed, times": False,
    "ode backwards, times": True,
    "sde on a tree": False,
    "sde on an unsafe path": True,
    "sde backwards on a grid": False,
}


def _mark(name, default):
    return name if default else pytest.param(name, marks=pytest.mark.slow)


def _call(call, y0, args, adjoint):
    return dfx.diffeqsolve(
        call.terms,
        call.solver,
        call.t0,
        call.t1,
        call.dt0,
        y0,
        args,
        saveat=call.saveat,
        stepsize_controller=call.controller,
        max_steps=call.max_steps,
        throw=False,
        adjoint=adjoint,
    )


Y0, ARGS = np.array([0.3, 0.7]), np.array(0.8)


@pytest.mark.parametrize("name", [_mark(name, name in DEFAULT) for name in CALLS])
def test_everything_saved_is_what_diffrax_saves(name):
    call = CALLS[name]()
    theirs, ours = (
        eqx.filter_jit(lambda y0, args, a=adjoint: _call(call, y0, args, a))(jnp.asarray(Y0), jnp.asarray(ARGS))
        for adjoint in (dfx.ForwardMode(), OURS)
    )
    assert ours.result == theirs.result
    short = call.max_steps < 10
    assert (theirs.result == dfx.RESULTS.max_steps_reached) == short
    assert ours.stats.keys() == theirs.stats.keys()
    for k in ("num_steps", "num_accepted_steps", "num_rejected_steps"):
        assert int(ours.stats[k]) == int(theirs.stats[k])
    pairs = list(
        zip(
            jax.tree.leaves((ours.ts, ours.ys, ours.solver_state)),
            jax.tree.leaves((theirs.ts, theirs.ys, theirs.solver_state)),
        )
    )
    assert pairs
    for mine, wanted in pairs:
        assert mine.dtype == wanted.dtype
        # Infinities mark what was not reached, and must stand at the same places.
        np.testing.assert_allclose(mine, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", [_mark(*item) for item in GRADIENTS.items()])
def test_gradients_of_everything_saved_are_those_of_diffrax(name):
    call = CALLS[name]()

    def scalar(y0, args, adjoint):
        leaves = jax.tree.leaves(_call(call, y0, args, adjoint).ys)
        kept = [jnp.where(jnp.isfinite(x), x, 0.0) for x in leaves]
        return sum((jnp.cos(jnp.arange(x.size)).reshape(x.shape) * x**2).sum() for x in kept)

    ours = jax.jit(jax.grad(lambda y0, args: scalar(y0, args, OURS), argnums=(0, 1)))(Y0, ARGS)
    theirs = jax.jit(jax.jacfwd(lambda y0, args: scalar(y0, args, dfx.ForwardMode()), argnums=(0, 1)))(Y0, ARGS)
    for mine, wanted in zip(ours, theirs):
        np.testing.assert_allclose(mine, wanted, rtol=1e-11)
        assert np.abs(wanted).min() > 1e-3


@pytest.mark.slow
def test_gradients_in_the_ends_of_time_and_the_step_are_those_of_diffrax():
    def final(ends, adjoint):
        sol = dfx.diffeqsolve(ODE, dfx.Heun(), ends[0], ends[1], ends[2], jnp.asarray(Y0), 0.8, adjoint=adjoint)
        return sol.ys[-1].sum()

    ends = jnp.array([0.1, 1.0, 0.25])
    ours = jax.jit(jax.grad(lambda e: final(e, OURS)))(ends)
    theirs = jax.jit(jax.jacfwd(lambda e: final(e, dfx.ForwardMode())))(ends)
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)
    assert np.abs(theirs).min() > 1e-4


@pytest.mark.slow
def test_a_batch_of_steps_and_starts_under_vmap():
    def final(y0, dt0, adjoint):
        sol = dfx.diffeqsolve(
            ODE, dfx.Heun(), 0.0, 1.0, dt0, y0, 0.8, adjoint=adjoint, max_steps=64, saveat=dfx.SaveAt(ts=OFF)
        )
        return sol.ys

    y0s, dt0s = jnp.stack([Y0, 2 * Y0, -Y0]), jnp.array([0.1, 0.3, 0.05])
    ours = jax.jit(jax.vmap(lambda y, h: final(y, h, OURS)))(y0s, dt0s)
    theirs = jax.jit(jax.vmap(lambda y, h: final(y, h, dfx.DirectAdjoint())))(y0s, dt0s)
    np.testing.assert_allclose(ours, theirs, rtol=1e-12)


_OFF_GRID = {
    "half steps": (OURS, dfx.HalfSolver(dfx.EulerHeun()), (0.0, 1.0, 0.125)),
    "finer steps": (OURS, dfx.EulerHeun(), (0.0, 1.0, 0.0625)),
    "steps that do not divide": (OURS, dfx.EulerHeun(), (0.0, 1.0, 0.17)),
    "shifted by half a step": (OURS, dfx.EulerHeun(), (0.0625, 1.0625, 0.125)),
    "another interval": (OURS, dfx.EulerHeun(), (1.0, 2.0, 0.125)),
    "finer steps, diffrax's adjoint": (dfx.ForwardMode(), dfx.EulerHeun(), (0.0, 1.0, 0.0625)),
    "half steps, diffrax's adjoint": (dfx.ForwardMode(), dfx.HalfSolver(dfx.EulerHeun()), (0.0, 1.0, 0.125)),
}


_OFTEN = ("half steps", "steps that do not divide", "finer steps, diffrax's adjoint")


@pytest.mark.parametrize(
    ("adjoint", "solver", "times"),
    [pytest.param(*v, id=k, marks=[] if k in _OFTEN else pytest.mark.slow) for k, v in _OFF_GRID.items()],
)
def test_steps_that_are_not_those_of_the_grid_are_never_a_silent_number(adjoint, solver, times):
    run = jax.jit(lambda y0, args: _call(Call(_sde(_grid_path()), solver, *times), y0, args, adjoint))
    sol = run(jnp.asarray(Y0), ARGS)
    assert np.isnan(sol.ys).all()
    if adjoint is OURS:
        assert not bool(dfx.is_okay(sol.result))


@pytest.mark.slow
def test_what_cannot_be_walked_goes_on_as_diffrax_has_it():
    # Dense output, events, and a solve that is resumed after a jump.
    run = lambda adjoint, **kw: dfx.diffeqsolve(
        ODE, dfx.Heun(), 0.0, 1.0, 0.3, jnp.asarray(Y0), 0.8, adjoint=adjoint, **kw
    )
    ours, theirs = (
        run(a, saveat=dfx.SaveAt(dense=True)).evaluate(0.37) for a in (OURS, dfx.RecursiveCheckpointAdjoint())
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-14)
    event = dfx.Event(lambda t, y, args, **kw: y[0] > 0.5)
    ours, theirs = (run(a, event=event) for a in (OURS, dfx.RecursiveCheckpointAdjoint()))
    assert ours.result == theirs.result == dfx.RESULTS.event_occurred
    np.testing.assert_allclose(ours.ys, theirs.ys, rtol=1e-14)
    ours, theirs = (
        dfx.diffeqsolve(ODE, dfx.LeapfrogMidpoint(), 0.0, 1.0, 0.3, jnp.asarray(Y0), 0.8, adjoint=a, made_jump=True).ys
        for a in (OURS, dfx.RecursiveCheckpointAdjoint())
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-14)


@pytest.mark.slow
def test_resuming_with_the_solver_state_equals_diffrax():
    solver = dfx.LeapfrogMidpoint()

    def run(adjoint):
        first = dfx.diffeqsolve(
            ODE,
            solver,
            0.0,
            0.5,
            0.125,
            jnp.asarray(Y0),
            0.8,
            saveat=dfx.SaveAt(t1=True, solver_state=True),
            adjoint=adjoint,
        )
        second = dfx.diffeqsolve(
            ODE, solver, 0.5, 1.0, 0.125, first.ys[-1], 0.8, solver_state=first.solver_state, adjoint=adjoint
        )
        return second.ys

    np.testing.assert_allclose(run(OURS), run(dfx.RecursiveCheckpointAdjoint()), rtol=1e-13)
