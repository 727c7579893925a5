r"""What a network predicts, and what else follows from it.

With x = alpha x0 + sigma eps (x and x0 less the mean, where the schedule has one) every prediction is linear in the
other ones:

    noise eps,    data x0,    score = -eps / sigma,    velocity v = alpha s eps - sigma x0 / s,
    flow u = alpha' x0 + sigma' eps,

the last with derivatives in time, so that u is the right side of the ordinary equation; s is the scale of the schedule.
Inverses: x0 = (alpha x - sigma v / s) / (alpha^2 + sigma^2 / s^2), eps = (alpha v / s + sigma x / s^2) / (the same),
and for u the solution of two linear equations. Sources: Ho et al. 2020, Salimans and Ho 2022, Lipman et al. 2023.
"""

import abc
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, Literal

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array

from .._compat import is_concrete
from ..equations._terms import check_like
from ._schedule import AbstractSchedule, number
from ._whole import axes_of_sample, check_sample_ndim

Prediction = Literal["noise", "data", "velocity", "score", "flow"]
Scale = Array | Callable[[Any], Any]
PREDICTIONS = ("noise", "data", "velocity", "score", "flow")


def check_prediction(kind: Any) -> None:
    """Refuse unknown predictions.

    Raises:
        ValueError: naming the known ones.
    """
    if kind not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(map(repr, PREDICTIONS))}, got {kind!r}.")


class AbstractDenoiser(eqx.Module):
    """What samplers ask: the data and the noise in x at time t; all other predictions follow.

    Subclasses have a ``schedule`` and the method ``parts``.
    """

    schedule: eqx.AbstractVar[AbstractSchedule]

    @abc.abstractmethod
    def parts(self, t: Any, x: Array, args: Any) -> tuple[Array, Array]:
        """The predicted data, less the schedule's mean, and the predicted noise.

        Arguments:
            t: the time.
            x: the state, as it is.
            args: passed on to the network.
        """

    def predict(self, kind: Prediction, t: Any, x: Array, args: Any = None) -> Array:
        """One of the five predictions.

        Arguments:
            kind: "noise", "data", "velocity", "score" or "flow".
            t: the time.
            x: the state.
            args: passed on to the network.

        Raises:
            ValueError: for another kind.
        """
        check_prediction(kind)
        schedule, t = self.schedule, jnp.asarray(t, x.dtype)
        data, noise = self.parts(t, x, args)
        if kind == "data":
            return data + jnp.asarray(schedule.mean, x.dtype)
        if kind == "noise":
            return noise
        sigma = schedule.sigma(t)
        if kind == "score":
            return -noise / sigma
        if kind == "velocity":
            return schedule.alpha(t) * schedule.scale * noise - sigma / schedule.scale * data
        f, slope = schedule.rates(t)
        y = x - jnp.asarray(schedule.mean, x.dtype)
        return f * y - sigma * slope * noise


class Denoiser(AbstractDenoiser):
    """A network and what it was trained to predict.

    Arguments:
        fn: ``fn(t, x, args)``, returns an array like x, one sample.
        schedule: of the noise that it was trained with.
        prediction: "noise" (eps), "data" (x0), "velocity" (v), "score" or "flow" (the velocity of the ordinary
            equation).

    Raises:
        TypeError: if fn cannot be called like this, or the schedule is none.
        ValueError: for another prediction; while tracing, for an output of another shape than x.

    Example:
        >>> import jax.numpy as jnp, sdeflow as sf
        >>> normal = sf.diffusion.Denoiser(lambda t, x, args: x, sf.diffusion.EDM(), prediction="data")
        >>> float(normal.predict("noise", 2.0, jnp.array(3.0)))
        0.0
    """

    fn: Callable[[Any, Array, Any], Array]
    schedule: AbstractSchedule
    prediction: str = eqx.field(static=True)

    def __init__(
        self,
        fn: Callable[[Any, Array, Any], Array],
        schedule: AbstractSchedule,
        *,
        prediction: Prediction = "noise",
    ):
        check_schedule(schedule)
        check_prediction(prediction)
        _check_network(fn, "fn(t, x, args)")
        self.fn, self.schedule, self.prediction = fn, schedule, prediction

    def parts(self, t: Any, x: Array, args: Any) -> tuple[Array, Array]:
        """The predicted data, less the schedule's mean, and the predicted noise."""
        schedule = self.schedule
        out = check_like(self.fn(t, x, args), x, "prediction of the denoiser")
        mean = jnp.asarray(schedule.mean, x.dtype)
        y = x - mean
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        if self.prediction in ("noise", "score"):
            noise = out if self.prediction == "noise" else -sigma * out
            return (y - sigma * noise) / alpha, noise
        if self.prediction == "data":
            data = out - mean
            return data, (y - alpha * data) / sigma
        if self.prediction == "velocity":
            s = schedule.scale
            size = alpha**2 + (sigma / s) ** 2
            return (alpha * y - sigma / s * out) / size, (alpha / s * out + sigma / s**2 * y) / size
        f, slope = schedule.rates(t)
        noise = (f * y - out) / (sigma * slope)
        # alpha x0 = y - sigma eps, without the difference of what is nearly equal.
        return (out - (f - slope) * y) / (alpha * slope), noise


