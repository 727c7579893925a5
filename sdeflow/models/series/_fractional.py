"""A latent stochastic equation whose noise has memory.

    z(t_1) ~ N(m, s),   dz = h(t, z) dt + g(z) o dB,   x_i ~ N(decoder(z(t_i)), sigma),

B fractional noise of few factors, one set for every number of z, with a Hurst index that is learned. The posterior
pushes the Brownian motion behind the factors by u(t, z, factors, what is to come), so its divergence is
E int |u|^2 / 2 dt. Of type I the factors start in a normal law that is read off the series, whose divergence is added.

Source: Daems, Opper, Crevecoeur and Birdal, "Variational inference for SDEs driven by fractional noise", ICLR 2024.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from ...equations import AbstractEquation, FractionalSDE, FractionalState
from ...paths import FactorLaw, MarkovFractionalNoise
from ...solvers import ExponentialHeun
from ...solving import Solution, solve
from ..fields import MLP
from ._latent import LatentSDE


class FractionalLatentSDE(LatentSDE):
    r"""A latent equation dz = h(t, z) dt + g(z) o dB with fractional noise B and a Hurst index that is learned.

    All else is as in `LatentSDE`. Factors of type I have a long past, and the posterior a law of its own for it: left
    as in the prior it would cost the bound a few hundredths of a nat where H is near 0 or 1. Type II has no past.

    Arguments:
        channels: C, the channels of the series.
        latent_size: H, the length of z.
        width: hidden layers of the networks.
        context_size: length of the summary.
        hurst: the Hurst index to start from, one for all numbers of z; ``model.memory.hurst`` is what was learned.
        horizon: the longest internal time (see `sdeflow.data.TimeSeries`) from the first to the last time of a series,
            forecasts included. Whoever asks for more gets an error, and `fit` a loss that is not finite.
        kind: "I", stationary increments, or "II", noise that starts with the series.
        num_factors: factors of the noise.
        max_rate: the fastest rate of a factor, by default 100 / horizon.
        decoder: "network", "identity" where H = C, or a callable of your own from shape (H,) to (C,).
        noise: the standard deviation of observations to start from; it is learned, for each channel.
        additive: whether g is the same everywhere.
        steps_per_interval: steps between two observations.
        key: a JAX random key for the initial weights.

    Raises:
        ValueError: for a size out of range, another decoder or kind, H out of its range, or noise or a horizon that is
            not positive.

    Example:
        >>> import jax, sdeflow as sf
        >>> data, _ = sf.data.simulated_series(4, num_channels=2, key=jax.random.key(0))
        >>> model = sf.models.FractionalLatentSDE(2, latent_size=3, horizon=10.0, key=jax.random.key(1))
        >>> model.elbo(data, key=jax.random.key(2)).shape
        (4,)
    """

    memory: MarkovFractionalNoise
    past: eqx.nn.Linear | None

    def __init__(
        self,
        channels: int,
        *,
        latent_size: int,
        width: int = 64,
        context_size: int = 64,
        hurst: float = 0.5,
        horizon: float = 1.0,
        kind: Literal["I", "II"] = "I",
        num_factors: int = 6,
        max_rate: float | None = None,
        decoder: Literal["network", "identity"] | Callable[[Array], Array] = "network",
        noise: float = 0.1,
        additive: bool = False,
        steps_per_interval: int = 4,
        key: PRNGKeyArray,
    ):
        rest, for_bend = jax.random.split(key)
        super().__init__(
            channels, latent_size=latent_size, width=width, context_size=context_size, decoder=decoder, noise=noise,
            additive=additive, solver=ExponentialHeun(), steps_per_interval=steps_per_interval, key=rest,
        )  # fmt: skip
        self.memory = MarkovFractionalNoise(hurst, horizon, kind=kind, num_factors=num_factors, max_rate=max_rate)
        known = context_size + 2 * channels + 2
        bend = MLP(known + (1 + num_factors) * latent_size, latent_size, width=width, depth=2, key=for_bend)
        last = lambda net: (net.layers[-1].weight, net.layers[-1].bias)
        bend = eqx.tree_at(last, bend, tuple(0.1 * x for x in last(bend)))
        self.posterior = eqx.tree_at(lambda p: p.bend, self.posterior, bend)
        self.past = None
        if kind == "I":
            # Of zeros, which are the past of the prior.
            past = eqx.nn.Linear(context_size, num_factors * (2 + num_factors) * latent_size, key=key)
            self.past = jax.tree_util.tree_map(jnp.zeros_like, past)

    def check_times(self, times: Sequence[Any]) -> None:
        """Refuse series that are longer than the horizon of the noise."""
        for t in times:
            if np.size(t):
                self.memory.check_horizon(np.asarray(t) - np.ravel(t)[0])

    @property
    def prior(self) -> AbstractEquation:
        """The equation of the hidden path before anything is observed."""
        return self._equation()

    def _equation(self, control: Any = None, past: Any = None) -> FractionalSDE:
        prior = self.posterior.prior
        return FractionalSDE(
            prior.drift, prior.diffusion, self.memory, control=control, past=past, additive=prior.additive
        )

    def _past(self, t: Any, z: Array, context: Any) -> FactorLaw:
        # The first summary is of the whole series.
        out = self.past(context.summaries[0])  # pyright: ignore[reportOptionalCall]
        out = out.reshape(-1, self.memory.num_factors, z.shape[0])
        return FactorLaw(out[0], out[1], out[2:])

    def _push(self, t: Any, state: FractionalState, context: Any) -> Array:
        # The factors are of the size of the noise they make at the end of the horizon.
        size = jnp.sqrt(jnp.asarray(self.memory.horizon, state.x.dtype))
        return self.posterior.push(t, state.x, context, state.factors.ravel() / size)

    def path(self, z: Array, times: Array, context: Any, *, key: Any, regularisers: Any) -> tuple[Solution, Array]:
        """A path from ``z``, and its divergence from the prior in nats; the prior's where ``context`` is None."""
        how = {"steps_per_interval": self.steps_per_interval, "solver": self.solver, "key": key, "throw": False}
        if context is None:
            return solve(self.prior, z, times, regularisers=regularisers, **how), jnp.zeros(())
        posterior = self._equation(self._push, None if self.past is None else self._past)
        sol = solve(posterior, z, times, args=context, regularisers=regularisers, **how)
        return sol, sol.final.path_kl
