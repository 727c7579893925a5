"""The job "bridges": from snapshots of cells to velocities, fates, and a score on a day that was held out."""

import dataclasses
import time as clock
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from ..bridges import (
    Bridge,
    Fates,
    PiecewiseBridge,
    copy_previous,
    fate,
    interpolate,
    light_sb,
    transport_midpoint,
)
from ..data import HeldOut, Snapshots, leave_one_out, simulated_cells, write_velocity
from ..equations import BrownianMotion
from ..metrics import energy_distance, wasserstein
from ._ending import InputError, finished
from ._picture import FateRow, Judged, Subject, draw

_SPREAD = 0.1  # Variance of an unguided cell over a mean gap between days, where the cells' own is 1.
_MOST = 1000  # Cells that a distance, or a fate, is computed from.
_PATHS = 40
_FEW = 0.03  # Types with less of a day's cells are left out of the table of fates.
_SHOWN_TYPES = 5


def bridges(
    out: Path,
    *,
    seed: int = 2,
    quick: bool = False,
    data: Path | None = None,
    time: str = "day",
    rep: str = "X_pca",
    label: str | None = None,
) -> Iterator[str]:
    """Join snapshots of cells by bridges; predict a day held out, draw velocities, say what cells become.

    Arguments:
        out: the directory of the figure, and of the file with velocities; made if it is not there.
        seed: decides the simulated cells, the fits and the noise.
        quick: few cells and few updates.
        data: an AnnData file, which is left as it is; simulated cells if None.
        time: the column of ``obs`` with the time of each cell.
        rep: the entry of ``obsm`` that the bridges live in.
        label: the column of ``obs`` with the type of each cell; without it there are no fates.

    Raises:
        InputError: for a file that cannot be used.
        OSError: if the figure or the file with velocities cannot be written.
    """
    start = clock.perf_counter()
    for_data, for_test, for_fits, for_fates, for_paths = jax.random.split(jax.random.key(seed), 5)
    subject = _simulated(for_data, quick) if data is None else _read(data, time, rep, label)
    out.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {"num_components": 10, "steps": 1000} if quick else {"num_components": 50, "steps": 4000}
    cells = subject.cells.standardise("scalar")
    source = "Simulated cells that differentiate" if data is None else f"{data}"
    yield f"{source}: {str(subject.cells).removeprefix('Snapshots: ')}"
    gap = float(np.diff(cells.times).mean())
    reference = BrownianMotion(cells.dim, (_SPREAD / gap) ** 0.5)

    judged = None
    middle = (len(cells) - 1) // 2
    if len(cells) < 3 or cells.counts[middle] < 4:
        yield "Nothing is held out and scored: that takes a time between two others, with at least four cells."
    else:
        setup = leave_one_out(cells)[middle - 1]
        judged = _judge(subject, setup, reference, settings, for_test)
        yield (
            f"Held out: {subject.at(judged.time)}, from a bridge between {subject.at(setup.before)} and "
            f"{subject.at(setup.after)} that never saw it. {len(judged.predicted)} cells against {len(judged.real)}, "
            "distances W1 / W2 / energy, in the units of the data:"
        )
        for name, scores in judged.scores.items():
            yield f"  {name:<34}" + " / ".join(f"{score:.3f}" for score in scores)

    pieces = []
    for i, ((t0, x0), (t1, x1)) in enumerate(cells.pairs()):
        began = clock.perf_counter()
        key = jax.random.fold_in(for_fits, i)
        pieces.append(_fit(x0, x1, t0, t1, reference, settings, key, backward="fit"))
        yield f"Bridge from {subject.at(t0)} to {t1:g}, there and back: {clock.perf_counter() - began:.1f} s."
    bridge = PiecewiseBridge(pieces)

    rows, names = [], ()
    if cells.labels is not None:
        # Each time to start from is a program to compile, which is most of what a quick look waits for.
        rows, names = _fates(cells, pieces, {middle} if quick else {0, middle}, for_fates)
        yield f"What cells become by {subject.at(cells.times[-1])}, by exact paths from where they are:"
        for row in rows:
            shares = ", ".join(f"{p:.0%} {name}" for name, p in zip(names, row.probabilities) if p >= 0.005)
            yield f"  {f'{subject.at(row.time)}, {row.kind} ({row.count})':<34}{shares}"
    elif data is not None:
        yield "No fates: name the column of obs with the types of cells, --label."

    if data is not None:
        write_velocity(subject.adata, bridge, rep=rep, time=time, like=cells)
        copy = out / f"{data.stem}-velocity.h5ad"
        subject.adata.write_h5ad(copy)
        yield f'Velocities are in obsm["velocity_{rep.removeprefix("X_")}"] of a copy, {copy}; {data} is as it was.'

    path = out / "bridges.png"
    yield finished(
        start,
        path,
        lambda: draw(path, subject, cells, bridge, _paths(cells, bridge, for_paths), rows, names, judged),
    )


# Data


def _simulated(key: PRNGKeyArray, quick: bool) -> Subject:
    """Simulated cells in their principal components."""
    cells = simulated_cells(100 if quick else 1000, key=key)
    points = np.concatenate(cells.samples)
    centre = points.mean(axis=0)
    turn = np.linalg.svd(points - centre, full_matrices=False)[2]
    turn *= np.sign(turn.sum(axis=1, keepdims=True))
    # The sign of a component is free: time goes to the right.
    turn[0] *= np.sign(turn[0] @ (cells.samples[-1].mean(axis=0) - cells.samples[0].mean(axis=0)))
    cells = dataclasses.replace(cells, samples=[(x - centre) @ turn.T for x in cells.samples])
    return Subject(cells, "day", ("PC 1", "PC 2"))


