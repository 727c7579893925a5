"""Newton's method for the stages of implicit steps of fixed length."""

from typing import Any

import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx

from .._compat import moved_by


class StageNewton(optx.Newton):
    """``optimistix.Newton`` that ends once its own step is within the tolerances, or below the rounding of the state.

    optimistix asks for a residual within ``atol`` too. That of a stiff stage is rounded like the field times the
    state, which may never be so small: in float32 the plainest stiff equation would not be solved.
    """

    def terminate(
        self, fn: Any, y: Any, args: Any, options: dict[str, Any], state: Any, tags: frozenset[object]
    ) -> tuple[Any, Any]:
        """Whether to stop, and with which result."""
        del fn, options, tags
        done = state.diffsize < 1
        stage = moved_by(args, state.diff)
        if stage is not None:
            before, move = stage
            # A few roundings of the state, where the tolerances are less: a solution that rests far from zero.
            eps = jnp.finfo(jnp.result_type(*jtu.tree_leaves(y))).eps
            done = done | (self.norm(move) <= 4 * eps * self.norm(before))
        return done | (state.result != optx.RESULTS.successful), state.result
