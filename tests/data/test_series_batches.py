"""Batches: static shapes, every series once, padding that shows nothing, buckets that cost least."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from data_toys import ragged
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sdeflow.data import SeriesBatch, TimeSeries
from sdeflow.data._buckets import choose_buckets

few = settings(deadline=None, max_examples=60)


def whole(count=40, **options):
    times, values = ragged(count, **options)
    rng = np.random.default_rng(1)
    return TimeSeries.from_arrays(
        times,
        values,
        labels=rng.integers(0, 3, count),
        targets=rng.normal(size=(count, 2)),
        static=rng.normal(size=count),
    )


@few
@given(count=st.integers(1, 30), size=st.integers(1, 30), seed=st.one_of(st.none(), st.integers(0, 99)))
def test_an_epoch_holds_every_series_once(count, size, seed):
    data = whole(count, seed=count).with_buckets(num_buckets=3)
    size = min(size, count)
    batches = list(data.batches(size, None if seed is None else jax.random.key(seed)))
    seen = np.concatenate([batch.ids[batch.weight == 1] for batch in batches])
    assert sorted(seen.tolist()) == list(range(count))
    if seed is None and len(data.buckets) == 1:
        assert seen.tolist() == list(range(count))
    for batch in batches:
        length = batch.times.shape[1]
        assert batch.values.shape == (size, length, 2)
        assert length in data.buckets
        assert (batch.weight[:1] == 1).all()
        assert (np.diff(batch.weight) <= 0).all()
        # Filler repeats the first row.
        np.testing.assert_array_equal(batch.ids[batch.weight == 0], batch.ids[0])
        for row, i in enumerate(batch.ids):
            n = data.lengths[i]
            assert batch.lengths[row] == n
            assert all(n > bucket for bucket in data.buckets if bucket < length)
            np.testing.assert_array_equal(batch.times[row, :n], data.times[i].astype(np.float32))
            np.testing.assert_array_equal(batch.times[row, n:], batch.times[row, n - 1])
            np.testing.assert_array_equal(batch.values[row, :n], data.values[i].astype(np.float32))
            assert np.isnan(batch.values[row, n:]).all()
            np.testing.assert_array_equal(batch.mask[row], ~np.isnan(batch.values[row]))
            assert batch.labels[row] == data.labels[i]
            np.testing.assert_array_equal(batch.targets[row], data.targets[i].astype(np.float32))
            np.testing.assert_array_equal(batch.static[row], data.static[i].astype(np.float32))


def test_types():
    batch = next(whole().batches(4))
    assert isinstance(batch, SeriesBatch)
    assert isinstance(batch, eqx.Module)
    dtypes = {name: getattr(batch, name).dtype for name in ("times", "values", "targets", "static", "weight")}
    assert set(dtypes.values()) == {np.dtype(np.float32)}
    assert {batch.lengths.dtype, batch.labels.dtype, batch.ids.dtype} == {np.dtype(np.int32)}
    assert batch.mask.dtype == bool
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(batch))
    plain = next(TimeSeries.from_arrays([[0.0]], [[1.0]]).batches(1))
    assert (plain.labels, plain.targets, plain.static) == (None, None, None)


def test_keys_shuffle_and_mix():
    data = whole(200, high=30).with_buckets([10, 20, 30])
    order = lambda key: [batch.ids.tolist() for batch in data.batches(8, key)]
    assert order(jax.random.key(0)) == order(jax.random.key(0))
    assert order(jax.random.key(0)) != order(jax.random.key(1))
    lengths = [batch.times.shape[1] for batch in data.batches(8, jax.random.key(0))]
    assert lengths != sorted(lengths)
    assert lengths != sorted(lengths, reverse=True)
    plain = [batch.times.shape[1] for batch in data.batches(8)]
    assert plain == sorted(plain)
    # Shuffled within its bucket, too.
    ids = [batch.ids for batch in data.batches(8, jax.random.key(0)) if batch.times.shape[1] == 20]
    assert (np.diff(np.concatenate(ids)) < 0).any()


def test_one_trace_for_a_bucket():
    data = whole(60, high=30).with_buckets([10, 20, 30])

    @eqx.filter_jit
    @eqx.debug.assert_max_traces(max_traces=3)
    def run(batch):
        return jnp.nansum(batch.values * batch.weight[:, None, None])

    for epoch in range(2):
        for batch in data.batches(8, jax.random.key(epoch)):
            run(batch)


def test_a_batch_maps_over_its_series():
    batch = next(whole().batches(4))
    means = jax.vmap(lambda one: jnp.where(one.mask, one.values, 0).sum() / one.mask.sum())(batch)
    np.testing.assert_allclose(means, np.nanmean(batch.values, axis=(1, 2)), rtol=1e-5)


def test_longer_padding_changes_no_real_entry():
    data = whole(10)
    short, long = (data.with_buckets(n).batch(np.arange(10)) for n in (9, 16))
    for name in ("times", "values", "mask"):
        np.testing.assert_array_equal(getattr(short, name), getattr(long, name)[:, :9])
    assert not long.mask[:, 9:].any()
    np.testing.assert_array_equal(long.times[:, 9:], np.broadcast_to(long.times[:, 8:9], (10, 7)))


def test_batch_of_given_positions():
    data = whole(10).with_buckets([3, 9])
    shorts = np.flatnonzero(data.lengths <= 3)
    assert data.batch(shorts).times.shape[1] == 3
    assert data.batch(np.arange(10)).times.shape[1] == 9
    assert data.batch([-1, 0]).ids.tolist() == [9, 0]
    with pytest.raises(ValueError, match="length=2 is shorter"):
        data.batch(np.arange(10), length=2)
    with pytest.raises(IndexError):
        data.batch([10])


# Buckets


def best_work(lengths, num_buckets):
    """Every choice of bucket lengths, tried."""
    distinct = np.unique(lengths)
    return [
        (work(lengths, (*inner, distinct[-1])), k)
        for k in range(1, num_buckets + 1)
        for inner in itertools.combinations(distinct[:-1], k - 1)
    ]


def work(lengths, buckets):
    buckets = np.asarray(buckets)
    return buckets[np.searchsorted(buckets, lengths)].sum() + 16 * buckets.sum()


@few
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=200), num_buckets=st.integers(1, 4))
@example(lengths=[1, 1, 1, 1, 1, 1, 2, 6], num_buckets=3)  # As many as allowed are not the cheapest.
def test_buckets_cost_least(lengths, num_buckets):
    lengths = np.array(lengths)
    buckets = choose_buckets(lengths, num_buckets)
    works = best_work(lengths, min(num_buckets, np.unique(lengths).size))
    least = min(w for w, _ in works)
    assert buckets[-1] == lengths.max()
    assert work(lengths, buckets) <= 1.1 * least
    # The best of their number, and no smaller number would do.
    assert work(lengths, buckets) == min(w for w, k in works if k == len(buckets))
    assert all(w > 1.1 * least for w, k in works if k < len(buckets))


def test_many_distinct_lengths_stay_fast_and_close_to_the_best():
    lengths = np.random.default_rng(0).lognormal(5, 0.8, size=5000).astype(int) + 1
    buckets = choose_buckets(lengths, 3)
    assert buckets[-1] == lengths.max()
    assert len(buckets) <= 3
    # Half the work of padding all to the longest, at the least.
    assert work(lengths, buckets) < 0.5 * work(lengths, (lengths.max(),))


def test_with_buckets():
    data = whole(100, high=20)
    longest = int(data.lengths.max())
    assert data.with_buckets([30, 10, 10]).buckets == (10, 30)
    assert data.with_buckets(64).buckets == (64,)
    assert data.with_buckets(num_buckets=1).buckets == (longest,)
    assert data[:50].with_buckets(like=data).buckets == data.buckets
    short = data[data.lengths < 10]
    assert data.with_buckets(like=short.with_buckets(num_buckets=1)).buckets == (short.lengths.max(), longest)
    for lengths in ([0, 30], [2.5], [], "all"):
        with pytest.raises(ValueError, match="positive integers"):
            data.with_buckets(lengths)
    with pytest.raises(ValueError, match=f"longest series has {longest} time steps .* only 5"):
        data.with_buckets([5])
    with pytest.raises(ValueError, match="exactly one"):
        data.with_buckets()
    with pytest.raises(ValueError, match="exactly one"):
        data.with_buckets(30, num_buckets=2)
    with pytest.raises(ValueError, match="num_buckets must be"):
        data.with_buckets(num_buckets=0)


def test_buckets_follow_the_lengths_after_until():
    data = TimeSeries.from_arrays([np.arange(100.0)] * 3, [np.ones(100)] * 3)
    assert data.until(9.0).buckets == (10,)


def test_assembly_is_vectorised():
    """2000 series in batches of 64 within a fraction of the time of one training step each."""
    import time

    data = whole(2000, high=100, channels=8)
    next(data.batches(64))
    start = time.process_time()
    count = sum(1 for _ in data.batches(64, jax.random.key(0)))
    assert (time.process_time() - start) / count < 5e-3
