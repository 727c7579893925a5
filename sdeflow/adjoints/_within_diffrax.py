"""Our adjoints inside a plain ``diffrax.diffeqsolve`` call: its loop, replaced by a walk.

diffrax hands an adjoint the terms wrapped for the direction of time, the state it has initialised and what is to be
saved, and expects the final state back. The walk takes the wrapper off, walks the user's own terms (with negative steps
if time decreases, where diffrax's stochastic Runge-Kutta solvers have the wrong sign of the drift), and fills in what
was asked to be saved. Brownian paths of any kind are asked for all their increments before the loop.

Where the number of steps is static (``StepTo``, a ``GridBrownian`` among the terms, or times that are not traced) all
rows are laid out at once. Otherwise it is known only at run time: then the walk goes in chunks of rows up to
``max_steps``, and skips the chunks that are not needed, in groups, groups of groups and so on, so that time and memory
follow the steps that are taken. What is to be saved at given times is computed chunk by chunk: the dense information of
all rows together may be a thousand times the solution.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._compat import SaveState, known_value, unwrap
from .._results import demote
from ..paths import GridBrownian
from ..paths._rows import RowNoise
from ..walking import Carry, adopt_state, asks_within, first_carry, make_rows, prepare_solver, restarts, take_step

CHUNK = 16  # rows of a chunk
_GROUP = 32  # chunks of a group, groups of the next larger one
_WINDOW = 64  # how many of the requested times a chunk looks at together


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
        # diffrax has checked that these times span the solve, and hands the second one on through that check.
        times = controller.ts.at[1].set(state.tnext)
        bound, count, static = min(times.shape[0] - 1, bound), times.shape[0] - 1, True
        left, right, live = times[:bound], times[1 : bound + 1], None
    else:
        count = state.controller_state[1]
        known = known_value(count)
        static = bool(paths) or known is not None
        if paths:
            bound = min(bound, max(p.grid.num_rows for p in paths))
        if known is not None:
            count = int(known)
            bound = min(bound, max(count, 1))
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
    start = state.solver_state if kwargs["passed_solver_state"] else None
    given = (adjoint, solver, terms, args, state.y)
    requested = [sub for sub in subs if sub.ts is not None]
    emitted: Any = None
    if wants_steps or steps.static:
        number = sum(sub.ts.shape[0] for sub in requested)
        keeps = emit
        again = bool(requested) and number <= left.shape[0] and _can_step_again(adjoint, solver, state.solver_state)
        if again:
            keeps = lambda right, carry, info: (carry.y, None)
        final, emitted = _walk(*given, (left * direction, right * direction), steps, start, every, keeps)
        if again:
            info = _steps_again(solver, terms, args, direction, left, right, state.y, emitted[0])
        else:
            info = lambda i: jtu.tree_map(lambda x: x[i], emitted[1])
        found = [_at_times(sub, left, right, info, solver, args, direction) for sub in requested]
    else:
        final, found = _walk_in_chunks(*given, requested, t0, direction, steps, start, state.solver_state)
    values = iter(found)

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
        at_times = None if sub.ts is None else next(values)
        states = emitted[0] if sub.steps else None
        return _fill(sub, save, state.y, final.y, at_times, states, args, right, steps_taken, t0, reached)

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
    within = asks_within(solver)
    carry: Any = None
    if solver_state is not None or not steps.static:
        carry = _begin(solver, terms, args, y0, left[:1], right[:1], solver_state)
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


def _begin(solver: Any, terms: Any, args: Any, y0: Any, left: Any, right: Any, solver_state: Any) -> Carry:
    """The carry before the first row, from the state of the solver where one was passed on."""
    bare = make_rows((), left, right, own_grid=False)
    prepared = prepare_solver(solver)
    carry = first_carry(prepared, terms, args, y0, bare, fallible=True)
    if solver_state is None:
        return carry
    resumed = adopt_state(prepared, solver_state, terms, left[0], right[0], y0, args, fresh=False)
    return Carry(carry.y, resumed, carry.result)


def _walk_in_chunks(
    adjoint: Any,
    solver: Any,
    terms: Any,
    args: Any,
    y0: Any,
    requested: list[Any],
    t0: Any,
    direction: Any,
    steps: Steps,
    solver_state: Any,
    example: Any,
) -> tuple[Carry, list[Any]]:
    """Walk chunk after chunk, as long as there are steps to take.

    Returns:
        The last carry, and what every ``SubSaveAt`` in ``requested`` saves at its times, as far as they were reached.
    """
    left, right = steps.left, steps.right
    within = asks_within(solver)
    live = jnp.ones(left.shape, bool) if steps.live is None else steps.live
    carry = _begin(solver, terms, args, y0, left[:1] * direction, right[:1] * direction, solver_state)
    at_start = [sub.fn(t0, y0, args) for sub in requested]
    spread = lambda sub, tree: jtu.tree_map(lambda x: jnp.broadcast_to(x, (sub.ts.shape[0], *jnp.shape(x))), tree)
    saved = [spread(sub, tree) for sub, tree in zip(requested, at_start)]
    terms, typed = _bare_keys(terms)
    again = sum(sub.ts.shape[0] for sub in requested) <= CHUNK and _can_step_again(adjoint, solver, example)

    def chunk(carry: tuple[Carry, list[Any]], xs: Any) -> tuple[Carry, list[Any]]:
        walked, saved = carry
        left, right, live, jump = xs
        own = typed(terms)
        rows = make_rows(own, left * direction, right * direction, live, jump, own_grid=False, within=within)
        emit = lambda _, carry, info: carry.y if again else info[1]
        every = 1 if requested else None
        start = walked.y
        walked, kept, _ = adjoint.walk(solver, own, args, y0, rows, every=every, emit=emit, start=walked)
        if again and requested:
            info = _steps_again(solver, own, args, direction, left, right, start, kept)
        else:
            info = lambda i: jtu.tree_map(lambda x: x[i], kept)
        where = (left[0], right[-1], left, right, info, solver, args, direction)
        return walked, [_look_up(sub, entries, *where) for sub, entries in zip(requested, saved)]

    return _while_live(chunk, (carry, saved), _folded((left, right, live, steps.jump), CHUNK))


def _bare_keys(tree: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The tree with its random keys as numbers, and what makes keys of them again.

    JAX cannot differentiate a branch that a typed key goes into: it confuses the key's tangent with the key.
    """
    is_key = lambda x: isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    kinds = [jax.random.key_impl(x) if is_key(x) else None for x in jtu.tree_leaves(tree)]
    bare = jtu.tree_map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)

    def typed(tree: Any) -> Any:
        leaves, treedef = jtu.tree_flatten(tree)
        keys = [x if kind is None else jax.random.wrap_key_data(x, impl=kind) for x, kind in zip(leaves, kinds)]
        return treedef.unflatten(keys)

    return bare, typed


