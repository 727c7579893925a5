r"""The schedules, a row each.

| name | log alpha | sigma | t of l |
|---|---|---|---|
| `VP` | -(b1 - b0) t^2 / 4 - b0 t / 2 | sqrt(1 - alpha^2) | 4 u / (b0 + sqrt(b0^2 + 4 (b1 - b0) u)) |
| `SubVP` | the same | 1 - alpha^2 | the same |
| `Cosine` | log cos(pi/2 (t + s)/(1 + s)) - log cos(pi/2 s/(1 + s)) | sqrt(1 - alpha^2) | an arc tangent |
| `VE` | 0 | smin (smax / smin)^t | (-l - log smin) / log(smax / smin) |
| `EDM` | 0 | t | e^-l |
| `Flow` | log(1 - t) | t | 1 / (1 + e^l) |
| `Tabulated` | linear between the knots of a table | sqrt(1 - alpha^2) | linear in log alpha |
| `MeanReverting` | those of another schedule, around a mean | | |

where u = -log alpha is log(1 + e^-2l) / 2 for `VP` and arsinh(e^-l / 2) for `SubVP`.

Sources: Song et al., ICLR 2021 (VP, SubVP, VE); Nichol and Dhariwal, ICML 2021 (Cosine); Karras et al., NeurIPS 2022
(EDM); Lipman et al., ICLR 2023 (Flow); Luo et al., ICML 2023 (MeanReverting).
"""

import math
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._compat import is_concrete
from ._schedule import AbstractSchedule, cell, module_of, number

# What is taken for the signal where there is none: as small as that of the steps of discrete models, and not 0.
_LOG_FLOOR = -12 * math.log(2)
_FLOOR = 2.0**-12


def _kept_up(left: Any, t_max: float) -> Any:
    """What is left of a signal that ends at ``t_max = 1``, kept from being 0 there; derivatives are as they were."""
    if t_max < 1:
        return left
    xp, left = module_of(left)
    up = xp.maximum(left, xp.asarray(_FLOOR, left.dtype))
    return up if xp is np else left + jax.lax.stop_gradient(up - left)


class _Preserving(AbstractSchedule):
    """Schedules with alpha^2 + sigma^2 = 1."""

    def log_sigma(self, t: Any) -> Any:
        """The logarithm of the noise's standard deviation."""
        xp, t = module_of(t)
        return xp.log(-xp.expm1(2 * self.log_alpha(t))) / 2


def _decay(l: Any) -> Any:
    """Minus log alpha where ``alpha^2 + sigma^2 = 1``."""
    xp, l = module_of(l)
    return xp.logaddexp(-2 * l, xp.zeros_like(l)) / 2


class _LinearRate:
    """The integral of a rate that is linear in time, and its inverse."""

    beta_min: float
    beta_max: float

    def _check_rates(self) -> None:
        for name in ("beta_min", "beta_max"):
            object.__setattr__(self, name, number(getattr(self, name), name))
        if not (self.beta_min > 0 and self.beta_max >= self.beta_min):
            raise ValueError(f"rates need 0 < beta_min <= beta_max, got {self.beta_min} and {self.beta_max}.")

    def _log_alpha(self, t: Any) -> Any:
        return -t * ((self.beta_max - self.beta_min) * t / 4 + self.beta_min / 2)

    def _invert(self, u: Any) -> Any:
        xp, u = module_of(u)
        root = xp.sqrt(self.beta_min**2 + 4 * (self.beta_max - self.beta_min) * u)
        return 4 * u / (self.beta_min + root)


