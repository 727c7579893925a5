"""``wasserstein``: exact transport, on the host and for evaluation only (no gradient, no jit)."""

import math
from typing import Any

import numpy as np

from ._blocks import check_masses
from ._gaussians import samples


def wasserstein(
    x: Any, y: Any, p: float = 1, *, a: Any = None, b: Any = None, max_points: int | None = 3000, seed: int = 0
) -> float:
    r"""The exact Wasserstein distance ``W_p = (min_P sum_ij P_ij |x_i - y_j|^p)^(1/p)`` between two samples.

    For evaluation: NumPy on the host, in float64. Papers report both p = 1 and p = 2 as "earth mover's distance": the
    function of that name that comes with TrajectoryNet, which LightSB and SBIRR use, is W_2, and TorchCFM's tables
    are W_1. State p, n and how the points were scaled, as it is in their units, and larger for fewer points: by
    O(n^(-1/D)) where the laws agree, so compare samples of one size, and with two samples of one law.

    On a line it is computed from the quantiles. Equal numbers of points with equal weights are assigned to each other
    (``scipy.optimize.linear_sum_assignment``, O(n^3): seconds for 3000). Else POT's ``ot.emd2`` solves it, if it is
    installed; without it, small clouds of unequal numbers are assigned with each point repeated.

    Arguments:
        x: shape (n, D), or (n,) on a line.
        y: shape (m, D), or (m,).
        p: at least 1.
        a: the weights of x, shape (n,), equal if None; they are divided by their sum.
        b: the weights of y, shape (m,).
        max_points: a larger cloud that is not on a line gives this many of its points, by its weights and with
            ``seed``; None for all.
        seed: of the subsample, the same for the same seed.

    Returns:
        A number.

    Raises:
        ValueError: if the points or weights are not as described.
        ImportError: if the problem is one for POT, and it is not installed.

    Example:
        >>> import numpy as np, sdeflow as sf
        >>> x, y = np.array([[0.0, 0.0], [0.0, 1.0]]), np.array([[3.0, 4.0], [0.0, 1.0]])
        >>> sf.metrics.wasserstein(x, y, 1), round(sf.metrics.wasserstein(x, y, 2), 4)
        (2.5, 3.0822)
    """
    x, y = samples("x", x), samples("y", y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must have one dimension, got {x.shape[1]} and {y.shape[1]}.")
    if not 1 <= p < math.inf:
        raise ValueError(f"p must be at least 1 and finite, got {p}.")
    if max_points is not None and max_points < 1:
        raise ValueError(f"max_points must be at least 1, or None, got {max_points}.")
    a, b = _shares("a", a, len(x)), _shares("b", b, len(y))
    if x.shape[1] == 1:
        return _line(x[:, 0], y[:, 0], a, b, p) ** (1 / p)
    # One generator for each, so that a cloud's subsample does not depend on the other cloud.
    (x, a), (y, b) = (_subsample(z, w, max_points, seed) for z, w in ((x, a), (y, b)))
    equal = all((w == w[0]).all() for w in (a, b))
    if equal and len(x) == len(y):
        return _assigned(x, y, p) ** (1 / p)
    try:
        import ot  # pyright: ignore[reportMissingImports]
    except ImportError:
        common = math.lcm(len(x), len(y))
        if equal and common <= 2000:
            return _assigned(x.repeat(common // len(x), 0), y.repeat(common // len(y), 0), p) ** (1 / p)
        raise ImportError(
            f"Exact transport between {len(x)} and {len(y)} weighted points needs POT: run `pip install POT`, or pass "
            "samples of one size without weights."
        ) from None
    value, log = ot.emd2(a, b, _costs(x, y, p), numItermax=10_000_000, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"POT did not solve the transport problem: {log['warning']}")
    return max(float(value), 0.0) ** (1 / p)


def _shares(name: str, weight: Any, n: int) -> np.ndarray:
    if weight is None:
        return np.full(n, 1 / n)
    weight = np.asarray(weight, float)
    check_masses(name, weight, n)
    return weight / weight.sum()


def _subsample(x: np.ndarray, w: np.ndarray, most: int | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    x, w = x[w > 0], w[w > 0]
    if most is None or len(x) <= most:
        return x, w
    rng, even = np.random.default_rng(seed), (w == w[0]).all()
    picked = rng.choice(len(x), most, replace=not even, p=None if even else w)
    return x[picked], np.full(most, 1 / most)


def _costs(x: np.ndarray, y: np.ndarray, p: float) -> np.ndarray:
    from scipy.spatial.distance import cdist

    return cdist(x, y, "sqeuclidean") if p == 2 else cdist(x, y) ** p


def _assigned(x: np.ndarray, y: np.ndarray, p: float) -> float:
    from scipy.optimize import linear_sum_assignment

    costs = _costs(x, y, p)
    return float(costs[linear_sum_assignment(costs)].mean())


def _line(x: np.ndarray, y: np.ndarray, a: np.ndarray, b: np.ndarray, p: float) -> float:
    i, j = np.argsort(x), np.argsort(y)
    below, under = np.cumsum(a[i]), np.cumsum(b[j])
    below, under = below / below[-1], under / under[-1]
    jumps = np.sort(np.concatenate([[0.0], below, under]))
    middle = (jumps[1:] + jumps[:-1]) / 2
    k, l = np.searchsorted(below, middle), np.searchsorted(under, middle)
    return float(np.diff(jumps) @ np.abs(x[i][k] - y[j][l]) ** p)
