"""The Brownian path of ``diffrax.VirtualBrownianTree``, all rows of a grid at once.

The tree halves intervals: given the increments (W, H, K) over an interval of length h, those over its halves follow
from as many fresh normals (Foster 2020, theorem 6.1.4; Jelincic et al. 2024, theorem 3.7). Asking it for one row costs
two descents of log2(1/tol) levels. On a dyadic grid (2^L equal steps) the rows are the leaves: one pass breadth-first
gives all of them, with 2^L normals for each field and no descent. Other grids are asked row by row, in one batch.
"""

import dataclasses
import math
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from ..grids import Grid
from ._increments import backwards
from ._threefry import written_out


class QuietTree(diffrax.VirtualBrownianTree):
    """``diffrax.VirtualBrownianTree``, which answers NaN outside of its times.

    diffrax checks that at run time, by a call back to the host, and no program that holds one is kept by JAX's
    persistent cache.
    """

    def _evaluate(self, r: Any) -> Any:
        r = jnp.where((r < 0) | (r > 1), jnp.nan, r)
        return jtu.tree_map(lambda key, shape: self._evaluate_leaf(key, r, shape), self.key, self.shape)


def quiet(path: Any) -> Any:
    """The path, a tree of diffrax's turned into one that calls nothing back, and draws the same numbers sooner."""
    if type(path) is not diffrax.VirtualBrownianTree:
        return path
    out = object.__new__(QuietTree)
    for field in dataclasses.fields(path):
        object.__setattr__(out, field.name, getattr(path, field.name))
    object.__setattr__(out, "key", jtu.tree_map(written_out, path.key))
    return out


def quiet_tree(t0: Any, t1: Any, tol: Any, structure: Any, key: PRNGKeyArray, levy_area: type) -> Any:
    """The tree of diffrax over times that may be traced, in increasing order."""
    tree = diffrax.VirtualBrownianTree(0.0, 1.0, 0.5, structure, key, levy_area)
    t0, t1 = jnp.asarray(t0), jnp.asarray(t1)
    return quiet(eqx.tree_at(lambda x: (x.t0, x.t1, x.tol), tree, (t0, t1, tol / (t1 - t0))))


def tree_table(grid: Grid, structure: Any, key: PRNGKeyArray, levy_area: type) -> Any:
    """The increments over all rows of the grid, of the tree with this key over the grid's interval."""
    levels = dyadic_levels(grid)
    if levels is None:
        return _by_query(grid, structure, key, levy_area)
    leaves, treedef = jtu.tree_flatten(structure)
    keys = jr.split(written_out(key), len(leaves))
    length = jnp.abs(jnp.asarray(grid.right[-1] - grid.left[0]))
    rows = [_breadth_first(k, x, levels, length, levy_area) for k, x in zip(keys, leaves)]
    names = rows[0].keys()
    return levy_area(**{name: treedef.unflatten([row[name] for row in rows]) for name in names})


def dyadic_levels(grid: Grid) -> int | None:
    """L if the grid is known to be 2^L equal increasing steps without padding, else None."""
    if not grid.is_concrete or not np.asarray(grid.live).all():
        return None
    n = grid.num_rows
    left, right = np.asarray(grid.left, np.float64), np.asarray(grid.right, np.float64)
    even = np.allclose(right - left, (right[-1] - left[0]) / n, rtol=1e-6, atol=0)
    return n.bit_length() - 1 if n & (n - 1) == 0 and even and right[-1] > left[0] else None


def _by_query(grid: Grid, structure: Any, key: PRNGKeyArray, levy_area: type) -> Any:
    left, right = jnp.asarray(grid.left), jnp.asarray(grid.right)
    low, high = jnp.minimum(left, right), jnp.maximum(left, right)
    tree = quiet_tree(low.min(), high.max(), (high - low).min() / 2, structure, key, levy_area)
    rows = jax.vmap(lambda a, b: tree.evaluate(a, b, use_levy=True))(low, high)
    rows = jtu.tree_map(lambda x, y: jnp.where(_lead(left <= right, x), x, y), rows, backwards(rows))
    # The tree's own dt is off by the root of its length when the structure has several leaves.
    dt = jtu.tree_map(lambda w: (right - left).astype(w.dtype), rows.W)
    return eqx.tree_at(lambda r: r.dt, rows, dt)