def _folded(xs: Any, size: int) -> Any:
    """The rows in pieces of this size; those that fill the last one up are not live."""
    left, right, live, jump = xs
    short = -left.shape[0] % size
    pad = lambda x: None if x is None else jnp.concatenate([x, jnp.broadcast_to(x[-1], (short, *x.shape[1:]))])
    live = jnp.concatenate([live, jnp.zeros((short, *live.shape[1:]), bool)])
    return jtu.tree_map(lambda x: x.reshape(-1, size, *x.shape[1:]), (pad(left), pad(right), live, pad(jump)))


def _while_live(go: Any, carry: Any, xs: Any) -> Any:
    """``carry = go(carry, x)`` for every x whose first row is live; whole groups of the others are skipped at once."""
    if xs[0].shape[0] > _GROUP:
        return _while_live(lambda carry, group: _while_live(go, carry, group), carry, _folded(xs, _GROUP))

    again = jax.checkpoint(go, prevent_cse=False)

    def body(carry: Any, x: Any) -> tuple[Any, None]:
        return jax.lax.cond(x[2].reshape(-1)[0], again, lambda carry, x: carry, carry, x), None

    return jax.lax.scan(body, carry, xs)[0]


def _look_up(
    sub: Any,
    saved: Any,
    begin: Any,
    end: Any,
    left: Any,
    right: Any,
    info: Any,
    solver: Any,
    args: Any,
    direction: Any,
) -> Any:
    """What is saved, with the entries of the times within these rows."""

    def window(ts: Any, saved: Any) -> Any:
        here = (ts > begin) & (ts <= end)
        values = _at_times(eqx.tree_at(lambda s: s.ts, sub, ts), left, right, info, solver, args, direction)
        pick = lambda new, old: jnp.where(_along(here, old), new, old)
        return jtu.tree_map(pick, values, saved)

    count = sub.ts.shape[0]
    if count <= _WINDOW:
        return window(sub.ts, saved)
    # The times are in order, so most windows have nothing to do with these rows.
    short = -count % _WINDOW
    fold = lambda x: jnp.concatenate([x, jnp.broadcast_to(x[-1], (short, *x.shape[1:]))]).reshape(
        -1, _WINDOW, *x.shape[1:]
    )

    def body(_: None, xs: Any) -> tuple[None, Any]:
        ts, saved = xs
        return None, jax.lax.cond((ts[-1] > begin) & (ts[0] <= end), window, lambda ts, saved: saved, ts, saved)

    _, out = jax.lax.scan(body, None, (fold(sub.ts), jtu.tree_map(fold, saved)))
    return jtu.tree_map(lambda x: x.reshape(-1, *x.shape[2:])[:count], out)