class VP(_Preserving, _LinearRate):
    """Variance preserving with a linear rate: dx = -beta x / 2 dt + sqrt(beta) dw, beta from beta_min to beta_max.

    Arguments:
        beta_min, beta_max: the rate at t = 0 and t = 1.
        t_min, t_max: where samplers end and start.

    Raises:
        ValueError: for rates that are not positive or decrease, and times that are not ordered.
        TypeError: for traced numbers: what is learned is the grid.

    Example:
        >>> import sdeflow as sf
        >>> vp = sf.diffusion.VP()
        >>> round(float(vp.t_of_log_snr(vp.log_snr(0.3))), 5)
        0.3
    """

    beta_min: float = eqx.field(default=0.1, static=True)
    beta_max: float = eqx.field(default=20.0, static=True)
    t_min: float = eqx.field(default=1e-3, static=True)
    t_max: float = eqx.field(default=1.0, static=True)

    def __check_init__(self):
        self._check_rates()
        self._check_span()

    def log_alpha(self, t: Any) -> Any:
        """The logarithm of the signal's amplitude."""
        return self._log_alpha(module_of(t)[1])

    def t_of_log_snr(self, l: Any) -> Any:
        """The time at which ``log_snr`` is l."""
        return self._invert(_decay(l))


class SubVP(AbstractSchedule, _LinearRate):
    """Sub-variance preserving: the drift of `VP` with less noise, sigma = 1 - alpha^2.

    Arguments:
        beta_min, beta_max: the rate at t = 0 and t = 1.
        t_min, t_max: where samplers end and start.

    Raises:
        ValueError, TypeError: as `VP`.

    Example:
        >>> import sdeflow as sf
        >>> round(float(sf.diffusion.SubVP().sigma(1.0)), 5)
        0.99996
    """

    beta_min: float = eqx.field(default=0.1, static=True)
    beta_max: float = eqx.field(default=20.0, static=True)
    t_min: float = eqx.field(default=1e-3, static=True)
    t_max: float = eqx.field(default=1.0, static=True)

    def __check_init__(self):
        self._check_rates()
        self._check_span()

    def log_alpha(self, t: Any) -> Any:
        """The logarithm of the signal's amplitude."""
        return self._log_alpha(module_of(t)[1])

    def log_sigma(self, t: Any) -> Any:
        """The logarithm of the noise's standard deviation."""
        xp, t = module_of(t)
        return xp.log(-xp.expm1(2 * self.log_alpha(t)))

    def t_of_log_snr(self, l: Any) -> Any:
        """The time at which ``log_snr`` is l."""
        xp, l = module_of(l)
        return self._invert(xp.arcsinh(xp.exp(-l) / 2))


class Cosine(_Preserving):
    """Variance preserving with alpha a quarter of a cosine, which spends less time in nearly pure noise.

    Arguments:
        offset: s, so that sigma does not vanish too fast at 0.
        t_min, t_max: where samplers end and start. At t = 1 there is no signal: with t_max = 1 it counts as 2^-12 of
            what it falls by in a unit of time.

    Raises:
        ValueError: for a negative offset, or times that are not ordered or go beyond 1.

    Example:
        >>> import sdeflow as sf
        >>> round(float(sf.diffusion.Cosine().alpha(0.5)), 3)
        0.703
    """

    offset: float = eqx.field(default=0.008, static=True)
    t_min: float = eqx.field(default=1e-3, static=True)
    t_max: float = eqx.field(default=0.9946, static=True)

    def __check_init__(self):
        object.__setattr__(self, "offset", number(self.offset, "offset"))
        self._check_span()
        if self.offset < 0 or self.t_max > 1:
            raise ValueError(f"Cosine needs offset >= 0 and t_max <= 1, got {self.offset} and {self.t_max}.")

    @property
    def _first(self) -> float:
        return math.pi / 2 * self.offset / (1 + self.offset)

    def _turned(self, t: Any) -> Any:
        return math.pi / 2 / (1 + self.offset) * t

    @property
    def ends_without_signal(self) -> bool:
        """Whether there is pure noise at ``t_max``."""
        return self.t_max >= 1

    def log_alpha(self, t: Any) -> Any:
        """The logarithm of the signal's amplitude."""
        xp, t = module_of(t)
        # Near 0 the cosine is 1 less rounding, near the end so is sigma.
        near = xp.log1p(-xp.exp(2 * self.log_sigma(xp.minimum(t, 0.5)))) / 2
        far = xp.log(xp.sin(self._turned(_kept_up(1 - t, self.t_max)))) - math.log(math.cos(self._first))
        return xp.where(t < 0.5, near, far)

    def log_sigma(self, t: Any) -> Any:
        """The logarithm of the noise's standard deviation."""
        xp, t = module_of(t)
        turned, first = self._turned(t), self._first
        return xp.log(xp.sin(turned) * xp.sin(turned + 2 * first)) / 2 - math.log(math.cos(first))

    def t_of_log_snr(self, l: Any) -> Any:
        """The time at which ``log_snr`` is l."""
        xp, l = module_of(l)
        first = self._first
        c, s = math.cos(first), math.sin(first)
        a, squared = xp.exp(-_decay(l)), xp.exp(-2 * _decay(-l))
        top = xp.sqrt(s**2 + c**2 * squared)
        turned = xp.arctan2(c * squared / (top + a * s), a * c**2 + top * s)
        return turned * (2 / math.pi) * (1 + self.offset)


