"""Arrays of samples as data for training."""

import jax
import numpy as np
import pytest

from sdeflow._compat import SdeflowWarning
from sdeflow.data import Samples

KEY = jax.random.key(0)
DATA = Samples(np.arange(14.0).reshape(7, 2), args={"label": np.arange(7)})


@pytest.mark.parametrize("key", [None, KEY])
def test_an_epoch_has_every_sample_once_and_fillers_of_weight_0(key):
    batches = list(DATA.batches(3, key=key))
    assert all(batch.values.shape == (3, 2) for batch in batches)
    real = np.concatenate([batch.weight for batch in batches]) > 0
    ids = np.concatenate([batch.ids for batch in batches])
    assert sorted(ids[real]) == list(range(7))
    assert (ids[real].tolist() == list(range(7))) == (key is None)
    for batch in batches:
        np.testing.assert_array_equal(batch.values, DATA.values[batch.ids])
        np.testing.assert_array_equal(batch.args["label"], batch.ids)


def test_the_parts_of_a_split_are_disjoint_and_keep_what_belongs_to_a_sample():
    parts = DATA.split((0.3, 0.3, 0.4), key=KEY)
    labels = np.concatenate([part.args["label"] for part in parts])
    assert sorted(labels) == list(range(7))
    for part in parts:
        np.testing.assert_array_equal(part.values[:, 0], 2.0 * part.args["label"])
    assert repr(DATA[2]) == "Samples: 1 of shape (2,), float64"


def test_what_cannot_be_trained_on_is_refused():
    with pytest.raises(TypeError, match=r"got dtype int64: convert"):
        Samples(np.arange(3))
    with pytest.raises(ValueError, match=r"got shape \(0, 2\)"):
        Samples(np.zeros((0, 2)))
    with pytest.raises(ValueError, match="1 of 3 samples are not finite, first 1"):
        Samples(np.array([0.0, np.nan, 1.0]))
    with pytest.raises(ValueError, match=r"args\['label'\] must have a row for each of the 2 samples"):
        Samples(np.zeros(2), args={"label": np.zeros(3)})
    with pytest.raises(ValueError, match="batch size must be at least 1"):
        DATA.batches(0)
    with pytest.warns(SdeflowWarning, match="batch size 9 is more than the 7 samples"):
        assert len(next(iter(Samples(DATA.values).batches(9))).ids) == 7
