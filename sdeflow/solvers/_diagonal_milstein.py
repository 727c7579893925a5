"""Milstein's method for diagonal noise, with one Jacobian-vector product.

For Ito noise whose i-th diffusion depends on the i-th component of the state alone,

    Y' = Y + f h + g W + 1/2 g'[g] (W^2 - h),

all products elementwise, where g'[g] is the derivative of g in the direction g. ``diffrax.ItoMilstein`` allows general
commutative noise and pays one such product, and a cube of memory, for every noise dimension.

Source: Milstein, Approximate integration of stochastic differential equations, 1974.
"""

from typing import Any, ClassVar

import diffrax
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import PyTree


class DiagonalMilstein(diffrax.AbstractItoSolver):
    """Milstein's method for Ito equations with diagonal noise: strong order 1 at about the cost of Euler.

    The i-th entry of the diffusion must depend on the i-th entry of the state alone; for diagonal noise whose entries
    depend on each other use ``diffrax.ItoMilstein``, or any order 1/2 method.

    Raises:
        ValueError: while tracing, if the diffusion is a lineax operator other than a diagonal one.

    Example:
        >>> import jax, jax.numpy as jnp, sdeflow as sf
        >>> gbm = sf.equations.GeometricBrownianMotion(0.1, 0.4)
        >>> sol = sf.solve(gbm, jnp.ones(2), [0.0, 1.0], dt0=0.1, key=jax.random.key(0),
        ...                solver=sf.solvers.DiagonalMilstein())
        >>> sol.final.shape
        (2,)
    """

    term_structure: ClassVar = diffrax.MultiTerm[tuple[diffrax.AbstractTerm, diffrax.AbstractTerm]]
    interpolation_cls: ClassVar = diffrax.LocalLinearInterpolation

    def order(self, terms: Any) -> int:
        """Order for ordinary equations."""
        return 1

    def strong_order(self, terms: Any) -> float:
        """Strong order."""
        return 1.0

    def init(self, terms: Any, t0: Any, t1: Any, y0: PyTree, args: Any) -> None:
        """No state."""

    def step(
        self, terms: Any, t0: Any, t1: Any, y0: PyTree, args: Any, solver_state: None, made_jump: Any
    ) -> tuple[PyTree, None, dict[str, PyTree], None, Any]:
        """One step."""
        drift, diffusion = terms.terms
        h, w = terms.contr(t0, t1)
        g, along = jax.jvp(
            lambda y: _diagonal(diffusion.vf(t0, y, args), y), (y0,), (self._direction(terms, t0, y0, args),)
        )
        f = drift.vf_prod(t0, y0, args, h)
        new = lambda y, f, g, c, w: y + f + g * w + c * (w**2 - jnp.asarray(h, w.dtype)) / 2
        y1 = jtu.tree_map(new, y0, f, g, along, w)
        return y1, None, {"y0": y0, "y1": y1}, None, diffrax.RESULTS.successful

    @staticmethod
    def _direction(terms: Any, t0: Any, y0: PyTree, args: Any) -> PyTree:
        return _diagonal(terms.terms[1].vf(t0, y0, args), y0)

    def func(self, terms: Any, t0: Any, y0: PyTree, args: Any) -> Any:
        """The vector fields."""
        return terms.vf(t0, y0, args)


def _diagonal(g: Any, y: PyTree) -> PyTree:
    if isinstance(g, lx.AbstractLinearOperator):
        if not lx.is_diagonal(g):
            raise ValueError(
                f"DiagonalMilstein needs diagonal noise, but the diffusion is a {type(g).__name__}: use "
                "diffrax.ItoMilstein for commutative noise, or diffrax.Euler."
            )
        return lx.diagonal(g).reshape(jnp.shape(y))
    return g
