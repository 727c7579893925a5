"""Bridges that are learned: the loss with its numbers, and what training finds."""

import types

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers.bridges import ROTATING, one
from helpers.processes import PEAK_GIB, last_number

import sdeflow as sf
from sdeflow.bridges import MixturePotential, gaussian_sb, light_loss, light_sb, sinkhorn_bridge
from sdeflow.bridges._light import _chunk, _order
from sdeflow.bridges._moments import Components, Moments, _Cloud, _moved, inverse, tiles

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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.parametrize("d", [1, 5, 16, 33])
def test_small_matrices_are_inverted_by_products(d):
    rng = np.random.default_rng(d)
    roots = rng.normal(size=(3, d, 2 * d))
    matrices = roots @ roots.transpose(0, 2, 1) / d
    inverses, log_determinants = jax.jit(inverse)(jnp.asarray(matrices))
    np.testing.assert_allclose(inverses, np.linalg.inv(matrices), rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(log_determinants, np.linalg.slogdet(matrices)[1], rtol=1e-11, atol=1e-12)


def gaussian_pair(d):
    rng = np.random.default_rng(1)
    m0, m1 = rng.normal(size=(2, d))
    c0, c1 = (a @ a.T / d + 0.2 * np.eye(d) for a in rng.normal(size=(2, d, d)))
    exact = gaussian_sb(m0, c0, m1, c1, sf.equations.BrownianMotion(d, np.sqrt(0.5)))
    shift = np.asarray(exact.clock.shift)
    S = np.asarray(exact.potential.covariances()[0])
    # Back from coordinates around the shift.
    return (m0, c0), (m1, c1), S, np.asarray(exact.potential.centres[0]) + shift - S @ shift


def test_moments_of_gaussians_lead_to_the_closed_form():
    x, y, S, r = gaussian_pair(3)
    cloud = lambda mean, cov: _Cloud(jnp.ones(1), jnp.asarray(mean)[None], jnp.asarray(cov)[None])
    far = Components(jnp.zeros(1), jnp.zeros((1, 3)), jnp.eye(3)[None])
    step = jax.jit(lambda now: _moved(now, cloud(*x), cloud(*y), jnp.array(0.5), jnp.array(1e12)))
    now, gaps = far, []
    for _ in range(80):
        now = step(now)
        gaps.append(float(jnp.abs(now.spread[0] - S).max()))
    assert gaps[-1] < 1e-9 < 1e-2 < gaps[0]
    np.testing.assert_allclose(now.centres[0], r, atol=1e-9)


def test_the_first_guess_is_the_bridge_of_gaussians_in_pieces():
    (m0, c0), (m1, c1), S, r = gaussian_pair(3)
    rows = lambda mean, cov: mean + np.sqrt(3) * np.concatenate([np.eye(3), -np.eye(3)]) @ np.linalg.cholesky(cov).T
    x, y = (jnp.asarray(rows(*pair)) for pair in ((m0, c0), (m1, c1)))
    plain = lambda centres: Components(
        jnp.zeros(len(centres)), centres, jnp.broadcast_to(jnp.eye(3), (len(centres), 3, 3))
    )
    whole = tiles(x, y, plain(jnp.asarray(m1)[None]), jnp.array(0.5))
    np.testing.assert_allclose(whole.spread[0], S, atol=1e-10)
    np.testing.assert_allclose(whole.centres[0], r, atol=1e-10)
    # Pieces around points of N(m1, tau^2 C1), placed so that all together have the moments of the end.
    tau = 64 ** (-1 / 3)
    centres = m1 + np.sqrt(1 - tau**2) * np.random.default_rng(0).multivariate_normal(np.zeros(3), c1, 64)
    parts = tiles(x, y, plain(jnp.asarray(centres)), jnp.array(0.5))
    values, basis = jnp.linalg.eigh(parts.spread)
    mixture = MixturePotential(parts.logs, parts.centres, values, jnp.array(0.5), basis)
    w = jax.vmap(lambda z: mixture.weights(z, jnp.ones(())))(jnp.asarray(m0 + np.zeros((1, 3))))[0]
    assert float(-(w * jnp.log(w)).sum()) > np.log(16)
    np.testing.assert_allclose(mixture.mean(jnp.asarray(m0), jnp.ones(())), m1, atol=0.35)


def test_weights_of_rows_are_those_of_the_bridge():
    rng = np.random.default_rng(0)
    x0, x1 = rng.normal(size=(4000, 1)), 1 + 0.5 * rng.normal(size=(4000, 1))
    a = np.exp(0.5 * x0[:, 0])
    a /= a.sum()
    bridge = light_sb(x0, x1, a=a, epsilon=0.5, num_components=1, steps=2000, key=jr.key(0), backward="samples")
    mean = (a @ x0)[0]
    v0, v1 = (a @ (x0 - mean) ** 2)[0], x1.var()
    S = (np.sqrt(4 * v0 * v1 + 0.25) - 0.5) / (2 * v0)
    np.testing.assert_allclose(bridge.endpoint_mean(0.0, jnp.array([0.4])), x1.mean() + S * (0.4 - mean), atol=0.02)
    exact = gaussian_sb(jnp.array([mean]), v0 * jnp.eye(1), x1.mean(0), v1 * jnp.eye(1), bridge.reference)
    np.testing.assert_allclose(bridge.score(0.5, jnp.array([0.4])), exact.score(0.5, jnp.array([0.4])), atol=0.06)
    with pytest.raises(ValueError, match="one weight for each point"):
        light_sb(x0, x1, a=a[1:], epsilon=0.5, num_components=1, steps=10, key=jr.key(0))


def test_an_order_has_each_row_as_often_as_its_weight_says():
    assert sorted(_order(jr.key(0), 100, None).tolist()) == list(range(100))
    weights = jnp.arange(100.0) / 4950
    counts = np.bincount(_order(jr.key(0), 100, weights), minlength=100)
    assert (np.abs(counts - 100 * np.asarray(weights)) < 1).all()
    assert counts[0] == 0


def test_an_update_copies_no_data():
    def temporary(n):
        stage = Moments(jnp.array(0.5), 10, 64)
        now = Components(jnp.zeros(4), jnp.zeros((4, 3)), jnp.broadcast_to(jnp.eye(3), (4, 3, 3)))
        x, order = jnp.zeros((n, 3)), jnp.arange(n)
        state = jax.eval_shape(lambda: stage.start(now))
        state = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), state)
        args = (stage, state, (x, x, order, order), jnp.array(0), jnp.array(10))
        return _chunk.lower(*args).compile().compiled.memory_analysis().temp_size_in_bytes

    assert temporary(100_000) < temporary(1000) + 10_000


