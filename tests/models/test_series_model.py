"""`SeriesModel`: what a series is told about, and that nothing else in its batch or padding matters."""

import dataclasses

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

import sdeflow as sf
from sdeflow.data import TimeSeries, simulated_series
from sdeflow.models import NeuralLangevinSDE, SeriesModel
from sdeflow.models.series._base import Row
from sdeflow.paths import linear_control
from sdeflow.training import CrossEntropy, fit

KEY = jr.key(11)


def model_of(channels=3, classes=4, size=5, **kwargs):
    dynamics = NeuralLangevinSDE(size, control_size=channels, width=8, key=jr.key(0))
    return SeriesModel(dynamics, channels=channels, num_outputs=classes, key=jr.key(1), **kwargs)


def ragged(num=6, channels=3, ids=None, seed=0):
    """Series of 3 to 9 steps at random times, with gaps; the mean of the last channel is the label."""
    rng = np.random.default_rng(seed)
    lengths = 3 + np.arange(num) % 7
    times = [np.cumsum(rng.uniform(0.1, 1.0, size=n)) for n in lengths]
    values = [np.where(rng.random((n, channels)) < 0.3, np.nan, rng.normal(size=(n, channels))) for n in lengths]
    for i, x in enumerate(values):
        x[:, -1] += i % 4
        x[0, 0] = 1.0
    return TimeSeries.from_arrays(times, values, labels=np.arange(num) % 4, ids=ids).with_buckets(9)


@eqx.filter_jit
def prediction_of(model, batch, key=KEY):
    return model(batch, key=key)


def outputs_of(model, batch, key=KEY):
    return prediction_of(model, batch, key).outputs


@eqx.filter_jit
def gradient_of(model, batch):
    def loss(model):
        return jnp.sum(jnp.sin(model(batch, key=KEY).outputs))

    return eqx.filter_grad(loss)(model)


def take(batch, rows):
    return jax.tree.map(lambda x: x[np.asarray(rows)], batch)


def same_bits(a, b):
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(np.asarray(x), np.asarray(y)), a, b))


# ---- What it computes. ----


