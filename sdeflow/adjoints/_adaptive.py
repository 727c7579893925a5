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

from .._compat import is_save_state, lax_while_loop
from ..walking import prepare_solver
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


class Record(eqx.Module):
    """The start of every accepted step; every leaf leads with the length of the record."""

    tprev: Any
    tnext: Any
    jump: Any
    y: Any
    solver_state: Any
    saved: Any


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
            record = jtu.tree_map(lambda r, x: r.at[at].set(x, mode="drop"), record, _snapshot(state))
            return body(state), record

        state, record = lax_while_loop(
            lambda c: cond(c[0]), step, (init, empty), max_steps=max_steps, buffers=lambda c: buffers(c[0])
        )
        records.append(record)
        return state

    final, _ = adjoint._loop(**kwargs, init_state=state, inner_while_loop=lax_while_loop, outer_while_loop=outer)
    return final, records[0]


def _inexact(tree: Any) -> Any:
    return eqx.filter(tree, eqx.is_inexact_array)


def _zeros(tree: Any) -> Any:
    return jtu.tree_map(jnp.zeros_like, tree)


def _add(a: Any, b: Any) -> Any:
    return jtu.tree_map(jnp.add, a, b)


def _where(keep: Any, tree: Any) -> Any:
    return jtu.tree_map(lambda x: jnp.where(keep, x, 0), tree)


def _freeze(tree: Any) -> Any:
    return jtu.tree_map(lambda x: jax.lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, tree)


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
    return final, {"record_overflow": count > length}


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
        step_d, save_d = wanted(step, perturbed[0]), wanted(save, perturbed[1])
        ct_ys = [
            jtu.tree_map(lambda y, g: jnp.zeros_like(y) if g is None else g, s.ys, g)
            for s, g in zip(_saves(final), grads[0])
        ]

        def save_vjp(k: int, t: Any, y: Any, ct: Any) -> tuple[Any, Any]:
            """Pull the cotangent of what sub k saved at (t, y) back to what its function holds, and to y."""
            _, pull = jax.vjp(lambda s, y: eqx.combine(s, save)(t, y)[k], save_d, y)
            return pull(ct)

        count, starts = final.num_accepted_steps, [1 if sub.t0 else 0 for sub in subs]
        at = lambda tree, i: jtu.tree_map(lambda x: x[i], tree)
        ct_y, ct_save = _zeros(y0), _zeros(save_d)
        for k, sub in enumerate(subs):
            if sub.t1 and sub.steps != 1:
                last = at(ct_ys[k], _saves(final)[k].save_index - 1)
                if sub.steps:
                    last = _where(count % sub.steps != 0, last)
                a, b = save_vjp(k, final.tprev, final.y, last)
                ct_save, ct_y = _add(ct_save, a), _add(ct_y, b)

        def pull_times(k: int, i: Any, tprev: Any, tnext: Any, dense: Any, ct: tuple[Any, Any]) -> tuple[Any, Any]:
            """Cotangents of the times that sub k saved within step i, pulled back to its dense information."""
            dense_d, dense_n = eqx.partition(dense, eqx.is_inexact_array)
            low = record.saved[k][i]
            after = record.saved[k][jnp.minimum(i + 1, length - 1)]
            high = jnp.where(i + 1 < count, after, _saves(final)[k].saveat_ts_index)

            def one(carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
                j, ct_dense, ct_save = carry
                t = ts[k][j]

                def interpolate(d: Any) -> Any:
                    info = eqx.combine(d, dense_n)
                    return solver.interpolation_cls(t0=tprev, t1=tnext, **info).evaluate(t)

                y, pull = jax.vjp(interpolate, dense_d)
                a, b = save_vjp(k, t, y, at(ct_ys[k], starts[k] + j))
                return j + 1, _add(ct_dense, pull(b)[0]), _add(ct_save, a)

            _, ct_dense, ct_save = jax.lax.while_loop(lambda c: c[0] < high, one, (low, *ct))
            return ct_dense, ct_save

        def body(carry: Any) -> Any:
            i, ct_y, ct_state, ct_step, ct_save = carry
            now = at(record, i)
            state_d, state_n = eqx.partition(now.solver_state, eqx.is_inexact_array)

            def one(step_d: Any, y: Any, s: Any) -> Any:
                out = eqx.combine(step_d, step)(y, eqx.combine(s, state_n), now.tprev, now.tnext, now.jump)
                return out[0], _inexact(out[1]), _inexact(out[2])

            (y1, _, dense), pull = jax.vjp(one, step_d, now.y, state_d)
            ct_dense = _zeros(dense)
            for k, sub in enumerate(subs):
                if sub.ts is not None:
                    ct_dense, ct_save = pull_times(k, i, now.tprev, now.tnext, dense, (ct_dense, ct_save))
                if sub.steps:
                    hit = (i + 1) % sub.steps == 0
                    ct = at(ct_ys[k], starts[k] + (i + 1) // sub.steps - 1)
                    a, b = save_vjp(k, now.tnext, y1, _where(hit, ct))
                    ct_save, ct_y = _add(ct_save, a), _add(ct_y, b)
            a, ct_y, ct_state = pull((ct_y, ct_state, ct_dense))
            return i - 1, ct_y, ct_state, _add(ct_step, a), ct_save

        ct_state = _zeros(_inexact(solver_state0))
        start = (jnp.minimum(count, length) - 1, ct_y, ct_state, _zeros(step_d), ct_save)
        _, ct_y, ct_state, ct_step, ct_save = jax.lax.while_loop(lambda c: c[0] >= 0, body, start)
        for k, sub in enumerate(subs):
            if sub.t0:
                a, b = save_vjp(k, t0, y0, at(ct_ys[k], 0))
                ct_save, ct_y = _add(ct_save, a), _add(ct_y, b)
        # A record that overflowed must never pass for a gradient.
        spoil = lambda tree: jtu.tree_map(lambda x: jnp.where(count > length, jnp.nan, x), tree)
        out = (ct_step, ct_save, ct_y, ct_state)
        like = lambda ct, x: eqx.combine(spoil(ct), jtu.tree_map(lambda _: None, x))
        return (*(like(ct, x) for ct, x in zip(out, inputs[:4])), jtu.tree_map(lambda _: None, inputs[4]))

    inputs = (step, save, state.y, state.solver_state, times)
    ys, overflow = attach(inputs, found, record, final)
    overflow = jax.lax.stop_gradient(overflow) > 0
    if throw:
        ys = eqx.error_if(
            ys,
            overflow,
            f"More than {length} steps were accepted, which is what the record for gradients holds: use "
            "sdeflow.adjoints.DiscreteAdjoint(record=...) with a larger number.",
        )
    final = eqx.tree_at(lambda f: [s.ys for s in _saves(f)], final, ys)
    return final, {"record_overflow": overflow}