_BIG = """
import jax, numpy as np, sdeflow as sf
rng = np.random.default_rng(0)
x, y = (rng.standard_normal((1_000_000, 50), np.float32) + shift for shift in (0, np.float32(1)))
bridge = sf.bridges.light_sb(x, y, epsilon=1.0, num_components=10, steps=3000, key=jax.random.key(0))
gap = bridge.endpoint_mean(0.0, x[0]) - (1 + 0.618 * x[0])
assert float(abs(gap).max()) < 0.1, gap
"""

_DEVICES = """
import jax, numpy as np, sdeflow as sf
from jax.sharding import NamedSharding, PartitionSpec
jax.config.update("jax_enable_x64", True)
rng = np.random.default_rng(0)
x, y = rng.normal(size=(64, 3)), rng.normal(size=(128, 3)) + 0.5
mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
shared = [jax.device_put(z, NamedSharding(mesh, PartitionSpec("rows"))) for z in (x, y)]
options = dict(epsilon=0.5, num_components=4, steps=60, key=jax.random.key(0), backward="fit")
one, four = (sf.bridges.light_sb(*clouds, **options) for clouds in ((x, y), shared))
for p, q in zip(jax.tree.leaves((one.potential.covariances(), one.potential.centres, one.history)),
                jax.tree.leaves((four.potential.covariances(), four.potential.centres, four.history))):
    np.testing.assert_allclose(p, q, atol=1e-6)
print(len(shared[0].sharding.device_set))
"""


@pytest.mark.slow
def test_a_million_cells_fit_in_memory():
    assert last_number(_BIG + PEAK_GIB) < 8


@pytest.mark.slow
def test_four_devices_learn_what_one_learns():
    assert last_number(_DEVICES, XLA_FLAGS="--xla_force_host_platform_device_count=4") == 4


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x0": [["one", "two"]]}, "x0 must be an array of numbers"),
        ({"x1": sf.data.Snapshots([0.0, 1.0], [np.zeros((2, 2)), np.zeros((2, 2))])}, "cells of one time"),
        ({"x0": types.SimpleNamespace(obsm={})}, "cells of one time"),
        ({"x0": types.SimpleNamespace(toarray=None)}, "pass its toarray"),
        ({"epsilon": "0.1"}, "epsilon must be a number, got '0.1'"),
        ({"epsilon": None, "reference": 0.3}, "a variance is passed as epsilon"),
    ],
)
def test_what_is_no_sample_and_no_reference_is_refused(change, says):
    x = np.random.default_rng(0).normal(size=(10, 2))
    with pytest.raises(TypeError, match=says):
        light_sb(**({"x0": x, "x1": x, "epsilon": 0.5, "num_components": 2, "steps": 2, "key": jr.key(0)} | change))


def test_samples_on_a_plane_are_learned_in_float32():
    rng = np.random.default_rng(0)
    plane = np.linalg.qr(rng.normal(size=(20, 20)))[0][:3]
    x0, x1 = (np.float32(rng.normal(size=(300, 3)) @ plane + shift) for shift in (0, 1))
    bridge = light_sb(x0, x1, epsilon=1.0, num_components=4, steps=100, key=jr.key(0))
    assert bridge.potential.centres.dtype == np.float32
    assert np.isfinite(bridge.drift(1.0, x0[0])).all()
