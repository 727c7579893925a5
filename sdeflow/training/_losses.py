"""Losses on predictions of series: ``CrossEntropy`` and ``MaskedMSE``."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ._prediction import Prediction
from ._rows import field, row_mean, row_weight
from ._sum import AbstractPredictionLoss, Metrics


class CrossEntropy(AbstractPredictionLoss):
    r"""The cross entropy of logits, ``-sum_i w_i log softmax(z_i)[c_i] / sum_i w_i``.

    ``prediction.outputs`` are the logits z, shape (B, K) with K >= 2; ``batch.labels`` the classes c, shape
    (B,), integers 0..K-1; ``batch.weight`` the weights w, ones if absent. A label outside 0..K-1 makes the
    loss NaN, so that training stops there. Reports "accuracy", the weighted share of rows whose largest logit
    is the label's.

    Raises:
        ValueError: the batch has no labels, or the shapes are not those above.
        TypeError: the labels are not integers.

    Example:
        >>> import jax.numpy as jnp
        >>> from types import SimpleNamespace
        >>> from sdeflow.training import CrossEntropy, Prediction
        >>> batch = SimpleNamespace(labels=jnp.array([0, 1]), weight=jnp.array([1.0, 0.0]))
        >>> value, metrics = CrossEntropy().score(Prediction(jnp.zeros((2, 2))), batch, 0)
        >>> round(value.item(), 4), metrics["accuracy"].item()
        (0.6931, 1.0)
    """

    def score(self, prediction: Prediction, batch: PyTree, step: Array | int) -> tuple[Float[Array, ""], Metrics]:
        """Score logits against labels."""
        logits, labels = jnp.asarray(prediction.outputs), field(batch, "labels")
        if labels is None:
            raise ValueError("CrossEntropy was given a batch without labels; build the data with `labels=`.")
        labels = jnp.asarray(labels)
        if not jnp.issubdtype(labels.dtype, jnp.integer):
            raise TypeError(f"CrossEntropy was given labels of dtype {labels.dtype}; use class numbers 0..K-1.")
        if logits.ndim != 2 or logits.shape[1] < 2 or labels.shape != logits.shape[:1]:
            raise ValueError(
                f"CrossEntropy was given outputs of shape {logits.shape} and labels of shape {labels.shape}; "
                "it needs logits (B, K) with K >= 2 and labels (B,)."
            )
        weight = row_weight(batch, logits.shape[0], logits.dtype)
        logits = jnp.where(weight[:, None] > 0, logits, 0)
        known = (labels >= 0) & (labels < logits.shape[1])
        picked = jnp.where(known, labels, 0)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits), picked[:, None], axis=1)[:, 0]
        value = row_mean(jnp.where(known, -log_prob, jnp.nan), weight)
        right = (jnp.argmax(logits, axis=1) == labels).astype(logits.dtype)
        return value, {"accuracy": row_mean(right, weight)}


class MaskedMSE(AbstractPredictionLoss):
    r"""The mean squared error over what was observed, ``sum_i w_i sum_j m_ij e_ij^2 / sum_i w_i sum_j m_ij``.

    ``prediction.outputs`` are compared with ``batch.targets`` where the batch has them (NaN there is
    missing), else with ``batch.values`` where ``batch.mask`` is True. Both must have the same shape, (B,
    ...). A batch in which nothing is observed costs 0.

    Raises:
        ValueError: the batch has neither targets nor values, or the shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from types import SimpleNamespace
        >>> from sdeflow.training import MaskedMSE, Prediction
        >>> batch = SimpleNamespace(targets=jnp.array([[1.0, jnp.nan], [3.0, jnp.nan]]))
        >>> MaskedMSE().score(Prediction(jnp.zeros((2, 2))), batch, 0)[0].item()
        5.0
    """

    def score(self, prediction: Prediction, batch: PyTree, step: Array | int) -> tuple[Float[Array, ""], Metrics]:
        """Score outputs against what was observed."""
        outputs, name, wanted = jnp.asarray(prediction.outputs), "targets", field(batch, "targets")
        if wanted is None:
            name, wanted = "values", field(batch, "values")
        if wanted is None:
            raise ValueError("MaskedMSE was given a batch without targets or values; build the data with `targets=`.")
        wanted = jnp.asarray(wanted)
        if outputs.shape != wanted.shape or outputs.ndim < 1:
            raise ValueError(
                f"MaskedMSE was given outputs of shape {outputs.shape} for {name} of shape {wanted.shape}; "
                "the shapes must be equal."
            )
        observed = ~jnp.isnan(wanted)
        if name == "values" and (mask := field(batch, "mask")) is not None:
            observed &= _like(jnp.asarray(mask).astype(bool), wanted)
        weight = row_weight(batch, outputs.shape[0], outputs.dtype)
        observed &= _like(weight > 0, wanted)
        error = jnp.where(observed, outputs, 0) - jnp.where(observed, wanted, 0).astype(outputs.dtype)
        axes = tuple(range(1, outputs.ndim))
        counts = jnp.sum(observed, axis=axes, dtype=outputs.dtype)
        return row_mean(jnp.sum(error**2, axis=axes), weight, counts), {}


def _like(mask: Any, x: Any) -> Any:
    """Trailing axes of length 1 until ``mask`` broadcasts over ``x``; other shapes are an error."""
    if mask.shape != x.shape[: mask.ndim]:
        raise ValueError(f"batch.mask has shape {mask.shape} for values of shape {x.shape}; leading axes must agree.")
    return mask.reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim))
