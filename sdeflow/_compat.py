"""The private parts of other packages that sdeflow relies on, each with a contract test.

Nothing else in the package may import a name that starts with an underscore from jax, equinox or diffrax.
Every item below is pinned by one test in ``tests/test_diffrax_contract.py``.
"""

import dataclasses
import functools as ft
import types
import warnings
from collections.abc import Callable
from typing import Any

import diffrax
import equinox.internal as eqxi
import jax
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from diffrax._integrate import SaveState as SaveState
from diffrax._integrate import TermAndSolverIncompatible as TermAndSolverIncompatible
from diffrax._integrate import _assert_term_compatible  # pyright: ignore[reportPrivateUsage]
from diffrax._root_finder import use_stepsize_tol as use_stepsize_tol
from diffrax._term import WrapTerm as WrapTerm
from jax.core import Tracer
from jax.interpreters.partial_eval import dce_jaxpr as dce_jaxpr

_BAD_JAX = {
    "0.10.2": "it computes a jitted, vmapped matrix-vector product followed by a reduction wrongly on CPU",
    "0.11.0": "it is known to break other packages of this family",
    "0.11.1": "small updates inside a loop cost time proportional to the whole buffer on CPU",
}


class SdeflowWarning(UserWarning):
    """The class of every warning that sdeflow emits, so that users can filter on it."""


def warn_if_bad_jax(version: str) -> None:
    """Warn once when the installed jax is a release with a known fault that reaches this package."""
    if version in _BAD_JAX:
        warnings.warn(
            f"jax {version} is installed and must not be used: {_BAD_JAX[version]}. "
            'Run `pip install "jax>=0.10.0,!=0.10.2,!=0.11.0,!=0.11.1"`.',
            SdeflowWarning,
            stacklevel=3,
        )


def is_term(x: Any) -> bool:
    """Whether ``x`` is one diffrax term, not a ``MultiTerm`` of several."""
    return isinstance(x, diffrax.AbstractTerm) and not isinstance(x, diffrax.MultiTerm)


def unwrap(terms: Any) -> tuple[Any, Any]:
    """Take off the direction wrapper that ``diffeqsolve`` puts around every term.

    Returns the user's terms and the direction (+1 or -1, possibly traced; the Python int 1 if there was no wrapper).
    """
    direction: list[Any] = []

    def strip(term: Any) -> Any:
        if isinstance(term, WrapTerm):
            direction.append(term.direction)
            return term.term
        return term

    stripped = jtu.tree_map(strip, terms, is_leaf=is_term)
    return stripped, (direction[0] if direction else 1)


def is_concrete(*arrays: Any) -> bool:
    """Whether every array, or list of numbers, has a value that can be read now, on the host."""
    return not any(isinstance(x, Tracer) for x in jtu.tree_leaves(arrays))


assert_term_compatible = _assert_term_compatible
"""What ``diffeqsolve`` compares terms with the solver by; it raises `TermAndSolverIncompatible`."""


# How NumPy computes the primitives by which ``diffeqsolve`` counts its steps.
_ON_HOST: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "neg": np.negative,
    "abs": np.abs,
    "min": np.minimum,
    "max": np.maximum,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "and": np.logical_and,
    "or": np.logical_or,
    "not": np.logical_not,
    "ceil": np.ceil,
    "is_finite": np.isfinite,
    "nextafter": np.nextafter,
    "select_n": lambda which, *cases: cases[int(which)],
    "convert_element_type": lambda x: x,
    "copy": lambda x: x,
    "stop_gradient": lambda x: x,
}


def known_value(x: Any) -> np.ndarray | None:
    """The value of a scalar that a trace computes from constants alone, such as a number of steps; None if unknown.

    ``jax.jit`` makes tracers of what is computed within it, whatever it is computed from. Each knows the equation that
    made it, so that those which rest on no argument can be computed now, by NumPy.
    """
    if np.size(x) != 1:
        return None
    if not isinstance(x, Tracer):
        return np.asarray(x)
    constant = x.get_const() if hasattr(x, "get_const") else None
    if constant is not None:
        return known_value(constant)
    made_by, name = getattr(x, "parent", None), getattr(x, "val", None)
    if made_by is None or name is None or not hasattr(made_by, "in_tracers"):
        return None
    found = _on_host(
        made_by.primitive, made_by.params, made_by.outvars, [known_value(one) for one in made_by.in_tracers]
    )
    return next((value for var, value in zip(made_by.outvars, found) if var is name), None)


def _on_host(primitive: Any, params: dict[str, Any], outvars: Any, given: list[Any]) -> list[np.ndarray | None]:
    """The outputs of one equation, as far as its inputs are known."""
    inner = params.get("jaxpr", params.get("call_jaxpr"))
    if inner is None:
        compute = _ON_HOST.get(primitive.name)
        if compute is None or len(outvars) != 1 or any(value is None for value in given):
            return [None] * len(outvars)
        return [np.asarray(compute(*given), outvars[0].aval.dtype)]
    if not hasattr(inner, "consts"):
        return [None] * len(outvars)
    known = dict(zip((*inner.jaxpr.constvars, *inner.jaxpr.invars), (*map(known_value, inner.consts), *given)))
    read = lambda atom: known_value(atom.val) if hasattr(atom, "val") else known.get(atom)
    for eqn in inner.jaxpr.eqns:
        known.update(zip(eqn.outvars, _on_host(eqn.primitive, eqn.params, eqn.outvars, [read(x) for x in eqn.invars])))
    return [read(atom) for atom in inner.jaxpr.outvars]


