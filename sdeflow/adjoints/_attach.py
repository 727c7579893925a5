"""Values that get their gradient from a rule, which under ``jax.vmap`` sees the whole batch.

``jax.custom_vjp`` batches a reverse rule blindly: what all lanes share (a network's weights, say) gets one cotangent a
lane, and these are summed afterwards, so that a batch of a hundred writes a hundred copies of the weights every step.
`attach` is a primitive instead. If the batch is inside of the gradient, ``grad(mean(vmap(solve)))``, batching reaches
it first, and the rule is told which inputs are batched; it then returns one cotangent for what is shared. If the
gradient is inside of the batch, ``vmap(grad(solve))``, every lane has a cotangent of its own, as it must.

A rule is no function of its inputs that could be differentiated again: the values it was made with count as constants.
Second derivatives, and first ones in forward mode, are an error that says what to do, and never a wrong number.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from .._mesh import on_each_device

Flags = tuple[bool, ...]
Rule = Callable[[list[Array], list[Array], Flags, Flags | None], list[Array]]


def attach(
    rule: Rule, values: Sequence[Array], inputs: Sequence[Array], note: Array, advice: str
) -> tuple[list[Array], Array]:
    """Return ``values``, as a function of ``inputs`` whose derivative is ``rule``, and the note.

    Arguments:
        rule: ``rule(inputs, cotangents, wanted, batched)`` returns the cotangents of the inputs that are ``wanted``, in
            order, given those of the values. ``batched`` says which inputs lead with the batch; None if there is none.
            The cotangents that it is given all lead with the batch; those of inputs without it are sums over the batch.
        values: floating arrays, constants as far as derivatives are concerned.
        inputs: arrays of any dtype.
        note: an array that is returned where the values are differentiated; elsewhere it is zero.
        advice: what to say to who wants other derivatives than the rule knows.

    Raises:
        ValueError: while it is differentiated, for second derivatives in the inputs and for forward mode.
    """
    *values, note = attach_p.bind(*values, note, *inputs, rule=rule, count=len(values), levels=(), advice=advice)
    return values, note


# The primitive itself. ``levels`` holds, for every batch from the innermost outwards, which inputs lead with it.


def _plain(*args: Any, count: int, **_: Any) -> list[Any]:
    return [*args[:count], jnp.zeros_like(args[count])]


def _shapes(*args: Any, count: int, **_: Any) -> list[Any]:
    return list(args[: count + 1])


def _no_tangent(x: Array) -> Any:
    return ad.Zero(jax.typeof(x).to_tangent_aval())


def _jvp(primals: Any, tangents: Any, *, rule: Rule, count: int, levels: tuple[Flags, ...], advice: str) -> Any:
    values, note, inputs = list(primals[:count]), primals[count], list(primals[count + 1 :])
    moved = tangents[count + 1 :]
    wanted = tuple(type(t) is not ad.Zero for t in moved)
    if not any(wanted):
        out = attach_p.bind(*primals, rule=rule, count=count, levels=levels, advice=advice)
        return out, [_no_tangent(x) for x in out]
    shapes = tuple(jax.typeof(x).to_tangent_aval() for x in values)
    moves = [t for t, w in zip(moved, wanted) if w]
    out = move_p.bind(*moves, *inputs, rule=rule, wanted=wanted, levels=levels, shapes=shapes, advice=advice)
    return [*values, note], [*out, _no_tangent(note)]


def _front(args: Any, dims: Any) -> tuple[int, list[Any], list[bool]]:
    (size,) = {x.shape[d] for x, d in zip(args, dims) if d is not None}
    flags = [d is not None for d in dims]
    return size, [jnp.moveaxis(x, d, 0) if flag else jnp.asarray(x) for x, d, flag in zip(args, dims, flags)], flags


def _spread(x: Array, flag: bool, size: int) -> Array:
    return x if flag else jnp.broadcast_to(x, (size, *x.shape))


def _batch(args: Any, dims: Any, *, count: int, levels: tuple[Flags, ...], **params: Any) -> Any:
    size, front, flags = _front(args, dims)
    for i in range(count + 1):
        front[i] = _spread(front[i], flags[i], size)
    out = attach_p.bind(*front, count=count, levels=(*levels, tuple(flags[count + 1 :])), **params)
    return out, [0] * len(out)


attach_p = Primitive("attach_gradient")
attach_p.multiple_results = True
attach_p.def_impl(_plain)
attach_p.def_abstract_eval(_shapes)
ad.primitive_jvps[attach_p] = _jvp
batching.primitive_batchers[attach_p] = _batch
mlir.register_lowering(attach_p, mlir.lower_fun(_plain, multiple_results=True))


# Its derivative: a linear map of the tangents of the wanted inputs, of which only the transpose is known.


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _once(x: Array, advice: str) -> Array:
    """The identity, which refuses to be differentiated."""
    return x


@_once.defjvp
def _twice(advice: str, primals: Any, tangents: Any) -> Any:
    raise ValueError(advice)


def _pull(rule: Rule, inputs: list[Array], cts: list[Array], wanted: Flags, levels: tuple[Flags, ...]) -> list[Array]:
    """The rule, and outside of it the batches that it does not see."""
    if len(levels) < 2:
        return rule(inputs, cts, wanted, levels[0] if levels else None)
    *inner, flags = levels
    axes = ([0 if flag else None for flag in flags], 0)
    out = jax.vmap(lambda x, ct: _pull(rule, x, ct, wanted, tuple(inner)), in_axes=axes)(inputs, cts)
    chosen = [flag for flag, w in zip(flags, wanted) if w]
    return [x if flag else x.sum(axis=0) for x, flag in zip(out, chosen)]


def _transpose(
    cts: Any, *args: Any, rule: Rule, wanted: Flags, levels: tuple[Flags, ...], shapes: Any, advice: str
) -> list[Any]:
    # JAX may hand over a small constant as a number of Python.
    inputs = [jnp.asarray(x) for x in args[sum(wanted) :]]
    inputs = [_once(x, advice) if jnp.issubdtype(x.dtype, jnp.inexact) else x for x in inputs]
    pull = lambda both: _pull(rule, both[0], both[1], wanted, levels)
    out = on_each_device(pull, (inputs, [ad.instantiate_zeros(ct) for ct in cts]))
    return [*out, *(None for _ in inputs)]


def _move_batch(args: Any, dims: Any, *, wanted: Flags, levels: tuple[Flags, ...], shapes: Any, **params: Any) -> Any:
    size, front, flags = _front(args, dims)
    moves = iter(range(sum(wanted)))
    for i, w in enumerate(wanted, start=sum(wanted)):
        if w:
            # A tangent leads with the batch exactly if its input does.
            k = next(moves)
            both = flags[i] or flags[k]
            front[i], front[k] = (_spread(front[n], flags[n], size) if both else front[n] for n in (i, k))
            flags[i] = both
    shapes = tuple(x.update(shape=(size, *x.shape)) for x in shapes)
    levels = (*levels, tuple(flags[sum(wanted) :]))
    out = move_p.bind(*front, wanted=wanted, levels=levels, shapes=shapes, **params)
    return out, [0] * len(out)


def _refuse(*_: Any, advice: str, **__: Any) -> Any:
    raise ValueError(advice)


move_p = Primitive("attached_derivative")
move_p.multiple_results = True
move_p.def_impl(_refuse)
move_p.def_abstract_eval(lambda *_, shapes, **__: list(shapes))
ad.primitive_jvps[move_p] = _refuse
ad.primitive_transposes[move_p] = _transpose
batching.primitive_batchers[move_p] = _move_batch
mlir.register_lowering(move_p, _refuse)
