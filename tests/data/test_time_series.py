"""Times, dates, duplicates, selection, standardisation, splits and thinning of `TimeSeries`."""

import copy
import datetime
import pickle

import jax
import numpy as np
import pytest
from data_toys import ragged
from hypothesis import given, settings
from hypothesis import strategies as st

from sdeflow.data import TimeSeries

NAN = float("nan")
few = settings(deadline=None, max_examples=40)


def same(a, b):
    """Two sets with the same series, values and tables, to the last bit."""
    assert a.ids == b.ids
    assert a.classes == b.classes
    for mine, theirs in zip((*a.times, *a.values), (*b.times, *b.values)):
        np.testing.assert_array_equal(mine, theirs)
    for name in ("labels", "targets", "static", "value_shift", "value_scale"):
        mine, theirs = getattr(a, name), getattr(b, name)
        assert (mine is None) == (theirs is None)
        if mine is not None:
            np.testing.assert_array_equal(mine, theirs)


# Times


@few
@given(seed=st.integers(0, 999), log_scale=st.floats(-6, 6), shift=st.floats(-1e9, 1e9))
@pytest.mark.parametrize("align", ["global", "start"])
def test_affine_maps_of_time_leave_internal_times_alone(align, seed, log_scale, shift):
    times, values = ragged(5, seed=seed, low=2)
    scale = 10.0**log_scale
    moved = [scale * (t + round(shift / 1e3)) for t in times]
    a = TimeSeries.from_arrays(times, values, align=align)
    b = TimeSeries.from_arrays(moved, values, align=align)
    for t, u, user, i in zip(a.times, b.times, moved, range(5)):
        np.testing.assert_allclose(t, u, atol=1e-8)
        np.testing.assert_allclose(b.to_user_time(u, i), user, rtol=1e-12)
        np.testing.assert_array_equal(b.to_internal_time(user, i), u)
    assert b.time_scale == pytest.approx(scale * a.time_scale, rel=1e-7)
    if align == "start":
        assert all(t[0] == 0 and t[-1] <= 1 for t in a.times)
        assert max(t[-1] for t in a.times) == 1


def test_unix_seconds_keep_their_spacing():
    start = 1.7e9 + np.array([0.0, 86400.0])
    times = [s + np.arange(0, 3600.0, 60.0) for s in start]
    data = TimeSeries.from_arrays(times, [np.ones(60)] * 2, align="start")
    gaps = np.diff(data.batch([0, 1]).times.astype(np.float64), axis=1)
    np.testing.assert_allclose(gaps, 60 / data.time_scale, rtol=1e-4)
    assert data.time_scale == 3540
    np.testing.assert_array_equal(data.time_shift, start)


def test_shift_and_scale():
    data = TimeSeries.from_arrays([[5.0, 9.0], [3.0, 6.0]], [[1, 2], [1, 2]])
    assert (data.time_shift, data.time_scale) == (3.0, 4.0)
    assert [t.tolist() for t in data.times] == [[0.5, 1.5], [0.0, 0.75]]
    single = TimeSeries.from_arrays([[5.0]], [[1.0]])
    assert (single.time_shift, single.time_scale) == (5.0, 1.0)


def test_series_of_a_map_by_position():
    data = TimeSeries.from_arrays([[5.0, 9.0], [3.0, 6.0]], [[1, 2], [1, 2]], align="start")
    np.testing.assert_array_equal(data.to_user_time([[0.0, 1.0], [0.0, 0.5]], [0, 1]), [[5, 9], [3, 5]])
    np.testing.assert_array_equal(data[1].time_shift, [3.0])
    with pytest.raises(ValueError, match="with i="):
        data.to_user_time(0.5)
    with pytest.raises(ValueError, match=r"shape \(2,\), which must lead"):
        data.to_user_time([0.0, 0.5, 1.0], [0, 1])
    with pytest.raises(ValueError, match="NaN"):
        data.to_internal_time(NAN, 0)


