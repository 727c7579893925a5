"""Exact transport and the distances of moments: small cases by hand, closed forms, POT, and bad input."""

import builtins

import numpy as np
import pytest

import sdeflow as sf

wasserstein, bw2_uvp, cbw2_uvp = sf.metrics.wasserstein, sf.metrics.bw2_uvp, sf.metrics.cbw2_uvp


@pytest.fixture
def without_pot(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name == "ot":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


# ---- Exact transport. ----


def test_three_points_by_hand():
    x, y = np.array([[0.0, 0.0], [1.0, 0.0], [5.0, 0.0]]), np.array([[5.0, 1.0], [0.0, 1.0], [1.0, 2.0]])
    np.testing.assert_allclose(wasserstein(x, y, 1), 4 / 3, rtol=1e-14)
    np.testing.assert_allclose(wasserstein(x, y, 2), np.sqrt(2), rtol=1e-14)
    np.testing.assert_allclose(wasserstein(x, y, 3), (10 / 3) ** (1 / 3), rtol=1e-14)
    assert isinstance(wasserstein(x, y), float)


def test_a_shift_costs_its_length_and_one_law_costs_nothing():
    x = np.random.default_rng(0).normal(size=(60, 3))
    for p in (1, 2):
        np.testing.assert_allclose(wasserstein(x, x + [2.0, 0, 1.0], p), np.sqrt(5), rtol=1e-12)
        assert wasserstein(x, x[::-1], p) == 0


@pytest.mark.parametrize("p", [1, 1.5, 2])
def test_pot_and_scipy_agree_on_weights_and_unequal_sizes(p):
    ot = pytest.importorskip("ot")
    from scipy.stats import wasserstein_distance

    rng = np.random.default_rng(0)
    x, y, a, b = rng.normal(size=(20, 3)), rng.normal(size=(30, 3)), rng.uniform(size=20), rng.uniform(size=30)
    C = np.linalg.norm(x[:, None] - y, axis=-1) ** p
    wanted = ot.emd2(a / a.sum(), b / b.sum(), C) ** (1 / p)
    np.testing.assert_allclose(wasserstein(x, y, p, a=a, b=b), wanted, rtol=1e-9)
    C = np.abs(x[:, 0, None] - y[:, 0]) ** p
    wanted = ot.emd2(a / a.sum(), b / b.sum(), C) ** (1 / p)
    np.testing.assert_allclose(wasserstein(x[:, 0], y[:, 0], p, a=a, b=b), wanted, rtol=1e-9)
    if p == 1:
        np.testing.assert_allclose(
            wasserstein(x[:, 0], y[:, 0], a=a, b=b), wasserstein_distance(x[:, 0], y[:, 0], a, b), rtol=1e-12
        )
    # Points of weight zero are not there.
    padded = wasserstein(np.vstack([x, [[99.0, 0, 0]]]), y, p, a=np.r_[a, 0], b=b)
    np.testing.assert_allclose(padded, wasserstein(x, y, p, a=a, b=b), rtol=1e-9)


def test_without_pot_few_points_are_repeated_and_weights_are_refused(without_pot):
    x, y = np.array([[0.0, 0.0], [4.0, 0.0]]), np.array([[0.0, 0.0], [4.0, 0.0], [4.0, 3.0]])
    # Each x is three sixths and each y two: one goes from (0, 0) to (4, 3), one from (4, 0), and the rest stay.
    np.testing.assert_allclose(wasserstein(x, y), (5 + 3) / 6)
    with pytest.raises(ImportError, match="pip install POT"):
        wasserstein(x, y, a=[1.0, 2.0])


def test_a_large_cloud_gives_the_same_subsample_for_the_same_seed():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 500, 2))
    some = wasserstein(x, y, max_points=100)
    assert some == wasserstein(x, y, max_points=100)
    assert some != wasserstein(x, y, max_points=100, seed=1)
    assert some > wasserstein(x, y) == wasserstein(x, y, max_points=None)
    # By their weights: all the weight is on points that are equal.
    weight = np.r_[np.ones(250), np.zeros(250)]
    x[:250] = 1.0
    np.testing.assert_allclose(wasserstein(x, np.ones((1, 2)), a=weight * rng.uniform(1, 2, 500), max_points=10), 0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"p": 0.5}, "p must be at least 1"),
        ({"p": np.inf}, "p must be at least 1 and finite"),
        ({"y": np.zeros((3, 3))}, "one dimension, got 2 and 3"),
        ({"x": np.full((3, 2), np.nan)}, "x has points that are infinite or NaN"),
        ({"x": np.zeros((0, 2))}, "n and D at least 1"),
        ({"a": np.ones(4)}, r"a must have shape \(3,\)"),
        ({"a": np.zeros(3)}, "one is positive"),
        ({"b": [-1.0, 1.0, 1.0]}, "none is negative"),
        ({"max_points": 0}, "max_points must be at least 1"),
    ],
)
def test_bad_input_is_an_error_that_says_what(options, says):
    with pytest.raises(ValueError, match=says):
        wasserstein(**{"x": np.zeros((3, 2)), "y": np.ones((3, 2)), **options})


