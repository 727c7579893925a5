"""Adaptive solves where they go wrong elsewhere: fields that fail, jumps, clipped times; and time that decreases."""

import functools

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdeflow as sf

pytestmark = pytest.mark.usefixtures("x64_module")

PID = dfx.PIDController(rtol=1e-6, atol=1e-9)


@functools.cache
def _fails_after_half(points, throw):
    def run(y0):
        field = lambda t, y, args: jnp.where(t > 0.5, jnp.nan, -y)
        return sf.solve(
            sf.ODE(field), y0, np.linspace(0.0, 1.0, points), solver=dfx.Tsit5(), stepsize_controller=PID, throw=throw
        )

    return run


@pytest.mark.parametrize(("points", "last"), [(6, "0.4"), (2, "0"), (11, "0.5")])
def test_a_field_that_becomes_nan_ends_the_solve_soon_and_says_where(points, last):
    with pytest.raises(sf.SolveError, match=rf"last at the requested time {last}\.$") as raised:
        _fails_after_half(points, True)(jnp.array(1.0))
    assert raised.value.result == sf.RESULTS.nonfinite
    sol = jax.jit(_fails_after_half(points, False))(jnp.array(1.0))
    assert sol.result == sf.RESULTS.nonfinite
    assert int(sol.stats["num_steps"] + sol.stats["num_rejected"]) <= 60
    reached = np.linspace(0.0, 1.0, points) <= 0.5
    np.testing.assert_allclose(sol.ys[reached], np.exp(-np.linspace(0.0, 1.0, points)[reached]), rtol=1e-5)
    assert not np.isfinite(np.asarray(sol.ys)[~reached]).any(), "what was not reached must not look like a state"


def test_a_start_that_is_not_finite_takes_no_step():
    field = sf.ODE(lambda t, y, args: -y)
    for bad in (jnp.nan, jnp.inf):
        y0 = jnp.array([1.0, bad])
        sol = sf.solve(field, y0, [0.0, 1.0], throw=False)
        assert sol.result == sf.RESULTS.nonfinite
        assert int(sol.stats["num_steps"]) == 0
        assert int(sol.stats["num_rejected"]) <= 60
        with pytest.raises(sf.SolveError, match="at none of the requested times"):
            sf.solve(field, y0, [0.0, 1.0])


def test_in_a_batch_a_failing_path_harms_no_other():
    field = sf.ODE(lambda t, y, bad: jnp.where((t > 0.5) & bad, jnp.nan, -y))
    run = lambda bad: sf.solve(
        field, jnp.array(1.0), np.array([0.0, 1.0]), args=bad, solver=dfx.Tsit5(), stepsize_controller=PID, throw=False
    )
    sol = jax.jit(jax.vmap(run))(jnp.array([False, True, False]))
    assert np.asarray(sf.is_okay(sol.result)).tolist() == [True, False, True]
    np.testing.assert_allclose(sol.final[np.array([0, 2])], np.exp(-1), rtol=1e-5)


def test_too_few_steps_are_reported_and_unreached_times_hold_no_numbers():
    field = sf.ODE(lambda t, y, args: jnp.cos(50 * t) - y)
    sol = sf.solve(field, jnp.array(1.0), [0.0, 0.5, 1.0], solver=dfx.Tsit5(), stepsize_controller=PID, max_steps=8,
                   throw=False)  # fmt: skip
    assert sol.result == sf.RESULTS.max_steps_reached
    assert not np.isfinite(sol.ys[1:]).any()
    with pytest.raises(sf.SolveError, match="maximum number of solver steps"):
        sf.solve(field, jnp.array(1.0), [0.0, 0.5, 1.0], solver=dfx.Tsit5(), stepsize_controller=PID, max_steps=8)


def test_the_default_for_an_ordinary_equation_is_as_accurate_as_it_says():
    ts = np.linspace(0.0, 2.0, 9)
    sol = sf.solve(sf.ODE(lambda t, y, args: y * jnp.cos(t)), jnp.array(1.0), ts)
    np.testing.assert_allclose(sol.ys, np.exp(np.sin(ts)), rtol=5e-3)
    assert "adaptive, PID(rtol=1e-3, atol=1e-6)" in repr(sol)
    np.testing.assert_allclose(sol.final, sol.ys[-1], rtol=1e-15)
    assert np.array_equal(sol.ts, ts)


