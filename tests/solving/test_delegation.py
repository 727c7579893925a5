"""What the walk does not do goes to diffrax: its own adjoints, and events."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import optimistix as optx
import pytest

import sdeflow as sf

pytestmark = [pytest.mark.usefixtures("x64_module"), pytest.mark.slow]

TS = np.array([0.0, 0.5, 1.0])


def _final(rate, adjoint, ts=TS, dt0=0.05):
    sol = sf.solve(
        sf.ODE(lambda t, y, r: -r * y), jnp.array(2.0), ts, args=rate, dt0=dt0, solver=dfx.Heun(), adjoint=adjoint
    )
    return sol.final


def test_diffrax_s_direct_adjoint_gives_the_gradients_of_ours():
    ours = jax.jit(jax.value_and_grad(lambda r: _final(r, None)))(1.3)
    theirs = jax.jit(jax.value_and_grad(lambda r: _final(r, dfx.DirectAdjoint())))(1.3)
    np.testing.assert_allclose(theirs, ours, rtol=1e-12)


def test_diffrax_s_checkpoints_give_the_gradients_of_ours():
    ours = jax.jit(jax.value_and_grad(lambda r: _final(r, None)))(1.3)
    theirs = jax.jit(jax.value_and_grad(lambda r: _final(r, dfx.RecursiveCheckpointAdjoint())))(1.3)
    np.testing.assert_allclose(theirs, ours, rtol=1e-12)


def test_forward_mode_gives_forward_derivatives():
    push = lambda adjoint: jax.jit(lambda r: jax.jvp(lambda r: _final(r, adjoint), (r,), (1.0,)))(1.3)
    np.testing.assert_allclose(push(dfx.ForwardMode()), push(None), rtol=1e-12)


def test_the_continuous_adjoint_of_an_ordinary_equation_is_near_the_exact_gradient():
    exact = jax.jit(jax.grad(lambda r: _final(r, None)))(1.3)
    continuous = jax.jit(jax.grad(lambda r: _final(r, dfx.BacksolveAdjoint())))(1.3)
    np.testing.assert_allclose(continuous, exact, rtol=5e-3)
    np.testing.assert_allclose(continuous, -2 * np.exp(-1.3), rtol=5e-3)


def test_the_continuous_adjoint_of_a_stratonovich_equation_is_near_the_exact_gradient():
    path = dfx.VirtualBrownianTree(0.0, 1.0, 1 / 512, (), key=jax.random.key(4))

    def final(args, adjoint):
        equation = sf.SDE(lambda t, y, a: -a[0] * y, lambda t, y, a: a[1] * jnp.cos(y), interpretation="stratonovich")
        return sf.solve(equation, jnp.array(1.0), np.array([0.0, 1.0]), args=args, dt0=1 / 200, solver=dfx.Heun(),
                        path=path, adjoint=adjoint).final  # fmt: skip

    start = (jnp.array(0.8), jnp.array(0.5))
    exact = jax.jit(jax.grad(lambda a: final(a, None)))(start)
    continuous = jax.jit(jax.grad(lambda a: final(a, dfx.BacksolveAdjoint())))(start)
    np.testing.assert_allclose(continuous, exact, rtol=2e-2)


def test_the_implicit_adjoint_differentiates_a_steady_state():
    # y' = c - y^3 rests at c^(1/3), whose derivative is c^(-2/3) / 3.
    def rest(c):
        return sf.solve(sf.ODE(lambda t, y, c: c - y**3), jnp.array(1.0), np.array([0.0, 20.0]), args=c, dt0=0.05,
                        solver=dfx.Heun(), adjoint=dfx.ImplicitAdjoint()).final  # fmt: skip

    value, slope = jax.jit(jax.value_and_grad(rest))(jnp.array(1.4))
    np.testing.assert_allclose(value, 1.4 ** (1 / 3), rtol=1e-8)
    np.testing.assert_allclose(slope, 1.4 ** (-2 / 3) / 3, rtol=1e-8)


# y' = -y crosses one half at log 2.
def _crossing(rate, how, **kwargs):
    event = dfx.Event(lambda t, y, args, **k: y - 0.5, how)
    return sf.solve(sf.ODE(lambda t, y, r: -r * y), jnp.array(1.0), np.array([0.0, 0.25, 2.0]), args=rate, solver=dfx.Tsit5(),
                    event=event, **kwargs)  # fmt: skip


@pytest.mark.parametrize(
    "kwargs", [{"dt0": 0.1}, {"stepsize_controller": dfx.PIDController(1e-6, 1e-9)}], ids=["fixed", "adaptive"]
)
def test_an_event_ends_a_solve_at_its_root_and_counts_as_success(kwargs):
    root = optx.Newton(1e-8, 1e-8)
    sol = _crossing(1.0, root, **kwargs)
    assert sol.result == sf.RESULTS.event_occurred
    assert sf.is_okay(sol.result)
    np.testing.assert_allclose(sol.final, 0.5, rtol=1e-6)
    np.testing.assert_allclose(sol.ys[:2], np.exp([0.0, -0.25]), rtol=1e-5)
    assert not np.isfinite(sol.ys[2]), "a time after the event has no state"


def test_an_event_that_never_comes_changes_nothing():
    event = dfx.Event(lambda t, y, args, **k: y < -1.0)
    run = lambda **k: sf.solve(sf.ODE(lambda t, y, r: -y), jnp.array(1.0), TS, dt0=0.1, solver=dfx.Tsit5(), **k)
    sol = run(event=event)
    assert sol.result == sf.RESULTS.successful
    np.testing.assert_allclose(sol.ys, run().ys, rtol=1e-12)
    assert int(sol.stats["num_steps"]) == 10
