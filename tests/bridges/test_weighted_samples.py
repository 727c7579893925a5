"""Bridges of weighted samples, and of such whose ends are only near their weights: closed forms of a few points."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import sdeflow as sf
from sdeflow.bridges import sinkhorn_bridge

pytestmark = pytest.mark.usefixtures("x64_module")

HOW = {"tolerance": 1e-11, "max_iterations": 20_000}
rng = np.random.default_rng(0)
X0, X1 = rng.normal(size=(6, 2)), rng.normal(size=(5, 2)) + 1
A, B = rng.uniform(0.2, 1.0, size=6), rng.uniform(0.2, 1.0, size=5)
FIELDS = "drift", "velocity", "backward_drift", "score"


def same(one, two):
    t, x = 0.4, jnp.array([0.3, 0.8])
    for name in FIELDS:
        np.testing.assert_allclose(getattr(one, name)(t, x), getattr(two, name)(t, x), rtol=1e-7)
    np.testing.assert_allclose(one.endpoint_mean(0.0, X0[2]), two.endpoint_mean(0.0, X0[2]), rtol=1e-7)


@pytest.mark.parametrize("rho", [None, 0.7, (np.inf, 0.5)])
def test_a_row_twice_is_a_row_of_twice_the_weight_and_one_of_weight_zero_is_none(rho):
    twice = lambda v: np.concatenate([v, v[:1]])
    one = sinkhorn_bridge(X0, X1, 0.5, a=A, b=B, rho=rho, **HOW)
    halved = [twice(np.where(np.arange(len(w)) == 0, w / 2, w)) for w in (A, B)]
    same(one, sinkhorn_bridge(twice(X0), twice(X1), 0.5, a=halved[0], b=halved[1], rho=rho, **HOW))
    none = lambda v: np.concatenate([v, 0 * v[:1]])
    same(one, sinkhorn_bridge(twice(X0), twice(X1), 0.5, a=none(A), b=none(B), rho=rho, **HOW))


def test_two_points_of_soft_mass():
    # The mass is (a b)^((eps + rho) / (eps + 2 rho)) exp(-C / (eps + 2 rho)).
    for (a, b), cost, epsilon, rho, mass in (((1, 1), 1.0, 0.5, 2.0, 0.8007374), ((2, 0.7), 0.3, 0.1, 1.0, 1.0339539)):
        x0, x1 = np.zeros((2, 1)), np.full((2, 1), np.sqrt(2 * cost))
        bridge = sinkhorn_bridge(x0, x1, epsilon, a=np.full(2, a / 2), b=np.full(2, b / 2), rho=rho, **HOW)
        np.testing.assert_allclose(bridge.history["source"].sum(), mass, atol=1e-7)
        np.testing.assert_allclose(bridge.history["target"], mass / 2, atol=1e-7)
        # Whatever moves, moves from the one place to the other.
        np.testing.assert_allclose(bridge.drift(0.25, jnp.array([0.4])), (x1[0] - 0.4) / 0.75, rtol=1e-10)
        np.testing.assert_allclose(bridge.backward_drift(0.25, jnp.array([0.4])), (0.4 - x0[0]) / 0.25, rtol=1e-10)


def test_a_soft_end_weighs_what_it_holds_against_how_far_it_is():
    # From one place, held, to two: the shares are those of b exp(-C / (eps + rho)), not b.
    epsilon, rho, b, y = 0.3, 0.8, np.array([0.25, 0.75]), np.array([[0.5], [2.0]])
    bridge = sinkhorn_bridge(np.zeros((2, 1)), y, epsilon, b=b, rho=(np.inf, rho), **HOW)
    share = b * np.exp(-(y[:, 0] ** 2) / 2 / (epsilon + rho))
    share /= share.sum()
    np.testing.assert_allclose(bridge.history["target"], share, rtol=1e-7)
    np.testing.assert_allclose(bridge.history["source"], 0.5, rtol=1e-9)
    np.testing.assert_allclose(bridge.endpoint_mean(0.0, jnp.zeros(1)), share @ y, rtol=1e-7)
    n = 4000
    ends = jax.vmap(lambda key: bridge.sample_endpoint(jnp.zeros(1), key=key))(jr.split(jr.key(0), n))
    assert abs((ends == 2.0).mean() - share[1]) < 5 * np.sqrt(share.prod() / n)


@pytest.mark.parametrize("rho", [None, 0.7])
def test_the_plan_of_the_bridge_is_that_of_its_weights_in_both_directions(rho):
    bridge = sinkhorn_bridge(X0, X1, 0.5, a=A, b=B, rho=rho, **HOW)
    plan = sf.metrics.sinkhorn(X0, X1, 0.5, a=A, b=B, rho=rho, **HOW).plan()
    np.testing.assert_allclose(bridge.history["source"], plan.sum(1), rtol=1e-8)
    np.testing.assert_allclose(bridge.history["target"], plan.sum(0), rtol=1e-8)
    if rho is None:
        np.testing.assert_allclose(bridge.history["target"], B / B.sum(), rtol=1e-8)
    forward = jax.vmap(lambda x: bridge.endpoint_mean(0.0, x))(jnp.asarray(X0))
    np.testing.assert_allclose(forward, plan @ X1 / plan.sum(1, keepdims=True), rtol=1e-8)
    # The way back starts from the points x1 with what has passed of the clock all ahead.
    back = jax.vmap(lambda z: bridge.backward.mean(z, jnp.ones(())))(bridge.clock.end(jnp.asarray(X1)))
    np.testing.assert_allclose(bridge.clock.state(back), plan.T @ X0 / plan.sum(0)[:, None], rtol=1e-8)
    # Its density in between is that of the pairs' Brownian bridges: its score is theirs.
    t, x = 0.4, jnp.array([0.3, 0.8])
    centres = (1 - t) * X0[:, None] + t * X1
    density = lambda x: jnp.log((plan * jnp.exp(-((x - centres) ** 2).sum(-1) / (2 * 0.5 * t * (1 - t)))).sum())
    np.testing.assert_allclose(bridge.score(t, x), jax.grad(density)(x), rtol=1e-7)


def test_growth_decides_which_cells_leave():
    # Two kinds of cells, one of which divides: the later population is the earlier one, grown.
    cells = np.array([[0.0], [0.1], [4.0], [4.1]])
    grown = sf.data.growth_weights(np.array([0.7, 0.7, 0.0, 0.0]), 0.0, 2.0)
    bridge = sinkhorn_bridge(cells, cells, 0.05, a=grown, b=grown, **HOW)
    ignorant = sinkhorn_bridge(cells, cells, 0.05, b=grown, **HOW)
    means = [
        jax.vmap(lambda x, one=one: one.endpoint_mean(0.0, x))(jnp.asarray(cells))[2:] for one in (bridge, ignorant)
    ]
    np.testing.assert_allclose(means[0], cells[2:], atol=0.1)
    # Half of the cells stand where only 1 in 1 + exp(1.4) is found later: the rest of them must cross.
    stay = 2 / (1 + np.exp(1.4))
    np.testing.assert_allclose(means[1].mean(), stay * 4.05 + (1 - stay) * 0.05, atol=0.05)


def test_rho_is_checked():
    with pytest.raises(ValueError, match="rho must be positive"):
        sinkhorn_bridge(X0, X1, 0.5, rho=-1.0)
