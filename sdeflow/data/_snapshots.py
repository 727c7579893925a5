"""`Snapshots`: populations of cells at a few times, each cell seen once, kept on the host."""

import dataclasses
import functools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from ._anndata import read_cells
from ._cells import (
    check_count,
    deviations,
    frozen,
    read_index,
    read_labels,
    read_names,
    read_samples,
    read_scaling,
    read_times,
    read_weights,
)
from ._long import is_missing
from ._random import SUBSAMPLE, generators


@dataclasses.dataclass(frozen=True, eq=False, repr=False, init=False)
class Snapshots:
    """An immutable set of populations: at each of a few times a cloud of cells, none of them seen twice.

    Every method returns a new set. Numbers stay in the precision that they came in, on the host, until a model
    takes them; ``len(snapshots)`` is the number of times.

    Arguments:
        times: shape (T,), at least two, strictly increasing.
        samples: T arrays of shape (n_i, d), at least two cells each; of shape (n_i,) for d = 1.
        weights: T arrays of shape (n_i,), the mass of each cell, not negative; where populations grow or die, the sums
            differ between times. None weighs all cells alike.
        labels: T arrays of shape (n_i,), such as the type of each cell.
        names: d names of the components.
        index: T arrays of shape (n_i,), the row that each cell has in the table it came from; counted through by
            default.
        shift: shape (d,), what `Snapshots.standardise` has subtracted already; zero by default.
        scale: shape (d,), what it has divided by already; one by default.

    Raises:
        TypeError: for times or samples that are not numbers.
        ValueError: for fewer than two times, a time with fewer than two cells, times that do not increase, values
            that are not finite, or shapes that disagree.

    Example:
        >>> from sdeflow.data import Snapshots
        >>> import numpy as np
        >>> cells = Snapshots([0.0, 1.0, 3.0], [np.zeros((4, 2)), np.ones((5, 2)), np.full((3, 2), 2.0)])
        >>> cells.dim, cells.counts, cells.at(1.0).shape
        (2, (4, 5, 3), (5, 2))
        >>> [(t0, t1) for (t0, _), (t1, _) in cells.drop(1.0).pairs()]
        [(0.0, 3.0)]
        >>> cells
        Snapshots: 12 cells of 2 components at 3 times (0: 4, 1: 5, 3: 3).
    """

    times: Float[np.ndarray, " T"]
    samples: tuple[Float[np.ndarray, "n d"], ...]
    weights: tuple[Float[np.ndarray, " n"], ...] | None
    labels: tuple[np.ndarray, ...] | None
    names: tuple[Hashable, ...] | None
    index: tuple[Int[np.ndarray, " n"], ...]
    shift: Float[np.ndarray, " d"]
    scale: Float[np.ndarray, " d"]

    def __init__(
        self,
        times: Any,
        samples: Any,
        *,
        weights: Sequence[Any] | None = None,
        labels: Sequence[Any] | None = None,
        names: Sequence[Hashable] | None = None,
        index: Sequence[Any] | None = None,
        shift: Any = None,
        scale: Any = None,
    ):
        times, samples = read_samples(samples, functools.partial(read_times, times))
        counts, dim = [len(x) for x in samples], samples[0].shape[1]
        fields = {
            "times": times,
            "samples": samples,
            "weights": read_weights(weights, times, counts),
            "labels": read_labels(labels, times, counts),
            "names": read_names(names, dim),
            "index": read_index(index, times, counts),
            "shift": read_scaling(shift, 0.0, dim),
            "scale": read_scaling(scale, 1.0, dim),
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_anndata(
        cls,
        adata: Any,
        *,
        time: str,
        rep: str = "X_pca",
        weights: str | None = None,
        labels: str | None = None,
        times: Mapping[Hashable, float] | None = None,
    ) -> "Snapshots":
        """Snapshots of the cells of an AnnData, or of anything that has ``.obs``, ``.obsm`` and ``.X`` as it has.

        Cells are sorted by time; ``index`` says which row of ``adata`` each of them was. Views will do, and backed
        files, whose X is read block by block.

        Arguments:
            adata: the annotated cells.
            time: the column of ``adata.obs`` with the time of each cell: numbers, or text or categories whose labels
                are numbers.
            rep: the entry of ``adata.obsm`` with the coordinates of each cell, or "X" for ``adata.X``.
            weights: a column of ``adata.obs`` with the mass of each cell.
            labels: a column of ``adata.obs`` with the label of each cell.
            times: what the labels of ``time`` mean, as ``{"day 2": 2.0, "day 4": 4.0}``, if they are not numbers.

        Raises:
            TypeError: for columns or coordinates of a kind that holds no numbers.
            ValueError: for a key that is not there (listing those that are), labels that are not numbers (listing
                them), cells without a time or with values that are not finite, fewer than two times, a time with
                fewer than two cells, or a sparse or backed X above 1 GiB once it is dense.

        Example:
            >>> from sdeflow.data import Snapshots
            >>> from types import SimpleNamespace
            >>> import numpy as np
            >>> pca = np.arange(12.0).reshape(6, 2)
            >>> adata = SimpleNamespace(obs={"day": ["2", "4", "2", "4", "7", "7"]}, obsm={"X_pca": pca}, n_obs=6)
            >>> cells = Snapshots.from_anndata(adata, time="day")
            >>> cells.times.tolist(), [rows.tolist() for rows in cells.index]
            ([2.0, 4.0, 7.0], [[0, 2], [1, 3], [4, 5]])
        """
        return cls(**read_cells(adata, time, rep, weights, labels, times))

    # What is in it

    @property
    def dim(self) -> int:
        """d, the number of components of a cell."""
        return self.samples[0].shape[1]

    @property
    def num_cells(self) -> int:
        """The number of cells of all times together."""
        return sum(self.counts)

    @property
    def counts(self) -> tuple[int, ...]:
        """The number of cells at each time."""
        return tuple(len(x) for x in self.samples)

    @property
    def masses(self) -> Float[np.ndarray, " T"]:
        """Shape (T,), the mass of each time: the sum of its weights, or the number of its cells without any."""
        return (
            np.array(self.counts, dtype=np.float64)
            if self.weights is None
            else np.array([w.sum() for w in self.weights])
        )

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        count = lambda n, word: f"{n} {word}{'s' if n != 1 else ''}"
        shown = [f"{t:g}: {n}" for t, n in zip(self.times, self.counts)]
        shown = shown if len(shown) <= 12 else [*shown[:10], "...", shown[-1]]
        extras = (
            []
            if self.labels is None
            else [count(len({x for x in np.concatenate(self.labels).tolist() if not is_missing(x)}), "label")]
        )
        extras += [] if self.weights is None else ["weights"]
        scaling = ""
        if self.is_standardised:
            one = not self.shift.any() and (self.scale == self.scale[0]).all()
            scaling = f"; all divided by {self.scale[0]:.4g}" if one else "; each component standardised"
        return (
            f"Snapshots: {count(self.num_cells, 'cell')} of {count(self.dim, 'component')} at {len(self)} times "
            f"({', '.join(shown)})" + (f", with {' and '.join(extras)}" if extras else "") + scaling + "."
        )

    def position(self, time: float) -> int:
        """Which of the times this is; equal up to rounding in float32 will do.

        Raises:
            ValueError: if there is no such time, listing those there are.
        """
        gaps = np.abs(self.times - float(time))
        if not gaps.min() <= 1e-6 * max(1.0, abs(float(time))):
            raise ValueError(f"There are no cells at time {time!r}; the times are {self.times.tolist()}.")
        return int(np.argmin(gaps))

    def at(self, time: float) -> Float[np.ndarray, "n d"]:
        """The cells of one time, shape (n, d).

        Raises:
            ValueError: if there is no such time, listing those there are.
        """
        return self.samples[self.position(time)]

    def pairs(self) -> list[tuple[tuple[float, np.ndarray], tuple[float, np.ndarray]]]:
        """Consecutive times with their cells: T - 1 pairs ``((t0, x0), (t1, x1))``."""
        ends = [(float(t), x) for t, x in zip(self.times, self.samples)]
        return list(zip(ends[:-1], ends[1:]))

    # A part of it

    def _pick(self, positions: Sequence[int], rows: Sequence[Any] | None = None) -> "Snapshots":
        """Some of the times, and at each of them some of its cells."""
        rows = [slice(None)] * len(positions) if rows is None else rows
        pick = lambda arrays: None if arrays is None else [arrays[i][r] for i, r in zip(positions, rows)]
        return dataclasses.replace(
            self,
            times=self.times[list(positions)],
            samples=pick(self.samples),
            weights=pick(self.weights),
            labels=pick(self.labels),
            index=pick(self.index),
        )

    def take(self, times: Sequence[float]) -> "Snapshots":
        """The same with these times alone.

        Raises:
            ValueError: if one of them is not there, or they are fewer than two or do not increase.
        """
        return self._pick([self.position(t) for t in times])

    def drop(self, time: float) -> "Snapshots":
        """The same without the cells of one time.

        Raises:
            ValueError: if there is no such time, or fewer than two would be left.
        """
        out = self.position(time)
        return self._pick([i for i in range(len(self)) if i != out])

    def keep(self, dims: int) -> "Snapshots":
        """The first ``dims`` components of every cell: of principal components, those that vary most.

        Raises:
            TypeError: if ``dims`` is not an integer.
            ValueError: if it is below 1, or above what there is.
        """
        if check_count(dims, "dims", 1) > self.dim:
            raise ValueError(f"dims must be at most {self.dim}, the number of components, got {dims}.")
        return dataclasses.replace(
            self,
            samples=[frozen(np.ascontiguousarray(x[:, :dims])) for x in self.samples],
            names=None if self.names is None else self.names[:dims],
            shift=self.shift[:dims],
            scale=self.scale[:dims],
        )

    def subsample(self, n: int, *, key: PRNGKeyArray) -> "Snapshots":
        """At most ``n`` cells of each time, drawn without replacement and kept in their order.

        What is drawn at a time depends on the key and the time alone. Weights grow by n_i / n, so that the mass of a
        time stays the same on average.

        Arguments:
            n: how many, at least 2; a time with fewer keeps all.
            key: a JAX key.

        Raises:
            TypeError: if ``n`` is not an integer, or ``key`` not a JAX key.
            ValueError: if ``n`` is below 2.

        Example:
            >>> from sdeflow.data import Snapshots
            >>> import jax, numpy as np
            >>> cells = Snapshots([0.0, 1.0], [np.zeros((40, 2)), np.zeros((9, 2))])
            >>> cells.subsample(10, key=jax.random.key(0)).counts
            (10, 9)
        """
        n = check_count(n, "n", 2)
        rows = [
            np.sort(rng.choice(count, size=min(n, count), replace=False))
            for count, rng in zip(self.counts, generators(key, SUBSAMPLE, self.times))
        ]
        picked = self._pick(range(len(self)), rows)
        if picked.weights is None:
            return picked
        weights = [w * (count / len(w)) for w, count in zip(picked.weights, self.counts)]
        return dataclasses.replace(picked, weights=weights)

    # Units

    @property
    def is_standardised(self) -> bool:
        """Whether the samples are in other units than they came in."""
        return bool(self.shift.any() or (self.scale != 1).any())

    def standardise(
        self, kind: Literal["per_dim", "scalar"] = "per_dim", *, like: "Snapshots | None" = None
    ) -> "Snapshots":
        """The same in units of order one: ``internal = (user - shift) / scale``.

        The moments are those of the cells of all times together, unweighted.

        Arguments:
            kind: "per_dim" gives every component mean 0 and standard deviation 1, and leaves the scale of a constant
                one alone. "scalar" divides all by one number, the mean over the components of their standard
                deviations, so that directions and ratios of distances stay; it does not shift.
            like: take the shift and the scale of this set, or of its cells if it has none yet.

        Raises:
            ValueError: for another ``kind``, or if ``like`` has another number of components.

        Example:
            >>> from sdeflow.data import Snapshots
            >>> cells = Snapshots([0.0, 1.0], [[[1.0, 0.0], [3.0, 0.0]], [[5.0, 4.0], [7.0, 4.0]]])
            >>> scaled = cells.standardise("scalar")
            >>> scaled.scale.round(3).tolist(), scaled.unstandardise(scaled.at(1.0)).round(12).tolist()
            ([2.118, 2.118], [[5.0, 4.0], [7.0, 4.0]])
        """
        if kind not in ("per_dim", "scalar"):
            raise ValueError(f'kind must be "per_dim" or "scalar", got {kind!r}.')
        source = self if like is None else like
        if source.dim != self.dim:
            raise ValueError(f"like has {source.dim} components, but these snapshots have {self.dim}.")
        shift, scale = source.shift, source.scale
        if like is None or not like.is_standardised:
            mean, deviation = deviations(np.concatenate(source.samples))
            mean, deviation = shift + scale * mean, scale * deviation
            if kind == "scalar":
                shift, scale = np.zeros(self.dim), np.full(self.dim, deviation.mean() or 1.0)
            else:
                shift, scale = mean, np.where(deviation > 0, deviation, scale)
        samples = [((self.unstandardise(x) - shift) / scale).astype(x.dtype) for x in self.samples]
        return dataclasses.replace(self, samples=samples, shift=shift, scale=scale)

    def unstandardise(self, x: Any) -> Any:
        """Points of shape (..., d), of this set or made by a model of it, in the user's units: ``shift + scale x``."""
        return x * self.scale + self.shift

    def padded(self, size: int | None = None) -> tuple[Float[np.ndarray, "T n d"], Float[np.ndarray, "T n"]]:
        """All times as one array, so that one compiled program serves them all.

        Arguments:
            size: the cells to pad each time to; by default as many as the largest has.

        Returns:
            The cells, shape (T, n, d), each time filled up with repeats of its first cell, which keep distances
            finite and in range; and their weights, shape (T, n), one for each cell if there are none, zero where
            filled up.

        Raises:
            ValueError: if ``size`` is below what the largest time has.

        Example:
            >>> from sdeflow.data import Snapshots
            >>> values, weights = Snapshots([0.0, 1.0], [[[1.0], [2.0], [3.0]], [[4.0], [5.0]]]).padded()
            >>> values[..., 0].tolist(), weights.tolist()
            ([[1.0, 2.0, 3.0], [4.0, 5.0, 4.0]], [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
        """
        size = max(self.counts) if size is None else check_count(size, "size", 2)
        if size < max(self.counts):
            raise ValueError(f"size={size} is below {max(self.counts)}, the number of cells at the largest time.")
        values = np.empty((len(self), size, self.dim), np.result_type(*self.samples))
        weights = np.zeros((len(self), size), values.dtype)
        for i, x in enumerate(self.samples):
            values[i, : len(x)], values[i, len(x) :] = x, x[0]
            weights[i, : len(x)] = 1.0 if self.weights is None else self.weights[i]
        return values, weights
