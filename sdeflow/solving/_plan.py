"""From what the user says about steps to rows: which grid, and how its steps lie between the requested times."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from .._compat import is_concrete
from ..grids import Grid, subdivide, through
from ..grids._build import check_count, cut, host_times
from ..grids._grid import check_resolution


class Plan(NamedTuple):
    """A planned walk.

    Fields:
        grid: the rows, without padding wherever that is known.
        ts: the requested times.
        every: k if every interval between requested times has exactly k rows, else None.
        masked: whether some rows may be padding.
        num_rows: the number of rows before known padding was dropped; the noise is stored by this number.
        why: how the steps were chosen.
        own_grid: whether the rows are those of the path's own grid (or of a path that is yet to be made for them).
        traced: whether times or rows are traced, and so were not compared on the host.
    """

    grid: Grid
    ts: Any
    every: int | None
    masked: bool
    num_rows: int
    why: str
    own_grid: bool
    traced: bool


def plan(ts: Any, dt0: Any, grid: Grid | None, steps_per_interval: int | None, path: Any, dtype: Any) -> Plan:
    """Choose the grid; exactly one of ``dt0``, ``grid`` and ``steps_per_interval`` may fix the steps.

    Raises:
        ValueError: if more than one is given, or times and grid disagree.
    """
    given = [
        name for name, x in (("dt0", dt0), ("grid", grid), ("steps_per_interval", steps_per_interval)) if x is not None
    ]
    if len(given) > 1:
        raise ValueError(f"Only one of dt0, grid and steps_per_interval may fix the steps, got {' and '.join(given)}.")
    why = {"dt0": "steps of at most dt0", "steps_per_interval": "equal steps in every interval"}.get(
        given[0] if given else "", "one step per interval"
    )
    # The path's own grid may be named twice.
    own = path is None or (grid is not None and getattr(path, "grid", None) is grid)
    if grid is None and not given and path is not None and getattr(path, "grid", None) is not None:
        grid, why, own = path.grid, "the grid of the path", True
    if grid is not None:
        why = "the given grid" if given else why
        if jnp.ndim(grid.left) != 1:
            raise ValueError("A batch of grids is for jax.vmap: solve walks one grid at a time.")
        if grid.save.shape[0] != jnp.shape(ts)[0]:
            raise ValueError(
                f"The grid saves {grid.save.shape[0]} times but ts has {jnp.shape(ts)[0]}: build it with "
                "sf.grids.through(ts, ...)."
            )
        if not grid.is_concrete:
            return Plan(grid, ts, None, True, grid.num_rows, why, own, True)
        _check_times(ts, grid)
        return _known(grid, ts, why, own, dtype)
    if steps_per_interval is not None and is_concrete(ts):
        k, times = check_count(steps_per_interval, "steps_per_interval"), host_times(ts)
        return _known(cut(times, np.full(times.size - 1, k)), ts, why, own, dtype)
    if dt0 is not None or is_concrete(ts):
        return _known(through(ts, dt0), ts, why, own, dtype)
    k = 1 if steps_per_interval is None else steps_per_interval
    grid = subdivide(jnp.asarray(ts, dtype), k)
    return Plan(grid, ts, k, True, grid.num_rows, why, own, True)


def _known(grid: Grid, ts: Any, why: str, own: bool, dtype: Any) -> Plan:
    """A plan from a grid whose numbers are known: padding is dropped and equal intervals are recognised."""
    count = int(np.asarray(grid.num_steps))
    num_rows = grid.num_rows
    if count < num_rows:
        jump = None if grid.jump is None else grid.jump[:count]
        grid = Grid(grid.left[:count], grid.right[:count], grid.live[:count], grid.save, jump, grid.ends_at_jump)
    check_resolution(np.asarray(grid.left), np.asarray(grid.right), dtype)
    save = np.asarray(grid.save)
    per = np.diff(save)
    every = int(per[0]) if per.size and per[0] > 0 and (per == per[0]).all() else None
    return Plan(grid, ts, every, False, num_rows, why, own, not is_concrete(ts))


def _check_times(ts: Any, grid: Grid) -> None:
    if not is_concrete(ts):
        return
    save = np.asarray(grid.save)
    ends = np.concatenate([np.asarray(grid.left)[:1], np.asarray(grid.right)])[save]
    wanted = np.asarray(ts, np.float64)
    slack = 1e-5 * np.abs(np.asarray(grid.right) - np.asarray(grid.left)).min() + 8 * np.spacing(
        np.abs(wanted).max().astype(np.float32)
    )
    bad = np.abs(ends - wanted) > slack
    if bad.any():
        i = int(np.argmax(bad))
        raise ValueError(
            f"The grid reaches {ends[i]:g} where ts[{i}]={wanted[i]:g}: build it with sf.grids.through(ts, ...)."
        )
