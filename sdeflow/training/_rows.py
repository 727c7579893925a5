"""Rows of a batch: their weights, and how a filler row is kept from reaching a value or a gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

# Only these are known to hold one row per series; a shared grid may have as many entries as there are series.
ROW_FIELDS = ("times", "values", "mask", "lengths", "labels", "targets", "static")


def field(batch: Any, name: str) -> Any:
    """The attribute (or dict entry) ``name`` of a batch, None where there is none."""
    return batch.get(name) if isinstance(batch, dict) else getattr(batch, name, None)


def row_weight(batch: PyTree, rows: int, dtype: Any) -> Float[Array, " rows"]:
    """``batch.weight`` as an array of shape (rows,), ones where the batch has none."""
    weight = field(batch, "weight")
    if weight is None:
        return jnp.ones(rows, dtype)
    if jnp.shape(weight) != (rows,):
        raise ValueError(
            f"batch.weight has shape {jnp.shape(weight)} but the prediction has {rows} rows; "
            "give one weight per row of the batch."
        )
    return jnp.asarray(weight).astype(dtype)


def row_mean(
    values: Float[Array, " rows"], weight: Float[Array, " rows"], counts: Float[Array, " rows"] | None = None
) -> Float[Array, ""]:
    """``sum_i w_i v_i / sum_i w_i c_i`` over the rows of positive weight, with ``c_i = 1`` by default; 0 if
    none.

    Rows of weight 0 are cut out before the product, so that a NaN in them meets neither value nor gradient.
    """
    real = weight > 0
    weight = jnp.where(real, weight, 0)
    total = jnp.sum(weight if counts is None else weight * jnp.where(real, counts, 0))
    value = jnp.sum(weight * jnp.where(real, values, 0))
    return jnp.where(total > 0, value / jnp.where(total > 0, total, 1), 0)


def without_filler(batch: PyTree) -> PyTree:
    """The batch with each row of weight 0 overwritten by the first row of positive weight.

    A ``where`` on the outputs alone cannot stop a NaN inside the model: its cotangent is 0 there, and 0 * NaN
    = NaN.
    """
    weight = field(batch, "weight")
    if weight is None:
        return batch
    real: Bool[Any, " rows"] = jnp.asarray(weight) > 0
    first = jnp.argmax(real)

    def replace(path: Any, leaf: Any) -> Any:
        name = getattr(path[0], "name", getattr(path[0], "key", None)) if path else None
        if name not in ROW_FIELDS or not isinstance(leaf, jax.Array | np.ndarray) or leaf.shape[:1] != real.shape:
            return leaf
        leaf = jnp.asarray(leaf)
        return jnp.where(real.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, leaf[first])

    return jtu.tree_map_with_path(replace, batch)
