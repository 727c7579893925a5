"""Langevin dynamics in a potential U at temperature T.

overdamped:     dX = -grad U(X) dt + sqrt(2 T) dW,                         invariant density exp(-U(x)/T)
underdamped:    dX = V dt,  dV = -gamma V dt - grad U(X) dt + sqrt(2 gamma T) dW,
                                                                           invariant exp(-(U(x) + |v|^2/2)/T)
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, PyTree

from ._equation import AbstractEquation


def _positive(x: Any, name: str) -> Array:
    x = jnp.asarray(x, jnp.result_type(float))
    if x.ndim != 0:
        raise ValueError(f"{name} must be a scalar, got shape {x.shape}.")
    return x


class Langevin(AbstractEquation):
    """Overdamped Langevin dynamics dX = -grad U(X) dt + sqrt(2 T) dW; its noise is additive.

    Arguments:
        potential: ``U(x)``, from a state (an array or tree of arrays) to a scalar.
        temperature: T, a scalar.

    Raises:
        ValueError: if the temperature is not a scalar.

    Example:
        >>> import jax, jax.numpy as jnp, sdeflow as sf
        >>> double_well = sf.equations.Langevin(lambda x: jnp.sum((x**2 - 1) ** 2), temperature=0.5)
        >>> sol = sf.solve(double_well, jnp.zeros(4), [0.0, 1.0], dt0=0.01, key=jax.random.key(0))
        >>> sol.final.shape
        (4,)
    """

    potential: Callable[[PyTree], Array]
    temperature: Array
    interpretation: str = eqx.field(static=True)
    additive: bool = eqx.field(static=True)

    def __init__(self, potential: Callable[[PyTree], Array], temperature: Any = 1.0):
        self.potential, self.temperature = potential, _positive(temperature, "temperature")
        self.interpretation, self.additive = "ito", True

    def drift(self, t: Any, y: PyTree, args: Any) -> PyTree:
        """Minus the gradient of the potential."""
        return jtu.tree_map(jnp.negative, jax.grad(self.potential)(y))

    def diffusion(self, t: Any, y: PyTree, args: Any) -> PyTree:
        """The square root of twice the temperature, as diagonal noise."""
        return jtu.tree_map(lambda x: jnp.full(x.shape, jnp.sqrt(2 * self.temperature), x.dtype), y)


class UnderdampedLangevin(AbstractEquation):
    """Underdamped Langevin dynamics of a state ``(x, v)`` of positions and velocities.

    Its terms are diffrax's underdamped Langevin terms, so that ALIGN, ShOULD and QUICSORT apply.

    Arguments:
        potential: ``U(x)``, from positions to a scalar.
        friction: gamma, a scalar.
        temperature: T, a scalar.

    Raises:
        ValueError: if friction or temperature is not a scalar.

    Example:
        >>> import jax, jax.numpy as jnp, sdeflow as sf
        >>> oscillator = sf.equations.UnderdampedLangevin(lambda x: jnp.sum(x**2) / 2, friction=1.0, temperature=0.5)
        >>> start = (jnp.ones(2), jnp.zeros(2))
        >>> x, v = sf.solve(oscillator, start, [0.0, 1.0], dt0=0.1, key=jax.random.key(0)).final
        >>> x.shape
        (2,)
    """

    potential: Callable[[PyTree], Array]
    friction: Array
    temperature: Array
    interpretation: str = eqx.field(static=True)
    additive: bool = eqx.field(static=True)

    def __init__(self, potential: Callable[[PyTree], Array], friction: Any = 1.0, temperature: Any = 1.0):
        self.potential = potential
        self.friction, self.temperature = _positive(friction, "friction"), _positive(temperature, "temperature")
        self.interpretation, self.additive = "ito", True

    def drift(self, t: Any, y: PyTree, args: Any) -> PyTree:
        """(v, -gamma v - grad U(x))."""
        x, v = y
        force = jax.grad(self.potential)(x)
        return v, jtu.tree_map(lambda v, g: -self.friction.astype(v.dtype) * v - g, v, force)

    def diffusion(self, t: Any, y: PyTree, args: Any) -> lx.AbstractLinearOperator:
        """The operator from the noise of the velocities to the state."""
        x, v = y
        size = jnp.sqrt(2 * self.friction * self.temperature)

        def apply(w: PyTree) -> PyTree:
            return jtu.tree_map(jnp.zeros_like, x), jtu.tree_map(lambda w: size.astype(w.dtype) * w, w)

        return lx.FunctionLinearOperator(apply, jax.eval_shape(lambda: v))

    def terms(self, path: diffrax.AbstractPath | None = None) -> diffrax.AbstractTerm:
        """Diffrax's underdamped Langevin terms."""
        if path is None:
            raise ValueError("A stochastic equation needs a path for its terms, e.g. sf.paths.GridBrownian(...).")
        temperature = self.temperature

        def gradient(x: PyTree, args: Any) -> PyTree:
            del args
            return jtu.tree_map(lambda g: g / temperature.astype(g.dtype), jax.grad(self.potential)(x))

        return diffrax.MultiTerm(
            diffrax.UnderdampedLangevinDriftTerm(self.friction, temperature, gradient),
            diffrax.UnderdampedLangevinDiffusionTerm(self.friction, temperature, path),  # pyright: ignore
        )
