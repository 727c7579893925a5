"""Bounded features of time, so that no network meets a large number however long a series is."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float


def bounded_time(t: Any) -> Float[Array, " 1"]:
    """T / (1 + |t|), shape (1,): strictly increasing, with a limit as t grows.

    Example:
        >>> from sdeflow.models.fields import bounded_time
        >>> bounded_time(1.0).tolist(), bounded_time(-3.0).tolist()
        ([0.5], [-0.75])
    """
    t = _floating(t)
    return (t / (1 + jnp.abs(t)))[None]


def circular_time(t: Any) -> Float[Array, " 2"]:
    """(sin t, cos t), shape (2,): what the published experiments feed to their networks.

    Example:
        >>> from sdeflow.models.fields import circular_time
        >>> circular_time(0.0).tolist()
        [0.0, 1.0]
    """
    t = _floating(t)
    return jnp.stack([jnp.sin(t), jnp.cos(t)])


def _floating(t: Any) -> Array:
    return jnp.asarray(t, jnp.result_type(float) if isinstance(t, int | float) else jnp.result_type(t, 0.0))
