r"""Losses that teach a denoiser: all of them the square of the error of the predicted noise, weighted by the level.

    E_t E_x0 E_z  w(t) |eps(t, x_t) - z|^2 / d,      x_t = alpha x0 + sigma z,  d the size of x.

As all predictions are linear in one another, one error says what every other one is: with r = sigma / alpha,

    score: 1/sigma,  data: r,  velocity: s alpha + sigma r / s,  flow: -sigma l',  likelihood: sqrt(-2 l') = g / sigma

times the error of the noise. Sources: Vincent 2011, Song et al. ICLR 2021 (weight sigma^2 of the score, which is 1
here), Song et al. NeurIPS 2021 (g^2, a bound of the likelihood), Karras et al. NeurIPS 2022, Lipman et al. ICLR 2023.
"""

import abc
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ..training import AbstractLoss
from ..training._rows import field, row_mean, row_weight
from ._denoiser import PREDICTIONS, AbstractDenoiser, Precondition, Prediction, check_denoiser
from ._schedule import AbstractSchedule, number

Weighting = Prediction | Literal["likelihood"]


class AbstractMatching(AbstractLoss):
    """A loss for `sdeflow.fit` that matches a denoiser to the noise in noised data.

    A batch is one of `sdeflow.data.Samples`, any other with ``values`` (and ``args``, a row for each sample, and
    ``weight``), or a bare array of samples. Subclasses say how levels are drawn and what they weigh.
    """

    stratified: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def time(self, model: AbstractDenoiser, u: Array) -> Array:
        """The time at the share u of the law of levels.

        Arguments:
            model: the denoiser.
            u: shape (B,), uniform between 0 and 1.
        """

    @abc.abstractmethod
    def weight(self, model: AbstractDenoiser, t: Array) -> Array:
        """The weight w of the squared error of the noise.

        Arguments:
            model: the denoiser.
            t: one time.
        """

    def error(self, model: AbstractDenoiser, t: Array, x0: Array, noise: Array, args: Any = None) -> Float[Array, ""]:
        """The weighted error at one time, of one sample with one noise.

        Arguments:
            model: the denoiser.
            t: the time.
            x0: the data.
            noise: z, like the data, of unit variance.
            args: passed on to the denoiser.
        """
        schedule = model.schedule
        mean = jnp.asarray(schedule.mean, x0.dtype)
        x = mean + schedule.alpha(t) * (x0 - mean) + schedule.sigma(t) * noise
        found = model.parts(t, x, args)[1]
        return self.weight(model, t) * jnp.mean((found - noise) ** 2)

    def __call__(
        self, model: AbstractDenoiser, batch: PyTree, key: PRNGKeyArray, step: Array | int
    ) -> tuple[Float[Array, ""], dict[str, Any]]:
        """The mean of the weighted errors of a batch, each at its own level."""
        check_denoiser(model)
        values, args = (batch, None) if isinstance(batch, jax.Array) else (field(batch, "values"), field(batch, "args"))
        if values is None or jnp.ndim(values) < 1 or not jnp.issubdtype(jnp.result_type(values), jnp.floating):
            raise TypeError(
                f"{type(self).__name__} was given a batch without real samples; train on sf.data.Samples(values), or "
                "on batches that are arrays of samples."
            )
        x0 = jnp.asarray(values)
        count = x0.shape[0]
        for_level, for_noise = jr.split(key)
        u = jr.uniform(for_level, (count,), x0.dtype)
        if self.stratified:
            u = (u + jnp.arange(count, dtype=x0.dtype)) / count
        t = self.time(model, u)
        noise = jr.normal(for_noise, x0.shape, x0.dtype)
        errors = jax.vmap(lambda *one: self.error(model, *one))(t, x0, noise, args)
        return row_mean(errors, row_weight(batch, count, errors.dtype)), {}


