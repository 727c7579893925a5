"""The jobs of ``python -m sdeflow demo``: each yields the sentences to print and leaves a figure behind."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from . import plotting
from .data import TimeSeries, japanese_vowels, simulated_series
from .models import NeuralLangevinSDE, SeriesModel
from .training import CrossEntropy, FitResult, fit

_DROPPED = 0.5
_SHOWN_CLASSES = 3
_SHOWN_SERIES = 3


def series(out: Path, *, seed: int = 0, quick: bool = False) -> Iterator[str]:
    """Classify irregular series, half of whose values are missing, by a neural Langevin equation.

    Arguments:
        out: the directory of the figure; made if it is not there.
        seed: decides what is dropped, how the data are split, the initial weights and the noise.
        quick: few steps on a small simulated data set.

    Raises:
        OSError: if the figure cannot be written.
    """
    start = time.perf_counter()
    drop, simulate, split, build, train_key, test_key = jax.random.split(jax.random.key(seed), 6)
    out.mkdir(parents=True, exist_ok=True)
    train, test, name = _load(simulate, quick)
    yield f"{name}: {len(train)} series to learn from and {len(test)} to be tested on."
    train, test = (part.drop_observations(_DROPPED, key=drop) for part in (train, test))
    fitting, held_out = train.split(0.85, key=split)
    fitting = fitting.standardise()
    held_out, test = held_out.standardise(like=fitting), test.standardise(like=fitting)
    yield f"Half of the values dropped at random, in each channel on its own. {fitting}"

    size, steps = (8, 30) if quick else (32, 800)
    channels, classes = train.num_channels, len(train.classes or ())
    equation, readout = jax.random.split(build)
    dynamics = NeuralLangevinSDE(size, control_size=channels, key=equation)  # pyright: ignore[reportCallIssue]
    model = SeriesModel(dynamics, channels=channels, num_outputs=classes, key=readout)
    yield f"Training dz = gamma(zeta(z, X)) dt + sigma(t) dW with a state of {size} numbers, at most {steps} steps."
    fitted = fit(
        model,
        fitting,
        CrossEntropy(),
        optim=optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(3e-3, steps), weight_decay=0.01)
        ),
        steps=steps,
        batch_size=32,
        key=train_key,
        validation=held_out,
        patience=30,
    )
    yield f"Trained: {fitted.message} Best validation loss after step {fitted.best_step}."

    logits = fitted.model.predict(test, key=test_key, num_samples=8)
    accuracy = float((logits.argmax(axis=1) == test.labels).mean())
    trivial = float((nearest_centroid(fitting, test) == test.labels).mean())
    yield f"Test accuracy {accuracy:.3f}; the nearest class centroid of the observed means has {trivial:.3f}."
    path = out / "series.png"
    _draw(fitted, test, path, test_key)
    yield f"Done in {time.perf_counter() - start:.0f} s. The figure: {path}"


JOBS: dict[str, Callable[..., Iterator[str]]] = {"series": series}


def nearest_centroid(train: TimeSeries, test: TimeSeries) -> np.ndarray:
    """The class whose mean of per-series, per-channel means of what was observed is nearest; shape (N,)."""
    means = [np.stack([_observed_mean(x) for x in part.values]) for part in (train, test)]
    assert train.labels is not None
    centres = np.stack([means[0][train.labels == k].mean(axis=0) for k in np.unique(train.labels)])
    return np.unique(train.labels)[((means[1][:, None] - centres) ** 2).sum(axis=2).argmin(axis=1)]


def _observed_mean(values: np.ndarray) -> np.ndarray:
    observed = ~np.isnan(values)
    # The data are standardised: a channel without any observation is expected at 0.
    return np.where(observed, values, 0).sum(axis=0) / np.maximum(observed.sum(axis=0), 1)


def _load(key: Any, quick: bool) -> tuple[TimeSeries, TimeSeries, str]:
    if quick:
        return *simulated_series(60, num_test=30, lengths=(8, 12), missing=0.0, key=key), "Simulated series"
    try:
        return *japanese_vowels(), "Japanese Vowels"
    except FileNotFoundError as error:
        return *simulated_series(300, missing=0.0, key=key), f"{error} Simulated series take their place"


def _draw(fitted: FitResult, test: TimeSeries, path: Path, key: Any) -> None:
    """What was observed, what the state made of it, and how training went."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    raw, latent, training = figure.subplots(1, 3)
    labels = test.labels
    assert labels is not None
    assert test.classes is not None
    chosen = [i for k in range(_SHOWN_CLASSES) for i in np.flatnonzero(labels == k)[:_SHOWN_SERIES]]
    shown = test[chosen]
    names = [f"class {test.classes[k]}" for k in labels[chosen]]
    times = [shown.to_user_time(t) for t in shown.times]

    plotting.trajectories(times, shown.values, ax=raw, labels=names, marker=".", linestyle="none")
    raw.set(title="Observed values, one channel of several", xlabel="time")

    states = fitted.model(shown.batch(np.arange(len(shown))), key=key).states
    paths = [np.asarray(z[:n]) for z, n in zip(states, shown.lengths)]
    plotting.trajectories(times, _principal(paths), ax=latent, labels=names)
    latent.set(title="Hidden state, first principal component", xlabel="time")

    history = fitted.history
    training.plot(history["step"], history["loss"], color="C7", linewidth=0.8, label="training loss")
    training.plot(history["validation_step"], history["validation_loss"], color="C0", label="validation loss")
    training.set(title="Training", xlabel="step", yscale="log")
    share = training.twinx()
    share.plot(history["validation_step"], history["validation_accuracy"], color="C1", label="validation accuracy")
    share.set(ylim=(0, 1.02))
    training.legend(handles=[*training.lines, *share.lines])
    figure.savefig(path, dpi=120)


def _principal(paths: list[np.ndarray]) -> list[np.ndarray]:
    """The component of each path along the direction in which all of them vary most."""
    everything = np.concatenate(paths)
    centre = everything.mean(axis=0)
    direction = np.linalg.svd(everything - centre, full_matrices=False)[2][0]
    return [(x - centre) @ direction for x in paths]