class VE(AbstractSchedule):
    """Variance exploding: noise is added and the signal stays, sigma = sigma_min (sigma_max / sigma_min)^t.

    Arguments:
        sigma_min, sigma_max: the noise at t = 0 and t = 1.
        t_min, t_max: where samplers end and start.

    Raises:
        ValueError: for noise that is not positive or does not grow, and times that are not ordered.

    Example:
        >>> import sdeflow as sf
        >>> round(float(sf.diffusion.VE().sigma(0.5)), 4)
        0.7071
    """

    sigma_min: float = eqx.field(default=0.01, static=True)
    sigma_max: float = eqx.field(default=50.0, static=True)
    t_min: float = eqx.field(default=0.0, static=True)
    t_max: float = eqx.field(default=1.0, static=True)
    unit_prior: ClassVar[bool] = False

    def __check_init__(self):
        for name in ("sigma_min", "sigma_max"):
            object.__setattr__(self, name, number(getattr(self, name), name))
        self._check_span()
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"VE needs 0 < sigma_min < sigma_max, got {self.sigma_min} and {self.sigma_max}.")

    def log_alpha(self, t: Any) -> Any:
        """The logarithm of the signal's amplitude."""
        xp, t = module_of(t)
        return xp.zeros_like(t)

    def log_sigma(self, t: Any) -> Any:
        """The logarithm of the noise's standard deviation."""
        return math.log(self.sigma_min) + math.log(self.sigma_max / self.sigma_min) * module_of(t)[1]

    def t_of_log_snr(self, l: Any) -> Any:
        """The time at which ``log_snr`` is l."""
        return (-module_of(l)[1] - math.log(self.sigma_min)) / math.log(self.sigma_max / self.sigma_min)


class EDM(AbstractSchedule):
    """Time is the noise: alpha = 1, sigma = t.

    Arguments:
        t_min, t_max: the noise where samplers end and start.

    Raises:
        ValueError: for times that are not ordered.

    Example:
        >>> import sdeflow as sf
        >>> round(float(sf.diffusion.EDM().log_snr(1.0)), 4)
        0.0
    """

    t_min: float = eqx.field(default=0.002, static=True)
    t_max: float = eqx.field(default=80.0, static=True)
    unit_prior: ClassVar[bool] = False

    def __check_init__(self):
        self._check_span()

    def log_alpha(self, t: Any) -> Any:
        """The logarithm of the signal's amplitude."""
        xp, t = module_of(t)
        return xp.zeros_like(t)

    def log_sigma(self, t: Any) -> Any:
        """The logarithm of the noise's standard deviation."""
        xp, t = module_of(t)
        return xp.log(t)

    def t_of_log_snr(self, l: Any) -> Any:
        """The time at which ``log_snr`` is l."""
        xp, l = module_of(l)
        return xp.exp(-l)


