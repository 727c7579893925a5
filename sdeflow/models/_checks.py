"""Checks that every model makes of its options."""

from typing import Any


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
