"""Reading the user's arrays into flat ones, with every check that a data set needs, once.

A ragged data set is kept flat: the rows of all series one after another, and ``offsets`` of shape (N + 1,)
that say where each series begins. Checks then run over all rows at once, and an error can still name the
series and the row.
"""

import dataclasses
import numbers
import warnings
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from .._compat import SdeflowWarning
from ._time_map import TimeMap, as_time_array

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_ULPS = 8  # The same limit as that of a grid: closer times are noise in float32.
_MISSING = ("NAType", "NaTType", "NoneType")


@dataclasses.dataclass(frozen=True, eq=False)
class Flat:
    """All rows of all series: times (T,), values (T, C), offsets (N + 1,), and the dtype of dates, if any."""

    times: np.ndarray
    values: np.ndarray
    offsets: np.ndarray
    dtype: np.dtype | None
    ids: tuple[Hashable, ...]

    @property
    def series(self) -> np.ndarray:
        """Shape (T,), the position of the series that each row belongs to."""
        return np.repeat(np.arange(len(self.ids)), np.diff(self.offsets))


def read_ids(ids: Sequence[Hashable] | None, count: int) -> tuple[Hashable, ...]:
    """The users' names of the series, 0..N-1 by default.

    Raises:
        ValueError: if their number is wrong or one occurs twice.
    """
    if ids is None:
        return tuple(range(count))
    names = tuple(x.item() if isinstance(x, np.generic) else x for x in ids)
    if len(names) != count:
        raise ValueError(f"There are {count} series but {len(names)} ids; give one id for each series.")
    seen: set[Hashable] = set()
    for position, name in enumerate(names):
        if name in seen:
            raise ValueError(f"The id {name!r} occurs twice, the second time at position {position}; make ids unique.")
        seen.add(name)
    return names


def as_numbers(array: Any, where: str) -> np.ndarray:
    """Real numbers as float64; None and pandas' NA become NaN.

    Raises:
        TypeError: for text, complex numbers, dates and other objects, naming the column.
    """
    if isinstance(array, np.ma.MaskedArray):
        array = np.ma.filled(array.astype(np.float64), np.nan)
    array = np.asarray(array)
    if array.dtype.name in ("float16", "bfloat16"):
        warnings.warn(
            f"{where} holds {array.dtype.name} numbers; they are read as float32.",
            SdeflowWarning,
            stacklevel=5,
        )
        return array.astype(np.float64)
    if array.dtype.kind in "iufb":
        return array.astype(np.float64)
    columns = (
        array.reshape(array.shape[0], -1) if array.ndim > 1 else array[:, None] if array.ndim else array[None, None]
    )
    if array.dtype != object:
        raise TypeError(f"{where}: values must be real numbers, got dtype {array.dtype}; encode or drop that column.")
    numeric = np.full(columns.shape, np.nan)
    for column in range(columns.shape[1]):
        for row, x in enumerate(columns[:, column]):
            if isinstance(x, numbers.Real):
                numeric[row, column] = float(x)
            elif type(x).__name__ not in _MISSING:
                raise TypeError(
                    f"{where}: values must be real numbers, got {x!r} in column {column} at row {row}; "
                    "encode or drop that column."
                )
    return numeric.reshape(array.shape)


def flatten(times: Sequence[Any], values: Sequence[Any], ids: Sequence[Hashable] | None) -> Flat:
    """Lists of arrays as flat arrays, each series checked for its own shapes.

    Raises:
        TypeError: if times or values are not lists of arrays of numbers (or of dates, for times).
        ValueError: for no series, an empty series, or shapes that disagree.
    """
    times, values = _as_list(times, "times"), _as_list(values, "values")
    if len(times) != len(values):
        raise ValueError(f"There are {len(times)} series of times but {len(values)} of values; give one of each.")
    if not times:
        raise ValueError("A TimeSeries needs at least one series, got none.")
    names = read_ids(ids, len(times))
    all_times, all_values = [], []
    for name, t, x in zip(names, times, values):
        try:
            t, x = as_time_array(t, f"Series {name!r}"), as_numbers(x, f"Series {name!r}")
        except ValueError as error:
            raise ValueError(f"Series {name!r} cannot be read as arrays: {error}") from error
        x = x[:, None] if x.ndim == 1 else x
        if t.ndim != 1 or x.ndim != 2:
            raise ValueError(
                f"Series {name!r}: times must be of shape (L,) and values of shape (L, C) or (L,), "
                f"got {t.shape} and {x.shape}."
            )
        if t.size != x.shape[0]:
            raise ValueError(f"Series {name!r} has {t.size} times but {x.shape[0]} rows of values; they must match.")
        if t.size == 0:
            raise ValueError(f"Series {name!r} has no time steps; leave it out.")
        if x.shape[1] == 0 or x.shape[1] != (all_values[0] if all_values else x).shape[1]:
            expected = all_values[0].shape[1] if all_values else "at least one"
            raise ValueError(
                f"Series {name!r} has {x.shape[1]} channels, but {expected} are expected; use NaN for gaps."
            )
        kind, first = t.dtype.kind, (all_times or [t])[0].dtype.kind
        if (kind in "Mm" or first in "Mm") and kind != first:
            raise TypeError(
                f"Series {name!r} has times of dtype {t.dtype}, others of {all_times[0].dtype}; use one kind."
            )
        all_times.append(t)
        all_values.append(x)
    flat = np.concatenate(all_times)
    offsets = np.concatenate([[0], np.cumsum([t.size for t in all_times])])
    dtype = flat.dtype if flat.dtype.kind in "Mm" else None
    bad = np.isnan(flat) if dtype is not None else ~np.isfinite(flat)
    result = Flat(flat, np.concatenate(all_values), offsets, dtype, names)
    if bad.any():
        name, row = locate(result, int(np.argmax(bad)))
        raise ValueError(f"Series {name!r}: times[{row}] is {flat[np.argmax(bad)]}; every row needs a finite time.")
    return result if dtype is None else dataclasses.replace(result, times=flat.astype(np.int64))


