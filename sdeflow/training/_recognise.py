"""Equal optimisers and losses, made anew, as the same object, so that their compiled programs are found again.

optax's transformations and schedules are closures, which compare by identity: ``optax.adam(1e-3)`` made twice is two
functions to ``jax.jit``, and compiles twice. Here an object is read down to what its behaviour follows from: byte code,
what functions close over, defaults, globals that functions of the user name, fields, numbers and arrays. Equal ones
get the object that was seen first. Whatever is not understood keeps its own identity: a program is compiled anew rather
than used for another optimiser.
"""

import collections
import dataclasses
import enum
import functools
import hashlib
import types
from collections.abc import Callable
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._compat import is_concrete
from ._describe import LIBRARIES

_T = TypeVar("_T")
_HEAP_TYPE = 1 << 9  # CPython's flag of classes that are written in Python: what they hold is in their __dict__
_MOST = 64  # objects remembered, the last used
# From a value to the object that had it and what was made of it.
_seen: "collections.OrderedDict[Any, tuple[Any, Any]]" = collections.OrderedDict()


class _Unknown(Exception):
    """Raised for what cannot be compared by value."""


def recognised(x: _T, make: Callable[[_T], Any] = lambda x: x) -> Any:
    """``make(x)``, or what was made of an equal object before.

    Arguments:
        x: an optimiser, a loss or another function, with what it holds.
        make: what to make of an object that is new.
    """
    value = _value_or_none(x)
    if value is None:
        return make(x)
    key = (make, value)
    if key in _seen:
        first, made = _seen[key]
        # What the first one closes over, a list say, may have changed since it was seen.
        if first is x or _value_or_none(first) == value:
            _seen.move_to_end(key)
            return made
    made = make(x)
    _seen[key] = x, made
    while len(_seen) > _MOST:
        _seen.popitem(last=False)
    return made


def _value_or_none(x: Any) -> Any:
    try:
        value = _value(x, ())
        hash(value)
    except (_Unknown, TypeError, RecursionError):
        return None
    return value


def _value(x: Any, above: tuple[Any, ...]) -> Any:
    """A hashable value, equal for objects that behave alike.

    Raises:
        _Unknown: if the object holds something that may change, or of which too little is known.
    """
    if any(x is one for one in above):
        return ("itself", sum(x is not one for one in above))
    if x is None or isinstance(x, bool | int | str | bytes):
        return (type(x), x)
    if isinstance(x, float | complex):
        return (type(x), repr(x))
    if isinstance(x, jax.Array | np.ndarray | np.generic):
        return _array(x)
    if isinstance(x, type | types.ModuleType | types.BuiltinFunctionType | np.ufunc | np.dtype | enum.Enum):
        return (type, x)
    below = functools.partial(_value, above=(*above, x))
    if isinstance(x, functools.partial):
        return (functools.partial, below(x.func), below(x.args), below(x.keywords))
    if isinstance(x, types.MethodType):
        return (types.MethodType, below(x.__func__), below(x.__self__))
    if isinstance(x, types.FunctionType):
        return _function(x, below)
    if isinstance(x, tuple | list):
        return (type(x), *(below(item) for item in x))
    if isinstance(x, dict):
        return (type(x), *((below(k), below(v)) for k, v in x.items()))
    if isinstance(x, set | frozenset):
        return (type(x), frozenset(below(item) for item in x))
    if dataclasses.is_dataclass(x):
        # Whatever was put into it beside its fields would be missed.
        fields = [field.name for field in dataclasses.fields(x)]
        if not isinstance(x, eqx.Module) and set(vars(x)) - set(fields):
            raise _Unknown
        return (type(x), *((name, below(getattr(x, name, None))) for name in fields))
    if _is_of_library(x) and callable(x) and hasattr(x, "__wrapped__"):
        # A function of a library that is compiled, or has custom derivatives: there is one of it.
        return ("library", x)
    if _is_of_library(type(x)) and type(x).__flags__ & _HEAP_TYPE and hasattr(x, "__dict__"):
        return (type(x), below(vars(x)))
    raise _Unknown


def _is_of_library(x: Any) -> bool:
    return (getattr(x, "__module__", None) or "").split(".")[0] in LIBRARIES


def _function(x: types.FunctionType, below: Callable[[Any], Any]) -> Any:
    cells = []
    for cell in x.__closure__ or ():
        try:
            cells.append(below(cell.cell_contents))
        except ValueError:  # a name that is not bound yet
            cells.append("unbound")
    named: list[Any] = []
    if not _is_of_library(x):
        # What a user's function finds outside of itself may have changed since.
        named = [(name, below(x.__globals__[name])) for name in _names(x.__code__) if name in x.__globals__]
    extra = below(getattr(x, "__wrapped__", None))
    return (types.FunctionType, x.__code__, *cells, "defaults", below(x.__defaults__), below(x.__kwdefaults__),
            "globals", *named, extra)  # fmt: skip


def _names(code: types.CodeType) -> list[str]:
    """The names that code looks up outside of itself, that of inner functions included."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= set(_names(constant))
    return sorted(names)


def _array(x: Any) -> Any:
    if not is_concrete(x):
        raise _Unknown
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return ("key", str(jax.random.key_impl(x)), _digest(np.asarray(jax.random.key_data(x))))
    weak, data = isinstance(x, jax.Array) and x.weak_type, np.asarray(x)
    if data.dtype.hasobject:
        raise _Unknown
    return (type(x), str(data.dtype), data.shape, weak, _digest(data))


def _digest(data: Any) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(data).tobytes()).digest()