@pytest.mark.parametrize("unit", ["D", "h", "s", "ms", "us", "ns"])
def test_dates_come_back_as_dates(unit):
    user = np.array(["2024-02-28", "2024-03-01", "2024-03-04"], f"M8[{unit}]")
    data = TimeSeries.from_arrays([user, user[:2]], [[1, 2, 3], [1, 2]])
    np.testing.assert_allclose(data.times[0], [0, 0.4, 1])
    np.testing.assert_array_equal(data.to_user_time(data.times[0]), user)
    assert data.time_dtype.kind == "M"
    assert data.time_shift == user[0]
    assert data.until("2024-03-01").lengths.tolist() == [2, 2]
    assert data.until(datetime.datetime(2024, 3, 2)).lengths.tolist() == [2, 2]
    assert data.until(np.datetime64("2024-03-04T00:00:00.000000001")).lengths.tolist() == [3, 2]
    with pytest.raises(TypeError, match="plain numbers|same kind"):
        data.until(3.0)


def test_nanoseconds_lose_nothing():
    user = np.array([0, 1, 1000], "m8[ns]") + np.datetime64("2024-01-01T12:34:56.789012345")
    data = TimeSeries.from_arrays([user], [[1, 2, 3]])
    np.testing.assert_array_equal(data.times[0], [0, 1e-3, 1])
    np.testing.assert_array_equal(data.to_user_time(data.times[0]), user)
    numbers = TimeSeries.from_arrays([user.astype(np.int64)], [[1, 2, 3]])
    np.testing.assert_array_equal(numbers.times[0], [0, 1e-3, 1])


def test_durations_and_objects():
    durations = TimeSeries.from_arrays([np.array([0, 36], "m8[h]")], [[1, 2]])
    assert durations.to_user_time(0.5) == np.timedelta64(18, "h")
    zone = datetime.timezone(datetime.timedelta(hours=2))
    stamps = [datetime.datetime(2024, 1, 1, 2, tzinfo=zone), datetime.datetime(2024, 1, 1, 4, tzinfo=zone)]
    data = TimeSeries.from_arrays([stamps], [[1, 2]])
    assert data.time_shift == np.datetime64("2024-01-01T00:00:00")
    with pytest.raises(TypeError, match="same kind"):
        TimeSeries.from_arrays([[0.0, 1.0]], [[1, 2]]).until(np.datetime64("2024-01-01"))


def test_like_shares_the_map_of_times_and_the_classes():
    train = TimeSeries.from_arrays([[0.0, 10.0]] * 2, [[1, 2]] * 2, labels=["b", "a"])
    test = TimeSeries.from_arrays([[2.0, 27.0]], [[1, 2]], labels=["b"], like=train)
    assert test.times[0].tolist() == [0.2, 2.7]
    assert (test.labels.tolist(), test.classes) == ([1], ("a", "b"))
    started = TimeSeries.from_arrays([[0.0, 10.0]], [[1, 2]], align="start")
    later = TimeSeries.from_arrays([[2.0, 27.0]], [[1, 2]], align="start", like=started)
    assert later.times[0].tolist() == [0.0, 2.5]
    with pytest.raises(ValueError, match="another align="):
        TimeSeries.from_arrays([[0.0]], [[1.0]], like=started)
    with pytest.raises(ValueError, match="like has 1 channels, but these series have 2"):
        TimeSeries.from_arrays([[0.0]], [[[1.0, 2.0]]], like=train)
    with pytest.raises(TypeError, match=r"plain numbers.*datetime64"):
        TimeSeries.from_arrays([np.array(["2024-01-01"], "M8[s]")], [[1.0]], like=train)


@pytest.mark.parametrize(
    ("how", "expected"), [("mean", [[2, 5], [3, 6], [NAN, 8]]), ("last", [[3, 5], [3, 6], [NAN, 8]])]
)
def test_duplicates(how, expected):
    times = [[0, 0, 1, 2, 2], [5]]
    values = [[[1, NAN], [3, 5], [3, 6], [NAN, 8], [NAN, NAN]], [[9, 9]]]
    data = TimeSeries.from_arrays(times, values, duplicates=how)
    np.testing.assert_array_equal(data.values[0], expected)
    assert data.lengths.tolist() == [3, 1]
    # Equal times of neighbouring series are not duplicates.
    apart = TimeSeries.from_arrays([[0, 1], [1, 2]], [[1, 2], [3, 4]], duplicates=how)
    assert apart.lengths.tolist() == [2, 2]


