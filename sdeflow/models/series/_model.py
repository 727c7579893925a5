"""``SeriesModel``: what an equation driven by a time series says about the series.

    z(t_1) = Linear(X(t_1)),    dz = f(z, X(t)) dt + g(t) dW,    outputs = MLP(z(t_n))

X is the straight-line path through the observations, gaps filled. Every series is walked on its own times.
"""

from collections.abc import Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ..._results import SolveError, is_okay, message_of
from ...data import SeriesBatch, TimeSeries
from ...equations import AbstractEquation
from ...paths import linear_control
from ...solving import Solution, solve
from ...training import Prediction
from .._checks import check_size
from ..fields import MLP
from ._keys import series_numbers


class SeriesModel(eqx.Module):
    r"""A model of irregular time series: encoder, equation, readout.

    The first values of the (filled) series make the start of the state, the equation carries it along the series
    under the control of the observations, and the readout turns the last state into logits. The noise of a series
    depends on the key and the id of the series, not on the batch it is in.

    Arguments:
        dynamics: an equation with ``state_size`` and ``control_size == channels``, such as
            `sdeflow.models.NeuralLangevinSDE`.
        channels: C, the channels of the series.
        task: "classify"; other tasks are not part of this version.
        num_outputs: K, the number of classes.
        solver: a diffrax solver; Euler by default, which has strong order 1 for additive noise and reads the control
            at the observations alone.
        steps_per_interval: steps between two observations.
        key: a JAX random key for the initial weights.

    Raises:
        TypeError: if ``dynamics`` is no equation with these two sizes, or ``solver`` no solver.
        ValueError: for another task, a size out of range, or a control of another size than the series.

    Example:
        >>> import jax, sdeflow as sf
        >>> train, test = sf.data.simulated_series(12, num_channels=4, num_classes=3, key=jax.random.key(0))
        >>> dynamics = sf.models.NeuralLangevinSDE(8, control_size=4, key=jax.random.key(1))
        >>> model = sf.models.SeriesModel(dynamics, channels=4, num_outputs=3, key=jax.random.key(2))
        >>> model.predict(test, key=jax.random.key(3)).shape
        (12, 3)
    """

    dynamics: Any
    encoder: eqx.nn.Linear
    readout: MLP
    solver: diffrax.AbstractSolver
    channels: int = eqx.field(static=True)
    task: str = eqx.field(static=True)
    num_outputs: int = eqx.field(static=True)
    steps_per_interval: int = eqx.field(static=True)

    def __init__(
        self,
        dynamics: AbstractEquation,
        *,
        channels: int,
        task: str = "classify",
        num_outputs: int | None = None,
        solver: diffrax.AbstractSolver | None = None,
        steps_per_interval: int = 1,
        key: PRNGKeyArray,
    ):
        if task != "classify":
            raise ValueError(f'task={task!r} is not part of this version of sdeflow; it has "classify".')
        sizes: list[Any] = [getattr(dynamics, name, None) for name in ("state_size", "control_size")]
        if not isinstance(dynamics, AbstractEquation) or None in sizes:
            raise TypeError(
                f"dynamics must be an equation with state_size and control_size, got {type(dynamics).__name__}; "
                "use sf.models.NeuralLangevinSDE(state_size, control_size=channels, key=key)."
            )
        if sizes[1] != check_size("channels", channels):
            raise ValueError(
                f"dynamics has control_size={sizes[1]} but the series have channels={channels}; build it with "
                f"control_size={channels}."
            )
        if num_outputs is None:
            raise ValueError("Say num_outputs=, the number of classes, e.g. num_outputs=len(data.classes).")
        if solver is not None and not isinstance(solver, diffrax.AbstractSolver):
            raise TypeError(f"solver must be an instance of a diffrax solver, got {solver!r}.")
        encoder, readout = jax.random.split(key)
        self.dynamics = dynamics
        self.encoder = eqx.nn.Linear(channels, sizes[0], key=encoder)
        self.readout = MLP(sizes[0], check_size("num_outputs", num_outputs), width=sizes[0], depth=1, key=readout)
        self.solver = diffrax.Euler() if solver is None else solver
        self.channels, self.task, self.num_outputs = channels, task, num_outputs
        self.steps_per_interval = check_size("steps_per_interval", steps_per_interval)

    def __call__(self, batch: SeriesBatch, *, key: PRNGKeyArray, regularisers: Sequence[Any] = ()) -> Prediction:
        """Predict a batch, as `sdeflow.training` asks for it.

        Returns:
            A `Prediction`: ``outputs`` are logits (B, K), ``states`` the hidden paths (B, L, H) at ``batch.times``,
            ``penalties`` what each regulariser charged each series, ``result`` the first failure of the batch (or
            success). A series that fails leaves the rows of the others as they are.

        Raises:
            ValueError: if the batch has another number of channels than the model.
        """
        sol = self._solve(batch, key, tuple(regularisers))
        return Prediction(jax.vmap(self.readout)(sol.final), sol.ys, None, sol.penalties, _first_failure(sol.result))

    def predict(
        self,
        series: TimeSeries,
        *,
        key: PRNGKeyArray,
        num_samples: int = 1,
        batch_size: int = 64,
        throw: bool = True,
    ) -> Float[np.ndarray, "N K"]:
        """Logits of every series of a data set, shape (N, K), in the order of the data set.

        The noise of a series depends on ``key`` and its id alone: a series has the same logits in every subset and
        every order of the data. The computation is compiled once for each bucket.

        Arguments:
            series: N series of the model's number of channels, standardised like the training data.
            key: a JAX random key.
            num_samples: paths of the noise for each series. With more than one, the logits are logarithms of the
                mean over paths of the probability of each class.
            batch_size: series in one batch.
            throw: raise if the solve of a series fails; otherwise its logits may be NaN.

        Raises:
            TypeError: if ``series`` is no TimeSeries.
            ValueError: for another number of channels, or a number out of range.
            SolveError: if the solve of a series fails, naming its id.
        """
        if not isinstance(series, TimeSeries):
            raise TypeError(
                f"series must be a TimeSeries, got {type(series).__name__}; build one with TimeSeries.from_arrays, or "
                "call the model itself on a batch."
            )
        num_samples = check_size("num_samples", num_samples)
        size = min(check_size("batch_size", batch_size), len(series))
        numbers = series_numbers(series.ids)
        logits = None
        for batch in series.batches(size, None):
            rows, real = batch.ids, batch.weight > 0
            batch = eqx.tree_at(lambda b: b.ids, batch, numbers[rows])
            outputs, result = _logits(self, batch, key, num_samples)
            okay = np.asarray(is_okay(result))
            if throw and not okay[real].all():
                bad = int(np.argmax(~okay & real))
                first = jtu.tree_map(lambda x, bad=bad: x[bad], result)
                raise SolveError(first, f"Series {series.ids[rows[bad]]!r}: {message_of(first)}")
            outputs = np.asarray(outputs)
            logits = np.empty((len(series), self.num_outputs), outputs.dtype) if logits is None else logits
            logits[rows[real]] = outputs[real]
        assert logits is not None
        return logits

    def _solve(self, batch: SeriesBatch, key: PRNGKeyArray, regularisers: tuple[Any, ...]) -> Solution:
        """Walk every series of a batch; every array of the solution leads with B."""
        self._check_channels(batch)
        walk = lambda times, values, number: self._walk(times, values, _key_of(key, number), regularisers)
        return jax.vmap(walk)(jnp.asarray(batch.times), jnp.asarray(batch.values), jnp.asarray(batch.ids))

    def _walk(self, times: Array, values: Array, key: PRNGKeyArray, regularisers: tuple[Any, ...]) -> Solution:
        """Walk one series, ``times`` (L,) and ``values`` (L, C), padded or not."""
        if times.shape[0] == 1:
            # One observation is a series that ends where it starts: a walk of no live step.
            times, values = jnp.repeat(times, 2), jnp.repeat(values, 2, axis=0)
        control = linear_control(times, values)
        return solve(
            self.dynamics,
            self.encoder(control.knots[0]),
            times,
            args=control,
            key=key if self.dynamics.is_stochastic or any(r.draws for r in regularisers) else None,
            steps_per_interval=self.steps_per_interval,
            solver=self.solver,
            regularisers=regularisers,
            throw=False,
        )

    def _check_channels(self, batch: Any) -> None:
        shape = jnp.shape(batch.values)
        if len(shape) != 3 or shape[2] != self.channels:
            raise ValueError(
                f"The model was built with channels={self.channels}, but the batch has values of shape {shape}; "
                "it needs (B, L, C) with C the channels of the model."
            )


@eqx.filter_jit
def _logits(model: SeriesModel, batch: SeriesBatch, key: PRNGKeyArray, num_samples: int) -> tuple[Array, Any]:
    """Logits (B, K) and a result for each series."""
    model._check_channels(batch)

    def one(times: Array, values: Array, number: Array) -> tuple[Array, Any]:
        def sample(key: PRNGKeyArray) -> tuple[Array, Any]:
            sol = model._walk(times, values, key, ())
            return model.readout(sol.final), sol.result

        own = _key_of(key, number)
        if num_samples == 1:
            return sample(own)
        logits, result = jax.vmap(sample)(jax.random.split(own, num_samples))
        mean = jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=0) - np.log(num_samples)
        return mean, _first_failure(result)

    return jax.vmap(one)(jnp.asarray(batch.times), jnp.asarray(batch.values), jnp.asarray(batch.ids))


def _key_of(key: PRNGKeyArray, number: Any) -> PRNGKeyArray:
    """The key of one series: a function of the key and of the series' own number."""
    return jax.random.fold_in(key, number)


def _first_failure(result: Any) -> Any:
    """The first member that is a failure, or a success if there is none."""
    first = jnp.argmax(~is_okay(result))
    return jtu.tree_map(lambda x: x[first], result)
