"""The job "samplers": a diffusion model of digits, and gradients through its sampler."""

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from ..data import Samples, SamplesBatch
from ..diffusion import (
    DDIM,
    EDM,
    AbstractDenoiser,
    EDMLoss,
    Precondition,
    UniPC,
    bits_per_dim,
    invert,
    log_prob,
    sample,
)
from ..training import FitResult, fit
from ._ending import InputError, finished

_LEVELS = 17
_SIDE = 8
_EVALUATIONS = 10  # Of the network, for a sample.
_FINE = 20  # Likewise, for noise that is to be changed: it must lead back to the digit that it came from.
_EDITS = {0: 6, 1: 7, 2: 3, 3: 8, 4: 9, 5: 6, 6: 8, 7: 1, 8: 3, 9: 4}
_SIGMAS = (0.02, 20.0)


def samplers(out: Path, *, seed: int = 2, quick: bool = False) -> Iterator[str]:
    """Learn digits; sample, score, invert and edit them, and ask for classes by gradients through the sampler.

    Arguments:
        out: the directory of the figure; made if it is not there.
        seed: decides what is held out, the initial weights and the noise.
        quick: a small network and few updates.

    Raises:
        InputError: where scikit-learn, which carries the digits, is missing.
        OSError: if the figure cannot be written.
    """
    start = time.perf_counter()
    key, for_split, for_model, for_reader, for_noise = jax.random.split(jax.random.key(seed), 5)
    digits, test = _load().split(0.8, key=for_split)
    out.mkdir(parents=True, exist_ok=True)
    yield (
        f"The digits of scikit-learn, {_SIDE} x {_SIDE} pixels in {_LEVELS} levels: {len(digits)} to learn from and "
        f"{len(test)} to test."
    )
    scale = _Scale.of(digits)
    width, depth, steps = (64, 1, 300) if quick else (192, 3, 5000)
    yield f"Training a network of {depth} blocks of {width} to take noise away, for {steps} steps."
    fitted = _train(digits, test, scale, width, depth, steps, for_model)
    model = fitted.model
    losses = fitted.history["validation_loss"]
    yield f"{fitted.message[0].upper()}{fitted.message[1:]} Loss of test digits: {losses[0]:.3f} -> {losses[-1]:.3f}."

    noise = model.schedule.sample_prior((60, _SIDE**2), key=for_noise)
    exact, drawn = _drawn(model, noise, 200), _drawn(model, noise, _EVALUATIONS)
    miss = lambda x: float(jnp.sqrt(jnp.mean((x - exact) ** 2))) * (_LEVELS / 2)
    yield (
        f"Sampling with {_EVALUATIONS} evaluations of the network: `sample` ends {miss(drawn):.2f} levels from where "
        f"the equation leads (root mean square), DDIM {miss(_drawn(model, noise, _EVALUATIONS, DDIM())):.2f}."
    )
    count = 20 if quick else 100
    ours, normal = _bits(model, test[:count], digits, scale, key)
    yield (
        f"Likelihood of {count} test digits: {ours:.2f} bits a pixel; a normal law with the mean and the covariance of "
        f"the digits: {normal:.2f}; no model: {np.log2(_LEVELS):.2f}."
    )

    wanted, known = _classifier(digits, scale, 150 if quick else 600, for_reader), scale.enter(digits.values)
    targets = np.array(list(_EDITS.values()))
    originals = scale.enter(np.stack([test.values[test.args == k][0] for k in _EDITS]))
    inverted = _inverted(model, originals)
    again = _drawn(model, inverted, _FINE)
    yield (
        f"Inverting a test digit of every class and sampling again, {_FINE} evaluations each: "
        f"{float(jnp.sqrt(jnp.mean((again - originals) ** 2))) * (_LEVELS / 2):.2f} levels from the digit."
    )
    updates = 10 if quick else 60
    edited = _drawn(model, _steer(model, wanted, inverted, targets, updates), _FINE)
    fresh, classes = noise[:10], np.arange(10)
    asked = _drawn(model, _steer(model, wanted, fresh, classes, updates), _FINE)
    unasked = _drawn(model, fresh, _FINE)
    nearest = lambda x: digits.args[((np.asarray(x)[:, None] - known) ** 2).sum(axis=2).argmin(axis=1)]
    share = lambda x, target: f"{int((nearest(x) == target).sum())} of 10"
    yield (
        f"Changing the noise by {updates} gradients through the sampler, towards what a classifier takes for another "
        "digit. Nearest, of all digits to learn from, to one of the class that was wanted:"
    )
    yield f"  edited test digits: {share(again, targets)} before, {share(edited, targets)} after"
    yield f"  one of each class from noise: {share(unasked, classes)} before, {share(asked, classes)} after"

    drawn, originals, again, edited, unasked, asked = map(
        scale.leave, (drawn, originals, again, edited, unasked, asked)
    )
    shown = _Shown(drawn, originals, again, edited, unasked, asked, targets, fitted.history)
    path = out / "samplers.png"
    yield finished(start, path, lambda: _draw(shown, path))


