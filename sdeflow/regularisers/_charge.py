"""One solve with everything that it is to be charged for.

Integrals go beside the state. Readers watch the solver: it notes running sums for the global ones, and for each local
one the step that it draws. That step is then taken once more outside of the solve, with gradients of its own. An
adjoint that cannot carry notes through its reverse pass solves as it is, and the local ones watch a second solve
without gradients.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._compat import unwrap
from .._results import RESULTS, is_okay, promote
from ..adjoints import DiscreteAdjoint, ReversibleAdjoint
from ..adjoints._freeze import freeze
from ..solvers._charging import Charging, beside
from ..walking import prepare_solver, take_step
from ._alongside import OF_THEIR_OWN, alongside
from ._base import AbstractRegulariser, Scaled
from ._measures import Step, drift_of, frozen
from ._readers import AbstractReader, _Global, _Local
from ._states import AbstractStateRegulariser

_CARRIES_NOTES = (
    DiscreteAdjoint,
    diffrax.RecursiveCheckpointAdjoint,
    diffrax.DirectAdjoint,
    diffrax.ForwardMode,
)
_STREAM = 0x7265  # keeps what is drawn here apart from the noise of the solve


class Setting(NamedTuple):
    """What a solve is made of, as far as charging changes it; ``walks``: whether diffrax's loop is not used."""

    terms: Any
    y0: Any
    solver: Any
    controller: Any
    adjoint: Any
    save_fn: Any
    event: Any
    walks: bool


class Outcome(NamedTuple):
    """What came of a solve; ``final`` is the whole last state, ``ts`` are the times of ``ys``."""

    ys: Any
    final: Any
    stats: dict[str, Any]
    result: Any
    ts: Any
    dense: Any = None


def check_regularisers(regularisers: Sequence[Any], key: Any) -> None:
    """Refuse what is no regulariser, the same one twice, and drawing without a key.

    Raises:
        TypeError, ValueError: in one sentence.
    """
    for r in regularisers:
        if isinstance(r, Scaled):
            raise TypeError(
                f"solve charges {type(r.regulariser).__name__} as it is; its weight belongs to the loss: pass the "
                "regulariser without it."
            )
        if not isinstance(r, AbstractRegulariser):
            raise TypeError(f"regularisers must be instances of classes of sf.regularisers, got {r!r}.")
        if r.draws and key is None:
            raise ValueError(f"{type(r).__name__} draws at random: pass key=, e.g. key=jax.random.key(0).")
    names = [type(r).__name__ for r in regularisers]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{name} was given twice, but penalties go by class name: give it once.")


def charged(
    go: Callable[[Setting], Outcome], setting: Setting, regularisers: Sequence[Any], ts: Any, args: Any, key: Any
) -> tuple[Outcome, dict[str, Any]]:
    """Run a solve; return what came of it, the state alone, and the penalties."""
    if not regularisers:
        return go(setting), {}
    key = None if key is None else jax.random.fold_in(key, _STREAM)
    bare = setting
    integrals = [r for r in regularisers if isinstance(r, AbstractStateRegulariser)]
    readers = [r for r in regularisers if isinstance(r, AbstractReader)]
    depth = 0
    if integrals:
        terms, y0 = alongside(integrals, setting.terms, setting.y0, ts, args, key, setting.solver)
        setting, depth = setting._replace(terms=terms, y0=y0), 1
    seen, apart = _split(readers, setting.adjoint)
    if apart:
        watched = _watching(apart, bare._replace(adjoint=DiscreteAdjoint()), ts, args, key, 0)
        _, found = freeze(eqx.filter_closure_convert(lambda: go(_stripping(watched, 1)).final))()
    if seen:
        setting, depth = _watching(seen, setting, ts, args, key, depth), depth + 1
    out = go(_stripping(setting, depth))
    final = out.final
    penalties = _read(apart, found, bare, ts, args) if apart else {}
    if seen:
        final, notes = final
        penalties |= _read(seen, notes, bare, ts, args)
    if integrals:
        final, values = final
        penalties |= {type(r).__name__: x for r, x in zip(integrals, values)}
        out = out._replace(result=_judged(integrals, values, final, out.result))
    return out._replace(final=final), {type(r).__name__: penalties[type(r).__name__] for r in regularisers}


