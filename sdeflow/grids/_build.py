"""Building grids: on the host in float64 where the times are known, inside a trace where they are not."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._compat import is_concrete
from ._grid import Grid, beside


def host_times(ts: Any) -> np.ndarray:
    """Requested times as a float64 array on the host.

    Raises:
        ValueError: if they are traced, not one-dimensional, fewer than two, not finite or not strictly monotone.
    """
    if not is_concrete(ts):
        raise ValueError(
            "ts is traced, so its values cannot choose a static number of steps: pass ts as a NumPy array, "
            "or pass grid= or steps_per_interval= instead of dt0=."
        )
    times = np.asarray(ts, dtype=np.float64)
    if times.ndim != 1 or times.size < 2:
        raise ValueError(f"ts must be one-dimensional with at least two times, got shape {times.shape}.")
    check_finite(times)
    gaps = np.diff(times)
    if not ((gaps > 0).all() or (gaps < 0).all()):
        bad = int(np.argmax(gaps * np.sign(gaps[0] if gaps[0] else 1.0) <= 0))
        raise ValueError(
            f"ts must be strictly increasing or strictly decreasing; ts[{bad}]={times[bad]:g} and "
            f"ts[{bad + 1}]={times[bad + 1]:g} are not."
        )
    return times


def check_finite(times: np.ndarray) -> None:
    """Refuse requested times that are NaN or infinite.

    Raises:
        ValueError: naming the first of them; for an end at infinity also what to do.
    """
    if np.isfinite(times).all():
        return
    hint = ""
    if np.isinf(times[-1]):
        hint = " Where an event or a steady state ends the solve, give a late time, or diffrax.diffeqsolve its t1=inf."
    raise ValueError(f"ts must be finite; entry {int(np.argmin(np.isfinite(times)))} is not.{hint}")


def cut(times: np.ndarray, counts: np.ndarray) -> Grid:
    """The grid with ``counts[j]`` equal steps from ``times[j]`` to ``times[j+1]``."""
    save = np.concatenate([[0], np.cumsum(counts)])
    interval = np.repeat(np.arange(counts.size), counts)
    offset = np.arange(save[-1]) - save[interval]
    inner = times[interval] + np.diff(times)[interval] * (offset / counts[interval])
    knots = np.concatenate([inner, times[-1:]])
    return Grid(knots[:-1], knots[1:], np.ones(interval.size, bool), save)


def check_count(value: Any, name: str) -> int:
    """A positive static integer.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    return int(value)


def check_dt0(dt0: Any, gap: float | None = None) -> float:
    """A finite step length that is not zero, and of the sign of ``gap`` if that is given.

    Raises:
        ValueError: for any other number.
        TypeError: if it is not a number.
    """
    if np.ndim(dt0) != 0 or isinstance(dt0, str | bool) or np.asarray(dt0).dtype.kind not in "iuf":
        raise TypeError(f"dt0 must be a number, the length of a step, got {dt0!r}.")
    dt0 = float(dt0)
    if not np.isfinite(dt0) or dt0 == 0 or (gap is not None and dt0 * gap <= 0):
        sign = "" if gap is None else f" and of the sign of ts[1]-ts[0]={gap:g}"
        raise ValueError(f"dt0 must be finite, not zero{sign}, got {dt0}.")
    return dt0


def _within(jumps: Any, times: np.ndarray, precision: Any) -> np.ndarray:
    """The jumps as float64, each once and in the order of the times; those beside a requested time lie on it.

    Raises:
        ValueError: for jumps that are traced, not finite, not one-dimensional or outside of the times.
    """
    if not is_concrete(jumps):
        raise ValueError("jumps is traced, so it cannot choose a static number of steps: pass it as a NumPy array.")
    found = np.asarray(jumps, np.float64)
    if found.ndim != 1 or not np.isfinite(found).all():
        raise ValueError(f"jumps must be finite and one-dimensional, got {found.tolist()}.")
    slack = 8 * np.finfo(precision).eps * np.abs(times).max()
    low, high = times.min(), times.max()
    outside = (found < low - slack) | (found > high + slack)
    if outside.any():
        raise ValueError(
            f"jumps[{int(np.argmax(outside))}]={found[outside][0]:g} lies outside of ts, which runs from "
            f"{times[0]:g} to {times[-1]:g}."
        )
    nearest = times[np.abs(found[:, None] - times).argmin(axis=1)]
    found = np.unique(np.where(np.abs(found - nearest) <= slack, nearest, found))
    return found if times[-1] > times[0] else found[::-1]


