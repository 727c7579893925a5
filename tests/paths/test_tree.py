"""``storage="tree"`` is ``diffrax.VirtualBrownianTree``: the same path for the same key, and the right law."""

import functools

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.stats import assert_mean, assert_uncorrelated

import sdeflow as sf

pytestmark = [pytest.mark.usefixtures("x64_module"), pytest.mark.slow]

AREAS = {"W": dfx.BrownianIncrement, "WH": dfx.SpaceTimeLevyArea, "WHK": dfx.SpaceTimeTimeLevyArea}
GRIDS = {
    "8 steps": sf.grids.uniform(0.0, 1.0, 8),
    "16 steps elsewhere": sf.grids.uniform(0.5, 3.7, 16),
    "1 step": sf.grids.uniform(-1.0, 1.0, 1),
    "11 steps": sf.grids.uniform(0.0, 1.0, 11),
    "uneven": sf.grids.through(np.array([0.2, 0.5, 1.3, 1.4]), 0.15),
    "decreasing": sf.grids.uniform(1.0, -0.5, 8),
    "decreasing, uneven": sf.grids.through(np.array([1.4, 1.3, 0.5, 0.2]), -0.15),
}


def _structure(dtype=None):
    return {"a": jax.ShapeDtypeStruct((2,), dtype or jnp.float64), "b": jax.ShapeDtypeStruct((), dtype or jnp.float64)}


def _reference(grid, structure, key, area):
    """Every row asked of diffrax's tree, its tolerance half the shortest step."""
    left, right = np.asarray(grid.left), np.asarray(grid.right)
    return _asked(np.minimum(left, right), np.maximum(left, right), structure, key, area)


def _asked(low, high, structure, key, area):
    tree = dfx.VirtualBrownianTree(low.min(), high.max(), (high - low).min() / 2, structure, key=key, levy_area=area)
    ask = lambda a, b: tree.evaluate(a, b, use_levy=True)
    return jax.jit(jax.vmap(ask))(jnp.asarray(low), jnp.asarray(high))


def _scaled(grid, structure, key, area):
    """As `_reference` for equal steps, of the tree over [0, 1], where their ends are exact, scaled as motion scales."""
    ends = np.arange(grid.num_rows + 1) / grid.num_rows
    rows = _asked(ends[:-1], ends[1:], structure, key, area)
    return jax.tree.map(lambda x: x * x.dtype.type(np.sqrt(float(grid.right[-1] - grid.left[0]))), rows)


# On the other grids the areas that say most are enough: their rows hold what the shorter ones do.
SHORTER = ("8 steps", "uneven", "decreasing")


@pytest.mark.parametrize(
    ("name", "area"),
    [(n, a) for n in GRIDS for a in AREAS if a == "WHK" or n in SHORTER],
)
def test_every_row_is_that_of_diffrax_s_tree(name, area):
    grid, key = GRIDS[name], jax.random.key(11)
    path = sf.paths.GridBrownian(grid, _structure(), key=key, levy_area=AREAS[area], storage="tree")
    reference = _reference(grid, _structure(), key, AREAS[area])
    if name == "16 steps elsewhere":
        # diffrax turns times into parts of the whole, here off by a rounding. Over one Brownian motion moves by about
        # its root, 1.5e-8: diffrax's answer is as far from that at the node, which ours is.
        inexact, reference = reference, _scaled(grid, _structure(), key, AREAS[area])
        for field in "WHK"[: len(area)]:
            apart = jax.tree.map(lambda x, y: float(np.abs(x - y).max()), *(getattr(r, field) for r in (inexact, reference)))  # fmt: skip
            assert max(apart.values()) < 1e-7
    # Backwards, W and K change their sign and H does not.
    sign = -1 if name.startswith("decreasing") else 1
    for field, factor in (("W", sign), ("H", 1), ("K", sign))[: len(area)]:
        for leaf in ("a", "b"):
            ours, theirs = getattr(path.table, field)[leaf], getattr(reference, field)[leaf]
            assert ours.shape == theirs.shape
            np.testing.assert_allclose(ours, factor * theirs, rtol=0, atol=1e-12)
            assert np.abs(np.asarray(theirs)).min() > 1e-6
    np.testing.assert_allclose(path.table.dt["b"], np.asarray(grid.right - grid.left), rtol=1e-12)


def test_the_tree_inside_is_that_of_an_old_key_too():
    grid, old = GRIDS["8 steps"], jax.random.PRNGKey(3)
    path = sf.paths.GridBrownian(grid, (2,), key=old, storage="tree")
    shape = jax.ShapeDtypeStruct((2,), jnp.float64)
    np.testing.assert_allclose(path.table.W, _reference(grid, shape, old, AREAS["W"]).W, rtol=0, atol=1e-13)


def test_float32_rows_are_those_of_the_tree_in_float32():
    grid, key, area = GRIDS["16 steps elsewhere"], jax.random.key(1), AREAS["WHK"]
    with jax.enable_x64(False):
        path = sf.paths.GridBrownian(grid, _structure(jnp.float32), key=key, levy_area=area, storage="tree")
        # In float32 the ends of these steps are off by 6e-8 of the whole, over which motion moves by 5e-4: diffrax is
        # asked where they are exact.
        reference = _scaled(grid, _structure(jnp.float32), key, area)
    for field in "WHK":
        for leaf in ("a", "b"):
            ours = getattr(path.table, field)[leaf]
            assert ours.dtype == jnp.float32
            # The tree takes H and K as differences of integrals from the start, which cancel in float32.
            atol = {"W": 2e-6, "H": 1e-4, "K": 2e-3}[field]
            np.testing.assert_allclose(ours, getattr(reference, field)[leaf], rtol=0, atol=atol)


