"""The simulated classes: told apart by how channels follow each other, and by nothing else."""

import jax
import numpy as np
import pytest

from sdeflow.data import simulated_series


def log_likelihoods(data, theta=0.25, fastest=2.0):
    """Shape (N, K), exact for complete series: each pair of channels is one complex AR(1) process."""
    rates = np.linspace(-fastest, fastest, len(data.classes))
    scores = np.zeros((len(data), rates.size))
    for i, (t, x) in enumerate(zip(data.times, data.values)):
        z = x[:, 0::2] + 1j * x[:, 1::2]
        gaps = np.diff(t * data.time_scale)[:, None]
        spread = -np.expm1(-2 * theta * gaps)
        for k, rate in enumerate(rates):
            error = z[1:] - np.exp((-theta + 1j * rate) * gaps) * z[:-1]
            scores[i, k] = -(np.abs(error) ** 2 / (2 * spread)).sum()
    return scores


def single_time_features(data):
    """Means, spreads and correlations of the channels at single times."""
    upper = np.triu_indices(data.num_channels, 1)
    return np.array([[*x.mean(axis=0), *x.std(axis=0), *(x.T @ x / len(x))[upper]] for x in data.values])


def test_the_classes_can_be_told_apart_but_not_at_single_times():
    train, test = simulated_series(600, key=jax.random.key(0), missing=0.0)
    right = (log_likelihoods(test).argmax(axis=1) == test.labels).mean()
    assert right > 0.99
    a, b = single_time_features(train), single_time_features(test)
    centre, scale = a.mean(axis=0), a.std(axis=0)
    design = lambda f: np.column_stack([np.ones(len(f)), (f - centre) / scale, ((f - centre) / scale) ** 2])
    weights = np.linalg.lstsq(design(a), np.eye(3)[train.labels], rcond=None)[0]
    naive = ((design(b) @ weights).argmax(axis=1) == test.labels).mean()
    # Slow rotation averages less, so spreads are a hint at speed; the sign of the rotation stays hidden.
    assert naive < 0.75


def test_the_stationary_law_is_standard_normal_in_every_class():
    train, _ = simulated_series(3000, key=jax.random.key(1), missing=0.0)
    first = np.stack([x[0] for x in train.values])
    last = np.stack([x[-1] for x in train.values])
    for label in range(3):
        for x in (first[train.labels == label], last[train.labels == label]):
            n = len(x)
            assert np.abs(x.mean(axis=0)).max() < 5 / np.sqrt(n)
            assert np.abs(x.var(axis=0) - 1).max() < 5 * np.sqrt(2 / n)
            assert np.abs(np.corrcoef(x.T) - np.eye(4)).max() < 5 / np.sqrt(n)


def test_shapes_and_options():
    train, test = simulated_series(
        20, key=jax.random.key(0), num_classes=4, num_channels=3, lengths=(5, 8), missing=0.3, num_test=9
    )
    assert (len(train), len(test)) == (20, 9)
    assert train.num_channels == 3
    assert train.classes == test.classes == (0, 1, 2, 3)
    assert np.bincount(train.labels).tolist() == [5] * 4
    assert (train.lengths.min() >= 5) & (train.lengths.max() <= 8)
    assert train.time_scale == test.time_scale
    assert train.buckets == test.buckets
    share = np.isnan(np.concatenate(train.values)).mean()
    assert 0.2 < share < 0.4


def test_keys_decide():
    a, b, c = (simulated_series(6, key=jax.random.key(s))[0] for s in (0, 0, 1))
    np.testing.assert_array_equal(a.values[0], b.values[0])
    assert a.lengths.tolist() != c.lengths.tolist() or (a.values[0] != c.values[0]).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_series": 2}, "one series of each of 3 classes"),
        ({"num_classes": 1}, "two classes and two channels"),
        ({"num_channels": 1}, "two classes and two channels"),
        ({"lengths": (5, 3)}, "lengths must be"),
        ({"missing": 1.0}, "fraction must lie in"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        simulated_series(**{"num_series": 12, "key": jax.random.key(0), **options})
