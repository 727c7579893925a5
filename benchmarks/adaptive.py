"""Claim: adaptive solves of ordinary equations cost what diffrax's do, and batches of unlike ones much less.

dy = s f(y) dt on [0, 1] with f = MLP(D, W, W, D), Tsit5, a PID controller at rtol = atol = 1e-5 and a first step of
0.05 for every method; s is the speed of a sample. Row 10a solves forward and 10b takes value and gradient, with the
batch inside the state: one step size for all. In 10c the speeds spread over two decades and every sample has step
sizes of its own, under ``vmap``; the reference is one joint solve of the batch by hand.

The limit is an integrator written by hand for the problem: Dormand and Prince's pair of order 5, the steps of an
integral controller. It is free of controllers to choose, of requested times and of a result to report. Its gradient
is that of a scan over `BOUND` attempts, each recomputed, which stops early: a bound that it is handed, where the
others have only ``max_steps``.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import sdeflow as sf

from . import _harness as harness
from . import _problems as problems
from ._harness import Claim, Method, Options, Row
from ._problems import Size

SIZE = Size("adaptive", batch=128, dim=32, width=64, steps=0)
TOL, FIRST, MAX_STEPS = 1e-5, 0.05, 4096
SPEED, SPREAD, DECADES = 10.0, 3.0, 2
BOUND = 64  # attempts of the hand-written gradient

# ---- The problem. ----


def make(speed: float, decades: float) -> tuple[dict, jax.Array, jax.Array]:
    """Parameters, initial states (B, D), and speeds (B, 1) that spread evenly in their logarithm around ``speed``."""
    params, y0, _ = problems.make(SIZE)
    exponents = np.linspace(-decades / 2, decades / 2, SIZE.batch, dtype=np.float32)
    return params, y0, jnp.asarray(speed * 10.0**exponents)[:, None]


def field(t: Any, y: jax.Array, args: tuple[dict, jax.Array]) -> jax.Array:
    """The vector field s f(y), for a batch or for one sample."""
    params, speed = args
    return speed * problems.drift(t, y, params)


def _controller() -> diffrax.PIDController:
    return diffrax.PIDController(rtol=TOL, atol=TOL)


Answer = tuple[jax.Array, jax.Array, jax.Array]  # the last state, accepted steps, rejected steps


def sdeflow(params: dict, y0: jax.Array, speed: jax.Array, *, max_steps: int = MAX_STEPS) -> Answer:
    """Ours, as a user writes it."""
    sol = sf.solve(
        sf.ODE(field),
        y0,
        [0.0, 1.0],
        args=(params, speed),
        dt0=FIRST,
        solver=diffrax.Tsit5(),
        stepsize_controller=_controller(),
        max_steps=max_steps,
    )
    return sol.final, sol.stats["num_steps"], sol.stats["num_rejected"]


def diffrax_default(
    params: dict,
    y0: jax.Array,
    speed: jax.Array,
    *,
    max_steps: int = MAX_STEPS,
    solver: diffrax.AbstractSolver | None = None,
) -> Answer:
    """The way diffrax comes, its default adjoint."""
    sol = diffrax.diffeqsolve(
        diffrax.ODETerm(field),
        diffrax.Tsit5() if solver is None else solver,
        0.0,
        1.0,
        FIRST,
        y0,
        args=(params, speed),
        stepsize_controller=_controller(),
        max_steps=max_steps,
    )
    return sol.ys[-1], sol.stats["num_accepted_steps"], sol.stats["num_rejected_steps"]


diffrax_dopri5 = functools.partial(diffrax_default, solver=diffrax.Dopri5())


# Dormand and Prince (1980), table 2; the last row of A is also the solution's.
_A = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_E = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def hand(params: dict, y0: jax.Array, speed: jax.Array, *, bounded: bool = False) -> Answer:
    """Dormand and Prince by hand.

    Arguments:
        bounded: loop so that a gradient exists.
    """
    f = lambda y: field(None, y, (params, speed))

    def attempt(carry: tuple) -> tuple:
        t, h, y, slope, taken, refused = carry
        h = jnp.minimum(h, 1.0 - t)
        slopes = [slope]
        for row in _A:
            y1 = y + h * sum(a * k for a, k in zip(row, slopes, strict=True) if a)
            slopes.append(f(y1))
        error = h * sum(e * k for e, k in zip(_E, slopes, strict=True) if e)
        scaled = jax.lax.stop_gradient(error / (TOL + TOL * jnp.maximum(jnp.abs(y), jnp.abs(y1))))
        size = jnp.sqrt(jnp.mean(scaled**2))
        good = size < 1
        factor = jnp.clip(0.9 * size**-0.2, jnp.where(good, 1.0, 0.2), 10.0)
        y, slope = (jnp.where(good, a, b) for a, b in ((y1, y), (slopes[-1], slope)))
        return jnp.where(good, t + h, t), h * factor, y, slope, taken + good, refused + ~good

    go_on = lambda carry: carry[0] < 1.0 - 1e-6
    carry = (jnp.float32(0), jnp.float32(FIRST), y0, f(y0), jnp.int32(0), jnp.int32(0))
    if bounded:
        # What is recomputed is recomputed inside the branch, so attempts that are not needed cost nothing.
        step = jax.checkpoint(attempt, prevent_cse=False)
        body = lambda carry, _: (jax.lax.cond(go_on(carry), step, lambda carry: carry, carry), None)
        carry, _ = jax.lax.scan(body, carry, None, BOUND)
    else:
        carry = jax.lax.while_loop(go_on, attempt, carry)
    # Out of attempts: nothing to be proud of, and not to be timed.
    final = jnp.where(go_on(carry), jnp.nan, carry[2])
    return final, carry[4], carry[5]


def lanes(implementation: Callable[..., Answer]) -> Callable[..., Answer]:
    """The same with a solve for every sample."""

    def each(params: dict, y0: jax.Array, speed: jax.Array, **options: Any) -> Answer:
        return jax.vmap(functools.partial(implementation, params, **options))(y0, speed)

    return each


def program(implementation: Callable[..., Answer], *, gradient: bool, **options: Any) -> Callable:
    """The loss and the numbers of steps, with gradients to the weights and the initial states if asked."""

    def value(params: dict, y0: jax.Array, speed: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        final, taken, refused = implementation(params, y0, speed, **options)
        return problems.loss(final), (taken, refused)

    return jax.value_and_grad(value, argnums=(0, 1), has_aux=True) if gradient else value


# ---- The measurements. ----


def run(options: Options) -> list[Claim]:
    """Measure the three targets."""
    claims = []
    if options.wants("10a"):
        claims.append(_forward(options))
    if options.wants("10b"):
        claims += [_gradient(n, options) for n in ((MAX_STEPS,) if options.quick else (256, MAX_STEPS))]
    if options.wants("10c"):
        claims.append(_vmapped(options))
    return claims


def _build(
    name: str, implementation: Callable[..., Answer], args: tuple, note: str = "", *, gradient: bool, **keep: Any
) -> Method:
    method = harness.compiled(name, program(implementation, gradient=gradient, **keep), args, note)
    steps = _steps(method, gradient)
    return dataclasses.replace(method, note=f"{steps}; {note}" if note else steps)


def _steps(method: Method, gradient: bool) -> str:
    taken, refused = (np.asarray(x) for x in _value(method, gradient)[1])
    if taken.ndim:
        trips = taken + refused
        return f"{taken.min()}-{taken.max()} steps, mean {taken.mean():.1f}, attempts at most {trips.max()}"
    return f"{taken} steps, {refused} refused"


def _value(method: Method, gradient: bool) -> Any:
    return method.call()[0] if gradient else method.call()


def _apart(a: Method, b: Method) -> str:
    """How far two gradients differ, relative to the largest entry."""
    pairs = list(zip(*(jax.tree.leaves(method.call()[1]) for method in (a, b)), strict=True))
    worst = max(float(jnp.max(jnp.abs(x - y))) for x, y in pairs) / max(float(jnp.max(jnp.abs(y))) for _, y in pairs)
    return f"{worst:.1e}"


def _beside(method: Method, other: str) -> Method:
    return dataclasses.replace(method, name=f"{method.name} / {other}", note=f"relative to {other}")


def _floor(reference: Method, options: Options) -> Row:
    note = f"{reference.note}; against itself: the noise floor"
    return harness.row(reference, dataclasses.replace(reference, note=note), options)


def _setting(speeds: str) -> str:
    return f"B={SIZE.batch} D={SIZE.dim} W={SIZE.width} float32, tolerance {TOL:g}, first step {FIRST:g}; {speeds}"


def _forward(options: Options) -> Claim:
    args = make(SPEED, 0)
    build = functools.partial(_build, args=args, gradient=False)
    peer = build("diffrax Tsit5", diffrax_default)
    ours = build("sdeflow", sdeflow)
    limit = build("hand Dopri5", hand)
    rows = [harness.row(peer, ours, options, 1.05), _floor(peer, options), harness.row(peer, limit, options)]
    rows.append(harness.row(limit, _beside(ours, "hand Dopri5"), options))
    rows.append(harness.row(peer, build("diffrax Dopri5", diffrax_dopri5), options))
    apart = abs(float(ours.call()[0] - peer.call()[0]))
    return Claim(
        "10a",
        "adaptive ordinary equation, forward",
        _setting(f"speeds {SPEED:g}, one step size for the batch"),
        f"{peer.name}, all else default, {rows[1].ms:.3g} ms",
        rows,
        [f"loss differs from diffrax's by {apart:.1e}"],
        floor=rows[1],
    )


def _gradient(max_steps: int, options: Options) -> Claim:
    args = make(SPEED, 0)
    build = functools.partial(_build, args=args, gradient=True)
    peer = build("diffrax Tsit5", diffrax_default, max_steps=max_steps)
    ours = build("sdeflow", sdeflow, max_steps=max_steps)
    limit = build("hand Dopri5", hand, note=f"scan of {BOUND} attempts at most", bounded=True)
    rows = [harness.row(peer, ours, options, 1.1), _floor(peer, options), harness.row(peer, limit, options)]
    rows.append(harness.row(limit, _beside(ours, "hand Dopri5"), options))
    return Claim(
        "10b",
        f"adaptive ordinary equation, value and gradient, max_steps={max_steps}",
        _setting(f"speeds {SPEED:g}, one step size for the batch"),
        f"{peer.name}, RecursiveCheckpointAdjoint, {rows[1].ms:.3g} ms",
        rows,
        [f"largest difference of the gradients from diffrax's, of the largest entry: {_apart(ours, peer)}"],
        floor=rows[1],
    )


def _vmapped(options: Options) -> Claim:
    args = make(SPREAD, DECADES)
    build = functools.partial(_build, args=args, gradient=True)
    limit = build("hand Dopri5, joint", hand, note=f"scan of {BOUND} attempts at most", bounded=True)
    ours = build("sdeflow", lanes(sdeflow), note="vmap")
    joint = build("sdeflow, joint", sdeflow)
    rows = [harness.row(limit, ours, options, 1.8), _floor(limit, options), harness.row(limit, joint, options)]
    rows.append(harness.row(joint, _beside(ours, "its joint solve"), options))
    remarks = []
    peer = build("diffrax Tsit5, vmap", lanes(diffrax_default), note=f"max_steps={MAX_STEPS}, the default")
    remarks.append(f"largest difference of the gradients under vmap from diffrax's: {_apart(ours, peer)}")
    rows.append(harness.row(limit, peer, options))
    rows.append(harness.row(limit, build("diffrax Tsit5, joint", diffrax_default), options))
    remarks.append(
        "a joint solve steps for the batch's mean error and so lets slow samples buy the fast ones a larger error: "
        "under vmap every sample meets the tolerance alone"
    )
    return Claim(
        "10c",
        "adaptive ordinary equations, unlike samples under vmap, value and gradient",
        _setting(f"speeds over {DECADES} decades around {SPREAD:g}"),
        f"{limit.name}, {rows[1].ms:.3g} ms",
        rows,
        remarks,
        floor=rows[1],
    )
