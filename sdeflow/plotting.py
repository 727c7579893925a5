"""Pictures of what the other rooms compute: thin functions that take ``ax=None`` and return the axes.

matplotlib is imported when a function is called, never before. Without ``ax`` a function draws on the current
axes of pyplot, which makes new ones where there are none.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np


def trajectories(
    ts: Any,
    ys: Any,
    *,
    ax: Any = None,
    labels: Sequence[Hashable] | None = None,
    component: int | tuple[int, int] = 0,
    **style: Any,
) -> Any:
    """Draw paths, each on its own times.

    Arguments:
        ts: shape (n,) for times that all paths share, or N arrays of shape (n_i,).
        ys: N arrays of shape (n_i,) or (n_i, d), e.g. one array of shape (N, n, d); or a single path as one
            array of shape (n,) or (n, d), such as ``sol.ys``. NaN leaves a gap.
        ax: matplotlib axes to draw on.
        labels: N labels; paths of one label share a colour and an entry of the legend.
        component: which of the d components to draw against time; a pair draws one against the other.
        style: passed on to ``ax.plot``.

    Returns:
        The axes.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: for shapes that disagree, or a component that is not there.

    Example:
        >>> import numpy as np
        >>> from matplotlib.figure import Figure
        >>> from sdeflow.plotting import trajectories
        >>> ax = Figure().subplots()
        >>> times = [[0.0, 1.0], [0.0, 0.3, 2.0]]
        >>> ax = trajectories(times, [np.ones(2), np.zeros(3)], ax=ax, labels=["a", "b"])
        >>> len(ax.lines)
        2
    """
    ax = _axes(ax)
    paths = [_path(y, i) for i, y in enumerate([ys] if _is_single(ts, ys) else ys)]
    times = _times(ts, paths)
    if labels is not None and len(labels) != len(paths):
        raise ValueError(f"There are {len(paths)} paths but {len(labels)} labels; give one for each path.")
    pair = component if isinstance(component, tuple) else (component,)
    for i, y in enumerate(paths):
        bad = [c for c in pair if not -y.shape[1] <= c < y.shape[1]]
        if bad:
            raise ValueError(f"Path {i} has {y.shape[1]} components, so there is no component {bad[0]}.")
    colours = {label: f"C{i % 10}" for i, label in enumerate(dict.fromkeys(labels or ()))}
    named: set[Hashable] = set()
    for i, (t, y) in enumerate(zip(times, paths)):
        own = dict(style)
        if labels is not None:
            own.setdefault("color", colours[labels[i]])
            own.setdefault("label", f"{labels[i]}" if labels[i] not in named else "_")
            named.add(labels[i])
        ax.plot(*((t, y[:, pair[0]]) if len(pair) == 1 else (y[:, pair[0]], y[:, pair[1]])), **own)
    if named:
        ax.legend()
    return ax


def bands(
    ts: Any,
    samples: Any,
    *,
    ax: Any = None,
    levels: Sequence[float] = (0.5, 0.9),
    color: Any = "C0",
    label: str | None = None,
) -> Any:
    """Draw the median of samples over time, and around it central bands that hold shares of them.

    Arguments:
        ts: shape (n,).
        samples: shape (S, n), S samples of one quantity.
        ax: matplotlib axes to draw on.
        levels: the share of the samples that each band holds, between 0 and 1.
        color: the colour of all of it.
        label: the entry of the median in a legend.

    Returns:
        The axes.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: for shapes that disagree, samples that are not finite, or a level outside (0, 1).

    Example:
        >>> import numpy as np
        >>> from matplotlib.figure import Figure
        >>> from sdeflow.plotting import bands
        >>> samples = np.random.default_rng(0).normal(size=(100, 3))
        >>> len(bands([0.0, 1.0, 2.0], samples, ax=Figure().subplots()).collections)
        2
    """
    ax = _axes(ax)
    ts, samples = np.asarray(ts, float), np.asarray(samples, float)
    if ts.ndim != 1 or samples.ndim != 2 or samples.shape[1] != ts.size:
        raise ValueError(f"samples must be of shape (S, {ts.size}) for these times, got {samples.shape}.")
    if not np.isfinite(samples).all():
        raise ValueError("samples must be finite; leave the failed ones out.")
    for level in sorted(levels, reverse=True):
        if not 0 < level < 1:
            raise ValueError(f"A level must lie between 0 and 1, both excluded, got {level}.")
        low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0)
        ax.fill_between(ts, low, high, color=color, alpha=0.25, linewidth=0)
    ax.plot(ts, np.median(samples, axis=0), color=color, label=label)
    return ax


def _axes(ax: Any) -> Any:
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('Plotting needs matplotlib; run `pip install "sdeflow[plot]"`.') from error
    return plt.gca()


def _path(y: Any, i: int) -> np.ndarray:
    y = np.asarray(y, float)
    if y.ndim not in (1, 2):
        raise ValueError(f"Path {i} has shape {y.shape}; paths are (n,) or (n, d), and ys a list of them.")
    return y.reshape(len(y), -1)


def _is_single(ts: Any, ys: Any) -> bool:
    """Whether ``ys`` is one path over the times ``ts``, rather than a list of paths."""
    return np.ndim(ts[0]) == 0 and hasattr(ys, "ndim") and ys.ndim <= 2 and len(ys) == len(ts)


def _times(ts: Any, paths: list[np.ndarray]) -> list[np.ndarray]:
    """One array of times for each path."""
    shared = np.ndim(ts[0]) == 0
    times = [np.asarray(ts)] * len(paths) if shared else [np.asarray(t) for t in ts]
    if len(times) != len(paths):
        raise ValueError(f"There are {len(paths)} paths but {len(times)} arrays of times; give one for each.")
    for i, (t, y) in enumerate(zip(times, paths)):
        if t.shape != (len(y),):
            raise ValueError(f"Path {i} has {len(y)} points but times of shape {t.shape}.")
    return times
