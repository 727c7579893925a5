"""Fields that jump and controls with kinks: steps that stop short of them have their numbers and gradients."""

import functools

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdeflow as sf
from sdeflow.grids import Grid

pytestmark = pytest.mark.usefixtures("x64_module")

# y' = y before one half, -20 y after it: y(1) = exp(0.5 - 10).
EXACT = np.exp(-9.5)
SWITCHED = sf.ODE(lambda t, y, rate: jnp.where(t < 0.5, 1.0, -rate) * y)
ENDS = np.array([0.0, 1.0])
PID = dfx.ClipStepSizeController(dfx.PIDController(rtol=1e-6, atol=1e-9), jump_ts=jnp.array([0.5]))


def _start():
    return jnp.array(1.0), jnp.array(20.0)


def _theirs(start, **kwargs):
    y0, rate = start
    return dfx.diffeqsolve(
        dfx.ODETerm(SWITCHED.drift), dfx.Tsit5(), 0.0, 1.0, 0.1, y0, rate, stepsize_controller=PID, max_steps=256,
        **kwargs,
    )  # fmt: skip


@functools.cache
def _recorded():
    """diffrax's value, and where each of its accepted steps began."""
    sol = jax.jit(lambda start: _theirs(start, saveat=dfx.SaveAt(t0=True, steps=True)))(_start())
    ts = np.asarray(sol.ts)[np.isfinite(sol.ts)]
    return float(sol.ys[ts.size - 1]), ts


def _grid_of(ts, *, ends, flags):
    """A grid from recorded times: whether its steps have both their ends, and whether it says where they jump."""
    jump = ts[:-1] == np.nextafter(0.5, 1.0)
    assert jump.sum() == 1
    right = ts[1:].copy()
    if ends:
        right[right == np.nextafter(0.5, 1.0)] = np.nextafter(0.5, 0.0)
    return Grid(ts[:-1], right, np.ones(right.size, bool), np.array([0, right.size]), jump if flags else None)


def _along(grid):
    return lambda start: sf.solve(SWITCHED, start[0], ENDS, args=start[1], grid=grid, solver=dfx.Tsit5()).final


@functools.cache
def _replayed():
    """Value and gradient along diffrax's own steps."""
    return jax.jit(jax.value_and_grad(_along(_grid_of(_recorded()[1], ends=True, flags=True))))(_start())


def test_recorded_steps_with_both_ends_and_the_flag_are_the_solve():
    value, ts = _recorded()
    np.testing.assert_allclose(value, 7.485204e-5, rtol=1e-7)
    np.testing.assert_allclose(value, EXACT, rtol=5e-6)
    np.testing.assert_allclose(_replayed()[0], value, rtol=1e-12)


def test_without_the_flag_a_solver_that_keeps_its_slope_is_wrong_and_says_nothing():
    value, ts = _recorded()
    unflagged = float(jax.jit(_along(_grid_of(ts, ends=True, flags=False)))(_start()))
    across = float(jax.jit(_along(_grid_of(ts, ends=False, flags=True)))(_start()))
    print(f"exact {EXACT:.6e}, both ends and flag {value:.6e}, no flag {unflagged:.6e}, one end {across:.6e}")
    assert abs(unflagged / EXACT - 1) > 0.01
    assert abs(across / EXACT - 1) > 0.001


def test_the_adaptive_solve_has_diffrax_s_value_and_gradient_and_that_of_the_frozen_steps():
    def ours(start):
        sol = sf.solve(
            SWITCHED, start[0], ENDS, args=start[1], dt0=0.1, solver=dfx.Tsit5(), stepsize_controller=PID,
        )  # fmt: skip
        return sol.final

    value, grads = jax.jit(jax.value_and_grad(ours))(_start())
    np.testing.assert_allclose(value, 7.485204e-5, rtol=1e-7)
    np.testing.assert_allclose(value, _recorded()[0], rtol=1e-10)
    theirs = jax.jit(jax.grad(lambda start: _theirs(start).ys[0]))(_start())
    np.testing.assert_allclose(grads, theirs, rtol=1e-10)
    np.testing.assert_allclose(grads, _replayed()[1], rtol=1e-10)
    frozen = jax.jit(_along(_grid_of(_recorded()[1], ends=True, flags=True)))
    for k, e in ((0, 1e-4), (1, 1e-3)):
        move = lambda d, k=k: frozen(tuple(x + d if i == k else x for i, x in enumerate(_start())))
        slope = (8 * (move(e) - move(-e)) - (move(2 * e) - move(-2 * e))) / (12 * e)
        np.testing.assert_allclose(grads[k], slope, rtol=1e-9)


