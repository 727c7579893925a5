"""What the bridges between samples share: the checked clouds and the reference's clock around them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._compat import is_concrete
from ..equations import BrownianMotion, LinearSDE
from ..metrics._average import as_float
from ._clock import Clock


def prepared(
    x0: Any, x1: Any, epsilon: Any, reference: LinearSDE | None, t0: Any, t1: Any
) -> tuple[Clock, Array, Array]:
    """The clock, and both clouds in its coordinates, centred at the mean of the second.

    Raises:
        ValueError: for clouds of other shapes, with NaN, or of one point; an epsilon that is not positive; neither or
            both of ``epsilon`` and ``reference``.
    """
    x0, x1 = (_cloud(name, x) for name, x in (("x0", x0), ("x1", x1)))
    if x0.shape[1] != x1.shape[1]:
        raise ValueError(f"x0 and x1 must have as many columns, got {x0.shape[1]} and {x1.shape[1]}.")
    if (epsilon is None) == (reference is None):
        raise ValueError(
            "give epsilon, the variance of Brownian motion over the horizon, or a reference, which has noise of its "
            "own: one of them, not both."
        )
    if reference is None:
        if not isinstance(epsilon, int | float | np.number | np.ndarray | jax.Array) or isinstance(epsilon, bool):
            raise TypeError(f"epsilon must be a number, got {epsilon!r}.")
        if is_concrete(epsilon) and not (np.isfinite(epsilon) and epsilon > 0):
            raise ValueError(f"epsilon must be positive and finite, got {epsilon}.")
        sigma = jnp.sqrt(jnp.asarray(epsilon, x0.dtype) / (jnp.asarray(t1, x0.dtype) - t0))
        reference = BrownianMotion(x0.shape[1], sigma)
    elif not isinstance(reference, LinearSDE):
        raise TypeError(
            f"reference must be a LinearSDE, such as BrownianMotion({x0.shape[1]}, 0.3), got "
            f"{type(reference).__name__}; a variance is passed as epsilon."
        )
    elif reference.dim != x0.shape[1]:
        raise ValueError(f"the reference has {reference.dim} components and the samples {x0.shape[1]}.")
    clock = Clock(reference, t0, t1)
    clock = clock.around(clock.end(x1).mean(axis=0))
    return clock, clock.start(x0), clock.end(x1)


def _cloud(name: str, x: Any) -> Array:
    kind = type(x).__name__
    if hasattr(x, "obsm") or hasattr(x, "pairs"):
        raise TypeError(
            f"{name} must be the cells of one time, an array of shape (n, d), got {kind}: take them from "
            "Snapshots.from_anndata(...).pairs()."
        )
    if hasattr(x, "toarray"):
        raise TypeError(f"{name} must be a dense array of shape (n, d), got {kind}: pass its toarray().")
    try:
        x = jnp.asarray(x)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array of numbers of shape (n, d), got {kind}.") from error
    if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.number) or jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise ValueError(f"{name} must be an array of numbers of shape (n, d), got shape {x.shape} and {x.dtype}.")
    if len(x) < 2:
        raise ValueError(f"{name} must have at least two rows, got {len(x)}.")
    x = as_float(x)
    if is_concrete(x) and not bool(jnp.isfinite(x).all()):
        row = int(np.flatnonzero(~np.isfinite(np.asarray(x)).all(axis=1))[0])
        raise ValueError(f"{name} has numbers that are not finite, first in row {row}.")
    return x
