"""Bucket lengths: the few lengths to which series are padded; a program compiles once for each of them."""

from typing import Any

import numpy as np

_CANDIDATES = 64  # Lengths beyond this many are thinned by quantiles before the exact search.
_FILLER = 16  # Rows that the last batch of a bucket wastes: half of a usual batch.
_SLACK = 1.1  # One more compilation must save a tenth of the work to be worth its seconds.


def choose_buckets(lengths: np.ndarray, num_buckets: int) -> tuple[int, ...]:
    """The fewest lengths whose padded work is within a tenth of the least that ``num_buckets`` lengths allow.

    The work of a bucket is its length times its series, and half a batch of filler rows, so that a small set
    is not cut up. The best cut is found exactly, by dynamic programming over the distinct lengths.

    Example:
        >>> import numpy as np
        >>> from sdeflow.data._buckets import choose_buckets
        >>> choose_buckets(np.repeat([10, 11, 100], 50), 3)
        (11, 100)
    """
    distinct, counts = np.unique(lengths, return_counts=True)
    if distinct.size > _CANDIDATES:
        keep = np.unique(np.quantile(lengths, np.linspace(0, 1, _CANDIDATES + 1)[1:], method="higher"))
        group = np.searchsorted(keep, distinct)
        distinct, counts = keep, np.bincount(group, weights=counts, minlength=keep.size)
    below = np.concatenate([[0.0], np.cumsum(counts)])
    # work[i, j]: the padded work of the series whose lengths are distinct[i..j], all padded to distinct[j].
    work = (below[None, 1:] - below[:-1, None] + _FILLER) * distinct[None, :]
    size = distinct.size
    most = min(num_buckets, size)
    cost = np.full((most + 1, size + 1), np.inf)
    cost[0, 0] = 0.0
    cut = np.zeros((most + 1, size + 1), dtype=int)
    for k in range(1, most + 1):
        for j in range(1, size + 1):
            total = cost[k - 1, :j] + work[:j, j - 1]
            cut[k, j] = int(np.argmin(total))
            cost[k, j] = total[cut[k, j]]
    best = next(k for k in range(1, most + 1) if cost[k, size] <= _SLACK * cost[:, size].min())
    ends, j = [], size
    for k in range(best, 0, -1):
        ends.append(int(distinct[j - 1]))
        j = cut[k, j]
    return tuple(reversed(ends))


def check_buckets(lengths: object, longest: int) -> tuple[int, ...]:
    """Bucket lengths given by the user, as an increasing tuple.

    Raises:
        ValueError: if a length is not a positive integer, or the longest series fits into none.
    """
    given = np.atleast_1d(np.asarray(lengths))
    if given.ndim != 1 or given.size == 0 or given.dtype.kind not in "iu" or (given < 1).any():
        raise ValueError(f"Bucket lengths must be positive integers, got {lengths!r}.")
    buckets = tuple(int(x) for x in np.unique(given))
    if buckets[-1] < longest:
        raise ValueError(
            f"The longest series has {longest} time steps but the longest bucket only {buckets[-1]}: "
            f"add a bucket of at least {longest}."
        )
    return buckets


def other_buckets(
    of_series: np.ndarray, lengths: Any, num_buckets: int | None, like: tuple[int, ...] | None
) -> tuple[int, ...]:
    """Bucket lengths given, chosen, or shared with another set, of which exactly one is not None.

    Raises:
        ValueError: as `sdeflow.data.TimeSeries.with_buckets` says.
    """
    if sum(option is not None for option in (lengths, num_buckets, like)) != 1:
        raise ValueError("Give exactly one of lengths, num_buckets= and like= to with_buckets.")
    if num_buckets is not None:
        if not isinstance(num_buckets, int | np.integer) or num_buckets < 1:
            raise ValueError(f"num_buckets must be a positive integer, got {num_buckets!r}.")
        return choose_buckets(of_series, int(num_buckets))
    longest = int(of_series.max())
    return check_buckets(lengths if like is None else (*like, max(longest, like[-1])), longest)
