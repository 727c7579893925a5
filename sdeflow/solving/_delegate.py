"""What the walk does not do itself goes to ``diffrax.diffeqsolve``: adaptive steps, events, diffrax's own adjoints."""

import contextlib
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._compat import SaveState, is_term, unwrap
from .._results import RESULTS, is_okay, promote
from ..adjoints import AbstractWalkAdjoint, DiscreteAdjoint
from ..adjoints._freeze import freeze
from ..adjoints._jump_times import beside_jumps
from ..equations._linear import LinearDriftTerm
from ..equations._terms import DiffusionTerm, DriftTerm
from ..grids import Grid
from ..regularisers._charge import Outcome
from ..solvers import McCallumFoster
from ..solvers._charging import Charging
from ..solvers._unrolled import StandIn
from ..walking import prepare_solver
from ._choose import evaluations, resolve_tolerances
from ._dense import Dense
from ._guard import GuardedController
from ._plan import Plan
from ._solution import all_finite
from ._traced_times import any_times

# Solvers that diffrax's continuous adjoint can run backwards with noise: all others fail there, in various ways.
_BACKSOLVABLE = (diffrax.Heun, diffrax.Midpoint, diffrax.Ralston, diffrax.ReversibleHeun)


def check_adjoint(
    adjoint: diffrax.AbstractAdjoint,
    solver: diffrax.AbstractSolver,
    ts: Any,
    steps: Plan | None,
    *,
    stochastic: bool,
    unsafe: bool,
    split: bool,
    event: Any,
    save_fn: Any,
) -> None:
    """Refuse what diffrax's adjoints cannot do, or do wrongly, before anything runs.

    Arguments:
        steps: the fixed steps, if they are fixed.
        unsafe: whether the noise is one of diffrax's unsafe paths.
        split: whether the terms are a tuple, for a solver that splits them.

    Raises:
        ValueError: naming the adjoint, what it cannot do, and what can.
    """
    cure = "use adjoint=sf.adjoints.DiscreteAdjoint()."
    if isinstance(adjoint, diffrax.ImplicitAdjoint):
        if jnp.shape(ts)[0] != 2 or save_fn is not None:
            raise ValueError(
                f"ImplicitAdjoint differentiates a steady state: give ts its two ends and no save_fn, or {cure}"
            )
        if stochastic:
            raise ValueError(f"ImplicitAdjoint differentiates a steady state, and noise has none: {cure}")
    if unsafe and isinstance(adjoint, diffrax.BacksolveAdjoint | diffrax.RecursiveCheckpointAdjoint):
        raise ValueError(
            f"{type(adjoint).__name__} needs noise that can be asked again, which an UnsafeBrownianPath cannot: pass "
            f"key= or path=diffrax.VirtualBrownianTree(...), or {cure}"
        )
    if not isinstance(adjoint, diffrax.BacksolveAdjoint):
        return
    if event is not None or split:
        raise ValueError(f"BacksolveAdjoint knows neither events nor split terms: {cure}")
    if stochastic and not isinstance(solver, _BACKSOLVABLE):
        names = ", ".join(f"diffrax.{kind.__name__}" for kind in _BACKSOLVABLE)
        raise ValueError(
            f"BacksolveAdjoint cannot run {type(solver).__name__} backwards with noise: use one of {names} on a "
            f"Stratonovich equation, or {cure}"
        )
    if steps is not None and steps.grid.may_jump:
        raise ValueError(f"BacksolveAdjoint takes steps of its own, which go across the jumps of the grid: {cure}")
    if steps is not None and not _has_equal_steps(steps):
        raise ValueError(f"BacksolveAdjoint takes equal steps or adaptive ones, and these are neither: {cure}")


