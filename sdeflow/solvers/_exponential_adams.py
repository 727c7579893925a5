r"""Exponential Adams methods: an equation with a stiff linear part, taken exactly, one evaluation a step.

For dy/dt = r y + N(t, y) the step from t_n to t_n + h is

    y_{n+1} = e^{r h} y_n + h sum_j w_j N_{n-j},      w_j = int_0^1 e^{r h (1 - u)} p_j(u) du,

with p_j Lagrange's polynomials on the last k nodes, wherever these lie, in units of the step. The moments
``int_0^1 e^{z (1 - u)} u^d du``, d! times the function phi_{d+1}, come from quadrature where z is moderate, and
elsewhere from their recurrence, which cancels near 0. Diffusion samplers of the multistep kind are such methods: see
`sdeflow.diffusion.LogSNRFlow`, where r = 1.

Source: Hochbruck and Ostermann, Exponential multistep methods of Adams type, BIT 2011.
"""

from typing import Any, ClassVar

import diffrax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, PyTree

_MODERATE = 6.0
# Exact to the last digits there.
_POINTS, _WEIGHTS = (x / 2 for x in np.polynomial.legendre.leggauss(20))
_POINTS = _POINTS + 0.5


class ExponentialAdams(diffrax.AbstractSolver):
    """An exponential multistep method for dy/dt = rate y + N(t, y), given the whole right side.

    Its first steps combine fewer slopes, as do those after a jump: unless they are shorter, or the equation is close to
    linear there, the error falls with the square of their length at best. Steps may be of different lengths; they do
    not adapt.

    Arguments:
        order: how many slopes are combined, 1 to 4. Order 1 is the exponential method of Euler.
        rate: r, a number or an array that broadcasts to the state; 0 for the plain method of Adams and Bashforth.

    Raises:
        ValueError: for another order.

    Example:
        >>> import jax.numpy as jnp, sdeflow as sf
        >>> stiff = sf.ODE(lambda t, y, args: -1000.0 * (y - jnp.cos(t)))
        >>> sol = sf.solve(stiff, jnp.array(0.0), [0.0, 1.0], dt0=0.01, solver=sf.solvers.ExponentialAdams(2, -1000.0))
        >>> bool(abs(sol.final - 0.5411) < 1e-3)
        True
    """

    order_: int
    rate: Any = 0.0

    term_structure: ClassVar = diffrax.AbstractTerm
    interpolation_cls: ClassVar = diffrax.LocalLinearInterpolation

    def __init__(self, order: int = 3, rate: Any = 0.0):
        if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= 4:
            raise ValueError(f"order must be an integer from 1 to 4, got {order!r}.")
        self.order_, self.rate = order, rate

    def order(self, terms: Any) -> int:
        """Order for ordinary equations, the first steps included."""
        return min(self.order_, 2)

    def init(self, terms: Any, t0: Any, t1: Any, y0: PyTree, args: Any) -> tuple[Array, PyTree, Array]:
        """No slopes yet."""
        k = self.order_
        slopes = jtu.tree_map(lambda y: jnp.zeros((k, *jnp.shape(y)), jnp.result_type(y)), y0)
        return jnp.zeros(k, jnp.result_type(t0, float)), slopes, jnp.array(0)

    def step(
        self, terms: Any, t0: Any, t1: Any, y0: PyTree, args: Any, solver_state: Any, made_jump: Any
    ) -> tuple[PyTree, None, dict[str, PyTree], Any, Any]:
        """One step."""
        times, slopes, count = solver_state
        count = jnp.minimum(jnp.where(made_jump, 0, count) + 1, self.order_)
        times = jnp.concatenate([jnp.asarray(t0, times.dtype)[None], times[:-1]])
        new = jtu.tree_map(lambda f, y: f - self._rate(y) * y, terms.vf(t0, y0, args), y0)
        slopes = jtu.tree_map(lambda n, old: jnp.concatenate([n[None], old[:-1]]), new, slopes)
        polynomials = self._polynomials((times - t0) / jnp.where(t1 == t0, 1, t1 - t0), count)
        control = terms.contr(t0, t1)

        def moved(y: Array, n: Array) -> Array:
            h = jnp.asarray(control, n.dtype)
            z = self._rate(y) * h
            w = jnp.tensordot(polynomials.astype(n.dtype), _moments(z, self.order_), 1, precision="highest")
            # One weight for each slope leads; what is left broadcasts to the state from the right, as the rate does.
            w = w.reshape(w.shape[0], *[1] * (n.ndim - w.ndim), *w.shape[1:])
            return jnp.exp(z) * y + h * (w * n).sum(axis=0)

        y1 = jtu.tree_map(moved, y0, slopes)
        return y1, None, {"y0": y0, "y1": y1}, (times, slopes, count), diffrax.RESULTS.successful

    def func(self, terms: Any, t0: Any, y0: PyTree, args: Any) -> Any:
        """The vector field."""
        return terms.vf(t0, y0, args)

    def _rate(self, y: Array) -> Array:
        return jnp.asarray(self.rate, y.dtype)

    def _polynomials(self, nodes: Array, count: Array) -> Array:
        """Lagrange's polynomials on the first ``count`` nodes: their coefficients, (k, k), the constant ones first."""
        k = self.order_
        known = jnp.arange(k) < count
        rows = []
        for j in range(k):
            p = jnp.zeros(k, nodes.dtype).at[0].set(known[j].astype(nodes.dtype))
            for m in range(k):
                if m != j:
                    use = known[j] & known[m]
                    gap = jnp.where(use, nodes[j] - nodes[m], 1)
                    longer = (jnp.concatenate([jnp.zeros_like(p[:1]), p[:-1]]) - nodes[m] * p) / gap
                    p = jnp.where(use, longer, p)
            rows.append(p)
        return jnp.stack(rows)


def _moments(z: Array, count: int) -> Array:
    """``int_0^1 e^{z (1 - u)} u^d du`` for d below ``count``, leading."""
    small = jnp.abs(z) < _MODERATE
    near, far = jnp.where(small, z, 0), jnp.where(small, _MODERATE, z)
    widen = lambda x: jnp.asarray(x, z.dtype).reshape(-1, *[1] * z.ndim)
    kernel = widen(_WEIGHTS) * jnp.exp(near * (1 - widen(_POINTS)))
    out, moment = [], jnp.expm1(far) / far
    for d in range(count):
        if d:
            moment = (d * moment - 1) / far
        out.append(jnp.where(small, (kernel * widen(_POINTS**d)).sum(axis=0), moment))
    return jnp.stack(out)
