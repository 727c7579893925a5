"""Linear equations whose coefficients depend on time, against a rotating frame, where they do not, and quadrature.

In the frame X = R(t) Y that turns at the rate w, dX = (R A R' + w J) X dt + R b dt + R L dW is the constant equation
dY = (A Y + b) dt + L dW; the coefficients of X do not commute between times.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.frames import A, L, b, constant, rotating, turn
from scipy import integrate

import sdeflow as sf

pytestmark = pytest.mark.usefixtures("x64_module")

transition = eqx.filter_jit(lambda sde, s, t: sde.transition(s, t))
W = 1.7


@pytest.fixture(scope="module")
def turning():
    return rotating(W)


def turned(law, s, t):
    (phi, c, q), (start, end) = law, (np.asarray(turn(W * s)), np.asarray(turn(W * t)))
    return end @ phi @ start.T, end @ c, end @ q @ end.T


def close(a, b, tolerance):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("times", [(0.0, 1.3), (0.4, 0.401), (-1.0, 4.0)])
def test_transitions_are_those_of_the_constant_equation_in_its_frame(turning, times):
    close(transition(turning, *times), turned(transition(constant(), *times), *times), 1e-12)


def test_functions_that_are_constant_are_the_constant_equation():
    same = sf.equations.LinearSDE(lambda t: jnp.asarray(A), lambda t: jnp.asarray(b), L)
    close(transition(same, 0.2, 1.7), transition(constant(), 0.2, 1.7), 1e-13)


def test_no_time_is_the_identity_exactly(turning):
    phi, c, q = transition(turning, 0.4, 0.4)
    np.testing.assert_array_equal(phi, np.eye(2))
    assert not np.asarray(c).any()
    assert not np.asarray(q).any()


def test_a_scalar_equation_has_its_integrals():
    theta = lambda t: 0.5 + 2.0 * t
    sde = sf.equations.OrnsteinUhlenbeck(theta, 0.3, lambda t: jnp.exp(t / 2))
    s, t = 0.2, 1.5
    rate = lambda u: 0.5 * (t - u) + t**2 - u**2
    phi, c, q = transition(sde, s, t)
    variance = integrate.quad(lambda u: np.exp(u - 2 * rate(u)), s, t, epsabs=1e-14, epsrel=1e-13)[0]
    np.testing.assert_allclose(phi[0, 0], np.exp(-rate(s)), rtol=1e-12)
    np.testing.assert_allclose(c[0], 0.3 * (1 - np.exp(-rate(s))), rtol=1e-12)
    np.testing.assert_allclose(q[0, 0], variance, rtol=1e-12)
    y, one = jnp.array([0.7]), jnp.ones(1)
    np.testing.assert_allclose(sde.drift(1.5, y, None), 3.5 * (0.3 - y), rtol=1e-12)
    np.testing.assert_allclose(sde.diffusion(1.5, y, None), np.exp(0.75) * one, rtol=1e-12)


def test_brownian_motion_takes_a_sigma_that_depends_on_time():
    sde = sf.equations.BrownianMotion(2, lambda t: jnp.exp(t / 2) * jnp.array([1.0, 2.0]))
    phi, c, q = transition(sde, 0.5, 2.0)
    np.testing.assert_array_equal(phi, np.eye(2))
    np.testing.assert_array_equal(c, np.zeros(2))
    np.testing.assert_allclose(q, (np.exp(2) - np.exp(0.5)) * np.diag([1.0, 4.0]), rtol=1e-13)
    np.testing.assert_allclose(sde.diffusion(2.0, jnp.zeros((3, 2)), None)[1], np.e * np.array([1.0, 2.0]), rtol=1e-14)


def test_bridges_are_those_of_the_constant_equation_in_its_frame(turning):
    s, t, u = 0.1, 0.7, 1.6
    F, G, c, C = turning.bridge(s, t, u)
    f, g, k, V = constant().bridge(s, t, u)
    Rs, Rt, Ru = (np.asarray(turn(W * v)) for v in (s, t, u))
    close((F, G, c, C), (Rt @ f @ Rs.T, Rt @ g @ Ru.T, Rt @ k, Rt @ V @ Rt.T), 1e-11)


def test_the_density_of_observations_is_the_same_in_both_frames(turning):
    ts = np.array([0.5, 0.9, 1.0, 2.4])
    ys = np.array([[0.3, -0.1], [0.5, 0.2], [0.4, 0.1], [-0.7, 0.6]])
    seen = np.stack([turn(W * t) @ y for t, y in zip(ts, ys)])
    start = np.asarray(turn(W * 0.2)) @ np.array([0.1, 0.4])
    wanted = constant().log_prob(ts, ys, obs_std=0.2, initial=(np.array([0.1, 0.4]), np.eye(2)), t0=0.2)
    found = turning.log_prob(ts, seen, obs_std=0.2, initial=(start, np.eye(2)), t0=0.2)
    np.testing.assert_allclose(found, wanted, rtol=1e-11)
    with pytest.raises(ValueError, match="depends on time has no stationary law"):
        turning.log_prob(ts, seen)


def test_float32_has_its_digits(turning):
    wanted = transition(turning, 0.2, 1.7)
    with jax.enable_x64(False):
        found = transition(rotating(W), 0.2, 1.7)
    assert all(x.dtype == jnp.float32 for x in found)
    for x, y in zip(found, wanted):
        np.testing.assert_allclose(x, y, atol=1e-6 * np.abs(y).max())


def test_derivatives_in_time_and_in_parameters_are_exact(turning):
    s, t = jnp.asarray(0.2), jnp.asarray(1.1)
    (phi, c, q), (dphi, dc, dq) = jax.jit(lambda t: jax.jvp(lambda t: turning.transition(s, t), (t,), (t / t,)))(t)
    At, bt, Lt = turning.coefficients(t)
    close((dphi, dc, dq), (At @ phi, At @ c + bt, At @ q + q @ At.T + Lt @ Lt.T), 1e-11)
    batch = jax.vmap(lambda t: transition(turning, s, t))(jnp.array([0.9, 1.1]))
    close((x[1] for x in batch), (phi, c, q), 1e-14)
    # The mean of Brownian motion's variance in a parameter of sigma(t) = exp(k t): int_0^1 2 t exp(2 k t) dt.
    k = 0.6
    grad = jax.jit(jax.grad(lambda k: variance(k)))(k)
    np.testing.assert_allclose(grad, (np.exp(2 * k) * (2 * k - 1) + 1) / (2 * k**2), rtol=1e-12)


def variance(k):
    return sf.equations.BrownianMotion(1, lambda t: jnp.exp(k * t)).transition(0.0, 1.0)[2][0, 0]


def test_what_varies_too_fast_is_refused_or_nan():
    jump = lambda: sf.equations.BrownianMotion(1, lambda t: jnp.where(t < 0.51, 1.0, 2.0))
    with pytest.raises(ValueError, match="vary too fast for 32 pieces between 0 and 1"):
        jump().transition(0.0, 1.0)
    assert np.isnan(jax.jit(lambda t: jump().transition(0.0, t)[2][0, 0])(1.0))
    stiff = lambda pieces: sf.equations.OrnsteinUhlenbeck(lambda t: 100.0 + 0 * t, pieces=pieces)
    with pytest.raises(ValueError, match="raise `pieces`"):
        stiff(32).transition(0.0, 1.0)
    np.testing.assert_allclose(stiff(128).transition(0.0, 1.0)[2][0, 0], 1 / 200, rtol=1e-9)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: sf.equations.LinearSDE(lambda t: jnp.ones(2), b, L),
            r"must have shapes \(d, d\), \(d,\) and \(d, m\)",
        ),
        (lambda: sf.equations.LinearSDE(A, b, L, pieces=0), "pieces must be a positive integer"),
        (lambda: sf.equations.BrownianMotion(2, lambda t: jnp.ones(3)), r"a scalar or of shape \(2,\), got \(3,\)"),
        (lambda: sf.equations.OrnsteinUhlenbeck(lambda t: jnp.ones(2), np.zeros(3)), "broadcast to one dimension"),
        (lambda: sf.equations.OrnsteinUhlenbeck(lambda t: 1.0 + t).stationary(), "depends on time has no stationary"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("waves", [64, 96, 160])
def test_waves_that_are_even_about_each_piece_are_refused(waves):
    wave = sf.equations.BrownianMotion(1, lambda t: jnp.sqrt(1 + jnp.cos(2 * jnp.pi * waves * t)))
    with pytest.raises(ValueError, match="vary too fast"):
        wave.transition(0.0, 1.0)
