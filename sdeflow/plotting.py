"""Pictures of what the other rooms compute: thin functions that take ``ax=None`` and return the axes.

matplotlib is imported when a function is called, never before. Without ``ax`` a function draws on the current
axes of pyplot, which makes new ones where there are none.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

from .data._velocity import evaluate
from .equations import AbstractEquation


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
    _check_levels(levels)
    for level in sorted(levels, reverse=True):
        low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0)
        ax.fill_between(ts, low, high, color=color, alpha=0.25, linewidth=0)
    ax.plot(ts, np.median(samples, axis=0), color=color, label=label)
    return ax


def streams(
    field: Any,
    cells: Any,
    t: Any = None,
    *,
    ax: Any = None,
    components: tuple[int, int] = (0, 1),
    bandwidth: float | tuple[float, float] | None = None,
    least: float = 1.0,
    resolution: int = 40,
    **style: Any,
) -> Any:
    """Draw the flow of cells in the plane of two components, where there are cells.

        v(p) = sum_i K(p - p_i) v_i / sum_i K(p - p_i),

    the mean of the velocities v_i of the cells around each point p of a grid, with a Gaussian kernel K. The cells
    themselves are not drawn: ``ax.scatter`` does that as you like it.

    Arguments:
        field: a bridge, whose ``velocity`` is drawn; an equation, of which the drift is; any function of ``t`` and one
            state (d,); or the velocities themselves, shape (n, d), such as ``adata.obsm["velocity_pca"]``.
        cells: shape (n, d), where the field is evaluated. A cell with NaN is left out.
        t: one time, or the time of each cell, shape (n,); not needed where the field is an array.
        ax: matplotlib axes to draw on.
        components: which two of the d components to draw. All d are used to evaluate the field.
        bandwidth: the standard deviation of the kernel, in the units of the cells, for both components or for each; by
            default Scott's rule, the standard deviation of the cells times ``n^(-1/6)``.
        least: the field is drawn where at least so many cells are near, each counted as its kernel, at most 1.
        resolution: points of the grid in each direction.
        style: passed on to ``ax.streamplot``.

    Returns:
        The axes.

    Raises:
        ImportError: if matplotlib is not installed.
        TypeError: for a field that is none of these.
        ValueError: for shapes that disagree, a component that is not there, or no place with enough cells.

    Example:
        >>> import numpy as np
        >>> from matplotlib.figure import Figure
        >>> from sdeflow.plotting import streams
        >>> cells = np.random.default_rng(0).normal(size=(200, 2))
        >>> ax = streams(lambda t, x: -x, cells, 0.0, ax=Figure().subplots())
        >>> len(ax.collections)
        1
    """
    ax = _axes(ax)
    cells = _points(cells, "cells")
    velocity = _field(field, cells, t)
    pair = _pair(components, cells.shape[1], "The cells")
    known = np.isfinite(cells[:, pair]).all(axis=1) & np.isfinite(velocity[:, pair]).all(axis=1)
    if known.sum() < 2:
        raise ValueError(f"Only {known.sum()} of {len(cells)} cells have a place and a velocity that are finite.")
    places, arrows = cells[known][:, pair], velocity[known][:, pair]
    grid, kernels = _kernels(places, bandwidth, resolution)
    near = kernels[0].T @ kernels[1]
    if not (near >= least).any():
        raise ValueError(f"No place has least={least:g} cells near it, the most are {near.max():.3g}; lower least.")
    safe = np.where(near >= least, near, np.nan)
    # Rows of an image go along the second component.
    u, v = (((kernels[0] * arrow[:, None]).T @ kernels[1] / safe).T for arrow in arrows.T)
    ax.streamplot(*grid, u, v, **{"color": "0.25", "linewidth": 0.8, "arrowsize": 0.8} | style)
    return ax


def density(
    samples: Any,
    *,
    ax: Any = None,
    components: tuple[int, int] = (0, 1),
    levels: Sequence[float] = (0.5, 0.9),
    filled: bool = False,
    color: Any = "C0",
    label: str | None = None,
    bandwidth: float | tuple[float, float] | None = None,
    resolution: int = 100,
) -> Any:
    """Draw the smallest regions of a plane that hold shares of the samples, by a Gaussian kernel estimate.

    Arguments:
        samples: shape (n, d).
        ax: matplotlib axes to draw on.
        components: which two of the d components to draw.
        levels: the share of the samples that each region holds, between 0 and 1.
        filled: shade the regions, in place of drawing their borders.
        color: the colour of all of it.
        label: the entry in a legend.
        bandwidth: the standard deviation of the kernel, as in `streams`.
        resolution: points of the grid in each direction.

    Returns:
        The axes.

    Raises:
        ImportError: if matplotlib is not installed.
        ValueError: for samples that are not finite or do not differ, a component that is not there, or a level outside
            (0, 1).

    Example:
        >>> import numpy as np
        >>> from matplotlib.figure import Figure
        >>> from sdeflow.plotting import density
        >>> samples = np.random.default_rng(0).normal(size=(300, 3))
        >>> ax = density(samples, ax=Figure().subplots(), components=(0, 2), label="day 2")
        >>> ax.get_legend_handles_labels()[1]
        ['day 2']
    """
    from scipy.interpolate import RegularGridInterpolator

    ax = _axes(ax)
    samples = _points(samples, "samples")
    places = samples[:, _pair(components, samples.shape[1], "The samples")]
    if not np.isfinite(places).all():
        raise ValueError("samples must be finite; leave the failed ones out.")
    _check_levels(levels)
    grid, kernels = _kernels(places, bandwidth, resolution)
    height = kernels[0].T @ kernels[1]
    at_samples = RegularGridInterpolator(grid, height)(places)
    borders = np.quantile(at_samples, 1 - np.sort(levels)[::-1])
    if filled:
        for border in borders:
            ax.contourf(*grid, height.T, levels=[border, np.inf], colors=[color], alpha=0.25)
    else:
        ax.contour(*grid, height.T, levels=borders, colors=[color], linewidths=1.2)
    if label is not None:
        # A set of contours has no entry of its own in a legend.
        ax.plot([], [], color=color, label=label, **({"linewidth": 6, "alpha": 0.4} if filled else {}))
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


def _check_levels(levels: Sequence[float]) -> None:
    for level in levels:
        if not 0 < level < 1:
            raise ValueError(f"A level must lie between 0 and 1, both excluded, got {level}.")


def _points(x: Any, name: str) -> np.ndarray:
    x = np.asarray(x, float)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"{name} must be at least two points of shape (n, d), got shape {x.shape}.")
    return x


def _pair(components: tuple[int, int], d: int, whose: str) -> list[int]:
    if len(components) != 2 or components[0] == components[1]:
        raise ValueError(f"components must be two different ones, got {components!r}.")
    bad = [c for c in components if not -d <= c < d]
    if bad:
        raise ValueError(f"{whose} have {d} components, so there is no component {bad[0]}.")
    return list(components)


def _field(field: Any, cells: np.ndarray, t: Any) -> np.ndarray:
    """The velocity of every cell."""
    if hasattr(field, "shape") or isinstance(field, list | tuple):
        velocity = np.asarray(field, float)
        if velocity.shape != cells.shape:
            raise ValueError(f"The velocities have shape {velocity.shape}, but the cells {cells.shape}.")
        return velocity
    if isinstance(field, AbstractEquation):
        value = lambda t, x: field.drift(t, x, None)
    elif callable(value := getattr(field, "velocity", field)):
        pass
    else:
        raise TypeError(
            "field must be a bridge, an equation, a function of t and a state, or an array of velocities, got "
            f"{type(field).__name__}."
        )
    if t is None:
        raise ValueError("t must be the time at which the field is drawn, or the time of each cell.")
    when = np.asarray(t, float)
    if when.shape not in ((), (len(cells),)):
        raise ValueError(f"t must be one time or one for each of {len(cells)} cells, got shape {when.shape}.")
    known = np.isfinite(cells).all(axis=1)
    velocity = np.full(cells.shape, np.nan)
    if known.any():
        velocity[known] = evaluate(value, np.broadcast_to(when, len(cells))[known], cells[known])
    return velocity


def _kernels(
    places: np.ndarray, bandwidth: float | tuple[float, float] | None, resolution: int
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """A grid around places of the plane, and for each of both directions the kernels (n, resolution), at most 1.

    A Gaussian kernel is a product, so that sums over places are products of matrices, however many there are.
    """
    spread = places.std(axis=0)
    if not (spread > 0).all():
        raise ValueError(f"The points do not differ in one of the two components; deviations are {spread.tolist()}.")
    width = np.broadcast_to(spread * len(places) ** (-1 / 6) if bandwidth is None else np.asarray(bandwidth, float), 2)
    if not (width > 0).all():
        raise ValueError(f"bandwidth must be positive, got {bandwidth!r}.")
    grid, kernels = [], []
    for x, h in zip(places.T, width):
        axis = np.linspace(x.min() - 3 * h, x.max() + 3 * h, resolution)
        grid.append(axis)
        kernels.append(np.exp(-(((x[:, None] - axis) / h) ** 2) / 2))
    return (grid[0], grid[1]), (kernels[0], kernels[1])
