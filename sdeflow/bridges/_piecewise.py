r"""``PiecewiseBridge``: consecutive bridges as one law over many days.

With every snapshot prescribed and a reference without memory, the bridge through many populations is made of the
bridges between consecutive ones, each independent of the others given where it starts: the chain rule of the
divergence. Its drift jumps at the snapshots, where forward things belong to the piece that begins and the way back to
the piece that ends.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._compat import is_concrete
from ..equations import ODE, SDE
from ._bridge import Bridge, as_equation, check_times


class PiecewiseBridge(eqx.Module):
    """Bridges of consecutive horizons, as one from the first t0 to the last t1.

    Arguments:
        bridges: each begins when the one before ends.

    Raises:
        TypeError: for anything but bridges.
        ValueError: for none, bridges of different dimensions, or horizons that do not join.

    Example:
        >>> import jax, jax.numpy as jnp, sdeflow as sf
        >>> eye, wiener = jnp.eye(1), sf.equations.BrownianMotion(1)
        >>> join = lambda m0, m1, t: sf.bridges.gaussian_sb(m0, eye, m1, eye, wiener, t0=t, t1=t + 1)
        >>> none, one = jnp.zeros(1), jnp.ones(1)
        >>> bridge = sf.bridges.PiecewiseBridge([join(none, one, 0.0), join(one, -one, 1.0)])
        >>> [round(float(bridge.velocity(t, x)[0]), 4) for t, x in ((0.0, none), (1.0, one))]
        [1.0, -2.0]
    """

    bridges: tuple[Bridge, ...]

    def __init__(self, bridges: Sequence[Bridge]):
        pieces = tuple(bridges)
        if not pieces or not all(isinstance(piece, Bridge) for piece in pieces):
            kinds = sorted({type(piece).__name__ for piece in pieces}) or "none"
            raise TypeError(f"bridges must be a list of at least one Bridge, got {kinds}.")
        sizes = [piece.clock.shift.shape[0] for piece in pieces]
        if len(set(sizes)) > 1:
            raise ValueError(f"the bridges live in different dimensions: {sizes}.")
        for i, (left, right) in enumerate(zip(pieces[:-1], pieces[1:])):
            if is_concrete(left.t1, right.t0) and float(left.t1) != float(right.t0):
                raise ValueError(
                    f"bridge {i} ends at {float(left.t1):g} but bridge {i + 1} begins at {float(right.t0):g}; "
                    "give consecutive ones, in order."
                )
        self.bridges = pieces

    @property
    def t0(self) -> Array:
        """When the first begins."""
        return self.bridges[0].t0

    @property
    def t1(self) -> Array:
        """When the last ends."""
        return self.bridges[-1].t1

    @property
    def times(self) -> Float[Array | np.ndarray, " T"]:
        """Shape (T,), the times of the snapshots; of NumPy where they are known, so that they can plan a grid."""
        times = [*(piece.t0 for piece in self.bridges), self.t1]
        return np.stack([np.asarray(t) for t in times]) if is_concrete(*times) else jnp.stack(times)

    def drift(self, t: Any, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """The drift at one state; at a snapshot that of the piece which begins there."""
        return self._at(t, lambda piece, t: piece.drift(t, x))

    def backward_drift(self, t: Any, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """The drift for decreasing times; at a snapshot that of the piece which ends there."""
        return self._at(t, lambda piece, t: piece.backward_drift(t, x), side="left")

    def velocity(self, t: Any, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """The velocity of the ordinary equation with the same densities; at a snapshot as `drift`."""
        return self._at(t, lambda piece, t: piece.velocity(t, x))

    def score(self, t: Any, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """The gradient of the log density at time t; at a snapshot as `drift`."""
        return self._at(t, lambda piece, t: piece.score(t, x))

    def sample_endpoint(self, x0: Float[Array, " d"], *, key: PRNGKeyArray) -> Float[Array, " d"]:
        """Draw X(t1) given X(t0) = x0, exactly."""
        return self._through(lambda piece, x, key: (piece.sample_endpoint(x, key=key), None), x0, key)[0]

    def sample_path(self, x0: Float[Array, " d"], ts: Float[Array, " n"], *, key: PRNGKeyArray) -> Float[Array, "n d"]:
        """Draw the states at times ``ts`` given X(t0) = x0, exactly, piece after piece.

        Arguments:
            x0: one state.
            ts: not decreasing, between t0 and t1.
            key: a random key.

        Raises:
            ValueError: for times that decrease or lie outside of the horizon.
        """
        ts = jnp.asarray(ts, self.t1.dtype)
        check_times(ts, self.t0, self.t1)

        def part(piece: Bridge, x: Array, key: PRNGKeyArray) -> tuple[Array, Array]:
            # Times of other pieces are drawn at the ends of this one, and then not taken.
            own = jnp.append(jnp.clip(ts, piece.t0, piece.t1), piece.t1)
            path = piece.sample_path(x, own, key=key)
            return path[-1], path[:-1]

        _, paths = self._through(part, x0, key)
        return paths[jnp.searchsorted(jnp.asarray(self.times[1:-1]), ts, side="left"), jnp.arange(len(ts))]

    def equation(self, direction: Literal["forward", "backward", "flow"] = "forward") -> SDE | ODE:
        """The bridges for `sdeflow.solve`, as of one bridge.

        The drift jumps at the snapshots within, and steps should not go across: plan them with
        ``grid=sf.grids.through(ts, dt0, jumps=bridge.times[1:-1])``.

        Arguments:
            direction: "forward"; "backward", for times from t1 down to t0; "flow", for either direction.
        """
        side = "left" if direction == "backward" else "right"
        return as_equation(
            self, direction, lambda t, y, args: self._at(t, lambda p, t: p.reference.diffusion(t, y, args), side=side)
        )

    def _at(self, t: Any, value: Callable[[Bridge, Array], Any], side: Literal["left", "right"] = "right") -> Any:
        """The value of the piece that t is in, at t within its horizon."""
        t = jnp.asarray(t, self.t1.dtype)
        i = jnp.searchsorted(jnp.asarray(self.times[1:-1]), t, side=side)
        # Every piece at a time of its own: under vmap all branches are computed, and none may be infinite.
        inside = lambda piece: value(piece, jnp.clip(t, piece.t0, piece.t1))
        if (alike := self._alike()) is None:
            return jax.lax.switch(i, [lambda piece=piece: inside(piece) for piece in self.bridges])
        arrays, rest = alike
        return inside(eqx.combine(jax.tree.map(lambda a: a[i], arrays), rest))

    def _through(
        self, step: Callable[[Bridge, Array, PRNGKeyArray], tuple[Array, Any]], x: Any, key: PRNGKeyArray
    ) -> tuple[Array, Any]:
        """The state after all pieces, and what each step gives beside it, stacked."""
        x = jnp.asarray(x)
        x, keys = x.astype(jnp.result_type(x, self.t1.dtype)), jr.split(key, len(self.bridges))
        if (alike := self._alike()) is None:
            given = []
            for piece, own in zip(self.bridges, keys):
                x, extra = step(piece, x, own)
                given.append(extra)
            return x, jax.tree.map(lambda *parts: jnp.stack(parts), *given)
        arrays, rest = alike
        return jax.lax.scan(lambda x, row: step(eqx.combine(row[0], rest), x, row[1]), x, (arrays, keys))

    def _alike(self) -> tuple[Any, Any] | None:
        """The arrays of all pieces, stacked, and what they share; None where their shapes or kinds differ.

        One piece with other numbers is compiled once, whatever the number of days.
        """
        bare = [eqx.tree_at(lambda b: (b.history, b.result), p, ({}, None), is_leaf=_is_none) for p in self.bridges]
        arrays, rest = zip(*(eqx.partition(piece, eqx.is_array) for piece in bare))
        kinds = [[(a.shape, a.dtype) for a in jax.tree.leaves(part)] for part in arrays]
        if not (eqx.tree_equal(*rest) is True and all(kind == kinds[0] for kind in kinds)):
            return None
        return jax.tree.map(lambda *parts: jnp.stack(parts), *arrays), rest[0]

    def __repr__(self) -> str:
        shown = [f"{t:g}" for t in np.asarray(self.times)] if is_concrete(self.times) else ["..."]
        d = self.bridges[0].clock.shift.shape[0]
        return f"PiecewiseBridge({d} dimensions, {len(self.bridges)} bridges, snapshots at {', '.join(shown)})"


def _is_none(x: Any) -> bool:
    return x is None