def test_a_prediction_is_encoder_then_walk_then_readout():
    model, data = model_of(), ragged()
    prediction = prediction_of(model, data.batch(np.arange(6)))
    assert prediction.outputs.shape == (6, 4)
    assert prediction.states.shape == (6, 9, 5)
    ts = jnp.asarray(data.times[4], jnp.float32)
    control = linear_control(ts, data.values[4].astype(np.float32))
    z0 = model.encoder(control.evaluate(ts[0]))
    sol = sf.solve(model.dynamics, z0, ts, args=control, key=jr.fold_in(KEY, 4), solver=diffrax.Euler())
    assert int(sol.stats["num_steps"]) == len(ts) - 1 == 6
    np.testing.assert_allclose(prediction.states[4, :7], sol.ys, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(prediction.outputs[4], model.readout(sol.final), rtol=1e-5, atol=1e-5)


def test_padded_states_repeat_the_last_one():
    data = ragged()
    states = prediction_of(model_of(), data.batch(np.arange(6))).states[0]
    np.testing.assert_array_equal(states[3:], np.broadcast_to(states[2], (6, 5)))


@pytest.mark.slow
def test_more_steps_and_another_solver_are_another_walk_to_the_same_end():
    sde = dict(size=2, classes=2)
    batch = ragged().batch(np.arange(6))
    coarse, fine, shark = (
        prediction_of(model_of(**sde, **kwargs), batch).states
        for kwargs in ({}, {"steps_per_interval": 8}, {"solver": diffrax.ShARK()})
    )
    assert not np.array_equal(coarse, fine)
    assert not np.array_equal(coarse, shark)
    assert fine.shape == coarse.shape == (6, 9, 2)


def test_a_series_of_one_observation_ends_where_it_starts():
    model = model_of(channels=1)
    batch = TimeSeries.from_arrays([[0.0], [5.0]], [[2.0], [3.0]]).batch([0, 1])
    assert batch.times.shape == (2, 1)
    prediction = prediction_of(model, batch)
    want = model.readout(model.encoder(jnp.array([3.0])))
    np.testing.assert_allclose(prediction.outputs[1], want, rtol=1e-5)


def test_an_ordinary_equation_serves_too():
    class Decay(sf.ODE):
        state_size: int = 2
        control_size: int = 3

    model = SeriesModel(Decay(lambda t, z, args: -z), channels=3, num_outputs=2, key=jr.key(1))
    batch = ragged().batch([0])
    states = prediction_of(model, batch).states[0]
    np.testing.assert_allclose(states[1], states[0] * (1 - (batch.times[0, 1] - batch.times[0, 0])), rtol=1e-5)


# ---- A series is on its own. ----


def test_equal_keys_give_equal_outputs_and_other_keys_others():
    model, batch = model_of(), ragged().batch(np.arange(6))
    assert same_bits(outputs_of(model, batch), outputs_of(model, batch))
    assert not np.allclose(outputs_of(model, batch), outputs_of(model, batch, jr.key(12)))


def test_under_jit_the_outputs_are_those_without():
    model, batch = model_of(), ragged().batch(np.arange(6))
    np.testing.assert_allclose(outputs_of(model, batch), model(batch, key=KEY).outputs, rtol=1e-5, atol=1e-6)


def test_a_batch_is_a_loop_over_its_series():
    model, batch = model_of(), ragged().batch(np.arange(6))
    alone = [outputs_of(model, take(batch, [i]))[0] for i in range(6)]
    np.testing.assert_allclose(outputs_of(model, batch), alone, rtol=1e-5, atol=1e-6)


def test_permuting_the_batch_permutes_the_outputs():
    model, batch = model_of(), ragged().batch(np.arange(6))
    order = [3, 0, 5, 1, 4, 2]
    assert same_bits(outputs_of(model, take(batch, order)), outputs_of(model, batch)[jnp.asarray(order)])


def test_the_noise_belongs_to_the_id():
    model, batch = model_of(), ragged().batch(np.zeros(3, int))
    same = outputs_of(model, batch)
    np.testing.assert_array_equal(same[0], same[1])
    other = outputs_of(model, dataclasses.replace(batch, ids=np.array([0, 1, 0], np.int32)))
    np.testing.assert_array_equal(other[::2], same[::2])
    assert not np.allclose(other[1], same[1])


def test_padding_changes_neither_outputs_nor_gradients():
    model, data = model_of(), ragged()
    short, long = data.batch(np.arange(6)), data.batch(np.arange(6), length=15)
    assert long.times.shape == (6, 15)
    assert same_bits(outputs_of(model, short), outputs_of(model, long))
    assert same_bits(gradient_of(model, short), gradient_of(model, long))


def test_a_series_that_fails_leaves_the_others_as_they_are():
    model, batch = model_of(), ragged().batch(np.arange(6))
    values = batch.values.copy()
    values[2] = np.inf
    spoilt = dataclasses.replace(batch, values=values)
    before, after = outputs_of(model, batch), outputs_of(model, spoilt)
    others = np.array([0, 1, 3, 4, 5])
    assert not np.isfinite(after[2]).all()
    assert np.isfinite(before).all()
    assert same_bits(after[others], before[others])
    assert bool(sf.is_okay(prediction_of(model, batch).result))
    result = prediction_of(model, spoilt).result
    assert not bool(sf.is_okay(result))
    assert bool(result == sf.RESULTS.nonfinite)


def test_gradients_are_finite_with_gaps_padding_and_single_observations():
    data = TimeSeries.from_arrays(
        [[0.0], [0.0, 1.0, 4.0]], [[[1.0, np.nan, np.nan]], [[np.nan] * 3, [np.nan, 2.0, np.nan], [np.nan] * 3]]
    )
    gradient = gradient_of(model_of(), data.batch([0, 1]))
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(gradient))


