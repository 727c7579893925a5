"""The reverse pass of the adjoints that solve an equation backwards: from row to row, with jumps at kept states.

At the end of every row the cotangents of what was kept there are added to a, then the row is taken from its end to its
start. Rows may be differentiated with respect to their ends, where nothing but time drives the equation:

    dL/d(right) = a f(right, y),      dL/d(left) = -a f(left, y).
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._results import RESULTS, is_okay
from ..walking import Carry, Rows, first_carry, prepare_solver, walk
from ..walking._row import FallibleStep, step_row
from ._attach import Flags, attach
from ._fields import Field, depends, parts, read_fields
from ._freeze import freeze
from ._lanes import Lanes, add, dot, leaves_by_number, where, zeros
from ._sweep import inexact


class Problem(eqx.Module):
    """All that the reverse pass reads.

    Arguments:
        fields: the terms of the equation, with what they hold.
        controls: ``(noise, left, right)``, what drives those that are noise, backwards.
        save: ``(left, right, noise, y_prev, y)``, what is kept of a row; None if nothing is.
        solver: what takes the rows backwards.
        rows: left, right, live, noise and dense information of all rows, the last None if it is not kept.
        start, final: the states at either end.
        multi: whether the terms are a sum (static).
        levy: whether the noise comes with its Levy area (static).
        looks_back: whether what is kept of a row depends on the state before it (static).
    """

    fields: tuple[Field, ...]
    controls: Any
    save: Any
    solver: Any
    rows: tuple[Any, Any, Any, Any, Any]
    start: PyTree
    final: PyTree
    multi: bool = eqx.field(static=True)
    levy: bool = eqx.field(static=True)
    looks_back: bool = eqx.field(static=True)


class Backwards(Lanes):
    """One reverse pass: cotangents of the ``chosen`` inputs, by their numbers."""

    def __init__(self, build: Any, places: Any, inputs: list[Any], batched: Any, chosen: list[int], every: int | None):
        super().__init__(build, inputs, batched)
        self.places, self.every = places, every
        self.of_step = [i for i in chosen if i in set(jtu.tree_leaves(places.fields))]
        self.of_save = [i for i in chosen if i in set(jtu.tree_leaves(places.save))]
        self.of_times = bool(set(places.rows[:2]) & set(chosen))
        self.problem = build(inputs)

    def ends(self, y: Any, here: Any, dense: Any) -> tuple[Any, Any]:
        """The states before and after a row; the former only counts where what is kept looks back."""
        raise NotImplementedError

    def back(self, y: Any, a: Any, here: Any, dense: Any, live: Any) -> tuple[Any, Any, Any, list[Any]]:
        """Take a row backwards: y and a before it, whether that went well, and what the inputs of fields gain."""
        raise NotImplementedError

    def run(self, ct_y: Any, ct_saved: Any) -> tuple[dict[int, Any], Any, Any]:
        """All cotangents that are wanted, the start as it was reconstructed, and whether all went well."""
        rows = self.by_time(self.problem.rows, self.places.rows)
        length = jtu.tree_leaves(rows[0])[0].shape[0]

        def body(carry: Any, xs: Any) -> tuple[Any, Any]:
            i, row = xs
            (y, a, pending, okay), of_step, of_save = carry
            left, right, live, noise, dense = self.for_all(row, self.places.rows)
            here = (left, right, noise)
            before, after = self.ends(y, here, dense)
            kept, ct_left, ct_right, ct_before, ct_after = self._pull_saved(i, here, before, after, ct_saved)
            a1 = add(a, add(pending, ct_after))
            y0, a0, good, held = self.back(after, a1, here, dense, live)
            if self.of_times:
                before = y0 if self.places.rows[4] is None else before
                ct_right = ct_right + self._only(live, self._slope(right, after, a1))
                ct_left = ct_left - self._only(live, self._slope(left, before, a0))
            new = (y0, a0, ct_before, okay & good)
            if live is not None:
                # What padding kept is the last state, whose cotangent this then is.
                new = where(live, new, (y, add(a1, ct_before), zeros(pending), okay))
            return (new, add(of_step, held), add(of_save, kept)), (ct_left, ct_right)

        gains = [[zeros(self.inputs[n]) for n in numbers] for numbers in (self.of_step, self.of_save)]
        okay = jnp.ones((self.size,) if self.many else (), bool)
        final = self.for_all(self.problem.final, self.places.final)
        carry = ((final, ct_y, zeros(ct_y), okay), *gains)
        (state, of_step, of_save), times = jax.lax.scan(body, carry, (jnp.arange(length), rows), reverse=True)
        found, a, pending, okay = state
        out = dict(zip(self.of_step, of_step)) | dict(zip(self.of_save, of_save))
        times = jtu.tree_map(lambda x: jnp.moveaxis(x, 0, -1), times)
        starts = leaves_by_number(self.places.start, add(a, pending))
        for place, value in (*starts, *zip(self.places.rows[:2], times)):
            out[place] = self.reduced(place, value)
        return out, found, okay

    def _slope(self, t: Any, y: Any, a: Any) -> Any:
        slope = lambda inputs, t, y, a: sum(dot(a, field.call(t, y)) for field in self.build(inputs).fields)
        return self.over(slope, self.inputs, t, y, a)

    def _pull_saved(self, i: Any, here: Any, y0: Any, y: Any, ct: Any) -> tuple[list[Any], Any, Any, Any, Any]:
        """Cotangents of what the save function holds, of the ends of row i and of the states there."""
        left, right, noise = here
        nothing = ([zeros(self.inputs[n]) for n in self.of_save], zeros(left), zeros(right), zeros(y), zeros(y))
        if self.every is None:
            return nothing
        at = lambda x, k: x[:, k] if self.many else x[k]

        def pulled() -> Any:
            save = lambda problem, left, right, y0, y, noise: (problem.save(left, right, noise, y0, y), None)
            _, pull, _ = self.vjp(save, self.of_save, (left, right, y0, y), (noise,))
            return pull(jtu.tree_map(lambda x: at(x, i // self.every), ct))

        if self.every == 1:
            return pulled()
        return jax.lax.cond((i + 1) % self.every == 0, pulled, lambda: nothing)

    def _only(self, live: Any, tree: Any) -> Any:
        """Cotangents of a row: none where it is padding."""
        return tree if live is None else where(live, tree, zeros(tree))

    def charged(self, step: Callable[..., Any], fixed: tuple[Any, ...], live: Any) -> tuple[Any, list[Any]]:
        """``step(problem, *fixed) -> (s, auxiliary)``: the latter, and what the inputs of fields gain by s."""
        if not self.of_step:
            return self.over(lambda inputs, *x: step(self.build(inputs), *x)[1], self.inputs, *fixed), []
        s, pull, out = self.vjp(step, self.of_step, (), fixed)
        (held,) = pull(self._only(live, jnp.ones_like(s)))
        return out, held


def walk_backwards(
    kind: type[Backwards],
    name: str,
    solver: diffrax.AbstractSolver,
    terms: Any,
    args: Any,
    y0: PyTree,
    rows: Rows,
    *,
    every: int | None,
    emit: Callable[[Any, Carry, Any], Any],
    start: Carry | None,
    keep_dense: bool,
    check: Callable[[tuple[Field, ...]], Any],
    judge: Callable[[Problem, Any], Any] = lambda problem, found: jnp.asarray(False),
) -> tuple[Carry, Any, Problem]:
    """Walk all rows, with a reverse pass of this kind as the gradient; the arguments are those of a walk, and more.

    Arguments:
        name: of the adjoint, for what it says.
        keep_dense: whether the reverse pass reads the dense information of all rows.
        check: given the fields, refuses what the adjoint cannot do; returns what takes the rows backwards, or None for
            the solver itself.
        judge: given the problem and the start as it was reconstructed, whether the gradient is none.

    Returns:
        The last carry, what was emitted, and the problem that the reverse pass reads.
    """
    solver = prepare_solver(solver)
    levy = isinstance(solver, diffrax.AbstractSRK)
    begin = first_carry(solver, terms, args, y0, rows, fallible=False) if start is None else start
    y = begin.y
    fields, controls = read_fields(terms, args, rows, y, levy)
    follower = check(fields)

    def watch(right: Any, carry: Carry, info: Any) -> Any:
        kept = None if every is None else emit(right, carry, info if every == 1 else None)
        went = None if carry.result is None else is_okay(carry.result)
        return kept, {**info[1], "y1": carry.y}, went

    def ahead(begin: Carry) -> Any:
        options = {"every": 1, "emit": watch} if keep_dense else {"every": every, "emit": emit}
        return walk(solver, terms, args, None, rows, checkpoints=None, start=begin, **options)

    try:
        run = eqx.filter_closure_convert(ahead, begin)
    except FallibleStep:
        begin = Carry(begin.y, begin.solver_state, RESULTS.successful, jnp.zeros((), jnp.int32))
        run = eqx.filter_closure_convert(ahead, begin)
    final, emitted = freeze(run)(freeze(begin))
    live, dense = rows.live, None
    if keep_dense:
        emitted, dense, went = emitted
        if every not in (None, 1):
            emitted = jtu.tree_map(lambda x: x[every - 1 :: every], emitted)
        if went is not None:
            live = went if live is None else live & went
    save, looks_back = (None, False) if every is None else _saving(solver, terms, args, rows, begin, emit, every)
    problem = Problem(
        fields, controls, save, freeze(solver if follower is None else follower),
        (rows.left, rows.right, live, rows.noise, freeze(dense)), y, freeze(final.y),
        isinstance(terms, diffrax.MultiTerm), levy, looks_back,
    )  # fmt: skip

    saved, rest = eqx.partition(emitted, eqx.is_inexact_array)
    values, values_def = jtu.tree_flatten((final.y, saved))
    arrays, static = eqx.partition(problem, eqx.is_array)
    inputs, treedef = jtu.tree_flatten(arrays)
    places = treedef.unflatten(range(len(inputs)))
    build = lambda inputs: eqx.combine(treedef.unflatten(inputs), static)
    fixed = set(jtu.tree_leaves((places.controls, places.rows[2:])))
    if any(field.kind != "time" for field in fields):
        fixed |= set(places.rows[:2])

    def rule(inputs: list[Any], cts: list[Any], wanted: Flags, batched: Flags | None) -> list[Any]:
        chosen = [i for i, w in enumerate(wanted) if w]
        if fixed & set(chosen):
            raise ValueError(
                f"{name} has no gradients with respect to noise, nor to times where more than time drives the "
                "equation: use adjoint=sf.adjoints.DiscreteAdjoint()."
            )
        reverse = kind(build, places, inputs, batched, chosen, every)
        out, found, okay = reverse.run(*values_def.unflatten(cts))
        okay = okay & ~reverse.over(lambda inputs, x: judge(build(inputs), x), inputs, found)
        out = reverse.spoiled(out, ~okay)
        return [out[i] for i in chosen]

    advice = (
        f"{name} has first derivatives in reverse mode, by jax.grad: for second derivatives or forward mode pass "
        "adjoint=sdeflow.adjoints.DiscreteAdjoint()."
    )
    values, _ = attach(rule, values, inputs, jnp.asarray(False), advice)
    y, saved = values_def.unflatten(values)
    return Carry(y, final.solver_state, final.result, final.taken), eqx.combine(saved, rest), problem


def _saving(
    solver: Any, terms: Any, args: Any, rows: Rows, begin: Carry, emit: Callable[..., Any], every: int
) -> tuple[Any, bool]:
    """What is kept of a row, with what that closes over, and whether it depends on the state before the row."""
    row = jtu.tree_map(lambda x: x[0], (rows.left, rows.right, rows.noise))
    y = begin.y

    def stepped(left: Any, right: Any, noise: Any, y0: Any) -> Any:
        state = solver.init(terms, left, right, y0, args)
        _, (_, dense) = step_row(
            solver, terms, args, rows, Carry(y0, state, RESULTS.successful), (left, right, None, None, noise)
        )
        return dense

    shapes = eqx.filter_eval_shape(stepped, *row, y)
    sample = jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    kept = lambda t, y, dense: inexact(emit(t, Carry(y, None, None), (None, dense) if every == 1 else None))
    looks_back = depends(lambda dense: kept(row[1], y, dense), sample)

    def save(left: Any, right: Any, noise: Any, y0: Any, y: Any) -> Any:
        # Where nothing looks back no step is taken, so that what it holds is not held twice.
        return kept(right, y, stepped(left, right, noise, y0) if looks_back else zeros(sample))

    return eqx.filter_closure_convert(save, *row, y, y), looks_back


def check_terms(name: str, terms: Any) -> None:
    """Refuse terms that are not one sum.

    Raises:
        ValueError: naming the adjoint and what can be used.
    """
    whole = isinstance(terms, diffrax.AbstractTerm)
    if not whole or any(isinstance(term, diffrax.MultiTerm) for term in parts(terms)):
        raise ValueError(f"{name} takes no split terms: use adjoint=sf.adjoints.DiscreteAdjoint().")
