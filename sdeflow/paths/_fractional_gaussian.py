"""Fractional Brownian motion as a Gaussian process: covariances, conditional laws, and the Hurst index from data.

    type I:     E B(s) B(t) = (s^2H + t^2H - |t - s|^2H) / 2,
    type II:    E B(s) B(t) = 2H s^(H+1/2) t^(H-1/2) / (H + 1/2) 2F1(1/2 - H, 1; H + 3/2; s/t) for s <= t,

both with variance t^2H. The increments of type I over unit steps have the autocovariance

    r_k = (|k+1|^2H - 2 |k|^2H + |k-1|^2H) / 2 = sum_(j >= 1) binom(2H, 2j) k^(2H - 2j);

the first form loses all digits in float32 at long lags, the series converges fast from k = 8 on. Their spectral density
(Sinai 1976), whose tail is integrated rather than cut off, as that would bias small H, is

    f(l) = sin(pi H) Gamma(2H + 1) (1 - cos l) / pi  sum_j |2 pi j + l|^(-2H - 1).
"""

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve, solve_triangular
from jax.scipy.special import gammaln
from jaxtyping import Array, Float

from .._compat import is_concrete
from ._fractional_fit import Kind, check_number

_EXACT, _TERMS = 8, 10  # lags by the first form, and terms of the series after them
_ALIASES = 30
_GOLDEN = (5**0.5 - 1) / 2


def check_hurst(hurst: Any, kind: Kind) -> Any:
    """H as a scalar; of type II a number, as the covariance is made of it on the host.

    Raises:
        TypeError: for what is no number.
        ValueError: for H outside of (0, 1), another kind, or a traced H of type II.
    """
    if kind not in ("I", "II"):
        raise ValueError(f'kind must be "I" or "II", got {kind!r}.')
    check_number(hurst)
    if np.ndim(hurst) != 0:
        raise ValueError(f"hurst must be a scalar, got shape {np.shape(hurst)}.")
    if is_concrete(hurst):
        if not 0 < float(hurst) < 1:
            raise ValueError(f"hurst must lie strictly between 0 and 1, got {float(hurst)}: there is no such noise.")
    elif kind == "II":
        raise ValueError(
            'The exact covariance of kind="II" needs a number for hurst: use sf.paths.MarkovFractionalNoise, or '
            'kind="I", where H is traced.'
        )
    return hurst


def autocovariance(hurst: Any, n: int) -> Array:
    """r_0, ..., r_(n-1) of the increments of type I over unit steps, to the precision of the floats."""
    H = jnp.asarray(hurst, jnp.result_type(float))
    near = [jnp.ones_like(H), 2 ** (2 * H - 1) - 1]
    near += [((k + 1.0) ** (2 * H) - 2 * float(k) ** (2 * H) + (k - 1.0) ** (2 * H)) / 2 for k in range(2, _EXACT)]
    if n <= _EXACT:
        return jnp.stack(near[:n])
    k = jnp.arange(_EXACT, n, dtype=H.dtype)
    total, binomial = jnp.zeros_like(k), jnp.ones_like(H)
    for j in range(1, _TERMS + 1):
        binomial = binomial * (2 * H - 2 * j + 2) * (2 * H - 2 * j + 1) / ((2 * j - 1) * (2 * j))
        total = total + binomial * k ** (2.0 - 2 * j)
    return jnp.concatenate([jnp.stack(near), k ** (2 * H - 2) * total])


def covariance(s: Any, t: Any, hurst: Any, kind: Kind = "I") -> Any:
    """E B(s) B(t) of times that broadcast; NumPy in float64 where H and the times are known."""
    if not is_concrete(s, t, hurst):
        s, t, H = (jnp.asarray(x, jnp.result_type(float)) for x in (s, t, hurst))
        power = lambda d: jnp.where(d > 0, jnp.exp(2 * H * jnp.log(jnp.where(d > 0, d, 1))), 0)
        return (power(s) + power(t) - power(jnp.abs(s - t))) / 2
    s, t, H = np.asarray(s, np.float64), np.asarray(t, np.float64), float(hurst)
    if kind == "I":
        return (s ** (2 * H) + t ** (2 * H) - np.abs(s - t) ** (2 * H)) / 2
    from scipy.special import hyp2f1

    first, later = np.minimum(s, t), np.maximum(s, t)
    safe = np.where(later > 0, later, 1.0)
    size = 2 * H / (H + 0.5) * first ** (H + 0.5) * safe ** (H - 0.5)
    return size * hyp2f1(0.5 - H, 1.0, H + 1.5, first / safe)