# Selection


def test_selection(data):
    part = data[[3, 1, 1]]
    assert part.ids == ("p3", "p1", "p1")
    for name in ("times", "values"):
        for mine, i in zip(getattr(part, name), (3, 1, 1)):
            np.testing.assert_array_equal(mine, getattr(data, name)[i])
    assert part.labels.tolist() == data.labels[[3, 1, 1]].tolist()
    assert data[-1].ids == ("p39",)
    assert data[5:7].ids == ("p5", "p6")
    assert data[np.arange(40) % 2 == 0].num_series == 20
    assert part.buckets == data.buckets
    assert [one.ids[0] for one in data] == list(data.ids)
    with pytest.raises(IndexError, match="none at position 40"):
        data[40]
    with pytest.raises(ValueError, match="selection is empty"):
        data[3:3]


def test_nothing_can_be_changed(data):
    for array in (data.values[0], data.times[0], data.labels, data.lengths, data.value_scale):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    with pytest.raises(AttributeError):
        data.ids = ()
    source = np.ones(3)
    mine = TimeSeries.from_arrays([[0, 1, 2]], [source], targets=[1.0])
    source[:] = 5
    assert mine.values[0].tolist() == [[1.0]] * 3


def test_copies_and_pickles(data):
    same(pickle.loads(pickle.dumps(data)), data)
    same(copy.deepcopy(data), data)


def test_until():
    data = TimeSeries.from_arrays([[0.1, 0.2, 0.3], [0.1, 0.7]], [[1, 2, 3], [4, 5]])
    past = data.until(0.3)
    assert past.lengths.tolist() == [3, 1]
    assert past.time_scale == data.time_scale
    assert data.until([0.2, 0.7]).lengths.tolist() == [2, 2]
    with pytest.raises(ValueError, match="observed in series 0, 1"):
        data.until(0.05)
    with pytest.raises(ValueError, match=r"scalar or of shape \(2,\)"):
        data.until([0.1, 0.2, 0.3])
    started = TimeSeries.from_arrays([[10.0, 11.0], [20.0, 21.0]], [[1, 2], [4, 5]], align="start")
    assert started.until(20.0 + np.array([-10, 0])).lengths.tolist() == [1, 1]


def test_until_needs_an_observation():
    data = TimeSeries.from_arrays([[0.0, 1.0]], [[NAN, 1.0]], ids=["late"])
    with pytest.raises(ValueError, match="series 'late'"):
        data.until(0.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"labels": ["a", "b"]},
            ["2 series", "1 channel ", "2 to 3 time steps", "2 classes", "20.0% of the values"],
        ),
        ({"targets": [1, 2], "static": np.ones((2, 3))}, ["1 target,", "3 static covariates"]),
    ],
)
def test_repr_says_what_is_there(options, words):
    text = repr(TimeSeries.from_arrays([[1, 2, 4], [1, 3]], [[1, NAN, 2], [3, 4]], **options))
    for word in [*words, "times from 1 to 4", "being 3;", "padded to 3 steps (17% of them padding)"]:
        assert word in text
    assert "\n" not in text
    dates = TimeSeries.from_arrays([np.array(["2024-01-01", "2024-01-02"], "M8[D]")], [[1, 2]])
    assert "from 2024-01-01T00:00:00.000000 to 2024-01-02T00:00:00.000000" in repr(dates)


# Values


