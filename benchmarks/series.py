"""Claim: the stable classes classify irregular series at least as well as their peers, and train much faster.

Accuracy. Three data sets that ship inside aeon, on their official split: BasicMotions (40 and 40 series, 6 channels,
100 steps, 4 classes), JapaneseVowels (270 and 370, 12, 7 to 29, 9) and PickupGestureWiimoteZ (50 and 50, 1, 29 to 361,
10). A share of the values is dropped at random, from each channel by itself, anew for every seed; the same for all
methods.

    neural methods    a state of 32 numbers, networks of width 32, one Euler step (midpoint for the controlled equation)
                      between two observations, in the pure mode: the same updates of AdamW in batches of 32 with a
                      cosine schedule, and in every epoch another share of the observations hidden. Two first rates are
                      tried with a fifth of the training data held out, by one seed that is not reported, at half of the
                      values missing; the one with the lower cross entropy there trains on all training data. The last
                      parameters count, and 8 paths of the noise. The runs of a method train side by side in one
                      program.
    MiniRocket        aeon's, with its own defaults; gaps filled by straight lines, series stretched to one length

Speed. One training step (value and gradient) of a Langevin model, batch 64, a state of 32, 100 Euler steps, two
networks of width 64 and depth 2: sdeflow, torchsde on the grid 0, 1, ..., 100 (the steps are then exact in float32; on
[0, 1] it is many times slower) and diffrax with its own Brownian tree, all with the same networks, in one process.

``--full`` takes five seeds and 0, 30, 50 and 70 % missing, and writes every figure to benchmarks/series.csv.
"""

import csv
import dataclasses
import importlib.util
import itertools
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import optax

import sdeflow as sf
from sdeflow import models
from sdeflow.data import TimeSeries, read_ts

from . import _harness as harness
from ._harness import Claim, Method, Options, Row, Spread
from ._problems import layers, network

STEPS = {"BasicMotions": 300, "JapaneseVowels": 500, "PickupGestureWiimoteZ": 120}
SIZE, RATES, SWEEP_SEED = 32, (3e-3, 1e-2), 100
#: the accuracy to reach, of the spec's miniature: data, share missing, method -> mean
MARKS = {
    ("BasicMotions", 0.0): {"Langevin": 1.0, "linear noise": 1.0, "geometric": 0.95},
    ("BasicMotions", 0.7): {"Langevin": 0.875, "linear noise": 0.875, "geometric": 0.75},
    ("JapaneseVowels", 0.0): {"Langevin": 0.970, "linear noise": 0.959, "geometric": 0.884},
}

DYNAMICS: dict[str, Callable[..., Any]] = {
    "naive": lambda channels, key: models.NeuralSDE(SIZE, width=SIZE, key=key),
    "naive, control": lambda channels, key: models.NeuralSDE(SIZE, control_size=channels, width=SIZE, key=key),
    "Langevin": lambda channels, key: models.NeuralLangevinSDE(SIZE, control_size=channels, width=SIZE, key=key),
    "linear noise": lambda channels, key: models.NeuralLinearNoiseSDE(SIZE, control_size=channels, width=SIZE, key=key),
    "geometric": lambda channels, key: models.NeuralGeometricSDE(SIZE, control_size=channels, width=SIZE, key=key),
    "neural CDE": lambda channels, key: models.NeuralCDE(SIZE, control_size=channels, width=SIZE, key=key),
    "ODE-RNN": lambda channels, key: models.ODERNN(SIZE, control_size=channels, width=SIZE, key=key),
}
ROCKET = "MiniRocket"
REFERENCE = "naive, control"


@dataclasses.dataclass(frozen=True)
class Figure:
    """What came of one method on one data set, share missing and seed."""

    data: str
    missing: float
    method: str
    seed: int
    rate: float
    accuracy: float
    seconds: float


def load(name: str) -> tuple[TimeSeries, TimeSeries]:
    """The official split, in one bucket: compiling for a second one takes longer than the padding that it saves.

    Raises:
        ModuleNotFoundError: without aeon.
    """
    spec = importlib.util.find_spec("aeon")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the data come with aeon: make bench installs it")
    folder = Path(next(iter(spec.submodule_search_locations))) / "datasets" / "data" / name
    train = read_ts(folder / f"{name}_TRAIN.ts")
    test = read_ts(folder / f"{name}_TEST.ts", like=train)
    longest = int(max(train.lengths.max(), test.lengths.max()))
    return train.with_buckets(longest), test.with_buckets(longest)


