"""Brownian motion on a grid: the right law, a row a function of (key, row) alone, and no answer off the grid."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers.stats import assert_mean, assert_normal, assert_uncorrelated, assert_variance

from sdeflow.grids import Grid, stack, subdivide, through, uniform
from sdeflow.paths import GridBrownian

AREAS = {"W": dfx.BrownianIncrement, "WH": dfx.SpaceTimeLevyArea, "WHK": dfx.SpaceTimeTimeLevyArea}
VARIANCE = {"W": 1.0, "H": 1 / 12, "K": 1 / 720}
STORAGES = ("table", "counter")
FULL = dfx.SpaceTimeTimeLevyArea


def _rows(path):
    """All rows of a path, as a dict of arrays that lead with the row."""
    if path.table is not None:
        out = path.table
    else:
        h = jnp.asarray(path.grid.right - path.grid.left)
        out = jax.jit(jax.vmap(path.row))(jnp.arange(h.shape[0]), h)
    return {name: getattr(out, name) for name in ("W", "H", "K") if hasattr(out, name)}


def _path(grid, structure=(2,), *, key, area="W", storage="table"):
    return GridBrownian(grid, structure, key=key, levy_area=AREAS[area], storage=storage)


def _merged(path, *factors):
    """The table of a path after merging by each factor in turn."""

    def run():
        out = path
        for k in factors:
            out = out.coarsen(k)
        return out.table

    return jax.jit(run)()


# ---- The law. ----


@pytest.fixture(scope="module", params=STORAGES)
def draws(request):
    """Rows of unequal length on 16 keys: fields of shape (keys, rows, 3), scaled to unit variance."""
    grid = through([0.0, 0.1, 1.0, 1.5], 0.02)
    h = np.asarray(grid.right - grid.left)

    def one(key):
        return _rows(GridBrownian(grid, (3,), key=key, levy_area=FULL, storage=request.param))

    rows = jax.jit(jax.vmap(one))(jr.split(jr.key(11), 16))
    return {k: np.asarray(x) / np.sqrt(h * VARIANCE[k])[None, :, None] for k, x in rows.items()}


@pytest.mark.parametrize("field", ["W", "H", "K"])
def test_increments_and_areas_are_normal_with_variances_h_and_h_12_and_h_720(draws, field):
    assert_normal(draws[field], 0.0, 1.0)
    assert_mean(draws[field], 0.0)
    assert_variance(draws[field], 1.0, 0.0)


@pytest.mark.parametrize("pair", ["WH", "WK", "HK"])
def test_increments_and_areas_are_uncorrelated(draws, pair):
    assert_uncorrelated(draws[pair[0]], draws[pair[1]])


@pytest.mark.parametrize("field", ["W", "H", "K"])
def test_rows_and_dimensions_and_keys_are_uncorrelated(draws, field):
    x = draws[field]
    assert_uncorrelated(x[:, 1:], x[:, :-1])
    assert_uncorrelated(x[..., 1:], x[..., :-1])
    assert_uncorrelated(x[1:], x[:-1])


def test_leaves_of_a_tree_are_uncorrelated():
    grid = uniform(0.0, 1.0, 64)
    tree = {"a": jnp.zeros(2), "b": (jnp.zeros(()), jnp.zeros((2, 2)))}
    paths = jax.vmap(lambda key: GridBrownian(grid, tree, key=key).table.W)(jr.split(jr.key(2), 16))
    a, (b, c) = paths["a"], paths["b"]
    assert (a.shape, b.shape, c.shape) == ((16, 64, 2), (16, 64), (16, 64, 2, 2))
    assert_uncorrelated(a[..., 0], b)
    assert_uncorrelated(b, c[..., 0, 0])
    assert_uncorrelated(a[..., 1], c[..., 0, 1])
    for leaf in (a, b, c):
        assert_normal(leaf, 0.0, 1 / 64)


def test_decreasing_times_have_the_same_law_and_negative_dt():
    path = _path(through([1.0, 0.0], -0.25), key=jr.key(0), area="WHK")
    forward = _path(through([0.0, 1.0], 0.25), key=jr.key(0), area="WHK")
    np.testing.assert_array_equal(path.table.W, forward.table.W)
    assert path.table.dt.tolist() == [-0.25] * 4


# ---- Row i is a function of (key, i) alone. ----


@pytest.mark.parametrize("storage", STORAGES)
def test_a_longer_path_only_appends_rows(storage):
    tree, area = ((2,), "WH") if storage == "counter" else ({"a": jnp.zeros(3), "b": jnp.zeros((2, 2))}, "WHK")
    make = lambda n: _path(uniform(0.0, n / 8, n), tree, key=jr.key(5), area=area, storage=storage)
    short, long = _rows(make(8)), _rows(make(24))
    assert set(short) == set(area)
    for a, b in zip(jax.tree.leaves(short), jax.tree.leaves(long)):
        np.testing.assert_array_equal(a, b[:8])


@pytest.mark.parametrize(("storage", "extra"), [("table", 1), ("table", 7), ("table", 100), ("counter", 100)])
def test_padding_changes_no_bit_of_any_row(storage, extra):
    grid = through([0.0, 0.3, 1.0], 0.13)
    make = lambda grid: _path(grid, key=jr.key(1), area="WH", storage=storage)
    short, long = _rows(make(grid)), _rows(make(grid.pad(grid.num_rows + extra)))
    for k in short:
        np.testing.assert_array_equal(short[k], long[k][: grid.num_rows])


@pytest.mark.parametrize("storage", STORAGES)
def test_w_and_h_do_not_depend_on_which_areas_are_drawn(storage):
    grid = uniform(0.0, 1.0, 6)
    rows = {area: _rows(_path(grid, key=jr.key(3), area=area, storage=storage)) for area in AREAS}
    for area in ("WH", "WHK"):
        np.testing.assert_array_equal(rows["W"]["W"], rows[area]["W"])
    np.testing.assert_array_equal(rows["WH"]["H"], rows["WHK"]["H"])


@pytest.mark.parametrize("storage", STORAGES)
def test_a_row_depends_on_the_length_of_its_own_step_only(storage):
    even = through([0.0, 1.0], 0.25)
    odd = Grid(np.array([0.0, 0.25, 0.5, 0.6]), np.array([0.25, 0.5, 0.6, 3.0]), np.ones(4, bool), np.array([0, 4]))
    make = lambda grid: _path(grid, key=jr.key(3), storage=storage)
    a, b = _rows(make(even))["W"], _rows(make(odd))["W"]
    np.testing.assert_array_equal(a[:2], b[:2])
    assert (a[2:] != b[2:]).all()


def test_other_keys_and_other_rows_are_other_numbers():
    grid = uniform(0.0, 1.0, 6)
    for storage in STORAGES:
        a, b = (_rows(_path(grid, key=jr.key(k), storage=storage))["W"] for k in (0, 1))
        assert len(np.unique(np.concatenate([a, b]))) == 24


def test_old_style_keys_work():
    grid = uniform(0.0, 1.0, 4)
    new, old = (GridBrownian(grid, (2,), key=k).table.W for k in (jr.key(4), jr.PRNGKey(4)))
    np.testing.assert_array_equal(new, old)


def test_storage_is_what_was_asked_for_and_a_counter_keeps_nothing():
    grid = uniform(0.0, 1.0, 1000)
    path = GridBrownian(grid, (50,), key=jr.key(0), storage="counter")
    assert path.storage == "counter"
    assert path.table is None
    assert GridBrownian(grid, (2,), key=jr.key(0)).storage == "table"


def test_dtypes_are_those_of_the_structure(x64):
    grid = uniform(0.0, 1.0, 4)
    tree = {"a": jax.ShapeDtypeStruct((2,), jnp.float32), "b": jax.ShapeDtypeStruct((), jnp.float64)}
    for storage in STORAGES:
        rows = _rows(_path(grid, tree, key=jr.key(0), area="WHK", storage=storage))
        assert {k: str(x["a"].dtype) + str(x["b"].dtype) for k, x in rows.items()} == dict.fromkeys(
            "WHK", "float32float64"
        )


# ---- What a plain diffrax call may ask. ----


@pytest.mark.parametrize(
    ("storage", "ts"),
    [("table", [0.0, 0.3, 1.0]), ("table", [1.0, 0.3, 0.0]), ("counter", [0.0, 0.3, 1.0])],
    ids=["increasing-table", "decreasing-table", "counter"],
)
def test_queries_on_the_grid_are_the_rows(storage, ts):
    grid = through(ts, 0.13 * np.sign(ts[1] - ts[0])).pad(16)
    path = _path(grid, key=jr.key(0), area="WHK", storage=storage)
    count = int(grid.num_steps)
    a, b = jnp.asarray(grid.left), jnp.asarray(grid.right)
    answers = jax.jit(jax.vmap(lambda s, t: path.evaluate(s, t, use_levy=True)))(a, b)
    rows = _rows(path)
    for k, x in rows.items():
        np.testing.assert_allclose(getattr(answers, k)[:count], x[:count], rtol=1e-6)
    third = path.row(2, b[2] - a[2])
    np.testing.assert_allclose(third.K, rows["K"][2], rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.vmap(path.evaluate))(a, b)[:count], rows["W"][:count], rtol=1e-6)


def test_queries_with_exchanged_ends_run_the_path_backwards():
    path = _path(uniform(0.0, 1.0, 4), key=jr.key(0), area="WHK")
    query = jax.jit(lambda s, t: path.evaluate(s, t, use_levy=True))
    there, back = query(0.25, 0.5), query(0.5, 0.25)
    np.testing.assert_array_equal(back.W, -there.W)
    np.testing.assert_array_equal(back.H, there.H)
    np.testing.assert_array_equal(back.K, -there.K)
    assert float(back.dt) == -float(there.dt) == -0.25


@eqx.filter_jit
def _query(path, t0, t1, use_levy=False):
    return path.evaluate(t0, t1, use_levy=use_levy)


_OFF = {
    "half a step": (0.25, 0.375),
    "two steps": (0.25, 0.75),
    "shifted by a third": (0.33, 0.58),
    "before the grid": (-0.25, 0.0),
    "after the grid": (1.0, 1.25),
    "nothing": (0.5, 0.5),
    "the whole": (0.0, 1.0),
    "a point": (0.5, None),
}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("query", _OFF.values(), ids=_OFF)
def test_queries_off_the_grid_get_nan(storage, query):
    path = _path(uniform(0.0, 1.0, 4), key=jr.key(0), area="WHK", storage=storage)
    assert np.isnan(_query(path, *query)).all()
    if query[1] is not None:
        out = _query(path, *query, use_levy=True)
        assert all(np.isnan(x).all() for x in (out.W, out.H, out.K))


def test_padded_rows_do_not_answer_for_times_after_the_end():
    path = _path(uniform(0.0, 1.0, 4).pad(9), key=jr.key(0))
    np.testing.assert_array_equal(_query(path, 0.75, 1.0), path.table.W[3])
    assert np.isnan(_query(path, 1.0, 1.25)).all()


def test_rounding_of_accumulated_times_is_forgiven():
    grid = uniform(0.0, 1.0, 1000)
    path = GridBrownian(grid, (), key=jr.key(0))
    h = np.float32(1e-3)
    left = np.concatenate([[np.float32(0.0)], np.cumsum(np.full(999, h), dtype=np.float32)])
    assert np.abs(left - grid.left).max() > 2e-6
    out = jax.vmap(path.evaluate)(jnp.asarray(left), jnp.asarray(left + h))
    np.testing.assert_array_equal(out, path.table.W)


def test_a_path_covers_its_grid():
    path = GridBrownian(through([0.5, 2.0], 0.25).pad(20), (), key=jr.key(0))
    assert (float(path.t0), float(path.t1)) == (0.5, 2.0)


def test_paths_work_on_batches_of_grids():
    grids = [through([0.0, 1.0], 0.25), through([0.0, 0.3], 0.1)]
    make = jax.jit(lambda grid: GridBrownian(grid, (2,), key=jr.key(0)).table.W)
    batch = jax.vmap(make)(stack(grids))
    for i, grid in enumerate(grids):
        np.testing.assert_allclose(batch[i, : grid.num_rows], make(grid), rtol=1e-6)


# ---- Gradients in the times. ----


@pytest.mark.parametrize("storage", STORAGES)
def test_the_square_root_of_a_step_has_no_nan_gradient_where_padding_has_length_zero(storage):
    def total(ts):
        path = GridBrownian(subdivide(ts, 2), (3,), key=jr.key(0), levy_area=FULL, storage=storage)
        return sum((x[:4] ** 2).sum() for x in _rows(path).values())

    grad = jax.jit(jax.grad(total))(jnp.array([0.0, 0.3, 1.0, 1.0, 1.0]))
    assert np.isfinite(grad).all()
    # W^2 + H^2 + K^2 of a row is linear in its length, so the gradient telescopes.
    assert abs(grad.sum()) < 1e-5 * np.abs(grad).max()
    assert np.abs(grad[:3]).min() > 1e-3


def test_the_gradient_in_the_length_is_that_at_fixed_normals(x64):
    def w(h):
        return GridBrownian(subdivide(jnp.stack([0.0 * h, h]), 1), (), key=jr.key(0)).table.W[0]

    value, grad = jax.jit(jax.value_and_grad(w))(jnp.array(0.7))
    np.testing.assert_allclose(grad, value / (2 * 0.7), rtol=1e-12)


# ---- Merging steps. ----


def _by_definition(w, h):
    """W, H and K of a step from its W at equal sub-steps: trapezoidal sums of their definitions as integrals."""
    n = w.shape[0]
    path = np.concatenate([np.zeros((1, *w.shape[1:])), np.cumsum(w, axis=0)])
    total = path[-1]
    r = np.linspace(0.0, 1.0, n + 1).reshape(-1, *(1,) * (w.ndim - 1))
    bridge = path - r * total
    weights = np.full(n + 1, 1.0 / n)
    weights[[0, -1]] /= 2
    weights = weights.reshape(r.shape)
    return total, (weights * bridge).sum(axis=0), (weights * bridge * (0.5 - r)).sum(axis=0)


def test_merged_areas_are_the_integrals_of_the_fine_path(x64):
    coarse, each = 16, 64
    fine = _path(uniform(0.0, 2.0, coarse * each), (5,), key=jr.key(8), area="WHK")
    merged = _merged(fine, each)
    w = np.asarray(fine.table.W).reshape(coarse, each, 5)
    total, area, moment = (np.stack(x) for x in zip(*(_by_definition(x, 2.0 / coarse) for x in w)))
    rms = lambda x: float(np.sqrt((np.asarray(x) ** 2).mean()))
    np.testing.assert_allclose(merged.W, total, atol=1e-12)
    # The areas inside the fine steps are what the sums leave out: 1/64 of H, and sqrt(5)/64 of K.
    assert rms(merged.H - area) < 1.5 / each * rms(area)
    assert rms(merged.K - moment) < 1.5 * np.sqrt(5) / each * rms(moment)


def test_merging_is_exact_for_a_path_that_is_a_polynomial(x64):
    # On [a, b] the path t^3 has W, H and K in closed form, by their definitions as integrals.
    def step(a, b):
        h, x = b - a, np.polynomial.legendre.leggauss(8)
        r = (x[0] + 1) / 2
        t = a + h * r
        bridge = t**3 - a**3 - r * (b**3 - a**3)
        return b**3 - a**3, (x[1] / 2 * bridge).sum(), (x[1] / 2 * bridge * (0.5 - r)).sum()

    knots = np.array([0.0, 0.2, 0.5, 0.9, 1.0, 1.3, 2.0])
    grid = through(knots)
    path = GridBrownian(grid, (), key=jr.key(0), levy_area=FULL)
    values = np.array([step(a, b) for a, b in zip(knots[:-1], knots[1:])])
    table = FULL(dt=jnp.diff(knots), W=values[:, 0], H=values[:, 1], K=values[:, 2])
    path = eqx.tree_at(lambda p: (p.table, p.grid.save), path, (table, np.array([0, 6])))
    for k in (2, 3, 6):
        merged = _merged(path, k)
        wanted = np.array([step(a, b) for a, b in zip(knots[:-1:k], knots[k::k])])
        np.testing.assert_allclose(merged.W, wanted[:, 0], rtol=1e-12)
        np.testing.assert_allclose(merged.H, wanted[:, 1], rtol=1e-11)
        np.testing.assert_allclose(merged.K, wanted[:, 2], rtol=1e-10, atol=1e-15)


def test_merging_in_two_rounds_is_merging_at_once(x64):
    fine = _path(uniform(0.0, 1.0, 48), (3,), key=jr.key(8), area="WHK")
    once, twice = _merged(fine, 12), _merged(fine, 3, 4)
    for a, b in zip(jax.tree.leaves(once), jax.tree.leaves(twice)):
        np.testing.assert_allclose(a, b, atol=1e-14)


def test_merged_rows_follow_the_law():
    grid = through([0.0, 1.0, 1.6], 0.05)

    def one(key):
        return _rows(GridBrownian(grid, (40,), key=key, levy_area=FULL, storage="counter").coarsen(4))

    rows = jax.jit(jax.vmap(one))(jr.split(jr.key(3), 16))
    h = np.repeat([0.2, 0.2], [5, 3])
    scaled = {k: np.asarray(x) / np.sqrt(h * VARIANCE[k])[None, :, None] for k, x in rows.items()}
    for x in scaled.values():
        assert_normal(x, 0.0, 1.0)
        assert_variance(x, 1.0, 0.0)
    for a, b in ("WH", "WK", "HK"):
        assert_uncorrelated(scaled[a], scaled[b])


def test_trees_and_counters_merge_too():
    tree = {"a": jnp.zeros(2), "b": jnp.zeros(())}
    path = _path(uniform(0.0, 1.0, 12), tree, key=jr.key(3), storage="counter")
    fine, coarse = _rows(path), _merged(path, 4)
    for name, shape in (("a", (3, 4, 2)), ("b", (3, 4))):
        wanted = fine["W"][name].reshape(shape).sum(axis=1)
        np.testing.assert_allclose(coarse.W[name], wanted, rtol=1e-5, atol=1e-7)
    assert type(coarse) is dfx.BrownianIncrement


# ---- What is refused. ----


def test_an_unknown_levy_area_is_refused():
    with pytest.raises(ValueError, match="levy_area must be one of diffrax.BrownianIncrement, diffrax.SpaceTime"):
        GridBrownian(uniform(0.0, 1.0, 2), (), key=jr.key(0), levy_area=dfx.AbstractBrownianIncrement)


def test_an_unknown_storage_is_refused():
    with pytest.raises(ValueError, match="storage must be .*, got 'disk'"):
        GridBrownian(uniform(0.0, 1.0, 2), (), key=jr.key(0), storage="disk")


@pytest.mark.parametrize("dtype", ["int32", "complex64", "bool"])
def test_noise_that_is_not_real_floating_is_refused(dtype):
    with pytest.raises(ValueError, match=f"needs a real floating structure, got dtype {dtype}"):
        GridBrownian(uniform(0.0, 1.0, 2), jnp.zeros(2, dtype), key=jr.key(0))


def test_coarsening_by_what_does_not_divide_is_refused():
    path = GridBrownian(uniform(0.0, 1.0, 10), (), key=jr.key(0))
    with pytest.raises(ValueError, match="k=3 must divide"):
        path.coarsen(3)