def test_standardise_uses_observed_values_only(data):
    ours = data.standardise()
    pooled, before = np.concatenate(ours.values), np.concatenate(data.values)
    np.testing.assert_allclose(np.nanmean(pooled, axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(np.nanstd(pooled, axis=0), 1)
    np.testing.assert_array_equal(np.isnan(pooled), np.isnan(before))
    np.testing.assert_allclose(ours.to_user_values(pooled), before, rtol=1e-12)
    np.testing.assert_allclose(ours.value_shift, np.nanmean(before, axis=0))
    again = ours.standardise()
    np.testing.assert_allclose(np.concatenate(again.values), pooled, rtol=1e-9)
    np.testing.assert_allclose(again.value_scale, ours.value_scale)


def test_standardise_like_train(data):
    train, test = data[:30], data[30:]
    for like in (train, train.standardise()):
        ours = test.standardise(like=like)
        expected = (np.concatenate(test.values) - np.nanmean(np.concatenate(train.values), axis=0)) / np.nanstd(
            np.concatenate(train.values), axis=0
        )
        np.testing.assert_allclose(np.concatenate(ours.values), expected, rtol=1e-9)
    with pytest.raises(ValueError, match="like has 1 channels, but these series have 2"):
        test.standardise(like=TimeSeries.from_arrays([[0]], [[1]]))


def test_standardise_leaves_constant_and_unseen_channels_finite():
    x = np.stack([np.full(4, 0.1), np.full(4, NAN), 1e9 + np.arange(4.0)], axis=1)
    ours = TimeSeries.from_arrays([np.arange(4)], [x]).standardise()
    np.testing.assert_allclose(ours.values[0][:, 0], 0, atol=1e-15)
    assert np.isnan(ours.values[0][:, 1]).all()
    np.testing.assert_allclose(ours.value_scale, [1, 1, np.std(np.arange(4))])
    np.testing.assert_allclose(ours.values[0][:, 2], (np.arange(4) - 1.5) / np.std(np.arange(4)))


# Random choices


@few
@given(seed=st.integers(0, 999), fraction=st.floats(0, 0.99), per=st.sampled_from(["channel", "step"]))
def test_dropping_commutes_with_any_reordering(seed, fraction, per):
    times, values = ragged(8, seed=seed)
    data = TimeSeries.from_arrays(times, values, ids=list("abcdefgh"))
    key = jax.random.key(seed)
    order = np.random.default_rng(seed).permutation(8)[:5]
    thin = data.drop_observations(fraction, key=key, per=per)
    same(data[order].drop_observations(fraction, key=key, per=per), thin[order])
    rebuilt = TimeSeries.from_arrays(
        [times[i] for i in order], [values[i] for i in order], ids=["abcdefgh"[i] for i in order]
    ).drop_observations(fraction, key=key, per=per)
    for mine, i in zip(rebuilt.values, order):
        np.testing.assert_array_equal(mine, thin.values[i])
    for before, after in zip(data.values, thin.values):
        kept = ~np.isnan(after)
        assert kept.any()
        np.testing.assert_array_equal(after[kept], before[kept])
        if per == "step":
            # A step that stays keeps all it had.
            stays = kept.any(axis=1)
            np.testing.assert_array_equal(after[stays], before[stays])
    for before, after in zip(data.times, thin.times):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("per", ["channel", "step"])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.5, 0.7])
def test_the_share_dropped_is_the_share_asked_for(per, fraction):
    times = [np.arange(7)] * 2000
    data = TimeSeries.from_arrays(times, [np.ones((7, 3))] * 2000)
    shares = [
        np.isnan(np.concatenate(data.drop_observations(fraction, key=jax.random.key(s), per=per).values)).mean()
        for s in range(2)
    ]
    # Each series rounds 7 * fraction up or down at random, so it deviates by at most 0.5 / 7.
    assert np.abs(np.array(shares) - fraction).max() <= 5 * 0.5 / 7 / np.sqrt(2000)


def test_dropping_is_repeatable_and_depends_on_the_key(data):
    thin = data.drop_observations(0.5, key=jax.random.key(0))
    same(thin, data.drop_observations(0.5, key=jax.random.key(0)))
    other = data.drop_observations(0.5, key=jax.random.key(1))
    assert any(np.isnan(a).tolist() != np.isnan(b).tolist() for a, b in zip(thin.values, other.values))
    square = TimeSeries.from_arrays([np.arange(50)], [np.ones((50, 2))])
    gone = np.isnan(square.drop_observations(0.5, key=jax.random.key(0)).values[0])
    assert (gone[:, 0] != gone[:, 1]).any()
    for fraction in (1.0, -0.1, NAN):
        with pytest.raises(ValueError, match="fraction must lie in"):
            data.drop_observations(fraction, key=jax.random.key(0))
    with pytest.raises(ValueError, match='per must be "channel" or "step"'):
        data.drop_observations(0.5, key=jax.random.key(0), per="row")


