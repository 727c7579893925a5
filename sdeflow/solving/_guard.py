"""A step size controller that survives trial steps which are not finite.

diffrax's PID controller rejects a trial that is NaN, or whose implicit stages did not converge, and shrinks the step. A
trial state of infinity it turns into a NaN error, then a NaN step size, and rejects every step from then on. The guard
rejects such a step itself, leaves the controller as it was, and tries a fifth of the step. What the controller decides
of all other trials is unchanged, so that a solve takes the steps of plain diffrax.

Where the field itself is not finite no step length helps: steps are accepted ever closer to its border, but none gets
past the earliest time at which a trial has failed. After `TRIALS` such failures the solve ends.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

TRIALS = 24  # how many trials may fail before a step gets past the earliest of them
SHRINK = 0.2  # what a failed trial does to the step, as diffrax's controllers do by default


class GuardedController(diffrax.AbstractAdaptiveStepSizeController):
    """Wraps an adaptive controller; what it decides on finite trial steps is unchanged.

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
        return tnext, (inner, jnp.array(0), jnp.full_like(t0, jnp.inf))

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
        """What the controller decides, unless that is no step at all."""
        inner, failed, earliest = controller_state
        decided = self.controller.adapt_step_size(t0, t1, y0, y1_candidate, args, y_error, error_order, inner)
        # A step cut down to no length at all moves nowhere: taken as good, it would be taken for ever.
        good = _finite(y1_candidate, y_error) & (t1 != t0)
        # An error of infinity, or a NaN, may be the controller's own business.
        usable = good | (jnp.isfinite(decided[2]) & ~jnp.asarray(decided[0]) & (t1 != t0))
        retry = (False, t0, t0 + SHRINK * (t1 - t0), False, inner, diffrax.RESULTS.successful)
        keep, left, right, jump, inner = (
            jtu.tree_map(lambda a, b: jnp.where(usable, a, b), a, b) for a, b in zip(decided[:5], retry[:5])
        )
        jump = jump if eqx.is_array(decided[3]) else decided[3]
        past = good & keep & (t1 >= earliest)
        failed = jnp.where(past, 0, failed + ~good)
        earliest = jnp.where(past, jnp.inf, jnp.where(good, earliest, jnp.minimum(earliest, t1)))
        stuck = diffrax.RESULTS.where(failed > TRIALS, diffrax.RESULTS.nonfinite, diffrax.RESULTS.successful)  # pyright: ignore
        result = diffrax.RESULTS.where(usable, decided[5], diffrax.RESULTS.successful)
        result = diffrax.RESULTS.where(result == diffrax.RESULTS.successful, stuck, result)
        return keep, left, right, jump, (inner, failed, earliest), result


def _finite(y: Any, error: Any) -> Any:
    """Whether all of both trees, which are alike, is finite, in one pass: infinity times zero is NaN, and NaN stays."""
    both = jtu.tree_map(lambda a, b: jnp.sum(a * 0 + b * 0), *eqx.filter((y, error), eqx.is_inexact_array))
    return jnp.isfinite(sum(jtu.tree_leaves(both)))
