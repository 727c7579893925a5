"""Our adjoints inside a plain ``diffrax.diffeqsolve`` call: its loop, replaced by a walk.

diffrax hands an adjoint the terms wrapped for the direction of time, the state it has initialised and what is to be
saved, and expects the final state back. The walk takes the wrapper off, walks the user's own terms (with negative steps
if time decreases, where diffrax's stochastic Runge-Kutta solvers have the wrong sign of the drift), and fills in what
was asked to be saved. Brownian paths of any kind are asked for all their increments before the loop.

Where the number of steps is static (``StepTo``, or a ``GridBrownian`` among the terms) all rows are laid out at once.
With a bare ``dt0`` it is known only at run time: then the walk goes in chunks of rows up to ``max_steps``, and skips
the chunks that are not needed.
"""

from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._compat import SaveState, unwrap
from .._results import demote
from ..paths import GridBrownian
from ..paths._rows import RowNoise
from ..walking import Carry, adopt_state, asks_within, first_carry, make_rows, prepare_solver

CHUNK = 32


def is_save(x: Any) -> bool:
    return isinstance(x, diffrax.SubSaveAt)


def _can_walk(kwargs: dict[str, Any]) -> bool:
    saveat, controller = kwargs["saveat"], kwargs["stepsize_controller"]
    subs = jtu.tree_leaves(saveat.subs, is_leaf=is_save)
    known = type(controller) in (diffrax.ConstantStepSize, diffrax.StepTo)
    interleaved = any(sub.ts is not None and sub.steps for sub in subs)
    extras = saveat.dense or saveat.controller_state or kwargs["event"] is not None or kwargs["max_steps"] is None
    progress = not isinstance(kwargs["progress_meter"], diffrax.NoProgressMeter)
    # A solve that goes on from another one brings its own clock and its own last jump.
    resumed = kwargs["passed_controller_state"] or kwargs["init_state"].made_jump is not False
    return known and not (interleaved or extras or progress or resumed)