def test_the_digest_of_an_id_never_changes():
    """Pinned, since a change would move every held-out split that users rely on."""
    from sdeflow.data._random import digest

    assert digest("p0") == 2849515147681686429
    assert digest(np.int64(3)) == digest(3)
    assert digest(3) != digest("3")


@few
@given(seed=st.integers(0, 999), fraction=st.floats(0.1, 0.9))
def test_split_is_a_partition_that_ignores_order(seed, fraction):
    times, values = ragged(20, seed=seed)
    labels = np.random.default_rng(seed).integers(0, 3, 20)
    data = TimeSeries.from_arrays(times, values, labels=labels)
    key = jax.random.key(seed)
    first, second = data.split(fraction, key=key)
    assert sorted(first.ids + second.ids) == list(range(20))
    order = np.random.default_rng(seed + 1).permutation(20)
    assert set(data[order].split(fraction, key=key)[0].ids) == set(first.ids)
    for k in range(3):
        total, mine = (data.labels == k).sum(), (first.labels == k).sum()
        if total > 1:
            assert 0 < mine < total
            assert abs(mine - fraction * total) < 1.0 + 1e-9 or mine in (1, total - 1)


def test_split_sizes():
    data = TimeSeries.from_arrays([[0]] * 45, [[1]] * 45, labels=np.repeat(np.arange(9), 5))
    first, second = data.split(0.7, key=jax.random.key(0))
    assert len(first) + len(second) == 45
    assert abs(len(first) - 0.7 * 45) <= 0.5
    assert first.buckets == second.buckets == data.buckets
    members = [data.split(0.7, key=jax.random.key(s))[0].ids for s in range(3)]
    assert members[0] != members[1] != members[2]
    with pytest.raises(ValueError, match="between 0 and 1"):
        data.split(1.0, key=jax.random.key(0))
    with pytest.raises(ValueError, match="at least two series"):
        data[0].split(0.5, key=jax.random.key(0))
    with pytest.raises(ValueError, match="leaves one part"):
        TimeSeries.from_arrays([[0]] * 2, [[1]] * 2, labels=[0, 1]).split(0.1, key=jax.random.key(0))


@few
@given(seed=st.integers(0, 999), weights=st.lists(st.floats(0.5, 2.0), min_size=2, max_size=4))
def test_a_split_into_several_parts(seed, weights):
    times, values = ragged(40, seed=seed)
    labels = np.random.default_rng(seed).integers(0, 2, 40)
    data = TimeSeries.from_arrays(times, values, labels=labels)
    shares = np.array(weights) / sum(weights)
    key = jax.random.key(seed)
    parts = data.split(shares, key=key)
    assert sorted(i for part in parts for i in part.ids) == list(range(40))
    for part, share in zip(parts, shares):
        # Each cut rounds once.
        assert abs(len(part) - 40 * share) <= len(shares)
        assert set(part.labels.tolist()) == set(labels.tolist()) or len(part) < 4
    order = np.random.default_rng(seed + 1).permutation(40)
    assert [set(part.ids) for part in data[order].split(shares, key=key)] == [set(part.ids) for part in parts]
    # The first part is the same as that of a split in two.
    assert data.split(float(shares[0]), key=key)[0].ids == parts[0].ids


def test_shares_that_are_none(data):
    for shares in ([0.5, 0.6], [1.0], [], [0.5, 0.5, 0.0], [-0.5, 1.5], [NAN, 0.5]):
        with pytest.raises(ValueError, match="positive and add up to 1"):
            data.split(shares, key=jax.random.key(0))
    with pytest.raises(ValueError, match="at least 3 series, got 2"):
        data[:2].split([0.2, 0.4, 0.4], key=jax.random.key(0))
