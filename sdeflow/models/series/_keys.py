"""One number for each series, made of its id, to fold into a key: noise that belongs to the series."""

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import UInt

from ...data._random import digest


def series_numbers(ids: Sequence[Hashable]) -> UInt[np.ndarray, " N"]:
    """Shape (N,): an id that is an integer in [0, 2^31) stands for itself, any other is hashed to [2^31, 2^32).

    So the ids that a data set gives by default agree with the positions that its batches carry.

    Example:
        >>> from sdeflow.models.series._keys import series_numbers
        >>> series_numbers([3, 0]).tolist(), int(series_numbers(["patient 7"])[0]) >= 2**31
        ([3, 0], True)
    """
    return np.array([_number(x) for x in ids], np.uint32)


def _number(series_id: Hashable) -> int:
    whole = isinstance(series_id, int | np.integer) and not isinstance(series_id, bool)
    if whole and 0 <= int(series_id) < 2**31:  # pyright: ignore[reportArgumentType]
        return int(series_id)  # pyright: ignore[reportArgumentType]
    return digest(series_id) % 2**31 + 2**31