def fractional_posterior(
    ts: Any, xs: Any, at: Any, *, hurst: Any, kind: Kind = "I", obs_std: Any = 0.0
) -> tuple[Float[Array, " m"], Float[Array, "m m"]]:
    """The law of fractional Brownian motion at some times, given what was observed at others: a forecast or a bridge.

    Its variance is t^(2H) and B(0) = 0 is known; it costs O(n^3).

    Arguments:
        ts: shape (n,), positive increasing times of the observations.
        xs: shape (n,), the observations.
        at: shape (m,), positive times.
        hurst: H.
        kind: "I" or "II".
        obs_std: the standard deviation of the observations' noise.

    Returns:
        The mean, shape (m,), and the covariance, shape (m, m).

    Raises:
        ValueError: for H outside of (0, 1), times that repeat, decrease or are not positive, observations that are not
            finite, or other shapes.

    Example:
        >>> import sdeflow as sf
        >>> mean, covariance = sf.paths.fractional_posterior([1.0, 2.0], [0.5, 1.0], [3.0], hurst=0.9)
        >>> bool(mean[0] > 1.0)  # it goes on in its direction
        True
    """
    check_hurst(hurst, kind)
    ts, at = _positive_times(ts, "ts"), np.asarray(at, np.float64) if is_concrete(at) else at
    if np.shape(xs) != np.shape(ts):
        raise ValueError(f"xs must have shape {np.shape(ts)}, one value a time, got {np.shape(xs)}.")
    if np.ndim(at) != 1:
        raise ValueError(f"at must have shape (m,), got {np.shape(at)}.")
    if is_concrete(xs) and not np.isfinite(np.asarray(xs, np.float64)).all():
        raise ValueError("xs must be finite: leave out the times at which nothing was observed.")
    noise = obs_std**2 * np.eye(np.shape(ts)[0])
    seen, both, own = (covariance(a[:, None], b[None], hurst, kind) for a, b in ((ts, ts), (at, ts), (at, at)))
    if is_concrete(seen, noise, xs):
        gain = np.linalg.solve(seen + noise, np.asarray(both).T).T
        mean, rest = gain @ np.asarray(xs, np.float64), own - gain @ np.asarray(both).T
        return jnp.asarray(mean, jnp.result_type(float)), jnp.asarray(rest, jnp.result_type(float))
    L = jnp.linalg.cholesky(jnp.asarray(seen + noise))
    half = solve_triangular(L, both.T, lower=True)
    return both @ cho_solve((L, True), jnp.asarray(xs)), own - half.T @ half


def fgn_log_prob(increments: Any, hurst: Any) -> Float[Array, ""]:
    """The log density in nats of increments of type I over unit steps, of variance one, by Durbin and Levinson.

    It is differentiable in both, and costs O(n^2) time and O(n) memory. A path with steps h and scale s has the
    increments ``diff(xs) / (s * h**H)``, whose density is that times (s h^H)^-n.

    Arguments:
        increments: shape (n,).
        hurst: H.

    Raises:
        ValueError: for H outside of (0, 1) or another shape.

    Example:
        >>> import sdeflow as sf
        >>> round(float(sf.paths.fgn_log_prob([0.5, -0.5], 0.5)), 3)
        -2.088
    """
    check_hurst(hurst, "I")
    x = jnp.asarray(increments)
    if x.ndim != 1 or x.shape[0] < 1:
        raise ValueError(f"increments must have shape (n,), got {x.shape}.")
    square, log_size = _innovations(x.astype(jnp.result_type(float)), jnp.asarray(hurst, jnp.result_type(float)))
    return -(square + log_size + x.shape[0] * np.log(2 * np.pi)) / 2


@jax.jit
def _innovations(x: Array, hurst: Array) -> tuple[Array, Array]:
    """The sum of the squared standardised innovations, and of the logarithms of their variances."""
    n = x.shape[0]
    r = autocovariance(hurst, n + 1)
    # Turned round, so that what lies j before place k is a slice.
    past, lags = (jnp.concatenate([v[::-1], jnp.zeros(n + 1, v.dtype)]) for v in (x, r[: n + 1]))

    def step(carry: tuple[Array, Array], k: Array) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
        phi, v = carry  # phi_j in place j - 1, of the prediction of x_k from x_(k-j)
        error = x[k] - phi @ jax.lax.dynamic_slice_in_dim(past, n - k, n)
        m = k + 1
        reflection = (r[m] - phi @ jax.lax.dynamic_slice_in_dim(lags, n - m + 1, n)) / v
        turned = jax.lax.dynamic_slice_in_dim(jnp.concatenate([phi[::-1], jnp.zeros(n + 1, v.dtype)]), n - m + 1, n)
        phi = phi - reflection * turned
        phi = jnp.where(jnp.arange(n) == m - 1, reflection, phi)
        return (phi, v * (1 - reflection**2)), (error**2 / v, jnp.log(v))

    start = (jnp.zeros(n, r.dtype), jnp.ones((), r.dtype))
    _, (squares, logs) = jax.lax.scan(step, start, jnp.arange(n))
    return squares.sum(), logs.sum()