def check_saving(
    save: str, dense: bool, adjoint: diffrax.AbstractAdjoint, still: bool, adaptive: bool, max_steps: int | None
) -> bool:
    """Whether every step is to be saved.

    Raises:
        ValueError: for another ``save``, and for what cannot be saved.
    """
    if save not in ("requested", "steps"):
        raise ValueError(f'save must be "requested" or "steps", got {save!r}.')
    wants = [name for name, asked in (('save="steps"', save == "steps"), ("dense=True", dense)) if asked]
    if not wants or still:
        return False
    what = " and ".join(wants)
    if isinstance(adjoint, diffrax.BacksolveAdjoint | diffrax.ImplicitAdjoint):
        raise ValueError(  # noqa: TRY004
            f"{type(adjoint).__name__} knows no states but those at requested times: leave out {what}, or use "
            "adjoint=sf.adjoints.DiscreteAdjoint()."
        )
    if dense and isinstance(adjoint, AbstractWalkAdjoint) and not isinstance(adjoint, DiscreteAdjoint):
        raise ValueError(
            f"{type(adjoint).__name__} does not keep what is between the steps: leave out dense=True, or use "
            "adjoint=sf.adjoints.DiscreteAdjoint()."
        )
    if adaptive and max_steps is None:
        raise ValueError(f"{what} holds as many steps as there may be: give max_steps=.")
    return save == "steps"


def _has_equal_steps(steps: Plan) -> bool:
    grid = steps.grid
    if not grid.is_concrete or steps.masked:
        return False
    h = np.asarray(grid.right, np.float64) - np.asarray(grid.left, np.float64)
    return np.allclose(h, h.mean(), rtol=1e-5, atol=0)


class _AlongRows(diffrax.AbstractStepSizeController):
    """The rows of a grid: both of their ends, and whether the field may jump where they begin.

    ``diffrax.StepTo`` has times alone, and no place for padding.
    """

    left: Any
    right: Any
    jump: Any

    @staticmethod
    def of(grid: Grid, ts: Any, good: Any) -> tuple["_AlongRows", Any, Any]:
        """The steps, and where they begin and end.

        Arguments:
            ts: the requested times, good ones.
            good: whether the rows are; None where that is known. Bad ones are replaced.
        """
        left, right, live = (jnp.asarray(x) for x in (grid.left, grid.right, grid.live))
        if good is not None:
            line = jnp.linspace(ts[0], ts[-1], left.shape[0] + 1, dtype=left.dtype)
            left, right = jnp.where(good, left, line[:-1]), jnp.where(good, right, line[1:])
            live = live | ~good
        end = right[jnp.maximum(live.sum() - 1, 0)]
        begin, right = left[0], jnp.where(live, right, end)
        # The loop goes on until the next step begins at the end, which padding and an entry more do.
        left = jnp.append(jnp.where(live, left, end), end)
        return _AlongRows(left, right, grid.jump), begin, end  # pyright: ignore[reportCallIssue]

    def wrap(self, direction: Any) -> "_AlongRows":
        return _AlongRows(self.left * direction, self.right * direction, self.jump)  # pyright: ignore[reportCallIssue]

    def init(
        self, terms: Any, t0: Any, t1: Any, y0: Any, dt0: Any, args: Any, func: Any, error_order: Any
    ) -> tuple[Any, Any]:
        return self.right[0], jnp.array(1)

    def adapt_step_size(
        self,
        t0: Any,
        t1: Any,
        y0: Any,
        y1_candidate: Any,
        args: Any,
        y_error: Any,
        error_order: Any,
        controller_state: Any,
    ) -> tuple[Any, Any, Any, Any, Any, Any]:
        i = controller_state
        jump = False if self.jump is None else self.jump[i]
        return True, self.left[i], self.right[i], jump, i + 1, diffrax.RESULTS.successful


