"""Scores of forecasts that are samples: ``crps``, ``energy_score`` and ``coverage``.

For independent samples X, X' of a forecast and what happened, y, the energy score is E|X - y| - E|X - X'| / 2, and in
one dimension it is the continuous ranked probability score. It is smallest, in the mean, for the law of y itself
(Gneiting and Raftery 2007, JASA 102). From S samples the second term is a sum over pairs,

    fair:       sum_(i != j) |x_i - x_j| / (2 S (S - 1)),        empirical:      sum_ij |x_i - x_j| / (2 S^2),

of which the fair one has the right mean for every S (Ferro 2014, QJRMS 140), and the empirical one is the score of the
samples' own distribution, which rewards forecasts that are too narrow.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._average import absolute, as_float, average, known, weights


def crps(
    samples: Any, y: Any, *, mask: Any = None, weight: Any = None, fair: bool = True, average: bool = False
) -> Float[Array, "..."]:
    """The continuous ranked probability score of each entry: mean |x_i - y| - sum_ij |x_i - x_j| / (2 S (S - 1)).

    The sum over pairs is sum_i (2 i - S - 1) x_(i) / (S (S - 1)) of the sorted samples, so it takes O(S log S) time
    and O(S) memory. It is in the units of y, and smaller is better.

    Arguments:
        samples: shape (S, ...).
        y: shape (...), NaN where missing.
        mask: True where an entry counts; y's shape or its leading axes.
        weight: for the average; y's shape or its leading axes.
        fair: the estimator without bias (the default, as scores of few and of many samples then compare, and a loss
            does not reward narrow forecasts), or with S^2 in place of S (S - 1).
        average: return the weighted mean over what was observed instead.

    Returns:
        y's shape, NaN where missing; or a scalar.

    Raises:
        ValueError: if the shapes disagree, a weight is negative, or ``fair`` is asked of one sample.

    Example:
        >>> import numpy as np, sdeflow as sf
        >>> samples, y = np.array([[0.0, 0.0], [4.0, 4.0]]), np.array([1.0, 6.0])
        >>> sf.metrics.crps(samples, y).tolist(), sf.metrics.crps(samples, y, fair=False).tolist()
        ([0.0, 2.0], [1.0, 3.0])
    """
    samples, y = _pair(samples, y, fair)
    seen = known(y, mask)
    # Around y, so that nothing is lost far from zero.
    x = jnp.where(_weighed(seen, weight, average), samples - y, 0)
    S = len(samples)
    coefficients = (2 * np.arange(1, S + 1) - S - 1) / (float(S) * (S - 1 if fair else S))
    spread = jnp.tensordot(jnp.asarray(coefficients, x.dtype), jnp.sort(x, axis=0), 1, precision="highest")
    return _reduced(absolute(x).mean(axis=0) - spread, seen, weight, average)


def energy_score(
    samples: Any, y: Any, *, mask: Any = None, weight: Any = None, fair: bool = True, average: bool = False
) -> Float[Array, "..."]:
    """The energy score of each vector: mean ||x_i - y|| - sum_ij ||x_i - x_j|| / (2 S (S - 1)).

    Norms run over the last axis, and there over the entries that were observed: the score of the forecast's marginal.
    It takes O(S^2) time and O(S) memory, its gradient too. With one entry it is `crps`.

    Arguments:
        samples: shape (S, ..., d).
        y: shape (..., d), NaN where missing.
        mask: True where an entry counts; y's shape or its leading axes.
        weight: for the average; shape (...) or its leading axes.
        fair: the estimator without bias, or with S^2 in place of S (S - 1); see `crps`.
        average: return the weighted mean over the vectors with an observation instead.

    Returns:
        Shape (...), NaN where nothing was observed; or a scalar.

    Raises:
        ValueError: if the shapes disagree, a weight is negative, or ``fair`` is asked of one sample.

    Example:
        >>> import numpy as np, sdeflow as sf
        >>> samples = np.array([[0.0, 0.0], [3.0, 4.0]])
        >>> [float(sf.metrics.energy_score(samples, np.zeros(2), fair=fair)) for fair in (True, False)]
        [0.0, 1.25]
    """
    samples, y = _pair(samples, y, fair)
    if y.ndim < 1:
        raise ValueError("energy_score needs y of shape (..., d); for a scalar use crps.")
    seen = known(y, mask)
    x = jnp.where(seen & _weighed(seen.any(axis=-1), weight, average)[..., None], samples - y, 0)
    S = len(samples)

    # The pairs at each distance in the list of samples, around its end; the distance S - k holds those of k again.
    @jax.checkpoint
    def step(total: Array, k: Array) -> tuple[Array, None]:
        times = jnp.where(2 * k == S, 1, 2).astype(x.dtype)
        return total + times * _norm(x - jnp.roll(x, k, axis=0)).mean(axis=0), None

    total, _ = jax.lax.scan(step, jnp.zeros(y.shape[:-1], x.dtype), jnp.arange(1, S // 2 + 1))
    score = _norm(x).mean(axis=0) - total / (2 * (S - 1 if fair else S))
    return _reduced(score, seen.any(axis=-1), weight, average)


def coverage(samples: Any, y: Any, level: float = 0.9, *, mask: Any = None, weight: Any = None) -> Float[Array, ""]:
    """The weighted share of entries inside the central band of their samples, bounds included.

    The bounds lie at the places (S + 1) (1 - level) / 2 and (S + 1) (1 + level) / 2 of the sorted samples, between
    which one more draw of the same law falls with probability ``level``, so that a right forecast is not called
    overconfident for having few samples. With S < 2 / (1 - level) - 1 the band is the range of the samples and smaller
    than that: 19 will do for 0.9. Its gradient is 0.

    Arguments:
        samples: shape (S, ...).
        y: shape (...), NaN where missing.
        level: between 0 and 1.
        mask: True where an entry counts; y's shape or its leading axes.
        weight: y's shape or its leading axes.

    Returns:
        A scalar, NaN where nothing was observed.

    Raises:
        ValueError: if the shapes disagree, a weight is negative, or the level is not between 0 and 1.

    Example:
        >>> import jax, numpy as np, sdeflow as sf
        >>> draws = jax.random.normal(jax.random.key(0), (100, 1000))
        >>> round(float(sf.metrics.coverage(draws[1:], draws[0])), 1)
        0.9
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, both excluded, got {level}.")
    samples, y = _pair(samples, y, False)
    seen, ranked, S = known(y, mask), jnp.sort(samples, axis=0), len(samples)

    def at(share: float) -> Array:
        place = min(max((S + 1) * share - 1, 0.0), S - 1.0)
        # Where rounding alone keeps a place from being a whole number, it is one.
        place = round(place) if abs(place - round(place)) < 1e-9 * S else place
        low = int(place)
        return ranked[low] + (place - low) * (ranked[min(low + 1, S - 1)] - ranked[low])

    inside = (at((1 - level) / 2) <= y) & (y <= at((1 + level) / 2))
    return _reduced(inside.astype(samples.dtype), seen, weight, True)