class Flow(AbstractSchedule):
    """Straight lines from data to noise: alpha = 1 - t, sigma = t.

    Arguments:
        t_min, t_max: where samplers end and start. At t = 1 there is no signal: with t_max = 1 it counts as 2^-12.

    Raises:
        ValueError: for times that are not ordered or go beyond 1.

    Example:
        >>> import sdeflow as sf
        >>> round(float(sf.diffusion.Flow().t_of_log_snr(0.0)), 4)
        0.5
    """

    t_min: float = eqx.field(default=1e-3, static=True)
    t_max: float = eqx.field(default=0.999, static=True)

    def __check_init__(self):
        self._check_span()
        if self.t_max > 1:
            raise ValueError(f"Flow ends at t = 1, where there is no signal left, got t_max={self.t_max}.")

    @property
    def ends_without_signal(self) -> bool:
        """Whether there is pure noise at ``t_max``."""
        return self.t_max >= 1

    def log_alpha(self, t: Any) -> Any:
        """The logarithm of the signal's amplitude."""
        xp, t = module_of(t)
        return xp.log1p(-t) if self.t_max < 1 else xp.log(_kept_up(1 - t, self.t_max))

    def log_sigma(self, t: Any) -> Any:
        """The logarithm of the noise's standard deviation."""
        xp, t = module_of(t)
        return xp.log(t)

    def t_of_log_snr(self, l: Any) -> Any:
        """The time at which ``log_snr`` is l."""
        xp, l = module_of(l)
        return xp.exp(-xp.logaddexp(l, xp.zeros_like(l)))


class Tabulated(_Preserving):
    """A table of N rates, as discrete models are trained with: log alpha is linear between the knots (i + 1) / N.

    At t = 0 there is no noise. The label of such a model at time t is i = N t - 1.

    Arguments:
        betas: N numbers between 0 and 1, e.g. ``numpy.linspace(1e-4, 0.02, 1000)``. The last may be 1, which leaves no
            signal; alpha counts as 2^-12 at t = 1 then.
        t_min, t_max: where samplers end and start; by default the first and the last knot.

    Raises:
        ValueError: for rates that do not lie between 0 and 1, for what looks like their products, and times that are
            not ordered.
        TypeError: for traced rates.

    Example:
        >>> import numpy as np, sdeflow as sf
        >>> sf.diffusion.Tabulated(np.linspace(1e-4, 0.02, 1000))
        Tabulated(1000 betas from 0.0001 to 0.02)
    """

    betas: tuple[float, ...] = eqx.field(static=True)
    t_min: float = eqx.field(static=True)
    t_max: float = eqx.field(static=True)

    def __init__(self, betas: Any, *, t_min: float | None = None, t_max: float = 1.0):
        if not is_concrete(betas):
            raise TypeError("betas must be numbers that are known before tracing.")
        table = np.asarray(betas, np.float64)
        if table.ndim != 1 or table.size < 2:
            raise ValueError(f"betas must be at least two numbers between 0 and 1, got shape {table.shape}.")
        wrong = ~((table > 0) & (table < 1) & np.isfinite(table))
        wrong[-1] &= table[-1] != 1
        if wrong.any():
            i = int(np.argmax(wrong))
            raise ValueError(
                f"betas must lie between 0 and 1, only the last may be 1; betas[{i}]={table[i]:g} does not."
            )
        if table[0] > 0.5 and table[-1] < table[0]:
            raise ValueError(
                f"betas fall from {table[0]:g} to {table[-1]:g}, as products of 1 - beta do: of these, a, pass "
                "betas=1 - a / np.append(1.0, a[:-1])."
            )
        self.betas = tuple(table.tolist())
        self.t_min, self.t_max = (1 / table.size if t_min is None else t_min), t_max

    def __check_init__(self):
        self._check_span()

    def _knots(self) -> tuple[np.ndarray, np.ndarray]:
        # From the data on, so that there is no noise at t = 0.
        count = len(self.betas)
        betas = np.asarray(self.betas)
        none_left = betas[-1] == 1
        log_alpha = np.append(0.0, np.cumsum(np.log1p(-betas[: count - none_left])) / 2)
        if none_left:
            log_alpha = np.append(log_alpha, min(_LOG_FLOOR, log_alpha[-1] - math.log(2)))
        return np.arange(count + 1) / count, log_alpha

    @property
    def ends_without_signal(self) -> bool:
        """Whether there is pure noise at ``t_max``."""
        return self.betas[-1] == 1 and self.t_max >= 1

    def log_alpha(self, t: Any) -> Any:
        """The logarithm of the signal's amplitude."""
        return _interpolated(t, *self._knots())

    def t_of_log_snr(self, l: Any) -> Any:
        """The time at which ``log_snr`` is l."""
        t, log_alpha = self._knots()
        return _interpolated(_decay(l), -log_alpha, t)

    def __repr__(self) -> str:
        return f"Tabulated({len(self.betas)} betas from {self.betas[0]:.3g} to {self.betas[-1]:.3g})"


