"""Networks that are drifts and diffusions: their formulas by hand, their bounds, what they refuse."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from sdeflow.models.fields import MLP, ControlledDrift, NoiseScale, bounded_time, circular_time, lipswish


def affine(layer, x):
    return np.asarray(layer.weight) @ np.asarray(x) + np.asarray(layer.bias)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_lipswish_moves_no_two_inputs_apart_and_is_as_steep_as_that_allows():
    x = jnp.linspace(-12.0, 12.0, 24_001)
    slope = np.asarray(jax.vmap(jax.grad(lipswish))(x))
    assert 0.999 < np.abs(slope).max() <= 1.0
    np.testing.assert_allclose(lipswish(x), 0.909 * np.asarray(x) * sigmoid(np.asarray(x)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_an_mlp_is_affine_maps_with_activations_between(depth):
    net = MLP(3, 2, width=5, depth=depth, activation=jnp.tanh, key=jr.key(0))
    x = jnp.array([0.3, -1.0, 2.0])
    h = np.asarray(x)
    for layer in net.layers[:-1]:
        h = np.tanh(affine(layer, h))
    assert len(net.layers) == depth + 1
    np.testing.assert_allclose(net(x), affine(net.layers[-1], h), rtol=1e-5, atol=1e-6)


def test_features_of_time_are_bounded_and_tell_times_apart():
    ts = jnp.array([0.0, 0.5, 1.0, 100.0, 1e30, -3.0])
    features = np.asarray(jax.vmap(bounded_time)(ts))
    assert features.shape == (6, 1)
    assert np.abs(features).max() <= 1
    assert (np.diff(features[:4, 0]) > 0).all()
    assert float(circular_time(0.5)[0] ** 2 + circular_time(0.5)[1] ** 2) == pytest.approx(1.0)


@pytest.mark.parametrize("t", [0, 1.5, np.float32(2.0), jnp.asarray(3)])
def test_time_may_be_any_real_scalar(t):
    assert bounded_time(t).dtype == jnp.result_type(float)
    assert circular_time(t).shape == (2,)


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_pure_noise_stays_between_its_bounds(scale):
    sigma = NoiseScale(6, width=8, sigma_min=0.2, sigma_max=0.7, key=jr.key(1))
    blown_up = jax.tree.map(lambda x: scale * x, eqx.filter(sigma, eqx.is_inexact_array))
    sigma = eqx.combine(blown_up, sigma)
    values = np.asarray(jax.vmap(sigma)(jnp.array([0.0, 0.1, 1.0, 1e6])))
    assert values.shape == (4, 6)
    # A saturated sigmoid is 0 or 1 in float32.
    assert values.min() >= 0.2 * (1 - 1e-6)
    assert values.max() <= 0.7 * (1 + 1e-6)


def test_pure_noise_starts_near_the_geometric_mean_of_its_bounds():
    sigma = NoiseScale(64, width=64, sigma_min=0.01, sigma_max=1.0, key=jr.key(2))
    assert 0.06 < float(jnp.exp(jnp.log(sigma(0.5)).mean())) < 0.16


def test_benchmark_noise_is_the_published_formula():
    sigma = NoiseScale(3, width=4, mode="benchmark", key=jr.key(3))
    first, second = sigma.net.layers
    hidden = np.maximum(affine(first, [np.sin(0.7), np.cos(0.7)]), 0)
    want = np.tanh(sigmoid(1.0) * np.maximum(affine(second, hidden), 0))
    assert want.max() > 0
    np.testing.assert_allclose(sigma(0.7), want, rtol=1e-5, atol=1e-6)


def test_a_pure_drift_is_the_published_formula_bounded_by_its_rate():
    drift = ControlledDrift(3, control_size=2, width=4, depth=2, rate=5.0, key=jr.key(4))
    z, x = np.array([0.5, -1.0, 2.0], np.float32), np.array([1.0, -0.3], np.float32)
    h = affine(drift.zeta, np.concatenate([z, affine(drift.embed, x)]))
    for layer in drift.gamma.layers[:-1]:
        h = 0.909 * affine(layer, h) * sigmoid(affine(layer, h))
    want = 5.0 * np.tanh(affine(drift.gamma.layers[-1], h))
    np.testing.assert_allclose(drift(jnp.asarray(z), jnp.asarray(x)), want, rtol=1e-4, atol=1e-5)
    assert np.abs(drift(1e6 * jnp.asarray(z), jnp.asarray(x))).max() <= 5.0


def test_a_benchmark_drift_is_the_published_formula():
    drift = ControlledDrift(3, control_size=2, sees_time=True, width=4, depth=2, mode="benchmark", key=jr.key(5))
    z, x = np.array([0.5, -1.0, 2.0], np.float32), np.array([1.0, -0.3], np.float32)
    lifted = affine(drift.lift, np.concatenate([[np.sin(0.4), np.cos(0.4)], z]))
    h = np.maximum(affine(drift.zeta, np.concatenate([lifted, affine(drift.embed, x)])), 0)
    h = np.maximum(affine(drift.gamma.layers[0], h), 0)
    want = np.tanh(affine(drift.gamma.layers[1], h))
    assert len(drift.gamma.layers) == 2
    np.testing.assert_allclose(drift(jnp.asarray(z), jnp.asarray(x), 0.4), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["pure", "benchmark"])
@pytest.mark.parametrize("sees_time", [False, True])
def test_a_drift_sees_the_time_only_if_told_to(mode, sees_time):
    drift = ControlledDrift(3, sees_time=sees_time, mode=mode, key=jr.key(6))
    slope = jax.jacfwd(lambda t: drift(jnp.ones(3), None, t))(0.3)
    assert bool((slope != 0).any()) == sees_time


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MLP(0, 2, width=3, depth=1, key=jr.key(0)), r"in_size must be an integer of at least 1, got 0"),
        (lambda: MLP(1, 2, width=3.0, depth=1, key=jr.key(0)), r"width must be an integer of at least 1, got 3.0"),
        (lambda: MLP(1, 2, width=3, depth=-1, key=jr.key(0)), r"depth must be an integer of at least 0, got -1"),
        (lambda: NoiseScale(2, mode="paper", key=jr.key(0)), r'mode must be "pure".*"benchmark".*\'paper\''),
        (lambda: NoiseScale(2, sigma_min=0.0, key=jr.key(0)), r"0 < sigma_min < sigma_max, got 0.0 and"),
        (lambda: NoiseScale(2, sigma_min=2.0, sigma_max=1.0, key=jr.key(0)), r"got 2.0 and 1.0"),
        (lambda: NoiseScale(2, sigma_max=float("nan"), key=jr.key(0)), r"sigma_min < sigma_max"),
        (lambda: ControlledDrift(2, control_size=-1, key=jr.key(0)), r"control_size must be .* at least 0, got -1"),
        (lambda: ControlledDrift(2, rate=-1.0, key=jr.key(0)), r"rate must be positive and finite, got -1.0"),
        (lambda: ControlledDrift(2, depth=0, key=jr.key(0)), r"depth must be an integer of at least 1, got 0"),
        (lambda: ControlledDrift(True, key=jr.key(0)), r"state_size must be an integer of at least 1, got True"),
    ],
)
def test_bad_options_are_refused_with_their_value(make, match):
    with pytest.raises(ValueError, match=match):
        make()
