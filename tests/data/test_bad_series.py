"""What a data set refuses: every message names the series, the place and the way out."""

import numpy as np
import pytest

from sdeflow._compat import SdeflowWarning
from sdeflow.data import TimeSeries

NAN = float("nan")


def build(times, values, **options):
    return TimeSeries.from_arrays(times, values, **options)


@pytest.mark.parametrize(
    ("times", "values", "message"),
    [
        ([[0, 1], [0, 2, 1]], [[1, 2], [1, 2, 3]], r"'b'.*times\[2\]=1 follows 2; sort"),
        ([[0, 1], [0, 1, 1]], [[1, 2], [1, 2, 3]], r"'b'.*times\[2\]=1 follows 1; use duplicates="),
        ([[0, 1], [0, NAN]], [[1, 2], [1, 2]], r"'b'.*times\[1\] is nan"),
        ([[0, 1], [np.inf, 2]], [[1, 2], [1, 2]], r"'b'.*times\[0\] is inf"),
        ([[0, 1], [0, 1]], [[1, 2], [NAN, NAN]], r"No value is observed in series 'b'"),
        ([[0, 1], [0, 1]], [[1, 2], [1, np.inf]], r"'b': values\[1, 0\] is inf"),
        ([[0, 1], [0, 1]], [[1, 2], [1, 1e39]], r"'b': values\[1, 0\] is 1e\+39, which float32"),
        ([[0, 1], []], [[1, 2], []], r"'b' has no time steps"),
        ([[0, 1], [0, 1]], [[1, 2], [[1, 2], [3, 4]]], r"'b' has 2 channels, but 1 are expected"),
        ([[0, 1], [0, 1]], [[1, 2], [1, 2, 3]], r"'b' has 2 times but 3 rows"),
        ([[0, 1], [0, 1]], [[1, 2], [[1, 2], [3]]], r"'b' cannot be read as arrays"),
        ([[0, 1], [[0, 1]]], [[1, 2], [1, 2]], r"'b': times must be of shape"),
        ([[0, 1]], [[1, 2], [1, 2]], r"1 series of times but 2 of values"),
        (
            [[0, 1], np.array(["2020-01-01", "NaT"], "M8[D]")],
            [[1, 2], [1, 2]],
            None,
        ),
    ],
)
def test_series_that_are_refused(times, values, message):
    if message is None:
        with pytest.raises(TypeError, match="'b' has times of dtype datetime64"):
            build(times, values, ids=["a", "b"])
        return
    with pytest.raises(ValueError, match=message):
        build(times, values, ids=["a", "b"])


def test_missing_dates():
    with pytest.raises(ValueError, match=r"times\[1\] is NaT"):
        build([np.array(["2020-01-01", "NaT"], "M8[D]")], [[1, 2]])


def test_no_series():
    with pytest.raises(ValueError, match="at least one series, got none"):
        build([], [])


def test_single_series_without_a_list():
    with pytest.raises(TypeError, match="put a single series into a list"):
        build([0.0, 1.0], [1.0, 2.0])
    with pytest.raises(TypeError, match="must be a list"):
        build(3.0, [[1.0]])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([["x"], ["y"]], "dtype <U1"),
        (np.array([[1.0, "x"], [2.0, "y"]], object), "got 'x' in column 1 at row 0"),
        (np.array([1j, 2j]), "complex128"),
        (np.array(["2020-01-01", "2020-01-02"], "M8[D]"), "datetime64"),
    ],
)
def test_values_that_are_not_numbers(values, message):
    with pytest.raises(TypeError, match=rf"Series 0.*{message}"):
        build([[0, 1]], [values])


def test_objects_that_are_numbers_are_read():
    data = build([[0, 1, 2]], [np.array([[1, 2.5], [None, True], [3, np.float32(4)]], object)])
    np.testing.assert_array_equal(data.values[0], [[1, 2.5], [NAN, 1], [3, 4]])
    masked = np.ma.array([1.0, 2.0], mask=[False, True])
    np.testing.assert_array_equal(build([[0, 1]], [masked]).values[0], [[1.0], [NAN]])


def test_integers_become_floats_and_half_precision_warns():
    assert build([[0, 1]], [np.array([1, 2], np.int8)]).values[0].dtype == np.float64
    with pytest.warns(SdeflowWarning, match="float16"):
        data = build([[0, 1]], [np.array([1, 2], np.float16)])
    assert data.batch([0]).values.dtype == np.float32


