r"""``bw2_uvp`` and ``cbw2_uvp``: how far the first two moments are off, on the host and for evaluation only.

Both rest on the transport cost |x - y|^2 / 2 between the Gaussians with the moments in question,

    BW^2 = |m_1 - m_2|^2 / 2 + tr C_1 / 2 + tr C_2 / 2 - tr (C_1^(1/2) C_2 C_1^(1/2))^(1/2),

as a percentage of half the variance of the target (Korotin et al. 2021, NeurIPS), its "unexplained variance".
"""

from typing import Any

import numpy as np

from ._blocks import as_rows


def bw2_uvp(x: Any, y: Any) -> float:
    r"""The moments' distance of a sample from the target, ``100 BW^2 / (tr Cov Y / 2)``, in percent.

    For evaluation: NumPy on the host, in float64. 0 for equal means and covariances, and 100 for a sample that is a
    point at the target's mean. It does not depend on a common scale. From n points it is too large by O(D / n) where
    the laws agree; covariances are divided by n - 1.

    Arguments:
        x: the sample, shape (n, D).
        y: the target's sample, shape (m, D).

    Returns:
        A number, in percent.

    Raises:
        ValueError: if the points are not as described, or the target does not vary.

    Example:
        >>> import numpy as np, sdeflow as sf
        >>> y = np.array([[-1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> round(sf.metrics.bw2_uvp(2 * y, y), 6)
        100.0
    """
    x, y = samples("x", x), samples("y", y)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"x and y must have one dimension, got {x.shape[1]} and {y.shape[1]}.")
    first, second = _moments("x", x[None]), _moments("y", y[None])
    return _percent(_bures(first, second), np.trace(second[1][0]))


def cbw2_uvp(x: Any, y: Any, *, variance: Any) -> float:
    r"""The mean over conditions of the moments' distance, ``100 mean_n BW^2(x_n, y_n) / (Var Y / 2)``, in percent.

    It compares two conditional laws, as the plans of two Schrödinger bridges, at n conditions (Gushchin et al. 2023,
    NeurIPS). For evaluation: NumPy on the host, in float64. The exact moments tell more: sampled ones have a floor of
    O(D / m), which is what the published tables at 1000 draws end at.

    Arguments:
        x: draws of shape (n, m, D), m for each of n conditions; or a pair of exact moments, means (n, D) and
            covariances (n, D, D).
        y: the target's, as either.
        variance: the trace of Cov(Y) over all conditions.

    Returns:
        A number, in percent.

    Raises:
        ValueError: if the shapes disagree, a number is not finite or the variance is not positive.

    Example:
        >>> import numpy as np, sdeflow as sf
        >>> means, covariances = np.zeros((5, 2)), np.tile(np.eye(2), (5, 1, 1))
        >>> sf.metrics.cbw2_uvp((means + 1, covariances), (means, covariances), variance=2.0)
        100.0
    """
    first, second = (_moments(name, z) for name, z in (("x", x), ("y", y)))
    if first[0].shape != second[0].shape:
        raise ValueError(
            "x and y must have as many conditions, and one dimension, got (n, D) = "
            f"{first[0].shape} and {second[0].shape}."
        )
    return _percent(_bures(first, second), float(variance))


def samples(name: str, x: Any) -> np.ndarray:
    """Points as rows, in float64; one axis is that of points on a line.

    Raises:
        ValueError: if there are no points, they are not finite, or have another number of axes.
    """
    return as_rows(name, np.asarray(x, float))


def _moments(name: str, z: Any) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(z, tuple) and len(z) == 2:
        means, covariances = (np.asarray(part, float) for part in z)
        if means.ndim != 2 or covariances.shape != (*means.shape, means.shape[-1]):
            raise ValueError(
                f"{name} must have means of shape (n, D) and covariances of shape (n, D, D), got {means.shape} and "
                f"{covariances.shape}."
            )
    else:
        z = np.asarray(z, float)
        if z.ndim != 3 or 0 in z.shape or z.shape[1] < 2:
            raise ValueError(f"{name} must be at least 2 draws for each condition, shape (n, m, D), got {z.shape}.")
        means = z.mean(axis=1)
        off = z - means[:, None]
        covariances = np.swapaxes(off, 1, 2) @ off / (z.shape[1] - 1)
    if not (np.isfinite(means).all() and np.isfinite(covariances).all()):
        raise ValueError(f"{name} has numbers that are infinite or NaN.")
    return means, covariances


def _bures(first: tuple[np.ndarray, np.ndarray], second: tuple[np.ndarray, np.ndarray]) -> float:
    (m, C), (n, S) = first, second
    values, vectors = np.linalg.eigh(C)
    root = (vectors * np.sqrt(np.maximum(values, 0))[..., None, :]) @ np.swapaxes(vectors, -1, -2)
    inner = np.linalg.eigvalsh(root @ S @ root)
    traces = np.trace(C, axis1=-2, axis2=-1) + np.trace(S, axis1=-2, axis2=-1)
    distances = (((m - n) ** 2).sum(axis=-1) + traces) / 2 - np.sqrt(np.maximum(inner, 0)).sum(axis=-1)
    return float(np.maximum(distances, 0).mean())


def _percent(distance: float, variance: float) -> float:
    if not (np.isfinite(variance) and variance > 0):
        raise ValueError(f"The target's variance must be positive and finite, got {variance}.")
    return 100 * distance / (float(variance) / 2)
