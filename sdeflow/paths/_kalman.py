"""The Kalman recursion: the exact law of a linear Gaussian chain that is observed in part.

    x_k = Phi_k x_(k-1) + c_k + N(0, Q_k),      y_k = H_k x_k + N(0, R_k),      x_(-1) ~ N(mean, covariance)

A row predicts over its gap, then weighs what was observed: S = H P H' + R, K = P H' S^-1, m <- m + K (y - H m), and P
by Joseph's form (1 - K H) P (1 - K H)' + K R K', which stays positive in float32 and also where R = 0. A missing entry
becomes one of unit variance that is uncorrelated with everything and observed at its mean: it adds exactly 0, and rows
over which no time passes and nothing is seen change no bit of what came before.

The smoother is that of Bryson and Frazier (Bierman 1973, Automatica 9), which carries the gradient and the curvature of
the log density of the future backwards. It needs no inverse of a predicted covariance, as the recursion of Rauch, Tung
and Striebel does, so that states without noise, observations without noise and rows at one time are not special.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array

Moments = tuple[Array, Array]
_LOG_2PI = float(np.log(2 * np.pi))


class _Row(NamedTuple):
    """What one row of the recursion reads."""

    Phi: Array
    c: Array
    Q: Array
    H: Array
    R: Array
    y: Array
    seen: Array


class _Weighed(NamedTuple):
    """What an observation says, with S = L L'."""

    directions: Array  # L^-1 H
    surprise: Array  # L^-1 (y - H m)
    gain: Array  # K
    keep: Array  # 1 - K H
    log_prob: Array


# Compiled, so that a call outside of any trace does not build its loops anew.
@functools.partial(jax.jit, static_argnames="moments")
def kalman(
    gaps: tuple[Any, Any, Any],
    H: Any,
    R: Any,
    ys: Any,
    mask: Any,
    mean: Any,
    covariance: Any,
    *,
    moments: bool = False,
) -> Any:
    """The log density of the observations in nats, and on request the law of each state given those up to it.

    Arguments:
        gaps: Phi (n, d, d), c (n, d) and Q (n, d, d): row k is the transition from row k - 1, row 0 from the start.
        H: shape (p, d) or (n, p, d), from the state to what is observed.
        R: shape (p, p) or (n, p, p), the covariance of the observations' noise; 0 is allowed.
        ys: shape (n, p); what is not seen may be anything, NaN too.
        mask: shape (n, p), True where an entry was observed.
        mean, covariance: shapes (d,) and (d, d), the law of the state before the first gap.
        moments: also return the filtered means (n, d) and covariances (n, d, d).

    Returns:
        A scalar, or it and a pair. It is NaN where S is singular: observations without noise of what is known.
    """
    log_prob, found = _forward(*_prepared(gaps, H, R, ys, mask, mean, covariance), moments)
    return (log_prob, found[1]) if moments else log_prob


@jax.jit
def kalman_smoother(
    gaps: tuple[Any, Any, Any], H: Any, R: Any, ys: Any, mask: Any, mean: Any, covariance: Any
) -> tuple[Array, Moments]:
    """As `kalman`, with the law of each state given all observations: means (n, d) and covariances (n, d, d)."""
    rows, start = _prepared(gaps, H, R, ys, mask, mean, covariance)
    log_prob, (predicted, filtered) = _forward(rows, start, True)

    def back(future: Moments, at: tuple[_Row, Moments, Moments]) -> tuple[Moments, Moments]:
        # ``future`` holds minus the gradient and minus the curvature, in the state of this row, of the log density of
        # what comes after it, averaged over the law that the filter gave the state.
        row, (m, P), (mean, covariance) = at
        slope, bend = future
        smoothed = mean - covariance @ slope, _symmetric(covariance - covariance @ bend @ covariance)
        w = _weigh(row, m, P)
        slope = w.keep.T @ slope - w.directions.T @ w.surprise
        bend = _symmetric(w.keep.T @ bend @ w.keep + w.directions.T @ w.directions)
        return (row.Phi.T @ slope, row.Phi.T @ bend @ row.Phi), smoothed

    with jax.default_matmul_precision("highest"):
        nothing = jax.tree_util.tree_map(jnp.zeros_like, start)
        _, smoothed = jax.lax.scan(back, nothing, (rows, predicted, filtered), reverse=True)
    return log_prob, smoothed


def _prepared(gaps: Any, H: Any, R: Any, ys: Any, mask: Any, mean: Any, covariance: Any) -> tuple[_Row, Moments]:
    """One row of everything for each observation, and the start, all of one precision."""
    dtype = jnp.result_type(*gaps, H, R, ys, mean, covariance)
    Phi, c, Q, H, R, ys, mean, covariance = (jnp.asarray(x, dtype) for x in (*gaps, H, R, ys, mean, covariance))
    seen, (n, p) = jnp.asarray(mask, bool), ys.shape
    # Masked before anything is computed, so that no derivative meets 0 * NaN.
    both = seen[:, :, None] & seen[:, None, :]
    H = jnp.where(seen[:, :, None], jnp.broadcast_to(H, (n, p, c.shape[1])), 0)
    R = jnp.where(both, jnp.broadcast_to(R, (n, p, p)), 0)
    return _Row(Phi, c, Q, H, R, jnp.where(seen, ys, 0), seen), (mean, _symmetric(covariance))


def _forward(rows: _Row, start: Moments, moments: bool) -> tuple[Array, Any]:
    def step(carry: tuple[Array, Moments], row: _Row) -> tuple[tuple[Array, Moments], Any]:
        log_prob, (m, P) = carry
        m, P = row.Phi @ m + row.c, _symmetric(row.Phi @ P @ row.Phi.T + row.Q)
        w = _weigh(row, m, P)
        filtered = m + w.gain @ (row.y - row.H @ m), _symmetric(w.keep @ P @ w.keep.T + w.gain @ row.R @ w.gain.T)
        return (log_prob + w.log_prob, filtered), ((m, P), filtered) if moments else None

    # Summed in order, and not as an array, whose sum would depend on its length.
    zero = jnp.zeros((), start[0].dtype)
    with jax.default_matmul_precision("highest"):
        (log_prob, _), found = jax.lax.scan(step, (zero, start), rows)
    return log_prob, found


def _weigh(row: _Row, m: Array, P: Array) -> _Weighed:
    p, d = row.H.shape
    both = row.seen[:, None] & row.seen[None, :]
    S = jnp.where(both, _symmetric(row.H @ P @ row.H.T + row.R), jnp.eye(p, dtype=P.dtype))
    # A missing entry has y = 0 and H = 0.
    whole = jnp.concatenate([row.H, (row.y - row.H @ m)[:, None]], axis=1)
    if p == 1:
        L = jnp.sqrt(S)
        whole, gain = whole / L, (row.H @ P).T / S
    else:
        L = jnp.linalg.cholesky(S, symmetrize_input=False)
        whole = solve_triangular(L, whole, lower=True)
        gain = solve_triangular(L, whole[:, :d] @ P, trans="T", lower=True).T
    directions, surprise = whole[:, :d], whole[:, d]
    log_prob = -(surprise @ surprise + row.seen.sum() * _LOG_2PI) / 2 - jnp.log(jnp.diagonal(L)).sum()
    return _Weighed(directions, surprise, gain, jnp.eye(d, dtype=P.dtype) - gain @ row.H, log_prob)


def _symmetric(P: Array) -> Array:
    return (P + jnp.swapaxes(P, -1, -2)) / 2
