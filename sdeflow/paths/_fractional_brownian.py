"""Fractional Brownian motion itself, drawn exactly, as a path for ordinary solvers.

On equal steps the covariance of the increments is a corner of a circulant matrix, whose eigenvalues are a Fourier
transform and not negative (Davies and Harte 1987; Craigmile 2003),

    row = (r_0, ..., r_n, r_(n-1), ..., r_1),      w = FFT(sqrt(FFT(row) / 2n) z),

and the real and the imaginary part of w_0, ..., w_(n-1) are two independent draws. Otherwise a Cholesky factor serves.
"""

import math
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._compat import is_concrete
from ._fractional_fit import Kind
from ._fractional_gaussian import autocovariance, check_hurst, covariance
from ._grid_brownian import as_structure, normals


class FractionalBrownian(diffrax.AbstractPath):
    """Fractional Brownian motion, exact at the times it is made for and straight in between.

    It drives an equation of Stratonovich (`sdeflow.SDE` with ``interpretation="stratonovich"``) with a solver such as
    ``diffrax.Heun()`` whose steps end at ``ts``; for H != 1/2 there is no Ito integral. For inference, which needs a
    density of paths, use `MarkovFractionalNoise` and `sdeflow.equations.FractionalSDE`.

    Arguments:
        ts: shape (n,), increasing times; the path is 0 at ``ts[0]``, from where its time is counted.
        shape: of one value; its entries are independent.
        key: a JAX random key.
        hurst: H, between 0 and 1; for type I it may be traced, and draws are differentiable in it.
        kind: "I", stationary increments, O(n log n) on equal steps and O(n^3) otherwise; "II", nothing before
            ``ts[0]``, O(n^3). Both have the variance t^(2H).

    Raises:
        ValueError: for H outside of (0, 1), another kind, or times that are fewer than two, repeat or decrease.

    Example:
        >>> import diffrax, jax, jax.numpy as jnp, sdeflow as sf
        >>> ts = jnp.linspace(0.0, 1.0, 65)
        >>> path = sf.paths.FractionalBrownian(ts, (3,), key=jax.random.key(0), hurst=0.7)
        >>> path.values.shape
        (65, 3)
        >>> sde = sf.SDE(lambda t, y, args: -y, lambda t, y, args: 0.5 * y, interpretation="stratonovich")
        >>> sf.solve(sde, jnp.ones(3), [0.0, 1.0], dt0=1 / 64, path=path, solver=diffrax.Heun()).final.shape
        (3,)
    """

    ts: Float[Array, " n"]
    values: Array

    def __init__(self, ts: Any, shape: tuple[int, ...] = (), *, key: PRNGKeyArray, hurst: Any, kind: Kind = "I"):
        check_hurst(hurst, kind)
        times = _check_times(ts)
        structure = as_structure(tuple(shape))
        gaps = np.diff(times) if is_concrete(times) else None
        if kind == "I" and gaps is not None and np.ptp(gaps) <= 1e-5 * gaps[0] + 4 * np.spacing(np.float32(times[-1])):
            steps = davies_harte(key, math.prod(shape), gaps.size, hurst)
            step = jnp.asarray((times[-1] - times[0]) / gaps.size, steps.dtype)
            steps = steps * step ** jnp.asarray(hurst, steps.dtype)
        else:
            steps = _by_cholesky(key, math.prod(shape), times, hurst, kind)
        self.ts = jnp.asarray(times, structure.dtype)
        self.values = _summed(steps).reshape(-1, *shape)

    @property
    def t0(self) -> Any:
        """Where the path begins."""
        return self.ts[0]

    @property
    def t1(self) -> Any:
        """Where the path ends."""
        return self.ts[-1]

    def evaluate(self, t0: Any, t1: Any = None, left: bool = True) -> Array:
        """The value at ``t0``, or the increment from ``t0`` to ``t1``; NaN outside of the path's times."""
        del left
        return self._at(t0) if t1 is None else self._at(t1) - self._at(t0)

    def _at(self, t: Any) -> Array:
        t = jnp.asarray(t, self.ts.dtype)
        i = jnp.clip(jnp.searchsorted(self.ts, t, side="right") - 1, 0, self.ts.shape[0] - 2)
        weight = (t - self.ts[i]) / (self.ts[i + 1] - self.ts[i])
        # A step may end a rounding error after the last time.
        weight = jnp.where((weight >= -1e-3) & (weight <= 1 + 1e-3), jnp.clip(weight, 0, 1), jnp.nan)
        weight = weight.astype(self.values.dtype)
        return self.values[i] * (1 - weight) + self.values[i + 1] * weight


