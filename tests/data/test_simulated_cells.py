"""The simulated cells: a progenitor that branches at the right time into valleys at the right places."""

import jax
import numpy as np
import pytest

from sdeflow.data import simulated_cells
from sdeflow.data._simulated_cells import _simulate


def test_shapes_and_labels():
    data = simulated_cells(200, key=jax.random.key(0), num_fates=3, dim=7)
    assert (data.dim, data.counts, data.times.tolist()) == (7, (200,) * 5, [0, 1, 2, 3, 4])
    shares = [(labels == "progenitor").mean() for labels in data.labels]
    assert shares[0] == 1.0
    assert 0.4 < shares[2] < 0.9
    assert shares[4] < 0.1
    assert (np.diff(shares) <= 0).all()
    assert set(np.concatenate(data.labels).tolist()) == {"progenitor", "A", "B", "C"}


@pytest.mark.parametrize("fates", [2, 3])
def test_valleys_lie_where_the_normal_form_has_them(fates):
    late = _simulate(6000, 4.0, fates, np.random.default_rng(0))
    z = late[:, 1] + 1j * late[:, 2]
    valley = np.round(np.angle(z) * fates / (2 * np.pi)).astype(int) % fates
    shares = np.bincount(valley[np.abs(z) > 0.6], minlength=fates) / (np.abs(z) > 0.6).sum()
    # The fates are one another's images, so each takes the same share.
    assert np.abs(shares - 1 / fates).max() < 5 * np.sqrt(shares[0] * (1 - shares[0]) / 5000)
    for k in range(fates):
        ours = z[(valley == k) & (np.abs(z) > 0.6)] * np.exp(-2j * np.pi * k / fates)
        assert abs(np.angle(ours.mean())) < 0.05
        # The radius at rest solves mu r + c r^(K-1) = r^3; a cell lags a little behind its own mu.
        mu = 1.5 * (4.0 - 1.5)
        rest = np.sqrt(mu + 0.5) if fates == 2 else (0.5 + np.sqrt(0.25 + 4 * mu)) / 2
        assert 0.8 * rest < ours.real.mean() < rest


def test_progress_is_the_day_and_its_spread_is_exact():
    state = _simulate(20_000, 3.0, 2, np.random.default_rng(1))
    s, variance = state[:, 0], 0.3**2 + 0.2**2 * 3.0
    assert abs(s.mean() - 3.0) < 5 * np.sqrt(variance / s.size)
    assert abs(s.var() - variance) < 5 * variance * np.sqrt(2 / s.size)


def test_the_embedding_is_orthonormal_and_the_same_for_every_key():
    one, two = (simulated_cells(50, key=jax.random.key(seed), noise=0.0, dim=6) for seed in (0, 1))
    both = np.concatenate([*one.samples, *two.samples])
    assert np.linalg.matrix_rank(both, tol=1e-8) == 3
    basis = np.linalg.qr(np.random.default_rng(6).standard_normal((6, 3)))[0]
    np.testing.assert_allclose(both @ basis @ basis.T, both, atol=1e-12)
    # Distances are those of the three numbers.
    assert abs((one.at(4.0) @ basis)[:, 0].mean() - 4.0) < 0.5


def test_the_key_and_the_time_decide():
    few = simulated_cells(20, key=jax.random.key(0), times=[1.0, 4.0])
    many = simulated_cells(20, key=jax.random.key(0))
    for t in few.times:
        np.testing.assert_array_equal(few.at(t), many.at(t))
    other = simulated_cells(20, key=jax.random.key(1))
    assert (other.at(1.0) != many.at(1.0)).any()


def test_noise_is_what_it_says():
    clean, noisy = (simulated_cells(2000, key=jax.random.key(0), noise=n, dim=4) for n in (0.0, 0.5))
    error = noisy.at(2.0) - clean.at(2.0)
    assert abs(error.std() - 0.5) < 5 * 0.5 / np.sqrt(2 * error.size)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_cells": 1}, "num_cells must be at least 2"),
        ({"num_fates": 4}, "num_fates must be 2 or 3"),
        ({"dim": 2}, "dim must be at least 3"),
        ({"noise": -1.0}, "noise must be"),
        ({"times": [-1.0, 2.0]}, "times must be days between 0 and 100"),
        ({"times": [2.0, 1.0]}, "times must increase"),
        ({"times": [2.0]}, "at least two times"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        simulated_cells(**{"num_cells": 10, "key": jax.random.key(0), **options})


def test_refuses_kinds():
    with pytest.raises(TypeError, match="num_cells must be an integer"):
        simulated_cells(2.5, key=jax.random.key(0))
    with pytest.raises(TypeError, match="key must be a JAX key"):
        simulated_cells(10, key=0)
