"""Reading what AnnData holds: the times of cells, their coordinates, and what else a column says of them.

anndata itself is never imported: anything will do that has ``.obs`` and ``.obsm`` (tables of columns, and of arrays
with one row for each cell), and ``.X`` where that is asked for.
"""

import re
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from ._long import is_missing
from ._read import as_numbers

_LIMIT = 2**30  # Bytes of a dense array made from a sparse one, or read from a file.
ANEW = "compute it anew, or leave these cells out"  # What to do about cells that are not finite.
_BLOCK = 2**26  # Bytes that are read from a file at once.
_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")


def read_cells(
    adata: Any,
    time: str,
    rep: str,
    weights: str | None,
    labels: str | None,
    times: Mapping[Hashable, float] | None,
) -> dict[str, Any]:
    """The arguments of `Snapshots` for the cells of an AnnData, sorted by time.

    Raises:
        TypeError: for columns or coordinates that hold no numbers.
        ValueError: for missing keys, times that cannot be read, or coordinates that cannot be used.
    """
    when = cell_times(adata, time, times)
    missing = np.isnan(when)
    if missing.any():
        raise ValueError(
            f"{missing.sum()} of the {missing.size} cells have no time in obs[{time!r}], the first in row "
            f"{np.argmax(missing)}; leave them out with adata[adata.obs[{time!r}].notna()]."
        )
    values, names = coordinates(adata, rep)
    if values.shape[0] != when.size:
        raise ValueError(f"{source(rep)} has {values.shape[0]} rows, but there are {when.size} cells in obs[{time!r}].")
    check_finite(values, source(rep), np.arange(when.size), ANEW)
    distinct, counts = np.unique(when, return_counts=True)
    if distinct.size < 2:
        raise ValueError(
            f"Snapshots need at least two times, but all {when.size} cells have the same one in obs[{time!r}]: "
            f"{distinct.tolist()}."
        )
    if counts.min() < 2:
        raise ValueError(
            f"There is one cell at time {distinct[counts.argmin()]:g} of obs[{time!r}], but every time needs at least "
            "two; leave that time out, or pool it with its neighbour through times=."
        )
    order = np.argsort(when, kind="stable")
    split = lambda array: np.split(array[order], np.cumsum(counts)[:-1])
    return {
        "times": distinct,
        "samples": split(values),
        "weights": None
        if weights is None
        else split(as_numbers(_numpy(column_of(adata, weights)), f"obs[{weights!r}]")),
        "labels": None if labels is None else split(_numpy(column_of(adata, labels))),
        "names": names,
        "index": split(np.arange(when.size)),
    }


# Columns of obs


def cell_times(adata: Any, time: str, times: Mapping[Hashable, float] | None) -> np.ndarray:
    """Shape (n,), the time of each cell in float64, NaN for cells without one.

    Raises:
        TypeError: for dates, truth values and other kinds that are no times.
        ValueError: for a column that is not there, or labels that are not numbers.
    """
    column = _numpy(column_of(adata, time))
    if times is None and column.dtype.kind in "iuf":
        return _finite(column.astype(np.float64), time)
    if times is None and column.dtype.kind not in "OUST":
        raise TypeError(
            f"obs[{time!r}] is of dtype {column.dtype}; give numbers, or say what the labels mean with "
            "times={label: time}."
        )
    labels = [None if is_missing(label) else label for label in column.tolist()]
    distinct = [label for label in dict.fromkeys(labels) if label is not None]
    read = _number if times is None else lambda label: times.get(label)
    meaning = {label: read(label) for label in distinct}
    if unknown := [label for label, number in meaning.items() if number is None]:
        fault = "are not numbers" if times is None else "are not in times="
        raise ValueError(
            f"The labels {_shown(unknown)} in obs[{time!r}] {fault}; its labels are {_shown(distinct)}. Say what each "
            "means with times={label: time}, and leave out cells without one."
        )
    # A cell without a label is at no time: an array of floats holds None as NaN.
    return _finite(np.array([meaning.get(label) for label in labels], dtype=np.float64), time)


def _finite(when: np.ndarray, time: str) -> np.ndarray:
    if np.isinf(when).any():
        raise ValueError(f"The time of the cell in row {np.argmax(np.isinf(when))} is infinite in obs[{time!r}].")
    return when


def _number(label: Any) -> float | None:
    """What a label says if it is a number and nothing else: float() alone would read "nan", "inf" and "1_0"."""
    text = label.decode() if isinstance(label, bytes) else str(label)
    is_text = isinstance(label, str | bytes)
    is_real = isinstance(label, int | float | np.integer | np.floating) and not isinstance(label, bool)
    return float(text) if (is_text and _NUMBER.fullmatch(text)) or is_real else None


