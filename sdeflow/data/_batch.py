"""One batch of padded series: a pytree of NumPy arrays with static shapes."""

import warnings
from typing import Any

import equinox as eqx
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._compat import SdeflowWarning


class SeriesBatch(eqx.Module):
    """``B`` series padded to one length ``L``; what `TimeSeries.batches` yields.

    The arrays are NumPy arrays, so nothing reaches the device before the program that uses them is called.

    Arguments:
        times: shape (B, L), internal times; padding repeats the last time of the series.
        values: shape (B, L, C), NaN where missing and in the padding.
        mask: shape (B, L, C), True where a value was observed; False in channels that count observations.
        lengths: shape (B,), the number of time steps before the padding.
        labels: shape (B,), class numbers 0..K-1, or None.
        targets: shape (B, k), or None.
        static: shape (B, s), covariates that do not change in time, or None.
        ids: shape (B,), the position of each series in its data set; fold it into a key for noise per series.
        weight: shape (B,), 1 for a series and 0 for a filler row, which repeats the first series of the
            batch.

    Example:
        >>> from sdeflow.data import TimeSeries
        >>> data = TimeSeries.from_arrays([[0.0, 1.0, 2.0], [0.0, 2.0]], [[1.0, 2.0, 3.0], [4.0, 5.0]])
        >>> batch = data.with_buckets(3).batch([1])
        >>> batch.times.tolist(), batch.mask[..., 0].tolist()
        ([[0.0, 1.0, 1.0]], [[True, True, False]])
    """

    times: Float[Array | np.ndarray, "*batch L"]
    values: Float[Array | np.ndarray, "*batch L C"]
    mask: Bool[Array | np.ndarray, "*batch L C"]
    lengths: Int[Array | np.ndarray, "*batch"]
    labels: Int[Array | np.ndarray, "*batch"] | None
    targets: Float[Array | np.ndarray, "*batch k"] | None
    static: Float[Array | np.ndarray, "*batch s"] | None
    ids: Int[Array | np.ndarray, "*batch"]
    weight: Float[Array | np.ndarray, "*batch"]


def plan_epoch(
    bucket_of: np.ndarray, num_buckets: int, size: int, rng: np.random.Generator | None
) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Bucket, positions of shape (size,) and weights of shape (size,) of every batch of one epoch."""
    plan = []
    for bucket in range(num_buckets):
        members = np.flatnonzero(bucket_of == bucket)
        members = members if rng is None else rng.permutation(members)
        for start in range(0, members.size, size):
            chosen = members[start : start + size]
            weight = (np.arange(size) < chosen.size).astype(np.float32)
            rows = np.append(chosen, np.repeat(chosen[:1], size - chosen.size))
            plan.append((bucket, rows, weight))
    return plan if rng is None else [plan[i] for i in rng.permutation(len(plan))]


def check_size(size: Any, data: Any, what: str = "series") -> int:
    """The rows of a batch, at most as many as there are series; of a larger size each data set warns once.

    Arguments:
        what: the data set is made of.

    Raises:
        TypeError: if ``size`` is not an integer.
        ValueError: if ``size`` is below 1.
    """
    if isinstance(size, bool) or not isinstance(size, int | np.integer):
        raise TypeError(f"The batch size must be an integer, got {size!r}.")
    if size < 1:
        raise ValueError(f"The batch size must be at least 1, got {size}.")
    count = len(data)
    warned = vars(data).setdefault("_warned_sizes", set())
    if size > count and size not in warned:
        # Not left to Python, which forgets what it has shown whenever a filter is set, as jax does while it compiles.
        warned.add(size)
        warnings.warn(
            f"The batch size {size} is more than the {count} {what} there are; batches hold {count} rows.",
            SdeflowWarning,
            stacklevel=3,
        )
    return min(int(size), count)
