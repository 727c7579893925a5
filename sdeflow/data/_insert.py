"""Rows of missing values at further times."""

from collections.abc import Hashable, Sequence

import numpy as np


def insert_rows(
    times: Sequence[np.ndarray],
    values: Sequence[np.ndarray],
    wanted: np.ndarray,
    ids: Sequence[Hashable],
    beyond: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Flat times and values with a row for every wanted time, the lengths of the series, and the places of those rows.

    Arguments:
        times, values: those of each series.
        wanted: shape (N, T), increasing times; one at which a series has a row already gets no other.
        ids: names of the series.
        beyond: whether all of them must come after the last time of a series.

    Raises:
        ValueError: for a time that is too early, naming the series.
    """
    all_times, all_values, places = [], [], []
    for name, t, x, more in zip(ids, times, values, wanted):
        if more[0] < t[0] or (beyond and more[0] <= t[-1]):
            edge = "after its last" if beyond else "not before its first"
            raise ValueError(f"Series {name!r}: all ts must come {edge} time.")
        merged, back = np.unique(np.concatenate([t, more]), return_inverse=True)
        filled = np.full((merged.size, x.shape[1]), np.nan)
        filled[back[: t.size]] = x
        all_times.append(merged)
        all_values.append(filled)
        places.append(back[t.size :])
    lengths = np.array([t.size for t in all_times])
    return np.concatenate(all_times), np.concatenate(all_values), lengths, np.array(places)
