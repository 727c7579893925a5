"""Pictures: what is drawn on the axes, and what is refused."""

import sys

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from sdeflow.plotting import bands, trajectories

mpl.use("Agg")


@pytest.fixture
def ax():
    return Figure().subplots()


def drawn(ax):
    return [np.asarray(line.get_xydata()) for line in ax.lines]


def test_each_path_is_drawn_on_its_own_times(ax):
    times, paths = [[0.0, 1.0], [0.0, 0.3, 2.0]], [np.array([5.0, 6.0]), np.array([1.0, np.nan, 3.0])]
    assert trajectories(times, paths, ax=ax) is ax
    for got, t, y in zip(drawn(ax), times, paths, strict=True):
        np.testing.assert_array_equal(got, np.stack([t, y], axis=1))


def test_paths_may_share_their_times(ax):
    ys = np.arange(12.0).reshape(4, 3)
    trajectories([0.0, 1.0, 2.0], ys, ax=ax)
    assert [line[:, 1].tolist() for line in drawn(ax)] == ys.tolist()


def test_one_array_over_its_times_is_one_path(ax):
    ys = np.arange(8.0).reshape(4, 2)
    trajectories(np.arange(4.0), ys, ax=ax, component=1)
    trajectories(np.arange(4.0), ys[:, 0], ax=ax)
    assert [line[:, 1].tolist() for line in drawn(ax)] == [ys[:, 1].tolist(), ys[:, 0].tolist()]


def test_a_pair_of_components_is_drawn_as_a_curve_in_the_plane(ax):
    ys = np.random.default_rng(0).normal(size=(2, 5, 3))
    trajectories(np.arange(5.0), ys, ax=ax, component=(2, 0))
    np.testing.assert_array_equal(drawn(ax), ys[:, :, [2, 0]])


def test_paths_of_one_label_share_a_colour_and_an_entry(ax):
    trajectories([0.0, 1.0], np.zeros((4, 2)), ax=ax, labels=["b", "a", "b", "a"], linewidth=3)
    colours = [line.get_color() for line in ax.lines]
    assert colours[0] == colours[2] != colours[1] == colours[3]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["b", "a"]
    assert {line.get_linewidth() for line in ax.lines} == {3}


def test_dates_may_be_times(ax):
    days = np.array(["2024-01-01", "2024-01-03"], "datetime64[D]")
    trajectories([days], [[1.0, 2.0]], ax=ax)
    assert ax.lines[0].get_xdata()[1] == days[1]


def test_without_axes_the_current_ones_are_used():
    import matplotlib.pyplot as plt

    try:
        figure, wanted = plt.subplots()
        assert trajectories([0.0, 1.0], np.zeros((1, 2))) is wanted
        assert bands([0.0, 1.0], np.zeros((3, 2))) is wanted
    finally:
        plt.close(figure)


@pytest.mark.parametrize("draw", [trajectories, bands])
def test_without_matplotlib_the_extra_is_named(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r'matplotlib; run `pip install "sdeflow\[plot\]"`'):
        draw([0.0, 1.0], np.zeros((3, 2)))


@pytest.mark.parametrize(
    ("ts", "ys", "options", "match"),
    [
        ([0.0, 1.0], np.zeros((3, 3)), {}, r"Path 0 has 3 points but times of shape \(2,\)"),
        ([[0.0], [1.0]], np.zeros((3, 1)), {}, r"3 paths but 2 arrays of times"),
        ([0.0, 1.0], np.zeros((3, 2)), {"labels": ["a"]}, r"3 paths but 1 labels"),
        ([0.0, 1.0], np.zeros((3, 2, 2)), {"component": 2}, r"Path 0 has 2 components, .* no component 2"),
        ([0.0, 1.0], np.zeros((1, 2, 2, 2)), {}, r"Path 0 has shape \(2, 2, 2\)"),
    ],
)
def test_shapes_that_disagree_are_refused(ts, ys, options, match, ax):
    with pytest.raises(ValueError, match=match):
        trajectories(ts, ys, ax=ax, **options)


def test_bands_hold_the_shares_they_are_named_by(ax):
    samples = np.random.default_rng(0).normal(size=(1000, 2))
    bands([0.0, 1.0], samples, ax=ax, levels=(0.5, 0.9), label="model")
    widest, narrowest = (np.asarray(band.get_paths()[0].vertices) for band in ax.collections)
    for vertices, level in ((widest, 0.9), (narrowest, 0.5)):
        at_one = vertices[vertices[:, 0] == 1.0, 1]
        inside = (samples[:, 1] >= at_one.min()) & (samples[:, 1] <= at_one.max())
        assert inside.mean() == pytest.approx(level, abs=0.002)
    np.testing.assert_allclose(ax.lines[0].get_ydata(), np.median(samples, axis=0))
    assert ax.lines[0].get_label() == "model"


@pytest.mark.parametrize(
    ("samples", "levels", "match"),
    [
        (np.zeros((3, 4)), (0.5,), r"shape \(S, 2\) for these times, got \(3, 4\)"),
        (np.array([[0.0, np.nan]]), (0.5,), r"samples must be finite"),
        (np.zeros((3, 2)), (90,), r"between 0 and 1, both excluded, got 90"),
    ],
)
def test_bands_refuse_what_has_no_quantiles(samples, levels, match, ax):
    with pytest.raises(ValueError, match=match):
        bands([0.0, 1.0], samples, ax=ax, levels=levels)
