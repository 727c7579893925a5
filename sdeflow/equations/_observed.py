"""Linear equations that are seen in part, at some times and with noise: y_k = H x(t_k) + obs_std N(0, 1).

What a call may pass is checked here; the law of the gaps comes from the equation, and the recursion over them from
`sdeflow.paths._kalman`.
"""

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._compat import is_concrete
from .._mesh import on_any_mesh
from ..paths._kalman import kalman, kalman_smoother

Wanted = Literal["log_prob", "filter", "smooth"]


def observed(
    wanted: Wanted, equation: Any, ts: Any, ys: Any, mask: Any, obs_std: Any, observe: Any, initial: Any, t0: Any
) -> Any:
    """The log density of observations, or the law of the state at their times: see `LinearSDE.log_prob`."""
    d = equation.dim
    H = _operator(observe, d)
    ys, seen = _observations(ys, mask, np.shape(ts), H.shape[0])
    gaps = _gaps(ts, t0, seen)
    # Where the coefficients depend on time it matters when a gap begins.
    starts = jnp.zeros(seen.shape[0]) if equation.is_constant else jnp.asarray(ts) - gaps
    std = _deviations(obs_std, ys.ndim == 1, seen)
    start = equation.stationary() if isinstance(initial, str) and initial == "stationary" else _start(initial, d)
    log_prob, moments = _run(equation, starts, gaps, H, std, ys.reshape(seen.shape), seen, start, wanted)
    if is_concrete(log_prob) and not np.isfinite(log_prob):
        raise ValueError(
            "The density is not finite: something that is known exactly was observed without noise (pass obs_std > 0), "
            "or the equation, ys or initial holds numbers that are not finite."
        )
    return log_prob if wanted == "log_prob" else moments


# Compiled as a whole, so that a call outside of any trace does not build its loops anew.
@on_any_mesh
@eqx.filter_jit
def _run(
    equation: Any, starts: Any, gaps: Any, H: Any, std: Any, ys: Any, seen: Any, start: tuple[Any, Any], wanted: Wanted
) -> tuple[Array, Any]:
    # The equation and what was seen say which precision it is; a float of Python does not.
    dtype = jnp.result_type(equation.dtype, *([ys] if jnp.issubdtype(ys.dtype, jnp.floating) else []))
    cast = lambda x: jnp.asarray(x, dtype)
    laws = jax.vmap(lambda start, gap: equation.transition(start, start + gap))(cast(starts), cast(gaps))
    R = jax.vmap(jnp.diag)(jnp.where(seen, cast(std), 0) ** 2)
    given = jax.tree_util.tree_map(cast, (laws, H, R, ys))
    start = jax.tree_util.tree_map(cast, start)
    if wanted == "smooth":
        return kalman_smoother(*given, seen, *start)
    if wanted == "filter":
        return kalman(*given, seen, *start, moments=True)
    return kalman(*given, seen, *start), None


def _host(x: Any) -> Any:
    """What is not an array of jax stays with numpy, so that its values are known in a trace too."""
    return x if isinstance(x, jax.Array) else np.asarray(x)


def _operator(observe: Any, d: int) -> Any:
    if observe is None:
        return np.eye(d)
    H = _host(observe)
    if H.ndim == 2 and H.shape[1] == d and H.shape[0] > 0:
        return H
    chosen = H.ndim == 1 and H.size > 0 and jnp.issubdtype(H.dtype, jnp.integer) and is_concrete(H)
    if chosen and (np.asarray(H) >= 0).all() and (np.asarray(H) < d).all():
        return np.eye(d)[np.asarray(H)]
    raise ValueError(
        f"observe must be a matrix (p, {d}) or a list of p of the numbers 0..{d - 1}, got {observe!r}: it says what of "
        "the state is seen."
    )


