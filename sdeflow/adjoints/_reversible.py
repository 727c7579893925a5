"""Exact gradients with memory for one state: the reverse pass undoes the steps one after the other.

A reversible step can be inverted in closed form, so nothing has to be kept of the way but its end. The reverse pass
goes from row to row, recovers the state before each, and pulls the cotangent back through the step that it undid.

Reversible Heun (``diffrax.ReversibleHeun``), with v_n = f(t_n, z_n) and <v, c> the product with the row's control:

    z_{n+1} = 2 y_n - z_n + <v_n, c_n>,      y_{n+1} = y_n + <v_n + v_{n+1}, c_n> / 2.

In terms of u_n = y_n + <v_n, c_n> / 2 one has z_{n+1} = 2 u_n - z_n. So from (u_n, z_n) and the controls on either side

    y_n = u_n - <v_n, c_n> / 2,      u_{n-1} = y_n - <v_n, c_{n-1}> / 2,      z_{n-1} = 2 u_{n-1} - z_n

takes one evaluation of the field, the same that the pullback needs: a reverse step costs what it costs to recompute a
step and to differentiate it, and no more. `sdeflow.solvers.McCallumFoster` likewise takes each increment once.

Sources: Kidger, Foster, Li and Lyons, Efficient and accurate gradients for neural SDEs, 2021, arXiv:2105.13493;
McCallum and Foster, 2024, arXiv:2410.11648.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from ..paths._increments import backwards
from ..solvers import McCallumFoster
from ..solvers._charging import Charging
from ..walking import Carry, Rows, first_carry, prepare_solver, walk
from ._adaptive import can_record, check_record, length_of_record, replaying_loop
from ._attach import Flags, attach
from ._base import AbstractWalkAdjoint
from ._freeze import freeze
from ._lanes import Lanes, add, leaves_by_number, where, zeros
from ._sweep import inexact

_FIRST_ONLY = (
    "ReversibleAdjoint has first derivatives in reverse mode, by jax.grad: for second derivatives or forward mode pass "
    "adjoint=sdeflow.adjoints.DiscreteAdjoint()."
)


class ReversibleAdjoint(AbstractWalkAdjoint):
    """Undo the steps that were taken: exact gradients, with memory that does not grow with their number.

    Gradients are those of `DiscreteAdjoint` up to rounding. The solver must be reversible:
    ``diffrax.ReversibleHeun()``, or ``sf.solvers.McCallumFoster(solver)`` for any explicit one-step solver. Neither is
    stable for stiff equations.

    On fixed steps the reverse pass reconstructs the start from the end. How far it misses is the *defect*, relative to
    the size of the start: ``sol.stats["defect"]``. (If more, relative to what the first step leads to if it is taken as
    often as there are steps; and for a start near zero that hardly moves, to a tenth of what the solution usually is.)
    Where the defect is larger than ``max_defect`` gradients are NaN rather than wrong. An adaptive solve is recorded
    (times alone) and walked once more along its accepted steps.

    Gradients are of first order, in reverse mode, and with respect to all but times and noise.

    Arguments:
        max_defect: the largest defect for which gradients count as gradients.
        record: for adaptive steps only: how many accepted steps the record holds. Default: 256, and 4 more for every
            requested time of `sdeflow.solve`, at most ``max_steps``.

    Raises:
        ValueError: for another ``max_defect`` than a positive number or a ``record`` below 1; while tracing, for a
            solver that is not reversible, and for ``diffrax.ReversibleHeun`` along a grid with jumps.

    Example:
        >>> import diffrax, jax, jax.numpy as jnp, sdeflow as sf
        >>> decay = sf.ODE(lambda t, y, rate: -rate * y)
        >>> options = dict(dt0=0.1, solver=diffrax.ReversibleHeun(), adjoint=sf.adjoints.ReversibleAdjoint())
        >>> final = lambda rate: sf.solve(decay, jnp.array(1.0), [0.0, 1.0], args=rate, **options).final
        >>> round(float(jax.grad(final)(jnp.array(1.0))), 3)
        -0.367
    """

    max_defect: float = eqx.field(default=1e-2, static=True)
    record: int | None = eqx.field(default=None, static=True)

    def __check_init__(self):
        if not isinstance(self.max_defect, float | int) or not self.max_defect > 0:
            raise ValueError(f"max_defect must be a positive number, got {self.max_defect!r}.")
        check_record(self.record)

    def walk(
        self,
        solver: diffrax.AbstractSolver,
        terms: Any,
        args: Any,
        y0: PyTree,
        rows: Rows,
        *,
        every: int | None,
        emit: Callable[[Any, Carry, Any], Any],
        start: Carry | None = None,
    ) -> tuple[Carry, Any, dict[str, Any]]:
        """Walk all rows, to be undone in reverse."""
        check_reversible(solver, rows.jump is not None)
        solver = prepare_solver(solver)
        if start is None:
            start = first_carry(solver, terms, args, y0, rows, fallible=False)
        begin = Carry(start.y, start.solver_state, None)

        def ahead(begin: Carry) -> tuple[Carry, Any]:
            return walk(solver, terms, args, None, rows, checkpoints=None, every=every, emit=emit, start=begin)

        final, emitted = freeze(eqx.filter_closure_convert(ahead, begin))(freeze(begin))
        problem = _problem(solver, terms, args, rows, begin, final, None if every is None else emit)
        saved, rest = eqx.partition(emitted, eqx.is_inexact_array)
        notes = final.y[1] if isinstance(solver, Charging) else None
        values, values_def = jtu.tree_flatten((*problem.final, saved, notes))

        arrays, static = eqx.partition(problem, eqx.is_array)
        inputs, treedef = jtu.tree_flatten(arrays)
        places = treedef.unflatten(range(len(inputs)))
        build = lambda inputs: eqx.combine(treedef.unflatten(inputs), static)
        heun = isinstance(_inside(solver), diffrax.ReversibleHeun)
        kind = _UndoHeun if heun else _UndoCoupled

        def rule(inputs: list[Any], cts: list[Any], wanted: Flags, batched: Flags | None) -> list[Any]:
            chosen = [i for i, w in enumerate(wanted) if w]
            if set(jtu.tree_leaves((places.rows, places.fetch))) & set(chosen):
                raise ValueError(
                    "ReversibleAdjoint has no gradients with respect to times or noise: use "
                    "adjoint=sf.adjoints.DiscreteAdjoint()."
                )
            undo = kind(build, places, inputs, batched, chosen, every)
            out, defect = undo.run(*values_def.unflatten(cts))
            out = undo.spoiled(out, ~(defect <= self.max_defect))
            return [out[i] for i in chosen]

        values, _ = attach(rule, values, inputs, jnp.asarray(False), _FIRST_ONLY)
        y, hats, saved, notes = values_def.unflatten(values)
        own = solver.own(terms) if isinstance(solver, Charging) else terms
        state = (hats, own.vf(rows.right[-1], hats, args)) if heun else hats
        measure = kind(build, places, freeze(inputs), None, [], every)
        _, defect = measure.run(*zeros(values_def.unflatten(values)))
        y = (y, notes) if isinstance(solver, Charging) else y
        taken = start.taken
        if taken is not None:
            taken = taken + (rows.length if rows.live is None else rows.live.sum(dtype=taken.dtype))
        return Carry(y, state, start.result, taken), eqx.combine(saved, rest), {"defect": defect}

    def check_solver(self, solver: diffrax.AbstractSolver) -> None:
        """Refuse a solver whose steps it cannot undo."""
        check_reversible(solver, False)

    def loop(self, **kwargs: Any) -> Any:
        """The loop of ``diffrax.diffeqsolve``: by walking, adaptive steps a second time along those accepted."""
        if can_record(kwargs):
            check_reversible(kwargs["solver"], False)
            return replaying_loop(self, length_of_record(self.record, kwargs), **kwargs)
        return super().loop(**kwargs)


def check_reversible(solver: Any, jumps: bool) -> None:
    """Refuse a solver whose steps cannot be undone.

    Raises:
        ValueError: naming the solver and what can be used.
    """
    solver = _inside(solver)
    name = type(solver).__name__
    if isinstance(solver, diffrax.ReversibleHeun):
        if jumps:
            raise ValueError(
                "ReversibleHeun takes its slope afresh where the field jumps, which cannot be undone: use "
                "sf.solvers.McCallumFoster(diffrax.Heun()), or adjoint=sf.adjoints.DiscreteAdjoint()."
            )
    elif not isinstance(solver, McCallumFoster):
        raise ValueError(  # noqa: TRY004
            f"ReversibleAdjoint cannot undo the steps of {name}: use solver=diffrax.ReversibleHeun(), or "
            f"sf.solvers.McCallumFoster({name}()) if it is explicit, or "
            'adjoint=sf.adjoints.DiscreteAdjoint(checkpoints="sqrt").'
        )


def _inside(solver: Any) -> Any:
    return solver.solver if isinstance(solver, Charging) else solver


class _Problem(eqx.Module):
    """All that the reverse pass reads.

    Arguments:
        step: what is undone; for reversible Heun ``(u_prev, z, here, next, more) -> ((y, u, z_next), halves)``, for
            coupled copies ``(y, from, to, increments) -> Psi``; with what it closes over.
        half: for reversible Heun ``(v, next) -> <v, c> / 2``.
        fetch: ``(noise, left, right) -> increments`` of a row.
        save: ``(t, y_prev, y)``, what is kept of a row; None if nothing is.
        charge: ``(y, z, here) -> notes``, what a row adds to the notes of a charging solver, from the state before it.
        coupling: c of coupled copies.
        rows: left, right, live and noise of all rows.
        start, final: the floating states at either end: (y, z), and for reversible Heun v at the start.
        notes: those of a charging solver at the start.
    """

    step: Any
    half: Any
    fetch: Any
    save: Any
    charge: Any
    coupling: Any
    rows: tuple[Any, Any, Any, Any]
    start: tuple[Any, ...]
    final: tuple[Any, ...]
    notes: Any


def _problem(solver: Any, terms: Any, args: Any, rows: Rows, begin: Carry, final: Carry, emit: Any) -> _Problem:
    fetch = lambda noise, left, right: rows.source.increments(noise, left, right, rows.own_grid)
    noise = jtu.tree_map(lambda x: x[0], rows.noise)
    times = (rows.left[0], rows.right[0])
    increments = eqx.filter_eval_shape(fetch, noise, *times)
    increments = jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), increments)
    y, last, half, coupling, notes = begin.y, final.y, None, None, None
    charge = None
    charging, all_terms, paired = solver, terms, lambda y: y
    if isinstance(solver, Charging):
        (y, notes), last = begin.y, final.y[0]
        solver, terms = solver.solver, solver.own(terms)
        nothing = freeze(zeros(notes))
        paired = lambda y: (y, nothing)
    heun = isinstance(solver, diffrax.ReversibleHeun)
    control = lambda left, right, noise: rows.source.install(terms, noise, left, right).contr(left, right)

    if heun:

        def halved(v: Any, left: Any, right: Any, noise: Any) -> Any:
            return jtu.tree_map(lambda x: x / 2, terms.prod(v, control(left, right, noise)))

        def heun_step(u: Any, z: Any, here: Any, after: Any, more: Any) -> Any:
            v = terms.vf(here[1], z, args)
            before, beyond = halved(v, *here), halved(v, *after)
            beyond = jtu.tree_map(lambda x: jnp.where(more, x, 0), beyond)
            y, u = add(u, before), add(add(u, before), beyond)
            return (y, u, jtu.tree_map(lambda u, z: 2 * u - z, u, z)), (before, beyond)

        z, v = begin.solver_state
        row = (*times, increments)
        half = eqx.filter_closure_convert(halved, v, *row)
        step = eqx.filter_closure_convert(heun_step, y, z, row, row, jnp.asarray(True))
        start, final_ = (y, z, v), (last, final.solver_state[0])
    else:

        def increment(y: Any, t0: Any, t1: Any, noise: Any) -> Any:
            return solver.increment(rows.source.install(terms, noise, t0, t1), t0, t1, y, args)[0]

        step = eqx.filter_closure_convert(increment, y, *times, increments)
        coupling = jnp.asarray(solver.c, rows.left.dtype)
        z = begin.solver_state
        start, final_ = (y, z), (last, final.solver_state)

    if charging is not solver:

        def added(y: Any, z: Any, left: Any, right: Any, noise: Any) -> Any:
            here = rows.source.install(all_terms, noise, left, right)
            state = (z, terms.vf(left, z, args)) if heun else z
            return charging.step(here, left, right, paired(y), args, state, False)[0][1]

        charge = eqx.filter_closure_convert(added, y, z, *times, increments)

    save = None
    if emit is not None:
        dense = lambda y0, y: {"y0": y0, "y1": y}
        if charging is not solver:
            dense = lambda y0, y: {"dense": {"y0": y0, "y1": y}, "notes": paired(y)[1]}
        kept = lambda t, y0, y: inexact(emit(t, Carry(paired(y), None, None), (None, dense(y0, y))))
        save = eqx.filter_closure_convert(kept, times[1], y, y)
    fetch = eqx.filter_closure_convert(fetch, noise, *times)
    all_rows = (rows.left, rows.right, rows.live, rows.noise)
    return _Problem(step, half, fetch, save, charge, coupling, all_rows, start, freeze(final_), notes)


class _Undo(Lanes):
    """One reverse pass: cotangents of the ``chosen`` inputs, by their numbers."""

    def __init__(self, build: Any, places: Any, inputs: list[Any], batched: Any, chosen: list[int], every: int | None):
        super().__init__(build, inputs, batched)
        self.places, self.every = places, every
        self.of_step = [i for i in chosen if i in set(jtu.tree_leaves((places.step, places.half, places.charge)))]
        self.of_save = [i for i in chosen if i in set(jtu.tree_leaves(places.save))]
        self.problem = build(inputs)

    def enter(self, last: Any, ct_y: Any, ct_z: Any) -> Any:
        """What is carried from row to row, before the last one."""
        raise NotImplementedError

    def back(
        self, carry: Any, here: Any, live: Any, saved: Callable[[Any], Any]
    ) -> tuple[Any, list[Any], list[Any], Any]:
        """Undo a row: the carry before it, what the inputs of the step and of the save function gain, what was seen."""
        raise NotImplementedError

    def leave(self, carry: Any, first: Callable[[], Any]) -> tuple[Any, Any, Any, list[Any]]:
        """The start as it was reconstructed, the move from the true one, cotangents, and what the step's inputs gain.

        Arguments:
            first: reads the first row.
        """
        raise NotImplementedError

    def run(self, ct_y: Any, ct_z: Any, ct_saved: Any, ct_notes: Any) -> tuple[dict[int, Any], Any]:
        """All cotangents that are wanted, and the defect."""
        self.ct_notes = ct_notes
        rows = self.by_time(self.problem.rows, self.places.rows)
        length = jtu.tree_leaves(rows[0])[0].shape[0]

        def read(row: Any) -> tuple[Any, Any]:
            left, right, live, noise = self.for_all(row, self.places.rows)
            noise = self.over(lambda inputs, *x: self.build(inputs).fetch(*x), self.inputs, noise, left, right)
            return (left, right, noise), live

        def body(carry: Any, xs: Any) -> tuple[Any, None]:
            i, row = xs
            state, of_step, of_save, sizes = carry
            here, live = read(row)

            def saved(y: Any) -> Any:
                size = self._rms(y)
                counts = size > 0 if live is None else (size > 0) & live
                seen = (jnp.where(counts, jnp.where(counts, size, 1) ** -0.25, 0), counts.astype(size.dtype))
                return self._pull_saved(i, here[1], y, ct_saved), seen

            state, more, kept, seen = self.back(state, here, live, saved)
            return (state, add(of_step, more), add(of_save, kept), add(sizes, seen)), None

        last, _ = read(jtu.tree_map(lambda x: x[-1], rows))
        gains = [[zeros(self.inputs[n]) for n in numbers] for numbers in (self.of_step, self.of_save)]
        sizes = zeros((self._rms(ct_y), self._rms(ct_y)))
        carry = (self.enter(last, ct_y, ct_z), *gains, sizes)
        (state, of_step, of_save, (inverse, count)), _ = jax.lax.scan(
            body, carry, (jnp.arange(length), rows), reverse=True
        )
        found, move, cts, more = self.leave(state, lambda: read(jtu.tree_map(lambda x: x[0], rows))[0])
        out = dict(zip(self.of_step, add(of_step, more))) | dict(zip(self.of_save, of_save))
        ends = leaves_by_number(self.places.start, cts) + leaves_by_number(self.places.notes, ct_notes)
        for place, value in ends:
            out[place] = self.reduced(place, value)
        # A mean that leans to the small: of a solution that grew, the size that it had early, beside which a gap at the
        # start has to be seen; of one that began at zero, not the moment when it did.
        usual = (count / jnp.where(inverse > 0, inverse, 1)) ** 4
        measure = lambda inputs, found, move, usual: _defect(found, move, usual, self.build(inputs))
        defect = self.over(measure, self.inputs, found, move, usual)
        return out, defect

    def _rms(self, tree: Any) -> Any:
        """The root mean square of all numbers of a solve."""
        leaves = [jnp.square(jnp.abs(x)) for x in jtu.tree_leaves(tree)]
        axes = lambda x: tuple(range(int(self.many), x.ndim))
        count = sum(x.size for x in leaves) // (self.size if self.many else 1)
        return jnp.sqrt(sum(x.sum(axis=axes(x)) for x in leaves) / count)

    def _pull_saved(self, i: Any, t: Any, y: Any, ct: Any) -> tuple[list[Any], Any, Any]:
        """Cotangents of the save function's inputs, of the state before row i and of the one after it, ``y``."""
        nothing = ([zeros(self.inputs[n]) for n in self.of_save], zeros(y), zeros(y))
        if self.every is None:
            return nothing
        at = lambda x, k: x[:, k] if self.many else x[k]

        def pulled() -> Any:
            save = lambda problem, y0, y, t: (problem.save(t, y0, y), None)
            # What depends on the state before the row does so linearly, so any state will do.
            _, pull, _ = self.vjp(save, self.of_save, (y, y), (t,))
            return pull(jtu.tree_map(lambda x: at(x, i // self.every), ct))

        if self.every == 1:
            return pulled()
        return jax.lax.cond((i + 1) % self.every == 0, pulled, lambda: nothing)

    def charged(self, y: Any, z: Any, row: Any, live: Any) -> tuple[list[Any], Any, Any]:
        """Cotangents of the step's inputs and of the state (y, z) from what the row that starts there was charged."""
        if self.problem.charge is None:
            return [zeros(self.inputs[n]) for n in self.of_step], zeros(y), zeros(z)
        charge = lambda problem, y, z, row: (problem.charge(y, z, *row), None)
        _, pull, _ = self.vjp(charge, self.of_step, (y, z), (row,))
        return pull(self.only(live, self.ct_notes))

    def only(self, live: Any, tree: Any) -> Any:
        """Cotangents of a row: none where it is padding."""
        return tree if live is None else where(live, tree, zeros(tree))


def _defect(found: tuple[Any, ...], move: Any, usual: Any, problem: _Problem) -> Any:
    """How far the reconstructed start is from the true one.

    The end says nothing of how large a gap is: where a solution grew, what is small beside the end may be large beside
    the start, and a wrong start has wrong slopes.

    Arguments:
        found: the start as it was reconstructed.
        move: the first step from the true start.
        usual: a mean of the sizes of the solution that leans to the small.
    """
    flat = lambda tree: jnp.concatenate([jnp.abs(x).ravel() for x in jtu.tree_leaves(tree)])
    rms = lambda x: jnp.sqrt(jnp.mean(x**2))
    begin, (left, _, live, _) = problem.start[:2], problem.rows
    steps = left.shape[0] if live is None else jnp.maximum(live.sum(), 1)
    size = jnp.maximum(rms(flat(begin)), steps * rms(flat(move)))
    # Where a start of zero does not move at first either, only what comes later says what is large.
    size = jnp.where(size < usual / 100, usual / 10, size)
    gap = rms(flat(jtu.tree_map(jnp.subtract, found, begin)))
    return jnp.where(size > 0, gap / jnp.where(size > 0, size, 1), gap)


class _UndoHeun(_Undo):
    def enter(self, last: Any, ct_y: Any, ct_z: Any) -> Any:
        y, z = self.for_all(self.problem.final, self.places.final)
        more = jnp.zeros((self.size,) if self.many else (), bool)
        # As if a step without noise and of no length followed, so that the end is like any other place.
        ct_u = jtu.tree_map(lambda a, b: a + 2 * b, ct_y, ct_z)
        return (y, z, last, more), (ct_u, jtu.tree_map(jnp.negative, ct_z), zeros(ct_y))

    def back(
        self, carry: Any, here: Any, live: Any, saved: Callable[[Any], Any]
    ) -> tuple[Any, list[Any], list[Any], Any]:
        (u, z, after, more), (ct_u, ct_z, pending) = carry
        step = lambda problem, *x: problem.step(*x)
        _, pull, (before, beyond) = self.vjp(step, self.of_step, (zeros(u), z), (here, after, more))
        y = jtu.tree_map(jnp.subtract, u, beyond)
        (of_save, ct_before, ct_y), seen = saved(y)
        charged = more if live is None else more & live
        of_charge, of_y, of_z = self.charged(y, z, after, charged)
        held, new_u, new_z = pull(self.only(live, (add(add(ct_y, pending), of_y), ct_u, ct_z)))
        held, new_z = add(held, of_charge), add(new_z, of_z)
        u1 = jtu.tree_map(jnp.subtract, y, before)
        z1 = jtu.tree_map(lambda u, z: 2 * u - z, u1, z)
        new = (u1, z1, here, jnp.ones_like(more)), (new_u, new_z, ct_before)
        if live is not None:
            # What padding kept is the last state, whose cotangent this then is.
            ct_u = add(ct_u, add(ct_before, ct_y))
            new = where(live, new, ((u, z, after, more), (ct_u, ct_z, pending)))
        return new, held, of_save, seen

    def leave(self, carry: Any, first: Callable[[], Any]) -> tuple[Any, Any, Any, list[Any]]:
        del first
        (u, z, after, more), (ct_u, ct_z, pending) = carry

        def begin(problem: _Problem, y: Any, z: Any, v: Any, after: Any, more: Any) -> Any:
            half = jtu.tree_map(lambda x: jnp.where(more, x, 0), problem.half(v, *after))
            u = add(y, half)
            return (u, jtu.tree_map(lambda u, z: 2 * u - z, u, z)), half

        start = self.for_all(self.problem.start, self.places.start)
        _, pull, half = self.vjp(begin, self.of_step, start, (after, more))
        held, ct_y, ct_hat, ct_v = pull((ct_u, ct_z))
        of_charge, of_y, of_z = self.charged(start[0], start[1], after, more)
        found = (jtu.tree_map(jnp.subtract, u, half), z)
        return found, add(half, half), (add(add(ct_y, pending), of_y), add(ct_hat, of_z), ct_v), add(held, of_charge)


class _UndoCoupled(_Undo):
    def enter(self, last: Any, ct_y: Any, ct_z: Any) -> Any:
        del last
        return self.for_all(self.problem.final, self.places.final), (ct_y, ct_z, zeros(ct_y))

    def back(
        self, carry: Any, here: Any, live: Any, saved: Callable[[Any], Any]
    ) -> tuple[Any, list[Any], list[Any], Any]:
        (y1, z1), (ct_y, ct_z, pending) = carry
        left, right, noise = here
        c = self.for_all(self.problem.coupling, self.places.coupling)
        times = lambda c, x: jnp.reshape(c, jnp.shape(c) + (1,) * (x.ndim - jnp.ndim(c))).astype(x.dtype) * x
        step = lambda problem, *x: (problem.step(*x), None)
        (of_save, ct_before, ct_after), seen = saved(y1)
        total = add(ct_y, add(ct_after, pending))

        down = tuple(map(backwards, noise))
        psi, pull, _ = self.vjp(step, self.of_step, (y1,), (right, left, down))
        held, more = pull(self.only(live, jtu.tree_map(jnp.negative, ct_z)))
        total = add(total, more)
        z = add(z1, psi)
        psi, pull, _ = self.vjp(step, self.of_step, (z,), (left, right, noise))
        held_too, more = pull(self.only(live, total))
        y = jtu.tree_map(lambda y1, z, psi: times(1 / c, y1 - times(1 - c, z) - psi), y1, z, psi)
        new_z = jtu.tree_map(lambda a, b, more: a + times(1 - c, b) + more, ct_z, total, more)
        of_charge, of_y, of_z = self.charged(y, z, here, live)
        new_y = jtu.tree_map(lambda x, more: times(c, x) + more, total, of_y)
        new = (y, z), (new_y, add(new_z, of_z), ct_before)
        if live is not None:
            new = where(live, new, ((y1, z1), (add(ct_y, add(ct_before, ct_after)), ct_z, pending)))
        return new, add(add(held, held_too), of_charge), of_save, seen

    def leave(self, carry: Any, first: Callable[[], Any]) -> tuple[Any, Any, Any, list[Any]]:
        (y, z), (ct_y, ct_z, pending) = carry
        _, start = self.for_all(self.problem.start, self.places.start)
        left, right, noise = first()
        step = lambda inputs, *x: self.build(inputs).step(*x)
        move = self.over(step, self.inputs, start, left, right, noise)
        return (y, z), move, (add(ct_y, pending), ct_z), [zeros(self.inputs[n]) for n in self.of_step]
