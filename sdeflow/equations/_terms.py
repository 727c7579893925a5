"""The diffrax terms of our equations: they check exactly what diffrax would broadcast.

``diffrax.ODETerm`` accepts a drift of the wrong shape and broadcasts it into a wrong answer. These terms compare
structure, shape and dtype with the state while tracing, which costs nothing at run time.
"""

import math
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
from jaxtyping import Array, PyTree


def _describe(x: Any) -> str:
    return eqx.tree_pformat(x, short_arrays=True, struct_as_array=True, width=200).replace("\n", " ")


def _fill(out: Any) -> str:
    """What to do about one number where an array is wanted."""
    return " Return an array of the state's shape, e.g. jnp.zeros_like(y)." if eqx.is_array_like(out) else ""


def check_like(out: Any, y: Any, what: str, advice: str = "") -> Any:
    """``out`` as arrays of exactly the structure, shapes and dtypes of ``y``.

    Raises:
        ValueError: naming the leaf, what it is and what it must be.
    """
    if jtu.tree_structure(out) != jtu.tree_structure(y):
        raise ValueError(
            f"The {what} must return the structure of the state, {_describe(y)}, but returned {_describe(out)}.{advice}"
        )
    paths = [jtu.keystr(path) for path, _ in jtu.tree_flatten_with_path(y)[0]]
    leaves = []
    for path, o, x in zip(paths, jtu.tree_leaves(out), jtu.tree_leaves(y)):
        where = f" at leaf y{path}" if path else ""
        if jnp.shape(o) != jnp.shape(x):
            raise ValueError(
                f"The {what} must return the state's shape {jnp.shape(x)}{where}, but returned shape {jnp.shape(o)}; "
                f"sdeflow never broadcasts.{advice or _fill(o)}"
            )
        dtype, wanted = jnp.result_type(o), jnp.result_type(x)
        if not jnp.issubdtype(dtype, jnp.inexact) or jnp.promote_types(dtype, wanted) != wanted:
            raise ValueError(f"The {what} must return dtype {wanted}{where}, but returned {dtype}.{advice}")
        leaves.append(jnp.asarray(o, wanted))
    return jtu.tree_unflatten(jtu.tree_structure(y), leaves)


class DriftTerm(diffrax.AbstractTerm):
    """f(t, y, args) dt, with the exact shape of y demanded of f."""

    drift: Callable[[Any, PyTree, Any], PyTree]

    def vf(self, t: Any, y: PyTree, args: Any) -> PyTree:
        """The drift, checked against the state."""
        return check_like(self.drift(t, y, args), y, "drift")

    def contr(self, t0: Any, t1: Any, **kwargs: Any) -> Any:
        """The length of the step."""
        return t1 - t0

    def prod(self, vf: PyTree, control: Any) -> PyTree:
        """The drift times the length of the step."""
        return jtu.tree_map(lambda v: jnp.asarray(control, jnp.finfo(v.dtype).dtype) * v, vf)


class DiffusionTerm(diffrax.AbstractTerm):
    """g(t, y, args) dW: an array of y's structure means diagonal noise, a lineax operator anything else."""

    diffusion: Callable[[Any, PyTree, Any], Any]
    control: diffrax.AbstractPath

    def vf(self, t: Any, y: PyTree, args: Any) -> Any:
        """The diffusion, checked against the state."""
        out = self.diffusion(t, y, args)
        if isinstance(out, lx.AbstractLinearOperator):
            check_operator(out, y)
            return out
        return check_like(out, y, "diffusion", _DIAGONAL)

    def contr(self, t0: Any, t1: Any, **kwargs: Any) -> Any:
        """The increment of the driving path."""
        return self.control.evaluate(t0, t1, **kwargs)

    def prod(self, vf: Any, control: Any) -> PyTree:
        """The diffusion applied to an increment, of exactly the noise's structure and shapes."""
        is_operator = isinstance(vf, lx.AbstractLinearOperator)
        check_noise(control, vf.in_structure() if is_operator else vf)
        if is_operator:
            return vf.mv(control)
        return jtu.tree_map(lambda g, w: g * w, vf, control)


_DIAGONAL = (
    " Return an array of the state's structure for diagonal noise, or a lineax operator from the noise to the state."
)


def check_operator(operator: lx.AbstractLinearOperator, y: PyTree[Array]) -> None:
    """Check that an operator-valued diffusion maps into the state.

    Raises:
        ValueError: if its output structure is not that of ``y``.
    """
    out = operator.out_structure()
    same = jtu.tree_structure(out) == jtu.tree_structure(y) and all(
        o.shape == jnp.shape(x) for o, x in zip(jtu.tree_leaves(out), jtu.tree_leaves(y))
    )
    if not same:
        raise ValueError(
            f"The diffusion's operator must map the noise to the state {_describe(y)}, but maps to {_describe(out)}: "
            "return a lineax operator from the noise to the state."
        )
    for o, x in zip(jtu.tree_leaves(out), jtu.tree_leaves(y)):
        wanted = jnp.result_type(x)
        if not jnp.issubdtype(o.dtype, jnp.inexact) or jnp.promote_types(o.dtype, wanted) != wanted:
            raise ValueError(
                f"The diffusion's operator must map to dtype {wanted}, but maps to {o.dtype}: cast its entries."
            )


def check_raw_term(term: diffrax.AbstractTerm, t: Any, y: PyTree, args: Any) -> None:
    """Check that a plain diffrax term moves every entry of the state, while tracing.

    diffrax itself would broadcast an ``ODETerm`` of another shape into a wrong answer.

    Raises:
        ValueError: naming the shapes.
    """
    if type(term) not in (diffrax.ODETerm, diffrax.ControlTerm):
        return
    # Not the term's own vf, which broadcasts already.
    field = term.vector_field(t, y, args)  # pyright: ignore
    if type(term) is diffrax.ODETerm:
        _check_shapes(field, y, "vector field of the ODETerm")
        return
    control = term.contr(t, t)
    if isinstance(field, lx.AbstractLinearOperator):
        check_operator(field, y)
        check_noise(control, field.in_structure())
    else:
        _check_shapes(term.prod(field, control), y, "vector field of the ControlTerm, times its control,")


def _check_shapes(out: Any, y: Any, what: str) -> None:
    same = jtu.tree_structure(out) == jtu.tree_structure(y) and all(
        jnp.shape(o) == jnp.shape(x) for o, x in zip(jtu.tree_leaves(out), jtu.tree_leaves(y))
    )
    if not same:
        raise ValueError(
            f"The {what} must have the structure and shapes of the state, {_describe(y)}, but is {_describe(out)}; "
            f"sdeflow never broadcasts.{_fill(out)}"
        )


def check_noise(control: Any, wanted: Any) -> None:
    """Check that an increment of the path is what the diffusion is to be applied to.

    Raises:
        ValueError: if the structures or shapes differ.
    """
    same = jtu.tree_structure(control) == jtu.tree_structure(wanted) and all(
        jnp.shape(w) == jnp.shape(g) for w, g in zip(jtu.tree_leaves(control), jtu.tree_leaves(wanted))
    )
    if not same:
        sizes = [sum(math.prod(jnp.shape(x)) for x in jtu.tree_leaves(tree)) for tree in (wanted, control)]
        raise ValueError(
            f"The diffusion is applied to noise like {_describe(wanted)}, but the path's increments are "
            f"{_describe(control)} (noise size m={sizes[0]}, path has k={sizes[1]}): give the path the structure of "
            "the noise; sdeflow never broadcasts."
        )