class ScoreMatching(AbstractMatching):
    r"""Denoising score matching, at times that are uniform: ``w |eps - z|^2``.

    Arguments:
        weighting: "noise" for w = 1, which is sigma^2 for the score; "likelihood" for g^2 / sigma^2, of which half the
            sum over components, times the span of t, bounds the negative logarithm of the likelihood; or the prediction
            whose error is to count, "data", "velocity", "score" or, which is flow matching, "flow".
        t_min: the least time; None for that of the schedule.
        stratified: draw one level in each of B equal shares of the times, which has less variance than B independent
            ones, and the same mean.

    Raises:
        ValueError: for another weighting, or a t_min that is not below the schedule's end.
        TypeError: while tracing, for what is no denoiser, and batches without samples.

    Example:
        >>> import jax, jax.numpy as jnp, sdeflow as sf
        >>> vp = sf.diffusion.VP()
        >>> best = sf.diffusion.Denoiser(lambda t, x, args: x / vp.sigma(t), vp)  # all data are 0
        >>> float(sf.diffusion.ScoreMatching()(best, jnp.zeros((8, 2)), jax.random.key(0), 0)[0]) < 1e-12
        True
    """

    weighting: Weighting = eqx.field(default="noise", static=True)
    t_min: float | None = eqx.field(default=None, static=True)
    stratified: bool = eqx.field(default=True, static=True)

    def __check_init__(self):
        known = (*PREDICTIONS, "likelihood")
        if self.weighting not in known:
            raise ValueError(f"weighting must be one of {', '.join(map(repr, known))}, got {self.weighting!r}.")
        if self.t_min is not None and number(self.t_min, "t_min") < 0:
            raise ValueError(f"t_min must not be negative, got {self.t_min}.")

    def time(self, model: AbstractDenoiser, u: Array) -> Array:
        """Uniform from t_min to the schedule's end."""
        first, last = self._span(model.schedule)
        return first + (last - first) * u

    def weight(self, model: AbstractDenoiser, t: Array) -> Array:
        """The square of what the error of the noise is multiplied by."""
        if self.weighting == "noise":
            return jnp.ones_like(t)
        schedule = model.schedule
        sigma = schedule.sigma(t)
        if self.weighting == "score":
            return 1 / sigma**2
        if self.weighting in ("likelihood", "flow"):
            slope = schedule.rates(t)[1]
            return -2 * slope if self.weighting == "likelihood" else (sigma * slope) ** 2
        alpha = schedule.alpha(t)
        ratio = sigma / alpha
        if self.weighting == "data":
            return ratio**2
        return (schedule.scale * alpha + sigma * ratio / schedule.scale) ** 2

    def _span(self, schedule: AbstractSchedule) -> tuple[float, float]:
        first = schedule.t_min if self.t_min is None else self.t_min
        if not first < schedule.t_max:
            raise ValueError(f"t_min={first:g} must be below the end of the schedule, {schedule.t_max:g}.")
        return first, schedule.t_max


class EDMLoss(AbstractMatching):
    r"""Karras' loss: the error of the data at levels ``log(sigma / alpha) ~ N(mean, deviation^2)``.

        w_data = (r^2 + d^2) / (r d)^2,      r = sigma / alpha,

    with d the deviation of the data, so that the network of `Precondition` has one and the same error to make at all
    levels: the loss is that of F. It serves every denoiser and schedule; levels beyond the schedule's end or start are
    those there.

    Arguments:
        mean, deviation: of the logarithm of the level.
        sigma_data: d; None takes that of the `Precondition` which is trained.
        stratified: as in `ScoreMatching`.

    Raises:
        ValueError: for a deviation that is not positive, and, while tracing, if d is None and the denoiser has none.
        TypeError: while tracing, for what is no denoiser, and batches without samples.

    Example:
        >>> import jax, jax.numpy as jnp, sdeflow as sf
        >>> normal = sf.diffusion.Precondition(lambda label, y, args: 0 * y, sf.diffusion.EDM())
        >>> data = 0.5 * jax.random.normal(jax.random.key(0), (4096, 2))
        >>> round(float(sf.diffusion.EDMLoss()(normal, data, jax.random.key(1), 0)[0]), 1)  # the variance of the target
        1.0
    """

    mean: float = eqx.field(default=-1.2, static=True)
    deviation: float = eqx.field(default=1.2, static=True)
    sigma_data: float | None = eqx.field(default=None, static=True)
    stratified: bool = eqx.field(default=True, static=True)

    def __check_init__(self):
        number(self.mean, "mean")
        for name in ("deviation", "sigma_data"):
            value = getattr(self, name)
            if value is not None and number(value, name) <= 0:
                raise ValueError(f"{name} must be positive, got {value}.")

    def time(self, model: AbstractDenoiser, u: Array) -> Array:
        """The time of the normal quantile of u."""
        schedule = model.schedule
        # A share of 0 or 1 is a level at infinity, which single precision draws once in a while.
        wide = jnp.asarray(u, jnp.promote_types(u.dtype, jnp.float32))
        tiny = jnp.finfo(u.dtype).eps
        log_r = self.mean + self.deviation * jax.scipy.special.ndtri(jnp.clip(wide, tiny, 1 - tiny))
        t = jnp.clip(schedule.t_of_log_snr(-log_r), schedule.t_min, schedule.t_max)
        return jnp.asarray(t, u.dtype)

    def weight(self, model: AbstractDenoiser, t: Array) -> Array:
        """``w_data r^2``, as the error of the data is r times that of the noise."""
        d = self.sigma_data
        if d is None:
            if not isinstance(model, Precondition):
                raise ValueError(
                    f"a {type(model).__name__} does not say what the deviation of the data is: pass sigma_data=, or "
                    "train a sf.diffusion.Precondition."
                )
            d = model.sigma_data
        return 1 + jnp.exp(-2 * model.schedule.log_snr(t)) / d**2
