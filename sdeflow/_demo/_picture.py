"""The picture of the job "bridges": velocities, paths, fates and the day held out."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import plotting
from ..bridges import PiecewiseBridge
from ..data import Snapshots

_SHOWN = 6000  # Cells; more hide one another.
_NEAR = 0.003  # Of the cells shown, those near a place that has arrows.
_GREY = "0.8"


class Subject(NamedTuple):
    """The cells in the user's units, and what their times and components are called."""

    cells: Snapshots
    time: str
    axes: tuple[str, str]
    adata: Any = None

    def at(self, t: float) -> str:
        """How a time is called."""
        return f"{self.time} {t:g}"


class Judged(NamedTuple):
    """A time that was held out, in the user's units."""

    time: float
    real: np.ndarray
    predicted: np.ndarray
    scores: dict[str, tuple[float, float, float]]


class FateRow(NamedTuple):
    """The mean fate of the cells of one type at one time."""

    time: float
    kind: str
    count: int
    probabilities: np.ndarray


def draw(
    path: Path,
    subject: Subject,
    cells: Snapshots,
    bridge: PiecewiseBridge,
    paths: tuple[np.ndarray, np.ndarray],
    rows: list[FateRow],
    names: tuple[str, ...],
    judged: Judged | None,
) -> None:
    """Draw what the job found; panels of what there is none of are left out.

    Arguments:
        path: of the figure.
        subject: the cells in the user's units.
        cells: the same in the units of the bridge.
        bridge: over all times.
        paths: times, shape (T,), and paths in the user's units, shape (N, T, d).
        rows: the fates, if the cells have labels.
        names: of what they become.
        judged: the time that was held out, if there is one.
    """
    from matplotlib.figure import Figure

    count = 2 + bool(rows) + (judged is not None)
    shape = (2, 2) if count == 4 else (1, count)
    figure = Figure(figsize=(6.4 * shape[1], 5.2 * shape[0]), layout="constrained")
    axes = iter(np.ravel(figure.subplots(*shape)))
    step = -(-cells.num_cells // _SHOWN)
    points = np.concatenate(subject.cells.samples)[::step]
    when = np.repeat(cells.times, cells.counts)[::step]
    colours = {name: f"C{i % 10}" for i, name in enumerate(names)}
    plane = [next(axes), next(axes)]
    _velocities(plane[0], subject, cells, bridge, points, when)
    _trajectories(plane[1], subject, points, paths, colours)
    if rows:
        _bars(next(axes), subject, rows, names, colours)
    if judged is not None:
        plane.append(next(axes))
        _held_out(plane[-1], subject, points, judged)
    low, high = np.quantile(points[:, :2], [0.001, 0.999], axis=0)
    margin = 0.1 * (high - low)
    for ax in plane:
        ax.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]))
        ax.set(xlabel=subject.axes[0], ylabel=subject.axes[1])
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _velocities(
    ax: Any, subject: Subject, cells: Snapshots, bridge: PiecewiseBridge, points: np.ndarray, when: np.ndarray
) -> None:
    import matplotlib as mpl

    shades = mpl.colormaps["viridis"](np.linspace(0.05, 0.95, len(cells)))
    for t, shade in zip(cells.times, shades):
        own = points[when == t]
        ax.scatter(own[:, 0], own[:, 1], color=shade, s=8, alpha=0.5, linewidth=0, label=subject.at(t))
    field = lambda t, x: cells.scale * bridge.velocity(t, (x - cells.shift) / cells.scale)
    plotting.streams(field, points, when, ax=ax, least=max(3.0, _NEAR * len(points)), density=1.1)
    ax.set_title("Velocity of the cells, each at its own time")
    ax.legend(markerscale=2.5, frameon=False, fontsize="small")


def _trajectories(
    ax: Any, subject: Subject, points: np.ndarray, paths: tuple[np.ndarray, np.ndarray], colours: dict[str, str]
) -> None:
    """Paths in the colour of the nearest cell to where they end."""
    ts, found = paths
    ax.scatter(points[:, 0], points[:, 1], color=_GREY, s=8, alpha=0.5, linewidth=0)
    style = {"ax": ax, "component": (0, 1), "linewidth": 0.9, "alpha": 0.8}
    if subject.cells.labels is None:
        plotting.trajectories(ts, found, color="C0", **style)
    else:
        gaps = ((found[:, -1, None] - subject.cells.samples[-1]) ** 2).sum(axis=-1)
        ends = np.array([f"{x}" for x in subject.cells.labels[-1]])[gaps.argmin(axis=1)]
        for name, colour in colours.items():
            if (own := found[ends == name]).size:
                plotting.trajectories(ts, own, labels=[f"ends as {name}"] * len(own), color=colour, **style)
        ax.legend(frameon=False, fontsize="small")
    ax.scatter(found[:, 0, 0], found[:, 0, 1], color="black", s=10, zorder=3)
    ax.set_title(f"Exact paths of {len(found)} cells of {subject.at(ts[0])} (dots)")


def _bars(ax: Any, subject: Subject, rows: list[FateRow], names: tuple[str, ...], colours: dict[str, str]) -> None:
    left = np.zeros(len(rows))
    heights = np.arange(len(rows))[::-1]
    for k, name in enumerate(names):
        shares = np.array([row.probabilities[k] for row in rows])
        if shares.max() < 0.01:
            continue
        ax.barh(heights, shares, left=left, color=colours[name], height=0.7, label=name)
        for y, x, share in zip(heights, left, shares):
            if share >= 0.08:
                ax.text(x + share / 2, y, f"{share:.0%}", ha="center", va="center", color="white")
        left += shares
    ax.set_yticks(heights, [f"{subject.at(row.time)}: {row.kind}\n{row.count} cells" for row in rows])
    ax.set(xlim=(0, 1), xlabel="mean probability", title=f"What cells become by {subject.at(subject.cells.times[-1])}")
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=5, frameon=False, fontsize="small")


def _held_out(ax: Any, subject: Subject, points: np.ndarray, judged: Judged) -> None:
    ax.scatter(points[:, 0], points[:, 1], color=_GREY, s=8, alpha=0.5, linewidth=0)
    day = subject.at(judged.time)
    plotting.density(judged.real, ax=ax, filled=True, color="C9", label=f"real cells of {day}")
    plotting.density(judged.predicted, ax=ax, color="C3", label="the bridge, which never saw them")
    scores = [f"{name} {found[0]:.2f}" for name, found in judged.scores.items()]
    caption = f"W1 to the real cells: {', '.join(scores[:2])},\n{', '.join(scores[2:])}"
    place = {"xycoords": "axes fraction", "ha": "center", "va": "top", "fontsize": "small"}
    ax.annotate(caption, (0.5, -0.13), **place)
    ax.set_title(f"Held out: {day}, borders of 50% and 90% of the cells")
    ax.legend(frameon=False, fontsize="small")
