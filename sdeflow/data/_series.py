"""`TimeSeries`: ragged, irregular series on the host, and the batches that training takes from them."""

import dataclasses
import functools
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from ._assemble import assemble, check_channels
from ._batch import SeriesBatch, check_size, plan_epoch
from ._buckets import choose_buckets, other_buckets
from ._choices import drop, split_positions
from ._insert import insert_rows
from ._intensity import counts, mean_counts
from ._long import split_long
from ._moments import moments
from ._random import SHUFFLE, generator
from ._read import check_observed
from ._summary import digest, summary
from ._time_map import TimeMap

_NUM_BUCKETS = 3


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TimeSeries:
    """An immutable set of time series, each with its own times, its own length and its own gaps.

    Build one with `TimeSeries.from_arrays` or `TimeSeries.from_long`. Every method returns a new set. Times
    are kept as internal times of order one, ``internal = (user - time_shift) / time_scale``, because float32
    resolves no others; values are kept in float64 and reach batches as float32.

    ``data[i]``, ``data[2:5]`` and ``data[positions]`` are sets again; ``len(data)`` is the number of series.

    Example:
        >>> from sdeflow.data import TimeSeries
        >>> import jax
        >>> data = TimeSeries.from_arrays(
        ...     times=[[0.0, 1.0, 4.0], [2.0, 3.0]],
        ...     values=[[[1.0, 2.0], [float("nan"), 2.5], [3.0, 1.0]], [[0.0, 1.0], [1.0, 0.0]]],
        ...     labels=["up", "down"],
        ... )
        >>> data.num_series, data.num_channels, data.lengths.tolist(), data.classes
        (2, 2, [3, 2], ('down', 'up'))
        >>> for batch in data.batches(2, jax.random.key(0)):
        ...     print(batch.values.shape, batch.weight.tolist())
        (2, 3, 2) [1.0, 1.0]
    """

    _times: Float[np.ndarray, " T"]
    _values: Float[np.ndarray, "T C"]
    _offsets: Int[np.ndarray, " N1"]
    _time_map: TimeMap
    ids: tuple[Hashable, ...]
    buckets: tuple[int, ...]
    value_shift: Float[np.ndarray, " C"]
    value_scale: Float[np.ndarray, " C"]
    labels: Int[np.ndarray, " N"] | None = None
    classes: tuple[Hashable, ...] | None = None
    targets: Float[np.ndarray, "N k"] | None = None
    static: Float[np.ndarray, "N s"] | None = None
    has_intensity: bool = False

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if isinstance(array := getattr(self, field.name), np.ndarray):
                array.flags.writeable = False

    # Construction

    @classmethod
    def from_arrays(
        cls,
        times: Sequence[Any],
        values: Sequence[Any],
        *,
        labels: Sequence[Hashable] | None = None,
        targets: Any = None,
        static: Any = None,
        ids: Sequence[Hashable] | None = None,
        duplicates: Literal["error", "mean", "last"] = "error",
        align: Literal["global", "start"] = "global",
        like: "TimeSeries | None" = None,
    ) -> "TimeSeries":
        """A data set from lists of arrays, one pair of arrays for each series.

        Arguments:
            times: N arrays of shape (L_i,), strictly increasing: numbers, datetime64 or timedelta64. Dates
                coarser than microseconds are kept in microseconds; times with a zone become UTC.
            values: N arrays of shape (L_i, C), or (L_i,) for C = 1; NaN where missing. Integers and booleans
                are read as floats.
            labels: N class labels of any hashable kind, numbered 0..K-1 in sorted order.
            targets: shape (N, k) or (N,), numbers to predict.
            static: shape (N, s) or (N,), covariates that do not change in time.
            ids: N distinct names (integers or strings, say); 0..N-1 by default. Names, not positions, decide
                what random methods do to a series.
            duplicates: what to do with rows of equal time: refuse them, or take per channel the mean or the
                last of the observed values.
            align: "global" measures all times from the earliest; "start" each series from its own first time,
                for data whose absolute dates mean nothing.
            like: take the map of times and the classes from this set; for test data, so that one unit of
                internal time means the same in both.

        Raises:
            TypeError: for values that are not real numbers (naming the column), or times of mixed kinds.
            ValueError: for no series, empty series, series without any observation, shapes or lengths that
                disagree, times that are not finite or not increasing, infinite values, or times so close that
                float32 cannot tell them apart after the map.

        Example:
            >>> from sdeflow.data import TimeSeries
            >>> import numpy as np
            >>> days = [np.array(["2024-01-01", "2024-01-03"], "datetime64[D]")]
            >>> data = TimeSeries.from_arrays(days, [[1.0, 2.0]])
            >>> data.times[0].tolist(), str(data.to_user_time(0.5))
            ([0.0, 1.0], '2024-01-02T00:00:00.000000')
        """
        return cls._build(times, values, labels, None, targets, static, ids, duplicates, align, like)

    @classmethod
    def from_long(
        cls,
        frame: Any,
        *,
        id: str,
        time: str,
        values: str | Sequence[str],
        label: str | None = None,
        targets: str | Sequence[str] | None = None,
        static: str | Sequence[str] | None = None,
        duplicates: Literal["error", "mean", "last"] = "error",
        align: Literal["global", "start"] = "global",
        like: "TimeSeries | None" = None,
    ) -> "TimeSeries":
        """A data set from a table with one row for each series and time: pandas, polars or a dict of columns.

        Rows may stand in any order, since a table has none: they are sorted by time within each series.
        Series come in the order in which their ids first occur.

        Arguments:
            frame: a table whose ``frame[name]`` is a column.
            id: the column that names the series.
            time: the column of times.
            values: the column, or columns, of values; missing entries become NaN.
            label: the column of class labels, constant within each series.
            targets: the column, or columns, of numbers to predict, constant within each series.
            static: the column, or columns, of covariates that do not change in time.
            duplicates: as in `TimeSeries.from_arrays`, and so are the next two.
            align: from which time to measure.
            like: a set to take the map of times and the classes from.

        Raises:
            TypeError: if a column of numbers is not numeric, naming the column.
            ValueError: for a column that is not there, missing ids or times, a label, target or covariate that
                changes within a series, and all that `TimeSeries.from_arrays` refuses.

        Example:
            >>> from sdeflow.data import TimeSeries
            >>> table = {"who": ["a", "b", "a"], "t": [1.0, 0.0, 0.0], "x": [3.0, 2.0, 1.0]}
            >>> data = TimeSeries.from_long(table, id="who", time="t", values="x")
            >>> data.ids, data.values[0].tolist()
            (('a', 'b'), [[1.0], [3.0]])
        """
        times, rows, ids, labels, tables = split_long(
            frame, id, time, values, label, {"targets": targets, "static": static}
        )
        return cls._build(times, rows, labels, None, tables["targets"], tables["static"], ids, duplicates, align, like)

    @classmethod
    def _build(cls, times, values, labels, classes, targets, static, ids, duplicates, align, like) -> "TimeSeries":
        fields = assemble(times, values, labels, classes, targets, static, ids, duplicates, align, like)
        return cls(buckets=choose_buckets(np.diff(fields["_offsets"]), _NUM_BUCKETS), **fields)

    # What is in it

    @property
    def num_series(self) -> int:
        """N, the number of series."""
        return len(self.ids)

    @property
    def num_channels(self) -> int:
        """C, the number of channels, those of `TimeSeries.with_intensity` included."""
        return self._values.shape[1]

    @property
    def num_measured(self) -> int:
        """The number of channels without those of `TimeSeries.with_intensity`, which come last."""
        return self.num_channels // 2 if self.has_intensity else self.num_channels

    @functools.cached_property
    def lengths(self) -> Int[np.ndarray, " N"]:
        """Shape (N,), the number of time steps of each series."""
        lengths = np.diff(self._offsets)
        lengths.flags.writeable = False
        return lengths

    @functools.cached_property
    def times(self) -> tuple[Float[np.ndarray, " L"], ...]:
        """The internal times of each series, shape (L_i,), float64."""
        return tuple(np.split(self._times, self._offsets[1:-1]))

    @functools.cached_property
    def values(self) -> tuple[Float[np.ndarray, "L C"], ...]:
        """The values of each series, shape (L_i, C), NaN where missing."""
        return tuple(np.split(self._values, self._offsets[1:-1]))

    def fingerprint(self) -> str:
        """A digest of times, values, gaps, labels and the time map: what a checkpoint compares before it resumes.

        Example:
            >>> from sdeflow.data import TimeSeries
            >>> one, two = TimeSeries.from_arrays([[0.0]], [[1.0]]), TimeSeries.from_arrays([[0.0]], [[2.0]])
            >>> one.fingerprint() == one.fingerprint(), one.fingerprint() == two.fingerprint()
            (True, False)
        """
        return digest(self)

    def __len__(self) -> int:
        return self.num_series

    def __getitem__(self, index: Any) -> "TimeSeries":
        if isinstance(index, int | np.integer) and not -len(self) <= index < len(self):
            raise IndexError(f"There are {len(self)} series, so none at position {index}.")
        positions = np.atleast_1d(np.arange(len(self))[index])
        if positions.size == 0:
            raise ValueError("The selection is empty, but a TimeSeries needs at least one series.")
        lengths = self.lengths[positions]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        rows = np.arange(offsets[-1]) + np.repeat(self._offsets[positions] - offsets[:-1], lengths)
        pick = lambda array: None if array is None else array[positions]
        return dataclasses.replace(
            self,
            _times=self._times[rows],
            _values=self._values[rows],
            _offsets=offsets,
            _time_map=self._time_map.take(positions),
            ids=tuple(self.ids[i] for i in positions),
            labels=pick(self.labels),
            targets=pick(self.targets),
            static=pick(self.static),
        )

    def __repr__(self) -> str:
        return summary(self)

    # Times

    @property
    def time_shift(self) -> Any:
        """What internal time 0 is in user time: a scalar, or shape (N,) with ``align="start"``."""
        shift = (
            self._time_map.shift if self._time_map.dtype is None else self._time_map.shift.astype(self._time_map.dtype)
        )
        return shift if self._time_map.per_series else shift[()]

    @property
    def time_scale(self) -> float:
        """How many of the user's units (of `time_dtype`, for dates) make one unit of internal time."""
        return self._time_map.scale

    @property
    def time_dtype(self) -> np.dtype | None:
        """The datetime64 or timedelta64 dtype of the user's times; None for plain numbers."""
        return self._time_map.dtype

    def to_user_time(self, t: Any, i: Any = None) -> Any:
        """Internal times to the user's: ``time_shift + time_scale t``, as dates if the data came with dates.

        Arguments:
            t: internal times of any shape.
            i: with ``align="start"``, the position of the series they belong to, or an array of positions
                whose shape leads that of ``t``.

        Raises:
            ValueError: if ``i`` is needed and missing, or its shape does not lead that of ``t``.

        Example:
            >>> from sdeflow.data import TimeSeries
            >>> data = TimeSeries.from_arrays([[10.0, 20.0]], [[0.0, 1.0]])
            >>> float(data.to_user_time(0.5)), float(data.to_internal_time(15.0))
            (15.0, 0.5)
        """
        t = np.asarray(t, dtype=np.float64)
        return self._time_map.to_user(t, self._time_map.offset(t.shape, i))[()]

    def to_internal_time(self, t: Any, i: Any = None) -> Any:
        """The user's times to internal ones: ``(t - time_shift) / time_scale``, in float64.

        Arguments:
            t: user times of any shape: numbers, dates or durations as in the data.
            i: as in `TimeSeries.to_user_time`.

        Raises:
            TypeError: if ``t`` is not of the kind of the data's times.
            ValueError: if ``t`` is missing, or ``i`` is needed and missing.
        """
        raw = self._time_map.raw(t)
        return self._time_map.to_internal(raw, self._time_map.offset(raw.shape, i))[()]

    def until(self, t: Any) -> "TimeSeries":
        """Only the time steps up to and including the user time ``t``: the past of a forecast.

        Arguments:
            t: a user time, or shape (N,), one for each series.

        Raises:
            ValueError: if a series has no observation up to then, naming it.

        Example:
            >>> from sdeflow.data import TimeSeries
            >>> data = TimeSeries.from_arrays([[0.0, 1.0, 2.0], [0.0, 3.0]], [[1, 2, 3], [4, 5]])
            >>> data.until(1.0).lengths.tolist()
            [2, 1]
        """
        raw = self._time_map.raw(t)
        if raw.ndim > 1 or (raw.ndim == 1 and raw.size != len(self)):
            raise ValueError(f"t must be a scalar or of shape ({len(self)},), got shape {raw.shape}.")
        limits = self._time_map.to_internal(raw, self._time_map.shift)
        if raw.dtype.kind == "f":
            # What `to_user_time` said of a row is that row, though it was rounded on the way.
            limits = limits + 2 * np.spacing(np.abs(raw) + np.abs(self._time_map.shift)) / self._time_map.scale
        limits = np.broadcast_to(limits, (len(self),))
        keep = self._times <= np.repeat(limits, self.lengths)
        offsets = np.concatenate([[0], np.cumsum(keep)])[self._offsets]
        values = self._values[keep]
        check_observed(
            values[:, : self.num_measured], offsets, self.ids, f"take a later time than {t}, or leave these series out"
        )
        buckets = choose_buckets(np.diff(offsets), len(self.buckets))
        return dataclasses.replace(self, _times=self._times[keep], _values=values, _offsets=offsets, buckets=buckets)

    def with_times(self, ts: Any, *, beyond: bool = False) -> tuple["TimeSeries", Int[np.ndarray, "N T"]]:
        """The same series with rows of missing values at further times, and where those rows are.

        A time at which a series has a row already gets no other.

        Arguments:
            ts: shape (T,) or (N, T), increasing user times, none before the first of a series.
            beyond: whether all of them must come after the last time of a series.

        Raises:
            ValueError: for another shape, times that do not increase, or one too early, naming the series.

        Example:
            >>> from sdeflow.data import TimeSeries
            >>> data, places = TimeSeries.from_arrays([[0.0, 2.0]], [[1.0, 2.0]]).with_times([1.0, 2.0])
            >>> data.times[0].tolist(), places.tolist()
            ([0.0, 0.5, 1.0], [[1, 2]])
        """
        raw = np.atleast_1d(self._time_map.raw(ts))
        if raw.ndim > 2 or raw.size == 0 or (raw.ndim == 2 and raw.shape[0] != len(self)):
            raise ValueError(f"ts must be of shape (T,) or ({len(self)}, T) with T >= 1, got {raw.shape}.")
        raw = np.broadcast_to(raw, (len(self), raw.shape[-1]))
        if (np.diff(raw, axis=1) <= 0).any():
            raise ValueError("ts must increase strictly; sort the times and leave out repeats.")
        wanted = self._time_map.to_internal(raw, self._time_map.offset(raw.shape, np.arange(len(self))))
        own = [x[:, : self.num_measured] for x in self.values]
        times, values, lengths, places = insert_rows(self.times, own, wanted, self.ids, beyond)
        changed = dataclasses.replace(
            self,
            _times=times,
            _values=values,
            _offsets=np.concatenate([[0], np.cumsum(lengths)]),
            buckets=choose_buckets(lengths, len(self.buckets)),
        )
        if self.has_intensity:
            changed = dataclasses.replace(changed, _values=changed._counted(values))
        return changed, places

    # Values

    def standardise(self, like: "TimeSeries | None" = None) -> "TimeSeries":
        """Every channel shifted and scaled to mean 0 and standard deviation 1 over its observed values.

            internal = (user - value_shift) / value_scale

        A channel that is constant, or never observed, keeps its scale, and so do counts of observations.

        Arguments:
            like: take the shift and scale of this set (the training data) instead of one's own.

        Raises:
            ValueError: if ``like`` has another number of channels.

        Example:
            >>> from sdeflow.data import TimeSeries
            >>> train = TimeSeries.from_arrays([[0.0, 1.0]], [[10.0, 30.0]]).standardise()
            >>> train.values[0].tolist(), train.to_user_values(train.values[0]).tolist()
            ([[-1.0], [1.0]], [[10.0], [30.0]])
        """
        source, own = self if like is None else like, self.num_measured
        check_channels(source, own)
        shift, scale = source.value_shift[:own], source.value_scale[:own]
        if like is None or not (shift.any() or (scale != 1).any()):
            mean, deviation = moments(source._values[:, :own])
            shift, scale = shift + scale * mean, scale * deviation
        values = self._values.copy()
        values[:, :own] = (self.to_user_values(values)[:, :own] - shift) / scale
        return dataclasses.replace(
            self,
            _values=values,
            value_shift=np.append(shift, self.value_shift[own:]),
            value_scale=np.append(scale, self.value_scale[own:]),
        )

    def to_user_values(self, values: Any) -> Any:
        """Values of shape (..., C) in the user's units: ``value_shift + value_scale values``."""
        return values * self.value_scale + self.value_shift

    def drop_observations(
        self, fraction: float, *, key: PRNGKeyArray, per: Literal["channel", "step"] = "channel"
    ) -> "TimeSeries":
        """A share of the observed values set to NaN at random; the time steps themselves stay.

        What is dropped from a series depends on the key and the series' id alone, not on its position. At
        least one observation of each series is kept. Channels of `TimeSeries.with_intensity` are counted anew, in
        the unit that they had.

        Arguments:
            fraction: the share to drop, in [0, 1).
            key: a JAX key.
            per: "channel" drops from each channel independently; "step" drops all channels of a time step
                together.

        Raises:
            TypeError: if ``key`` is not a JAX key.
            ValueError: for a fraction outside [0, 1) or another ``per``.

        Example:
            >>> from sdeflow.data import TimeSeries
            >>> import jax, numpy as np
            >>> data = TimeSeries.from_arrays([np.arange(10.0)], [np.ones((10, 2))])
            >>> thin = data.drop_observations(0.7, key=jax.random.key(0))
            >>> np.isnan(thin.values[0]).sum(axis=0).tolist()
            [7, 7]
        """
        own = self.num_measured
        values = drop(self._values[:, :own], self._offsets, self.ids, fraction, key, per)
        return dataclasses.replace(self, _values=self._counted(values) if self.has_intensity else values)

    def with_intensity(self, like: "TimeSeries | None" = None) -> "TimeSeries":
        """The same series with, for every channel, one more that counts its observations.

            intensity(t_i) = #{j <= i : the channel is observed at t_j} / unit

        A model sees a path without gaps; the counts show it when and how often each channel was measured. They come
        after the channels, are never missing, and are causal: each counts what came up to its own time. The unit is
        the mean count at the end of a series, so that they are of order one. Batches have them in ``values`` but not
        in ``mask``, since nobody measured them. `TimeSeries.standardise` leaves them alone, before or after, and
        what `TimeSeries.drop_observations` drops, before or after, is not counted.

        Arguments:
            like: take the units of this set (the training data), whether it has its counts or not.

        Raises:
            ValueError: if there are counts already, or ``like`` has another number of channels.

        Example:
            >>> from sdeflow.data import TimeSeries
            >>> data = TimeSeries.from_arrays([[0.0, 1.0, 2.0]], [[5.0, float("nan"), 6.0]]).with_intensity()
            >>> data.num_channels, data.values[0][:, 1].tolist(), data.to_user_values(data.values[0])[:, 1].tolist()
            (2, [0.5, 0.5, 1.0], [1.0, 1.0, 2.0])
        """
        if self.has_intensity:
            raise ValueError("These series have counts of their observations already.")
        source = self if like is None else like
        own = self.num_channels
        check_channels(source, own)
        unit = source.value_scale[own:] if source.has_intensity else mean_counts(source._values, source._offsets)
        wider = dataclasses.replace(
            self,
            value_shift=np.append(self.value_shift, np.zeros(own)),
            value_scale=np.append(self.value_scale, unit),
            has_intensity=True,
        )
        return dataclasses.replace(wider, _values=wider._counted(self._values))

    def _counted(self, values: np.ndarray) -> np.ndarray:
        """Values of shape (T, C) and beside them their counts, in the units of this set."""
        return np.concatenate([values, counts(values, self._offsets) / self.value_scale[values.shape[1] :]], axis=1)

    def split(self, fraction: float | Sequence[float], *, key: PRNGKeyArray) -> tuple["TimeSeries", ...]:
        """Two sets: a ``fraction`` of the series, and the rest; of every class the same share, if labelled.

        Which series goes where depends on the key and the ids, not on their order.

        Arguments:
            fraction: the share of the first set, between 0 and 1; or the shares of all sets, which add up to 1.
            key: a JAX key.

        Raises:
            TypeError: if ``key`` is not a JAX key.
            ValueError: if one of the sets would be empty, or the shares do not add up to 1.

        Example:
            >>> from sdeflow.data import TimeSeries
            >>> import jax
            >>> data = TimeSeries.from_arrays([[0.0]] * 10, [[1.0]] * 10)
            >>> [len(part) for part in data.split(0.8, key=jax.random.key(0))]
            [8, 2]
            >>> train, validation, test = data.split([0.6, 0.2, 0.2], key=jax.random.key(0))
        """
        return tuple(self[part] for part in split_positions(self.ids, self.labels, fraction, key))

    # Batches

    def with_buckets(
        self,
        lengths: Sequence[int] | int | None = None,
        *,
        num_buckets: int | None = None,
        like: "TimeSeries | None" = None,
    ) -> "TimeSeries":
        """The same series, to be padded to other lengths; a program compiles once for each bucket it meets.

        Give one of the three. The default of a new set is ``num_buckets=3``, of which fewer are used when a
        further one would save less than a tenth of the padded work.

        Arguments:
            lengths: the lengths to pad to.
            num_buckets: choose at most this many lengths, with the least padding.
            like: share the lengths of this set, with one more for longer series if there are any.

        Raises:
            ValueError: unless exactly one is given, or if the longest series fits into no bucket.
        """
        shared = None if like is None else like.buckets
        return dataclasses.replace(self, buckets=other_buckets(self.lengths, lengths, num_buckets, shared))

    @functools.cached_property
    def _bucket(self) -> np.ndarray:
        """Shape (N,), which bucket each series belongs to."""
        return np.searchsorted(self.buckets, self.lengths)

    @functools.cached_property
    def _device_precision(self) -> tuple[np.ndarray, ...]:
        """Times, values and tables as batches carry them, converted once rather than in every batch."""
        tables = (None if table is None else table.astype(np.float32) for table in (self.targets, self.static))
        return self._times.astype(np.float32), self._values.astype(np.float32), *tables  # pyright: ignore

    def batch(
        self, positions: Any, *, length: int | None = None, weight: Float[np.ndarray, " B"] | None = None
    ) -> SeriesBatch:
        """The series at these positions as one padded batch.

        Arguments:
            positions: shape (B,), positions in this set; repeats are allowed.
            length: the length to pad to; by default the bucket of the longest of them.
            weight: shape (B,); ones by default.

        Raises:
            ValueError: if ``length`` is shorter than a series.
        """
        positions = np.atleast_1d(np.arange(len(self))[positions])
        lengths = self.lengths[positions]
        needed = int(lengths.max(initial=1))
        length = self.buckets[int(self._bucket[positions].max(initial=0))] if length is None else int(length)
        if length < needed:
            raise ValueError(f"length={length} is shorter than the longest series of the batch, {needed} time steps.")
        times, values, targets, static = self._device_precision
        steps = np.arange(length)
        rows = self._offsets[positions][:, None] + np.minimum(steps, lengths[:, None] - 1)
        inside = (steps < lengths[:, None])[..., None]
        padded = np.where(inside, values[rows], np.float32(np.nan))
        mask = ~np.isnan(padded)
        mask[..., self.num_measured :] = False
        pick = lambda array: None if array is None else array[positions]
        return SeriesBatch(
            times=times[rows],
            values=padded,
            mask=mask,
            lengths=lengths.astype(np.int32),
            labels=pick(self.labels),
            targets=pick(targets),
            static=pick(static),
            ids=positions.astype(np.int32),
            weight=np.ones(positions.size, np.float32) if weight is None else np.asarray(weight, np.float32),
        )

    def batches(self, size: int, key: PRNGKeyArray | None = None) -> Iterator[SeriesBatch]:
        """One epoch: every series once, in batches of exactly ``size`` rows and of few lengths.

        A batch holds series of one bucket. The last one of each bucket is filled up with repeats of its first
        series, of weight 0, so that shapes never change.

        Arguments:
            size: B, the rows of a batch; more than there are series means all of them, with a warning.
            key: shuffles the series within their buckets and mixes the buckets. None keeps the original order
                within each bucket, shortest bucket first.

        Raises:
            TypeError: if ``size`` is not an integer, or ``key`` not a JAX key.
            ValueError: if ``size`` is below 1.
        """
        size = check_size(size, self)
        rng = None if key is None else generator(key, SHUFFLE)
        plan = plan_epoch(self._bucket, len(self.buckets), size, rng)
        return (self.batch(rows, length=self.buckets[bucket], weight=weight) for bucket, rows, weight in plan)
