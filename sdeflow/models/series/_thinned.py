"""``Thinned``: training data that hide other observations in every epoch."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from jaxtyping import PRNGKeyArray

from ...data import SeriesBatch, TimeSeries
from ...data._batch import check_size
from ...data._random import DROP, generator


@dataclasses.dataclass(frozen=True)
class Thinned:
    """A data set to train on, of which every epoch hides another random share of the observations.

    The share is uniform between 0 and ``at_most``, and what is hidden is drawn anew for every epoch from its key. A
    model that never sees the same gaps twice cannot learn them by heart, which matters most where the series are few.

    Arguments:
        data: the series.
        at_most: the largest share to hide, in [0, 1).
        per: what to hide, as in `sdeflow.data.TimeSeries.drop_observations`.

    Raises:
        TypeError: if ``data`` is no TimeSeries.
        ValueError: for a share outside [0, 1), or another ``per``.

    Example:
        >>> import jax, numpy as np, sdeflow as sf
        >>> data = sf.TimeSeries.from_arrays([np.arange(10.0)] * 4, [np.ones((10, 3))] * 4)
        >>> epochs = sf.models.Thinned(data, 0.5)
        >>> hidden = [~next(epochs.batches(4, key=jax.random.key(e))).mask for e in range(2)]
        >>> bool(hidden[0].any()), bool((hidden[0] != hidden[1]).any())
        (True, True)
    """

    data: TimeSeries
    at_most: float
    per: Literal["channel", "step"] = "channel"

    def __post_init__(self):
        if not isinstance(self.data, TimeSeries):
            raise TypeError(f"data must be a TimeSeries, got {type(self.data).__name__}.")
        if not 0 <= self.at_most < 1:
            raise ValueError(f"at_most must lie in [0, 1), got {self.at_most!r}.")
        if self.per not in ("channel", "step"):
            raise ValueError(f'per must be "channel" or "step", got {self.per!r}.')

    def batches(self, size: int, key: PRNGKeyArray | None = None) -> Iterator[SeriesBatch]:
        """One epoch, as `sdeflow.data.TimeSeries.batches` gives it; without a key nothing is hidden."""
        if key is None:
            return self.data.batches(size)
        # Every epoch is a data set of its own, which would warn anew of a size beyond the series there are.
        size = check_size(size, self.data)
        share = self.at_most * generator(key, DROP).random()
        return self.data.drop_observations(share, key=key, per=self.per).batches(size, key)

    def fingerprint(self) -> str:
        """A digest of the data and of what is hidden: what a checkpoint compares before it resumes."""
        return f"{self.data.fingerprint()}, at most {self.at_most} hidden per {self.per}"
