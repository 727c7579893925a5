"""Claim: the Brownian path of diffrax costs little more than plain normals, and Milstein little more than Euler.

Row 8 draws every increment of the path that ``diffrax.VirtualBrownianTree`` has with the same key, over n equal
steps, and compares with one draw of as many normals: the least that any path costs. diffrax's tree answers for every
interval and its cost is that of the intervals it is asked for; ours is for this grid, though it is the same path.

Row 9 solves the medium problem by `sdeflow.solvers.DiagonalMilstein` and by Euler, noise drawn inside both timings.
Each entry of the problem's diffusion sees the whole state, which costs what it would cost if it did not; for the
numbers of Milstein's method it must not, so agreement is checked against the hand-written scan of the same formula.
"""

import dataclasses
import functools

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax

import sdeflow as sf

from . import _harness as harness
from . import _peers as peers
from . import _problems as problems
from ._harness import Claim, Method, Options
from ._problems import Size

SHAPE = (32, 32)
LENGTHS = (256, 1024)  # powers of two, where the tree's nodes are the grid's


def run(options: Options) -> list[Claim]:
    """Measure both targets."""
    claims = []
    if options.wants("8"):
        claims += [_draw(n, options) for n in (LENGTHS[:1] if options.quick else LENGTHS)]
    if options.wants("9"):
        claims.append(_milstein(options))
    return claims


# ---- 8: the tree. ----


def grid_tree(n: int, key: jax.Array) -> jax.Array:
    """All increments (n, 32, 32), by us."""
    grid = sf.grids.uniform(0.0, 1.0, n)
    return sf.paths.GridBrownian(grid, SHAPE, key=key, storage="tree").table.W


def one_draw(n: int, key: jax.Array) -> jax.Array:
    """As many normals, in one draw, not even scaled."""
    return jr.normal(key, (n, *SHAPE))


def _ends(n: int) -> tuple[jax.Array, jax.Array]:
    times = jnp.linspace(0.0, 1.0, n + 1)
    return times[:-1], times[1:]


def tree_path(n: int, key: jax.Array) -> diffrax.VirtualBrownianTree:
    """The path of diffrax, as coarse as it may be for n steps."""
    return diffrax.VirtualBrownianTree(0.0, 1.0, tol=0.5 / n, shape=SHAPE, key=key)


def tree_in_loop(n: int, key: jax.Array) -> jax.Array:
    """What a solve does: ask for one step after the other."""
    path = tree_path(n, key)
    return jax.lax.scan(lambda _, ends: (None, path.evaluate(*ends)), None, _ends(n))[1]


def tree_in_batch(n: int, key: jax.Array) -> jax.Array:
    """The best that can be had from it: ask for all steps at once, before the loop."""
    return jax.vmap(tree_path(n, key).evaluate)(*_ends(n))


def _draw(n: int, options: Options) -> Claim:
    args = (jr.key(0),)

    def build(name: str, draw: object, note: str = "") -> Method:
        return harness.compiled(name, functools.partial(draw, n), args, note)

    limit = build("one draw of normals", one_draw)
    ours, loop = build("sdeflow", grid_tree), build("diffrax, in a loop", tree_in_loop, "as diffeqsolve asks it")
    batch = build("diffrax, all at once", tree_in_batch, "vmap(path.evaluate) before the loop")
    rows = [harness.row(limit, ours, options, 1.4)]
    rows.append(harness.row(limit, dataclasses.replace(limit, note="against itself: the noise floor"), options))
    rows += [harness.row(limit, method, options) for method in (loop, batch)]
    increments = loop.call()
    apart = jnp.max(jnp.abs(ours.call() - increments))
    total = jnp.max(jnp.abs(jnp.cumsum(ours.call(), axis=0) - jnp.cumsum(increments, axis=0)))
    return Claim(
        "8",
        f"the path of VirtualBrownianTree, n={n}",
        f"n={n} steps of shape {SHAPE[0]}x{SHAPE[1]} float32, W alone; diffrax's tolerance is half a step",
        f"{limit.name}, {rows[1].ms:.3g} ms",
        rows,
        [f"largest difference from diffrax's path: increments {apart:.1e}, path {total:.1e}"],
        floor=rows[1],
    )


