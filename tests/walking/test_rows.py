"""One row and its scan: a row's noise answers for its own step alone, jumps are heeded, scans differ in memory only."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdeflow as sf
from sdeflow.grids import Grid
from sdeflow.paths._rows import RowNoise, RowPath
from sdeflow.solvers._unrolled import UnrolledERK, UnrolledSRK
from sdeflow.walking import checkpointed_scan, prepare_solver

AREA = dfx.SpaceTimeLevyArea


def _row():
    left, right = jnp.array(0.25), jnp.array(0.5)
    increment = AREA(dt=jnp.array(0.25), W=jnp.array([1.0, 2.0]), H=jnp.array([3.0, 4.0]))
    return RowPath(left, right, increment, AREA)


# ---- The noise of a row. ----


def test_a_row_answers_for_its_own_step():
    row = _row()
    assert (float(row.t0), float(row.t1)) == (0.25, 0.5)
    np.testing.assert_array_equal(row.evaluate(row.left, row.right), [1.0, 2.0])
    np.testing.assert_array_equal(row.evaluate(row.left, row.right, use_levy=True).H, [3.0, 4.0])
    # Equal numbers in other arrays are the same step.
    np.testing.assert_array_equal(row.evaluate(jnp.array(0.25), jnp.array(0.5)), [1.0, 2.0])


@pytest.mark.parametrize(
    "query", [(0.25, 0.375), (0.375, 0.5), (0.25, 0.75), (0.0, 0.25), (0.25, 0.50000006), (0.25, None)]
)
def test_a_row_gives_nan_for_anything_else(query):
    t0, t1 = (None if t is None else jnp.array(t) for t in query)
    assert np.isnan(_row().evaluate(t0, t1)).all()
    if t1 is not None:
        out = _row().evaluate(t0, t1, use_levy=True)
        assert np.isnan(out.W).all()
        assert np.isnan(out.H).all()


def test_a_row_taken_backwards_changes_the_sign_of_its_increment():
    row = _row()
    back = row.evaluate(row.right, row.left, use_levy=True)
    np.testing.assert_array_equal(back.W, [-1.0, -2.0])
    np.testing.assert_array_equal(back.H, [3.0, 4.0])
    np.testing.assert_array_equal(row.evaluate(jnp.array(0.5), jnp.array(0.25)), [-1.0, -2.0])


class _Halves(dfx.AbstractWrappedSolver):
    """A solver of the user's that asks for halves of its step, of which the walk knows nothing."""

    solver: dfx.AbstractSolver
    term_structure = dfx.AbstractTerm
    interpolation_cls = dfx.LocalLinearInterpolation
    order = error_order = strong_order = lambda self, terms: None
    init = func = lambda self, *args: None

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        middle = t0 + (t1 - t0) / 2
        first, *_ = self.solver.step(terms, t0, middle, y0, args, None, made_jump)
        return self.solver.step(terms, middle, t1, first, args, None, False)


def test_half_steps_in_the_walk_are_a_failure_and_never_twice_the_variance():
    sde = sf.SDE(lambda t, y, args: 0.0 * y, lambda t, y, args: jnp.ones_like(y), additive=True)
    run = lambda grid: sf.solve(
        sde, jnp.zeros(4), [0.0, 1.0], grid=grid, key=jax.random.key(0), solver=_Halves(dfx.EulerHeun())
    )
    grid = sf.grids.uniform(0.0, 1.0, 8)
    with pytest.raises(sf.SolveError, match="infinite or NaN") as caught:
        run(grid)
    assert caught.value.result == sf.RESULTS.nonfinite
    inside = jax.jit(run)(grid.pad(11))
    assert np.isnan(inside.final).all()
    assert not bool(sf.is_okay(inside.result))


def test_half_steps_of_an_ordinary_equation_are_fine():
    sol = sf.solve(sf.ODE(lambda t, y, args: -y), jnp.ones(2), [0.0, 1.0], dt0=0.1, solver=dfx.HalfSolver(dfx.Euler()))
    np.testing.assert_allclose(sol.final, 0.95**20 + np.zeros(2), rtol=1e-5)


