"""STEER: a random last time while training, so that the field is smooth beyond the time that counts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from .._compat import is_concrete


def steer_end_time(ts: Any, width: float, *, key: PRNGKeyArray) -> Array:
    """The requested times with the last one drawn anew, t_n' ~ U(t_n - width, t_n + width); for training only.

    Arguments:
        ts: shape (n,), the requested times.
        width: half of the interval, above zero and below the distance of the last two times.
        key: a JAX random key.

    Returns:
        Shape (n,), traced inside of ``jit``: give `sdeflow.solve` adaptive steps, or ``steps_per_interval``.

    Raises:
        ValueError: for a width that is not positive or as large as the last interval.

    Source: Ghosh, Behl, Dupont, Torr and Namboodiri, STEER, 2020, arXiv:2006.10711.

    Example:
        >>> import jax, sdeflow as sf
        >>> ts = sf.grids.steer_end_time([0.0, 1.0], 0.5, key=jax.random.key(0))
        >>> bool(0.5 <= ts[1] <= 1.5)
        True
    """
    times = jnp.asarray(ts, jnp.result_type(float) if not hasattr(ts, "dtype") else None)
    if times.ndim != 1 or times.shape[0] < 2:
        raise ValueError(f"ts must be one-dimensional with at least two times, got shape {times.shape}.")
    last = float(abs(np.asarray(ts)[-1] - np.asarray(ts)[-2])) if is_concrete(times) else np.inf
    if not 0 < width < last:
        raise ValueError(
            f"width must lie between 0 and the length of the last interval, {last:g}, got {width!r}: the times would "
            "change their order."
        )
    moved = times[-1] + jax.random.uniform(key, (), times.dtype, -width, width)
    return times.at[-1].set(moved)
