"""Latent models of series: a hidden path with a prior, and what the observations say of it.

    LatentSDE    z(t_1) ~ N(m, s),   dz = h(t, z) dt + g(z) dW,   x_i ~ N(decoder(z(t_i)), sigma)
    LatentODE    z(t_1) ~ N(0, 1),   dz = f(t, z) dt,             x_i ~ N(decoder(z(t_i)), sigma)

Given a series, a network reads it backwards in time, says where z starts, and (for the first) bends its drift towards
what is to come: the posterior has drift h + g u. Then

    log p(x) >= E[ sum_i log p(x_i | z(t_i)) ] - KL(q(z(t_1)) || p(z(t_1))) - E int |u|^2 / 2 dt,

and the last term is an integral beside the state, like every other charge for a walk. After the last observation u is
0.

Sources: Li, Wong, Chen and Duvenaud, "Scalable gradients for stochastic differential equations", 2020, arXiv
2001.01328; Rubanova, Chen and Duvenaud, "Latent ODEs for irregularly-sampled time series", 2019, arXiv 1907.03907.
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ...data import SeriesBatch, TimeSeries
from ...equations import AbstractEquation
from ...regularisers._states import AbstractStateRegulariser
from ...solving import Solution, solve
from ...training import Prediction
from ...training._likelihoods import log_normal
from .._checks import check_noise, check_size, check_solver
from .._plain import NeuralODE
from ..fields import MLP, bounded_time
from ._base import AbstractSeriesModel, Row, first_failure, key_of
from ._drive import check_series, over_series
from ._ode_rnn import ODERNN

_LEAST_NOISE = 1e-3


class AbstractLatentModel(AbstractSeriesModel):
    """What latent models share: a decoder, noise of the observations, and all that is made of encoder and paths."""

    decoder: Any
    log_noise: Float[Array, " C"]
    solver: diffrax.AbstractSolver
    channels: int = eqx.field(static=True)
    latent_size: int = eqx.field(static=True)
    steps_per_interval: int = eqx.field(static=True)

    def _set_up(
        self, channels: Any, latent_size: Any, width: int, decoder: Any, noise: Any, solver: Any, steps: Any, key: Any
    ) -> None:
        self.channels, self.latent_size = check_size("channels", channels), check_size("latent_size", latent_size)
        if not callable(decoder) and decoder not in ("network", "identity"):
            raise ValueError(f'decoder must be "network", "identity" or a callable, got {decoder!r}.')
        if decoder == "identity" and channels != latent_size:
            raise ValueError(
                f"The identity decodes channels={channels} only from as many latent numbers, not {latent_size}."
            )
        if callable(decoder):
            z = jax.ShapeDtypeStruct((self.latent_size,), jnp.result_type(float))
            found = jax.tree_util.tree_map(lambda x: x.shape, eqx.filter_eval_shape(decoder, z))
            if found != (self.channels,):
                raise ValueError(f"The decoder must take shape {z.shape} to ({self.channels},), but it gives {found}.")
            self.decoder = decoder
        elif decoder == "identity":
            self.decoder = None
        else:
            self.decoder = MLP(latent_size, channels, width=width, depth=1, key=key)
        self.log_noise = jnp.full(channels, np.log(check_noise(noise)), jnp.result_type(float))
        self.solver, self.steps_per_interval = check_solver(solver), check_size("steps_per_interval", steps)

    @abc.abstractmethod
    def encode(self, times: Array, values: Array) -> tuple[Array, Array, Any]:
        """Mean and standard deviation of the first state, and what the posterior path is to know."""

    @abc.abstractmethod
    def first_state(self) -> tuple[Array, Array]:
        """Mean and standard deviation of the first state in the prior."""

    @abc.abstractmethod
    def path(self, z: Array, times: Array, context: Any, *, key: Any, regularisers: Any) -> tuple[Solution, Array]:
        """A path from ``z``, and its divergence from the prior in nats; the prior's where ``context`` is None."""

    def __call__(self, batch: SeriesBatch, *, key: PRNGKeyArray, regularisers: Sequence[Any] = ()) -> Prediction:
        """One path of each series of a batch, as `sdeflow.losses.ELBO` reads it.

        Returns:
            A `Prediction`: ``outputs`` (B, L, C) decoded at ``batch.times``, ``states`` (B, L, H), ``kl`` (B,) in nats
            (of the start and of the path), ``scale`` (C,), penalties, and the first failure of the batch.

        Raises:
            ValueError: if the batch has another number of channels than the model.
        """
        self.check_batch(batch)
        one = lambda row: self._posterior(row, key_of(key, row.number), tuple(regularisers))
        sol, kl = jax.vmap(one)(Row.all(batch))
        # A series of one row was walked as if it had two.
        states = sol.ys[:, : batch.times.shape[1]]
        outputs = jax.vmap(jax.vmap(self.decode))(states)
        penalties = {name: x for name, x in sol.penalties.items() if name != _Bending.__name__}
        return Prediction(outputs, states, kl, penalties, first_failure(sol.result), scale=jnp.exp(self.log_noise))

    def decode(self, z: Float[Array, " H"]) -> Float[Array, " C"]:
        """The mean of an observation, given the state."""
        return z if self.decoder is None else self.decoder(z)

    def elbo(
        self,
        series: TimeSeries,
        *,
        key: PRNGKeyArray,
        num_samples: int = 16,
        batch_size: int = 64,
        throw: bool = True,
    ) -> Float[np.ndarray, " N"]:
        """The evidence lower bound of every series, in nats, averaged over paths.

        Raises:
            TypeError: if ``series`` is no TimeSeries.
            ValueError: for another number of channels, or a number out of range.
            SolveError: if the solve of a series fails, naming its id.
        """
        num_samples = check_size("num_samples", num_samples)
        self.check_times(check_series(series).times)
        call = lambda batch, rows: _bounds(self, batch, key, num_samples)
        return over_series(call, check_series(series), batch_size, throw)

    def sample(self, ts: Any, num_samples: int, *, key: PRNGKeyArray, noise: bool = False) -> Float[Array, "S T C"]:
        """Decoded paths of the prior, shape (num_samples, T, C).

        Arguments:
            ts: shape (T,), increasing internal times (see `sdeflow.data.TimeSeries.to_internal_time`).
            num_samples: S.
            key: a JAX random key.
            noise: whether to add the noise of observations.
        """
        ts = np.asarray(ts, np.float64)
        self.check_times([ts])
        ts = jnp.asarray(ts, self.log_noise.dtype)
        return _prior(self, ts, check_size("num_samples", num_samples), key, noise)

    def draw(self, row: Row, places: Array, key: PRNGKeyArray) -> tuple[Array, Any]:
        """One path of one series at the rows ``places``, and how its solve ended."""
        sol, _ = self._posterior(row, key)
        return jax.vmap(self.decode)(sol.ys[places]), sol.result

    def _posterior(self, row: Row, key: PRNGKeyArray, charged: tuple[Any, ...] = ()) -> tuple[Solution, Array]:
        """A path given a series, and its divergence from the prior, start included."""
        row = row.walkable()
        for_start, for_path = jax.random.split(key)
        # What was not measured, such as counts of observations, is none of a latent model's business.
        mean, deviation, context = self.encode(row.times, jnp.where(row.mask, row.values, jnp.nan))
        z = mean + deviation * jax.random.normal(for_start, mean.shape, mean.dtype)
        sol, kl = self.path(z, row.times, context, key=for_path, regularisers=charged)
        m, s = self.first_state()
        start = jnp.log(s / deviation) + (deviation**2 + (mean - m) ** 2) / (2 * s**2) - 0.5
        return sol, kl + start.sum()


