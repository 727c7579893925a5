"""What a `TimeSeries` is made of, read from the user's arrays and checked."""

from typing import Any

import numpy as np

from ._read import (
    check_order,
    check_resolution,
    check_values,
    flatten,
    merge_duplicates,
    read_labels,
    read_table,
)
from ._time_map import fit_time_map


def assemble(
    times: Any,
    values: Any,
    labels: Any,
    classes: Any,
    targets: Any,
    static: Any,
    ids: Any,
    duplicates: str,
    align: str,
    like: Any,
) -> dict[str, Any]:
    """The fields of a `TimeSeries`, but for its buckets; arguments and errors are those of `TimeSeries.from_arrays`."""
    if align not in ("global", "start"):
        raise ValueError(f'align must be "global" or "start", got {align!r}.')
    flat = flatten(times, values, ids)
    check_order(flat, duplicates)
    flat = merge_duplicates(flat, duplicates)
    check_values(flat)
    time_map = fit_time_map(flat.times, flat.offsets, flat.dtype, align)
    channels = flat.values.shape[1]
    if like is not None:
        check_channels(like, channels)
        time_map = time_map.following(like._time_map)
        classes = like.classes if labels is not None else classes
    shift = np.repeat(time_map.shift, np.diff(flat.offsets)) if time_map.per_series else time_map.shift
    internal = time_map.to_internal(flat.times, shift)
    check_resolution(internal, flat, time_map)
    codes, classes = read_labels(labels, classes, flat.ids)
    return {
        "_times": internal,
        "_values": flat.values,
        "_offsets": flat.offsets,
        "_time_map": time_map,
        "ids": flat.ids,
        "value_shift": np.zeros(channels),
        "value_scale": np.ones(channels),
        "labels": codes,
        "classes": classes,
        "targets": read_table(targets, "targets", flat.ids),
        "static": read_table(static, "static", flat.ids),
    }


def check_channels(like: Any, channels: int) -> None:
    """Refuse a set with another number of channels."""
    if like.num_measured != channels:
        raise ValueError(f"like has {like.num_measured} channels, but these series have {channels}.")