def loop_by_walking(adjoint: Any, **kwargs: Any) -> Any:
    """What ``adjoint.loop`` returns to ``diffeqsolve``: the final state and auxiliary statistics."""
    if not _can_walk(kwargs):
        return diffrax.RecursiveCheckpointAdjoint().loop(**kwargs)
    state, controller, t0, t1 = kwargs["init_state"], kwargs["stepsize_controller"], kwargs["t0"], kwargs["t1"]
    terms, _ = unwrap(kwargs["terms"])
    paths = [p for p in RowNoise.of(terms).paths if isinstance(p, GridBrownian)]

    bound = kwargs["max_steps"]
    if isinstance(controller, diffrax.StepTo):
        times = controller.ts
        bound, count, static = min(times.shape[0] - 1, bound), times.shape[0] - 1, True
        left, right, live = times[:bound], times[1 : bound + 1], None
    else:
        count = state.controller_state[1]
        static = bool(paths)
        if static:
            bound = min(bound, max(p.grid.num_rows for p in paths))
        rounded = bound if static else -(-bound // CHUNK) * CHUNK
        # The formula of diffrax's constant steps, so that both loops stand on the same times: equal steps, except
        # that the first one is dt0 even where dt0 does not divide the whole.
        index = jnp.arange(rounded + 1)
        fraction = jnp.minimum(index, count).astype(t0.dtype) / jnp.maximum(count, 1).astype(t0.dtype)
        times = jnp.where(index == 1, state.tnext, t0 + (t1 - t0) * fraction)
        times = jnp.where(index >= count, t1, times)
        live = index[:-1] < jnp.minimum(count, bound)
        last = jnp.maximum(jnp.minimum(count, bound) - 1, 0)
        left, right = jnp.where(live, times[:-1], times[last]), jnp.where(live, times[1:], times[last + 1])

    steps = Steps(left, right, live, None, count, bound, static)
    return walk_steps(adjoint, kwargs, steps), {}


class Steps(NamedTuple):
    """The steps of a walk on diffrax's (increasing) time axis.

    Fields:
        left, right: the ends of all rows.
        live: which rows are steps; None if all are.
        jump: whether the field may jump at ``left``; None if it never does.
        count: how many steps there are to take.
        bound: how many of them may be taken; with more to take the walk ends early and says so.
        static: whether all rows are laid out at once; else they are walked in chunks, and dead chunks are skipped.
    """

    left: Any
    right: Any
    live: Any
    jump: Any
    count: Any
    bound: int
    static: bool


def walk_steps(adjoint: Any, kwargs: dict[str, Any], steps: Steps) -> Any:
    """Walk these steps, and return diffrax's final state."""
    solver, args, saveat, state = kwargs["solver"], kwargs["args"], kwargs["saveat"], kwargs["init_state"]
    t0, t1 = kwargs["t0"], kwargs["t1"]
    terms, direction = unwrap(kwargs["terms"])
    left, right, count, bound = steps.left, steps.right, steps.count, steps.bound
    subs = jtu.tree_leaves(saveat.subs, is_leaf=is_save)
    wants_dense, wants_steps = any(s.ts is not None for s in subs), any(s.steps for s in subs)

    def emit(_: Any, carry: Carry, info: Any) -> Any:
        return (carry.y if wants_steps else None), (info[1] if wants_dense else None)

    every = 1 if wants_dense or wants_steps else None
    ends = (left * direction, right * direction)
    start = state.solver_state if kwargs["passed_solver_state"] else None
    final, emitted = _walk(adjoint, solver, terms, args, state.y, ends, steps, start, every, emit)

    steps_taken = jnp.minimum(count, bound)
    result = diffrax.RESULTS.successful if final.result is None else demote(final.result)
    short = diffrax.RESULTS.where(count > bound, diffrax.RESULTS.max_steps_reached, diffrax.RESULTS.successful)
    result = diffrax.RESULTS.where(result == diffrax.RESULTS.successful, short, result)
    finite = jnp.array(True)
    for leaf in jtu.tree_leaves(final.y):
        finite = finite & jnp.isfinite(leaf).all()
    okay = (result == diffrax.RESULTS.successful) & ~finite
    result = diffrax.RESULTS.where(okay, diffrax.RESULTS.nonfinite, result)  # pyright: ignore

    reached = jnp.where(count > bound, right[-1], t1)

    def fill(sub: Any, save: SaveState) -> SaveState:
        where = (left, right, steps_taken, t0, reached)
        return _fill(sub, save, state.y, final.y, emitted, solver, args, direction, *where)

    save_state = jtu.tree_map(fill, saveat.subs, state.save_state, is_leaf=is_save)
    where = lambda s: (s.y, s.tprev, s.solver_state, s.result, s.num_steps, s.num_accepted_steps, s.save_state)
    new = (final.y, reached, final.solver_state, result, steps_taken, steps_taken, save_state)
    return eqx.tree_at(where, state, new, is_leaf=lambda x: x is None)


def _walk(
    adjoint: Any,
    solver: Any,
    terms: Any,
    args: Any,
    y0: Any,
    ends: tuple[Any, Any],
    steps: Steps,
    solver_state: Any,
    every: int | None,
    emit: Any,
) -> tuple[Carry, Any]:
    left, right = ends
    carry: Any = None
    within = asks_within(solver)
    if solver_state is not None or not steps.static:
        bare = make_rows((), left[:1], right[:1], own_grid=False)
        prepared = prepare_solver(solver)
        carry = first_carry(prepared, terms, args, y0, bare, fallible=True)
        if solver_state is not None:
            resumed = adopt_state(prepared, solver_state, terms, left[0], right[0], y0, args, fresh=False)
            carry = Carry(carry.y, resumed, carry.result, carry.taken)
    if steps.static:
        rows = make_rows(terms, left, right, steps.live, steps.jump, own_grid=False, within=within)
        return adjoint.walk(solver, terms, args, y0, rows, every=every, emit=emit, start=carry)[:2]

    chunked = jtu.tree_map(lambda x: x.reshape(-1, CHUNK), (left, right, steps.live, steps.jump))

    def chunk(carry: Carry, xs: Any) -> tuple[Carry, Any]:
        def go(carry: Carry) -> tuple[Carry, Any]:
            rows = make_rows(terms, *xs, own_grid=False, within=within)
            return adjoint.walk(solver, terms, args, y0, rows, every=every, emit=emit, start=carry)[:2]

        def skip(carry: Carry) -> tuple[Carry, Any]:
            shape = eqx.filter_eval_shape(go, carry)[1]
            return carry, jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), shape)

        return jax.lax.cond(xs[2][0], go, skip, carry)

    carry, out = jax.lax.scan(jax.checkpoint(chunk, prevent_cse=False), carry, chunked)
    return carry, jtu.tree_map(lambda x: x.reshape(-1, *x.shape[2:]), out)


