r"""The way back as equations for `sdeflow.solve`, with times that decrease.

    dx = [f x - (1 + tau^2) / 2 g^2 score] dt + tau g dw = [f x - (1 + tau^2) sigma l' eps] dt + tau g dw,

with l the ``log_snr`` of the schedule and l' its derivative, g^2 = -2 sigma^2 l'. All tau have the same densities; tau
= 1 is Anderson's reverse equation and tau = 0 the ordinary one (Song et al., ICLR 2021). In the time l the ordinary
equation for y = x / sigma has a constant linear part,

    dy/dl = y - eps(t(l), sigma y),

for `sdeflow.solvers.ExponentialAdams` with rate 1.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from ..equations import AbstractEquation
from ._denoiser import AbstractDenoiser, check_denoiser


class _Reverse(AbstractEquation):
    """What the ordinary and the stochastic equation share."""

    denoiser: AbstractDenoiser

    def _drift(self, t: Any, y: Array, args: Any, weight: Any) -> Array:
        schedule, t = self.denoiser.schedule, jnp.asarray(t, y.dtype)
        f, slope = schedule.rates(t)
        noise = self.denoiser.predict("noise", t, y, args)
        return f * (y - jnp.asarray(schedule.mean, y.dtype)) - weight * schedule.sigma(t) * slope * noise


class ReverseSDE(_Reverse):
    """The reverse-time equation of a diffusion model, with additive noise; ``ts`` decrease.

    Arguments:
        denoiser: what predicts the noise.
        tau: how much of the noise is kept: 1 for Anderson's equation, towards 0 for the ordinary one.

    Raises:
        TypeError: for what is no denoiser.

    Example:
        >>> import diffrax, jax, jax.numpy as jnp, sdeflow as sf
        >>> vp = sf.diffusion.VP()
        >>> normal = sf.diffusion.Denoiser(lambda t, x, args: vp.sigma(t) * x, vp)  # data with variance 1
        >>> sol = sf.solve(sf.diffusion.ReverseSDE(normal), jnp.ones(2), [1.0, vp.t_min], dt0=-0.05,
        ...                solver=diffrax.Euler(), key=jax.random.key(0))
        >>> sol.final.shape
        (2,)
    """

    denoiser: AbstractDenoiser
    tau: Array
    interpretation: str = eqx.field(static=True)
    additive: bool = eqx.field(static=True)

    def __init__(self, denoiser: AbstractDenoiser, tau: Any = 1.0):
        check_denoiser(denoiser)
        self.denoiser, self.tau = denoiser, jnp.asarray(tau, jnp.result_type(tau, float))
        self.interpretation, self.additive = "ito", True

    def drift(self, t: Any, y: Array, args: Any) -> Array:
        """The drift, for decreasing times."""
        return self._drift(t, y, args, 1 + self.tau.astype(y.dtype) ** 2)

    def diffusion(self, t: Any, y: Array, args: Any) -> Array:
        """Tau g, as diagonal noise."""
        schedule, t = self.denoiser.schedule, jnp.asarray(t, y.dtype)
        _, slope = schedule.rates(t)
        size = self.tau.astype(y.dtype) * schedule.sigma(t) * jnp.sqrt(-2 * slope)
        return jnp.full(y.shape, size, y.dtype)


class ProbabilityFlow(_Reverse):
    """The ordinary equation with the densities of a diffusion model, for either direction of time.

    Arguments:
        denoiser: what predicts the noise.

    Raises:
        TypeError: for what is no denoiser.

    Example:
        >>> import jax.numpy as jnp, sdeflow as sf
        >>> vp = sf.diffusion.VP()
        >>> normal = sf.diffusion.Denoiser(lambda t, x, args: vp.sigma(t) * x, vp)  # data with variance 1
        >>> sol = sf.solve(sf.diffusion.ProbabilityFlow(normal), jnp.array(0.5), [1.0, vp.t_min], dt0=-0.05)
        >>> round(float(sol.final), 4)
        0.5
    """

    denoiser: AbstractDenoiser
    interpretation: str = eqx.field(static=True)
    additive: bool = eqx.field(static=True)

    def __init__(self, denoiser: AbstractDenoiser):
        check_denoiser(denoiser)
        self.denoiser = denoiser
        self.interpretation, self.additive = "ito", True

    def drift(self, t: Any, y: Array, args: Any) -> Array:
        """The velocity dx/dt."""
        return self._drift(t, y, args, 1)

    def reparametrised(self) -> "LogSNRFlow":
        """The same curves in the time l = log(alpha / sigma), which grows from noise to data, for y = x / sigma."""
        return LogSNRFlow(self.denoiser)


class LogSNRFlow(AbstractEquation):
    """The ordinary equation in the time l = log(alpha / sigma): dy/dl = y - eps, y = (x - mean) / sigma.

    Its linear part is constant, so `sdeflow.solvers.ExponentialAdams` with rate 1 takes it exactly.

    Arguments:
        denoiser: what predicts the noise.

    Example:
        >>> import jax.numpy as jnp, sdeflow as sf
        >>> vp = sf.diffusion.VP()
        >>> normal = sf.diffusion.Denoiser(lambda t, x, args: vp.sigma(t) * x, vp)  # data with variance 1
        >>> flow = sf.diffusion.ProbabilityFlow(normal).reparametrised()
        >>> ls = vp.log_snr(jnp.array([1.0, vp.t_min]))
        >>> sol = sf.solve(flow, flow.enter(ls[0], jnp.array(0.5)), ls, steps_per_interval=20,
        ...                solver=sf.solvers.ExponentialAdams(3, 1.0))
        >>> bool(abs(flow.leave(ls[1], sol.final) - 0.5) < 1e-2)
        True
    """

    denoiser: AbstractDenoiser
    interpretation: str = eqx.field(static=True)
    additive: bool = eqx.field(static=True)

    def __init__(self, denoiser: AbstractDenoiser):
        check_denoiser(denoiser)
        self.denoiser = denoiser
        self.interpretation, self.additive = "ito", True

    def drift(self, t: Any, y: Array, args: Any) -> Array:
        """The velocity dy/dl."""
        l = jnp.asarray(t, y.dtype)
        t = self.denoiser.schedule.t_of_log_snr(l)
        return y - self.denoiser.predict("noise", t, self.leave(l, y), args)

    def enter(self, l: Any, x: Array) -> Array:
        """Y at l, from x."""
        schedule = self.denoiser.schedule
        return (x - jnp.asarray(schedule.mean, x.dtype)) / schedule.sigma(schedule.t_of_log_snr(l))

    def leave(self, l: Any, y: Array) -> Array:
        """X at l, from y."""
        schedule = self.denoiser.schedule
        return schedule.sigma(schedule.t_of_log_snr(l)) * y + jnp.asarray(schedule.mean, y.dtype)