# Data


def _load() -> Samples:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InputError('The digits come with scikit-learn: pip install "sdeflow[demo]".') from error
    values, labels = load_digits(return_X_y=True)
    return Samples(values.astype(np.float32), np.asarray(labels))


@dataclasses.dataclass(frozen=True)
class _Scale:
    """From levels, 0 to 16 with a share of the next one, to centred numbers within two units, and back."""

    mean: Float[np.ndarray, " pixels"]
    deviation: float

    @classmethod
    def of(cls, digits: Samples) -> "_Scale":
        units = 2 * (digits.values + 0.5) / _LEVELS
        mean = units.mean(axis=0)
        return cls(mean, round(float((units - mean).std()), 3))

    def enter(self, levels: Any, share: Any = 0.5) -> Float[np.ndarray, "rows pixels"]:
        return (2 * (levels + share) / _LEVELS - self.mean).astype(np.float32)

    def leave(self, x: Any) -> Float[np.ndarray, "rows pixels"]:
        return (np.asarray(x) + self.mean) * _LEVELS / 2 - 0.5


@dataclasses.dataclass(frozen=True)
class _Spread:
    """Digits with a random share of the next level, another one each time: their law has a density."""

    digits: Samples
    scale: _Scale

    def batches(self, size: int, key: PRNGKeyArray) -> Iterator[SamplesBatch]:
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        for batch in self.digits.batches(size, key=key):
            values = self.scale.enter(batch.values, rng.uniform(size=batch.values.shape))
            yield dataclasses.replace(batch, values=values)


# Models


class _Network(eqx.Module):
    """Residual blocks that the level of the noise modulates."""

    first: eqx.nn.Linear
    blocks: list[eqx.nn.Linear]
    levels: list[eqx.nn.Linear]
    last: eqx.nn.Linear

    def __init__(self, width: int, depth: int, *, key: PRNGKeyArray):
        keys = iter(jax.random.split(key, 2 * depth + 3))
        self.first = eqx.nn.Linear(_SIDE**2, width, key=next(keys))
        self.blocks = [eqx.nn.Linear(width, width, key=next(keys)) for _ in range(depth)]
        self.levels = [eqx.nn.Linear(16, 2 * width, key=next(keys)) for _ in range(depth + 1)]
        # At first all that is added is nothing, so that a normal law is where learning starts.
        self.last = jax.tree.map(jnp.zeros_like, eqx.nn.Linear(width, _SIDE**2, key=next(keys)))

    def __call__(self, label: Array, y: Array, args: Any) -> Array:
        waves = label * 2.0 ** jnp.arange(-1.0, 7.0)
        level = jnp.concatenate([jnp.sin(waves), jnp.cos(waves)])
        h = self.first(y)
        for block, modulation in zip(self.blocks, self.levels):
            normed = (h - h.mean()) / jnp.sqrt(h.var() + 1e-5)
            h = h + block(jax.nn.silu(_modulated(normed, modulation(level))))
        return self.last(_modulated(h, self.levels[-1](level)))


def _modulated(h: Array, by: Array) -> Array:
    gain, shift = jnp.split(by, 2)
    return h * (1 + gain) + shift


def _train(
    digits: Samples, test: Samples, scale: _Scale, width: int, depth: int, steps: int, key: PRNGKeyArray
) -> FitResult:
    for_network, for_training = jax.random.split(key)
    model = Precondition(
        network=_Network(width, depth, key=for_network), schedule=EDM(*_SIGMAS), sigma_data=scale.deviation
    )
    optim = optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=0.01)
    return fit(
        model,
        _Spread(digits, scale),
        EDMLoss(mean=-0.5, deviation=1.5),
        optim=optax.chain(optax.clip_by_global_norm(1.0), optim),
        steps=steps,
        batch_size=128,
        key=for_training,
        validation=_Spread(test, scale),
        validate_every=max(1, steps // 20),
    )


def _classifier(digits: Samples, scale: _Scale, steps: int, key: PRNGKeyArray) -> Any:
    """A small network that reads digits."""
    for_model, for_training = jax.random.split(key)
    model = eqx.nn.MLP(_SIDE**2, 10, 64, 2, jax.nn.silu, key=for_model)
    optim, data = optax.adam(optax.cosine_decay_schedule(3e-3, steps)), _Spread(digits, scale)
    options: dict[str, Any] = {"optim": optim, "steps": steps, "batch_size": 128, "key": for_training}
    return fit(model, data, _misread, progress=False, **options).model


def _misread(model: Any, batch: SamplesBatch, key: PRNGKeyArray, step: Any) -> tuple[Array, dict]:
    # With noise that hides details: gradients then change what a digit is made of, and not what fools a network.
    x = batch.values + 0.4 * jax.random.normal(key, batch.values.shape)
    return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), batch.args).mean(), {}


