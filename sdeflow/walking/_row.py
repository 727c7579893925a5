"""One row of a walk: a diffrax solver's step over ``(left, right)``, driven by the row's own noise.

A padded row leaves state and result as they are, bit for bit. A step that reports a failure (a diverged Newton solve,
say) freezes the path at its last okay state, as ``diffrax.diffeqsolve`` stops there.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._compat import finding_roots_with
from .._results import RESULTS, is_okay, promote
from ..paths._rows import RowNoise
from ..solvers import McCallumFoster
from ..solvers._charging import Charging
from ..solvers._newton import StageAdjoint
from ..solvers._unrolled import UnrolledERK, UnrolledSRK, unrolled, with_all_derivatives


class Rows(eqx.Module):
    """What a walk runs over: N steps and what each carries. Every array leads with N.

    Arguments:
        left, right: (N,) the ends of the steps.
        live: (N,) False for padding; None when there is none.
        jump: (N,) whether the field may jump at ``left``; None when it never does.
        noise: one entry a Brownian path, as `RowNoise.draw` made it.
        source: where the noise comes from.
        own_grid: the rows are those of the paths' own grids.
    """

    left: Array
    right: Array
    live: Array | None
    jump: Array | None
    noise: Any
    source: RowNoise
    own_grid: bool = eqx.field(static=True)

    @property
    def arrays(self) -> Any:
        """The part of the rows that a scan slices."""
        return (self.left, self.right, self.live, self.jump, self.noise)

    @property
    def length(self) -> int:
        """N."""
        return self.left.shape[0]


class Carry(eqx.Module):
    """What a walk carries from row to row: the state and the solver's own state.

    If steps can fail, also the result and the number of rows that were accepted.
    """

    y: PyTree[Array]
    solver_state: PyTree[Array]
    result: Any
    taken: Any = None


class FallibleStep(Exception):
    """Raised while tracing when a step returns a result although the carry has no place for one."""


def make_rows(
    terms: Any,
    left: Array,
    right: Array,
    live: Array | None = None,
    jump: Array | None = None,
    *,
    own_grid: bool,
    within: bool = False,
    index: Array | None = None,
) -> Rows:
    """Rows over the given steps, with the noise of the Brownian paths in ``terms`` drawn for all of them.

    Arguments:
        within: the solver asks for other spans than its steps, so the paths themselves stay in its terms.
    """
    source = RowNoise.of(terms, within)
    index = jnp.arange(left.shape[0]) if index is None else index
    noise = source.draw(index, left, right, own_grid)
    return Rows(left, right, live, jump, noise, source, own_grid)


def asks_otherwise(solver: Any) -> str:
    """What a solver asks its path for if that is not its step: "halves of its steps", say; nothing if it is."""
    if isinstance(solver, diffrax.HalfSolver):
        return "halves of its steps"
    if isinstance(solver, diffrax.LeapfrogMidpoint):
        return "two of its steps at once"
    inner = getattr(solver, "solver", None)
    return "" if inner is None else asks_otherwise(inner)


def straighten(
    solver: diffrax.AbstractSolver, looping: Callable[[Any], Any] = lambda solver: solver, times: int = 1
) -> Any:
    """The solver with the stages of small tableaus written out, wrapped solvers included.

    Arguments:
        looping: what to do with a solver that goes on looping over its stages.
        times: how often what wraps the solver calls it in one step.
    """
    if isinstance(solver, McCallumFoster):
        return solver
    straight = unrolled(solver, times)
    if straight is not None:
        return straight
    # Two halves and the whole: three times the code of one step, which soon costs more to compile than it saves.
    times *= 3 if isinstance(solver, diffrax.HalfSolver) else 1
    inner = {field.name: getattr(solver, field.name, None) for field in dataclasses.fields(solver)}
    changes = {k: straighten(x, looping, times) for k, x in inner.items() if isinstance(x, diffrax.AbstractSolver)}
    return looping(dataclasses.replace(solver, **changes) if changes else solver)


def prepare_solver(solver: diffrax.AbstractSolver) -> diffrax.AbstractSolver:
    """The solver that takes a walk's steps: straightened, and with derivatives of every order, without callbacks."""
    return straighten(solver, lambda x: finding_roots_with(with_all_derivatives(x), StageAdjoint()))


def _innermost(solver: Any) -> Any:
    """The solver whose state is that of this one."""
    inner = getattr(solver, "solver", None)
    has_own = _is_straight(solver) or isinstance(solver, McCallumFoster)
    wraps = isinstance(inner, diffrax.AbstractSolver) and not has_own
    return _innermost(inner) if wraps else solver


def _is_straight(solver: Any) -> bool:
    # Not isinstance, for which a wrapped solver passes as what it wraps.
    return issubclass(type(solver), UnrolledERK | UnrolledSRK)


