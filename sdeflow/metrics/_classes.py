"""Scores of classifications: ``accuracy`` and ``auroc``."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._compat import is_concrete
from ._average import as_float, average, over, weights


def accuracy(logits: Any, labels: Any, *, mask: Any = None, weight: Any = None) -> Float[Array, ""]:
    """The weighted share of rows whose largest logit is that of their label; the first of equal ones counts.

    Arguments:
        logits: shape (..., K).
        labels: shape (...), integers 0..K-1.
        mask: True where a row counts; the labels' shape or its leading axes.
        weight: the weight of each row; the labels' shape or its leading axes.

    Returns:
        A scalar, NaN where no row counts.

    Raises:
        ValueError: if the shapes disagree, or a weight is negative.
        TypeError: if the labels are not integers.

    Example:
        >>> import numpy as np, sdeflow as sf
        >>> float(sf.metrics.accuracy(np.array([[2.0, 1.0], [0.0, 3.0]]), np.array([0, 0])))
        0.5
    """
    logits, labels = as_float(logits), jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers 0..K-1, got {labels.dtype}.")
    if logits.ndim < 1 or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels must have shape {logits.shape[:-1]} for logits of shape {logits.shape}, got {labels.shape}."
        )
    right = (jnp.argmax(logits, axis=-1) == labels).astype(logits.dtype)
    return average(right, weights(weight, _counted(mask, labels.shape), logits.dtype))


def auroc(scores: Any, labels: Any, *, mask: Any = None, weight: Any = None) -> Float[Array, ""]:
    r"""The area under the ROC curve: the probability that a positive scores above a negative, ties counted by half.

    It is ``sum_ij w_i w_j ([s_i > s_j] + [s_i = s_j] / 2) / sum_ij w_i w_j`` over positives i and negatives j, the
    statistic of Mann and Whitney (1947), exact and in O(n log n). Its gradient in the scores is 0.

    Arguments:
        scores: shape (n,), larger for what is rather positive.
        labels: shape (n,), 0 or 1.
        mask: shape (n,), True where a row counts.
        weight: shape (n,).

    Returns:
        A scalar; NaN where a score that counts is, and in a trace where a class is missing.

    Raises:
        ValueError: if the shapes disagree, a label is neither 0 nor 1, a weight is negative or a class is missing.
        TypeError: if the labels are neither integers nor booleans.

    Example:
        >>> import numpy as np, sdeflow as sf
        >>> float(sf.metrics.auroc(np.array([0.1, 0.4, 0.4, 0.8]), np.array([0, 0, 1, 1])))
        0.875
    """
    scores, labels = as_float(scores), jnp.asarray(labels)
    if not (jnp.issubdtype(labels.dtype, jnp.integer) or labels.dtype == bool):
        raise TypeError(f"labels must be 0 or 1, or booleans, got {labels.dtype}.")
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(f"scores and labels must have one shape, got {scores.shape} and {labels.shape}.")
    counted = _counted(mask, labels.shape)
    if is_concrete(labels, counted) and not np.isin(np.asarray(labels)[np.asarray(counted)], (0, 1)).all():
        raise ValueError("labels must be 0 or 1.")
    w = weights(weight, counted, scores.dtype)
    positive, negative = jnp.where(labels == 1, w, 0), jnp.where(labels == 1, 0, w)
    if is_concrete(w, labels) and not (np.asarray(positive).any() and np.asarray(negative).any()):
        raise ValueError("The area under the ROC curve needs both classes, and here only one has rows that count.")
    s = jnp.where(w > 0, scores, 0)
    order = jnp.argsort(s)
    ranked = s[order]
    # The negatives before each place in the ranking.
    before = jnp.concatenate([jnp.zeros(1, s.dtype), jnp.cumsum(negative[order])])
    below, up_to = (before[jnp.searchsorted(ranked, s, side=side)] for side in ("left", "right"))
    share = average((below + up_to) / 2, positive) / before[-1]
    return jnp.where(jnp.isnan(s).any(), jnp.nan, share)


def _counted(mask: Any, shape: tuple[int, ...]) -> Array:
    if mask is None:
        return jnp.ones(shape, bool)
    return jnp.broadcast_to(over("mask", mask, shape).astype(bool), shape)