def _fill(
    sub: Any,
    save: SaveState,
    y0: Any,
    y1: Any,
    emitted: Any,
    solver: Any,
    args: Any,
    direction: Any,
    left: Any,
    right: Any,
    count: Any,
    t0: Any,
    reached: Any,
) -> SaveState:
    """Write what one ``SubSaveAt`` asks for, in diffrax's order: t0, then times or steps, then the end.

    Times beyond ``reached`` keep the infinities that diffrax puts there.
    """
    ts, ys, index, ts_index = save.ts, save.ys, save.save_index, save.saveat_ts_index

    if sub.t0:
        ts, ys = ts.at[index].set(t0), jtu.tree_map(lambda b, x: b.at[index].set(x), ys, sub.fn(t0, y0, args))
        index = index + 1
    if sub.ts is not None:
        row = jnp.clip(jnp.searchsorted(right, sub.ts, side="left"), 0, jnp.maximum(count - 1, 0))
        _, dense = emitted

        def at(i: Any, t: Any) -> Any:
            info = jtu.tree_map(lambda x: x[i], dense)
            piece = solver.interpolation_cls(t0=left[i] * direction, t1=right[i] * direction, **info)
            return sub.fn(t, piece.evaluate(t * direction), args)

        values = jax.vmap(at)(row, sub.ts)
        # Where no time passes there are no steps to look into.
        start = sub.fn(t0, y0, args)
        values = jtu.tree_map(lambda x, v: jnp.where(count == 0, x, v), start, values)
        done = sub.ts <= reached
        # What is not to be written is sent out of the buffer, where it is dropped.
        at_index = jnp.where(done, index + jnp.arange(sub.ts.shape[0]), ts.shape[0])
        write = lambda buffer, x: buffer.at[at_index].set(x, mode="drop")
        ts, ys = write(ts, sub.ts), jtu.tree_map(write, ys, values)
        index, ts_index = index + done.sum(), ts_index + done.sum()
    if sub.steps:
        rows = jnp.arange(sub.steps - 1, right.shape[0], sub.steps)
        values = jax.vmap(lambda i: sub.fn(right[i], jtu.tree_map(lambda x: x[i], emitted[0]), args))(rows)
        at_index = jnp.where(rows < count, index + jnp.arange(rows.shape[0]), ts.shape[0])
        write = lambda buffer, x: buffer.at[at_index].set(x, mode="drop")
        ts, ys = write(ts, right[rows]), jtu.tree_map(write, ys, values)
        index = index + count // sub.steps
    if sub.t1 and sub.steps != 1:
        already = jnp.array(False) if not sub.steps else count % sub.steps == 0
        at_index = jnp.where(already, ts.shape[0], index)
        write = lambda buffer, x: buffer.at[at_index].set(x, mode="drop")
        ts, ys = write(ts, reached), jtu.tree_map(write, ys, sub.fn(reached, y1, args))
        index = index + jnp.where(already, 0, 1)
    return SaveState(saveat_ts_index=ts_index, ts=ts, ys=ys, save_index=index)
