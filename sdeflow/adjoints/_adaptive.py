"""Exact gradients of adaptive steps: diffrax's own loop forwards, the steps that it accepted backwards.

Forwards nothing changes: the value is that of ``diffrax.diffeqsolve``. When a gradient is wanted, the loop also writes
the start of every accepted step (time, state, solver state) into a record of static length; a rejected attempt is
overwritten by the next. Backwards a while loop runs over the accepted steps alone,

    (dL/dy_i, dL/dtheta)  +=  vjp of one solver step at (t_i, y_i),

so that rejected steps, even those that hit NaN, can touch neither value nor gradient, and the cost does not grow with
``max_steps``. Step sizes count as constants, as in diffrax; gradients with respect to times need a fixed grid.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._compat import buffer_at_set, is_buffer, is_save_state, lax_while_loop
from ..walking import prepare_solver
from ._sweep import Lane, Record, sweep
from ._within_diffrax import CHUNK, Steps, walk_steps

# What diffrax hands to an adjoint but its own loop does not take.
_NOT_FOR_LOOP = ("init_state", "throw", "passed_solver_state", "passed_controller_state")


def is_save(x: Any) -> bool:
    """Whether ``x`` is one ``diffrax.SubSaveAt``."""
    return isinstance(x, diffrax.SubSaveAt)


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


def may_jump(controller: Any) -> bool:
    """Whether a controller can say that the field jumped; only then must a step look at the flag."""
    if isinstance(controller, diffrax.PIDController):
        return False
    if hasattr(controller, "jump_ts") and hasattr(controller, "controller"):
        return controller.jump_ts is not None or may_jump(controller.controller)
    return True


def _saves(state: Any) -> list[Any]:
    return jtu.tree_leaves(state.save_state, is_leaf=is_save_state)


def _snapshot(state: Any) -> Record:
    saved = tuple(save.saveat_ts_index for save in _saves(state))
    now = Record(state.tprev, state.tnext, state.made_jump, state.y, state.solver_state, saved)
    return jtu.tree_map(jnp.asarray, now)


def run_recording(
    adjoint: diffrax.AbstractAdjoint, state: Any, length: int, kwargs: dict[str, Any]
) -> tuple[Any, Record]:
    """Diffrax's loop with a record of the accepted steps. Where nobody reads the record, XLA removes it."""
    records: list[Record] = []

    def outer(cond: Callable, body: Callable, init: Any, *, max_steps: Any, buffers: Callable) -> Any:
        empty = jtu.tree_map(lambda x: jnp.zeros((length, *x.shape), x.dtype), _snapshot(init))

        def step(carry: tuple[Any, Record]) -> tuple[Any, Record]:
            state, record = carry
            at = state.num_accepted_steps
            record = jtu.tree_map(lambda x, r: buffer_at_set(r, at, x), _snapshot(state), record)
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

    final, _ = adjoint._loop(**kwargs, init_state=state, inner_while_loop=lax_while_loop, outer_while_loop=outer)
    return final, records[0]


def _freeze(tree: Any) -> Any:
    return jtu.tree_map(lambda x: jax.lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, tree)


def _too_long(length: int) -> str:
    return (
        f"More than {length} steps were accepted, which is what the record for gradients holds: use "
        "sdeflow.adjoints.DiscreteAdjoint(record=...) with a larger number."
    )


