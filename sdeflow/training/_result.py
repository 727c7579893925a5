"""What `fit` gives back, ``FitResult``, and what it tells its callbacks, ``Event``."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from ._step import fresh


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class FitResult:
    """The outcome of `fit`.

    Arguments:
        model: the best model by validation loss if there was validation data, else the last one.
        history: a dict of NumPy arrays with a row a step: "step" (the index k that the loss saw), "loss", and
            every metric of the loss; and with a row an evaluation: "validation_step", "validation_loss" and
            so on.
        result: a member of `sdeflow.RESULTS`: successful, nonfinite_loss or interrupted.
        num_steps: the number of steps done.
        message: why training ended, in one sentence.
        best_step: the step after which ``model`` was taken, None if there was no validation.
        failure: the "step", "epoch", "position" in the epoch and "ids" of the batch whose loss was not
            finite, or None.
    """

    model: PyTree
    history: dict[str, np.ndarray]
    result: Any
    num_steps: int
    message: str
    best_step: int | None = None
    failure: dict[str, Any] | None = None

    def __repr__(self) -> str:
        lines = [self.message]
        loss = self.history["loss"]
        if len(loss):
            lines.append(f"loss             {loss[0]:.4g} -> {loss[-1]:.4g}")
        scores = self.history.get("validation_loss", np.empty(0))
        if len(scores):
            text = f"validation loss  {scores[0]:.4g} -> {scores[-1]:.4g}"
            if self.best_step is not None:
                at = int(np.flatnonzero(self.history["validation_step"] == self.best_step)[0])
                text += f", best {scores[at]:.4g} after step {self.best_step}"
            lines.append(text)
        metrics = [n for n in self.history if n not in ("step", "loss") and not n.startswith("validation_")]
        lines += [f"{name:<16} {self.history[name][-1]:.4g}" for name in metrics if len(self.history[name])]
        return "FitResult(\n" + "".join(f"  {line}\n" for line in lines) + ")"


@dataclasses.dataclass(frozen=True, eq=False)
class Event:
    """What a callback is told after a step.

    Arguments:
        step: the index k of the step just done, 0, 1, ...
        loss: its loss.
        metrics: its metrics.
        model: the model after it, a copy that is yours to keep. Read it within the callback: the memory that
            it is copied from goes to the next step.
    """

    step: int
    loss: float
    metrics: Mapping[str, float]
    _params: PyTree = dataclasses.field(repr=False)
    _static: PyTree = dataclasses.field(repr=False)

    @property
    def model(self) -> PyTree:
        """The model after this step."""
        if any(x.is_deleted() for x in jtu.tree_leaves(self._params) if isinstance(x, jax.Array)):
            raise RuntimeError(
                f"event.model of step {self.step} was read after its callback had ended; read it within."
            )
        return eqx.combine(fresh(self._params), self._static)