def delegate(
    terms: Any,
    solver: diffrax.AbstractSolver,
    y0: Any,
    ts: Any,
    args: Any,
    *,
    steps: Plan | None,
    dt0: Any,
    controller: diffrax.AbstractStepSizeController | None,
    adjoint: diffrax.AbstractAdjoint,
    event: diffrax.Event | None,
    max_steps: int | None,
    save_fn: Any,
    good: Any,
    all_steps: bool,
    dense: bool,
) -> Outcome:
    """Solve with diffrax.

    Arguments:
        steps: the fixed steps, if they are fixed.
        good: whether the times are, where they are traced; None where that is known.
        all_steps: whether to save every accepted step, in place of the requested times.
        dense: whether to keep what is between the steps.

    Raises:
        ValueError: if the steps adapt and the solver does not estimate its error.
    """
    continuous = isinstance(adjoint, diffrax.BacksolveAdjoint)
    # Both ends need no search for requested times within the loop.
    ends_only = ts.shape[0] == 2 and event is None and not all_steps
    if good is not None:
        ts = jnp.where(good, ts, any_times(ts))
        dt0 = None if dt0 is None else jnp.where(good, dt0, jnp.abs(dt0))
    begin, end, wanted = ts[0], ts[-1], ts
    if steps is None:
        # Requested times are stepped to, so that what is returned are states of the solver.
        first = None if dt0 is None else jnp.asarray(dt0, ts.dtype)
        controller, dt0 = GuardedController(controller, first), None  # pyright: ignore
        begin = beside_jumps(controller, begin, end)
        wanted = wanted.at[0].set(begin)
        if not ends_only:
            controller = diffrax.ClipStepSizeController(controller, step_ts=ts)
    elif continuous:
        # Backwards it starts anew at every saved time, from where given steps would not lead on.
        controller, max_steps = diffrax.ConstantStepSize(), steps.grid.num_rows + 1
        dt0 = (ts[-1] - ts[0]) / steps.grid.num_rows
    else:
        controller, begin, end = _AlongRows.of(steps.grid, ts, good)
        dt0, max_steps = None, steps.grid.num_rows
        # Where the field jumps at an end, steps begin just after it and end just before it.
        low, high = jnp.minimum(begin, end), jnp.maximum(begin, end)
        wanted = ts + freeze(jnp.clip(ts, low, high) - ts)
    if continuous or isinstance(adjoint, diffrax.ImplicitAdjoint):
        # Both see only what terms and args hold.
        terms = jtu.tree_map(lambda x: _holding(x, ts[0], y0, args) if is_term(x) else x, terms, is_leaf=is_term)
    cost = evaluations(solver)
    wrapping = isinstance(solver, diffrax.HalfSolver | Charging | McCallumFoster)
    if wrapping and isinstance(solver.solver, diffrax.AbstractImplicitSolver):  # pyright: ignore
        solver = StandIn(resolve_tolerances(solver, ts.dtype, None if steps is not None else controller))  # pyright: ignore
    if isinstance(adjoint, diffrax.DirectAdjoint | diffrax.ForwardMode) and wrapping:
        # They look for the loop over stages of the solver within, in the wrong place.
        solver = StandIn(prepare_solver(solver))  # pyright: ignore

    def run(saveat: diffrax.SaveAt, adjoint: diffrax.AbstractAdjoint = adjoint) -> diffrax.Solution:
        with _known_to_be_right(solver, y0):
            return diffrax.diffeqsolve(
                terms,
                solver,
                begin,
                end,
                dt0,
                y0,
                args,
                saveat=dataclasses.replace(saveat, dense=dense),
                stepsize_controller=controller,  # pyright: ignore
                adjoint=adjoint,
                event=event,
                max_steps=max_steps,
                throw=False,
            )

    save_with: Run = run
    if isinstance(adjoint, AbstractWalkAdjoint) and not ends_only and not all_steps:
        save_with = functools.partial(_run_saving, run, adjoint)
    save = _save_continuous if continuous else _save_end if isinstance(adjoint, diffrax.ImplicitAdjoint) else _save
    save = _save_steps if all_steps else save
    sol, ys, final = save(save_with, wanted, y0, args, save_fn, ends_only)
    saved_at = ts
    if all_steps:
        saved_at = sol.ts[0]
        saved_at = jnp.where(saved_at == begin, ts[0], jnp.where(saved_at == end, ts[-1], saved_at))
    accepted, rejected = sol.stats["num_accepted_steps"], sol.stats["num_rejected_steps"]
    nfe = None if cost is None else (accepted + rejected) * cost[0] + cost[1]
    stats = {
        "num_steps": accepted,
        "num_rejected": rejected,
        "nfe": nfe,
        "time_reached": _time_reached(sol, end, ts[-1]),
    }
    result: Any = promote(sol.result)
    if "record_overflow" in sol.stats:
        spilt = is_okay(result) & sol.stats["record_overflow"]
        result = RESULTS.where(spilt, RESULTS.record_overflow, result)
    between = Dense(sol.interpolation, ((ts[0], ts[-1]), (begin, end)), save_fn, args) if dense else None
    return Outcome(ys, final, stats, result, saved_at, between)


