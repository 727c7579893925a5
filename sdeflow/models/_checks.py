"""Checks that every model makes of its options."""

import math
from typing import Any

import diffrax


def check_size(name: str, value: Any, least: int = 1) -> int:
    """An integer of at least ``least``.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")
    return value.__index__()


def check_mode(mode: Any) -> str:
    """One of the two parameterisations.

    Raises:
        ValueError: for anything else.
    """
    if mode not in ("pure", "benchmark"):
        raise ValueError(
            f'mode must be "pure" (what theorems cover) or "benchmark" (the published experiments), got {mode!r}.'
        )
    return mode


def check_noise(noise: Any) -> float:
    """A standard deviation.

    Raises:
        ValueError: unless it is positive and finite.
    """
    if not 0 < noise < math.inf:
        raise ValueError(f"noise must be positive and finite, got {noise!r}.")
    return float(noise)


def check_solver(solver: Any) -> diffrax.AbstractSolver:
    """A solver.

    Raises:
        TypeError: for anything else.
    """
    if not isinstance(solver, diffrax.AbstractSolver):
        raise TypeError(f"solver must be an instance of a diffrax solver, got {solver!r}.")
    return solver
