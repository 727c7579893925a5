"""Writing the velocity of a bridge into AnnData, at the keys where scanpy, scVelo and CellRank read.

What they read, by their sources: scVelo's plots take ``obsm["velocity_pca"]`` beside ``obsm["X_pca"]``, unless
``uns["velocity_params"]`` is there and does not list ``"pca"`` among its ``"embeddings"``, when they compute it anew;
they skip cells with NaN. scVelo's graph takes ``layers["velocity"]`` and ``layers["Ms"]``, for the genes that
``var["velocity_genes"]`` marks. CellRank's ``VelocityKernel`` takes the same, or with ``attr="obsm"`` two matrices of
one shape. Both drop a gene, or component, that is NaN in any cell.
"""

import importlib.metadata
import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from .._compat import warn
from ._anndata import ANEW, cell_times, check_finite, check_memory, coordinates, source
from ._snapshots import Snapshots

_BLOCK = 1024  # Cells at once: the drift between two samples of 10 000 cells then takes 40 MB.


def write_velocity(
    adata: Any,
    bridge: Any,
    *,
    rep: str = "X_pca",
    time: str | float | None = None,
    key_added: str = "velocity",
    to_genes: bool = False,
    kind: Literal["velocity", "drift"] = "velocity",
    times: Mapping[Hashable, float] | None = None,
    latest: float | None = None,
    like: Snapshots | None = None,
) -> None:
    """Write the velocity of a bridge at every cell into ``adata``, for scanpy, scVelo and CellRank.

    Each cell has the velocity of its own time, clipped into the horizon of the bridge. It is written to:

    * ``obsm["velocity_pca"]`` for ``rep="X_pca"``, of the shape of ``obsm["X_pca"]``: for
      ``scvelo.pl.velocity_embedding_stream(adata, basis="pca")`` and
      ``cellrank.kernels.VelocityKernel(adata, attr="obsm", xkey="X_pca", vkey="velocity_pca")``;
    * with ``to_genes``, ``layers["velocity"]``, the same in the space of genes, ``v @ varm["PCs"].T``, in the units of
      the matrix that the components were made of; ``var["velocity_genes"]``, the genes that the components use; and
      ``layers["Ms"]`` unless there is one, the cells as their components see them, up to a constant of each gene:
      for ``scvelo.tl.velocity_graph(adata)`` and ``cellrank.kernels.VelocityKernel(adata)``;
    * ``uns["sdeflow"]``, what was done, and ``uns["velocity_params"]``, so that scVelo does not compute anew.

    Cells without a time get NaN. Nothing is written if anything is refused. A view becomes a copy, as whenever one
    writes into a view.

    Arguments:
        adata: the annotated cells, changed in place.
        bridge: anything with ``.t0``, ``.t1`` and ``.velocity(t, x)``, for one cell ``x`` of shape (d,).
        rep: the entry of ``adata.obsm`` that the bridge lives in.
        time: the column of ``adata.obs`` with the time of each cell, in the units of the bridge; or one time for all.
            None takes the column that an earlier call has noted in ``uns["sdeflow"]``.
        key_added: the name to write to, in place of "velocity".
        to_genes: whether to write velocities of genes, too; for ``rep="X_pca"`` alone.
        kind: "velocity", that of the probability flow, which moves the populations into one another without noise;
            or "drift", where a cell is expected to go from where it is.
        times: what the labels of ``time`` mean, as in `Snapshots.from_anndata`.
        latest: cells that are later are taken at this time; the bridge's ``t1`` by default. A bridge between samples
            has no drift at ``t1`` itself: name a time a little earlier.
        like: the snapshots that the bridge was fitted to, if they were standardised or had components left out. Cells
            are put into their units first, and velocities back into those of ``adata``; components that the bridge does
            not know are NaN.

    Raises:
        TypeError: for a bridge without ``t0``, ``t1`` or the method that ``kind`` names, or a time that is none.
        ValueError: for keys that are not there, times that lie all outside of the bridge's horizon, coordinates that
            are not finite, velocities that are not finite, and layers above 1 GiB.

    Example:
        >>> from sdeflow.data import write_velocity
        >>> from types import SimpleNamespace
        >>> import numpy as np
        >>> adata = SimpleNamespace(obs={"day": [0.0, 0.5, 1.0]}, obsm={"X_pca": np.ones((3, 2))}, uns={}, n_obs=3)
        >>> bridge = SimpleNamespace(t0=0.0, t1=1.0, velocity=lambda t, x: t * x)
        >>> write_velocity(adata, bridge, time="day")
        >>> adata.obsm["velocity_pca"].tolist()
        [[0.0, 0.0], [0.5, 0.5], [1.0, 1.0]]
    """
    if getattr(adata, "is_view", False) and getattr(adata, "isbacked", False):
        raise ValueError("A view of a backed AnnData cannot be written to; take adata.to_memory() first.")
    if kind not in ("velocity", "drift"):
        raise ValueError(f'kind must be "velocity" or "drift", got {kind!r}.')
    lacks = [name for name in ("t0", "t1", kind) if not hasattr(bridge, name)]
    if lacks:
        raise TypeError(
            f"A {type(bridge).__name__} has no {' and no '.join(lacks)}; give a bridge between populations."
        )
    loadings = _loadings(adata, rep) if to_genes else None
    cells, _ = coordinates(adata, rep)
    when, column = _when(adata, time, times, len(cells))
    known = ~np.isnan(when)
    when = _clip(when, float(bridge.t0), float(bridge.t1), latest)
    check_finite(cells[known], source(rep), np.flatnonzero(known), ANEW)
    dim = cells.shape[1] if like is None else like.dim
    if dim > cells.shape[1]:
        raise ValueError(f"{source(rep)} has {cells.shape[1]} components, but like has {dim}.")
    velocity = np.full(cells.shape, np.nan, cells.dtype)
    inside = cells[known][:, :dim] if like is None else (cells[known][:, :dim] - like.shift) / like.scale
    try:
        found = evaluate(getattr(bridge, kind), when[known], inside)
    except (TypeError, ValueError) as error:
        # The error is the bridge's own, which may name an option of it; shapes are the likeliest fault of ours.
        error.add_note(
            f"The bridge was given cells of {dim} components; if it was fitted to fewer, give like=, the snapshots "
            "that it was fitted to."
        )
        raise
    advice = (
        "a bridge between samples has no drift at its end, for which latest= is a time a little before it, and no "
        'velocity at either: use gaussian_sb, or light_sb with backward="fit"'
    )
    check_finite(found, f"the bridge's {kind}", np.flatnonzero(known), advice)
    velocity[np.ix_(known, np.arange(dim))] = found if like is None else found * like.scale
    _warn_unknown(known)
    genes = {} if loadings is None else _genes(adata, loadings[:, :dim], cells[:, :dim], velocity[:, :dim])
    _write(
        adata, velocity, genes, rep.removeprefix("X_"), key_added, _notes(bridge, rep, column, key_added, kind, when)
    )


