"""One number for each series, made of its id: what is folded into a key to give the series noise of its own."""

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import UInt

from ...data._random import digest


def series_numbers(ids: Sequence[Hashable]) -> UInt[np.ndarray, " N"]:
    """Shape (N,). An id that is a number in [0, 2^31) stands for itself, so that the ids which a data set gives by
    default agree with the positions that batches carry; any other id is hashed.
    """
    return np.array([_number(x) for x in ids], np.uint32)


def _number(series_id: Hashable) -> int:
    whole = isinstance(series_id, int | np.integer) and not isinstance(series_id, bool)
    if whole and 0 <= int(series_id) < 2**31:  # pyright: ignore[reportArgumentType]
        return int(series_id)  # pyright: ignore[reportArgumentType]
    return digest(series_id) % 2**31 + 2**31
