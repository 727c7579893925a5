"""Scores: closed forms, small cases counted by hand, and what is missing counts for nothing."""

import itertools

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers.stats import assert_mean
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import sdeflow as sf

pytestmark = pytest.mark.usefixtures("x64_module")

crps, energy_score, coverage = sf.metrics.crps, sf.metrics.energy_score, sf.metrics.coverage
accuracy, auroc, rmse, mae = sf.metrics.accuracy, sf.metrics.auroc, sf.metrics.rmse, sf.metrics.mae


def gaussian_crps(y, mean, sigma):
    z = (y - mean) / sigma
    return sigma * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / np.sqrt(np.pi))


def by_pairs(samples, y, fair):
    """Both terms from their definition, over every pair; samples (S, d), y (d,)."""
    S = len(samples)
    pairs = sum(np.linalg.norm(a - b) for a in samples for b in samples)
    first = np.mean([np.linalg.norm(a - y) for a in samples])
    return first - pairs / (2 * S * (S - 1 if fair else S))


# ---- CRPS and energy score. ----


def test_the_crps_of_normal_samples_is_the_closed_form():
    y = np.array([-3.0, 0.3, 0.5, 2.0])
    draw = jax.jit(lambda key: crps(0.4 + 0.7 * jr.normal(key, (100_000, 4)), y))
    found = np.stack([draw(key) for key in jr.split(jr.key(0), 8)])
    for k in range(4):
        assert_mean(found[:, k], gaussian_crps(y[k], 0.4, 0.7))
    np.testing.assert_allclose(found.mean(0), gaussian_crps(y, 0.4, 0.7), atol=3e-3)


def test_the_fair_estimator_has_no_bias_and_the_empirical_one_has_its_known_bias():
    # With S = 3 the empirical score is too large by E|X - X'| / (2 S) = sigma / (S sqrt(pi)).
    samples = 0.7 * jr.normal(jr.key(1), (3, 200_000))
    y, truth = np.full(200_000, 0.9), gaussian_crps(0.9, 0.0, 0.7)
    assert_mean(crps(samples, y), truth)
    assert_mean(crps(samples, y, fair=False), truth + 0.7 / (3 * np.sqrt(np.pi)))


@pytest.mark.parametrize("fair", [True, False])
@pytest.mark.parametrize("S", [2, 3, 4, 7, 8])
def test_both_scores_are_the_sums_over_pairs(S, fair):
    rng = np.random.default_rng(S)
    samples, y = rng.normal(size=(S, 5, 3)), rng.normal(size=(5, 3))
    samples[1] = samples[0]
    energy = energy_score(samples, y, fair=fair)
    assert energy.shape == (5,)
    np.testing.assert_allclose(energy, [by_pairs(samples[:, i], y[i], fair) for i in range(5)], rtol=1e-12)
    each = crps(samples, y, fair=fair)
    wanted = [[by_pairs(samples[:, i, j, None], y[i, j, None], fair) for j in range(3)] for i in range(5)]
    np.testing.assert_allclose(each, wanted, rtol=1e-11)
    np.testing.assert_allclose(energy_score(samples[..., None], y[..., None], fair=fair), each, rtol=1e-11)


def test_two_samples_by_hand():
    # |0 - 1| and |4 - 1| average to 2, half of the distance 4 is 2; counted with themselves, the pairs weigh half.
    assert float(crps(np.array([0.0, 4.0]), 1.0)) == 0.0
    assert float(crps(np.array([0.0, 4.0]), 1.0, fair=False)) == 1.0
    assert float(energy_score(np.array([[0.0, 0.0], [3.0, 4.0]]), np.zeros(2))) == 0.0
    assert float(energy_score(np.array([[0.0, 0.0], [3.0, 4.0]]), np.zeros(2), fair=False)) == 1.25


@pytest.mark.parametrize("score", [crps, energy_score])
def test_gradients_are_finite_with_ties_and_equal_finite_differences_without(score):
    rng = np.random.default_rng(0)
    gradient = jax.grad(lambda samples, y: score(samples, y).sum(), argnums=(0, 1))
    for S in (2, 5):
        assert all(np.isfinite(g).all() for g in gradient(jnp.zeros((S, 4, 2)), jnp.zeros((4, 2))))
        samples, y, way = rng.normal(size=(S, 4, 2)), rng.normal(size=(4, 2)), rng.normal(size=(S, 4, 2))
        along = float((gradient(samples, y)[0] * way).sum())
        at = lambda e: float(score(samples + e * way, y).sum())
        np.testing.assert_allclose(along, (at(1e-6) - at(-1e-6)) / 2e-6, rtol=1e-7)


