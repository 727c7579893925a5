r"""What a schedule is: how much signal and how much noise there is at time t.

    x_t | x_0 ~ N(alpha(t) x_0, sigma(t)^2 I),      l(t) = log(alpha / sigma),

the law of dx = f x dt + g dw with f = d log alpha / dt and g^2 = -2 sigma^2 dl/dt (Kingma et al., Variational diffusion
models, 2021). ``log_snr`` is this l, the logarithm of the ratio of amplitudes: half of that of alpha^2 / sigma^2. It
falls as t grows.

A NumPy array of times stays on the host, in its own precision: what samplers know about their grids is computed there.
"""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from .._compat import is_concrete


def module_of(x: Any) -> tuple[Any, Any]:
    """NumPy with the array for what lives on the host, ``jax.numpy`` with an array for anything else."""
    if isinstance(x, np.ndarray | np.floating):
        return np, np.asarray(x)
    return jnp, jnp.asarray(x, jnp.result_type(x, float) if not hasattr(x, "dtype") else None)


def cell(knots: Any, x: Any) -> Any:
    """In which interval between the knots x lies, the first and the last going on beyond."""
    xp, x = module_of(x)
    # One comparison with each knot: a search would be a loop within whatever it is compiled into.
    above = np.searchsorted(knots, x) if xp is np else jnp.searchsorted(knots, x, method="compare_all")
    return xp.clip(above - 1, 0, len(knots) - 2)


def number(value: Any, name: str) -> float:
    """A finite number known on the host.

    Raises:
        TypeError: for what is traced or no number.
        ValueError: for infinite numbers and NaN.
    """
    if not is_concrete(value) or np.ndim(value) != 0 or np.asarray(value).dtype.kind not in "iuf":
        raise TypeError(f"{name} must be a number that is known before tracing, got {value!r}.")
    if not np.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}.")
    return float(value)


def check_mean(schedule: "AbstractSchedule", shape: tuple[int, ...]) -> None:
    """Refuse states that the mean of a schedule would widen.

    Raises:
        ValueError: if the mean does not broadcast to states of this shape.
    """
    mean = np.shape(schedule.mean)
    if len(mean) > len(shape) or any(m not in (1, n) for m, n in zip(mean[::-1], shape[::-1])):
        raise ValueError(f"the mean of the schedule has shape {mean}, which does not broadcast to a state of {shape}.")


class AbstractSchedule(eqx.Module):
    """The base class of every schedule: subclasses give log alpha, log sigma and the inverse of ``log_snr``.

    All formulas hold their digits in single precision, from ``t_min`` to ``t_max``. ``mean`` is where the process tends
    to and ``scale`` its deviation there, 0 and 1 for all but `MeanReverting`.
    """

    t_min: eqx.AbstractVar[float]
    t_max: eqx.AbstractVar[float]
    unit_prior: ClassVar[bool] = True
    mean: ClassVar[Any] = 0.0
    scale: ClassVar[Any] = 1.0

    @property
    def ends_without_signal(self) -> bool:
        """Whether there is pure noise at ``t_max``."""
        return False

    @abc.abstractmethod
    def log_alpha(self, t: Any) -> Any:
        """The logarithm of the signal's amplitude."""

    @abc.abstractmethod
    def log_sigma(self, t: Any) -> Any:
        """The logarithm of the noise's standard deviation."""

    @abc.abstractmethod
    def t_of_log_snr(self, l: Any) -> Any:
        """The time at which ``log_snr`` is l."""

    def alpha(self, t: Any) -> Any:
        """The amplitude of the signal."""
        xp, t = module_of(t)
        return xp.exp(self.log_alpha(t))

    def sigma(self, t: Any) -> Any:
        """The standard deviation of the noise."""
        xp, t = module_of(t)
        return xp.exp(self.log_sigma(t))

    def log_snr(self, t: Any) -> Any:
        """Log(alpha / sigma)."""
        _, t = module_of(t)
        return self.log_alpha(t) - self.log_sigma(t)

    def rates(self, t: Any) -> tuple[Array, Array]:
        """The derivatives of log alpha and of ``log_snr`` in time: f, and l' with g^2 = -2 sigma^2 l'."""
        t = jnp.asarray(t, jnp.result_type(t, float) if not hasattr(t, "dtype") else None)
        one = jnp.ones_like(t)
        f = jax.jvp(self.log_alpha, (t,), (one,))[1]
        return f, f - jax.jvp(self.log_sigma, (t,), (one,))[1]

    def prior_std(self) -> float:
        """The standard deviation of where samplers start."""
        return self.scale if self.unit_prior else float(self.sigma(np.float64(self.t_max)))

    def sample_prior(self, shape: tuple[int, ...], *, key: PRNGKeyArray) -> Array:
        """Draw where samplers start: N(mean, prior_std^2).

        Arguments:
            shape: of the draw; the mean must broadcast to it.
            key: a random key.

        Raises:
            ValueError: if the mean has another shape.
        """
        check_mean(self, np.broadcast_shapes(shape))
        return self.mean + self.prior_std() * jr.normal(key, shape)

    def _check_span(self) -> None:
        object.__setattr__(self, "t_min", number(self.t_min, "t_min"))
        object.__setattr__(self, "t_max", number(self.t_max, "t_max"))
        if not 0 <= self.t_min < self.t_max:
            raise ValueError(f"a schedule needs 0 <= t_min < t_max, got {self.t_min} and {self.t_max}.")