class Guided(AbstractDenoiser):
    """Classifier-free guidance: ``unconditional + scale (conditional - unconditional)``, for noise and data alike.

    Arguments:
        conditional, unconditional: two denoisers with one schedule.
        scale: 1 is the conditional denoiser alone; a number, or a function of t that returns one.

    Raises:
        ValueError: if the schedules differ.

    Example:
        >>> import jax.numpy as jnp, sdeflow as sf
        >>> to = lambda m: sf.diffusion.Denoiser(lambda t, x, args: m + 0 * x, sf.diffusion.VP(), prediction="data")
        >>> float(sf.diffusion.Guided(to(1.0), to(0.0), 3.0).predict("data", 0.5, jnp.array(0.2)))
        3.0
    """

    conditional: AbstractDenoiser
    unconditional: AbstractDenoiser
    scale: Scale

    def __init__(self, conditional: AbstractDenoiser, unconditional: AbstractDenoiser, scale: Any):
        check_denoiser(conditional)
        check_denoiser(unconditional)
        same = eqx.tree_equal(conditional.schedule, unconditional.schedule)
        if is_concrete(same) and not same:
            raise ValueError("the conditional and the unconditional denoiser must have one and the same schedule.")
        self.conditional, self.unconditional = conditional, unconditional
        self.scale = as_scale(scale)

    @property
    def schedule(self) -> AbstractSchedule:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The schedule of both."""
        return self.conditional.schedule

    def parts(self, t: Any, x: Array, args: Any) -> tuple[Array, Array]:
        """The guided data, less the schedule's mean, and the guided noise."""
        there, here = self.conditional.parts(t, x, args), self.unconditional.parts(t, x, args)
        w = scale_at(self.scale, t, x)
        return here[0] + w * (there[0] - here[0]), here[1] + w * (there[1] - here[1])


class Thresholded(AbstractDenoiser):
    """Dynamic thresholding: the predicted data is clipped to where data can be, and the noise follows from it.

    With s the larger of ``bound`` and the quantile of |x0| over one sample, x0 becomes ``clip(x0, -s, s) bound / s``.
    For data in a box, such as pixels, under strong guidance (Saharia et al., NeurIPS 2022). Samplers that read noise
    take the noise that goes with the clipped data, and converge to the same samples.

    Arguments:
        denoiser: any denoiser, a guided one too.
        quantile: between 0 and 1.
        bound: the half width of the box.
        sample_ndim: how many axes one sample has, the last ones of the state; None for all of them, as under
            ``jax.vmap``. Without it samplers refuse states of two axes or more that may be a batch.

    Raises:
        ValueError: for a quantile outside of [0, 1] or a bound that is not positive.

    Example:
        >>> import jax.numpy as jnp, sdeflow as sf
        >>> far = sf.diffusion.Denoiser(lambda t, x, args: 9 + 0 * x, sf.diffusion.VP(), prediction="data")
        >>> sf.diffusion.Thresholded(far).predict("data", 0.5, jnp.zeros(2)).tolist()
        [1.0, 1.0]
    """

    denoiser: AbstractDenoiser
    quantile: float = eqx.field(default=0.995, static=True)
    bound: float = eqx.field(default=1.0, static=True)
    sample_ndim: int | None = eqx.field(default=None, static=True)
    looks_at_whole: ClassVar[bool] = True

    def __check_init__(self):
        check_denoiser(self.denoiser)
        check_sample_ndim(self.sample_ndim)
        if not 0 <= number(self.quantile, "quantile") <= 1:
            raise ValueError(f"quantile must lie between 0 and 1, got {self.quantile}.")
        if number(self.bound, "bound") <= 0:
            raise ValueError(f"bound must be positive, got {self.bound}.")

    @property
    def schedule(self) -> AbstractSchedule:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of the denoiser."""
        return self.denoiser.schedule

    def parts(self, t: Any, x: Array, args: Any) -> tuple[Array, Array]:
        """The clipped data, less the schedule's mean, and the noise that goes with it."""
        schedule = self.schedule
        mean = jnp.asarray(schedule.mean, x.dtype)
        data = self.denoiser.parts(t, x, args)[0] + mean
        axes = axes_of_sample(x, self.sample_ndim)
        s = jnp.maximum(jnp.quantile(jnp.abs(data), self.quantile, axis=axes, keepdims=True), self.bound)
        data = jnp.clip(data, -s, s) * (self.bound / s) - mean
        return data, (x - mean - schedule.alpha(t) * data) / schedule.sigma(t)