@contextlib.contextmanager
def _known_to_be_right(solver: Any, y0: Any) -> Iterator[None]:
    """Silence where diffrax warns of what was checked, and say in our words what a solver lacks."""
    unmarked = not isinstance(solver, diffrax.AbstractItoSolver | diffrax.AbstractStratonovichSolver)
    complex_state = any(jnp.iscomplexobj(x) for x in jtu.tree_leaves(y0))
    with contextlib.ExitStack() as stack:
        # Filters of warnings belong to the whole process, so they are touched only where there is need to.
        if unmarked or complex_state:
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "Complex dtype support in Diffrax")
            warnings.filterwarnings("ignore", ".* is not marked as converging to either")
        try:
            yield
        except RuntimeError as error:
            if "does not provide error estimates" not in str(error):
                raise
            while isinstance(solver, StandIn):
                solver = solver.solver
            name = type(solver).__name__
            raise ValueError(
                f"Adaptive steps need a solver that estimates its error, and {name} does not: use "
                f"diffrax.HalfSolver(diffrax.{name}()), another solver, or fix the steps with dt0=."
            ) from error


def _time_reached(sol: diffrax.Solution, end: Any, last: Any) -> Any:
    """Where the solve ended, which is the last time of what was saved last; ``last`` for the end of the last step."""
    ts: Any = sol.ts[-1] if isinstance(sol.ts, tuple) else sol.ts
    return jnp.where(ts[-1] == end, last, ts[-1])


Run = Callable[[diffrax.SaveAt], Any]


class _SavingAt(diffrax.AbstractAdjoint):
    """An adjoint whose loop saves at times of which ``diffeqsolve`` does not know.

    diffrax checks requested times at run time, by a call back to the host, and no program that holds one is kept by
    JAX's persistent cache. Here they are known to be in order.
    """

    adjoint: AbstractWalkAdjoint
    saveat: diffrax.SaveAt

    def loop(self, **kwargs: Any) -> Any:
        direction, state, dtype = unwrap(kwargs["terms"])[1], kwargs["init_state"], kwargs["t0"].dtype

        def turned(sub: diffrax.SubSaveAt) -> diffrax.SubSaveAt:
            fn = lambda t, y, args: sub.fn(t * direction, y, args)
            ts = None if sub.ts is None else sub.ts * direction
            return diffrax.SubSaveAt(ts=ts, t1=sub.t1, fn=fn)

        def allocated(sub: diffrax.SubSaveAt) -> SaveState:
            n = sub.t1 + (0 if sub.ts is None else sub.ts.shape[0])
            shape = eqx.filter_eval_shape(sub.fn, kwargs["t0"], state.y, kwargs["args"])
            ys = jtu.tree_map(lambda x: jnp.full((n, *x.shape), unset(x.dtype), x.dtype), shape)
            return SaveState(ts=jnp.full(n, jnp.inf, dtype), ys=ys, save_index=0, saveat_ts_index=0)

        subs = tuple(turned(sub) for sub in self.saveat.subs)
        state = eqx.tree_at(lambda s: s.save_state, state, tuple(allocated(sub) for sub in subs))
        saveat = diffrax.SaveAt(subs=subs, dense=kwargs["saveat"].dense)
        return self.adjoint.loop(**{**kwargs, "saveat": saveat, "init_state": state})