# ---- Grids that are told of jumps. ----


@functools.cache
def _told(right_continuous, backwards, adjoint, dtype):
    """Value and gradient in the rate of the switched equation, on 80 steps; time may run backwards from the end."""
    below = (lambda t: t < 0.5) if right_continuous else (lambda t: t <= 0.5)
    ode = sf.ODE(lambda t, y, rate: jnp.where(below(t), 1.0, -rate) * y)
    ts, dt0 = ([1.0, 0.0], -1 / 80) if backwards else ([0.0, 1.0], 1 / 80)
    grid = sf.grids.through(ts, dt0, jumps=[0.5])
    with jax.enable_x64(dtype == "float64"):
        final = lambda rate: (
            sf.solve(ode, jnp.array(1.0, dtype), ts, args=rate, grid=grid, solver=dfx.Tsit5(), adjoint=adjoint).final
        )
        return jax.jit(jax.value_and_grad(final))(jnp.array(20.0, dtype))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
@pytest.mark.parametrize("right_continuous", [True, False], ids=["t < jump", "t <= jump"])
def test_it_does_not_matter_on_which_side_the_field_has_its_value_at_the_jump(right_continuous, backwards, dtype):
    value, slope = _told(right_continuous, backwards, None, dtype)
    exact = 1 / EXACT if backwards else EXACT
    assert value.dtype == dtype
    np.testing.assert_allclose(value, exact, rtol=5e-6)
    np.testing.assert_allclose(slope, exact * (0.5 if backwards else -0.5), rtol=1e-4)
    reference = _told(True, backwards, None, "float64")
    np.testing.assert_allclose((value, slope), reference, rtol=1e-12 if dtype == "float64" else 1e-4)


@pytest.mark.parametrize(
    "backwards", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["forwards", "backwards"]
)
def test_diffrax_s_own_adjoint_is_told_of_the_jumps_too(backwards):
    ours, theirs = (_told(True, backwards, a, "float64") for a in (None, dfx.RecursiveCheckpointAdjoint()))
    np.testing.assert_allclose(theirs, ours, rtol=1e-10)


def test_padded_grids_of_a_batch_keep_their_jumps():
    fields = [0.5, 0.2, 0.0]
    ode = sf.ODE(lambda t, y, at: jnp.where(t < at, 1.0, -20.0) * y)
    grids = [sf.grids.through(ENDS, 1 / 40, jumps=[at] if at else []) for at in fields]
    run = lambda grid, at: sf.solve(ode, jnp.array(1.0), ENDS, args=at, grid=grid, solver=dfx.Tsit5()).final
    batch = jax.jit(jax.vmap(run))(sf.grids.stack(grids, 50), jnp.array(fields))
    alone = [run(grid, at) for grid, at in zip(grids, fields)]
    np.testing.assert_allclose(batch, alone, rtol=1e-12)
    np.testing.assert_allclose(batch, np.exp([at - 20 * (1 - at) for at in fields]), rtol=2e-3)


def test_a_state_is_saved_on_the_jump_as_it_was_before_it():
    ts = [0.0, 0.5, 1.0]
    grid = sf.grids.through(ts, 1 / 80, jumps=[0.5])
    sol = sf.solve(SWITCHED, jnp.array(1.0), ts, args=20.0, grid=grid, solver=dfx.Tsit5())
    np.testing.assert_allclose(sol.ys, np.exp([0.0, 0.5, -9.5]), rtol=5e-6)
    np.testing.assert_allclose(sol.ys[1], np.exp(0.5), rtol=1e-12)


