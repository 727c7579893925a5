"""Observations held until the next one.

    X(t) = the last value observed up to and including t, channel by channel

The path is right-continuous and causal: what is observed after t does not change it up to t.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._compat import is_concrete
from ._controls import AbstractControl, Extrapolate, finish, latest, observed, read_observations, rows_up_to


class RectilinearControl(AbstractControl):
    """A path of steps through observations; built by `rectilinear_control`.

    Arguments:
        before: shape (C,), the value of each channel before it was observed.
    """

    before: Float[Array, " C"]

    def evaluate(self, t0: Any, t1: Any = None, left: bool = False) -> Float[Array, " C"]:
        """X(t0), or the increment X(t1) - X(t0) if ``t1`` is given.

        Arguments:
            t0: a scalar time.
            t1: a scalar time, or None.
            left: whether to give the limits from the left, which at an observation do not see it yet. Other paths
                have it True by default, which makes a difference here alone.

        Raises:
            ValueError: for a time that is not a scalar, or a concrete one outside the times of a concrete
                path with ``extrapolate="error"``; inside a trace such a time gives NaN.
        """
        return super().evaluate(t0, t1, left)

    def derivative(self, t: Any, left: bool = True) -> Float[Array, " C"]:
        """A path of steps has none: it is 0 between jumps and does not exist at them.

        Raises:
            ValueError: always, since an equation driven by dX would stand still without a word.
        """
        raise ValueError(
            "A RectilinearControl moves in jumps alone, so its derivative says nothing: read its values, or use "
            "linear_control or hermite_control where an equation is driven by dX."
        )

    def _value(self, t, left):
        held = _value(self.times, self.knots, self.last, t, side="left" if left else "right")
        if self.extrapolate == "error":
            return held
        return jnp.where(t <= self.t0 if left else t < self.t0, self.before, held)

    def _slope(self, t, left):
        raise NotImplementedError


def rectilinear_control(
    times: Float[Array | np.ndarray, " L"],
    values: Float[Array | np.ndarray, "L C"],
    *,
    before: Any = 0.0,
    extrapolate: Extrapolate = "error",
) -> RectilinearControl:
    """The path of steps through observations, NaN meaning missing: each value is held until the next.

    It is causal everywhere, between observations too: X(t) depends on what was observed up to t alone. Choose it for
    predictions that are made while the data arrive. Before its first observation a channel has the value ``before``,
    since its first value is not known yet; that is 0, the mean of standardised data, unless you say otherwise. Rows
    that repeat the last time are padding, whatever their values, and change no result in a single bit.

    Steps of a solver should end at the times of the observations, as those of `sdeflow.solve` do when ``ts`` are
    these times: Euler then reads each value from its own time on. Solvers that read the path at the end of a step
    already see the observation there, and have the order 1 across jumps; on
    ``sdeflow.grids.through(..., jumps=times[1:-1])`` they stop just short.

    ``diffrax.rectilinear_interpolation`` gives the same path along a parameter of its own, of 2 L - 1 knots, that
    advances time and values in turn, with time as one more channel; it is made for equations driven by dX. Here time
    itself is the parameter, because our equations are given t: X(t) is what that path has when its time is t and its
    values have been updated. The one thing that it has and this has not is a derivative.

    Arguments:
        times: shape (L,), strictly increasing except for repeats of the last time.
        values: shape (L, C), NaN where missing. Integers are read as floats.
        before: a number, or shape (C,), the value of a channel before its first observation.
        extrapolate: "error" refuses times outside the data (see below), "flat" gives ``before`` before the first
            time, and holds the last values after the last.

    Returns:
        A ``diffrax.AbstractPath`` with ``.evaluate``, ``.at``, ``.knots``, ``.t0`` and ``.t1``; at an observation
        it has the new value, and ``.evaluate(t, left=True)`` the one before. ``.derivative`` is an error.

    Raises:
        ValueError: for shapes that disagree, no rows, an unknown ``extrapolate``, and, if the arrays are
            concrete, times that are not finite or not increasing in their precision, infinite values, or a
            ``before`` that is not finite. Inside a trace, times that fall give a path of NaN, and so does with
            ``extrapolate="error"`` a query outside the data by more than 8 units in the last place.

    Example:
        >>> import jax.numpy as jnp
        >>> from sdeflow.paths import rectilinear_control
        >>> path = rectilinear_control(jnp.array([0.0, 1.0, 3.0]), jnp.array([[jnp.nan], [2.0], [6.0]]))
        >>> [path.evaluate(t).tolist() for t in (0.5, 1.0, 2.9, 3.0)], path.evaluate(3.0, left=True).tolist()
        ([[0.0], [2.0], [2.0], [6.0]], [2.0])
    """
    times, values = read_observations(times, values, extrapolate)
    channels = values.shape[1]
    if jnp.shape(before) not in ((), (channels,)):
        raise ValueError(f"before must be a number or of shape ({channels},), got shape {jnp.shape(before)}.")
    if is_concrete(before) and not np.isfinite(before).all():
        raise ValueError(f"before must be finite, got {before}.")
    before = jnp.broadcast_to(jnp.asarray(before, values.dtype), (channels,))
    knots, last, before = _fill_forward(times, values, before)
    return RectilinearControl(times, knots, last, extrapolate, before)


@jax.jit
def _fill_forward(times, values, before):
    """Every gap filled with the last observed value of the channel, or with ``before``."""
    seen = observed(times, values)
    row = latest(seen)
    held = jnp.where(seen, values, 0)[jnp.maximum(row, 0), jnp.arange(values.shape[1])]
    knots, last = finish(times, jnp.where(row >= 0, held, before))
    # Times that fall are reported by NaN before them, too.
    return knots, last, jnp.where(jnp.isnan(knots).any(), jnp.nan, before)


@functools.partial(jax.jit, static_argnames="side")
def _value(times, knots, last, t, side):
    return knots[jnp.clip(rows_up_to(times, t, side) - 1, 0, last)]
