"""Observation intensity: how often each channel was observed so far, as a channel of its own.

    n_c(t_i) = #{j <= i : channel c is observed at t_j}

A path through the values has no gaps any more, so a model cannot see when it was measured and how often; with these
counts it can. They are causal. Source: Kidger, Morrill, Foster and Lyons, "Neural controlled differential equations for
irregular time series", NeurIPS 2020, arXiv 2005.08926.
"""

import numpy as np


def counts(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Shape (T, C), the observations of each channel up to and including each row, within its series."""
    total = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(~np.isnan(values), axis=0)])
    return total[1:] - np.repeat(total[offsets[:-1]], np.diff(offsets), axis=0)


def mean_counts(values: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Shape (C,), the observations of each channel in a series on average; 1 where there are none."""
    mean = (~np.isnan(values)).sum(axis=0) / (offsets.size - 1)
    return np.where(mean > 0, mean, 1.0)
