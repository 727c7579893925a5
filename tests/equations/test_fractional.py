"""Equations driven by fractional noise, as users solve them; float32 throughout."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from helpers.stats import assert_mean

import sdeflow as sf
from sdeflow.equations import FractionalSDE, FractionalState

Noise = sf.paths.MarkovFractionalNoise
KEY = jax.random.key(0)
decay = lambda t, x, args: -x
growing = lambda t, x, args: 0.5 * x
constant = lambda t, x, args: jnp.ones_like(x)


def equation(kind="I", diffusion=growing, **options):
    return FractionalSDE(decay, diffusion, Noise(0.3, 1.0, kind=kind), **options)


def test_what_is_saved_is_the_state_and_the_memory_is_at_the_end():
    sol = sf.solve(equation(), jnp.ones(2), [0.0, 0.5, 1.0], dt0=0.1, key=KEY)
    assert sol.ys.shape == (3, 2)
    assert isinstance(sol.final, FractionalState)
    np.testing.assert_array_equal(sol.final.x, sol.ys[-1])
    assert sol.final.factors.shape == (6, 2)
    assert "ExponentialHeun" in repr(sol)
    saved = sf.solve(equation(), jnp.ones(2), [0.0, 0.5, 1.0], dt0=0.1, key=KEY, save_fn=lambda t, x, args: 2 * x.sum())
    np.testing.assert_allclose(saved.ys, 2 * sol.ys.sum(axis=1), rtol=1e-6)


def test_a_solve_goes_on_from_its_end():
    sde, grid = equation(), sf.grids.uniform(0.0, 1.0, 16)
    path, start = sde.noise.path(grid, (2,), key=KEY), sde.start(jnp.ones(2), key=KEY)
    run = lambda y, ts: sf.solve(sde, y, ts, path=path, dt0=1 / 16)
    middle = run(start, [0.0, 0.5])
    np.testing.assert_allclose(run(middle.final, [0.5, 1.0]).ys[-1], run(start, [0.0, 1.0]).ys[-1], rtol=1e-5)


def test_any_diffrax_solver_of_the_right_calculus():
    sde, keys = equation("II"), jax.random.split(KEY, 64)

    def run(sde, solver):
        solve = lambda key: sf.solve(sde, jnp.ones(2), [0.0, 1.0], dt0=1 / 1024, key=key, solver=solver).ys[-1]
        return np.asarray(jax.jit(jax.vmap(solve))(keys))

    heun, euler = run(sde, dfx.Heun()), run(sde.to_ito(elementwise=True), dfx.Euler())
    # The same Brownian motion drives both; Euler is of strong order 1/2 with a large coefficient.
    assert np.abs(heun - euler).mean() < 0.03
    assert np.corrcoef(heun.ravel(), euler.ravel())[0, 1] > 0.98


def test_matrices_trees_and_batches():
    loading = jnp.array([[1.0], [-2.0]])
    sde = equation(diffusion=lambda t, x, args: lx.MatrixLinearOperator(loading), additive=True)
    sol = sf.solve(sde, jnp.zeros(2), [0.0, 1.0], dt0=0.1, key=KEY)
    assert sol.final.factors.shape == (6, 1)
    np.testing.assert_allclose(sol.ys[-1][1], -2 * sol.ys[-1][0], rtol=1e-5)
    tree = {"a": jnp.ones(2), "b": jnp.ones(())}
    ones = FractionalSDE(
        lambda t, x, args: jax.tree.map(jnp.negative, x),
        lambda t, x, args: jax.tree.map(jnp.ones_like, x),
        Noise(0.7, 1.0),
    )
    sol = sf.solve(ones, tree, [0.0, 1.0], dt0=0.1, key=KEY)
    assert sol.final.factors["a"].shape == (6, 2)
    assert sol.ys["b"].shape == (2,)
    keys = jax.random.split(KEY, 8)
    batch = jax.vmap(lambda k: sf.solve(equation(), jnp.ones(2), [0.0, 1.0], dt0=0.1, key=k).ys[-1])(keys)
    one = sf.solve(equation(), jnp.ones(2), [0.0, 1.0], dt0=0.1, key=keys[3]).ys[-1]
    np.testing.assert_allclose(batch[3], one, rtol=1e-5)


def test_dimensions_are_independent_and_the_long_past_is_drawn_apart_from_the_steps():
    noise = Noise(0.7, 1.0)
    sde = FractionalSDE(lambda t, x, args: 0 * x, constant, noise, additive=True)
    keys = jax.random.split(KEY, 8 * 250)
    final = jax.jit(jax.vmap(lambda k: sf.solve(sde, jnp.zeros(2), [0.0, 1.0], dt0=0.1, key=k).final))(keys)
    assert_mean(final.x[:, 0] * final.x[:, 1], 0.0)
    assert_mean(final.x**2, float(noise.covariance(1.0, 1.0)))
    # The factors stay stationary; the slowest needs its exact start for that.
    np.testing.assert_allclose(
        np.var(final.factors[:, 1:], axis=(0, 2)) * 2 * noise.rates[1:], 1, atol=5 * np.sqrt(2 / 4000)
    )


def test_a_control_pushes_the_noise_and_is_paid_for():
    push = lambda t, state, args: jnp.full(2, 0.7, jnp.float32)
    pushed = FractionalSDE(lambda t, x, args: 0 * x, constant, Noise(0.5, 1.0), control=push, additive=True)
    free = FractionalSDE(lambda t, x, args: 0 * x, constant, Noise(0.5, 1.0), additive=True)
    run = lambda sde, **options: sf.solve(sde, jnp.zeros(2), [0.0, 1.0], dt0=0.002, key=KEY, **options)
    sol = run(pushed)
    # With H = 1/2 the noise is Brownian motion, so the control is a drift.
    np.testing.assert_allclose(sol.ys[-1] - run(free).ys[-1], 0.7, atol=1e-4)
    assert sol.final.path_kl == pytest.approx(0.49, rel=1e-4)
    # As ordinary terms: what the noise has done is int u . dW / u = W.
    ordinary = run(pushed, solver=dfx.Heun())
    assert ordinary.final.path_kl == pytest.approx(0.49, rel=1e-4)
    np.testing.assert_allclose(ordinary.ys[-1].sum() - 1.4, ordinary.final.martingale / 0.7, atol=1e-3)


def test_a_past_is_paid_for_with_and_without_a_control():
    law = sf.paths.FactorLaw(jnp.full((6, 2), 0.5), jnp.zeros((6, 2)))
    run = lambda sde, **options: sf.solve(sde, jnp.ones(2), [0.0, 1.0], **{"dt0": 0.1, "key": KEY, **options}).final
    final = run(equation(past=law))
    assert float(final.path_kl) == pytest.approx(1.5, rel=1e-6)
    by_args = equation(past=lambda t, x, args: args, control=lambda t, y, args: jnp.full(2, 0.7, jnp.float32))
    assert float(run(by_args, args=law).path_kl) == pytest.approx(1.5 + 0.49, rel=1e-5)
    ordinary = run(equation(past=law), dt0=1 / 1024, solver=dfx.Heun())
    assert float(ordinary.path_kl) == pytest.approx(1.5, rel=1e-6)
    assert float(ordinary.martingale) == float(final.martingale) != 0
    with pytest.raises(ValueError, match="has no past"):
        equation("II", past=law)
    with pytest.raises(TypeError, match="past must be"):
        equation(past=0.5)


def test_bad_input():
    sde = equation()
    run = lambda sde, ts=(0.0, 1.0), **options: sf.solve(
        sde, jnp.ones(2), list(ts), **{"dt0": 0.1, "key": KEY, **options}
    )
    with pytest.raises(ValueError, match="horizon that covers"):
        run(sde, (0.0, 1.5))
    with pytest.raises(ValueError, match="backwards in time"):
        run(sde, (1.0, 0.0), dt0=-0.1)
    with pytest.raises(ValueError, match="explicit steps are wrong"):
        run(sde, solver=dfx.Heun())
    with pytest.raises(ValueError, match="to_ito"):
        run(sde, dt0=0.001, solver=dfx.Euler())
    with pytest.raises(ValueError, match="ExponentialHeun takes terms of its own kind"):
        run(sde, regularisers=(sf.regularisers.Kinetic(),))
    path = sde.noise.path(sf.grids.uniform(0.0, 1.0, 4), (2,), key=KEY)
    with pytest.raises(ValueError, match="start at random"):
        run(sde, key=None, dt0=None, path=path)
    with pytest.raises(TypeError, match="noise must be"):
        FractionalSDE(decay, growing, sf.paths.GridBrownian(sf.grids.uniform(0.0, 1.0, 4), (2,), key=KEY))
    with pytest.raises(TypeError, match="must be callable"):
        FractionalSDE(decay, 0.5, Noise(0.3, 1.0))
    with pytest.raises(ValueError, match="The drift must return the state's shape"):
        run(FractionalSDE(lambda t, x, args: x.sum(), growing, Noise(0.3, 1.0)))
    with pytest.raises(ValueError, match="The control must return"):
        run(equation(control=lambda t, y, args: jnp.zeros(3)))


def test_what_is_traced_and_does_not_fit_fails():
    run = jax.jit(lambda ts: sf.solve(equation(), jnp.ones(2), ts, steps_per_interval=4, key=KEY).result)
    assert sf.is_okay(run(jnp.array([0.0, 1.0])))
    # Known times are known inside of a trace too.
    known = jnp.array([0.0, 1.5])
    with pytest.raises(ValueError, match="horizon that covers"):
        jax.jit(lambda x: sf.solve(equation(), x, known, steps_per_interval=4, key=KEY).ys)(jnp.ones(2))
    assert not sf.is_okay(run(jnp.array([0.0, 1.5])))
    stiff = jax.jit(
        lambda ts: sf.solve(equation(), jnp.ones(2), ts, steps_per_interval=4, key=KEY, solver=dfx.Heun()).result
    )
    assert not sf.is_okay(stiff(jnp.array([0.0, 1.0])))
    assert sf.is_okay(stiff(jnp.array([0.0, 0.01])))
