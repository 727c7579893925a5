"""Observations joined by straight lines.

    X(t) = x_i + (t - t_i) / (t_{i+1} - t_i) (x_{i+1} - x_i),    t_i <= t <= t_{i+1}

A missing value is interpolated in time between the observed neighbours of its own channel.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._controls import AbstractControl, Extrapolate, fill_between, fraction, piece, read_observations


class LinearControl(AbstractControl):
    """A piecewise linear path through observations; built by `linear_control`."""

    def _value(self, t, left):
        return _value(self.times, self.knots, self.last, t)

    def _slope(self, t, left):
        return _slope(self.times, self.knots, self.last, t, side="left" if left else "right")


def linear_control(
    times: Float[Array | np.ndarray, " L"],
    values: Float[Array | np.ndarray, "L C"],
    *,
    extrapolate: Extrapolate = "error",
) -> LinearControl:
    """The straight-line path through observations, NaN meaning missing.

    A gap is filled by interpolation between the observed neighbours in the same channel; before the first and
    after the last observation of a channel it holds that value; a channel without any observation is 0. Rows
    that repeat the last time are padding, whatever their values, and change no result in a single bit.

    Arguments:
        times: shape (L,), strictly increasing except for repeats of the last time.
        values: shape (L, C), NaN where missing. Integers are read as floats.
        extrapolate: "error" refuses times outside the data (see below), "flat" holds the first and last
            values.

    Returns:
        A ``diffrax.AbstractPath`` with ``.evaluate``, ``.derivative``, ``.at``, ``.knots``, ``.t0`` and
        ``.t1``. Between two knots it looks ahead to the later one; at the knots themselves it is causal
        wherever nothing is missing.

    Raises:
        ValueError: for shapes that disagree, no rows, an unknown ``extrapolate``, and, if the arrays are
            concrete, times that are not finite or not increasing in their precision, or infinite values.
            Inside a trace, times that fall give a path of NaN, and so does with ``extrapolate="error"`` a
            query outside the data by more than 8 units in the last place.

    Example:
        >>> import jax.numpy as jnp
        >>> from sdeflow.paths import linear_control
        >>> path = linear_control(jnp.array([0.0, 1.0, 3.0]), jnp.array([[0.0], [jnp.nan], [6.0]]))
        >>> path.evaluate(1.0).tolist(), path.evaluate(1.0, 2.5).tolist(), path.derivative(0.5).tolist()
        ([2.0], [3.0], [2.0])
    """
    times, values = read_observations(times, values, extrapolate)
    knots, last = fill_between(times, values)
    return LinearControl(times, knots, last, extrapolate)


@jax.jit
def _value(times, knots, last, t):
    ends, (left_knot, right_knot) = _segment(times, knots, last, t, side="right")
    weight = fraction(times, t, ends, knots.dtype)
    step = right_knot - left_knot
    # Measured from the nearer knot, so that both knots are met to the last bit.
    return jnp.where(weight < 0.5, left_knot + weight * step, right_knot - (1 - weight) * step)


@functools.partial(jax.jit, static_argnames="side")
def _slope(times, knots, last, t, side):
    (left_time, right_time), (left_knot, right_knot) = _segment(times, knots, last, t, side)
    gap = (right_time - left_time).astype(knots.dtype)
    return jnp.where(gap > 0, (right_knot - left_knot) / jnp.where(gap > 0, gap, 1), 0)


def _segment(times, knots, last, t, side):
    """Times (2,) and values (2, C) of the two knots around ``t``, never of the padding."""
    i = piece(times, last, t, side)
    # One gather for the pair: in reverse mode XLA may merge two, in an order that depends on the padding.
    pair = jnp.stack([i, jnp.minimum(i + 1, last)])
    return times[pair], knots[pair]
