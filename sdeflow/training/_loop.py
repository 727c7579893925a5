"""The host side of training: epochs, validation, patience. The arithmetic is in ``_step``."""

import collections
import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from .._compat import SdeflowWarning
from ._history import History
from ._interrupts import Interrupts
from ._progress import Progress
from ._result import Event
from ._rows import field
from ._saving import Standing, save
from ._step import Fixed, TrainState, batch_size, batch_weights, evaluate, fresh, to_arrays, train_step

# How many steps may be under way before the host waits for the oldest; so also how late a nonfinite loss is
# noticed.
LAG = 32


@dataclasses.dataclass(frozen=True)
class Plan:
    """The checked arguments of `fit` that the loop needs."""

    data: Any
    validation: Any
    steps: int
    batch_size: int
    key: PRNGKeyArray
    key_data: PRNGKeyArray
    key_validation: PRNGKeyArray
    patience: int | None
    callbacks: tuple[Callable[[Event], Any], ...]
    checkpoint: Path | None
    checkpoint_every: int
    validate_every: int | None
    validate_at: int
    resume: str = "same"


@dataclasses.dataclass(frozen=True)
class _Ahead:
    """A step that was dispatched and whose loss has not been read."""

    step: int
    epoch: int
    position: int
    ids: Any
    report: dict[str, Any]


