"""`Thinned`: what an epoch hides, and that it is a function of the epoch's key."""

import jax
import jax.random as jr
import numpy as np
import pytest

from sdeflow.data import TimeSeries
from sdeflow.models import Thinned


def full(num=20, length=30):
    return TimeSeries.from_arrays([np.arange(float(length))] * num, [np.ones((length, 4))] * num, labels=[0, 1] * 10)


def mask(data, key):
    (batch,) = data.batches(20, key)
    order = np.argsort(batch.ids)
    return batch.mask[order]


def test_every_epoch_hides_another_share_up_to_the_largest():
    thinned = Thinned(full(), 0.6)
    shares = np.array([1 - mask(thinned, jr.key(epoch)).mean() for epoch in range(60)])
    # Uniform on [0, 0.6]: 5 standard errors of the mean of 60 are 0.11.
    assert shares.max() < 0.62
    assert abs(shares.mean() - 0.3) < 0.11
    assert 0.1 < shares.std() < 0.25


def test_an_epoch_is_a_function_of_its_key():
    thinned = Thinned(full(), 0.6)
    first, again, other = (list(thinned.batches(8, jr.key(k))) for k in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b, equal_nan=True), first, again))
    assert not np.array_equal(first[0].mask, other[0].mask)


def test_what_is_hidden_varies_from_series_to_series():
    found = mask(Thinned(full(), 0.9), jr.key(3))
    assert 0.05 < found.mean() < 0.95
    assert len({x.tobytes() for x in found}) == 20


def test_whole_time_steps_may_be_hidden():
    found = mask(Thinned(full(), 0.9, per="step"), jr.key(3))
    assert 0.05 < found.mean() < 0.95
    np.testing.assert_array_equal(found, np.broadcast_to(found[..., :1], found.shape))


def test_without_a_key_nothing_is_hidden():
    (batch,) = Thinned(full(), 0.6).batches(20)
    assert batch.mask.all()
    assert batch.ids.tolist() == list(range(20))


def test_a_fingerprint_tells_data_and_share_apart():
    other = full().drop_observations(0.1, key=jr.key(0))
    prints = {Thinned(full(), 0.5).fingerprint(), Thinned(full(), 0.6).fingerprint(), Thinned(other, 0.5).fingerprint()}
    assert len(prints) == 3
    assert Thinned(full(), 0.5).fingerprint() in prints


@pytest.mark.parametrize(
    ("data", "options", "error", "match"),
    [
        (np.ones(3), {"at_most": 0.5}, TypeError, r"data must be a TimeSeries, got ndarray"),
        (full(), {"at_most": 1.0}, ValueError, r"at_most must lie in \[0, 1\), got 1.0"),
        (full(), {"at_most": float("nan")}, ValueError, r"got nan"),
        (full(), {"at_most": 0.5, "per": "row"}, ValueError, r"per must be \"channel\" or \"step\", got 'row'"),
    ],
)
def test_what_cannot_be_hidden_is_refused(data, options, error, match):
    with pytest.raises(error, match=match):
        Thinned(data, **options)
