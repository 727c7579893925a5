"""Faults that are known of other solvers of differential equations, each with a test that the walk does not share it."""

import functools
from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest
from jax.sharding import PartitionSpec

import sdeflow as sf

KEY = jax.random.key(0)
DECAY = sf.ODE(lambda t, y, rate: -rate * y)
STRATONOVICH = sf.SDE(
    lambda t, y, rate: -rate * y, lambda t, y, rate: 0.4 * jnp.cos(rate * y), interpretation="stratonovich"
)
PID = dfx.PIDController(rtol=1e-6, atol=1e-9)
RATE = jnp.array(1.3)


# ---- Time in float32. diffrax takes 91 steps of 0.01 from 1e4 on, 23 from 1e5, 2 from 1e6, and says nothing. ----


@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
def test_large_times_lose_neither_a_step_nor_the_value(offset):
    sol = sf.solve(sf.ODE(lambda t, y, args: -y), jnp.array(1.0), [offset, offset + 1], dt0=0.01, solver=dfx.Heun())
    assert int(sol.stats["num_steps"]) == 100
    np.testing.assert_allclose(sol.final, np.exp(-1), rtol=1e-4)


# Traced, 1.7e9 and the second after it are one number in float32: a repeated time, which is padding.
@pytest.mark.parametrize(
    ("offset", "how"),
    [(offset, how) for offset in (1e5, 1e6, 1.7e9) for how in ("dt0", "grid", "steps per interval", "adaptive")]
    + [(1e5, "traced"), (1e6, "traced")],
)
def test_times_too_large_for_their_steps_are_refused_whatever_fixes_the_steps(offset, how):
    ts, field = np.array([offset, offset + 1]), sf.ODE(lambda t, y, args: -y)
    calls = {
        "dt0": lambda: sf.solve(field, jnp.array(1.0), ts, dt0=0.01),
        "grid": lambda: sf.grids.uniform(ts[0], ts[1], 100),
        "steps per interval": lambda: sf.solve(field, jnp.array(1.0), ts, steps_per_interval=100),
        "adaptive": lambda: sf.solve(
            field, jnp.array(1.0), ts, dt0=0.01, solver=dfx.Heun(), stepsize_controller=dfx.PIDController(1e-3, 1e-6)
        ),
    }
    if how == "traced":
        sol = _traced(jnp.array(ts))
        assert sol.result == sf.RESULTS.bad_times
        return
    with pytest.raises(ValueError, match="below 8 units in the last place of the largest time"):
        calls[how]()


@jax.jit
def _traced(ts):
    return sf.solve(sf.ODE(lambda t, y, args: -y), jnp.array(1.0), ts, steps_per_interval=100, solver=dfx.Heun())


# ---- NaN. diffrax calls a fixed solve of NaN a success, and spends all of max_steps on an adaptive one. ----

BREAKS = sf.ODE(lambda t, y, args: jnp.where(t > 0.5, jnp.nan, -y))


def test_nan_in_fixed_steps_is_no_success():
    sol = sf.solve(BREAKS, jnp.array(1.0), [0.0, 0.45, 1.0], dt0=0.05, throw=False)
    assert sol.result == sf.RESULTS.nonfinite
    assert not bool(sf.is_okay(sol.result))
    with pytest.raises(sf.SolveError, match=r"last at the requested time 0\.45\.$"):
        sf.solve(BREAKS, jnp.array(1.0), [0.0, 0.45, 1.0], dt0=0.05)


@pytest.mark.parametrize(
    "options",
    [*(pytest.param(x, marks=pytest.mark.slow) for x in ({}, {"dtmin": 1e-5})), {"dtmin": 1e-5, "force_dtmin": False}],
    ids=["no least step", "a forced least step", "a least step"],
)
def test_nan_in_adaptive_steps_ends_them_soon_whatever_the_controller_says_of_least_steps(options):
    controller = dfx.PIDController(rtol=1e-3, atol=1e-6, **options)
    sol = sf.solve(
        BREAKS, jnp.array(1.0), [0.0, 0.45, 1.0], solver=dfx.Tsit5(), stepsize_controller=controller, throw=False
    )
    # Where the controller may give up at its least step, it may do so before the guard of ours.
    expected = ("dt_min_reached", "nonfinite") if "force_dtmin" in options else ("nonfinite",)
    assert any(sol.result == getattr(sf.RESULTS, name) for name in expected)
    assert not bool(sf.is_okay(sol.result))
    assert int(sol.stats["num_steps"] + sol.stats["num_rejected"]) <= 60
    np.testing.assert_allclose(sol.ys[1], np.exp(-0.45), rtol=1e-3)


