"""Observations joined by cubics whose slope at each knot is that of the straight line before it.

Piece i, of width h_i, with s_i = (x_{i+1} - x_i) / h_i and s_{-1} = s_0:

    X(t_i + u) = x_i + s_{i-1} u + 2 (s_i - s_{i-1}) / h_i u^2 + (s_{i-1} - s_i) / h_i^2 u^3

These are Hermite cubics with backward differences (Morrill, Kidger, Yang and Lyons, "Neural controlled differential
equations for online prediction tasks", arXiv 2106.11028). With w = u / h_i, D = x_{i+1} - x_i and B = h_i s_{i-1},
which is how they are computed here,

    X = x_i + w (B + (D - B) w (2 - w)) = x_{i+1} - (1 - w) (B + (D - B) (1 + w - w^2))
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ._controls import AbstractControl, Extrapolate, fill_between, fraction, piece, read_observations


class HermiteControl(AbstractControl):
    """A smooth path through observations; built by `hermite_control`."""

    def _value(self, t, left):
        return _value(self.times, self.knots, self.last, t)

    def _slope(self, t, left):
        # The slope is continuous, so both sides agree.
        return _slope(self.times, self.knots, self.last, t)


def hermite_control(
    times: Float[Array | np.ndarray, " L"],
    values: Float[Array | np.ndarray, "L C"],
    *,
    extrapolate: Extrapolate = "error",
) -> HermiteControl:
    r"""The path of cubics with backward differences through observations, NaN meaning missing.

    It is continuously differentiable, so adaptive solvers and solvers of high order keep their step and their order
    at the knots, where those of straight lines have kinks. At a knot the slope is that of the straight line which
    ends there, so what is after a knot does not bend the path before it. The price is overshooting: a jump within a
    short gap is carried on, by a height that grows with the ratio of the gap after it to its own.

    Gaps are filled first, as in `linear_control` and in torchcde: by straight lines between the observed neighbours
    in the same channel, holding the first and the last value, 0 for a channel without any observation. The cubics
    go through what was filled in, so after the last observation of a channel the path swings back within one step
    and then holds. ``diffrax.backward_hermite_coefficients`` draws one cubic over a gap instead, so that the two
    agree wherever nothing is missing. Rows that repeat the last time are padding, whatever their values, and change
    no result in a single bit.

    Arguments:
        times: shape (L,), strictly increasing except for repeats of the last time.
        values: shape (L, C), NaN where missing. Integers are read as floats.
        extrapolate: "error" refuses times outside the data (see below), "flat" holds the first and last
            values.

    Returns:
        A ``diffrax.AbstractPath`` with ``.evaluate``, ``.derivative``, ``.at``, ``.knots``, ``.t0`` and
        ``.t1``. Between two knots it looks ahead to the later one; at the knots themselves its value and its slope
        are causal wherever nothing is missing, except for the slope at the first.

    Raises:
        ValueError: for shapes that disagree, no rows, an unknown ``extrapolate``, and, if the arrays are
            concrete, times that are not finite or not increasing in their precision, or infinite values.
            Inside a trace, times that fall give a path of NaN, and so does with ``extrapolate="error"`` a
            query outside the data by more than 8 units in the last place.

    Example:
        >>> import jax.numpy as jnp
        >>> from sdeflow.paths import hermite_control
        >>> path = hermite_control(jnp.array([0.0, 1.0, 3.0]), jnp.array([[0.0], [2.0], [2.0]]))
        >>> path.evaluate(1.0).tolist(), path.evaluate(2.0).tolist(), path.derivative(1.0).tolist()
        ([2.0], [2.5], [2.0])
    """
    times, values = read_observations(times, values, extrapolate)
    knots, last = fill_between(times, values)
    return HermiteControl(times, knots, last, extrapolate)


@jax.jit
def _value(times, knots, last, t):
    _, weight, knot, step, carried = _cubic(times, knots, last, t)
    bend = step - carried
    # Measured from the nearer knot, so that both knots are met to the last bit.
    from_left = knot[0] + weight * (carried + bend * weight * (2 - weight))
    from_right = knot[1] - (1 - weight) * (carried + bend * (1 + weight * (1 - weight)))
    return jnp.where(weight < 0.5, from_left, from_right)


@jax.jit
def _slope(times, knots, last, t):
    gap, weight, _, step, carried = _cubic(times, knots, last, t)
    rise = carried + (step - carried) * weight * (4 - 3 * weight)
    return jnp.where(gap > 0, rise / jnp.where(gap > 0, gap, 1), 0)


def _cubic(times, knots, last, t):
    """Of the piece around ``t``: its width h, the fraction w, its two knots (2, C), D and B."""
    i = piece(times, last, t, side="right")
    # One gather for all three: in reverse mode XLA may merge several, in an order that depends on the padding.
    rows = jnp.stack([jnp.maximum(i - 1, 0), i, jnp.minimum(i + 1, last)])
    time, knot = times[rows], knots[rows]
    weight = fraction(times, t, time[1:], knots.dtype)
    gap, gap_before = time[2] - time[1], time[1] - time[0]
    ratio = (gap / jnp.where(gap_before > 0, gap_before, 1)).astype(knots.dtype)
    step = knot[2] - knot[1]
    carried = jnp.where(gap_before > 0, ratio * (knot[1] - knot[0]), step)
    return gap.astype(knots.dtype), weight, knot[1:], step, carried