def replaying_loop(adjoint: Any, length: int, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """The adaptive loop, its accepted steps then walked in chunks, so that derivatives of every order exist."""
    state, jumps = kwargs["init_state"], may_jump(kwargs["stepsize_controller"])
    loop = {k: kwargs[k] for k in kwargs if k not in _NOT_FOR_LOOP}
    run = _freeze(eqx.filter_closure_convert(lambda s: run_recording(adjoint, s, length, loop), _freeze(state)))
    final, record = run(_freeze(state))
    count = final.num_accepted_steps
    row = jnp.arange(-(-length // CHUNK) * CHUNK)
    live, last = row < count, jnp.maximum(jnp.minimum(count, length) - 1, 0)
    source = jnp.where(live & (row < length), row, last)
    left, right, jump = (x[source] for x in (record.tprev, record.tnext, record.jump))
    steps = Steps(left, right, live & (row < length), jump if jumps else None, count, length, False)
    walked = walk_steps(adjoint, kwargs, steps)
    keep = lambda s: (s.y, s.solver_state, s.save_state)
    final = eqx.tree_at(keep, final, keep(walked), is_leaf=lambda x: x is None)
    # Steps beyond the record were not walked: a factor of NaN spoils the values and derivatives of every order.
    overflow = count > length
    factor = jnp.where(overflow, jnp.nan, 1.0)
    spoil = lambda x: x * factor.astype(x.dtype) if eqx.is_inexact_array(x) else x
    ys = jtu.tree_map(spoil, [s.ys for s in _saves(final)])
    if kwargs["throw"]:
        ys = eqx.error_if(ys, overflow, _too_long(length))
    final = eqx.tree_at(lambda f: [s.ys for s in _saves(f)], final, ys)
    return final, {"record_overflow": overflow}


def adaptive_loop(adjoint: diffrax.AbstractAdjoint, length: int, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """What ``adjoint.loop`` returns to ``diffeqsolve`` for adaptive steps, with the recorded reverse rule."""
    state, throw = kwargs["init_state"], kwargs["throw"]
    kwargs = {k: kwargs[k] for k in kwargs if k not in _NOT_FOR_LOOP}
    solver, terms, args, controller = (kwargs[k] for k in ("solver", "terms", "args", "stepsize_controller"))
    subs, replayed = subs_of(kwargs["saveat"]), prepare_solver(solver)
    jumps = may_jump(controller)

    def replay(y: Any, solver_state: Any, tprev: Any, tnext: Any, jump: Any) -> tuple[Any, Any, Any]:
        jump = jump if jumps else False
        y1, _, dense, state1, _ = replayed.step(terms, tprev, tnext, y, args, solver_state, jump)
        return y1, state1, dense

    def save(t: Any, y: Any) -> tuple[Any, ...]:
        return tuple(sub.fn(t, y, args) for sub in subs)

    # What the user's functions close over must be seen by the reverse rule, so it is made an input of it.
    flag = jnp.asarray(False)
    example = (state.y, state.solver_state, state.tprev, state.tnext, flag)
    step = eqx.filter_closure_convert(replay, *jtu.tree_map(jnp.asarray, example))
    save = eqx.filter_closure_convert(save, state.tprev, state.y)
    run = _freeze(eqx.filter_closure_convert(lambda s: run_recording(adjoint, s, length, kwargs), _freeze(state)))
    times = (kwargs["t0"], kwargs["t1"], tuple(sub.ts for sub in subs))

    # The loop itself stands outside of differentiation; the rule below only says where gradients of ys come from.
    final, record = run(_freeze(state))
    found = [s.ys for s in _saves(final)]

    @eqx.filter_custom_vjp
    def attach(inputs: Any, ys: Any, record: Any, final: Any) -> Any:
        return ys, jnp.zeros(())

    @attach.def_fwd
    def forward(perturbed: Any, inputs: Any, ys: Any, record: Any, final: Any) -> Any:
        return (ys, (final.num_accepted_steps > length).astype(float)), None

    @attach.def_bwd
    def backward(_: Any, grads: Any, perturbed: Any, inputs: Any, ys: Any, record: Any, final: Any) -> Any:
        step, save, y0, solver_state0, (t0, _, ts) = inputs
        if any(jtu.tree_leaves(perturbed[4])):
            raise ValueError(
                "Gradients with respect to t0, t1 or the saved times need a fixed grid: pass dt0=, grid= or "
                "steps_per_interval= instead of an adaptive stepsize_controller."
            )
        wanted = lambda tree, mask: jtu.tree_map(lambda x, m: x if m is True else None, tree, mask)
        saves = _saves(final)
        lane = Lane(
            step=step,
            save=save,
            step_d=wanted(step, perturbed[0]),
            save_d=wanted(save, perturbed[1]),
            record=record,
            y0=y0,
            solver_state0=solver_state0,
            t0=t0,
            ts=ts,
            count=final.num_accepted_steps,
            last=(final.tprev, final.y),
            saved=tuple(s.saveat_ts_index for s in saves),
            index=tuple(s.save_index for s in saves),
            ct=tuple(
                jtu.tree_map(lambda y, g: jnp.zeros_like(y) if g is None else g, s.ys, g)
                for s, g in zip(saves, grads[0])
            ),
            jumps=jumps,
            subs=tuple((sub.t0, sub.t1, sub.steps) for sub in subs),
            interpolation=solver.interpolation_cls,
        )
        like = lambda ct, x: eqx.combine(ct, jtu.tree_map(lambda _: None, x))
        return (
            *(like(ct, x) for ct, x in zip(sweep(lane), inputs[:4])),
            jtu.tree_map(lambda _: None, inputs[4]),
        )

    inputs = (step, save, state.y, state.solver_state, times)
    ys, overflow = attach(inputs, found, record, final)
    overflow = jax.lax.stop_gradient(overflow) > 0
    if throw:
        ys = eqx.error_if(
            ys,
            overflow,
            _too_long(length),
        )
    final = eqx.tree_at(lambda f: [s.ys for s in _saves(f)], final, ys)
    return final, {"record_overflow": overflow}
