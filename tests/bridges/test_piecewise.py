"""Bridges over many days, and what cells become, against closed forms and single bridges."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats

import sdeflow as sf
from sdeflow.bridges import Bridge, Clock, MixturePotential, PiecewiseBridge, fate, gaussian_sb, sinkhorn_bridge
from sdeflow.equations import BrownianMotion, OrnsteinUhlenbeck

pytestmark = pytest.mark.usefixtures("x64_module")

MEANS, VARIANCES, TIMES = np.array([[0.0, 1.0], [2.0, 0.5], [1.0, -1.0]]), (1.0, 0.25, 2.0), (0.0, 1.0, 3.0)
POINTS = jnp.array([[0.3, -0.2], [1.5, 0.9], [-0.4, 0.1]])


def gaussian(i, reference=None):
    eye, reference = jnp.eye(2), BrownianMotion(2, 0.8) if reference is None else reference
    ends = MEANS[i], VARIANCES[i] * eye, MEANS[i + 1], VARIANCES[i + 1] * eye
    return gaussian_sb(*ends, reference, t0=TIMES[i], t1=TIMES[i + 1])


def pieces(kind):
    """Two pieces whose arrays have equal shapes, or whose references are of two kinds."""
    other = OrnsteinUhlenbeck(theta=0.5, mean=jnp.zeros(2), sigma=0.8 * jnp.ones(2))
    return [gaussian(0), gaussian(1, None if kind == "alike" else other)]


@pytest.mark.parametrize("kind", ["alike", "unlike"])
def test_each_time_belongs_to_its_piece(kind):
    left, right = pieces(kind)
    both = PiecewiseBridge([left, right])
    assert (both._alike() is None) == (kind == "unlike")
    assert both.times.tolist() == list(TIMES)
    names = ("drift", "velocity", "score", "backward_drift")
    values = lambda bridge, ts: jax.jit(jax.vmap(lambda t, x: {name: getattr(bridge, name)(t, x) for name in names}))(
        ts, jnp.tile(POINTS, (2, 1))
    )
    # At the snapshot itself what goes forward belongs to the right piece, the way back to the left one.
    ts = jnp.array([0.0, 0.7, 1.0, 2.2, 3.0, 1.0])
    found, before, after = (values(bridge, ts) for bridge in (both, left, right))
    for name in names:
        is_left = (ts <= 1.0 if name == "backward_drift" else ts < 1.0)[:, None]
        wanted = np.where(is_left, before[name], after[name])
        # The density is one at the snapshot, so its score is; all else jumps there.
        assert name == "score" or np.abs(before[name] - after[name])[2].min() > 1e-3
        np.testing.assert_allclose(found[name], wanted, rtol=1e-10, err_msg=name)
    assert np.isfinite(jax.jit(jax.grad(lambda t: both.drift(t, POINTS[0]).sum()))(0.4))


@pytest.mark.parametrize("kind", ["alike", "unlike"])
def test_paths_go_through_all_snapshots(kind):
    both, count = PiecewiseBridge(pieces(kind)), 20_000
    ts = jnp.array([0.0, 0.5, 1.0, 2.0, 3.0])
    first, noise = jr.split(jr.key(3))
    x0 = MEANS[0] + jr.normal(first, (count, 2))
    keys = jr.split(noise, count)
    paths = np.asarray(jax.jit(jax.vmap(lambda x, key: both.sample_path(x, ts, key=key)))(x0, keys))
    np.testing.assert_array_equal(paths[:, 0], x0)
    for k, i in ((2, 1), (4, 2)):
        error = (VARIANCES[i] / count) ** 0.5
        np.testing.assert_allclose(paths[:, k].mean(axis=0), MEANS[i], atol=5 * error)
        np.testing.assert_allclose(paths[:, k].var(axis=0), VARIANCES[i], atol=5 * VARIANCES[i] * (2 / count) ** 0.5)
    # A path is the first piece's and then, from where that ended, the second's: given the snapshot between them, both
    # sides are independent. For Gaussians that is a partial covariance of 0.
    rest = [np.polynomial.polynomial.polyfit(paths[:, 2, 0], paths[:, k, 0], 1) for k in (1, 3)]
    gaps = [paths[:, k, 0] - a - b * paths[:, 2, 0] for k, (a, b) in zip((1, 3), rest)]
    assert abs(np.corrcoef(*gaps)[0, 1]) < 5 / count**0.5
    ends = np.asarray(jax.jit(jax.vmap(lambda x, key: both.sample_endpoint(x, key=key)))(x0, keys))
    np.testing.assert_allclose(ends.mean(axis=0), MEANS[2], atol=5 * (VARIANCES[2] / count) ** 0.5)
    assert stats.ks_2samp(ends[:, 0], paths[::-1, 4, 0]).pvalue > 1e-4


def planned(both, ts):
    return sf.grids.through(ts, dt0=0.1 * np.sign(ts[1] - ts[0]), jumps=both.times[1:-1])


def test_the_flow_carries_the_moments_through_all_snapshots():
    both = PiecewiseBridge(pieces("alike"))
    # The flow of Gaussians is affine: the mean goes to the mean, one deviation to one deviation.
    at = lambda i: jnp.stack([jnp.asarray(MEANS[i]), MEANS[i] + VARIANCES[i] ** 0.5 * jnp.array([1.0, 0.0])])
    flow = jax.jit(jax.vmap(lambda y: sf.solve(both.equation("flow"), y, TIMES, grid=planned(both, TIMES)).ys))
    found = flow(at(0))
    for i in range(3):
        np.testing.assert_allclose(found[:, i], at(i), atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_the_equation_has_the_moments_of_all_snapshots(way):
    both, count, order = PiecewiseBridge(pieces("alike")), 2000, [0, 1, 2] if way == "forward" else [2, 1, 0]
    ts = [TIMES[i] for i in order]
    starts = MEANS[order[0]] + VARIANCES[order[0]] ** 0.5 * jr.normal(jr.key(5), (count, 2))
    solve = lambda y, key: sf.solve(both.equation(way), y, ts, grid=planned(both, ts), key=key).ys
    paths = np.asarray(jax.jit(jax.vmap(solve))(starts, jr.split(jr.key(6), count)))
    # The walk's own error is below a hundredth here.
    for k, i in enumerate(order):
        error = 5 * (VARIANCES[i] / count) ** 0.5
        np.testing.assert_allclose(paths[:, k].mean(axis=0), MEANS[i], atol=error + 0.01)
        np.testing.assert_allclose(paths[:, k].var(axis=0), VARIANCES[i], rtol=5 * (2 / count) ** 0.5 + 0.02)


def test_single_precision_stays():
    single = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == jnp.float64 else a, pieces("alike"))
    both = PiecewiseBridge(single)
    x, ts = POINTS[0].astype(jnp.float32), jnp.array([0.0, 1.0, 2.0], jnp.float32)
    found = jax.jit(lambda x, key: (both.drift(1.0, x), both.sample_path(x, ts, key=key)))(x, jr.key(0))
    assert [a.dtype for a in found] == [jnp.float32] * 2


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (list, TypeError, "at least one Bridge"),
        (lambda: [gaussian(0), "x"], TypeError, "'Bridge', 'str'"),
        (lambda: [gaussian(1), gaussian(0)], ValueError, "bridge 0 ends at 3 but bridge 1 begins at 0"),
        (
            lambda: [gaussian_sb(*(jnp.zeros(1), jnp.eye(1)) * 2, BrownianMotion(1)), gaussian(1)],
            ValueError,
            r"different dimensions: \[1, 2\]",
        ),
    ],
)
def test_bridges_that_do_not_join_are_refused(given, error, words):
    with pytest.raises(error, match=words):
        PiecewiseBridge(given())


@pytest.mark.parametrize(
    ("ts", "words"),
    [([0.5, 3.5], "between t0=0 and t1=3, got 0.5 to 3.5"), ([2.0, 1.0], "do not decrease"), (1.0, "one row")],
)
def test_times_of_paths_are_checked(ts, words):
    with pytest.raises(ValueError, match=words):
        PiecewiseBridge(pieces("alike")).sample_path(POINTS[0], jnp.array(ts), key=jr.key(0))


# ---- Fates. ----

EPSILON, SPREAD, WELLS = 0.5, 0.05, np.array([-3.0, 3.0])
LABELS = ["left"] * 20 + ["right"] * 20
CELLS = np.concatenate([well + np.linspace(-0.5, 0.5, 20) for well in WELLS])[:, None]
STARTS = np.array([-0.4, -0.05, 0.0, 0.1, 0.3])


def two_wells(t0=0.0):
    """A bridge on a line into two wells of masses 1 and 2, which no path reaches both of."""
    clock = Clock(BrownianMotion(1, EPSILON**0.5), t0, t0 + 1.0)
    weights = jnp.log(jnp.array([1.0, 2.0]))
    return Bridge(
        clock, MixturePotential(weights, jnp.asarray(WELLS)[:, None], jnp.full((2, 1), SPREAD), clock.epsilon)
    )


def into_the_right_well(x):
    """log w_k = log a_k + (S x^2 + 2 r_k x) / (2 epsilon), for wells of one spread."""
    odds = 2 * np.exp((WELLS[1] - WELLS[0]) * x / EPSILON)
    return odds / (1 + odds)


def within_five_errors(found, wanted, paths):
    return (np.abs(found - wanted) < 5 * np.sqrt(wanted * (1 - wanted) / paths) + 1e-9).all()


def test_fates_between_two_wells_are_the_weights_of_the_mixture():
    paths = 4000
    fates = fate(two_wells(), STARTS[:, None], CELLS, LABELS, num_paths=paths, key=jr.key(0))
    assert fates.names == ("left", "right")
    np.testing.assert_allclose(np.asarray(fates.probabilities).sum(axis=1), 1, rtol=1e-12)
    wanted = into_the_right_well(STARTS)
    assert 0.01 < wanted.min() < 0.5 < wanted.max() < 0.999
    assert within_five_errors(np.asarray(fates.probabilities)[:, 1], wanted, paths)
    again = fate(two_wells(), STARTS[:2, None], CELLS, LABELS, num_paths=paths, key=jr.key(0))
    np.testing.assert_array_equal(again.probabilities, fates.probabilities[:2])


def test_fates_over_two_days_are_averages_over_where_the_first_ends():
    paths, eye = 4000, jnp.eye(1)
    day = gaussian_sb(jnp.zeros(1), eye, 0.2 * jnp.ones(1), 0.3 * eye, BrownianMotion(1, EPSILON**0.5))
    both = PiecewiseBridge([day, two_wells(1.0)])
    fates = fate(both, STARTS[:, None], CELLS, LABELS, num_paths=paths, key=jr.key(1))
    slope = float(day.potential.spread[0, 0])
    quantiles = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    ends = 0.2 + slope * STARTS[:, None] + (EPSILON * slope) ** 0.5 * quantiles
    assert within_five_errors(np.asarray(fates.probabilities)[:, 1], into_the_right_well(ends).mean(axis=1), paths)


def test_fates_of_samples_are_rows_of_the_plan():
    rng, paths = np.random.default_rng(0), 4000
    x, y = rng.normal(size=(6, 2)), 1.5 * rng.normal(size=(30, 2))
    kinds = rng.integers(3, size=30)
    plan = np.asarray(sf.metrics.sinkhorn(x, y, 0.5, tolerance=1e-6).plan())
    wanted = np.stack([plan[:, kinds == k].sum(axis=1) for k in range(3)], axis=1) / plan.sum(axis=1, keepdims=True)
    bridge = sinkhorn_bridge(x, y, 0.5, tolerance=1e-6)
    fates = fate(bridge, x, y, kinds, neighbours=1, num_paths=paths, key=jr.key(2))
    assert fates.names == (0, 1, 2)
    assert within_five_errors(np.asarray(fates.probabilities), wanted, paths)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": LABELS[:-1]}, r"40 cells but labels of shape \(39,\)"),
        ({"neighbours": 41}, "at most 40"),
        ({"num_paths": 0}, "num_paths must be a positive integer, got 0"),
        ({"x0": np.zeros((2, 3))}, "one dimension, got 3 and 1"),
        ({"x0": np.array([[np.nan]])}, "infinite or NaN"),
    ],
)
def test_fates_refuse(change, words):
    given = {"x0": STARTS[:, None], "cells": CELLS, "labels": LABELS} | change
    with pytest.raises(ValueError, match=words):
        fate(two_wells(), **given, key=jr.key(0))


def test_cells_without_a_label_have_no_vote():
    x0, x1 = jnp.array([[-1.0], [1.0]]), jnp.array([[-3.0], [-2.9], [3.0], [3.1]])
    bridge = sf.bridges.sinkhorn_bridge(x0, x1, 1.0)
    some = sf.bridges.fate(bridge, x0, x1, ["left", None, "right", float("nan")], neighbours=1, key=jax.random.key(0))
    few = sf.bridges.fate(bridge, x0, x1[::2], ["left", "right"], neighbours=1, key=jax.random.key(0))
    assert some.names == ("left", "right")
    np.testing.assert_array_equal(some.probabilities, few.probabilities)
    with pytest.raises(ValueError, match="no cell has a label"):
        sf.bridges.fate(bridge, x0, x1, [None] * 4, neighbours=1, key=jax.random.key(0))
