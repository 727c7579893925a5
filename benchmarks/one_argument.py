"""Claim: one changed argument makes an existing diffrax training step faster, with the same numbers.

The script trains the drift and diffusion networks with optax, through ``diffrax.diffeqsolve`` with a
``VirtualBrownianTree`` and steps of fixed length. It is timed as it is; with
``adjoint=sf.adjoints.DiscreteAdjoint()`` as the one change; and with the Brownian path exchanged for
`sdeflow.paths.GridBrownian` as well. A tree is a path for every refinement of the steps and the grid's path
for these steps only, so the third line gives up a feature.

A second table solves ten steps, of 3 and of 10 000 numbers, with ``max_steps`` as by default and of a million,
where the number of steps is known while tracing and where the end of the time is traced, forwards and with the
gradient.
"""

import functools
from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import lineax
import optax

import sdeflow as sf

from . import _harness as harness
from . import _peers as peers
from . import _problems as problems
from ._harness import Claim, Options

SIZE = problems.SIZES["mid"]
SOLVERS = {"Euler": diffrax.Euler, "Heun": diffrax.Heun}


def training_step(solver: diffrax.AbstractSolver, make_path: Callable, **changed: Any) -> Callable:
    """The user's training step; ``changed`` are the arguments added to ``diffeqsolve``."""
    optim = optax.adam(1e-3)

    def diffusion(t: Any, y: jax.Array, args: dict) -> lineax.AbstractLinearOperator:
        return lineax.DiagonalLinearOperator(problems.diffusion(t, y, args))

    def loss(params: dict, y0: jax.Array, key: jax.Array) -> jax.Array:
        terms = diffrax.MultiTerm(diffrax.ODETerm(problems.drift), diffrax.ControlTerm(diffusion, make_path(y0, key)))
        sol = diffrax.diffeqsolve(terms, solver, 0.0, 1.0, SIZE.step_size, y0, args=params, **changed)
        return problems.loss(sol.ys[-1])

    def step(params: dict, opt_state: Any, y0: jax.Array, key: jax.Array) -> tuple:
        value, grads = jax.value_and_grad(loss)(params, y0, key)
        updates, opt_state = optim.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, value, grads

    return step


def tree(y0: jax.Array, key: jax.Array) -> diffrax.VirtualBrownianTree:
    """The path of the script before it is changed."""
    return diffrax.VirtualBrownianTree(
        0.0, 1.0, tol=SIZE.step_size / 2, shape=jax.ShapeDtypeStruct(y0.shape, y0.dtype), key=key
    )


def run(options: Options) -> list[Claim]:
    """Time the script before and after, with Euler and with Heun (Euler alone when quick)."""
    names = ["Euler"] if options.quick else list(SOLVERS)
    return [measure(name, SOLVERS[name](), options) for name in names] + ten_steps(options)


def ten_steps(options: Options) -> list[Claim]:
    """Ten steps of Tsit5, and of Heun on a Brownian tree, whatever ``max_steps`` is."""
    claims = []
    sizes = [10_000] if options.quick else [3, 10_000]
    for noisy in (False, True):
        for size in sizes:
            pairs = [(fwd, bound, known) for fwd in (True, False) for bound in (4096, 10**6) for known in (True, False)]
            rows = []
            for forwards, bound, known in pairs:
                what = "value" if forwards else "gradient"
                name = f"{what}, max_steps={bound:.0e}, {'known' if known else 'traced'} end"
                before, after = (
                    harness.compiled(name, _ten_steps(noisy, forwards, bound, known, adjoint), _start(size))
                    for adjoint in (diffrax.RecursiveCheckpointAdjoint(), sf.adjoints.DiscreteAdjoint())
                )
                rows.append(harness.row(before, after, options, 1.1))
            what = "Heun on a VirtualBrownianTree" if noisy else "Tsit5"
            setting = f"{size} numbers, float32, {what}, five saved times, ten steps taken"
            claims.append(
                Claim(
                    "one argument",
                    f"ten steps of {what}, {size} numbers",
                    setting,
                    "diffrax, its default adjoint",
                    rows,
                )
            )
    return claims


def _start(size: int) -> tuple[jax.Array, jax.Array]:
    return jnp.linspace(0.5, 1.5, size), jnp.array(1.0)


def _ten_steps(
    noisy: bool, forwards: bool, max_steps: int, known: bool, adjoint: diffrax.AbstractAdjoint
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    def final(y: jax.Array, end: jax.Array) -> jax.Array:
        drift = diffrax.ODETerm(lambda t, y, args: -y)
        shape = jax.ShapeDtypeStruct(y.shape, y.dtype)
        path = diffrax.VirtualBrownianTree(0.0, 1.0, tol=0.05, shape=shape, key=jax.random.key(0))
        noise = diffrax.ControlTerm(lambda t, y, args: lineax.DiagonalLinearOperator(0.1 * y), path)
        sol = diffrax.diffeqsolve(
            diffrax.MultiTerm(drift, noise) if noisy else drift, diffrax.Heun() if noisy else diffrax.Tsit5(),
            0.0, 1.0 if known else end, 0.1, y, saveat=diffrax.SaveAt(ts=jnp.linspace(0, 1, 5)), max_steps=max_steps,
            adjoint=adjoint,
        )  # fmt: skip
        return sol.ys.sum()

    return final if forwards else jax.grad(final)


def measure(name: str, solver: diffrax.AbstractSolver, options: Options) -> Claim:
    """The three lines for one solver."""
    params, y0, key = problems.make(SIZE)
    args = (params, optax.adam(1e-3).init(params), y0, key)
    grid_path = functools.partial(peers.grid_path, SIZE)
    discrete = sf.adjoints.DiscreteAdjoint()
    before = harness.compiled("as it was", training_step(solver, tree), args)
    after = harness.compiled(
        "adjoint=DiscreteAdjoint()",
        training_step(solver, tree, adjoint=discrete),
        args,
        "the one changed argument",
    )
    both = harness.compiled(
        "and path=GridBrownian",
        training_step(solver, grid_path, adjoint=discrete),
        args,
        "another Brownian path",
    )
    # the numbers of the third line are checked against diffrax's own adjoint on the same path
    check = jax.jit(training_step(solver, grid_path))(*args)
    rows = [harness.row(before, method, options) for method in (before, after, both)]
    remarks = [
        "one argument changed, same Brownian path: " + _differences(before.call(), after.call()),
        "path changed too, against diffrax's adjoint on that path: " + _differences(check, both.call()),
    ]
    setting = f"n={SIZE.steps} B={SIZE.batch} D={SIZE.dim} W={SIZE.width} float32, {name}; gradient and Adam update"
    return Claim(
        "one argument",
        f"a diffrax training step, {name}",
        setting,
        f"{before.name}, {rows[0].ms:.3g} ms",
        rows,
        remarks,
    )


def _differences(a: tuple, b: tuple) -> str:
    loss = abs(float(a[2] - b[2])) / abs(float(a[2]))
    pairs = list(zip(jax.tree.leaves(a[3]), jax.tree.leaves(b[3]), strict=True))
    worst = max(float(jnp.max(jnp.abs(x - y))) for x, y in pairs) / max(float(jnp.max(jnp.abs(x))) for x, _ in pairs)
    return f"loss differs by {loss:.1e} of its value, gradients by {worst:.1e} of the largest entry"
