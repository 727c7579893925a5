"""What a path given by the user must be able to answer, checked before anything runs."""

from typing import Any

import diffrax
import numpy as np

from .._compat import is_concrete
from ..grids import Grid
from ..paths import GridBrownian
from ..paths._grid_brownian import LEVY_AREAS
from ..walking import asks_within
from ._choose import levy_area_for


def check_path(path: Any, solver: diffrax.AbstractSolver, ts: Any, grid: Grid | None) -> None:
    """Refuse a path that the solver cannot use, that ends too early, or that is too coarse for the steps.

    Arguments:
        grid: the steps, if they are fixed. What is traced is not checked.

    Raises:
        TypeError: if it is not a diffrax path.
        ValueError: if it lacks the Levy area that the solver needs, does not cover ``ts``, or is a
            ``VirtualBrownianTree`` whose tolerance is more than half of the shortest step.
    """
    if not isinstance(path, diffrax.AbstractPath):
        raise TypeError(f"path must be a diffrax path such as sf.paths.GridBrownian(...), got {type(path).__name__}.")
    kind = type(path).__name__
    if asks_within(solver) and isinstance(path, GridBrownian):
        raise ValueError(
            "HalfSolver asks for halves of its steps, which a GridBrownian does not know: pass key= instead, or "
            "path=diffrax.VirtualBrownianTree(...)."
        )
    area, needed = getattr(path, "levy_area", None), levy_area_for(solver)
    if area in LEVY_AREAS and LEVY_AREAS.index(area) < LEVY_AREAS.index(needed):
        raise ValueError(
            f"{type(solver).__name__} needs levy_area=diffrax.{needed.__name__}, but the {kind} has "
            f"{area.__name__}: build the path with that levy_area."
        )
    ends: Any = (getattr(path, "t0", None), getattr(path, "t1", None))
    if any(x is None for x in ends) or not is_concrete(ts, *ends) or np.ndim(ends[0]) != 0:
        return
    low, high = sorted((float(ends[0]), float(ends[1])))
    times = np.asarray(ts, np.float64)
    slack = 1e-5 * np.ptp(times)
    if times.min() < low - slack or times.max() > high + slack:
        raise ValueError(
            f"The {kind} covers times from {low:g} to {high:g}, but ts runs from {times[0]:g} to {times[-1]:g}: build "
            "it to cover all of ts."
        )
    if (
        isinstance(path, diffrax.VirtualBrownianTree)
        and grid is not None
        and is_concrete(path.tol)
        and grid.is_concrete
    ):
        shortest = float(np.abs(np.asarray(grid.right) - np.asarray(grid.left)).min())
        shortest = shortest / 2 if asks_within(solver) else shortest
        # The tree keeps its tolerance as a fraction of the interval that it covers.
        tol = float(path.tol) * (high - low)
        if tol > shortest / 2 * (1 + 1e-5):
            raise ValueError(
                f"The VirtualBrownianTree's tol={tol:g} is more than half of the shortest step "
                f"{shortest:g}, so its increments would have the wrong statistics: make tol smaller."
            )