def unset(dtype: Any) -> Any:
    """What stands where nothing was saved."""
    if jnp.issubdtype(dtype, jnp.inexact):
        return jnp.inf
    return jnp.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.integer) else False


def _run_saving(run: Any, adjoint: AbstractWalkAdjoint, saveat: diffrax.SaveAt) -> diffrax.Solution:
    return run(diffrax.SaveAt(t1=True), _SavingAt(adjoint, saveat))  # pyright: ignore[reportCallIssue]


def _save(run: Run, ts: Any, y0: Any, args: Any, save_fn: Any, ends_only: bool) -> tuple[Any, Any, Any]:
    fn = (lambda t, y, args: y) if save_fn is None else save_fn
    wanted = diffrax.SubSaveAt(t0=True, t1=True, fn=fn) if ends_only else diffrax.SubSaveAt(ts=ts, fn=fn)
    sol = run(diffrax.SaveAt(subs=(wanted, diffrax.SubSaveAt(t1=True))))
    ys, final = sol.ys[0], jtu.tree_map(lambda x: x[-1], sol.ys[1])
    if ends_only:
        # A solve that ended early has no state at the last time, only one at the time where it ended.
        reached = sol.ts[0][-1] == ts[-1]
        last = lambda x: x.at[-1].set(jnp.where(reached, x[-1], jnp.inf))
        ys = jtu.tree_map(lambda x: last(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x, ys)
    return sol, ys, final


def _save_steps(run: Run, ts: Any, y0: Any, args: Any, save_fn: Any, ends_only: bool) -> tuple[Any, Any, Any]:
    fn = (lambda t, y, args: y) if save_fn is None else save_fn
    sol = run(diffrax.SaveAt(subs=(diffrax.SubSaveAt(t0=True, steps=True, fn=fn), diffrax.SubSaveAt(t1=True))))
    return sol, sol.ys[0], jtu.tree_map(lambda x: x[-1], sol.ys[1])


def _save_continuous(run: Run, ts: Any, y0: Any, args: Any, save_fn: Any, ends_only: bool) -> tuple[Any, Any, Any]:
    sol = run(diffrax.SaveAt(t0=True, t1=True) if ends_only else diffrax.SaveAt(ts=ts))
    final = jtu.tree_map(lambda x: x[-1], sol.ys)
    ys = sol.ys if save_fn is None else jax.vmap(lambda t, y: save_fn(t, y, args))(ts, sol.ys)
    return sol, ys, final


def _save_end(run: Run, ts: Any, y0: Any, args: Any, save_fn: Any, ends_only: bool) -> tuple[Any, Any, Any]:
    sol = run(diffrax.SaveAt(t1=True))
    final = jtu.tree_map(lambda x: x[-1], sol.ys)
    return sol, jtu.tree_map(lambda a, b: jnp.stack([a, b]), y0, final), final


def _holding(term: Any, t: Any, y: Any, args: Any) -> Any:
    """The term, with what its functions close over made part of it."""
    names = {DriftTerm: "drift", LinearDriftTerm: "drift", DiffusionTerm: "diffusion"}
    names |= dict.fromkeys((diffrax.ODETerm, diffrax.ControlTerm), "vector_field")
    name = names.get(type(term))
    if name is None:
        return term
    held = eqx.filter_closure_convert(getattr(term, name), t, y, args)
    return eqx.tree_at(lambda x: getattr(x, name), term, held)


def pre_check(y0: Any) -> Any:
    """The result of a start that is not finite, which an adaptive controller would search for a step in vain."""
    okay: Any = RESULTS.successful
    return RESULTS.where(all_finite(y0), okay, RESULTS.nonfinite)  # pyright: ignore[reportArgumentType]
