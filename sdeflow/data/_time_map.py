"""The affine map between the user's times and internal times of order one.

    internal = (user - shift) / scale

Float32 cannot tell Unix seconds apart, and a solver walks in float32 by default, so the shift is taken in the
user's own numbers (integers for dates) and the division in float64, once, on the host.
"""

import dataclasses
import datetime
from typing import Any

import numpy as np

_COARSE = ("Y", "M", "W", "D", "h", "m", "s", "ms")


def as_time_array(times: Any, where: str) -> np.ndarray:
    """Numbers (float64 or int64), datetime64 or timedelta64; dates coarser than microseconds become those.

    Raises:
        TypeError: if the entries are neither numbers nor dates nor durations.
    """
    array = np.asarray(times)
    if array.dtype == object and array.size:
        array = _from_objects(array, where)
    if array.dtype.kind in "Mm":
        unit = np.datetime_data(array.dtype)[0]
        return array.astype(f"{array.dtype.kind}8[us]") if unit in (*_COARSE, "generic") else array
    if array.dtype.kind not in "iuf":
        raise TypeError(f"{where}: times must be numbers, datetime64 or timedelta64, got {array.dtype}; convert them.")
    # Integers stay integers until the shift: nanoseconds since 1970 do not fit into a float64.
    return array.astype(np.int64 if array.dtype.kind == "i" else np.float64)


def _from_objects(array: np.ndarray, where: str) -> np.ndarray:
    first = array.flat[0]
    try:
        if isinstance(first, datetime.datetime) and first.tzinfo is not None:
            utc = [x.astimezone(datetime.UTC).replace(tzinfo=None) for x in array.flat]
            return np.array(utc, dtype="datetime64[us]").reshape(array.shape)
        if isinstance(first, datetime.date | np.datetime64):
            return array.astype("datetime64[us]")
        if isinstance(first, datetime.timedelta | np.timedelta64):
            return array.astype("timedelta64[us]")
        if not any(isinstance(x, str | bytes) for x in array.flat):
            return array.astype(np.float64)
    except (TypeError, ValueError, AttributeError):
        pass
    raise TypeError(f"{where}: times must be numbers or dates, got {first!r} among them; convert them first.")


@dataclasses.dataclass(frozen=True, eq=False)
class TimeMap:
    """``internal = (user - shift) / scale``, with one shift for all series or one for each.

    Arguments:
        shift: shape () or (N,), in raw numbers: int64 counts of the unit for dates and durations.
        scale: a positive number of the same unit.
        dtype: the user's datetime64 or timedelta64 dtype; None for plain numbers.
    """

    shift: np.ndarray
    scale: float
    dtype: np.dtype | None

    @property
    def per_series(self) -> bool:
        """Whether every series has a shift of its own."""
        return self.shift.ndim == 1

    def take(self, index: np.ndarray) -> "TimeMap":
        """The map of the series at these positions."""
        return dataclasses.replace(self, shift=self.shift[index]) if self.per_series else self

    def following(self, other: "TimeMap") -> "TimeMap":
        """The map of another data set, except for the shifts if those belong to the series.

        Raises:
            TypeError: if one has dates and the other numbers, or dates of another unit.
            ValueError: if only one has a shift for each series.
        """
        if self.dtype != other.dtype:
            mine, theirs = (str(x.dtype or "plain numbers") for x in (self, other))
            raise TypeError(f"like has times of {theirs}, these series of {mine}; convert one of them.")
        if self.per_series != other.per_series:
            raise ValueError("like was read with another align=; pass the same to both.")
        return dataclasses.replace(self, scale=other.scale, shift=self.shift if self.per_series else other.shift)

    def raw(self, t: Any) -> np.ndarray:
        """User times as plain numbers in the unit of the data.

        Raises:
            TypeError: if dates are given where the data have numbers, or the other way round.
            ValueError: if a time is NaN or NaT.
        """
        if self.dtype is not None and isinstance(t, str):
            t = np.datetime64(t)
        array = as_time_array(t, "t")
        if (array.dtype.kind in "Mm" or self.dtype is not None) and array.dtype.kind != getattr(
            self.dtype, "kind", None
        ):
            raise TypeError(
                f"t is of dtype {array.dtype} but the times of the data are "
                f"{'plain numbers' if self.dtype is None else self.dtype}: pass t in the same kind."
            )
        if np.isnan(array).any():
            raise ValueError("t must not be NaN or NaT.")
        return array if self.dtype is None else array.astype(self.dtype).astype(np.int64)

    def offset(self, shape: tuple[int, ...], i: Any) -> np.ndarray:
        """The shift of the series ``i``, made to line up with times of this shape."""
        if not self.per_series:
            return self.shift
        if i is None:
            raise ValueError('The data were read with align="start": say which series the times belong to with i=.')
        shift = self.shift[i]
        if shift.shape != shape[: shift.ndim]:
            raise ValueError(f"i has shape {shift.shape}, which must lead the shape of the times, {shape}.")
        return shift.reshape(shift.shape + (1,) * (len(shape) - shift.ndim))

    def to_internal(self, raw: np.ndarray, shift: np.ndarray) -> np.ndarray:
        """Raw user numbers to internal times; the only place where the division is done."""
        return (raw - shift).astype(np.float64) / self.scale

    def to_user(self, internal: np.ndarray, shift: np.ndarray) -> np.ndarray:
        """Internal times to user times, as dates (rounded to the unit) if the user gave dates."""
        span = internal * self.scale
        if self.dtype is None:
            return shift + span
        return (shift + np.rint(span).astype(np.int64)).astype(self.dtype)


def fit_time_map(raw: np.ndarray, offsets: np.ndarray, dtype: np.dtype | None, align: str) -> TimeMap:
    """The map whose scale is the longest span of a series, so that spans become at most 1."""
    first, last = raw[offsets[:-1]], raw[offsets[1:] - 1]
    span = float((last - first).max())
    shift = first.copy() if align == "start" else np.asarray(first.min())
    return TimeMap(shift=shift, scale=span if span > 0 else 1.0, dtype=dtype)
