"""Geometric Brownian motion: dX = mu X dt + sigma X dW (Ito), X(t) = X(0) exp((mu - sigma^2/2) t + sigma W(t))."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from ._equation import AbstractEquation


class GeometricBrownianMotion(AbstractEquation):
    """dX = mu X dt + sigma X dW in the Ito sense, elementwise.

    E X(t) = X(0) exp(mu t) and E X(t)^2 = X(0)^2 exp((2 mu + sigma^2) t).

    Arguments:
        mu: growth rate, a scalar or an array that broadcasts to the state's shape.
        sigma: volatility, likewise.

    Example:
        >>> import diffrax, jax, jax.numpy as jnp, sdeflow as sf
        >>> gbm = sf.equations.GeometricBrownianMotion(0.1, 0.2)
        >>> sol = sf.solve(gbm, jnp.ones(3), [0.0, 1.0], dt0=0.05, key=jax.random.key(0))
        >>> bool((sol.final > 0).all())
        True
    """

    mu: Array
    sigma: Array
    interpretation: str = eqx.field(static=True)
    additive: bool = eqx.field(static=True)

    def __init__(self, mu: Any, sigma: Any):
        self.mu, self.sigma = jnp.asarray(mu, float), jnp.asarray(sigma, float)
        self.interpretation, self.additive = "ito", False

    def drift(self, t: Any, y: PyTree, args: Any) -> PyTree:
        """Mu y."""
        return self.mu.astype(y.dtype) * y

    def diffusion(self, t: Any, y: PyTree, args: Any) -> Any:
        """Sigma y."""
        return self.sigma.astype(y.dtype) * y

    def to_stratonovich(self, *, elementwise: bool = True) -> AbstractEquation:
        """The same process in the Stratonovich sense: dX = (mu - sigma^2/2) X dt + sigma X o dW."""
        return super().to_stratonovich(elementwise=elementwise)

    def exact(self, x0: Array, t: Any, w: Array) -> Array:
        """X(t) = x0 exp((mu - sigma^2/2) t + sigma w), given the value w of the Brownian motion at time t."""
        return x0 * jnp.exp((self.mu - self.sigma**2 / 2) * t + self.sigma * w)
