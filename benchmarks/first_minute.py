"""Claim: nobody waits for the first result: first calls, with tracing and compiling, beside what is written by hand.

Every pair forgets all compiled programs first, in this process, and no program is kept on disk. A training step is
beside the same loss in a loop of equinox and optax; `sf.solve` and `sf.diffusion.sample` are beside
``diffrax.diffeqsolve`` of the same equation with diffrax's defaults. CPU seconds are judged: compiling is what takes
the time, and the machine may be shared.
"""

import gc
import time
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax._src import monitoring

import sdeflow as sf

from . import _harness as harness
from ._harness import Claim, Options, Row, Spread

KEY = jax.random.key(0)
STEPS = 3


def run(options: Options) -> list[Claim]:
    """Measure training, sampling, solving and `light_sb`, each from nothing."""
    return [_training(options), _refit(), _light(options), _solving(options)]


def _first(call: Callable[[], Any]) -> dict[str, float]:
    """Seconds of a call that finds no compiled program."""
    jax.clear_caches()
    eqx.clear_caches()
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(eqx.filter(call(), eqx.is_array))
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def _beside(name: str, ours: Callable[[], Any], peer: Callable[[], Any], target: float, pairs: int) -> Row:
    taken = []
    for i in range(pairs):
        both = [(0, ours), (1, peer)][:: 1 if i % 2 else -1]
        figures = {which: _first(call) for which, call in both}
        taken.append((figures[0], figures[1]))
    ratio = {c: Spread.of([a[c] / b[c] for a, b in taken]) for c in ("wall", "cpu")}
    seconds = [float(np.median([pair[i]["cpu"] for pair in taken])) for i in (0, 1)]
    note = f"cpu {seconds[0]:.2f} s beside {seconds[1]:.2f} s"
    return Row(name, ratio["wall"], ratio["cpu"], note=note, target=target, judged=("cpu",))


def _series(lengths: tuple[int, ...]) -> sf.TimeSeries:
    """Random walks of two channels in two classes, irregularly observed."""
    rng = np.random.default_rng(0)
    counts = [lengths[i % len(lengths)] for i in range(64)]
    times = [np.sort(rng.uniform(0.0, 1.0, n)) for n in counts]
    values = [np.cumsum(rng.normal(size=(n, 2)), 0) * 0.1 for n in counts]
    return sf.TimeSeries.from_arrays(times, values, labels=np.arange(64) % 2)


def _models(data: sf.TimeSeries) -> dict[str, tuple[Any, Any]]:
    dynamics = sf.models.NeuralLangevinSDE(8, control_size=data.num_channels, width=16, key=KEY)
    classifier = sf.models.SeriesModel(dynamics, channels=data.num_channels, num_outputs=2, key=KEY)
    latent = sf.models.LatentSDE(data.num_channels, latent_size=4, context_size=8, width=16, key=KEY)
    return {
        "NeuralLangevinSDE": (classifier, sf.losses.CrossEntropy()),
        "LatentSDE": (latent, sf.losses.ELBO()),
    }


def _by_hand(model: Any, data: Any, loss: Any, optim: Any) -> Any:
    """The loop that people write: one compiled step, called until there are enough."""

    @eqx.filter_jit
    def step(model: Any, state: Any, batch: Any, key: jax.Array, i: jax.Array) -> Any:
        (value, _), grads = eqx.filter_value_and_grad(lambda m: loss(m, batch, key, i), has_aux=True)(model)
        updates, state = optim.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state, value

    state = optim.init(eqx.filter(model, eqx.is_inexact_array))
    done = 0
    while done < STEPS:
        for batch in data.batches(16, key=KEY):
            model, state, value = step(model, state, batch, jax.random.fold_in(KEY, done), jnp.asarray(done))
            done += 1
            if done == STEPS:
                break
    return model


def _fit(model: Any, data: Any, loss: Any, rate: float = 3e-3) -> Any:
    optim = optax.adam(rate)
    fitted = sf.fit(model, data, loss, optim=optim, steps=STEPS, batch_size=16, key=KEY, progress=False)
    return fitted.model


