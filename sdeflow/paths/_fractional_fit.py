"""The weights with which a sum of Ornstein-Uhlenbeck factors comes nearest to fractional Brownian motion.

With factors dY_k = -rate_k Y_k dt + dW, all of one W, and B' = sum_k w_k (Y_k(t) - Y_k(0)), the weights minimise

    J = int_0^T E (B'(t) - B(t))^2 dt = w' A w - 2 b' w + c,      so that      A w = b.

B is of type I (long past, stationary increments; Mandelbrot and Van Ness 1968) or II (nothing before time 0; Levy 1953,
Riemann-Liouville), both with the kernel (t - s)^(H - 1/2) / Gamma(H + 1/2). A, b and c are those of Daems et al.,
"Variational inference for SDEs driven by fractional noise", ICLR 2024, with the limits at a rate of zero, and with
series where their forms cancel. A does not depend on H; the solution in float32 has no correct digit of its derivative.

So everything here is NumPy in float64, once for each grid of rates: w(H) is kept as a Chebyshev series on [0.02, 0.98],
which 16 nodes give to about 1e-9 of its largest entry, derivative and all.
"""

import functools
from typing import Any, Literal

import numpy as np

Kind = Literal["I", "II"]
Rates = tuple[float, ...]
LOWEST, HIGHEST = 0.02, 0.98
_NODES = 16


def check_number(hurst: Any) -> None:
    """Refuse what is no Hurst index at all.

    Raises:
        TypeError: naming what was given.
    """
    if hurst is None or isinstance(hurst, str) or callable(hurst):
        raise TypeError(f"hurst must be a number, got {type(hurst).__name__}.")


def variance(hurst: Any, kind: Kind) -> Any:
    """The variance of B(1) with the kernel as above."""
    from scipy.special import gamma

    if kind == "I":
        return 1 / (gamma(2 * hurst + 1) * np.sin(np.pi * hurst))
    return 1 / (2 * hurst * gamma(hurst + 0.5) ** 2)


def gram(kind: Kind, rates: Rates, horizon: float) -> np.ndarray:
    """A, shape (K, K)."""
    g = np.asarray(rates)
    total = g[:, None] + g[None, :]
    if kind == "II":
        return horizon**2 * _e2(total * horizon)
    each = g * _e2(g * horizon)
    both_zero = total == 0
    ratio = (each[:, None] + each[None, :]) / np.where(both_zero, 1.0, total)
    return horizon**2 * np.where(both_zero, 0.5, ratio)


def moments(kind: Kind, rates: Rates, horizon: float, hurst: float) -> tuple[np.ndarray, float]:
    """b, shape (K,), and c."""
    one = _moment_i if kind == "I" else _moment_ii
    b = np.array([one(rate, horizon, hurst + 0.5) for rate in rates])
    return b, float(variance(hurst, kind) * horizon ** (2 * hurst + 1) / (2 * hurst + 1))


def solve_weights(kind: Kind, rates: Rates, horizon: float, hursts: np.ndarray) -> np.ndarray:
    """w, shape (len(hursts), K)."""
    # In units of the horizon, where the entries of A are at most 1.
    scaled = tuple(rate * horizon for rate in rates)
    A = gram(kind, scaled, 1.0)
    b = np.stack([moments(kind, scaled, 1.0, float(h))[0] for h in hursts], axis=1)
    if np.linalg.cond(A) < 1e12:
        w = np.linalg.solve(A, b)
        w += np.linalg.solve(A, b - A @ w)
    else:
        w = np.linalg.lstsq(A, b, rcond=1e-15)[0]
    return (w * horizon ** (hursts - 0.5)).T


@functools.lru_cache(maxsize=64)
def chebyshev_table(kind: Kind, rates: Rates, horizon: float) -> np.ndarray:
    """The Chebyshev coefficients of w(H), shape (16, K); H = 0.02 is x = -1 and H = 0.98 is x = 1."""
    angles = np.pi * (np.arange(_NODES) + 0.5) / _NODES
    middle, half = (HIGHEST + LOWEST) / 2, (HIGHEST - LOWEST) / 2
    values = solve_weights(kind, rates, horizon, middle + half * np.cos(angles))
    series = 2 / _NODES * np.cos(np.arange(_NODES)[:, None] * angles) @ values
    series[0] /= 2
    return series


def end_covariance(kind: Kind, rates: Rates, horizon: float) -> np.ndarray:
    """The covariance of Y_k(T) - Y_k(0), shape (K, K)."""
    g = np.asarray(rates)
    total = g[:, None] + g[None, :]
    gone = -np.expm1(-(total if kind == "II" else g) * horizon)
    pair = gone if kind == "II" else gone[:, None] + gone[None, :]
    return np.where(total == 0, horizon, pair / np.where(total == 0, 1.0, total))


def relative_cost(kind: Kind, rates: Rates, horizon: float, hurst: float, matched: bool = False) -> float:
    """J / c: the share of the variance, averaged over the horizon, by which B' misses B."""
    scaled = tuple(rate * horizon for rate in rates)
    w = solve_weights(kind, scaled, 1.0, np.array([hurst]))[0]
    if matched:
        w = w * np.sqrt(variance(hurst, kind) / (w @ end_covariance(kind, scaled, 1.0) @ w))
    b, c = moments(kind, scaled, 1.0, hurst)
    return float(max(w @ gram(kind, scaled, 1.0) @ w - 2 * b @ w + c, 0.0) / c)


def _e2(x: np.ndarray) -> np.ndarray:
    """(x - 1 + exp(-x)) / x^2, which is 1/2 at 0."""
    small = x < 1
    series, term = np.zeros_like(x), np.full_like(x, 0.5)
    for n in range(20):
        series += term
        term = term * -np.where(small, x, 0.0) / (n + 3)
    y = np.where(small, 1.0, x)
    return np.where(small, series, (y + np.expm1(-y)) / y**2)


def _moment_ii(rate: float, T: float, a: float) -> float:
    from scipy.special import gamma, gammainc

    if rate == 0:
        return float(T ** (a + 1) / gamma(a + 2))
    z = rate * T
    return float(T * rate**-a * gammainc(a, z) - a * rate ** (-a - 1) * gammainc(a + 1, z))


def _moment_i(rate: float, T: float, a: float) -> float:
    from scipy.special import gamma

    if rate == 0:
        return float(T ** (a + 1) / gamma(a + 2))
    z = rate * T
    if z < 3:
        # What remains of the closed form after its leading terms have cancelled.
        n = np.arange(1, 40)
        rising = (z**n / gamma(a + 1 + n)).sum() * z**a
        odd = np.arange(3, 40, 2)
        return float(rate ** (-a - 1) * (rising - 2 * (z**odd / gamma(odd + 1.0)).sum()))
    return float(
        2 * T * rate**-a - T**a / (rate * gamma(a + 1)) + rate ** (-a - 1) * (np.exp(-z) - _scaled_upper_gamma(a, z))
    )


def _scaled_upper_gamma(a: float, z: float) -> float:
    """exp(z) Q(a, z), Q the regularised upper incomplete gamma function, by its continued fraction; for z >= 3."""
    from scipy.special import gamma

    depth = 60
    g = z + 2 * depth + 1 - a
    for n in range(depth, 0, -1):
        g = z + 2 * n - 1 - a - n * (n - a) / g
    return float(z**a / gamma(a) / g)
