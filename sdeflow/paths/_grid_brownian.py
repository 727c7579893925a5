"""Brownian motion on a grid: row ``i`` is a function of ``(key, i)`` alone.

On a step of length h the increment and the Lévy areas of Foster, Oberhauser and Lyons are independent normals,

    W ~ N(0, h),    H ~ N(0, h/12),    K ~ N(0, h/720).

A table draws all rows at once, which is the cheapest way there is; a counter draws each row when it is asked for and
needs no memory. Neither depends on how long the padding is.

Merging steps (`GridBrownian.coarsen`) uses the definitions of H and K as integrals over a step from s to t,

    int W_{s,r} dr = h (H + W/2),    int W_{s,r} ((s+t)/2 - r) dr = h^2 (K - W/12),

which add up over sub-steps.
"""

import functools as ft
from collections.abc import Sequence
from typing import Any, Literal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from ..grids import Grid
from ._increments import backwards
from ._threefry import written_out
from ._tree import tree_table

LEVY_AREAS = (diffrax.BrownianIncrement, diffrax.SpaceTimeLevyArea, diffrax.SpaceTimeTimeLevyArea)
_FIELDS = ("W", "H", "K")
_VARIANCE = {"W": 1.0, "H": 1 / 12, "K": 1 / 720}


def safe_sqrt(h: Array) -> Array:
    """The square root of ``|h|`` with a zero derivative at zero, where the plain one has NaN."""
    positive = h != 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, jnp.abs(h), 1.0)), 0.0)


def fields_of(levy_area: type) -> tuple[str, ...]:
    """The random fields that an increment of this type carries."""
    return _FIELDS[: 1 + LEVY_AREAS.index(levy_area)]


def as_structure(structure: Any) -> PyTree[jax.ShapeDtypeStruct]:
    """A tree of shapes and dtypes from arrays, from such a tree, or from one shape tuple."""
    if isinstance(structure, tuple) and all(isinstance(n, int | np.integer) for n in structure):
        return jax.ShapeDtypeStruct(structure, jax.dtypes.canonicalize_dtype(np.float64))

    def one(x: Any) -> jax.ShapeDtypeStruct:
        dtype = jnp.result_type(x)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"Brownian motion needs a real floating structure, got dtype {dtype}.")
        return jax.ShapeDtypeStruct(jnp.shape(x), dtype)

    return jtu.tree_map(one, structure)


def normals(key: PRNGKeyArray, structure: Any, levy_area: type, lead: tuple[int, ...] = ()) -> dict[str, Any]:
    """Standard normals for every field and leaf; time leads, so that a longer draw only appends rows."""
    leaves, treedef = jtu.tree_flatten(structure)
    key = written_out(key)

    def draw(field: int) -> Any:
        # The key of W does not depend on whether H and K are drawn too.
        keys = [jr.fold_in(key, 3 * i + field) for i in range(len(leaves))]
        return treedef.unflatten([jr.normal(k, (*lead, *x.shape), x.dtype) for k, x in zip(keys, leaves)])

    return {name: draw(i) for i, name in enumerate(fields_of(levy_area))}


def increment(h: Array, draws: dict[str, Any], levy_area: type) -> Any:
    """Scale standard normals to a (batch of) Brownian increment of length ``h``."""

    def scaled(name: str) -> Any:
        def leaf(z: Array) -> Array:
            std = safe_sqrt(h).astype(z.dtype) * np.asarray(np.sqrt(_VARIANCE[name]), z.dtype)
            return z * std.reshape(std.shape + (1,) * (z.ndim - std.ndim))

        return jtu.tree_map(leaf, draws[name])

    values = {name: scaled(name) for name in draws}
    return levy_area(dt=jtu.tree_map(lambda z: h.astype(z.dtype), values["W"]), **values)


