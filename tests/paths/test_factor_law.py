"""The law of the factors at the start: its coordinates, its price, and that zeros are the stationary one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.stats import assert_mean

import sdeflow as sf
from sdeflow.paths._markov_fractional import stationary_factor

KEY = jax.random.key(0)
Law, Noise = sf.paths.FactorLaw, sf.paths.MarkovFractionalNoise
NOISE = Noise(0.7, 1.0, rates=[0.1, 1.0, 10.0])
start = jax.jit(jax.vmap(lambda key, law: NOISE.start_of((2,), key, law), in_axes=(0, None)))
start_alone = jax.jit(lambda key, law: NOISE.start((2,), key=key, law=law))


def law_of(key=KEY):
    a, b, c = jax.random.split(key, 3)
    return Law(jax.random.normal(a, (3, 2)), 0.5 * jax.random.normal(b, (3, 2)), 0.5 * jax.random.normal(c, (3, 3, 2)))


def test_zeros_are_the_stationary_law():
    zeros = jnp.zeros((3, 2))
    np.testing.assert_array_equal(start_alone(KEY, Law(zeros, zeros)), start_alone(KEY, None))
    assert float(Law(zeros, zeros).kl()) == 0
    assert float(Law(zeros, zeros, jnp.zeros((3, 3, 2))).kl()) == 0


def test_draws_have_the_law():
    law, L = law_of(), stationary_factor(NOISE._rates)
    factors, kl, excess = start(jax.random.split(KEY, 8 * 1000), law)
    for d in range(2):
        S = np.diag(np.exp(law.log_scale[:, d])) + np.tril(law.mixing[..., d], -1)
        mean, covariance = L @ law.mean[:, d], L @ S @ S.T @ L.T
        for i in range(3):
            assert_mean(factors[:, i, d], mean[i])
            for j in range(i + 1):
                centred = factors[:, :, d] - mean
                assert_mean(centred[:, i] * centred[:, j], covariance[i, j])
    # The price, against the divergence of normal laws; a draw of it is right on average.
    exact = 0.0
    for d in range(2):
        S = np.diag(np.exp(law.log_scale[:, d])) + np.tril(law.mixing[..., d], -1)
        exact += (np.trace(S @ S.T) + np.sum(law.mean[:, d] ** 2) - 3 - np.linalg.slogdet(S @ S.T)[1]) / 2
    np.testing.assert_allclose(kl, exact, rtol=1e-5)
    assert_mean(excess, 0.0)
    assert excess.std() > 0.5


def test_the_density_is_that_of_normal_laws_for_trees_too():
    law, z = law_of(), jax.random.normal(jax.random.key(1), (3, 2))
    exact = 0.0
    for d in range(2):
        S = np.diag(np.exp(law.log_scale[:, d])) + np.tril(law.mixing[..., d], -1)
        exact += jax.scipy.stats.multivariate_normal.logpdf(z[:, d], law.mean[:, d], S @ S.T)
        exact -= jax.scipy.stats.norm.logpdf(z[:, d]).sum()
    np.testing.assert_allclose(law.log_ratio(z), exact, rtol=1e-4)
    other = law_of(jax.random.key(2))
    both = Law(*({"a": getattr(law, n), "b": getattr(other, n)} for n in ("mean", "log_scale", "mixing")))
    np.testing.assert_allclose(both.kl(), law.kl() + other.kl(), rtol=1e-6)
    np.testing.assert_allclose(
        both.log_ratio({"a": z, "b": -z}), law.log_ratio(z) + other.log_ratio(-z), rtol=1e-5, atol=1e-5
    )


def test_the_slope_of_the_price():
    """The excess has the mean slope zero, so that a bound with it off is as steep on average."""
    law = law_of()
    slopes = jax.jit(jax.vmap(jax.grad(lambda law, key: NOISE.start_of((2,), key, law)[2]), in_axes=(None, 0)))
    for slope in jax.tree.leaves(slopes(law, jax.random.split(KEY, 8 * 500))):
        rough = np.asarray(slope)
        assert (np.abs(rough.mean(axis=0)) < 5 * rough.std(axis=0) / np.sqrt(4000) + 1e-6).all()


def test_bad_input():
    zeros = jnp.zeros((3, 2))
    with pytest.raises(ValueError, match="log_scale should have"):
        Law(zeros, jnp.zeros(3))
    with pytest.raises(ValueError, match="mixing should have"):
        Law(zeros, zeros, jnp.zeros((3, 3)))
    with pytest.raises(ValueError, match="mean of shape"):
        NOISE.start((3,), key=KEY, law=Law(zeros, zeros))
    with pytest.raises(ValueError, match="start at zero"):
        Noise(0.7, 1.0, kind="II").start((2,), key=KEY, law=Law(zeros, zeros))