# y' = y^3 leaves every bound at t = 1/2; an implicit solver cannot step there, and a least step ends a stiff one.
@pytest.mark.parametrize(
    ("kwargs", "names"),
    [
        ({"dt0": 0.02, "solver": dfx.Euler()}, ("nonfinite",)),
        ({}, ("nonfinite",)),
        pytest.param(
            {"solver": dfx.Kvaerno3(), "stepsize_controller": dfx.PIDController(rtol=1e-3, atol=1e-6)},
            ("max_steps_reached", "nonfinite"),
            marks=pytest.mark.slow,
        ),
        (
            {
                "solver": dfx.Tsit5(),
                "stepsize_controller": dfx.PIDController(rtol=1e-5, atol=1e-8, dtmin=1e-2, force_dtmin=False),
            },
            ("dt_min_reached",),
        ),
    ],
    ids=["fixed steps", "the default", "implicit", "a least step"],
)
def test_an_explosion_is_a_result_that_names_the_time_before_it(kwargs, names):
    cubic = sf.ODE(lambda t, y, args: y**3)
    sol = sf.solve(cubic, jnp.array(1.0), [0.0, 0.25, 1.0], throw=False, **kwargs)
    assert any(sol.result == getattr(sf.RESULTS, name) for name in names)
    assert int(sol.stats["num_steps"]) <= 100
    np.testing.assert_allclose(sol.ys[1], 2**0.5, rtol=0.06 if "dt0" in kwargs else 2e-3)
    assert not np.isfinite(sol.ys[2])
    with pytest.raises(sf.SolveError, match=r"requested time 0\.25|to t=0\.(47|50)"):
        sf.solve(cubic, jnp.array(1.0), [0.0, 0.25, 1.0], **kwargs)


def test_noise_in_a_cubic_field_explodes_within_fifty_steps_and_says_so():
    equation = sf.SDE(lambda t, y, args: y**3, lambda t, y, args: 0.3 * jnp.ones_like(y), additive=True)
    run = lambda key: sf.solve(equation, jnp.array(2.0), [0.0, 1.0], dt0=0.02, key=key, solver=dfx.Euler())
    results = jax.vmap(run)(jax.random.split(KEY, 8)).result
    assert not bool(sf.is_okay(results).any())


@pytest.mark.parametrize(
    "kwargs",
    [{"dt0": 0.1}, pytest.param({"stepsize_controller": PID}, marks=pytest.mark.slow)],
    ids=["fixed", "adaptive"],
)
def test_an_event_on_a_state_that_is_not_finite_is_no_success(kwargs):
    # What is true of NaN alone, as "not above" is, ends the solve; diffrax then counts it as one that went well.
    event = dfx.Event(lambda t, y, args, **unused: ~(y > -1.0))
    run = lambda: sf.solve(
        BREAKS, jnp.array(1.0), [0.0, 0.45, 1.0], solver=dfx.Tsit5(), event=event, throw=False, **kwargs
    )
    sol = run()
    assert sol.result == sf.RESULTS.nonfinite
    assert not bool(sf.is_okay(sol.result))
    assert not np.isfinite(sol.ys[2])


# ---- Wrapped solvers. diffrax looks for the loop over stages of the solver within in the wrapper, and fails. ----


class Wrapped(dfx.AbstractWrappedSolver):
    """What a user may write around a Runge-Kutta solver: it steps as that does."""

    solver: Any

    term_structure = property(lambda self: self.solver.term_structure)
    interpolation_cls = property(lambda self: self.solver.interpolation_cls)

    def order(self, terms):
        return self.solver.order(terms)

    def error_order(self, terms):
        return self.solver.error_order(terms)

    def strong_order(self, terms):
        return self.solver.strong_order(terms)

    def init(self, terms, t0, t1, y0, args):
        return self.solver.init(terms, t0, t1, y0, args)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        return self.solver.step(terms, t0, t1, y0, args, solver_state, made_jump)

    def func(self, terms, t0, y0, args):
        return self.solver.func(terms, t0, y0, args)


