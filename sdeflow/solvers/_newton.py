"""Newton's method for the stages of implicit steps of fixed length, and the derivatives of such stages."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import optimistix as optx
from jax.flatten_util import ravel_pytree
from jaxtyping import PyTree

from .._compat import lax_while_loop, moved_by


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


class StageAdjoint(optx.AbstractAdjoint):
    """Differentiate a stage k(theta), the root of f(k, theta), by the implicit function theorem.

    dk = -(df/dk)^-1 (df/dtheta) dtheta, as ``optimistix.ImplicitAdjoint`` has it. There lineax solves the system, and
    raises from within the program where a cotangent is NaN, by a call back to the host: here NaN stays NaN.
    """

    def apply(
        self,
        primal_fn: Callable[..., Any],
        rewrite_fn: Callable[..., Any],
        inputs: Any,
        tags: frozenset[object],
    ) -> PyTree:
        """Find the root."""
        del tags
        root, rest = _stage(primal_fn, rewrite_fn, (*inputs, lax_while_loop))
        return root, jtu.tree_map(lambda x: jax.lax.stop_gradient(x) if eqx.is_inexact_array(x) else x, rest)


@eqx.filter_custom_jvp
def _stage(find: Callable[..., Any], residual: Callable[..., Any], inputs: Any) -> Any:
    return jtu.tree_map(jnp.asarray, find(inputs))


@_stage.def_jvp
def _stage_jvp(primals: Any, tangents: Any) -> Any:
    find, residual, inputs = primals
    moves = tangents[2]
    moving = jtu.tree_map(lambda x: x is not None, moves, is_leaf=lambda x: x is None)
    varying, still = eqx.partition(inputs, moving)
    root, rest = _stage(find, residual, inputs)
    flat, unravel = ravel_pytree(root)
    f = lambda k, some: ravel_pytree(residual(unravel(k), rest, eqx.combine(some, still)))[0]
    _, moved = jax.jvp(lambda some: f(flat, some), (varying,), (moves,))
    change = -jnp.linalg.solve(jax.jacfwd(f, holomorphic=jnp.iscomplexobj(flat))(flat, varying), moved)
    none = jtu.tree_map(lambda x: jnp.zeros_like(x) if eqx.is_inexact_array(x) else None, rest)
    return (root, rest), (unravel(change), none)
