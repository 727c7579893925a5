"""Pictures: what is drawn on the axes, and what is refused."""

import sys

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from sdeflow import ODE
from sdeflow.bridges import gaussian_sb
from sdeflow.equations import BrownianMotion
from sdeflow.plotting import bands, density, streams, trajectories

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
    with pytest.raises(ImportError, match="matplotlib"):
        density(CELLS)
    with pytest.raises(ImportError, match="matplotlib"):
        streams(CELLS, CELLS)


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


# ---- Streams. ----

CELLS = np.random.default_rng(0).normal(size=(300, 3)) * [1.0, 2.0, 0.5]
TURN = np.array([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, -1.0]])


class Recorder:
    """Axes that remember what a field was drawn from."""

    def streamplot(self, x, y, u, v, **style):
        self.x, self.y, self.field, self.style = x, y, np.stack([u, v], axis=-1), style


def flow(*args, **options):
    recorder = Recorder()
    assert streams(*args, ax=recorder, **options) is recorder
    return recorder


def test_a_stream_is_the_weighted_mean_of_the_cells_around_a_point():
    found = flow(lambda t, x: t * TURN @ x, CELLS, 2.0, components=(2, 0), bandwidth=(0.2, 0.3), least=0.5)
    velocity = (2.0 * CELLS @ TURN.T)[:, [2, 0]]
    checked = 0
    for i, j in np.argwhere(np.isfinite(found.field[..., 0]))[::40]:
        gaps = (CELLS[:, [2, 0]] - [found.x[j], found.y[i]]) / [0.2, 0.3]
        weights = np.exp(-(gaps**2).sum(axis=1) / 2)
        assert weights.sum() >= 0.5
        np.testing.assert_allclose(found.field[i, j], weights @ velocity / weights.sum(), rtol=1e-4, atol=1e-5)
        checked += 1
    assert checked > 5


def test_nothing_streams_where_there_are_no_cells():
    two = np.concatenate([CELLS[:150] * 0.1, CELLS[150:] * 0.1 + [5.0, 0.0, 0.0]])
    found = flow(np.ones_like(two), two, bandwidth=0.1, resolution=60)
    known = np.isfinite(found.field[..., 0])
    np.testing.assert_allclose(found.field[known], 1.0)
    np.testing.assert_array_equal(known, np.isfinite(found.field[..., 1]))
    empty = (found.x > 1.0) & (found.x < 4.0)
    assert empty.any()
    assert not known[:, empty].any()
    for centre in (0.0, 5.0):
        near = np.ix_(np.abs(found.y) < 0.15, np.abs(found.x - centre) < 0.1)
        assert known[near].all()


def test_bridges_equations_functions_and_arrays_have_streams():
    eye = jnp.eye(3)
    bridge = gaussian_sb(jnp.zeros(3), eye, jnp.ones(3), 0.5 * eye, BrownianMotion(3))
    when = np.linspace(0.0, 1.0, len(CELLS))
    velocities = np.stack([np.asarray(bridge.velocity(t, x)) for t, x in zip(when[::100], CELLS[::100])])
    np.testing.assert_allclose(flow(bridge, CELLS, when).field, flow(bridge.velocity, CELLS, when).field)
    every = flow(bridge, CELLS[::100], when[::100], least=0.1).field
    np.testing.assert_allclose(every, flow(velocities, CELLS[::100], least=0.1).field, rtol=1e-5, atol=1e-6)
    wanted = flow(CELLS @ TURN.T, CELLS).field
    np.testing.assert_allclose(flow(ODE(lambda t, y, args: TURN @ y), CELLS, 0.0).field, wanted, atol=1e-5)
    np.testing.assert_allclose(flow(lambda t, x: TURN @ x, CELLS, 0.0).field, wanted, atol=1e-5)


