"""How every job ends: with a picture, where there is matplotlib, and the time it took; or with a sentence of advice."""

import importlib.util
import time
from collections.abc import Callable
from pathlib import Path


class InputError(Exception):
    """What a user can set right, in one sentence."""


def finished(start: float, path: Path, draw: Callable[[], None]) -> str:
    """Draw the figure, and say where it is or how to get one."""
    ending = f"The figure: {path}"
    if importlib.util.find_spec("matplotlib") is None:
        ending = 'No figure was drawn, for matplotlib is missing: pip install "sdeflow[plot]".'
    else:
        draw()
    return f"Done in {time.perf_counter() - start:.0f} s. {ending}"
