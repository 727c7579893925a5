"""Times and grids whose values are known only when the program runs: what the host checks elsewhere, as a result.

A few comparisons for each time and row, and no callback. What fails them ends as ``RESULTS.bad_times``, with NaN for
the states, so that no plausible number comes of it.
"""

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree

from ..adjoints._freeze import freeze
from ..grids import Grid
from ..grids._grid import ULPS


def times_are_good(ts: Array, grid: Grid | None, forwards_only: bool = False) -> Bool[Array, ""]:
    """Whether traced times are finite and strictly monotone up to repeats of the last, and the grid leads through them.

    Arguments:
        grid: the steps, if they are fixed.
        forwards_only: whether decreasing times are bad too.
    """
    # A comparison has no derivative, however the times are differentiated.
    ts, grid = freeze((ts, grid))
    sign = jnp.sign(ts[-1] - ts[0])
    gaps = ts[1:] - ts[:-1]
    ends = (ts[1:] == ts[-1]) & (gaps == 0)
    good = jnp.isfinite(ts).all() & ((gaps * sign > 0) | ends).all()
    if forwards_only:
        good &= ts[-1] >= ts[0]
    if grid is None:
        return good & _resolved((gaps != 0).sum(), ts)

    left, right, live, save = (jnp.asarray(x) for x in (grid.left, grid.right, grid.live, grid.save))
    h, both, count = right - left, live[1:], live.sum()
    good &= (~live | (h * sign > 0)).all() & (live[1:] <= live[:-1]).all()
    good &= (save[0] == 0) & (save[1:] >= save[:-1]).all() & (save[-1] == count)
    shortest = jnp.where(live, jnp.abs(h), jnp.inf).min()
    shortest = jnp.where(count == 0, 0, shortest)
    # The tolerances of the checks on the host.
    apart = jnp.abs(left[1:] - right[:-1]) <= 1e-3 * shortest + 2 * _spacing(jnp.abs(ts).max())
    good &= (~both | apart).all()
    reached = jnp.concatenate([left[:1], right])[save]
    slack = 1e-5 * shortest + 8 * _spacing(jnp.abs(ts).max().astype(jnp.float32)).astype(ts.dtype)
    return good & (jnp.abs(reached - ts) <= slack).all() & _resolved(count, ts)


def _resolved(count: Array, ts: Array) -> Array:
    """Whether steps are on average long enough for their precision: single times of data may well lie close."""
    # One unit less than the host asks for, as these ends are rounded already.
    limit = (ULPS - 1) * _spacing(jnp.abs(ts).max())
    return jnp.abs(ts[-1] - ts[0]) >= count.astype(ts.dtype) * limit


def _spacing(x: Array) -> Array:
    # A tolerance and no function of the times: nextafter has no derivative.
    x = jax.lax.stop_gradient(x)
    return jnp.nextafter(x, jnp.array(jnp.inf, x.dtype)) - x


def any_times(ts: Array) -> Array:
    """Good times of the same shape, for diffrax to walk instead of bad ones, which it would answer with a callback."""
    return jnp.arange(ts.shape[0], dtype=ts.dtype)


def blank_unless(good: Array, tree: PyTree) -> PyTree:
    """The tree, with NaN for its numbers unless all is good."""
    blank = lambda x: jnp.where(good, x, jnp.nan) if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else x
    return jtu.tree_map(blank, tree)
