"""What is hidden from a model in training, so that it learns to say what it was not shown."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, PRNGKeyArray


def hidden(task: str, shape: tuple[int, int], length: Any, share: float, key: PRNGKeyArray) -> Bool[Array, "L C"]:
    """Which entries of one series to hide.

    To learn to forecast, all from some time step on; the first step is never hidden, and of the others a share that is
    uniform between 0 and ``share``, and at least one. To learn to impute, half of such a share of the time steps, and
    half of it of the single values.

    Arguments:
        task: "forecast" or "impute".
        shape: (L, C).
        length: the number of time steps before the padding.
        share: the largest share, in (0, 1].
        key: a JAX random key.
    """
    count, channels = shape
    how_much, steps, values = jax.random.split(key, 3)
    part = share * jax.random.uniform(how_much, dtype=jnp.result_type(float))
    if task == "forecast":
        last = jnp.maximum(length - 1, 1)
        first = jnp.clip(jnp.ceil((1 - part) * length).astype(last.dtype), 1, last)
        return jnp.broadcast_to((jnp.arange(count) >= first)[:, None], shape)
    # One number for each entry whatever the padding is: those of a longer batch begin with those of a shorter one.
    draw = lambda key, width: jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), (width,)))
    rows, entries = draw(steps, 1)(jnp.arange(count)), draw(values, channels)(jnp.arange(count))
    return (rows < part / 2) | (entries < part / 2)
