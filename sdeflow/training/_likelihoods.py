"""Losses of predictions with uncertainty: ``NegativeLogLikelihood``, ``ELBO`` and ``EnergyScore``."""

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from ..metrics import energy_score
from ._losses import Scored, observations
from ._prediction import Prediction
from ._rows import row_mean
from ._sum import AbstractPredictionLoss, Metrics


def log_normal(error: Array, scale: Any) -> Array:
    """The log density, in nats, of normal noise with standard deviation ``scale`` at ``error``."""
    return -((error / scale) ** 2) / 2 - jnp.log(scale) - jnp.log(2 * jnp.pi) / 2


def _log_likelihood(prediction: Prediction, batch: PyTree, name: str) -> tuple[Any, Scored]:
    """Nats of every series, shape (B,), a mixture over samples if there are several; and what was scored."""
    if prediction.scale is None:
        raise ValueError(
            f"{name} needs the standard deviation of the observations, and this prediction has no scale: build a "
            "SeriesModel with noise=0.1, say."
        )
    seen = observations(name, prediction, batch)
    scale = jnp.broadcast_to(prediction.scale, jnp.broadcast_shapes(jnp.shape(prediction.scale), seen.wanted.shape))
    scale = jnp.where(seen.observed, scale, 1)[:, None]
    each = jnp.where(seen.observed[:, None], log_normal(seen.error, scale), 0)
    joint = each.sum(axis=tuple(range(2, each.ndim)))
    return jax.nn.logsumexp(joint, axis=1) - jnp.log(float(joint.shape[1])), seen


class NegativeLogLikelihood(AbstractPredictionLoss):
    r"""Minus the log-likelihood of what was observed, in nats per observed value.

    Given its output x and ``prediction.scale`` s, an observation is normal with mean x and standard deviation s. With
    outputs (B, S, ...) of several samples the likelihood of a series is the mean over its samples of that of all its
    observations, log (1/S) sum_s prod_j N(y_j; x_sj, s_j).

    Targets are those of `MaskedMSE`.

    Raises:
        ValueError: the prediction has no scale, the batch neither targets nor values, or the shapes differ.

    Example:
        >>> import jax.numpy as jnp
        >>> from types import SimpleNamespace
        >>> from sdeflow.training import NegativeLogLikelihood, Prediction
        >>> batch = SimpleNamespace(targets=jnp.array([[1.0, jnp.nan]]))
        >>> prediction = Prediction(jnp.zeros((1, 2)), scale=jnp.ones(2))
        >>> round(NegativeLogLikelihood().score(prediction, batch, 0)[0].item(), 4)
        1.4189
    """

    def score(self, prediction: Prediction, batch: PyTree, step: Array | int) -> tuple[Float[Array, ""], Metrics]:
        """Score outputs and scale against what was observed."""
        found, seen = _log_likelihood(prediction, batch, "NegativeLogLikelihood")
        return row_mean(-found, seen.weight, seen.counts), {}


