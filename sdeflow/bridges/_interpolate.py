r"""``interpolate``: the cells of a time at which none were seen.

Let t be where the time lies between its neighbours, x a cell of the nearer one, and s <= 1/2 how far away that is as a
share of the gap. The Sinkhorn bridge through the gap has, given that it passes x, the mean

    m(x) = (1 - s) x + s E[far | x],

the barycentric projection of the entropic plan. Of the bridge's own noise nothing is added: it would be that of the
reference, not of the cells. The means of all snapshots say how the population bends meanwhile. Tied to them, the
momentum reference dX = V dt, dV = sigma dW with a free start has the natural cubic spline S for its mean, whatever
sigma is (Wahba, J. R. Stat. Soc. B 1978), and every cell is moved by what S differs from its chord:

    x(t) = m(x) + S(t) - (1 - t) mean x0 - t mean x1.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from ..data import Snapshots
from ..metrics import sinkhorn

#: epsilon as a share of the mean of the total variances of both neighbours: what does best on simulated cells.
_BLUR = 0.1


class Gap(NamedTuple):
    """Both neighbours of a time: their times and cells, and where the time lies between them."""

    before: float
    after: float
    x0: np.ndarray
    x1: np.ndarray
    t: float


def gap(snapshots: Snapshots, time: Any) -> Gap:
    """The neighbours of a time, checked.

    Raises:
        ValueError: for a time that is not strictly between the first and the last, or is one of theirs; for weights.
    """
    times, time = snapshots.times, float(time)
    if not times[0] < time < times[-1] or time in times:
        raise ValueError(f"time must lie between two of the snapshots, at {times.tolist()}, got {time:g}.")
    if snapshots.weights is not None:
        raise ValueError("The cells must weigh alike; draw them by their weights first.")
    i = int(np.searchsorted(times, time)) - 1
    before, after = float(times[i]), float(times[i + 1])
    return Gap(before, after, snapshots.samples[i], snapshots.samples[i + 1], (time - before) / (after - before))


def interpolate(
    snapshots: Snapshots, time: Any, *, epsilon: Any = None, curvature: bool | None = None
) -> Float[np.ndarray, "n d"]:
    r"""Cells at a time between two snapshots: the mean of the Sinkhorn bridge from the nearer one, bent as the means.

        x(t) = (1 - s) x + s E[far | x] + S(t) - (1 - t) mean x0 - t mean x1

    for each cell x of the nearer snapshot, with s <= 1/2 its distance as a share of the gap and S the natural cubic
    spline through the means of all snapshots. It returns to the snapshots as the time does. For evaluation on held-out
    days see `score_left_out`.

    Arguments:
        snapshots: the cells that are known, without weights.
        time: strictly between two of their times. Differences of times matter: give real times where gaps differ.
        epsilon: the regularisation of the plan, in the units of the squared distance; by default 0.1 of the mean of
            the total variances of both neighbours.
        curvature: whether to bend. By default with four snapshots or more: three have one second difference only,
            which says nothing of how far to trust it.

    Returns:
        As many cells as the nearer snapshot has, the earlier one halfway; cell by cell in its order.

    Raises:
        ValueError: for a time at or outside of the snapshots, or weights.
        SolveError: if the plan did not converge, as for an epsilon that is tiny.

    Example:
        >>> import jax, sdeflow as sf
        >>> cells = sf.data.simulated_cells(60, key=jax.random.key(0))
        >>> sf.bridges.interpolate(cells, 2.5).shape
        (60, 5)
    """
    _, _, x0, x1, t = gap(snapshots, time)
    near, far, s = (x0, x1, t) if t <= 0.5 else (x1, x0, 1 - t)
    if epsilon is None:
        epsilon = _BLUR * float(x0.var(axis=0).sum() + x1.var(axis=0).sum()) / 2
    cells = (1 - s) * near + s * np.asarray(sinkhorn(near, far, epsilon).transport(), near.dtype)
    if len(snapshots) >= 4 if curvature is None else curvature:
        from scipy.interpolate import CubicSpline

        means = np.stack([x.mean(axis=0, dtype=np.float64) for x in snapshots.samples])
        spline = CubicSpline(snapshots.times, means, bc_type="natural")
        chord = (1 - t) * x0.mean(axis=0, dtype=np.float64) + t * x1.mean(axis=0, dtype=np.float64)
        cells = cells + (spline(float(time)) - chord)
    return cells.astype(near.dtype)