# What is done with them


@eqx.filter_jit
def _drawn(model: AbstractDenoiser, noise: Array, evaluations: int, solver: Any = None) -> Array:
    return jax.vmap(lambda x: sample(model, x, solver=solver, num_steps=evaluations))(noise)


@eqx.filter_jit
def _inverted(model: AbstractDenoiser, x: Any) -> Array:
    return jax.vmap(lambda x: invert(model, jnp.asarray(x), solver=UniPC(3), num_steps=_FINE))(x)


@eqx.filter_jit
def _steer(model: AbstractDenoiser, classifier: Any, noise: Array, targets: Any, updates: int) -> Array:
    """Noise near the given one whose samples are of the classes that are wanted."""
    size = model.schedule.prior_std()
    optim = optax.adam(0.05)

    def cost(shift: Array, noise: Array, target: Array) -> Array:
        x = sample(model, noise + size * shift, solver=UniPC(3), num_steps=_FINE)
        wrong = optax.softmax_cross_entropy_with_integer_labels(classifier(x), target)
        return wrong + 0.02 * jnp.sum(shift**2)

    def update(carry: Any, _: None) -> Any:
        shift, state = carry
        moves, state = optim.update(jax.vmap(jax.grad(cost))(shift, noise, jnp.asarray(targets)), state)
        return (optax.apply_updates(shift, moves), state), None

    shift = jnp.zeros_like(noise)
    (shift, _), _ = jax.lax.scan(update, (shift, optim.init(shift)), None, updates)
    return noise + size * shift


def _bits(
    model: AbstractDenoiser, test: Samples, digits: Samples, scale: _Scale, key: PRNGKeyArray
) -> tuple[float, float]:
    """Bits a pixel, of the model and of a normal law; bounds from above, as the share of a level is random."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    x, seen = (scale.enter(part.values, rng.uniform(size=part.values.shape)) for part in (test, digits))
    one = lambda x: log_prob(model, x, num_steps=20)
    found = np.asarray(jax.jit(lambda x: jax.lax.map(one, x, batch_size=20))(x), np.float64)
    values, axes = np.linalg.eigh(np.cov(seen.astype(np.float64).T))
    normal = -0.5 * (((x - seen.mean(axis=0)) @ axes) ** 2 / values + np.log(2 * np.pi * values)).sum(axis=1)
    bits = lambda nats: float(bits_per_dim(nats.mean(), _SIDE**2, levels=_LEVELS, width=2))
    return bits(found), bits(normal)


# The figure


@dataclasses.dataclass(frozen=True)
class _Shown:
    """What the figure shows, in levels."""

    drawn: np.ndarray
    originals: np.ndarray
    again: np.ndarray
    edited: np.ndarray
    unasked: np.ndarray
    asked: np.ndarray
    targets: np.ndarray
    history: dict[str, np.ndarray]


def _draw(shown: _Shown, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 3.6), layout="constrained")
    drawn, changed, training = figure.subplots(1, 3, width_ratios=(1.0, 1.3, 0.7))
    tile = lambda rows: np.block([[np.pad(x.reshape(_SIDE, _SIDE), 1) for x in row] for row in rows])
    style: dict[str, Any] = {"cmap": "gray_r", "vmin": 0, "vmax": _LEVELS - 1}
    drawn.imshow(tile(shown.drawn.reshape(6, 10, -1)), **style)
    drawn.set(title=f"Drawn with {_EVALUATIONS} evaluations of the network", xticks=[], yticks=[])
    rows = (shown.originals, shown.again, shown.edited, shown.unasked, shown.asked)
    changed.imshow(tile(rows), **style)
    side = _SIDE + 2
    names = ("test digits", "inverted and\nsampled again", f"their noise changed\ntowards {_listed(shown.targets)}")
    names += ("from noise", "the noise changed\ntowards 0, 1, ... 9")
    changed.set_yticks(side * (np.arange(len(rows)) + 0.5) - 0.5, names, fontsize="small")
    changed.tick_params(length=0)
    changed.set(title="Gradients through the sampler", xticks=[])
    history = shown.history
    training.plot(history["step"], history["loss"], color="C7", linewidth=0.5, alpha=0.6, label="training")
    training.plot(history["validation_step"], history["validation_loss"], color="C0", label="test digits")
    training.set(title="Training", xlabel="step", ylabel="loss")
    training.set_ylim(0.9 * history["validation_loss"].min(), 1.1)
    training.legend(frameon=False)
    figure.savefig(path, dpi=120)


def _listed(classes: np.ndarray) -> str:
    return " ".join(f"{k}" for k in classes)
