"""Per-channel mean and standard deviation of the values that were observed."""

import numpy as np


def moments(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shapes (C,) and (C,) from values of shape (T, C); 0 and 1 where there is nothing to measure."""
    observed = ~np.isnan(values)
    count = np.maximum(observed.sum(axis=0), 1)
    mean = np.where(observed, values, 0.0).sum(axis=0) / count
    variance = np.where(observed, (values - mean) ** 2, 0.0).sum(axis=0) / count
    # A constant channel leaves a deviation of rounding errors, which must not be blown up to 1.
    low = np.where(observed, values, np.inf).min(axis=0)
    high = np.where(observed, values, -np.inf).max(axis=0)
    return mean, np.where(low < high, np.sqrt(variance), 1.0)