def _judged(integrals: Sequence[Any], values: Sequence[Any], final: Any, result: Any) -> Any:
    """The result, with the failure of an integral that is not finite along a solution that is."""
    finite = lambda tree: jnp.array([jnp.isfinite(x).all() for x in jtu.tree_leaves(tree)]).all()
    for r, value in zip(integrals, values):
        if r.failure is not None:
            failed = is_okay(result) & finite(final) & ~jnp.isfinite(value)
            result = RESULTS.where(failed, getattr(RESULTS, r.failure), promote(result))
    return result


def _split(readers: Sequence[Any], adjoint: Any) -> tuple[list[Any], list[Any]]:
    """Which readers watch the solve, and which a second one."""
    if isinstance(adjoint, _CARRIES_NOTES):
        return list(readers), []
    sums = [r for r in readers if isinstance(r, _Global)]
    if sums and not isinstance(adjoint, ReversibleAdjoint):
        name = type(sums[0]).__name__
        raise ValueError(
            f"{type(adjoint).__name__} does not differentiate the steps, so {name} cannot charge for them: use "
            f"adjoint=sf.adjoints.DiscreteAdjoint(), or sf.regularisers.Local{name[6:]}()."
        )
    return sums, [r for r in readers if not isinstance(r, _Global)]


def _stripped(tree: Any, depth: int) -> Any:
    for _ in range(depth):
        tree = tree[0]
    return tree


class _OfStateAlone(eqx.Module):
    """What ``save_fn`` makes of the state without what goes beside it."""

    save_fn: Any
    depth: int = eqx.field(static=True)

    def __call__(self, t: Any, y: Any, args: Any) -> Any:
        y = _stripped(y, self.depth)
        return y if self.save_fn is None else self.save_fn(t, y, args)


def _stripping(setting: Setting, depth: int) -> Setting:
    """The user's functions, and the norm of the controller, shown the state alone."""
    event = setting.event
    if event is not None:
        shown = lambda fn: lambda t, y, args, **kwargs: fn(t, _stripped(y, depth), args, **kwargs)
        event = dataclasses.replace(event, cond_fn=jtu.tree_map(shown, event.cond_fn))
    return setting._replace(
        save_fn=_OfStateAlone(setting.save_fn, depth),
        event=event,
        controller=_with_norm(setting.controller, depth),
    )


def _with_norm(controller: Any, depth: int) -> Any:
    if controller is None or not dataclasses.is_dataclass(controller):
        return controller
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(controller):
        value = getattr(controller, field.name, None)
        if isinstance(value, diffrax.AbstractStepSizeController):
            changes[field.name] = _with_norm(value, depth)
        elif field.name == "norm" and callable(value):
            changes[field.name] = lambda tree, value=value: value(_stripped(tree, depth))
    return dataclasses.replace(controller, **changes) if changes else controller  # pyright: ignore


class _Watch(eqx.Module):
    """Makes the next notes of a step: running sums of the global readers, the drawn steps of the local ones."""

    readers: tuple[Any, ...]
    times: tuple[Any, ...]
    keys: tuple[Any, ...]
    tolerances: tuple[Any, ...]
    last: Any
    depth: int = eqx.field(static=True)

    def __call__(
        self, solver: Any, terms: Any, t0: Any, t1: Any, y0: Any, args: Any, y1: Any, error: Any, dense: Any, notes: Any
    ) -> Any:
        _, direction = unwrap(terms)
        strip = lambda tree: None if tree is None else _stripped(tree, self.depth)
        left, right = t0 * direction, t1 * direction
        count, *rest = notes
        new: list[Any] = [count + 1]
        for i, r in enumerate(self.readers):
            if isinstance(r, _Global):
                drift = lambda t, y: strip(self._whole_drift(terms, t, y, y0, args, direction))
                slopes = strip(dense.get("k"))
                step = Step(solver, drift, left, right, strip(y0), strip(y1), strip(error), slopes, *self.tolerances[i])
                new.append(rest[i] + r.charge(step).astype(rest[i].dtype))
                continue
            if r.time == "biased":
                chance = jax.random.uniform(jax.random.fold_in(self.keys[i], count.astype(jnp.int32)), (), count.dtype)
                taken = chance * (count + 1) < 1
            else:
                tau = self.times[i]
                after, before = (tau - left) * (right - left) >= 0, (right - tau) * (right - left) > 0
                taken = after & (before | (right == self.last))
            here = (left, right, frozen(strip(y0)) if r.detach_state else strip(y0))
            new.append(jtu.tree_map(lambda a, b, taken=taken: jnp.where(taken, a, b), here, rest[i]))
        return tuple(new)

    def _whole_drift(self, terms: Any, t: Any, y: Any, like: Any, args: Any, direction: Any) -> Any:
        # The field asks for all that stands beside the state; what it is does not matter to the drift.
        for level in range(self.depth):
            y = (y, _stripped(like, self.depth - 1 - level)[1])
        return drift_of(unwrap(terms)[0], args)(t, y)


