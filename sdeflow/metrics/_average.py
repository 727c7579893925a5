"""What was observed, and weighted averages over it."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._compat import is_concrete


def as_float(x: Any) -> Array:
    """An array of floating numbers."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.result_type(float))


def absolute(x: Array) -> Array:
    """|x| with derivative 0 at 0, where jax takes that of the right."""
    return jnp.where(x == 0, 0, jnp.abs(x))


def over(name: str, x: Any, shape: tuple[int, ...]) -> Array:
    """``x``, whose shape is ``shape`` or its leading axes, with trailing axes of length 1 up to its rank."""
    x = jnp.asarray(x)
    if x.shape != shape[: x.ndim]:
        raise ValueError(f"{name} has shape {x.shape}; it must be {shape} or its leading axes.")
    return x.reshape(*x.shape, *(1,) * (len(shape) - x.ndim))


def known(y: Array, mask: Any) -> Array:
    """Where there is an observation, of y's shape."""
    seen = ~jnp.isnan(y)
    return seen if mask is None else seen & over("mask", mask, y.shape).astype(bool)


def weights(weight: Any, seen: Array, dtype: Any) -> Array:
    """The weight of every entry, 0 where nothing is seen.

    Raises:
        ValueError: for a negative weight, or one of another shape.
    """
    if weight is None:
        return seen.astype(dtype)
    if is_concrete(weight) and (np.asarray(weight) < 0).any():
        raise ValueError("weight must not be negative.")
    return jnp.where(seen, over("weight", weight, seen.shape).astype(dtype), 0)


def average(values: Array, w: Array) -> Array:
    """The mean of the values with these weights; NaN where all are 0. A value of no weight may be NaN."""
    total = w.sum()
    mean = jnp.where(w > 0, w * jnp.where(w > 0, values, 0), 0).sum() / jnp.where(total > 0, total, 1)
    return jnp.where(total > 0, mean, jnp.nan)