def _lead(x: Array, like: Array) -> Array:
    return x.reshape(x.shape + (1,) * (like.ndim - 1))


def _breadth_first(key: PRNGKeyArray, x: Any, levels: int, length: Array, levy_area: type) -> dict[str, Array]:
    """W, H and K over all leaves of one array of the structure."""
    fields = 1 + (diffrax.BrownianIncrement, diffrax.SpaceTimeLevyArea, diffrax.SpaceTimeTimeLevyArea).index(levy_area)
    state, *starts = jr.split(key, 1 + fields)
    scale = (1.0, 1 / math.sqrt(12), 1 / math.sqrt(720))
    # H and K are carried times h and h^2, so that they add up over intervals.
    cells = [jr.normal(k, x.shape, x.dtype)[None] * np.asarray(s, x.dtype) for k, s in zip(starts, scale)]

    # All keys first, which is cheap, then one draw for the whole tree, then the arithmetic level by level.
    nodes, middles = state[None], []
    for _ in range(levels):
        split = jax.vmap(lambda k: jr.split(k, 3))(nodes)
        middles.append(split[:, 1])
        # The left half goes on with the third key, the right half with the first.
        nodes = jnp.stack([split[:, 2], split[:, 0]], axis=1).reshape(-1, *split.shape[2:])
    if levels:
        keys = jnp.concatenate(middles)
        if fields == 1:
            keys = keys[:, None]
        else:
            keys = jax.vmap(lambda k: jr.split(k, fields))(keys)
        draws = jax.vmap(jax.vmap(lambda k: jr.normal(k, x.shape, x.dtype)))(keys)
    for level in range(levels):
        first = 2**level - 1
        z = [draws[first : first + 2**level, i] for i in range(fields)]
        cells = _halve(cells, z, 2.0**-level)
    h = 2.0**-levels
    rows = {"W": cells[0]}
    if fields > 1:
        rows["H"] = cells[1] / np.asarray(h, x.dtype)
    if fields > 2:
        rows["K"] = cells[2] / np.asarray(h * h, x.dtype)
    root = jnp.sqrt(length).astype(x.dtype)
    out = {name: value * root for name, value in rows.items()}
    return {"dt": jnp.full(2**levels, h, x.dtype) * length.astype(x.dtype), **out}


def _halve(cells: list[Array], z: list[Array], h: float) -> list[Array]:
    """Both halves of every cell of length ``h``, interleaved."""
    if len(cells) == 1:
        mean, spread = cells[0] / 2, z[0] * (math.sqrt(h) / 2)
        pairs = [(mean + spread, mean - spread)]
    else:
        w, area = cells[0], cells[1]
        a = z[0] * (math.sqrt(h) / 4)
        skew = area * (1.5 / h) + a
        pairs = [(w / 2 + skew, w / 2 - skew)]
        if len(cells) == 2:
            mean, spread = area / 8 - a * (h / 4), z[1] * (h / 4 * math.sqrt(h / 12))
            pairs.append((mean + spread, mean - spread))
        else:
            moment = cells[2]
            b, c = z[1] * math.sqrt(h / 768), z[2] * math.sqrt(h / 2880)
            mean, spread = area / 8 - a * (h / 4), moment * (15 / (8 * h)) + b * (h / 2)
            pairs.append((mean + spread, mean - spread))
            mean, spread = moment / 32 - b * (h * h / 8), c * (h * h / 4)
            pairs.append((mean + spread, mean - spread))
    return [jnp.stack(pair, axis=1).reshape(-1, *pair[0].shape[1:]) for pair in pairs]
