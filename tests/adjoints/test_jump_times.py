"""Derivatives in the times of declared jumps, against closed forms: y' = -y + u(t), u constant between the jumps."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdeflow as sf

pytestmark = pytest.mark.usefixtures("x64_module")

TIMES = np.array([0.7, 1.3])
LEVELS = (1.0, 3.0, 0.0)
A = sf.adjoints
SLOW = pytest.mark.slow


def _drift(t, y, jumps):
    return -y + jnp.select([t < jumps[0], t < jumps[1]], LEVELS[:2], LEVELS[2])


def _exact(t):
    """The derivatives of y(t) in both jumps."""
    steps = -np.diff(LEVELS)
    return np.where(t > TIMES, steps * np.exp(TIMES - t), 0)


def _controller(jumps, **kwargs):
    return dfx.ClipStepSizeController(dfx.PIDController(rtol=1e-7, atol=1e-9), jump_ts=jumps, **kwargs)


def _diffeqsolve(jumps, adjoint, solver, ts=(2.0,)):
    sol = dfx.diffeqsolve(
        dfx.ODETerm(_drift), solver, 0.0, 2.0, None, jnp.array(0.2), jumps, saveat=dfx.SaveAt(ts=jnp.array(ts)),
        stepsize_controller=_controller(jumps), adjoint=adjoint,
    )  # fmt: skip
    return sol.ys


@pytest.mark.parametrize(
    ("adjoint", "solver"),
    [
        (A.DiscreteAdjoint(), dfx.Tsit5()),
        (A.InterpolatingAdjoint(), dfx.Tsit5()),
        pytest.param(A.DiscreteAdjoint(), dfx.Dopri8(), marks=SLOW),
        pytest.param(A.DiscreteAdjoint(), dfx.Kvaerno3(), marks=SLOW),
        pytest.param(A.DiscreteAdjoint(higher_order=True), dfx.Tsit5(), marks=SLOW),
        pytest.param(A.ContinuousAdjoint(), dfx.Tsit5(), marks=SLOW),
    ],
    ids=repr,
)
def test_gradients_in_the_times_of_jumps(adjoint, solver):
    jumps = jnp.array(TIMES)
    # Between steps the solver's own interpolation is meant, before, between and after the jumps.
    ts = (0.6, 1.28, 1.31, 1.9, 2.0) if isinstance(adjoint, A.DiscreteAdjoint) else (2.0,)
    weights = jnp.arange(1.0, 1 + len(ts))
    value, grad = jax.value_and_grad(lambda x: weights @ _diffeqsolve(x, adjoint, solver, ts))(jumps)
    plain = weights @ _diffeqsolve(jumps, dfx.RecursiveCheckpointAdjoint(), solver, ts)
    np.testing.assert_allclose(value, plain, rtol=1e-12)
    exact = sum(float(w) * _exact(t) for w, t in zip(weights, ts))
    np.testing.assert_allclose(grad, exact, rtol=2e-5)


def test_jumps_outside_of_the_times_have_no_derivative():
    def final(jumps):
        field = sf.ODE(lambda t, y, a: -y)
        return sf.solve(field, jnp.array(1.0), [0.0, 1.0], stepsize_controller=_controller(jumps)).final

    grad = jax.grad(final)(jnp.array([-1.0, 0.0, 1.0, 3.0]))
    np.testing.assert_array_equal(grad, np.zeros(4))


@pytest.mark.parametrize("direction", [1, pytest.param(-1, marks=SLOW)])
def test_batches_of_jumps_in_either_direction(direction):
    # s = -t turns y' = f(t, y) into y' = -f(-s, y).
    def field(t, y, jumps):
        return direction * _drift(direction * t, y, direction * jumps)

    def final(jumps):
        sol = sf.solve(
            sf.ODE(field), jnp.array(0.2), [0.0, direction * 1.0, direction * 2.0], args=jumps,
            stepsize_controller=_controller(jumps),
        )  # fmt: skip
        return sol.ys[1:]

    shifts = jnp.array([[0.0, 0.0], [0.1, -0.2]])
    jac = jax.vmap(jax.jacrev(final))(direction * (jnp.array(TIMES) + shifts))
    for i, shift in enumerate(np.asarray(shifts)):
        at = TIMES + shift
        exact = [np.where(at < t, -np.diff(LEVELS) * np.exp(at - t), 0) for t in (1.0, 2.0)]
        np.testing.assert_allclose(direction * jac[i], exact, rtol=2e-5)


@pytest.mark.parametrize("higher_order", [False, pytest.param(True, marks=SLOW)])
def test_noise_has_no_part_in_them(higher_order):
    # y' = u(t) + noise: other step ends stay where they are, and so does the noise of every step.
    def final(jumps):
        drift = lambda t, y, jumps: _drift(t, jnp.zeros_like(y), jumps)
        sde = sf.SDE(drift, lambda t, y, a: 0.3 * jnp.ones_like(y), additive=True)
        controller = dfx.ClipStepSizeController(dfx.PIDController(rtol=1e-2, atol=1e-2), jump_ts=jumps)
        return sf.solve(
            sde, jnp.array(0.2), [0.0, 2.0], args=jumps, key=jax.random.key(2), solver=dfx.ShARK(), dt0=0.1,
            stepsize_controller=controller, adjoint=A.DiscreteAdjoint(higher_order=higher_order),
        ).final  # fmt: skip

    np.testing.assert_allclose(jax.grad(final)(jnp.array(TIMES)), -np.diff(LEVELS), rtol=1e-10)
