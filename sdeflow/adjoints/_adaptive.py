"""Exact gradients of adaptive steps: diffrax's own loop forwards, the steps that it accepted backwards.

Forwards the loop and its controller are those of ``diffrax.diffeqsolve``. When a gradient is wanted, the loop also
writes the start of every accepted step (time, state, where needed the solver's state) into a record of static length; a
rejected attempt is overwritten by the next. Backwards a while loop runs over the accepted steps alone,

    (dL/dy_i, dL/dtheta)  +=  vjp of one solver step at (t_i, y_i),

so that rejected steps, even those that hit NaN, can touch neither value nor gradient, and the cost does not grow with
``max_steps``. Step sizes count as constants, as in diffrax, except where a declared jump says when a step ends and the
next begins; gradients with respect to other times need a fixed grid.

Each step is that of a walk: the terms as the user gave them, in the direction that time has, the noise fed as a row.
diffrax would mirror time instead, where its stochastic Runge-Kutta solvers have the wrong sign of the drift.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from .._compat import buffer_at_set, is_buffer, is_save_state, lax_while_loop, unwrap
from ..paths._rows import RowNoise, still
from ..walking import adopt_state, prepare_solver, restarts, straighten, with_noise_of_step
from ._attach import attach
from ._freeze import freeze
from ._jump_times import Moved, moved_by_jumps
from ._sweep import Record, Solve, sweep
from ._within_diffrax import Steps, is_save, walk_steps

# What diffrax hands to an adjoint but its own loop does not take.
_NOT_FOR_LOOP = ("init_state", "throw", "passed_solver_state", "passed_controller_state")

# Accepted steps that a record holds, unless its length is given, and what each time to step to adds to them.
RECORD, STEPS_PER_TIME = 256, 4

_FIRST_ONLY = (
    "Adaptive steps have first derivatives in reverse mode, by jax.grad: for second derivatives or forward mode pass "
    "adjoint=sdeflow.adjoints.DiscreteAdjoint(higher_order=True), or fix the steps."
)


def subs_of(saveat: diffrax.SaveAt) -> list[diffrax.SubSaveAt]:
    """All that a ``SaveAt`` asks for."""
    return jtu.tree_leaves(saveat.subs, is_leaf=is_save)


def can_record(kwargs: dict[str, Any]) -> bool:
    """Whether the recorded rule covers this solve; diffrax's default adjoint takes the rest."""
    saveat = kwargs["saveat"]
    interleaved = any(sub.ts is not None and sub.steps for sub in subs_of(saveat))
    extras = saveat.dense or saveat.solver_state or saveat.controller_state or saveat.made_jump
    passed = kwargs["passed_solver_state"] or kwargs["passed_controller_state"]
    progress = not isinstance(kwargs["progress_meter"], diffrax.NoProgressMeter)
    adapts = isinstance(kwargs["stepsize_controller"], diffrax.AbstractAdaptiveStepSizeController)
    return adapts and not (
        interleaved or extras or passed or progress or kwargs["event"] is not None or kwargs["max_steps"] is None
    )


def length_of_record(record: int | None, kwargs: dict[str, Any]) -> int:
    """How many accepted steps to hold, if it is not given: some more for every time that the controller steps to."""
    if record is not None:
        return record
    times, inner = 0, kwargs["stepsize_controller"]
    while inner is not None:
        step_ts, inner = getattr(inner, "step_ts", None), getattr(inner, "controller", None)
        times += 0 if step_ts is None else step_ts.shape[0]
    return min(kwargs["max_steps"], RECORD + STEPS_PER_TIME * times)


def check_record(record: Any) -> None:
    """Refuse what is no length of a record.

    Raises:
        ValueError: for all but positive integers and None.
    """
    if record is None or (isinstance(record, int) and not isinstance(record, bool) and record >= 1):
        return
    raise ValueError(f"record must be a positive number of steps, got {record!r}.")


def may_jump(controller: Any) -> bool:
    """Whether a controller can say that the field jumped; only then must a step look at the flag."""
    if isinstance(controller, diffrax.PIDController):
        return False
    if hasattr(controller, "jump_ts") and hasattr(controller, "controller"):
        return controller.jump_ts is not None or may_jump(controller.controller)
    return True


def _saves(state: Any) -> list[Any]:
    return jtu.tree_leaves(state.save_state, is_leaf=is_save_state)


def _ys(state: Any) -> list[Any]:
    return [save.ys for save in _saves(state)]


