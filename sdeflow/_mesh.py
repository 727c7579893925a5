"""Computations that know nothing of meshes, run where JAX writes one into the types of arrays.

With explicit axes every operation has to say how its result lies on the mesh, and within ``jax.shard_map`` every value
has a type that says over which axes it varies; a loop does not take a carry whose type changes in its first step.
Loops of other packages, which begin from constants, then are errors. Here a whole computation is traced as it would be
on one device, and its program is applied: explicit axes are automatic within it, and within ``jax.shard_map`` it is
what it is there, a program of one device.
"""

import functools
import types
from collections.abc import Callable
from typing import Any, TypeVar, cast

import equinox as eqx
import jax
import jax.tree_util as jtu
import numpy as np
from jax.core import eval_jaxpr
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ._compat import typed_as_varying, varying_axes

_F = TypeVar("_F", bound=Callable[..., Any])
_KIND = jax.sharding.AxisType
_NO_MESH = jax.sharding.AbstractMesh((), ())


def on_any_mesh(fn: _F) -> _F:
    """``fn``, of trees, on any mesh.

    What it returns is not split over explicit axes, except over those that a ``jax.vmap`` around it maps; within
    ``jax.shard_map`` all that it returns varies over the axes over which one of its arrays does.
    """

    @functools.wraps(fn)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        context = jax.sharding.get_abstract_mesh()
        mesh: Any = _mesh_of((args, kwargs)) if context.empty else context
        kinds = () if mesh is None else mesh.axis_types
        if mesh is None or (_KIND.Explicit not in kinds and _KIND.Manual not in kinds):
            return fn(*args, **kwargs)
        dynamic, static = eqx.partition(_opened((args, kwargs)), lambda x: isinstance(x, jax.Array | np.ndarray))
        rest: list[Any] = []

        def inner(dynamic: Any) -> Any:
            args, kwargs = _closed(eqx.combine(dynamic, static))
            out, other = eqx.partition(fn(*args, **kwargs), eqx.is_array)
            rest.append(other)
            return out

        if _KIND.Manual in kinds:
            out = on_each_device(inner, dynamic)
        else:
            axes = tuple(name for name, kind in zip(mesh.axis_names, kinds) if kind == _KIND.Explicit)
            with jax.sharding.use_abstract_mesh(getattr(mesh, "abstract_mesh", mesh)):
                out = jax.sharding.auto_axes(inner, axes=axes, out_sharding=jax.sharding.PartitionSpec())(dynamic)
        return eqx.combine(out, rest[-1])

    return cast(_F, wrapped)


class _Opened(eqx.Module):
    """A function of Python, with what it closes over as part of the tree."""

    function: Any = eqx.field(static=True)
    cells: tuple[Any, ...]


def _opened(tree: Any, within: frozenset[int] = frozenset()) -> Any:
    """The tree, with functions that close over arrays opened, as those would bring their mesh into the program."""

    def one(x: Any) -> Any:
        if id(x) in within:
            return x
        try:
            held = _held(x)
        except ValueError:  # a name that is yet to be bound
            return x
        held = _opened(held, within | {id(x)})
        return _Opened(x, held) if any(map(eqx.is_array, jtu.tree_leaves(held))) else x

    return jtu.tree_map(one, tree)


def _held(x: Any) -> tuple[Any, ...]:
    if isinstance(x, functools.partial):
        return x.func, x.args, x.keywords
    cells = x.__closure__ if isinstance(x, types.FunctionType) else None
    return tuple(cell.cell_contents for cell in cells or ())


def _closed(tree: Any) -> Any:
    """The tree with its functions again."""

    def one(x: Any) -> Any:
        if not isinstance(x, _Opened):
            return x
        old, held = x.function, _closed(x.cells)
        if isinstance(old, functools.partial):
            return functools.partial(held[0], *held[1], **held[2])
        cells = tuple(map(types.CellType, held))
        new = types.FunctionType(old.__code__, old.__globals__, old.__name__, old.__defaults__, cells)
        new.__kwdefaults__ = old.__kwdefaults__
        return new

    return jtu.tree_map(one, tree, is_leaf=lambda x: isinstance(x, _Opened))


def _mesh_of(tree: Any) -> Any:
    for x in jtu.tree_leaves(tree):
        mesh = getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None) if eqx.is_array(x) else None
        if mesh is not None and not mesh.empty:
            return mesh
    return None


def on_each_device(fn: Callable[[Any], Any], tree: Any) -> Any:
    """``fn`` of a tree of arrays, traced as on one device where that is within ``jax.shard_map``."""
    context = jax.sharding.get_abstract_mesh()
    mesh = _mesh_of(tree) if context.empty else context
    if mesh is None or _KIND.Manual not in mesh.axis_types:
        return fn(tree)
    leaves, treedef = jtu.tree_flatten(tree)
    shapes = [jax.ShapeDtypeStruct(np.shape(x), x.dtype, weak_type=getattr(x, "weak_type", False)) for x in leaves]
    with jax.sharding.use_abstract_mesh(_NO_MESH):
        program, out = jax.make_jaxpr(lambda *x: fn(jtu.tree_unflatten(treedef, x)), return_shape=True)(*shapes)
    # What functions close over are constants of the program; they take part in derivatives as its inputs do.
    inputs = [x for x in (*program.consts, *leaves) if eqx.is_array(x)]
    axes = tuple(sorted(frozenset().union(*map(varying_axes, inputs))))

    def untyped(x: Any) -> Any:
        if not eqx.is_array(x):
            return x
        missing = tuple(set(axes) - varying_axes(x))
        # Its derivative sums over the devices, as it must for what they share.
        x = jax.lax.pcast(x, missing, to="varying") if missing else x
        return retype_p.bind(x, axes=axes, mesh=mesh, typed=False)

    values = eval_jaxpr(program.jaxpr, [*map(untyped, program.consts)], *map(untyped, leaves))
    if not context.empty:
        values = [retype_p.bind(x, axes=axes, mesh=mesh, typed=True) for x in values]
    return jtu.tree_unflatten(jtu.tree_structure(out), values)


# The identity, which changes nothing but whether the mesh is written into a value's type; so does its transpose.


def _identity(x: Any, *, axes: tuple[str, ...], mesh: Any, typed: bool) -> Any:
    return x


def _typed(x: Any, *, axes: tuple[str, ...], mesh: Any, typed: bool) -> Any:
    return typed_as_varying(x, axes, mesh) if typed else typed_as_varying(x, (), _NO_MESH)


def _transpose(ct: Any, x: Any, *, typed: bool, **params: Any) -> list[Any]:
    del x
    return [ct if type(ct) is ad.Zero else retype_p.bind(ct, typed=not typed, **params)]


def _batch(args: Any, dims: Any, **params: Any) -> tuple[Any, Any]:
    return retype_p.bind(*args, **params), dims[0]


retype_p = Primitive("write_mesh")
retype_p.def_impl(_identity)
retype_p.def_abstract_eval(_typed)
ad.deflinear2(retype_p, _transpose)
batching.primitive_batchers[retype_p] = _batch
mlir.register_lowering(retype_p, mlir.lower_fun(_identity, multiple_results=False))
