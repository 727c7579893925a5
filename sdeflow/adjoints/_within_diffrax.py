"""Our adjoints inside a plain ``diffrax.diffeqsolve`` call: its loop, replaced by a walk.

diffrax hands an adjoint the terms wrapped for the direction of time, the state it has initialised and what is to be
saved, and expects the final state back. The walk takes the wrapper off, walks the user's own terms (with negative steps
if time decreases, where diffrax's stochastic Runge-Kutta solvers have the wrong sign of the drift), and fills in what
was asked to be saved. Brownian paths of any kind are asked for all their increments before the loop.

Where the number of steps is static (``StepTo``, a ``GridBrownian`` among the terms, or times that are not traced) all
rows are laid out at once. Otherwise it is known only at run time: then the walk goes in chunks of rows up to
``max_steps``, and skips the chunks that are not needed, in groups, groups of groups and so on, so that time and memory
follow the steps that are taken. What is to be saved at given times is computed chunk by chunk, never kept for all rows.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._compat import SaveState, known_value, unwrap
from .._results import RESULTS, demote
from ..paths import GridBrownian
from ..paths._rows import RowNoise
from ..walking import Carry, Rows, adopt_state, asks_otherwise, first_carry, make_rows, prepare_solver, restarts
from ..walking._row import step_row

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
        times = controller.ts.astype(t0.dtype).at[1].set(state.tnext)
        count, static = times.shape[0] - 1, True
        bound = min(count, bound)
        return walk_steps(
            adjoint, kwargs, Steps(lambda i: (times[i], times[i + 1], None, None), count, bound, static)
        ), {}

    count = state.controller_state[1]
    known = known_value(count)
    static = bool(paths) or known is not None
    if paths:
        bound = min(bound, max(p.grid.num_rows for p in paths))
    if known is not None:
        count = int(known)
        bound = min(bound, max(count, 1))

    def time(i: Any) -> Any:
        # The formula of diffrax's constant steps, so that both loops stand on the same times: equal steps, except
        # that the first one is dt0 even where dt0 does not divide the whole.
        fraction = jnp.minimum(i, count).astype(t0.dtype) / jnp.maximum(count, 1).astype(t0.dtype)
        inner = jnp.where(i == 1, state.tnext, t0 + (t1 - t0) * fraction)
        return jnp.where(i >= count, t1, inner)

    def rows(i: Any) -> Any:
        taken = jnp.minimum(count, bound)
        i, live = jnp.minimum(i, jnp.maximum(taken - 1, 0)), i < taken
        return time(i), time(i + 1), live, None

    return walk_steps(adjoint, kwargs, Steps(rows, count, bound, static)), {}


class Steps(NamedTuple):
    """The steps of a walk on diffrax's (increasing) time axis.

    Fields:
        rows: ``rows(i)`` gives, for an array of numbers of rows, their ends ``left`` and ``right``, which of them are
            steps (None if all are) and whether the field may jump at ``left`` (None if never). Steps come first.
        count: how many steps there are to take.
        bound: how many of them may be taken; with more to take the walk ends early and says so.
        static: whether all rows are laid out at once; else they are walked in chunks, and dead chunks are skipped.
    """

    rows: Callable[[Any], tuple[Any, Any, Any, Any]]
    count: Any
    bound: int
    static: bool


class _Walk(NamedTuple):
    """What all parts of one walk share; ``direction`` is -1 where time decreases."""

    adjoint: Any
    solver: Any
    terms: Any
    args: Any
    direction: Any
    steps_again: bool

    def rows(self, terms: Any, row: Any) -> Rows:
        left, right, live, jump = row
        ends = (left * self.direction, right * self.direction)
        return make_rows(terms, *ends, live, jump, own_grid=False, within=bool(asks_otherwise(self.solver)))

    def walk(self, terms: Any, y0: Any, rows: Rows, every: int | None, emit: Any, start: Any) -> tuple[Carry, Any]:
        walked = self.adjoint.walk(self.solver, terms, self.args, y0, rows, every=every, emit=emit, start=start)
        return walked[:2]

    def dense_of(self, terms: Any, rows: Rows, y0: Any, kept: Any) -> Callable[[Any], Any]:
        """``info(i)``, the dense information of row i.

        Arguments:
            y0: the state before the rows.
            kept: that information of all rows; where the steps are taken again, the states after them.
        """
        if not self.steps_again:
            return lambda i: jtu.tree_map(lambda x: x[i], kept)
        solver = prepare_solver(self.solver)
        before = jtu.tree_map(lambda y, ys: jnp.concatenate([y[None], ys[:-1]]), y0, kept)

        def info(i: Any) -> Any:
            y, left, right, noise = jtu.tree_map(lambda x: x[i], (before, rows.left, rows.right, rows.noise))
            state = solver.init(terms, left, right, y, self.args)
            carry = Carry(y, state, RESULTS.successful)
            return step_row(solver, terms, self.args, rows, carry, (left, right, None, None, noise))[1][1]

        return info


def walk_steps(adjoint: Any, kwargs: dict[str, Any], steps: Steps) -> Any:
    """Walk these steps, and return diffrax's final state."""
    args, saveat, state, t0 = kwargs["args"], kwargs["saveat"], kwargs["init_state"], kwargs["t0"]
    terms, direction = unwrap(kwargs["terms"])
    count, bound = steps.count, steps.bound
    subs = jtu.tree_leaves(saveat.subs, is_leaf=is_save)
    requested, wants_steps = [sub for sub in subs if sub.ts is not None], any(sub.steps for sub in subs)
    start = state.solver_state if kwargs["passed_solver_state"] else None

    laid_out = wants_steps or steps.static
    # The steps that hold requested times are taken once more, where they are few and need the state before them alone:
    # the dense information of all rows is far larger than the states.
    few = sum(sub.ts.shape[0] for sub in requested) <= (bound if laid_out else CHUNK)
    follows = restarts(prepare_solver(kwargs["solver"]), state.solver_state)
    walk = _Walk(adjoint, kwargs["solver"], terms, args, direction, few and follows and adjoint.keeps_states)
    right = states = None
    if laid_out:
        final, values, right, states = _walk_whole(walk, state.y, steps, start, requested, wants_steps)
    else:
        final, values = _walk_in_chunks(walk, state.y, steps, start, requested, t0)
    each = iter(values)

    steps_taken = jnp.minimum(count, bound)
    result = diffrax.RESULTS.successful if final.result is None else demote(final.result)
    short = diffrax.RESULTS.where(count > bound, diffrax.RESULTS.max_steps_reached, diffrax.RESULTS.successful)
    result = diffrax.RESULTS.where(result == diffrax.RESULTS.successful, short, result)
    finite = jnp.array(True)
    for leaf in jtu.tree_leaves(final.y):
        finite = finite & jnp.isfinite(leaf).all()
    okay = (result == diffrax.RESULTS.successful) & ~finite
    result = diffrax.RESULTS.where(okay, diffrax.RESULTS.nonfinite, result)  # pyright: ignore

    reached = jnp.where(count > bound, steps.rows(jnp.asarray(bound - 1))[1], kwargs["t1"])

    def fill(sub: Any, save: SaveState) -> SaveState:
        at_times = None if sub.ts is None else next(each)
        return _fill(sub, save, state.y, final.y, at_times, states, args, right, steps_taken, t0, reached)

    save_state = jtu.tree_map(fill, saveat.subs, state.save_state, is_leaf=is_save)
    where = lambda s: (s.y, s.tprev, s.solver_state, s.result, s.num_steps, s.num_accepted_steps, s.save_state)
    new = (final.y, reached, final.solver_state, result, steps_taken, steps_taken, save_state)
    return eqx.tree_at(where, state, new, is_leaf=lambda x: x is None)


