"""Claim: samplers cost what a scan written by hand costs, gradients too, and less than diffusers' schedulers.

The scans written by hand know the sampler: their weights are the numbers of its table, the schedule's are given to them
row by row, and they carry just the outputs that they combine. 512 points in the plane, a network of two hidden layers
with the time as an input, single precision, VP, 20 steps that are even in log(alpha / sigma).
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sdeflow as sf

from . import _harness as harness
from ._harness import Claim, Method, Options, Row

BATCH, STEPS = 512, 20
WIDTHS = {"tiny": 16, "2x256": 256}
SCHEDULE = sf.diffusion.VP()
SAMPLERS = {
    "DDIM": sf.diffusion.DDIM(),
    "DPM-Solver++ 2M": sf.diffusion.DPMSolverPP(2),
    "UniPC-3": sf.diffusion.UniPC(3),
    "DEIS-3": sf.diffusion.DEIS(3),
}
LIMIT = 1.15


def network(params: list[Any], t: Any, x: Any) -> Any:
    """Two hidden layers of x and t."""
    y = jnp.concatenate([x, jnp.broadcast_to(t, (*x.shape[:-1], 1)).astype(x.dtype)], axis=-1)
    for layer in params[:-1]:
        y = jnp.tanh(y @ layer["weight"] + layer["bias"])
    return y @ params[-1]["weight"] + params[-1]["bias"]


def weights(width: int) -> list[dict[str, np.ndarray]]:
    """Those of the network, the same for every peer."""
    rng, sizes = np.random.default_rng(0), (3, width, width, 2)
    return [
        {
            "weight": (rng.standard_normal((a, b)) / a**0.5).astype(np.float32),
            "bias": np.zeros(b, np.float32),
        }
        for a, b in zip(sizes[:-1], sizes[1:])
    ]


def starts() -> np.ndarray:
    """Noise to start from."""
    return np.random.default_rng(1).standard_normal((BATCH, 2)).astype(np.float32)


def ours(solver: Any, params: Any, x: Any) -> Any:
    """The sampler under test."""
    denoiser = sf.diffusion.Denoiser(lambda t, x, args: network(args, t, x), SCHEDULE)
    return sf.diffusion.sample(denoiser, x, args=params, solver=solver, num_steps=STEPS)


def by_hand(solver: Any, params: Any, x: Any, remat: bool = False) -> Any:
    """The same recursion as a scan that was written for it."""
    times = solver.times(SCHEDULE, STEPS, "logsnr", None)
    table = solver.table(SCHEDULE, times, "logsnr", STEPS)
    alpha, sigma = SCHEDULE.alpha(table.t), SCHEDULE.sigma(table.t)
    columns = [table.t, alpha, sigma, table.keep, *table.out.T, *([] if table.fix is None else table.fix.T)]
    rows = [jnp.asarray(column, jnp.float32) for column in columns]
    of_data, order, corrects = table.reads == "data", table.width, table.fix is not None

    def step(carry: Any, row: Any) -> Any:
        x, *past = carry
        t, alpha, sigma, keep, *rest = row
        out = network(params, t, x)
        out = (x - sigma * out) / alpha if of_data else out
        outputs = [out, *past]
        if corrects:
            for weight, output in zip(rest[order:], outputs):
                x = x + weight * output
        x = keep * x
        for weight, output in zip(rest, outputs):
            x = x + weight * output
        return (x, *outputs[: order - 1]), None

    step = jax.checkpoint(step, prevent_cse=False) if remat else step
    start = (x, *[jnp.zeros_like(x)] * (order - 1))
    return jax.lax.scan(step, start, rows)[0][0]


def forward(width: str, options: Options) -> Claim:
    """Sampling, beside the scan written by hand."""
    args = (weights(WIDTHS[width]), starts())
    rows, remarks, floor = [], [], None
    names = ("DPM-Solver++ 2M", "UniPC-3") if options.quick else SAMPLERS
    for name in names:
        solver = SAMPLERS[name]
        limit = harness.compiled(f"{name} by hand", functools.partial(by_hand, solver), args)
        method = harness.compiled(name, functools.partial(ours, solver), args)
        rows.append(harness.row(limit, method, options, target=LIMIT))
        floor = floor or harness.row(limit, limit, options)
        remarks.append(f"{name}: {_difference(limit.call(), method.call())}")
    setting = f"B={BATCH}, {STEPS} steps, network {width}, float32, compiled"
    return Claim("diffusion speed", f"sampling, network {width}", setting, "the scan by hand", rows, remarks, floor)


def convolutions(options: Options) -> Claim:
    """A network of convolutions with channels first, the loop over its evaluations written out and not."""
    rng = np.random.default_rng(2)
    sizes = ((32, 1), (32, 32), (1, 32))
    kernels = [(rng.standard_normal((*s, 3, 3)) / (3 * s[1] ** 0.5)).astype(np.float32) for s in sizes]
    images = rng.standard_normal((16, 1, 32, 32)).astype(np.float32)

    def convolve(t: Any, x: Any, args: Any) -> Any:
        for i, kernel in enumerate(args):
            x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME")
            x = jnp.tanh(x) if i < len(args) - 1 else x
        return x

    def draw(unroll: bool, kernels: Any, x: Any) -> Any:
        denoiser = sf.diffusion.Denoiser(convolve, SCHEDULE)
        solver = sf.diffusion.DPMSolverPP(2)
        return sf.diffusion.sample(denoiser, x, args=kernels, solver=solver, num_steps=10, unroll=unroll)

    loop, flat = (
        harness.compiled(name, functools.partial(draw, unroll), (kernels, images))
        for name, unroll in (("a loop", False), ("unroll=True", True))
    )
    rows = [harness.row(loop, flat, options)]
    remarks = [_difference(loop.call(), flat.call())]
    setting = "16 images of 32 x 32, three convolutions, channels first, 10 steps, float32"
    return Claim("diffusion speed", "convolutions written out", setting, "the loop", rows, remarks, None)


def gradient(options: Options) -> Claim:
    """Value and gradient in the weights and the noise."""
    args = (weights(256), starts())
    loss = lambda sampler: lambda params, x: jnp.mean((sampler(params, x) - 1) ** 2)
    rows, remarks, floor = [], [], None
    for name in ("DPM-Solver++ 2M",) if options.quick else ("DPM-Solver++ 2M", "UniPC-3"):
        solver = SAMPLERS[name]
        both = lambda sampler: jax.value_and_grad(loss(sampler), argnums=(0, 1))
        limit = harness.compiled(f"{name} by hand", both(functools.partial(by_hand, solver, remat=True)), args)
        method = harness.compiled(name, both(functools.partial(ours, solver)), args)
        ahead = harness.compiled(f"{name}, forward", functools.partial(ours, solver), args)
        rows.append(harness.row(limit, method, options, target=LIMIT))
        beside = harness.row(ahead, method, options)
        rows.append(Row(f"{name} / its own forward pass", beside.wall, beside.cpu, beside.ms))
        floor = floor or harness.row(limit, limit, options)
        remarks.append(f"{name}: {_difference(limit.call(), method.call())}")
    setting = f"B={BATCH}, {STEPS} steps, network 2x256, float32; weights and noise"
    title = "value and gradient through a sampler"
    return Claim("diffusion speed", title, setting, "the loop by hand, each step recomputed", rows, remarks, floor)


def memory(options: Options) -> Claim:
    """Temporary memory of a gradient that undoes its steps."""
    args = (weights(16), starts())
    denoiser = sf.diffusion.Denoiser(lambda t, x, args: network(args, t, x), SCHEDULE)
    found = {}
    for adjoint in (sf.adjoints.ReversibleAdjoint(), None):
        for steps in (10, 1000):

            def loss(params: Any, x: Any, steps: int = steps, adjoint: Any = adjoint) -> Any:
                solver = sf.diffusion.BDIA()
                out = sf.diffusion.sample(denoiser, x, args=params, solver=solver, num_steps=steps, adjoint=adjoint)
                return jnp.mean(out**2)

            found[adjoint is None, steps] = harness.compiled("", jax.grad(loss, argnums=(0, 1)), args).temp_mb
    growth = found[False, 1000] / found[False, 10]
    rows = [
        harness.line("ReversibleAdjoint, 1000 / 10 steps", growth, (0.0, 1.1), _megabytes(found, False)),
        harness.line(
            "the default, 1000 / 10 steps", found[True, 1000] / found[True, 10], (0, 0), _megabytes(found, True)
        ),
    ]
    setting = f"BDIA, B={BATCH}, a tiny network, float32: temporary memory of the compiled gradient"
    return Claim("diffusion speed", "memory of a gradient", setting, "10 steps", rows)


def _megabytes(found: dict, plain: bool) -> str:
    return f"{found[plain, 10]:.3f} and {found[plain, 1000]:.3f} MB"


def again(options: Options) -> Claim:
    """Equal calls outside of a compiled program."""
    params, x = jax.device_put(weights(16)), jnp.asarray(starts())
    denoiser = sf.diffusion.Denoiser(lambda t, x, args: network(args, t, x), SCHEDULE)
    rows = []
    for name in ("DPM-Solver++ 2M", "UniPC-3"):
        solver = SAMPLERS[name]
        call = lambda s=solver: sf.diffusion.sample(denoiser, x, args=params, solver=s, num_steps=STEPS)
        limit = harness.compiled(name, functools.partial(ours, solver), (params, x))
        plain = Method(f"{name}, a plain call", lambda call=call: jax.block_until_ready(call()))
        rows.append(harness.row(limit, plain, options))
    setting = f"B={BATCH}, {STEPS} steps, a tiny network: sample(...) as it is typed, for the second time and later"
    return Claim("diffusion speed", "a plain call", setting, "the call compiled by the user", rows)


def peers(width: str, target: float, options: Options) -> Claim:
    """The schedulers of diffusers in torch, with the same network."""
    setting = f"B={BATCH}, {STEPS} steps, network {width}, float32, torch with 1 thread; the lowest wins"
    title = f"beside diffusers, network {width}"
    if not options.torch or any(importlib.util.find_spec(name) is None for name in ("torch", "diffusers")):
        rows = [Row("diffusers", note="not installed: pip install torch diffusers")]
        return Claim("diffusion speed", title, setting, "diffusers", rows)
    import torch

    from . import _diffusers_peers as other

    rows, remarks, before = [], [], torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, make in other.schedulers().items():
            peer = Method(f"{name} of diffusers", other.call(make, weights(WIDTHS[width]), starts()))
            sampler = other.equivalent(name)
            method = harness.compiled(name, sampler, (weights(WIDTHS[width]), starts()))
            rows.append(harness.row(peer, method, options, target=target))
            remarks.append(f"{name}: {_difference(peer.call().numpy(), method.call())}")
    finally:
        torch.set_num_threads(before)
    return Claim("diffusion speed", title, setting, "diffusers", rows, remarks)


def _difference(one: Any, two: Any) -> str:
    """The largest difference, relative to the largest entry."""
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)]
    worst = max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)
    return f"differs from its reference by {worst:.1e} of the largest entry"


def run(options: Options) -> list[Claim]:
    """All of it."""
    parts: list[Callable[[], Claim]] = [
        lambda: forward("tiny", options),
        lambda: forward("2x256", options),
        lambda: convolutions(options),
        lambda: gradient(options),
        lambda: memory(options),
        lambda: again(options),
        lambda: peers("tiny", 0.33, options),
        lambda: peers("2x256", 1.0, options),
    ]
    return [part() for part in parts]
