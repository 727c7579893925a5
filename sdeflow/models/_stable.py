"""Stable neural SDEs: data enter through the drift alone, and the noise cannot make the solution explode.

The classes share gamma, zeta and sigma. They differ in whether the drift sees the time, and in two products:

    Langevin       dz =   gamma(zeta(   z, X(t))) dt + sigma(t)   dW
    linear noise   dz =   gamma(zeta(t, z, X(t))) dt + sigma(t) z dW
    geometric      dz = z gamma(zeta(t, z, X(t))) dt + sigma(t) z dW

The benchmark mode is that of the published experiments: a tanh around the whole drift and the whole diffusion, and
tanh(z) in the place of the z that multiplies gamma. No theorem speaks of it; in particular its geometric class may
change sign.

Source: Oh, Lim and Kim, "Stable neural stochastic differential equations in analyzing irregular time series data", ICLR
2024, arXiv 2402.14989.
"""

import abc
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ..equations import AbstractEquation, Chart
from ._checks import check_size
from ._neural import AbstractNeuralEquation
from .fields import ControlledDrift, NoiseScale


class AbstractStableSDE(AbstractNeuralEquation):
    """The networks that the stable classes share, and how they become a drift and a diffusion.

    A subclass says whether its drift sees the time, whether its noise is additive, what gamma and sigma are multiplied
    with, and the bounds of its pure mode that are used unless others are given.
    """

    gamma: ControlledDrift
    sigma: NoiseScale
    state_size: int = eqx.field(static=True)
    control_size: int = eqx.field(static=True)
    mode: str = eqx.field(static=True)
    interpretation: ClassVar[str] = "ito"  # pyright: ignore
    sees_time: ClassVar[bool]
    bounds: ClassVar[tuple[float, float, float]]

    def __init__(
        self,
        state_size: int,
        *,
        control_size: int = 0,
        width: int = 64,
        depth: int = 2,
        mode: Literal["pure", "benchmark"] = "pure",
        rate: float | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        key: PRNGKeyArray,
    ):
        self.state_size = check_size("state_size", state_size)
        self.control_size = check_size("control_size", control_size, least=0)
        self.mode = mode
        gamma, sigma = jax.random.split(key)
        speed, low, high = self.bounds
        self.gamma = ControlledDrift(
            state_size,
            control_size=control_size,
            sees_time=self.sees_time,
            width=width,
            depth=depth,
            mode=mode,
            rate=speed if rate is None and mode == "pure" else rate,
            key=gamma,
        )
        self.sigma = NoiseScale(
            state_size,
            width=width,
            mode=mode,
            sigma_min=low if sigma_min is None else sigma_min,
            sigma_max=high if sigma_max is None else sigma_max,
            key=sigma,
        )

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
        self.check_state(y)
        seen = (y, self.control(t, args), t)
        if self.mode == "benchmark":
            return self.gamma.rate * jnp.tanh(self.drift_from(self.gamma.unbounded(*seen), jnp.tanh(y)))
        return self.drift_from(self.gamma(*seen), y)

    def diffusion(self, t: Any, y: Float[Array, " H"], args: Any) -> Float[Array, " H"]:
        """The diagonal of the diffusion; of what it is given, sigma sees ``t`` alone."""
        self.check_state(y)
        if self.mode == "benchmark":
            return jnp.tanh(self.noise_from(self.sigma.unbounded(t), y))
        return self.noise_from(self.sigma(t), y)


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
        sigma_min, sigma_max: the bounds of sigma in the pure mode, 0.1 and 10 by default; training starts near their
            geometric mean.
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
    bounds: ClassVar[tuple[float, float, float]] = (30.0, 0.1, 10.0)

    # Type checkers would make one of the fields.
    __init__ = AbstractStableSDE.__init__

    def drift_from(self, gamma: Float[Array, " H"], z: Float[Array, " H"]) -> Float[Array, " H"]:
        """Gamma itself."""
        return gamma

    def noise_from(self, sigma: Float[Array, " H"], z: Float[Array, " H"]) -> Float[Array, " H"]:
        """Sigma itself."""
        return sigma


class NeuralLinearNoiseSDE(AbstractStableSDE):
    r"""Learned drift and linear noise, driven by data: dz = gamma(zeta(t, z, X(t))) dt + sigma(t) z dW (Ito).

    The noise vanishes with the state, and grows no faster than it: drift and diffusion are Lipschitz, so a unique
        strong
    solution exists. For a drift that contracts at rate lam, two solutions with the same noise approach each other in
    the mean square where sigma^2 < 2 lam; Euler steps of length h keep that where h < (2 lam - sigma^2) / lam^2.

    Arguments:
        state_size: H, the length of z.
        control_size: C, the length of X(t); 0 for an equation without a control.
        width, depth: hidden layers of gamma.
        mode: "pure" is what the theorems are about; "benchmark" repeats the published experiments, with relu networks,
            sin t and cos t for the time, and a tanh around drift and diffusion.
        rate: the largest speed of a state, 30 by default (1 in the benchmark mode).
        sigma_min, sigma_max: the bounds of sigma in the pure mode, 0.05 and 1 by default; training starts near their
            geometric mean.
        key: a JAX random key for the initial weights.

    Raises:
        ValueError: for a size out of range, another mode, a rate that is not positive, or bounds out of order.

    Example:
        >>> import jax, jax.numpy as jnp, sdeflow as sf
        >>> sde = sf.models.NeuralLinearNoiseSDE(8, key=jax.random.key(0))
        >>> sf.solve(sde, jnp.ones(8), [0.0, 0.5, 1.0], dt0=0.1, key=jax.random.key(1)).ys.shape
        (3, 8)
    """

    additive: ClassVar[bool] = False  # pyright: ignore
    sees_time: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float, float]] = (30.0, 0.05, 1.0)

    # Type checkers would make one of the fields.
    __init__ = AbstractStableSDE.__init__

    def drift_from(self, gamma: Float[Array, " H"], z: Float[Array, " H"]) -> Float[Array, " H"]:
        """Gamma itself."""
        return gamma

    def noise_from(self, sigma: Float[Array, " H"], z: Float[Array, " H"]) -> Float[Array, " H"]:
        """Sigma z."""
        return sigma * z


