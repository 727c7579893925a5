"""Brownian motion together with its exponentially weighted integrals over each step, drawn exactly.

On a step of length h, W and

    I_k = int_0^h exp(-rate_k (h - s)) dW_s,      E I_j I_k = h e1((rate_j + rate_k) h),      e1(x) = (1 - exp(-x)) / x,

are jointly normal; W is the I of rate zero. Their covariance has a numerical rank of 3 to 6, so that it has no Cholesky
factor in float32. It is an integral over the step, though, and Gaussian quadrature writes it as V V' with one column a
node; orthogonalising V's rows (Gram and Schmidt) gives the same triangular factor without ever forming the covariance.
It is stable in float32, is differentiable in h, and needs as many normals as there are integrals.
"""

import functools
from typing import Any, Literal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from ..grids import Grid
from ._grid_brownian import GridBrownian, as_structure, normals, safe_sqrt
from ._threefry import written_out

_NODES, _POWER = 64, 3  # of the quadrature, refined towards the end of the step: 1e-6 up to rate * h = 3000


class FactorIncrement(eqx.Module):
    """What a step of `FactorBrownian` carries: its length, W, and the integrals, leaves (K, *shape)."""

    dt: Any
    W: Any
    factors: Any


def joint_factor(rates: tuple[float, ...], h: Array) -> Array:
    """The matrix L with (W, I_1, ..., I_K) = sqrt(h) L z; W itself leads unless a rate is zero.

    Arguments:
        rates: K rates in increasing order.
        h: shape (...), lengths of steps.

    Returns:
        Shape (..., J, J), J = K if the first rate is zero, else K + 1.
    """
    node, weight = np.polynomial.legendre.leggauss(_NODES)
    node, weight = (node + 1) / 2, weight / 2
    s, weight = node**_POWER, weight * _POWER * node ** (_POWER - 1)
    # W, then the fastest first: what is left of a row when its turn comes shrinks from row to row. In the other order
    # the nearly equal slow ones would leave directions that are rounding errors, along which fast ones still lie.
    every = np.array([0.0, *(rate for rate in rates[::-1] if rate > 0)])
    h = jnp.abs(jnp.asarray(h, jnp.result_type(float)))
    V = jnp.asarray(np.sqrt(weight), h.dtype) * jnp.exp(-jnp.asarray(np.outer(every, s), h.dtype) * h[..., None, None])
    below = jnp.arange(len(every))

    def eliminate(V: Array, k: Array) -> tuple[Array, Array]:
        row = V[..., k, :]
        size = jnp.sqrt(jnp.maximum((row**2).sum(-1), jnp.finfo(h.dtype).tiny))
        direction = row / size[..., None]
        along = (V * direction[..., None, :]).sum(-1)
        column = jnp.where(below == k, size[..., None], jnp.where(below > k, along, 0))
        return jnp.where((below > k)[:, None], V - along[..., None] * direction[..., None, :], V), column

    # A loop, as code in a row is fused: a residue would be computed twice, rounded differently, and its direction would
    # not have length one.
    L = jnp.moveaxis(jax.lax.scan(eliminate, V, below)[1], 0, -1)
    return jnp.concatenate([L[..., :1, :], L[..., :0:-1, :]], axis=-2)


# Compiled, so that a path made outside of any trace does not compile its operations one by one.
@functools.partial(jax.jit, static_argnums=0)
def factor_increment(rates: tuple[float, ...], h: Array, z: Any) -> FactorIncrement:
    """The increment of steps of length ``h``, shape (...), from standard normals with leaves (..., J, *shape)."""
    L = joint_factor(rates, h) * safe_sqrt(jnp.asarray(h, jnp.result_type(float)))[..., None, None]
    lead = L.ndim - 2

    def one(z: Array) -> Array:
        flat = z.reshape(*z.shape[: lead + 1], -1)
        with jax.default_matmul_precision("highest"):
            return jnp.matmul(L.astype(z.dtype), flat).reshape(z.shape)

    both = jtu.tree_map(one, z)
    at = (slice(None),) * lead
    W = jtu.tree_map(lambda x: x[*at, 0], both)
    factors = both if rates[0] == 0 else jtu.tree_map(lambda x: x[*at, 1:], both)
    return FactorIncrement(jtu.tree_map(lambda w: jnp.asarray(h, w.dtype), W), W, factors)