def _read(path: Path, time: str, rep: str, label: str | None) -> Subject:
    """The cells of an AnnData file.

    Raises:
        InputError: for what cannot be read, or used.
    """
    if not path.is_file():
        raise InputError(f"There is no file {path}.")
    try:
        import anndata
    except ImportError as error:
        raise InputError(f'Reading {path} needs anndata: pip install "sdeflow[single-cell]".') from error
    try:
        adata = anndata.read_h5ad(path)
    except Exception as error:  # Whatever h5py and anndata raise for a file that is none of theirs.
        raise InputError(f"{path} could not be read as an AnnData file: {error}") from error
    try:
        cells = Snapshots.from_anndata(adata, time=time, rep=rep, labels=label)
    except (TypeError, ValueError) as error:
        raise InputError(f"{path}: {error}") from error
    if cells.dim < 2:
        raise InputError(f"{path}: a picture needs two components, but {rep!r} has one.")
    short = "PC" if rep == "X_pca" else rep.removeprefix("X_")
    return Subject(cells, time, (f"{short} 1", f"{short} 2"), adata)


# Bridges


def _fit(
    x0: np.ndarray,
    x1: np.ndarray,
    t0: float,
    t1: float,
    reference: BrownianMotion,
    settings: dict[str, Any],
    key: PRNGKeyArray,
    backward: Any = None,
) -> Bridge:
    x0, x1 = np.asarray(x0, np.float32), np.asarray(x1, np.float32)
    return light_sb(x0, x1, reference=reference, t0=t0, t1=t1, backward=backward, key=key, **settings)


@eqx.filter_jit
def _draw_paths(
    bridge: Any, starts: Float[Array, "n d"], ts: Float[Array, " T"], key: PRNGKeyArray
) -> Float[Array, "n T d"]:
    keys = jax.random.split(key, len(starts))
    return jax.vmap(lambda x, key: bridge.sample_path(x, ts, key=key))(starts, keys)


def _paths(cells: Snapshots, bridge: PiecewiseBridge, key: PRNGKeyArray) -> tuple[np.ndarray, np.ndarray]:
    """Times, and exact paths through all of them, in the user's units."""
    ts = np.unique(np.concatenate([np.linspace(t0, t1, 17) for (t0, _), (t1, _) in cells.pairs()]))
    starts = cells.subsample(_PATHS, key=key).samples[0]
    found = _draw_paths(bridge, jnp.asarray(starts, jnp.float32), jnp.asarray(ts, jnp.float32), key)
    return ts, cells.unstandardise(np.asarray(found))


def _judge(
    subject: Subject, setup: HeldOut, reference: BrownianMotion, settings: dict[str, Any], key: PRNGKeyArray
) -> Judged:
    """The cells of a day, as a bridge between its neighbours has them, beside what needs no bridge."""
    for_fit, for_cells, for_paths = jax.random.split(key, 3)
    ((t0, x0), (t1, x1)) = setup.train.take([setup.before, setup.after]).pairs()[0]
    # Clouds of one size: distances between samples depend on it. The other half of the day says what is perfect.
    n = min(len(setup.cells) // 2, *setup.train.counts, _MOST)
    few = setup.train.subsample(n, key=for_cells)
    both = np.asarray(jax.random.permutation(for_cells, setup.cells))[: 2 * n]
    bridge = _fit(x0, x1, t0, t1, reference, settings, for_fit)
    ts = jnp.asarray([setup.time], jnp.float32)
    predicted = np.asarray(_draw_paths(bridge, jnp.asarray(few.at(t0), jnp.float32), ts, for_paths))[:, 0]
    guesses = {
        "the bridge": predicted,
        "interpolate, from all other times": interpolate(few, setup.time, key=for_paths),
        "straight along optimal transport": transport_midpoint(few, setup.time),
        f"a copy of {subject.at(t0)}": copy_previous(few, setup.time),
        f"the other half of {subject.at(setup.time)}": both[n:],
    }
    real = setup.train.unstandardise(both[:n])
    guesses = {name: setup.train.unstandardise(x) for name, x in guesses.items()}
    scores = {
        name: (wasserstein(x, real, 1), wasserstein(x, real, 2), float(energy_distance(x, real)))
        for name, x in guesses.items()
    }
    return Judged(setup.time, real, guesses["the bridge"], scores)


def _fates(
    cells: Snapshots, pieces: list[Bridge], starts: set[int], key: PRNGKeyArray
) -> tuple[list[FateRow], tuple[str, ...]]:
    """The mean fates of the types at some of the times."""
    assert cells.labels is not None
    last = cells.subsample(_MOST, key=key)
    assert last.labels is not None
    rows, names = [], ()
    for i in sorted(starts):
        some = cells.subsample(_MOST // 2, key=jax.random.fold_in(key, i))
        assert some.labels is not None
        ends, kinds = last.samples[-1], [f"{x}" for x in last.labels[-1]]
        votes = min(5, len(ends))
        found: Fates = fate(PiecewiseBridge(pieces[i:]), some.samples[i], ends, kinds, key=key, neighbours=votes)
        names, probabilities = tuple(map(str, found.names)), np.asarray(found.probabilities)
        own = np.array([f"{x}" for x in some.labels[i]])
        kinds, counts = np.unique(own, return_counts=True)
        for j in np.argsort(-counts, kind="stable")[:_SHOWN_TYPES]:
            if counts[j] >= _FEW * len(own):
                mean = probabilities[own == kinds[j]].mean(axis=0)
                rows.append(FateRow(float(cells.times[i]), str(kinds[j]), int(counts[j]), mean))
    return rows, names