class NeuralGeometricSDE(AbstractStableSDE):
    r"""A geometric equation with learned parts: dz = z gamma(zeta(t, z, X(t))) dt + sigma(t) z dW (Ito).

    No entry of z ever changes its sign, and 0 stays 0. In the pure mode `sdeflow.solve` walks x = log(z / z(0))
    instead,

        dx = (gamma - sigma^2 / 2) dt + sigma dW,    z = z(0) exp(x),

    whose noise is additive: signs are exact whatever the steps are, so are constant gamma and sigma, and every solver
    will do. What `solve` saves is z. Where x leaves [-80, 80] it is held there, and ``sol.stats["clamped"]`` counts the
    entries of the last state for which that happened. ``diffrax.diffeqsolve`` on ``.terms(path)`` walks z itself, as
    `solve` does in the benchmark mode.

    Arguments:
        state_size: H, the length of z.
        control_size: C, the length of X(t); 0 for an equation without a control.
        width, depth: hidden layers of gamma.
        mode: "pure" is what the theorems are about; "benchmark" repeats the published experiments, with relu networks,
            sin t and cos t for the time, tanh(z) for the z before gamma, and a tanh around drift and diffusion.
        rate: the largest entry of gamma, 30 by default (1 in the benchmark mode).
        sigma_min, sigma_max: the bounds of sigma in the pure mode, 0.05 and 1 by default; training starts near their
            geometric mean.
        key: a JAX random key for the initial weights.

    Raises:
        ValueError: for a size out of range, another mode, a rate that is not positive, or bounds out of order.

    Example:
        >>> import jax, jax.numpy as jnp, sdeflow as sf
        >>> sde = sf.models.NeuralGeometricSDE(2, key=jax.random.key(0))
        >>> sol = sf.solve(sde, jnp.array([1.0, -1.0]), [0.0, 1.0], dt0=0.5, key=jax.random.key(1))
        >>> jnp.sign(sol.final).tolist()
        [1.0, -1.0]
    """

    additive: ClassVar[bool] = False  # pyright: ignore
    sees_time: ClassVar[bool] = True
    bounds: ClassVar[tuple[float, float, float]] = (30.0, 0.05, 1.0)

    # Type checkers would make one of the fields.
    __init__ = AbstractStableSDE.__init__

    def drift_from(self, gamma: Float[Array, " H"], z: Float[Array, " H"]) -> Float[Array, " H"]:
        """Gamma z."""
        return gamma * z

    def noise_from(self, sigma: Float[Array, " H"], z: Float[Array, " H"]) -> Float[Array, " H"]:
        """Sigma z."""
        return sigma * z

    def start_from(self, x: Float[Array, " H"]) -> Float[Array, " H"]:
        """softplus(x) + 0.0001, as 0 cannot be left."""
        return jax.nn.softplus(x) + 1e-4

    def chart(self, y0: Any) -> Chart | None:
        """The logarithm of the growth, for the pure mode."""
        self.check_state(y0)
        if self.mode == "benchmark":
            return None
        y0 = jnp.asarray(y0)
        return Chart(
            _Logarithmic(self, y0),  # pyright: ignore[reportCallIssue]
            jnp.zeros_like(y0),
            _Growth(y0),
        )


_LARGEST = 80.0  # exp(80) is a float32, and so is its product with any start of ordinary size.


class _Growth(eqx.Module):
    """z(0) exp(x)."""

    start: Array

    def __call__(self, x: Array) -> Array:
        return self.start * jnp.exp(jnp.clip(x, -_LARGEST, _LARGEST))

    def notes(self, x: Array) -> dict[str, Array]:
        """What to say of the last state."""
        return {"clamped": jnp.sum(jnp.abs(x) > _LARGEST)}


class _Logarithmic(AbstractEquation):
    """dx = (gamma - sigma^2 / 2) dt + sigma dW for x = log(z / z(0))."""

    sde: NeuralGeometricSDE
    start: Array
    interpretation: ClassVar[str] = "ito"  # pyright: ignore
    additive: ClassVar[bool] = True  # pyright: ignore

    def drift(self, t: Any, y: Array, args: Any) -> Array:
        sde = self.sde
        return sde.gamma(_Growth(self.start)(y), sde.control(t, args), t) - sde.sigma(t) ** 2 / 2

    def diffusion(self, t: Any, y: Array, args: Any) -> Array:
        return self.sde.sigma(t)