@pytest.mark.parametrize(
    ("times", "kind"), [(["a", "b"], "dtype <U1"), ([1j, 2j], "complex128"), ([True, False], "bool")]
)
def test_times_that_are_not_times(times, kind):
    with pytest.raises(TypeError, match="times must be numbers"):
        build([times], [[1, 2]])


def test_ids():
    with pytest.raises(ValueError, match="'a' occurs twice, the second time at position 1"):
        build([[0], [0]], [[1], [1]], ids=["a", "a"])
    with pytest.raises(ValueError, match="2 series but 1 ids"):
        build([[0], [0]], [[1], [1]], ids=["a"])


def test_labels():
    with pytest.raises(ValueError, match="2 series but 1 labels"):
        build([[0], [0]], [[1], [1]], labels=[1])
    with pytest.raises(ValueError, match="label of series 1 is missing"):
        build([[0], [0]], [[1], [1]], labels=["x", None])
    with pytest.raises(ValueError, match="label of series 0 is missing"):
        build([[0], [0]], [[1], [1]], labels=[NAN, 1.0])
    with pytest.raises(TypeError, match="label of series 1 is .*hashable"):
        build([[0], [0]], [[1], [1]], labels=["x", ["y"]])
    train = build([[0], [0]], [[1], [1]], labels=["x", "y"])
    with pytest.raises(ValueError, match=r"series 0 is 'z', which is none of the classes \('x', 'y'\)"):
        build([[0]], [[1]], labels=["z"], like=train)


def test_tables():
    with pytest.raises(ValueError, match=r"targets must be of shape \(2, k\).*got \(3, 1\)"):
        build([[0], [0]], [[1], [1]], targets=[1, 2, 3])
    with pytest.raises(ValueError, match=r"static of series 'b', column 1, is nan"):
        build([[0], [0]], [[1], [1]], static=[[1, 2], [3, NAN]], ids=["a", "b"])


def test_times_beyond_float32_name_the_way_out():
    times = [[0.0, 1e-3], [1e6, 1e6 + 1e-3]]
    with pytest.raises(ValueError, match=r'Series 1: times\[0\] and times\[1\].*align="start"'):
        build(times, [[1, 2], [1, 2]])
    data = build(times, [[1, 2], [1, 2]], align="start")
    np.testing.assert_allclose(data.batch([0, 1]).times, [[0, 1], [0, 1]], atol=1e-6)
    with pytest.raises(ValueError, match="merge such rows"):
        build([[0.0, 1.0, 1.0 + 1e-7]], [[1, 2, 3]], align="start")


def test_the_resolution_limit_is_eight_ulp_of_the_largest_time():
    ulp = float(np.spacing(np.float32(1.0)))
    build([[0.0, 1.0 - 8 * ulp, 1.0]], [[1, 2, 3]])
    with pytest.raises(ValueError, match="float32 cannot resolve"):
        build([[0.0, 1.0 - 7 * ulp, 1.0]], [[1, 2, 3]])


@pytest.mark.parametrize("option", [{"align": "end"}, {"duplicates": "first"}])
def test_unknown_options(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be"):
        build([[0]], [[1]], **option)


def test_batch_sizes(data):
    with pytest.raises(ValueError, match="at least 1, got 0"):
        data.batches(0)
    for size in (2.0, True, "all"):
        with pytest.raises(TypeError, match="must be an integer"):
            data.batches(size)
    with pytest.warns(SdeflowWarning, match="batch size 41 is more than the 40 series") as caught:
        batches = list(data.batches(41))
    assert len(caught) == 1
    assert all(batch.weight.shape == (40,) for batch in batches)


@pytest.mark.parametrize("key", [0, "seed", None, np.zeros(2), 3.5])
def test_keys_that_are_none(data, key):
    with pytest.raises(TypeError, match=r"jax\.random\.key\(0\)"):
        data.split(0.5, key=key)


def test_batches_of_keys(data):
    import jax

    with pytest.raises(TypeError, match="single key, got a batch"):
        data.batches(2, jax.random.split(jax.random.key(0)))
    # A key of the older kind is as good as one of the new.
    ours, theirs = (data.split(0.5, key=k)[0].ids for k in (jax.random.key(1), jax.random.PRNGKey(1)))
    assert ours == theirs
