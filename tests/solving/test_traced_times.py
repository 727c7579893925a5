"""Traced times and grids that do not fit are a failed result, without a callback; those that fit change no number."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdeflow as sf

DECAY = sf.ODE(lambda t, y, args: -y)
PID = dfx.PIDController(rtol=1e-3, atol=1e-6)
KEY = jax.random.key(0)
Y = jnp.array([1.0, 0.5])
OU = sf.equations.OrnsteinUhlenbeck(1.0, 0.0, 0.5)
TS = np.float32([0.0, 0.25, 0.5, 1.0])
GRID = sf.grids.through(TS, 0.125, num_steps=11)
PATH = sf.paths.GridBrownian(GRID, (2,), key=KEY)
HOW = {
    "steps per interval": lambda ts: sf.solve(DECAY, Y, ts, steps_per_interval=3),
    "one step an interval": lambda ts: sf.solve(DECAY, Y, ts, solver=dfx.Heun()),
    "noise": lambda ts: sf.solve(OU, Y, ts, steps_per_interval=3, key=KEY),
    "adaptive": lambda ts: sf.solve(DECAY, Y, ts, solver=dfx.Tsit5(), stepsize_controller=PID),
    "adaptive with a first step": lambda ts: sf.solve(
        DECAY, Y, ts, dt0=jnp.where(ts[0] < ts[-1], 0.1, -0.1), solver=dfx.Tsit5(), stepsize_controller=PID
    ),
    "diffrax's adjoint": lambda ts: sf.solve(
        DECAY, Y, ts, steps_per_interval=3, solver=dfx.Heun(), adjoint=dfx.RecursiveCheckpointAdjoint()
    ),
}
GRIDDED = {
    "a known grid": lambda ts: sf.solve(DECAY, Y, ts, grid=GRID),
    "the grid of a path": lambda ts: sf.solve(OU, Y, ts, path=PATH, solver=dfx.Euler()),
}
# Not one of these may look like a solution.
BAD = {
    "not sorted": [0.0, 0.5, 0.25, 1.0],
    "turning back at the end": [0.0, 0.25, 1.0, 0.5],
    "falling, then rising": [1.0, 0.25, 0.5, 0.0],
    "a repeat inside": [0.0, 0.5, 0.5, 1.0],
    "a repeat at the start": [0.0, 0.0, 0.5, 1.0],
    "NaN": [0.0, jnp.nan, 0.5, 1.0],
    "NaN at the end": [0.0, 0.25, 0.5, jnp.nan],
    "infinity": [0.0, 0.25, 0.5, jnp.inf],
    "too close for float32": [1e5, 1e5 + 0.04, 1e5 + 0.08, 1e5 + 0.12],
}
GOOD = {
    "rising": TS,
    "falling": TS[::-1],
    "padded": np.float32([0.0, 0.25, 1.0, 1.0]),
    "padding alone": np.float32([0.5, 0.5, 0.5, 0.5]),
    "two that lie close": np.float32([0.0, 0.5, 0.5000002, 1.0]),
}
HEAVY = ("adaptive with a first step", "diffrax's adjoint")


def _known(name, ts):
    """What the program gives when the times are known: without their padding, it then being repeated."""
    kept = ts[: 1 + np.flatnonzero(np.diff(ts))[-1] + 1] if len(set(ts.tolist())) > 1 else ts[:1]
    ys = HOW[name](kept).ys
    return np.concatenate([ys, np.repeat(ys[-1:], len(ts) - len(kept), axis=0)])


_JITTED = {name: jax.jit(run) for name, run in (HOW | GRIDDED).items()}


def _fails(sol):
    assert sol.result == sf.RESULTS.bad_times
    assert not bool(sf.is_okay(sol.result))
    assert np.isnan(sol.ys).all()
    assert np.isnan(sol.final).all()


def _marked(names, heavy):
    return [pytest.param(name, marks=pytest.mark.slow if name in heavy else []) for name in names]


@pytest.mark.parametrize("how", _marked(HOW, HEAVY))
def test_traced_times_that_are_not_monotone_are_a_failed_result(how):
    for ts in BAD.values():
        _fails(_JITTED[how](jnp.array(ts, jnp.float32)))


@pytest.mark.parametrize("how", _marked([name for name in HOW if name != "diffrax's adjoint"], ("adaptive", *HEAVY)))
def test_traced_times_that_fit_give_the_numbers_of_known_ones(how):
    for name, ts in GOOD.items():
        sol = _JITTED[how](jnp.array(ts))
        assert sol.result == sf.RESULTS.successful, name
        # Known times that lie so close are refused.
        if "close" in name:
            np.testing.assert_allclose(sol.ys[1], sol.ys[2], rtol=1e-2)
        elif how != "noise" or "padding" not in name:
            known = _known(how, ts)
            # The steps between times are float32 where these are traced and rounded from float64 where they are known:
            # a component that passes near 0 keeps the rounding of what it was.
            rounding = 4 * np.finfo(np.float32).eps * np.abs(known).max()
            np.testing.assert_allclose(sol.ys, known, rtol=1e-5, atol=rounding, err_msg=name)


@pytest.mark.parametrize("how", GRIDDED)
def test_traced_times_that_are_not_those_of_the_grid_are_a_failed_result(how):
    fine = _JITTED[how](jnp.array(TS))
    assert fine.result == sf.RESULTS.successful
    np.testing.assert_array_equal(fine.ys, GRIDDED[how](TS).ys)
    for ts in [*BAD.values(), TS + 0.01, TS * 2, TS[::-1], [0.0, 0.25, 0.51, 1.0]]:
        _fails(_JITTED[how](jnp.array(ts, jnp.float32)))


def _walk(left, right, live, save, ts):
    return sf.solve(DECAY, Y, ts, grid=sf.grids.Grid(left, right, live, save))


def test_a_traced_grid_that_does_not_fit_is_a_failed_result():
    run = jax.jit(_walk)
    arrays = (
        *(jnp.asarray(x, jnp.float32) for x in (GRID.left, GRID.right)),
        jnp.array(GRID.live),
        jnp.array(GRID.save),
    )
    fine = run(*arrays, TS)
    assert fine.result == sf.RESULTS.successful
    np.testing.assert_allclose(fine.ys, sf.solve(DECAY, Y, TS, grid=GRID).ys, rtol=1e-6)
    left, right, live, save = arrays
    _fails(run(left + 0.5, right + 0.5, live, save, TS))
    _fails(run(left.at[2].add(0.05), right, live, save, TS))
    _fails(run(left, right.at[3].set(jnp.nan), live, save, TS))
    _fails(run(right, left, live, save, TS))
    _fails(run(left, right, live.at[2].set(False), save, TS))
    _fails(run(left, right, live[::-1], save, TS))
    _fails(run(left, right, live, save.at[1].set(3), TS))
    _fails(run(left, right, live, save.at[-1].set(7), TS))
    _fails(run(left, right, live, save, TS * 1.1))
    _fails(run(left, right, live, save, TS[::-1]))
    _fails(run(left + 1e6, right + 1e6, live, save, TS + 1e6))


def test_a_grid_of_a_batch_that_ends_early_is_padding_and_no_failure():
    grids = sf.grids.stack([sf.grids.through(TS, 0.125), sf.grids.through(TS[:3], 0.25)])
    times = jnp.stack([TS, np.append(TS[:3], TS[2])])
    sol = jax.jit(jax.vmap(lambda grid, ts: sf.solve(DECAY, Y, ts, grid=grid)))(grids, times)
    assert np.asarray(sf.is_okay(sol.result)).all()
    np.testing.assert_allclose(sol.final, np.exp(-times[:, -1:]) * Y, rtol=1e-4)


def test_in_a_batch_only_the_path_with_bad_times_fails():
    times = jnp.array([TS, BAD["not sorted"], TS])
    run = lambda y, ts: sf.solve(DECAY, y, ts, steps_per_interval=3)
    sol = jax.jit(jax.vmap(run, in_axes=(None, 0)))(Y, times)
    assert np.asarray(sf.is_okay(sol.result)).tolist() == [True, False, True]
    assert np.isnan(sol.final[1]).all()
    np.testing.assert_allclose(sol.final[::2], np.exp(-1) * np.stack([Y, Y]), rtol=1e-4)
    # A loss that leaves the failed path out has a gradient.
    loss = lambda y: jnp.where(sol.result == sf.RESULTS.successful, jax.vmap(run, (None, 0))(y, times).final.sum(1), 0)
    assert np.isfinite(jax.jit(jax.grad(lambda y: loss(y).sum()))(Y)).all()


@pytest.mark.slow
def test_a_stochastic_runge_kutta_solver_that_diffrax_runs_backwards_is_a_failed_result():
    noise = sf.SDE(lambda t, y, args: -y, lambda t, y, args: jnp.ones_like(y), additive=True)
    run = jax.jit(
        lambda ts: sf.solve(
            noise, Y, ts, steps_per_interval=2, key=KEY, solver=dfx.ShARK(), adjoint=dfx.RecursiveCheckpointAdjoint()
        )
    )
    assert run(jnp.array([0.0, 1.0])).result == sf.RESULTS.successful
    _fails(run(jnp.array([1.0, 0.0])))


@pytest.mark.parametrize("how", ["steps per interval", "noise", *GRIDDED])
def test_the_checks_call_nothing_back(how):
    assert "callback" not in _JITTED[how].lower(jnp.array(TS)).as_text()


def test_the_sentence_says_what_and_what_to_do():
    sentence = sf.RESULTS[sf.RESULTS.bad_times]
    for words in ("not strictly monotone", "not those of the grid", "Sort or rescale ts", "sf.grids.through"):
        assert words in sentence


def test_check_raises_it_inside_of_a_trace():
    run = jax.jit(lambda ts: sf.check(sf.solve(DECAY, Y, ts, steps_per_interval=3)).final)
    with pytest.raises(Exception, match="traced times do not fit"):
        jax.block_until_ready(run(jnp.array(BAD["not sorted"])))


# Inside jit an entry of an array of JAX is traced even where the array is not.
@pytest.mark.parametrize("name", ["fixed", "raw terms", "adaptive"])
def test_known_times_may_be_arrays_of_jax_inside_jit(name):
    more = {"stepsize_controller": PID} if name == "adaptive" else {}
    equation = dfx.ODETerm(lambda t, y, args: -y) if name == "raw terms" else DECAY
    run = lambda ts: lambda y: sf.solve(equation, y, ts, dt0=0.1, solver=dfx.Heun(), **more).ys
    np.testing.assert_array_equal(jax.jit(run(jnp.asarray(TS)))(Y), jax.jit(run(TS))(Y))