# ---- Moments. ----


def random_covariances(n, D, seed):
    roots = np.random.default_rng(seed).normal(size=(n, D, D))
    return roots @ np.swapaxes(roots, 1, 2)


def test_the_moments_distance_of_commuting_covariances_is_elementary():
    # |m - n|^2 / 2 + sum (sqrt c - sqrt s)^2 / 2 over the eigenvalues, in a turned basis.
    from scipy.stats import ortho_group

    Q = ortho_group.rvs(4, size=3, random_state=0)
    rng = np.random.default_rng(0)
    c, s, m, n = rng.uniform(0.1, 2, (4, 3, 4))
    C, S = (Q * v[:, None] @ np.swapaxes(Q, 1, 2) for v in (c, s))
    wanted = (((m - n) ** 2).sum(1) + ((np.sqrt(c) - np.sqrt(s)) ** 2).sum(1)).mean() / 2
    np.testing.assert_allclose(cbw2_uvp((m, C), (n, S), variance=3.0), 100 * wanted / 1.5, rtol=1e-10)


def test_the_moments_distance_is_half_of_bures_between_any_covariances():
    from scipy.linalg import sqrtm

    C, S = random_covariances(5, 3, 0), random_covariances(5, 3, 1)
    zero = np.zeros((5, 3))
    wanted = np.mean([np.trace(c + s) / 2 - np.trace(sqrtm(sqrtm(c) @ s @ sqrtm(c)).real) for c, s in zip(C, S)])
    np.testing.assert_allclose(cbw2_uvp((zero, C), (zero, S), variance=2.0), 100 * wanted, rtol=1e-10)
    np.testing.assert_allclose(cbw2_uvp((zero, S), (zero, C), variance=2.0), 100 * wanted, rtol=1e-10)
    np.testing.assert_allclose(cbw2_uvp((zero, C), (zero, C), variance=2.0), 0, atol=1e-9)
    # A point in place of a law, with its singular covariance.
    np.testing.assert_allclose(
        cbw2_uvp((zero, 0 * C), (zero, C), variance=1.0), 100 * np.trace(C, axis1=1, axis2=2).mean(), rtol=1e-12
    )


def test_samples_give_their_moments_and_scale_does_not_matter():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 3)), 2 * rng.normal(size=(60, 3)) + 1
    exact = cbw2_uvp(
        (x.mean(0)[None], np.cov(x.T)[None]), (y.mean(0)[None], np.cov(y.T)[None]), variance=np.trace(np.cov(y.T))
    )
    np.testing.assert_allclose(bw2_uvp(x, y), exact, rtol=1e-10)
    np.testing.assert_allclose(bw2_uvp(10 * x, 10 * y), exact, rtol=1e-10)
    np.testing.assert_allclose(bw2_uvp(y, y), 0, atol=1e-9)
    np.testing.assert_allclose(bw2_uvp(np.tile(y.mean(0), (9, 1)), y), 100, rtol=1e-10)
    assert isinstance(bw2_uvp(x, y), float)
    # Draws approach the exact moments, from above where the laws agree.
    means, C = rng.normal(size=(20, 3)), random_covariances(20, 3, 2)
    draw = lambda m: means[:, None] + rng.normal(size=(20, m, 3)) @ np.swapaxes(np.linalg.cholesky(C), 1, 2)
    few, many = (cbw2_uvp(draw(m), (means, C), variance=1.0) for m in (100, 10_000))
    assert 0 < many < few / 30


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: bw2_uvp(np.zeros((3, 2)), np.zeros((3, 3))), "one dimension"),
        (lambda: bw2_uvp(np.ones((3, 2)), np.zeros((3, 2))), "variance must be positive"),
        (lambda: bw2_uvp(np.full((3, 2), np.nan), np.zeros((3, 2))), "infinite or NaN"),
        (lambda: bw2_uvp(np.ones((1, 2)), np.ones((3, 2))), "at least 2 draws"),
        (lambda: cbw2_uvp(np.zeros((3, 2)), np.zeros((3, 4, 2)), variance=1.0), r"shape \(n, m, D\)"),
        (lambda: cbw2_uvp(np.zeros((2, 4, 2)), np.zeros((3, 4, 2)), variance=1.0), "as many conditions"),
        (lambda: cbw2_uvp((np.zeros((3, 2)), np.zeros((3, 2))), np.zeros((3, 4, 2)), variance=1.0), r"\(n, D, D\)"),
        (lambda: cbw2_uvp(np.zeros((3, 4, 2)), np.zeros((3, 4, 2)), variance=0.0), "variance must be positive"),
    ],
)
def test_bad_moments_are_an_error_that_says_what(call, says):
    with pytest.raises(ValueError, match=says):
        call()
