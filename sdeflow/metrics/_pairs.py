"""Distances that are sums over pairs of points: ``energy_distance`` and ``mmd``.

The pairs within a cloud are those of two different points, so that both are estimates without bias of a number about
the two laws, and are negative at times where the laws agree. They stream over blocks of rows, their gradients too.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._compat import is_concrete
from .._mesh import on_any_mesh
from ._blocks import block_rows, clouds, over_blocks, products, split


@on_any_mesh
def energy_distance(x: Any, y: Any, *, biased: bool = False) -> Float[Array, ""]:
    r"""The energy distance between two laws from samples, ``E|X - Y| - E|X - X'| / 2 - E|Y - Y'| / 2``.

    It is half of the number that Székely and Rizzo (2013) give the name, and the one that single-cell benchmarks call
    "MMD". It is in the units of the points: say what they were scaled by. Without bias for every n and m; under equal
    laws it is about E|X - X'| (1/n + 1/m) / 2 in size. O(n m) time and O(n + m) memory.

    Arguments:
        x: shape (n, D), n at least 2.
        y: shape (m, D), m at least 2.
        biased: divide the sums within a cloud by n^2 in place of n (n - 1): the distance of the samples' own
            distributions, never negative, and larger by about ``E|X - X'| (1/n + 1/m) / 2``.

    Returns:
        A scalar.

    Raises:
        ValueError: if the clouds have different dimensions, or points that are not finite, or too few.

    Example:
        >>> import numpy as np, sdeflow as sf
        >>> float(sf.metrics.energy_distance(np.array([[0.0], [1.0]]), np.array([[3.0], [4.0]])))
        2.0
    """
    return _between(*_enough(x, y, biased), None, biased)


@on_any_mesh
def mmd(x: Any, y: Any, *, bandwidths: Any = "median", biased: bool = False) -> Float[Array, ""]:
    r"""The squared maximum mean discrepancy, ``E k(X, X') + E k(Y, Y') - 2 E k(X, Y)``, of a sum of Gaussian kernels.

    The kernel is ``k(x, y) = sum_h exp(-|x - y|^2 / (2 h^2))`` (Gretton et al. 2012, JMLR 13). Without bias for every
    n and m, of size 1/n under equal laws, and at most 2 for each bandwidth. It depends on the points' scale unless the
    bandwidth is their median distance. O(n m) time and O(n + m) memory.

    Arguments:
        x: shape (n, D), n at least 2.
        y: shape (m, D), m at least 2.
        bandwidths: positive numbers h; ``(0.01, 0.1, 1, 10, 100)`` are those that TorchCFM sums over. "median": the
            median distance between different points of both clouds, of at most 1000 evenly picked ones. It differs
            from one pair of clouds to the next, so give numbers where results are to be compared. To a gradient
            bandwidths are constant.
        biased: divide the sums within a cloud by n^2 in place of n (n - 1), as TorchCFM does; never negative.

    Returns:
        A scalar.

    Raises:
        ValueError: if the clouds have different dimensions, or points that are not finite, or too few; or for
            bandwidths that are not positive.

    Example:
        >>> import numpy as np, sdeflow as sf
        >>> x, y = np.array([[0.0], [1.0]]), np.array([[3.0], [4.0]])
        >>> round(float(sf.metrics.mmd(x, y, bandwidths=1.0)), 4)
        1.1341
    """
    x, y = clouds(x, y)
    if isinstance(bandwidths, str):
        if bandwidths != "median":
            raise ValueError(f'bandwidths must be numbers or "median", got {bandwidths!r}.')
        h = _median(x, y)[None]
    else:
        h = jnp.atleast_1d(jnp.asarray(bandwidths, x.dtype))
        if h.ndim != 1 or not h.size or (is_concrete(h) and not (np.asarray(h) > 0).all()):
            raise ValueError(f"bandwidths must be positive numbers, got {bandwidths}.")
    return -2 * _between(*_enough(x, y, biased), -1 / (2 * jax.lax.stop_gradient(h) ** 2), biased)


def _enough(x: Any, y: Any, biased: bool) -> tuple[Array, Array]:
    x, y = clouds(x, y)
    if not biased and min(len(x), len(y)) < 2:
        raise ValueError(f"It takes at least 2 points of each, got {len(x)} and {len(y)}: pass more, or biased=True.")
    return x, y


@on_any_mesh
@eqx.filter_jit
def _between(x: Array, y: Array, rates: Array | None, biased: bool) -> Array:
    """E k(X, Y) - (E k(X, X') + E k(Y, Y')) / 2, where k is the distance, or a sum of exponentials of its square."""

    def kernel(square: Array) -> Array:
        if rates is not None:
            return jnp.exp(square[..., None] * rates).sum(axis=-1)
        return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)

    centre = jax.lax.stop_gradient(jnp.concatenate([x, y]).mean(axis=0))
    x, y = x - centre, y - centre

    def inside(x: Array) -> Array:
        n, others = len(x), _mean(x, x, kernel, True)
        return others + kernel(jnp.zeros((), x.dtype)) / n if biased else others * (n / (n - 1))

    return _mean(x, y, kernel, False) - inside(x) / 2 - inside(y) / 2


def _mean(x: Array, y: Array, kernel: Callable[[Array], Array], different: bool) -> Array:
    """The sum of k(|x_i - y_j|^2), without i = j if the pairs are to be ``different``, over the number of all."""
    n, m = len(x), len(y)
    rows = block_rows(n, m, None)
    yy, columns = (y**2).sum(axis=1), jnp.arange(m)
    noise = 4 * jnp.finfo(x.dtype).eps

    # A checkpoint, so that the gradient computes a block again and keeps none.
    @jax.checkpoint
    def step(block: tuple) -> tuple:
        x, i, counted = block
        total = (x**2).sum(axis=1)[:, None] + yy
        square = total - 2 * products(x, y)
        # What rounding leaves of nothing would get a gradient of any size.
        values = kernel(jnp.where(square > noise * total, square, 0))
        values = jnp.where(i[:, None] == columns, 0, values) if different else values
        return (counted * values.mean(axis=1)).sum() / n, ()

    each = split(x, rows), split(jnp.arange(n), rows), split(jnp.ones(n, x.dtype), rows)
    return over_blocks(step, each)[0]


@jax.jit
def _median(x: Array, y: Array) -> Array:
    points = jnp.concatenate([x, y])
    picked = points[np.linspace(0, len(points) - 1, min(len(points), 1000)).astype(int)]
    picked = picked - picked.mean(axis=0)
    first, second = np.triu_indices(len(picked), 1)
    total = (picked**2).sum(axis=1)
    square = (total[:, None] + total - 2 * products(picked, picked))[first, second]
    median = jnp.sqrt(jnp.maximum(jnp.median(square), 0))
    return jnp.where(median > 0, median, 1)
