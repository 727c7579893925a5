"""Snapshots: what they hold, the parts and units of them, what they refuse, and the splits of protocols."""

import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdeflow
from sdeflow.data import HeldOut, Snapshots, leave_one_out, msci_setups

NAN = float("nan")
SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def cells(counts=(6, 4, 9, 5), times=(0.0, 1.0, 2.5, 7.0), dim=3, seed=0, dtype=np.float64, **options):
    rng = np.random.default_rng(seed)
    samples = [(3.0 + rng.normal(size=(n, dim)) * np.arange(1, dim + 1)).astype(dtype) for n in counts]
    return Snapshots(times, samples, **options)


def full():
    counts = (6, 4, 9, 5)
    rng = np.random.default_rng(1)
    return cells(
        counts,
        weights=[rng.random(n) for n in counts],
        labels=[np.array(["a", "b", "c"])[rng.integers(0, 3, n)] for n in counts],
        names=["PC1", "PC2", "PC3"],
    )


def same(a, b, rtol=0.0):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=0)


# ---- What is in it. ----


def test_what_is_in_it():
    data = full()
    assert sdeflow.Snapshots is Snapshots
    assert (data.dim, data.num_cells, data.counts, len(data)) == (3, 24, (6, 4, 9, 5), 4)
    assert data.times.tolist() == [0.0, 1.0, 2.5, 7.0]
    np.testing.assert_allclose(data.masses, [w.sum() for w in data.weights])
    assert cells().masses.tolist() == [6, 4, 9, 5]
    assert data.names == ("PC1", "PC2", "PC3")
    assert np.concatenate(data.index).tolist() == list(range(24))
    assert data.at(2.5) is data.samples[2]
    assert data.at(np.float32(2.5)).shape == (9, 3)
    assert repr(data) == (
        "Snapshots: 24 cells of 3 components at 4 times (0: 6, 1: 4, 2.5: 9, 7: 5), with 3 labels and weights."
    )
    assert "; each component standardised." in repr(data.standardise())
    assert f"; all divided by {data.standardise('scalar').scale[0]:.4g}." in repr(data.standardise("scalar"))
    many = cells([2] * 40, times=np.arange(40))
    assert "9: 2, ..., 39: 2)" in repr(many)


def test_pairs_are_consecutive():
    data = cells()
    pairs = data.pairs()
    assert [(a[0], b[0]) for a, b in pairs] == [(0.0, 1.0), (1.0, 2.5), (2.5, 7.0)]
    for i, ((_, x0), (_, x1)) in enumerate(pairs):
        assert x0 is data.samples[i]
        assert x1 is data.samples[i + 1]


def test_precision_and_shapes():
    assert {x.dtype for x in cells(dtype=np.float32).samples} == {np.dtype(np.float32)}
    assert {x.dtype for x in cells(dtype=np.float64).standardise().samples} == {np.dtype(np.float64)}
    assert {x.dtype for x in cells(dtype=np.float32).standardise().samples} == {np.dtype(np.float32)}
    assert Snapshots([0, 1], [[1, 2, 3], [4, 5]]).samples[0].dtype == np.float64
    assert Snapshots([0, 1], [[1, 2, 3], [4, 5]]).at(1).tolist() == [[4.0], [5.0]]
    assert Snapshots([0, 1], [jnp.ones((3, 2)), jnp.ones((2, 2))]).samples[0].dtype == np.float32
    assert Snapshots(np.arange(4.0), np.ones((4, 5, 2))).counts == (5, 5, 5, 5)


def test_nobody_can_write_into_it():
    x = np.zeros((3, 2))
    data = Snapshots([0.0, 1.0], [x, x])
    x[:] = 5.0
    assert data.at(0.0).sum() == 0
    with pytest.raises(ValueError, match="read-only"):
        data.at(0.0)[0, 0] = 1.0
    with pytest.raises(ValueError, match="read-only"):
        data.times[0] = 1.0
    assert x.flags.writeable


# ---- Parts. ----


def test_drop_and_take_carry_everything():
    data = full()
    less, taken = data.drop(2.5), data.take([0.0, 1.0, 7.0])
    for part in (less, taken):
        assert part.times.tolist() == [0.0, 1.0, 7.0]
        for name in ("samples", "weights", "index"):
            whole = getattr(data, name)
            same(getattr(part, name), [whole[i] for i in (0, 1, 3)])
        assert [x.tolist() for x in part.labels] == [data.labels[i].tolist() for i in (0, 1, 3)]
        assert part.names == data.names
    assert data.standardise().drop(1.0).scale.tolist() == data.standardise().scale.tolist()


