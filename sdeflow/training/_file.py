"""The bytes of a checkpoint file, and how they reach the disk whole or not at all.

Layout, little-endian: 8 bytes of magic; format version (uint32) and header length (uint64); the header in
JSON; the raw bytes of every leaf in the header's order; SHA-256 of all that precedes. The last 32 bytes are
the digest in every version, so that damage and novelty can be told apart.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import secrets
import shutil
import struct
import sys
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._compat import SdeflowWarning

MAGIC = b"\x89SDEFLOW"
VERSION = 1
_NUMBERS = struct.Struct("<IQ")
_START = len(MAGIC) + _NUMBERS.size
_DIGEST = hashlib.sha256().digest_size
_STALE_SECONDS = 3600.0
_CHUNK = 2**22


class CheckpointError(ValueError):
    """A checkpoint file is damaged, or holds something else than what was asked for."""


class DamagedError(CheckpointError):
    """The bytes are not those that were written (or were never a checkpoint)."""


def locate(path: str | Path) -> Path:
    """The file itself: absolute, so that changing the working directory moves nothing, with links followed."""
    return Path(os.path.realpath(path))


def previous(path: Path) -> Path:
    """Where the file that ``path`` replaced is kept."""
    return path.with_name(path.name + ".prev")


def encode(header: dict[str, Any], arrays: dict[str, np.ndarray]) -> list[Any]:
    """The file as a list of buffers; the header gets the list of (name, shape, dtype) under "leaves".

    Raises:
        TypeError: an array could not be read back: text, objects, records, dates, or numbers with a mask.
    """
    for name, array in arrays.items():
        _check_readable(name, array)
    arrays = {name: _plain(array) for name, array in arrays.items()}
    leaves = [[name, list(array.shape), array.dtype.name] for name, array in arrays.items()]
    text = json.dumps({**header, "leaves": leaves}).encode()
    return [MAGIC + _NUMBERS.pack(VERSION, len(text)), text, *(array.tobytes() for array in arrays.values())]


def decode(data: bytes, path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The header and the arrays by name.

    Raises:
        CheckpointError: the data is empty, damaged, not a checkpoint, or of a newer format.
    """
    where = f"The checkpoint {str(path)!r}"
    if not data:
        raise DamagedError(f"{where} is empty; delete it to start afresh.")
    if data[: len(MAGIC)] != MAGIC[: len(data)]:
        raise DamagedError(f"{where} is not a checkpoint of sdeflow; give another path.")
    if len(data) < _START + _DIGEST or hashlib.sha256(data[:-_DIGEST]).digest() != data[-_DIGEST:]:
        raise DamagedError(f"{where} is damaged ({len(data)} bytes, wrong digest); restore it or delete it.")
    version, length = _NUMBERS.unpack_from(data, len(MAGIC))
    if version > VERSION:
        raise CheckpointError(
            f"{where} has format {version}, but this version of sdeflow reads up to {VERSION}; upgrade sdeflow."
        )
    header = json.loads(data[_START : _START + length])
    arrays, offset = {}, _START + length
    for name, shape, dtype in header["leaves"]:
        kind = _number_type(dtype)
        if kind is None:
            raise DamagedError(f"{where} cannot be read: its leaf {name or 'the whole'} is {dtype}, not numbers.")
        count = math.prod(shape)
        # A copy: a view would keep the whole file in memory, and could not be written to.
        array = np.frombuffer(data, _little(kind), count, offset).astype(kind)
        arrays[name] = array.reshape(shape)
        offset += count * kind.itemsize
    if offset + _DIGEST != len(data):
        raise DamagedError(f"{where} is damaged: it holds {len(data)} bytes, its header speaks of {offset + _DIGEST}.")
    return header, arrays


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray], bool]:
    """Read ``path``, or with a warning the file before it if that is damaged or gone.

    Returns the header, the arrays and whether ``path`` itself was good.
    """
    try:
        return *decode(path.read_bytes(), path), True
    except (DamagedError, FileNotFoundError) as error:
        backup = previous(path)
        try:
            found = decode(backup.read_bytes(), backup)
        except (CheckpointError, OSError):
            raise error from None
        reason = str(error) if isinstance(error, DamagedError) else f"The checkpoint {str(path)!r} is gone."
        warnings.warn(f"{reason} The one before it, {str(backup)!r}, was loaded.", SdeflowWarning, stacklevel=4)
        return *found, False