def _pair(samples: Any, y: Any, fair: bool) -> tuple[Array, Array]:
    samples, y = as_float(samples), as_float(y)
    if samples.ndim != y.ndim + 1 or samples.shape[1:] != y.shape or not len(samples):
        wanted = f"(S, {', '.join(map(str, y.shape))})" if y.ndim else "(S,)"
        raise ValueError(f"samples must have shape {wanted} for y of shape {y.shape}, got {samples.shape}.")
    if fair and len(samples) < 2:
        raise ValueError("The fair estimator needs at least 2 samples, got 1: pass more, or fair=False.")
    dtype = jnp.result_type(samples, y)
    return samples.astype(dtype), y.astype(dtype)


def _weighed(seen: Array, weight: Any, averaged: bool) -> Array:
    """Where the samples matter."""
    if weight is None:
        return seen
    if not averaged:
        raise ValueError("weight is for the average: pass average=True.")
    return weights(weight, seen, jnp.result_type(float)) > 0


def _reduced(values: Array, seen: Array, weight: Any, averaged: bool) -> Array:
    return average(values, weights(weight, seen, values.dtype)) if averaged else jnp.where(seen, values, jnp.nan)


def _norm(x: Array) -> Array:
    """The length of vectors along the last axis, with gradient 0 at 0."""
    square = (x**2).sum(axis=-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
