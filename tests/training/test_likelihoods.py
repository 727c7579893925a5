"""Losses of predictions with uncertainty, against what they are by definition."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy import stats

from sdeflow.data import TimeSeries
from sdeflow.training import ELBO, EnergyScore, MaskedMSE, NegativeLogLikelihood, Prediction


def batch(seed=0, count=3, rows=4, channels=2):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, rows, channels))
    values[rng.random(values.shape) < 0.3] = np.nan
    values[:, 0, 0] = 1.0
    data = TimeSeries.from_arrays([np.arange(rows)] * count, list(values))
    return data.batch(np.arange(count)), values


def outputs(samples=None, seed=1, shape=(3, 4, 2)):
    return jr.normal(jr.key(seed), shape if samples is None else (shape[0], samples, *shape[1:]))


def test_the_likelihood_is_that_of_the_normal_law_of_what_was_observed():
    given, values = batch()
    x, scale = outputs(), jnp.array([0.5, 2.0])
    value, _ = NegativeLogLikelihood().score(Prediction(x, scale=scale), given, 0)
    seen = ~np.isnan(values)
    nats = stats.norm.logpdf(values, x, np.broadcast_to(scale, values.shape))
    np.testing.assert_allclose(value, -nats[seen].mean(), rtol=1e-5)


def test_the_likelihood_of_samples_is_a_mixture_over_whole_series():
    given, values = batch()
    x, scale = outputs(5), jnp.array([0.5, 2.0])
    value, _ = NegativeLogLikelihood().score(Prediction(x, scale=scale), given, 0)
    seen = ~np.isnan(values)
    nats = stats.norm.logpdf(values[:, None], x, np.broadcast_to(scale, values.shape)[:, None])
    joint = np.where(seen[:, None], nats, 0).sum(axis=(2, 3))
    np.testing.assert_allclose(value, -np.log(np.exp(joint).mean(axis=1)).sum() / seen.sum(), rtol=1e-5)


def test_the_bound_is_likelihood_less_the_weighted_divergence():
    given, values = batch()
    prediction = Prediction(outputs(), kl=jnp.array([1.0, 2.0, 6.0]), scale=jnp.ones(2))
    fit, _ = NegativeLogLikelihood().score(prediction, given, 0)
    fit = fit * (~np.isnan(values)).sum() / 3
    for warmup, step, weight in ((0, 0, 1.0), (10, 0, 0.0), (10, 5, 0.5), (10, 99, 1.0)):
        value, metrics = ELBO(kl_warmup=warmup).score(prediction, given, jnp.array(step))
        np.testing.assert_allclose(value, fit + weight * 3.0, rtol=1e-5)
        np.testing.assert_allclose(metrics["kl"], 3.0, rtol=1e-6)
        assert float(metrics["kl_weight"]) == weight


@pytest.mark.parametrize("over", ["step", "path"])
def test_the_energy_score_is_its_definition(over):
    given, values = batch()
    x = np.asarray(outputs(4))
    seen = ~np.isnan(values)
    value, _ = EnergyScore(over=over).score(Prediction(jnp.asarray(x)), given, 0)

    def score(samples, y):
        near = np.mean([np.linalg.norm(s - y) for s in samples])
        apart = np.mean([np.linalg.norm(a - b) for i, a in enumerate(samples) for j, b in enumerate(samples) if i != j])
        return near - apart / 2

    scores = []
    for i in range(3):
        places = [seen[i]] if over == "path" else [np.arange(4)[:, None] == k for k in range(4)]
        for place in places:
            use = seen[i] & place
            if use.any():
                scores.append(score([s[use] for s in x[i]], values[i][use]))
    np.testing.assert_allclose(value, np.mean(scores), rtol=1e-5)


def test_the_energy_score_keeps_the_spread_that_the_square_error_takes_away():
    y = jr.normal(jr.key(0), (4096, 1))
    data = type("Batch", (), {"targets": y})()
    draws = jr.normal(jr.key(1), (4096, 8, 1))

    def best(loss):
        scales = jnp.linspace(0.0, 2.0, 41)
        scores = [float(loss.score(Prediction(s * draws), data, 0)[0]) for s in scales]
        return float(scales[int(np.argmin(scores))])

    assert best(MaskedMSE()) == 0.0
    assert abs(best(EnergyScore()) - 1.0) < 0.11


def test_only_what_is_to_be_scored_counts():
    given, values = batch()
    scored = jnp.zeros((3, 4, 2), bool).at[1, 2].set(True)
    for loss, samples in ((MaskedMSE(), None), (NegativeLogLikelihood(), None), (EnergyScore(), 3)):
        x = outputs(samples)
        score = lambda x, loss=loss: loss.score(Prediction(x, scored=scored, scale=jnp.ones(2)), given, 0)[0]
        slope = jax.grad(score)(x)
        place = slope[1, :, 2] if samples else slope[1, 2]
        assert int((slope != 0).sum()) == int((place != 0).sum()) == (~np.isnan(values[1, 2])).sum() * (samples or 1)


def test_equal_samples_and_missing_rows_have_finite_gradients():
    given, _ = batch()
    same = jnp.zeros((3, 4, 4, 2))
    for loss in (EnergyScore(), EnergyScore(over="path"), NegativeLogLikelihood()):
        slope = jax.grad(lambda x, loss=loss: loss.score(Prediction(x, scale=jnp.ones(2)), given, 0)[0])(same)
        assert bool(jnp.isfinite(slope).all())


@pytest.mark.parametrize(
    ("loss", "prediction", "match"),
    [
        (NegativeLogLikelihood(), Prediction(jnp.zeros((3, 4, 2))), r"noise=0\.1"),
        (ELBO(), Prediction(jnp.zeros((3, 4, 2)), scale=jnp.ones(2)), r"has no kl: use a model such as"),
        (EnergyScore(), Prediction(jnp.zeros((3, 4, 2))), r"num_samples=8"),
        (EnergyScore(), Prediction(jnp.zeros((3, 2, 4, 1))), r"but for an axis of samples"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(loss, prediction, match):
    with pytest.raises(ValueError, match=match) as caught:
        loss.score(prediction, batch()[0], 0)
    assert "\n" not in str(caught.value)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match=r"kl_warmup must be a number of steps"):
        ELBO(kl_warmup=-1)
    with pytest.raises(ValueError, match=r'over must be "step" or "path"'):
        EnergyScore(over="time")
