"""The bridge of a linear equation driven by fractional noise to an observation of its end, in closed form.

For dX = -theta X dt + dB with the factors Y of B, the state at the end is, given z = (X, Y) at a time tau before it,

    X(T) = c(tau) . z + int g dW,      g(tau) = c_0 w + sum_k c_k,      w = sum_k w_k,
    c_0 = exp(-theta tau),      c_k = -w_k rate_k int_0^tau exp(-theta (tau - s) - rate_k s) ds,

so an observation y of X(T) with deviation s has the density N(y; c . z, v + s^2), v(tau) = int_0^tau g^2, and

    u(t, z) = g (y - c . z) / (v + s^2)

is the control under which the bound on its evidence is the evidence, path by path once int u dW is taken off. Of type I
the factors at the start, L e with e ~ N(0, 1), are seen through y too: with b = L'(c_1, ..., c_K) and
T_j = v + s^2 + sum_(i >= j) b_i^2, the law of e given y is that of m + S e with

    m = b (y - c_0 x) / T_1,      S_jj = sqrt(T_(j+1) / T_j),      S_ij = -b_i b_j / sqrt(T_j T_(j+1)) for i > j.

Source: the construction of Daems et al., ICLR 2024, whose control is learned and whose past is that of the prior; with
s = 0 it is the bridge of Nobis et al., NeurIPS 2025.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ..paths import FactorLaw, MarkovFractionalNoise
from ..paths._markov_fractional import stationary_factor
from ._fractional import FractionalSDE, FractionalState

_NODES, _POWER = 64, 3


class FractionalBridge(eqx.Module):
    """The control that makes dX = -theta X dt + dB end at an observation; each entry of the state is on its own.

    The factors of type I start in their law given the observation.

    Arguments:
        noise: a `sdeflow.paths.MarkovFractionalNoise` with an index that does not depend on time.
        theta: the rate of decay; 0 is the noise itself.
        t1: the time of the observation.
        value: what was observed.
        obs_std: its standard deviation; with 0 paths end exactly there as steps are refined.

    Raises:
        TypeError: if the noise is of another kind.
        ValueError: if its Hurst index depends on time, or theta or the deviation is negative.

    Example:
        >>> import jax, jax.numpy as jnp, sdeflow as sf
        >>> noise = sf.paths.MarkovFractionalNoise(0.7, 1.0, kind="II")
        >>> bridge = sf.equations.FractionalBridge(noise, theta=0.0, t1=1.0, value=2.0, obs_std=0.0)
        >>> sol = sf.solve(bridge.equation(), jnp.zeros(3), [0.0, 1.0], dt0=0.01, key=jax.random.key(0))
        >>> bool(jnp.all(jnp.abs(sol.ys[-1] - 2.0) < 0.3))
        True
    """

    noise: MarkovFractionalNoise
    theta: Any
    t1: Any
    value: Any
    obs_std: Any

    def __init__(self, noise: MarkovFractionalNoise, theta: Any, t1: Any, value: Any, obs_std: Any = 0.0):
        if not isinstance(noise, MarkovFractionalNoise):
            raise TypeError(f"noise must be a sf.paths.MarkovFractionalNoise, got {type(noise).__name__}.")
        if callable(noise.hurst):
            raise ValueError(  # noqa: TRY004
                "The bridge is known for a Hurst index that does not depend on time."
            )
        for name, x in (("theta", theta), ("obs_std", obs_std)):
            if isinstance(x, int | float) and x < 0:
                raise ValueError(f"{name} must not be negative, got {x}.")
        self.noise, self.theta, self.t1, self.value, self.obs_std = noise, theta, t1, value, obs_std

    def equation(self) -> FractionalSDE:
        """The equation of the bridge; without its control and its past it is that of the prior."""
        theta, past = self.theta, self.past if self.noise.kind == "I" else None
        drift, diffusion = lambda t, x, args: -theta * x, lambda t, x, args: jnp.ones_like(x)
        return FractionalSDE(drift, diffusion, self.noise, control=self, past=past, additive=True)

    def __call__(self, t: Any, state: FractionalState, args: Any = None) -> Array:
        """The control u(t, z)."""
        del args
        x = state.x
        tau = jnp.asarray(self.t1 - t, x.dtype)
        mean, variance = self._end(tau, state)
        pull = _weighted(self._response(tau), jnp.asarray(self.noise.coefficients(), x.dtype))
        # From the end on nothing is to come, and the control is 0.
        before = (tau > 0) & (variance > 0)
        safe = jnp.where(before, variance, 1)
        return jnp.where(before, pull * (self.value - mean) / safe, 0).astype(x.dtype)

    def past(self, t: Any, x: Array, args: Any = None) -> FactorLaw:
        """The law of the factors given the observation and the state ``x`` in which they start at time ``t``.

        Raises:
            ValueError: for type II, which has no past.
        """
        del args
        b, mean, variance = self._seen_past(t, x)
        # T_1, ..., T_(K+1).
        rest = jnp.append(jnp.cumsum((b**2)[::-1])[::-1], 0) + variance
        below = -jnp.outer(b, b / jnp.sqrt(rest[:-1] * rest[1:]))
        wide = lambda v: jnp.broadcast_to(v.reshape(*v.shape, *(1,) * x.ndim), (*v.shape, *x.shape))
        return FactorLaw(
            wide(b) * (self.value - mean) / rest[0], wide(jnp.log(rest[1:] / rest[:-1]) / 2), wide(jnp.tril(below, -1))
        )

    def log_evidence(self, t: Any, state: FractionalState | Array) -> Array:
        """The log density of the observation given the state at time ``t``, summed over its entries.

        Arguments:
            t: the time.
            state: the state with its factors; or x alone, if the equation starts at ``t``.
        """
        if isinstance(state, FractionalState):
            mean, variance = self._end(jnp.asarray(self.t1 - t, state.x.dtype), state)
        elif self.noise.kind == "I":
            b, mean, variance = self._seen_past(t, state)
            variance = variance + (b**2).sum()
        else:
            start = FractionalState(state, jnp.zeros((self.noise.num_factors, *state.shape), state.dtype))
            return self.log_evidence(t, start)
        return jax.scipy.stats.norm.logpdf(self.value, mean, jnp.sqrt(variance)).sum()

    def _seen_past(self, t: Any, x: Array) -> tuple[Array, Array, Array]:
        """B, and what is expected of the observation, and its variance, if nothing happened before ``t``."""
        if self.noise.kind == "II":
            raise ValueError('Noise of kind="II" starts at time 0 and has no past.')
        tau = jnp.asarray(self.t1 - t, x.dtype)
        mean, variance = self._end(tau, FractionalState(x, jnp.zeros((self.noise.num_factors, *x.shape), x.dtype)))
        c = jnp.asarray(self.noise.coefficients(), x.dtype) * self._response(tau)[1]
        with jax.default_matmul_precision("highest"):
            return jnp.asarray(stationary_factor(self.noise._rates), x.dtype).T @ c, mean, variance

    def _response(self, tau: Array) -> tuple[Array, Array]:
        """c_0 and c_k / w_k."""
        rates, theta = jnp.asarray(self.noise.rates, tau.dtype), jnp.asarray(self.theta, tau.dtype)
        gap = jnp.abs(theta - rates) * tau[..., None]
        # (1 - exp(-gap)) / gap, and its limit 1.
        near = gap < 1e-4
        ratio = jnp.where(near, 1 - gap / 2, -jnp.expm1(-gap) / jnp.where(near, 1, gap))
        slower = jnp.exp(-jnp.minimum(theta, rates) * tau[..., None])
        return jnp.exp(-theta * tau), -rates * slower * tau[..., None] * ratio

    def _end(self, tau: Array, state: FractionalState) -> tuple[Array, Array]:
        """The mean and the variance of the observation given the state a time ``tau`` before it."""
        x, w = state.x, jnp.asarray(self.noise.coefficients(), tau.dtype)
        c0, ratio = self._response(tau)
        tall = (w * ratio).reshape(-1, *(1,) * x.ndim)
        mean = c0 * x + (tall * state.factors).sum(axis=0)
        # By quadrature refined where fast factors still have a response.
        node, weight = np.polynomial.legendre.leggauss(_NODES)
        node, weight = (node + 1) / 2, weight / 2
        at, weight = node**_POWER, weight * _POWER * node ** (_POWER - 1)
        g = _weighted(self._response(tau * jnp.asarray(at, tau.dtype)), w)
        variance = tau * (jnp.asarray(weight, tau.dtype) * g**2).sum()
        return mean, variance + jnp.asarray(self.obs_std, tau.dtype) ** 2


def _weighted(response: tuple[Array, Array], w: Array) -> Array:
    """g: what an impulse of the Brownian motion does to the end."""
    c0, ratio = response
    return c0 * w.sum() + (w * ratio).sum(axis=-1)