def _off(grid: Grid, jumps: np.ndarray) -> Grid:
    """The grid, its steps taken off the jumps that they meet."""
    left, right = grid.left.copy(), grid.right.copy()
    left = np.where(np.isin(left, jumps), beside(left, right), left)
    right = np.where(np.isin(right, jumps), beside(right, grid.left), right)
    at_end = np.asarray(np.isin(grid.right[-1], jumps))
    return Grid(left, right, grid.live, grid.save, np.isin(grid.left, jumps), at_end)


def through(
    ts: Any, dt0: float | None = None, num_steps: int | None = None, jumps: Sequence[float] | np.ndarray | None = None
) -> Grid:
    """The grid that lands exactly on every requested time, with equal steps of at most ``dt0`` in between.

    The interval from ``ts[j]`` to ``ts[j+1]`` is cut into ``ceil(gap / dt0)`` equal steps, in float64. Where the field
    jumps or has a kink (a drift that is switched, a control made of straight lines), steps must not go across: a solver
    would lose its order, and one that keeps its last slope for the next step would start with the wrong one.

    Arguments:
        ts: shape (n,), n >= 2, strictly increasing, or strictly decreasing for reverse time. Not traced.
        dt0: the largest step, signed like ``ts[1] - ts[0]``. None takes one step per interval.
        num_steps: pad with dead rows up to this many, so that grids of different lengths share one shape.
        jumps: times from ``ts[0]`` to ``ts[-1]`` where the field may be discontinuous, in any order. One step ends just
            before such a time, by one unit in the last place, and the next begins just after it with its ``jump`` set,
            so that it does not matter on which side the field has its value there.

    Raises:
        ValueError: for times that are traced or not strictly monotone, a ``dt0`` that is zero, not finite or of the
            wrong sign, a ``num_steps`` below the steps needed, ``jumps`` outside of the times, or steps below the
            resolution of the times.
        TypeError: for a ``dt0`` that is not a number.

    Example:
        >>> import sdeflow as sf
        >>> grid = sf.grids.through([0.0, 1.0, 1.5], dt0=0.5, num_steps=8)
        >>> int(grid.num_steps), grid.num_rows, grid.save.tolist()
        (3, 8, [0, 2, 3])
        >>> sf.grids.through([0.0, 1.0], dt0=0.5, jumps=[0.75]).jump.tolist()
        [False, False, True]
    """
    precision = np.float32 if getattr(ts, "dtype", None) == np.float32 else np.float64
    times = host_times(ts)
    kept = np.arange(times.size)
    if jumps is not None:
        jumps = _within(jumps, times, precision)
        knots = np.union1d(times, jumps)
        requested, times = times, knots if times[-1] > times[0] else knots[::-1]
        kept = np.flatnonzero(np.isin(times, requested))
    gaps = np.diff(times)
    if dt0 is None:
        counts = np.ones(gaps.size, dtype=np.int64)
    else:
        if not is_concrete(dt0):
            raise ValueError("dt0 is traced, so it cannot choose a static number of steps: pass grid= instead.")
        dt0 = check_dt0(dt0, gaps[0])
        # Times that were rounded to their own precision must not cost an extra step.
        slack = 8 * np.finfo(precision).eps * np.abs(times).max() / abs(dt0) + 1e-12
        counts = np.maximum(1, np.ceil(gaps / dt0 - slack)).astype(np.int64)
    grid = cut(times, counts)
    grid = Grid(grid.left, grid.right, grid.live, grid.save[kept])
    if jumps is not None:
        grid = _off(grid, jumps)  # pyright: ignore[reportArgumentType]
    if num_steps is None:
        return grid
    return grid.pad(check_count(num_steps, "num_steps"))