def column_of(adata: Any, name: str) -> Any:
    keys = list(adata.obs.keys())
    if name not in keys:
        raise ValueError(f"There is no column {name!r} in obs; it has {_shown(keys)}.")
    return adata.obs[name]


def _numpy(column: Any) -> np.ndarray:
    """A column as an array: of the labels for categories, of objects where pandas' own kinds have gaps."""
    return np.asarray(column.to_numpy() if hasattr(column, "to_numpy") else column)


def _shown(items: Iterable[Any], limit: int = 20) -> str:
    items = [str(x) if isinstance(x, str) else x for x in items]
    return repr(items) if len(items) <= limit else f"{items[:limit]!r} and {len(items) - limit} more"


# Coordinates


def source(rep: str) -> str:
    """Where a representation is kept, in words."""
    return "X" if rep == "X" else f"obsm[{rep!r}]"


def coordinates(adata: Any, rep: str) -> tuple[np.ndarray, list[str] | None]:
    """Shape (n, d), the coordinates of all cells, and the names of the components where there are any.

    Raises:
        TypeError: if they are not numbers.
        ValueError: for a key that is not there, no or another than a matrix, or a dense array above the limit.
    """
    if rep == "X":
        if getattr(adata, "X", None) is None:
            raise ValueError(f"adata has no X; give a representation, rep= one of {_shown(adata.obsm.keys())}.")
        names = getattr(adata, "var_names", None)
        return dense(adata.X, rep), None if names is None else [str(x) for x in names]
    keys = list(adata.obsm.keys())
    if rep not in keys:
        hint = f"; did you mean {'X_' + rep!r}?" if f"X_{rep}" in keys else "."
        raise ValueError(f'There is no {rep!r} in obsm; it has {_shown(keys)}, and rep="X" is adata.X{hint}')
    found = adata.obsm[rep]
    names = [str(x) for x in found.columns] if hasattr(found, "columns") else None
    return dense(found.to_numpy() if hasattr(found, "to_numpy") else found, rep), names


def dense(matrix: Any, rep: str) -> np.ndarray:
    """A matrix in memory, in single precision if it came in it: from an array, a sparse matrix or a file.

    Raises:
        TypeError: if it does not hold numbers.
        ValueError: if it is not a matrix, or too large to be made dense.
    """
    if len(shape := np.shape(matrix) or matrix.shape) != 2:
        raise ValueError(f"{source(rep)} must be a matrix with one row for each cell, got shape {shape}.")
    if hasattr(matrix, "dtype") and not isinstance(matrix, np.ndarray | jax.Array):
        if np.dtype(matrix.dtype).kind not in "iufb":
            raise TypeError(f"{source(rep)} must hold real numbers, got dtype {matrix.dtype}.")
        double = np.dtype(matrix.dtype) == np.float64
        check_memory(
            shape, 8 if double else 4, source(rep), "give a representation, such as rep='X_pca', or fewer genes"
        )
        out = np.empty(shape, np.float64 if double else np.float32)
        step = max(1, _BLOCK // max(1, out[:1].nbytes))
        for start in range(0, shape[0], step):
            rows = matrix[start : start + step]
            out[start : start + step] = rows.toarray() if hasattr(rows, "toarray") else np.asarray(rows)
        return out
    array = np.asarray(matrix)
    return array if array.dtype == np.float32 else as_numbers(array, source(rep))


def check_memory(shape: tuple[int, ...], itemsize: int, what: str, instead: str) -> None:
    """Refuse a dense array above the limit.

    Raises:
        ValueError: naming its size, the limit, and what to do.
    """
    size = shape[0] * shape[1] * itemsize
    if size > _LIMIT:
        raise ValueError(
            f"{what} would take {size / 2**30:.1f} GiB as a dense array of {shape[0]} cells and {shape[1]} columns, "
            f"above the limit of {_LIMIT / 2**30:g} GiB; {instead}."
        )


def check_finite(values: np.ndarray, what: str, rows: np.ndarray, advice: str) -> None:
    """Refuse cells with values that are not finite; ``rows`` says which rows of the AnnData they are.

    Raises:
        ValueError: with how many there are, and the first.
    """
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        raise ValueError(
            f"{bad.sum()} of the {bad.size} cells have values that are not finite in {what}, the first in row "
            f"{rows[np.argmax(bad)]}; {advice}."
        )