def test_cells_without_a_place_or_a_velocity_are_left_out():
    cells, velocities = CELLS.copy(), CELLS @ TURN.T
    cells[::3], velocities[1::3] = np.nan, np.nan
    wanted = flow(velocities[2::3], CELLS[2::3]).field
    np.testing.assert_array_equal(flow(velocities, cells).field, wanted)
    found = flow(lambda t, x: TURN @ x, cells, 0.0).field
    kept = np.arange(len(cells)) % 3 != 0
    np.testing.assert_allclose(found, flow((CELLS @ TURN.T)[kept], CELLS[kept]).field, atol=1e-5)


def test_streams_are_drawn_in_the_style_that_is_asked_for(ax):
    assert flow(CELLS, CELLS, color="red", density=2).style == {
        "color": "red",
        "density": 2,
        "linewidth": 0.8,
        "arrowsize": 0.8,
    }
    assert streams(CELLS, CELLS, ax=ax) is ax
    (lines,) = ax.collections
    ends = np.concatenate([path.vertices for path in lines.get_paths()])
    assert np.abs(ends).max() < 8


@pytest.mark.parametrize(
    ("field", "options", "error", "match"),
    [
        (3.0, {}, TypeError, "an array of velocities, got float"),
        (CELLS[:5], {}, ValueError, r"velocities have shape \(5, 3\), but the cells \(300, 3\)"),
        (lambda t, x: x, {}, ValueError, "t must be the time"),
        (lambda t, x: x, {"t": [0.0, 1.0]}, ValueError, r"one for each of 300 cells, got shape \(2,\)"),
        (lambda t, x: x[:2], {"t": 0.0}, ValueError, r"gives \(2,\) for a cell of shape \(3,\)"),
        (CELLS, {"components": (0, 3)}, ValueError, "3 components, so there is no component 3"),
        (CELLS, {"components": (1, 1)}, ValueError, "two different ones"),
        (CELLS, {"bandwidth": 0.0}, ValueError, "bandwidth must be positive"),
        (CELLS, {"least": 1e6}, ValueError, "lower least"),
        (np.full_like(CELLS, np.nan), {}, ValueError, "Only 0 of 300 cells"),
    ],
)
def test_what_does_not_stream_is_refused(field, options, error, match):
    with pytest.raises(error, match=match):
        flow(field, CELLS, **options)


# ---- Densities. ----


def share_inside(contours, level, places):
    inside = np.zeros(len(places), bool)
    for polygon in contours.get_paths()[level].to_polygons():
        inside ^= mpl.path.Path(polygon).contains_points(places)
    return inside.mean()


@pytest.mark.parametrize("filled", [False, True])
def test_regions_hold_the_shares_they_are_named_by(ax, filled):
    two = np.concatenate([CELLS, CELLS + [8.0, 0.0, 0.0]])
    levels = (0.5, 0.9)
    assert density(two, ax=ax, components=(0, 1), levels=levels, filled=filled, label="day 2") is ax
    regions = [(c, 0) for c in ax.collections] if filled else [(ax.collections[0], k) for k in (0, 1)]
    shares = [share_inside(contours, k, two[:, :2]) for contours, k in regions]
    np.testing.assert_allclose(shares, sorted(levels, reverse=True), atol=0.01)
    assert ax.get_legend_handles_labels()[1] == ["day 2"]


@pytest.mark.parametrize(
    ("samples", "options", "match"),
    [
        (np.zeros(5), {}, r"shape \(n, d\), got shape \(5,\)"),
        (np.zeros((5, 2)), {}, "do not differ"),
        (np.array([[0.0, np.nan], [1.0, 1.0]]), {}, "samples must be finite"),
        (CELLS, {"levels": (90,)}, "between 0 and 1, both excluded, got 90"),
        (CELLS[:, :1], {}, "1 components, so there is no component 1"),
    ],
)
def test_samples_without_a_density_are_refused(samples, options, match, ax):
    with pytest.raises(ValueError, match=match):
        density(samples, ax=ax, **options)
