"""A ragged, labelled data set with named series."""

import pytest
from data_toys import ragged

from sdeflow.data import TimeSeries


@pytest.fixture
def data():
    times, values = ragged(40)
    labels = ["abc"[i % 3] for i in range(40)]
    return TimeSeries.from_arrays(times, values, labels=labels, ids=[f"p{i}" for i in range(40)])
