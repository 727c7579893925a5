"""Other coordinates, in which an equation is better solved than in its own."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
from jaxtyping import Array, PyTree


class Chart(eqx.Module):
    """What ``solve`` walks in the place of an equation; what it saves is the equation's own state.

    Arguments:
        equation: an `AbstractEquation` for the other coordinates.
        start: their start, or a module that makes it of ``(ts, args, key)``.
        read: ``read(x)``, the state that they stand for. If it has a method ``notes(x)``, the dict that this returns
            for the last x joins ``sol.stats``; with a method ``final(x)``, that is ``sol.final``.
    """

    equation: Any
    start: Any
    read: Callable[[PyTree], PyTree]

    def begin(self, ts: Any, args: Any, key: Any) -> PyTree[Array]:
        """The start of a solve with these times, arguments and key."""
        return self.start(ts, args, key) if callable(self.start) else self.start

    def final(self, x: PyTree) -> PyTree:
        """What to return of the last x."""
        return getattr(self.read, "final", self.read)(x)

    def notes(self, x: PyTree) -> dict[str, Array]:
        """What to say of the last x."""
        notes = getattr(self.read, "notes", None)
        return {} if notes is None else notes(x)


class Reading(eqx.Module):
    """``fn(t, y, args, ...)`` for the other coordinates; without a function the state itself."""

    read: Callable[[PyTree], PyTree]
    fn: Callable | None

    def __call__(self, t: Any, x: PyTree, args: Any, *more: Any, **options: Any) -> Any:
        y = self.read(x)
        return y if self.fn is None else self.fn(t, y, args, *more, **options)
