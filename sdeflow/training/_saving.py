"""How `fit` saves its state and takes it up again, so that a killed run ends as one that was not."""

import ast
import dataclasses
import itertools
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from .._compat import SdeflowWarning
from ._checkpoint import contents, rebuild, versions
from ._describe import class_path, describe, digest_of
from ._file import CheckpointError, previous, read, write
from ._history import History
from ._step import TrainState, fresh

if TYPE_CHECKING:
    from ._loop import Loop

_AFRESH = "To start afresh, delete the file and its .prev, or give another `checkpoint=`."


class Standing(NamedTuple):
    """The best parameters, their score and step, evaluations since, and the last step that was evaluated."""

    best: PyTree
    best_value: float
    best_step: int | None
    stale: int
    validated_step: int


def save(loop: "Loop") -> None:
    """Write the state to the checkpoint; a failure to write is a warning, and training goes on."""
    path = loop.plan.checkpoint
    if path is None or loop.saved == loop.mark() or is_torn(loop):
        return
    model = eqx.combine(loop.state.params, loop.untrained)
    tree = {
        "last": model,
        "optimiser": eqx.combine(loop.state.opt_state, loop.fixed.opt_static),
        "streak": loop.state.streak,
        "history": loop.history.arrays(before=loop.step),
    }
    if loop.best is not None:
        tree["best"] = eqx.combine(loop.best, loop.untrained)
    before = loop.before_last
    if before is not None and before.best is not None:
        tree["best_before_last"] = eqx.combine(before.best, loop.untrained)
    meta = {
        "step": loop.step,
        "epoch": loop.epoch,
        "position": loop.position,
        **_standing(loop),
        "before_last": None if before is None else _standing(before),
        "run": loop.identity,
    }
    try:
        write(path, contents(tree, meta, class_path(model)), keep=loop.keep_previous)
    except OSError as error:
        loop.save_error = error
        warnings.warn(
            f"The checkpoint {str(path)!r} could not be written after {loop.step} steps ({error}); "
            "training goes on, free some space or check the disk.",
            SdeflowWarning,
            stacklevel=5,
        )
    else:
        loop.saved, loop.save_error, loop.keep_previous = loop.mark(), None, True


def _standing(of: "Loop | Standing") -> dict[str, Any]:
    value = of.best_value if of.best is not None else None
    return {"best_value": value, "best_step": of.best_step, "stale": of.stale, "validated_step": of.validated_step}


def take_up(loop: "Loop") -> None:
    """Take up the state of the checkpoint, if there is one.

    Raises:
        CheckpointError: the checkpoint belongs to another run, or is damaged.
    """
    path = loop.plan.checkpoint
    if path is None:
        return
    run, leaves = _identity(loop), _leaves(loop)
    loop.identity = {**run, **leaves}
    if not (path.exists() or previous(path).exists()):
        return
    header, arrays, good = read(path)
    meta = header["meta"]
    if not isinstance(meta, dict) or "run" not in meta:
        raise CheckpointError(f"The checkpoint {str(path)!r} was not written by `fit`; give another path.")
    if loop.plan.resume != "anyway":
        _compare(meta["run"], run, header["versions"], path)
    if meta["step"] > loop.plan.steps:
        raise CheckpointError(
            f"The checkpoint {str(path)!r} is at step {meta['step']} but steps={loop.plan.steps}; "
            f"ask for at least as many. {_AFRESH}"
        )
    model = eqx.combine(loop.state.params, loop.untrained)
    optimiser = eqx.combine(loop.state.opt_state, loop.fixed.opt_static)
    try:
        model = rebuild(header, arrays, model, path, "last")
        optimiser = rebuild(header, arrays, optimiser, path, "optimiser")
        standing = _read_standing(meta, header, arrays, model, path, "best")
        before = meta.get("before_last") and _read_standing(
            meta["before_last"], header, arrays, model, path, "best_before_last"
        )
    except CheckpointError as error:
        raise CheckpointError(f"{error} {_AFRESH}") from None
    if loop.plan.resume != "anyway":
        _compare(meta["run"], leaves, header["versions"], path)
    # The leaves that are not trained stay those of the caller; unless resumed anyway, they are equal to the file's.
    params = fresh(eqx.filter(model, eqx.is_inexact_array))
    opt_state, opt_static = eqx.partition(fresh(optimiser), eqx.is_array)
    step, streak = (jnp.asarray(x, jnp.int32) for x in (meta["step"], arrays["['streak']"]))
    loop.state = TrainState(params, opt_state, step, streak, jnp.zeros((), bool))
    loop.fixed = dataclasses.replace(loop.fixed, opt_static=opt_static)
    start = "['history']["
    loop.history = History({ast.literal_eval(n[len(start) : -1]): a for n, a in arrays.items() if n.startswith(start)})
    loop.step, loop.epoch, loop.position = meta["step"], meta["epoch"], meta["position"]
    if before is not None and loop.step < loop.plan.steps:
        # A run that goes on does not make the evaluation that followed the last step of a shorter one.
        loop.history.drop_last_validation()
        standing, before = before, None
    loop.before_last = before
    if standing.best is not None:
        loop.best, loop.best_value, loop.best_step = standing[:3]
    loop.stale, loop.validated_step = standing.stale, standing.validated_step
    loop.saved = loop.mark() if good else None
    loop.keep_previous = good  # a damaged file must not take the place of the good one before it


