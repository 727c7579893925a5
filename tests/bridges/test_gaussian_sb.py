"""Bridges between Gaussians, for every kind of reference, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.bridges import CASES, MOSTLY_SLOW, case, closed_form, gaussians
from scipy import linalg

import sdeflow as sf
from sdeflow.bridges import gaussian_sb

pytestmark = pytest.mark.usefixtures("x64_module")


def test_the_control_energy_is_the_divergence_from_the_reference():
    bridge = gaussian_sb(
        jnp.zeros(1), jnp.eye(1), jnp.ones(1), jnp.eye(1) / 4, sf.equations.BrownianMotion(1, 0.5**0.5)
    )
    # X(t) is normal and the drift affine, so E|g|^2 has a closed form at each time.
    S, eps = float(bridge.potential.spread[0, 0]), 0.5
    ts, w = np.polynomial.legendre.leggauss(60)
    ts, w = (ts + 1) / 2, w / 2
    energy = 0.0
    for t, weight in zip(ts, w):
        variance = (1 - t) ** 2 + t**2 / 4 + 2 * t * (1 - t) * S + eps * t * (1 - t)
        g = lambda x, t=t: float(bridge.drift(t, jnp.array([x]))[0])
        slope = g(1.0) - g(0.0)
        energy += weight * (slope**2 * variance + g(t) ** 2) / (2 * eps)
    assert energy == pytest.approx(1.719146, abs=1e-6)


@pytest.mark.parametrize(("name", "d", "i"), CASES)
def test_the_bridge_of_gaussians_is_the_closed_form(name, d, i):
    T = 1.3
    bridge, (m0, S0, m1, S1), reference = case(d, i, T)
    C, phi, _, q = closed_form(m0, S0, m1, S1, reference, T)
    joint = np.linalg.inv(np.block([[S0, C], [C.T, S1]]))
    np.testing.assert_allclose(joint[:d, d:], -phi.T @ np.linalg.inv(q), rtol=1e-7, atol=1e-9)
    # What the end keeps of its covariance once the start is known, in the coordinates of the clock.
    G = bridge.clock.scale
    G = np.diag(G) if G.ndim == 1 else G
    rest = bridge.epsilon * bridge.potential.covariances()[0]
    np.testing.assert_allclose(rest, G @ (S1 - C.T @ np.linalg.solve(S0, C)) @ G.T, rtol=1e-7, atol=1e-9)
    x = jnp.asarray(m0 + 0.7)
    wanted = m1 + C.T @ np.linalg.solve(S0, x - m0)
    np.testing.assert_allclose(bridge.endpoint_mean(0.2, x), wanted, rtol=1e-8)


@pytest.mark.parametrize(("name", "d", "i"), MOSTLY_SLOW)
def test_moments_follow_the_drift_from_one_end_to_the_other(name, d, i):
    # The score -S^-1 (x - m) tells the moments at every time. They are the ends' at the ends, and in between they obey
    # m' = drift(m) and Lyapunov's equation; so they do for the flow without noise, and for the way back.
    bridge, (m0, S0, m1, S1), reference = case(d, i)
    zero = jnp.zeros(d)

    def moments(t):
        S = jnp.linalg.inv(-jax.jacfwd(lambda x: bridge.score(t, x))(zero))
        return S @ bridge.score(t, zero), S

    @jax.jit
    def residuals(t):
        (m, S), rates = jax.jvp(moments, (t,), (jnp.ones(()),))
        parts = [rates]
        L = reference.coefficients(t)[2]
        noise = L @ L.T
        for field, extra in ((bridge.drift, noise), (bridge.velocity, 0.0), (bridge.backward_drift, -noise)):
            A = jax.jacfwd(lambda x, field=field: field(t, x))(zero)
            parts.append((A @ m + field(t, zero), A @ S + S @ A.T + extra))
        return (m, S), parts

    for t in (0.2, 0.7, 1.5):
        (m, S), ((dm, dS), *fields) = residuals(jnp.asarray(t))
        if t in (0.2, 1.5):
            np.testing.assert_allclose(m, m0 if t == 0.2 else m1, rtol=1e-8, atol=1e-8)
            np.testing.assert_allclose(S, S0 if t == 0.2 else S1, rtol=1e-8, atol=1e-8)
        for mean, covariance in fields:
            np.testing.assert_allclose(mean, dm, rtol=1e-7, atol=1e-7)
            np.testing.assert_allclose(covariance, dS, rtol=1e-7, atol=1e-7)


def test_moments_of_brownian_bridges_of_gaussians():
    m0, S0, m1, S1 = gaussians(3)
    eps, t = 0.64, 0.4
    bridge = gaussian_sb(m0, S0, m1, S1, sf.equations.BrownianMotion(3, 0.8))
    C, *_ = closed_form(m0, S0, m1, S1, sf.equations.BrownianMotion(3, 0.8), 1.0)
    St = (1 - t) ** 2 * S0 + t**2 * S1 + t * (1 - t) * (C + C.T) + eps * t * (1 - t) * np.eye(3)
    Kt = t * S1 + (1 - t) * C - (1 - t) * S0 - t * C.T - eps * t * np.eye(3)
    x = np.array([0.3, -0.5, 1.0])
    mt = (1 - t) * m0 + t * m1
    np.testing.assert_allclose(bridge.score(t, x), -np.linalg.solve(St, x - mt), rtol=1e-9)
    np.testing.assert_allclose(bridge.drift(t, x), Kt.T @ np.linalg.solve(St, x - mt) + m1 - m0, rtol=1e-9)


@pytest.mark.parametrize(
    ("v0", "v1", "eps", "c"),
    [
        (1, 1, 0.1, 0.951249),
        (1, 1, 0.5, 0.780776),
        (1, 1, 1.0, 0.618034),
        (1, 1, 2.0, 0.414214),
        (1, 0.25, 0.1, 0.452494),
        (1, 0.25, 0.5, 0.309017),
        (1, 0.25, 1.0, 0.207107),
        (1, 4, 0.5, 1.765564),
        (1, 4, 1.0, 1.561553),
    ],
)
def test_covariances_of_two_ends_on_a_line(v0, v1, eps, c):
    eye = jnp.eye(1)
    bridge = gaussian_sb(jnp.zeros(1), v0 * eye, jnp.zeros(1), v1 * eye, sf.equations.BrownianMotion(1, eps**0.5))
    assert float(bridge.endpoint_mean(0.0, jnp.ones(1))[0]) * v0 == pytest.approx(c, abs=1e-6)


def test_little_noise_is_the_map_between_gaussians_and_much_of_it_is_independence():
    m0, S0, m1, S1 = gaussians(3)
    h = linalg.sqrtm(S0).real
    wanted = h @ linalg.sqrtm(h @ S1 @ h).real @ np.linalg.inv(h)
    for sigma, C in ((1e-4, wanted), (1e3, np.zeros((3, 3)))):
        bridge = gaussian_sb(m0, S0, m1, S1, sf.equations.BrownianMotion(3, sigma))
        slope = jax.jacfwd(lambda x, bridge=bridge: bridge.endpoint_mean(0.0, x))(jnp.zeros(3))
        np.testing.assert_allclose(S0 @ slope.T, C, atol=1e-5)


def test_euler_s_moments_converge_at_the_rate_of_the_step():
    # The drift is affine, so the moments of Euler's chain are a recursion and no chance is in them.
    bridge, (m0, S0, m1, S1), reference = case(2, 0)
    field = jax.jit(lambda t: (bridge.drift(t, jnp.zeros(2)), jax.jacfwd(lambda x: bridge.drift(t, x))(jnp.zeros(2))))

    def error(steps):
        h, m, S = 1.3 / steps, m0, S0
        for i in range(steps):
            c, B = (np.asarray(v) for v in field(0.2 + i * h))
            step = np.eye(2) + h * B
            m, S = step @ m + h * c, step @ S @ step.T + h * 0.64 * np.eye(2)
        # The mean moves along a line, which Euler's rule keeps to.
        np.testing.assert_allclose(m, m1, atol=1e-12)
        return S - S1

    coarse, fine = error(400), error(800)
    assert np.abs(fine).max() < 0.01
    np.testing.assert_allclose(coarse / fine, 2.0, atol=0.05)


def test_a_start_without_variance_is_a_bridge_from_a_point():
    zero = jnp.zeros((2, 2))
    bridge = gaussian_sb(jnp.ones(2), zero, -jnp.ones(2), jnp.eye(2), sf.equations.BrownianMotion(2))
    np.testing.assert_allclose(bridge.endpoint_mean(0.0, jnp.ones(2)), -1.0)
    assert np.isfinite(bridge.drift(1.0, jnp.zeros(2))).all()