class _Walking(diffrax.AbstractWrappedSolver):
    """The solver with which diffrax's loop takes the steps of a walk."""

    solver: Any

    @property
    def term_structure(self) -> Any:
        return self.solver.term_structure

    @property
    def interpolation_cls(self) -> Any:
        return self.solver.interpolation_cls

    def error_order(self, terms: Any) -> Any:
        return self.solver.error_order(terms)

    def init(self, terms: Any, t0: Any, t1: Any, y0: Any, args: Any) -> Any:
        bare, direction = unwrap(terms)
        return self.solver.init(bare, t0 * direction, t1 * direction, y0, args)

    def step(self, terms: Any, t0: Any, t1: Any, y0: Any, args: Any, solver_state: Any, made_jump: Any) -> Any:
        bare, direction = unwrap(terms)
        left, right = t0 * direction, t1 * direction
        here = with_noise_of_step(self.solver, bare, left, right)
        return self.solver.step(here, left, right, y0, args, solver_state, made_jump)

    def func(self, terms: Any, t0: Any, y0: Any, args: Any) -> Any:
        return self.solver.func(terms, t0, y0, args)


def _run_recording(
    adjoint: diffrax.AbstractAdjoint, state: Any, length: int, kwargs: dict[str, Any]
) -> tuple[Any, Record]:
    """Diffrax's loop with a record of the accepted steps. Where nobody reads the record, XLA removes it."""
    solver, args, t0 = kwargs["solver"], kwargs["args"], kwargs["t0"]
    bare, direction = unwrap(kwargs["terms"])
    forgets = restarts(prepare_solver(solver), state.solver_state)
    if not RowNoise.of(bare).paths:
        # Other rounding in the error estimate moves the steps by a hair. The solution of an ordinary equation does not
        # mind; one that is driven by noise would see another noise, and is stepped with by diffrax's own code.
        solver = straighten(solver)
    adopted = adopt_state(
        solver, state.solver_state, bare, t0 * direction, state.tnext * direction, state.y, args, fresh=True
    )
    state = eqx.tree_at(lambda s: s.solver_state, state, adopted, is_leaf=lambda x: x is None)
    records: list[Record] = []

    def snapshot(state: Any) -> Record:
        saved = tuple(save.saveat_ts_index for save in _saves(state))
        kept = None if forgets else state.solver_state
        now = Record(state.tprev, state.tnext, state.made_jump, state.y, kept, saved)  # pyright: ignore
        return jtu.tree_map(jnp.asarray, now)

    def outer(cond: Callable, body: Callable, init: Any, *, max_steps: Any, buffers: Callable) -> Any:
        empty = jtu.tree_map(lambda x: jnp.zeros((length, *x.shape), x.dtype), snapshot(init))

        def step(carry: tuple[Any, Record]) -> tuple[Any, Record]:
            state, record = carry
            at = state.num_accepted_steps
            record = jtu.tree_map(lambda x, r: buffer_at_set(r, at, x), snapshot(state), record)
            return body(state), record

        state, record = lax_while_loop(
            lambda c: cond(c[0]),
            step,
            (init, empty),
            max_steps=max_steps,
            # Under vmap a loop selects between old and new for every lane; a buffer does so for the row it writes.
            buffers=lambda c: (buffers(c[0]), jtu.tree_leaves(c[1], is_leaf=is_buffer)),
        )
        records.append(record)
        return state

    loop = {**kwargs, "solver": _Walking(solver)}  # pyright: ignore
    final, _ = adjoint._loop(**loop, init_state=state, inner_while_loop=lax_while_loop, outer_while_loop=outer)
    return final, records[0]


def _too_long(length: int) -> str:
    return (
        f"More than {length} steps were accepted, which is what the record for gradients holds: use "
        "sdeflow.adjoints.DiscreteAdjoint(record=...) with a larger number, up to max_steps."
    )


