"""Ctrl-C between two steps, never within one: the buffers of a step in flight belong to nobody."""

import signal
import threading
from typing import Any


class Interrupts:
    """Within the ``with`` block the first SIGINT is held back until `check` is called; the second acts at
    once.

    Only Python's own handler is replaced, and only in the main thread; whoever has installed another one
    keeps it.
    """

    def __init__(self) -> None:
        self.pending = False
        self._installed = False

    def __enter__(self) -> "Interrupts":
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._handle)
            self._installed = True
        return self

    def __exit__(self, *args: Any) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self) -> None:
        """Raise the KeyboardInterrupt that was held back, if any."""
        if self.pending:
            self.pending = False
            raise KeyboardInterrupt

    def _handle(self, signum: int, frame: Any) -> None:
        if self.pending:
            raise KeyboardInterrupt
        self.pending = True
