"""Reading the arrays of snapshots, with every check that a set of populations needs, once."""

import numbers
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np

from ._read import as_numbers

_ULPS = 8  # The same limit as that of a grid: closer times are noise in float32.


def frozen(array: np.ndarray) -> np.ndarray:
    """The array, or a copy if somebody could still write into it."""
    if array.flags.writeable:
        array = array.copy()
        array.flags.writeable = False
    return array


def read_times(times: Any, count: int) -> np.ndarray:
    """Shape (T,), increasing float64.

    Raises:
        TypeError: if they are not numbers.
        ValueError: for another number of times than of samples, fewer than two, or times that do not increase.
    """
    array = as_numbers(times, "times")
    if array.ndim != 1 or array.size != count:
        raise ValueError(
            f"There are {count} arrays of samples but times of shape {array.shape}; give one time for each array."
        )
    if count < 2:
        raise ValueError(f"Snapshots need at least two times, got {count}.")
    if not np.isfinite(array).all():
        row = int(np.argmin(np.isfinite(array)))
        raise ValueError(f"times[{row}] is {array[row]}; every snapshot needs a finite time.")
    gaps = np.diff(array)
    if (gaps <= 0).any():
        row = int(np.argmax(gaps <= 0)) + 1
        raise ValueError(
            f"times must increase strictly, but times[{row}]={array[row]:g} follows {array[row - 1]:g}; sort them, "
            "each with its samples, and pool the samples of equal times."
        )
    largest = np.float32(np.abs(array).max())
    close = np.diff(array.astype(np.float32).astype(np.float64)) < _ULPS * np.spacing(largest)
    if close.any():
        row = int(np.argmax(close))
        raise ValueError(
            f"times[{row}] and times[{row + 1}] are {gaps[row]:.3g} apart, which float32 cannot resolve at {largest:g}"
            "; measure times from the first."
        )
    return frozen(array)


def read_samples(samples: Any, times: Callable[[int], np.ndarray]) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """The times, and one array of shape (n_i, d) for each, in the precision that they came in.

    Arguments:
        samples: a list of arrays.
        times: reads the times once their number is known, so that faults of the samples can name them.

    Raises:
        TypeError: for samples that are no list of arrays of numbers.
        ValueError: for shapes that disagree, fewer than two cells at a time, or values that are not finite.
    """
    if isinstance(samples, str | bytes) or not hasattr(samples, "__len__"):
        raise TypeError(f"samples must be a list with one array of cells for each time, got {type(samples).__name__}.")
    found = [_floats(x, f"samples[{i}]") for i, x in enumerate(samples)]
    when = times(len(found))
    for t, x in zip(when, found):
        if x.ndim != 2 or x.shape[1] == 0:
            raise ValueError(
                f"The samples at time {t:g} must be of shape (n, d), one row for each cell, got {x.shape}."
            )
        if x.shape[1] != found[0].shape[1]:
            raise ValueError(
                f"The cells at time {t:g} have {x.shape[1]} components, those at time {when[0]:g} have "
                f"{found[0].shape[1]}; use one representation for all."
            )
        if x.shape[0] < 2:
            raise ValueError(
                f"There are {x.shape[0]} cells at time {t:g}, but every time needs at least two; drop that time, or "
                "pool it with its neighbour."
            )
        bad = ~np.isfinite(x).all(axis=1)
        if bad.any():
            raise ValueError(
                f"{bad.sum()} of the {bad.size} cells at time {t:g} have values that are not finite, the first in row "
                f"{np.argmax(bad)}; impute them or leave these cells out."
            )
    return when, tuple(frozen(x) for x in found)


def _floats(x: Any, where: str) -> np.ndarray:
    array = np.asarray(x)
    array = array if array.dtype == np.float32 else as_numbers(array, where)
    return array[:, None] if array.ndim == 1 else array


def read_weights(weights: Any, times: np.ndarray, counts: Sequence[int]) -> tuple[np.ndarray, ...] | None:
    """One array of shape (n_i,) for each time, of masses that are not negative.

    Raises:
        ValueError: for wrong shapes, negative or infinite masses, or a time without mass.
    """
    if weights is None:
        return None
    found = tuple(frozen(as_numbers(w, "weights")) for w in _per_time(weights, "weights", times, counts))
    for t, w in zip(times, found):
        if not (np.isfinite(w) & (w >= 0)).all():
            row = int(np.argmin(np.isfinite(w) & (w >= 0)))
            raise ValueError(
                f"The weight of cell {row} at time {t:g} is {w[row]:g}; weights are finite and not negative."
            )
        if w.sum() == 0:
            raise ValueError(f"The cells at time {t:g} have no weight; give one of them some, or drop that time.")
    return found


def read_labels(labels: Any, times: np.ndarray, counts: Sequence[int]) -> tuple[np.ndarray, ...] | None:
    """One array of shape (n_i,) for each time, of labels as they are.

    Raises:
        ValueError: for a wrong number of labels.
    """
    if labels is None:
        return None
    return tuple(frozen(np.asarray(x)) for x in _per_time(labels, "labels", times, counts))


def read_index(index: Any, times: np.ndarray, counts: Sequence[int]) -> tuple[np.ndarray, ...]:
    """One array of shape (n_i,) for each time: where each cell stood in the table it came from.

    Raises:
        ValueError: for a wrong number of entries.
    """
    if index is None:
        return tuple(frozen(x) for x in np.split(np.arange(sum(counts)), np.cumsum(counts)[:-1]))
    return tuple(frozen(np.asarray(x, dtype=np.int64)) for x in _per_time(index, "index", times, counts))


def _per_time(given: Any, what: str, times: np.ndarray, counts: Sequence[int]) -> list[Any]:
    items = list(given)
    if len(items) != len(times):
        raise ValueError(f"There are {len(times)} times but {len(items)} arrays of {what}; give one for each time.")
    for t, count, item in zip(times, counts, items):
        if np.shape(item) != (count,):
            raise ValueError(
                f"There are {count} cells at time {t:g}, but {what} of shape {np.shape(item)}; give one for each cell."
            )
    return items


def read_names(names: Sequence[Hashable] | None, dim: int) -> tuple[Hashable, ...] | None:
    """The names of the components.

    Raises:
        ValueError: for a wrong number of names.
    """
    if names is None:
        return None
    if len(found := tuple(names)) != dim:
        raise ValueError(f"There are {dim} components but {len(found)} names; give one for each component.")
    return found


def read_scaling(values: Any, default: float, dim: int) -> np.ndarray:
    """Shape (d,), a shift or a scale in float64.

    Raises:
        ValueError: for another shape.
    """
    array = np.asarray(default if values is None else values, dtype=np.float64)
    if array.shape not in ((), (1,), (dim,)):
        raise ValueError(f"shift and scale must be of shape () or ({dim},), got {array.shape}.")
    return frozen(np.broadcast_to(array, (dim,)).copy())


def deviations(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations of the columns, in float64; exactly 0 where a column is constant."""
    x = x.astype(np.float64)
    return x.mean(axis=0), np.where(x.min(axis=0) < x.max(axis=0), x.std(axis=0), 0.0)


def check_count(n: Any, what: str, least: int) -> int:
    """A whole number that is not too small.

    Raises:
        TypeError: if it is not an integer.
        ValueError: if it is too small.
    """
    if not isinstance(n, numbers.Integral) or isinstance(n, bool | np.bool_):
        raise TypeError(f"{what} must be an integer, got {n!r}.")
    if n < least:
        raise ValueError(f"{what} must be at least {least}, got {n}.")
    return int(n)