# ---- predict. ----


def test_predict_is_the_model_in_the_order_of_the_data():
    model, data = model_of(), ragged(num=12).with_buckets((5, 9))
    logits = model.predict(data, key=KEY, batch_size=4)
    assert logits.shape == (12, 4)
    for i in range(12):
        np.testing.assert_allclose(logits[i], outputs_of(model, data.batch([i]))[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("ids", [None, list("abcdefghijkl"), [10**12 + i for i in range(12)]])
def test_predictions_follow_the_ids_through_subsets_and_orders(ids):
    model, data = model_of(), ragged(num=12, ids=ids)
    logits = model.predict(data, key=KEY)
    order = np.array([7, 2, 11, 3])
    np.testing.assert_allclose(model.predict(data[order], key=KEY), logits[order], rtol=1e-5, atol=1e-6)


def test_more_samples_average_probabilities():
    model, data = model_of(), ragged()
    averaged = model.predict(data, key=KEY, num_samples=3)
    batch = data.batch(np.arange(6))
    own = jax.vmap(lambda i: jr.split(jr.fold_in(KEY, i), 3))(batch.ids)

    def one(times, values, key):
        return jax.nn.softmax(model.readout(model._walk(Row(times, values, None, None, None, None), key)[0].final))

    each = jax.jit(jax.vmap(jax.vmap(one, (None, None, 0))))
    share = each(jnp.asarray(batch.times), jnp.asarray(batch.values), own)
    np.testing.assert_allclose(np.exp(averaged), share.mean(axis=1), rtol=1e-4, atol=1e-6)
    assert float(share.std(axis=1).max()) > 1e-3


def test_predict_names_the_series_that_fails():
    model = model_of()
    model = eqx.tree_at(lambda m: m.encoder.weight, model, jnp.full((5, 3), 10.0))
    times, values = [[0.0, 1.0]] * 3, np.ones((3, 2, 3))
    values[1] = 3e38
    data = TimeSeries.from_arrays(times, values, ids=["a", "b", "c"])
    with pytest.raises(sf.SolveError, match=r"Series 'b': The solution became infinite or NaN") as error:
        model.predict(data, key=KEY)
    assert bool(error.value.result == sf.RESULTS.nonfinite)
    logits = model.predict(data, key=KEY, throw=False)
    assert np.isfinite(logits).all(axis=1).tolist() == [True, False, True]


# ---- Compiled once for each bucket. ----


class Counted(NeuralLangevinSDE):
    """Counts how often its drift is traced."""

    def drift(self, t, y, args):
        TRACES.append(y.shape)
        return super().drift(t, y, args)


TRACES: list = []


def test_predict_compiles_once_for_each_bucket():
    dynamics = Counted(4, control_size=3, width=8, key=jr.key(0))
    model = SeriesModel(dynamics, channels=3, num_outputs=4, key=jr.key(1))
    data = ragged(num=14)
    TRACES.clear()
    model.predict(data, key=KEY, batch_size=7)
    once = len(TRACES)
    assert once > 0
    model.predict(data, key=jr.key(5), batch_size=7)
    model.predict(ragged(num=14, seed=1), key=KEY, batch_size=7)
    assert len(TRACES) == once
    model.predict(data.with_buckets((5, 9)), key=KEY, batch_size=7)
    assert len(TRACES) == 2 * once


def test_two_hundred_steps_compile_once_for_each_bucket():
    traced = []

    def loss(model, batch, key, step):
        traced.append(batch.times.shape)
        return CrossEntropy()(model, batch, key, step)

    data = ragged(num=40).with_buckets((5, 9))
    result = fit(model_of(), data, loss, optim=optax.adam(1e-2), steps=200, batch_size=8, key=jr.key(0), progress=False)
    assert sorted(traced) == [(8, 5), (8, 9)]
    assert result.num_steps == 200
    first, last = result.history["loss"][:20], result.history["loss"][-20:]
    assert np.mean(first) - np.mean(last) > 5 * np.sqrt((np.var(first, ddof=1) + np.var(last, ddof=1)) / 20)


# ---- It learns. ----


@pytest.mark.slow
def test_it_tells_apart_classes_that_differ_only_in_how_they_move():
    train, test = simulated_series(400, num_test=200, num_classes=2, num_channels=2, key=jr.key(0))
    train, test = train.with_buckets(30), test.with_buckets(30)
    train, held_out = train.split(0.8, key=jr.key(3))
    dynamics = NeuralLangevinSDE(16, control_size=2, width=32, key=jr.key(1))
    result = fit(
        SeriesModel(dynamics, channels=2, num_outputs=2, key=jr.key(2)),
        train,
        CrossEntropy(),
        optim=optax.adam(optax.cosine_decay_schedule(3e-3, 800)),
        steps=800,
        batch_size=32,
        key=jr.key(4),
        validation=held_out,
        progress=False,
    )
    accuracy = (result.model.predict(test, key=jr.key(5)).argmax(axis=1) == test.labels).mean()
    # Half is chance, and 5 standard errors of 200 series more are 0.68.
    assert accuracy > 0.8


# ---- Refusals. ----


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"task": "regress"}, ValueError, r'task must be "classify", "forecast" or "impute", got \'regress\''),
        ({"task": "impute", "num_outputs": 4}, ValueError, r"num_outputs=4 channels cannot be predicted"),
        ({"control": "cubic"}, ValueError, r"control must be one of 'linear'.*got 'cubic'"),
        ({"hide": 0.0}, ValueError, r"hide must be in \(0, 1\], got 0.0"),
        ({"noise": -1.0}, ValueError, r"noise must be positive and finite, got -1.0"),
        ({"num_outputs": None}, ValueError, r"num_outputs=, the number of classes"),
        ({"num_outputs": 0}, ValueError, r"num_outputs must be an integer of at least 1, got 0"),
        ({"channels": 2}, ValueError, r"control_size=3 but the series have channels=2"),
        ({"channels": "3"}, ValueError, r"channels must be an integer"),
        ({"steps_per_interval": 0}, ValueError, r"steps_per_interval must be an integer of at least 1, got 0"),
        ({"solver": diffrax.Euler}, TypeError, r"solver must be an instance"),
        ({"dynamics": sf.ODE(lambda t, y, args: -y)}, TypeError, r"state_size and control_size, got ODE"),
        ({"dynamics": None}, TypeError, r"got NoneType"),
    ],
)
def test_bad_options_are_refused_in_one_sentence(change, error, match):
    given = {
        "dynamics": NeuralLangevinSDE(4, control_size=3, key=jr.key(0)),
        "channels": 3,
        "num_outputs": 2,
        "key": jr.key(0),
    } | change
    with pytest.raises(error, match=match) as caught:
        SeriesModel(given.pop("dynamics"), **given)
    assert "\n" not in str(caught.value)


def test_data_of_other_channels_are_refused():
    data = ragged(channels=2)
    with pytest.raises(ValueError, match=r"channels=3, but the batch has values of shape \(1, 9, 2\)"):
        model_of()(data.batch([0]), key=KEY)
    with pytest.raises(ValueError, match=r"channels=3"):
        model_of().predict(data, key=KEY)


def test_predict_wants_a_data_set_and_whole_numbers():
    with pytest.raises(TypeError, match=r"series must be a TimeSeries, got SeriesBatch.*from_arrays"):
        model_of().predict(ragged().batch([0]), key=KEY)
    with pytest.raises(ValueError, match=r"num_samples must be an integer of at least 1, got 0"):
        model_of().predict(ragged(), key=KEY, num_samples=0)
    with pytest.raises(ValueError, match=r"batch_size must be an integer of at least 1, got 0"):
        model_of().predict(ragged(), key=KEY, batch_size=0)