def dropped(parts: tuple[TimeSeries, TimeSeries], missing: float, seed: int) -> tuple[TimeSeries, TimeSeries]:
    """Both parts with a share of their values missing, standardised like the first."""
    keys = jax.random.split(jax.random.key(seed))
    train, test = (x.drop_observations(missing, key=key) if missing else x for x, key in zip(parts, keys))
    return train.standardise(), test.standardise(like=train)


def init(method: str, data: TimeSeries, seed: int) -> models.SeriesModel:
    """A model to start from."""
    for_dynamics, for_model = jax.random.split(jax.random.key(seed))
    channels, classes = data.num_channels, len(data.classes or ())
    return models.SeriesModel(
        DYNAMICS[method](channels, for_dynamics), channels=channels, num_outputs=classes, key=for_model
    )


def trained(method: str, jobs: list[tuple[TimeSeries, int, float]], steps: int) -> list[models.SeriesModel]:
    """Models for some (data, seed, first rate), trained side by side: one program steps them all."""
    stack = lambda *leaves: jnp.stack([jnp.asarray(x) for x in leaves])
    starts = [eqx.partition(init(method, data, seed), eqx.is_inexact_array) for data, seed, _ in jobs]
    params, static = jax.tree.map(stack, *[p for p, _ in starts]), starts[0][1]
    schedule = optax.cosine_decay_schedule(1.0, steps)
    direction = optax.chain(
        optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.add_decayed_weights(0.01), optax.scale(-1.0)
    )

    def one(params: Any, state: Any, batch: Any, key: Any, rate: Any, step: Any) -> Any:
        loss = lambda p: sf.losses.CrossEntropy()(eqx.combine(p, static), batch, jax.random.fold_in(key, step), step)[0]
        grads = jax.grad(loss)(params)
        moves, state = direction.update(grads, state, params)
        moves = jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), rate * schedule(step) * x, 0), moves)
        return optax.apply_updates(params, moves), state

    update = jax.jit(jax.vmap(one, in_axes=(0, 0, 0, 0, 0, None)), donate_argnums=(0, 1))
    state = jax.vmap(direction.init)(params)
    keys = jnp.stack([jax.random.fold_in(jax.random.key(seed), 1) for _, seed, _ in jobs])
    rates = jnp.array([rate for *_, rate in jobs])
    sources = [batches(data, seed) for data, seed, _ in jobs]
    for step in range(steps):
        batch = jax.tree.map(lambda *xs: np.stack(xs), *[next(source) for source in sources])
        params, state = update(params, state, batch, keys, rates, step)
    return [eqx.combine(jax.tree.map(lambda x, i=i: x[i], params), static) for i in range(len(jobs))]


def batches(data: TimeSeries, seed: int) -> Any:
    """Batches without end, of which every epoch hides another share of the observations."""
    thinned, key = models.Thinned(data, 0.5), jax.random.fold_in(jax.random.key(seed), 2)
    for epoch in itertools.count():
        yield from thinned.batches(32, jax.random.fold_in(key, epoch))


def accuracy(model: models.SeriesModel, data: TimeSeries, seed: int) -> float:
    """The share of the data that is told right."""
    logits = model.predict(data, key=jax.random.fold_in(jax.random.key(seed), 3), num_samples=8, throw=False)
    return float((logits.argmax(axis=1) == data.labels).mean())


def rocket(train: TimeSeries, test: TimeSeries, seed: int) -> float:
    """The same for MiniRocket."""
    from aeon.classification.convolution_based import MiniRocketClassifier

    longest = max(9, int(max(train.lengths.max(), test.lengths.max())))

    def table(data: TimeSeries) -> np.ndarray:
        out = np.zeros((len(data), data.num_channels, longest))
        for i, (t, x) in enumerate(zip(data.times, data.values)):
            new = np.linspace(t[0], t[-1], longest)
            for c, column in enumerate(x.T):
                seen = ~np.isnan(column)
                out[i, c] = np.interp(new, t[seen], column[seen]) if seen.any() else 0.0
        return out

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        classifier = MiniRocketClassifier(random_state=seed).fit(table(train), train.labels)
        return float((classifier.predict(table(test)) == test.labels).mean())


def choose_rate(name: str, method: str, parts: tuple[TimeSeries, TimeSeries]) -> float:
    """The better first rate on held-out training data."""
    train, _ = dropped(parts, 0.5, SWEEP_SEED)
    fitting, held_out = train.split(0.8, key=jax.random.key(SWEEP_SEED))
    found = trained(method, [(fitting, SWEEP_SEED, rate) for rate in RATES], STEPS[name])
    # By the cross entropy: of a few series the accuracies are mostly equal.
    logits = [model.predict(held_out, key=jax.random.key(0), num_samples=8, throw=False) for model in found]
    losses = [optax.softmax_cross_entropy_with_integer_labels(x, held_out.labels).mean() for x in logits]
    return RATES[int(np.nanargmin(losses))]


