"""What is recorded while a model is trained: columns of numbers that grow by one row a step."""

import bisect
from collections.abc import Mapping

import numpy as np

_VALIDATION = "validation_"


class History:
    """Columns "step", "loss" and metrics, a row a step; after "validation_" likewise, a row an evaluation."""

    def __init__(self, columns: Mapping[str, np.ndarray] | None = None):
        self._columns: dict[str, list[float]] = {"step": [], "loss": []}
        for name, column in (columns or {}).items():
            self._columns[name] = np.asarray(column).tolist()

    @property
    def num_steps(self) -> int:
        """How many steps are recorded."""
        return len(self._columns["step"])

    def add_step(self, step: int, loss: float, metrics: Mapping[str, float]) -> None:
        """Record one step.

        Raises:
            ValueError: the metrics differ from those of the steps before, or one has a reserved name.
        """
        self._add("", step, loss, metrics)

    def add_validation(self, step: int, loss: float, metrics: Mapping[str, float]) -> None:
        """Record one evaluation, made after step ``step``."""
        self._add(_VALIDATION, step, loss, metrics)

    def drop_last_validation(self) -> None:
        """Forget the last evaluation."""
        for name, column in self._columns.items():
            if name.startswith(_VALIDATION) and column:
                column.pop()

    def arrays(self, before: int | None = None) -> dict[str, np.ndarray]:
        """All columns, float64 but for the int64 steps; only the rows of steps ``< before`` if given."""
        out = {}
        for name, column in self._columns.items():
            steps = self._columns[_VALIDATION + "step" if name.startswith(_VALIDATION) else "step"]
            rows = len(steps) if before is None else bisect.bisect_left(steps, before)
            out[name] = np.asarray(column[:rows], np.int64 if name in ("step", _VALIDATION + "step") else np.float64)
        return out

    def _add(self, prefix: str, step: int, loss: float, metrics: Mapping[str, float]) -> None:
        reserved = [m for m in metrics if m in ("step", "loss") or m.startswith(_VALIDATION)]
        if reserved:
            raise ValueError(f"The loss returned a metric named {reserved[0]!r}; that name is taken, choose another.")
        row = {prefix + name: value for name, value in {"step": step, "loss": loss, **metrics}.items()}
        known = {name for name in self._columns if name.startswith(_VALIDATION) == bool(prefix)}
        if known != row.keys() and self._columns.get(prefix + "step"):
            before = sorted(name.removeprefix(prefix) for name in known - {prefix + "step", prefix + "loss"})
            raise ValueError(
                f"The loss returned the metrics {sorted(metrics)} at step {step} but {before} before; "
                "return the same ones at every step."
            )
        for name, value in row.items():
            self._columns.setdefault(name, []).append(value)
