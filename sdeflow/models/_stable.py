"""Stable neural SDEs: data enter through the drift alone, and the noise cannot make the solution explode.

The classes share gamma, zeta and sigma. They differ in whether the drift sees the time, and in two products:

    Langevin       dz =   gamma(zeta(   z, X(t))) dt + sigma(t)   dW
    linear noise   dz =   gamma(zeta(t, z, X(t))) dt + sigma(t) z dW
    geometric      dz = z gamma(zeta(t, z, X(t))) dt + sigma(t) z dW

This version has the first. Source: Oh, Lim and Kim, "Stable neural stochastic differential equations in analyzing
irregular time series data", ICLR 2024, arXiv 2402.14989.
"""

import abc
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ..equations import AbstractEquation
from ._checks import check_size
from .fields import ControlledDrift, NoiseScale


class AbstractStableSDE(AbstractEquation):
    """The networks that the stable classes share, and how they become a drift and a diffusion.

    A subclass says whether its drift sees the time, whether its noise is additive, and what gamma and sigma are
    multiplied with.
    """

    gamma: ControlledDrift
    sigma: NoiseScale
    state_size: int = eqx.field(static=True)
    control_size: int = eqx.field(static=True)
    interpretation: ClassVar[str] = "ito"  # pyright: ignore
    sees_time: ClassVar[bool]

    def __init__(
        self,
        state_size: int,
        *,
        control_size: int,
        width: int,
        depth: int,
        mode: Literal["pure", "benchmark"],
        rate: float | None,
        sigma_min: float,
        sigma_max: float,
        key: PRNGKeyArray,
    ):
        self.state_size = check_size("state_size", state_size)
        self.control_size = check_size("control_size", control_size, least=0)
        gamma, sigma = jax.random.split(key)
        self.gamma = ControlledDrift(
            state_size,
            control_size=control_size,
            sees_time=self.sees_time,
            width=width,
            depth=depth,
            mode=mode,
            rate=rate,
            key=gamma,
        )
        self.sigma = NoiseScale(state_size, width=width, mode=mode, sigma_min=sigma_min, sigma_max=sigma_max, key=sigma)

    @abc.abstractmethod
    def drift_from(self, gamma: Float[Array, " H"], z: Float[Array, " H"]) -> Float[Array, " H"]:
        """The drift, given the value of gamma."""

    @abc.abstractmethod
    def noise_from(self, sigma: Float[Array, " H"], z: Float[Array, " H"]) -> Float[Array, " H"]:
        """The diagonal of the diffusion, given the value of sigma."""

    def drift(self, t: Any, y: Float[Array, " H"], args: Any) -> Float[Array, " H"]:
        """The drift at state ``y``; ``args`` is the control, any path with ``.evaluate(t)``.

        Raises:
            TypeError: if there is a control to read and ``args`` is no path.
            ValueError: if the state or the control's value has another length than the equation was built for.
        """
        self._check_state(y)
        return self.drift_from(self.gamma(y, self._control(t, args), t), y)

    def diffusion(self, t: Any, y: Float[Array, " H"], args: Any) -> Float[Array, " H"]:
        """The diagonal of the diffusion; of what it is given, sigma sees ``t`` alone."""
        self._check_state(y)
        return self.noise_from(self.sigma(t), y)

    def _check_state(self, y: Any) -> None:
        if jnp.shape(y) != (self.state_size,):
            raise ValueError(
                f"{type(self).__name__} was built with state_size={self.state_size}, but the state has shape "
                f"{jnp.shape(y)}; start from an array of shape ({self.state_size},), and use jax.vmap for batches."
            )

    def _control(self, t: Any, args: Any) -> Any:
        if self.control_size == 0:
            return None
        if not callable(getattr(args, "evaluate", None)):
            raise TypeError(
                f"{type(self).__name__} was built with control_size={self.control_size}, so args must be a path with "
                f".evaluate(t), such as sf.paths.linear_control(times, values); got {type(args).__name__}."
            )
        x = args.evaluate(t)
        if jnp.shape(x) != (self.control_size,):
            raise ValueError(
                f"{type(self).__name__} was built with control_size={self.control_size}, but the control's value has "
                f"shape {jnp.shape(x)}; build both with the same number of channels."
            )
        return x


class NeuralLangevinSDE(AbstractStableSDE):
    r"""A Langevin equation with learned parts, driven by data: dz = gamma(zeta(z, X(t))) dt + sigma(t) dW (Ito).

    The noise is additive and the drift has no explicit time: what happens in time happens in the control X, which
    enters by its value. zeta is affine and gamma a bounded network, so the drift is bounded and Lipschitz, and so is
    sigma: a unique strong solution exists, and neither noise nor long steps make it explode. Being additive, the noise
    means the same in the Ito and the Stratonovich sense, and every solver will do.

    Arguments:
        state_size: H, the length of z.
        control_size: C, the length of X(t); 0 for an equation without a control.
        width, depth: hidden layers of gamma.
        mode: "pure" is what the theorems are about; "benchmark" repeats the published experiments, with relu networks
            and sin t and cos t for the time.
        rate: the largest speed of a state, 30 by default (1 in the benchmark mode). Series of
            `sdeflow.data.TimeSeries` are at most 1 long, and in that time a state has to take in many observations.
        sigma_min, sigma_max: the bounds of sigma in the pure mode.
        key: a JAX random key for the initial weights.

    Raises:
        ValueError: for a size out of range, another mode, a rate that is not positive, or bounds out of order.

    Example:
        >>> import jax, jax.numpy as jnp, sdeflow as sf
        >>> sde = sf.models.NeuralLangevinSDE(8, control_size=2, key=jax.random.key(0))
        >>> ts = jnp.array([0.0, 0.2, 1.0])
        >>> control = sf.paths.linear_control(ts, jnp.array([[0.0, 1.0], [jnp.nan, 2.0], [1.0, 0.0]]))
        >>> sf.solve(sde, jnp.zeros(8), ts, args=control, dt0=0.1, key=jax.random.key(1)).ys.shape
        (3, 8)
    """

    additive: ClassVar[bool] = True  # pyright: ignore
    sees_time: ClassVar[bool] = False

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
        super().__init__(
            state_size,
            control_size=control_size,
            width=width,
            depth=depth,
            mode=mode,
            rate=rate,
            sigma_min=sigma_min,
            sigma_max=sigma_max,
            key=key,
        )

    def drift_from(self, gamma: Float[Array, " H"], z: Float[Array, " H"]) -> Float[Array, " H"]:
        """Gamma itself."""
        return gamma

    def noise_from(self, sigma: Float[Array, " H"], z: Float[Array, " H"]) -> Float[Array, " H"]:
        """Sigma itself."""
        return sigma
