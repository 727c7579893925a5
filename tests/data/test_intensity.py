"""Channels that count observations: what they are, that they look back alone, and what happens to them later."""

import equinox as eqx
import jax.random as jr
import numpy as np
import pytest
from data_toys import ragged
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sdeflow.data import TimeSeries
from sdeflow.models import NeuralLangevinSDE, SeriesModel, Thinned

NAN = float("nan")
few = settings(deadline=None, max_examples=40)


def series(seed=0, count=8, **options):
    times, values = ragged(count, seed=seed, **options)
    return TimeSeries.from_arrays(times, values, ids=[f"p{i}" for i in range(count)])


def same(a, b):
    """Equal to the last bit; the digest leaves nothing out."""
    assert a.ids == b.ids
    for mine, theirs in zip((*a.times, *a.values), (*b.times, *b.values)):
        np.testing.assert_array_equal(mine, theirs)
    assert a.fingerprint() == b.fingerprint()


def by_hand(x):
    """Counts of one series, in a loop."""
    found, so_far = np.zeros_like(x), np.zeros(x.shape[1])
    for i, row in enumerate(x):
        so_far = so_far + ~np.isnan(row)
        found[i] = so_far
    return found


@few
@given(seed=st.integers(0, 999), missing=st.sampled_from([0.0, 0.3, 0.9]))
def test_equals_a_loop(seed, missing):
    data = series(seed, missing=missing)
    wider = data.with_intensity()
    ends = [by_hand(x)[-1] for x in data.values]
    unit = np.mean(ends, axis=0)
    np.testing.assert_allclose(wider.value_scale[2:], np.where(unit > 0, unit, 1))
    for x, y in zip(data.values, wider.values):
        np.testing.assert_array_equal(y[:, :2], x)
        np.testing.assert_allclose(y[:, 2:], by_hand(x) / wider.value_scale[2:])
        np.testing.assert_allclose(wider.to_user_values(y)[:, 2:], by_hand(x))
    assert (wider.num_channels, wider.num_measured, data.num_measured) == (4, 2, 2)
    assert wider.fingerprint() != data.fingerprint()


@few
@given(seed=st.integers(0, 999), t=st.floats(0.0, 4.0))
@example(seed=328, t=0.0)  # the time of a first row, rounded
def test_what_comes_later_is_never_seen(seed, t):
    train, data = series(seed + 1), series(seed)
    t += max(x[0] for x in (data.to_user_time(x) for x in data.times))
    same(data.until(t).with_intensity(like=train), data.with_intensity(like=train).until(t))


def test_standardising_before_or_after_is_the_same():
    train, test = series(1), series(2)
    one, two = train.standardise().with_intensity(), train.with_intensity().standardise()
    same(one, two)
    same(two.standardise(), train.with_intensity().standardise().standardise())
    # The units of the training data, whatever was done to them first.
    expected = test.standardise(like=train).with_intensity(like=train)
    for like in (train.with_intensity(), one):
        same(test.standardise(like=like).with_intensity(like=like), expected)
        same(test.with_intensity(like=like).standardise(like=like), expected)
    np.testing.assert_array_equal(expected.value_scale, one.value_scale)


def test_what_is_dropped_is_not_counted():
    data, key = series(3, count=20), jr.key(0)
    wider = data.with_intensity()
    for per in ("channel", "step"):
        thin = wider.drop_observations(0.5, key=key, per=per)
        same(thin, data.drop_observations(0.5, key=key, per=per).with_intensity(like=wider))
    assert sum(x[-1, 2:].sum() for x in thin.values) < sum(x[-1, 2:].sum() for x in wider.values)
    batch = next(Thinned(wider, 0.9).batches(20, jr.key(1)))
    for i in range(20):
        x = batch.values[i, : batch.lengths[i]].astype(np.float64)
        np.testing.assert_allclose(x[:, 2:] * wider.value_scale[2:], by_hand(x[:, :2]), rtol=1e-5)


def test_selection_and_order():
    data = series(4)
    wider = data.with_intensity()
    same(wider[[5, 1, 3]], data[[5, 1, 3]].with_intensity(like=data))


def test_batches_have_them_as_values_that_nobody_measured():
    batch = series(5).with_intensity().with_buckets(12).batch(np.arange(8))
    assert batch.values.shape == (8, 12, 4)
    assert not batch.mask[..., 2:].any()
    np.testing.assert_array_equal(batch.mask[..., :2], ~np.isnan(batch.values[..., :2]))
    inside = np.arange(12) < batch.lengths[:, None]
    assert np.isfinite(batch.values[inside][:, 2:]).all()
    assert np.isnan(batch.values[~inside]).all()


def test_a_channel_that_was_never_observed_counts_nothing():
    data = TimeSeries.from_arrays([[0.0, 1.0]], [[[1.0, NAN], [2.0, NAN]]]).with_intensity()
    assert data.values[0][:, 2:].tolist() == [[0.5, 0.0], [1.0, 0.0]]
    assert data.value_scale.tolist() == [1, 1, 2, 1]


def test_refuses():
    data = series(6)
    with pytest.raises(ValueError, match="counts of their observations already"):
        data.with_intensity().with_intensity()
    with pytest.raises(ValueError, match="like has 3 channels, but these series have 2"):
        data.with_intensity(like=series(6, channels=3).with_intensity())
    late = TimeSeries.from_arrays([[0.0, 1.0]], [[NAN, 1.0]], ids=["late"]).with_intensity()
    with pytest.raises(ValueError, match="No value is observed in series 'late'"):
        late.until(0.5)
    read = TimeSeries.from_arrays([[0.0, 1.0]], [[[1.0, 2.0], [3.0, 4.0]]], like=data.with_intensity())
    assert not read.has_intensity
    text = repr(TimeSeries.from_arrays([[0.0, 1.0]], [[NAN, 1.0]]).with_intensity())
    assert "1 channel with intensities" in text
    assert "50.0% of the values missing" in text


def test_a_model_sees_when_it_was_measured():
    """Two series on one straight line, of which one was measured more often, are one path without the counts."""
    line = np.linspace(0.0, 1.0, 9)
    seldom = np.where(np.arange(9) % 4 == 0, line, NAN)
    data = TimeSeries.from_arrays([line, line], [line, seldom], ids=["often", "seldom"])

    def outputs(data):
        sde = NeuralLangevinSDE(4, control_size=data.num_channels, width=8, key=jr.key(0))
        model = SeriesModel(sde, channels=data.num_channels, num_outputs=2, key=jr.key(1))
        # One id, so that both have the same noise.
        batch = eqx.tree_at(lambda b: b.ids, data.batch([0, 1]), np.zeros(2, np.int32))
        return np.asarray(model(batch, key=jr.key(2)).outputs)

    blind, seeing = outputs(data), outputs(data.with_intensity())
    np.testing.assert_allclose(blind[0], blind[1], rtol=1e-4, atol=1e-5)
    assert np.abs(seeing[0] - seeing[1]).max() > 1e-2