def _interpolated(x: Any, knots: np.ndarray, values: np.ndarray) -> Any:
    """Straight lines between the knots, the first and the last going on beyond."""
    xp, x = module_of(x)
    knots, values = xp.asarray(knots, x.dtype), xp.asarray(values, x.dtype)
    i = cell(knots, x)
    return values[i] + (x - knots[i]) * ((values[i + 1] - values[i]) / (knots[i + 1] - knots[i]))


class MeanReverting(AbstractSchedule):
    r"""A schedule around a mean: ``x - mean`` is what the schedule says, its noise times ``scale``.

    With the schedule of ``dy = -theta y dt + ...`` this is dx = theta (mean - x) dt + scale sqrt(2 theta) dw, the
    equation of restoration from a degraded state. Every sampler is the sampler of the schedule after a shift.

    Arguments:
        schedule: of x - mean, any but another of this kind.
        mean: an array that broadcasts to the state, e.g. a degraded image.
        scale: the standard deviation that x - mean tends to, for a schedule that preserves variance.

    Raises:
        TypeError: if the schedule is none.
        ValueError: for a scale that is not positive, or a schedule with a mean of its own.

    Example:
        >>> import jax, jax.numpy as jnp, sdeflow as sf
        >>> around = sf.diffusion.MeanReverting(sf.diffusion.VP(), jnp.full(3, 5.0), scale=0.1)
        >>> bool(abs(around.sample_prior((3,), key=jax.random.key(0)) - 5).max() < 0.5)
        True
    """

    schedule: AbstractSchedule
    mean: Array  # pyright: ignore[reportIncompatibleMethodOverride]
    scale: float = eqx.field(static=True)  # pyright: ignore[reportIncompatibleMethodOverride]

    def __init__(self, schedule: AbstractSchedule, mean: Any, *, scale: float = 1.0):
        if not isinstance(schedule, AbstractSchedule):
            raise TypeError(f"schedule must be a schedule such as sf.diffusion.VP(), got {type(schedule).__name__}.")
        if isinstance(schedule, MeanReverting):
            raise ValueError("MeanReverting takes a schedule without a mean of its own.")  # noqa: TRY004
        self.schedule, self.mean = schedule, jnp.asarray(mean, jnp.result_type(mean, float))
        self.scale = number(scale, "scale")
        if self.scale <= 0:
            raise ValueError(f"scale must be positive, got {scale}.")

    @property
    def t_min(self) -> float:
        """Where samplers end."""
        return self.schedule.t_min

    @property
    def t_max(self) -> float:
        """Where samplers start."""
        return self.schedule.t_max

    @property
    def ends_without_signal(self) -> bool:
        """Whether there is pure noise at ``t_max``."""
        return self.schedule.ends_without_signal

    def log_alpha(self, t: Any) -> Any:
        """The logarithm of the signal's amplitude."""
        return self.schedule.log_alpha(t)

    def log_sigma(self, t: Any) -> Any:
        """The logarithm of the noise's standard deviation."""
        return self.schedule.log_sigma(t) + math.log(self.scale)

    def t_of_log_snr(self, l: Any) -> Any:
        """The time at which ``log_snr`` is l."""
        return self.schedule.t_of_log_snr(module_of(l)[1] + math.log(self.scale))

    def prior_std(self) -> float:
        """The standard deviation of where samplers start."""
        return self.scale * self.schedule.prior_std()
