"""``default_sampler``: the solver and the grid that `sample` takes where none are named.

They were chosen by the errors of some 120 combinations on random mixtures of Gaussians, under each kind of schedule and
for 5 to 50 evaluations; ``python -m benchmarks sampler_defaults`` ranks them on other mixtures.
"""

from typing import Any

import numpy as np

from ..grids._build import check_count
from ._multistep import Multistep
from ._presets import UniPC, iPNDM
from ._schedule import AbstractSchedule
from ._times import check_grid

# From how many steps on the solvers with a corrector are better, and where steps in log(alpha / sigma) are best.
_MANY, _MANY_EVEN = 15, 9
# Up to where Karras' steps are better than equal ones in log(alpha / sigma) where data is not scaled.
_VERY_FEW = 7


def default_sampler(schedule: AbstractSchedule, num_steps: int | None, grid: Any = None) -> tuple[Multistep, Any]:
    """Choose the solver and the grid that `sample` takes by default.

    Arguments:
        schedule: of the noise.
        num_steps: how many steps, which is how many evaluations; None for a `sdeflow.grids.Grid`.
        grid: a grid to go with; None to choose one.

    Returns:
        The solver and the grid.

    Raises:
        ValueError: if the number of steps is missing or none, or the grid is unknown.

    Example:
        >>> import sdeflow as sf
        >>> solver, grid = sf.diffusion.default_sampler(sf.diffusion.VP(), 10)
        >>> grid, solver == sf.diffusion.iPNDM(3)
        ('quadratic', True)
    """
    if grid is not None:
        check_grid(grid)
    if num_steps is not None:
        count = check_count(num_steps, "num_steps")
    elif grid is None or isinstance(grid, str):
        raise ValueError("num_steps says how many evaluations there are: pass num_steps=, e.g. 10.")
    else:
        count = np.shape(grid.left)[-1]
    kind = _kind(schedule)
    few = count < (_MANY_EVEN if kind == "even" else _MANY)
    best = {
        "exploding": "edm" if count < _VERY_FEW else "logsnr",
        "even": "logsnr",
        "preserving": "quadratic",
        "straight": "t" if few else "quadratic",
    }[kind]
    if schedule.ends_without_signal or (kind == "straight" and not few):
        # Of data, which is what may start from pure noise.
        solver = UniPC(2 if few else 3, lower_order_final=True)
    else:
        solver = iPNDM(3) if few else UniPC(3, reads="noise", lower_order_final=True)
    return solver, best if grid is None else grid


def _kind(schedule: AbstractSchedule) -> str:
    """How much of the data half of the time leaves.

    As much as there is noise, as in flows and cosines ("straight"); far less ("preserving"); or, as in the tables of
    latent models, less ("even": equal steps in log(alpha / sigma) are best). Or data is never scaled ("exploding").
    """
    half = np.float64(schedule.t_max / 2)
    if schedule.log_alpha(half) == 0:
        return "exploding"
    middle = schedule.log_snr(half)
    return "straight" if middle > -0.25 else "even" if middle > -0.8 else "preserving"
