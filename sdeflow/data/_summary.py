"""What a data set says about itself: one line to read, and a digest to compare."""

import dataclasses
import hashlib
from typing import Any

import numpy as np


def summary(data: Any) -> str:
    """The ``repr`` of a `TimeSeries`."""
    count = lambda n, word, plural="s": f"{n} {word}{plural if n != 1 else ''}"
    low, high = data.lengths.min(), data.lengths.max()
    steps = count(low, "time step") if low == high else f"{low} to {high} time steps"
    channels = count(data.num_measured, "channel") + (" with intensities" if data.has_intensity else "")
    extras = [] if data.classes is None else [count(len(data.classes), "class", "es")]
    extras += [] if data.targets is None else [count(data.targets.shape[1], "target")]
    extras += [] if data.static is None else [count(data.static.shape[1], "static covariate")]
    if data._time_map.per_series:
        span = "times from each series' own start"
    else:
        ends = data.to_user_time(np.array([data._times.min(), data._times.max()]))
        low_time, high_time = (str(t) if data.time_dtype else f"{t:g}" for t in ends)
        span = f"times from {low_time} to {high_time}"
    unit = "" if data.time_dtype is None else f" {np.datetime_data(data.time_dtype)[0]}"
    padding = 1 - data.lengths.sum() / np.asarray(data.buckets)[data._bucket].sum()
    return (
        f"TimeSeries: {len(data)} series of {channels} and {steps}"
        + "".join(f", {text}" for text in extras)
        + f"; {np.isnan(data._values[:, : data.num_measured]).mean():.1%} of the values missing; {span}, "
        f"one internal unit being {data.time_scale:g}{unit}; "
        f"batches padded to {' or '.join(map(str, data.buckets))} steps ({padding:.0%} of them padding)."
    )


def digest(data: Any) -> str:
    """The fingerprint of a `TimeSeries`: a digest of all its fields."""
    found = hashlib.sha256()
    for field in dataclasses.fields(data):
        value = getattr(data, field.name)
        array = value if isinstance(value, np.ndarray) and value.dtype != object else None
        found.update(field.name.encode() + (repr(value).encode() if array is None else repr(array.dtype).encode()))
        if array is not None:
            found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()
