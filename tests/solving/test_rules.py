"""The rules of ``solve``: what fixes the steps, what is chosen by default, what is refused and in which words."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdeflow as sf
from sdeflow import SdeflowWarning

KEY = jax.random.key(0)
OU = sf.equations.OrnsteinUhlenbeck(1.0, 0.0, 0.5)
GBM = sf.equations.GeometricBrownianMotion(0.1, 0.2)
STRATONOVICH = sf.SDE(lambda t, y, a: -y, lambda t, y, a: 0.2 * y, interpretation="stratonovich")
DECAY = sf.ODE(lambda t, y, a: -y)
Y = jnp.ones(2)
TS = [0.0, 1.0]


def _grid():
    return sf.grids.through(TS, 0.25)


def _path(**options):
    return sf.paths.GridBrownian(_grid(), (2,), key=KEY, **options)


REFUSED = {
    "two ways to fix the steps": (
        lambda: sf.solve(DECAY, Y, TS, dt0=0.1, steps_per_interval=2),
        "Only one of dt0, grid and steps_per_interval",
    ),
    "a stochastic equation without steps": (lambda: sf.solve(GBM, Y, TS, key=KEY), "pass dt0="),
    "no noise": (lambda: sf.solve(OU, Y, TS, dt0=0.1), "pass key=jax.random.key"),
    "key and path": (lambda: sf.solve(OU, Y, TS, key=KEY, path=_path()), "key or path, not both"),
    "a path for an ordinary equation": (lambda: sf.solve(DECAY, Y, TS, dt0=0.25, path=_path()), "drop path="),
    "Heun for Ito noise": (
        lambda: sf.solve(GBM, Y, TS, dt0=0.1, key=KEY, solver=diffrax.Heun()),
        r"to_stratonovich\(\)",
    ),
    "Euler for Stratonovich noise": (
        lambda: sf.solve(STRATONOVICH, Y, TS, dt0=0.1, key=KEY, solver=diffrax.Euler()),
        r"to_ito\(\)",
    ),
    "Ito noise backwards": (
        lambda: sf.solve(GBM, Y, [1.0, 0.0], dt0=-0.1, key=KEY, solver=diffrax.Euler()),
        "two inequivalent limits",
    ),
    "times that do not increase": (
        lambda: sf.solve(DECAY, Y, [0.0, 0.5, 0.5], dt0=0.1),
        r"ts\[1\]=0.5 and ts\[2\]=0.5",
    ),
    "a time that is not finite": (lambda: sf.solve(DECAY, Y, [0.0, np.nan], dt0=0.1), "finite"),
    "dt0 of the wrong sign": (lambda: sf.solve(DECAY, Y, TS, dt0=-0.1), "of the sign of"),
    "dt0 of zero": (lambda: sf.solve(DECAY, Y, TS, dt0=0.0), "not zero"),
    "dt0 below the resolution of the times": (
        lambda: sf.solve(DECAY, Y, np.array([1e5, 1e5 + 1]), dt0=0.01),
        "units in the last place",
    ),
    "traced times with dt0": (
        lambda: jax.jit(lambda ts: sf.solve(DECAY, Y, ts, dt0=0.1).final)(jnp.array(TS)),
        "ts is traced",
    ),
    "a grid for other times": (
        lambda: sf.solve(DECAY, Y, [0.0, 0.5, 1.0], grid=_grid()),
        "saves 2 times but ts has 3",
    ),
    "a grid that ends elsewhere": (lambda: sf.solve(DECAY, Y, [0.0, 2.0], grid=_grid()), r"where ts\[1\]=2"),
    "a drift of the wrong shape": (
        lambda: sf.solve(sf.ODE(lambda t, y, a: -y[:1]), Y, TS, dt0=0.1),
        r"shape \(2,\).*returned shape \(1,\)",
    ),
    "a scalar drift": (lambda: sf.solve(sf.ODE(lambda t, y, a: -1.0), Y, TS, dt0=0.1), r"returned shape \(\)"),
    "a drift of integers": (
        lambda: sf.solve(sf.ODE(lambda t, y, a: jnp.ones(2, int)), Y, TS, dt0=0.1),
        "must return dtype float32",
    ),
    "a drift of another structure": (
        lambda: sf.solve(sf.ODE(lambda t, y, a: (y, y)), Y, TS, dt0=0.1),
        "must return the structure of the state",
    ),
    "a diffusion that is no diagonal": (
        lambda: sf.solve(sf.SDE(lambda t, y, a: -y, lambda t, y, a: jnp.eye(2)), Y, TS, dt0=0.1, key=KEY),
        "for diagonal noise, or a lineax operator",
    ),
    "a path without the Levy area": (
        lambda: sf.solve(OU, Y, TS, path=_path(), solver=diffrax.ShARK()),
        "ShARK needs levy_area=diffrax.SpaceTimeLevyArea",
    ),
    "a path that ends too early": (
        lambda: sf.solve(OU, Y, [0.0, 3.0], dt0=0.25, path=_path(), solver=diffrax.Euler()),
        "covers times from 0 to 1",
    ),
    "a regulariser": (
        lambda: sf.solve(DECAY, Y, TS, dt0=0.1, regularisers=(sf.regularisers.LocalError(),)),
        "pass key=",
    ),
    "raw terms without a solver": (
        lambda: sf.solve(diffrax.ODETerm(lambda t, y, a: -y), Y, TS, dt0=0.1),
        "pass solver=",
    ),
    "a controller that does not adapt": (
        lambda: sf.solve(DECAY, Y, TS, stepsize_controller=diffrax.StepTo(jnp.array(TS))),
        "does not adapt",
    ),
    "an adaptive controller on a grid": (
        lambda: sf.solve(DECAY, Y, TS, grid=_grid(), stepsize_controller=diffrax.PIDController(1e-3, 1e-6)),
        "chooses its own steps",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_call_is_refused_with_a_cure(name):
    call, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        call()


MISTYPED = {
    "y0 of a list": (lambda: sf.solve(DECAY, [1.0, 2.0], TS, dt0=0.1), "y0 must be an array"),
    "y0 of None": (lambda: sf.solve(DECAY, None, TS, dt0=0.1), "y0 must be an array"),
    "a number as key": (lambda: sf.solve(OU, Y, TS, dt0=0.1, key=0), r"such as jax.random.key\(0\)"),
    "many keys": (lambda: sf.solve(OU, Y, TS, dt0=0.1, key=jax.random.split(KEY, 3)), "use jax.vmap"),
    "a function as equation": (lambda: sf.solve(lambda t, y, a: -y, Y, TS, dt0=0.1), r"sf.ODE\(vector_field\)"),
    "a class as solver": (lambda: sf.solve(DECAY, Y, TS, dt0=0.1, solver=diffrax.Tsit5), "an instance"),
    "a drift that is no function": (lambda: sf.SDE(1.0, lambda t, y, a: y), "drift must be callable"),
}


@pytest.mark.parametrize("name", MISTYPED)
def test_a_wrong_type_is_named(name):
    call, words = MISTYPED[name]
    with pytest.raises(TypeError, match=words):
        call()


def test_what_is_chosen_by_default_is_printed_with_its_reason():
    shown = {
        "ODE": (sf.solve(DECAY, Y, TS, dt0=0.25), "Tsit5"),
        "linear": (sf.solve(OU, Y, TS, dt0=0.25, key=KEY), "Exact"),
        "additive": (sf.solve(OU.to_stratonovich(), Y, TS, dt0=0.25, key=KEY), "ShARK"),
        "Ito": (sf.solve(GBM, Y, TS, dt0=0.25, key=KEY), "Euler"),
        "Stratonovich": (sf.solve(STRATONOVICH, Y, TS, dt0=0.25, key=KEY), "Heun"),
    }
    for name, (sol, solver) in shown.items():
        text = repr(sol)
        assert f"solver: {solver}," in text, name
        assert "grid: 4 rows" in text
        assert "adjoint: DiscreteAdjoint()" in text
        assert "4 steps" in text
        assert ('storage="table"' in text) == (name != "ODE")


def test_without_anything_an_ordinary_equation_adapts_and_a_given_solver_takes_one_step_an_interval():
    assert "adaptive, PID(rtol=1e-3, atol=1e-6)" in repr(sf.solve(DECAY, Y, TS))
    assert int(sf.solve(DECAY, Y, [0.0, 0.1, 0.2, 0.4], solver=diffrax.Heun()).stats["num_steps"]) == 3


def test_additive_noise_goes_with_every_solver():
    for solver in (diffrax.Euler(), diffrax.Heun(), diffrax.ShARK(), diffrax.SRA1(), diffrax.SEA()):
        assert sf.is_okay(sf.solve(OU, Y, TS, dt0=0.25, key=KEY, solver=solver).result)


def test_long_walks_draw_their_noise_row_by_row_and_padding_counts():
    many = sf.grids.through(TS, 1 / 4097)
    assert 'storage="counter"' in repr(sf.solve(OU, Y, TS, grid=many, key=KEY, solver=diffrax.Euler()))
    few, padded = sf.grids.through(TS, 0.25), sf.grids.through(TS, 0.25, num_steps=5000)
    assert 'storage="table"' in repr(sf.solve(OU, Y, TS, grid=few, key=KEY, solver=diffrax.Euler()))
    assert 'storage="counter"' in repr(sf.solve(OU, Y, TS, grid=padded, key=KEY, solver=diffrax.Euler()))


def test_nan_is_a_result_and_outside_of_a_trace_an_error_that_names_the_last_finite_time():
    broken = sf.ODE(lambda t, y, a: jnp.where(t > 0.5, jnp.nan, -y))
    ts = [0.0, 0.25, 0.5, 1.0]
    with pytest.raises(sf.SolveError, match="last at the requested time 0.5") as caught:
        sf.solve(broken, Y, ts, dt0=0.05)
    assert not bool(sf.is_okay(caught.value.result))
    sol = sf.solve(broken, Y, ts, dt0=0.05, throw=False)
    assert not bool(sf.is_okay(sol.result))
    assert "failed" in repr(sol)
    inside = jax.jit(lambda y: sf.solve(broken, y, ts, dt0=0.05).result)(Y)
    assert not bool(sf.is_okay(inside))


def test_check_plants_an_error_inside_a_trace():
    broken = sf.ODE(lambda t, y, a: y * jnp.inf)
    fine = jax.jit(lambda y: sf.check(sf.solve(DECAY, y, TS, dt0=0.25)).final)
    assert bool(jnp.isfinite(fine(Y)).all())
    with pytest.raises(Exception, match="infinite or NaN"):
        jax.block_until_ready(eqx.filter_jit(lambda y: sf.check(sf.solve(broken, y, TS, dt0=0.25)).final)(Y))


def test_half_precision_is_promoted_with_a_warning_and_integers_in_silence():
    with pytest.warns(SdeflowWarning, match="promoted to float32"):
        assert sf.solve(DECAY, jnp.ones(2, jnp.float16), TS, dt0=0.25).final.dtype == jnp.float32
    assert sf.solve(DECAY, jnp.ones(2, int), TS, dt0=0.25).final.dtype == jnp.float32


def test_save_fn_keeps_what_it_returns():
    ts = [0.0, 0.25, 1.0]
    whole = sf.solve(DECAY, Y, ts, dt0=0.25)
    kept = sf.solve(DECAY, Y, ts, dt0=0.25, args=2.0, save_fn=lambda t, y, args: args * y.sum() + t)
    np.testing.assert_allclose(kept.ys, 2 * whole.ys.sum(axis=1) + np.array(ts), rtol=1e-6)


def test_the_program_of_a_default_solve_and_of_its_gradient_calls_nothing_back():
    def loss(y, key):
        return sf.solve(OU, y, np.array([0.0, 0.5, 1.0]), dt0=0.1, key=key).ys.sum()

    for fn in (loss, jax.grad(loss)):
        assert "callback" not in jax.jit(fn).lower(Y, KEY).as_text()


def test_other_values_of_state_key_and_arguments_compile_nothing_anew():
    traces = []

    def drift(t, y, args):
        traces.append(None)
        return -args * y

    sde = sf.SDE(drift, lambda t, y, args: 0.1 * jnp.ones_like(y), additive=True)
    run = lambda y, key, rate: sf.solve(sde, y, TS, args=rate, dt0=0.25, key=key).final
    run(Y, KEY, jnp.array(1.0))
    seen = len(traces)
    run(2 * Y, jax.random.key(5), jnp.array(3.0))
    assert len(traces) == seen


def test_negative_entries_of_a_diffusion_are_noise_of_the_other_sign():
    """Nothing is taken for a mistake, or made positive: only the law of a diagonal is blind to signs."""
    walk = lambda scale: sf.solve(
        sf.SDE(lambda t, y, args: -y, lambda t, y, args: scale * jnp.array([1.0, -2.0]), additive=True),
        jnp.ones(2), TS, dt0=0.25, key=jax.random.key(0), solver=diffrax.Euler(),
    ).ys  # fmt: skip
    one, other, still = walk(0.5), walk(-0.5), walk(0.0)
    np.testing.assert_allclose(one + other, 2 * still, rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(one - other).max()) > 0.1
