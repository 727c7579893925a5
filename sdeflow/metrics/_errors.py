"""Errors of point forecasts: ``rmse`` and ``mae``."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from ._average import absolute, as_float, average, known, weights


def rmse(prediction: Any, y: Any, *, mask: Any = None, weight: Any = None) -> Float[Array, ""]:
    r"""The root of the mean squared error, ``sqrt(sum_i w_i (p_i - y_i)^2 / sum_i w_i)`` over what was observed.

    Arguments:
        prediction: shape (...), like ``y``.
        y: shape (...), NaN where missing.
        mask: True where an entry counts; y's shape or its leading axes.
        weight: the weights w; y's shape or its leading axes.

    Returns:
        A scalar, NaN where nothing was observed. Its gradient is 0 where every error is.

    Raises:
        ValueError: if the shapes disagree, or a weight is negative.

    Example:
        >>> import numpy as np, sdeflow as sf
        >>> round(float(sf.metrics.rmse(np.array([1.0, 2.0, 3.0]), np.array([4.0, np.nan, 7.0]))), 4)
        3.5355
    """
    error, w = _error(prediction, y, mask, weight)
    square = average(error**2, w)
    return jnp.where(square == 0, 0, jnp.sqrt(jnp.where(square == 0, 1, square)))


def mae(prediction: Any, y: Any, *, mask: Any = None, weight: Any = None) -> Float[Array, ""]:
    r"""The mean absolute error, ``sum_i w_i |p_i - y_i| / sum_i w_i`` over what was observed.

    Arguments:
        prediction: shape (...), like ``y``.
        y: shape (...), NaN where missing.
        mask: True where an entry counts; y's shape or its leading axes.
        weight: the weights w; y's shape or its leading axes.

    Returns:
        A scalar, NaN where nothing was observed. The gradient of an error that is 0 is 0.

    Raises:
        ValueError: if the shapes disagree, or a weight is negative.

    Example:
        >>> import numpy as np, sdeflow as sf
        >>> float(sf.metrics.mae(np.array([1.0, 2.0, 3.0]), np.array([4.0, np.nan, 7.0])))
        3.5
    """
    error, w = _error(prediction, y, mask, weight)
    return average(absolute(error), w)


def _error(prediction: Any, y: Any, mask: Any, weight: Any) -> tuple[Array, Array]:
    prediction, y = as_float(prediction), as_float(y)
    if prediction.shape != y.shape:
        raise ValueError(f"prediction and y must have one shape, got {prediction.shape} and {y.shape}.")
    seen = known(y, mask)
    w = weights(weight, seen, jnp.result_type(prediction, y))
    return jnp.where(w > 0, prediction, 0) - jnp.where(w > 0, y, 0), w
