"""``solve``: plan a grid of steps, then walk it with a diffrax solver.

The function reads its inputs on the host, plans, and hands over to one compiled function that walks (or delegates to
``diffrax.diffeqsolve``). Nothing in that function calls back to the host, so JAX's persistent cache can keep it.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from .._compat import is_concrete, is_term
from .._mesh import on_any_mesh
from .._results import RESULTS, SolveError, is_okay
from ..adjoints import AbstractWalkAdjoint
from ..equations import AbstractEquation, Chart
from ..equations._chart import Reading
from ..equations._terms import DriftTerm, check_raw_term
from ..grids import Grid
from ..grids._grid import cast
from ..paths import FractionalBrownian
from ..paths._rows import RowNoise
from ..paths._tree import quiet_tree
from ..regularisers._charge import Outcome, Setting, charged, check_regularisers
from ..solvers import Exact
from ..walking import asks_otherwise, make_rows
from ._check_input import (
    check_counts,
    check_enough_steps,
    check_first_step,
    check_noise_given,
    check_precision,
    check_real,
    check_still,
    check_ts,
    check_y0,
)
from ._check_path import check_path, check_sides, controls_cut_short
from ._check_terms import check_terms
from ._choose import (
    check_adapts,
    check_backwards,
    check_interpretation,
    check_rough,
    check_stiff,
    choose_adjoint,
    choose_solver,
    choose_storage,
    evaluations,
    is_solved_exactly,
    levy_area_for,
    noise_of_grid,
    resolve_coupling,
    resolve_pieces,
    resolve_tolerances,
    wrong_backwards,
)
from ._delegate import check_adjoint, check_saving, delegate, pre_check, unset
from ._dense import Dense, RowInterpolation
from ._failed import last_finite, void_failed
from ._plan import Plan, plan
from ._solution import Solution, failure, with_finite_check
from ._traced_times import blank_unless, times_are_good


def solve(
    equation: AbstractEquation | diffrax.AbstractTerm | tuple[diffrax.AbstractTerm, ...],
    y0: PyTree,
    ts: Array | np.ndarray | Sequence[float],
    *,
    args: PyTree = None,
    key: PRNGKeyArray | None = None,
    dt0: float | None = None,
    grid: Grid | None = None,
    steps_per_interval: int | None = None,
    solver: diffrax.AbstractSolver | None = None,
    path: diffrax.AbstractPath | None = None,
    stepsize_controller: diffrax.AbstractStepSizeController | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    regularisers: Sequence[Any] = (),
    save_fn: Callable[[Any, PyTree, Any], PyTree] | None = None,
    event: diffrax.Event | None = None,
    max_steps: int | None = 4096,
    save: Literal["requested", "steps"] = "requested",
    dense: bool = False,
    throw: bool = True,
) -> Solution:
    """Solve a differential equation through the requested times.

    One path per call; use ``jax.vmap`` for batches (a batched ``y0`` with a batch-wise drift is one path, and works).
    One of ``dt0``, ``grid`` and ``steps_per_interval`` fixes the steps. With none of them, a solver that is given takes
    one step per interval of ``ts``; without a solver a linear equation takes as many, exactly, an ordinary one is
    solved adaptively by Tsit5 with ``rtol=1e-3, atol=1e-6``, and another stochastic one is an error that asks for
    ``dt0``.

    Arguments:
        equation: what moves: an equation of sdeflow, or raw diffrax terms (a tuple for solvers that split them).
        y0: the start, an array or a tree of floating arrays.
        ts: shape (n,), the requested times, strictly increasing or (in reverse time) decreasing, from the start on; at
            one time alone the solution is ``y0``.
            Inside ``jit`` make it with NumPy, or give ``grid`` or ``steps_per_interval``; only then may it be traced,
            and end in repeats of its last time, which are padding. Traced times that do not fit end as
            ``RESULTS.bad_times``, with NaN for the states.
        args: passed to the drift and the diffusion.
        key: a JAX random key for the noise of a stochastic equation; ``key`` or ``path``, never both.
        dt0: the largest step, signed like ``ts[1]-ts[0]``; every interval is cut into equal steps. With an adaptive
            controller, its first step.
        grid: the steps themselves, from `sdeflow.grids.through`.
        steps_per_interval: equal steps between two requested times.
        solver: any diffrax solver. Default with fixed steps: Tsit5 for ordinary equations, `sdeflow.solvers.Exact` for
            a `sdeflow.equations.LinearSDE` (ShARK where the path lacks what it needs, and where regularisers or an
            adjoint read stages), ShARK for other additive noise, else Euler (Ito) or Heun (Stratonovich).
        path: what drives a stochastic equation, e.g. `sdeflow.paths.GridBrownian`.
        stepsize_controller: a diffrax controller for adaptive steps.
        adjoint: how gradients come back: one of `sdeflow.adjoints` or of diffrax. Default:
            `sdeflow.adjoints.DiscreteAdjoint`, with ``checkpoints="sqrt"`` where the states before all steps would take
            more than 32 MiB.
        regularisers: what to charge the model for its solve.
        save_fn: ``save_fn(t, y, args)``, what to keep of the state at the requested times.
        event: a ``diffrax.Event`` that may end the solve.
        max_steps: the most steps that an adaptive solve takes.
        save: "requested" times, or every accepted step ("steps"): then ``sol.ts`` and ``sol.ys`` have the start and the
            end of each of the ``sol.stats["num_steps"]`` steps, and infinities up to the most steps there could be.
        dense: keep what the solver knows between the steps, for ``sol.evaluate(t)``.
        throw: raise a failure when called outside of a trace.

    Returns:
        A `Solution`.

    Raises:
        ValueError, TypeError: for wrong shapes, dtypes, structures and static values, before anything runs.
        NotImplementedError: for noise on a complex state.
        SolveError: outside of a trace with ``throw=True``, if the solution is not finite or the solver failed. Inside a
            trace read ``sol.result``, or plant a check with `sdeflow.check`.

    Example:
        >>> import jax, jax.numpy as jnp, sdeflow as sf
        >>> ou = sf.equations.OrnsteinUhlenbeck(theta=1.0, mean=0.0, sigma=0.5)
        >>> sol = sf.solve(ou, jnp.ones(3), [0.0, 0.5, 2.0], dt0=0.1, key=jax.random.key(0))
        >>> sol.ys.shape, int(sol.stats["num_steps"])
        ((3, 3), 20)
    """
    y0 = check_y0(y0)
    dtype = jnp.finfo(jnp.result_type(*jtu.tree_leaves(y0))).dtype
    check_regularisers(regularisers, key)
    raw = _is_terms(equation)
    if not raw and not isinstance(equation, AbstractEquation):
        raise TypeError(
            f"equation must be an sdeflow equation or diffrax terms, got {type(equation).__name__}: "
            "wrap a drift and a diffusion as sf.SDE(drift, diffusion), a vector field as sf.ODE(vector_field)."
        )
    stochastic = not raw and equation.is_stochastic  # pyright: ignore
    chart = None if raw else equation.chart(y0)  # pyright: ignore
    if chart is not None:
        return _in_coordinates(
            chart, ts, args=args, key=key, dt0=dt0, grid=grid, steps_per_interval=steps_per_interval, solver=solver,
            path=path, stepsize_controller=stepsize_controller, adjoint=adjoint, regularisers=regularisers,
            save_fn=save_fn, event=event, max_steps=max_steps, save=save, dense=dense, throw=throw,
        )  # fmt: skip
    ts = check_ts(ts, repeats=grid is not None or steps_per_interval is not None or path is not None)
    # With one time there is nothing to solve: the start is the solution.
    still = len(ts) == 1
    paths = _paths_of(equation) if raw else () if path is None else (path,)
    noisy = stochastic or len(paths) > 0
    check_counts(dt0, grid, steps_per_interval, max_steps)
    check_real(y0, noisy)
    choices: list[tuple[str, str]] = []

    adaptive = isinstance(stepsize_controller, diffrax.AbstractAdaptiveStepSizeController)
    if stepsize_controller is not None and not adaptive:
        if not isinstance(stepsize_controller, diffrax.ConstantStepSize):
            raise ValueError(
                f"{type(stepsize_controller).__name__} does not adapt: fix the steps with dt0=, grid= or "
                "steps_per_interval= instead."
            )
        stepsize_controller = None
    fixed = any(x is not None for x in (dt0, grid, steps_per_interval)) or getattr(path, "grid", None) is not None
    exact = solver is None and not adaptive and is_solved_exactly(equation, path, adjoint, regularisers)
    if not adaptive and not fixed and solver is None and not exact:
        if stochastic or raw:
            raise ValueError(
                "Nothing says how long the steps are: pass dt0=, e.g. dt0=0.01, or grid= or steps_per_interval=."
            )
        adaptive, stepsize_controller = True, diffrax.PIDController(rtol=1e-3, atol=1e-6)
        choices.append(("steps", "adaptive, PID(rtol=1e-3, atol=1e-6), the default for an ordinary equation"))
    if solver is None:
        if raw:
            raise ValueError("Raw diffrax terms need a solver: pass solver=.")
        if exact:
            solver, why = Exact(), "the law of a linear equation over a step of any length"
        else:
            solver, why = choose_solver(equation, not adaptive)  # pyright: ignore
        choices.append(("solver", f"{type(solver).__name__}, {why}"))
    else:
        if not isinstance(solver, diffrax.AbstractSolver):
            raise TypeError(f"solver must be an instance of a diffrax solver, got {solver!r}.")
        choices.append(("solver", f"{type(solver).__name__}, as given"))
    decreasing = not still and is_concrete(ts) and float(ts[-1]) < float(ts[0])
    if not raw:
        check_interpretation(equation, solver, decreasing)  # pyright: ignore
    draws = any(r.draws for r in regularisers) and (path is not None or not stochastic)
    drawn = check_noise_given(stochastic, raw, None if draws else key, path)
    key = key if draws else drawn

    steps = None
    if adaptive:
        if grid is not None or steps_per_interval is not None:
            raise ValueError(
                "An adaptive stepsize_controller chooses its own steps: drop grid= or steps_per_interval=."
            )
        check_adapts(solver, noisy)
        check_first_step(ts, dt0, dtype)
    elif still:
        check_still(grid)
    else:
        steps = plan(ts, dt0, grid, steps_per_interval, path, dtype)
        if raw:
            # A path within the terms has a grid of its own, which need not be that of the steps.
            steps = steps._replace(own_grid=False)
        check_stiff(equation, solver, steps.grid)
        if isinstance(solver, Exact):
            solver = resolve_pieces(solver, equation, steps.grid)
        choices.append(("grid", f"{steps.num_rows} rows, {steps.why}"))
    check_sides(solver, None if steps is None else steps.grid, stepsize_controller, (equation, args), ts)
    if isinstance(path, FractionalBrownian):
        check_rough(equation)
    for one in paths:
        check_path(one, solver, ts, None if steps is None else steps.grid, adaptive=adaptive, dt0=dt0)
    storage = None
    if stochastic and path is None and steps is not None:
        storage, why = choose_storage(steps.num_rows, solver)
        choices.append(("noise", why))
    if adjoint is None:
        adjoint, why = choose_adjoint(y0, None if steps is None else steps.num_rows, event)
        choices.append(("adjoint", f"{_short(adjoint)}, {why}"))
    else:
        if not isinstance(adjoint, diffrax.AbstractAdjoint):
            raise TypeError(
                f"adjoint must be one such as sf.adjoints.DiscreteAdjoint() or one of diffrax's, got {adjoint!r}."
            )
        unsafe = any(isinstance(one, diffrax.UnsafeBrownianPath) for one in paths)
        if not still and event is None and isinstance(adjoint, AbstractWalkAdjoint):
            adjoint.check_solver(solver)
        if not still:
            check_adjoint(
                adjoint, solver, ts, steps, stochastic=noisy, unsafe=unsafe, split=isinstance(equation, tuple),
                event=event, save_fn=save_fn,
            )  # fmt: skip
        choices.append(("adjoint", f"{_short(adjoint)}, as given"))
    all_steps = check_saving(save, dense, adjoint, still, adaptive, max_steps)
    if adaptive:
        check_enough_steps(ts, max_steps, getattr(adjoint, "record", None))
    walked = isinstance(adjoint, AbstractWalkAdjoint) and steps is not None and event is None
    if not still:
        check_precision(y0, solver, delegated=not walked)
    forwards_only = wrong_backwards(solver, noisy, adjoint, event, adaptive and max_steps is None)
    if forwards_only and decreasing:
        check_backwards(solver)
    traced = not is_concrete(ts) if steps is None else steps.traced

    sol = _run(
        equation, y0, jnp.asarray(ts, dtype), args, key, dt0 if adaptive else None, steps, storage, solver, path,
        stepsize_controller, adjoint, tuple(regularisers), save_fn, event, max_steps, all_steps, dense,
        traced, forwards_only, tuple(choices),
    )  # fmt: skip
    leaves = jtu.tree_leaves(sol.result)
    if throw and is_concrete(*leaves) and not bool(is_okay(sol.result).all()):
        nonfinite = bool((sol.result == RESULTS.nonfinite).all())
        hint = controls_cut_short((equation, args), ts) if nonfinite else ""
        raise SolveError(sol.result, failure(sol) + hint)
    return sol


def _in_coordinates(chart: Chart, ts: Any, *, save_fn: Any, event: Any, **options: Any) -> Solution:
    """The solution of an equation that is walked in other coordinates."""
    if event is not None:
        reading = jtu.tree_map(lambda fn: Reading(chart.read, fn), event.cond_fn, is_leaf=callable)
        event = eqx.tree_at(lambda e: e.cond_fn, event, reading, is_leaf=callable)
    start = chart.begin(ts, options["args"], options["key"])
    sol = solve(chart.equation, start, ts, save_fn=Reading(chart.read, save_fn), event=event, **options)
    stats = {**sol.stats, **chart.notes(sol.final)}
    return eqx.tree_at(
        lambda s: (s.final, s.last, s.stats), sol, (chart.final(sol.final), chart.final(sol.last), stats)
    )


@on_any_mesh
@eqx.filter_jit
def _run(
    equation: Any,
    y0: Any,
    ts: Any,
    args: Any,
    key: Any,
    dt0: Any,
    steps: Plan | None,
    storage: str | None,
    solver: Any,
    path: Any,
    controller: Any,
    adjoint: Any,
    regularisers: tuple[Any, ...],
    save_fn: Any,
    event: Any,
    max_steps: int | None,
    all_steps: bool,
    dense: bool,
    traced: bool,
    forwards_only: bool,
    choices: tuple[tuple[str, str], ...],
) -> Solution:
    dtype = ts.dtype
    if steps is not None:
        steps = steps._replace(grid=cast(steps.grid, dtype))
    good = times_are_good(ts, None if steps is None else steps.grid, forwards_only) if traced else None
    if ts.shape[0] == 1:
        return _stay(equation, y0, ts, args, regularisers, save_fn, controller is not None, good, choices)
    if key is not None and path is None and not _is_terms(equation) and equation.is_stochastic:
        structure = _noise_structure(equation, ts[0], y0, args)
        if storage is None:
            path = quiet_tree(
                jnp.minimum(ts[0], ts[-1]), jnp.maximum(ts[0], ts[-1]), _tree_tolerance(ts, dt0, steps), structure, key,
                levy_area_for(solver),
            )  # fmt: skip
        else:
            path = noise_of_grid(equation, solver, steps.grid, structure, key, storage)  # pyright: ignore
    terms = equation if _is_terms(equation) else equation.terms(path)
    check_terms(terms, solver, ts[0], y0, args)
    _check_raw_terms(terms, y0, ts, args)

    if steps is not None:
        solver = resolve_coupling(resolve_tolerances(solver, dtype), steps.grid.num_steps, dtype)
    elif regularisers:
        # Now, as the controller's norm will not know the state from what goes beside it.
        solver = resolve_tolerances(solver, dtype, controller)

    walks = steps is not None and event is None and isinstance(adjoint, AbstractWalkAdjoint)

    def go(x: Setting) -> Outcome:
        if x.walks:
            return _walk(x.terms, x.y0, ts, args, steps, x.solver, x.adjoint, x.save_fn, all_steps, dense)
        out = delegate(
            x.terms, x.solver, x.y0, ts, args, steps=steps, dt0=dt0, controller=x.controller, adjoint=x.adjoint,
            event=x.event, max_steps=max_steps, save_fn=x.save_fn, good=good, all_steps=all_steps, dense=dense,
        )  # fmt: skip
        start = pre_check(y0)
        return out._replace(result=RESULTS.where(is_okay(start), out.result, start))

    setting = Setting(terms, y0, solver, controller, adjoint, save_fn, event, walks)
    out, penalties = charged(go, setting, regularisers, ts, args, key)
    return _finished(ts, y0, out, penalties, good, choices, save_fn is None, (equation, args))


def _finished(
    ts: Any, y0: Any, out: Outcome, penalties: Any, good: Any, choices: Any, bare: bool, inputs: Any = ()
) -> Solution:
    """The solution, with what its last state and its traced times say of the result.

    Arguments:
        bare: whether ``ys`` are the states.
        inputs: what a solve that failed has no derivative in, beside ``y0``.
    """
    ys, final, stats = out.ys, out.final, out.stats
    result = with_finite_check(out.result, final)
    if good is not None:
        result = RESULTS.where(good, result, RESULTS.bad_times)
    last, reached = last_finite(out.ts, y0, ys if bare else None, final, stats["time_reached"])
    at_times, dense = [(out.ts, ys)], out.dense
    if dense is not None:
        at_times.append((dense.times, dense.of.infos))
    (ys, *infos), (final, penalties), last = void_failed(
        result, ts, reached, at_times, (final, penalties), last, (inputs, y0)
    )
    if dense is not None:
        dense = eqx.tree_at(lambda d: d.of.infos, dense, infos[0])
    saved_at = out.ts
    if good is not None:
        saved = (ys, final, last, penalties, reached, saved_at)
        ys, final, last, penalties, reached, saved_at = blank_unless(good, saved)
    stats = {**stats, "time_reached": reached}
    return Solution(saved_at, ys, final, stats, penalties, result, choices, last, dense)


def _stay(
    equation: Any, y0: Any, ts: Any, args: Any, regularisers: Any, save_fn: Any, adaptive: bool, good: Any, choices: Any
) -> Solution:
    """The solution at one time, where it starts: no step is taken."""
    if isinstance(equation, AbstractEquation):
        eqx.filter_eval_shape(DriftTerm(equation.drift).vf, ts[0], y0, args)  # pyright: ignore
    first = y0 if save_fn is None else save_fn(ts[0], y0, args)
    ys = jtu.tree_map(lambda x: jnp.asarray(x)[None], first)
    stats = {"num_steps": jnp.array(0), "nfe": jnp.array(0), "time_reached": ts[0]}
    if adaptive:
        stats |= {"num_rejected": jnp.array(0)}
    penalties = {type(r).__name__: jnp.zeros((), ts.dtype) for r in regularisers}
    out = Outcome(ys, y0, stats, RESULTS.successful, ts)
    return _finished(ts, y0, out, penalties, good, choices, save_fn is None)


def _walk(
    terms: Any,
    y0: Any,
    ts: Any,
    args: Any,
    steps: Any,
    solver: Any,
    adjoint: Any,
    save_fn: Any,
    all_steps: bool,
    dense: bool,
) -> Outcome:
    grid: Any = steps.grid
    live = grid.live if steps.masked else None
    within = bool(asks_otherwise(solver))
    rows = make_rows(terms, grid.left, grid.right, live, grid.jump, own_grid=steps.own_grid, within=within)
    keep = (lambda t, y: y) if save_fn is None else (lambda t, y: save_fn(t, y, args))
    emit = lambda t, carry, info: (keep(t, carry.y), info[1] if dense else None)

    ends_only = ts.shape[0] == 2 and not all_steps
    each = all_steps or dense or steps.every is None
    every = None if ends_only and not dense else (1 if each else steps.every)
    carry, emitted, said = adjoint.walk(solver, terms, args, y0, rows, every=every, emit=emit)
    emitted, infos = (None, None) if emitted is None else emitted
    first = keep(ts[0], y0)
    join = lambda a, b: jnp.concatenate([jnp.asarray(a)[None], b])
    if ends_only:
        last = keep(ts[-1], carry.y)
        ys = jtu.tree_map(lambda a, b: jnp.stack([a, b]), first, last)
    elif all_steps:
        ys = jtu.tree_map(join, first, emitted)
    elif each:
        ys = jtu.tree_map(lambda a, b: join(a, b)[grid.save], first, emitted)
    else:
        ys = jtu.tree_map(join, first, emitted)

    count = grid.num_steps if steps.masked else grid.num_rows
    cost = evaluations(solver)
    nfe = None if cost is None else count * cost[0] + cost[1]
    result = RESULTS.successful if carry.result is None else carry.result
    reached = ts[-1]
    if carry.taken is not None:
        ends = jnp.concatenate([grid.left[:1], grid.right])
        reached = jnp.where(is_okay(result), reached, ends[carry.taken].astype(ts.dtype))
    stats = {
        "num_steps": jnp.asarray(count), "nfe": None if nfe is None else jnp.asarray(nfe), "time_reached": reached,
        **said,
    }  # fmt: skip
    saved_at, between = ts, None
    if all_steps:
        saved_at = jnp.concatenate([ts[:1], grid.right.astype(ts.dtype)])
        if steps.masked:
            beyond = ~jnp.append(True, grid.live)
            blank = lambda x: jnp.where(beyond.reshape(-1, *(1,) * (x.ndim - 1)), unset(x.dtype), x)
            saved_at, ys = jtu.tree_map(blank, (saved_at, ys))
    if dense:
        left, right, taken = jnp.asarray(grid.left), jnp.asarray(grid.right), jnp.asarray(count)
        known = RowInterpolation(left, right, taken, infos, solver.interpolation_cls)
        ends = (left[0], right[taken - 1])
        between = Dense(known, ((ts[0], ts[-1]), ends), save_fn, args)
    return Outcome(ys, carry.y, stats, result, saved_at, between)


def _is_terms(equation: Any) -> bool:
    """Whether this is what a diffrax solver takes: a term, or for split methods a tuple of terms."""
    one = lambda x: isinstance(x, diffrax.AbstractTerm)
    return one(equation) or (isinstance(equation, tuple) and len(equation) > 0 and all(map(one, equation)))


def _paths_of(terms: Any) -> tuple[Any, ...]:
    """The Brownian paths that raw terms hold."""
    return RowNoise.of(terms).paths


def _check_raw_terms(terms: Any, y0: Any, ts: Any, args: Any) -> None:
    """Check the shapes of raw terms that all move the whole state; those of a tuple move parts of it."""
    if isinstance(terms, tuple):
        return
    for term in jtu.tree_leaves(terms, is_leaf=is_term):
        if is_term(term):
            eqx.filter_eval_shape(lambda term=term: check_raw_term(term, ts[0], y0, args))


def _noise_structure(equation: AbstractEquation, t: Any, y0: Any, args: Any) -> Any:
    """What drives the diffusion: y's structure for diagonal noise, else what the operator takes."""
    out = eqx.filter_eval_shape(equation.diffusion, t, y0, args)  # pyright: ignore
    if isinstance(out, lx.AbstractLinearOperator):
        return out.in_structure()
    return jtu.tree_map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), y0)


def _tree_tolerance(ts: Any, dt0: Any, steps: Plan | None) -> Any:
    if steps is not None:
        # Half of the shortest half step.
        return jnp.abs(steps.grid.right - steps.grid.left).min() / 4
    span = jnp.abs(ts[-1] - ts[0])
    return span * 2.0**-14 if dt0 is None else jnp.minimum(span * 2.0**-14, jnp.abs(dt0) / 2)


def _short(adjoint: Any) -> str:
    return repr(adjoint).replace("\n", "").replace("  ", "")
