"""The ``.ts`` text format of the time-series classification archive, and one data set in that format.

Lines that start with ``#`` are comments and lines that start with ``@`` are headers, up to ``@data``. Then
every line is one series: channels separated by colons, numbers by commas, the label or target last, ``?`` or
``NaN`` for a missing value. Series, and the channels of one series, may differ in length.
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from ._series import TimeSeries

_MISSING = ("?", "nan", "")


def read_ts(path: str | Path, *, like: TimeSeries | None = None) -> TimeSeries:
    r"""A data set from a ``.ts`` file, with times 0, 1, 2, ... and the classes in the order of the header.

    Arguments:
        path: the file.
        like: take the map of times and the classes from this set (the training file), as in
            `TimeSeries.from_arrays`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a file without ``@data`` or without series, time stamps in the file, a label that the
            header does not list, or an entry that is not a number, naming the line.

    Example:
        >>> import tempfile, pathlib
        >>> from sdeflow.data import read_ts
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "tiny.ts"
        >>> _ = path.write_text("@classLabel true a b\n@data\n1,2,?:3,4,5:a\n6,7:8,9:b\n")
        >>> data = read_ts(path)
        >>> data.num_channels, data.lengths.tolist(), data.classes
        (2, [3, 2], ('a', 'b'))
    """
    headers: dict[str, list[str]] = {}
    values: list[np.ndarray] = []
    answers: list[str] = []
    in_data = False
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            if in_data:
                x, answer = _series(line, _has_answer(headers), f"{path}, line {number}")
                values.append(x)
                answers.append(answer)
            elif line.startswith("@"):
                name, *rest = line[1:].split()
                headers[name.lower()] = rest
                in_data = name.lower() == "data"
                if in_data and headers.get("timestamps", ["false"])[0].lower() == "true":
                    raise ValueError(
                        f"{path} holds time stamps, which read_ts does not read; use TimeSeries.from_arrays."
                    )
            else:
                raise ValueError(f"{path}, line {number}: expected a header with @ before @data, got {line[:40]!r}.")
    if not values:
        raise ValueError(f"{path} holds no series{'' if in_data else ' and no @data line'}; is it a .ts file?")
    labels, targets, classes = _answers(headers, answers, path)
    times = [np.arange(x.shape[0]) for x in values]
    return TimeSeries._build(times, values, labels, classes, targets, None, None, "error", "global", like)


def japanese_vowels() -> tuple[TimeSeries, TimeSeries]:
    """The Japanese Vowels data as (train, test): 270 and 370 series, 12 channels, 7 to 29 steps.

    The classes are 9 speakers, who utter two vowels. Both sets share one map of times, the classes and the
    buckets. The files are those in the wheel of aeon, which is located but not imported. Source: Kudo, Toyama
    and Shimbo, Pattern Recognition Letters 20 (1999) 1103-1111.

    Raises:
        FileNotFoundError: if aeon is not installed or carries no such files.

    Example:
        >>> from sdeflow.data import japanese_vowels  # doctest: +SKIP
        >>> train, test = japanese_vowels()  # doctest: +SKIP
        >>> len(train), len(test), train.num_channels  # doctest: +SKIP
        (270, 370, 12)
    """
    spec = importlib.util.find_spec("aeon")
    folders = [] if spec is None else [Path(place) for place in spec.submodule_search_locations or ()]
    for folder in folders:
        train_file, test_file = (
            folder / "datasets" / "data" / "JapaneseVowels" / f"JapaneseVowels_{part}.ts" for part in ("TRAIN", "TEST")
        )
        if train_file.is_file() and test_file.is_file():
            train = read_ts(train_file)
            test = read_ts(test_file, like=train)
            train = train.with_buckets((*train.buckets[:-1], int(max(train.lengths.max(), test.lengths.max()))))
            return train, test.with_buckets(like=train)
    raise FileNotFoundError(
        "The Japanese Vowels files come with the package aeon, which was not found; "
        'run `pip install "sdeflow[examples]"`.'
    )


def _has_answer(headers: dict[str, list[str]]) -> bool:
    return any(headers.get(name, ["false"])[0].lower() == "true" for name in ("classlabel", "targetlabel"))


def _series(line: str, has_answer: bool, where: str) -> tuple[np.ndarray, str]:
    """One data line as values of shape (L, C), short channels filled with NaN, and its last field."""
    fields = line.split(":")
    fields, answer = (fields[:-1], fields[-1].strip()) if has_answer else (fields, "")
    if not fields:
        raise ValueError(f"{where}: expected channels and a label separated by colons, got {line[:40]!r}.")
    channels = [[_number(entry, where) for entry in field.split(",")] for field in fields]
    values = np.full((max(map(len, channels)), len(channels)), np.nan)
    for c, channel in enumerate(channels):
        values[: len(channel), c] = channel
    return values, answer


def _number(entry: str, where: str) -> float:
    entry = entry.strip()
    if entry.lower() in _MISSING:
        return float("nan")
    try:
        return float(entry)
    except ValueError:
        raise ValueError(f"{where}: {entry[:40]!r} is not a number; missing values are written ? or NaN.") from None


def _answers(headers: dict[str, list[str]], answers: list[str], path: Any) -> tuple[Any, Any, Any]:
    """Labels, targets and classes, of which those that the header does not announce are None."""
    if headers.get("targetlabel", ["false"])[0].lower() == "true":
        return (
            None,
            [_number(answer, f"{path}, target of series {i}") for i, answer in enumerate(answers)],
            None,
        )
    if not _has_answer(headers):
        return None, None, None
    return answers, None, headers["classlabel"][1:] or None
