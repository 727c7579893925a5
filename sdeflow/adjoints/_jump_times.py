"""The times of declared jumps as inputs of the steps beside them.

An adaptive solve whose controller knows jumps ends one step just before such a time tau and begins the next just after
it. All other step ends are constants, but these two move with tau, which is how the solution depends on it:

    dL/dtau = dL/d(end of the step before) + dL/d(start of the step after).

For y' = f before and y' = g after it this is a . (f - g), a = dL/dy at tau, to the accuracy of the steps.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from ._freeze import freeze


def _declared(controller: Any) -> list[Array]:
    """The times of jumps that a controller and those within it know."""
    if not isinstance(controller, diffrax.AbstractStepSizeController):
        return []
    own = getattr(controller, "jump_ts", None)
    found = [] if own is None or own.size == 0 else [own]
    return found + _declared(getattr(controller, "controller", None))


def moved_by_jumps(controller: Any, t0: Array, t1: Array) -> Callable[[Array], Array] | None:
    """A function that gives the ends of steps their derivatives in the times of jumps; None if there are no jumps.

    Arguments:
        controller: as diffrax's loop has it, so that times increase.
        t0, t1: the ends of the solve, which no jump moves.
    """
    declared = _declared(controller)
    if not declared:
        return None
    jumps = jnp.concatenate([x.astype(t0.dtype) for x in declared])
    at, low, high = freeze((jumps, t0, t1))
    eps, tiny = jnp.finfo(t0.dtype).eps, jnp.finfo(t0.dtype).tiny

    def moved(t: Array) -> Array:
        i = jnp.argmin(jnp.abs(at - t))
        beside = jnp.abs(at[i] - t) <= 4 * (eps * jnp.abs(at[i]) + tiny)
        return t + jnp.where(beside & (t > low) & (t < high), jumps[i] - at[i], 0)

    return moved


class Moved(eqx.Module):
    """Makes the interpolation of a step whose dense information says where the step begins and ends."""

    inner: Any = eqx.field(static=True)

    def __call__(self, *, t0: Any, t1: Any, ends: tuple[Array, Array], info: Any) -> Any:
        del t0, t1
        return self.inner(t0=ends[0], t1=ends[1], **info)