def test_two_noises_of_one_walk_are_kept_apart():
    grid = sf.grids.uniform(0.0, 1.0, 4)
    one, two = (sf.paths.GridBrownian(grid, (2,), key=jax.random.key(k)) for k in (0, 1))
    ones = lambda t, y, args: jnp.ones(2)
    terms = dfx.MultiTerm(
        dfx.ODETerm(lambda t, y, args: 0 * y),
        sf.SDE(lambda t, y, args: y, ones).terms(one).terms[1],
        sf.SDE(lambda t, y, args: y, lambda t, y, args: 10 * ones(t, y, args)).terms(two).terms[1],
    )
    assert len(RowNoise.of(terms).paths) == 2
    sol = sf.solve(terms, jnp.zeros(2), [0.0, 1.0], grid=grid, solver=dfx.Euler())
    wanted = one.table.W.sum(axis=0) + 10 * two.table.W.sum(axis=0)
    np.testing.assert_allclose(sol.final, wanted, rtol=1e-5)


@pytest.mark.parametrize("storage", ["table", "counter"])
def test_the_walk_draws_the_rows_of_the_path(storage):
    grid = sf.grids.through([0.0, 0.3, 1.0], 0.13)
    path = sf.paths.GridBrownian(grid, (2,), key=jax.random.key(0), storage=storage)
    brownian = sf.equations.BrownianMotion(2)
    ys = sf.solve(brownian, jnp.zeros(2), [0.0, 0.3, 1.0], path=path, solver=dfx.Euler()).ys
    h = jnp.asarray(grid.right - grid.left)
    w = jnp.stack([path.row(i, h[i]).W for i in range(grid.num_rows)])
    np.testing.assert_allclose(ys[1:], jnp.cumsum(w, axis=0)[grid.save[1:] - 1], rtol=1e-4, atol=1e-6)


def test_a_key_is_the_path_made_of_it():
    grid = sf.grids.through([0.0, 0.3, 1.0], 0.13)
    ou = sf.equations.OrnsteinUhlenbeck(1.0, 0.0, 0.5)
    by_key = sf.solve(ou, jnp.ones(2), [0.0, 0.3, 1.0], grid=grid, key=jax.random.key(3))
    path = sf.paths.GridBrownian(grid, (2,), key=jax.random.key(3), levy_area=dfx.SpaceTimeTimeLevyArea)
    by_path = sf.solve(ou, jnp.ones(2), [0.0, 0.3, 1.0], path=path)
    np.testing.assert_allclose(by_key.ys, by_path.ys, rtol=1e-6)


# ---- Jumps of the field. ----


def test_a_jump_that_the_grid_knows_of_is_crossed_exactly(x64):
    # Tsit5 keeps the last slope of a step as the first of the next: wrong across a jump, unless the grid says so.
    rate = lambda t: jnp.where(t < 0.5, 1.0, -20.0)
    ode = sf.ODE(lambda t, y, args: rate(t) * y)
    bare = sf.grids.uniform(0.0, 1.0, 80)
    before = np.nextafter(0.5, 0.0)
    right = np.where(bare.right == 0.5, before, bare.right)
    jump = np.isclose(bare.left, 0.5)
    assert jump.sum() == 1
    # Two solves of smooth equations, one to the jump and one from it.
    halves = [
        sf.solve(sf.ODE(lambda t, y, args, r=r: r * y), jnp.array(1.0), ends, dt0=1 / 80, solver=dfx.Tsit5()).final
        for r, ends in ((1.0, [0.0, 0.5]), (-20.0, [0.5, 1.0]))
    ]
    wanted = float(halves[0] * halves[1])
    np.testing.assert_allclose(wanted, np.exp(0.5 - 10.0), rtol=1e-5)
    errors = {}
    for name, flags in (("known", jump), ("unknown", None)):
        grid = Grid(bare.left, right, bare.live, bare.save, flags)
        sol = sf.solve(ode, jnp.array(1.0), [0.0, 1.0], grid=grid, solver=dfx.Tsit5())
        errors[name] = abs(float(sol.final) / wanted - 1)
    assert errors["known"] < 1e-12
    assert errors["unknown"] > 1e-3


