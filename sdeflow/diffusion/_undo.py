r"""Gradients of `BDIA` with memory for one pair of states: the reverse pass undoes the steps.

A row takes (z_{n-1}, z_n) to (z_n, z_{n+1}) with ``z_{n+1} = g(z_n) + back z_{n-1}``, ``g(z) = keep z + out m(z)``. So

    z_{n-1} = (z_{n+1} - g(z_n)) / back

takes the one evaluation that the pullback of g needs as well: a reverse row costs what recomputing and differentiating
a step costs, and nothing is kept of the way but its end.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from .._compat import varies_over, vary
from ..adjoints._attach import Flags, attach
from ..adjoints._freeze import freeze
from ..adjoints._lanes import Lanes, add, zeros
from ._denoiser import AbstractDenoiser
from ._table import Table, Walked, follow, read

_FIRST_ONLY = (
    "ReversibleAdjoint has first derivatives in reverse mode, by jax.grad: for second derivatives or forward mode pass "
    "adjoint=sdeflow.adjoints.DiscreteAdjoint()."
)


class _Problem(eqx.Module):
    """All that the reverse pass reads: g with what it closes over, the rows, and the states at both ends."""

    step: Any
    rows: Any
    start: Any
    final: Any


def follow_to_undo(
    table: Table, denoiser: AbstractDenoiser, x: Array, base: Array | None, args: Any, max_defect: float
) -> Walked:
    """`follow`, with gradients of the denoiser, the arguments and the start that undo the rows.

    Arguments:
        max_defect: gradients are NaN where the start is missed by more, relative to its size.
    """
    # Within jax.shard_map all of them have to vary alike.
    alike = lambda a: vary(a, varies_over(x))
    table, base = jtu.tree_map(alike, (table.cast(x.dtype), base))
    ahead = lambda x, base: follow(table, denoiser, x, base, args, None, None)
    final = freeze(eqx.filter_closure_convert(ahead, x, base))(*freeze((x, base)))

    def moved(z: Array, t: Array, keep: Array, out: Array) -> Array:
        return keep * z + out[0] * read(table, denoiser, t, z, args)

    step = eqx.filter_closure_convert(moved, x, table.t[0], table.keep[0], table.out[0])
    rows = (table.t, table.keep, table.out, table.back)
    problem = _Problem(step, rows, (x, base), freeze((final.base, final.x)))
    arrays, static = eqx.partition(problem, eqx.is_array)
    inputs, treedef = jtu.tree_flatten(arrays)
    places = treedef.unflatten(range(len(inputs)))
    build = lambda inputs: eqx.combine(treedef.unflatten(inputs), static)

    def rule(inputs: list[Any], cts: list[Any], wanted: Flags, batched: Flags | None) -> list[Any]:
        chosen = [i for i, w in enumerate(wanted) if w]
        if set(jtu.tree_leaves(places.rows)) & set(chosen):
            raise ValueError(
                "ReversibleAdjoint has no gradients with respect to the grid: use "
                "adjoint=sdeflow.adjoints.DiscreteAdjoint()."
            )
        lanes = Lanes(build, inputs, batched)
        numbers = [i for i in chosen if i in set(jtu.tree_leaves(places.step))]
        wide = lambda x, n: lanes.for_all((x,), (n,))[0]

        def back(carry: Any, row: Any) -> tuple[Any, None]:
            z, after, ct_z, ct_after, gains = carry
            t, keep, out, share = lanes.for_all(row, places.rows)
            g, pull, _ = lanes.vjp(lambda p, z, *row: (p.step(z, *row), None), numbers, (z,), (t, keep, out))
            gained, ct = pull(ct_after)
            share = share.reshape(*share.shape, *[1] * (z.ndim - share.ndim))
            before = (after - g) / jnp.where(share == 0, 1, share)
            return (before, z, share * ct_after, ct_z + ct, add(gains, gained)), None

        ends = [wide(x, n) for x, n in zip(build(inputs).final, places.final)]
        carry = (*ends, *cts, zeros([inputs[n] for n in numbers]))
        rows = lanes.by_time(build(inputs).rows, places.rows)
        (first_base, first, ct_base, ct_x, gains), _ = jax.lax.scan(back, carry, rows, reverse=True)
        found = dict(zip(numbers, gains))
        missed = jnp.zeros(())
        for place, ct, reached in zip(places.start, (ct_x, ct_base), (first, first_base)):
            if place is not None:
                truth = wide(inputs[place], place)
                axes = tuple(range(1 if lanes.many else 0, truth.ndim))
                size = lambda x, axes=axes: jnp.sqrt((x**2).mean(axis=axes))
                missed = jnp.maximum(missed, size(reached - truth) / jnp.maximum(size(truth), 1e-6))
                found[place] = lanes.reduced(place, ct)
        found = lanes.spoiled(found, ~(missed <= max_defect))
        return [found[i] if i in found else jnp.zeros_like(inputs[i]) for i in chosen]

    (end_base, end), _ = attach(rule, [final.base, final.x], inputs, jnp.asarray(False), _FIRST_ONLY)
    return Walked(end, end_base)