def _walk_whole(
    walk: _Walk, y0: Any, steps: Steps, solver_state: Any, requested: list[Any], wants_steps: bool
) -> tuple[Carry, list[Any], Any, Any]:
    """Walk rows that are laid out all at once.

    Returns:
        The last carry, what every ``SubSaveAt`` in ``requested`` saves at its times, the ends of all rows and, on
        request, the states there.
    """
    size = steps.bound if steps.static else -(-steps.bound // CHUNK) * CHUNK
    laid = steps.rows(jnp.arange(size))
    terms, wants_states = walk.terms, wants_steps or (bool(requested) and walk.steps_again)
    wants_dense = bool(requested) and not walk.steps_again
    keep = lambda _, carry, info: ((carry.y if wants_states else None), (info[1] if wants_dense else None))
    every = 1 if wants_states or wants_dense else None
    carry: Any = None
    if solver_state is not None or not steps.static:
        carry = _begin(walk, y0, laid, solver_state)
    if steps.static:
        final, emitted = walk.walk(terms, y0, walk.rows(terms, laid), every, keep, carry)
    else:

        def chunk(carry: Carry, row: Any) -> tuple[Carry, Any]:
            def go(carry: Carry) -> tuple[Carry, Any]:
                return walk.walk(terms, y0, walk.rows(terms, row), every, keep, carry)

            def skip(carry: Carry) -> tuple[Carry, Any]:
                shape = eqx.filter_eval_shape(go, carry)[1]
                return carry, jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), shape)

            return jax.lax.cond(row[2][0], go, skip, carry)

        chunks = jtu.tree_map(lambda x: x.reshape(-1, CHUNK), laid)
        final, emitted = jax.lax.scan(jax.checkpoint(chunk, prevent_cse=False), carry, chunks)
        emitted = jtu.tree_map(lambda x: x.reshape(-1, *x.shape[2:]), emitted)
    states, dense = (None, None) if emitted is None else emitted
    values = []
    if requested:
        info = walk.dense_of(terms, walk.rows(terms, laid), y0, states if walk.steps_again else dense)
        values = [_at_times(walk, sub, laid, info) for sub in requested]
    return final, values, laid[1], states


