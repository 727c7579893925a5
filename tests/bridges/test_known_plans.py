"""A plan that is known in closed form, sampled and learned again (Gushchin et al. 2023, EntropicOTBenchmark)."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import sdeflow as sf
from sdeflow.bridges import MixturePotential, light_sb

pytestmark = pytest.mark.usefixtures("x64_module")


def known(d, epsilon, seed):
    """The plan whose potential, before the kernel, is a mixture of five Gaussians N(mu, Sigma) around a sphere."""
    rng = np.random.default_rng(seed)
    mu = rng.standard_normal((5, d))
    mu *= 3 / np.linalg.norm(mu, axis=1, keepdims=True)
    sizes = rng.uniform(0.3, 1.0, (5, d))
    basis = np.stack([np.linalg.qr(rng.standard_normal((d, d)))[0] for _ in range(5)])
    # S = Sigma / (Sigma + eps) has the same eigenvectors, and r = (1 - S) mu.
    spread = sizes / (sizes + epsilon)
    inside = np.einsum("kde,kd->ke", basis, mu)
    centres = np.einsum("kde,ke->kd", basis, (1 - spread) * inside)
    logs = -(np.log(sizes + epsilon) + inside**2 / (sizes + epsilon)).sum(1) / 2
    return MixturePotential(*(jnp.asarray(v) for v in (logs, centres, spread, epsilon, basis)))


def conditional(p, x):
    """The weights, means and covariances of the components of the end given x, and the mean and covariance of all."""
    w, S = p.weights(x, jnp.ones(())), p.covariances()
    means = p.centres + S @ x
    mean = w @ means
    return (w, means, p.epsilon * S), (mean, jnp.einsum("k,kde->de", w, p.epsilon * S) + _spread(w, means - mean))


def _spread(w, gaps):
    return jnp.einsum("k,kd,ke->de", w, gaps, gaps)


def log_density(parts, y):
    w, means, C = parts
    return jax.nn.logsumexp(
        jnp.log(w) + jax.vmap(lambda m, c: jax.scipy.stats.multivariate_normal.logpdf(y, m, c))(means, C)
    )


@pytest.mark.slow
def test_light_sb_finds_the_plan_again():
    # The marks: 0.1 % of the target's variance in the conditional laws, and 0.01 nats.
    d, epsilon = 2, 1.0
    truth = known(d, epsilon, 1000 * d + 100)
    x0, other = jr.normal(jr.key(0), (2, 50_000, d))
    draw = jax.jit(jax.vmap(lambda x, key: truth.sample(x, key=key)))
    y = draw(other, jr.split(jr.key(1), len(other)))
    found = light_sb(x0, y, epsilon=epsilon, num_components=50, steps=10_000, key=jr.key(2))
    shift = found.clock.shift

    def learned(x):
        (w, means, C), (mean, covariance) = conditional(found.potential, x - shift)
        return (w, means + shift, C), (mean + shift, covariance)

    test = jnp.asarray(np.random.default_rng(7).standard_normal((200, d)))
    _, wanted = jax.vmap(lambda x: conditional(truth, x))(test)
    _, got = jax.vmap(learned)(test)
    assert sf.metrics.cbw2_uvp(got, wanted, variance=float(jnp.cov(y.T).trace())) < 0.1
    fresh = jr.normal(jr.key(3), (20_000, d))
    ends = draw(fresh, jr.split(jr.key(4), len(fresh)))
    log_ratio = lambda x, y: log_density(conditional(truth, x)[0], y) - log_density(learned(x)[0], y)
    ratio = jax.jit(jax.vmap(log_ratio))(fresh, ends)
    assert float(ratio.mean()) < 0.01