def test_what_is_missing_counts_for_nothing():
    rng = np.random.default_rng(0)
    samples, y = rng.normal(size=(6, 5, 3)), rng.normal(size=(5, 3))
    y[0, 1], y[2] = np.nan, np.nan
    mask, weight = np.ones((5, 3), bool), np.array([1.0, 2.0, 1.0, 0.0, 0.5])
    mask[1, 2] = False
    seen = mask & ~np.isnan(y)
    each, energy = crps(samples, y, mask=mask), energy_score(samples, y, mask=mask)
    np.testing.assert_array_equal(np.isnan(each), ~seen)
    np.testing.assert_array_equal(np.isnan(energy), ~seen.any(axis=1))
    # The energy score is that of the entries that are there.
    np.testing.assert_allclose(energy[0], by_pairs(samples[:, 0][:, [0, 2]], y[0, [0, 2]], True))
    w = weight[:, None] * seen
    np.testing.assert_allclose(
        crps(samples, y, mask=mask, weight=weight, average=True), np.nansum(w * each) / w.sum(), rtol=1e-13
    )
    w = weight * seen.any(axis=1)
    np.testing.assert_allclose(
        energy_score(samples, y, mask=mask, weight=weight, average=True), np.nansum(w * energy) / w.sum(), rtol=1e-13
    )
    # A row of no weight may hold anything.
    samples[:, 3] = np.nan
    for score in (crps, energy_score):
        value = lambda samples, y, score=score: score(samples, y, mask=mask, weight=weight, average=True)
        gradients = jax.jit(jax.grad(value, argnums=(0, 1)))(samples, y)
        assert all(np.isfinite(g).all() for g in gradients)
        assert not np.asarray(gradients[1])[~seen].any()


def test_float32_keeps_its_digits_far_from_zero():
    samples, y = np.random.default_rng(0).normal(size=(1000, 3)), np.zeros(3)
    wanted = crps(samples, y), energy_score(samples, y)
    with jax.enable_x64(False):
        far = np.float32(1e4) + np.float32(samples)
        found = crps(far, np.float32(1e4) + np.float32(y)), energy_score(far, np.float32(1e4) + np.float32(y))
    near = np.float64(far) - 1e4
    for a, b, c in zip(found, wanted, (crps(near, y), energy_score(near, y))):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, c, rtol=2e-6)
        np.testing.assert_allclose(a, b, rtol=1e-2)


def test_the_energy_score_keeps_no_matrix_of_pairs():
    # 20,000 samples: a matrix of pairs would take 3.2 GB and its gradient more.
    samples, y = jax.ShapeDtypeStruct((20_000, 3), jnp.float64), jax.ShapeDtypeStruct((3,), jnp.float64)
    compiled = jax.jit(jax.grad(energy_score)).lower(samples, y).compile()
    memory = compiled.memory_analysis()
    assert memory is None or memory.temp_size_in_bytes < 5e7


# ---- Coverage. ----


def test_the_coverage_of_a_right_forecast_is_its_level():
    # 19 samples: the band is their range, which holds the 20th draw with probability 18 / 20.
    draws = jr.normal(jr.key(0), (20, 1000, 200))
    found = jax.vmap(lambda x: coverage(x[1:], x[0]), in_axes=1)(draws)
    assert_mean(found, 0.9)
    assert_mean(jax.vmap(lambda x: coverage(x[1:], x[0], level=0.5), in_axes=1)(draws), 0.5)


def test_coverage_counts_what_is_inside():
    samples, y = np.arange(19.0)[:, None] * np.ones(4), np.array([0.0, 18.0, 18.5, np.nan])
    np.testing.assert_allclose(coverage(samples, y), 2 / 3)
    np.testing.assert_allclose(coverage(samples, y, weight=np.array([1.0, 1.0, 2.0, 5.0])), 0.5)
    np.testing.assert_allclose(coverage(samples, y, mask=np.array([True, True, False, True])), 1.0)
    # Level 1/2: the bounds are the 5th and the 15th of 19.
    ys = np.array([3.9, 4.0, 14.0, 14.1])
    np.testing.assert_allclose(coverage(samples, ys, level=0.5), 0.5)


# ---- Classes. ----


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans(), st.integers(0, 3)), min_size=2, max_size=16))
def test_the_auroc_counts_pairs_and_ties_by_half(rows):
    rows = [*rows, *[(0, False, 0)] * (16 - len(rows))]  # rows without weight: all have the shape of one program
    scores, labels, weight = (np.array(x, float) for x in zip(*rows))
    pairs = [(i, j) for i, j in itertools.product(range(len(rows)), repeat=2) if labels[i] > labels[j]]
    total = sum(weight[i] * weight[j] for i, j in pairs)
    if not total:
        with pytest.raises(ValueError, match="needs both classes"):
            auroc(scores, labels.astype(int), weight=weight)
        return
    half = {1: 1.0, 0: 0.5, -1: 0.0}
    wanted = sum(weight[i] * weight[j] * half[int(np.sign(scores[i] - scores[j]))] for i, j in pairs) / total
    np.testing.assert_allclose(auroc(scores, labels.astype(int), weight=weight), wanted, rtol=1e-13)
    np.testing.assert_allclose(auroc(np.exp(scores) - 9, labels.astype(bool), weight=weight), wanted, rtol=1e-13)
    np.testing.assert_allclose(auroc(-scores, labels.astype(int), weight=weight), 1 - wanted, atol=1e-13)


