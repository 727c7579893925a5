"""`fit` on real data sets and models of series: warnings once, other data refused, the best kept, modes of jax."""

import warnings

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from training_toys import equal

from sdeflow._compat import SdeflowWarning
from sdeflow._results import RESULTS
from sdeflow.data import TimeSeries
from sdeflow.models import NeuralLangevinSDE, SeriesModel, Thinned
from sdeflow.training import CheckpointError, CrossEntropy, fit

ADAM = optax.adam(1e-2)
CE = CrossEntropy()


def series(count=12, seed=0):
    rng = np.random.default_rng(seed)
    times = [np.cumsum(rng.uniform(0.1, 1.0, size=4)) for _ in range(count)]
    values = [np.where(rng.random((4, 2)) < 0.2, np.nan, rng.normal(size=(4, 2)) + i % 2) for i in range(count)]
    for x in values:
        x[0] = 1.0
    return TimeSeries.from_arrays(times, values, labels=np.arange(count) % 2)


def model():
    sde = NeuralLangevinSDE(3, control_size=2, width=4, key=jr.key(0))
    return SeriesModel(sde, channels=2, num_outputs=2, key=jr.key(1))


def run(data=None, loss=CE, **kwargs):
    given = {"optim": ADAM, "steps": 4, "batch_size": 6, "key": jr.key(2), "progress": False}
    data = series() if data is None else data
    return fit(model(), data, loss, **(given | kwargs))


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: Thinned(data, 0.0)])
def test_a_batch_size_beyond_the_data_is_warned_of_once_and_means_all_of_them(wrap):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run(wrap(series()), batch_size=50, steps=5)
    ours = [w for w in caught if issubclass(w.category, SdeflowWarning)]
    assert len(ours) == 1
    assert "batch size 50 is more than the 12 series" in str(ours[0].message)
    assert equal(found.model, run(batch_size=12, steps=5).model)


CHANGES = {
    "one value": lambda data: _with_one_more(data),
    "standardised": lambda data: data.standardise(),
    "thinned": lambda data: data.drop_observations(0.3, key=jr.key(0)),
    "fewer": lambda data: data[:11],
    "another order": lambda data: data[::-1],
    "other buckets": lambda data: data.with_buckets(8),
    "other labels": lambda data: TimeSeries.from_arrays(data.times, data.values, labels=1 - data.labels),
}


def _with_one_more(data):
    values = [x.copy() for x in data.values]
    values[3][0, 1] = np.nextafter(values[3][0, 1], 2)
    return TimeSeries.from_arrays([data.to_user_time(t) for t in data.times], values, labels=data.labels)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "c"
    run(checkpoint=path, steps=2)
    return path


@pytest.mark.parametrize("change", CHANGES)
def test_a_checkpoint_does_not_go_on_with_other_series(checkpoint, change):
    before = checkpoint.read_bytes()
    with pytest.raises(CheckpointError, match=r"data \(\w+ in the file, \w+ here\)"):
        run(CHANGES[change](series()), checkpoint=checkpoint)
    assert checkpoint.read_bytes() == before


def test_a_checkpoint_goes_on_with_the_same_series_read_anew(tmp_path):
    path = tmp_path / "c"
    run(checkpoint=path, steps=2)
    assert equal(run(checkpoint=path, steps=4).model, run(steps=4).model)


def test_when_the_loss_becomes_nan_the_best_model_by_validation_is_kept():
    def loss(model, batch, key, step):
        value, metrics = CE(model, batch, key, step)
        return jnp.where(step == 5, jnp.nan, value), metrics

    kept = []
    with pytest.warns(SdeflowWarning, match="step 5"):
        found = run(
            loss=loss,
            validation=series(6, seed=1),
            validate_every=1,
            steps=9,
            callbacks=[lambda e: kept.append(e.model)],
        )
    assert bool(found.result == RESULTS.nonfinite_loss)
    scores = found.history["validation_loss"]
    assert len(scores) == 5
    assert np.isfinite(scores).all()
    assert found.best_step == int(np.argmin(scores))
    assert equal(found.model, kept[found.best_step])


def test_python_and_numpy_numbers_in_calls_trace_nothing_anew():
    traced = []

    def loss(model, batch, key, step):
        traced.append(batch.times.shape)
        return CE(model, batch, key, step)

    run(loss=loss, steps=3)
    run(loss=loss, steps=np.int64(5), batch_size=np.int32(6), key=jr.key(9))
    assert len(traced) == 1


MODES = {
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "no rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "debug nans": lambda: jax.debug_nans(True),
    "leaks": lambda: jax.checking_leaks(),
    "x64": lambda: jax.enable_x64(True),
}


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=pytest.mark.slow) if mode in ("x64", "leaks") else mode for mode in MODES]
)
def test_training_is_the_same_in_every_mode_that_finds_mistakes(mode):
    usual = run(optim=optax.sgd(1e-2), validation=series(6, seed=1)).history
    with MODES[mode]():
        found = run(optim=optax.sgd(1e-2), validation=series(6, seed=1)).history
    for name in usual:
        if mode == "x64":
            # Other draws of weights and noise.
            assert np.isfinite(found[name]).all()
            continue
        np.testing.assert_allclose(found[name], usual[name], rtol=1e-3, atol=1e-5)
