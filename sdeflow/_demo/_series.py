"""The job "series": classify real speech of which half is missing."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import numpy as np
import optax
from jaxtyping import Array, Int, PRNGKeyArray

from .. import plotting
from ..data import SeriesBatch, TimeSeries, japanese_vowels, simulated_series
from ..models import NeuralLangevinSDE, SeriesModel, Thinned
from ..training import CrossEntropy, FitResult, fit
from ._ending import finished

_SHOWN_CLASSES = 3
_SHOWN_SERIES = 4


def series(out: Path, *, seed: int = 2, quick: bool = False) -> Iterator[str]:
    """Classify series of which half of the values are missing, by a neural Langevin equation.

    Arguments:
        out: the directory of the figure; made if it is not there.
        seed: decides what is missing, how the data are split, the initial weights and the noise; the default is not
            the best of several but one near their mean.
        quick: a few steps on a small simulated data set.

    Raises:
        OSError: if the figure cannot be written.
    """
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    key = jax.random.key(seed)
    for_data, for_model, for_training, for_test = jax.random.split(key, 4)
    name, fitting, held_out, test = _load(for_data, quick)
    yield (
        f"{name}, half of the values dropped at random in each channel: {len(fitting)} series to learn from, "
        f"{len(held_out)} to validate and {len(test)} to test; {test.num_channels} channels, "
        f"{test.lengths.min()} to {test.lengths.max()} time steps, {len(test.classes or ())} classes."
    )
    size, steps = (8, 20) if quick else (32, 1000)
    yield f"Training dz = gamma(zeta(z, X)) dt + sigma(t) dW, a state of {size} numbers, for at most {steps} steps."
    fitted = _train(fitting, held_out, size, steps, for_model, for_training)
    yield f"{fitted.message[0].upper()}{fitted.message[1:]} The best model is that of step {fitted.best_step}."

    logits = fitted.model.predict(test, key=for_test, num_samples=8)
    share = lambda found: float((found == test.labels).mean())
    yield (
        f"Test accuracy: {share(logits.argmax(axis=1)):.3f}. The nearest class centroid of the means of what was "
        f"observed: {share(nearest_centroid(fitting, test)):.3f}."
    )
    path = out / "series.png"
    yield finished(start, path, lambda: _draw(fitted, test, path, for_test))


def nearest_centroid(train: TimeSeries, test: TimeSeries) -> Int[np.ndarray, " N"]:
    """The class of which the mean, over series, of each channel's mean of what was observed is nearest."""
    assert train.labels is not None
    train_means, test_means = (np.stack([_observed_mean(x) for x in part.values]) for part in (train, test))
    classes = np.unique(train.labels)
    centres = np.stack([train_means[train.labels == k].mean(axis=0) for k in classes])
    return classes[((test_means[:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)]


def _observed_mean(values: np.ndarray) -> np.ndarray:
    observed = ~np.isnan(values)
    # The data are standardised: 0 is the best guess for a channel of which nothing was observed.
    return np.where(observed, values, 0).sum(axis=0) / np.maximum(observed.sum(axis=0), 1)


def _load(key: PRNGKeyArray, quick: bool) -> tuple[str, TimeSeries, TimeSeries, TimeSeries]:
    """What the data are, and their three parts, standardised alike."""
    simulate, drop_train, drop_test, split = jax.random.split(key, 4)
    if quick:
        name, (train, test) = "Simulated series", simulated_series(40, lengths=(8, 12), missing=0.0, key=simulate)
    else:
        try:
            name, (train, test) = "Japanese Vowels", japanese_vowels()
        except FileNotFoundError as error:
            name = f"{error} Until then simulated series take their place"
            train, test = simulated_series(300, missing=0.0, key=simulate)
    # One bucket: compiling for a second one would take longer than the padding that it saves.
    train = train.drop_observations(0.5, key=drop_train).with_buckets(int(max(train.lengths.max(), test.lengths.max())))
    fitting, held_out = train.split(0.85, key=split)
    fitting, test = fitting.standardise(), test.drop_observations(0.5, key=drop_test).with_buckets(like=train)
    return name, fitting, held_out.standardise(like=fitting), test.standardise(like=fitting)


def _train(
    fitting: TimeSeries, held_out: TimeSeries, size: int, steps: int, key: PRNGKeyArray, training_key: PRNGKeyArray
) -> FitResult:
    channels, classes = fitting.num_channels, len(fitting.classes or ())
    for_dynamics, for_model = jax.random.split(key)
    dynamics = NeuralLangevinSDE(size, control_size=channels, key=for_dynamics)
    model = SeriesModel(dynamics, channels=channels, num_outputs=classes, key=for_model)
    rate = optax.cosine_decay_schedule(3e-3, steps)
    return fit(
        model,
        Thinned(fitting, 0.8),
        CrossEntropy(),
        optim=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=0.01)),
        steps=steps,
        batch_size=32,
        key=training_key,
        validation=held_out,
        validate_every=max(1, steps // 20),
        patience=10,
    )


def _draw(fitted: FitResult, test: TimeSeries, path: Path, key: PRNGKeyArray) -> None:
    """What was observed, what the state makes of it, and how training went."""
    from matplotlib.figure import Figure

    assert test.labels is not None
    assert test.classes is not None
    figure = Figure(figsize=(14, 4.2), layout="constrained")
    observed, latent, training = figure.subplots(1, 3)
    shown = test[[i for k in range(_SHOWN_CLASSES) for i in np.flatnonzero(test.labels == k)[:_SHOWN_SERIES]]]
    labels = [f"class {test.classes[k]}" for k in shown.labels]  # pyright: ignore[reportOptionalIterable]
    times = [shown.to_user_time(t, i) for i, t in enumerate(shown.times)]

    plotting.trajectories(times, shown.values, ax=observed, labels=labels, marker="o", markersize=3, linewidth=0.8)
    observed.set(title="Observed: one channel, half of it missing", xlabel="time", ylabel="standardised value")

    states = _states(fitted.model, shown.batch(np.arange(len(shown))), key)
    paths = [np.asarray(z)[:n] for z, n in zip(states, shown.lengths)]
    plotting.trajectories(times, _principal(paths), ax=latent, labels=labels)
    latent.set(title="Hidden state: its first principal component", xlabel="time")

    history = fitted.history
    training.plot(history["step"], history["loss"], color="C7", linewidth=0.8, label="training loss")
    training.plot(history["validation_step"], history["validation_loss"], color="C0", label="validation loss")
    training.set(title="Training", xlabel="step", ylabel="cross entropy", yscale="log")
    share = training.twinx()
    share.plot(history["validation_step"], history["validation_accuracy"], color="C1", label="validation accuracy")
    share.set(ylim=(0, 1.02))
    training.legend(handles=[*training.lines, *share.lines], loc="lower left")
    figure.savefig(path, dpi=120)


@eqx.filter_jit
def _states(model: SeriesModel, batch: SeriesBatch, key: PRNGKeyArray) -> Array:
    return model(batch, key=key).states


def _principal(paths: list[Any]) -> list[Any]:
    """Each path along the direction in which the points of all of them vary most."""
    points = np.concatenate(paths)
    centre = points.mean(axis=0)
    direction = np.linalg.svd(points - centre, full_matrices=False)[2][0]
    return [(path - centre) @ direction for path in paths]
