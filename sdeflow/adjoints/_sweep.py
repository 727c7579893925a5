"""The reverse sweep over the accepted steps of an adaptive solve, for one solve or for a batch of them.

One solve: a while loop from the last accepted step to the first, each time the vector-Jacobian product of one step.

A batch of solves that took different numbers of steps: one loop for all, each lane aligned at its own last step, and
one vector-Jacobian product of all lanes' steps together, so that the cotangent of what they share is one sum from the
start. A lane that has no step left takes another lane's, with cotangents of zero.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu

from ._attach import Flags, Rule
from ._lanes import Lanes, add, leaves_by_number, where, zeros


class Record(eqx.Module):
    """The start of every accepted step; every leaf leads with the length of the record."""

    tprev: Any
    tnext: Any
    jump: Any
    y: Any
    solver_state: Any
    saved: Any


class Solve(eqx.Module):
    """All that the sweep over one solve reads.

    Arguments:
        step: ``step(y, solver_state, tprev, tnext, jump) -> (y1, solver_state1, dense)``, with what it closes over.
        save: ``save(t, y)``, a tuple of what each sub saves, with what it closes over.
        record: the accepted steps.
        y0, solver_state0: the start.
        t0, t1: the ends of time.
        ts: for each sub, the times it saves, or None.
        count: how many steps were accepted.
        last: the last time and state.
        saved, index: for each sub, how many of its times were saved, and how many entries it wrote.
        subs: for each sub, whether it saves t0 and t1, and every how many steps it saves (static).
        interpolation: how the solver interpolates within a step (static).
    """

    step: Any
    save: Any
    record: Record
    y0: Any
    solver_state0: Any
    t0: Any
    t1: Any
    ts: tuple[Any, ...]
    count: Any
    last: tuple[Any, Any]
    saved: tuple[Any, ...]
    index: tuple[Any, ...]
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

    def take(self, y: Any, state: Any, row: Record) -> tuple[tuple[Any, Any, Any], Any]:
        """One recorded step from (y, state); returns y1 and what is floating of the next state and of the dense info.

        The rest of the dense information is static to the reverse pass, and is returned beside them.
        """
        y1, state1, dense = self.step(y, eqx.combine(state, row.solver_state), row.tprev, row.tnext, row.jump)
        return (y1, inexact(state1), inexact(dense)), eqx.filter(dense, eqx.is_inexact_array, inverse=True)


def inexact(tree: Any) -> Any:
    """The floating leaves of a tree."""
    return eqx.filter(tree, eqx.is_inexact_array)


def _at(tree: Any, i: Any) -> Any:
    return jtu.tree_map(lambda x: x[i], tree)


def sweep(solve: Solve, ys: Any) -> tuple[Rule, list[Any]]:
    """The reverse rule of a solve for `attach`, and the inputs that it is to be given.

    Arguments:
        ys: the tree structure of the floating leaves of what was saved.
    """
    arrays, static = eqx.partition(solve, eqx.is_array)
    inputs, treedef = jtu.tree_flatten(arrays)
    places = treedef.unflatten(range(len(inputs)))
    times = set(jtu.tree_leaves((places.t0, places.t1, places.ts)))

    def build(inputs: list[Any]) -> Solve:
        return eqx.combine(treedef.unflatten(inputs), static)

    def rule(inputs: list[Any], cts: list[Any], wanted: Flags, batched: Flags | None) -> list[Any]:
        chosen = [i for i, w in enumerate(wanted) if w]
        if times & set(chosen):
            raise ValueError(
                "Gradients with respect to t0, t1 or the saved times need a fixed grid: pass dt0=, grid= or "
                "steps_per_interval= instead of an adaptive stepsize_controller."
            )
        out = _Sweep(build, places, inputs, chosen, batched).run(ys.unflatten(cts))
        return [out[i] for i in chosen]

    return rule, inputs


class _Sweep(Lanes):
    """One sweep: cotangents of the ``chosen`` inputs, by their numbers."""

    def __init__(
        self,
        build: Callable[[list[Any]], Solve],
        places: Any,
        inputs: list[Any],
        chosen: list[int],
        batched: Flags | None,
    ):
        super().__init__(build, inputs, batched)
        self.places = places
        self.of_step = [i for i in chosen if i in set(jtu.tree_leaves(places.step))]
        self.of_save = [i for i in chosen if i in set(jtu.tree_leaves(places.save))]

    # What was saved: the rules for one lane.

    def _pull_save(self, inputs: list[Any], k: int, t: Any, y: Any, ct: Any) -> tuple[list[Any], Any]:
        """The cotangent of what sub k saved at (t, y), pulled back to what its function holds and to y."""

        def saved(held: list[Any], y: Any) -> Any:
            return inexact(self.build(self.replaced(inputs, self.of_save, held)).save(t, y)[k])

        return jax.vjp(saved, [inputs[i] for i in self.of_save], y)[1](ct)

    def _start(self, inputs: list[Any], ct: Any) -> tuple[Any, Any, list[Any]]:
        """Cotangents of the last state, of the last solver state and of what the save functions hold."""
        solve = self.build(inputs)
        ct_y, ct_save = zeros(solve.y0), [zeros(inputs[i]) for i in self.of_save]
        for k, (_, t1, steps) in enumerate(solve.subs):
            if t1 and steps != 1:
                entry = _at(ct[k], solve.index[k] - 1)
                entry = where(solve.count % steps != 0, entry, zeros(entry)) if steps else entry
                t, y = solve.last
                a, b = self._pull_save(inputs, k, t, y, entry)
                ct_save, ct_y = add(ct_save, a), add(ct_y, b)
        # Not from the first solver state, of which constants may have become plain numbers by now.
        return ct_y, zeros(inexact(_at(solve.record.solver_state, 0))), ct_save

    def _row(self, inputs: list[Any], i: Any) -> Record:
        return _at(self.build(inputs).record, i)

    def _pull_saves(
        self, inputs: list[Any], i: Any, row: Record, out: Any, dense_rest: Any, ct: Any, cts: Any
    ) -> tuple[Any, Any, list[Any]]:
        """Add what was saved in step i: cotangents of y1, of the dense information, of what save functions hold."""
        solve, (y1, _, dense) = self.build(inputs), out
        ct_y, ct_save = cts
        ct_dense = zeros(dense)
        for k, (t0, _, steps) in enumerate(solve.subs):
            if solve.ts[k] is not None:
                found = (dense, dense_rest)
                ct_dense, ct_save = self._pull_times(inputs, k, i, row, found, ct[k], (ct_dense, ct_save))
            if steps:
                entry = _at(ct[k], (1 if t0 else 0) + (i + 1) // steps - 1)
                entry = where((i + 1) % steps == 0, entry, zeros(entry))
                a, b = self._pull_save(inputs, k, row.tnext, y1, entry)
                ct_save, ct_y = add(ct_save, a), add(ct_y, b)
        return ct_y, ct_dense, ct_save

    def _pull_times(
        self, inputs: list[Any], k: int, i: Any, row: Record, dense: Any, ct: Any, cts: tuple[Any, Any]
    ) -> tuple[Any, Any]:
        """Cotangents of the times that sub k saved within step i, pulled back to the step's dense information."""
        solve = self.build(inputs)
        after = solve.record.saved[k][jnp.minimum(i + 1, solve.length - 1)]
        high = jnp.where(i + 1 < solve.count, after, solve.saved[k])

        def one(carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            j, ct_dense, ct_save = carry
            t = solve.ts[k][j]

            def interpolate(d: Any) -> Any:
                return solve.interpolation(t0=row.tprev, t1=row.tnext, **eqx.combine(d, dense[1])).evaluate(t)

            y, pull = jax.vjp(interpolate, dense[0])
            a, b = self._pull_save(inputs, k, t, y, _at(ct, (1 if solve.subs[k][0] else 0) + j))
            return j + 1, add(ct_dense, pull(b)[0]), add(ct_save, a)

        _, ct_dense, ct_save = jax.lax.while_loop(lambda c: c[0] < high, one, (row.saved[k], *cts))
        return ct_dense, ct_save

    def _finish(self, inputs: list[Any], ct: Any, cts: tuple[Any, Any]) -> tuple[Any, Any]:
        """Add what was saved at t0."""
        solve, (ct_y, ct_save) = self.build(inputs), cts
        for k, (t0, _, _) in enumerate(solve.subs):
            if t0:
                a, b = self._pull_save(inputs, k, solve.t0, solve.y0, _at(ct[k], 0))
                ct_save, ct_y = add(ct_save, a), add(ct_y, b)
        return ct_y, ct_save

    # The loop, for one lane or all.

    def _back(self, i: Any, live: Any, lead: Any, ct: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        """Sweep over step i, of every lane that is live; ``lead`` is the number of one that is."""
        (ct_y, ct_state, ct_save), total = carry
        row = self.over(self._row, self.inputs, i)
        if self.many:
            # Another lane's step is one that must be swept over anyway: what it computes is as finite as the result.
            row = where(live, row, jtu.tree_map(lambda x: x[lead][None], row))

        moving = (row.y, inexact(row.solver_state))
        out, pull, rest = self.vjp(Solve.take, self.of_step, moving, (row,))
        seen_y, ct_dense, saved = self.over(self._pull_saves, self.inputs, i, row, out, rest, ct, (ct_y, ct_save))
        seen = (seen_y, ct_state, ct_dense)
        if self.many:
            seen = where(live, seen, zeros(seen))
            saved = where(live, saved, ct_save)
        more, new_y, new_state = pull(seen)
        if self.many:
            new_y, new_state = where(live, (new_y, new_state), (ct_y, ct_state))
        return (new_y, new_state, saved), add(total, more)

    def run(self, ct: Any) -> dict[int, Any]:
        """All cotangents that are wanted, by the number of their input."""
        taken = self.over(lambda inputs: self.build(inputs).taken, self.inputs)
        lead = jnp.argmax(taken) if self.many else None
        state = self.build(self.inputs).record.solver_state
        # Solvers look at their flags (is this the first step?) for all lanes at once, and one that is set changes the
        # others' arithmetic: then the first steps are taken together, after all others.
        apart = self.many and any(not eqx.is_inexact_array(x) for x in jtu.tree_leaves(state))
        first = 1 if apart else 0

        def body(loop: tuple[Any, Any]) -> tuple[Any, Any]:
            k, carry = loop
            i = taken - 1 - k
            return k + 1, self._back(jnp.maximum(i, 0), i >= first, lead, ct, carry)

        carry = (self.over(self._start, self.inputs, ct), [zeros(self.inputs[n]) for n in self.of_step])
        most = jnp.max(taken) - first
        _, carry = jax.lax.while_loop(lambda loop: loop[0] < most, body, (jnp.zeros_like(most), carry))
        if apart:
            carry = self._back(jnp.zeros_like(taken), taken > 0, lead, ct, carry)
        (ct_y, ct_state, ct_save), total = carry
        ct_y, ct_save = self.over(self._finish, self.inputs, ct, (ct_y, ct_save))

        out = dict(zip(self.of_step, total))
        starts = leaves_by_number(self.places.y0, ct_y) + leaves_by_number(self.places.solver_state0, ct_state)
        for place, value in (*zip(self.of_save, ct_save), *starts):
            out[place] = self.reduced(place, value)
        # A record that overflowed must never pass for a gradient.
        return self.spoiled(
            out, self.over(lambda inputs: self.build(inputs).count > self.build(inputs).length, self.inputs)
        )