def _can_step_again(adjoint: Any, solver: Any, solver_state: Any) -> bool:
    """Whether the steps that hold requested times may be taken once more: the dense information of all is far larger.

    That needs the state before a step alone, and a reverse pass that keeps states anyway.
    """
    return adjoint.keeps_states and restarts(prepare_solver(solver), solver_state)


def _steps_again(
    solver: Any, terms: Any, args: Any, direction: Any, left: Any, right: Any, y0: Any, ys: Any
) -> Callable[[Any], Any]:
    """``info(i)``, the dense information of row i, by its step from the state before it; ``ys`` are those after."""
    prepared = prepare_solver(solver)
    before = jtu.tree_map(lambda y, ys: jnp.concatenate([y[None], ys[:-1]]), y0, ys)
    start = lambda i: jtu.tree_map(lambda x: x[i], before)
    return lambda i: take_step(prepared, terms, left[i] * direction, right[i] * direction, start(i), args)[2]


def _at_times(sub: Any, left: Any, right: Any, info: Any, solver: Any, args: Any, direction: Any) -> Any:
    """``sub.fn`` at the times of a ``SubSaveAt``, from ``info(i)``, the dense information of row i."""
    row = jnp.clip(jnp.searchsorted(right, sub.ts, side="left"), 0, right.shape[0] - 1)

    def at(i: Any, t: Any) -> Any:
        piece = solver.interpolation_cls(t0=left[i] * direction, t1=right[i] * direction, **info(i))
        return sub.fn(t, piece.evaluate(t * direction), args)

    return jax.vmap(at)(row, sub.ts)


def _fill(
    sub: Any,
    save: SaveState,
    y0: Any,
    y1: Any,
    at_times: Any,
    states: Any,
    args: Any,
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
        # Where no time passes there are no steps to look into.
        start = sub.fn(t0, y0, args)
        values = jtu.tree_map(lambda x, v: jnp.where((count == 0) | _along(sub.ts <= t0, v), x, v), start, at_times)
        done = sub.ts <= reached
        # What is not to be written is sent out of the buffer, where it is dropped.
        at_index = jnp.where(done, index + jnp.arange(sub.ts.shape[0]), ts.shape[0])
        write = lambda buffer, x: buffer.at[at_index].set(x, mode="drop")
        ts, ys = write(ts, sub.ts), jtu.tree_map(write, ys, values)
        index, ts_index = index + done.sum(), ts_index + done.sum()
    if sub.steps:
        rows = jnp.arange(sub.steps - 1, right.shape[0], sub.steps)
        values = jax.vmap(lambda i: sub.fn(right[i], jtu.tree_map(lambda x: x[i], states), args))(rows)
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


def _along(flags: Any, x: Any) -> Any:
    """Flags of the leading axis, to be broadcast against an array."""
    return flags.reshape(-1, *[1] * (jnp.ndim(x) - 1))
