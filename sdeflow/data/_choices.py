"""Which series go where and which observations are dropped: decided by keys and ids, never by order."""

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import PRNGKeyArray

from ._random import DROP, SPLIT, generators


def split_positions(
    ids: Sequence[Hashable], labels: np.ndarray | None, fraction: float | Sequence[float], key: PRNGKeyArray
) -> list[np.ndarray]:
    """Positions of the parts, in the original order; each class is divided in the same proportion.

    A series draws a number from its own id, and within its class the smallest numbers go to the first part, the next
    to the second, and so on.

    Raises:
        ValueError: if one part would be empty, or the shares are not positive numbers that add up to 1.
    """
    shares = _shares(fraction)
    if len(ids) < len(shares):
        least = "two" if len(shares) == 2 else str(len(shares))
        raise ValueError(f"A split needs at least {least} series, got {len(ids)}.")
    draws = np.array([rng.random() for rng in generators(key, SPLIT, ids)])
    labels = np.zeros(len(ids), dtype=np.int32) if labels is None else labels
    parts, rest = [], np.arange(len(ids))
    for k in range(len(shares) - 1):
        first = _divide(labels[rest], draws[rest], shares[k] / sum(shares[k:]))
        if first.all() or not first.any():
            raise ValueError(f"fraction={fraction} leaves one part of the {len(ids)} series empty; choose another.")
        parts.append(rest[first])
        rest = rest[~first]
    return [*parts, rest]


def _shares(fraction: float | Sequence[float]) -> list[float]:
    if np.ndim(fraction) == 0:
        share = float(np.asarray(fraction))
        if not 0 < share < 1:
            raise ValueError(f"fraction must lie between 0 and 1, both excluded, got {fraction!r}.")
        return [share, 1 - share]
    shares = [float(share) for share in np.ravel(np.asarray(fraction))]
    if len(shares) < 2 or not all(share > 0 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"The shares of a split must be positive and add up to 1, got {fraction!r}.")
    return shares


def _divide(labels: np.ndarray, draws: np.ndarray, fraction: float) -> np.ndarray:
    """Which series go to the first of two parts."""
    classes, counts = np.unique(labels, return_counts=True)
    exact = fraction * counts
    take = np.floor(exact + 1e-9).astype(int)
    # Largest remainders, so that the whole set, too, is divided as asked.
    extra = max(round(fraction * labels.size) - int(take.sum()), 0)
    take[np.argsort(take - exact, kind="stable")[:extra]] += 1
    take = np.where(counts > 1, np.clip(take, 1, counts - 1), take)
    first = np.zeros(labels.size, dtype=bool)
    for label, number in zip(classes, take):
        members = np.flatnonzero(labels == label)
        first[members[np.argsort(draws[members], kind="stable")[:number]]] = True
    return first


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
