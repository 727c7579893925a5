"""Batches, trees, dtypes and traces: however a solve is called, a path's numbers are its own."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest

import sdeflow as sf

SERIES = [np.array(ts) for ts in ([0.0, 0.5, 1.0], [0.1, 0.2, 1.7], [0.0, 2.0, 2.25], [1.0, 1.3, 1.4])]
DT0 = 0.11


def _equation(rate):
    drift = lambda t, y, args: -rate * y + jnp.sin(t) * args
    return sf.SDE(drift, lambda t, y, args: 0.3 + 0.1 * jnp.cos(y), interpretation="stratonovich")


def _one(y0, ts, grid, args, key, rate):
    sol = sf.solve(_equation(rate), y0, ts, args=args, grid=grid, key=key, solver=dfx.Heun())
    return (sol.ys**2).sum(), sol


def _batch(dtype=None):
    grids = [sf.grids.through(ts, DT0) for ts in SERIES]
    y0 = jnp.array([[0.3, 0.7], [1.0, -1.0], [0.2, 0.1], [2.0, 0.5]], dtype)
    args = jnp.array([0.1, 0.5, -0.2, 0.7], dtype)
    return grids, y0, jnp.asarray(np.stack(SERIES), dtype), args, jr.split(jr.key(0), 4)


def _gradients(y0, ts, grid, args, key, rate):
    return jax.value_and_grad(_one, argnums=(0, 3, 5), has_aux=True)(y0, ts, grid, args, key, rate)


@pytest.fixture(scope="module")
def mapped():
    """Value, solution and gradients of a batch of series, each with a grid of its own, in one call of float64."""
    with jax.enable_x64(True):
        grids, y0, ts, args, keys = _batch()
        run = jax.jit(jax.vmap(_gradients, in_axes=(0, 0, 0, 0, 0, None)))
        return run, run(y0, ts, sf.grids.stack(grids), args, keys, jnp.array(0.9))


def test_a_batch_of_series_with_their_own_grids_is_a_loop(mapped, x64):
    grids, y0, ts, args, keys = _batch()
    assert len({grid.num_rows for grid in grids}) == 4
    ((_, sol), grads) = mapped[1]
    for i, grid in list(enumerate(grids))[1:3]:
        (_, alone), one = jax.jit(lambda *a, i=i, g=grid: _gradients(a[0], SERIES[i], g, *a[1:]))(
            y0[i], args[i], keys[i], jnp.array(0.9)
        )
        np.testing.assert_allclose(sol.ys[i], alone.ys, rtol=1e-12)
        np.testing.assert_allclose(sol.final[i], alone.final, rtol=1e-12)
        assert int(sol.stats["num_steps"][i]) == int(alone.stats["num_steps"]) == grid.num_rows
        assert int(sol.stats["nfe"][i]) == int(alone.stats["nfe"])
        for batched, single in zip(grads, one):
            np.testing.assert_allclose(batched[i], single, rtol=1e-12)


def test_a_series_of_nan_leaves_the_others_unchanged_to_the_bit(mapped, x64):
    grids, y0, ts, args, keys = _batch()
    run, healthy = mapped
    sick = run(y0.at[1, 0].set(jnp.nan), ts, sf.grids.stack(grids), args, keys, jnp.array(0.9))
    ((_, sol), grads), ((_, sol0), grads0) = sick, healthy
    assert sf.is_okay(sol0.result).tolist() == [True] * 4
    assert sf.is_okay(sol.result).tolist() == [True, False, True, True]
    for a, b in zip(jax.tree.leaves((sol.ys, sol.final, grads)), jax.tree.leaves((sol0.ys, sol0.final, grads0))):
        np.testing.assert_array_equal(np.delete(a, 1, axis=0), np.delete(b, 1, axis=0))
    assert "3 of 4 paths okay" in repr(sol)


def test_permuting_a_batch_permutes_its_solutions(mapped, x64):
    grids, y0, ts, args, keys = _batch()
    run, ((_, sol), grads) = mapped
    order = np.array([2, 0, 3, 1])
    grid = sf.grids.stack([grids[i] for i in order])
    (_, other), grads2 = run(y0[order], ts[order], grid, args[order], keys[order], jnp.array(0.9))
    for a, b in zip(jax.tree.leaves((other.ys, grads2)), jax.tree.leaves((sol.ys, grads))):
        np.testing.assert_array_equal(a, b[order])


def test_ragged_series_with_repeated_last_times_are_a_loop(x64):
    # ts itself is traced and padded by repeats, with steps_per_interval instead of a grid.
    ragged = jnp.array([[0.0, 0.5, 1.0, 1.0], [0.1, 0.2, 1.7, 3.0], [0.0, 2.0, 2.0, 2.0]])
    counts = [3, 4, 2]
    y0, keys = jnp.array([[0.3, 0.7], [1.0, -1.0], [0.2, 0.1]]), jr.split(jr.key(0), 3)
    solve = lambda y, ts, key: sf.solve(
        _equation(0.9), y, ts, args=0.4, key=key, steps_per_interval=3, solver=dfx.Heun()
    )
    batch = jax.jit(jax.vmap(solve))(y0, ragged, keys)
    for i, n in enumerate(counts):
        alone = solve(y0[i], np.asarray(ragged[i, :n]), keys[i])
        np.testing.assert_allclose(batch.ys[i, :n], alone.ys, rtol=1e-12)
        np.testing.assert_array_equal(batch.ys[i, n:], np.broadcast_to(batch.final[i], (4 - n, 2)))
        assert int(batch.stats["num_steps"][i]) == 3 * (n - 1)


def test_jit_and_eager_and_traced_grids_agree(x64):
    grid, ts = sf.grids.through(SERIES[1], DT0), SERIES[1]
    y0, key = jnp.array([0.3, 0.7]), jr.key(1)
    run = lambda y0, grid: sf.solve(_equation(0.9), y0, ts, args=0.4, key=key, grid=grid, solver=dfx.Heun()).ys
    eager = run(y0, grid)
    np.testing.assert_array_equal(jax.jit(lambda y: run(y, grid))(y0), eager)
    np.testing.assert_allclose(jax.jit(run)(y0, grid), eager, rtol=1e-14)
    with jax.disable_jit():
        np.testing.assert_allclose(
            run(y0, sf.grids.through(ts)), jax.jit(lambda y: run(y, sf.grids.through(ts)))(y0), rtol=1e-14
        )


def test_dt0_and_grid_and_num_steps_are_one_solve(x64):
    y0, key, ts = jnp.array([0.3, 0.7]), jr.key(1), SERIES[0]
    run = lambda **kw: sf.solve(_equation(0.9), y0, ts, args=0.4, key=key, solver=dfx.Heun(), **kw).ys
    one = run(dt0=0.1)
    np.testing.assert_array_equal(run(grid=sf.grids.through(ts, 0.1)), one)
    np.testing.assert_array_equal(run(grid=sf.grids.through(ts, 0.1, num_steps=64)), one)
    np.testing.assert_array_equal(run(steps_per_interval=5), one)


def test_ends_alone_are_the_ends_of_all(x64):
    y0, key = jnp.array([0.3, 0.7]), jr.key(1)
    grid = sf.grids.through([0.0, 0.5, 1.0], 0.1)
    ends = sf.grids.Grid(grid.left, grid.right, grid.live, np.array([0, 10]))
    run = lambda ts, grid: sf.solve(_equation(0.9), y0, ts, args=0.4, key=key, grid=grid, solver=dfx.Heun())
    whole, short = run([0.0, 0.5, 1.0], grid), run([0.0, 1.0], ends)
    np.testing.assert_allclose(short.ys, whole.ys[np.array([0, 2])], rtol=1e-15)
    np.testing.assert_array_equal(whole.ys[0], y0)
    np.testing.assert_array_equal(whole.ys[-1], whole.final)


def test_a_time_may_be_saved_twice_by_a_grid(x64):
    grid = sf.grids.through([0.0, 1.0], 0.25)
    grid = sf.grids.Grid(grid.left, grid.right, grid.live, np.array([0, 2, 2, 4]))
    sol = sf.solve(_equation(0.9), jnp.ones(2), [0.0, 0.5, 0.5, 1.0], args=0.4, grid=grid, key=jr.key(0))
    np.testing.assert_array_equal(sol.ys[1], sol.ys[2])


# ---- Shapes of the state. ----


def test_a_tree_is_its_leaves_side_by_side(x64):
    tree = {"a": jnp.array([0.3, 0.7]), "b": (jnp.array(1.0), jnp.array([[0.1], [0.2]]))}
    drift = lambda t, y, args: jax.tree.map(lambda x: -args * x + jnp.sin(t), y)
    diffusion = lambda t, y, args: jax.tree.map(lambda x: 0.2 + 0.1 * jnp.cos(x), y)
    sde = sf.SDE(drift, diffusion)
    grid = sf.grids.through(SERIES[0], 0.1)
    path = sf.paths.GridBrownian(grid, tree, key=jr.key(0))
    loss = lambda y: sum((x**2).sum() for x in jax.tree.leaves(sf.solve(sde, y, SERIES[0], args=0.5, path=path).ys))
    sol, grad = sf.solve(sde, tree, SERIES[0], args=0.5, path=path), jax.jit(jax.grad(loss))(tree)
    assert jax.tree.structure(sol.ys) == jax.tree.structure(tree)
    for y0, w, ys, g in zip(*map(jax.tree.leaves, (tree, path.table.W, sol.ys, grad))):
        leaf = eqx.tree_at(lambda p, w=w: p.table.W, sf.paths.GridBrownian(grid, y0, key=jr.key(1)), w)
        one = lambda y: (sf.solve(sde, y, SERIES[0], args=0.5, path=leaf).ys ** 2).sum()  # noqa: B023
        alone = sf.solve(sde, y0, SERIES[0], args=0.5, path=leaf)
        np.testing.assert_allclose(ys, alone.ys, rtol=1e-13)
        np.testing.assert_allclose(g, jax.jit(jax.grad(one))(y0), rtol=1e-12)


def test_a_batched_state_with_a_batchwise_drift_is_one_path(x64):
    W = jnp.array([[0.1, 0.8], [-0.7, 0.2]])
    drift, diffusion = lambda t, y, args: jnp.tanh(y @ W) - y, lambda t, y, args: 0.2 * jnp.ones_like(y)
    sde = sf.SDE(drift, diffusion, additive=True)
    y0, grid = jr.normal(jr.key(1), (5, 2)), sf.grids.uniform(0.0, 1.0, 8)
    path = sf.paths.GridBrownian(grid, (5, 2), key=jr.key(0), levy_area=dfx.SpaceTimeLevyArea)
    whole = sf.solve(sde, y0, [0.0, 1.0], path=path).final

    def one(y, w, h):
        bare = sf.paths.GridBrownian(grid, (2,), key=jr.key(0), levy_area=dfx.SpaceTimeLevyArea)
        own = eqx.tree_at(lambda p: (p.table.W, p.table.H), bare, (w, h))
        return sf.solve(sde, y, [0.0, 1.0], path=own).final

    rows = jax.vmap(one, in_axes=(0, 1, 1))(y0, path.table.W, path.table.H)
    np.testing.assert_allclose(whole, rows, rtol=1e-12)


@pytest.mark.parametrize("noises", [1, 3])
def test_operators_that_are_not_square_are_sums_over_their_columns(x64, noises):
    L = jnp.array([[0.3, -0.2, 0.5], [0.1, 0.4, -0.6]])[:, :noises]
    sde = sf.SDE(lambda t, y, args: -y, lambda t, y, args: lx.MatrixLinearOperator(L * jnp.cos(y)[:, None]))
    grid = sf.grids.uniform(0.0, 1.0, 6)
    path = sf.paths.GridBrownian(grid, (noises,), key=jr.key(0))
    sol = sf.solve(sde, jnp.array([0.3, 0.7]), [0.0, 1.0], path=path)
    y = np.array([0.3, 0.7])
    for w in np.asarray(path.table.W):
        y = y - y / 6 + (np.asarray(L) * np.cos(y)[:, None]) @ w
    np.testing.assert_allclose(sol.final, y, rtol=1e-13)
    by_key = sf.solve(sde, jnp.array([0.3, 0.7]), [0.0, 1.0], grid=grid, key=jr.key(0))
    np.testing.assert_allclose(by_key.final, sol.final, rtol=1e-14)


def test_a_scalar_state_and_an_empty_batch_work():
    assert sf.solve(_equation(0.9), jnp.array(0.3), [0.0, 1.0], args=0.1, dt0=0.5, key=jr.key(0)).ys.shape == (2,)
    assert sf.solve(_equation(0.9), jnp.zeros((0, 2)), [0.0, 1.0], args=0.1, dt0=0.5, key=jr.key(0)).final.shape == (
        0,
        2,
    )


# ---- Precision. ----


def _dtypes(sol):
    return {str(x.dtype) for x in jax.tree.leaves((sol.ts, sol.ys, sol.final))}


@pytest.mark.parametrize("wide", [False, True], ids=["x64 off", "x64 on"])
def test_a_float32_state_stays_float32(wide):
    with jax.enable_x64(wide):
        y0, ts = jnp.array([0.3, 0.7], jnp.float32), np.array([0.0, 0.5, 1.0])
        ou = sf.equations.OrnsteinUhlenbeck(1.0, 0.0, 0.3)
        assert _dtypes(sf.solve(ou, y0, ts, dt0=0.25, key=jr.key(0))) == {"float32"}
        sol = sf.solve(sf.ODE(lambda t, y, args: -y * t), y0, ts, dt0=0.25)
        assert _dtypes(sol) == {"float32"}
        grad = jax.grad(lambda y: sf.solve(ou, y, ts, dt0=0.25, key=jr.key(0), solver=dfx.Euler()).final.sum())(y0)
        assert grad.dtype == jnp.float32


def test_the_leaves_of_a_tree_keep_their_own_dtypes(x64):
    y0 = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones(2, jnp.float64)}
    sde = sf.SDE(
        lambda t, y, args: jax.tree.map(lambda x: -x, y),
        lambda t, y, args: jax.tree.map(lambda x: 0.1 * jnp.ones_like(x), y),
        additive=True,
    )
    sol = sf.solve(sde, y0, [0.0, 1.0], dt0=0.25, key=jr.key(0), solver=dfx.Euler())
    assert {k: str(x.dtype) for k, x in sol.final.items()} == {"a": "float32", "b": "float64"}


def test_complex_states_of_ordinary_equations_rotate(x64):
    sol = sf.solve(sf.ODE(lambda t, y, args: 1j * y), jnp.array([1.0 + 0j]), [0.0, np.pi / 2], dt0=0.05)
    np.testing.assert_allclose(sol.final, [1j], atol=1e-8)
    assert sol.ts.dtype == jnp.float64


def test_noise_for_complex_states_is_refused():
    sde = sf.SDE(lambda t, y, args: y, lambda t, y, args: y)
    with pytest.raises(NotImplementedError, match="real and imaginary parts"):
        sf.solve(sde, jnp.array([1j]), [0.0, 1.0], dt0=0.5, key=jr.key(0))


# ---- What has no test in the rules. ----

OU = sf.equations.OrnsteinUhlenbeck(1.0, 0.0, 0.5)
GBM = sf.equations.GeometricBrownianMotion(0.1, 0.2)
DECAY = sf.ODE(lambda t, y, args: -y)
RAW = dfx.ODETerm(lambda t, y, args: -y)
TS = [0.0, 1.0]


def _tree(tol, t1=1.0):
    return dfx.VirtualBrownianTree(0.0, t1, tol, (2,), jr.key(0))


REFUSED = {
    "a solver of no known calculus for Ito noise": (
        lambda y: sf.solve(GBM, y, TS, dt0=0.1, key=jr.key(0), solver=dfx.Tsit5()),
        r"Tsit5 is not known to converge to the Ito solution.*equation.to_stratonovich\(\)",
    ),
    "a tree coarser than the steps": (
        lambda y: sf.solve(GBM, y, TS, dt0=0.1, path=_tree(0.06), solver=dfx.Euler()),
        "tol=0.06 is more than half of the shortest step 0.1",
    ),
    "a tree that ends too early": (
        lambda y: sf.solve(GBM, y, [0.0, 2.0], dt0=0.1, path=_tree(0.01), solver=dfx.Euler()),
        "The VirtualBrownianTree covers times from 0 to 1, but ts runs from 0 to 2",
    ),
    "a path that begins too late": (
        lambda y: sf.solve(GBM, y, [-1.0, 1.0], dt0=0.1, path=_tree(0.01), solver=dfx.Euler()),
        "covers times from 0 to 1, but ts runs from -1 to 1",
    ),
    "a tree without areas": (
        lambda y: sf.solve(OU, y, TS, dt0=0.1, path=_tree(0.01)),
        "ShARK needs levy_area=diffrax.SpaceTimeLevyArea, but the VirtualBrownianTree has BrownianIncrement",
    ),
    "a key for an ordinary equation": (
        lambda y: sf.solve(DECAY, y, TS, dt0=0.1, key=jr.key(0)),
        "An ordinary equation has no noise; drop key=",
    ),
    "a key for raw terms": (
        lambda y: sf.solve(RAW, y, TS, dt0=0.1, key=jr.key(0), solver=dfx.Heun()),
        "Raw diffrax terms carry their own noise; drop key=",
    ),
    "raw terms without steps": (lambda y: sf.solve(RAW, y, TS), "Nothing says how long the steps are: pass dt0="),
    "a batch of grids": (
        lambda y: sf.solve(DECAY, y, TS, grid=sf.grids.stack([sf.grids.through(TS, 0.5)] * 2)),
        "A batch of grids is for jax.vmap",
    ),
    "a batch of times": (
        lambda y: jax.jit(lambda ts: sf.solve(DECAY, y, ts, steps_per_interval=2).final)(jnp.zeros((2, 3))),
        r"got shape \(2, 3\); use vmap for batches",
    ),
    "no times": (lambda y: sf.solve(DECAY, y, [], dt0=0.1), r"at least one time, got shape \(0,\)"),
    "two equal times": (lambda y: sf.solve(DECAY, y, [0.5, 0.5], dt0=0.1), r"ts\[0\]=0.5 and ts\[1\]=0.5"),
    "no steps in an interval": (
        lambda y: sf.solve(DECAY, y, TS, steps_per_interval=0),
        "steps_per_interval must be a positive integer, got 0",
    ),
    "half a step in an interval": (
        lambda y: sf.solve(DECAY, y, TS, steps_per_interval=1.5),
        "steps_per_interval must be a positive integer, got 1.5",
    ),
    "seconds since 1970 in float32": (
        lambda y: sf.solve(DECAY, y, [1.7e9, 1.7e9 + 3600], dt0=60.0),
        "The shortest step of the grid is 60, below 8 units in the last place of the largest time 1.7e.09 in float32",
    ),
    "Euler with adaptive steps": (
        lambda y: sf.solve(
            GBM, y, TS, dt0=0.1, key=jr.key(0), solver=dfx.Euler(), stepsize_controller=dfx.PIDController(1e-3, 1e-3)
        ),
        "should not be solved with adaptive step sizes with Euler",
    ),
    "checkpoints of another name": (
        lambda y: sf.adjoints.DiscreteAdjoint("all"),
        'checkpoints must be "step", "sqrt", None or a positive number of segments, got \'all\'',
    ),
    "no segments": (lambda y: sf.adjoints.DiscreteAdjoint(0), "a positive number of segments, got 0"),
    "a flag for segments": (lambda y: sf.adjoints.DiscreteAdjoint(True), "a positive number of segments, got True"),
    "an empty record": (
        lambda y: sf.adjoints.DiscreteAdjoint(record=0),
        "record must be a positive number of steps, got 0",
    ),
}


@pytest.mark.parametrize(("call", "words"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_call_is_refused_with_what_to_do(call, words):
    with pytest.raises(ValueError, match=words):
        call(jnp.ones(2))


MISTYPED = {
    "an adjoint by name": (
        lambda y: sf.solve(DECAY, y, TS, dt0=0.1, adjoint="step"),
        r"adjoint must be one such as sf.adjoints.DiscreteAdjoint\(\) .*, got .step.",
    ),
    "a path that is none": (
        lambda y: sf.solve(OU, y, TS, dt0=0.1, path=jnp.ones(3)),
        r"path must be a diffrax path such as sf.paths.GridBrownian\(...\), got",
    ),
    "text for a state": (
        lambda y: sf.solve(DECAY, "y", TS, dt0=0.1),
        "y0 must be an array or a tree of arrays, got str",
    ),
    "a batch of old keys": (
        lambda y: sf.solve(OU, y, TS, dt0=0.1, key=jr.split(jr.PRNGKey(0), 3)),
        r"a batch of keys of shape \(3,\): use jax.vmap over keys",
    ),
}


@pytest.mark.parametrize(("call", "words"), MISTYPED.values(), ids=MISTYPED)
def test_a_wrong_type_is_refused_with_what_to_do(call, words):
    with pytest.raises(TypeError, match=words):
        call(jnp.ones(2))


def test_a_solve_error_carries_the_result_and_its_sentence():
    broken = sf.ODE(lambda t, y, args: jnp.where(t > 0.5, jnp.nan, -y))
    with pytest.raises(sf.SolveError) as caught:
        sf.solve(broken, jnp.ones(2), [0.0, 0.25, 1.0], dt0=0.05)
    assert caught.value.result == sf.RESULTS.nonfinite
    assert caught.value.message == str(caught.value)
    assert caught.value.message.endswith("It was finite last at the requested time 0.25.")
    with pytest.raises(sf.SolveError, match="finite at none of the requested times"):
        sf.solve(DECAY, jnp.array([jnp.nan]), TS, dt0=0.5)


def test_old_style_keys_are_the_same_keys():
    run = lambda key: sf.solve(OU, jnp.ones(2), TS, dt0=0.25, key=key).final
    np.testing.assert_array_equal(run(jr.PRNGKey(3)), run(jr.key(3)))


def test_the_given_is_printed_as_given():
    sol = sf.solve(
        OU, jnp.ones(2), [0.0, 0.5, 1.0], steps_per_interval=2, key=jr.key(0), solver=dfx.Euler(),
        adjoint=sf.adjoints.DiscreteAdjoint("sqrt"),
    )  # fmt: skip
    text = repr(sol)
    assert "Solution (okay)" in text
    assert "ys: f32[3,2]" in text
    assert "ts: 3 times from 0 to 1" in text
    assert "solver: Euler, as given" in text
    assert "grid: 4 rows, equal steps in every interval" in text
    assert "DiscreteAdjoint(checkpoints='sqrt'" in text
    assert "as given" in text.split("adjoint:")[1]
    assert "cost: 4 steps, 4 drift evaluations" in text
    shown = []
    jax.jit(lambda y: shown.append(repr(sf.solve(OU, y, TS, dt0=0.5, key=jr.key(0)))) or y)(jnp.ones(2))
    assert "Solution (traced)" in shown[0]
