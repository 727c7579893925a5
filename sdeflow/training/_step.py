"""One compiled step of training, gated so that a nonfinite loss or gradient changes nothing."""

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optax
from jaxtyping import Array, Bool, Int, PRNGKeyArray, PyTree

from ._rows import field
from ._sum import scored


class TrainState(eqx.Module):
    """What a step changes: the trained arrays, the optimiser's arrays and three counters.

    ``step`` counts the updates done, so it is the index k of the next one; ``streak`` counts the nonfinite
    steps in a row. Once ``failed``, every further step leaves all of this as it is.
    """

    params: PyTree[Array]
    opt_state: PyTree[Array]
    step: Int[Array, ""]
    streak: Int[Array, ""]
    failed: Bool[Array, ""]


class Fixed(eqx.Module):
    """What a step only reads. Key, skip and the arrays in ``static`` and ``loss`` are traced."""

    static: PyTree
    opt_static: PyTree
    loss: Any
    optim: Any
    key: PRNGKeyArray
    skip: Int[Array, ""]


def fresh(tree: PyTree) -> PyTree:
    """A copy of every array of ``tree`` in a buffer of its own, strongly typed, so that it may be donated."""
    # 64 bits of the host become 32 where JAX has no more, as in any other program.
    copy = lambda x: jnp.array(x, dtype=x.dtype if isinstance(x, jax.Array) else jax.dtypes.canonicalize_dtype(x.dtype))
    return jtu.tree_map(lambda x: copy(x) if eqx.is_array(x) else x, tree)


def start(model: PyTree, loss: Any, optim: Any, key: PRNGKeyArray, skip: int) -> tuple[Fixed, TrainState]:
    """Split a model and its optimiser into what a step reads and what it changes."""
    params, static = eqx.partition(fresh(model), eqx.is_inexact_array)
    opt_state, opt_static = eqx.partition(fresh(optim.init(params)), eqx.is_array)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(params, opt_state, zero, jnp.zeros((), jnp.int32), jnp.zeros((), bool))
    return Fixed(static, opt_static, loss, optim, key, jnp.asarray(skip, jnp.int32)), state


