"""What every model of series does alike: it reads batches row by row, and draws samples at times that are asked for."""

import abc
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ..._results import is_okay
from ...data import SeriesBatch, TimeSeries
from .._checks import check_size
from ._drive import check_series, over_series


class Row(NamedTuple):
    """What is read of one series of a batch; of all of them, with B leading."""

    times: Array
    values: Array
    mask: Array
    length: Array
    static: Any
    number: Array

    @classmethod
    def all(cls, batch: SeriesBatch) -> "Row":
        """Every series of a batch."""
        fields = (batch.times, batch.values, batch.mask, batch.lengths, batch.static, batch.ids)
        return cls(*(None if x is None else jnp.asarray(x) for x in fields))  # pyright: ignore[reportArgumentType]

    def walkable(self) -> "Row":
        """With two times at least: a single one is followed by padding, a walk of no live step."""
        if self.times.shape[0] > 1:
            return self
        blank = jnp.full_like(self.values, jnp.nan)
        return self._replace(
            times=jnp.repeat(self.times, 2),
            values=jnp.concatenate([self.values, blank]),
            mask=jnp.concatenate([self.mask, jnp.zeros_like(self.mask)]),
        )


class AbstractSeriesModel(eqx.Module):
    """A model that reads series of ``channels`` channels and draws samples of them at other times.

    ``log_noise`` is the logarithm of the standard deviation of an observation, for each channel that is predicted; None
    for a model without such noise.
    """

    channels: eqx.AbstractVar[int]
    log_noise: eqx.AbstractVar[Array | None]

    @abc.abstractmethod
    def draw(self, row: Row, places: Array, key: PRNGKeyArray) -> tuple[Array, Any]:
        """One path of one series at the rows ``places`` (T,), shape (T, K), and how its solve ended."""

    def check_task(self, verb: str) -> None:
        """Refuse what the model was not made for.

        Raises:
            ValueError: naming the verb and what it needs.
        """

    def forecast(
        self,
        series: TimeSeries,
        ts: Any,
        num_samples: int = 100,
        *,
        key: PRNGKeyArray,
        noise: bool = True,
        batch_size: int = 64,
        throw: bool = True,
    ) -> Float[np.ndarray, "N S T K"]:
        """Samples of every series at later times, shape (N, num_samples, T, K), in the units of ``series.values``.

        ``series.to_user_values`` brings them to those of the user, where all channels are predicted.

        Arguments:
            series: N series, standardised like the training data: what is known.
            ts: shape (T,) or (N, T), increasing user times after the last observation of each series.
            num_samples: paths of each series.
            key: a JAX random key; what is drawn for a series depends on it and on the id of the series.
            noise: whether to add the noise of observations, if the model has any.
            batch_size: series in one batch.
            throw: raise if the solve of a series fails.

        Raises:
            TypeError: if ``series`` is no TimeSeries.
            ValueError: for a model for another task, or a time that is not after the last observation, naming the
                series.
            SolveError: if the solve of a series fails, naming its id.
        """
        self.check_task("forecast")
        return self._at(series, ts, num_samples, key, noise, batch_size, throw, beyond=True)

    def impute(
        self,
        series: TimeSeries,
        ts: Any,
        num_samples: int = 100,
        *,
        key: PRNGKeyArray,
        noise: bool = True,
        batch_size: int = 64,
        throw: bool = True,
    ) -> Float[np.ndarray, "N S T K"]:
        """Samples of every series at any times from its first on; arguments, shapes and errors as in `forecast`."""
        self.check_task("impute")
        return self._at(series, ts, num_samples, key, noise, batch_size, throw, beyond=False)

    def _at(
        self, series: Any, ts: Any, num_samples: int, key: Any, noise: bool, size: int, throw: bool, *, beyond: bool
    ) -> np.ndarray:
        num_samples = check_size("num_samples", num_samples)
        series, places = check_series(series).with_times(ts, beyond=beyond)
        self.check_times(series.times)
        call = lambda batch, rows: _samples(self, batch, places[rows], key, num_samples, noise)
        return over_series(call, series, size, throw)

    def check_times(self, times: Sequence[Any]) -> None:
        """Refuse internal times, one array for each series, of which the model says nothing; in general there are none.

        Raises:
            ValueError: saying which would do.
        """

    def check_batch(self, batch: Any) -> None:
        """Refuse a batch of another number of channels.

        Raises:
            ValueError: naming both.
        """
        shape = jnp.shape(batch.values)
        if len(shape) != 3 or shape[2] != self.channels:
            raise ValueError(
                f"The model was built with channels={self.channels}, but the batch has values of shape {shape}; "
                "it needs (B, L, C) with C the channels of the model."
            )

    def observed(self, means: Array, key: PRNGKeyArray) -> Array:
        """Means of observations with the noise of these."""
        if self.log_noise is None:
            return means
        return means + jnp.exp(self.log_noise) * jax.random.normal(key, means.shape, means.dtype)


@eqx.filter_jit
def _samples(
    model: AbstractSeriesModel, batch: SeriesBatch, places: Any, key: PRNGKeyArray, num_samples: int, noise: bool
) -> tuple[Array, Any]:
    """Samples (B, S, T, K) at the rows ``places`` (B, T), and a result for each series."""
    model.check_batch(batch)

    def one(places: Array, row: Row) -> tuple[Array, Any]:
        def sample(key: PRNGKeyArray) -> tuple[Array, Any]:
            for_path, for_noise = jax.random.split(key)
            found, result = model.draw(row, places, for_path)
            return (model.observed(found, for_noise) if noise else found), result

        found, result = jax.vmap(sample)(jax.random.split(key_of(key, row.number), num_samples))
        return found, first_failure(result)

    return jax.vmap(one)(jnp.asarray(places), Row.all(batch))


def key_of(key: PRNGKeyArray, number: Any) -> PRNGKeyArray:
    """The key of one series: a function of the key and of the series' own number."""
    return jax.random.fold_in(key, number)


def first_failure(result: Any) -> Any:
    """The first member that is a failure, or a success if there is none."""
    first = jnp.argmax(~is_okay(result))
    return jtu.tree_map(lambda x: x.ravel()[first], result)