def uniform(t0: float, t1: float, num_steps: int) -> Grid:
    """``num_steps`` equal steps from ``t0`` to ``t1``, saving both ends.

    Raises:
        ValueError: if ``num_steps`` is not a positive integer, or the times are equal or not finite.

    Example:
        >>> import sdeflow as sf
        >>> sf.grids.uniform(0.0, 1.0, 4).right.tolist()
        [0.25, 0.5, 0.75, 1.0]
    """
    return cut(host_times([t0, t1]), np.array([check_count(num_steps, "num_steps")]))


def subdivide(ts: Array, steps_per_interval: int) -> Grid:
    """Equal steps in every interval of ``ts``, which may be traced and may end in repeats of its last time.

    The steps of the repeated times are padding: dead rows that repeat the last live step.

    Arguments:
        ts: shape (n,), strictly monotone up to the repeats.
        steps_per_interval: how many steps between two requested times, a positive static integer.

    Raises:
        ValueError: if ``steps_per_interval`` is not a positive integer or ``ts`` is not of shape (n,), n >= 2.

    Example:
        >>> import jax.numpy as jnp, sdeflow as sf
        >>> grid = sf.grids.subdivide(jnp.array([0.0, 1.0, 1.0]), 2)
        >>> grid.left.tolist(), grid.live.tolist()
        ([0.0, 0.5, 0.5, 0.5], [True, True, False, False])
    """
    k = check_count(steps_per_interval, "steps_per_interval")
    ts = jnp.asarray(ts)
    if ts.ndim != 1 or ts.shape[0] < 2:
        raise ValueError(f"ts must be one-dimensional with at least two times, got shape {jnp.shape(ts)}.")
    gaps = ts[1:] - ts[:-1]
    fraction = jnp.asarray(np.arange(1, k) / k, ts.dtype)
    # A requested time is its own row's start, and no sum with zero: a field that is steep there, as sqrt(t) is at 0,
    # has an infinite derivative in it, and NaN would be that of the gap.
    begin = ts[:-1, None]
    left = jnp.concatenate([begin, begin + gaps[:, None] * fraction[None]], axis=1).reshape(-1)
    # The next row's left end is this row's right end to the last bit, and intervals end exactly on ts.
    right = jnp.concatenate([left[1:], ts[-1:]])
    live = jnp.repeat(gaps != 0, k)
    count = live.sum()
    last = jnp.maximum(count - 1, 0)
    left, right = jnp.where(live, left, left[last]), jnp.where(live, right, right[last])
    save = jnp.minimum(jnp.arange(ts.shape[0]) * k, count)
    return Grid(left, right, live, save)


def stack(grids: Sequence[Grid], num_steps: int | None = None) -> Grid:
    """Pad grids to one length and stack them, for use under ``jax.vmap``.

    Arguments:
        grids: concrete grids; fewer saved times than the most are made up by repeating the last.
        num_steps: the common number of rows; None takes the longest grid's.

    Raises:
        ValueError: if there is no grid, or one is longer than ``num_steps``.

    Example:
        >>> import sdeflow as sf
        >>> batch = sf.grids.stack([sf.grids.through([0, 1.0], 0.5), sf.grids.through([0, 2.0], 0.5)])
        >>> batch.left.shape
        (2, 4)
    """
    if not grids:
        raise ValueError("stack needs at least one grid.")
    rows = max(grid.num_rows for grid in grids) if num_steps is None else num_steps
    saves = max(grid.save.shape[0] for grid in grids)
    padded = [grid.pad(rows) for grid in grids]
    has_jump = any(grid.jump is not None for grid in padded)
    jumps = [np.zeros(rows, bool) if grid.jump is None else np.asarray(grid.jump) for grid in padded]
    at_end = [False if grid.ends_at_jump is None else bool(grid.ends_at_jump) for grid in padded]
    save = [np.pad(np.asarray(grid.save), (0, saves - grid.save.shape[0]), mode="edge") for grid in padded]
    return Grid(
        np.stack([np.asarray(grid.left) for grid in padded]),
        np.stack([np.asarray(grid.right) for grid in padded]),
        np.stack([np.asarray(grid.live) for grid in padded]),
        np.stack(save),
        np.stack(jumps) if has_jump else None,
        np.array(at_end) if has_jump else None,
    )
