"""``fit``: train any model on any data with any loss."""

import contextlib
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import PRNGKeyArray, PyTree

from .._compat import SdeflowWarning
from .._results import RESULTS, message_of
from ._file import check_writable, locate
from ._interrupts import Interrupts
from ._loop import Loop, Plan
from ._progress import make_progress
from ._recognise import recognised
from ._result import Event, FitResult
from ._saving import is_torn, save, take_up
from ._step import start
from ._sum import name_of

_IDS_SHOWN = 16


def fit(
    model: PyTree,
    data: Any,
    loss: Callable[..., Any],
    *,
    optim: optax.GradientTransformation,
    steps: int,
    batch_size: int,
    key: PRNGKeyArray,
    validation: Any = None,
    patience: int | None = None,
    callbacks: Sequence[Callable[[Event], Any]] = (),
    checkpoint: str | Path | None = None,
    progress: bool = True,
    validate_every: int | None = None,
    validate_at: int = 10**9,
    checkpoint_every: int | None = None,
    skip_nonfinite: int = 0,
    resume: Literal["same", "anyway"] = "same",
) -> FitResult:
    r"""Minimise a loss over the floating-point arrays of a model.

    Step k = 0, 1, ... takes the next batch b of the data and moves the parameters by the optimiser's answer
    to ``grad loss(model, b, fold_in(key_loss, k), k)``. Epoch e shuffles with ``fold_in(key_data, e)``. The
    two keys and the one of validation are ``fold_in(key, 0)``, ``1`` (data) and ``2``: everything is a
    function of (key, k).

    The step is compiled once for each shape of batch. A step whose loss, gradient or new parameters are not
    finite changes nothing; training stops there, unless ``skip_nonfinite`` allows for it.

    Arguments:
        model: any pytree; its floating-point arrays are trained. It is not changed.
        data: any object whose ``.batches(size, key=key)`` yields one epoch of batches: pytrees of NumPy
            arrays. A batch that has ``ids`` is named by them in messages.
        loss: ``loss(model, batch, key, step) -> (scalar, dict of scalar metrics)``.
        optim: an optax optimiser.
        steps: how many steps to do, those of a resumed checkpoint included.
        batch_size: passed on to ``data.batches``.
        key: one PRNG key.
        validation: data like ``data``, scored with the same loss, in inference mode, always with the same
            keys and with the weights that the loss has at step ``validate_at``. A score is the mean over batches,
            each weighted by the sum of its ``weight`` (by its rows if it has none; arrays of one length that
            all batches share, such as a grid of times, are no rows). A score that is not finite is warned of,
            and is neither the best nor counted by ``patience``; if none is finite, the result says so.
        patience: stop after this many evaluations without a better validation loss.
        callbacks: called with an `Event` after every step; True from one of them (a truth value of Python, NumPy
            or JAX) stops training. A loop with callbacks waits for each step's loss.
        checkpoint: a file to save to and, if it exists, to resume from: the result is bitwise that of a run
            that was never stopped. Read a trained model back with ``load_checkpoint(path, model,
            part="best")`` (or "last").
        progress: a tqdm bar (or lines where tqdm is missing) on stderr.
        validate_every: steps between evaluations; once an epoch if None, and always after the last step.
        validate_at: the step whose weights the validation loss has, where weights follow a schedule. By default one by
            which schedules have ended, so that all evaluations can be compared, those of an extended run too.
        checkpoint_every: steps between saves; a tenth of ``steps`` if None, but at most 1000.
        skip_nonfinite: how many nonfinite steps in a row to skip before giving up.
        resume: "same" refuses a checkpoint of another run: other data (by their ``fingerprint()``, else by their first
            batch), another loss (its code, and what it closes over), optimiser, key or start, or other leaves that are
            not trained. "anyway" goes on from it all the same.

    Returns:
        A `FitResult`. Ctrl-C saves the state and returns what there is, with ``RESULTS.interrupted``; a
        nonfinite loss returns the parameters before it (the best, with validation), with
        ``RESULTS.nonfinite_loss`` and a `SdeflowWarning` that names step and batch.

    Raises:
        TypeError: the optimiser, the data, the key or what the loss returns is not what is described above.
        ValueError: a number is out of range, the model has nothing to train or starts from NaN, the data
            yields no batch, or the checkpoint belongs to another run (a `CheckpointError` that says what
            differs).
        OSError: the checkpoint cannot be written there; at the start, or at the end if no save ever succeeded
            (then the error's ``fit`` attribute holds the result).

    An exception of the data, the loss or a callback is passed on after the state was saved.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from sdeflow.training import fit
        >>> class Numbers:
        ...     def batches(self, size, key):
        ...         yield jnp.full(size, 3.0)
        >>> result = fit(
        ...     jnp.zeros(()), Numbers(), lambda w, batch, key, step: (jnp.mean((w - batch) ** 2), {}),
        ...     optim=optax.sgd(0.1), steps=50, batch_size=4, key=jax.random.key(0), progress=False,
        ... )
        >>> round(float(result.model), 3), len(result.history["loss"])
        (3.0, 50)
    """
    steps = _count("steps", steps, least=0)
    batch_size = _count("batch_size", batch_size)
    skip_nonfinite = _count("skip_nonfinite", skip_nonfinite, least=0)
    optim = recognised(optim, _check_optim)
    loss = recognised(loss, _check_loss)
    _check_model(model)
    _check_key(key)
    if resume not in ("same", "anyway"):
        raise ValueError(f'fit was given resume={resume!r}; give "same" or "anyway".')
    for name, source in (("data", data), ("validation", validation)):
        if not callable(getattr(source, "batches", None)) and not (name == "validation" and source is None):
            raise TypeError(f"fit was given {name}={_type(source)}; it needs a method `.batches(size, key)`.")
    if validation is None and (patience is not None or validate_every is not None):
        raise ValueError("fit was given patience= or validate_every= without validation=; give validation data.")
    if callable(callbacks) or not all(callable(callback) for callback in callbacks):
        raise TypeError(f"fit was given callbacks={callbacks!r}; give a list of callables of one `Event`.")
    path = None if checkpoint is None else locate(checkpoint)
    if path is not None:
        check_writable(path)

    key_loss, key_data, key_validation = (jax.random.fold_in(key, i) for i in range(3))
    plan = Plan(
        data,
        validation,
        steps,
        batch_size,
        key,
        key_data,
        key_validation,
        None if patience is None else _count("patience", patience),
        tuple(callbacks),
        path,
        max(1, min(1000, steps // 10)) if checkpoint_every is None else _count("checkpoint_every", checkpoint_every),
        None if validate_every is None else _count("validate_every", validate_every),
        _count("validate_at", validate_at, least=0),
        resume,
    )
    fixed, state = start(model, loss, optim, key_loss, skip_nonfinite)
    with Interrupts() as interrupts, contextlib.ExitStack() as stack:
        untrained = eqx.filter(model, eqx.is_inexact_array, inverse=True)
        loop = Loop(plan, fixed, state, untrained, make_progress(False, 0, 0), interrupts)
        take_up(loop)
        loop.progress = make_progress(progress, steps, loop.step)
        stack.callback(loop.progress.close)
        interrupted = False
        try:
            loop.train()
        except KeyboardInterrupt:
            loop.drain()
            if is_torn(loop):
                raise
            interrupted = True
        except Exception:
            with contextlib.suppress(Exception):  # the first error is the one to hear about
                loop.drain()
                save(loop)
            raise
        save(loop)
    return _finish(loop, interrupted)


def _finish(loop: Loop, interrupted: bool) -> FitResult:
    """Turn a loop that ended into a result, with warnings for what must not pass unnoticed."""
    plan, failure = loop.plan, loop.failure
    done = f"{loop.step} of {plan.steps} steps"
    if failure is not None:
        result = RESULTS.nonfinite_loss
        where = f"step {failure.step} (epoch {failure.epoch}, batch {failure.position}{_ids(failure.ids)})"
        message = f"nonfinite loss at {where}."
        warnings.warn(f"The loss or its gradient was not finite at {where}. {message_of(result)}", SdeflowWarning, 3)
    elif interrupted:
        result, message = RESULTS.interrupted, f"interrupted after {done}."
    elif loop.validated_step >= 0 and loop.best is None:
        result, message = RESULTS.nonfinite_validation, f"no finite validation loss in {done}."
    else:
        result = RESULTS.successful
        message = f"successful: {done}" + (f", {loop.stop}." if loop.stop else ".")
    history = loop.history.arrays()
    _warn_of_failed_solves(history)
    params = loop.state.params if loop.best is None else loop.best
    model = eqx.combine(params, loop.untrained)
    at = None if failure is None else {n: getattr(failure, n) for n in ("step", "epoch", "position", "ids")}
    fitted = FitResult(model, history, result, loop.step, message, loop.best_step, at)
    if plan.checkpoint is not None and loop.save_error is not None and loop.saved is None:
        error = OSError(
            loop.save_error.errno,
            f"no checkpoint could be written ({loop.save_error.strerror}); the result is this error's `.fit`",
            str(plan.checkpoint),
        )
        error.fit = fitted  # pyright: ignore[reportAttributeAccessIssue]
        raise error from loop.save_error
    return fitted


def _ids(ids: Any) -> str:
    if ids is None:
        return ""
    shown = np.asarray(ids).ravel()
    return f", ids {shown[:_IDS_SHOWN].tolist()}" + (" and more" if len(shown) > _IDS_SHOWN else "")


def _warn_of_failed_solves(history: dict[str, Any]) -> None:
    failed = history.get("failed")
    if failed is not None and (failed > 0).any():
        first = int(history["step"][(failed > 0).argmax()])
        warnings.warn(
            f"In {int((failed > 0).sum())} of {len(failed)} steps a solve failed for a part of the batch, "
            f'first at step {first}; see history["failed"], and take smaller steps or a more stable solver.',
            SdeflowWarning,
            stacklevel=4,
        )


def _count(name: str, value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"fit was given {name}={value!r}; give an integer.")
    if value.__index__() < least:
        raise ValueError(f"fit was given {name}={value}; it must be at least {least}.")
    return value.__index__()


def _check_optim(optim: Any) -> optax.GradientTransformation:
    if isinstance(optim, optax.MultiSteps):
        return optim.gradient_transformation()
    if not isinstance(optim, optax.GradientTransformation):
        raise TypeError(f"fit was given optim={_type(optim)}; give an optax optimiser such as `optax.adam(1e-3)`.")
    return optim


def _check_loss(loss: Any) -> Callable[..., Any]:
    if isinstance(loss, type) or not callable(loss):
        raise TypeError(
            f"fit was given loss={loss if isinstance(loss, type) else _type(loss)}; give a callable "
            "`loss(model, batch, key, step)`, such as `CrossEntropy()`."
        )
    try:
        for leaf in jtu.tree_leaves(eqx.filter(loss, eqx.is_array, inverse=True)):
            hash(leaf)
    except TypeError:  # the compiled step is looked up by its static parts
        wrapped = lambda *args: loss(*args)
        wrapped.__name__ = name_of(loss)
        return wrapped
    return loss


def _check_model(model: PyTree) -> None:
    is_state = lambda x: isinstance(x, eqx.nn.State)
    for path, node in jtu.tree_leaves_with_path(model, is_leaf=is_state):
        if is_state(node):
            raise ValueError(
                f"The model holds an equinox.nn.State (at {jtu.keystr(path) or 'its root'}), which a loss cannot hand "
                "back: its running statistics would stay as they are, but for weight decay. Use layers without state, "
                "such as equinox.nn.LayerNorm; to keep a trained state as it is, close over it in the loss."
            )
    leaves = [(jtu.keystr(path) or "the model", leaf) for path, leaf in jtu.tree_leaves_with_path(model)]
    trained = [(name, leaf) for name, leaf in leaves if eqx.is_inexact_array(leaf)]
    if not trained:
        have = ", ".join(f"{name}: {_type(leaf)}" for name, leaf in leaves[:8]) or "no leaves"
        raise ValueError(f"The model has no floating-point array to train ({have}); make its parameters jax arrays.")
    bad = [name for name, leaf in trained if bool(jnp.isnan(leaf).any())]
    if bad:
        raise ValueError(f"The model starts with NaN in the parameters {', '.join(bad)}; initialise them anew.")


def _check_key(key: Any) -> None:
    dtype = getattr(key, "dtype", None)
    if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
        if key.ndim:
            raise TypeError(f"fit was given {key.shape} PRNG keys; give one, such as `jax.random.key(0)`.")
    elif dtype != jnp.uint32 or key.ndim != 1:
        raise TypeError(f"fit was given key={key!r}; give a PRNG key such as `jax.random.key(0)`.")


def _type(x: Any) -> str:
    if eqx.is_array(x):
        return f"{x.dtype}{list(x.shape)}"
    return f"{type(x).__module__}.{type(x).__qualname__}".removeprefix("builtins.")