def test_keep_takes_the_first_components():
    data = full().standardise()
    two = data.keep(2)
    assert (two.dim, two.names) == (2, ("PC1", "PC2"))
    same(two.samples, [x[:, :2] for x in data.samples])
    np.testing.assert_allclose(two.unstandardise(two.at(1.0)), full().at(1.0)[:, :2], rtol=1e-13)
    # Scaling each component by itself, and keeping some, go in either order.
    same(full().keep(2).standardise().samples, two.samples, rtol=1e-12)


def test_subsample():
    data, key = full(), jax.random.key(0)
    thin = data.subsample(5, key=key)
    assert thin.counts == (5, 4, 5, 5)
    for i, rows in enumerate(thin.index):
        within = rows - data.index[i][0]
        assert (np.diff(rows) > 0).all()  # without replacement, in order
        np.testing.assert_array_equal(thin.samples[i], data.samples[i][within])
        assert thin.labels[i].tolist() == data.labels[i][within].tolist()
        np.testing.assert_allclose(thin.weights[i], data.weights[i][within] * data.counts[i] / thin.counts[i])
    same(data.subsample(5, key=key).index, thin.index)
    # What is drawn at a time does not depend on the other times.
    same(data.drop(0.0).subsample(5, key=key).index, thin.index[1:])
    assert any((data.subsample(5, key=k).index[2] != thin.index[2]).any() for k in jax.random.split(key, 3))
    assert cells().subsample(3, key=key).weights is None


def test_subsampling_is_uniform_and_keeps_the_mass_on_average():
    data = full()
    keys = jax.random.split(jax.random.key(1), 400)
    hits, masses = np.zeros(9), []
    for key in keys:
        thin = data.subsample(4, key=key)
        hits[thin.index[2] - data.index[2][0]] += 1
        masses.append(thin.masses[2])
    p = 4 / 9
    assert np.abs(hits / 400 - p).max() < 5 * np.sqrt(p * (1 - p) / 400)
    assert abs(np.mean(masses) - data.masses[2]) < 5 * np.std(masses) / np.sqrt(400)


@pytest.mark.parametrize("size", [None, 12])
def test_padding_shows_nothing(size):
    data = full()
    values, weights = data.padded(size)
    assert values.shape == (4, size or 9, 3)
    for i, n in enumerate(data.counts):
        np.testing.assert_array_equal(values[i, :n], data.samples[i])
        np.testing.assert_array_equal(weights[i, :n], data.weights[i])
        assert (weights[i, n:] == 0).all()
        assert (values[i, n:] == values[i, 0]).all()
    ones = cells(dtype=np.float32).padded()
    assert ones[1].sum(axis=1).tolist() == [6, 4, 9, 5]
    assert {x.dtype for x in ones} == {np.dtype(np.float32)}


# ---- Units. ----


def test_per_dim_is_the_standard_scaler():
    data = cells()
    pooled = np.concatenate(data.samples)
    scaled = data.standardise()
    same(scaled.samples, [(x - pooled.mean(axis=0)) / pooled.std(axis=0) for x in data.samples], rtol=1e-12)
    np.testing.assert_allclose(np.concatenate(scaled.samples).std(axis=0), 1.0)


def test_scalar_divides_by_the_mean_deviation_and_does_not_shift():
    data = cells()
    scale = np.concatenate(data.samples).std(axis=0).mean()
    scaled = data.standardise("scalar")
    same(scaled.samples, [x / scale for x in data.samples], rtol=1e-14)
    assert not scaled.shift.any()


