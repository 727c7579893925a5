"""Noise that travels with the rows of a walk.

A walk takes the Brownian paths out of its terms, draws what it needs for all of its rows, and hands each step a
``RowPath``: a path that answers for exactly one step. There is no search and no callback in the loop, and large times
lose nothing. A solver that asks for parts of its step (``diffrax.HalfSolver``) keeps the path itself.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from ._grid_brownian import GridBrownian, nan_like
from ._increments import backwards
from ._tree import quiet


def _is_brownian(x: Any) -> bool:
    return isinstance(x, diffrax.AbstractBrownianPath)


class RowPath(diffrax.AbstractBrownianPath):
    """The Brownian path of one step: it answers for exactly ``(left, right)``, either way, and NaN for any other query.

    A solver that asks for half a step (``diffrax.HalfSolver``) would otherwise be given the whole increment and twice
    the variance, silently.
    """

    left: Array
    right: Array
    increment: Any
    levy_area: type = eqx.field(static=True)

    @property
    def t0(self) -> Any:
        """Where the step begins."""
        return self.left

    @property
    def t1(self) -> Any:
        """Where the step ends."""
        return self.right

    def evaluate(self, t0: Any, t1: Any = None, left: bool = True, use_levy: bool = False) -> Any:
        """The increment of this step; with its sign changed if it is taken from its end to its start."""
        del left
        if t1 is None:
            return nan_like(self.increment.W)
        there, back = self.increment, backwards(self.increment)
        if not use_levy:
            there, back = there.W, back.W
        # The usual cases, settled while tracing: nothing is left of them in the compiled step.
        if t0 is self.left and t1 is self.right:
            return there
        if t0 is self.right and t1 is self.left:
            return back
        exact, reverse = (t0 == self.left) & (t1 == self.right), (t0 == self.right) & (t1 == self.left)
        return jtu.tree_map(lambda x, y: jnp.where(exact, x, jnp.where(reverse, y, jnp.nan)), there, back)


class BothWays(diffrax.AbstractBrownianPath):
    """A path that may know increasing queries only, asked in either direction."""

    path: Any

    @property
    def levy_area(self) -> Any:
        """That of the path."""
        return self.path.levy_area

    @property
    def t0(self) -> Any:
        """Where the path begins."""
        return self.path.t0

    @property
    def t1(self) -> Any:
        """Where the path ends."""
        return self.path.t1

    def evaluate(self, t0: Any, t1: Any = None, left: bool = True, use_levy: bool = False) -> Any:
        """The increment from ``t0`` to ``t1``, which may come first."""
        if t1 is None:
            return quiet(self.path).evaluate(t0, left=left, use_levy=use_levy)
        row = quiet(self.path).evaluate(jnp.minimum(t0, t1), jnp.maximum(t0, t1), left=left, use_levy=True)
        row = jtu.tree_map(lambda x, y: jnp.where(t0 <= t1, x, y), row, backwards(row))
        return row if use_levy else row.W


def both_ways(terms: Any) -> Any:
    """The terms, with Brownian paths that may be asked in either direction."""
    one = lambda x: BothWays(x) if _is_brownian(x) and not isinstance(x, RowPath | BothWays) else x  # pyright: ignore
    return jtu.tree_map(one, terms, is_leaf=_is_brownian)


class Still(diffrax.AbstractBrownianPath):
    """A path without derivatives in the times that it is asked for."""

    path: Any

    @property
    def levy_area(self) -> Any:
        """That of the path."""
        return self.path.levy_area

    @property
    def t0(self) -> Any:
        """Where the path begins."""
        return self.path.t0

    @property
    def t1(self) -> Any:
        """Where the path ends."""
        return self.path.t1

    def evaluate(self, t0: Any, t1: Any = None, left: bool = True, use_levy: bool = False) -> Any:
        """The increment of the path from ``t0`` to ``t1``."""
        t0, t1 = (None if t is None else jax.lax.stop_gradient(t) for t in (t0, t1))
        return quiet(self.path).evaluate(t0, t1, left=left, use_levy=use_levy)


def still(terms: Any) -> Any:
    """The terms, with Brownian paths that have no derivatives in time."""
    one = lambda x: Still(x) if _is_brownian(x) else x  # pyright: ignore[reportCallIssue]
    return jtu.tree_map(one, terms, is_leaf=_is_brownian)


class RowNoise(eqx.Module):
    """All Brownian paths of some terms, in order, as a source of rows.

    Arguments:
        paths: the paths.
        within: whether steps ask for parts of themselves, and so need the paths rather than rows of them.
    """

    paths: tuple[Any, ...]
    within: bool = eqx.field(static=True)

    @staticmethod
    def of(terms: Any, within: bool = False) -> "RowNoise":
        """Collect the Brownian paths that occur in ``terms``."""
        leaves = jtu.tree_leaves(terms, is_leaf=_is_brownian)
        return RowNoise(tuple(x for x in leaves if _is_brownian(x)), within)

    def draw(self, index: Array, left: Array, right: Array, own_grid: bool) -> tuple[Any, ...]:
        """What the rows carry: arrays that lead with the rows, one entry a path.

        Arguments:
            index: (N,) the rows' numbers.
            left, right: (N,) the rows' ends.
            own_grid: the rows are those of the paths' own grids, so nothing needs to be compared.
        """
        if self.within:
            return ()

        def one(path: Any) -> Any:
            if not (own_grid and isinstance(path, GridBrownian)):
                return jax.vmap(lambda a, b: BothWays(path).evaluate(a, b, use_levy=True))(left, right)  # pyright: ignore
            if path.table is None:
                return index
            return jtu.tree_map(lambda x: x[: index.shape[0]], path.table)

        return tuple(one(path) for path in self.paths)

    def increments(self, drawn: tuple[Any, ...], left: Array, right: Array, own_grid: bool) -> tuple[Any, ...]:
        """One row's increments, one entry a path: what the row carries, or is drawn here from its number."""
        by_number = lambda path: own_grid and isinstance(path, GridBrownian) and path.table is None
        return tuple(p.row(x, right - left) if by_number(p) else x for p, x in zip(self.paths, drawn))

    def install(self, terms: Any, increments: tuple[Any, ...], left: Array, right: Array) -> Any:
        """Put one row's noise into ``terms`` in place of the paths."""
        if not self.paths:
            return terms
        if self.within:
            return both_ways(terms)
        rows = iter(zip(self.paths, increments))

        def one(x: Any) -> Any:
            if not _is_brownian(x):
                return x
            path, row = next(rows)
            return RowPath(left=left, right=right, increment=row, levy_area=path.levy_area)  # pyright: ignore[reportCallIssue]

        return jtu.tree_map(one, terms, is_leaf=_is_brownian)
