"""Cells between snapshots, and scores of days left out, where both are known: clouds that move, splines, counts."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from sdeflow.bridges import (
    copy_next,
    copy_previous,
    independent_midpoint,
    interpolate,
    score_left_out,
    sinkhorn_bridge,
    transport_midpoint,
)
from sdeflow.data import Snapshots
from sdeflow.metrics import paired_difference

pytestmark = pytest.mark.usefixtures("x64_module")

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
KEY = jr.key(0)
N, D = 40, 3


def cloud(seed=0, dtype=np.float64):
    return np.random.default_rng(seed).normal(size=(N, D)).astype(dtype)


def moved(times, path, dtype=np.float64):
    """One cloud whose mean goes along a path: rows in another order each time."""
    x, rng = cloud(), np.random.default_rng(1)
    return Snapshots(times, [(rng.permutation(x) + path(t)).astype(dtype) for t in times])


def line(t):
    return t * np.array([2.0, -1.0, 0.5])


def curve(t):
    return np.array([np.sin(t), 0.3 * t**2, 1.0])


def in_order(x):
    return x[np.lexsort(x.T)]


# ---- The simplest guesses. ----


@pytest.mark.parametrize("time", [0.5, 1.0, 3.9])
def test_the_transport_midpoint_of_a_cloud_that_moves_is_exact(time):
    snapshots = moved((0.0, 4.0), line)
    guess = transport_midpoint(snapshots, time)
    np.testing.assert_allclose(in_order(guess - line(time)), in_order(cloud()), atol=1e-12)


def test_copies_are_the_neighbours():
    snapshots = moved((0.0, 1.0, 4.0, 5.0), line)
    assert copy_previous(snapshots, 2.0) is snapshots.samples[1]
    assert copy_next(snapshots, 2.0) is snapshots.samples[2]


def test_the_independent_midpoint_takes_each_cell_after_once():
    x = np.zeros((N, D))
    guess = independent_midpoint(Snapshots([0.0, 4.0], [x, cloud()]), 1.0, key=KEY)
    np.testing.assert_allclose(in_order(guess), in_order(cloud() / 4), atol=1e-15)
    fewer = independent_midpoint(Snapshots([0.0, 4.0], [x, cloud()[:7]]), 1.0, key=KEY)
    _, counts = np.unique(fewer, axis=0, return_counts=True)
    assert fewer.shape == (N, D)
    assert sorted(counts) == [5] * 2 + [6] * 5


# ---- The interpolation. ----


def test_in_step_it_is_the_mean_of_the_sinkhorn_bridge():
    x0, x1 = cloud(), 0.5 * cloud(2)[:30] + 1.0
    guess = interpolate(Snapshots([1.0, 5.0], [x0, x1]), 2.0, key=KEY, epsilon=0.4, asynchrony=0.0)
    bridge = sinkhorn_bridge(x0, x1, 0.4)
    ends = jax.vmap(partial(bridge.endpoint_mean, 0.0))(jnp.asarray(x0))
    np.testing.assert_allclose(guess, 0.75 * x0 + 0.25 * ends, atol=1e-10)


def test_the_default_blur_scales_with_the_cells():
    x0, x1 = cloud(), cloud(2) + 1.0
    small, large = (Snapshots([0.0, 1.0], [c * x0, c * x1]) for c in (1.0, 100.0))
    guess = interpolate(small, 0.3, key=KEY)
    np.testing.assert_allclose(interpolate(large, 0.3, key=KEY), 100 * guess, rtol=1e-9)
    variance = (np.trace(np.cov(x0.T, ddof=0)) + np.trace(np.cov(x1.T, ddof=0))) / 2
    np.testing.assert_allclose(interpolate(small, 0.3, key=KEY, epsilon=0.05 * variance), guess, rtol=1e-9)


def test_cells_far_apart_go_where_transport_takes_them():
    x = 4.0 * np.stack(np.unravel_index(np.arange(N), (4, 4, 4)), axis=1)
    snapshots = Snapshots([0.0, 2.0], [x, np.random.default_rng(3).permutation(x) + 1.0])
    guess = interpolate(snapshots, 1.0, key=KEY, epsilon=0.4, asynchrony=0.0)
    np.testing.assert_allclose(guess, transport_midpoint(snapshots, 1.0), atol=1e-9)


@pytest.mark.parametrize("curvature", [False, True])
def test_it_returns_to_the_snapshots(curvature):
    snapshots = moved((0.0, 1.0, 2.0, 3.0), curve)
    for time, i in ((1.0 + 1e-10, 1), (2.0 - 1e-10, 2)):
        guess = interpolate(snapshots, time, key=KEY, curvature=curvature)
        np.testing.assert_allclose(guess, snapshots.samples[i], atol=1e-3)


def test_it_starts_from_the_nearer_end_and_knows_no_direction_of_time():
    x0, x1 = cloud(), cloud(2)[:30] + 1.0
    there, back = Snapshots([0.0, 4.0], [x0, x1]), Snapshots([0.0, 4.0], [x1, x0])
    late = interpolate(there, 3.0, key=KEY)
    assert late.shape == x1.shape
    assert interpolate(there, 2.0, key=KEY).shape == x0.shape
    np.testing.assert_array_equal(late, interpolate(back, 1.0, key=KEY))


def test_cells_out_of_step_are_so_along_their_way_alone():
    x, far, t = cloud(), np.array([300.0, 0.0, 400.0]), 0.25
    snapshots = Snapshots([0.0, 1.0], [x, x + far])
    sharp = partial(interpolate, snapshots, t, epsilon=0.01)
    apart = [sharp(key=jr.fold_in(KEY, k)) - sharp(key=KEY, asynchrony=0.0) for k in range(25)]
    along, across = np.array(apart) @ (far / 500), np.array(apart) @ np.array([0.0, 1.0, 0.0])
    wanted = x.var(axis=0).mean() * t * (1 - t)
    assert abs(along.var() / wanted - 1) < 5 * np.sqrt(2 / along.size)
    # The ways differ a little where the plan is not sharp.
    assert np.abs(across).max() < 0.02 * np.sqrt(wanted)
    assert not np.array_equal(apart[0], apart[1])


def test_no_cell_leaves_its_way():
    x, t = cloud(), 0.5
    snapshots = Snapshots([0.0, 1.0], [x, x + 10.0])
    end = x + (interpolate(snapshots, t, key=KEY, asynchrony=0.0) - x) / t
    share = ((interpolate(snapshots, t, key=KEY, asynchrony=1e9) - x) / (end - x))[:, 0]
    np.testing.assert_allclose(share, np.round(share), atol=1e-9)
    assert set(np.round(share)) == {0.0, 1.0}


def test_the_bend_is_that_of_the_natural_spline():
    times, means = (0.0, 1.0, 2.0, 3.0), np.array([curve(t) for t in (0.0, 1.0, 2.0, 3.0)])
    snapshots = moved(times, curve)
    bend = interpolate(snapshots, 1.5, key=KEY, curvature=True) - interpolate(snapshots, 1.5, key=KEY, curvature=False)
    # Four even knots: 4 M1 + M2 = 6 D1, M1 + 4 M2 = 6 D2, and halfway the spline is (M1 + M2) / 16 below its chord.
    second = means[:-2] - 2 * means[1:-1] + means[2:]
    centre = np.mean(cloud(), axis=0)
    np.testing.assert_allclose(means[1:3] + centre, [x.mean(axis=0) for x in snapshots.samples[1:3]], atol=1e-12)
    np.testing.assert_allclose(bend, np.broadcast_to(-6 * second.sum(axis=0) / 5 / 16, (N, D)), atol=1e-12)


def test_the_bend_is_the_mean_of_the_momentum_reference_tied_to_the_means():
    times, time = np.array([0.0, 0.7, 2.0, 2.5, 4.0]), 1.1
    snapshots = moved(tuple(times), curve)
    means = np.array([x.mean(axis=0) for x in snapshots.samples])
    # Integrated Brownian motion, and a start and velocity of which nothing is known: kriging with a trend.
    kernel = lambda s, t: np.minimum(s, t) ** 2 * (3 * np.maximum(s, t) - np.minimum(s, t)) / 6
    trend = np.stack([np.ones(5), times], axis=1)
    system = np.block([[kernel(times[:, None], times), trend], [trend.T, np.zeros((2, 2))]])
    weights = np.linalg.solve(system, np.concatenate([kernel(times, time), [1.0, time]]))[:5]
    share = (time - 0.7) / 1.3
    wanted = weights @ means - (1 - share) * means[1] - share * means[2]
    plain = partial(interpolate, snapshots, time, key=KEY)
    np.testing.assert_allclose(plain(curvature=True) - plain(curvature=False), np.tile(wanted, (N, 1)), atol=1e-10)


def test_it_bends_with_four_snapshots_or_more():
    three, four = moved((0.0, 1.0, 2.0), curve), moved((0.0, 1.0, 2.0, 3.0), curve)
    for snapshots, bent in ((three, False), (four, True)):
        guess, other = (interpolate(snapshots, 0.5, key=KEY, curvature=c) for c in (bent, not bent))
        np.testing.assert_array_equal(interpolate(snapshots, 0.5, key=KEY), guess)
        assert np.abs(guess - other).max() > 1e-3


def test_it_keeps_single_precision():
    single, double = (moved((0.0, 1.0, 2.0, 3.0), curve, dtype) for dtype in (np.float32, np.float64))
    for method in (partial(interpolate, key=KEY), partial(independent_midpoint, key=KEY), transport_midpoint):
        guess = method(single, 1.5)
        assert guess.dtype == np.float32
        np.testing.assert_allclose(guess, method(double, 1.5), atol=1e-4)


# ---- The scores. ----


def test_scores_of_a_cloud_that_moves_are_known():
    times = (0.0, 1.0, 3.0, 4.0)
    methods = {"transport": transport_midpoint, "previous": copy_previous}
    scores = score_left_out(moved(times, line), methods, n=N, key=KEY, num_subsamples=2)
    assert scores["transport"].shape == (2, 2, 2)
    np.testing.assert_allclose(scores["transport"], 0, atol=1e-12)
    # From 0 to 1 and from 1 to 3; a shift costs its length, whatever the power.
    steps = np.linalg.norm(line(1.0)) * np.array([1.0, 2.0])
    np.testing.assert_allclose(scores["previous"], np.broadcast_to(steps[:, None], (2, 2, 2)), rtol=1e-12)


def test_no_method_sees_the_day_that_is_left_out():
    seen = []

    def watch(train, time):
        seen.append((time, train.times.tolist(), train.counts))
        return copy_next(train, time)

    score_left_out(moved((0.0, 1.0, 3.0, 4.0), line), {"watch": watch}, n=9, key=KEY, num_subsamples=1)
    assert seen == [(1.0, [0.0, 3.0, 4.0], (9, 9, 9)), (3.0, [0.0, 1.0, 4.0], (9, 9, 9))]


def test_the_first_subsamples_stay_the_same():
    snapshots, methods = moved((0.0, 1.0, 2.0), line), {"copy": copy_previous}
    two, three = (score_left_out(snapshots, methods, n=9, key=KEY, num_subsamples=k)["copy"] for k in (2, 3))
    np.testing.assert_array_equal(two, three[:2])
    assert len(np.unique(three[..., 0])) == 3


@pytest.mark.skipif(not (DATA / "hesc.npz").exists(), reason="the cells are not shipped")
def test_embryonic_cells_between_their_days_are_nearer_than_the_transport_midpoint():
    with np.load(DATA / "hesc.npz", allow_pickle=False) as file:
        cells = Snapshots([0, 12, 24, 36, 72], [file[f"t{i}"] for i in range(5)]).standardise()
    methods = {"ours": partial(interpolate, key=KEY), "transport": transport_midpoint}
    scores = score_left_out(cells, methods, n=52, key=jr.key(5))
    for k in range(2):
        assert paired_difference(*(scores[name][..., k].mean(axis=1) for name in methods)).high < -0.3


# ---- Bad input. ----


@pytest.mark.parametrize("method", [partial(interpolate, key=KEY), transport_midpoint, copy_previous, copy_next])
@pytest.mark.parametrize("time", [-1.0, 0.0, 1.0, 3.0, 5.0, float("nan")])
def test_times_that_are_not_between_snapshots_are_refused(method, time):
    with pytest.raises(ValueError, match="strictly|must lie between"):
        method(moved((0.0, 1.0, 3.0), line), time)


def test_weights_and_unequal_numbers_are_refused():
    x = cloud()
    weighted = Snapshots([0.0, 1.0], [x, x], weights=[np.ones(N), np.ones(N)])
    for method in (partial(interpolate, key=KEY), copy_previous):
        with pytest.raises(ValueError, match="weigh alike"):
            method(weighted, 0.5)
    with pytest.raises(ValueError, match=r"got 40 at 0 and 7 at 1: use Snapshots\.subsample"):
        transport_midpoint(Snapshots([0.0, 1.0], [x, x[:7]]), 0.5)


@pytest.mark.parametrize("asynchrony", [-0.1, float("inf"), float("nan")])
def test_an_asynchrony_that_is_no_variance_is_refused(asynchrony):
    with pytest.raises(ValueError, match="asynchrony must be finite"):
        interpolate(moved((0.0, 1.0), line), 0.5, key=KEY, asynchrony=asynchrony)


def test_scores_that_cannot_be_compared_are_refused():
    snapshots = moved((0.0, 1.0, 2.0), line)
    score = partial(score_left_out, key=KEY, num_subsamples=1)
    with pytest.raises(ValueError, match="n must be at most 40"):
        score(snapshots, {"copy": copy_previous}, n=41)
    with pytest.raises(ValueError, match="num_subsamples must be at least 1"):
        score_left_out(snapshots, {"copy": copy_previous}, n=9, key=KEY, num_subsamples=0)
    with pytest.raises(ValueError, match="at least three times"):
        score(moved((0.0, 1.0), line), {"copy": copy_previous}, n=9)
    with pytest.raises(ValueError, match=r"'few' must return finite cells of shape \(9, 3\) for time 1, got shape"):
        score(snapshots, {"few": lambda train, time: train.samples[0][:5]}, n=9)
    with pytest.raises(ValueError, match="'hole' must return finite"):
        score(snapshots, {"hole": lambda train, time: np.full((9, D), np.nan)}, n=9)