class ELBO(AbstractPredictionLoss):
    r"""Minus the evidence lower bound of latent models, in nats per series: -(log p(x | z) - b KL).

    ``prediction.outputs`` and ``prediction.scale`` are those of `NegativeLogLikelihood`, ``prediction.kl`` the
    divergence of each series in nats, shape (B,). Reports "log_likelihood", "kl" and "kl_weight".

    Arguments:
        kl_warmup: steps over which b rises linearly to 1; 0 for b = 1 from the start.

    Raises:
        ValueError: a negative ``kl_warmup``, a prediction without ``kl``, and as `NegativeLogLikelihood`.

    Example:
        >>> import jax.numpy as jnp
        >>> from types import SimpleNamespace
        >>> from sdeflow.training import ELBO, Prediction
        >>> batch = SimpleNamespace(targets=jnp.zeros((1, 2)))
        >>> prediction = Prediction(jnp.zeros((1, 2)), kl=jnp.array([3.0]), scale=jnp.ones(2))
        >>> [round(ELBO(kl_warmup=100).score(prediction, batch, step)[0].item(), 4) for step in (0, 50, 100)]
        [1.8379, 3.3379, 4.8379]
    """

    kl_warmup: int = eqx.field(default=0, static=True)

    def __check_init__(self):
        if isinstance(self.kl_warmup, bool) or not isinstance(self.kl_warmup, int) or self.kl_warmup < 0:
            raise ValueError(f"kl_warmup must be a number of steps, at least 0, got {self.kl_warmup!r}.")

    def score(self, prediction: Prediction, batch: PyTree, step: Array | int) -> tuple[Float[Array, ""], Metrics]:
        """Score outputs, scale and divergence."""
        found, seen = _log_likelihood(prediction, batch, "ELBO")
        if prediction.kl is None:
            raise ValueError(
                "ELBO needs the divergence of a latent model, and this prediction has no kl: use a model such as "
                "sf.models.LatentSDE, or NegativeLogLikelihood."
            )
        weight = jnp.minimum(step / self.kl_warmup, 1.0) if self.kl_warmup else jnp.ones(())
        weight = jnp.asarray(weight, found.dtype)
        fit, kl = row_mean(found, seen.weight), row_mean(jnp.broadcast_to(prediction.kl, found.shape), seen.weight)
        return weight * kl - fit, {"log_likelihood": fit, "kl": kl, "kl_weight": weight}


class EnergyScore(AbstractPredictionLoss):
    r"""The energy score of samples, E|X - y| - E|X - X'| / 2, which is smallest for the law that y comes from.

    Unlike the mean square error it does not shrink the spread of the samples. ``prediction.outputs`` are samples (B, S,
    ...) with S >= 2, the norm that of the observed entries, and E|X - X'| the mean over pairs of different samples.
    Targets are those of `MaskedMSE`.

    Arguments:
        over: "step", a norm over channels at every time, averaged over times; "path", one norm over all of them, which
            sees how times depend on one another, too.

    Raises:
        ValueError: fewer than two samples, another ``over``, and as `MaskedMSE`.

    Source: Gneiting and Raftery, "Strictly proper scoring rules, prediction, and estimation", 2007.

    Example:
        >>> import jax.numpy as jnp
        >>> from types import SimpleNamespace
        >>> from sdeflow.training import EnergyScore, Prediction
        >>> batch = SimpleNamespace(targets=jnp.array([[0.0]]))
        >>> EnergyScore().score(Prediction(jnp.array([[[-1.0], [1.0]]])), batch, 0)[0].item()
        0.0
    """

    over: Literal["step", "path"] = eqx.field(default="step", static=True)

    def __check_init__(self):
        if self.over not in ("step", "path"):
            raise ValueError(f'over must be "step" or "path", got {self.over!r}.')

    def score(self, prediction: Prediction, batch: PyTree, step: Array | int) -> tuple[Float[Array, ""], Metrics]:
        """Score samples against what was observed."""
        seen = observations("EnergyScore", prediction, batch)
        error = seen.error
        if error.shape[1] < 2:
            raise ValueError(
                "EnergyScore compares samples, and the prediction has one: build a SeriesModel with num_samples=8, say."
            )
        if self.over == "step" and error.ndim == 4:
            wide = seen.observed
        else:
            error = error.reshape(*error.shape[:2], -1)
            wide = seen.observed.reshape(len(seen.observed), -1)
        # Errors are samples about what was observed.
        score = energy_score(jnp.moveaxis(error, 1, 0), jnp.zeros(wide.shape, error.dtype), mask=wide)
        counts = wide.any(axis=-1)
        score = jnp.where(counts, score, 0).reshape(len(counts), -1)
        return row_mean(score.sum(axis=1), seen.weight, counts.reshape(score.shape).sum(axis=1).astype(score.dtype)), {}