def _observations(ys: Any, mask: Any, times: tuple[int, ...], p: int) -> tuple[Any, Any]:
    """The observations as they were given, and where there are any, shape (n, p)."""
    if len(times) != 1 or times[0] < 1:
        raise ValueError(f"ts must have shape (n,) with n >= 1, got {times}.")
    ys, shape = _host(ys), (times[0], p)
    if ys.shape != shape and (p != 1 or ys.shape != times):
        raise ValueError(f"ys must have shape {shape}{f' or {times}' if p == 1 else ''}, got {ys.shape}.")
    seen = ys.reshape(shape) == ys.reshape(shape)  # not NaN, in whichever of the two libraries
    if mask is not None:
        mask = _host(mask).astype(bool)
        if mask.shape not in (shape, times):
            raise ValueError(f"mask must have shape {shape} or {times}, got {mask.shape}.")
        seen = seen & mask.reshape(times[0], -1)
    return ys, seen


def _gaps(ts: Any, t0: Any, seen: Any) -> Any:
    """The time that passes before each row, shape (n,); NaN, in a trace, where time would run backwards."""
    if not is_concrete(ts, t0):
        ts = jnp.asarray(ts)
        start = ts[0] if t0 is None else jnp.asarray(t0, ts.dtype)
        gaps = jnp.diff(ts, prepend=start[None])
        return jnp.where(gaps >= 0, gaps, jnp.nan)
    # On the host, so that large times lose nothing to the precision of the device.
    times = np.asarray(ts, np.float64)
    start = times[0] if t0 is None else float(t0)
    if not np.isfinite(times).all() or not np.isfinite(start):
        raise ValueError("ts must be finite, and t0 too.")
    if start > times[0]:
        raise ValueError(f"t0 = {start} must not lie after ts[0] = {times[0]}: it is the time of the initial law.")
    gaps = np.diff(times, prepend=start)
    # Rows at the end that repeat the last time and see nothing are padding.
    filler = (times == times[-1]) & (~np.asarray(seen).any(axis=1) if is_concrete(seen) else True)
    bad = np.flatnonzero((gaps[1:] <= 0) & ~((gaps[1:] == 0) & filler[1:])) + 1
    if bad.size:
        raise ValueError(f"ts must increase, but ts[{bad[0]}] = {times[bad[0]]} follows {times[bad[0] - 1]}.")
    return gaps


def _deviations(obs_std: Any, one_column: bool, seen: Any) -> Any:
    std = _host(obs_std)
    if one_column and std.ndim == 1:
        std = std[:, None]
    if std.ndim > 2 or any(a not in (1, b) for a, b in zip(std.shape[::-1], seen.shape[::-1])):
        raise ValueError(f"obs_std must broadcast to {seen.shape}, got {std.shape}.")
    if is_concrete(std, seen):
        every = np.broadcast_to(np.asarray(std), seen.shape)
        bad = every[np.asarray(seen) & ~(every >= 0)]
        if bad.size:
            raise ValueError(
                f"obs_std must not be negative or NaN where there are observations, got {bad[0]}: it is a standard "
                "deviation."
            )
    return std


def _start(initial: Any, d: int) -> tuple[Any, Any]:
    if isinstance(initial, str) or not isinstance(initial, tuple | list) or len(initial) != 2:
        raise ValueError(
            f'initial must be "stationary" or a pair of a mean and a covariance, got {initial!r:.60}: it is the law of '
            "the state at t0."
        )
    mean, covariance = (_host(x) for x in initial)
    if mean.shape != (d,) or covariance.shape != (d, d):
        raise ValueError(
            f"initial must be a mean of shape ({d},) and a covariance of shape ({d}, {d}), got {mean.shape} and "
            f"{covariance.shape}."
        )
    if is_concrete(covariance):
        P = np.asarray(covariance, np.float64)
        slack = 1e-5 * np.abs(P).max()
        if np.abs(P - P.T).max() > slack or np.linalg.eigvalsh(P).min() < -slack:
            raise ValueError("The covariance of initial must be symmetric and without negative eigenvalues.")
    return mean, covariance