class GridBrownian(diffrax.AbstractBrownianPath):
    """Brownian motion known on the steps of a grid, differentiable and deterministic in its key.

    In `sdeflow.solve` each step is handed its own row, at no cost. Given to a plain ``diffrax.diffeqsolve`` as the
    control of a term, it finds the row of a query by search and answers if both ends lie within a quarter of a step of
    the row's; any other query gets NaN, which solves report as a failure (a silent answer would have the wrong
    variance).

    Arguments:
        grid: the grid; N rows.
        structure: what one increment looks like: an array or tree of arrays, or a shape tuple.
        key: a JAX random key.
        levy_area: ``diffrax.BrownianIncrement`` (the default), ``SpaceTimeLevyArea`` (adds H) or
            ``SpaceTimeTimeLevyArea`` (adds H and K). W does not depend on the choice.
        storage: "table" draws all rows at once, (N, *shape); "counter" draws a row when it is asked for, O(1) memory;
            "tree" gives the path that ``diffrax.VirtualBrownianTree`` with this key has over the grid's interval, at a
            small part of its cost (least on 2^L equal steps).

    Raises:
        ValueError: for another storage or Lévy area, or a structure that is not real floating.

    Example:
        >>> import jax, sdeflow as sf
        >>> grid = sf.grids.through([0.0, 1.0], dt0=0.25)
        >>> path = sf.paths.GridBrownian(grid, (3,), key=jax.random.key(0))
        >>> path.evaluate(0.25, 0.5).shape
        (3,)
    """

    grid: Grid
    structure: PyTree[jax.ShapeDtypeStruct] = eqx.field(static=True)
    levy_area: type = eqx.field(static=True)
    key: Any
    table: Any
    _drawn: str = eqx.field(static=True)

    def __init__(
        self,
        grid: Grid,
        structure: PyTree | tuple[int, ...],
        *,
        key: PRNGKeyArray,
        levy_area: type | None = None,
        storage: Literal["table", "counter", "tree"] = "table",
    ):
        levy_area = diffrax.BrownianIncrement if levy_area is None else levy_area
        if levy_area not in LEVY_AREAS:
            names = ", ".join(f"diffrax.{c.__name__}" for c in LEVY_AREAS)
            raise ValueError(f"levy_area must be one of {names}, got {levy_area!r}.")
        if storage not in ("table", "counter", "tree"):
            raise ValueError(f'storage must be "table", "counter" or "tree", got {storage!r}.')
        self.grid, self.structure = grid, as_structure(structure)
        self.levy_area, self._drawn = levy_area, storage
        if storage == "tree":
            self.table, self.key = tree_table(grid, self.structure, key, levy_area), None
        elif storage == "table":
            h = jnp.asarray(grid.right - grid.left)
            self.table = increment(h, normals(key, self.structure, levy_area, h.shape), levy_area)
            self.key = None
        else:
            self.table, self.key = None, key

    @property
    def storage(self) -> str:
        """How the rows are stored; a counter that was coarsened has become a table."""
        return "table" if self._drawn == "counter" and self.table is not None else self._drawn

    @property
    def t0(self) -> Any:
        """Where the first row begins."""
        return self.grid.t0

    @property
    def t1(self) -> Any:
        """Where the last row ends."""
        return self.grid.t1

    def row(self, index: Any, h: Any) -> Any:
        """The increment of row ``index``, a step of length ``h``."""
        if self.table is not None:
            return jtu.tree_map(lambda x: x[index], self.table)
        draws = normals(jr.fold_in(written_out(self.key), index), self.structure, self.levy_area)
        return increment(jnp.asarray(h), draws, self.levy_area)

    def evaluate(self, t0: Any, t1: Any = None, left: bool = True, use_levy: bool = False) -> Any:
        """The increment over the row that ``(t0, t1)`` names; NaN for anything that is not a row."""
        del left
        if t1 is None:
            return nan_like(self.structure)
        a, b = jnp.asarray(self.grid.left), jnp.asarray(self.grid.right)
        # Decreasing times are searched on the mirrored axis; a query may come with its ends exchanged.
        sign = jnp.sign(b[0] - a[0])
        middle, quarter = sign * (t0 + t1) / 2, jnp.abs(b - a) / 4
        index = jnp.clip(jnp.searchsorted(sign * a, middle, side="right") - 1, 0, a.shape[0] - 1)
        index = jnp.minimum(index, jnp.maximum(self.grid.live.sum() - 1, 0))
        forward = (t1 - t0) * sign >= 0
        start, stop = jnp.where(forward, t0, t1), jnp.where(forward, t1, t0)
        found = (jnp.abs(start - a[index]) <= quarter[index]) & (jnp.abs(stop - b[index]) <= quarter[index])
        out = self.row(index, b[index] - a[index])
        out = jtu.tree_map(ft.partial(jnp.where, forward), out, backwards(out))
        out = jtu.tree_map(lambda x: jnp.where(found, x, jnp.nan), out)
        return out if use_levy else out.W

    def coarsen(self, k: int) -> "GridBrownian":
        """The same Brownian path on the grid whose steps are ``k`` of this one's, merged.

        Raises:
            ValueError: if the grid is traced or padded, or ``k`` does not divide the steps before every saved time.

        Example:
            >>> import jax, sdeflow as sf
            >>> grid = sf.grids.uniform(0.0, 1.0, 8)
            >>> path = sf.paths.GridBrownian(grid, (), key=jax.random.key(0))
            >>> whole = path.coarsen(8).table.W[0]
            >>> bool(abs(whole - path.table.W.sum()) < 1e-6)
            True
        """
        coarse = self.grid.coarsen(k)
        h = jnp.asarray(self.grid.right - self.grid.left)
        fine = self.table
        if fine is None:
            fine = jax.vmap(self.row)(jnp.arange(self.grid.num_rows), h)
        merge = ft.partial(_merge, jnp.asarray(self.grid.left), jnp.asarray(self.grid.right), k)
        names = fields_of(self.levy_area)
        leaves = [jtu.tree_leaves(getattr(fine, name)) for name in names]
        merged = [merge(values) for values in zip(*leaves)]
        treedef = jtu.tree_structure(self.structure)
        values = {name: treedef.unflatten([m[i] for m in merged]) for i, name in enumerate(names)}
        hc = jnp.asarray(coarse.right - coarse.left)
        table = self.levy_area(dt=jtu.tree_map(lambda w: hc.astype(w.dtype), values["W"]), **values)
        return eqx.tree_at(lambda p: (p.grid, p.table, p.key), self, (coarse, table, None), is_leaf=lambda x: x is None)


def _merge(left: Array, right: Array, k: int, fine: Sequence[Array]) -> list[Array]:
    w = fine[0]
    group = lambda x: x.reshape(-1, k, *x.shape[1:])
    wide = lambda x: group(x.astype(w.dtype)).reshape(-1, k, *(1,) * (w.ndim - 2))
    w = group(w)
    total = w.sum(axis=1)
    out = [total]
    if len(fine) == 1:
        return out
    h, middle = wide(right - left), wide((left + right) / 2)
    length = h.sum(axis=1)
    before = jnp.cumsum(w, axis=1) - w
    area = h * (group(fine[1]) + w / 2)
    out.append((area + h * before).sum(axis=1) / length - total / 2)
    if len(fine) == 3:
        centre = ((left[::k] + right[k - 1 :: k]) / 2).astype(w.dtype).reshape(-1, 1, *(1,) * (w.ndim - 2))
        lever = centre - middle
        moment = lever * (area + h * before) + h**2 * (group(fine[2]) - w / 12)
        out.append(moment.sum(axis=1) / length**2 + total / 12)
    return out


def nan_like(structure: Any) -> Any:
    """A tree of NaN of this structure."""
    return jtu.tree_map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), structure)