def under_vmap(x: Any) -> bool:
    """Whether an array is known to be one of many that ``jax.vmap`` works on at once; a ``jax.jit`` within hides it."""
    while isinstance(x, Tracer):
        if type(x).__name__ == "BatchTracer":
            return True
        x = getattr(x, "primal", None)
    return False


def varies_over(x: Any) -> frozenset[str]:
    """The axes of a mesh, within ``jax.shard_map``, that an array is known to vary over."""
    kind = jax.typeof(x)
    # Later releases keep the axes in a record of their own.
    return frozenset(kind.mat.varying if hasattr(kind, "mat") else getattr(kind, "vma", ()))


def vary(x: Any, axes: frozenset[str]) -> Any:
    """The array, varying over these axes as well."""
    missing = tuple(axes - varies_over(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def enumeration_of(item: Any) -> type:
    """The equinox enumeration that a member belongs to."""
    return item._enumeration


def values_of(item: Any) -> np.ndarray:
    """The index (or batch of indices) of a concrete enumeration member."""
    return np.asarray(item._value)


def messages(enumeration: Any) -> list[str]:
    """All sentences of an equinox enumeration, by index."""
    return enumeration._index_to_message


def names(enumeration: Any) -> list[str]:
    """All member names of an equinox enumeration."""
    return list(enumeration._name_to_item)


def warn(message: str, category: type[Warning] = SdeflowWarning) -> None:
    """Emit a warning that points at the caller of the public function that found fault."""
    warnings.warn(message, category, stacklevel=4)


def moved_by(relation: Any, change: Any) -> tuple[Any, Any] | None:
    """The state in an implicit stage of diffrax, and how it moves as the unknown of the stage changes.

    Arguments:
        relation: the arguments of the function whose root the stage is.
        change: of the unknown, a slope or an increment.

    Returns:
        Both, or None if the root is that of something else.
    """
    count = len(relation) if isinstance(relation, tuple) else 0
    if count == 8:
        _, diagonal, _, product, _, state, _, control = relation
        change = product(change, control)
    elif count == 7:
        _, diagonal, _, _, state, _, _ = relation
    elif count == 5:
        diagonal, (_, _, state, _, _) = 1, relation
    else:
        return None
    return state, jtu.tree_map(lambda x: diagonal * x, change)


def finding_roots_with(solver: Any, adjoint: Any) -> Any:
    """The implicit solver, whose stages are differentiated by this adjoint of optimistix.

    diffrax has no argument for it. Its step looks ``root_find`` up in the module's ``optx``: here the same step does so
    in a namespace that names the adjoint too, and diffrax itself stays as it is. Steps without roots and those that
    are not diffrax's are kept.
    """
    if not isinstance(solver, diffrax.AbstractImplicitSolver):
        return solver
    cls = type(solver)
    step = getattr(cls, "step", None)
    here = getattr(step, "__globals__", {})
    if here.get("optx") is not optx or not here.get("__name__", "").startswith("diffrax."):
        return solver
    same = object.__new__(_with_own_roots(cls, adjoint))
    for field in dataclasses.fields(solver):
        object.__setattr__(same, field.name, getattr(solver, field.name))
    return same


@ft.cache
def _with_own_roots(cls: Any, adjoint: Any) -> Any:
    own = types.SimpleNamespace(**vars(optx))
    own.root_find = lambda *args, **options: optx.root_find(*args, **options, adjoint=adjoint)
    old = cls.step
    step = types.FunctionType(
        old.__code__, {**old.__globals__, "optx": own}, old.__name__, old.__defaults__, old.__closure__
    )
    step.__kwdefaults__ = old.__kwdefaults__
    return type(cls)(cls.__name__, (cls,), {"step": step, "__module__": cls.__module__, "__doc__": cls.__doc__})


lax_while_loop = ft.partial(eqxi.while_loop, kind="lax")
"""The while loop that ``AbstractAdjoint._loop`` expects, without support for reverse mode."""


def is_save_state(x: Any) -> bool:
    """Whether ``x`` is what diffrax's loop carries for one ``SubSaveAt``."""
    return isinstance(x, SaveState)


buffer_at_set = eqxi.buffer_at_set
"""Write one row of an array that a loop carries, whether or not the loop treats it as a buffer."""


def is_buffer(x: Any) -> bool:
    """Whether ``x`` is what an equinox loop makes of an array that it updates in place."""
    return type(x).__name__ == "_Buffer"


def varying_axes(x: Any) -> frozenset[str]:
    """The axes of a ``jax.shard_map`` over whose devices a value is typed as varying."""
    aval = jax.typeof(x)
    kind = getattr(aval, "manual_axis_type", None)
    return frozenset(getattr(aval, "vma", ()) if kind is None else kind.varying)


def typed_as_varying(aval: Any, axes: tuple[str, ...], mesh: Any) -> Any:
    """The type of an array, as one on this mesh that varies over exactly these axes."""
    whole = jax.sharding.PartitionSpec(*(None for _ in aval.shape))
    aval = aval.update(sharding=jax.sharding.NamedSharding(mesh, whole), **_varying(aval, ()))
    return aval.update(**_varying(aval, axes))


def _varying(aval: Any, axes: tuple[str, ...]) -> dict[str, Any]:
    kind = getattr(aval, "manual_axis_type", None)
    return {"vma": frozenset(axes)} if kind is None else {"manual_axis_type": kind.update(varying=frozenset(axes))}
