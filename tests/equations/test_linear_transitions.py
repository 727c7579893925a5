"""Linear equations are exact: transitions compose, agree with scipy, and bridges condition the right Gaussian."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.linalg
from helpers.stats import assert_mean

import sdeflow as sf

pytestmark = pytest.mark.usefixtures("x64_module")

_OSCILLATOR = ([[0.0, 1.0], [-4.0, -0.3]], [0.1, -0.2], [[0.0], [0.5]])
_DENSE = ([[-1.0, 0.4, 0.0], [0.2, -0.7, -0.9], [0.0, 1.1, -0.2]], [0.3, -0.1, 0.2], np.arange(6).reshape(3, 2) / 5)
_UNSTABLE = ([[0.8, 1.0], [0.0, 0.5]], [1.0, -1.0], np.eye(2))
_NILPOTENT = ([[0.0, 1.0], [0.0, 0.0]], [0.0, 0.7], [[0.0], [1.0]])
_SKEWED = ([[-0.2, 30.0], [0.0, -0.1]], [1.0, 0.0], np.eye(2))
_NOTHING = (np.zeros((2, 2)), [0.0, 0.0], np.eye(2))
CASES = {
    "oscillator": _OSCILLATOR,
    "dense": _DENSE,
    "unstable": _UNSTABLE,
    "nilpotent": _NILPOTENT,
    "skewed": _SKEWED,
    "zero": _NOTHING,
}
TIMES = [1e-6, 0.01, 0.3, 0.5, 1.0, 7.0]


def _linear(name):
    return sf.equations.LinearSDE(*(np.asarray(x, float) for x in CASES[name]))


@pytest.fixture(scope="module")
def transition():
    return jax.jit(lambda sde, s, t: sde.transition(s, t))


@pytest.fixture(scope="module")
def bridge():
    return jax.jit(lambda sde, s, t, u: sde.bridge(s, t, u))


def _by_quadrature(A, b, L, t):
    """Phi, c and Q from their definitions: scipy's matrix exponential and Gauss-Legendre on 4 panels."""
    A, b, L = (np.asarray(x, float) for x in (A, b, L))
    nodes, weights = np.polynomial.legendre.leggauss(16)
    h = t / 4
    u = (np.arange(4)[:, None] + (nodes + 1) / 2).ravel() * h
    flow = scipy.linalg.expm(A * u[:, None, None])
    w = np.tile(weights * h / 2, 4)
    Q = np.einsum("u,uij,jk,ulk->il", w, flow, L @ L.T, flow)
    return scipy.linalg.expm(A * t), np.einsum("u,uij,j->i", w, flow, b), Q


def _close(a, b, tolerance, together=False):
    """Each array to a tolerance relative to its own largest entry, or to that of all of them."""
    sizes = [np.abs(np.asarray(y)).max() for y in b]
    for x, y, size in zip(a, b, sizes):
        assert np.abs(np.asarray(x) - np.asarray(y)).max() <= tolerance * (max(sizes) if together else size)


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("name", CASES)
def test_transition_is_the_matrix_exponential_and_its_integrals(transition, name, t):
    _close(transition(_linear(name), 0.0, t), _by_quadrature(*CASES[name], t), 2e-12)


