"""Bridges between samples, against Gaussians and the weighted mean of points."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats

import sdeflow as sf
from sdeflow.bridges import gaussian_sb, sinkhorn_bridge

pytestmark = pytest.mark.usefixtures("x64_module")


X = np.random.default_rng(0).normal(size=(10, 2))


def test_sinkhorn_s_bridge_is_near_the_gaussian_drift():
    # Quantiles rather than draws: what is left is the width of the gaps between the points.
    x0 = stats.norm.ppf((np.arange(2000) + 0.5) / 2000)[:, None]
    x1 = 1 + x0 / 2
    bridge = sinkhorn_bridge(x0, x1, 0.5)
    exact = gaussian_sb(
        x0.mean(0), np.cov(x0.T).reshape(1, 1), x1.mean(0), np.cov(x1.T).reshape(1, 1), bridge.reference
    )
    for t in (0.0, 0.3, 0.7):
        for x in (-0.5, 0.5, 1.0):
            x = jnp.array([x])
            np.testing.assert_allclose(bridge.drift(t, x), exact.drift(t, x), atol=5e-3)
            if t > 0:
                np.testing.assert_allclose(bridge.velocity(t, x), exact.velocity(t, x), atol=5e-3)


def test_sinkhorn_s_drift_is_the_weighted_mean_of_the_points():
    rng = np.random.default_rng(1)
    x0, x1 = rng.normal(size=(30, 2)), rng.normal(size=(40, 2)) + 1
    eps, t, x = 0.4, 0.6, np.array([0.2, 0.3])
    bridge = sinkhorn_bridge(x0, x1, eps, tolerance=1e-10, max_iterations=20_000)
    g = np.asarray(sf.metrics.sinkhorn(x0, x1, eps, tolerance=1e-10, max_iterations=20_000).g)
    logits = g / eps - ((x - x1) ** 2).sum(1) / (2 * eps * (1 - t))
    w = np.exp(logits - logits.max())
    wanted = (w @ x1 / w.sum() - x) / (1 - t)
    np.testing.assert_allclose(bridge.drift(t, x), wanted, rtol=1e-7)
    ends = jax.vmap(lambda key: bridge.sample_endpoint(jnp.asarray(x0[0]), key=key))(jr.split(jr.key(0), 50))
    assert all(np.abs(x1 - np.asarray(e)).sum(1).min() < 1e-12 for e in ends)


def test_sinkhorn_that_does_not_converge_is_a_result():
    with pytest.raises(sf.SolveError):
        sinkhorn_bridge(X, X + 5, 0.01, max_iterations=1)
    bridge = sinkhorn_bridge(X, X + 5, 0.01, max_iterations=1, throw=False)
    assert not bool(sf.is_okay(bridge.result))
