"""The ``.ts`` format: what it means, what is refused, and the data set that comes with aeon."""

import importlib.util
import subprocess
import sys

import numpy as np
import pytest

from sdeflow.data import japanese_vowels, read_ts

NAN = np.nan


@pytest.fixture
def write(tmp_path):
    def run(text):
        path = tmp_path / "file.ts"
        path.write_text(text)
        return path

    return run


def test_reads_ragged_channels_and_missing_values(write):
    data = read_ts(
        write(
            "# a comment\n@problemName Tiny\n@timeStamps false\n@classLabel true one 10 2\n"
            "@data\n\n1,?,3 : 4,5,NaN : 10\n6 : 7,8 : one\n"
        )
    )
    np.testing.assert_array_equal(data.values[0], [[1, 4], [NAN, 5], [3, NAN]])
    np.testing.assert_array_equal(data.values[1], [[6, 7], [NAN, 8]])
    assert [data.to_user_time(t).tolist() for t in data.times] == [[0, 1, 2], [0, 1]]
    assert data.classes == ("one", "10", "2")
    assert data.labels.tolist() == [1, 0]


def test_targets_and_no_answers(write):
    data = read_ts(write("@targetlabel true\n@data\n1,2,3:0.5\n4,5,6:-1e2\n"))
    assert (data.targets.tolist(), data.labels) == ([[0.5], [-100.0]], None)
    data = read_ts(write("@classLabel false\n@data\n1,2:3,4\n"))
    assert (data.num_channels, data.labels, data.targets) == (2, None, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no series and no @data"),
        ("@data\n", "holds no series; is it"),
        ("1,2:3\n", "line 1: expected a header"),
        ("@classLabel true a\n@data\n1,2,x:a\n", "line 3: 'x' is not a number"),
        ("@classLabel true a\n@data\n1,2:b\n", r"series 0 is 'b', which is none of the classes \('a',\)"),
        ("@classLabel true a\n@data\n1 2 3\n", "line 3: expected channels and a label"),
        ("@timestamps true\n@classLabel true a\n@data\n(0,1),(1,2):a\n", "time stamps"),
        ("@targetlabel true\n@data\n1,2:?\n", "targets of series 0"),
    ],
)
def test_refuses(write, text, message):
    with pytest.raises(ValueError, match=message):
        read_ts(write(text))


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_ts(tmp_path / "nothing.ts")


needs_aeon = pytest.mark.skipif(importlib.util.find_spec("aeon") is None, reason="aeon is not installed")


@needs_aeon
def test_japanese_vowels():
    train, test = japanese_vowels()
    assert (len(train), len(test)) == (270, 370)
    assert (train.num_channels, test.num_channels) == (12, 12)
    assert (train.lengths.min(), train.lengths.max()) == (7, 26)
    assert (test.lengths.min(), test.lengths.max()) == (7, 29)
    assert train.classes == test.classes == tuple("123456789")
    assert np.bincount(train.labels).tolist() == [30] * 9
    assert np.bincount(test.labels).tolist() == [31, 35, 88, 44, 29, 24, 40, 50, 29]
    assert train.buckets == test.buckets
    assert train.time_scale == test.time_scale == 25
    assert train.values[0][:3, 0].tolist() == [1.860936, 1.891651, 1.939205]
    assert not np.isnan(np.concatenate(train.values)).any()
    shapes = [{batch.times.shape for batch in part.batches(16)} for part in (train, test)]
    assert shapes[0] == shapes[1]


@needs_aeon
def test_aeon_is_not_imported():
    code = "import sys, sdeflow.data as data; data.japanese_vowels(); assert 'aeon' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_aeon(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r'pip install "sdeflow\[examples\]"'):
        japanese_vowels()
