"""What is returned of a solve that failed: its last accepted state, and NaN for all that was not reached.

A number for what was never computed would pass for a solution inside of a trace, where nothing is raised. So would its
derivative: those of a failed solve are NaN too.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, Bool, PyTree

from .._results import RESULTS, is_okay
from ..adjoints._freeze import freeze


def last_finite(ts: Array, y0: PyTree, ys: PyTree | None, final: PyTree, reached: Any) -> tuple[PyTree, Array]:
    """The last state known to be finite and its time: the final one, or the last before the states became infinite.

    Arguments:
        ys: the states at the requested times; None if they were not kept.
        reached: the time of ``final``.
    """
    good = _finite(final, 0)
    if ys is None:
        before, when = y0, ts[0]
    else:
        steady = jnp.cumprod(_finite(ys, 1).astype(jnp.int32))
        row = jnp.maximum(steady.sum() - 1, 0)
        before, when = jtu.tree_map(lambda x: x[row], ys), ts[row]
    return jtu.tree_map(lambda a, b: jnp.where(good, a, b), final, before), jnp.where(good, reached, when)


def void_failed(
    result: Any,
    ts: Array,
    reached: Array,
    at_times: list[tuple[Array, PyTree]],
    whole: PyTree,
    last: PyTree,
    inputs: PyTree,
) -> tuple[list[PyTree], PyTree, PyTree]:
    """What came of a solve, without the numbers and derivatives of one that failed.

    Arguments:
        ts: the requested times.
        at_times: pairs of times (n,) and what was seen there, leaves (n, ...); they are void beyond the time reached.
        whole: void if the solve failed.
        last: without derivatives if it failed.
        inputs: what to have no derivative in either; in a solve that failed in its first step nothing depends on it.
    """
    # Both say what is wrong with something else than the states.
    apart = (result == RESULTS.record_overflow) | (result == RESULTS.degenerate_diffusion)
    okay = is_okay(result) | apart
    sign, gap = jnp.sign(ts[-1] - ts[0]), jnp.abs(ts[1:] - ts[:-1])
    # The ends of steps are those of intervals up to rounding.
    slack = 1e-3 * jnp.where(gap > 0, gap, jnp.inf).min(initial=jnp.inf)
    slack = jnp.where(jnp.isfinite(slack), slack, 0)
    okay, reached, sign, slack = freeze((okay, reached, sign, slack))
    tie = _tie(okay, jtu.tree_leaves(eqx.filter(inputs, eqx.is_inexact_array)))

    def rows(times: Array, tree: PyTree) -> PyTree:
        seen = okay | ((freeze(times) - reached) * sign <= slack)
        return jtu.tree_map(lambda x: _void(x, tie, seen.reshape(-1, *(1,) * (jnp.ndim(x) - 1)), okay), tree)

    void = lambda x: _void(x, tie, okay, okay)
    keep = lambda x: _void(x, tie, jnp.array(True), okay)
    return [rows(*pair) for pair in at_times], jtu.tree_map(void, whole), jtu.tree_map(keep, last)


def _void(x: Array, tie: Array, seen: Bool[Array, "..."], okay: Bool[Array, ""]) -> Array:
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return _blanked(x, jnp.broadcast_to(tie.astype(x.dtype), x.shape), seen, okay)
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.where(seen, x, jnp.iinfo(x.dtype).max)
    return x


@jax.custom_jvp
def _tie(okay: Bool[Array, ""], inputs: list[Array]) -> Array:
    """Nought, whose derivative in all inputs is one unless all is okay."""
    # Mapped wherever one of them is: JAX wants a value and its derivative to be mapped alike.
    mapped = okay.astype(jnp.int32) + sum(jnp.isnan(x.reshape(-1)[:1]).sum() for x in inputs)
    return (0 * mapped).astype(float)


@_tie.defjvp
def _tied(primals: Any, tangents: Any) -> Any:
    out = _tie(*primals)
    total = sum((jnp.real(t).sum().astype(out.dtype) for t in tangents[1]), jnp.zeros_like(out))
    return out, jnp.where(primals[0], 0, total)


@jax.custom_jvp
def _blanked(x: Array, tie: Array, seen: Bool[Array, "..."], okay: Bool[Array, ""]) -> Array:
    """``x`` where it was seen, and NaN elsewhere; its derivatives are NaN everywhere unless all is okay."""
    del tie, okay
    return jnp.where(seen, x, jnp.asarray(jnp.nan, x.dtype))


@_blanked.defjvp
def _tangent(primals: Any, tangents: Any) -> Any:
    """NaN for a tangent or cotangent that is not zero: a loss that leaves a failed path out has its gradient.

    Past the largest number all but zero is infinite, and infinity less infinity NaN: in the first difference for a
    cotangent, in the second for a tangent.
    """
    x, _, _, okay = primals
    t = tangents[0] + tangents[1]
    past = jnp.where(okay, 1, jnp.finfo(x.dtype).max).astype(x.dtype)
    beyond = lambda a: a * past * past * past
    return _blanked(*primals), t + beyond(t - t) + (beyond(t) - beyond(t))


def _finite(tree: PyTree, axes: int) -> Bool[Array, "..."]:
    """Whether all numbers are finite, for each index of the first axes."""
    flags = [
        jnp.isfinite(x).all(axis=tuple(range(axes, x.ndim)))
        for x in map(jnp.asarray, jtu.tree_leaves(tree))
        if jnp.issubdtype(x.dtype, jnp.inexact)
    ]
    return jnp.stack(flags).all(axis=0) if flags else jnp.array(True)