def test_the_auroc_of_masked_rows_and_of_one_class():
    scores, labels = np.array([0.1, np.nan, 0.7, 0.4]), np.array([0, 1, 1, 0])
    assert float(auroc(scores, labels, mask=np.array([1, 0, 1, 1], bool))) == 1.0
    assert np.isnan(auroc(scores, labels))
    assert np.isnan(jax.jit(auroc)(scores[:1], labels[:1]))
    big = np.random.default_rng(0).integers(0, 50, 100_000)
    truth = stats.mannwhitneyu(big[::2], big[1::2]).statistic / 50_000**2
    with jax.enable_x64(False):
        found = auroc(np.float32(big), np.arange(100_000) % 2 == 0)
    np.testing.assert_allclose(found, truth, rtol=1e-6)


def test_accuracy_is_the_weighted_share_of_right_labels():
    logits, labels = np.array([[0.0, 1.0], [2.0, 1.0], [0.0, 3.0], [np.nan, 0.0]]), np.array([1, 1, 1, 0])
    mask = np.array([True, True, True, False])
    np.testing.assert_allclose(accuracy(logits, labels, mask=mask), 2 / 3)
    np.testing.assert_allclose(accuracy(logits, labels, weight=np.array([1.0, 2.0, 1.0, 0.0])), 0.5)
    np.testing.assert_allclose(accuracy(logits[:2].reshape(1, 2, 2), labels[:2].reshape(1, 2)), 0.5)


# ---- Errors. ----


def test_root_mean_square_and_mean_absolute_errors_by_hand():
    prediction, y = np.array([[1.0, 2.0], [3.0, 9.0]]), np.array([[1.0, 5.0], [-1.0, np.nan]])
    np.testing.assert_allclose(rmse(prediction, y), np.sqrt(25 / 3))
    np.testing.assert_allclose(mae(prediction, y), 7 / 3)
    np.testing.assert_allclose(rmse(prediction, y, weight=np.array([1.0, 2.0])), np.sqrt(41 / 4))
    np.testing.assert_allclose(mae(prediction, y, mask=np.array([False, True])), 4.0)
    for metric in (rmse, mae):
        gradient = jax.grad(metric)(jnp.zeros((2, 2)), jnp.array([[0.0, jnp.nan], [0.0, 0.0]]))
        assert not np.asarray(gradient).any()
        assert np.isnan(metric(prediction, np.full((2, 2), np.nan)))


# ---- What is refused. ----


def test_shapes_that_disagree_are_refused():
    for score in (crps, energy_score, coverage):
        with pytest.raises(
            ValueError, match=r"samples must have shape \(S, 3, 2\) for y of shape \(3, 2\), got \(3, 2\)"
        ):
            score(np.zeros((3, 2)), np.zeros((3, 2)))
        with pytest.raises(ValueError, match=r"mask has shape \(2,\); it must be \(3, 2\) or its leading axes"):
            score(np.zeros((4, 3, 2)), np.zeros((3, 2)), mask=np.ones(2, bool))
    with pytest.raises(ValueError, match=r"energy_score needs y of shape \(\.\.\., d\)"):
        energy_score(np.zeros(4), 0.0)
    for metric in (rmse, mae):
        with pytest.raises(ValueError, match=r"prediction and y must have one shape, got \(3,\) and \(3, 1\)"):
            metric(np.zeros(3), np.zeros((3, 1)))
    with pytest.raises(ValueError, match=r"labels must have shape \(4,\) for logits of shape \(4, 2\), got \(3,\)"):
        accuracy(np.zeros((4, 2)), np.zeros(3, int))
    with pytest.raises(ValueError, match=r"scores and labels must have one shape, got \(4,\) and \(3,\)"):
        auroc(np.zeros(4), np.zeros(3, int))


def test_values_without_a_meaning_are_refused():
    for score in (crps, energy_score):
        with pytest.raises(ValueError, match="fair estimator needs at least 2 samples, got 1"):
            score(np.zeros((1, 3)), np.zeros(3))
        assert np.isfinite(score(np.zeros((1, 3)), np.zeros(3), fair=False)).all()
        with pytest.raises(ValueError, match="weight is for the average: pass average=True"):
            score(np.zeros((2, 3, 3)), np.zeros((3, 3)), weight=np.ones(3))
    with pytest.raises(ValueError, match="weight must not be negative"):
        rmse(np.zeros(2), np.zeros(2), weight=np.array([1.0, -1.0]))
    for level in (0.0, 1.0, 90):
        with pytest.raises(ValueError, match="level must lie between 0 and 1"):
            coverage(np.zeros((4, 2)), np.zeros(2), level=level)
    for labels, error in ((np.array([0, 2]), ValueError), (np.array([0.0, 1.0]), TypeError)):
        with pytest.raises(error, match="labels"):
            auroc(np.zeros(2), labels)
    with pytest.raises(TypeError, match="labels must be integers"):
        accuracy(np.zeros((2, 2)), np.zeros(2))