def test_decreasing_times_retrace_an_adaptive_solve():
    ts = np.array([1.0, 0.6, 0.0])
    run = lambda rate: sf.solve(
        sf.ODE(lambda t, y, r: -r * y), jnp.array(1.0), ts, args=rate, solver=dfx.Tsit5(), stepsize_controller=PID
    ).ys  # fmt: skip
    np.testing.assert_allclose(run(1.0), np.exp(1 - ts), rtol=1e-5)
    slope = jax.jacrev(run)(jnp.array(1.0))
    np.testing.assert_allclose(slope, (1 - ts) * np.exp(1 - ts), rtol=1e-5)


# y' = y before one half, -20 y after it: y(1) = exp(0.5 - 10).
def _switch(t, y, rate):
    return jnp.where(t < 0.5, 1.0, -rate) * y


CLIP = dfx.ClipStepSizeController(dfx.PIDController(rtol=1e-6, atol=1e-9), jump_ts=jnp.array([0.5]))
HOW = {
    "inside": sf.adjoints.DiscreteAdjoint(),
    "inside, higher order": sf.adjoints.DiscreteAdjoint(higher_order=True),
    "diffrax": dfx.RecursiveCheckpointAdjoint(),
}


@functools.cache
def _switched(how):
    def inside(start):
        y0, rate = start
        return dfx.diffeqsolve(
            dfx.ODETerm(_switch), dfx.Tsit5(), 0.0, 1.0, 0.1, y0, rate, saveat=dfx.SaveAt(ts=jnp.array([0.4, 0.5, 1.0])),
            stepsize_controller=CLIP, adjoint=HOW[how],
        ).ys  # fmt: skip

    start = (jnp.array(1.0), jnp.array(20.0))
    return inside(start), jax.jit(jax.jacrev(inside))(start)


@pytest.mark.parametrize("how", [h for h in HOW if h != "diffrax"])
def test_a_jump_inside_diffeqsolve_keeps_value_and_gradient_of_diffrax(how):
    ours, theirs = _switched(how), _switched("diffrax")
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        np.testing.assert_allclose(a, b, rtol=1e-12)
    np.testing.assert_allclose(ours[0][-1], 7.485204e-5, rtol=1e-4)
    np.testing.assert_allclose(ours[1][1][-1], -0.5 * 7.485e-5, rtol=1e-3)


def test_a_jump_through_solve_keeps_value_and_gradient():
    def final(start):
        y0, rate = start
        return sf.solve(sf.ODE(_switch), y0, np.array([0.0, 0.3, 1.0]), args=rate, dt0=0.1, solver=dfx.Tsit5(),
                        stepsize_controller=CLIP).final  # fmt: skip

    value, (in_y0, in_rate) = jax.jit(jax.value_and_grad(final))((jnp.array(1.0), jnp.array(20.0)))
    np.testing.assert_allclose(value, np.exp(-9.5), rtol=1e-5)
    np.testing.assert_allclose(in_y0, value, rtol=1e-12)
    np.testing.assert_allclose(in_rate, -0.5 * value, rtol=1e-3)


# Decreasing times on fixed grids, against closed forms: diffrax runs stochastic Runge-Kutta solvers backwards wrongly.
ODE_SOLVERS = {
    "Euler": 4e-2, "Heun": 5e-4, "Midpoint": 5e-4, "Ralston": 5e-4, "Bosh3": 1e-5, "Tsit5": 1e-8, "Dopri5": 1e-8,
    "Dopri8": 1e-11, "ReversibleHeun": 2e-3, "ImplicitEuler": 4e-2, "Kvaerno3": 1e-5,
}  # fmt: skip
HEAVY = ("Midpoint", "Ralston", "Bosh3", "Dopri5", "Dopri8", "Kvaerno3", "SEA", "SPaRK", "SlowRK", "GeneralShARK")


def _marked(names):
    return [pytest.param(n, marks=pytest.mark.slow if n in HEAVY else []) for n in names]


@pytest.mark.parametrize("name", _marked(ODE_SOLVERS))
def test_ordinary_solvers_run_backwards_reach_e(name):
    run = lambda r: (
        sf.solve(
            sf.ODE(lambda t, y, r: -r * y),
            jnp.array(1.0),
            [1.0, 0.5, 0.0],
            args=r,
            dt0=-1 / 40,
            solver=getattr(dfx, name)(),
        ).ys
    )
    ys, slope = jax.jit(lambda r: (run(r), jax.jacfwd(run)(r)))(jnp.array(1.0))
    exact = np.exp([0.0, 0.5, 1.0])
    np.testing.assert_allclose(ys, exact, rtol=ODE_SOLVERS[name])
    np.testing.assert_allclose(slope, exact * [0.0, 0.5, 1.0], rtol=2.1 * ODE_SOLVERS[name])