def _begin(walk: _Walk, y0: Any, row: Any, solver_state: Any) -> Carry:
    """The carry before the first row, from the state of the solver where one was passed on."""
    left, right = (x[:1] * walk.direction for x in row[:2])
    bare = make_rows((), left, right, own_grid=False)
    prepared = prepare_solver(walk.solver)
    carry = first_carry(prepared, walk.terms, walk.args, y0, bare, fallible=True)
    if solver_state is None:
        return carry
    resumed = adopt_state(prepared, solver_state, walk.terms, left[0], right[0], y0, walk.args, fresh=False)
    return Carry(carry.y, resumed, carry.result, carry.taken)


def _walk_in_chunks(
    walk: _Walk, y0: Any, steps: Steps, solver_state: Any, requested: list[Any], t0: Any
) -> tuple[Carry, list[Any]]:
    """Walk chunk after chunk, as long as there are steps to take.

    Returns:
        The last carry, and what every ``SubSaveAt`` in ``requested`` saves at its times, as far as they were reached.
    """
    bare, typed = _bare_keys(walk.terms)
    taken = jnp.minimum(steps.count, steps.bound)
    of_chunk = jnp.arange(CHUNK)
    start = [sub.fn(t0, y0, walk.args) for sub in requested]
    spread = lambda sub, tree: jtu.tree_map(lambda x: jnp.broadcast_to(x, (sub.ts.shape[0], *jnp.shape(x))), tree)
    saved = [spread(sub, tree) for sub, tree in zip(requested, start)]

    def chunk(carry: tuple[Carry, list[Any]], index: Any, bare: Any) -> tuple[Carry, list[Any]]:
        before, saved = carry
        terms, row = typed(bare), steps.rows(index * CHUNK + of_chunk)
        rows = walk.rows(terms, row)
        keep = lambda _, carry, info: carry.y if walk.steps_again else info[1]
        after, kept = walk.walk(terms, y0, rows, 1 if requested else None, keep, before)
        if requested:
            info = walk.dense_of(terms, rows, before.y, kept)
            saved = [_look_up(walk, sub, entries, row, info) for sub, entries in zip(requested, saved)]
        return after, saved

    begin = _begin(walk, y0, steps.rows(of_chunk), solver_state)
    number = -(-steps.bound // CHUNK)
    return _while_live(chunk, (begin, saved), bare, jnp.asarray(0), number, 1, lambda index: index * CHUNK < taken)


def _while_live(
    go: Any, carry: Any, constant: Any, first: Any, number: int, stride: int, is_live: Callable[[Any], Any]
) -> Any:
    """``carry = go(carry, i, constant)`` for the ``number`` values of i from ``first`` on, as long as they are live.

    Groups of those that are not are skipped at once, by a branch a group, so that derivatives of every order exist and
    the time depends on how many are live.
    """
    while number > _GROUP * stride:
        stride *= _GROUP
    inner = go
    if stride > 1:
        inner = lambda carry, i, c: _while_live(go, carry, c, i, stride, 1, is_live)
    again = jax.checkpoint(inner, prevent_cse=False)

    def body(carry: Any, i: Any) -> tuple[Any, None]:
        return jax.lax.cond(is_live(i), again, lambda carry, i, c: carry, carry, i, constant), None

    indices = first + stride * jnp.arange(-(-number // stride))
    return jax.lax.scan(body, carry, indices)[0]


def _bare_keys(tree: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The tree with its random keys as numbers, and what makes keys of them again.

    JAX cannot differentiate a branch that a typed key goes into: it confuses the key's tangent with the key.
    """
    is_key = lambda x: isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    kinds = [jax.random.key_impl(x) if is_key(x) else None for x in jtu.tree_leaves(tree)]
    bare = jtu.tree_map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)
    arrays, static = eqx.partition(bare, eqx.is_array)

    def typed(arrays: Any) -> Any:
        leaves, treedef = jtu.tree_flatten(eqx.combine(arrays, static))
        keys = [x if kind is None else jax.random.wrap_key_data(x, impl=kind) for x, kind in zip(leaves, kinds)]
        return treedef.unflatten(keys)

    return arrays, typed


def _look_up(walk: _Walk, sub: Any, saved: Any, row: Any, info: Callable[[Any], Any]) -> Any:
    """What is saved, with the entries of the times within these rows."""
    begin, end = row[0][0], row[1][-1]

    def window(ts: Any, saved: Any) -> Any:
        here = (ts > begin) & (ts <= end)
        values = _at_times(walk, eqx.tree_at(lambda s: s.ts, sub, ts), row, info)
        return jtu.tree_map(lambda new, old: jnp.where(_along(here, old), new, old), values, saved)

    count = sub.ts.shape[0]
    if count <= _WINDOW:
        return window(sub.ts, saved)
    # The times are in order, so most windows have nothing to do with these rows.
    short = -count % _WINDOW
    pad = lambda x: jnp.concatenate([x, jnp.broadcast_to(x[-1], (short, *x.shape[1:]))])
    fold = lambda x: pad(x).reshape(-1, _WINDOW, *x.shape[1:])

    def body(_: None, xs: Any) -> tuple[None, Any]:
        ts, saved = xs
        return None, jax.lax.cond((ts[-1] > begin) & (ts[0] <= end), window, lambda ts, saved: saved, ts, saved)

    _, out = jax.lax.scan(body, None, (fold(sub.ts), jtu.tree_map(fold, saved)))
    return jtu.tree_map(lambda x: x.reshape(-1, *x.shape[2:])[:count], out)


def _at_times(walk: _Walk, sub: Any, row: Any, info: Callable[[Any], Any]) -> Any:
    """``sub.fn`` at the times of a ``SubSaveAt``, by the dense information of the rows that they lie in."""
    left, right = row[:2]
    index = jnp.clip(jnp.searchsorted(right, sub.ts, side="left"), 0, right.shape[0] - 1)

    def at(i: Any, t: Any) -> Any:
        ends = {"t0": left[i] * walk.direction, "t1": right[i] * walk.direction}
        piece = walk.solver.interpolation_cls(**ends, **info(i))
        return sub.fn(t, piece.evaluate(t * walk.direction), walk.args)

    return jax.vmap(at)(index, sub.ts)


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
