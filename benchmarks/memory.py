"""Claim: the gradient of ten thousand steps fits in the memory of a few hundred, its noise included.

dY = f(Y) dt + 0.3 dW on [0, 1] with f(Y) = tanh(Y W + b) - Y and a state of 32 x 64 float32, which is 8 KiB. The
figure is the temporary memory of the compiled value and gradient: what the reverse pass keeps, and the table of noise
if there is one. A table is one state a step, whatever the adjoint; a counter draws every row when it is needed.

Rows named "default" leave the choice to `sdeflow.solve`, which takes a table up to 4096 steps and a counter beyond;
beside each stands the other choice. Time is that of one execution: here it only says what the memory was paid for with.
"""

import dataclasses
import functools
import time

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

import sdeflow as sf

from . import _harness as harness
from ._harness import Claim, Method, Options, Row

SHAPE = (32, 64)
STATE = 4 * SHAPE[0] * SHAPE[1]  # bytes
LENGTHS = (100, 1000, 10_000)
#: megabytes for the longest solve, by segments with the noise of the default
BOUND = 25.0

SOLVERS = {"Heun": diffrax.Heun(), "Euler": diffrax.Euler()}
#: every adjoint, by its name in the table; one of diffrax runs diffrax's loop over the same path
ADJOINTS = {
    'checkpoints="step"': sf.adjoints.DiscreteAdjoint("step"),
    'checkpoints="sqrt"': sf.adjoints.DiscreteAdjoint("sqrt"),
    "checkpoints=None": sf.adjoints.DiscreteAdjoint(None),
    "diffrax RecursiveCheckpoint": diffrax.RecursiveCheckpointAdjoint(),
}
#: the adjoint that is held to the bound
JUDGED = 'checkpoints="sqrt"'
#: steps up to which `sdeflow.solve` draws a table
TABLE_UP_TO = 4096


def storages(n: int) -> dict[str, str]:
    """What stores the noise of n steps: the default, and the other, by their names in the table."""
    default, other = ("table", "counter") if n <= TABLE_UP_TO else ("counter", "table")
    return {f"default ({default})": "default", other: other}


def make() -> tuple[dict, jax.Array, jax.Array]:
    """Weights, initial state and key."""
    k_weight, k_y0, key = jr.split(jr.key(0), 3)
    weight = jr.normal(k_weight, (SHAPE[1], SHAPE[1])) / np.sqrt(SHAPE[1])
    return {"weight": weight, "bias": jnp.zeros(SHAPE[1])}, jr.normal(k_y0, SHAPE), key


def _drift(t: jax.Array, y: jax.Array, args: dict) -> jax.Array:
    return jnp.tanh(y @ args["weight"] + args["bias"]) - y


def _diffusion(t: jax.Array, y: jax.Array, args: dict) -> jax.Array:
    return jnp.full_like(y, 0.3)


def loss(
    n: int,
    solver: diffrax.AbstractSolver,
    adjoint: diffrax.AbstractAdjoint,
    storage: str,
    params: dict,
    y0: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """The mean square of the last state, the noise drawn within."""
    grid = sf.grids.uniform(0.0, 1.0, n)
    if storage == "default":
        noise = {"grid": grid, "key": key}
    else:
        noise = {"path": sf.paths.GridBrownian(grid, y0, key=key, storage=storage)}
    equation = sf.SDE(_drift, _diffusion, additive=True)
    sol = sf.solve(equation, y0, [0.0, 1.0], args=params, solver=solver, adjoint=adjoint, **noise)
    return jnp.mean(sol.final**2)


def run(options: Options) -> list[Claim]:
    """Both solvers, at all lengths (Heun, at the ends, when quick)."""
    names = ["Heun"] if options.quick else list(SOLVERS)
    lengths = (LENGTHS[0], LENGTHS[-1]) if options.quick else LENGTHS
    return [_measure(name, n, options) for name in names for n in lengths]


def _measure(solver: str, n: int, options: Options) -> Claim:
    rows, remarks = [], []
    for title, storage in storages(n).items():
        if options.quick and storage != "default":
            continue
        gradients: list = []
        for name, adjoint in ADJOINTS.items():
            label = f"{name}, {title}"
            target = BOUND if (n, name, storage) == (LENGTHS[-1], JUDGED, "default") else None
            fn = jax.value_and_grad(functools.partial(loss, n, SOLVERS[solver], adjoint, storage), argnums=(0, 1))
            rows.append(harness.attempt(label, functools.partial(_row, label, fn, target, gradients), target))
        remarks.append(f"{title}: largest difference of the gradients from the first row's, {_apart(gradients)}")
    return Claim(
        "6",
        f"memory of the gradient, {solver}, {n} steps",
        f"n={n}, state {SHAPE[0]}x{SHAPE[1]} float32 ({STATE / 1024:g} KiB), additive noise drawn inside, value and "
        "gradient",
        "nothing: temporary memory of the compiled program; milliseconds of one execution",
        rows,
        remarks,
    )


def _row(label: str, fn: object, target: float | None, gradients: list) -> Row:
    method: Method = harness.compiled(label, fn, make())
    start = time.perf_counter()
    gradients.append(jax.tree.leaves(jax.tree.map(np.asarray, method.call()[1])))
    ms = 1e3 * (time.perf_counter() - start)
    note = "" if method.temp_mb is None else f"{1e6 * method.temp_mb / STATE:.0f} states"
    kept = {k: getattr(method, k) for k in ("trace_s", "compile_s", "temp_mb", "loop_ops")}
    return dataclasses.replace(Row(label, ms=ms, note=note, target=target, judged=("temp_mb",)), **kept)


def _apart(gradients: list) -> str:
    """How far gradients on one sample of the noise differ from the first, relative to its largest entry."""
    first = gradients[0]
    largest = max(float(np.max(np.abs(x))) for x in first)
    worst = max(float(np.max(np.abs(x - y))) for g in gradients for x, y in zip(first, g, strict=True))
    return f"{worst / largest:.1e} of its largest entry"
