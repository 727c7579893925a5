"""Bridges near to references that depend on time: in a turning frame, and under a change of time, they are known."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers.frames import constant, rotating, turn

import sdeflow as sf
from sdeflow.bridges import Clock, gaussian_sb, light_sb, sinkhorn_bridge

pytestmark = pytest.mark.usefixtures("x64_module")

W, T0, T1 = 1.7, 0.2, 1.5
J = np.array([[0.0, -1.0], [1.0, 0.0]])
LAWS = (
    np.array([0.5, -0.3]),
    np.array([[0.9, 0.2], [0.2, 0.4]]),
    np.array([-1.0, 0.7]),
    np.array([[0.3, 0.1], [0.1, 0.6]]),
)


def turning_bridge(dtype=jnp.float64):
    Rs, Rt = turn(W * T0), turn(W * T1)
    m0, S0, m1, S1 = (jnp.asarray(v, dtype) for v in LAWS)
    return gaussian_sb(Rs @ m0, Rs @ S0 @ Rs.T, Rt @ m1, Rt @ S1 @ Rt.T, rotating(W), t0=T0, t1=T1)


@pytest.fixture(scope="module")
def both():
    """A bridge in the turning frame and the same one seen from outside."""
    return gaussian_sb(*LAWS, constant(), t0=T0, t1=T1), turning_bridge()


def fields(bridge):
    return jax.jit(
        lambda t, x: (bridge.drift(t, x), bridge.velocity(t, x), bridge.backward_drift(t, x), bridge.score(t, x))
    )


def test_every_field_is_that_of_the_constant_reference_in_its_frame(both):
    inside, outside = (fields(bridge) for bridge in both)
    x = np.array([0.3, -0.8])
    for t in (T0, 0.2 + 1.3 * 5 / 32, 0.77, 1.499, T1):
        R = np.asarray(turn(W * t))
        *moving, score = inside(t, x)
        for found, wanted in zip(outside(t, R @ x), [*(R @ v + W * J @ R @ x for v in moving), R @ score]):
            np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-10)
    end = both[1].endpoint_mean(0.9, turn(W * 0.9) @ x)
    np.testing.assert_allclose(end, turn(W * T1) @ both[0].endpoint_mean(0.9, x), rtol=1e-10)


def test_the_clock_starts_at_one_ends_at_zero_and_keeps_its_digits_near_the_end():
    clock, same = Clock(rotating(W), T0, T1), Clock(constant(), T0, T1)
    left = jax.jit(lambda t: clock.map(t)[2])
    np.testing.assert_array_equal(left(T1), np.zeros((2, 2)))
    np.testing.assert_allclose(left(T0), np.eye(2), atol=1e-13)
    for t in (1.0, T1 - 1e-6):
        # The two choices of G differ by a rotation, so what is left has the same eigenvalues.
        wanted = np.linalg.eigvalsh(same.map(t)[2])
        np.testing.assert_allclose(np.linalg.eigvalsh(left(t)), wanted, rtol=1e-8)


def test_the_table_of_the_clock_is_the_transition():
    clock, reference = Clock(rotating(W), T0, T1), rotating(W)
    for t in (T0, 0.2 + 1.3 * 5 / 32, 0.9, 1.4999):
        phi, c, q = reference.transition(t, T1)
        J, offset, left = clock.map(t)
        np.testing.assert_allclose(J, clock.scale @ phi, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(offset, clock.scale @ c, rtol=1e-11, atol=1e-13)
        np.testing.assert_allclose(left * clock.epsilon, clock.scale @ q @ clock.scale.T, rtol=1e-10, atol=1e-13)


def test_float32_keeps_the_drift(both):
    x = np.array([0.3, -0.8])
    with jax.enable_x64(False):
        single = turning_bridge(jnp.float32)
        drift = jax.jit(lambda t: single.drift(t, x.astype(np.float32)))
        found = {t: drift(t) for t in (T0, 0.9, T1)}
    for t, drift in found.items():
        assert drift.dtype == jnp.float32
        np.testing.assert_allclose(drift, both[1].drift(t, x), rtol=2e-5, atol=2e-5)


def test_a_gradient_reaches_the_parameters_of_the_reference():
    def drift(k):
        reference = sf.equations.OrnsteinUhlenbeck(lambda t: k + t, 0.3, lambda t: jnp.exp(k * t) * jnp.ones(2))
        return gaussian_sb(*LAWS, reference, t0=T0, t1=T1).drift(0.9, jnp.array([0.3, -0.8]))[0]

    k, h = 0.6, 1e-5
    value, slope = jax.jit(drift), jax.jit(jax.grad(drift))
    np.testing.assert_allclose(slope(k), (value(k + h) - value(k - h)) / (2 * h), rtol=1e-7)


# With sigma(t)^2 = 2 t Brownian motion runs by the clock t^2: a bridge near to it is the one near to a constant sigma
# at the time t^2, with 2 t of its drift.
CHANGED = {"reference": sf.equations.BrownianMotion(2, lambda t: jnp.sqrt(2 * t))}


def samples(n=40):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, 2)), 0.5 * rng.normal(size=(n, 2)) + np.array([1.0, -0.5])


@pytest.mark.parametrize("kind", ["sinkhorn", pytest.param("light", marks=pytest.mark.slow)])
def test_bridges_of_samples_obey_a_change_of_time(kind):
    x0, x1 = samples()
    light = {"num_components": 3, "steps": 40, "key": jr.key(0), "backward": "samples"}
    make = sinkhorn_bridge if kind == "sinkhorn" else lambda *clouds, **how: light_sb(*clouds, **how, **light)
    changed, plain = make(x0, x1, **CHANGED), make(x0, x1, epsilon=1.0)
    np.testing.assert_allclose(changed.epsilon, 1.0, rtol=1e-12)
    x, first, second = jnp.array([0.2, -0.1]), fields(changed), fields(plain)
    for t in (0.3, 0.8):
        (*moving, score), (*wanted, same) = first(t, x), second(t**2, x)
        np.testing.assert_allclose(moving, 2 * t * jnp.stack(wanted), rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(score, same, rtol=1e-8, atol=1e-10)
    ts = jnp.array([0.0, 0.4, 1.0])
    paths = [
        jax.jit(lambda s, b=b: b.sample_path(x0[0], s, key=jr.key(1)))(s) for b, s in ((changed, ts), (plain, ts**2))
    ]
    np.testing.assert_allclose(*paths, rtol=1e-9, atol=1e-9)


def test_sinkhorn_s_bridge_is_that_of_the_constant_reference_in_its_frame():
    x0, x1 = samples()
    how = {"t0": T0, "t1": T1, "tolerance": 1e-9, "max_iterations": 20_000}
    inside = sinkhorn_bridge(x0, x1, reference=constant(), **how)
    Rs, Rt = np.asarray(turn(W * T0)), np.asarray(turn(W * T1))
    outside = sinkhorn_bridge(x0 @ Rs.T, x1 @ Rt.T, reference=rotating(W), **how)
    R, x = np.asarray(turn(W * 0.9)), np.array([0.2, -0.1])
    np.testing.assert_allclose(outside.drift(0.9, R @ x), R @ inside.drift(0.9, x) + W * J @ R @ x, rtol=1e-6)


@pytest.mark.slow
def test_solved_paths_reach_the_target(both):
    bridge, n = both[1], 20_000
    m0, S0, m1, S1 = LAWS
    x0 = np.random.default_rng(0).multivariate_normal(m0, S0, n) @ np.asarray(turn(W * T0)).T
    grid = sf.grids.uniform(T0, T1, 80)
    run = lambda x, key: sf.solve(bridge.equation(), x, [T0, T1], grid=grid, key=key).final
    y = jax.jit(jax.vmap(run))(jnp.asarray(x0), jr.split(jr.key(1), n)) @ turn(W * T1)
    size = np.sqrt(np.diagonal(S1))
    assert (np.abs(y.mean(0) - m1) / size < 5 / np.sqrt(n)).all()
    assert (np.abs(np.cov(y.T) - S1) / np.outer(size, size) < 5 * np.sqrt(2 / n)).all()
