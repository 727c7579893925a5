"""The static side of a tree in words: what no array says, but a checkpoint must not lose.

Two trees can hold arrays of the same shapes and be different functions (tanh and relu). `describe` lists
everything of a tree that is not an array, each with its path, in a form that is the same in every process.
"""

import dataclasses
import functools
import hashlib
import types
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from .._compat import is_concrete

Description = list[tuple[str, str]]

# These packages move their private modules between releases, and their functions change by version, not by
# hand.
LIBRARIES = {"jax", "jaxlib", "equinox", "diffrax", "optax", "numpy", "lineax", "optimistix", "sdeflow"}
_PLAIN = (type(None), bool, int, float, complex, str, bytes)


def describe(tree: Any, *, code: bool | Literal["all"] = True, values: bool = False) -> Description:
    """List (path, text) for everything of ``tree`` that is not an array.

    Arguments:
        tree: modules, dataclasses, containers, functions and numbers, nested in any way.
        code: tell unnamed functions of the user apart by their byte code as well as by name; "all" does so for every
            function that is not a library's.
        values: describe arrays too, by a digest of their content.

    Example:
        >>> import jax.numpy as jnp
        >>> from sdeflow.training._describe import describe
        >>> describe({"f": jnp.tanh, "w": jnp.ones(2)})
        [('', 'dict'), ("['f']", 'jax.tanh')]
    """
    out: Description = []
    _walk(tree, "", out, (), code, values)
    return out


def digest_of(tree: Any) -> str:
    """A digest of all arrays and numbers of a tree, with their paths."""
    text = repr(describe(tree, values=True))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def class_path(x: Any) -> str:
    """``module.Class`` of an object."""
    return f"{type(x).__module__}.{type(x).__qualname__}"


def _walk(x: Any, path: str, out: Description, above: tuple, code: Any, values: bool) -> None:
    if isinstance(x, jax.Array | np.ndarray | np.generic):
        if values:
            out.append((path, _array_text(x)))
        return
    if any(x is parent for parent in above):
        out.append((path, "(itself)"))
        return
    if isinstance(x, _PLAIN):
        # Some schedules of optax turn their whole numbers into floats on first use.
        if values and isinstance(x, float) and x.is_integer():
            x = int(x)
        out.append((path, repr(x)))
        return
    below = functools.partial(_walk, out=out, above=(*above, x), code=code)
    if isinstance(x, type):
        out.append((path, _name(x)))
    elif isinstance(x, functools.partial):
        out.append((path, _name(type(x))))
        for part in ("func", "args", "keywords"):
            below(getattr(x, part), f"{path}.{part}", values=values)
    elif dataclasses.is_dataclass(x):
        out.append((path, _name(type(x))))
        for entry in dataclasses.fields(x):
            static = bool(entry.metadata.get("static", False))
            below(getattr(x, entry.name, None), f"{path}.{entry.name}", values=values or static)
    elif isinstance(x, dict):
        out.append((path, _name(type(x))))
        for key in sorted(x, key=repr):
            below(x[key], f"{path}[{key!r}]", values=values)
    elif isinstance(x, tuple | list):
        out.append((path, f"{_name(type(x))} of {len(x)}"))
        names = getattr(type(x), "_fields", None)
        for index, item in enumerate(x):
            below(item, f"{path}.{names[index]}" if names else f"{path}[{index}]", values=values)
    elif callable(x) and hasattr(x, "__qualname__" if not isinstance(x, np.ufunc) else "__name__"):
        _function(x, path, out, below, code)
    else:
        children, aux = _flatten_once(x)
        text = repr(x) if type(x).__repr__ is not object.__repr__ and " at 0x" not in repr(x) else ""
        out.append((path, _name(type(x)) if children is not None or not text else f"{_name(type(x))}: {text}"))
        for key, child in children or ():
            below(child, f"{path}{key}", values=values)
        if children is not None and aux is not None:
            below(aux, f"{path}.<static>", values=True)


def _function(x: Any, path: str, out: Description, below: Any, code: Any) -> None:
    """A function: its name, the code of one that has no name of its own, and all that it closes over."""
    name = _name(x)
    inner = x
    while hasattr(inner, "__wrapped__"):
        inner = inner.__wrapped__
    owner = getattr(inner, "__self__", None)
    inner = getattr(inner, "__func__", inner)
    own = getattr(inner, "__code__", None)
    local = "<lambda>" in name or "<locals>" in name
    if (code == "all" or (code and local)) and own is not None and name.split(".")[0] not in LIBRARIES:
        name = f"{name} with code {_code_digest(own, getattr(inner, '__doc__', None))}"
    out.append((path, name))
    if owner is not None and not isinstance(owner, types.ModuleType):
        below(owner, f"{path}.__self__", values=True)
    for part in ("__defaults__", "__kwdefaults__"):
        if (local or code == "all") and getattr(inner, part, None):
            below(getattr(inner, part), f"{path}.{part}", values=True)
    for cell_name, cell in zip(own.co_freevars if own else (), getattr(inner, "__closure__", None) or ()):
        try:
            content = cell.cell_contents
        except ValueError:  # a name that is not bound yet
            continue
        below(content, f"{path}{{{cell_name}}}", values=True)


def _name(x: Any) -> str:
    module = getattr(x, "__module__", None) or "builtins"
    name = getattr(x, "__qualname__", None) or getattr(x, "__name__", type(x).__name__)
    root = module.split(".")[0]
    if root == "builtins":
        return name
    return f"{root}.{name}" if root in LIBRARIES else f"{module}.{name}"


def _code_digest(code: types.CodeType, doc: str | None = None) -> str:
    digest = hashlib.sha256(code.co_code)
    constants = code.co_consts[1:] if doc is not None and code.co_consts[:1] == (doc,) else code.co_consts
    for part in (*constants, *code.co_names):
        digest.update((_code_digest(part) if isinstance(part, types.CodeType) else repr(part)).encode())
    return digest.hexdigest()[:12]


def _array_text(x: Any) -> str:
    if not is_concrete(x):
        return f"traced {x.dtype}{list(x.shape)}"
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    data = np.asarray(x)
    digest = hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest()[:12]
    return f"{data.dtype}{list(data.shape)} {digest}"


def _flatten_once(x: Any) -> tuple[list[tuple[str, Any]] | None, Any]:
    """The children of a registered pytree with their paths, and its static data; (None, None) for a leaf."""
    children, treedef = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda y: y is not x)
    node = treedef.node_data()
    if node is None:
        return None, None
    return [(jax.tree_util.keystr(path), child) for path, child in children], node[1]