@pytest.mark.parametrize("times", [(0.0, 0.3, 1.0), (0.2, 0.7, 3.1), (-1.0, 4.0, 4.25)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_transitions_compose(transition, name, times):
    s, t, u = times
    sde = _linear(name)
    (p1, c1, q1), (p2, c2, q2) = transition(sde, s, t), transition(sde, t, u)
    _close((p2 @ p1, p2 @ c1 + c2, p2 @ q1 @ p2.T + q2), transition(sde, s, u), 1e-12)


@pytest.mark.parametrize("theta", [1e-3, 0.25, 0.5, 1.0, 2.0, 30.0])
def test_ornstein_uhlenbeck_has_its_closed_form(transition, theta):
    sde = sf.equations.OrnsteinUhlenbeck(theta, 1.7, 0.6)
    for t in TIMES:
        phi, c, q = transition(sde, 0.0, t)
        np.testing.assert_allclose(phi[0, 0], np.exp(-theta * t), rtol=1e-12, atol=1e-16)
        np.testing.assert_allclose(c[0], -1.7 * np.expm1(-theta * t), rtol=1e-12)
        np.testing.assert_allclose(q[0, 0], 0.36 * -np.expm1(-2 * theta * t) / (2 * theta), rtol=1e-12)


def test_brownian_motion_has_its_closed_form(transition):
    phi, c, q = transition(sf.equations.BrownianMotion(3, jnp.array([0.5, 1.0, 2.0])), 1.0, 3.5)
    np.testing.assert_array_equal(phi, np.eye(3))
    np.testing.assert_array_equal(c, np.zeros(3))
    np.testing.assert_allclose(q, 2.5 * np.diag([0.25, 1.0, 4.0]), rtol=1e-14)


def test_no_time_is_the_identity(transition):
    phi, c, q = transition(_linear("dense"), 0.4, 0.4)
    np.testing.assert_array_equal(phi, np.eye(3))
    assert not np.asarray(c).any()
    assert not np.asarray(q).any()


def test_float32_keeps_its_digits_for_short_times(transition):
    A, b, L = CASES["oscillator"]
    with jax.enable_x64(False):
        sde = sf.equations.LinearSDE(*(np.asarray(x, np.float32) for x in (A, b, L)))
        for t in (1e-5, 1e-3, 0.1, 1.0):
            found = transition(sde, 0.0, t)
            wanted = _by_quadrature(*CASES["oscillator"], np.float64(np.float32(t)))
            assert all(x.dtype == jnp.float32 for x in found)
            # Every entry on its own, and of Phi what differs from the identity too.
            for x, y in zip(found[1:], wanted[1:]):
                np.testing.assert_allclose(x, y, rtol=2e-5)
            np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)


def test_gradients_are_finite_and_equal_finite_differences():
    # Zero and nilpotent matrices are where eigenvalue formulas have NaN.
    def scalar(A, b, L, t):
        phi, c, q = sf.equations.LinearSDE(A, b, L).transition(0.0, t)
        return jnp.sin(phi).sum() + (c**2).sum() + jnp.cos(q).sum()

    grad = jax.jit(jax.grad(scalar, argnums=(0, 1, 2, 3)))
    value = jax.jit(scalar)
    for name in ("oscillator", "nilpotent", "zero"):
        for t in (0.7, 1e-4, 0.0):
            point = [jnp.asarray(np.asarray(x, float)) for x in CASES[name]] + [jnp.asarray(t)]
            if name == "zero":
                point[2] = jnp.array([[1.0], [0.3]])
            g = grad(*point)
            assert all(np.isfinite(x).all() for x in g)
            for i, x in enumerate(point):
                # In t one side of zero is another law; the derivative there is that of the formula.
                e = np.zeros(x.shape)
                e.flat[0] = 1e-6
                above, below = point.copy(), point.copy()
                above[i], below[i] = x + e, x - e
                if i == 3 and t == 0.0:
                    continue
                wanted = (value(*above) - value(*below)) / 2e-6
                np.testing.assert_allclose(np.ravel(g[i])[0], wanted, rtol=2e-7, atol=1e-8)


# ---- Bridges. ----


@pytest.mark.parametrize("t", [0.0, 0.1, 0.8, 1.9, 2.0])
def test_the_brownian_bridge_has_its_closed_form(bridge, t):
    F, G, c, C = bridge(sf.equations.BrownianMotion(2, 0.7), 0.0, t, 2.0)
    np.testing.assert_allclose(F, (1 - t / 2) * np.eye(2), atol=1e-15)
    np.testing.assert_allclose(G, t / 2 * np.eye(2), atol=1e-15)
    np.testing.assert_allclose(c, np.zeros(2), atol=1e-15)
    np.testing.assert_allclose(C, 0.49 * t * (2 - t) / 2 * np.eye(2), atol=1e-15)


@pytest.mark.parametrize("t", [0.0, 1e-4, 0.5, 1.3, 2.0 - 1e-4, 2.0])
def test_the_ornstein_uhlenbeck_bridge_has_its_closed_form(bridge, t):
    theta, mean, sigma, u = 1.5, 0.4, 0.6, 2.0
    F, G, c, C = bridge(sf.equations.OrnsteinUhlenbeck(theta, mean, sigma), 0.0, t, u)
    sinh = np.sinh
    f, g = sinh(theta * (u - t)) / sinh(theta * u), sinh(theta * t) / sinh(theta * u)
    np.testing.assert_allclose(F[0, 0], f, rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(G[0, 0], g, rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(c[0], mean * (1 - f - g), rtol=1e-11, atol=1e-14)
    wanted = sigma**2 * sinh(theta * (u - t)) * sinh(theta * t) / (theta * sinh(theta * u))
    np.testing.assert_allclose(C[0, 0], wanted, rtol=1e-11, atol=1e-15)


def _conditioned(sde, transition, s, t, u):
    """F, G, c and C by conditioning the joint normal law of (X(t), X(u)) given X(s), the textbook way."""
    (p1, c1, q1), (p2, c2, q2) = (np.asarray(x) for x in transition(sde, s, t)), transition(sde, t, u)
    p2, c2, q2 = np.asarray(p2), np.asarray(c2), np.asarray(q2)
    cross, total = q1 @ p2.T, p2 @ q1 @ p2.T + q2
    gain = cross @ np.linalg.inv(total)
    mean_u = p2 @ c1 + c2
    return p1 - gain @ p2 @ p1, gain, c1 - gain @ mean_u, q1 - gain @ cross.T


@pytest.mark.parametrize("name", ["dense", "unstable", "oscillator", "nilpotent"])
def test_bridges_condition_the_joint_normal_law(transition, bridge, name):
    sde = _linear(name)
    _close(bridge(sde, 0.2, 0.9, 2.0), _conditioned(sde, transition, 0.2, 0.9, 2.0), 1e-11, together=True)


def test_simulated_paths_given_their_ends_follow_the_bridge(transition, bridge):
    # Regress the middle of simulated paths on their end: slope, mean and residual variance are the bridge's.
    sde = sf.equations.OrnsteinUhlenbeck(0.8, 0.5, 0.7)
    grid, y0 = sf.grids.uniform(0.0, 1.0, 64), jnp.full((500,), 1.2)

    def one(key):
        sol = sf.solve(sde, y0, [0.0, 0.5, 1.0], dt0=1 / 32, key=key)
        return sol.ys[1:]

    middle, end = np.moveaxis(np.asarray(jax.jit(jax.vmap(one))(jr.split(jr.key(0), 16))), 1, 0)
    assert grid.num_rows == 64
    F, G, c, C = (float(np.ravel(x)[0]) for x in bridge(sde, 0.0, 0.5, 1.0))
    rest = middle - (F * 1.2 + G * end + c)
    assert_mean(rest, 0.0)
    assert_mean(rest * (end - end.mean()), 0.0)
    assert_mean(rest**2, C)


@pytest.mark.parametrize("name", ["dense", "oscillator", "nilpotent", "unstable"])
def test_both_ends_of_a_bridge_are_the_ends(bridge, name):
    sde = _linear(name)
    d = len(CASES[name][1])
    start, end = bridge(sde, 0.0, 0.0, 1.5), bridge(sde, 0.0, 1.5, 1.5)
    zero = np.zeros(d)
    for (F, G, c, C), (f, g) in ((start, (1.0, 0.0)), (end, (0.0, 1.0))):
        np.testing.assert_allclose(F, f * np.eye(d), atol=1e-12)
        np.testing.assert_allclose(G, g * np.eye(d), atol=1e-12)
        np.testing.assert_allclose(c, zero, atol=1e-12)
        np.testing.assert_allclose(C, np.zeros((d, d)), atol=1e-12)


def test_bridge_covariances_are_symmetric_and_positive_near_the_ends(bridge):
    for t in (1e-6, 1e-3, 1.5 - 1e-3, 1.5 - 1e-6):
        C = np.asarray(bridge(_linear("dense"), 0.0, t, 1.5)[3])
        np.testing.assert_allclose(C, C.T, atol=1e-18)
        assert np.linalg.eigvalsh(C).min() > 0


def test_bridge_gradients_are_finite_at_both_ends():
    scalar = lambda sde, t: sum(x.sum() for x in sde.bridge(0.0, t, 1.5))
    grad = jax.jit(jax.grad(lambda sde, t: scalar(sde, t)))
    for t in (0.0, 0.7, 1.5):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(grad(_linear("dense"), t)))


def test_bridges_compose_with_transitions(transition, bridge):
    # p(t | s) is p(t | s, u) averaged over p(u | s).
    sde, (s, t, u) = _linear("dense"), (0.1, 0.8, 1.7)
    F, G, c, C = bridge(sde, s, t, u)
    pu, cu, qu = transition(sde, s, u)
    _close((F + G @ pu, G @ cu + c, C + G @ qu @ G.T), transition(sde, s, t), 1e-11, together=True)


# ---- What is refused. ----


@pytest.mark.parametrize(
    "arrays",
    [
        (np.eye(2), np.zeros(3), np.eye(2)),
        (np.eye(2), np.zeros(2), np.ones(2)),
        (np.zeros(2), np.zeros(2), np.eye(2)),
        (np.eye(2), np.zeros((2, 1)), np.eye(2)),
        (np.eye(2), np.zeros(2), np.ones((3, 2))),
    ],
)
def test_shapes_that_disagree_are_refused(arrays):
    with pytest.raises(ValueError, match=r"must have shapes \(d, d\), \(d,\) and \(d, m\), got"):
        sf.equations.LinearSDE(*arrays)


@pytest.mark.parametrize("dim", [0, -1, 2.0, True, "2"])
def test_a_dimension_is_a_positive_integer(dim):
    with pytest.raises(ValueError, match="dim must be a positive integer, got"):
        sf.equations.BrownianMotion(dim)


def test_a_sigma_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"sigma must be a scalar or of shape \(3,\), got \(2,\)"):
        sf.equations.BrownianMotion(3, np.ones(2))
    with pytest.raises(ValueError, match=r"must broadcast to one dimension, got \(2,\), \(3,\) and \(\)"):
        sf.equations.OrnsteinUhlenbeck(np.ones(2), np.ones(3), 1.0)


def test_times_that_decrease_are_refused():
    """Backwards the covariance would come out negative, and nobody would notice."""
    sde = sf.equations.OrnsteinUhlenbeck(1.0)
    with pytest.raises(ValueError, match="s <= t"):
        sde.transition(1.0, 0.5)
    with pytest.raises(ValueError, match="s <= t"):
        sde.bridge(0.0, 2.0, 1.0)