def test_jumps_survive_padding_and_tracing(x64):
    ode = sf.ODE(lambda t, y, args: jnp.where(t < 0.5, 1.0, -20.0) * y)
    bare = sf.grids.uniform(0.0, 1.0, 80)
    right = np.where(bare.right == 0.5, np.nextafter(0.5, 0.0), bare.right)
    grid = Grid(bare.left, right, bare.live, bare.save, np.isclose(bare.left, 0.5))
    run = lambda grid: sf.solve(ode, jnp.array(1.0), np.array([0.0, 1.0]), grid=grid, solver=dfx.Tsit5()).final
    np.testing.assert_allclose(jax.jit(run)(grid.pad(90)), run(grid), rtol=1e-14)


# ---- Scans. ----


@pytest.mark.parametrize("checkpoints", [None, "sqrt", 3, 50])
@pytest.mark.parametrize("length", [1, 13])
def test_every_policy_is_the_same_scan(length, checkpoints):
    def body(carry, x):
        carry = jnp.sin(carry) + x["a"] * x["b"]
        return carry, carry**2

    xs = {"a": jnp.linspace(0.1, 1.0, length), "b": jnp.linspace(1.0, 2.0, length)}

    def total(xs):
        carry, out = checkpointed_scan(body, 0.3, xs, length, checkpoints)
        return carry + out.sum(), out

    def wanted(xs):
        carry, out = jax.lax.scan(body, 0.3, xs, length)
        return carry + out.sum(), out

    (_, out), grad = jax.value_and_grad(total, has_aux=True)(xs)
    (_, out2), grad2 = jax.value_and_grad(wanted, has_aux=True)(xs)
    np.testing.assert_allclose(out, out2, rtol=1e-6)
    for k in xs:
        np.testing.assert_allclose(grad[k], grad2[k], rtol=1e-5)


def _kept(checkpoints, length):
    """Bytes that the gradient's program keeps between its two passes."""

    def body(carry, x):
        for _ in range(4):
            carry = jnp.sin(carry) + x
        return carry, None

    def total(y, xs):
        return checkpointed_scan(body, y, xs, length, checkpoints)[0].sum()

    compiled = jax.jit(jax.grad(total)).lower(jnp.ones(256), jnp.ones(length)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_policies_keep_what_they_say():
    # Storing keeps several states a step, "step" one, and "sqrt" about twice the square root of the number of steps.
    state = 256 * 4
    n = 10_000
    assert _kept(None, n) > 3 * n * state
    assert n * state < _kept("step", n) < 1.5 * n * state
    assert _kept("sqrt", n) < 6 * np.sqrt(n) * state
    assert _kept("sqrt", n) / _kept("sqrt", 100) < 12


def test_solvers_are_prepared_for_derivatives_of_every_order_wrapped_ones_too():
    assert isinstance(prepare_solver(dfx.Heun()), UnrolledERK)
    assert isinstance(prepare_solver(dfx.ShARK()), UnrolledSRK)
    assert isinstance(prepare_solver(dfx.HalfSolver(dfx.Heun())).solver, UnrolledERK)
    assert prepare_solver(dfx.HalfSolver(dfx.Tsit5())).solver.scan_kind == "bounded"
    assert prepare_solver(dfx.Dopri8()).scan_kind == "bounded"
    assert prepare_solver(dfx.HalfSolver(dfx.Kvaerno3())).solver.scan_kind == "bounded"
    assert prepare_solver(dfx.Heun(scan_kind="checkpointed")).scan_kind == "checkpointed"
    euler = dfx.Euler()
    assert prepare_solver(euler) is euler