def _training(options: Options) -> Claim:
    rows = []
    pairs = 1 if options.quick else 3
    for lengths in ((12,), (12, 30)):
        data = _series(lengths).with_buckets(lengths)
        for name, (model, loss) in _models(data).items():
            ours = lambda m=model, d=data, s=loss: _fit(m, d, s)
            hand = lambda m=model, d=data, s=loss: _by_hand(m, d, s, optax.adam(3e-3))
            title = f"{name}, {len(lengths)} bucket{'s' if len(lengths) > 1 else ''}"
            rows.append(harness.attempt(title, lambda t=title, o=ours, h=hand: _beside(t, o, h, 1.5, pairs), 1.5))
    return Claim("first 1", f"the first {STEPS} training steps", "64 series, width 16", "a loop written by hand", rows)


def _refit() -> Claim:
    """How many programs a second fit compiles, with an optimiser and a loss that are equal but new."""
    compiled: list[str] = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    data = _series((12,)).with_buckets((12,))
    model, _ = _models(data)["NeuralLangevinSDE"]
    _fit(model, data, sf.losses.CrossEntropy())
    monitoring.register_event_duration_secs_listener(listen)
    start = time.process_time()
    _fit(model, data, sf.losses.CrossEntropy())
    cpu, equal = time.process_time() - start, len(compiled)
    _fit(model, data, sf.losses.CrossEntropy(), rate=1e-3)
    other = len(compiled) - equal
    monitoring.unregister_event_duration_listener(listen)
    rows: list[Row] = [
        harness.line("programs compiled, equal optimiser", equal, (0, 0.5), f"cpu {cpu:.3f} s"),
        harness.line("programs compiled, another learning rate", other, (0, 0)),
    ]
    return Claim("first 2", "a second fit", "a new optax.adam(3e-3) and a new loss", "nothing: counts", rows)


def _light(options: Options) -> Claim:
    rng = np.random.default_rng(0)
    x0, x1 = (jnp.asarray(rng.normal(size=(2000, 5)), jnp.float32) for _ in range(2))
    call = lambda: sf.bridges.light_sb(x0, x1, epsilon=1.0, key=KEY, progress=False)
    taken = [_first(call)["cpu"] for _ in range(1 if options.quick else 3)]
    row = harness.line("light_sb, CPU seconds", float(np.median(taken)), (0, 4.0))
    return Claim("first 3", "first call of `light_sb`", "2000 x 5 points", "nothing: seconds", [row])


def _solving(options: Options) -> Claim:
    pairs = 1 if options.quick else 5
    drift, noise = (lambda t, y, args: -y), (lambda t, y, args: 0.5 * jnp.ones_like(y))
    y0, times = jnp.ones(4), jnp.linspace(0.0, 1.0, 11)

    def with_diffrax() -> Any:
        path = diffrax.VirtualBrownianTree(0.0, 1.0, 0.005, (4,), KEY)
        diffusion = lambda t, y, args: jnp.diag(noise(t, y, args))
        terms = diffrax.MultiTerm(diffrax.ODETerm(drift), diffrax.ControlTerm(diffusion, path))
        solve = lambda y: diffrax.diffeqsolve(
            terms, diffrax.Heun(), 0.0, 1.0, 0.01, y, saveat=diffrax.SaveAt(ts=times)
        ).ys  # fmt: skip
        return eqx.filter_jit(solve)(y0)

    equation = sf.SDE(drift, noise, additive=True)
    ours = lambda: eqx.filter_jit(
        lambda y: sf.solve(equation, y, times, dt0=0.01, key=KEY, solver=diffrax.Heun()).ys
    )(y0)  # fmt: skip

    schedule = sf.diffusion.VP()
    network = eqx.nn.MLP(5, 4, 64, 2, key=KEY)
    denoiser = sf.diffusion.Denoiser(lambda t, x, args: network(jnp.append(x, t)), schedule, prediction="noise")
    flow = sf.diffusion.ProbabilityFlow(denoiser)
    length = (schedule.t_min - schedule.t_max) / 10

    def flow_with_diffrax() -> Any:
        solve = lambda x: (
            diffrax.diffeqsolve(flow.terms(), diffrax.Heun(), schedule.t_max, schedule.t_min, length, x).ys
        )
        return eqx.filter_jit(solve)(y0)

    sample = lambda: eqx.filter_jit(lambda x: sf.diffusion.sample(denoiser, x, num_steps=10))(y0)
    rows = [
        harness.attempt("solve, 100 steps of Heun", lambda: _beside("solve", ours, with_diffrax, 1.0, pairs), 1.0),
        harness.attempt("sample, 10 steps", lambda: _beside("sample", sample, flow_with_diffrax, 1.0, pairs), 1.0),
    ]
    return Claim("first 4", "first calls", "4 numbers, compiled by filter_jit", "diffrax's own first call", rows)