def test_jumps_at_the_ends_and_noise_go_together():
    # A switched drift with additive noise: the noise knows nothing of the jumps.
    sde = sf.SDE(lambda t, y, a: jnp.where(t < 0.5, 1.0, -2.0) * y, lambda t, y, a: jnp.ones_like(y), additive=True)
    key, finals = jax.random.key(0), []
    for jumps in (None, [0.0, 0.5, 1.0]):
        grid = sf.grids.through(ENDS, 1 / 64, jumps=jumps)
        finals.append(sf.solve(sde, jnp.ones(3), ENDS, grid=grid, key=key, solver=dfx.Heun()).final)
    assert np.abs(finals[0] - finals[1]).max() < 0.1
    assert np.abs(finals[0] - finals[1]).max() > 1e-4, "the slope of the last step before the jump is another one"


# ---- Controls with kinks. ----

KNOTS = np.array([0.0, 0.2, 0.45, 0.5, 1.0])
VALUES = np.array([0.3, -1.0, 0.8, 1.5, -0.2])
PIECES = 4


def _driven(values, *, solver, jumps, dt0=1 / 16):
    """dy = -y dX + cos(t) dX along straight lines X, as an ordinary equation that asks for the slope of X."""
    path = sf.paths.linear_control(KNOTS, jnp.asarray(values)[:, None])
    ode = sf.ODE(lambda t, y, path: (jnp.cos(3 * t) - y) * path.derivative(t)[0])
    grid = sf.grids.through([0.0, 1.0], dt0, jumps=KNOTS[1:-1] if jumps else None)
    return sf.solve(ode, jnp.array(0.7), ENDS, args=path, grid=grid, solver=solver).final


def _by_hand(values, solver):
    """Each piece as a smooth equation of its own, from state to state."""
    y = jnp.array(0.7)
    for i in range(PIECES):
        slope = (values[i + 1] - values[i]) / (KNOTS[i + 1] - KNOTS[i])
        smooth = sf.ODE(lambda t, y, slope: (jnp.cos(3 * t) - y) * slope)
        ts = KNOTS[i : i + 2]
        y = sf.solve(smooth, y, ts, args=slope, grid=sf.grids.through(ts, 1 / 16), solver=solver).final
    return y


@pytest.mark.parametrize("name", ["Tsit5", pytest.param("Heun", marks=pytest.mark.slow)])
def test_a_control_of_straight_lines_is_its_smooth_pieces_one_after_the_other(name):
    solver = getattr(dfx, name)()
    ours = jax.jit(functools.partial(_driven, solver=solver, jumps=True))(VALUES)
    np.testing.assert_allclose(ours, _by_hand(VALUES, solver), rtol=1e-12)


def test_the_order_of_a_solver_is_lost_where_steps_go_across_kinks():
    fine = jax.jit(functools.partial(_driven, solver=dfx.Tsit5(), jumps=True, dt0=1 / 256))(VALUES)
    error = lambda jumps: abs(float(_driven(VALUES, solver=dfx.Tsit5(), jumps=jumps, dt0=1 / 64) - fine))
    assert error(True) < 1e-7
    assert error(False) > 1e-4


def test_the_gradient_in_the_values_of_a_control_is_that_of_finite_differences():
    final = jax.jit(functools.partial(_driven, solver=dfx.Tsit5(), jumps=True))
    grad, e = jax.jit(jax.grad(final))(VALUES), 1e-4
    for i in range(VALUES.size):
        move = e * np.eye(VALUES.size)[i]
        slope = (8 * (final(VALUES + move) - final(VALUES - move)) - (final(VALUES + 2 * move) - final(VALUES - 2 * move))) / (12 * e)  # fmt: skip
        np.testing.assert_allclose(grad[i], slope, rtol=1e-8, atol=1e-10)
    assert np.abs(grad).min() > 1e-3