class Precondition(AbstractDenoiser):
    r"""Karras' preconditioning: the network sees inputs and gives outputs of unit variance at every noise.

    With y = x / alpha and r = sigma / alpha, and d the deviation of the data,

        x0 = d^2 / (r^2 + d^2) y + r d / sqrt(r^2 + d^2) F(log(r) / 4, y / sqrt(r^2 + d^2), args).

    For normal data with deviation d the best network is 0 (Karras et al., NeurIPS 2022).

    Arguments:
        network: F, ``network(label, y, args)``, returns an array like y.
        schedule: of the noise.
        sigma_data: d.

    Raises:
        TypeError: if the network cannot be called like this, or the schedule is none.
        ValueError: for a deviation that is not positive.

    Example:
        >>> import jax.numpy as jnp, sdeflow as sf
        >>> best = sf.diffusion.Precondition(lambda label, y, args: 0 * y, sf.diffusion.EDM(), sigma_data=0.5)
        >>> round(float(best.predict("data", 0.5, jnp.array(3.0))), 3)
        1.5
    """

    network: Callable[[Any, Array, Any], Array]
    schedule: AbstractSchedule
    sigma_data: float = eqx.field(default=0.5, static=True)

    def __check_init__(self):
        check_schedule(self.schedule)
        if number(self.sigma_data, "sigma_data") <= 0:
            raise ValueError(f"sigma_data must be positive, got {self.sigma_data}.")
        _check_network(self.network, "network(label, y, args)")

    def parts(self, t: Any, x: Array, args: Any) -> tuple[Array, Array]:
        """The predicted data, less the schedule's mean, and the predicted noise."""
        schedule, d = self.schedule, self.sigma_data
        l = schedule.log_snr(t)
        r = jnp.exp(-l)
        y = (x - jnp.asarray(schedule.mean, x.dtype)) / schedule.alpha(t)
        size = jnp.sqrt(r**2 + d**2)
        out = check_like(self.network(-l / 4, y / size, args), x, "network")
        return (d / size) ** 2 * y + r * d / size * out, r / size**2 * y - d / size * out


def as_scale(scale: Any) -> Scale:
    """The strength of guidance: a number, or a function of the time."""
    return scale if callable(scale) else jnp.asarray(scale, jnp.result_type(scale, float))


def scale_at(scale: Scale, t: Any, x: Array) -> Array:
    """The strength at time t, of the dtype of x.

    Raises:
        ValueError: while tracing, if a function returns no scalar.
    """
    w = jnp.asarray(scale(t) if callable(scale) else scale, x.dtype)
    if callable(scale) and w.ndim:
        raise ValueError(f"scale(t) must return one number, got shape {w.shape}.")
    return w


def _check_network(network: Any, call: str) -> None:
    """Refuse what cannot be called with three arguments.

    Raises:
        TypeError: always then.
    """
    name = call.split("(")[0]
    if not callable(network):
        raise TypeError(f"{name} must be callable as {call}, got {type(network).__name__}.")
    try:
        signature = inspect.signature(network)
    except (TypeError, ValueError):  # not every callable has one
        return
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        raise TypeError(f"{name} must be callable as {call}, but its arguments are {signature}: wrap it.") from error


def check_schedule(schedule: Any) -> None:
    """Refuse what is no schedule.

    Raises:
        TypeError: always then.
    """
    if not isinstance(schedule, AbstractSchedule):
        raise TypeError(f"schedule must be a schedule such as sf.diffusion.VP(), got {type(schedule).__name__}.")


def check_denoiser(denoiser: Any) -> None:
    """Refuse what is no denoiser.

    Raises:
        TypeError: always then.
    """
    if not isinstance(denoiser, AbstractDenoiser):
        raise TypeError(
            f"a denoiser must be one such as sf.diffusion.Denoiser(fn, schedule), got {type(denoiser).__name__}."
        )