class FactorBrownian(GridBrownian):
    """Brownian motion on a grid whose rows also carry exponentially weighted integrals of it, drawn exactly.

    `sdeflow.solvers.ExponentialHeun` reads both; any other solver sees the Brownian motion alone.

    Arguments:
        grid: the grid; N rows, in increasing time.
        structure: what one increment of W looks like: an array or tree of arrays, or a shape tuple.
        rates: K rates in increasing order, such as those of a `MarkovFractionalNoise`.
        key: a JAX random key.
        storage: "table" draws all rows at once; "counter" draws a row when it is asked for, O(1) memory.

    Raises:
        ValueError: for another storage, or a structure that is not real floating.

    Example:
        >>> import jax, sdeflow as sf
        >>> grid = sf.grids.uniform(0.0, 1.0, 4)
        >>> path = sf.paths.FactorBrownian(grid, (3,), rates=(0.0, 1.0, 10.0), key=jax.random.key(0))
        >>> path.evaluate(0.25, 0.5, use_levy=True).factors.shape
        (3, 3)
    """

    rates: tuple[float, ...] = eqx.field(static=True)

    def __init__(
        self,
        grid: Grid,
        structure: PyTree | tuple[int, ...],
        *,
        rates: tuple[float, ...],
        key: PRNGKeyArray,
        storage: Literal["table", "counter"] = "table",
    ):
        if storage not in ("table", "counter"):
            raise ValueError(f'storage must be "table" or "counter", got {storage!r}: trees carry no such integrals.')
        self.grid, self.structure, self._drawn = grid, as_structure(structure), storage
        self.levy_area, self.rates = FactorIncrement, tuple(float(r) for r in rates)
        self.table, self.key = None, key
        if storage == "table":
            h = jnp.asarray(grid.right - grid.left)
            self.table, self.key = factor_increment(self.rates, h, self._normals(key, h.shape)), None

    def _normals(self, key: PRNGKeyArray, lead: tuple[int, ...] = ()) -> Any:
        count = len(self.rates) + (self.rates[0] != 0)
        several = jtu.tree_map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), self.structure)
        return normals(key, several, diffrax.BrownianIncrement, lead)["W"]

    def row(self, index: Any, h: Any) -> Any:
        """The increment of row ``index``, a step of length ``h``."""
        if self.table is not None:
            return jtu.tree_map(lambda x: x[index], self.table)
        z = self._normals(jax.random.fold_in(written_out(self.key), index))
        return factor_increment(self.rates, jnp.asarray(h), z)

    def coarsen(self, k: int) -> "FactorBrownian":
        """The same path on the grid whose steps are ``k`` of this one's, merged.

        Raises:
            ValueError: if the grid is traced or padded, or ``k`` does not divide the steps before every saved time.
        """
        coarse, h = self.grid.coarsen(k), jnp.asarray(self.grid.right - self.grid.left)
        fine = jax.vmap(self.row)(jnp.arange(self.grid.num_rows), h)
        # What was integrated early in the merged step is weighted down until its end.
        left_over = jnp.asarray(self.grid.right)[k - 1 :: k, None] - jnp.asarray(self.grid.right).reshape(-1, k)
        decay = jnp.exp(-left_over[..., None] * jnp.asarray(self.rates, left_over.dtype))

        def merge(x: Array) -> Array:
            grouped = x.reshape(-1, k, *x.shape[1:])
            weight = decay.reshape(*decay.shape, *(1,) * (grouped.ndim - 3)).astype(x.dtype)
            return (grouped * weight).sum(axis=1)

        W = jtu.tree_map(lambda x: x.reshape(-1, k, *x.shape[1:]).sum(axis=1), fine.W)
        length = jnp.asarray(coarse.right - coarse.left)
        dt = jtu.tree_map(lambda w: length.astype(w.dtype), W)
        table = FactorIncrement(dt, W, jtu.tree_map(merge, fine.factors))
        return eqx.tree_at(lambda p: (p.grid, p.table, p.key), self, (coarse, table, None), is_leaf=lambda x: x is None)