def test_a_finer_dyadic_grid_sees_the_same_motion():
    key, area = jax.random.key(5), AREAS["WH"]
    fine = sf.paths.GridBrownian(sf.grids.uniform(0.0, 1.0, 32), (3,), key=key, levy_area=area, storage="tree")
    coarse = sf.paths.GridBrownian(sf.grids.uniform(0.0, 1.0, 4), (3,), key=key, levy_area=area, storage="tree")
    merged = fine.coarsen(8)
    np.testing.assert_allclose(merged.table.W, coarse.table.W, rtol=0, atol=1e-12)
    np.testing.assert_allclose(merged.table.H, coarse.table.H, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["8 steps", pytest.param("uneven", marks=pytest.mark.slow)])
def test_padding_changes_no_row(name):
    grid, key = GRIDS[name], jax.random.key(2)
    bare = sf.paths.GridBrownian(grid, (2,), key=key, levy_area=AREAS["WH"], storage="tree").table
    padded = sf.paths.GridBrownian(
        grid.pad(grid.num_rows + 3), (2,), key=key, levy_area=AREAS["WH"], storage="tree"
    ).table
    for field in "WH":
        ours = np.asarray(getattr(padded, field))
        assert np.isfinite(ours).all()
        np.testing.assert_allclose(ours[: grid.num_rows], getattr(bare, field), rtol=0, atol=1e-12)


def test_keys_and_grids_may_be_batched():
    keys = jax.random.split(jax.random.key(0), 3)
    grid = GRIDS["8 steps"]
    draw = lambda key: sf.paths.GridBrownian(grid, (2,), key=key, storage="tree").table.W
    batch = jax.jit(jax.vmap(draw))(keys)
    np.testing.assert_allclose(batch, jnp.stack([draw(k) for k in keys]), rtol=0, atol=1e-14)
    traced = jax.jit(lambda grid: sf.paths.GridBrownian(grid, (2,), key=keys[0], storage="tree").table.W)(grid)
    np.testing.assert_allclose(traced, batch[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("solver", "area", "dt0"),
    [(dfx.ShARK(), "WH", 1 / 8), pytest.param(dfx.Euler(), "W", 0.13, marks=pytest.mark.slow),
     pytest.param(dfx.SPaRK(), "WH", 0.13, marks=pytest.mark.slow)],
    ids=["ShARK-dyadic", "Euler-uneven", "SPaRK-uneven"],
)  # fmt: skip
def test_a_solve_on_it_is_a_solve_on_diffrax_s_tree(solver, area, dt0):
    key, ts = jax.random.key(9), np.array([0.0, 0.5, 1.0])
    kind = {"Euler": "ito"}.get(type(solver).__name__, "stratonovich")
    additive = isinstance(solver, dfx.ShARK)
    noise = (lambda t, y, args: jnp.ones_like(y) * (1 + t)) if additive else (lambda t, y, args: jnp.cos(y))
    equation = sf.SDE(lambda t, y, args: -y, noise, interpretation=kind, additive=additive)  # pyright: ignore
    grid = sf.grids.through(ts, dt0)
    ours = sf.paths.GridBrownian(grid, (2,), key=key, levy_area=AREAS[area], storage="tree")
    step = np.diff(np.asarray(grid.left)).min()
    theirs = dfx.VirtualBrownianTree(0.0, 1.0, step / 2, (2,), key=key, levy_area=AREAS[area])
    run = lambda path: sf.solve(equation, jnp.ones(2), ts, grid=grid, path=path, solver=solver).ys
    np.testing.assert_allclose(run(ours), run(theirs), rtol=0, atol=1e-12)
    assert np.isfinite(run(ours)).all()


@functools.cache
def _samples(name, n=3000):
    grid = GRIDS[name]
    draw = lambda key: sf.paths.GridBrownian(grid, (), key=key, levy_area=AREAS["WHK"], storage="tree").table
    table = jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(8), n))
    return {field: np.asarray(getattr(table, field)) for field in "WHK"}


@pytest.mark.parametrize("name", ["8 steps", pytest.param("uneven", marks=pytest.mark.slow)])
def test_rows_are_independent_and_have_the_variances_of_their_fields(name):
    fields, grid = _samples(name), GRIDS[name]
    h = np.asarray(grid.right - grid.left)
    for field, scale in (("W", 1.0), ("H", 1 / 12), ("K", 1 / 720)):
        x = fields[field]
        for i in range(grid.num_rows):
            assert_mean(x[:, i], 0.0)
            assert_mean(x[:, i] ** 2, float(h[i]) * scale)
    columns = np.concatenate([fields[f] for f in "WHK"], axis=1)
    for i in range(columns.shape[1]):
        for j in range(i):
            assert_uncorrelated(columns[:, i], columns[:, j])
