"""``Samples``: arrays of independent samples, such as images or points, as data for `sdeflow.fit`."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import equinox as eqx
import jax.tree_util as jtu
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from ._batch import check_size, plan_epoch
from ._choices import split_positions
from ._random import SHUFFLE, generator


class SamplesBatch(eqx.Module):
    """``B`` samples; what `Samples.batches` yields.

    Arguments:
        values: shape (B, *shape).
        args: what belongs to each sample, leaves of shape (B, ...), or None.
        ids: shape (B,), the position of each sample in its data set.
        weight: shape (B,), 1 for a sample and 0 for a filler row, which repeats the first one of the batch.
    """

    values: Float[Array | np.ndarray, "B ..."]
    args: PyTree
    ids: Any
    weight: Any


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Samples:
    """Independent samples of one shape, and what is known of each; ``len(samples)`` is their number.

    Arguments:
        values: shape (N, *shape), real numbers; they stay on the host.
        args: a pytree with leaves of shape (N, ...), e.g. classes, which a denoiser gets as its ``args``; or None.

    Raises:
        TypeError: if the values are not real floating numbers.
        ValueError: if there are none, one is not finite, or a leaf of ``args`` has another length.

    Example:
        >>> import numpy as np, sdeflow as sf
        >>> points = sf.data.Samples(np.zeros((5, 2), np.float32), args=np.arange(5))
        >>> [batch.args.tolist() for batch in points.batches(3)]
        [[0, 1, 2], [3, 4, 3]]
    """

    values: Any
    args: PyTree = None

    def __post_init__(self):
        values = np.asarray(self.values)
        if values.dtype.kind != "f":
            raise TypeError(f"values must be real floating numbers, got dtype {values.dtype}: convert them first.")
        if values.ndim < 1 or len(values) == 0:
            raise ValueError(f"values must hold a row for each sample, got shape {values.shape}.")
        finite = np.isfinite(values.reshape(len(values), -1)).all(axis=1)
        if not finite.all():
            raise ValueError(f"{(~finite).sum()} of {len(values)} samples are not finite, first {np.argmin(finite)}.")
        args = jtu.tree_map(np.asarray, self.args)
        for path, leaf in jtu.tree_leaves_with_path(args):
            if leaf.shape[:1] != values.shape[:1]:
                raise ValueError(
                    f"args{jtu.keystr(path)} must have a row for each of the {len(values)} samples, got shape "
                    f"{leaf.shape}."
                )
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "args", args)

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        return f"Samples: {len(self)} of shape {self.values.shape[1:]}, {self.values.dtype}"

    def __getitem__(self, index: Any) -> "Samples":
        rows = np.atleast_1d(np.arange(len(self))[index])
        return Samples(self.values[rows], jtu.tree_map(lambda x: x[rows], self.args))

    def split(self, fraction: float, *, key: PRNGKeyArray) -> tuple["Samples", ...]:
        """Two sets: a ``fraction`` of the samples, and the rest.

        Arguments:
            fraction: the share of the first set, between 0 and 1; or the shares of all sets, which add up to 1.
            key: a JAX key.

        Raises:
            TypeError: if ``key`` is not a JAX key.
            ValueError: if one of the sets would be empty, or the shares do not add up to 1.
        """
        return tuple(self[rows] for rows in split_positions(range(len(self)), None, fraction, key))

    def batches(self, size: int, key: PRNGKeyArray | None = None) -> Iterator[SamplesBatch]:
        """One epoch: every sample once, in batches of exactly ``size`` rows.

        The last batch is filled up with repeats of its first sample, of weight 0.

        Arguments:
            size: B, the rows of a batch; more than there are samples means all of them, with a warning.
            key: shuffles the samples. None keeps their order.

        Raises:
            TypeError: if ``size`` is not an integer, or ``key`` not a JAX key.
            ValueError: if ``size`` is below 1.
        """
        size = check_size(size, self, "samples")
        rng = None if key is None else generator(key, SHUFFLE)
        plan = plan_epoch(np.zeros(len(self), int), 1, size, rng)
        return (
            SamplesBatch(self.values[rows], jtu.tree_map(lambda x, i=rows: x[i], self.args), rows, weight)
            for _, rows, weight in plan
        )
