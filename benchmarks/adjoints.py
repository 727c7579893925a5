"""Claim: a gradient through ten thousand steps takes the memory of a few states, and hardly more time than storing all.

The problem of the other parts in its Stratonovich form, by reversible Heun or by Heun in two coupled copies, every path
with its own noise drawn inside of the timing. Memory is the temporary memory of the compiled value and gradient, in
states of B x D float32. Time is relative to the scan that an expert writes by hand for reversible Heun: it draws all
of its noise at once and stores everything; its memory stands beside it.

Where a peer is too slow for ten thousand steps it runs fewer, beside the hand scan of as many.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import sdeflow as sf

from . import _harness as harness
from . import _peers as peers
from . import _problems as problems
from . import _torch_peers as torch_peers
from ._harness import Claim, Method, Options, Row
from ._problems import Size

TIMED = Size("long", batch=16, dim=16, width=32, steps=10_000)
MEASURED = Size("long and wide", batch=64, dim=32, width=64, steps=10_000)
#: how many steps the peers take that are too slow for all
FEWER, FEWEST = 1000, 250

#: states, and bytes for every row of the grid: its two ends, whether it is live, what numbers its noise
STATES, BYTES_PER_ROW = 30, 17
#: states for what is chosen by itself
STATES_BY_ITSELF = 2200
SECONDS = 1.15

HEUN, COUPLED = diffrax.ReversibleHeun(), sf.solvers.McCallumFoster(diffrax.Heun())
UNDO = sf.adjoints.ReversibleAdjoint()
OURS = {
    "ReversibleAdjoint, ReversibleHeun": (HEUN, UNDO),
    "ReversibleAdjoint, McCallumFoster(Heun)": (COUPLED, UNDO),
    'DiscreteAdjoint("step")': (HEUN, sf.adjoints.DiscreteAdjoint("step")),
    'DiscreteAdjoint("sqrt")': (HEUN, sf.adjoints.DiscreteAdjoint("sqrt")),
    "adjoint=None": (HEUN, None),
}
JUDGED = "ReversibleAdjoint, ReversibleHeun"
EQUATION = sf.SDE(problems.drift, problems.diffusion, interpretation="stratonovich")


def hand(size: Size, params: dict, y0: jax.Array, increments: jax.Array) -> jax.Array:
    """The scan of reversible Heun steps that an expert writes by hand: one drift and one diffusion a step."""
    h = size.step_size
    slopes = lambda y: (problems.drift(None, y, params), problems.diffusion(None, y, params))

    def step(carry: Any, dw: jax.Array) -> tuple[Any, None]:
        y, z, f, g = carry
        z1 = 2 * y - z + f * h + g * dw
        f1, g1 = slopes(z1)
        return (y + (f + f1) * (h / 2) + (g + g1) * (dw / 2), z1, f1, g1), None

    return jax.lax.scan(step, (y0, y0, *slopes(y0)), increments)[0][0]


def hand_draws(size: Size, params: dict, y0: jax.Array, key: jax.Array) -> jax.Array:
    """The hand-written scan that draws its noise in one batch."""
    return hand(size, params, y0, problems.draw(size, key))


def ours(solver: Any, adjoint: Any, size: Size, params: dict, y0: jax.Array, key: jax.Array) -> jax.Array:
    """Ours, as a user writes it."""
    sol = sf.solve(
        EQUATION, y0, np.array([0.0, 1.0]), args=params, key=key, dt0=size.step_size, solver=solver, adjoint=adjoint
    )
    return sol.final


def theirs(tree: bool, size: Size, params: dict, y0: jax.Array, key: jax.Array) -> jax.Array:
    """The loop and the default adjoint of diffrax, on its own Brownian path or on a table."""
    like = jax.ShapeDtypeStruct(y0.shape, y0.dtype)
    if tree:
        path = diffrax.VirtualBrownianTree(0.0, 1.0, size.step_size / 2, like, key)
    else:
        path = sf.paths.GridBrownian(sf.grids.uniform(0.0, 1.0, size.steps), like, key=key, storage="table")
    sol = diffrax.diffeqsolve(
        EQUATION.terms(path), HEUN, 0.0, 1.0, size.step_size, y0, params, max_steps=size.steps
    )  # fmt: skip
    return sol.ys[-1]


def run(options: Options) -> list[Claim]:
    """Memory, then time."""
    parts = {"6b": _memory, "7": _time}
    return [part(options) for number, part in parts.items() if options.wants(number)]


# ---- Memory: compiled and never run. ----


def _states(size: Size) -> int:
    return 4 * size.batch * size.dim


def _memory(options: Options) -> Claim:
    size, state = MEASURED, _states(MEASURED)
    bounds = {
        JUDGED: (STATES * state + BYTES_PER_ROW * size.steps) / 1e6,
        "adjoint=None": STATES_BY_ITSELF * state / 1e6,
    }
    programs: dict[str, Callable] = {
        **{name: functools.partial(ours, *how) for name, how in OURS.items()},
        "hand scan, stored": hand_draws,
        "diffrax, its adjoint, a table of noise": functools.partial(theirs, False),
        "diffrax, all defaults": functools.partial(theirs, True),
    }

    def row(name: str) -> Row:
        args = problems.make(size)
        memory = jax.jit(peers.program(programs[name], size, gradient=True)).lower(*args).compile().memory_analysis()
        used = memory.temp_size_in_bytes
        note = f"{used / state:.0f} states"
        if name.startswith("Reversible"):
            note += f", {(used - BYTES_PER_ROW * size.steps) / state:.1f} and {BYTES_PER_ROW} bytes a row of the grid"
        return Row(name, temp_mb=used / 1e6, note=note, target=bounds.get(name), judged=("temp_mb",))

    return Claim(
        "6b",
        "memory of a gradient through ten thousand steps",
        f"n={size.steps} B={size.batch} D={size.dim} W={size.width} float32, reversible Heun unless said; "
        f"state {state} bytes; noise drawn inside",
        "nothing: temporary memory of the compiled value and gradient",
        [harness.attempt(name, functools.partial(row, name), bounds.get(name)) for name in programs],
    )


# ---- Time. ----


def _time(options: Options) -> Claim:
    size, args = TIMED, problems.make(TIMED)
    limit = _compiled("hand scan, stored, draws its noise", hand_draws, size)
    itself = harness.row(limit, dataclasses.replace(limit, note="the limit against itself: the noise floor"), options)
    truth = _Truth(size, *args)
    rows = []
    for name, how in OURS.items():
        target = SECONDS if name == JUDGED else None
        if name == "adjoint=None":
            continue
        make = lambda name=name, how=how, t=target: _row(limit, name, how, size, truth, options, t)
        rows.append(harness.attempt(name, make, target))
    rows.append(dataclasses.replace(itself, note=f"{itself.note}; {_note(limit, size, truth.of_hand(limit))}"))
    few, fewest = (dataclasses.replace(size, steps=n) for n in (FEWER, FEWEST))
    for name, tree, taken in (
        ("diffrax, its adjoint, a table of noise", False, size),
        ("diffrax, all defaults", True, few),
    ):
        rows.append(harness.attempt(name, functools.partial(_their_row, limit, name, tree, taken, options)))
    if options.torch and not options.quick:
        short = _compiled("hand scan", hand_draws, fewest)
        found = torch_peers.reversible_row(short, fewest, options)
        note = f"{fewest.steps} steps beside the hand scan of as many; {found.note}"
        rows.append(dataclasses.replace(found, note=note))
    return Claim(
        "7",
        "value and gradient through ten thousand steps",
        f"n={size.steps} B={size.batch} D={size.dim} W={size.width} float32, reversible Heun unless said",
        f"{limit.name}, {itself.ms:.3g} ms",
        rows,
        ["float64: the largest entry by which the gradient differs from that of the same steps on the same noise"],
        floor=itself,
    )


def _compiled(name: str, implementation: Callable, size: Size) -> Method:
    return harness.compiled(name, peers.program(implementation, size, gradient=True), problems.make(size))


def _row(
    limit: Method, name: str, how: tuple[Any, Any], size: Size, truth: "_Truth", options: Options, target: float | None
) -> Row:
    method = _compiled(name, functools.partial(ours, *how), size)
    method = dataclasses.replace(method, note=_note(method, size, truth.of_ours(how[0], method)))
    return harness.row(limit, method, options, target)


def _their_row(limit: Method, name: str, tree: bool, size: Size, options: Options) -> Row:
    whole = size.steps == TIMED.steps
    beside = limit if whole else _compiled("hand scan", hand_draws, size)
    method = _compiled(name, functools.partial(theirs, tree), size)
    note = _note(method, size, None)
    note = note if whole else f"{size.steps} steps beside the hand scan of as many; {note}"
    return harness.row(beside, dataclasses.replace(method, note=note), options)


def _note(method: Method, size: Size, off: float | None) -> str:
    note = "" if method.temp_mb is None else f"{1e6 * method.temp_mb / _states(size):.0f} states"
    return note if off is None else f"{note}, float64 {off:.1e}"


class _Truth:
    """Gradients of the same steps on the same noise, in double precision."""

    def __init__(self, size: Size, params: dict, y0: jax.Array, key: jax.Array):
        self.size, self.start, self.key = size, (params, y0), key
        # Ten thousand rows are drawn one by one from a counter: its increments, all at once.
        grid = sf.grids.uniform(0.0, 1.0, size.steps)
        path = sf.paths.GridBrownian(grid, jax.ShapeDtypeStruct(y0.shape, y0.dtype), key=key, storage="counter")
        h = jnp.asarray(grid.right, y0.dtype) - jnp.asarray(grid.left, y0.dtype)
        self.increments = np.asarray(jax.jit(jax.vmap(lambda i, h: path.row(i, h).W))(jnp.arange(size.steps), h))

    def of_hand(self, method: Method) -> float:
        """For the hand-written scan."""
        increments = np.asarray(jax.jit(functools.partial(problems.draw, self.size))(self.key))
        return self._apart(method, lambda params, y0, w: hand(self.size, params, y0, w), increments)

    def of_ours(self, solver: Any, method: Method) -> float:
        """For a solve of ours."""

        def final(params: dict, y0: jax.Array, w: jax.Array) -> jax.Array:
            grid = sf.grids.uniform(0.0, 1.0, self.size.steps)
            path = sf.paths.GridBrownian(grid, jax.ShapeDtypeStruct(y0.shape, y0.dtype), key=self.key, storage="table")
            path = eqx.tree_at(lambda p: p.table.W, path, w)
            adjoint = sf.adjoints.DiscreteAdjoint("sqrt")
            return sf.solve(EQUATION, y0, [0.0, 1.0], args=params, path=path, solver=solver, adjoint=adjoint).final

        return self._apart(method, final, self.increments)

    def _apart(self, method: Method, final: Callable, increments: np.ndarray) -> float:
        with jax.enable_x64(True):
            double = lambda x: jnp.asarray(np.asarray(x), jnp.float64)
            start, w = jax.tree.map(double, self.start), double(increments)
            wanted = jax.jit(jax.grad(lambda s, w: problems.loss(final(*s, w))))(start, w)
            wanted = [np.asarray(x) for x in jax.tree.leaves(wanted)]
        found = [np.asarray(x, np.float64) for x in jax.tree.leaves(method.call()[1])]
        largest = max(float(np.abs(x).max()) for x in wanted)
        apart = max(float(np.abs(x - y).max()) for x, y in zip(found, wanted, strict=True)) / largest
        return apart if math.isfinite(apart) else math.nan
