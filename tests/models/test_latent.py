"""Latent models: both divergences, the bound, and what of the future reaches the posterior."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import sdeflow as sf
from sdeflow.data import TimeSeries
from sdeflow.models import LatentODE, LatentSDE

KEY = jr.key(5)
KINDS = [LatentSDE, LatentODE]
# What is shared by both is tried by default on one.
MOSTLY_SLOW = [LatentSDE, pytest.param(LatentODE, marks=pytest.mark.slow)]
_predict = eqx.filter_jit(lambda model, batch: model(batch, key=KEY))


def walks(num=6, rows=9, seed=0):
    rng = np.random.default_rng(seed)
    times = [np.sort(rng.uniform(0, 5, rows - i % 3)) for i in range(num)]
    values = [np.cumsum(rng.normal(size=(len(t), 2)), axis=0) for t in times]
    for x in values:
        x[2, 0] = np.nan
    return TimeSeries.from_arrays(times, values)


def model_of(kind, **options):
    return kind(2, **({"latent_size": 3, "width": 8, "context_size": 8, "noise": 0.5, "key": jr.key(1)} | options))


@pytest.mark.parametrize("kind", MOSTLY_SLOW)
def test_the_bound_is_likelihood_less_divergence(kind):
    model, data = model_of(kind), walks()
    batch = data.batch(np.arange(6))
    prediction = _predict(model, batch)
    seen = np.asarray(batch.mask)
    error = (np.asarray(prediction.outputs) - np.where(seen, batch.values, 0)) / 0.5
    nats = np.where(seen, -(error**2) / 2 - np.log(0.5) - np.log(2 * np.pi) / 2, 0).sum(axis=(1, 2))
    value, metrics = sf.losses.ELBO().score(prediction, batch, 0)
    np.testing.assert_allclose(value, -(nats - prediction.kl).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["kl"], prediction.kl.mean(), rtol=1e-5)
    assert float(prediction.kl.min()) > 0
    bounds = model.elbo(data, key=KEY, num_samples=64)
    assert bounds.shape == (6,)
    assert np.isfinite(bounds).all()


def test_both_divergences_are_those_of_what_is_solved():
    """With u = 0 and the posterior of the start equal to its prior there is none; a constant u has |u|^2 T / 2."""
    model, data = model_of(LatentSDE), walks()
    last = lambda net: (net.layers[-1].weight, net.layers[-1].bias)
    set_to = lambda net, bias: eqx.tree_at(last, net, (0 * net.layers[-1].weight, jnp.asarray(bias)))
    still = eqx.tree_at(
        lambda m: (m.posterior.pull, m.posterior.bend, m.begin),
        model,
        (
            set_to(model.posterior.pull, [-100.0] * 3 + [0.0] * 3),
            set_to(model.posterior.bend, [0.3] * 3),
            jax.tree.map(jnp.zeros_like, model.begin),
        ),
    )
    spread = jax.nn.softplus(0.0) + 1e-3
    still = eqx.tree_at(lambda m: m.start_log_scale, still, jnp.full(3, jnp.log(spread)))
    prediction = _predict(still, data.batch(np.arange(6)))
    spans = np.array([t[-1] - t[0] for t in data.times])
    np.testing.assert_allclose(prediction.kl, 3 * 0.3**2 * spans / 2, rtol=1e-4)
    moved = eqx.tree_at(lambda m: m.start_mean, still, jnp.full(3, 0.5))
    more = _predict(moved, data.batch(np.arange(6))).kl - prediction.kl
    np.testing.assert_allclose(more, 3 * 0.25 / (2 * spread**2), rtol=1e-4)


@pytest.mark.parametrize("kind", MOSTLY_SLOW)
def test_padding_and_the_batch_do_not_matter(kind):
    model, data = model_of(kind), walks()
    run = lambda b: _predict(model, b)
    short, long = run(data.batch([0, 1, 2], length=9)), run(data.batch([0, 1, 2], length=13))
    np.testing.assert_allclose(short.kl, long.kl, rtol=1e-5)
    np.testing.assert_allclose(short.outputs[:, :7], long.outputs[:, :7], rtol=1e-4, atol=1e-5)
    flipped = run(data.batch([2, 1, 0], length=9))
    np.testing.assert_allclose(flipped.kl[::-1], short.kl, rtol=1e-5)


def test_rows_without_observations_do_not_change_what_the_encoder_says():
    model, data = model_of(LatentSDE), walks()
    more, _ = data.with_times([4.999])
    encode, at = eqx.filter_jit(model.encode), eqx.filter_jit(lambda context, t: context.at(t))
    for i in range(3):
        one, two = (
            encode(jnp.asarray(d.times[i], jnp.float32), jnp.asarray(d.values[i], jnp.float32)) for d in (data, more)
        )
        np.testing.assert_allclose(one[0], two[0], rtol=1e-5)
        for t in np.linspace(data.times[i][0], data.times[i][-1], 7)[:-1]:
            a, b = at(one[2], jnp.float32(t)), at(two[2], jnp.float32(t))
            np.testing.assert_allclose(a[0], b[0], rtol=1e-4, atol=1e-5)


def test_the_posterior_knows_the_future_and_the_prior_follows_the_end():
    model, data = model_of(LatentSDE), walks()
    t = jnp.asarray(data.times[0], jnp.float32)
    x = jnp.asarray(data.values[0], jnp.float32)
    _, _, context = model.encode(t, x)
    z, middle = jnp.ones(3), float(t[3] + t[4]) / 2
    other = model.encode(t, x.at[5].add(3.0))[2]
    assert float(jnp.abs(model.posterior.push(middle, z, context) - model.posterior.push(middle, z, other)).max()) > 0
    past = model.encode(t, x.at[2].add(3.0))[2]
    np.testing.assert_array_equal(model.posterior.push(middle, z, context), model.posterior.push(middle, z, past))
    np.testing.assert_array_equal(model.posterior.push(float(t[-1]) + 0.1, z, context), jnp.zeros(3))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_their_shapes(kind):
    model, data = model_of(kind), walks()
    assert model.forecast(data, [6.0, 7.0], 4, key=KEY).shape == (6, 4, 2, 2)
    assert model.impute(data, [4.9], 4, key=KEY, noise=False).shape == (6, 4, 1, 2)
    assert model.sample(np.linspace(0, 1, 5), 7, key=KEY).shape == (7, 5, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_training_raises_the_bound(kind):
    model, data = model_of(kind), walks()
    result = sf.fit(
        model,
        data,
        sf.losses.ELBO(kl_warmup=10),
        optim=optax.adam(1e-2),
        steps=40,
        batch_size=6,
        key=KEY,
        progress=False,
    )
    loss = result.history["loss"]
    assert np.isfinite(loss).all()
    assert np.mean(loss[-5:]) < np.mean(loss[:5])


def test_a_decoder_may_be_one_s_own():
    own = eqx.nn.Linear(3, 2, key=KEY)
    model = model_of(LatentSDE, decoder=own)
    np.testing.assert_array_equal(model.decode(jnp.ones(3)), own(jnp.ones(3)))


def test_noise_can_be_the_same_everywhere():
    model = model_of(LatentSDE, additive=True)
    assert model.prior.additive
    assert type(model.solver).__name__ == "ShARK"
    np.testing.assert_array_equal(
        model.prior.diffusion(0.0, jnp.ones(3), None), model.prior.diffusion(1.0, -jnp.ones(3), None)
    )
    prediction = _predict(model, walks().batch(np.arange(6)))
    assert bool(jnp.isfinite(prediction.kl).all())


@pytest.mark.parametrize("kind", MOSTLY_SLOW)
def test_a_series_of_one_observation_has_a_bound(kind):
    data = TimeSeries.from_arrays([[0.0], [1.0, 2.0]], [[[1.0, 2.0]], [[0.0, 1.0], [1.0, 1.0]]])
    assert np.isfinite(model_of(kind).elbo(data, key=KEY)).all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"decoder": "linear"}, r'decoder must be "network", "identity" or a callable'),
        ({"decoder": jnp.sum}, r"take shape \(3,\) to \(2,\), but it gives \(\)"),
        ({"decoder": "identity"}, r"channels=2 only from as many latent numbers, not 3"),
        ({"noise": 0.0}, r"noise must be positive"),
        ({"latent_size": 0}, r"latent_size must be an integer of at least 1"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_options_are_refused(kind, options, match):
    with pytest.raises(ValueError, match=match):
        model_of(kind, **options)
