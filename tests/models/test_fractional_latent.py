"""A latent equation with memory: bounds below a known evidence, gradients in H, samples with the noise's law."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdeflow as sf

KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def data():
    return sf.data.simulated_series(4, num_channels=2, key=KEY)[0]


def horizon_of(data):
    return float(max(t[-1] - t[0] for t in data.times)) * 1.5


@pytest.fixture(scope="module")
def model(data):
    return sf.models.FractionalLatentSDE(
        2, latent_size=3, width=8, context_size=4, hurst=0.7, horizon=horizon_of(data), steps_per_interval=2, key=KEY
    )


def test_bounds_samples_and_forecasts(model, data):
    bound = model.elbo(data, key=KEY)
    assert bound.shape == (4,)
    assert np.isfinite(bound).all()
    np.testing.assert_allclose(model.elbo(data, key=KEY), bound)
    assert model.sample(np.linspace(0.0, 1.0, 5), 3, key=KEY).shape == (3, 5, 2)


@pytest.mark.slow
def test_the_index_has_a_gradient_and_the_rates_have_none(model, data):
    batch = next(iter(data.batches(4, KEY)))

    def loss(model):
        return sf.losses.ELBO()(model, batch, KEY, jnp.zeros((), jnp.int32))[0]

    both = eqx.filter_jit(eqx.filter_value_and_grad(loss))
    slope = both(model)[1]
    moved = lambda by: both(eqx.tree_at(lambda m: m.memory._logit, model, model.memory._logit + by))[0]
    difference = (moved(0.05) - moved(-0.05)) / 0.1
    np.testing.assert_allclose(slope.memory._logit, difference, rtol=0.01)
    assert np.isfinite(slope.memory._logit)
    assert slope.memory._logit != 0
    assert len(jax.tree_util.tree_leaves(slope.memory)) == 1
    # It can learn what the long past was, from that of the prior on.
    assert not np.any(model.past.bias)
    assert (np.asarray(slope.past.bias).reshape(2 + 6, 6, 3)[:2, 1:] != 0).all()
    assert all(np.isfinite(x).all() for x in jax.tree_util.tree_leaves(slope))


@pytest.mark.slow
def test_prior_paths_have_the_variance_of_the_noise():
    model = sf.models.FractionalLatentSDE(
        1, latent_size=1, width=4, context_size=4, hurst=0.3, additive=True, decoder="identity", key=KEY
    )
    still = jax.tree_util.tree_map(lambda x: 0 * x if eqx.is_array(x) else x, model.posterior.prior.h)
    model = eqx.tree_at(lambda m: m.posterior.prior.h, model, still)
    draw = lambda key: model.path(jnp.zeros(1), jnp.array([0.0, 0.25, 1.0]), None, key=key, regularisers=())[0].ys[
        1:, 0
    ]
    found = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(KEY, 4000)))
    scale = float(model.posterior.prior.g(jnp.zeros(1))[0]) ** 2
    for x, t in zip(found.T, (0.25, 1.0)):
        exact = scale * float(model.memory.covariance(t, t))
        assert abs(x.var() / exact - 1) < 5 * np.sqrt(2 / 4000)


def test_a_horizon_too_short_fails(model, data):
    short = sf.models.FractionalLatentSDE(2, latent_size=3, width=8, context_size=4, horizon=1e-3, key=KEY)
    for ask in (
        lambda: short.elbo(data, key=KEY),
        lambda: short.sample([0.0, 0.5], 2, key=KEY),
        lambda: short.forecast(data, [100.0], 2, key=KEY),
    ):
        with pytest.raises(ValueError, match="horizon that covers them"):
            ask()
    batch = next(iter(data.batches(2, KEY)))
    assert not sf.is_okay(eqx.filter_jit(lambda model: model(batch, key=KEY).result)(short))


@pytest.mark.slow
def test_at_one_half_the_bound_is_that_of_brownian_noise(data):
    sizes = {"latent_size": 3, "width": 8, "context_size": 4, "noise": 0.5, "additive": True, "steps_per_interval": 8}
    model = sf.models.FractionalLatentSDE(2, horizon=horizon_of(data), key=KEY, **sizes)
    # The same networks but for the bend, which is made the same by not seeing the factors.
    brownian = sf.models.LatentSDE(2, solver=diffrax.Euler(), key=jax.random.split(KEY)[0], **sizes)
    assert eqx.tree_equal(model.posterior.pull, brownian.posterior.pull)
    first, seen = model.posterior.bend.layers[0], brownian.posterior.bend.layers[0].weight.shape[1]
    weight = lambda m: m.posterior.bend.layers[0].weight
    model = eqx.tree_at(weight, model, first.weight.at[:, seen:].set(0))
    bend = eqx.tree_at(lambda b: b.layers, brownian.posterior.bend, model.posterior.bend.layers)
    brownian = eqx.tree_at(lambda m: m.posterior.bend, brownian, bend)
    brownian = eqx.tree_at(weight, brownian, first.weight[:, :seen])
    # A control that costs several nats.
    strong = lambda m: eqx.tree_at(lambda m: m.posterior.pull.layers[-1].bias, m, jnp.ones(6))
    model, brownian = strong(model), strong(brownian)
    keys = jax.random.split(KEY, 8)
    one, other = (np.stack([m.elbo(data, key=key, num_samples=128) for key in keys]) for m in (model, brownian))
    error = np.sqrt((one.var(axis=0, ddof=1) + other.var(axis=0, ddof=1)) / len(keys))
    assert (np.abs(one.mean(axis=0) - other.mean(axis=0)) < 5 * error).all()
