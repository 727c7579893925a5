"""What the walk does not do itself goes to ``diffrax.diffeqsolve``: adaptive steps, events, diffrax's own adjoints."""

from typing import Any

import diffrax
import jax.numpy as jnp
import jax.tree_util as jtu

from .._results import RESULTS, is_okay, promote
from ._choose import evaluations
from ._guard import GuardedController
from ._solution import all_finite


def delegate(
    terms: Any,
    solver: diffrax.AbstractSolver,
    y0: Any,
    ts: Any,
    args: Any,
    *,
    steps: Any,
    dt0: Any,
    controller: diffrax.AbstractStepSizeController | None,
    adjoint: diffrax.AbstractAdjoint,
    event: diffrax.Event | None,
    max_steps: int | None,
    save_fn: Any,
) -> tuple[Any, Any, Any, dict[str, Any], Any]:
    """Solve with diffrax.

    Arguments:
        steps: the times to step to, if the steps are fixed.

    Returns:
        ts, ys, the last state, statistics and the result.
    """
    fn = (lambda t, y, args: y) if save_fn is None else save_fn
    # Both ends need no search for requested times within the loop.
    ends_only = ts.shape[0] == 2 and event is None
    wanted = diffrax.SubSaveAt(t0=True, t1=True, fn=fn) if ends_only else diffrax.SubSaveAt(ts=ts, fn=fn)
    subs = (wanted, diffrax.SubSaveAt(t1=True))
    if steps is not None:
        controller, dt0 = diffrax.StepTo(ts=steps), None
        max_steps = max(steps.shape[0] - 1, 1)
    else:
        # Requested times are stepped to, so that what is returned are states of the solver.
        controller = GuardedController(controller)  # pyright: ignore
        if not ends_only:
            controller = diffrax.ClipStepSizeController(controller, step_ts=ts)
    sol = diffrax.diffeqsolve(
        terms,
        solver,
        ts[0],
        ts[-1],
        dt0,
        y0,
        args,
        saveat=diffrax.SaveAt(subs=subs),
        stepsize_controller=controller,  # pyright: ignore
        adjoint=adjoint,
        event=event,
        max_steps=max_steps,
        throw=False,
    )
    final = jtu.tree_map(lambda x: x[-1], sol.ys[1])  # pyright: ignore
    ys: Any = sol.ys[0]  # pyright: ignore
    if ends_only:
        # A solve that ended early has no state at the last time, only one at the time where it ended.
        reached = sol.ts[0][-1] == ts[-1]  # pyright: ignore
        last = lambda x: x.at[-1].set(jnp.where(reached, x[-1], jnp.inf))
        ys = jtu.tree_map(lambda x: last(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x, ys)
    accepted, rejected = sol.stats["num_accepted_steps"], sol.stats["num_rejected_steps"]
    cost = evaluations(solver)
    nfe = None if cost is None else (accepted + rejected) * cost[0] + cost[1]
    stats = {"num_steps": accepted, "num_rejected": rejected, "nfe": nfe}
    result: Any = promote(sol.result)
    if "record_overflow" in sol.stats:
        spilt = is_okay(result) & sol.stats["record_overflow"]
        result = RESULTS.where(spilt, RESULTS.record_overflow, result)
    return ts, ys, final, stats, result


def pre_check(y0: Any) -> Any:
    """The result of a start that is not finite, which an adaptive controller would search for a step in vain."""
    okay: Any = RESULTS.successful
    return RESULTS.where(all_finite(y0), okay, RESULTS.nonfinite)  # pyright: ignore[reportArgumentType]
