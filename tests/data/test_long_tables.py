"""Tables in long form: dicts, pandas and polars give the same data set."""

import numpy as np
import pytest

from sdeflow.data import TimeSeries

TABLE = {
    "who": ["b", "a", "b", "a", "c"],
    "hour": [2.0, 1.0, 0.0, 0.0, 5.0],
    "heart": [3.0, None, 1.0, 4.0, 6.0],
    "count": [1, 2, 3, 4, 5],
    "ill": ["yes", "no", "yes", "no", "yes"],
}


def as_dict(table):
    return table


def as_pandas(table):
    return pytest.importorskip("pandas").DataFrame(table)


def as_pandas_nullable(table):
    return pytest.importorskip("pandas").DataFrame(table).convert_dtypes()


def as_polars(table):
    return pytest.importorskip("polars").DataFrame(table)


FRAMES = [as_dict, as_pandas, as_pandas_nullable, as_polars]


@pytest.mark.parametrize("frame", FRAMES)
def test_reads(frame):
    data = TimeSeries.from_long(frame(TABLE), id="who", time="hour", values=["heart", "count"], label="ill")
    assert data.ids == ("b", "a", "c")
    assert [data.to_user_time(t).tolist() for t in data.times] == [[0, 2], [0, 1], [5]]
    for mine, expected in zip(data.values, ([[1, 3], [3, 1]], [[4, 4], [np.nan, 2]], [[6, 5]])):
        np.testing.assert_array_equal(mine, expected)
    assert data.classes == ("no", "yes")
    assert data.labels.tolist() == [1, 0, 1]


@pytest.mark.parametrize("frame", FRAMES)
def test_one_column_and_options(frame):
    table = TABLE | {"hour": [0.0, 1.0, 0.0, 0.0, 5.0]}
    data = TimeSeries.from_long(frame(table), id="who", time="hour", values="count", duplicates="mean", align="start")
    assert data.values[0].tolist() == [[2.0]]
    assert data.num_channels == 1
    assert data.time_shift.tolist() == [0, 0, 5]
    with pytest.raises(ValueError, match=r"'b'.*times\[1\]=0.* follows 0"):
        TimeSeries.from_long(frame(table), id="who", time="hour", values="count")


@pytest.mark.parametrize("frame", FRAMES)
def test_refuses(frame):
    read = lambda table, **options: TimeSeries.from_long(
        frame(table), **{"id": "who", "time": "hour", "values": "count", **options}
    )
    with pytest.raises(ValueError, match=r"no column 'pulse'; it has \['who', 'hour'"):
        read(TABLE, values="pulse")
    with pytest.raises(TypeError, match=r"Column 'ill': values must be real numbers"):
        read(TABLE, values=["count", "ill"])
    with pytest.raises(ValueError, match="Column 'who' has no id in row 1"):
        read(TABLE | {"who": ["b", None, "b", "a", "c"]})
    with pytest.raises(ValueError, match=r"Column 'hour' has no time in row 1 \(series 'a'\)"):
        read(TABLE | {"hour": [2.0, None, 0.0, 0.0, 5.0]})
    with pytest.raises(ValueError, match="'ill' changes within series 'b', from 'yes' to 'no' in row 2"):
        read(TABLE | {"ill": ["yes", "no", "no", "no", "yes"]}, label="ill")
    with pytest.raises(ValueError, match="label of series 'c' is missing"):
        read(TABLE | {"ill": ["yes", "no", "yes", "no", None]}, label="ill")
    with pytest.raises(ValueError, match="at least one column"):
        read(TABLE, values=[])
    with pytest.raises(ValueError, match="no rows"):
        read({name: column[:0] for name, column in TABLE.items()})


@pytest.mark.parametrize("frame", FRAMES)
def test_what_belongs_to_a_whole_series(frame):
    table = TABLE | {"age": [40, 71, 40, 71, 5], "dose": [0.5, 1.5, 0.5, 1.5, 2.5], "stay": [3, 9, 3, 9, 1]}
    read = lambda table, **options: TimeSeries.from_long(
        frame(table), id="who", time="hour", values="count", **{"targets": "stay", "static": ["age", "dose"], **options}
    )
    data = read(table)
    assert data.targets.tolist() == [[3], [9], [1]]
    assert data.static.tolist() == [[40, 0.5], [71, 1.5], [5, 2.5]]
    assert read(table, targets=None, static=[]).static is None
    with pytest.raises(
        ValueError, match=r"'age' changes within series 'a', from 71 to 72 in row 3; list it in values="
    ):
        read(table | {"age": [40, 71, 40, 72, 5]})
    with pytest.raises(ValueError, match="'age' changes within series 'a', from 71 to nan in row 3"):
        read(table | {"age": [40, 71, 40, None, 5]})
    with pytest.raises(ValueError, match="static of series 'c', column 0, is nan"):
        read(table | {"age": [40, 71, 40, 71, None]})
    with pytest.raises(TypeError, match="Column 'ill': values must be real numbers"):
        read(table, static="ill")
    with pytest.raises(ValueError, match="no column 'weight'"):
        read(table, targets="weight")


def test_integer_ids_are_plain_integers():
    data = TimeSeries.from_long(
        {"who": np.array([7, 7, 3]), "t": [0, 1, 0], "x": [1, 2, 3]}, id="who", time="t", values="x"
    )
    assert data.ids == (7, 3)


DATES = ["2024-01-01T00:00", "2024-01-01T12:00", "2024-01-02T00:00"]


@pytest.mark.parametrize("library", ["pandas", "polars", "numpy"])
@pytest.mark.parametrize("zone", [None, "Europe/Paris"])
def test_dates(library, zone):
    stamps = np.array(DATES, "M8[us]")
    if library == "pandas":
        pandas = pytest.importorskip("pandas")
        column = pandas.Series(pandas.to_datetime(stamps).tz_localize("UTC"))
        column = column.dt.tz_localize(None) if zone is None else column.dt.tz_convert(zone)
        frame = pandas.DataFrame({"who": ["a"] * 3, "when": column, "x": [1.0, 2.0, 3.0]})
    elif library == "polars":
        polars = pytest.importorskip("polars")
        frame = polars.DataFrame({"who": ["a"] * 3, "when": stamps, "x": [1.0, 2.0, 3.0]})
        if zone is not None:
            when = polars.col("when").dt.replace_time_zone("UTC").dt.convert_time_zone(zone)
            frame = frame.with_columns(when)
    else:
        frame = {"who": ["a"] * 3, "when": stamps, "x": [1.0, 2.0, 3.0]}
    data = TimeSeries.from_long(frame, id="who", time="when", values="x")
    assert data.time_shift == stamps[0]
    assert data.times[0].tolist() == [0.0, 0.5, 1.0]
    np.testing.assert_array_equal(data.to_user_time(data.times[0]), stamps)
