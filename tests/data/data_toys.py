"""Ragged data sets that several files use."""

import numpy as np


def ragged(count, *, channels=2, missing=0.3, seed=0, low=1, high=9, **options):
    """Lists of times and values of random lengths, with at least one observation in each series."""
    rng = np.random.default_rng(seed)
    times, values = [], []
    for _ in range(count):
        length = int(rng.integers(low, high, endpoint=True))
        times.append(np.cumsum(0.1 + rng.random(length)))
        x = rng.normal(size=(length, channels))
        x[rng.random(x.shape) < missing] = np.nan
        x[0, 0] = 1.0
        values.append(x)
    return times, values
