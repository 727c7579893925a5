"""Weights from birth and death: the law of growth, and what is refused."""

import numpy as np
import pytest

from sdeflow.data import growth_weights


def test_growth_composes_over_time_and_death_undoes_birth():
    birth, death = np.array([0.3, 1.1, 0.0]), np.array([0.1, 0.0, 0.7])
    once, more = growth_weights(birth, death, 1.5), growth_weights(birth, death, 0.7)
    np.testing.assert_allclose(once * more, growth_weights(birth, death, 2.2), rtol=1e-14)
    np.testing.assert_allclose(once * growth_weights(death, birth, 1.5), 1.0, rtol=1e-14)
    np.testing.assert_allclose(growth_weights(np.log(2) * np.ones(2), 0.0, 3), 8.0, rtol=1e-14)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([0.1, 0.2], [0.1], 1.0), "of one shape"),
        ((0.1, 0.2, 1.0), "of one shape"),
        (([0.1, -0.2], 0.0, 1.0), "birth must hold rates"),
        (([0.1, 0.2], np.nan, 1.0), "death must hold rates"),
        (([0.1, 0.2], 0.0, 0.0), "duration must be positive"),
        (([0.1, 2e3], 0.0, 1.0), "more descendants"),
    ],
)
def test_bad_rates_are_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        growth_weights(*arguments)
