"""``Dense``: the solution between the steps, by the interpolation that belongs to the solver."""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Float, Int, PyTree


class RowInterpolation(eqx.Module):
    """What a solver knows of every step of a walk.

    Attributes:
        left, right: shape (N,), where the steps begin and end.
        count: how many of them were taken, the first ones.
        infos: leaves (N, ...), the dense information.
        kind: makes a local interpolation of the ends and the information of one step.
    """

    left: Float[Array, " N"]
    right: Float[Array, " N"]
    count: Int[Array, ""]
    infos: PyTree[Array]
    kind: Callable[..., diffrax.AbstractLocalInterpolation] = eqx.field(static=True)

    def evaluate(self, t: Float[Array, ""]) -> PyTree[Array]:
        """The state at one time; NaN outside of the span."""
        lefts, rights, infos = jtu.tree_map(jnp.asarray, (self.left, self.right, self.infos))
        last = jnp.maximum(self.count - 1, 0)
        sign = jnp.where(rights[0] < lefts[0], -1, 1)
        inside = (t * sign >= lefts[0] * sign) & (t * sign <= rights[last] * sign)
        i = jnp.minimum(jnp.searchsorted(rights * sign, t * sign, side="left"), last)
        left, right, infos = jtu.tree_map(lambda x: x[i], (lefts, rights, infos))
        return self.kind(t0=left, t1=right, **infos).evaluate(jnp.where(inside, t, jnp.nan))


class Dense(eqx.Module):
    """The solution as a function of time.

    Attributes:
        of: a `RowInterpolation`, or diffrax's interpolation of a whole solve.
        ends: where the solve begins and ends as was asked, and as the steps have it.
        save_fn: what is shown of a state; None for the state itself.
        args: for ``save_fn``.
    """

    of: Any
    ends: tuple[tuple[Any, Any], tuple[Any, Any]]
    save_fn: Any
    args: PyTree

    @property
    def times(self) -> Array:
        """Shape (N,), where the steps end."""
        return self.of.right if isinstance(self.of, RowInterpolation) else self.of.ts[1:] * self.of.direction

    def evaluate(self, t: Any) -> PyTree[Array]:
        """What ``ys`` holds, at a time or at an array of times; NaN outside of what was solved."""
        t = jnp.asarray(t, self.times.dtype)
        values = jax.vmap(self._at)(t.reshape(-1))
        return jtu.tree_map(lambda x: x.reshape(*t.shape, *x.shape[1:]), values)

    def _at(self, t: Array) -> PyTree[Array]:
        # Steps begin and end beside the ends that were asked for, where the field jumps there.
        (begin, end), (first, last) = self.ends
        within = jnp.where(t == begin, first, jnp.where(t == end, last, t))
        y = self.of.evaluate(within)
        return y if self.save_fn is None else self.save_fn(t, y, self.args)