def _read_standing(
    meta: dict[str, Any], header: dict[str, Any], arrays: dict[str, Any], model: PyTree, path: Path, part: str
) -> Standing:
    best = None
    if meta["best_step"] is not None:
        best = fresh(eqx.filter(rebuild(header, arrays, model, path, part), eqx.is_inexact_array))
    return Standing(best, meta["best_value"], meta["best_step"], meta["stale"], meta["validated_step"])


def _identity(loop: "Loop") -> dict[str, Any]:
    """What must be the same for a resumed run to be the same run."""
    plan, fixed = loop.plan, loop.fixed
    typed = jnp.issubdtype(plan.key.dtype, jax.dtypes.prng_key)
    listed = lambda tree, **options: [list(entry) for entry in describe(tree, values=True, **options)]
    return {
        "batch_size": plan.batch_size,
        "validate_every": plan.validate_every,
        "validate_at": plan.validate_at,
        "key": np.asarray(jax.random.key_data(plan.key) if typed else plan.key).tolist(),
        "key implementation": str(jax.random.key_impl(plan.key)) if typed else "raw",
        "data": _fingerprint(plan.data, plan.batch_size, jax.random.fold_in(plan.key_data, 0)),
        "validation": _fingerprint(plan.validation, plan.batch_size, plan.key_validation),
        "loss": listed(fixed.loss, code="all"),
        "optim": listed(fixed.optim),
    }


def _leaves(loop: "Loop") -> dict[str, Any]:
    """The arrays that a run began with; compared after the structure of the model, whose differences say more."""
    arrays = lambda tree: [list(entry) for entry in describe(eqx.filter(tree, eqx.is_array), values=True)]
    return {"untrained leaves": arrays(loop.untrained), "start": arrays(loop.state.params)}


def _compare(saved: dict[str, Any], now: dict[str, Any], written: dict[str, str], path: Path) -> None:
    now = {name: value for name, value in now.items() if name in saved}
    if written.get("optax") != versions()["optax"]:
        now.pop("optim", None)  # its inner names belong to the release; the optimiser's state is still compared
    if written.get("python") != versions()["python"]:
        # Byte code belongs to the release of Python.
        saved, now = ({**run, "loss": _without_code(run.get("loss"))} for run in (saved, now))
    differ = [name for name in now if saved.get(name) != now[name]]
    if differ:
        what = ", ".join(_difference(name, saved.get(name), now[name]) for name in differ)
        raise CheckpointError(
            f"The checkpoint {str(path)!r} belongs to another run: {what}. Make them equal to resume, or pass "
            f'resume="anyway" to go on from it all the same. {_AFRESH}'
        )


def _without_code(entries: Any) -> Any:
    if not isinstance(entries, list):
        return entries
    return [entry and [re.sub(r" with code [0-9a-f]{12}$", "", part) for part in entry] for entry in entries]


def is_torn(loop: "Loop") -> bool:
    """Whether something was cut off within a step, so that the parts of the state do not belong together."""
    if any(x.is_deleted() for x in jtu.tree_leaves(loop.state) if isinstance(x, jax.Array)):
        return True
    return int(loop.state.step) != loop.step or loop.history.num_steps < loop.step


def _fingerprint(data: Any, size: int, key: Any) -> str | None:
    """What tells data apart: their own fingerprint, or a digest of their first batch."""
    if data is None:
        return None
    if callable(getattr(data, "fingerprint", None)):
        return str(data.fingerprint())
    return f"first batch {digest_of(next(iter(data.batches(size, key=key)), None))}"


def _difference(name: str, saved: Any, now: Any) -> str:
    if isinstance(now, list) and name in ("loss", "optim", "untrained leaves", "start") and isinstance(saved, list):
        for one, two in itertools.zip_longest(saved, now):
            if one != two:
                if _without_code([one]) != _without_code([two]):
                    one, two = *_without_code([one]), *_without_code([two])
                texts = [f"{e[0]} {e[1]}".strip() if e else "nothing" for e in (one, two)]
                return f"{name} ({texts[0]} in the file, {texts[1]} here)"
    return f"{name} ({saved} in the file, {now} here)"
