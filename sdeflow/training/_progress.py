"""The progress of a fit on stderr: a tqdm bar, or a line now and then."""

import sys
import time
from typing import Any, Protocol

_SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """What `fit` tells about its progress."""

    def update(self, steps: int, loss: float) -> None:
        """``steps`` have been done in all; the last of them had this loss."""

    def close(self) -> None:
        """No more will come."""


def make_progress(wanted: bool, total: int, done: int) -> Progress:
    """A bar if tqdm is installed, else lines; silence if not ``wanted``."""
    if not wanted:
        return _Silent()
    try:
        from tqdm import tqdm
    except ImportError:
        return _Lines(total)
    return _Bar(tqdm(total=total, initial=done, unit="step", file=sys.stderr))


class _Silent:
    def update(self, steps: int, loss: float) -> None:
        """Say nothing."""

    def close(self) -> None:
        """Say nothing."""


class _Bar:
    def __init__(self, bar: Any):
        self._bar = bar

    def update(self, steps: int, loss: float) -> None:
        """Move the bar."""
        self._bar.set_postfix_str(f"loss {loss:.4g}", refresh=False)
        self._bar.update(steps - self._bar.n)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


class _Lines:
    def __init__(self, total: int):
        self._total = total
        self._last = time.monotonic()

    def update(self, steps: int, loss: float) -> None:
        """Write a line if the last one is long ago, or if this is the end."""
        now = time.monotonic()
        if now - self._last >= _SECONDS_BETWEEN_LINES or steps == self._total:
            sys.stderr.write(f"step {steps} of {self._total}, loss {loss:.4g}\n")
            self._last = now

    def close(self) -> None:
        """Nothing is left open."""