def estimate_hurst(
    xs: Any, *, spacing: float | None = None, method: Literal["mle", "whittle"] = "mle"
) -> Float[Array, ""]:
    """The Hurst index of a path seen at equal steps, as fractional Brownian motion of type I.

    For irregular times maximise `MarkovFractionalNoise.log_prob`.

    Arguments:
        xs: shape (n,), values of the path at equally spaced times.
        spacing: the step, where the scale is known: a path of variance t^(2H). By default the scale is free.
        method: "mle", exact maximum likelihood, O(n^2) for each of 40 evaluations; "whittle", its approximation by the
            spectral density, O(n) after one Fourier transform and nearly as good.

    Returns:
        A scalar between 0.01 and 0.99.

    Raises:
        ValueError: for another shape or method, fewer than 8 values, or a spacing that is not positive.

    Example:
        >>> import jax, jax.numpy as jnp, sdeflow as sf
        >>> path = sf.paths.FractionalBrownian(jnp.arange(2000.0), (), key=jax.random.key(0), hurst=0.7)
        >>> H = sf.paths.estimate_hurst(path.values, method="whittle")
        >>> bool(abs(H - 0.7) < 0.07)
        True
    """
    if method not in ("mle", "whittle"):
        raise ValueError(f'method must be "mle" or "whittle", got {method!r}.')
    if np.ndim(xs) != 1 or np.shape(xs)[0] < 8:
        raise ValueError(f"xs must have shape (n,) with at least 8 values, got {np.shape(xs)}: use vmap for batches.")
    if spacing is not None and is_concrete(spacing) and not float(spacing) > 0:
        raise ValueError(f"spacing must be positive, got {spacing}.")
    return _estimate(jnp.diff(jnp.asarray(xs, jnp.result_type(float))), spacing, method)


@functools.partial(jax.jit, static_argnames="method")
def _estimate(x: Array, spacing: Any, method: str) -> Array:
    n = x.shape[0]
    # One size for all, so that float32 does not see squares of small numbers.
    size = jnp.sqrt(jnp.mean(x**2))
    size = jnp.where(size > 0, size, 1)
    unit = x / size
    if method == "mle":
        look = functools.partial(_innovations, unit)
    else:
        count = (n - 1) // 2
        power = jnp.abs(jnp.fft.rfft(unit)[1 : count + 1]) ** 2 / (2 * jnp.pi * n)
        frequency = 2 * jnp.pi * jnp.arange(1, count + 1, dtype=x.dtype) / n

        def look(H: Array) -> tuple[Array, Array]:
            log_f = _log_density(frequency, H)
            # The two sums of a likelihood of n innovations, which the periodogram approximates.
            return n * jnp.mean(power * jnp.exp(-log_f)), n * jnp.mean(log_f)

    def objective(H: Array) -> Array:
        square, log_size = look(H)
        if spacing is None:
            return n * jnp.log(square / n) + log_size
        log_scale = 2 * (H * jnp.log(jnp.asarray(spacing, x.dtype)) - jnp.log(size))
        return square * jnp.exp(-log_scale) + log_size + n * log_scale

    def narrow(_: Any, state: tuple[Array, ...]) -> tuple[Array, ...]:
        low, high, left, right, f_left, f_right = state
        lower = f_left < f_right
        low, high = jnp.where(lower, low, left), jnp.where(lower, right, high)
        probe = jnp.where(lower, high - _GOLDEN * (high - low), low + _GOLDEN * (high - low))
        found = objective(probe)
        left, right = jnp.where(lower, probe, right), jnp.where(lower, left, probe)
        f_left, f_right = jnp.where(lower, found, f_right), jnp.where(lower, f_left, found)
        return low, high, left, right, f_left, f_right

    low, high = jnp.asarray(0.01, x.dtype), jnp.asarray(0.99, x.dtype)
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    state = (low, high, left, right, objective(left), objective(right))
    low, high, *_ = jax.lax.fori_loop(0, 38, narrow, state)
    middle = (low + high) / 2
    return jnp.where(jnp.isfinite(x).all(), middle, jnp.nan)


def _log_density(frequency: Array, H: Array) -> Array:
    power = -2 * H - 1
    j = 2 * jnp.pi * jnp.arange(1, _ALIASES + 1, dtype=frequency.dtype)[:, None]
    total = frequency**power + ((j + frequency) ** power + (j - frequency) ** power).sum(axis=0)
    end = 2 * jnp.pi * (_ALIASES + 0.5)
    total = total + ((end + frequency) ** (-2 * H) + (end - frequency) ** (-2 * H)) / (4 * jnp.pi * H)
    # 1 - cos l without its cancellation.
    size = jnp.log(jnp.sin(jnp.pi * H)) + gammaln(2 * H + 1) + jnp.log(2 * jnp.sin(frequency / 2) ** 2 / jnp.pi)
    return size + jnp.log(total)


def _positive_times(ts: Any, name: str) -> Any:
    if not is_concrete(ts):
        return jnp.asarray(ts)
    times = np.asarray(ts, np.float64)
    if times.ndim != 1 or times.size < 1:
        raise ValueError(f"{name} must have shape (n,), got {times.shape}.")
    if not np.isfinite(times).all() or times[0] <= 0 or (np.diff(times) <= 0).any():
        raise ValueError(f"{name} must be positive and increase without repeats; B(0) = 0 is known.")
    return times
