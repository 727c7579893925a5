"""Checkpoints by name: ``save_checkpoint`` and ``load_checkpoint``, for any pytree. No pickle."""

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jaxtyping import PyTree

from ._describe import class_path, describe
from ._file import CheckpointError, encode, locate, read, write

_T = TypeVar("_T")
_PACKAGES = ("sdeflow", "jax", "diffrax", "equinox", "optax", "numpy")
_SHOWN = 8


def save_checkpoint(path: str | Path, tree: PyTree, *, meta: Mapping[str, Any] | None = None) -> None:
    """Write the arrays of ``tree`` to one file, atomically; the file it replaces is kept beside it as
    ``.prev``. A symbolic link stays: the file that it points to is replaced.

    Arguments:
        path: the file; its directory must exist.
        tree: any pytree. Typed PRNG keys are arrays like any other; everything that is not an array (sizes,
            activation functions) is written as a description, to be compared when loading.
        meta: what else to keep; must be expressible in JSON.

    Raises:
        OSError: the file could not be written; what was there before is untouched.
        TypeError: ``meta`` has no JSON form, or an array could not be read back (text, objects, records, dates,
            masked numbers); nothing is written then.
        ValueError: two leaves of ``tree`` have the same path.

    Example:
        >>> import os, tempfile
        >>> import jax.numpy as jnp
        >>> from sdeflow.training import load_checkpoint, save_checkpoint
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "model.ckpt")
        ...     save_checkpoint(path, {"w": jnp.arange(3.0)}, meta={"note": "first"})
        ...     tree, meta = load_checkpoint(path, {"w": jnp.zeros(3)})
        >>> tree["w"].tolist(), meta
        ([0.0, 1.0, 2.0], {'note': 'first'})
    """
    path = locate(path)
    chunks = contents(tree, meta or {}, class_path(tree))
    keep = True
    if path.exists():
        try:
            keep = read(path)[2]
        except CheckpointError:
            keep = False  # what is damaged must not take the place of a good `.prev`
    write(path, chunks, keep=keep)


def load_checkpoint(path: str | Path, like: _T, *, part: str | None = None) -> tuple[_T, dict[str, Any]]:
    """Read a checkpoint into a tree like ``like``; return the tree and the ``meta`` it was saved with.

    Arguments:
        path: a file of `save_checkpoint`, or of `fit` (then ``part`` is "best" or "last" and ``like`` a
            model).
        like: a tree of the same structure, whose arrays are replaced.
        part: read only this entry of a saved dict.

    Raises:
        CheckpointError: (a ValueError) the file is damaged and there is no good one before it, or it holds
            another class, other leaves, shapes, dtypes or static values than ``like``: all are named in one
            message.
        FileNotFoundError: there is no such file.

    A damaged file gives way to its ``.prev`` with a `SdeflowWarning`.
    """
    path = locate(path)
    header, arrays, _ = read(path)
    return rebuild(header, arrays, like, path, part), header["meta"]


def contents(tree: PyTree, meta: Mapping[str, Any], model_class: str) -> list[Any]:
    """The chunks of a checkpoint file."""
    arrays, keys = {}, {}
    for name, leaf in _named_arrays(tree):
        if name in arrays:
            raise ValueError(f"Two leaves of the tree have the path {name!r}; give them names of their own.")
        arrays[name], impl = _to_host(leaf)
        if impl is not None:
            keys[name] = impl
    header = {
        "class": model_class,
        "versions": versions(),
        "keys": keys,
        "static": describe(tree),
        "meta": dict(meta),
    }
    return encode(header, arrays)


def rebuild(
    header: Mapping[str, Any], arrays: Mapping[str, np.ndarray], like: _T, path: Path, part: str | None = None
) -> _T:
    """``like`` with its arrays replaced by those of the file, or one error that names every difference."""
    prefix = "" if part is None else f"[{part!r}]"
    saved = {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}
    keys = {name[len(prefix) :]: impl for name, impl in header["keys"].items() if name.startswith(prefix)}
    static = [(name[len(prefix) :], text) for name, text in header["static"] if name.startswith(prefix)]
    if part is not None and not (static or saved):
        raise CheckpointError(f"The checkpoint {str(path)!r} has no part {part!r}; it was not saved by `fit` with one.")
    wanted = dict(_named_arrays(like))
    problems = _static_differences(static, describe(like), header["versions"])
    problems += [f"{_at(name)} is missing in the file" for name in wanted if name not in saved]
    problems += [f"{_at(name)} is in the file only" for name in saved if name not in wanted]
    for name, leaf in wanted.items():
        if name in saved:
            have, want = _signature(saved[name], keys.get(name)), _signature(*_to_host(leaf))
            if have != want:
                problems.append(f"{_at(name)} is {have} in the file and {want} here")
    if problems:
        more = f", and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise CheckpointError(
            f"The checkpoint {str(path)!r} does not fit what it is loaded into: "
            f"{'; '.join(problems[:_SHOWN])}{more}. "
            f"Load it into the structure it was saved from ({header['class']})."
        )

    def replace(keypath: Any, leaf: Any) -> Any:
        name = jtu.keystr(keypath)
        return _from_host(saved[name], keys.get(name), leaf) if eqx.is_array(leaf) else leaf

    return jtu.tree_map_with_path(replace, like)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that a checkpoint depends on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def _static_differences(saved: Any, now: Any, saved_versions: Mapping[str, str]) -> list[str]:
    before, after = dict(saved), dict(now)
    found = [
        f"{_at(name)} is {before[name]} in the file and {after[name]} here"
        for name in before
        if name in after and before[name] != after[name]
    ]
    # A new release of a library may add a field to its modules; only then may one side know more than the
    # other.
    if dict(saved_versions) == versions():
        found += [f"{_at(name)} ({before[name]}) is in the file only" for name in before if name not in after]
        found += [f"{_at(name)} ({after[name]}) is missing in the file" for name in after if name not in before]
    elif found:
        changed = {k: v for k, v in saved_versions.items() if versions().get(k) != v}
        found.append("the file was written with " + ", ".join(f"{k} {v}" for k, v in changed.items()))
    return found


def _named_arrays(tree: PyTree) -> list[tuple[str, Any]]:
    return [(jtu.keystr(path), leaf) for path, leaf in jtu.tree_leaves_with_path(tree) if eqx.is_array(leaf)]


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_host(leaf: Any) -> tuple[np.ndarray, str | None]:
    if _is_key(leaf):
        return np.asarray(jax.random.key_data(leaf)), str(jax.random.key_impl(leaf))
    # Masked arrays stay as they are, so that they can be refused.
    return np.asanyarray(leaf) if isinstance(leaf, np.ma.MaskedArray) else np.asarray(leaf), None


def _from_host(array: np.ndarray, impl: str | None, like: Any) -> Any:
    if impl is not None:
        return jax.random.wrap_key_data(jnp.asarray(array), impl=impl)
    return jax.device_put(array, like.sharding) if isinstance(like, jax.Array) else array.astype(like.dtype)


def _signature(array: np.ndarray, impl: str | None) -> str:
    return f"{array.dtype.name}{list(array.shape)}" + (f" of {impl} keys" if impl else "")


def _at(name: str) -> str:
    return name or "the whole"