@pytest.mark.parametrize(
    "name", _marked(["ShARK", "SRA1", "SEA", "SPaRK", "SlowRK", "GeneralShARK", "Heun", "EulerHeun"])
)
def test_stochastic_solvers_run_backwards_reach_e_where_the_noise_is_nought(name):
    equation = sf.SDE(lambda t, y, args: -y, lambda t, y, args: jnp.zeros_like(y), additive=True)
    sol = sf.solve(equation, jnp.ones(2), [1.0, 0.0], dt0=-1 / 40, key=jax.random.key(0), solver=getattr(dfx, name)())
    np.testing.assert_allclose(sol.final, np.e, rtol=2e-2 if name in ("SEA", "EulerHeun") else 5e-4)


@pytest.mark.parametrize("name", _marked(["ShARK", "SRA1", "SEA", "SPaRK"]))
def test_additive_noise_run_backwards_returns_to_where_it_came_from(name):
    # There and back along one path of a tree, which knows every increment.
    area = dfx.SpaceTimeLevyArea
    path = dfx.VirtualBrownianTree(0.0, 1.0, 2**-9, (2,), key=jax.random.key(5), levy_area=area)
    equation = sf.SDE(
        lambda t, y, args: jnp.cos(3 * t) - y, lambda t, y, args: (1 + t) * jnp.ones_like(y), additive=True
    )
    y0, kwargs = jnp.array([0.3, -1.0]), {"path": path, "solver": getattr(dfx, name)()}

    def there_and_back(steps):
        end = sf.solve(equation, y0, [0.0, 1.0], dt0=1 / steps, **kwargs).final
        assert np.abs(np.asarray(end - y0)).min() > 0.1
        return sf.solve(equation, end, [1.0, 0.0], dt0=-1 / steps, **kwargs).final

    start = there_and_back(64)
    if name == "SEA":
        # Of order one, it misses by about 0.07 here; half of that with half the steps, which leaves the second order.
        assert np.abs(np.asarray(start - y0)).max() < 0.1
        start = 2 * there_and_back(128) - start
    np.testing.assert_allclose(start, y0, atol=1e-3)


@pytest.mark.parametrize(("ts", "dt0"), [([0.0, 1.0], -0.1), ([1.0, 0.5, 0.0], 0.1), ([0.0, 1.0], 0.0)])
def test_a_first_step_in_the_wrong_direction_is_refused(ts, dt0):
    with pytest.raises(ValueError, match=r"dt0 must be finite, not zero( and of the sign of ts\[1\]-ts\[0\]=|, got)"):
        sf.solve(sf.ODE(lambda t, y, args: -y), jnp.array(1.0), ts, dt0=dt0, stepsize_controller=PID)


def test_the_first_step_is_taken_as_given_in_either_direction():
    # A controller that never changes its mind shows what it was given.
    fixed = dfx.PIDController(rtol=1e3, atol=1e3, factormin=1.0, factormax=1.0)
    for ts, dt0 in (([0.0, 1.0], 0.25), ([1.0, 0.0], -0.25), ([0.0, 0.5, 1.0], 0.25)):
        sol = sf.solve(sf.ODE(lambda t, y, args: -y), jnp.array(1.0), ts, dt0=dt0, solver=dfx.Heun(), stepsize_controller=fixed)  # fmt: skip
        assert int(sol.stats["num_steps"]) == 4


@pytest.mark.parametrize(
    "kwargs", [{"dt0": 0.5}, {"stepsize_controller": dfx.PIDController(1e-6, 1e-9), "max_steps": 3}]
)
def test_a_failure_under_a_gradient_outside_of_jit_is_raised_as_a_solve_error(kwargs):
    blow_up = lambda rate: sf.solve(
        sf.ODE(lambda t, y, a: a * y**2), jnp.array(1.0), [0.0, 50.0], args=rate, solver=dfx.Heun(), **kwargs
    ).final  # fmt: skip
    with pytest.raises(sf.SolveError):
        jax.grad(blow_up)(1.0)