class Loop:
    """A run of `fit`: mutable, private, and gone when `fit` returns."""

    def __init__(
        self,
        plan: Plan,
        fixed: Fixed,
        state: TrainState,
        untrained: PyTree,
        progress: Progress,
        interrupts: Interrupts,
    ):
        self.plan, self.fixed, self.state = plan, fixed, state
        # The leaves that are not trained, as the caller gave them: what is returned and saved.
        self.untrained = untrained
        self.identity: dict[str, Any] = {}
        self.progress, self.interrupts = progress, interrupts
        self.history = History()
        self.step = self.epoch = self.position = 0
        self.best: PyTree = None
        self.best_value, self.best_step, self.stale = math.inf, None, 0
        self.validated_step = -1
        # What these were before the evaluation after the last step, which a longer run would not make there.
        self.before_last: Standing | None = None
        self.stop = ""
        self.failure: _Ahead | None = None
        self.saved: tuple[int, ...] | None = None
        self.save_error: OSError | None = None
        self.keep_previous = True
        self._warned_of_validation = False
        self._ahead: collections.deque[_Ahead] = collections.deque()

    # ---------------------------------------------------------------------------------------------- training

    def train(self) -> None:
        """Step until all steps are done, a callback or patience says stop, or the loss is nonfinite."""
        plan = self.plan
        if self.step:
            self._validate_if_due()
        while not self._done():
            batches = self._open_epoch()
            for batch in batches:
                self._advance(batch)
                if self._done():
                    break
            else:
                self._end_epoch()
        self.drain()
        if plan.validation is not None and self.failure is None and self.step and self._unvalidated():
            self.before_last = Standing(self.best, self.best_value, self.best_step, self.stale, self.validated_step)
            self.validate()

    def mark(self) -> tuple[int, ...]:
        """What changes whenever there is something new to save."""
        return self.step, self.validated_step, self.epoch, self.position

    def _done(self) -> bool:
        return bool(self.stop) or self.failure is not None or self.step >= self.plan.steps

    def _open_epoch(self) -> Iterator[PyTree]:
        """The batches of this epoch that have not been used yet."""
        batches = _batches(self.plan.data, self.plan.batch_size, jax.random.fold_in(self.plan.key_data, self.epoch))
        used = sum(1 for _ in itertools.islice(batches, self.position))
        if used < self.position:
            raise ValueError(
                f"data.batches yielded {used} batches in epoch {self.epoch}, but {self.position} had been "
                "used when the checkpoint was written; give the same data, or delete the checkpoint."
            )
        return batches

    def _end_epoch(self) -> None:
        if self.position == 0:
            raise ValueError(
                f"data.batches({self.plan.batch_size}) yielded no batch in epoch {self.epoch}; "
                "give data with at least one series and a smaller batch_size."
            )
        if self.plan.validate_every is None and self._unvalidated():
            self._validate_unless_failed()
        if self.failure is None:
            self.epoch, self.position = self.epoch + 1, 0

    def _advance(self, batch: PyTree) -> None:
        self.state, report = train_step((self.fixed, to_arrays(batch)), self.state)
        ids = field(batch, "ids")
        self._ahead.append(_Ahead(self.step, self.epoch, self.position, ids, report))
        self.step, self.position = self.step + 1, self.position + 1
        self.drain(0 if self.plan.callbacks else LAG)
        if self.failure is not None:
            return
        if self.plan.callbacks:
            self._call_back(jax.device_get(report))
        self._validate_if_due()
        if self.plan.checkpoint and self.failure is None and self.step % self.plan.checkpoint_every == 0:
            self.drain()
            save(self)
        self.interrupts.check()

    def drain(self, most: int = 0) -> None:
        """Read the losses that are ready, and wait until at most ``most`` are not."""
        ahead = self._ahead
        while ahead and (len(ahead) > most or _is_ready(ahead[0].report)):
            first = ahead.popleft()
            report = jax.device_get(first.report)
            loss = float(report["loss"])
            self.history.add_step(first.step, loss, _floats(report["metrics"]))
            self.progress.update(first.step + 1, loss)
            if report["failed"]:
                self.failure = first
                ahead.clear()
                # The steps after it changed nothing, and will be done again when training is resumed.
                self.step, self.epoch, self.position = first.step, first.epoch, first.position

    def _call_back(self, report: dict[str, Any]) -> None:
        event = Event(
            self.step - 1,
            float(report["loss"]),
            _floats(report["metrics"]),
            self.state.params,
            self.untrained,
        )
        for callback in self.plan.callbacks:
            name = getattr(callback, "__name__", type(callback).__name__)
            if _asks_to_stop(callback(event), name) and not self.stop:
                self.stop = f"{name} asked to stop"

    # -------------------------------------------------------------------------------------------- validation

    def _unvalidated(self) -> bool:
        return self.plan.validation is not None and self.validated_step != self.step - 1

    def _validate_if_due(self) -> None:
        every = self.plan.validate_every
        if every is not None and self.step % every == 0 and self._unvalidated():
            self._validate_unless_failed()
        self._check_patience()

    def _validate_unless_failed(self) -> None:
        self.drain()
        if self.failure is None:
            self.validate()

    def validate(self) -> None:
        """Score the validation data, keep the best parameters, count evaluations without improvement."""
        loss, metrics = self._score_validation()
        step = self.step - 1
        self.history.add_validation(step, loss, metrics)
        if loss < self.best_value:  # never true of NaN
            self.best, self.best_value, self.best_step, self.stale = fresh(self.state.params), loss, step, 0
        elif math.isfinite(loss):
            # A score that is not finite says nothing about progress; `fit` warns of it instead.
            self.stale += 1
        self.validated_step = step
        self._check_patience()

    def _warn_of_validation(self, bad: list[int], count: int) -> None:
        if self._warned_of_validation:
            return
        self._warned_of_validation = True
        shown = f"batch {bad[0]}" if len(bad) == 1 else f"{len(bad)} batches, the first of them batch {bad[0]},"
        warnings.warn(
            f"The validation loss after {self.step} steps is not finite in {shown} of {count}: look for NaN or "
            "infinite values there. Such a score is neither the best nor counted by patience.",
            SdeflowWarning,
            stacklevel=6,
        )

    def _check_patience(self) -> None:
        if self.plan.patience is not None and self.stale >= self.plan.patience and not self.stop:
            self.stop = f"no better validation loss in {self.stale} evaluations"

    def _score_validation(self) -> tuple[float, dict[str, float]]:
        plan = self.plan
        step = jnp.asarray(plan.validate_at, jnp.int32)
        scores, sizes = [], []
        with warnings.catch_warnings():
            # Less validation data than one batch is no mistake.
            warnings.simplefilter("ignore", SdeflowWarning)
            batches = _batches(plan.validation, plan.batch_size, plan.key_validation)
        for index, batch in enumerate(batches):
            key = jax.random.fold_in(plan.key_validation, index)
            arrays = to_arrays(batch)
            scores.append(evaluate(self.fixed, self.state.params, arrays, key, step))
            sizes.append(batch_size(arrays))
            self.interrupts.check()
        weights = batch_weights(sizes)
        total = math.fsum(weights)
        if total <= 0:
            raise ValueError(
                f"The validation data yielded {len(weights)} batches of total weight {total}; give at least one row."
            )
        scores = jax.device_get(scores)
        bad = [i for i, ((value, _), w) in enumerate(zip(scores, weights)) if w > 0 and not np.isfinite(value)]
        if bad:
            self._warn_of_validation(bad, len(scores))
        pairs = [(pair, w) for pair, w in zip(scores, weights) if w > 0]
        names = pairs[0][0][1]
        metrics = {n: math.fsum(w * float(found[n]) for (_, found), w in pairs) / total for n in names}
        return math.fsum(w * float(value) for (value, _), w in pairs) / total, metrics


def _asks_to_stop(answer: Any, name: str) -> bool:
    """Read a callback's answer: None or a truth value, of Python, NumPy or JAX."""
    if answer is None:
        return False
    value = np.asarray(answer) if isinstance(answer, bool | int | np.generic | np.ndarray | jax.Array) else None
    if value is None or value.shape != () or value.dtype.kind not in "biu" or value not in (0, 1):
        raise TypeError(f"The callback {name} returned {answer!r}; return True to stop, or False or None to go on.")
    return bool(value)


def _is_ready(report: dict[str, Any]) -> bool:
    return report["loss"].is_ready()


def _batches(data: Any, size: int, key: PRNGKeyArray) -> Iterator[PyTree]:
    return iter(data.batches(size, key=key))


def _floats(metrics: dict[str, Array]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}
