"""Simulated series whose classes differ in how they move, not in where they are.

Pairs of channels follow an Ornstein-Uhlenbeck process that also rotates, at a rate set by the class:

    dX = (-theta I + omega_k J) X dt + sqrt(2 theta) dW,    J = [[0, -1], [1, 0]]

Rotation leaves the stationary law alone: in every class each value is standard normal, and channels observed
at one time are independent. Only how the channels follow each other tells the classes apart; averages over a
series hint at the speed of the rotation but never at its direction. No step size enters, as the transition is
exact: ``X(t + h) = e^{-theta h} R(omega_k h) X(t) + noise``, with noise of variance ``1 - e^{-2 theta h}``.
"""

import numpy as np
from jaxtyping import PRNGKeyArray

from ._random import SIMULATE, generator
from ._series import TimeSeries

_THETA = 0.25
_FASTEST = 2.0  # One radian in a mean gap of 0.5, so that few gaps hide a whole turn.


def simulated_series(
    num_series: int,
    *,
    key: PRNGKeyArray,
    num_classes: int = 3,
    num_channels: int = 4,
    lengths: tuple[int, int] = (10, 30),
    missing: float = 0.1,
    num_test: int | None = None,
) -> tuple[TimeSeries, TimeSeries]:
    """Seeded irregular series of several classes, as (train, test), where no real data are at hand.

    Series have random lengths and random gaps (mean 0.5, at least 0.05), and values missing at random. Class
    k rotates at a rate between -2 and 2, evenly spaced; every pair of channels at the same rate. A last odd
    channel carries no information.

    Arguments:
        num_series: training series, spread evenly over the classes.
        key: a JAX key.
        num_classes: K, at least 2.
        num_channels: C, at least 2.
        lengths: the fewest and most time steps of a series.
        missing: the share of values missing, in [0, 1).
        num_test: test series; as many as training series by default.

    Raises:
        TypeError: if ``key`` is not a JAX key.
        ValueError: for fewer series than classes, fewer than two classes or channels, or lengths that are not
            increasing positive integers.

    Example:
        >>> import jax
        >>> from sdeflow.data import simulated_series
        >>> train, test = simulated_series(12, key=jax.random.key(0))
        >>> len(train), len(test), train.num_channels, train.classes
        (12, 12, 4, (0, 1, 2))
    """
    num_test = num_series if num_test is None else num_test
    if num_classes < 2 or num_channels < 2:
        raise ValueError(f"At least two classes and two channels are needed, got {num_classes} and {num_channels}.")
    if min(num_series, num_test) < num_classes:
        raise ValueError(
            f"Each part needs one series of each of {num_classes} classes, got {num_series} and {num_test}."
        )
    if not 1 <= lengths[0] <= lengths[1]:
        raise ValueError(f"lengths must be the fewest and the most time steps of a series, got {lengths}.")
    rng = generator(key, SIMULATE)
    rates = np.linspace(-_FASTEST, _FASTEST, num_classes)
    total = num_series + num_test
    labels = np.concatenate([rng.permutation(np.arange(n) % num_classes) for n in (num_series, num_test)])
    sizes = rng.integers(lengths[0], lengths[1], size=total, endpoint=True)
    times = [np.cumsum(0.05 + rng.exponential(0.45, size=size)) for size in sizes]
    values = [_path(t, float(rates[label]), num_channels, rng) for t, label in zip(times, labels)]
    both = TimeSeries.from_arrays(times, values, labels=labels.tolist(), align="start")
    if missing:
        both = both.drop_observations(missing, key=key)
    return both[:num_series], both[num_series:]


def _path(t: np.ndarray, rate: float, num_channels: int, rng: np.random.Generator) -> np.ndarray:
    """Values of shape (L, C) at the times of one series, by the exact transition from the stationary law."""
    pairs = (num_channels + 1) // 2
    noise = rng.standard_normal((t.size, pairs)) + 1j * rng.standard_normal((t.size, pairs))
    gaps = np.diff(t)
    # A pair of channels is one complex number, which the drift multiplies by exp((-theta + i omega) h).
    move = np.exp((-_THETA + 1j * rate) * gaps)
    spread = np.sqrt(-np.expm1(-2 * _THETA * gaps))
    state = noise[:1].copy()
    path = [state[0]]
    for i in range(gaps.size):
        path.append(move[i] * path[-1] + spread[i] * noise[i + 1])
    z = np.stack(path)
    return np.stack([np.real(z), np.imag(z)], axis=-1).reshape(t.size, 2 * pairs)[:, :num_channels]