@pytest.mark.parametrize("kind", ["per_dim", "scalar"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_there_and_back(kind, dtype):
    data = cells(dtype=dtype)
    scaled = data.standardise(kind)
    assert scaled.is_standardised
    assert not data.is_standardised
    eps = np.finfo(dtype).eps
    for x, y in zip(data.samples, scaled.samples):
        np.testing.assert_allclose(scaled.unstandardise(y), x, rtol=4 * eps, atol=16 * eps)
    # Twice is once, and the other kind starts from the user's units again.
    twice = scaled.standardise(kind)
    np.testing.assert_allclose(twice.scale, scaled.scale, rtol=8 * eps)
    np.testing.assert_allclose(scaled.standardise("scalar").scale, data.standardise("scalar").scale, rtol=8 * eps)
    # Models hand back JAX arrays, of any shape.
    back = jax.jit(lambda x: scaled.unstandardise(x))(jnp.ones((2, 5, 3)))
    np.testing.assert_allclose(back, np.broadcast_to(scaled.shift + scaled.scale, (2, 5, 3)), rtol=1e-5)


def test_like_takes_the_units_of_another_set():
    train, test = cells(seed=1), cells(seed=2)
    scaled = train.standardise()
    for like in (train, scaled):
        same(test.standardise(like=like).samples, [(x - scaled.shift) / scaled.scale for x in test.samples], rtol=1e-12)
    same(test.standardise().standardise(like=scaled).samples, test.standardise(like=scaled).samples, rtol=1e-10)


def test_a_constant_component_keeps_its_scale():
    x = np.column_stack([np.arange(6.0), np.full(6, 0.1)])
    data = Snapshots([0, 1], [x[:3], x[3:]])
    scaled = data.standardise()
    assert scaled.scale[1] == 1.0
    np.testing.assert_allclose(np.concatenate(scaled.samples)[:, 1], 0.0, atol=1e-15)
    np.testing.assert_allclose(data.standardise("scalar").scale, np.std(np.arange(6)) / 2)
    assert Snapshots([0, 1], np.ones((2, 3, 2))).standardise("scalar").scale.tolist() == [1.0, 1.0]


# ---- Refusals. ----

X = [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]


@pytest.mark.parametrize(
    ("times", "samples", "message"),
    [
        ([0.0], [X], r"at least two times, got 1"),
        ([], [], r"at least two times, got 0"),
        ([0.0, 1.0], [X], r"1 arrays of samples but times of shape \(2,\)"),
        ([0.0, 2.0, 1.0], [X, X, X], r"times\[2\]=1 follows 2; sort"),
        ([0.0, 1.0, 1.0], [X, X, X], r"times\[2\]=1 follows 1; sort.*pool"),
        ([0.0, NAN], [X, X], r"times\[1\] is nan"),
        ([1e6, 1e6 + 0.1], [X, X], r"times\[0\] and times\[1\] are 0.1 apart, which float32"),
        ([0.0, 3.0], [X, X[:1]], r"1 cells at time 3, but every time needs at least two"),
        ([0.0, 3.0], [X, np.zeros((0, 2))], r"0 cells at time 3"),
        ([0.0, 3.0], [X, np.zeros((3, 4))], r"time 3 have 4 components, those at time 0 have 2"),
        ([0.0, 3.0], [X, np.zeros((3, 4, 5))], r"time 3 must be of shape \(n, d\).*got \(3, 4, 5\)"),
        ([0.0, 3.0], [X, [[NAN, 1.0], [0.0, 1.0], [np.inf, NAN]]], r"2 of the 3 cells at time 3.*row 0; impute"),
    ],
)
def test_refuses(times, samples, message):
    with pytest.raises(ValueError, match=message):
        Snapshots(times, samples)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": [[1, 1, 1]]}, "2 times but 1 arrays of weights"),
        ({"weights": [[1, 1, 1], [1, 1]]}, r"3 cells at time 1, but weights of shape \(2,\)"),
        ({"weights": [[1, 1, 1], [1, -1, 1]]}, "weight of cell 1 at time 1 is -1"),
        ({"weights": [[1, NAN, 1], [1, 1, 1]]}, "weight of cell 1 at time 0 is nan"),
        ({"weights": [[0, 0, 0], [1, 1, 1]]}, "time 0 have no weight"),
        ({"labels": [["a"], ["b"] * 3]}, r"3 cells at time 0, but labels of shape \(1,\)"),
        ({"names": ["PC1"]}, "2 components but 1 names"),
        ({"index": [[0, 1, 2], [0]]}, "index of shape"),
        ({"scale": [1.0, 2.0, 3.0]}, "shift and scale must be of shape"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        Snapshots([0.0, 1.0], [X, X], **options)


def test_some_cells_may_weigh_nothing():
    assert Snapshots([0.0, 1.0], [X, X], weights=[[0, 1, 0], [1, 1, 1]]).masses.tolist() == [1, 3]


def test_refuses_kinds():
    with pytest.raises(TypeError, match=r"samples\[1\]: values must be real numbers"):
        Snapshots([0.0, 1.0], [X, [["a", "b"]] * 2])
    with pytest.raises(TypeError, match="samples must be a list"):
        Snapshots([0.0, 1.0], 3.0)
    with pytest.raises(TypeError, match="times: values must be real numbers"):
        Snapshots(["day 0", "day 1"], [X, X])


def test_methods_refuse():
    data = cells()
    for call in (data.at, data.drop, lambda t: data.take([t, 7.0])):
        with pytest.raises(ValueError, match=r"no cells at time 3\.0; the times are \[0\.0, 1\.0, 2\.5, 7\.0\]"):
            call(3.0)
    with pytest.raises(ValueError, match="no cells at time nan"):
        data.at(NAN)
    with pytest.raises(ValueError, match="at least two times, got 1"):
        data.take([0.0, 1.0]).drop(0.0)
    with pytest.raises(ValueError, match="dims must be at most 3"):
        data.keep(4)
    with pytest.raises(TypeError, match="dims must be an integer"):
        data.keep(1.5)
    with pytest.raises(ValueError, match="n must be at least 2, got 1"):
        data.subsample(1, key=jax.random.key(0))
    with pytest.raises(TypeError, match="key must be a JAX key"):
        data.subsample(2, key=0)
    with pytest.raises(ValueError, match='kind must be "per_dim" or "scalar"'):
        data.standardise("minmax")
    with pytest.raises(ValueError, match="like has 2 components, but these snapshots have 3"):
        data.standardise(like=data.keep(2))
    with pytest.raises(ValueError, match="size=5 is below 9"):
        data.padded(5)


# ---- Protocols. ----


def test_leave_one_out_holds_out_every_interior_time():
    data = full().standardise()
    setups = leave_one_out(data)
    assert [setup.time for setup in setups] == [1.0, 2.5]
    for train, time, held in setups:
        assert held is data.at(time)
        assert time not in train.times
        assert len(train) == 3
        assert train.scale.tolist() == data.scale.tolist()
    assert (setups[1].before, setups[1].after, setups[1].fraction) == (1.0, 7.0, 0.25)
    assert isinstance(setups[0], HeldOut)
    with pytest.raises(ValueError, match="at least three times"):
        leave_one_out(data.take([0.0, 1.0]))


def test_msci_setups():
    rng = np.random.default_rng(0)
    days = {day: rng.normal(size=(20 + day, 4)) * day for day in (7, 4, 3, 2)}
    first, second = msci_setups(days)
    for setup, trio, fraction in ((first, (2, 3, 4), 0.5), (second, (3, 4, 7), 0.25)):
        scale = np.concatenate([days[day] for day in trio]).std(axis=0).mean()
        assert setup.train.times.tolist() == [trio[0], trio[2]]
        assert (setup.time, setup.fraction) == (trio[1], fraction)
        same([*setup.train.samples, setup.cells], [days[trio[i]] / scale for i in (0, 2, 1)], rtol=1e-13)
        np.testing.assert_allclose(setup.train.unstandardise(setup.cells), days[trio[1]], rtol=1e-13)
    order = sorted(days)
    again = msci_setups(Snapshots([1.0, *order], [days[2], *(days[day] for day in order)]))
    same(again[1].train.samples, second.train.samples)
    with pytest.raises(ValueError, match=r"there is no day 7 in \[4.0, 3.0, 2.0\]"):
        msci_setups({day: x for day, x in days.items() if day != 7})
    with pytest.raises(ValueError, match="no cells at time 7.0"):
        msci_setups(Snapshots([2, 3, 4], [days[2], days[3], days[4]]))
    with pytest.raises(ValueError, match="not standardised"):
        msci_setups(Snapshots(order, [days[day] for day in order]).standardise())


@pytest.mark.skipif(not (SHARED / "cite_pca50_day2.npy").exists(), reason="the real cells are not here")
def test_msci_scales_of_the_real_cells():
    setups = msci_setups({day: np.load(SHARED / f"cite_pca50_day{day}.npy") for day in (2, 3, 4, 7)})
    assert [round(float(setup.train.scale[0]), 3) for setup in setups] == [6.436, 7.045]
    assert [setup.train.counts for setup in setups] == [(6071, 8485), (7643, 7195)]
    assert [setup.cells.shape for setup in setups] == [(7643, 50), (8485, 50)]


def test_the_signature_is_the_documented_one():
    names = list(inspect.signature(Snapshots).parameters)
    assert names == ["times", "samples", "weights", "labels", "names", "index", "shift", "scale"]