def figures(name: str, shares: Any, seeds: Any) -> list[Figure]:
    """Every method on one data set."""
    parts, found = load(name), []
    cases = [(missing, seed) for missing in shares for seed in seeds]
    data = {case: dropped(parts, *case) for case in cases}
    for method in [*DYNAMICS] + [ROCKET] * (importlib.util.find_spec("numba") is not None):
        began, rate = time.perf_counter(), float("nan")
        if method == ROCKET:
            scores = [rocket(*data[case], case[1]) for case in cases]
        else:
            rate = choose_rate(name, method, parts)
            fits = trained(method, [(data[case][0], case[1], rate) for case in cases], STEPS[name])
            scores = [accuracy(model, data[case][1], case[1]) for model, case in zip(fits, cases, strict=True)]
        seconds = (time.perf_counter() - began) / len(cases)
        found += [
            Figure(name, *case[:1], method, case[1], rate, x, seconds) for case, x in zip(cases, scores, strict=True)
        ]
        means = [statistics.fmean(x for c, x in zip(cases, scores, strict=True) if c[0] == q) for q in shares]
        text = ", ".join(f"{q:.0%}: {x:.3f}" for q, x in zip(shares, means, strict=True))
        print(f"    {name}, {method} ({seconds:.0f} s a case, rate {rate:g}): {text}", file=sys.stderr, flush=True)
    return found


@dataclasses.dataclass(frozen=True)
class Score(Row):
    """The line of a method; it passes if its mean is at the mark, or below by one standard error at most."""

    mark: float | None = None
    mean: float = 0.0
    error: float = 0.0

    @property
    def verdict(self) -> str:
        """PASS or MISS."""
        return "" if self.mark is None else ("PASS" if self.mean + self.error >= self.mark - 1e-9 else "MISS")


def table(found: list[Figure], name: str, missing: float) -> Claim:
    """The claim of one data set and share missing."""
    here = [x for x in found if x.data == name and x.missing == missing]
    plain = {x.seed: x.accuracy for x in here if x.method == REFERENCE}
    rows = []
    for method in dict.fromkeys(x.method for x in here):
        own = [x for x in here if x.method == method]
        accuracies = [x.accuracy for x in own]
        error = statistics.stdev(accuracies) / len(own) ** 0.5
        gaps = [x.accuracy - plain[x.seed] for x in own]
        # Student's 97.5 % quantile for 3 and for 5 seeds.
        half = {3: 4.303, 5: 2.776}.get(len(gaps), 2.0) * statistics.stdev(gaps) / len(gaps) ** 0.5
        gap = statistics.fmean(gaps)
        note = f"mean {statistics.fmean(accuracies):.3f}, standard error {error:.3f}"
        if method != REFERENCE:
            note += f", less {REFERENCE}: {gap:+.3f}, 95 % interval {gap - half:+.3f} to {gap + half:+.3f}"
        mark = MARKS.get((name, missing), {}).get(method)
        note += f", mark {mark}" if mark else ""
        note += f", {statistics.median(x.seconds for x in own):.0f} s, rate {own[0].rate:g}"
        more = {"accuracy": Spread.of(accuracies)}
        rows.append(Score(method, note=note, more=more, mark=mark, mean=statistics.fmean(accuracies), error=error))
    return Claim(
        "series",
        f"{name}, {missing:.0%} of the values missing: accuracy, higher is better",
        f"{len(plain)} seeds, {STEPS[name]} updates, the stable classes in the pure mode",
        "nothing: shares of the official test set, median and range over seeds",
        rows,
    )


def write(found: list[Figure], path: Path) -> None:
    """Every figure, with the command that makes them."""
    with open(path, "w", newline="") as file:
        file.write("# python -m benchmarks series --full\n")
        writer = csv.writer(file)
        writer.writerow([field.name for field in dataclasses.fields(Figure)])
        for x in found:
            row = dataclasses.asdict(x) | {"accuracy": f"{x.accuracy:.4f}", "seconds": f"{x.seconds:.1f}"}
            writer.writerow(row.values())


def run(options: Options) -> list[Claim]:
    """Speed, then accuracy."""
    if options.quick:
        return [speed(options)]
    shares, seeds = ((0.0, 0.3, 0.5, 0.7), range(5)) if options.full else ((0.0, 0.5), range(3))
    claims, found = [speed(options)], []
    for name in STEPS:
        found += figures(name, shares, seeds)
        claims += [table(found, name, missing) for missing in shares]
    if options.full:
        write(found, Path(__file__).with_name("series.csv"))
    return claims