def _when(
    adata: Any, time: str | float | None, times: Mapping[Hashable, float] | None, count: int
) -> tuple[np.ndarray, str | None]:
    """The time of each cell, NaN for cells without one, and the column that it was read from."""
    if time is None:
        time = dict(adata.uns).get("sdeflow", {}).get("time")
        if time is None:
            keys = [str(key) for key in adata.obs]
            raise ValueError(f"time= must name the column of obs with the time of each cell; obs has {keys}.")
    if isinstance(time, str):
        found = cell_times(adata, time, times)
        if np.isnan(found).all():
            raise ValueError(f"No cell has a time in obs[{time!r}].")
        return found, time
    if np.ndim(time) != 0 or not np.isfinite(float(time)):
        raise TypeError(f"time must be a column of obs or one finite number, got {time!r}.")
    return np.full(count, float(time)), None


def _clip(when: np.ndarray, t0: float, t1: float, latest: float | None) -> np.ndarray:
    late = t1 if latest is None else float(latest)
    if not t0 < late <= t1:
        raise ValueError(f"latest must lie in ({t0:g}, {t1:g}], the horizon of the bridge, got {latest}.")
    slack = 1e-6 * max(1.0, abs(t0), abs(t1))
    outside = (when < t0 - slack) | (when > t1 + slack)
    total = np.count_nonzero(~np.isnan(when))
    seen = f"times from {np.nanmin(when):g} to {np.nanmax(when):g}, outside of the bridge's horizon [{t0:g}, {t1:g}]"
    if outside.sum() == total:
        raise ValueError(f"All {total} cells have {seen}; put them into its units with times={{label: time}}.")
    if outside.any():
        message = (
            f"{outside.sum()} of {total} cells lie outside of the bridge's horizon and are taken at its ends: {seen}."
        )
        warn(message)
    return np.clip(when, t0, late)


def _warn_unknown(known: np.ndarray) -> None:
    if not known.all():
        warn(
            f"{np.count_nonzero(~known)} of the {known.size} cells have no time, and their velocity is NaN; scVelo's "
            "graph and CellRank drop every gene that is NaN in any cell, so leave these cells out before you use them."
        )


