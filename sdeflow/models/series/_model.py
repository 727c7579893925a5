"""``SeriesModel``: what an equation driven by a time series says about the series.

    z(t_1) = Linear(X(t_1), static),    dz = f(z, X(t)) dt + g(t) dW

    classify        logits = MLP(z(t_n))
    forecast        x(t) = X(t) + MLP(z(t)) beyond the last observation, where X holds its last value
    impute          x(t) = X(t) + MLP(z(t)) at any time

X is a path through the observations, gaps filled. Every series is walked on its own times.
"""

from collections.abc import Sequence
from typing import Any, Literal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ...data import SeriesBatch, TimeSeries
from ...equations import AbstractEquation
from ...paths import hermite_control, linear_control, rectilinear_control
from ...solving import Solution, solve
from ...training import Prediction
from .._checks import check_noise, check_size, check_solver
from ..fields import MLP
from ._base import AbstractSeriesModel, Row, first_failure, key_of
from ._drive import check_series, over_series
from ._hide import hidden
from ._ode_rnn import ODERNN

_TASKS = ("classify", "forecast", "impute")
_CONTROLS = {"linear": linear_control, "hermite": hermite_control, "rectilinear": rectilinear_control}


class SeriesModel(AbstractSeriesModel):
    r"""A model of irregular time series: encoder, equation, readout.

    The first values of the (filled) series make the start of the state, the equation carries it along the series
    under the control of the observations, and the readout turns the last state into logits, or every state into what is
    to be added to the control. The noise of a series depends on the key and the id of the series, not on the batch it
    is in.

    Arguments:
        dynamics: an equation with ``state_size`` and ``control_size`` (the channels, or 0), such as
            `sdeflow.models.NeuralLangevinSDE`, or an `ODERNN`.
        channels: C, the channels of the series.
        task: "classify"; "forecast" to say what comes after the last observation, learned by hiding the end of every
            series; "impute" to say what was not observed, learned by hiding some of what was.
        num_outputs: K, the number of classes; for the other tasks how many of the channels are predicted, the first
            ones, all by default.
        num_static: s, static covariates that the start is made of, too.
        control: how the observations are joined: "linear" (straight lines), "hermite" (smooth, with a slope for a
            `NeuralCDE` everywhere), or "rectilinear" (steps that never look ahead).
        solver: a diffrax solver. By default Euler, which has strong order 1 for additive noise and reads the control at
            the observations alone, and ``diffrax.Midpoint`` for a `NeuralCDE`.
        steps_per_interval: steps between two observations.
        num_samples: S, paths of the noise for each series in training.
        noise: a standard deviation of the observations to start from, learned for each channel; for
            `sdeflow.losses.NegativeLogLikelihood`. With it, samples have it, too.
        hide: the largest share of a series that training hides, in (0, 1].
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
    log_noise: Float[Array, " K"] | None
    solver: diffrax.AbstractSolver
    channels: int = eqx.field(static=True)
    task: str = eqx.field(static=True)
    num_outputs: int = eqx.field(static=True)
    num_static: int = eqx.field(static=True)
    joined: str = eqx.field(static=True)
    steps_per_interval: int = eqx.field(static=True)
    num_samples: int = eqx.field(static=True)
    hide: float = eqx.field(static=True)

    def __init__(
        self,
        dynamics: AbstractEquation | ODERNN,
        *,
        channels: int,
        task: Literal["classify", "forecast", "impute"] = "classify",
        num_outputs: int | None = None,
        num_static: int = 0,
        control: Literal["linear", "hermite", "rectilinear"] = "linear",
        solver: diffrax.AbstractSolver | None = None,
        steps_per_interval: int = 1,
        num_samples: int = 1,
        noise: float | None = None,
        hide: float = 0.5,
        key: PRNGKeyArray,
    ):
        if task not in _TASKS:
            raise ValueError(f'task must be "classify", "forecast" or "impute", got {task!r}.')
        if control not in _CONTROLS:
            raise ValueError(f"control must be one of {', '.join(map(repr, _CONTROLS))}, got {control!r}.")
        sizes: list[Any] = [getattr(dynamics, name, None) for name in ("state_size", "control_size")]
        if not isinstance(dynamics, AbstractEquation | ODERNN) or None in sizes:
            raise TypeError(
                f"dynamics must be an equation with state_size and control_size, got {type(dynamics).__name__}; "
                "use sf.models.NeuralLangevinSDE(state_size, control_size=channels, key=key)."
            )
        if sizes[1] not in (0, check_size("channels", channels)):
            raise ValueError(
                f"dynamics has control_size={sizes[1]} but the series have channels={channels}; build it with "
                f"control_size={channels}, or 0 for one that sees the start of a series alone."
            )
        if num_outputs is None and task == "classify":
            raise ValueError("Say num_outputs=, the number of classes, e.g. num_outputs=len(data.classes).")
        outputs = channels if num_outputs is None else check_size("num_outputs", num_outputs)
        if task != "classify" and outputs > channels:
            raise ValueError(f"num_outputs={outputs} channels cannot be predicted, as the series have {channels}.")
        if not 0 < hide <= 1:
            raise ValueError(f"hide must be in (0, 1], got {hide!r}.")
        encoder, readout = jax.random.split(key)
        self.dynamics = dynamics
        self.num_static = check_size("num_static", num_static, least=0)
        self.encoder = eqx.nn.Linear(channels + num_static, sizes[0], key=encoder)
        self.readout = MLP(sizes[0], outputs, width=sizes[0], depth=1, key=readout)
        self.log_noise = None
        if noise is not None:
            self.log_noise = jnp.full(outputs, np.log(check_noise(noise)), jnp.result_type(float))
        if solver is None:
            solver = diffrax.Midpoint() if getattr(dynamics, "reads_slope", False) else diffrax.Euler()
        self.solver = check_solver(solver)
        self.channels, self.task, self.num_outputs, self.joined = channels, task, outputs, control
        self.steps_per_interval = check_size("steps_per_interval", steps_per_interval)
        self.num_samples = check_size("num_samples", num_samples)
        self.hide = float(hide)

    def __call__(self, batch: SeriesBatch, *, key: PRNGKeyArray, regularisers: Sequence[Any] = ()) -> Prediction:
        """Predict a batch, as `sdeflow.training` asks for it.

        Returns:
            A `Prediction`: ``outputs`` are logits (B, K), or values (B, L, C) at ``batch.times`` of which those that
            were hidden are to be scored (``scored``); with several samples, (B, S, ...). ``states`` are the hidden
            paths (B, L, H), ``scale`` the standard deviations of the observations, ``penalties`` what each regulariser
            charged each series, ``result`` the first failure of the batch (or success). A series that fails leaves the
            rows of the others as they are.

        Raises:
            ValueError: if the batch has another number of channels than the model.
        """
        self.check_batch(batch)
        one = lambda row: self._one(row, key, tuple(regularisers))
        outputs, sol, scored = jax.vmap(one)(Row.all(batch))
        if self.task != "classify":
            # A series of one row was walked as if it had two.
            outputs = outputs[..., : batch.times.shape[1], :]
        scale = None if self.log_noise is None else self._padded(jnp.exp(self.log_noise), 1)
        penalties = sol.penalties
        if self.num_samples > 1:
            penalties = jtu.tree_map(lambda x: x.mean(axis=1), penalties)
        return Prediction(outputs, sol.ys, None, penalties, first_failure(sol.result), scored, scale)

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
            ValueError: for another number of channels, a number out of range, or a model for another task.
            SolveError: if the solve of a series fails, naming its id.
        """
        self.check_task("predict")
        num_samples = check_size("num_samples", num_samples)
        call = lambda batch, rows: _logits(self, batch, key, num_samples)
        return over_series(call, check_series(series), batch_size, throw)

    def check_task(self, verb: str) -> None:
        """Refuse what the model was not made for.

        Raises:
            ValueError: naming the verb and the task that it needs.
        """
        task = "classify" if verb == "predict" else verb
        if self.task != task:
            raise ValueError(f'{verb} needs a model that was built with task="{task}", not "{self.task}".')

    def check_batch(self, batch: Any) -> None:
        """Refuse a batch of another number of channels or of static covariates.

        Raises:
            ValueError: naming both.
        """
        super().check_batch(batch)
        static = None if batch.static is None else jnp.shape(batch.static)[1]
        if self.num_static and static != self.num_static:
            raise ValueError(
                f"The model was built with num_static={self.num_static}, but the series have {static or 'no'} static "
                "covariates."
            )

    def draw(self, row: Row, places: Array, key: PRNGKeyArray) -> tuple[Array, Any]:
        """One path of one series at the rows ``places``, and how its solve ended."""
        sol, control = self._walk(row, key)
        return self._read(sol, control)[places, : self.num_outputs], sol.result

    def _one(self, row: Row, key: Any, charged: Any) -> tuple[Array, Solution, Any]:
        """Outputs, solution and what is to be scored of one series."""
        own, scored = key_of(key, row.number), None
        if self.task != "classify":
            own, for_hiding = jax.random.split(own)
            predicted = jnp.arange(self.channels) < self.num_outputs
            hide = hidden(self.task, (row.times.shape[0], self.channels), row.length, self.hide, for_hiding)
            row, scored = row._replace(values=jnp.where(hide, jnp.nan, row.values)), hide & row.mask & predicted

        def sample(key: PRNGKeyArray) -> tuple[Array, Solution]:
            sol, control = self._walk(row, key, charged)
            return self._read(sol, control), sol

        if self.num_samples == 1:
            return *sample(own), scored
        return *jax.vmap(sample)(jax.random.split(own, self.num_samples)), scored

    def _walk(self, row: Row, key: PRNGKeyArray, regularisers: tuple[Any, ...] = ()) -> tuple[Solution, Any]:
        """Walk one series, padded or not; and its control."""
        row = row.walkable()
        times, values = row.times, row.values
        control = _CONTROLS[self.joined](times, values)
        first = control.knots[0] if self.num_static == 0 else jnp.concatenate([control.knots[0], row.static])
        start = self.encoder(first)
        if isinstance(self.dynamics, ODERNN):
            if regularisers:
                raise ValueError("An ODERNN takes no regularisers, as it is solved anew between any two observations.")
            return self.dynamics.solution(start, times, values, self.solver, self.steps_per_interval), control
        sol = solve(
            self.dynamics,
            self.dynamics.start_from(start) if hasattr(self.dynamics, "start_from") else start,
            times,
            args=control,
            key=key if self.dynamics.is_stochastic or any(r.draws for r in regularisers) else None,
            steps_per_interval=self.steps_per_interval,
            solver=self.solver,
            regularisers=regularisers,
            throw=False,
        )
        return sol, control

    def _read(self, sol: Solution, control: Any) -> Array:
        """Logits, or the values of all channels at all times; those that are not predicted are the control's."""
        if self.task == "classify":
            return self.readout(sol.final)
        return control.knots + self._padded(jax.vmap(self.readout)(sol.ys), 0)

    def _padded(self, x: Array, value: float) -> Array:
        """One entry for every channel, from one for each that is predicted."""
        fill = [(0, 0)] * (x.ndim - 1) + [(0, self.channels - self.num_outputs)]
        return x if self.task == "classify" else jnp.pad(x, fill, constant_values=value)


@eqx.filter_jit
def _logits(model: SeriesModel, batch: SeriesBatch, key: PRNGKeyArray, num_samples: int) -> tuple[Array, Any]:
    """Logits (B, K) and a result for each series."""
    model.check_batch(batch)

    def one(row: Row) -> tuple[Array, Any]:
        def sample(key: PRNGKeyArray) -> tuple[Array, Any]:
            sol, _ = model._walk(row, key)
            return model.readout(sol.final), sol.result

        own = key_of(key, row.number)
        if num_samples == 1:
            return sample(own)
        logits, result = jax.vmap(sample)(jax.random.split(own, num_samples))
        mean = jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=0) - np.log(num_samples)
        return mean, first_failure(result)

    return jax.vmap(one)(Row.all(batch))
