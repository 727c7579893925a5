"""What one step tells of its cost: the size of its error estimate, and how stiff the field is at its end."""

from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from ..solvers._unrolled import StandIn

TINY = 1e-30  # the root of nothing has no derivative


class Step(NamedTuple):
    """One step that was taken.

    Fields:
        solver: the solver that took it.
        drift: ``drift(t, y)``.
        t0, t1: its ends.
        y0, y1: the states there.
        error: the embedded error estimate; None if the solver has none.
        slopes: the stages' slopes times the length of the step, leaves (stages, ...); None if not known.
        rtol, atol: the tolerances that errors are measured by.
    """

    solver: Any
    drift: Any
    t0: Any
    t1: Any
    y0: PyTree
    y1: PyTree
    error: PyTree | None
    slopes: PyTree | None
    rtol: Any
    atol: Any

    @property
    def method(self) -> Any:
        """The solver as the user gave it."""
        solver = self.solver
        while isinstance(solver, StandIn):
            solver = solver.solver
        return solver

    @property
    def length(self) -> Array:
        """The length of the step."""
        return jnp.abs(self.t1 - self.t0)


def error_size(step: Step) -> Array:
    """E = RMS( e / (atol + rtol max(|y0|, |y1|)) ), e the embedded error estimate.

    Raises:
        ValueError: while tracing, if the solver estimates no error.
    """
    if step.error is None:
        raise ValueError(
            f"{type(step.method).__name__} estimates no error, which the regulariser needs: use a solver that does, "
            "e.g. diffrax.Heun() or diffrax.Tsit5(), or for noise diffrax.SPaRK() or diffrax.ShARK()."
        )
    scaled = jtu.tree_map(
        lambda e, a, b: e / (step.atol + step.rtol * jnp.maximum(jnp.abs(a), jnp.abs(b))), step.error, step.y0, step.y1
    )
    return jnp.sqrt(jnp.mean(ravel_pytree(scaled)[0] ** 2) + TINY)


def stiffness(step: Step) -> Array:
    """S = |f(t1, y1) - f(t1, g)| / |y1 - g|, g another approximation of the state at the step's end.

    For tableaus whose last two stages both lie at the end, the second of them at y1 (Tsit5, Dopri5), g is the stage
    before the last, and no evaluation is needed. Otherwise g is the embedded solution, y1 less the error estimate.

    Raises:
        ValueError: while tracing, if the solver has neither.
    """
    solver = step.method
    tableau = getattr(solver, "tableau", None)
    explicit = isinstance(tableau, diffrax.ButcherTableau) and isinstance(solver, diffrax.AbstractERK)
    if explicit and step.slopes is not None and tableau.fsal and float(tableau.c[-2]) == 1:  # pyright: ignore
        row = jnp.asarray(tableau.a_lower[-2])  # pyright: ignore
        g = jtu.tree_map(lambda y, k: y + jnp.tensordot(row.astype(k.dtype), k[: row.size], 1), step.y0, step.slopes)
        rise = jtu.tree_map(lambda k: (k[-1] - k[-2]) / (step.t1 - step.t0), step.slopes)
        run = jtu.tree_map(jnp.subtract, step.y1, g)
    else:
        if step.error is None:
            error_size(step)
        g = jtu.tree_map(jnp.subtract, step.y1, step.error)
        rise = jtu.tree_map(jnp.subtract, step.drift(step.t1, step.y1), step.drift(step.t1, g))
        run = jtu.tree_map(jnp.subtract, step.y1, g)
    above, below = jnp.sum(ravel_pytree(rise)[0] ** 2), jnp.sum(ravel_pytree(run)[0] ** 2)
    there = below > 0
    return jnp.where(there, jnp.sqrt(above + TINY) / jnp.sqrt(jnp.where(there, below, 1)), 0)


def drift_of(terms: Any, args: Any) -> Any:
    """``drift(t, y)`` of an equation's terms."""
    one = terms.terms[0] if isinstance(terms, diffrax.MultiTerm) else terms
    return lambda t, y: one.vf(t, y, args)


def frozen(tree: Any) -> Any:
    """The tree without derivatives."""
    return jtu.tree_map(jax.lax.stop_gradient, tree)
