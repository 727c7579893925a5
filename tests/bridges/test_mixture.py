"""The potential of a mixture: drift, value, normaliser and draws, against independent formulas."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers.bridges import mixture

pytestmark = pytest.mark.usefixtures("x64_module")


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


def test_single_precision_keeps_the_drift():
    p, x = mixture(K=20, d=5, epsilon=0.05, full=False), jnp.linspace(-3.0, 3.0, 5)
    single = jax.tree.map(lambda v: v.astype(jnp.float32), p)
    for left in (1.0, 0.5, 0.0):
        np.testing.assert_allclose(single.gradient(x.astype(jnp.float32), left), p.gradient(x, left), rtol=2e-4)