def _watching(readers: Sequence[Any], setting: Setting, ts: Any, args: Any, key: Any, depth: int) -> Setting:
    dtype = ts.dtype
    state = _stripped(setting.y0, depth)
    keys: Any = tuple(None if key is None else jax.random.fold_in(key, 100 + i) for i in range(len(readers)))
    times = tuple(
        ts[0] + (ts[-1] - ts[0]) * jax.random.uniform(k, (), dtype)
        if isinstance(r, _Local) and r.time == "unbiased"
        else None
        for r, k in zip(readers, keys)
    )
    tolerances = tuple(_tolerances(r, setting.controller) for r in readers)
    watch = _Watch(tuple(readers), times, keys, tolerances, ts[-1], depth)
    nothing = jnp.zeros((), dtype)
    notes = tuple(nothing if isinstance(r, _Global) else (ts[0], ts[0], frozen(state)) for r in readers)
    notes, terms = (nothing, *notes), setting.terms
    if not setting.walks:
        if isinstance(terms, tuple) or isinstance(setting.solver, OF_THEIR_OWN):
            raise ValueError(  # noqa: TRY004
                f"{type(readers[0]).__name__} cannot watch {type(setting.solver).__name__} within diffrax's loop: fix "
                "the steps with dt0= or grid=."
            )
        still = jtu.tree_map(jnp.zeros_like, notes)
        terms = beside(terms, lambda t, y: still, still)
    solver = Charging(setting.solver, watch, not setting.walks)
    return setting._replace(terms=terms, y0=(setting.y0, notes), solver=solver)


def _tolerances(reader: Any, controller: Any) -> tuple[Any, Any]:
    rtol = getattr(controller, "rtol", 0.0) if reader.rtol is None else reader.rtol
    atol = getattr(controller, "atol", 1.0) if reader.atol is None else reader.atol
    return rtol, atol


def _read(readers: Sequence[Any], notes: Any, bare: Setting, ts: Any, args: Any) -> dict[str, Any]:
    count, *rest = notes
    out = {}
    for r, note in zip(readers, rest):
        if isinstance(r, _Global):
            value = note / jnp.maximum(count, 1) if r.aggregate == "mean" else note
        else:
            value = _read_local(r, note, count, bare, ts, args)
        out[type(r).__name__] = value
    return out


def _read_local(reader: Any, note: Any, count: Any, bare: Setting, ts: Any, args: Any) -> Any:
    t0, t1, y0 = note
    t0, t1 = frozen((t0, t1))
    solver = prepare_solver(bare.solver)
    first = frozen if reader.detach_first_stage else (lambda state: state)
    y1, error, dense = take_step(solver, bare.terms, t0, t1, y0, args, first)
    drift = drift_of(bare.terms, args)
    step = Step(bare.solver, drift, t0, t1, y0, y1, error, dense.get("k"), *_tolerances(reader, bare.controller))
    span = jnp.abs(ts[-1] - ts[0])
    empty = t1 == t0
    # Where no step was taken there is nothing to charge.
    length = jnp.where(empty, 1, t1 - t0)
    step = step._replace(t1=t0 + length)
    value = reader.charge(step) * reader.weight(step, frozen(count), span)
    return jnp.where(empty, 0, value).astype(count.dtype)
