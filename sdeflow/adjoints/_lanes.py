"""A computation for one solve, or for a batch of solves of which some inputs are shared.

Reverse rules are written for one solve. `Lanes` runs their parts for every lane of a batch and differentiates outside
of the batch, so that the cotangent of what the lanes share is one sum from the start.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from ._attach import Flags


class Lanes:
    """One solve, or many.

    Arguments:
        build: makes what a part reads from the list of ``inputs``.
        inputs: all arrays.
        batched: which inputs lead with the batch; None if there is none.
    """

    def __init__(self, build: Callable[[list[Any]], Any], inputs: list[Any], batched: Flags | None):
        self.build, self.inputs, self.batched = build, inputs, batched
        self.many = batched is not None

    def over(self, f: Callable[..., Any], inputs: list[Any], *rest: Any) -> Any:
        """``f(inputs, *rest)`` for one solve, or for every lane of a batch; ``rest`` then leads with the batch."""
        if not self.many:
            return f(inputs, *rest)
        axes = [0 if flag else None for flag in self.batched]  # pyright: ignore
        return jax.vmap(f, in_axes=(axes, *(0 for _ in rest)))(inputs, *rest)

    def replaced(self, inputs: list[Any], numbers: list[int], values: list[Any]) -> list[Any]:
        """The inputs with those of these numbers replaced."""
        new = dict(zip(numbers, values))
        return [new.get(i, x) for i, x in enumerate(inputs)]

    def vjp(
        self, f: Callable[..., Any], numbers: list[int], moving: tuple[Any, ...], fixed: tuple[Any, ...] = ()
    ) -> tuple[Any, Callable[[Any], Any], Any]:
        """Value, pullback and auxiliary value of ``f(build(inputs), *moving, *fixed) -> (value, auxiliary)``.

        The pullback returns cotangents of the inputs of these ``numbers``, then those of all that is ``moving``.
        """

        def lanes(held: list[Any], *moving: Any) -> Any:
            inputs = self.replaced(self.inputs, numbers, held)
            return self.over(lambda inputs, *rest: f(self.build(inputs), *rest), inputs, *moving, *fixed)

        return jax.vjp(lanes, [self.inputs[n] for n in numbers], *moving, has_aux=True)

    @property
    def size(self) -> int:
        """The number of lanes of a batch."""
        return next(x.shape[0] for x, flag in zip(self.inputs, self.batched) if flag)  # pyright: ignore

    def by_time(self, rows: Any, places: Any) -> Any:
        """Rows that lead with time, for a scan, from inputs of these places."""
        if not self.many:
            return rows
        return jtu.tree_map(lambda x, n: jnp.moveaxis(x, 0, 1) if self.batched[n] else x, rows, places)  # pyright: ignore

    def for_all(self, row: Any, places: Any) -> Any:
        """A row of inputs of these places, with the batch leading everywhere."""
        if not self.many:
            return row
        wide = lambda x, n: x if self.batched[n] else jnp.broadcast_to(x, (self.size, *x.shape))  # pyright: ignore
        return jtu.tree_map(wide, row, places)

    def reduced(self, number: int, value: Any) -> Any:
        """A cotangent computed lane by lane, summed if its input is shared."""
        return value.sum(axis=0) if self.many and not self.batched[number] else value  # pyright: ignore

    def spoiled(self, out: dict[int, Any], bad: Any) -> dict[int, Any]:
        """Cotangents, NaN where ``bad`` (a flag for each lane) says that they are no gradient."""
        shared = jnp.any(bad)
        spoil = lambda n, x: where(bad if self.many and self.batched[n] else shared, jnp.full_like(x, jnp.nan), x)  # pyright: ignore
        return {n: spoil(n, x) for n, x in out.items()}


def where(keep: Any, a: Any, b: Any) -> Any:
    """Choose between trees; ``keep`` may lead with the batch, as the leaves then do."""
    wide = lambda x: jnp.reshape(keep, jnp.shape(keep) + (1,) * (x.ndim - jnp.ndim(keep)))
    return jtu.tree_map(lambda a, b: jnp.where(wide(a), a, b), a, b)


def zeros(tree: Any) -> Any:
    """Zeros like a tree."""
    return jtu.tree_map(jnp.zeros_like, tree)


def add(a: Any, b: Any) -> Any:
    """The sum of two trees."""
    return jtu.tree_map(jnp.add, a, b)


def leaves_by_number(places: Any, values: Any) -> list[tuple[int, Any]]:
    """Pairs of an input's number and its value, from two trees alike; Nones are left out."""
    found: list[tuple[int, Any]] = []
    jtu.tree_map(lambda n, x: None if x is None else found.append((n, x)), places, values)
    return found


def dot(a: Any, b: Any) -> Any:
    """The inner product of two trees."""
    return sum(jnp.sum(x * y) for x, y in zip(jtu.tree_leaves(a), jtu.tree_leaves(b)))