def replaying_loop(adjoint: Any, length: int, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """The adaptive loop, its accepted steps then walked in chunks, so that derivatives of every order exist."""
    state, jumps = kwargs["init_state"], may_jump(kwargs["stepsize_controller"])
    loop = {k: kwargs[k] for k in kwargs if k not in _NOT_FOR_LOOP}
    run = freeze(eqx.filter_closure_convert(lambda s: _run_recording(adjoint, s, length, loop), freeze(state)))
    final, record = run(freeze(state))
    count = final.num_accepted_steps
    last = jnp.maximum(jnp.minimum(count, length) - 1, 0)
    moved = moved_by_jumps(kwargs["stepsize_controller"], kwargs["t0"], kwargs["t1"])
    if moved is not None:
        kwargs["terms"] = still(kwargs["terms"])

    def rows(i: Any) -> tuple[Any, Any, Any, Any]:
        live = (i < count) & (i < length)
        left, right, jump = (x[jnp.where(live, i, last)] for x in (record.tprev, record.tnext, record.jump))
        if moved is not None:
            left, right = jnp.vectorize(moved)(left), jnp.vectorize(moved)(right)
        return left, right, live, jump if jumps else None

    steps = Steps(rows, count, length, False)
    walked = walk_steps(adjoint, kwargs, steps)
    keep = lambda s: (s.y, s.solver_state, s.save_state)
    final = eqx.tree_at(keep, final, keep(walked), is_leaf=lambda x: x is None)
    # Steps beyond the record were not walked: a factor of NaN spoils the values and derivatives of every order.
    overflow = count > length
    factor = jnp.where(overflow, jnp.nan, 1.0)
    spoil = lambda x: x * factor.astype(x.dtype) if eqx.is_inexact_array(x) else x
    ys = jtu.tree_map(spoil, _ys(final))
    if kwargs["throw"]:
        ys = eqx.error_if(ys, overflow, _too_long(length))
    return eqx.tree_at(_ys, final, ys), {"record_overflow": overflow}


def adaptive_loop(adjoint: diffrax.AbstractAdjoint, length: int, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """What ``adjoint.loop`` returns to ``diffeqsolve`` for adaptive steps, with the recorded reverse rule."""
    state, throw = kwargs["init_state"], kwargs["throw"]
    kwargs = {k: kwargs[k] for k in kwargs if k not in _NOT_FOR_LOOP}
    solver, terms, args, controller = (kwargs[k] for k in ("solver", "terms", "args", "stepsize_controller"))
    subs, inner = subs_of(kwargs["saveat"]), prepare_solver(solver)
    walking, jumps, forgets = _Walking(inner), may_jump(controller), restarts(inner, state.solver_state)  # pyright: ignore
    moved, interpolation = moved_by_jumps(controller, kwargs["t0"], kwargs["t1"]), solver.interpolation_cls

    def replay(y: Any, solver_state: Any, tprev: Any, tnext: Any, jump: Any) -> tuple[Any, Any, Any]:
        terms = kwargs["terms"]
        if moved is not None:
            tprev, tnext, terms = moved(tprev), moved(tnext), still(terms)
        if forgets:
            # The state follows from the solution, and so does its derivative; a jump needs no mention either.
            solver_state = walking.init(terms, tprev, tnext, y, args)
        flag = jump if jumps and not forgets else False
        y1, _, dense, state1, _ = walking.step(terms, tprev, tnext, y, args, solver_state, flag)
        dense = dense if moved is None else {"ends": (tprev, tnext), "info": dense}
        return y1, (None if forgets else state1), dense

    def save(t: Any, y: Any) -> tuple[Any, ...]:
        return tuple(sub.fn(t, y, args) for sub in subs)

    # The loop itself stands outside of differentiation; the rule below only says where gradients of ys come from.
    run = freeze(eqx.filter_closure_convert(lambda s: _run_recording(adjoint, s, length, kwargs), freeze(state)))
    final, record = run(freeze(state))

    # What the user's functions close over must be seen by the reverse rule, so it is made an input of it.
    solver_state = None
    if not forgets:
        # The start of the solver as a function of the solution there, through which derivatives go too.
        bare, direction = unwrap(terms)
        ends = (kwargs["t0"] * direction, state.tnext * direction)
        solver_state = adopt_state(inner, state.solver_state, bare, *ends, state.y, args, fresh=True)
    example = (state.y, solver_state, state.tprev, state.tnext, jnp.asarray(False))
    saves = _saves(final)
    solve = Solve(
        step=eqx.filter_closure_convert(replay, *jtu.tree_map(jnp.asarray, example)),
        save=eqx.filter_closure_convert(save, state.tprev, state.y),
        record=record,
        y0=state.y,
        solver_state0=solver_state,
        t0=kwargs["t0"],
        t1=kwargs["t1"],
        ts=tuple(sub.ts for sub in subs),
        count=final.num_accepted_steps,
        last=(final.tprev, final.y),
        saved=tuple(s.saveat_ts_index for s in saves),
        index=tuple(s.save_index for s in saves),
        subs=tuple((sub.t0, sub.t1, sub.steps) for sub in subs),
        interpolation=interpolation if moved is None else Moved(interpolation),
    )
    ys, rest = eqx.partition(_ys(final), eqx.is_inexact_array)
    found, treedef = jtu.tree_flatten(ys)
    rule, inputs = sweep(solve, treedef)
    # A record that is too short matters where a gradient is taken, and nowhere else.
    found, overflow = attach(rule, found, inputs, final.num_accepted_steps > length, _FIRST_ONLY)
    ys = eqx.combine(treedef.unflatten(found), rest)
    if throw:
        ys = eqx.error_if(ys, overflow, _too_long(length))
    return eqx.tree_at(_ys, final, ys), {"record_overflow": overflow}