@eqx.filter_jit(donate="all-except-first")
def train_step(read: tuple[Fixed, PyTree], state: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """Take one step on a batch; ``read`` is (fixed, batch), and the buffers of ``state`` are given up.

    Returns the new state and a report: "loss", "failed" and the dict "metrics".
    """
    fixed, batch = read
    key = jax.random.fold_in(fixed.key, state.step)

    def loss_of(params: PyTree) -> tuple[Array, dict[str, Array]]:
        return scored(fixed.loss, eqx.combine(params, fixed.static), batch, key, state.step)

    (value, metrics), grads = eqx.filter_value_and_grad(loss_of, has_aux=True)(state.params)
    # JAX's derivative in a complex number is the conjugate of the direction of steepest ascent, which optax expects.
    grads = jtu.tree_map(lambda g: jnp.conj(g) if jnp.iscomplexobj(g) else g, grads)
    old_opt = eqx.combine(state.opt_state, fixed.opt_static)
    updates, new_opt = optax.with_extra_args_support(fixed.optim).update(
        grads, old_opt, state.params, value=value, grad=grads, value_fn=lambda p: loss_of(p)[0]
    )
    new_params = optax.apply_updates(state.params, updates)
    new_opt = eqx.filter(new_opt, eqx.is_array)

    finite = jnp.isfinite(value) & jnp.isfinite(optax.tree.norm(grads)) & _still_finite(new_params, state.params)
    okay = finite & ~state.failed
    streak = jnp.where(okay, 0, state.streak + 1)
    failed = state.failed | (streak > fixed.skip)
    new_state = TrainState(
        _choose(okay, new_params, state.params),
        _choose(okay, new_opt, state.opt_state),
        jnp.where(failed, state.step, state.step + 1),
        jnp.where(failed, state.streak, streak),
        failed,
    )
    return new_state, {"loss": value, "failed": failed, "metrics": metrics}


@eqx.filter_jit
def evaluate(fixed: Fixed, params: PyTree, batch: PyTree, key: PRNGKeyArray, step: Int[Array, ""]) -> Any:
    """The loss and the metrics of one validation batch, with the layers that have it in inference mode."""
    model = _in_inference_mode(eqx.combine(params, fixed.static))
    return scored(fixed.loss, model, batch, key, step)


def to_arrays(batch: PyTree) -> PyTree:
    """The numeric leaves of a batch as strong arrays; None for all others, which no program can take."""
    arrays = jtu.tree_map(_numeric, batch)
    if not jtu.tree_leaves(arrays):
        raise TypeError(
            f"data.batches yielded an object of type {type(batch).__name__} without numeric arrays; "
            "yield pytrees of NumPy arrays."
        )
    return arrays


def batch_size(batch: PyTree) -> float | tuple[int, ...]:
    """What a validation batch says of its weight: the sum of its ``weight``, or the length of every leaf."""
    weight = field(batch, "weight")
    if weight is not None:
        return float(np.sum(np.asarray(weight, np.float64)))
    return tuple(len(leaf) for leaf in jtu.tree_leaves(batch) if np.ndim(leaf))


def batch_weights(sizes: Sequence[float | tuple[int, ...]]) -> list[float]:
    """The weights of validation batches, from what `batch_size` said of each.

    Without a ``weight`` that is the number of rows. Where the leaves of a batch differ in length, those whose length
    is the same in all batches are shared (a grid of times, say) and no rows; if all are, the batches count alike.

    Raises:
        ValueError: the number of rows cannot be told.
    """
    lengths = [size for size in sizes if isinstance(size, tuple)]
    if len({len(one) for one in lengths}) > 1:
        raise ValueError("The validation batches have different structures: give each a `weight`, one number a row.")
    of_leaf = list(zip(*lengths))
    alike = all(len(set(one)) <= 1 for one in lengths)
    rows = [i for i, leaf in enumerate(of_leaf) if alike or len(set(leaf)) > 1]

    def weigh(size: float | tuple[int, ...]) -> float:
        if not isinstance(size, tuple):
            return size
        found = {size[i] for i in rows}
        if len(found) > 1:
            raise ValueError(
                f"The arrays of a validation batch have {sorted(found)} rows: give it a `weight`, one number a row."
            )
        return float(found.pop()) if found else 1.0

    return [weigh(size) for size in sizes]


def _still_finite(new: PyTree, old: PyTree) -> Bool[Array, ""]:
    """Whether every entry is finite, or the infinity that it was: a mask of -inf, say, that is never trained."""
    good = jtu.tree_map(lambda n, o: jnp.all(jnp.isfinite(n) | (n == o)), new, old)
    return jnp.all(jnp.stack(jtu.tree_leaves(good)))


def _choose(okay: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    """``new`` or ``old``, in the floating dtypes of ``old``: a changed dtype would compile the step anew."""

    def pick(n: Array, o: Array) -> Array:
        n = jnp.asarray(n)
        if n.dtype != o.dtype:
            if not (jnp.issubdtype(n.dtype, jnp.inexact) and jnp.issubdtype(o.dtype, jnp.inexact)):
                raise TypeError(f"The optimiser's state began as {o.dtype} and became {n.dtype}; give it one dtype.")
            n = n.astype(o.dtype)
        return jax.lax.select(okay, n, o)

    return jtu.tree_map(pick, new, old)


def _numeric(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jnp.asarray(leaf, dtype=leaf.dtype) if leaf.weak_type else leaf
    if isinstance(leaf, bool | int | float | complex | np.ndarray | np.generic):
        leaf = np.asarray(leaf)
        return leaf if leaf.dtype.kind in "biufcV" and leaf.dtype.names is None else None
    return None


def _in_inference_mode(model: PyTree) -> PyTree:
    """The model with ``inference=True`` where a layer has that switch; other things of that name stay."""
    has_switch = lambda x: isinstance(getattr(x, "inference", None), bool)
    switch_on = lambda x: eqx.tree_at(lambda layer: layer.inference, x, True) if has_switch(x) else x
    return jtu.tree_map(switch_on, model, is_leaf=has_switch)