# The bridge


@eqx.filter_jit
def _velocities(field: Callable[..., Any], t: jax.Array, x: jax.Array) -> jax.Array:
    return jax.vmap(field)(t, x)


def evaluate(field: Callable[..., Any], when: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """A field of time and one state at each cell, block by block with one compiled program.

    Raises:
        ValueError: if what it gives is not like a state.
    """
    # What jit remembers of an object that is no module is the object itself, which may have changed since.
    fresh: Any = field if isinstance(field, eqx.Module) else lambda t, x: field(t, x)
    size = min(_BLOCK, len(cells))
    found = []
    for start in range(0, len(cells), size):
        # Blocks are padded by repeats of the last cell.
        rows = np.minimum(np.arange(start, start + size), len(cells) - 1)
        block = np.asarray(_velocities(fresh, jnp.asarray(when[rows], dtype=float), jnp.asarray(cells[rows], float)))
        if block.shape != cells[rows].shape:
            raise ValueError(f"The field gives {block.shape[1:]} for a cell of shape {cells.shape[1:]}.")
        found.append(block[: len(cells) - start])
    return np.concatenate(found)


# Genes


def _loadings(adata: Any, rep: str) -> np.ndarray:
    """Shape (genes, components), what the components are made of."""
    if rep != "X_pca":
        raise ValueError(f'to_genes=True needs rep="X_pca", whose components are sums of genes, got {rep!r}.')
    keys = list(getattr(adata, "varm", {}).keys())
    if "PCs" not in keys:
        raise ValueError(
            f'There is no "PCs" in varm, which to_genes=True needs; it has {keys}. Run scanpy.pp.pca first.'
        )
    loadings = np.asarray(adata.varm["PCs"])
    width = adata.obsm[rep].shape[1]
    if loadings.shape[1] < width:
        raise ValueError(f'varm["PCs"] has {loadings.shape[1]} components, but obsm["X_pca"] has {width}; use one PCA.')
    shape = (adata.obsm[rep].shape[0], loadings.shape[0])
    check_memory(shape, 4, "Velocities of all genes", "subset to the highly variable genes, or leave out to_genes=True")
    return loadings[:, :width]


def _genes(adata: Any, loadings: np.ndarray, cells: np.ndarray, velocity: np.ndarray) -> dict[str, Any]:
    """What to_genes=True adds: velocities, cells as their components see them, and the genes that the latter use."""
    to_genes = lambda x: (x @ loadings.T.astype(x.dtype)).astype(np.float32)
    added = {"velocity": to_genes(velocity), "genes": np.asarray((loadings != 0).any(axis=1))}
    # Both scVelo and CellRank look at differences of cells alone, so the means of the genes are not needed.
    return added if "Ms" in adata.layers else added | {"Ms": to_genes(cells)}


# AnnData


def _notes(bridge: Any, rep: str, column: str | None, key: str, kind: str, when: np.ndarray) -> dict[str, Any]:
    """What was done, in kinds that a file can hold."""
    notes: dict[str, Any] = {
        "version": _version(),
        "bridge": type(bridge).__name__,
        "key_added": key,
        "kind": kind,
        "rep": rep,
        "t0": float(bridge.t0),
        "t1": float(bridge.t1),
        "times": np.unique(when[~np.isnan(when)]),
    }
    if column is not None:
        notes["time"] = column
    epsilon = getattr(bridge, "epsilon", None)
    if epsilon is not None:
        value = np.asarray(epsilon, dtype=np.float64)
        notes["epsilon"] = float(value) if value.ndim == 0 else value
    return notes


def _version() -> str:
    try:
        return importlib.metadata.version("sdeflow")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _write(
    adata: Any, velocity: np.ndarray, genes: dict[str, Any], basis: str, key: str, notes: dict[str, Any]
) -> None:
    with warnings.catch_warnings():
        # That a view becomes a copy is what the docstring says.
        warnings.filterwarnings("ignore", message=".*initializing view as actual.*")
        adata.obsm[f"{key}_{basis}"] = velocity
        if genes:
            adata.layers[key] = genes["velocity"]
            adata.var[f"{key}_genes"] = genes["genes"]
            if "Ms" in genes:
                adata.layers["Ms"] = genes["Ms"]
        adata.uns["sdeflow"] = notes
        params = dict(adata.uns.get(f"{key}_params", {}))
        listed = [str(name) for name in params.get("embeddings", [])]
        adata.uns[f"{key}_params"] = params | {"embeddings": [*dict.fromkeys([*listed, basis])]}
