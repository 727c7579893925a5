"""Bridges that are learned: the loss with its numbers, and what training finds."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers.bridges import ROTATING, one

import sdeflow as sf
from sdeflow.bridges import MixturePotential, gaussian_sb, light_loss, light_sb, sinkhorn_bridge

pytestmark = pytest.mark.usefixtures("x64_module")


def quantiles(mean, sd, n=200_001):
    """Nodes of a normal law, with Gauss-Hermite weights, as (nodes, weights)."""
    x, w = np.polynomial.hermite_e.hermegauss(60)
    return jnp.asarray(mean + sd * x)[:, None], jnp.asarray(w / w.sum())


def population_loss(p):
    (x, w), (y, v) = quantiles(0.0, 1.0), quantiles(1.0, 0.5)
    zero = jnp.zeros((1, 1))
    base = light_loss(p, zero, zero)
    first = jax.vmap(lambda a: light_loss(p, a[None], zero))(x) - base
    second = jax.vmap(lambda b: light_loss(p, zero, b[None]))(y) - base
    return w @ first + v @ second + base


def test_the_loss_has_its_known_least_value_and_excess():
    S = (np.sqrt(4 * 0.25 + 0.25) - 0.5) / 2
    assert pytest.approx(0.309017, abs=1e-6) == S
    best = population_loss(one(S, 1.0))
    assert float(best) == pytest.approx(1.1032194, abs=1e-7)
    assert float(population_loss(one(0.5, 0.8)) - best) == pytest.approx(0.2025719238, abs=1e-9)
    grads = jax.grad(lambda s: population_loss(one(s[0], s[1])))(jnp.array([S, 1.0]))
    np.testing.assert_allclose(grads, 0, atol=1e-10)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_light_sb_learns_the_bridge_of_two_gaussians(covariance):
    rng = np.random.default_rng(0)
    x0, x1 = rng.normal(size=(4000, 1)), 1 + 0.5 * rng.normal(size=(4000, 1))
    bridge = light_sb(
        x0, x1, epsilon=0.5, num_components=1, steps=3000, key=jr.key(0), covariance=covariance, backward="fit"
    )
    v0, v1 = x0.var(), x1.var()
    S = (np.sqrt(4 * v0 * v1 + 0.25) - 0.5) / (2 * v0)
    assert float(bridge.potential.spread[0, 0]) == pytest.approx(S, abs=0.01)
    exact = gaussian_sb(x0.mean(0), v0 * jnp.eye(1), x1.mean(0), v1 * jnp.eye(1), bridge.reference)
    x = jnp.array([0.4])
    np.testing.assert_allclose(bridge.velocity(0.5, x), exact.velocity(0.5, x), atol=0.03)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_a_known_plan_is_recovered(covariance):
    # Recipe: a mixture of two as the truth, endpoints drawn from its plan.
    truth = MixturePotential(
        jnp.zeros(2), jnp.array([[1.0, 0.5], [-1.0, 0.3]]), jnp.array([[0.4, 0.8], [0.7, 0.3]]), jnp.array(0.5)
    )
    x0, other = jr.normal(jr.key(3), (2, 20_000, 2))
    x1 = jax.vmap(lambda x, key: truth.sample(x, key=key))(other, jr.split(jr.key(4), 20_000))
    bridge = light_sb(
        x0, x1, epsilon=0.5, num_components=8, steps=3000, key=jr.key(5), covariance=covariance, backward="samples"
    )
    clock = bridge.clock
    excess = light_loss(bridge.potential, clock.start(x0), clock.end(x1)) - light_loss(truth, x0, x1)
    # A translation of both clouds changes the loss by the mean of their product alone.
    shift = clock.shift
    excess -= (shift @ shift - shift @ x0.mean(0) - shift @ x1.mean(0)) / 0.5
    assert abs(float(excess)) < 0.01
    for x in (jnp.array([0.5, -0.5]), jnp.array([-1.0, 0.2])):
        np.testing.assert_allclose(bridge.endpoint_mean(0.0, x), truth.mean(x, jnp.ones(())), atol=0.08)
        assert np.isfinite(bridge.velocity(0.5, x)).all()
        assert np.isfinite(bridge.drift(1.0, x)).all()


def test_a_rotating_reference_from_samples():
    rng = np.random.default_rng(0)
    x0, x1 = rng.normal(size=(4000, 2)), np.array([1.0, -1.0]) + rng.normal(size=(4000, 2)) * [0.5, 0.8]
    reference = sf.equations.LinearSDE(*ROTATING)
    exact = gaussian_sb(x0.mean(0), np.cov(x0.T), x1.mean(0), np.cov(x1.T), reference)
    learned = light_sb(x0, x1, num_components=1, steps=3000, key=jr.key(0), reference=reference, covariance="full")
    points = sinkhorn_bridge(x0[:1500], x1[:1500], reference=reference)
    x = jnp.array([0.3, -0.2])
    np.testing.assert_allclose(learned.drift(0.4, x), exact.drift(0.4, x), atol=0.1)
    np.testing.assert_allclose(points.drift(0.4, x), exact.drift(0.4, x), atol=0.25)
