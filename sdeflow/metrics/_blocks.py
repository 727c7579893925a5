"""Clouds of points and their weights, and passes over all pairs of them that keep a block of rows at a time."""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._compat import is_concrete
from ._average import as_float

_T = TypeVar("_T")

# A block of this many pairs stays in the cache of one core: measured, larger and smaller ones are slower on CPU.
BLOCK = 2**19
# From here on nothing that has an entry for every pair is kept.
DENSE = 2**24


def cloud(name: str, x: Any) -> Float[Array, "n D"]:
    """Points as rows of floating numbers; one axis is that of points on a line.

    Raises:
        ValueError: if there are no points, they are not finite, or have another number of axes.
    """
    return as_rows(name, as_float(x))


def as_rows(name: str, x: Any) -> Any:
    """An array of JAX or of NumPy as points in rows, under the checks of `cloud`."""
    x = x[:, None] if x.ndim == 1 else x
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{name} must be points of shape (n, D) with n and D at least 1, got shape {x.shape}.")
    if is_concrete(x) and not np.isfinite(np.asarray(x)).all():
        raise ValueError(f"{name} has points that are infinite or NaN.")
    return x


def clouds(x: Any, y: Any) -> tuple[Float[Array, "n D"], Float[Array, "m D"]]:
    """Two clouds of one dimension and one dtype.

    Raises:
        ValueError: as `cloud`, or if the dimensions differ.
    """
    x, y = cloud("x", x), cloud("y", y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must have one dimension, got {x.shape[1]} and {y.shape[1]}.")
    dtype = jnp.result_type(x, y)
    return x.astype(dtype), y.astype(dtype)


def masses(name: str, weight: Any, points: Array, normalise: bool = True) -> Float[Array, " n"]:
    """The weight of every point, by default with sum 1.

    Raises:
        ValueError: if the shape is not that of the points, a weight is negative or not finite, or all are 0.
    """
    n = len(points)
    if weight is None:
        return jnp.full(n, 1 / n, points.dtype)
    weight = jnp.asarray(weight)
    check_masses(name, weight, n)
    weight = weight.astype(points.dtype)
    return weight / weight.sum() if normalise else weight


def check_masses(name: str, weight: Any, n: int) -> None:
    """That there is a weight for each of n points, none negative and one positive, in an array of JAX or NumPy."""
    if weight.shape != (n,):
        raise ValueError(f"{name} must have shape ({n},), one weight for each point, got {weight.shape}.")
    if is_concrete(weight):
        values = np.asarray(weight)
        if not np.isfinite(values).all() or (values < 0).any() or not (values > 0).any():
            raise ValueError(f"{name} must be finite weights of which none is negative and one is positive.")


def block_rows(n: int, m: int, chunk: int | None) -> int:
    """How many of n rows of length m go into a block.

    Raises:
        ValueError: if ``chunk`` is not positive.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 row, got {chunk}.")
    count = math.ceil(n / min(n, chunk or max(BLOCK // m, 8)))
    # Blocks of nearly one size, so that the last is not mostly padding.
    return math.ceil(n / count)


def split(x: Array, rows: int) -> Array:
    """Blocks of ``rows`` rows, shape (count, rows, ...), padded with zeros.

    Neighbours go to different blocks: where devices share the rows of x, they then share those of every block.
    """
    count = math.ceil(len(x) / rows)
    x = jnp.pad(x, [(0, rows * count - len(x))] + [(0, 0)] * (x.ndim - 1))
    return jnp.swapaxes(x.reshape(rows, count, *x.shape[1:]), 0, 1)


def join(blocks: Array, n: int) -> Array:
    """What `split` took apart."""
    return jnp.swapaxes(blocks, 0, 1).reshape(-1, *blocks.shape[2:])[:n]


def over_blocks(step: Callable[[Any], tuple[_T, Any]], blocks: Any) -> tuple[_T, Any]:
    """The sum over blocks of the first of what ``step`` returns, and the second for every block."""
    count = len(jax.tree.leaves(blocks)[0])
    if count == 1:
        total, each = step(jax.tree.map(lambda x: x[0], blocks))
        return total, jax.tree.map(lambda x: x[None], each)
    shapes = jax.eval_shape(lambda: step(jax.tree.map(lambda x: x[0], blocks))[0])
    start = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def body(total: Any, block: Any) -> tuple[Any, Any]:
        part, each = step(block)
        return jax.tree.map(jnp.add, total, part), each

    return jax.lax.scan(body, start, blocks)


def products(x: Array, y: Array) -> Array:
    """All inner products, in the full precision of the numbers on every device."""
    return jnp.matmul(x, y.T, precision="highest")