# Speed: the same step in three packages.

BATCH, STATE, WIDTH, ROWS = 64, 32, 64, 100


def _weights() -> tuple[Any, Any]:
    key = jax.random.key(0)
    drift = layers(jax.random.fold_in(key, 0), STATE, WIDTH, WIDTH, STATE)
    noise = layers(jax.random.fold_in(key, 1), 1, WIDTH, WIDTH, STATE)
    return (drift, noise), jax.random.normal(jax.random.fold_in(key, 2), (BATCH, STATE))


def _drift(t: Any, y: Any, params: Any) -> Any:
    return network(params[0], y, jnp.tanh)


def _noise(t: Any, y: Any, params: Any) -> Any:
    return jnp.broadcast_to(network(params[1], jnp.asarray(t, y.dtype)[None] / ROWS, jnp.tanh), y.shape)


def speed(options: Options) -> Claim:
    """One training step beside torchsde and diffrax, by CPU time."""
    params, y0 = _weights()
    key, ts = jax.random.key(3), np.arange(ROWS + 1.0)

    def ours(params: Any, y0: Any, key: Any) -> Any:
        sde = sf.SDE(_drift, _noise, additive=True)
        return jnp.mean(sf.solve(sde, y0, ts, args=params, key=key, solver=diffrax.Euler()).ys ** 2)

    def tree(params: Any, y0: Any, key: Any) -> Any:
        path = diffrax.VirtualBrownianTree(0.0, ROWS, 0.5, jax.ShapeDtypeStruct(y0.shape, y0.dtype), key=key)
        noise = lambda t, y, args: lx.DiagonalLinearOperator(_noise(t, y, args))
        terms = diffrax.MultiTerm(diffrax.ODETerm(_drift), diffrax.ControlTerm(noise, path))
        saveat = diffrax.SaveAt(ts=jnp.arange(ROWS + 1.0))
        return jnp.mean(
            diffrax.diffeqsolve(terms, diffrax.Euler(), 0.0, ROWS, 1.0, y0, args=params, saveat=saveat).ys ** 2
        )

    step = lambda fn: lambda params, y0, key: jax.value_and_grad(fn)(params, y0, key)
    mine = harness.compiled("sdeflow", step(ours), (params, y0, key))
    rows = []
    if options.torch and importlib.util.find_spec("torchsde") is not None:
        make = lambda: harness.row(Method("torchsde euler, grid 0..100", _torchsde(params, y0)), mine, options, 0.30)
        rows.append(
            dataclasses.replace(
                harness.attempt("sdeflow / torchsde", make, 0.30), method="sdeflow / torchsde", judged=("cpu",)
            )
        )
    make = lambda: harness.row(harness.compiled("diffrax", step(tree), (params, y0, key)), mine, options, 0.06)
    rows.append(
        dataclasses.replace(
            harness.attempt("sdeflow / diffrax, tree", make, 0.06), method="sdeflow / diffrax, tree", judged=("cpu",)
        )
    )
    return Claim(
        "series-speed",
        "a training step of a Langevin model",
        f"batch {BATCH}, a state of {STATE}, {ROWS} Euler steps, states saved, value and gradient, torch on 1 thread",
        "the peer named in the line",
        rows,
    )


def _torchsde(params: Any, y0: Any) -> Callable[[], Any]:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchsde

    torch.set_num_threads(1)
    tensor = lambda x: torch.nn.Parameter(torch.from_numpy(np.array(x)))

    class Equation(torch.nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def __init__(self) -> None:
            super().__init__()
            self.tree = jax.tree.map(tensor, params)
            self.leaves = torch.nn.ParameterList(jax.tree.leaves(self.tree))

        def f(self, t: Any, y: Any) -> Any:
            return network(self.tree[0], y, torch.tanh)

        def g(self, t: Any, y: Any) -> Any:
            return network(self.tree[1], t.reshape(1) / ROWS, torch.tanh).expand(y.shape)

    equation, start = Equation(), torch.from_numpy(np.array(y0))
    ts = torch.arange(ROWS + 1.0)

    def call() -> Any:
        path = torchsde.BrownianInterval(t0=ts[0], t1=ts[-1], size=tuple(start.shape), dtype=start.dtype, dt=1.0)
        value = torchsde.sdeint(equation, start, ts, bm=path, method="euler", dt=1.0).pow(2).mean()
        return value, torch.autograd.grad(value, list(equation.leaves))

    call()
    return call
