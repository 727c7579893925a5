"""Which series go where and which observations are dropped: decided by keys and ids, never by order."""

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import PRNGKeyArray

from ._random import DROP, SPLIT, generators


def split_positions(
    ids: Sequence[Hashable], labels: np.ndarray | None, fraction: float, key: PRNGKeyArray
) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the two parts, in the original order; each class is divided in the same proportion.

    A series draws a number from its own id, and within its class the smallest numbers go to the first part.

    Raises:
        ValueError: if one part would be empty.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, both excluded, got {fraction!r}.")
    if len(ids) < 2:
        raise ValueError(f"A split needs at least two series, got {len(ids)}.")
    draws = np.array([rng.random() for rng in generators(key, SPLIT, ids)])
    labels = np.zeros(len(ids), dtype=np.int32) if labels is None else labels
    classes, counts = np.unique(labels, return_counts=True)
    exact = fraction * counts
    take = np.floor(exact + 1e-9).astype(int)
    # Largest remainders, so that the whole set, too, is divided as asked.
    extra = max(round(fraction * len(ids)) - int(take.sum()), 0)
    take[np.argsort(take - exact, kind="stable")[:extra]] += 1
    take = np.where(counts > 1, np.clip(take, 1, counts - 1), take)
    first = np.zeros(len(ids), dtype=bool)
    for label, number in zip(classes, take):
        members = np.flatnonzero(labels == label)
        first[members[np.argsort(draws[members], kind="stable")[:number]]] = True
    if first.all() or not first.any():
        raise ValueError(f"fraction={fraction} leaves one part of the {len(ids)} series empty; choose another.")
    return np.flatnonzero(first), np.flatnonzero(~first)


def drop(
    values: np.ndarray,
    offsets: np.ndarray,
    ids: Sequence[Hashable],
    fraction: float,
    key: PRNGKeyArray,
    per: str,
) -> np.ndarray:
    """A copy of the flat values with a share of the observed ones set to NaN, series by series.

    Raises:
        ValueError: for a fraction outside [0, 1) or an unknown ``per``.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must lie in [0, 1), got {fraction!r}.")
    if per not in ("channel", "step"):
        raise ValueError(f'per must be "channel" or "step", got {per!r}.')
    thinned = values.copy()
    for rng, start, stop in zip(generators(key, DROP, ids), offsets[:-1], offsets[1:]):
        rows = thinned[start:stop]
        observed = ~np.isnan(rows)
        units = observed if per == "channel" else np.asarray(observed.any(axis=1, keepdims=True))
        rows[np.broadcast_to(_dropped(units, fraction, rng), rows.shape)] = np.nan
    return thinned


def _dropped(units: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """Which of the present units to drop, column by column: the fraction on average, never all of them."""
    draws = np.where(units, rng.random(units.shape), np.inf)
    # Rounding up or down at random keeps the mean right for short series, where rounding down would drop too
    # few.
    number = np.floor(fraction * units.sum(axis=0) + rng.random(units.shape[1]))
    rank = np.argsort(np.argsort(draws, axis=0, kind="stable"), axis=0, kind="stable")
    dropped = units & (rank < number)
    if (dropped == units).all():
        kept = np.argmax(np.where(units, draws, -np.inf))
        dropped[np.unravel_index(kept, dropped.shape)] = False
    return dropped
