"""Regularisers that are states of the equation: integrals along the solution, solved beside it.

    kinetic energy      int |f|^2 dt            Finlay, Jacobsen, Nurbekyan and Oberman, 2020, arXiv:2002.02798
    Jacobian            int |eps^T df/dy|^2 dt  the same; E over eps is the squared Frobenius norm of df/dy
    Taylor              int |d^K y/dt^K|^2 dt   Kelly, Bettencourt, Johnson and Duvenaud, 2020, arXiv:2007.04504

f is the drift; norms are sums of squares over the whole state. For decreasing times dt is |dt|: a solve costs the same
in either direction. The solution and, with adaptive steps, the choice of steps are those without the integral: it takes
no part in the error that the controller sees.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from ._base import AbstractRegulariser


def _square(tree: PyTree) -> Array:
    return jnp.sum(ravel_pytree(tree)[0] ** 2)


class AbstractStateRegulariser(AbstractRegulariser):
    """The integral of a rate along the solution, over the length of time whichever way it goes.

    ``signed`` integrals are over dt itself, and change sign with the direction of time. ``failure`` names the member
    of `sdeflow.RESULTS` that says that the integral is not finite where the solution is.
    """

    signed: ClassVar[bool] = False
    failure: ClassVar[str | None] = None

    def draw(self, key: Any, y0: PyTree) -> Any:
        """What is drawn once for a whole solve."""
        del key, y0

    def rate(self, drift: Any, t: Any, y: PyTree, drawn: Any) -> Array:
        """The integrand, given ``drift(t, y)``."""
        raise NotImplementedError


class Kinetic(AbstractStateRegulariser):
    """int |f(t, y)|^2 dt, f the drift.

    Source: Finlay, Jacobsen, Nurbekyan and Oberman, How to train your neural ODE, 2020, arXiv:2002.02798.

    Example:
        >>> import jax.numpy as jnp, sdeflow as sf
        >>> decay = sf.ODE(lambda t, y, args: -y)
        >>> sol = sf.solve(decay, jnp.array(1.0), [0.0, 1.0], dt0=0.1, regularisers=(sf.regularisers.Kinetic(),))
        >>> bool(abs(sol.penalties["Kinetic"] - (1 - jnp.exp(-2.0)) / 2) < 1e-5)
        True
    """

    def rate(self, drift: Any, t: Any, y: PyTree, drawn: Any) -> Array:
        """|f|^2."""
        return _square(drift(t, y))


class JacobianFrobenius(AbstractStateRegulariser):
    """int |eps^T df/dy|^2 dt with signs eps drawn once a solve; its mean is the integral of |df/dy|_F^2.

    Raises:
        ValueError: from ``solve`` without ``key=``.

    Source: Finlay, Jacobsen, Nurbekyan and Oberman, 2020; Hutchinson, 1989.

    Example:
        >>> import jax, jax.numpy as jnp, sdeflow as sf
        >>> decay = sf.ODE(lambda t, y, args: -2 * y)
        >>> sol = sf.solve(decay, jnp.ones(3), [0.0, 1.0], dt0=0.1, key=jax.random.key(0),
        ...                regularisers=(sf.regularisers.JacobianFrobenius(),))
        >>> round(float(sol.penalties["JacobianFrobenius"]), 3)
        12.0
    """

    draws: ClassVar[bool] = True

    def draw(self, key: Any, y0: PyTree) -> Any:
        """The signs."""
        flat, unravel = ravel_pytree(y0)
        return unravel(jax.random.rademacher(key, flat.shape, flat.dtype))

    def rate(self, drift: Any, t: Any, y: PyTree, drawn: Any) -> Array:
        """|eps^T df/dy|^2."""
        return _square(jax.vjp(lambda y: drift(t, y), y)[1](drawn)[0])


class PathKL(AbstractStateRegulariser):
    r"""int |u(t, y)|^2 / 2 dt with u = (f - prior) / g, f the drift of the solution and g its diagonal diffusion.

    By Girsanov's theorem its mean over paths is the Kullback-Leibler divergence, in nats, of the law of the solution
    from that of the equation with drift ``prior``, the same diffusion and the same start.

    Arguments:
        prior: ``prior(t, y, args)``, another drift.
        diffusion: ``diffusion(t, y, args)``, of the structure of y, nowhere 0; where it is, the solve ends as
            ``RESULTS.degenerate_diffusion``. Its signs do not matter.
        args: handed on to both.

    Source: Li, Wong, Chen and Duvenaud, Scalable gradients for stochastic differential equations, 2020,
    arXiv:2001.01328.

    Example:
        >>> import jax, jax.numpy as jnp, sdeflow as sf
        >>> noise = lambda t, y, args: jnp.full_like(y, 0.5)
        >>> sde = sf.SDE(lambda t, y, args: jnp.ones_like(y), noise, additive=True)
        >>> kl = sf.regularisers.PathKL(lambda t, y, args: jnp.zeros_like(y), noise)
        >>> sol = sf.solve(sde, jnp.zeros(3), [0.0, 2.0], dt0=0.1, key=jax.random.key(0), regularisers=(kl,))
        >>> round(float(sol.penalties["PathKL"]), 4)
        12.0
    """

    failure: ClassVar[str | None] = "degenerate_diffusion"
    prior: Callable[[Any, PyTree, Any], PyTree]
    diffusion: Callable[[Any, PyTree, Any], PyTree]
    args: Any = None

    def rate(self, drift: Any, t: Any, y: PyTree, drawn: Any) -> Array:
        """|u|^2 / 2."""
        gap = jtu.tree_map(
            lambda f, h, g: (f - h) / g, drift(t, y), self.prior(t, y, self.args), self.diffusion(t, y, self.args)
        )
        return _square(gap) / 2


class TaylorDerivative(AbstractStateRegulariser):
    """int |d^K y/dt^K|^2 dt along the solution of y' = f(t, y); K = 1 is `Kinetic`.

    The derivative is taken by nested forward mode, whose cost doubles with every order.

    Arguments:
        order: K, best about the order of the solver; 2 to 4 in the paper.

    Raises:
        ValueError: for an order that is not a positive integer.

    Source: Kelly, Bettencourt, Johnson and Duvenaud, Learning differential equations that are easy to solve, 2020,
    arXiv:2007.04504.

    Example:
        >>> import jax.numpy as jnp, sdeflow as sf
        >>> decay = sf.ODE(lambda t, y, args: -2 * y)
        >>> sol = sf.solve(decay, jnp.array(1.0), [0.0, 1.0], dt0=0.05,
        ...                regularisers=(sf.regularisers.TaylorDerivative(2),))
        >>> bool(abs(sol.penalties["TaylorDerivative"] - 4 * (1 - jnp.exp(-4.0))) < 1e-4)
        True
    """

    order: int = eqx.field(default=2, static=True)

    def __check_init__(self):
        if not isinstance(self.order, int) or isinstance(self.order, bool) or self.order < 1:
            raise ValueError(f"order must be a positive integer, got {self.order!r}.")

    def rate(self, drift: Any, t: Any, y: PyTree, drawn: Any) -> Array:
        """|d^K y/dt^K|^2."""
        derivative = drift
        for _ in range(self.order - 1):
            derivative = _along(derivative, drift)
        return _square(derivative(t, y))


def _along(g: Any, drift: Any) -> Any:
    """The total derivative of g(t, y) along the flow of the drift."""

    def total(t: Any, y: PyTree) -> PyTree:
        t = jnp.asarray(t, jnp.result_type(float))
        return jax.jvp(g, (t, y), (jnp.ones_like(t), drift(t, y)))[1]

    return total
