"""A step size controller that survives trial steps which are not finite.

diffrax's PID controller turns a trial state of infinity into a NaN error, then a NaN step size, and rejects every step
from then on. The guard shows it the state before the step and a large finite error instead: the step shrinks.
Where the field itself is not finite no step length helps: trials that keep failing before the same time end the solve.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu

from ._solution import all_finite

TRIALS = 24  # failed trials before one time, each followed by a step five times shorter
_LARGE = 1e6  # an error of this many tolerances makes every controller shrink as far as it may


class GuardedController(diffrax.AbstractAdaptiveStepSizeController):
    """Wraps an adaptive controller; what it decides on finite trial steps is unchanged.

    Arguments:
        controller: the controller to guard.
    """

    controller: diffrax.AbstractAdaptiveStepSizeController

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
        return GuardedController(self.controller.wrap(direction))  # pyright: ignore[reportCallIssue]

    def init(
        self, terms: Any, t0: Any, t1: Any, y0: Any, dt0: Any, args: Any, func: Any, error_order: Any
    ) -> tuple[Any, Any]:
        """The first step of the controller, and no failed trial so far."""
        tnext, inner = self.controller.init(terms, t0, t1, y0, dt0, args, func, error_order)
        return tnext, (inner, jnp.array(0), jnp.asarray(t0))

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
        """What the controller decides, shown a finite trial step."""
        inner, failed, until = controller_state
        error = eqx.filter(y_error, eqx.is_inexact_array)
        bad = ~(all_finite(y1_candidate) & all_finite(error))
        y1 = jtu.tree_map(lambda a, b: jnp.where(bad, b, a), y1_candidate, y0)
        if y_error is not None:
            large = lambda e, y: jnp.where(bad, _LARGE * (self.atol + self.rtol * jnp.abs(y)), e)
            y_error = jtu.tree_map(large, y_error, y0)
        keep, left, right, jump, inner, result = self.controller.adapt_step_size(
            t0, t1, y0, y1, args, y_error, error_order, inner
        )
        # Getting past the time where a trial failed forgives the failures before it.
        past = keep & (t1 >= until)
        failed = jnp.where(bad, failed + 1, jnp.where(past, 0, failed))
        until = jnp.where(bad, t1, until)
        stuck = diffrax.RESULTS.where(failed > TRIALS, diffrax.RESULTS.nonfinite, diffrax.RESULTS.successful)  # pyright: ignore
        result = diffrax.RESULTS.where(result == diffrax.RESULTS.successful, stuck, result)
        return keep & ~bad, left, right, jump, (inner, failed, until), result
