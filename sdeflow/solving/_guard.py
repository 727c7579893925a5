"""A step size controller that survives trial steps which are not finite.

diffrax's PID controller turns a trial state of infinity into a NaN error, then a NaN step size, and rejects every step
from then on. Where its answer is of no use, the guard rejects the step itself, leaves the controller as it was, and
tries a fifth of the step; every other answer is passed on, so that the steps are diffrax's own. Where the field itself
is not finite no step length helps: trials that keep failing while no step gets past the earliest of them end the solve,
those whose stages were not found as soon as they are as short as times can be told apart.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

TRIALS = 36  # how often trials may fail while no step gets past the earliest of them
SHRINK = 0.2  # what a failed trial does to the step, as diffrax's controllers do by default


class GuardedController(diffrax.AbstractAdaptiveStepSizeController):
    """Wraps an adaptive controller; what it decides is unchanged wherever a next step follows from it.

    Arguments:
        controller: the controller to guard.
        dt0: the length of the first step; None if the controller chooses it. Given to ``diffeqsolve`` it would be
            checked at run time, by a call back to the host.
    """

    controller: diffrax.AbstractAdaptiveStepSizeController
    dt0: Any = None

    @property
    def rtol(self) -> Any:
        """The relative tolerance of the controller."""
        return self.controller.rtol

    @property
    def atol(self) -> Any:
        """The absolute tolerance of the controller."""
        return self.controller.atol

    @property
    def norm(self) -> Any:
        """The norm of the controller."""
        return self.controller.norm

    @property
    def jump_ts(self) -> Any:
        """The guard adds no jumps of its own."""
        return None

    def wrap(self, direction: Any) -> "GuardedController":
        """Wrap the controller for the direction of time."""
        dt0 = None if self.dt0 is None else jnp.abs(self.dt0)
        return GuardedController(self.controller.wrap(direction), dt0)  # pyright: ignore[reportCallIssue]

    def init(
        self, terms: Any, t0: Any, t1: Any, y0: Any, dt0: Any, args: Any, func: Any, error_order: Any
    ) -> tuple[Any, Any]:
        """The first step of the controller, and no failed trial so far."""
        dt0 = self.dt0 if dt0 is None else dt0
        tnext, inner = self.controller.init(terms, t0, t1, y0, dt0, args, func, error_order)
        shortest = 4 * jnp.finfo(jnp.result_type(t0)).eps * jnp.maximum(jnp.abs(t0), jnp.abs(t1))
        return tnext, (inner, jnp.array(0), jnp.full_like(t0, jnp.inf), shortest)

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
        """What the controller decides, as long as a next step follows from it."""
        inner, failed, until, shortest = controller_state
        decided = self.controller.adapt_step_size(t0, t1, y0, y1_candidate, args, y_error, error_order, inner)
        # A step cut down to no length at all moves nowhere: taken as good, it would be taken for ever.
        moves = t1 != t0
        good = _finite(y1_candidate, y_error) & moves
        # A failed implicit step has an infinite error, and the controller answers with a shorter one.
        usable = good | (~decided[0] & jnp.isfinite(decided[2]) & moves)
        retry = (False, t0, t0 + SHRINK * (t1 - t0), False, inner, diffrax.RESULTS.successful)
        keep, left, right, jump, inner = (
            jtu.tree_map(lambda a, b: jnp.where(usable, a, b), a, b) for a, b in zip(decided[:5], retry[:5])
        )
        jump = jump if eqx.is_array(decided[3]) else decided[3]
        # Getting past the earliest time where a trial failed forgives all failures before it.
        past = keep & (t1 >= until)
        # A step whose stages were not found has an infinite error, and may well fail many times on the way into a sharp
        # layer, down to the resolution of time; where the state itself is not finite, the field is not.
        counts = ~usable | (~good & (~_finite(y1_candidate, y1_candidate) | (t1 - t0 <= shortest)))
        failed = jnp.where(past, 0, failed) + jnp.where(counts, 1, 0)
        until = jnp.where(good, jnp.where(past, jnp.inf, until), jnp.minimum(until, t1))
        result = diffrax.RESULTS.where(usable, decided[5], diffrax.RESULTS.successful)
        result = diffrax.RESULTS.where(failed > TRIALS, diffrax.RESULTS.nonfinite, result)  # pyright: ignore
        return keep, left, right, jump, (inner, failed, until, shortest), result


def _finite(y: Any, error: Any) -> Any:
    """Whether all of both trees, which are alike, is finite, in one pass: infinity times zero is NaN, and NaN stays."""
    both = jtu.tree_map(lambda a, b: jnp.sum(a * 0 + b * 0), *eqx.filter((y, error), eqx.is_inexact_array))
    return jnp.isfinite(sum(jtu.tree_leaves(both)))