def _as_list(arrays: Any, what: str) -> list[Any]:
    if isinstance(arrays, str | bytes) or not hasattr(arrays, "__len__") or not hasattr(arrays, "__iter__"):
        raise TypeError(f"{what} must be a list with one array for each series, got {type(arrays).__name__}.")
    items = list(arrays)
    for position, item in enumerate(items):
        if not hasattr(item, "__len__") or isinstance(item, str | bytes):
            raise TypeError(
                f"{what} must be a list with one array for each series, but entry {position} is {item!r}; "
                "put a single series into a list."
            )
    return items


def locate(flat: Flat, row: int) -> tuple[Hashable, int]:
    """The id of the series that a flat row belongs to, and the row's place in it."""
    series = int(np.searchsorted(flat.offsets, row, side="right")) - 1
    return flat.ids[series], row - int(flat.offsets[series])


def check_order(flat: Flat, duplicates: str) -> None:
    """Refuse times that fall, or that stand still unless ``duplicates`` says what to do.

    Raises:
        ValueError: naming the series, the row and both times.
    """
    if duplicates not in ("error", "mean", "last"):
        raise ValueError(f'duplicates must be "error", "mean" or "last", got {duplicates!r}.')
    step = np.diff(flat.times)
    step[flat.offsets[1:-1] - 1] = 1
    bad = step <= 0 if duplicates == "error" else step < 0
    if bad.any():
        row = int(np.argmax(bad)) + 1
        name, i = locate(flat, row)
        before, after = (x if flat.dtype is None else x.astype(flat.dtype) for x in flat.times[row - 1 : row + 1])
        advice = 'use duplicates="mean" or duplicates="last"' if before == after else "sort the rows by time"
        raise ValueError(f"Series {name!r}: times must increase, but times[{i}]={after} follows {before}; {advice}.")


def merge_duplicates(flat: Flat, how: str) -> Flat:
    """Rows of equal time become one: per channel the mean, or the last, of the observed values."""
    first = np.concatenate([[True], np.diff(flat.times) != 0])
    first[flat.offsets[:-1]] = True
    if first.all():
        return flat
    starts = np.flatnonzero(first)
    observed = ~np.isnan(flat.values)
    if how == "mean":
        total = np.add.reduceat(np.where(observed, flat.values, 0.0), starts, axis=0)
        count = np.add.reduceat(observed.astype(np.int64), starts, axis=0)
        values = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    else:
        rows = np.where(observed, np.arange(first.size)[:, None], -1)
        last = np.maximum.reduceat(rows, starts, axis=0)
        picked = np.take_along_axis(flat.values, np.maximum(last, 0), axis=0)
        values = np.where(last >= 0, picked, np.nan)
    offsets = np.concatenate([[0], np.cumsum(first)])[flat.offsets]
    return dataclasses.replace(flat, times=flat.times[starts], values=values, offsets=offsets)


def check_values(flat: Flat) -> None:
    """Refuse infinite values, values beyond float32, and series without any observation.

    Raises:
        ValueError: naming the series, and for infinite values the row and channel.
    """
    with np.errstate(invalid="ignore"):
        bad = np.abs(flat.values) > _FLOAT32_MAX
    if bad.any():
        row, channel = (int(x) for x in np.argwhere(bad)[0])
        name, i = locate(flat, row)
        raise ValueError(
            f"Series {name!r}: values[{i}, {channel}] is {flat.values[row, channel]}, which float32 cannot "
            "hold; use NaN for a missing value, or change the unit."
        )
    check_observed(flat.values, flat.offsets, flat.ids, "give it a value or leave it out")


