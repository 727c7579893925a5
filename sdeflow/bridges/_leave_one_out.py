"""Leave one day out: the simplest guesses at the cells of a day, and the score of any guess.

Snapshots of T times give T - 2 problems, each interior day predicted from the others. A guess that is not better than
the transport midpoint, which nothing was fitted for, has learned nothing of use in between.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.random as jr
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from ..data import Snapshots, leave_one_out
from ..metrics import wasserstein
from ._interpolate import gap


def copy_previous(snapshots: Snapshots, time: Any) -> Float[np.ndarray, "n d"]:
    """The cells of the last snapshot before a time.

    Arguments:
        snapshots: the cells that are known.
        time: strictly between two of their times.
    """
    return gap(snapshots, time).x0


def copy_next(snapshots: Snapshots, time: Any) -> Float[np.ndarray, "n d"]:
    """The cells of the first snapshot after a time.

    Arguments:
        snapshots: the cells that are known.
        time: strictly between two of their times.
    """
    return gap(snapshots, time).x1


def independent_midpoint(snapshots: Snapshots, time: Any, *, key: PRNGKeyArray) -> Float[np.ndarray, "n d"]:
    """Each cell before a time on its way to any cell after it: ``(1 - t) x_i + t y_j``, j uniform.

    Arguments:
        snapshots: the cells that are known.
        time: strictly between two of their times.
        key: a random key.

    Returns:
        As many cells as there are before; each cell after is drawn equally often, up to one.
    """
    _, _, x0, x1, t = gap(snapshots, time)
    order = np.asarray(jr.permutation(key, len(x1)))
    return ((1 - t) * x0 + t * x1[np.resize(order, len(x0))]).astype(x0.dtype)


def transport_midpoint(snapshots: Snapshots, time: Any) -> Float[np.ndarray, "n d"]:
    """Each cell before a time on its straight way to the cell that exact transport gives it.

        (1 - t) x_i + t y_j(i),    j the permutation with the least sum_i |x_i - y_j(i)|^2

    Arguments:
        snapshots: the cells that are known, as many before as after.
        time: strictly between two of their times.

    Raises:
        ValueError: for a time at or outside of the snapshots, weights, or unequal numbers of cells.

    Example:
        >>> import numpy as np
        >>> from sdeflow.bridges import transport_midpoint
        >>> from sdeflow.data import Snapshots
        >>> x = np.array([[0.0, 1.0], [5.0, 0.0]])
        >>> transport_midpoint(Snapshots([0.0, 4.0], [x, x[::-1] + 1.0]), 1.0).tolist()
        [[0.25, 1.25], [5.25, 0.25]]
    """
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    before, after, x0, x1, t = gap(snapshots, time)
    if len(x0) != len(x1):
        raise ValueError(
            f"Assigning cells takes as many before as after, got {len(x0)} at {before:g} and {len(x1)} at {after:g}: "
            "use Snapshots.subsample."
        )
    _, partner = linear_sum_assignment(cdist(x0, x1, "sqeuclidean"))
    return ((1 - t) * x0 + t * x1[partner]).astype(x0.dtype)


def score_left_out(
    snapshots: Snapshots,
    methods: Mapping[str, Callable[[Snapshots, float], Any]],
    *,
    n: int,
    key: PRNGKeyArray,
    num_subsamples: int = 5,
    powers: Sequence[float] = (1, 2),
) -> dict[str, Float[np.ndarray, "num_subsamples days powers"]]:
    r"""The Wasserstein distances of guesses at each interior day from its cells, on common subsamples.

    Each repeat draws ``n`` cells of every day, then leaves out one day after another and asks each method for it. The
    method sees the other days alone. Distances are exact, and larger for fewer cells (see `metrics.wasserstein`), so
    every guess must have n cells; state n. Compare two methods by `metrics.paired_difference`.

    Arguments:
        snapshots: three times or more; the scores are in their units. Standardise first.
        methods: by name, functions of the training snapshots and the time left out that return n cells.
        n: cells a day, at most as many as the smallest day has.
        key: of the subsamples; the first k of them are the same for every ``num_subsamples``.
        num_subsamples: how many repeats.
        powers: which distances.

    Returns:
        For each method the distances, shape (num_subsamples, T - 2, len(powers)).

    Raises:
        ValueError: for fewer than three times, an n that a day has not, or a guess of another shape or not finite.

    Example:
        >>> import jax, sdeflow as sf
        >>> cells = sf.data.simulated_cells(60, key=jax.random.key(0)).standardise()
        >>> ours = lambda train, time: sf.bridges.interpolate(train, time, key=jax.random.key(2))
        >>> methods = {"ours": ours, "copy": sf.bridges.copy_previous}
        >>> scores = sf.bridges.score_left_out(cells, methods, n=50, num_subsamples=2, key=jax.random.key(1))
        >>> w1 = {name: x[..., 0].mean(axis=1) for name, x in scores.items()}
        >>> sf.metrics.paired_difference(w1["ours"], w1["copy"]).mean < -0.5
        True
    """
    if n > min(snapshots.counts):
        raise ValueError(f"n must be at most {min(snapshots.counts)}, the cells of the smallest day, got {n}.")
    if num_subsamples < 1:
        raise ValueError(f"num_subsamples must be at least 1, got {num_subsamples}.")
    out: dict[str, list[list[list[float]]]] = {name: [] for name in methods}
    for repeat in range(num_subsamples):
        setups = leave_one_out(snapshots.subsample(n, key=jr.fold_in(key, repeat)))
        for name, method in methods.items():
            rows = []
            for train, time, cells in setups:
                guess = np.asarray(jax.device_get(method(train, time)))
                if guess.shape != cells.shape or not np.isfinite(guess).all():
                    raise ValueError(
                        f"{name!r} must return finite cells of shape {cells.shape} for time {time:g}, "
                        f"got shape {guess.shape}."
                    )
                rows.append([wasserstein(guess, cells, p, max_points=None) for p in powers])
            out[name].append(rows)
    return {name: np.array(rows) for name, rows in out.items()}