def circulant_eigenvalues(hurst: Any, n: int) -> Array:
    """Of the circulant matrix that holds the covariance of n increments over unit steps, shape (2n,)."""
    r = autocovariance(hurst, n + 1)
    return jnp.fft.fft(jnp.concatenate([r, r[-2:0:-1]])).real


def davies_harte(key: PRNGKeyArray, count: int, n: int, hurst: Any) -> Array:
    """Increments over unit steps of that many independent paths, shape (n, count)."""
    eigenvalues = circulant_eigenvalues(hurst, n)
    positive = eigenvalues > 0
    root = jnp.where(positive, jnp.sqrt(jnp.where(positive, eigenvalues, 1) / (2 * n)), 0)
    half = jax.ShapeDtypeStruct((-(-count // 2), 2 * n), root.dtype)
    # Two draws rather than one taken apart, which the compiler would make again for every part.
    real, imaginary = normals(key, (half, half), diffrax.BrownianIncrement)["W"]
    w = jnp.fft.fft(jax.lax.complex(real * root, imaginary * root))[:, :n]
    return jnp.concatenate([w.real, w.imag])[:count].T


def _summed(steps: Array) -> Array:
    """0 and the cumulative sums, shape (n + 1, count): within blocks by a triangular matrix, then over blocks.

    XLA's own on a CPU takes time that grows with the square of n.
    """
    n, count = steps.shape
    size = math.isqrt(n - 1) + 1
    blocks = jnp.pad(steps, ((0, -n % size), (0, 0))).reshape(-1, size, count)
    add = lambda x, length: jnp.einsum("ij,j...->i...", jnp.tri(length, dtype=x.dtype), x, precision="highest")
    before = add(blocks.sum(axis=1), blocks.shape[0]) - blocks.sum(axis=1)
    within = jnp.einsum("ij,bjc->bic", jnp.tri(size, dtype=steps.dtype), blocks, precision="highest")
    sums = (within + before[:, None]).reshape(-1, count)[:n]
    return jnp.concatenate([jnp.zeros((1, count), steps.dtype), sums])


def _by_cholesky(key: PRNGKeyArray, count: int, times: Any, hurst: Any, kind: Kind) -> Array:
    dtype = jnp.result_type(float)
    t = times - times[0]
    n = t.shape[0] - 1
    if is_concrete(t, hurst):
        # Of the values in float64; that of the increments follows from it.
        L = np.linalg.cholesky(covariance(t[1:, None], t[None, 1:], hurst, kind))
        L = np.diff(L, axis=0, prepend=np.zeros((1, n)))
    else:
        a, b = t[:-1], t[1:]
        K = lambda s, t: covariance(s[:, None], t[None], hurst)
        whole = K(b, b) - K(a, b) - K(b, a) + K(a, a)
        L = jnp.linalg.cholesky(jnp.asarray(whole))
    z = normals(key, jax.ShapeDtypeStruct((n, count), dtype), diffrax.BrownianIncrement)["W"]
    with jax.default_matmul_precision("highest"):
        return jnp.asarray(L, dtype) @ z


def _check_times(ts: Any) -> Any:
    times = np.asarray(ts, np.float64) if is_concrete(ts) else jnp.asarray(ts, jnp.result_type(float))
    if times.ndim != 1 or times.shape[0] < 2:
        raise ValueError(f"ts must have shape (n,) with n >= 2, got {times.shape}.")
    if isinstance(times, np.ndarray):
        bad = np.flatnonzero(~(np.diff(times) > 0)) + 1
        if not np.isfinite(times).all() or bad.size:
            where = f", but ts[{bad[0]}] = {times[bad[0]]} follows {times[bad[0] - 1]}" if bad.size else ""
            raise ValueError(f"ts must be finite and increase without repeats{where}.")
    return times
