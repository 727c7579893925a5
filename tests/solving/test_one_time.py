"""A solve at one time, where nothing moves: the start is the solution, and its derivative is the identity."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdeflow as sf

KEY = jax.random.key(0)
DECAY = sf.ODE(lambda t, y, args: -y)
OU = sf.equations.OrnsteinUhlenbeck(1.0, 0.0, 0.5)
PID = dfx.PIDController(rtol=1e-3, atol=1e-6)
TREE = dfx.VirtualBrownianTree(0.0, 1.0, 1e-3, (2,), key=KEY)
Y = jnp.array([0.3, -2.0])
KINDS = {
    "the default of an ordinary equation": lambda y, ts: sf.solve(DECAY, y, ts),
    "fixed steps": lambda y, ts: sf.solve(DECAY, y, ts, dt0=0.1),
    "steps per interval": lambda y, ts: sf.solve(DECAY, y, ts, steps_per_interval=3),
    "a solver alone": lambda y, ts: sf.solve(DECAY, y, ts, solver=dfx.Heun()),
    "adaptive steps": lambda y, ts: sf.solve(DECAY, y, ts, stepsize_controller=PID, dt0=0.1),
    "noise of a key": lambda y, ts: sf.solve(OU, y, ts, dt0=0.1, key=KEY),
    "noise of a path": lambda y, ts: sf.solve(OU, y, ts, dt0=0.1, path=TREE, solver=dfx.Euler()),
    "adaptive noise": lambda y, ts: sf.solve(OU, y, ts, dt0=0.1, key=KEY, stepsize_controller=PID),
    "raw terms": lambda y, ts: sf.solve(dfx.ODETerm(lambda t, y, a: -y), y, ts, dt0=0.1, solver=dfx.Euler()),
    "an adjoint of diffrax": lambda y, ts: sf.solve(DECAY, y, ts, dt0=0.1, adjoint=dfx.RecursiveCheckpointAdjoint()),
}


def _check(sol):
    assert sol.result == sf.RESULTS.successful
    assert int(sol.stats["num_steps"]) == int(sol.stats["nfe"]) == 0
    np.testing.assert_array_equal(sol.ts, np.float32([0.5]))
    np.testing.assert_array_equal(sol.ys, Y[None])
    np.testing.assert_array_equal(sol.final, Y)


@pytest.mark.parametrize("name", KINDS)
def test_one_time_gives_the_start(name):
    _check(KINDS[name](Y, [0.5]))
    _check(jax.jit(lambda y: KINDS[name](y, np.array([0.5])))(Y))
    _check(jax.jit(KINDS[name])(Y, jnp.array([0.5])))


@pytest.mark.parametrize("name", ["fixed steps", "adaptive steps", "noise of a key"])
def test_the_derivative_in_the_start_is_the_identity(name):
    run = lambda y: (lambda sol: (sol.ys[0], sol.final))(KINDS[name](y, np.array([0.5])))
    for derivative in (jax.jacrev, jax.jacfwd):
        for jacobian in derivative(run)(Y):
            np.testing.assert_array_equal(jacobian, np.eye(2))


def test_what_is_saved_goes_through_save_fn():
    sol = sf.solve(DECAY, Y, [0.5], dt0=0.1, args=2.0, save_fn=lambda t, y, args: {"sum": args * y.sum() + t, "t": t})
    np.testing.assert_allclose(sol.ys["sum"], [2 * Y.sum() + 0.5])
    np.testing.assert_array_equal(sol.ys["t"], [0.5])
    np.testing.assert_array_equal(sol.final, Y)


def test_a_start_that_is_not_finite_and_a_traced_time_that_is_not_are_failures():
    with pytest.raises(sf.SolveError, match="at none of the requested times"):
        sf.solve(DECAY, jnp.array([jnp.nan, 1.0]), [0.5], dt0=0.1)
    sol = jax.jit(lambda ts: sf.solve(DECAY, Y, ts, dt0=0.1))(jnp.array([jnp.nan]))
    assert sol.result == sf.RESULTS.bad_times
    assert np.isnan(sol.final).all()


def test_the_field_is_checked_all_the_same():
    with pytest.raises(ValueError, match="sdeflow never broadcasts"):
        sf.solve(sf.ODE(lambda t, y, args: -y[:1]), Y, [0.5], dt0=0.1)


def test_it_says_so_when_printed():
    text = repr(sf.solve(DECAY, Y, [0.5], dt0=0.1))
    assert "Solution (okay)" in text
    assert "ts: 1 time, 0.5" in text
    assert "cost: 0 steps, 0 drift evaluations" in text


def test_a_batch_of_times_under_vmap():
    sol = jax.vmap(lambda y, ts: sf.solve(DECAY, y, ts, dt0=0.1))(jnp.stack([Y, 2 * Y]), jnp.array([[0.5], [0.7]]))
    assert np.asarray(sf.is_okay(sol.result)).all()
    np.testing.assert_array_equal(sol.ys[:, 0], jnp.stack([Y, 2 * Y]))
