"""Tables in long form, one row for each series and time, to lists of arrays; any table will do."""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from ._read import as_numbers
from ._time_map import as_time_array


def split_long(
    frame: Any,
    id: str,
    time: str,
    values: str | Sequence[str],
    label: str | None,
    tables: dict[str, str | Sequence[str] | None],
) -> tuple[list[np.ndarray], list[np.ndarray], list[Hashable], list[Hashable] | None, dict[str, np.ndarray | None]]:
    """Times, values, ids, labels and tables of the series in a table, sorted by time within each.

    Raises:
        TypeError: if a column of numbers is not numeric.
        ValueError: for a missing column, a missing id or time, or what belongs to a whole series and changes in it.
    """
    values = _names(values)
    if not values:
        raise ValueError("values= must name at least one column.")
    names = _to_list(_column(frame, id))
    code: dict[Hashable, int] = {}
    codes = np.empty(len(names), dtype=np.int64)
    for row, name in enumerate(names):
        if is_missing(name):
            raise ValueError(f"Column {id!r} has no id in row {row}; fill it in or drop the row.")
        codes[row] = code.setdefault(name, len(code))
    if not code:
        raise ValueError("The table has no rows; a TimeSeries needs at least one series.")
    times = as_time_array(_to_numpy(_naive(_column(frame, time))), f"Column {time!r}")
    bad = np.isnan(times)
    if bad.any():
        row = int(np.argmax(bad))
        raise ValueError(
            f"Column {time!r} has no time in row {row} (series {names[row]!r}); fill it in or drop the row."
        )
    columns = [as_numbers(_to_numpy(_column(frame, name)), f"Column {name!r}") for name in values]
    order = np.lexsort((times, codes))
    cuts = np.flatnonzero(np.diff(codes[order])) + 1
    labels = None if label is None else _labels(_to_list(_column(frame, label)), codes, list(code), label)
    return (
        np.split(times[order], cuts),
        np.split(np.stack(columns, axis=1)[order], cuts),
        list(code),
        labels,
        {title: _table(frame, columns, codes, list(code)) for title, columns in tables.items()},
    )


def _names(columns: str | Sequence[str]) -> list[str]:
    return [columns] if isinstance(columns, str) else list(columns)


def _column(frame: Any, name: str) -> Any:
    columns = list(getattr(frame, "columns", frame))
    if name not in columns:
        raise ValueError(f"The table has no column {name!r}; it has {columns}.")
    return frame[name]


def _to_list(column: Any) -> list[Any]:
    for method in ("to_list", "tolist"):
        if hasattr(column, method):
            return getattr(column, method)()
    return list(column)


def _to_numpy(column: Any) -> np.ndarray:
    return column.to_numpy() if hasattr(column, "to_numpy") else np.asarray(column)


def _naive(column: Any) -> Any:
    """A pandas column with a time zone, as UTC without one; anything else as it is."""
    if getattr(column.dtype if hasattr(column, "dtype") else None, "tz", None) is None:
        return column
    return column.dt.tz_convert("UTC").dt.tz_localize(None)


def is_missing(x: Any) -> bool:
    return x is None or type(x).__name__ in ("NAType", "NaTType") or (isinstance(x, float) and x != x)


def _labels(column: list[Any], codes: np.ndarray, names: list[Hashable], title: str) -> list[Hashable]:
    # pandas' NA refuses to be compared, so every kind of missing label becomes None; they are refused later.
    column = [None if is_missing(label) else label for label in column]
    labels = [column[row] for row in np.unique(codes, return_index=True)[1]]
    for row, label in enumerate(column):
        expected = labels[codes[row]]
        if label != expected:
            raise ValueError(
                f"Column {title!r} changes within series {names[codes[row]]!r}, from {expected!r} to "
                f"{label!r} in row {row}; a label belongs to a whole series."
            )
    return labels


def _table(
    frame: Any, columns: str | Sequence[str] | None, codes: np.ndarray, names: list[Hashable]
) -> np.ndarray | None:
    """Shape (N, k), one row for each series, of columns that are constant within each."""
    if columns is None or not _names(columns):
        return None
    found = []
    for title in _names(columns):
        column = as_numbers(_to_numpy(_column(frame, title)), f"Column {title!r}")
        of_series = column[np.unique(codes, return_index=True)[1]]
        changed = ~((column == of_series[codes]) | (np.isnan(column) & np.isnan(of_series[codes])))
        if changed.any():
            row = int(np.argmax(changed))
            raise ValueError(
                f"Column {title!r} changes within series {names[codes[row]]!r}, from {of_series[codes[row]]:g} to "
                f"{column[row]:g} in row {row}; list it in values= if it changes in time."
            )
        found.append(of_series)
    return np.stack(found, axis=1)
