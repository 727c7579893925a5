"""Brownian motion on a grid whose rows also carry normals that are independent of it.

An exact step of a linear equation needs as many normals beside W and H as the equation has components, of which there
may be more than noises: see `sdeflow.solvers.Exact`.
"""

from typing import Any, Literal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PRNGKeyArray, PyTree

from ..grids import Grid
from ._grid_brownian import GridBrownian, as_structure, increment, normals
from ._threefry import written_out

_STREAM = 0x6C69  # keeps these normals apart from W and H


class LinearIncrement(eqx.Module):
    """What a step of `LinearBrownian` carries: its length, W, H, and normals (dim,) with the variance of W."""

    dt: Any
    W: Any
    H: Any
    normals: Any


class LinearBrownian(GridBrownian):
    """Brownian motion on a grid whose rows also carry ``dim`` normals that are independent of it.

    `sdeflow.solvers.Exact` reads both; any other solver sees the Brownian motion alone, which is that of a
    `GridBrownian` with ``levy_area=diffrax.SpaceTimeLevyArea`` and the same key.

    Arguments:
        grid: the grid; N rows.
        structure: what one increment of W looks like: an array or tree of arrays, or a shape tuple.
        dim: how many normals a row carries: the components of the state.
        key: a JAX random key.
        storage: "table" draws all rows at once; "counter" draws a row when it is asked for, O(1) memory.

    Raises:
        ValueError: for another storage, or a structure that is not real floating.

    Example:
        >>> import jax, sdeflow as sf
        >>> grid = sf.grids.uniform(0.0, 1.0, 4)
        >>> path = sf.paths.LinearBrownian(grid, (1,), dim=3, key=jax.random.key(0))
        >>> path.evaluate(0.25, 0.5, use_levy=True).normals.shape
        (3,)
    """

    dim: int = eqx.field(static=True)

    def __init__(
        self,
        grid: Grid,
        structure: PyTree | tuple[int, ...],
        *,
        dim: int,
        key: PRNGKeyArray,
        storage: Literal["table", "counter"] = "table",
    ):
        if storage not in ("table", "counter"):
            raise ValueError(f'storage must be "table" or "counter", got {storage!r}: trees carry no such normals.')
        self.grid, self.structure, self._drawn = grid, as_structure(structure), storage
        self.levy_area, self.dim = LinearIncrement, dim
        self.table, self.key = None, key
        if storage == "table":
            h = jnp.asarray(grid.right - grid.left)
            self.table, self.key = self._increment(key, h, h.shape), None

    def _increment(self, key: PRNGKeyArray, h: Any, lead: tuple[int, ...]) -> LinearIncrement:
        area = diffrax.SpaceTimeLevyArea
        row = increment(h, normals(key, self.structure, area, lead), area)
        dtype = jnp.result_type(*jtu.tree_leaves(self.structure))
        one, plain = jax.ShapeDtypeStruct((self.dim,), dtype), diffrax.BrownianIncrement
        own = jax.random.fold_in(written_out(key), _STREAM)
        rest = increment(h, normals(own, one, plain, lead), plain).W
        return LinearIncrement(row.dt, row.W, row.H, rest)

    def row(self, index: Any, h: Any) -> Any:
        """The increment of row ``index``, a step of length ``h``."""
        if self.table is not None:
            return jtu.tree_map(lambda x: x[index], self.table)
        return self._increment(jax.random.fold_in(written_out(self.key), index), jnp.asarray(h), ())

    def coarsen(self, k: int) -> "LinearBrownian":
        """The same path on the grid whose steps are ``k`` of this one's, merged; the normals add up.

        Raises:
            ValueError: if the grid is traced or padded, or ``k`` does not divide the steps before every saved time.
        """
        h = jnp.asarray(self.grid.right - self.grid.left)
        fine = jax.vmap(self.row)(jnp.arange(self.grid.num_rows), h)
        plain = object.__new__(GridBrownian)
        area = diffrax.SpaceTimeLevyArea(dt=fine.dt, W=fine.W, H=fine.H)
        given = {"grid": self.grid, "structure": self.structure, "levy_area": diffrax.SpaceTimeLevyArea}
        for name, value in {**given, "key": None, "table": area, "_drawn": "table"}.items():
            object.__setattr__(plain, name, value)
        merged = plain.coarsen(k)
        rest = fine.normals.reshape(-1, k, self.dim).sum(axis=1)
        table = LinearIncrement(merged.table.dt, merged.table.W, merged.table.H, rest)
        return eqx.tree_at(
            lambda p: (p.grid, p.table, p.key), self, (merged.grid, table, None), is_leaf=lambda x: x is None
        )
