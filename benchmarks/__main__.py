"""``python -m benchmarks [NAME ...]``: print the scoreboard, measured side by side in this run.

    python -m benchmarks                      everything
    python -m benchmarks sde_throughput       one part; several names are allowed
    python -m benchmarks 2 12c                claims by their numbers
    python -m benchmarks --quick              three short pairs, fewer peers: a look, not figures to quote
    python -m benchmarks --json report.json   also write every figure

The PyTorch peers are optional:

    pip install torch==2.13.0
    pip install --no-deps torchsde trampoline boltons    # scipy is needed too

(``--no-deps`` keeps torchsde from exchanging the installed torch). Without them, or with ``--no-torch``,
those lines are left out. The report always ends with exit code 0, met targets or not; nothing here uses the
network.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

PARTS = {
    "sde_throughput": "1-5: forward and gradient against the hand-written scan",
    "memory": "6: memory of a long gradient",
    "brownian": "8, 9: diffrax's Brownian path, Milstein beside Euler",
    "adaptive": "10: adaptive ordinary equations",
    "stiff": "stiff problems: steps beside diffrax, errors and gradients beside Radau",
    "saving": "11: every step saved",
    "adjoints": "6b, 7: memory and time of a gradient through ten thousand steps",
    "compile_time": "12: compile time, persistent cache, import",
    "first_minute": "first calls: training, a second fit, light_sb, solve, sample",
    "regularisers": "evaluations at prediction after training with regularisers",
    "series": "irregular series: a training step beside torchsde and diffrax, accuracy beside the peers",
    "bridges": "Schrödinger bridges: plans that are known, Gaussians, cells of a day held out",
    "diffusion": "diffusion samplers: errors on a mixture of Gaussians, to the digits that are known",
    "sampler_defaults": "what `sample` chooses by itself, ranked among 124 choices on random mixtures",
    "diffusers_table": "schedulers of diffusers beside their spelling here: the migration table",
    "diffusion_speed": "samplers beside scans written by hand and diffusers: time, gradients, memory",
    "latent": "latent stochastic equations: bound, bands and noise against a law that is known",
    "fractional": "fractional noise: Hurst index, strong error, bounds, speed",
    "one_argument": "an existing diffrax training step, one argument changed",
    "batch_sweep": "microseconds per step against batch size (by itself only on an accelerator)",
}
#: the claims that can be asked for by number, and their parts
NUMBERS = {
    **dict.fromkeys("12345", "sde_throughput"),
    "6": "memory",
    **dict.fromkeys("89", "brownian"),
    **dict.fromkeys(("10a", "10b", "10c"), "adaptive"),
    "11": "saving",
    **dict.fromkeys(("12a", "12b", "12c"), "compile_time"),
    **dict.fromkeys(("6b", "7"), "adjoints"),
}


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, run the parts, print and write the report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure sdeflow beside hand-written code and its peers.",
        epilog="parts: " + "; ".join(f"{name} ({what})" for name, what in PARTS.items()),
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="parts or numbers to run; all when none is named")
    parser.add_argument("--pairs", type=int, default=None, help="least number of pairs per row (default 7, quick 3)")
    parser.add_argument("--quick", action="store_true", help="short blocks, three pairs, fewer peers")
    parser.add_argument("--full", action="store_true", help="more seeds and settings where a part has them (series)")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="write the figures to FILE")
    parser.add_argument("--no-torch", action="store_true", help="leave the PyTorch peers out")
    parser.add_argument("--device", default=None, help="JAX platform to run on: cpu, gpu, ... (default: JAX's own)")
    options = parser.parse_args(argv)
    unknown = [name for name in options.names if name not in PARTS and name not in NUMBERS]
    if unknown:
        known = ", ".join((*PARTS, *NUMBERS))
        parser.error(f"no part is named {', '.join(unknown)}; there are {known}")
    if options.pairs is not None and options.pairs < 1:
        parser.error(f"--pairs must be at least 1, got {options.pairs}")
    # both are read when jax starts, here and in the fresh processes of compile_time
    if options.device:
        os.environ["JAX_PLATFORMS"] = options.device
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return _report(options)


def _report(options: argparse.Namespace) -> int:
    import jax

    from . import _harness as harness

    pairs = options.pairs or (3 if options.quick else 7)
    how = harness.Options(
        pairs=pairs,
        block=0.005 if options.quick else 0.02,
        span=0.2 if options.quick else 2.0,
        quick=options.quick,
        full=options.full,
        torch=not options.no_torch,
        only=_only(options.names),
    )
    environment = _environment()
    print("sdeflow scoreboard: paired ratios, median [min-max]; lower is better")
    print("  loop ops: instructions that do work in the body of each loop of the program, whatever the load")
    for name, value in environment.items():
        print(f"  {name}: {value}")
    print(
        f"  pairs per row: {pairs} or more, timed blocks of about {1e3 * how.block:g} ms or more\n",
        flush=True,
    )
    names = options.names or [n for n in PARTS if n != "batch_sweep" or jax.default_backend() != "cpu"]
    parts = dict.fromkeys(NUMBERS.get(name, name) for name in names)
    claims = []
    start = time.perf_counter()
    for name in parts:
        for claim in importlib.import_module(f"benchmarks.{name}").run(how):
            claims.append(claim)
            print(harness.table(claim) + "\n", flush=True)
    print("Targets\n" + harness.summary(claims))
    print(f"\n{time.perf_counter() - start:.0f} s in all")
    if options.json is not None:
        report = {"environment": environment, "pairs": pairs, "claims": [claim.as_dict() for claim in claims]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def _only(names: list[str]) -> frozenset[str]:
    # a part named in full is measured in full, whatever numbers are named beside it
    if not NUMBERS.keys() & set(names):
        return frozenset()
    return frozenset(number for number, part in NUMBERS.items() if number in names or part in names)


def _environment() -> dict[str, Any]:
    import jax

    versions = {}
    for name in ("sdeflow", "jax", "jaxlib", "diffrax", "equinox", "torch", "torchsde", "diffusers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    devices = ", ".join(sorted({d.device_kind for d in jax.devices()}))
    return {
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "python": platform.python_version(),
        "device": f"{jax.default_backend()} ({devices}), {len(jax.devices())}",
        "cores": f"{os.cpu_count()} (JAX uses all; PyTorch as each line says), load {os.getloadavg()[0]:.1f}",
    }


if __name__ == "__main__":
    sys.exit(main())
