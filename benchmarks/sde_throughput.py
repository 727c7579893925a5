"""Claim: solving an SDE costs no more than the scan an expert would write by hand.

Forward solves and values-with-gradients against the hand-written scan, at four sizes, beside diffrax as it
comes, diffrax on our Brownian path, and the PyTorch peers. The limit draws its noise inside the timing, as
every method here does, except in the small gradient row, where the limit is handed its noise: an advantage to
the limit.
"""

import dataclasses
import functools

import jax
import numpy as np

from . import _harness as harness
from . import _peers as peers
from . import _problems as problems
from . import _torch_peers as torch_peers
from ._harness import Claim, Method, Options, Row
from ._problems import Size


@dataclasses.dataclass(frozen=True)
class Target:
    """One row of the scoreboard: what is measured, at which size, against which limit, and the bound."""

    number: str
    size: str
    gradient: bool
    bound: float
    save: bool = False
    limit_draws: bool = True


TARGETS = (
    Target("1", "medium", gradient=False, bound=1.05),
    Target("2", "medium", gradient=True, bound=1.05),
    Target("3", "small", gradient=False, bound=1.15),
    Target("4", "small", gradient=True, bound=1.15, limit_draws=False),
    Target("5", "large", gradient=True, bound=1.1),
)


def run(options: Options) -> list[Claim]:
    """Measure every target."""
    return [measure(target, options) for target in TARGETS if options.wants(target.number)]


def measure(target: Target, options: Options) -> Claim:
    """Measure one target: ours, the limit against itself (the noise floor of the figures), and the peers."""
    size = problems.SIZES[target.size]
    params, y0, key = problems.make(size)
    keep = {"gradient": target.gradient, "save": target.save}

    def build(name: str, implementation: object, note: str = "") -> Method:
        return harness.compiled(name, peers.program(implementation, size, **keep), (params, y0, key), note)

    limit, other = _limit(target, size, options)
    rows = [
        harness.attempt(
            "sdeflow",
            lambda: harness.row(limit, build("sdeflow", peers.sdeflow), options, target.bound),
            target.bound,
        )
    ]
    rows.append(
        harness.row(limit, dataclasses.replace(limit, note="the limit against itself: the noise floor"), options)
    )
    if other is not None:
        rows.append(harness.row(limit, other, options))
    for name, implementation, note in (
        ("diffrax", peers.diffrax_default, "all defaults: VirtualBrownianTree, its adjoint"),
        ("diffrax on sdeflow's path", peers.diffrax_our_path, "its loop and adjoint"),
    ):
        rows.append(
            harness.attempt(name, lambda n=name, i=implementation, w=note: harness.row(limit, build(n, i, w), options))
        )
    rows += torch_peers.rows(limit, size, options, gradient=target.gradient, save=target.save)
    what = "value and gradient" if target.gradient else "forward"
    what += ", all steps saved" if target.save else ""
    return Claim(
        target.number,
        f"{what}, {size.name}",
        str(size),
        f"{limit.name}, {_milliseconds(rows[1])}",
        rows,
        _agreement(size, options),
        floor=rows[1],
    )


def _limit(target: Target, size: Size, options: Options) -> tuple[Method, Method | None]:
    """The hand-written scan; of the stored and the rematerialised one the faster, the other beside it."""
    params, y0, key = problems.make(size)
    noise = key if target.limit_draws else jax.jit(functools.partial(problems.draw, size))(key)
    implementation = peers.hand_draws if target.limit_draws else peers.hand_given
    handed = "draws its noise" if target.limit_draws else "noise given"

    def build(remat: bool, kind: str) -> Method:
        fn = peers.program(implementation, size, gradient=target.gradient, remat=remat, save=target.save)
        return harness.compiled(f"hand scan, {kind}{handed}", fn, (params, y0, noise))

    if not target.gradient:
        return build(False, ""), None
    stored, remat = build(False, "stored, "), build(True, "rematerialised, ")
    wall, _, _ = harness.compare(stored, remat, options)
    return (remat, stored) if wall.median <= 1 else (stored, remat)


def _milliseconds(row: Row) -> str:
    return f"{row.ms:.3g} ms"


@functools.cache
def _agreement(size: Size, options: Options) -> list[str]:
    """Whether the implementations compute the same thing: last states on one set of increments."""
    params, y0, key = problems.make(size)
    increments = peers.sdeflow_increments(size, y0, key)
    hand = np.asarray(jax.jit(functools.partial(peers.hand_given, size))(params, y0, increments))
    out = []
    for name, implementation in (("sdeflow", peers.sdeflow), ("diffrax", peers.diffrax_our_path)):
        ours = np.asarray(jax.jit(functools.partial(implementation, size))(params, y0, key))
        out.append(f"{name} {np.max(np.abs(ours - hand)):.1e}")
    if options.torch and torch_peers.installed():
        out.append(f"torch loop {torch_peers.agreement(size, np.asarray(increments), hand):.1e}")
    return ["on the same increments, the largest difference in the last state from the hand scan: " + ", ".join(out)]