WRAPPERS = {"half steps": dfx.HalfSolver, "a wrapper of the user's": Wrapped}
HOW = {
    "solve": lambda rate, solver: sf.solve(
        DECAY, jnp.array(1.0), np.array([0.0, 1.0]), args=rate, dt0=0.1, solver=solver
    ).final,
    "diffeqsolve": lambda rate, solver: dfx.diffeqsolve(
        dfx.ODETerm(lambda t, y, rate: -rate * y), solver, 0.0, 1.0, 0.1, jnp.array(1.0), rate,
        adjoint=sf.adjoints.DiscreteAdjoint(),
    ).ys[0],
    "adaptive": lambda rate, solver: sf.solve(
        DECAY, jnp.array(1.0), np.array([0.0, 1.0]), args=rate, dt0=0.1, solver=solver,
        stepsize_controller=dfx.PIDController(1e-4, 1e-6),
    ).final,
}  # fmt: skip


@pytest.mark.parametrize("how", [h if h == "solve" else pytest.param(h, marks=pytest.mark.slow) for h in HOW])
@pytest.mark.parametrize("solver", [dfx.Heun(), dfx.Tsit5()], ids=["Heun", "Tsit5"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_runge_kutta_solver_has_values_and_gradients(wrapper, solver, how):
    final = functools.partial(HOW[how], solver=WRAPPERS[wrapper](solver))
    value, slope = jax.jit(jax.value_and_grad(final))(RATE)
    np.testing.assert_allclose(value, np.exp(-RATE), rtol=5e-3)
    np.testing.assert_allclose(slope, -np.exp(-RATE), rtol=2e-2)
    if how != "adaptive":
        _, forward = jax.jit(lambda rate: jax.jvp(final, (rate,), (jnp.ones(()),)))(RATE)
        np.testing.assert_allclose(forward, slope, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("adjoint", [dfx.ForwardMode(), dfx.DirectAdjoint()], ids=["ForwardMode", "DirectAdjoint"])
def test_half_steps_go_with_diffrax_s_own_adjoints_too(adjoint):
    final = lambda rate: (
        sf.solve(
            DECAY,
            jnp.array(1.0),
            np.array([0.0, 1.0]),
            args=rate,
            dt0=0.1,
            solver=dfx.HalfSolver(dfx.Heun()),
            adjoint=adjoint,
        ).final
    )
    value, slope = jax.jit(lambda rate: jax.jvp(final, (rate,), (jnp.ones(()),)))(RATE)
    np.testing.assert_allclose((value, slope), (np.exp(-1.3), -np.exp(-1.3)), rtol=5e-3)


class Counting(Wrapped):
    """A wrapper with a state of its own: its steps are weighed by how many there were before."""

    def init(self, terms, t0, t1, y0, args):
        return self.solver.init(terms, t0, t1, y0, args), jnp.asarray(1.0)

    def step(self, terms, t0, t1, y0, args, solver_state, made_jump):
        inner, weight = solver_state
        y1, error, dense, inner, result = self.solver.step(terms, t0, t1, y0, args, inner, made_jump)
        return y1 + 1e-3 * weight * y0, error, dense, (inner, weight + args), result


@pytest.mark.slow
@pytest.mark.parametrize("inner", [dfx.Heun(), dfx.Tsit5()], ids=["Heun", "Tsit5"])
def test_the_state_that_a_wrapper_keeps_for_itself_is_kept_for_the_gradient(inner, x64):
    grads = {}
    for adjoint in (sf.adjoints.DiscreteAdjoint(), dfx.RecursiveCheckpointAdjoint()):
        run = lambda rate, adjoint=adjoint: sf.solve(
            DECAY, jnp.array(1.0), np.array([0.0, 1.0]), args=rate, dt0=0.1, solver=Counting(inner), adjoint=adjoint,
            stepsize_controller=dfx.PIDController(1e-3, 1e-5),
        ).final  # fmt: skip
        grads[type(adjoint)] = jax.jit(jax.value_and_grad(run))(jnp.array(1.3))
    ours, theirs = grads.values()
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)
    assert abs(theirs[1] + np.exp(-1.3)) > 1e-3, "the wrapper's state matters"


# ---- Controllers. Under a continuous adjoint one that looks at the state sees a tuple of four instead. ----


class Looking(dfx.PIDController):
    """A controller that insists on the state of the user, a tree of two leaves."""

    def adapt_step_size(self, t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state):
        for tree in (y0, y1_candidate, y_error):
            assert sorted(tree) == ["a", "b"]
            assert tree["a"].shape == (2,)
            assert tree["b"].shape == ()
        return super().adapt_step_size(t0, t1, y0, y1_candidate, args, y_error, error_order, controller_state)


@pytest.mark.slow
def test_a_controller_sees_the_tree_of_the_user_in_value_and_gradient():
    field = sf.ODE(lambda t, y, rate: {"a": -rate * y["a"], "b": rate * y["a"].sum() - y["b"]})

    def loss(y0, controller):
        sol = sf.solve(
            field, y0, np.array([0.0, 0.5, 1.0]), args=RATE, solver=dfx.Tsit5(), stepsize_controller=controller
        )
        return sol.final["b"] + sol.ys["a"].sum()

    y0 = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(0.5)}
    looked = jax.jit(jax.value_and_grad(functools.partial(loss, controller=Looking(1e-4, 1e-6))))(y0)
    plain = jax.jit(jax.value_and_grad(functools.partial(loss, controller=dfx.PIDController(1e-4, 1e-6))))(y0)
    jax.tree.map(np.testing.assert_array_equal, looked, plain)


@pytest.mark.slow
def test_the_gradient_of_adaptive_steps_is_that_of_the_steps_that_were_accepted(x64):
    field = lambda t, y, rate: jnp.cos(9 * t) - rate * y**3
    controller = dfx.PIDController(rtol=1e-3, atol=1e-5)
    adaptive = lambda rate: (
        sf.solve(
            sf.ODE(field),
            jnp.array(1.0),
            np.array([0.0, 1.0]),
            args=rate,
            solver=dfx.Bosh3(),
            stepsize_controller=controller,
        ).final
    )
    steps = dfx.diffeqsolve(
        dfx.ODETerm(field), dfx.Bosh3(), 0.0, 1.0, None, jnp.array(1.0), jnp.array(2.0), stepsize_controller=controller,
        saveat=dfx.SaveAt(t0=True, steps=True),
    )  # fmt: skip
    times = np.asarray(steps.ts)
    grid = sf.grids.through(times[np.isfinite(times)])
    assert grid.num_rows > 8
    frozen = lambda rate: (
        sf.solve(
            sf.ODE(field),
            jnp.array(1.0),
            np.asarray(times[np.isfinite(times)]),
            grid=grid,
            args=rate,
            solver=dfx.Bosh3(),
        ).final
    )
    start = jnp.array(2.0)
    np.testing.assert_allclose(jax.value_and_grad(adaptive)(start), jax.value_and_grad(frozen)(start), rtol=1e-9)


@pytest.mark.slow
def test_rejected_steps_can_be_kept_for_the_sake_of_the_levy_area():
    controller = dfx.ClipStepSizeController(
        dfx.PIDController(1e-2, 1e-3, pcoeff=0.1, icoeff=0.3), store_rejected_steps=64
    )
    run = lambda controller: sf.solve(
        STRATONOVICH,
        jnp.ones(2),
        [0.0, 1.0],
        args=RATE,
        dt0=0.5,
        key=KEY,
        solver=dfx.SPaRK(),
        stepsize_controller=controller,
    )
    kept, plain = run(controller), run(controller.controller)
    assert sf.is_okay(kept.result)
    assert int(kept.stats["num_rejected"]) > 0
    # The same path, other steps.
    np.testing.assert_allclose(kept.final, plain.final, atol=2e-2)


# ---- Noise that is not kept. diffrax refuses it by default, even where no gradient is wanted. ----


def test_noise_that_is_not_kept_goes_with_the_walk_and_its_gradient_is_exact():
    path = dfx.UnsafeBrownianPath((2,), key=KEY)

    def final(rate):
        return sf.solve(
            STRATONOVICH, jnp.ones(2), np.array([0.0, 1.0]), args=rate, dt0=0.25, solver=dfx.Heun(), path=path
        ).final

    both = jax.jit(
        lambda rate: (jax.jacrev(final)(rate), jax.jacfwd(final)(rate), final(rate + 1e-2), final(rate - 1e-2))
    )
    reverse, forward, above, below = both(RATE)
    np.testing.assert_allclose(reverse, forward, rtol=1e-5)
    np.testing.assert_allclose(reverse, (above - below) / 2e-2, rtol=1e-2)


# ---- What functions close over. Continuous adjoints do not see it, and fail. ----


@pytest.mark.parametrize(
    "kwargs",
    [{"dt0": 0.05}, pytest.param({"stepsize_controller": PID}, marks=pytest.mark.slow)],
    ids=["fixed", "adaptive"],
)
def test_gradients_reach_what_the_functions_close_over(kwargs):
    def loss(rate, closed):
        field = (lambda t, y, args: -rate * y) if closed else (lambda t, y, args: -args * y)
        save = (lambda t, y, args: rate * y) if closed else (lambda t, y, args: args * y)
        sol = sf.solve(
            sf.ODE(field), jnp.array(1.0), np.array([0.0, 0.5, 1.0]), args=None if closed else rate, save_fn=save,
            solver=dfx.Tsit5(), **kwargs,
        )  # fmt: skip
        return sol.ys.sum() + sol.final

    inside, given = (jax.jit(jax.value_and_grad(functools.partial(loss, closed=c)))(RATE) for c in (True, False))
    np.testing.assert_allclose(inside, given, rtol=1e-6)
    times = np.array([0.0, 0.5, 1.0])
    exact = ((1 - 1.3 * times) * np.exp(-1.3 * times)).sum() - np.exp(-1.3)
    np.testing.assert_allclose(inside[1], exact, rtol=1e-4)


# ---- Events. Gradients after one were reported wrong where a controller clips steps. ----


@pytest.mark.slow
@pytest.mark.parametrize("kwargs", [{"dt0": 0.1}, {"stepsize_controller": PID}], ids=["fixed", "adaptive"])
def test_the_time_of_an_event_has_its_gradient_although_steps_are_clipped(kwargs, x64):
    # y0' = -r y0 crosses one half at t = log(2)/r, which y1' = 1 reads.
    event = dfx.Event(lambda t, y, args, **unused: y[0] - 0.5, optx.Newton(1e-8, 1e-8))
    field = sf.ODE(lambda t, y, rate: jnp.stack([-rate * y[0], jnp.ones(())]))

    def crossing(rate):
        return sf.solve(field, jnp.array([1.0, 0.0]), np.array([0.0, 0.25, 2.0]), args=rate, solver=dfx.Tsit5(), event=event,
                        **kwargs).final[1]  # fmt: skip

    value, slope = jax.jit(jax.value_and_grad(crossing))(jnp.array(1.5))
    np.testing.assert_allclose(value, np.log(2) / 1.5, rtol=1e-6)
    np.testing.assert_allclose(slope, -np.log(2) / 1.5**2, rtol=1e-4)


# ---- Backwards in time. diffrax's stochastic Runge-Kutta solvers come to 0.368 instead of 2.718. ----


@pytest.mark.slow
@pytest.mark.parametrize("solver", [dfx.ShARK(), dfx.HalfSolver(dfx.SRA1())], ids=["ShARK", "half steps of SRA1"])
@pytest.mark.parametrize(
    "kwargs", [{}, {"stepsize_controller": dfx.PIDController(1e-4, 1e-6)}], ids=["fixed", "adaptive"]
)
def test_stochastic_runge_kutta_solvers_run_backwards_with_the_right_sign(solver, kwargs):
    silent = sf.SDE(lambda t, y, rate: -rate * y, lambda t, y, rate: jnp.zeros_like(y), additive=True)

    def final(rate):
        return sf.solve(
            silent, jnp.array(1.0), np.array([1.0, 0.0]), args=rate, dt0=-0.05, key=KEY, solver=solver, **kwargs
        ).final

    value, slope = jax.jit(jax.value_and_grad(final))(jnp.array(1.0))
    np.testing.assert_allclose((value, slope), (np.e, np.e), rtol=2e-2)


# ---- Devices. A while loop that a shard does not agree about is an error; a walk is a scan. ----


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_walk_and_its_gradient_run_within_shard_map(check_vma):
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    ou = sf.equations.OrnsteinUhlenbeck(1.0, 0.0, 0.5)
    one = lambda y, key: sf.solve(ou, y, np.array([0.0, 0.5, 1.0]), dt0=0.25, key=key, solver=dfx.Euler()).ys
    many = jax.vmap(one)
    spec = PartitionSpec("batch")
    sharded = jax.shard_map(many, mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=check_vma)
    y0, keys = jnp.ones((4, 2)), jax.random.split(KEY, 4)
    values_and_slopes = lambda fn: jax.jit(lambda y: (fn(y, keys), jax.grad(lambda y: fn(y, keys).sum())(y)))(y0)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), values_and_slopes(sharded), values_and_slopes(many)
    )
