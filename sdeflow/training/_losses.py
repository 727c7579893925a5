"""Losses on predictions of series: ``CrossEntropy`` and ``MaskedMSE``."""

from typing import Any, NamedTuple

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

    ``prediction.outputs`` are compared with ``batch.targets`` where the batch has them (NaN there is missing), else
    with ``batch.values`` where ``batch.mask`` is True, and where ``prediction.scored`` is if the model says what it
    was not shown. Both must have the same shape, (B, ...); outputs of several samples have one more axis after the
    first, and then the error is the mean over the samples. A batch in which nothing is observed costs 0.

    For samples of a stochastic model the mean square error is smallest where they do not vary at all; `EnergyScore` and
    `NegativeLogLikelihood` are for those.

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
        seen = observations("MaskedMSE", prediction, batch)
        square = jnp.mean(seen.error**2, axis=1)
        return row_mean(jnp.sum(square, axis=tuple(range(1, square.ndim))), seen.weight, seen.counts), {}


class Scored(NamedTuple):
    """What a prediction is compared with.

    Arguments:
        wanted: shape (B, ...), what was observed.
        observed: the same, whether it was, and counts.
        error: shape (B, S, ...), outputs less what was observed, 0 where nothing was.
        weight: shape (B,).
        counts: shape (B,), the entries that count.
    """

    wanted: Array
    observed: Array
    error: Array
    weight: Array
    counts: Array


def observations(name: str, prediction: Prediction, batch: PyTree) -> Scored:
    """Outputs beside the targets of a batch (NaN there is missing), or else beside its values.

    Raises:
        ValueError: naming the loss, if the batch has neither, or if the shapes differ.
    """
    outputs, what, wanted = jnp.asarray(prediction.outputs), "targets", field(batch, "targets")
    if wanted is None or prediction.scored is not None:
        what, wanted = "values", field(batch, "values")
    if wanted is None:
        raise ValueError(f"{name} was given a batch without targets or values; build the data with `targets=`.")
    wanted = jnp.asarray(wanted)
    sampled = outputs.ndim == wanted.ndim + 1
    if (outputs.shape[:1] + outputs.shape[2:] if sampled else outputs.shape) != wanted.shape or outputs.ndim < 1:
        raise ValueError(
            f"{name} was given outputs of shape {outputs.shape} for {what} of shape {wanted.shape}; "
            "the shapes must be equal, but for an axis of samples after the first."
        )
    observed = ~jnp.isnan(wanted)
    if what == "values" and (mask := field(batch, "mask")) is not None:
        observed &= _like(jnp.asarray(mask).astype(bool), wanted)
    if prediction.scored is not None:
        observed &= _like(prediction.scored, wanted)
    weight = row_weight(batch, outputs.shape[0], outputs.dtype)
    observed &= _like(weight > 0, wanted)
    samples = outputs if sampled else outputs[:, None]
    error = jnp.where(observed[:, None], samples, 0)
    error -= jnp.where(observed, wanted, 0).astype(outputs.dtype)[:, None]
    counts = jnp.sum(observed, axis=tuple(range(1, wanted.ndim)), dtype=outputs.dtype)
    return Scored(wanted, observed, error, weight, counts)


def _like(mask: Any, x: Any) -> Any:
    """Trailing axes of length 1 until ``mask`` broadcasts over ``x``; other shapes are an error."""
    if mask.shape != x.shape[: mask.ndim]:
        raise ValueError(f"batch.mask has shape {mask.shape} for values of shape {x.shape}; leading axes must agree.")
    return mask.reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim))
