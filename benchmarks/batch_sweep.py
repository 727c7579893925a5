"""Microseconds per step against the batch size: where a solve stops being bound by overhead.

Part of the full report on an accelerator; on a CPU it runs when asked for by name. The networks are those of
the medium problem. Arithmetic is counted for the networks alone: once forward, four times for a value and
gradient that recomputes its steps, three times for one that stores them; the rate is given for the forward
solve.
"""

import dataclasses

import jax

from . import _harness as harness
from . import _peers as peers
from . import _problems as problems
from ._harness import Claim, Method, Options, Row
from ._problems import Size


def run(options: Options) -> list[Claim]:
    """Forward, and value and gradient, over powers of two of the batch size."""
    return [_sweep(options, gradient) for gradient in (False, True)]


def _sweep(options: Options, gradient: bool) -> Claim:
    accelerator = jax.default_backend() != "cpu"
    powers = range(0, 18, 3 if options.quick else 1) if accelerator else range(0, 11, 5 if options.quick else 2)
    medium = problems.SIZES["medium"]
    rows = []
    for power in powers:
        size = dataclasses.replace(medium, name=f"B={2**power}", batch=2**power)
        rows += _rows(size, options, gradient)
    return Claim(
        "sweep",
        f"microseconds per step, {'value and gradient' if gradient else 'forward'}",
        f"n={medium.steps} D={medium.dim} W={medium.width} float32, Euler; B as given",
        "the hand scan that draws its noise, at the same B",
        rows,
    )


def _rows(size: Size, options: Options, gradient: bool) -> list[Row]:
    args = problems.make(size)

    def build(name: str, implementation: object, **extra: bool) -> Method:
        fn = peers.program(implementation, size, gradient=gradient, **extra)
        return harness.compiled(f"{size.name} {name}", fn, args)

    limit = build("hand scan", peers.hand_draws)
    if gradient:
        remat = build("hand scan", peers.hand_draws, remat=True)
        wall, _, _ = harness.compare(limit, remat, options)
        limit = remat if wall.median < 1 else limit
    rows = [harness.row(limit, limit, options)]
    for name, implementation in (
        ("sdeflow", peers.sdeflow),
        ("diffrax on sdeflow's path", peers.diffrax_our_path),
    ):
        rows.append(
            harness.attempt(
                f"{size.name} {name}",
                lambda n=name, i=implementation: harness.row(limit, build(n, i), options),
            )
        )
    return [_per_step(r, size, gradient) for r in rows]


def _per_step(r: Row, size: Size, gradient: bool) -> Row:
    if r.ms is None:
        return r
    note = f"{1e3 * r.ms / size.steps:.3g} us per step"
    if not gradient:
        note += f", {size.flops_per_step * size.steps / (1e6 * r.ms):.3g} GFLOP/s"
    return dataclasses.replace(r, note=note)
