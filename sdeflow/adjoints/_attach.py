"""Values that get their gradient from a rule, which under ``jax.vmap`` sees the whole batch.

``jax.custom_vjp`` batches a reverse rule blindly: what all lanes share (a network's weights, say) gets one cotangent a
lane, and these are summed afterwards, so that a batch of a hundred writes a hundred copies of the weights every step.
`attach` is a primitive instead. If the batch is inside of the gradient, ``grad(mean(vmap(solve)))``, batching reaches
it first, and the rule is told which inputs are batched; it then returns one cotangent for what is shared. If the
gradient is inside of the batch, ``vmap(grad(solve))``, every lane has a cotangent of its own, as it must.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

Flags = tuple[bool, ...]
Rule = Callable[[list[Array], list[Array], Flags, Flags | None], list[Array]]


def attach(rule: Rule, values: Sequence[Array], inputs: Sequence[Array], note: Array) -> tuple[list[Array], Array]:
    """Return ``values``, as a function of ``inputs`` whose derivative is ``rule``, and the note.

    Arguments:
        rule: ``rule(inputs, cotangents, wanted, batched)`` returns the cotangents of the inputs that are ``wanted``, in
            order, given those of the values. ``batched`` says which inputs lead with the batch; None if there is none.
            The cotangents that it is given all lead with the batch; those of inputs without it are sums over the batch.
        values: floating arrays, constants as far as derivatives are concerned.
        inputs: arrays of any dtype.
        note: an array that is returned where the values are differentiated; elsewhere it is zero.
    """
    *values, note = attach_p.bind(*values, note, *inputs, rule=rule, count=len(values), levels=())
    return values, note


def _with_rule(rule: Rule, count: int, levels: tuple[Flags, ...], wanted: Flags) -> Callable:
    """``f(differentiated inputs, values, the other inputs) -> values`` with the rule as its derivative."""

    def merge(diff: list[Array], rest: list[Array]) -> list[Array]:
        a, b = iter(diff), iter(rest)
        return [next(a) if w else next(b) for w in wanted]

    @jax.custom_vjp
    def f(diff: list[Array], values: list[Array], rest: list[Array]) -> list[Array]:
        return values

    def forward(diff: list[Array], values: list[Array], rest: list[Array]) -> Any:
        return values, (diff, rest)

    def backward(kept: Any, cts: list[Array]) -> Any:
        return rule(merge(*kept), cts, wanted, levels[0][count + 1 :] if levels else None), None, None

    f.defvjp(forward, backward)
    batched = f
    for flags in levels[1:]:
        axes = [0 if flag else None for flag in flags]
        values, inputs = axes[:count], axes[count + 1 :]
        diff = [a for a, w in zip(inputs, wanted) if w]
        rest = [a for a, w in zip(inputs, wanted) if not w]
        batched = jax.vmap(batched, in_axes=(diff, values, rest))
    return batched


def _plain(*args: Any, count: int, **_: Any) -> list[Any]:
    return [*args[:count], jnp.zeros_like(args[count])]


def _shapes(*args: Any, count: int, **_: Any) -> list[Any]:
    return list(args[: count + 1])


def _no_tangent(x: Array) -> Any:
    return ad.Zero(jax.typeof(x).to_tangent_aval())


def _jvp(primals: Any, tangents: Any, *, rule: Rule, count: int, levels: tuple[Flags, ...]) -> Any:
    values, note, inputs = list(primals[:count]), primals[count], list(primals[count + 1 :])
    moved = tangents[count + 1 :]
    wanted = tuple(type(t) is not ad.Zero for t in moved)
    if not any(wanted):
        out = attach_p.bind(*primals, rule=rule, count=count, levels=levels)
        return out, [_no_tangent(x) for x in out]
    diff, rest = ([x for x, w in zip(inputs, wanted) if w == side] for side in (True, False))
    f = _with_rule(rule, count, levels, wanted)
    out, moves = jax.jvp(lambda diff: f(diff, values, rest), (diff,), ([t for t, w in zip(moved, wanted) if w],))
    return [*out, note], [*moves, _no_tangent(note)]


def _batch(args: Any, dims: Any, *, rule: Rule, count: int, levels: tuple[Flags, ...]) -> Any:
    (size,) = {x.shape[d] for x, d in zip(args, dims) if d is not batching.not_mapped}
    flags = [d is not batching.not_mapped for d in dims]
    front = [jnp.moveaxis(x, d, 0) if flag else jnp.asarray(x) for x, d, flag in zip(args, dims, flags)]
    for i in range(count + 1):
        if not flags[i]:
            front[i], flags[i] = jnp.broadcast_to(front[i], (size, *front[i].shape)), True
    out = attach_p.bind(*front, rule=rule, count=count, levels=(*levels, tuple(flags)))
    return out, [0] * len(out)


attach_p = Primitive("attach_gradient")
attach_p.multiple_results = True
attach_p.def_impl(_plain)
attach_p.def_abstract_eval(_shapes)
ad.primitive_jvps[attach_p] = _jvp
batching.primitive_batchers[attach_p] = _batch
mlir.register_lowering(attach_p, mlir.lower_fun(_plain, multiple_results=True))