def check_observed(values: np.ndarray, offsets: np.ndarray, ids: Sequence[Hashable], advice: str) -> None:
    """Refuse series without any observed value.

    Raises:
        ValueError: naming the series.
    """
    rows = np.concatenate([[0], np.cumsum((~np.isnan(values)).any(axis=1))])
    empty = np.flatnonzero(np.diff(rows[offsets]) == 0)
    if empty.size:
        names = ", ".join(repr(ids[i]) for i in empty[:8]) + (", ..." if empty.size > 8 else "")
        raise ValueError(f"No value is observed in series {names}; {advice}.")


def read_labels(
    labels: Sequence[Hashable] | None, classes: Sequence[Hashable] | None, ids: Sequence[Hashable]
) -> tuple[np.ndarray | None, tuple[Hashable, ...] | None]:
    """Class labels as numbers 0..K-1 and the classes themselves, sorted if they can be.

    Raises:
        TypeError: if a label is not hashable.
        ValueError: if their number is wrong, one is missing, or one is none of ``classes``.
    """
    if labels is None:
        return None, tuple(classes) if classes is not None else None
    given = [x.item() if isinstance(x, np.generic | np.ndarray) and np.ndim(x) == 0 else x for x in labels]
    if len(given) != len(ids):
        raise ValueError(f"There are {len(ids)} series but {len(given)} labels; give one label for each series.")
    for name, label in zip(ids, given):
        if not isinstance(label, Hashable):
            raise TypeError(
                f"The label of series {name!r} is {label!r}; labels must be hashable, like ints or strings."
            )
        if type(label).__name__ in _MISSING or label != label:
            raise ValueError(f"The label of series {name!r} is missing ({label!r}); leave the series out or label it.")
    if classes is None:
        distinct = dict.fromkeys(given)
        try:
            classes = sorted(distinct)  # pyright: ignore[reportArgumentType]
        except TypeError:
            classes = list(distinct)
    code = {label: k for k, label in enumerate(classes)}
    for name, label in zip(ids, given):
        if label not in code:
            raise ValueError(
                f"The label of series {name!r} is {label!r}, which is none of the classes {tuple(classes)}."
            )
    return np.array([code[label] for label in given], dtype=np.int32), tuple(classes)


def read_table(table: Any, what: str, ids: Sequence[Hashable]) -> np.ndarray | None:
    """Targets or static covariates: one row for each series, complete and finite.

    Raises:
        ValueError: for a wrong number of rows, or NaN or infinite entries, naming the series.
    """
    if table is None:
        return None
    array = as_numbers(table, what)
    array = array[:, None] if array.ndim == 1 else array
    if array.ndim != 2 or array.shape[0] != len(ids):
        raise ValueError(f"{what} must be of shape ({len(ids)}, k), one row for each series, got {array.shape}.")
    bad = ~np.isfinite(array)
    if bad.any():
        row, column = (int(x) for x in np.argwhere(bad)[0])
        raise ValueError(f"{what} of series {ids[row]!r}, column {column}, is {array[row, column]}; fill it in first.")
    return array


def check_resolution(internal: np.ndarray, flat: Flat, time_map: TimeMap) -> None:
    """Refuse times whose smallest gap float32 cannot resolve, taken as float32 will hold them.

    Raises:
        ValueError: naming the series, the two rows and the way out.
    """
    rounded = internal.astype(np.float32).astype(np.float64)
    gaps = np.diff(rounded, append=np.inf)
    gaps[flat.offsets[1:] - 1] = np.inf
    largest = np.maximum.reduceat(np.abs(rounded), flat.offsets[:-1])
    limit = _ULPS * np.spacing(largest.astype(np.float32)).astype(np.float64)
    bad = gaps < np.repeat(limit, np.diff(flat.offsets))
    if not bad.any():
        return
    row = int(np.argmax(bad))
    series = int(flat.series[row])
    i = row - int(flat.offsets[series])
    if time_map.per_series:
        advice = "merge such rows, or cut the series into shorter ones"
    else:
        advice = 'use align="start", which measures each series from its own first time'
    gap = (flat.times[row + 1] - flat.times[row]) / time_map.scale
    raise ValueError(
        f"Series {flat.ids[series]!r}: times[{i}] and times[{i + 1}] are {gap:.3g} of an internal unit "
        f"apart, which float32 cannot resolve at {largest[series]:.6g}; {advice}."
    )