class _Context(eqx.Module):
    """What the posterior knows at a time: the next observation, when it is, and a summary of all from it on."""

    times: Array
    summaries: Array
    observed: Array  # apart from what is learned: the gradient in an array that is read at every step is as large as it
    end: Array

    def at(self, t: Any) -> tuple[Array, Array]:
        """Features, and whether there is an observation to come."""
        t = jnp.asarray(t, self.times.dtype)
        i = jnp.searchsorted(self.times, t, side="right", method="compare_all")
        i = jnp.minimum(i, self.times.shape[0] - 1)
        gap = jnp.maximum(self.times[i] - t, 0)
        return jnp.concatenate([self.summaries[i], self.observed[i], bounded_time(t), gap[None]]), t < self.end


class _Prior(AbstractEquation):
    """dz = h(t, z) dt + g(z) dW."""

    h: MLP
    g: Any
    interpretation: ClassVar[str] = "ito"  # pyright: ignore

    @property
    def additive(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the noise is the same everywhere."""
        return isinstance(self.g, _SameNoise)

    def drift(self, t: Any, y: Array, args: Any) -> Array:
        return self.h(jnp.concatenate([bounded_time(t), y]))

    def diffusion(self, t: Any, y: Array, args: Any) -> Array:
        return self.g(y)


class _Posterior(AbstractEquation):
    """dz = (h(t, z) + g(z) u(t, z, context)) dt + g(z) dW."""

    prior: _Prior
    pull: MLP
    bend: MLP
    interpretation: ClassVar[str] = "ito"  # pyright: ignore

    @property
    def additive(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the noise is the same everywhere."""
        return self.prior.additive

    def push(self, t: Any, y: Array, context: _Context, *memory: Array) -> Array:
        """U: a pull towards a target, both of which know what is to come, and a rest, which sees ``memory`` too."""
        seen, more = context.at(t)
        strength, target = jnp.split(self.pull(seen), 2)
        u = jax.nn.softplus(strength) * (target - y) + self.bend(jnp.concatenate([seen, y, *memory]))
        return jnp.where(more, u, 0)

    def drift(self, t: Any, y: Array, args: Any) -> Array:
        return self.prior.drift(t, y, None) + self.prior.g(y) * self.push(t, y, args)

    def diffusion(self, t: Any, y: Array, args: Any) -> Array:
        return self.prior.g(y)


class _SameNoise(eqx.Module):
    """g_i = floor + softplus(level_i), everywhere."""

    level: Array
    floor: float = eqx.field(static=True)

    def __call__(self, z: Array) -> Array:
        return self.floor + jax.nn.softplus(self.level)


class _EachNoise(eqx.Module):
    """g(z)_i = floor + softplus(MLP_i(z_i)): the noise of each number depends on it alone, and never vanishes."""

    nets: MLP
    floor: float = eqx.field(static=True)

    def __call__(self, z: Array) -> Array:
        each = eqx.filter_vmap(lambda net, x: net(x[None])[0])(self.nets, z)
        return self.floor + jax.nn.softplus(each)


class _Bending(AbstractStateRegulariser):
    """int |u|^2 / 2 dt, as `sdeflow.regularisers.PathKL` with u at hand and no division."""

    push: Any
    context: _Context

    def rate(self, drift: Any, t: Any, y: Any, drawn: Any) -> Array:
        return jnp.sum(self.push(t, y, self.context) ** 2) / 2


class LatentSDE(AbstractLatentModel):
    r"""A latent stochastic equation: a prior dz = h(t, z) dt + g(z) dW, and a posterior with drift h + g u.

    The posterior's u sees the next observation, how long it is to it, and a summary of all from it on, made by a gated
    recurrent unit that reads them backwards with their times. It pulls z towards a target, with a strength and a target
    that depend on what it sees, as it does where everything is linear and normal; a network of z is added. The noise is
    diagonal, g_i a function of z_i or a constant, at least 0.001. `fit` it with ``sf.losses.ELBO(kl_warmup=...)``.

    Arguments:
        channels: C, the channels of the series.
        latent_size: H, the length of z.
        width: hidden layers of the networks.
        context_size: length of the summary.
        decoder: "network", "identity" where H = C, or a callable of your own from shape (H,) to (C,).
        noise: the standard deviation of observations to start from; it is learned, for each channel.
        additive: whether g is the same everywhere. Then ShARK solves the equation, and the bound is nearly that of
            small steps. Euler's, whose steps have the variance of the prior, is lower by about (g^2 h / s^2)^2 / 4 for
            every step of length h before an observation with standard deviation s, and drives g down.
        solver: a diffrax solver, by default Euler for Ito equations, or ShARK.
        steps_per_interval: steps between two observations.
        key: a JAX random key for the initial weights.

    Raises:
        TypeError: if ``solver`` is no solver.
        ValueError: for a size out of range, another decoder, or noise that is not positive.

    Example:
        >>> import jax, sdeflow as sf
        >>> data, _ = sf.data.simulated_series(4, num_channels=2, key=jax.random.key(0))
        >>> model = sf.models.LatentSDE(2, latent_size=3, key=jax.random.key(1))
        >>> model.elbo(data, key=jax.random.key(2)).shape, model.sample([0.0, 0.5, 1.0], 5, key=jax.random.key(3)).shape
        ((4,), (5, 3, 2))
    """

    posterior: _Posterior
    cell: eqx.nn.GRUCell
    begin: eqx.nn.Linear
    start_mean: Array
    start_log_scale: Array

    def __init__(
        self,
        channels: int,
        *,
        latent_size: int,
        width: int = 64,
        context_size: int = 64,
        decoder: Literal["network", "identity"] | Callable[[Array], Array] = "network",
        noise: float = 0.1,
        additive: bool = False,
        solver: diffrax.AbstractSolver | None = None,
        steps_per_interval: int = 4,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 7)
        if solver is None:
            solver = diffrax.ShARK() if additive else diffrax.Euler()
        self._set_up(channels, latent_size, width, decoder, noise, solver, steps_per_interval, keys[0])
        context = check_size("context_size", context_size)
        h = MLP(1 + latent_size, latent_size, width=width, depth=2, activation=jax.nn.softplus, key=keys[1])
        one = lambda key: MLP(1, 1, width=width, depth=1, activation=jax.nn.softplus, key=key)
        if additive:
            g = _SameNoise(jnp.zeros(latent_size), _LEAST_NOISE)
        else:
            g = _EachNoise(eqx.filter_vmap(one)(jax.random.split(keys[2], latent_size)), _LEAST_NOISE)
        known = context + 2 * channels + 2
        pull = MLP(known, 2 * latent_size, width=width, depth=2, key=keys[3])
        bend = MLP(known + latent_size, latent_size, width=width, depth=2, key=keys[4])
        # The posterior starts near the prior: a bend of nearly nothing, and a weak pull.
        last = lambda net: (net.layers[-1].weight, net.layers[-1].bias)
        (w, b), (v, c) = last(bend), last(pull)
        bend = eqx.tree_at(last, bend, (0.1 * w, 0.1 * b))
        pull = eqx.tree_at(last, pull, (v, c.at[:latent_size].set(-2.0)))
        self.posterior = _Posterior(_Prior(h, g), pull, bend)  # pyright: ignore[reportCallIssue]
        self.cell = eqx.nn.GRUCell(2 * channels + 1, context, key=keys[5])
        self.begin = eqx.nn.Linear(context, 2 * latent_size, key=keys[6])
        self.start_mean, self.start_log_scale = jnp.zeros(latent_size), jnp.zeros(latent_size)

    @property
    def prior(self) -> AbstractEquation:
        """The equation of the hidden path before anything is observed."""
        return self.posterior.prior

    def first_state(self) -> tuple[Array, Array]:
        """Mean and standard deviation of the first state in the prior."""
        return self.start_mean, jnp.exp(self.start_log_scale)

    def encode(self, times: Array, values: Array) -> tuple[Array, Array, _Context]:
        """Mean and standard deviation of the first state, and summaries of what is to come."""
        seen = ~jnp.isnan(values)

        def row(h: Array, row: Any) -> tuple[Array, Array]:
            x, m, gap = row
            h = jnp.where(m.any(), self.cell(jnp.concatenate([x, m, gap[None]]), h), h)
            return h, h

        some = seen.any(axis=1)
        following, after, end = _next_observed(times, some)
        gaps = jnp.where(some, after - times, 0).astype(values.dtype)
        start = jnp.zeros(self.cell.hidden_size, values.dtype)
        filled, marks = jnp.where(seen, values, 0), seen.astype(values.dtype)
        whole, summaries = jax.lax.scan(row, start, (filled, marks, gaps), reverse=True)
        mean, raw = jnp.split(self.begin(whole), 2)
        # A row without observations has what the next one with any has, and its time.
        observed = jnp.concatenate([filled, marks], axis=1)[following]
        context = _Context(jnp.minimum(times[following], end), summaries[following], observed, end)
        return mean, jax.nn.softplus(raw) + 1e-3, context

    def path(self, z: Array, times: Array, context: Any, *, key: Any, regularisers: Any) -> tuple[Solution, Array]:
        """A path from ``z``, and its divergence from the prior in nats; the prior's where ``context`` is None."""
        how = {"steps_per_interval": self.steps_per_interval, "solver": self.solver, "key": key, "throw": False}
        if context is None:
            return solve(self.prior, z, times, regularisers=regularisers, **how), jnp.zeros(())
        charge = _Bending(self.posterior.push, context)
        sol = solve(self.posterior, z, times, args=context, regularisers=(charge, *regularisers), **how)
        return sol, sol.penalties[_Bending.__name__]


class LatentODE(AbstractLatentModel):
    r"""A latent ordinary equation: z(t_1) ~ N(0, 1), dz/dt = f(t, z), read off a series by an ODE-RNN run backwards.

    Arguments:
        channels: C, the channels of the series.
        latent_size: H, the length of z.
        width: hidden layers of the networks.
        context_size: length of the state of the ODE-RNN.
        decoder: "network", "identity" where H = C, or a callable of your own from shape (H,) to (C,).
        noise: the standard deviation of observations to start from; it is learned, for each channel.
        solver: a diffrax solver, ``diffrax.Heun`` by default.
        steps_per_interval: steps between two observations.
        key: a JAX random key for the initial weights.

    Raises:
        TypeError: if ``solver`` is no solver.
        ValueError: for a size out of range, another decoder, or noise that is not positive.

    Example:
        >>> import jax, sdeflow as sf
        >>> data, _ = sf.data.simulated_series(4, num_channels=2, key=jax.random.key(0))
        >>> model = sf.models.LatentODE(2, latent_size=3, key=jax.random.key(1))
        >>> model.elbo(data, key=jax.random.key(2)).shape
        (4,)
    """

    dynamics: NeuralODE
    reader: ODERNN
    begin: eqx.nn.Linear

    def __init__(
        self,
        channels: int,
        *,
        latent_size: int,
        width: int = 64,
        context_size: int = 64,
        decoder: Literal["network", "identity"] | Callable[[Array], Array] = "network",
        noise: float = 0.1,
        solver: diffrax.AbstractSolver | None = None,
        steps_per_interval: int = 1,
        key: PRNGKeyArray,
    ):
        keys = jax.random.split(key, 4)
        solver = diffrax.Heun() if solver is None else solver
        self._set_up(channels, latent_size, width, decoder, noise, solver, steps_per_interval, keys[0])
        self.dynamics = NeuralODE(latent_size, width=width, key=keys[1])
        self.reader = ODERNN(check_size("context_size", context_size), control_size=channels, width=width, key=keys[2])
        self.begin = eqx.nn.Linear(context_size, 2 * latent_size, key=keys[3])

    def first_state(self) -> tuple[Array, Array]:
        """Mean and standard deviation of the first state in the prior: 0 and 1."""
        return jnp.zeros(self.latent_size), jnp.ones(self.latent_size)

    def encode(self, times: Array, values: Array) -> tuple[Array, Array, Any]:
        """Mean and standard deviation of the first state."""
        start = jnp.zeros(self.reader.state_size, values.dtype)
        mean, raw = jnp.split(self.begin(self.reader.states(start, times, values, reverse=True)[0]), 2)
        return mean, jax.nn.softplus(raw) + 1e-3, None

    def path(self, z: Array, times: Array, context: Any, *, key: Any, regularisers: Any) -> tuple[Solution, Array]:
        """The path from ``z``; it follows from its start, so its divergence is 0."""
        key = key if any(r.draws for r in regularisers) else None
        sol = solve(
            self.dynamics, z, times, steps_per_interval=self.steps_per_interval, solver=self.solver, key=key,
            regularisers=regularisers, throw=False,
        )  # fmt: skip
        return sol, jnp.zeros((), z.dtype)


def _next_observed(times: Array, some: Array) -> tuple[Array, Array, Array]:
    """For every row the number of the first one from it on that has an observation, and the time of that after it.

    Where there is none, the last row, and the row's own time. Also the time of the last observation.
    """
    count = times.shape[0]
    here = jax.lax.associative_scan(jnp.minimum, jnp.where(some, jnp.arange(count), count), reverse=True)
    later = jnp.concatenate([here[1:], jnp.full_like(here[:1], count)])
    last = jnp.minimum(here, count - 1)
    after = jnp.where(later < count, times[jnp.minimum(later, count - 1)], times)
    return last, after, jnp.max(jnp.where(some, times, times[0]))


@eqx.filter_jit
def _bounds(model: AbstractLatentModel, batch: SeriesBatch, key: PRNGKeyArray, num_samples: int) -> tuple[Array, Any]:
    model.check_batch(batch)

    def one(row: Row) -> tuple[Array, Any]:
        def sample(key: PRNGKeyArray) -> tuple[Array, Any]:
            sol, kl = model._posterior(row, key)
            means = jax.vmap(model.decode)(sol.ys)[: row.times.shape[0]]
            nats = log_normal(means - jnp.where(row.mask, row.values, 0), jnp.exp(model.log_noise))
            return jnp.where(row.mask, nats, 0).sum() - kl, sol.result

        found, result = jax.vmap(sample)(jax.random.split(key_of(key, row.number), num_samples))
        return found.mean(), first_failure(result)

    return jax.vmap(one)(Row.all(batch))


@eqx.filter_jit
def _prior(model: AbstractLatentModel, ts: Array, num_samples: int, key: PRNGKeyArray, noise: bool) -> Array:
    def sample(key: PRNGKeyArray) -> Array:
        for_start, for_path, for_noise = jax.random.split(key, 3)
        mean, scale = model.first_state()
        z = mean + scale * jax.random.normal(for_start, mean.shape, mean.dtype)
        sol, _ = model.path(z, ts, None, key=for_path, regularisers=())
        means = jax.vmap(model.decode)(sol.ys)
        return model.observed(means, for_noise) if noise else means

    return jax.vmap(sample)(jax.random.split(key, num_samples))
