"""What a path given by the user must be able to answer, checked before anything runs."""

from typing import Any

import diffrax
import jax.tree_util as jtu
import numpy as np

from .._compat import is_concrete
from ..adjoints._jump_times import declared_jumps
from ..grids import Grid
from ..paths import AbstractControl, GridBrownian
from ..paths._grid_brownian import LEVY_AREAS
from ..walking import asks_otherwise
from ._choose import levy_area_for


def check_path(
    path: Any, solver: diffrax.AbstractSolver, ts: Any, grid: Grid | None, *, adaptive: bool, dt0: Any
) -> None:
    """Refuse a path that the solver cannot use, that ends too early, or that is too coarse for the steps.

    Arguments:
        grid: the steps, if they are fixed. What is traced is not checked.
        adaptive: whether the steps adapt.
        dt0: the first step of adaptive ones, if it is given.

    Raises:
        TypeError: if it is not a diffrax path.
        ValueError: if it lacks the Levy area that the solver needs, knows other steps only, does not cover ``ts``, or
            is a ``VirtualBrownianTree`` whose tolerance is more than half of the shortest step.
    """
    if not isinstance(path, diffrax.AbstractPath):
        raise TypeError(f"path must be a diffrax path such as sf.paths.GridBrownian(...), got {type(path).__name__}.")
    kind = type(path).__name__
    if adaptive and isinstance(path, GridBrownian | diffrax.UnsafeBrownianPath):
        knows = "knows the steps of its grid only" if isinstance(path, GridBrownian) else "cannot take a step again"
        raise ValueError(
            f"Adaptive steps need noise that can be asked anywhere, but the {kind} {knows}: pass key= instead, or "
            "path=diffrax.VirtualBrownianTree(...)."
        )
    asked = asks_otherwise(solver)
    if asked and isinstance(path, GridBrownian):
        raise ValueError(
            f"{type(solver).__name__} asks for {asked}, which a GridBrownian does not know: pass key= instead, or "
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
    slack = 1e-5 * np.ptp(times) + 8 * np.spacing(np.abs(times).max().astype(np.float32))
    if times.min() < low - slack or times.max() > high + slack:
        raise ValueError(
            f"The {kind} covers times from {low:g} to {high:g}, but ts runs from {times[0]:g} to {times[-1]:g}: build "
            "it to cover all of ts."
        )
    if isinstance(path, GridBrownian) and grid is not None and grid.is_concrete and path.grid.is_concrete:
        _check_rows(path.grid, grid)
    steps = None if grid is None or not grid.is_concrete else np.asarray(grid.right) - np.asarray(grid.left)
    if steps is None and dt0 is not None and is_concrete(dt0):
        steps = np.asarray(dt0)
    if isinstance(path, diffrax.VirtualBrownianTree) and steps is not None and is_concrete(path.tol):
        shortest = float(np.abs(steps).min())
        shortest = shortest / 2 if asked else shortest
        # The tree keeps its tolerance as a fraction of the interval that it covers.
        tol = float(path.tol) * (high - low)
        if tol > shortest / 2 * (1 + 1e-5):
            raise ValueError(
                f"The VirtualBrownianTree's tol={tol:g} is more than half of the shortest step "
                f"{shortest:g}, so its increments would have the wrong statistics: make tol smaller."
            )


def looks_ahead(solver: Any) -> float:
    """How far beyond the end of a step a solver evaluates the field, in steps; 0 for most.

    Kvaerno4 and Kvaerno5 have a stage there, .15 and .23 of a step late.
    """
    inner = getattr(solver, "solver", None)
    if isinstance(inner, diffrax.AbstractSolver):
        return looks_ahead(inner)
    places = getattr(getattr(solver, "tableau", None), "c", None)
    return 0.0 if places is None else max(float(np.max(np.asarray(places), initial=0.0)) - 1, 0.0)


def check_sides(solver: Any, grid: Grid | None, controller: Any, tree: Any, ts: Any) -> None:
    """Refuse a solver that looks beyond the end of a step where the field is another one there, or none.

    Arguments:
        grid: the fixed steps, None if they adapt.
        controller: of adaptive steps; it may know of jumps.
        tree: where controls may be, such as the arguments of the drift.

    Raises:
        ValueError: naming the solver and what can be used.
    """
    ahead = looks_ahead(solver)
    if ahead < 1e-9:
        return
    name = type(solver).__name__
    cure = "use a solver that does not, such as diffrax.Kvaerno3() or diffrax.Tsit5()"
    jumps = bool(declared_jumps(controller)) if grid is None else grid.may_jump
    if jumps:
        raise ValueError(
            f"{name} evaluates the field {ahead:.2g} of a step beyond its end, which is on the other side of a "
            f"declared jump: {cure}."
        )
    if grid is None or not grid.is_concrete:
        return
    left, right = (np.asarray(x, np.float64)[np.asarray(grid.live)] for x in (grid.left, grid.right))
    if right.size == 0:
        return
    furthest = float((right + ahead * (right - left))[-1])
    is_control = lambda x: isinstance(x, AbstractControl)
    for control in jtu.tree_leaves(tree, is_leaf=is_control):
        if is_control(control) and control.extrapolate == "error" and is_concrete(control.times, ts):
            low, high = float(control.t0), float(control.t1)
            slack = 1e-6 * max(abs(low), abs(high))
            if not low - slack <= furthest <= high + slack and low - slack <= right[-1] <= high + slack:
                raise ValueError(
                    f"{name} evaluates the field {ahead:.2g} of a step beyond its end, where the "
                    f'{type(control).__name__} has no values: build it with extrapolate="flat", or {cure}.'
                )


def controls_cut_short(tree: Any, ts: Any) -> str:
    """A sentence about data that ends before the solve does, which makes NaN of the solution; empty if there is none.

    Arguments:
        tree: where controls may be, such as the arguments of the drift.
    """
    is_control = lambda x: isinstance(x, AbstractControl)
    for control in jtu.tree_leaves(tree, is_leaf=is_control):
        if is_control(control) and control.extrapolate == "error" and is_concrete(control.times, ts):
            low, high = float(control.t0), float(control.t1)
            times = np.asarray(ts, np.float64)
            if times.min() < low or times.max() > high:
                return (
                    f" A {type(control).__name__} covers times from {low:g} to {high:g}, but ts runs from "
                    f'{times[0]:g} to {times[-1]:g}: use extrapolate="flat" to hold its ends.'
                )
    return ""


def _check_rows(known: Grid, grid: Grid) -> None:
    """Check that every step is one of those that a ``GridBrownian`` knows, as it finds them itself."""
    lows, highs = (np.sort(x) for x in _ends(known))
    low, high = _ends(grid)
    index = np.clip(np.searchsorted(lows, (low + high) / 2, side="right") - 1, 0, lows.size - 1)
    quarter = (highs - lows)[index] / 4
    other = (np.abs(low - lows[index]) > quarter) | (np.abs(high - highs[index]) > quarter)
    if other.any():
        i = int(np.argmax(other))
        raise ValueError(
            f"The GridBrownian knows the steps of its own grid, {known!r}, and none from {low[i]:g} to {high[i]:g}: "
            "drop dt0= or steps_per_interval=, or build the path on the grid of the solve."
        )


def _ends(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    left, right = np.asarray(grid.left, np.float64), np.asarray(grid.right, np.float64)
    live = np.asarray(grid.live)
    return np.minimum(left, right)[live], np.maximum(left, right)[live]
