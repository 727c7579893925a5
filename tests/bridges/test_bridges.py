"""Schrödinger bridges against closed forms: one component, one dimension, one Gaussian at a time, then samples."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers.frames import rotating
from scipy import linalg, stats

import sdeflow as sf
from sdeflow.bridges import Bridge, Clock, MixturePotential, gaussian_sb, light_loss, light_sb, sinkhorn_bridge

pytestmark = pytest.mark.usefixtures("x64_module")

ROTATING = (np.array([[-0.5, 1.2], [-0.8, -0.3]]), np.array([0.3, -0.2]), np.array([[0.6, 0.0], [0.2, 0.5]]))


def mixture(K=4, d=3, epsilon=0.7, full=True, seed=0):
    rng = np.random.default_rng(seed)
    basis = np.stack([np.linalg.qr(rng.normal(size=(d, d)))[0] for _ in range(K)]) if full else None
    return MixturePotential(
        jnp.asarray(rng.normal(size=K)),
        jnp.asarray(rng.normal(size=(K, d))),
        jnp.asarray(rng.uniform(0.2, 1.8, size=(K, d))),
        jnp.asarray(epsilon),
        None if basis is None else jnp.asarray(basis),
    )


def official_log_phi(p, x, t):
    """The potential as the official code has it, singular at t = 1; the gradient of x / (1 - t) included."""
    eps, S = p.epsilon, p.covariances()
    iS, eye = jnp.linalg.inv(S), jnp.eye(x.shape[0])
    A = t / (eps * (1 - t)) * eye + iS / eps
    c = x / (eps * (1 - t)) + (iS @ p.centres[..., None])[..., 0] / eps
    quadratic = jnp.einsum("kd,kde,ke->k", c, jnp.linalg.inv(A), c)
    rSr = jnp.einsum("kd,kde,ke->k", p.centres, iS, p.centres)
    logits = p.log_weights - (jnp.linalg.slogdet(S)[1] + jnp.linalg.slogdet(A)[1]) / 2 - rSr / (2 * eps) + quadratic / 2
    return -(x @ x) / (2 * eps * (1 - t)) + jax.nn.logsumexp(logits)


# ---- The potential of a mixture. ----


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("t", [0.0, 0.3, 0.9, 0.99])
def test_the_drift_is_the_gradient_of_the_official_potential(full, t):
    p, x = mixture(full=full), jnp.array([0.4, -1.3, 0.9])
    wanted = p.epsilon * jax.grad(official_log_phi, argnums=1)(p, x, t)
    np.testing.assert_allclose(p.epsilon * p.gradient(x, 1 - t), wanted, rtol=1e-6)


@pytest.mark.parametrize("left", [1.0, 0.35, 0.0])
def test_a_matrix_clock_with_equal_entries_is_a_number(left):
    p, x = mixture(), jnp.array([0.4, -1.3, 0.9])
    matrix, vector = left * jnp.eye(3), left * jnp.ones(3)
    for clock in (matrix, vector):
        np.testing.assert_allclose(p.log_value(x, clock), p.log_value(x, left), rtol=1e-12)
        np.testing.assert_allclose(p.gradient(x, clock), p.gradient(x, left), rtol=1e-11)
        np.testing.assert_allclose(p.mean(x, clock), p.mean(x, left), rtol=1e-11)


@pytest.mark.parametrize("left", [1.0, 0.35, 0.0])
@pytest.mark.parametrize("full", [True, False])
def test_the_gradient_is_that_of_the_value(full, left):
    p, x = mixture(full=full), jnp.array([0.4, -1.3, 0.9])
    B = left * jnp.array([[0.6, 0.2, 0.0], [0.2, 0.9, -0.1], [0.0, -0.1, 0.4]])
    for clock in (jnp.asarray(left), jnp.diagonal(B), B):
        np.testing.assert_allclose(p.gradient(x, clock), jax.grad(p.log_value)(x, clock), rtol=1e-9)


def test_the_normaliser_is_the_mean_of_the_exponential_under_the_mixture():
    p, x = mixture(), jnp.array([0.3, -0.2, 0.4])
    k = jr.categorical(jr.key(0), p.log_weights, shape=(400_000,))
    z = jnp.sqrt(p.epsilon * p.spread[k]) * jr.normal(jr.key(1), (400_000, 3))
    y = p.centres[k] + jnp.einsum("nde,ne->nd", p.basis[k], z)
    terms = jnp.exp(y @ x / p.epsilon) * jnp.exp(jax.nn.logsumexp(p.log_weights))
    wanted = jnp.exp(p.log_value(x, jnp.ones(())) + x @ x / (2 * p.epsilon))
    assert abs(terms.mean() - wanted) < 5 * terms.std() / np.sqrt(len(terms))


@pytest.mark.parametrize("full", [True, False])
def test_endpoints_have_the_mean_and_covariance_of_the_plan(full):
    p, x = mixture(full=full), jnp.array([0.4, -1.3, 0.9])
    y = jax.vmap(lambda key: p.sample(x, key=key))(jr.split(jr.key(2), 100_000))
    w, S = p.weights(x, jnp.ones(())), p.covariances()
    means = p.centres + jnp.einsum("kde,e->kd", S, x)
    mean = w @ means
    np.testing.assert_allclose(p.mean(x, jnp.ones(())), mean, rtol=1e-10)
    cov = jnp.einsum("k,kde->de", w, p.epsilon * S + means[:, :, None] * means[:, None]) - jnp.outer(mean, mean)
    np.testing.assert_allclose(y.mean(0), mean, atol=5 * float(jnp.sqrt(cov.trace() / 1e5)))
    np.testing.assert_allclose(jnp.cov(y.T), cov, atol=0.05 * float(cov.trace()) / 3)


# ---- One dimension with its numbers: p0 = N(0, 1), p1 = N(1, 1/4), epsilon = 1/2. ----


def one(S, r):
    return MixturePotential(jnp.zeros(1), jnp.full((1, 1), r), jnp.full((1, 1), S), jnp.asarray(0.5))


def quantiles(mean, sd, n=200_001):
    """Nodes of a normal law, with Gauss-Hermite weights, as (nodes, weights)."""
    x, w = np.polynomial.hermite_e.hermegauss(60)
    return jnp.asarray(mean + sd * x)[:, None], jnp.asarray(w / w.sum())


def population_loss(p):
    (x, w), (y, v) = quantiles(0.0, 1.0), quantiles(1.0, 0.5)
    zero = jnp.zeros((1, 1))
    base = light_loss(p, zero, zero)
    first = jax.vmap(lambda a: light_loss(p, a[None], zero))(x) - base
    second = jax.vmap(lambda b: light_loss(p, zero, b[None]))(y) - base
    return w @ first + v @ second + base


def test_the_loss_has_its_known_least_value_and_excess():
    S = (np.sqrt(4 * 0.25 + 0.25) - 0.5) / 2
    assert pytest.approx(0.309017, abs=1e-6) == S
    best = population_loss(one(S, 1.0))
    assert float(best) == pytest.approx(1.1032194, abs=1e-7)
    assert float(population_loss(one(0.5, 0.8)) - best) == pytest.approx(0.2025719238, abs=1e-9)
    grads = jax.grad(lambda s: population_loss(one(s[0], s[1])))(jnp.array([S, 1.0]))
    np.testing.assert_allclose(grads, 0, atol=1e-10)


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


# ---- Gaussians. ----


def gaussians(d, seed=0):
    rng = np.random.default_rng(seed)
    A, B = rng.normal(size=(2, d, d))
    return rng.normal(size=d), A @ A.T / d + 0.2 * np.eye(d), rng.normal(size=d), B @ B.T / d + 0.1 * np.eye(d)


def references(d):
    rng = np.random.default_rng(3)
    yield "brownian", sf.equations.BrownianMotion(d, 0.8)
    yield "each its own", sf.equations.BrownianMotion(d, np.linspace(0.5, 1.5, d))
    yield (
        "ou",
        sf.equations.OrnsteinUhlenbeck(0.7, 0.3, 0.9)
        if d == 1
        else sf.equations.OrnsteinUhlenbeck(np.linspace(0.2, 2.0, d), 0.3, np.linspace(0.5, 1.5, d)),
    )
    yield "rotating", sf.equations.LinearSDE(0.5 * rng.normal(size=(d, d)), rng.normal(size=d), rng.normal(size=(d, d)))
    if d == 2:
        yield "momentum", sf.equations.Momentum(1, 0.8)
        yield "turning", rotating(1.7)
        yield "growing", sf.equations.BrownianMotion(2, lambda t: jnp.exp(t / 2) * jnp.array([0.5, 0.8]))


CASES = [(name, d, i) for d in (2, 3) for i, (name, _) in enumerate(references(d))]


def case(d, i, T=1.3):
    m0, S0, m1, S1 = gaussians(d)
    reference = list(references(d))[i][1]
    return gaussian_sb(m0, S0, m1, S1, reference, t0=0.2, t1=0.2 + T), (m0, S0, m1, S1), reference


def closed_form(m0, S0, m1, S1, reference, T):
    """The covariance of the two ends, by the formula in whitened coordinates, in NumPy."""
    phi, c, q = (np.asarray(v) for v in reference.transition(0.2, 0.2 + T))
    iq = np.linalg.inv(linalg.sqrtm(q).real)
    F = iq @ phi
    V0, V1 = F @ S0 @ F.T, iq @ S1 @ iq
    h = linalg.sqrtm(V0).real
    D = linalg.sqrtm(4 * h @ V1 @ h + np.eye(len(c))).real
    C = (h @ D @ np.linalg.inv(h) - np.eye(len(c))) / 2
    return np.linalg.inv(F) @ C @ linalg.sqrtm(q).real, phi, c, q


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


@pytest.mark.parametrize(("name", "d", "i"), CASES)
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


# ---- Paths. ----


@pytest.mark.parametrize(("name", "d", "i"), [c for c in CASES if c[1] == 2])
def test_exact_paths_have_the_moments_of_the_bridge(name, d, i):
    bridge, (m0, S0, m1, S1), reference = case(d, i)
    n, ts = 40_000, jnp.array([0.2, 0.6, 1.1, 1.5])
    x0 = jnp.asarray(np.random.default_rng(0).multivariate_normal(m0, S0, n))
    paths = jax.jit(jax.vmap(lambda x, key: bridge.sample_path(x, ts, key=key)))(x0, jr.split(jr.key(0), n))
    np.testing.assert_array_equal(paths[:, 0], x0)
    # The score is affine, so it gives mean and covariance at every time.
    for k, t in enumerate(np.asarray(ts)):
        P = -jax.jacfwd(lambda x, t=t: bridge.score(t, x))(jnp.zeros(d))
        S = jnp.linalg.inv(P)
        m = S @ bridge.score(t, jnp.zeros(d))
        size = np.sqrt(np.diagonal(S))
        assert (np.abs((paths[:, k].mean(0) - m) / size) < 5 / np.sqrt(n)).all()
        error = (np.cov(paths[:, k].T) - S) / np.outer(size, size)
        assert (np.abs(error) < 5 * np.sqrt(2 / n)).all()
    # Two times together: the plan of the reference tied to its ends.
    C, *_ = closed_form(m0, S0, m1, S1, reference, 1.3)
    both = np.cov(np.concatenate([paths[:, 0], paths[:, -1]], axis=1).T)[:d, d:]
    size = np.sqrt(np.outer(np.diagonal(S0), np.diagonal(S1)))
    assert (np.abs(both - C) / size < 5 * np.sqrt(2 / n)).all()


def test_a_path_of_the_sde_reaches_the_target_of_a_rotating_reference():
    A, b, L = ROTATING
    m1, S1 = jnp.array([1.0, -0.5]), jnp.array([[0.5, 0.1], [0.1, 0.3]])
    bridge = gaussian_sb(jnp.zeros(2), jnp.eye(2), m1, S1, sf.equations.LinearSDE(A, b, L), t1=1.3)
    x0 = jr.normal(jr.key(0), (20_000, 2))
    grid = sf.grids.uniform(0.0, 1.3, 60)
    run = lambda x, key: sf.solve(bridge.equation(), x, [0.0, 1.3], grid=grid, key=key).final
    y = jax.jit(jax.vmap(run))(x0, jr.split(jr.key(1), len(x0)))
    np.testing.assert_allclose(y.mean(0), m1, atol=0.02)
    np.testing.assert_allclose(jnp.cov(y.T), S1, atol=0.02)


# ---- From samples. ----


def test_sinkhorn_s_bridge_is_near_the_gaussian_drift():
    # Quantiles rather than draws: what is left is the width of the gaps between the points.
    x0 = stats.norm.ppf((np.arange(2000) + 0.5) / 2000)[:, None]
    x1 = 1 + x0 / 2
    bridge = sinkhorn_bridge(x0, x1, 0.5)
    exact = gaussian_sb(
        x0.mean(0), np.cov(x0.T).reshape(1, 1), x1.mean(0), np.cov(x1.T).reshape(1, 1), bridge.reference
    )
    for t in (0.0, 0.3, 0.7):
        for x in (-0.5, 0.5, 1.0):
            x = jnp.array([x])
            np.testing.assert_allclose(bridge.drift(t, x), exact.drift(t, x), atol=5e-3)
            if t > 0:
                np.testing.assert_allclose(bridge.velocity(t, x), exact.velocity(t, x), atol=5e-3)


def test_sinkhorn_s_drift_is_the_weighted_mean_of_the_points():
    rng = np.random.default_rng(1)
    x0, x1 = rng.normal(size=(30, 2)), rng.normal(size=(40, 2)) + 1
    eps, t, x = 0.4, 0.6, np.array([0.2, 0.3])
    bridge = sinkhorn_bridge(x0, x1, eps, tolerance=1e-10, max_iterations=20_000)
    g = np.asarray(sf.metrics.sinkhorn(x0, x1, eps, tolerance=1e-10, max_iterations=20_000).g)
    logits = g / eps - ((x - x1) ** 2).sum(1) / (2 * eps * (1 - t))
    w = np.exp(logits - logits.max())
    wanted = (w @ x1 / w.sum() - x) / (1 - t)
    np.testing.assert_allclose(bridge.drift(t, x), wanted, rtol=1e-7)
    ends = jax.vmap(lambda key: bridge.sample_endpoint(jnp.asarray(x0[0]), key=key))(jr.split(jr.key(0), 50))
    assert all(np.abs(x1 - np.asarray(e)).sum(1).min() < 1e-12 for e in ends)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_light_sb_learns_the_bridge_of_two_gaussians(covariance):
    rng = np.random.default_rng(0)
    x0, x1 = rng.normal(size=(4000, 1)), 1 + 0.5 * rng.normal(size=(4000, 1))
    bridge = light_sb(
        x0, x1, epsilon=0.5, num_components=1, steps=3000, key=jr.key(0), covariance=covariance, backward="fit"
    )
    v0, v1 = x0.var(), x1.var()
    S = (np.sqrt(4 * v0 * v1 + 0.25) - 0.5) / (2 * v0)
    assert float(bridge.potential.spread[0, 0]) == pytest.approx(S, abs=0.01)
    exact = gaussian_sb(x0.mean(0), v0 * jnp.eye(1), x1.mean(0), v1 * jnp.eye(1), bridge.reference)
    x = jnp.array([0.4])
    np.testing.assert_allclose(bridge.velocity(0.5, x), exact.velocity(0.5, x), atol=0.03)


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_a_known_plan_is_recovered(covariance):
    # Recipe: a mixture of two as the truth, endpoints drawn from its plan.
    truth = MixturePotential(
        jnp.zeros(2), jnp.array([[1.0, 0.5], [-1.0, 0.3]]), jnp.array([[0.4, 0.8], [0.7, 0.3]]), jnp.array(0.5)
    )
    x0, other = jr.normal(jr.key(3), (2, 20_000, 2))
    x1 = jax.vmap(lambda x, key: truth.sample(x, key=key))(other, jr.split(jr.key(4), 20_000))
    bridge = light_sb(
        x0, x1, epsilon=0.5, num_components=8, steps=3000, key=jr.key(5), covariance=covariance, backward="samples"
    )
    clock = bridge.clock
    excess = light_loss(bridge.potential, clock.start(x0), clock.end(x1)) - light_loss(truth, x0, x1)
    # A translation of both clouds changes the loss by the mean of their product alone.
    shift = clock.shift
    excess -= (shift @ shift - shift @ x0.mean(0) - shift @ x1.mean(0)) / 0.5
    assert abs(float(excess)) < 0.01
    for x in (jnp.array([0.5, -0.5]), jnp.array([-1.0, 0.2])):
        np.testing.assert_allclose(bridge.endpoint_mean(0.0, x), truth.mean(x, jnp.ones(())), atol=0.08)
        assert np.isfinite(bridge.velocity(0.5, x)).all()
        assert np.isfinite(bridge.drift(1.0, x)).all()


def test_a_rotating_reference_from_samples():
    rng = np.random.default_rng(0)
    x0, x1 = rng.normal(size=(4000, 2)), np.array([1.0, -1.0]) + rng.normal(size=(4000, 2)) * [0.5, 0.8]
    reference = sf.equations.LinearSDE(*ROTATING)
    exact = gaussian_sb(x0.mean(0), np.cov(x0.T), x1.mean(0), np.cov(x1.T), reference)
    learned = light_sb(x0, x1, num_components=1, steps=3000, key=jr.key(0), reference=reference, covariance="full")
    points = sinkhorn_bridge(x0[:1500], x1[:1500], reference=reference)
    x = jnp.array([0.3, -0.2])
    np.testing.assert_allclose(learned.drift(0.4, x), exact.drift(0.4, x), atol=0.1)
    np.testing.assert_allclose(points.drift(0.4, x), exact.drift(0.4, x), atol=0.25)


# ---- Precision, transformations, bad input. ----


def test_single_precision_keeps_the_drift():
    p, x = mixture(K=20, d=5, epsilon=0.05, full=False), jnp.linspace(-3.0, 3.0, 5)
    single = jax.tree.map(lambda v: v.astype(jnp.float32), p)
    for left in (1.0, 0.5, 0.0):
        np.testing.assert_allclose(single.gradient(x.astype(jnp.float32), left), p.gradient(x, left), rtol=2e-4)


def test_bridges_go_through_jit_vmap_and_grad():
    bridge = case(2, 0)[0]
    xs = jr.normal(jr.key(0), (5, 2))
    batch = jax.jit(jax.vmap(bridge.velocity, in_axes=(None, 0)))(0.7, xs)
    np.testing.assert_allclose(batch[3], bridge.velocity(0.7, xs[3]), rtol=1e-12)

    def end(mean):
        made = gaussian_sb(
            jnp.zeros(2), jnp.diag(jnp.array([1.0, 2.0])), mean, jnp.diag(jnp.array([0.5, 0.7])), bridge.reference
        )
        return made.drift(0.5, xs[0]).sum()

    m, h = jnp.ones(2), 1e-5
    slope = (end(m.at[0].add(h)) - end(m.at[0].add(-h))) / (2 * h)
    np.testing.assert_allclose(jax.grad(end)(m)[0], slope, rtol=1e-7)


X = np.random.default_rng(0).normal(size=(10, 2))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: light_sb(X, X, epsilon=0.0, key=jr.key(0)), ValueError, "epsilon must be positive"),
        (lambda: sinkhorn_bridge(X, X, -1.0), ValueError, "epsilon must be positive"),
        (lambda: sinkhorn_bridge(X, X), ValueError, "one of them, not both"),
        (lambda: sinkhorn_bridge(X, X[:, :1], 1.0), ValueError, "as many columns"),
        (lambda: sinkhorn_bridge(X[:1], X, 1.0), ValueError, "at least two rows"),
        (lambda: sinkhorn_bridge(np.where(X > 2, np.nan, X) * np.nan, X, 1.0), ValueError, "first in row 0"),
        (lambda: light_sb(X, X, epsilon=1.0, num_components=0, key=jr.key(0)), ValueError, "num_components"),
        (lambda: light_sb(X, X, epsilon=1.0, key=jr.key(0), optim=3), TypeError, "optax"),
        (lambda: light_sb(X, X, epsilon=1.0, key=jr.key(0), backward="yes"), ValueError, "backward"),
        (lambda: Clock(sf.equations.BrownianMotion(2), 1.0, 1.0), ValueError, "t0 < t1"),
        (
            lambda: Clock(sf.equations.LinearSDE(np.zeros((2, 2)), np.zeros(2), np.eye(2)[:, :1])),
            ValueError,
            "without noise",
        ),
        (lambda: Clock(sf.ODE(lambda t, y, args: y)), TypeError, "LinearSDE"),
        (lambda: case(2, 0)[0].drift(0.5, X), ValueError, "use jax.vmap"),
        (lambda: case(2, 0)[0].sample_path(X[0], [0.0, 1.0], key=jr.key(0)), ValueError, "must lie between"),
        (
            lambda: gaussian_sb(X[0], np.eye(2), X[1], -np.eye(2), sf.equations.BrownianMotion(2)),
            ValueError,
            "negative",
        ),
        (lambda: gaussian_sb(X[0], np.eye(3), X[1], np.eye(2), sf.equations.BrownianMotion(2)), ValueError, "shape"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_what_needs_a_way_back_says_how_to_get_one():
    bridge = Bridge(Clock(sf.equations.BrownianMotion(2)), one(0.5, 0.0))
    for call in (bridge.velocity, bridge.backward_drift, bridge.score):
        with pytest.raises(ValueError, match="backward="):
            call(0.5, jnp.zeros(2))


def test_sinkhorn_that_does_not_converge_is_a_result():
    with pytest.raises(sf.SolveError):
        sinkhorn_bridge(X, X + 5, 0.01, max_iterations=1)
    bridge = sinkhorn_bridge(X, X + 5, 0.01, max_iterations=1, throw=False)
    assert not bool(sf.is_okay(bridge.result))
