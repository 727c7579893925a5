"""The reverse sweep over the accepted steps of an adaptive solve, for one solve or for a batch of them.

One solve: a while loop from the last accepted step to the first, each time the vector-Jacobian product of one step.

A batch (``jax.vmap``) of solves that took different numbers of steps: one loop for all, each lane aligned at its own
last step. There the cotangent of shared parameters is what would cost most, since every lane must have its own: it is
left out of the loop over steps and taken for a few steps at a time, as one matrix product a lane.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

GROUP = 4  # steps whose parameter cotangents are taken together in a batch


class Record(eqx.Module):
    """The start of every accepted step; every leaf leads with the length of the record."""

    tprev: Any
    tnext: Any
    jump: Any
    y: Any
    solver_state: Any
    saved: Any


def inexact(tree: Any) -> Any:
    """The floating leaves of a tree."""
    return eqx.filter(tree, eqx.is_inexact_array)


def zeros(tree: Any) -> Any:
    """Zeros like a tree."""
    return jtu.tree_map(jnp.zeros_like, tree)


def _add(a: Any, b: Any) -> Any:
    return jtu.tree_map(jnp.add, a, b)


def _where(keep: Any, tree: Any) -> Any:
    return jtu.tree_map(lambda x: jnp.where(keep, x, 0), tree)


def _at(tree: Any, i: Any) -> Any:
    return jtu.tree_map(lambda x: x[i], tree)


class Lane(eqx.Module):
    """All that the sweep over one solve reads.

    Arguments:
        step: ``step(y, solver_state, tprev, tnext, jump) -> (y1, solver_state1, dense)``, with what it closes over.
        save: ``save(t, y)``, a tuple of what each sub saves, with what it closes over.
        step_d, save_d: the leaves of both whose cotangents are wanted.
        record: the accepted steps.
        y0, solver_state0: the start.
        t0: the first time.
        ts: for each sub, the times it saves, or None.
        count: how many steps were accepted.
        last: the last time and state.
        saved, index: for each sub, how many of its times were saved, and how many entries it wrote.
        ct: for each sub, the cotangent of all that it saved.
        jumps: whether the field may jump, which solvers also decide for all lanes at once (static).
        subs: for each sub, whether it saves t0 and t1, and every how many steps it saves (static).
        interpolation: how the solver interpolates within a step (static).
    """

    step: Any
    save: Any
    step_d: Any
    save_d: Any
    record: Record
    y0: Any
    solver_state0: Any
    t0: Any
    ts: tuple[Any, ...]
    count: Any
    last: tuple[Any, Any]
    saved: tuple[Any, ...]
    index: tuple[Any, ...]
    ct: tuple[Any, ...]
    jumps: bool = eqx.field(static=True)
    subs: tuple[tuple[bool, bool, int], ...] = eqx.field(static=True)
    interpolation: Any = eqx.field(static=True)

    @property
    def length(self) -> int:
        """How many steps the record holds."""
        return self.record.tprev.shape[0]

    @property
    def taken(self) -> Any:
        """How many steps the record can answer for."""
        return jnp.minimum(self.count, self.length)

    def pull_save(self, k: int, t: Any, y: Any, ct: Any) -> tuple[Any, Any]:
        """The cotangent of what sub k saved at (t, y), pulled back to what its function holds and to y."""
        _, pull = jax.vjp(lambda s, y: eqx.combine(s, self.save)(t, y)[k], self.save_d, y)
        return pull(ct)

    def start(self) -> tuple[Any, Any, Any]:
        """Cotangents of the last state, of the last solver state and of what the save functions hold."""
        ct_y, ct_save = zeros(self.y0), zeros(self.save_d)
        for k, (_, t1, steps) in enumerate(self.subs):
            if t1 and steps != 1:
                ct = _at(self.ct[k], self.index[k] - 1)
                ct = _where(self.count % steps != 0, ct) if steps else ct
                a, b = self.pull_save(k, *self.last, ct)
                ct_save, ct_y = _add(ct_save, a), _add(ct_y, b)
        return ct_y, zeros(inexact(self.solver_state0)), ct_save

    def outputs(self, step_d: Any, row: Record, y: Any, state_d: Any) -> tuple[Any, Any, Any]:
        """The floating outputs of one recorded step, as a function of all that may have a cotangent."""
        state = eqx.combine(state_d, row.solver_state)
        y1, state1, dense = eqx.combine(step_d, self.step)(y, state, row.tprev, row.tnext, row.jump)
        return y1, inexact(state1), dense

    def row(self, i: Any, waits: Any = False) -> Record:
        """Step i of the record.

        Solvers look at their flags (is this the first step?) for all lanes of a batch at once, and one that is set
        changes the others' arithmetic, so a lane that waits at its start must not show its own.
        """
        row = _at(self.record, i)
        if waits is False:
            return row
        hide = lambda x: x if eqx.is_inexact_array(x) else jnp.where(waits, jnp.zeros_like(x), x)
        return eqx.tree_at(
            lambda r: r.solver_state, row, jtu.tree_map(hide, row.solver_state), is_leaf=lambda x: x is None
        )

    def back(self, i: Any, ct: tuple[Any, Any, Any], with_parameters: bool, waits: Any = False) -> tuple[Any, Any, Any]:
        """Sweep over step i.

        Returns:
            The cotangents before the step, those of the step's parameters (None without), and those of its outputs.
        """
        ct_y, ct_state, ct_save = ct
        row = self.row(i, waits)
        static: list[Any] = []

        def one(step_d: Any, y: Any, state_d: Any) -> tuple[Any, Any, Any]:
            y1, state1, dense = self.outputs(step_d, row, y, state_d)
            static.append(eqx.filter(dense, eqx.is_inexact_array, inverse=True))
            return y1, state1, inexact(dense)

        step_d = self.step_d if with_parameters else None
        (y1, _, dense), pull = jax.vjp(one, step_d, row.y, inexact(row.solver_state))
        ct_dense = zeros(dense)
        for k, (_, _, steps) in enumerate(self.subs):
            if self.ts[k] is not None:
                ct_dense, ct_save = self._pull_times(k, i, row, (dense, static[0]), (ct_dense, ct_save))
            if steps:
                entry = (1 if self.subs[k][0] else 0) + (i + 1) // steps - 1
                a, b = self.pull_save(k, row.tnext, y1, _where((i + 1) % steps == 0, _at(self.ct[k], entry)))
                ct_save, ct_y = _add(ct_save, a), _add(ct_y, b)
        seen = (ct_y, ct_state, ct_dense)
        ct_step, ct_y, ct_state = pull(seen)
        return (ct_y, ct_state, ct_save), ct_step, seen

    def _pull_times(self, k: int, i: Any, row: Record, dense: Any, ct: tuple[Any, Any]) -> tuple[Any, Any]:
        """Cotangents of the times that sub k saved within step i, pulled back to the step's dense information."""
        low, after = row.saved[k], self.record.saved[k][jnp.minimum(i + 1, self.length - 1)]
        high = jnp.where(i + 1 < self.count, after, self.saved[k])

        def one(carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            j, ct_dense, ct_save = carry
            t = self.ts[k][j]

            def interpolate(d: Any) -> Any:
                return self.interpolation(t0=row.tprev, t1=row.tnext, **eqx.combine(d, dense[1])).evaluate(t)

            y, pull = jax.vjp(interpolate, dense[0])
            a, b = self.pull_save(k, t, y, _at(self.ct[k], (1 if self.subs[k][0] else 0) + j))
            return j + 1, _add(ct_dense, pull(b)[0]), _add(ct_save, a)

        _, ct_dense, ct_save = jax.lax.while_loop(lambda c: c[0] < high, one, (low, *ct))
        return ct_dense, ct_save

    def parameters(self, i: Any, seen: Any, waits: Any) -> Any:
        """The parameters' cotangent of the steps ``i`` (a vector), given the cotangents of their outputs."""
        rows = jax.vmap(self.row)(i, waits)

        def all_rows(step_d: Any) -> Any:
            def one(row: Record) -> Any:
                y1, state1, dense = self.outputs(step_d, row, row.y, inexact(row.solver_state))
                return y1, state1, inexact(dense)

            return jax.vmap(one)(rows)

        return jax.vjp(all_rows, self.step_d)[1](seen)[0]

    def finish(self, ct: tuple[Any, Any, Any], ct_step: Any) -> tuple[Any, Any, Any, Any]:
        """Add what was saved at t0; NaN if the record overflowed, which must never pass for a gradient."""
        ct_y, ct_state, ct_save = ct
        for k, (t0, _, _) in enumerate(self.subs):
            if t0:
                a, b = self.pull_save(k, self.t0, self.y0, _at(self.ct[k], 0))
                ct_save, ct_y = _add(ct_save, a), _add(ct_y, b)
        out = (ct_step, ct_save, ct_y, ct_state)
        return jtu.tree_map(lambda x: jnp.where(self.count > self.length, jnp.nan, x), out)


def sweep(lane: Lane) -> tuple[Any, Any, Any, Any]:
    """Cotangents of the step's parameters, of what the save functions hold, of y0 and of the first solver state."""
    arrays, static = eqx.partition(lane, eqx.is_array)

    @jax.custom_batching.custom_vmap
    def run(arrays: Any) -> Any:
        return _one(eqx.combine(arrays, static))

    @run.def_vmap
    def batched(axis_size: int, in_batched: Any, arrays: Any) -> Any:
        del axis_size
        axes = jtu.tree_map(lambda b: 0 if b else None, in_batched[0])
        if lane.jumps:
            out = jax.vmap(lambda a: _one(eqx.combine(a, static)), in_axes=(axes,))(arrays)
        else:
            out = _many(arrays, static, axes)
        return out, jtu.tree_map(lambda _: True, out)

    return run(arrays)


def _one(lane: Lane) -> tuple[Any, Any, Any, Any]:
    def body(carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        i, ct, ct_step = carry
        ct, more, _ = lane.back(i, ct, with_parameters=True)
        return i - 1, ct, _add(ct_step, more)

    start = (lane.taken - 1, lane.start(), zeros(lane.step_d))
    _, ct, ct_step = jax.lax.while_loop(lambda c: c[0] >= 0, body, start)
    return lane.finish(ct, ct_step)


def _many(arrays: Any, static: Any, axes: Any) -> tuple[Any, Any, Any, Any]:

    def each(f: Any, *args: Any, over: tuple[Any, ...] = ()) -> Any:
        return jax.vmap(lambda a, *rest: f(eqx.combine(a, static), *rest), in_axes=(axes, *over))(arrays, *args)

    def back(lane: Lane, k: Any, ct: Any) -> tuple[Any, Any]:
        i = lane.taken - 1 - k
        new, _, seen = lane.back(jnp.maximum(i, 0), ct, with_parameters=False, waits=i < 1)
        return jtu.tree_map(lambda a, b: jnp.where(i >= 1, a, b), new, ct), _where(i >= 1, seen)

    def parameters(lane: Lane, k: Any, seen: Any) -> Any:
        i = lane.taken - 1 - k
        return lane.parameters(jnp.maximum(i, 0), seen, i < 1)

    def group(carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        first, ct, ct_step = carry
        ks = first + jnp.arange(GROUP)
        ct, seen = jax.lax.scan(lambda ct, k: each(back, k, ct, over=(None, 0)), ct, ks)
        if jtu.tree_leaves(ct_step):
            ct_step = _add(ct_step, each(parameters, ks, seen, over=(None, 1)))
        return first + GROUP, ct, ct_step

    def first_step(lane: Lane, ct: Any, ct_step: Any) -> tuple[Any, Any]:
        new, more, _ = lane.back(0, ct, with_parameters=True)
        keep = lane.taken > 0
        return jtu.tree_map(lambda a, b: jnp.where(keep, a, b), new, ct), _add(ct_step, _where(keep, more))

    ct, ct_step = each(Lane.start), each(lambda lane: zeros(lane.step_d))
    most = jnp.max(each(lambda lane: lane.taken)) - 1
    _, ct, ct_step = jax.lax.while_loop(lambda c: c[0] < most, group, (jnp.zeros_like(most), ct, ct_step))
    # All lanes take their first step together, so that its flags are set for all.
    ct, ct_step = each(first_step, ct, ct_step, over=(0, 0))
    return each(Lane.finish, ct, ct_step, over=(0, 0))
