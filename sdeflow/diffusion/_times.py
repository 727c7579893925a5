r"""Where a sampler steps: N + 1 times from noise to data, equally spaced in a coordinate of choice.

| grid | equal steps in |
|---|---|
| "logsnr" | log(alpha / sigma) |
| "t" | t |
| "quadratic" | sqrt(t) |
| "edm" | (sigma / alpha)^(1/7) (Karras et al., NeurIPS 2022) |

They are computed on the host in float64. A `sdeflow.grids.Grid` is taken as it is; traced, it can be learned.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from .._compat import is_concrete
from ..grids import Grid
from ..grids._build import check_count
from ._schedule import AbstractSchedule, module_of, number

GRIDS = ("logsnr", "t", "quadratic", "edm")
_POWER = 7.0


def coordinate(schedule: AbstractSchedule, grid: str, t: Any) -> Any:
    """The coordinate in which a grid has equal steps."""
    xp, t = module_of(t)
    if grid == "logsnr":
        return schedule.log_snr(t)
    if grid == "edm":
        return xp.exp(-schedule.log_snr(t) / _POWER)
    return xp.sqrt(t) if grid == "quadratic" else t


def time_at(schedule: AbstractSchedule, grid: str, u: Any) -> Any:
    """The time with this coordinate."""
    xp, u = module_of(u)
    if grid == "logsnr":
        return schedule.t_of_log_snr(u)
    if grid == "edm":
        return schedule.t_of_log_snr(-_POWER * xp.log(u))
    return u**2 if grid == "quadratic" else u


def between(schedule: AbstractSchedule, grid: str, s: Any, t: Any, fractions: Any) -> Any:
    """The times at these fractions of the way from s to t."""
    a, b = coordinate(schedule, grid, s), coordinate(schedule, grid, t)
    return time_at(schedule, grid, a + (b - a) * fractions)


def check_grid(grid: Any) -> None:
    """Refuse what is no grid.

    Raises:
        ValueError: for an unknown name.
        TypeError: for what is neither a name nor a grid.
    """
    if isinstance(grid, str):
        if grid not in GRIDS:
            known = " Karras' grid is 'edm'." if grid == "karras" else ""
            raise ValueError(f"grid must be one of {', '.join(map(repr, GRIDS))} or a Grid, got {grid!r}.{known}")
    elif not isinstance(grid, Grid):
        raise TypeError(
            f"grid must be one of {', '.join(map(repr, GRIDS))} or a Grid, such as sf.grids.subdivide(times, 1) of "
            f"decreasing times, got {type(grid).__name__}."
        )


def knots(schedule: AbstractSchedule, num_steps: int | None, grid: Any, t_end: Any, t_start: Any = None) -> Any:
    """The times between steps, N + 1 of them: a float64 NumPy array, or a traced one for a traced grid.

    Where the noise vanishes at ``t_end`` (log(alpha / sigma) is infinite) equal steps in t or sqrt(t) go all the way;
    on the other grids, whose coordinate is of no use there, the last step leads there from ``t_min``.

    Raises:
        ValueError: if the number of steps is missing or given twice, the end lies outside of the schedule, or the times
            of a grid do not decrease.
    """
    check_grid(grid)
    if isinstance(grid, Grid):
        return _given(schedule, num_steps, grid, t_end, t_start)
    if num_steps is None:
        raise ValueError(f"num_steps says how many steps there are on the grid {grid!r}: pass num_steps=, e.g. 20.")
    count = check_count(num_steps, "num_steps")
    start = schedule.t_max if t_start is None else number(t_start, "t_start")
    end = schedule.t_min if t_end is None else number(t_end, "t_end")
    if not 0 < start <= schedule.t_max:
        raise ValueError(f"t_start must be above 0 and at most t_max={schedule.t_max:g}, got {start:g}.")
    if not 0 <= end < start:
        name = "t_max" if t_start is None else "t_start"
        raise ValueError(f"t_end must lie between 0 and {name}={start:g}, got {end:g}.")
    clean = grid in ("logsnr", "edm") and noiseless(schedule, end)
    last = schedule.t_min if clean else end
    steps = count - 1 if clean else count
    if clean and not 0 < last < start:
        raise ValueError(f"there is no noise at t_end={end:g} and t_min={last:g}: give the schedule a positive t_min.")
    u0, u1 = (coordinate(schedule, grid, np.float64(t)) for t in (start, last))
    times = time_at(schedule, grid, np.linspace(u0, u1, steps + 1))
    # The ends as they were given, not through their coordinates and back.
    times[0] = start
    if steps:
        times[-1] = last
    return np.append(times, end) if clean else times


def sampling_grid(schedule: AbstractSchedule, num_steps: int, grid: str = "logsnr", t_end: float | None = None) -> Grid:
    """The times of a sampler as a `sdeflow.grids.Grid` that saves both ends: for `sdeflow.solve`, or to learn from.

    Arguments:
        schedule: of the noise.
        num_steps: how many steps.
        grid: "logsnr", "t", "quadratic" or "edm", what has equal steps.
        t_end: where to end, by default the schedule's ``t_min``.

    Raises:
        ValueError: for an unknown name or an end outside of the schedule.

    Example:
        >>> import sdeflow as sf
        >>> sf.diffusion.sampling_grid(sf.diffusion.Flow(), 3, "t", t_end=0.3).right.round(3).tolist()
        [0.766, 0.533, 0.3]
    """
    times = knots(schedule, num_steps, grid, t_end)
    return Grid(times[:-1], times[1:], np.ones(len(times) - 1, bool), np.array([0, len(times) - 1]))


def noiseless(schedule: AbstractSchedule, t: Any) -> bool:
    """Whether there is no noise at this time."""
    with np.errstate(divide="ignore"):
        return not np.isfinite(schedule.log_snr(np.float64(t)))


def _given(schedule: AbstractSchedule, num_steps: int | None, grid: Grid, t_end: Any, t_start: Any) -> Any:
    if any(x is not None for x in (num_steps, t_end, t_start)):
        raise ValueError(
            "a Grid says itself how many steps there are and where they begin and end: drop num_steps=, t_start= and "
            "t_end=."
        )
    if np.ndim(grid.left) != 1:
        raise ValueError("a batch of grids is for jax.vmap: sample takes one grid at a time.")
    if is_concrete(grid.live) and not np.asarray(grid.live).all():
        raise ValueError("sample takes a Grid without padding: make one by sf.grids.")
    if not is_concrete(grid.left, grid.right, grid.live):
        times = jnp.append(grid.left[:1], grid.right)
        # What would be an error outside of a trace is NaN within; a first time that is learned may pass t_max a little.
        right = jnp.all(grid.live) & jnp.all(times[1:] < times[:-1]) & (times[-1] >= 0)
        return times * jnp.where(right, 1, jnp.nan)
    times = np.append(np.asarray(grid.left[:1], np.float64), np.asarray(grid.right, np.float64))
    if not (np.diff(times) < 0).all():
        raise ValueError(
            f"times of a sampler decrease from t_max to t_end; step {int(np.argmax(np.diff(times) >= 0))} does not."
        )
    # The last digits of a time in single precision are not worth an error.
    if times[0] > schedule.t_max * (1 + 1e-6):
        raise ValueError(f"times of a sampler begin at t_max={schedule.t_max:g} at the latest, got {times[0]:g}.")
    if times[-1] < 0:
        raise ValueError(f"times of a sampler end at 0 at the earliest, got {times[-1]:g}.")
    return times


def drops_order(l: Any, clean: Any = False, ratio: float = 1.25) -> Any:
    """Whether the last steps of a multistep sampler should be of lower order on this grid: traced for a traced grid.

    So it is where the last step is longer in log(alpha / sigma) than the one before, as on a grid with equal steps in t
    or sqrt(t), or a few of Karras': a polynomial through far nodes would be extrapolated. Not where steps are even.

    Arguments:
        l: log(alpha / sigma) between steps.
        clean: whether there is no noise at the end, where l is infinite.
        ratio: how much longer the last step is then.
    """
    if len(l) < 3:
        return False
    # A little more, so that just as much longer is judged alike whatever the rounding.
    longer = abs(l[-1] - l[-2]) > (ratio + 1e-3) * abs(l[-2] - l[-3])
    return bool(longer or clean) if isinstance(l, np.ndarray) else longer | clean
