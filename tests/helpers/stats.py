"""Statistics for Monte Carlo assertions: five standard errors, Kolmogorov-Smirnov, independence.

Every helper takes samples that lead with the keys they were drawn from, and refuses fewer than eight keys.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy import stats

SIGMAS = 5.0
LEVEL = 1e-4


def _pooled(samples: Any) -> np.ndarray:
    samples = np.asarray(samples, np.float64)
    assert samples.shape[0] >= 8, f"a Monte Carlo test needs at least 8 keys, got {samples.shape[0]}"
    assert np.isfinite(samples).all()
    return samples.reshape(-1)


def z_of_mean(samples: Any, truth: float) -> float:
    """How many standard errors the sample mean is away from ``truth``."""
    x = _pooled(samples)
    return float((x.mean() - truth) / (x.std(ddof=1) / np.sqrt(x.size)))


def assert_mean(samples: Any, truth: float) -> None:
    """The mean of the law that the samples come from is ``truth``, as far as they can tell."""
    z = z_of_mean(samples, truth)
    assert abs(z) < SIGMAS, f"the mean is {z:.2f} standard errors away from {truth}"


def assert_variance(samples: Any, truth: float, mean: float) -> None:
    """The variance about a known mean is ``truth``."""
    assert_mean((np.asarray(samples, np.float64) - mean) ** 2, truth)


def assert_uncorrelated(x: Any, y: Any) -> None:
    """Two samples of mean zero have covariance zero."""
    assert_mean(np.asarray(x, np.float64) * np.asarray(y, np.float64), 0.0)


def assert_law(samples: Any, cdf: Callable[[np.ndarray], np.ndarray]) -> None:
    """The samples, independent of each other, follow this distribution function (Kolmogorov-Smirnov)."""
    p = stats.kstest(_pooled(samples), cdf).pvalue
    assert p > LEVEL, f"the Kolmogorov-Smirnov test rejects the law at p = {p:.2g}"


def assert_normal(samples: Any, mean: float, variance: float) -> None:
    """The samples, independent of each other, are normal with this mean and variance."""
    assert_law(samples, stats.norm(mean, np.sqrt(variance)).cdf)