def _adds_no_state(solver: Any) -> bool:
    """Whether the state of a prepared solver is that of the innermost one; what users write may keep more."""
    known = _is_straight(solver) or not isinstance(getattr(solver, "solver", None), diffrax.AbstractSolver)
    return known or (type(solver) in (diffrax.HalfSolver, Charging) and _adds_no_state(solver.solver))


def loops_over_stages(solver: Any) -> bool:
    """Whether a walk with this solver uses diffrax's loop over the stages of a Runge-Kutta method."""
    inner = _innermost(prepare_solver(solver))
    return not _is_straight(inner) and isinstance(inner, diffrax.AbstractRungeKutta)


def restarts(solver: Any, state: Any) -> bool:
    """Whether the state of a prepared solver before a step follows from the time and the solution there."""
    follows = isinstance(_innermost(solver), UnrolledERK) and _adds_no_state(solver)
    return not jtu.tree_leaves(state) or follows


def adopt_state(solver: Any, state: Any, terms: Any, t0: Any, t1: Any, y0: PyTree, args: Any, fresh: bool) -> Any:
    """The state of a prepared solver, from that of the solver as diffrax knows it.

    Arguments:
        fresh: the state is that of a start.
    """
    inner = _innermost(solver)
    if isinstance(inner, UnrolledERK):
        if fresh:
            return solver.init(terms, t0, t1, y0, args)
        terms, y0 = _seen_by_innermost(solver, terms, y0)
        return inner.adopt(state, terms, t0, t1, y0, args)
    return state


def _seen_by_innermost(solver: Any, terms: Any, y0: PyTree) -> tuple[Any, PyTree]:
    if isinstance(solver, Charging):
        terms, y0 = solver.own(terms), y0[0]
    inner = getattr(solver, "solver", None)
    return _seen_by_innermost(inner, terms, y0) if isinstance(inner, diffrax.AbstractSolver) else (terms, y0)


def take_step(
    solver: Any,
    terms: Any,
    left: Any,
    right: Any,
    y0: PyTree,
    args: Any,
    first: Callable[[Any], Any] = lambda state: state,
) -> tuple[PyTree, Any, Any]:
    """One step of a prepared solver by itself, with the noise of the paths in ``terms``.

    Arguments:
        first: what to make of the solver's state before it.

    Returns:
        The next state, the error estimate and the dense information.
    """
    here = with_noise_of_step(solver, terms, left, right)
    state = first(solver.init(here, left, right, y0, args))
    y1, error, dense, _, _ = solver.step(here, left, right, y0, args, state, False)
    return y1, error, dense


def with_noise_of_step(solver: Any, terms: Any, left: Any, right: Any) -> Any:
    """The terms with the noise of one step in place of the paths."""
    rows = make_rows(terms, left[None], right[None], own_grid=False, within=bool(asks_otherwise(solver)))
    return rows.source.install(terms, jtu.tree_map(lambda x: x[0], rows.noise), left, right)


def first_carry(solver: diffrax.AbstractSolver, terms: Any, args: Any, y0: PyTree, rows: Rows, fallible: bool) -> Carry:
    """The carry before the first row."""
    state = solver.init(terms, rows.left[0], rows.right[0], y0, args)
    # A weak type or a Python scalar would make the carry change its type after one step.
    state = jtu.tree_map(lambda x: jnp.asarray(x, jnp.result_type(x)), state)
    return Carry(y0, state, *((RESULTS.successful, jnp.zeros((), jnp.int32)) if fallible else (None,)))


def step_row(solver: diffrax.AbstractSolver, terms: Any, args: Any, rows: Rows, carry: Carry, row: Any) -> Any:
    """Take one row.

    Returns:
        The next carry, and the step's local error estimate and dense information as the solver gave them.

    Raises:
        FallibleStep: while tracing, if the solver reports a result and the carry has no place for it.
    """
    left, right, live, jump, noise = row
    increments = rows.source.increments(noise, left, right, rows.own_grid)
    here = rows.source.install(terms, increments, left, right)
    y1, error, dense, state1, result = solver.step(
        here, left, right, carry.y, args, carry.solver_state, False if jump is None else jump
    )
    keep, result1, taken = live, carry.result, carry.taken
    if result is not diffrax.RESULTS.successful:
        if carry.result is None:
            raise FallibleStep
        before, now = is_okay(carry.result), promote(result)
        went_on = before if live is None else before & live
        keep = went_on & is_okay(now)
        result1 = RESULTS.where(went_on, now, carry.result)
    if keep is not None:
        select = lambda a, b: jnp.where(keep, a, b)
        y1, state1 = jtu.tree_map(select, (y1, state1), (carry.y, carry.solver_state))
    if taken is not None:
        taken = taken + (1 if keep is None else keep.astype(taken.dtype))
    return Carry(y1, state1, result1, taken), (error, dense)
