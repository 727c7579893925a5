"""What the walk does not do itself goes to ``diffrax.diffeqsolve``: adaptive steps, events, diffrax's own adjoints."""

from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from .._results import RESULTS, promote


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
    subs = (diffrax.SubSaveAt(ts=ts, fn=fn), diffrax.SubSaveAt(t1=True))
    if steps is not None:
        controller, dt0 = diffrax.StepTo(ts=steps), None
        max_steps = max(steps.shape[0] - 1, 1)
    elif isinstance(controller, diffrax.PIDController) or dt0 is None:
        # Requested times are stepped to, so that what is returned are states of the solver.
        controller = diffrax.ClipStepSizeController(controller, step_ts=ts)  # pyright: ignore
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
    stats = {"num_steps": sol.stats["num_accepted_steps"], "rejected": sol.stats["num_rejected_steps"], "nfe": None}
    return sol.ts[0], sol.ys[0], final, stats, promote(sol.result)  # pyright: ignore


def pre_check(y0: Any) -> Any:
    """The result of a start that is not finite, which an adaptive controller would search for a step in vain."""
    okay = jnp.array(True)
    for leaf in jtu.tree_leaves(eqx.filter(y0, eqx.is_inexact_array)):
        okay = okay & jnp.isfinite(leaf).all()
    return RESULTS.where(okay, RESULTS.successful, RESULTS.nonfinite)
