"""The divergence of path laws, as an integral beside the state."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import sdeflow as sf
from sdeflow.regularisers import PathKL


def level(value):
    return lambda t, y, args: jnp.full_like(y, value)


@pytest.mark.usefixtures("x64")
def test_ornstein_uhlenbeck_processes_diverge_as_girsanov_says():
    rate_q, rate_p, sigma, end = 1.5, 0.5, 0.7, 2.0
    sde = sf.SDE(lambda t, y, args: -rate_q * y, level(sigma), additive=True)
    kl = PathKL(lambda t, y, args: -rate_p * y, level(sigma))
    run = lambda key: sf.solve(sde, jnp.ones(64), [0.0, end], dt0=0.02, key=key, regularisers=(kl,)).penalties["PathKL"]
    found = np.asarray(jax.jit(jax.vmap(run))(jr.split(jr.key(0), 64))) / 64
    v = sigma**2 / (2 * rate_q)
    wanted = (rate_q - rate_p) ** 2 / (2 * sigma**2)
    wanted *= (1 - v) * (1 - np.exp(-2 * rate_q * end)) / (2 * rate_q) + v * end
    np.testing.assert_allclose(wanted, 0.617208, atol=1e-6)
    assert abs(found.mean() - wanted) < 5 * found.std(ddof=1) / 8


@pytest.mark.parametrize("solver", [diffrax.Euler(), diffrax.ShARK(), None])
def test_a_constant_gap_is_exact(solver):
    sde = sf.SDE(level(0.9), level(0.4), additive=True)
    kl = PathKL(lambda t, y, args: args * jnp.ones_like(y), level(0.4), args=jnp.array(0.3))
    sol = sf.solve(sde, jnp.zeros(2), [0.0, 0.7, 2.0], dt0=0.1, solver=solver, key=jr.key(0), regularisers=(kl,))
    np.testing.assert_allclose(sol.penalties["PathKL"], 2 * 0.6**2 * 2.0 / (2 * 0.4**2), rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_it_is_differentiable_in_both_drifts_and_in_the_diffusion():
    def penalty(params):
        f, h, g = params
        sde = sf.SDE(lambda t, y, args: -f * y, lambda t, y, args: g * jnp.ones_like(y), additive=True)
        kl = PathKL(lambda t, y, args: -args[0] * y, lambda t, y, args: args[1] * jnp.ones_like(y), args=(h, g))
        sol = sf.solve(sde, jnp.ones(2), [0.0, 1.0], dt0=0.1, key=jr.key(0), regularisers=(kl,))
        return sol.penalties["PathKL"]

    at, eps = jnp.array([1.5, 0.5, 0.7]), 1e-6
    slope = jax.jit(jax.grad(penalty))(at)
    value = jax.jit(penalty)
    wanted = [(value(at + e) - value(at - e)) / (2 * eps) for e in eps * jnp.eye(3)]
    np.testing.assert_allclose(slope, wanted, rtol=1e-6)
    assert float(jnp.abs(slope).min()) > 1e-3


@pytest.mark.parametrize("gap", [0.0, 1.0])
def test_where_there_is_no_noise_the_solve_says_so(gap):
    noise = lambda t, y, args: jnp.where(t < 0.5, 0.3, 0.0) * jnp.ones_like(y)
    sde = sf.SDE(lambda t, y, args: gap * jnp.ones_like(y), noise, additive=True)
    solve = lambda **options: sf.solve(
        sde, jnp.zeros(2), [0.0, 1.0], dt0=0.1, key=jr.key(0), regularisers=(PathKL(level(0.0), noise),), **options
    )
    sol = solve(throw=False)
    assert bool(sol.result == sf.RESULTS.degenerate_diffusion)
    assert bool(jnp.isfinite(sol.final).all())
    with pytest.raises(sf.SolveError, match=r"the diffusion is 0 somewhere\. Keep it away from 0"):
        solve()


def test_the_sign_of_the_diffusion_does_not_matter():
    values = []
    for sign in (1.0, -1.0):
        sde = sf.SDE(level(0.9), level(sign * 0.4), additive=True)
        kl = PathKL(level(0.3), level(sign * 0.4))
        sol = sf.solve(sde, jnp.zeros(2), [0.0, 1.0], dt0=0.1, key=jr.key(0), regularisers=(kl,))
        values.append(float(sol.penalties["PathKL"]))
    np.testing.assert_allclose(values[0], values[1], rtol=1e-6)
