"""What a model hands to a loss: ``Prediction``."""

from typing import Any

import equinox as eqx
from jaxtyping import Array, PyTree


class Prediction(eqx.Module):
    """The answer of ``model(batch, *, key, regularisers=())``, read by the losses of `sdeflow.losses`.

    Arguments:
        outputs: what is scored, one row per series: logits (B, K), values (B, k) or (B, L, C); several samples of
            them, (B, S, ...).
        states: the hidden path, leaves (B, n, ...), or None.
        kl: the Kullback-Leibler divergence in nats, shape () or (B,), or None.
        penalties: a dict from the class name of each regulariser that was passed in to its cost, shape () or
            (B,).
        result: how the solve ended (members of `sdeflow.RESULTS`, shape () or (B,)), or None.
        scored: which entries of ``batch.values`` are to be compared with the outputs, shape (B, L, C); None for all
            that was observed.
        scale: the standard deviation of an observation given its output, of a shape that broadcasts to (B, L, C), or
            None.

    Example:
        >>> import jax.numpy as jnp
        >>> from sdeflow.training import Prediction
        >>> Prediction(jnp.zeros((4, 3))).penalties
        {}
    """

    outputs: PyTree[Array]
    states: PyTree[Array] = None
    kl: Array | None = None
    penalties: dict[str, Array] = eqx.field(default_factory=dict)
    result: Any = None
    scored: Array | None = None
    scale: Array | None = None