def write(path: Path, chunks: Iterable[Any], *, keep: bool) -> None:
    """Replace ``path`` by the chunks and their digest in one atomic step.

    The data is on the disk, and was read back from there, before the name points to it. With ``keep`` the old file
    stays as ``.prev``; it is linked, not moved, so that at no moment neither name exists.

    Raises:
        OSError: the file could not be written, or does not hold what was written; ``path`` is untouched.
    """
    temp = path.with_name(f"{_prefix(path)}{os.getpid()}-{secrets.token_hex(4)}.tmp")
    digest = hashlib.sha256()
    try:
        with open(temp, "xb") as file:
            for chunk in chunks:
                digest.update(chunk)
                file.write(chunk)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        _verify(temp, digest.digest())
        if keep and path.exists():
            link = temp.with_suffix(".link")
            try:
                _link(path, link)
                os.replace(link, previous(path))
            finally:
                with contextlib.suppress(OSError):
                    link.unlink()
        os.replace(temp, path)
    finally:
        with contextlib.suppress(OSError):
            temp.unlink()
    _sync_directory(path.parent)


def check_writable(path: Path) -> None:
    """Raise the OSError that a write to ``path`` would meet, before hours of work are staked on it."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "checkpoint= is a directory; give the path of a file", str(path))
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the directory of checkpoint= does not exist; make it", str(path))
    with contextlib.suppress(FileNotFoundError):
        os.stat(previous(path))  # a name that is too long for ".prev" fails here
    for leftover in path.parent.glob(f"{_prefix(path)}*.tmp"):
        with contextlib.suppress(OSError):  # another process may have been faster
            if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
                leftover.unlink()
    probe = path.with_name(f"{_prefix(path)}{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        probe.touch(exist_ok=False)
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
    if path.exists():
        with open(path, "rb"):
            pass


def _prefix(path: Path) -> str:
    """Short whatever the length of the name, and its own for each name in a shared directory."""
    return f".sdeflow-{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:12]}-"


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # some file systems have no hard links
        shutil.copy2(source, target)


def _verify(path: Path, digest: bytes) -> None:
    """Read a file that was just written, and compare it with the digest at its end."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size - _DIGEST
        while left > 0 and (chunk := file.read(min(left, _CHUNK))):
            found.update(chunk)
            left -= len(chunk)
        if found.digest() != digest or file.read() != digest:
            raise OSError(errno.EIO, "the file does not hold what was written to it; check the disk", str(path))


def _sync_directory(directory: Path) -> None:
    if os.name == "nt":  # Windows has no handle on a directory to sync
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems refuse it
            raise
    finally:
        os.close(handle)


def _number_type(name: str) -> np.dtype | None:
    """The type of numbers of this name, the small floats of JAX among them; None for anything else."""
    try:
        dtype = jnp.dtype(name)
    except TypeError:
        return None
    return dtype if dtype == jnp.bool_ or jnp.issubdtype(dtype, jnp.number) else None


def _check_readable(name: str, array: np.ndarray) -> None:
    leaf = name or "the whole"
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"A checkpoint holds no masked arrays, but {leaf} is one: keep its data and its mask as two arrays."
        )
    if array.dtype.names is not None or _number_type(array.dtype.name) is None:
        raise TypeError(
            f"A checkpoint holds arrays of numbers, but {leaf} has dtype {array.dtype}: keep text as strings outside "
            "of arrays or in meta=, records as one array a field, and dates as numbers."
        )


def _little(dtype: np.dtype) -> np.dtype:
    swapped = dtype.byteorder == ">" or (dtype.byteorder == "=" and sys.byteorder == "big")
    return dtype.newbyteorder("<") if swapped else dtype


def _plain(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, _little(array.dtype)).reshape(np.shape(array))
