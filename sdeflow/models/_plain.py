"""Neural SDEs and ODEs without further structure: what the stable classes are compared with.

    dz = f(t, z, X(t)) dt + g(t, z) dW        dz/dt = f(t, z, X(t))

Without a control the data reach the state through its start alone.
"""

from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from ._checks import check_size
from ._neural import AbstractNeuralEquation
from .fields import ControlledDrift, NoiseField


class NeuralODE(AbstractNeuralEquation):
    r"""A learned ordinary equation: dz/dt = f(t, z, X(t)), with f as the drift of the stable classes.

    Arguments:
        state_size: H, the length of z.
        control_size: C, the length of X(t); 0 for an equation without a control.
        width, depth: hidden layers of f.
        mode: "pure", or "benchmark" for the networks of the published experiments.
        rate: the largest speed of a state, 30 by default (1 in the benchmark mode).
        key: a JAX random key for the initial weights.

    Raises:
        ValueError: for a size out of range, another mode, or a rate that is not positive.

    Source: Chen, Rubanova, Bettencourt and Duvenaud, "Neural ordinary differential equations", 2018, arXiv 1806.07366.

    Example:
        >>> import jax, jax.numpy as jnp, sdeflow as sf
        >>> ode = sf.models.NeuralODE(8, key=jax.random.key(0))
        >>> sf.solve(ode, jnp.zeros(8), [0.0, 1.0], dt0=0.1).final.shape
        (8,)
    """

    f: ControlledDrift
    state_size: int = eqx.field(static=True)
    control_size: int = eqx.field(static=True)
    interpretation: ClassVar[str] = "ito"  # pyright: ignore
    additive: ClassVar[bool] = True  # pyright: ignore

    def __init__(
        self,
        state_size: int,
        *,
        control_size: int = 0,
        width: int = 64,
        depth: int = 2,
        mode: Literal["pure", "benchmark"] = "pure",
        rate: float | None = None,
        key: PRNGKeyArray,
    ):
        self.state_size = check_size("state_size", state_size)
        self.control_size = check_size("control_size", control_size, least=0)
        self.f = ControlledDrift(
            state_size,
            control_size=control_size,
            sees_time=True,
            width=width,
            depth=depth,
            mode=mode,
            rate=rate,
            key=key,
        )

    def drift(self, t: Any, y: Float[Array, " H"], args: Any) -> Float[Array, " H"]:
        """The drift at state ``y``; ``args`` is the control, any path with ``.evaluate(t)``.

        Raises:
            TypeError: if there is a control to read and ``args`` is no path.
            ValueError: if the state or the control's value has another length than the equation was built for.
        """
        self.check_state(y)
        return self.f(y, self.control(t, args), t)


class NeuralSDE(NeuralODE):
    r"""A learned stochastic equation: dz = f(t, z, X(t)) dt + g(t, z) dW (Ito, diagonal noise).

    The drift is bounded; the diffusion depends on the state, and no theorem on stability covers it. It is bounded and
    away from zero in the pure mode.

    Arguments:
        state_size: H, the length of z.
        control_size: C, the length of X(t); 0, the naive neural SDE, for an equation without a control.
        width, depth: hidden layers of f; g has one.
        mode: "pure", or "benchmark" for the networks of the published experiments.
        rate: the largest speed of a state, 30 by default (1 in the benchmark mode).
        sigma_min, sigma_max: the bounds of g in the pure mode.
        key: a JAX random key for the initial weights.

    Raises:
        ValueError: for a size out of range, another mode, a rate that is not positive, or bounds out of order.

    Source: as the baseline of Oh, Lim and Kim, ICLR 2024, arXiv 2402.14989.

    Example:
        >>> import jax, jax.numpy as jnp, sdeflow as sf
        >>> sde = sf.models.NeuralSDE(8, key=jax.random.key(0))
        >>> sf.solve(sde, jnp.zeros(8), [0.0, 1.0], dt0=0.1, key=jax.random.key(1)).final.shape
        (8,)
    """

    g: NoiseField
    additive: ClassVar[bool] = False  # pyright: ignore

    def __init__(
        self,
        state_size: int,
        *,
        control_size: int = 0,
        width: int = 64,
        depth: int = 2,
        mode: Literal["pure", "benchmark"] = "pure",
        rate: float | None = None,
        sigma_min: float = 0.1,
        sigma_max: float = 10.0,
        key: PRNGKeyArray,
    ):
        f, g = jax.random.split(key)
        super().__init__(state_size, control_size=control_size, width=width, depth=depth, mode=mode, rate=rate, key=f)
        self.g = NoiseField(state_size, width=width, mode=mode, sigma_min=sigma_min, sigma_max=sigma_max, key=g)

    def diffusion(self, t: Any, y: Float[Array, " H"], args: Any) -> Float[Array, " H"]:
        """The diagonal of the diffusion; it does not see the control."""
        self.check_state(y)
        return self.g(t, y)
