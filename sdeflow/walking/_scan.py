"""The scan over rows: what it keeps for the reverse pass, and what it emits.

Steps of a walk are pure, so a reverse pass may store every step, recompute each from the state before it ("step"), or
recompute whole segments ("sqrt"): the same gradient for different memory. On a CPU recomputing is also the faster way.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from .._compat import varies_over, vary
from ._row import Carry, FallibleStep, Rows, first_carry, step_row

Checkpoints = Literal["step", "sqrt"] | int | None


def checkpointed_scan(
    f: Callable, carry: Any, xs: Any, length: int, checkpoints: Checkpoints, unroll: int = 1
) -> tuple[Any, Any]:
    """``lax.scan(f, carry, xs)`` under a checkpointing policy.

    Arguments:
        checkpoints: None stores what every step needs; "step" stores the carry before every step; "sqrt" or a number
            stores the carry before every segment, with about sqrt(length) or that many segments.
        unroll: how many steps are written out in the body of the loop.
    """
    carry = _as_after(f, carry, xs)
    whole_way = unroll >= length
    if checkpoints is None:
        return jax.lax.scan(f, carry, xs, length, unroll=min(unroll, length))
    # Where no loop is left, nothing else keeps the compiler from undoing the recomputation.
    step = jax.checkpoint(f, prevent_cse=whole_way)
    if checkpoints == "step":
        return jax.lax.scan(step, carry, xs, length, unroll=min(unroll, length))
    segments = math.isqrt(length - 1) + 1 if checkpoints == "sqrt" else min(int(checkpoints), length)
    size = -(-length // segments)
    whole = length // size
    # What does not fill a segment is a shorter one of its own, so that a prime length costs nothing extra.
    head = jtu.tree_map(lambda x: x[: whole * size].reshape(whole, size, *x.shape[1:]), xs)
    tail = jtu.tree_map(lambda x: x[whole * size :], xs)

    def segment(carry: Any, xs: Any, size: int = size) -> tuple[Any, Any]:
        return jax.lax.scan(step, carry, xs, size, unroll=min(unroll, size))

    carry, out = jax.lax.scan(
        jax.checkpoint(segment, prevent_cse=whole_way), carry, head, whole, unroll=whole if whole_way else 1
    )
    out = jtu.tree_map(lambda x: x.reshape(whole * size, *x.shape[2:]), out)
    rest = length - whole * size
    if rest:
        # Not inside a loop, so nothing else keeps the compiler from undoing the recomputation.
        carry, last = jax.checkpoint(lambda c, x: segment(c, x, rest))(carry, tail)
        out = jtu.tree_map(lambda a, b: jnp.concatenate([a, b]), out, last)
    return carry, out


def _as_after(f: Callable, carry: Any, xs: Any) -> Any:
    """Within ``jax.shard_map``: the carry, varying over the axes of the mesh that it varies over after a step."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return carry
    while True:
        after: list[Any] = []

        def step(carry: Any, row: Any, after: list[Any] = after) -> None:
            after[:] = map(varies_over, jtu.tree_leaves(f(carry, row)[0]))

        jax.eval_shape(step, carry, jtu.tree_map(lambda x: x[0], xs))
        leaves, treedef = jtu.tree_flatten(carry)
        if not any(axes - varies_over(x) for x, axes in zip(leaves, after)):
            return carry
        carry = treedef.unflatten([vary(x, axes) for x, axes in zip(leaves, after)])


def walk(
    solver: Any,
    terms: Any,
    args: Any,
    y0: PyTree,
    rows: Rows,
    *,
    checkpoints: Checkpoints,
    every: int | None,
    emit: Callable[[Any, Carry, Any], Any],
    start: Carry | None = None,
) -> tuple[Carry, Any]:
    """Walk all rows.

    Arguments:
        start: the carry before the first row; None makes it from ``y0``.
        every: None emits nothing; k emits after every k-th row (k divides the number of rows), 1 after each.
        emit: ``emit(right, carry, info)``, what to emit after a row; ``info`` is None unless ``every`` is 1.

    Returns:
        The last carry, and what was emitted, leading with the number of emissions (None if nothing was).
    """

    def run(fallible: bool) -> tuple[Carry, Any]:
        def body(carry: Carry, row: Any) -> tuple[Carry, Any]:
            carry, info = step_row(solver, terms, args, rows, carry, row)
            return carry, (emit(row[1], carry, info) if every == 1 else None)

        carry = first_carry(solver, terms, args, y0, rows, fallible) if start is None else start
        if every is None or every == 1:
            return checkpointed_scan(body, carry, rows.arrays, rows.length, checkpoints)
        length, intervals = every, rows.length // every
        nested = jtu.tree_map(lambda x: x.reshape(intervals, every, *x.shape[1:]), rows.arrays)

        def interval(carry: Carry, xs: Any) -> tuple[Carry, Any]:
            carry, _ = checkpointed_scan(body, carry, xs, length, checkpoints)
            return carry, emit(xs[1][-1], carry, None)

        outer = checkpoints if checkpoints == "sqrt" or isinstance(checkpoints, int) else None
        return checkpointed_scan(interval, carry, nested, intervals, outer)

    try:
        return run(fallible=False)
    except FallibleStep:
        return run(fallible=True)
