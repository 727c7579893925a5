"""A compiled function of batches, run over a whole data set."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
import numpy as np

from ..._results import SolveError, is_okay, message_of
from ...data import SeriesBatch, TimeSeries
from .._checks import check_size
from ._keys import series_numbers


def check_series(series: Any) -> TimeSeries:
    """Refuse what is no data set.

    Raises:
        TypeError: naming what was given.
    """
    if not isinstance(series, TimeSeries):
        raise TypeError(
            f"series must be a TimeSeries, got {type(series).__name__}; build one with TimeSeries.from_arrays, or "
            "call the model itself on a batch."
        )
    return series


def over_series(
    call: Callable[[SeriesBatch, np.ndarray], tuple[np.ndarray | Any, Any]],
    series: TimeSeries,
    batch_size: int,
    throw: bool,
) -> np.ndarray:
    """What ``call`` makes of every series, in the order of the data set.

    Arguments:
        call: from a batch, whose ids are numbers made of the series' own ids, and the positions of its rows to outputs
            that lead with the batch, all of one shape, and a result for each row.
        series: the data set.
        batch_size: series in one batch.
        throw: whether a series that fails is an error.

    Raises:
        SolveError: naming the series that fails.
    """
    size = min(check_size("batch_size", batch_size), len(series))
    numbers = series_numbers(series.ids)
    found = None
    for batch in series.batches(size, None):
        rows, real = np.asarray(batch.ids), np.asarray(batch.weight) > 0
        outputs, result = call(eqx.tree_at(lambda b: b.ids, batch, numbers[rows]), rows)
        okay = np.asarray(is_okay(result))
        if throw and not okay[real].all():
            bad = int(np.argmax(~okay & real))
            first = jtu.tree_map(lambda x, bad=bad: x[bad], result)
            raise SolveError(first, f"Series {series.ids[rows[bad]]!r}: {message_of(first)}")
        outputs = np.asarray(outputs)
        found = np.empty((len(series), *outputs.shape[1:]), outputs.dtype) if found is None else found
        found[rows[real]] = outputs[real]
    assert found is not None
    return found