# ---- 9: Milstein. ----


def milstein(size: Size, params: dict, y0: jax.Array, key: jax.Array) -> jax.Array:
    """Ours."""
    equation = sf.SDE(problems.drift, problems.diffusion)
    solver = sf.solvers.DiagonalMilstein()
    return sf.solve(equation, y0, [0.0, 1.0], args=params, key=key, dt0=size.step_size, solver=solver).final


def hand_milstein(size: Size, params: dict, y0: jax.Array, increments: jax.Array) -> jax.Array:
    """A scan of Milstein steps with one Jacobian-vector product, by hand."""
    h = size.step_size

    def step(y: jax.Array, dw: jax.Array) -> tuple[jax.Array, None]:
        noise = functools.partial(problems.diffusion, None, args=params)
        g, along = jax.jvp(noise, (y,), (noise(y),))
        return y + problems.drift(None, y, params) * h + g * dw + along * (0.5 * (dw**2 - h)), None

    return jax.lax.scan(step, y0, increments)[0]


def hand_milstein_draws(size: Size, params: dict, y0: jax.Array, key: jax.Array) -> jax.Array:
    """The same, drawing its noise."""
    return hand_milstein(size, params, y0, problems.draw(size, key))


def ito_milstein(size: Size, params: dict, y0: jax.Array, key: jax.Array) -> jax.Array:
    """diffrax's, under vmap (with the batch inside the state it would need the cube of all its entries)."""
    grid = sf.grids.uniform(0.0, 1.0, size.steps)

    def diffusion(t: jax.Array, y: jax.Array, args: dict) -> lineax.AbstractLinearOperator:
        return lineax.DiagonalLinearOperator(problems.diffusion(t, y, args))

    def one(y0: jax.Array, key: jax.Array) -> jax.Array:
        path = sf.paths.GridBrownian(grid, y0.shape, key=key)
        terms = diffrax.MultiTerm(diffrax.ODETerm(problems.drift), diffrax.ControlTerm(diffusion, path))
        return diffrax.diffeqsolve(terms, diffrax.ItoMilstein(), 0.0, 1.0, size.step_size, y0, args=params).ys[-1]

    return jax.vmap(one)(y0, jr.split(key, size.batch))


def _milstein(options: Options) -> Claim:
    size = problems.SIZES["medium"]
    args = problems.make(size)

    def build(name: str, implementation: object, note: str = "") -> Method:
        return harness.compiled(name, peers.program(implementation, size, gradient=False), args, note)

    euler = build("sdeflow, Euler", peers.sdeflow)
    ours = build("sdeflow", milstein, "DiagonalMilstein")
    hand = build("hand scan, Milstein", hand_milstein_draws, "the limit")
    rows = [harness.row(euler, ours, options, 1.3)]
    rows.append(harness.row(euler, dataclasses.replace(euler, note="against itself: the noise floor"), options))
    rows.append(harness.row(euler, hand, options))
    again = dataclasses.replace(ours, name="sdeflow / that scan", note="relative to the hand-written Milstein")
    rows.append(harness.row(hand, again, options))
    rows.append(harness.row(euler, build("hand scan, Euler", peers.hand_draws), options))
    note = "vmap outside, a table of noise: our path"
    rows.append(
        harness.attempt(
            "diffrax ItoMilstein",
            lambda: harness.row(euler, build("diffrax ItoMilstein", ito_milstein, note), options),
        )
    )
    # By value, on the same noise: our path's increments handed to the scan.
    increments = peers.sdeflow_increments(size, args[1], args[2])
    by_hand = jax.jit(functools.partial(hand_milstein, size))(args[0], args[1], increments)
    apart = jnp.max(jnp.abs(jax.jit(functools.partial(milstein, size))(*args) - by_hand))
    return Claim(
        "9",
        "diagonal Milstein / Euler, forward, medium",
        f"n={size.steps} B={size.batch} D={size.dim} W={size.width} float32, noise drawn inside both",
        f"{euler.name}, {rows[1].ms:.3g} ms",
        rows,
        [
            f"on the same increments, the largest difference in the last state from the hand scan: {apart:.1e}",
            "a step of Euler goes through two networks, one of Milstein through three: the derivative is one more",
        ],
        floor=rows[1],
    )
