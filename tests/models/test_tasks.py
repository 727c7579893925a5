"""Forecasting and imputing: what is hidden, what is scored, and what comes out."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import sdeflow as sf
from sdeflow.data import TimeSeries
from sdeflow.models import ODERNN, NeuralGeometricSDE, NeuralLangevinSDE, SeriesModel
from sdeflow.models.series._hide import hidden

KEY = jr.key(3)


def waves(num=8, rows=12, seed=0):
    """Two channels, a wave and its slope, at irregular times with a gap."""
    rng = np.random.default_rng(seed)
    times = [np.sort(rng.uniform(0, 10, rows - i % 3)) for i in range(num)]
    values = [np.stack([np.sin(t + i), np.cos(t + i)], axis=1) for i, t in enumerate(times)]
    for x in values:
        x[3, 1] = np.nan
    return TimeSeries.from_arrays(times, values, ids=[f"w{i}" for i in range(num)])


def model_of(task, size=4, **options):
    dynamics = NeuralLangevinSDE(size, control_size=2, width=8, key=jr.key(0))
    return SeriesModel(dynamics, channels=2, task=task, key=jr.key(1), **options)


# ---- What is hidden. ----


def test_a_forecast_hides_the_end_and_imputing_hides_anything():
    for seed in range(30):
        end = np.asarray(hidden("forecast", (20, 3), jnp.array(15), 0.5, jr.key(seed)))
        first = int(np.argmax(end.any(axis=1)))
        assert 7 <= first <= 14
        np.testing.assert_array_equal(end, np.broadcast_to((np.arange(20) >= first)[:, None], (20, 3)))
    share = np.mean([np.asarray(hidden("impute", (20, 3), jnp.array(15), 0.5, jr.key(s))).mean() for s in range(400)])
    # Half of the uniform share for steps and half for values, less what both hide: 1/4 - E p^2 / 4 with p at most 1/2.
    assert abs(share - (0.25 - 1 / 48)) < 0.02


def test_what_is_hidden_does_not_depend_on_padding():
    for task in ("forecast", "impute"):
        short, long = (hidden(task, (rows, 2), jnp.array(9), 0.8, KEY) for rows in (9, 14))
        np.testing.assert_array_equal(long[:9], short)


def test_a_single_observation_is_not_hidden_from_a_forecast():
    assert not bool(hidden("forecast", (1, 2), jnp.array(1), 1.0, KEY).any())


@pytest.mark.parametrize("task", ["forecast", "impute"])
def test_the_model_does_not_see_what_it_is_scored_on(task):
    model, data = model_of(task), waves()
    batch = data.batch(np.arange(8))
    run = eqx.filter_jit(lambda batch: model(batch, key=KEY))
    first = run(batch)
    scored = np.asarray(first.scored)
    assert scored.any()
    assert (scored <= batch.mask).all()
    changed = np.where(scored, batch.values + 100.0, batch.values).astype(np.float32)
    second = run(eqx.tree_at(lambda b: b.values, batch, changed))
    np.testing.assert_array_equal(first.outputs, second.outputs)
    assert first.outputs.shape == batch.values.shape


# ---- What comes out. ----


def test_samples_lead_with_series_and_are_at_the_asked_times():
    model, data = model_of("forecast", noise=0.2), waves()
    ts = np.array([11.0, 12.5, 20.0])
    samples = model.forecast(data, ts, 5, key=KEY)
    assert samples.shape == (8, 5, 3, 2)
    assert np.isfinite(samples).all()
    # A series has the same samples alone and beside others.
    np.testing.assert_allclose(model.forecast(data[[5]], ts, 5, key=KEY)[0], samples[5], rtol=1e-4, atol=1e-5)
    own = np.broadcast_to(ts, (8, 3)) + np.arange(8)[:, None]
    other = model.forecast(data, own, 5, key=KEY)
    np.testing.assert_allclose(other[0], samples[0], rtol=1e-4, atol=1e-5)
    assert float(np.abs(other[1] - samples[1]).max()) > 1e-3


def test_a_start_model_holds_the_last_value_and_joins_neighbours_by_lines():
    data = TimeSeries.from_arrays([[0.0, 1.0, 2.0]], [[[0.0, 1.0], [1.0, 1.0], [4.0, 3.0]]])
    for task, ts, wanted in (("forecast", [3.0], [4.0, 3.0]), ("impute", [1.5], [2.5, 2.0])):
        model = model_of(task)
        still = eqx.tree_at(
            lambda m: m.readout, model, jax.tree.map(lambda x: 0 * x if eqx.is_array(x) else x, model.readout)
        )
        samples = getattr(still, task)(data, ts, 3, key=KEY)
        np.testing.assert_allclose(samples, np.broadcast_to(wanted, (1, 3, 1, 2)), rtol=1e-6)


def test_at_a_time_that_was_observed_no_row_is_added():
    data = waves()
    more, places = data.with_times(np.stack([t[[2, 5]] for t in (data.to_user_time(t) for t in data.times)]))
    assert more.lengths.tolist() == data.lengths.tolist()
    np.testing.assert_array_equal(places, np.tile([2, 5], (8, 1)))


def test_fewer_channels_can_be_predicted_than_there_are():
    model, data = model_of("impute", num_outputs=1, noise=0.3), waves()
    prediction = eqx.filter_jit(lambda batch: model(batch, key=KEY))(data.batch(np.arange(8)))
    assert not np.asarray(prediction.scored)[..., 1].any()
    assert prediction.scale.shape == (2,)
    assert model.impute(data, [9.99], 2, key=KEY).shape == (8, 2, 1, 1)


def test_several_samples_in_training_have_an_axis_of_their_own():
    model, data = model_of("forecast", num_samples=3), waves()
    prediction = model(data.batch(np.arange(8)), key=KEY)
    assert prediction.outputs.shape == (8, 3, 12, 2)
    assert float(jnp.abs(prediction.outputs[:, 0] - prediction.outputs[:, 1]).max()) > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "dynamics",
    [
        lambda: ODERNN(4, control_size=2, width=8, key=jr.key(0)),
        lambda: NeuralGeometricSDE(4, control_size=2, width=8, key=jr.key(0)),
    ],
)
def test_every_kind_of_dynamics_learns_to_impute(dynamics):
    data = waves(num=16)
    model = SeriesModel(dynamics(), channels=2, task="impute", key=jr.key(1))
    result = sf.fit(
        model, data, sf.losses.MaskedMSE(), optim=optax.adam(1e-2), steps=60, batch_size=16, key=KEY, progress=False
    )
    loss = result.history["loss"]
    assert np.isfinite(loss).all()
    assert np.mean(loss[-15:]) < 0.9 * np.mean(loss[:15])


# ---- Refusals. ----


def test_what_does_not_fit_is_refused_in_one_sentence():
    data = waves()
    with pytest.raises(ValueError, match=r'forecast needs a model that was built with task="forecast", not "impute"'):
        model_of("impute").forecast(data, [11.0], 2, key=KEY)
    with pytest.raises(ValueError, match=r'predict needs a model .* task="classify"'):
        model_of("impute").predict(data, key=KEY)
    with pytest.raises(ValueError, match=r"Series 'w0': all ts must come after its last time"):
        model_of("forecast").forecast(data, [5.0, 11.0], 2, key=KEY)
    with pytest.raises(ValueError, match=r"Series 'w\d': all ts must come not before its first time"):
        model_of("impute").impute(data, [0.0, 5.0], 2, key=KEY)
    with pytest.raises(ValueError, match=r"ts must increase strictly"):
        model_of("forecast").forecast(data, [12.0, 11.0], 2, key=KEY)
    with pytest.raises(ValueError, match=r"ts must be of shape \(T,\) or \(8, T\)"):
        model_of("forecast").forecast(data, np.ones((3, 2)), 2, key=KEY)
    with pytest.raises(ValueError, match=r"num_samples must be an integer of at least 1"):
        model_of("forecast").forecast(data, [11.0], 0, key=KEY)


def test_static_covariates_move_the_start():
    data = TimeSeries.from_arrays([[0.0, 1.0]] * 2, [[[0.0, 1.0]] * 2] * 2, static=[[0.0], [1.0]], ids=[3, 4])
    dynamics = NeuralLangevinSDE(4, control_size=2, width=8, key=jr.key(0))
    model = SeriesModel(dynamics, channels=2, num_outputs=2, num_static=1, key=jr.key(1))
    states = model(data.batch([0, 1]), key=KEY).states
    assert float(jnp.abs(states[0, 0] - states[1, 0]).max()) > 1e-3
    with pytest.raises(ValueError, match=r"num_static=1, but the series have no static"):
        model.predict(waves(), key=KEY)
