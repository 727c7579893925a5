"""Paired differences: the interval of known numbers, how often it holds, what it refuses."""

import numpy as np
import pytest

from sdeflow.metrics import PairedDifference, paired_difference


def test_the_interval_of_known_numbers():
    # Differences -1/2, 0, -1: standard deviation 1/2, and the table's 97.5% quantile for 2 degrees of freedom.
    found = paired_difference([1.0, 2.0, 3.0], [1.5, 2.0, 4.0])
    half = 4.302653 * 0.5 / np.sqrt(3)
    np.testing.assert_allclose(found, (-0.5, -0.5 - half, -0.5 + half), rtol=1e-6)
    assert not found.decided
    assert paired_difference([1.0, 2.0, 3.0], [1.5, 2.0, 4.0], level=0.5).decided


def test_what_both_have_in_common_cancels():
    common = np.array([0.0, 100.0, -7.0, 3.0])
    assert paired_difference(common + 2.0, common) == PairedDifference(2.0, 2.0, 2.0)
    assert paired_difference(common, common) == (0.0, 0.0, 0.0)
    assert not paired_difference(common, common).decided


def test_the_interval_holds_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [paired_difference(row, np.zeros(5), level=0.8) for row in rng.normal(1.0, 3.0, size=(2000, 5))]
    share = np.mean([x.low < 1.0 < x.high for x in found])
    assert abs(share - 0.8) < 5 * np.sqrt(0.8 * 0.2 / 2000)


@pytest.mark.parametrize(
    ("x", "y", "level", "message"),
    [
        ([1.0, 2.0], [1.0], 0.95, "rows of as many"),
        ([1.0], [1.0], 0.95, "at least two"),
        ([[1.0, 2.0]], [[1.0, 2.0]], 0.95, "shapes"),
        ([1.0, np.nan], [1.0, 2.0], 0.95, "finite"),
        ([1.0, 2.0], [1.0, 3.0], 1.0, "level"),
        ([1.0, 2.0], [1.0, 3.0], 0.0, "level"),
    ],
)
def test_bad_scores_are_refused(x, y, level, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(x, y, level=level)
