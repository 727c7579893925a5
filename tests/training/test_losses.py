"""Losses on predictions: values, filler rows, and the algebra of sums."""

from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from training_toys import Linear, Rows, mlp, squares

from sdeflow._results import RESULTS
from sdeflow.data import TimeSeries
from sdeflow.training import FunctionLoss, Prediction, Sum, fit, losses
from sdeflow.training._rows import without_filler


def batch_of(**fields):
    return SimpleNamespace(**fields)


class LocalError(eqx.Module):
    """Stands in for a regulariser of the package."""

    is_regulariser = True

    def __rmul__(self, weight):
        return Scaled(self, weight)


class Scaled(eqx.Module):
    """What a regulariser times a number is: `.regulariser` and `.weight`."""

    is_regulariser = True
    regulariser: eqx.Module
    weight: float


def series(count=6, seed=0, classes=3):
    """Ragged series with missing values, labels and targets, in one batch with two filler rows."""
    rng = np.random.default_rng(seed)
    times = [np.sort(rng.uniform(size=n)) for n in rng.integers(3, 6, count)]
    values = [rng.normal(size=(len(t), 2)) for t in times]
    values[0][1, 0] = np.nan
    data = TimeSeries.from_arrays(
        times, values, labels=rng.integers(0, classes, count), targets=rng.normal(size=(count, classes))
    )
    return next(batch for batch in data.with_buckets(6).batches(4, jr.key(0)) if (batch.weight == 0).any())


# -------------------------------------------------------------------------------------------------- values


def test_cross_entropy_is_the_weighted_mean_of_the_log_loss():
    rng = np.random.default_rng(0)
    logits, labels, weight = rng.normal(size=(7, 4)), rng.integers(0, 4, 7), rng.uniform(size=7)
    weight[2] = 0.0
    with jax.enable_x64(True):
        batch = batch_of(labels=jnp.asarray(labels), weight=jnp.asarray(weight))
        value, metrics = losses.CrossEntropy().score(Prediction(jnp.asarray(logits)), batch, 0)
        log_prob = logits[np.arange(7), labels] - np.log(np.exp(logits).sum(1))
        np.testing.assert_allclose(value, -np.average(log_prob, weights=weight), rtol=1e-12)
        right = np.average(logits.argmax(1) == labels, weights=weight)
        np.testing.assert_allclose(metrics["accuracy"], right, rtol=1e-12)


def test_cross_entropy_is_finite_for_huge_logits():
    batch = batch_of(labels=jnp.array([0, 1]))
    value = losses.CrossEntropy().score(Prediction(jnp.array([[1e30, 0.0], [-1e30, 1e30]])), batch, 0)[0]
    assert float(value) == 0.0


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_out_of_range_is_never_scored(label):
    prediction = Prediction(jnp.zeros((2, 3)))
    batch = batch_of(labels=jnp.array([0, label]), weight=jnp.ones(2))
    assert np.isnan(losses.CrossEntropy().score(prediction, batch, 0)[0])
    filler = batch_of(labels=jnp.array([0, label]), weight=jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(losses.CrossEntropy().score(prediction, filler, 0)[0], np.log(3), rtol=1e-6)


def test_masked_mse_scores_targets_where_they_are_not_missing():
    rng = np.random.default_rng(1)
    outputs, targets, weight = rng.normal(size=(5, 3)), rng.normal(size=(5, 3)), rng.uniform(size=5)
    targets[1, 2] = targets[3] = np.nan
    weight[4] = 0.0
    with jax.enable_x64(True):
        batch = batch_of(targets=targets, values=np.zeros((5, 3)), weight=weight)
        value = losses.MaskedMSE().score(Prediction(jnp.asarray(outputs)), batch, 0)[0]
        each = weight[:, None] * np.isfinite(targets)
        expected = np.nansum(each * (outputs - targets) ** 2) / each.sum()
        np.testing.assert_allclose(value, expected, rtol=1e-12)


@pytest.mark.parametrize("channels", [True, False])
def test_masked_mse_scores_values_where_the_mask_says_so(channels):
    rng = np.random.default_rng(2)
    values = rng.normal(size=(3, 4, 2)).astype(np.float32)
    mask = rng.uniform(size=(3, 4, 2) if channels else (3, 4)) < 0.5
    values[0, 0] = np.nan
    value = losses.MaskedMSE().score(Prediction(jnp.zeros((3, 4, 2))), batch_of(values=values, mask=mask), 0)[0]
    used = np.broadcast_to(mask if channels else mask[..., None], values.shape) & ~np.isnan(values)
    np.testing.assert_allclose(value, np.mean(values[used] ** 2), rtol=1e-6)


@pytest.mark.parametrize("loss", [losses.CrossEntropy(), losses.MaskedMSE()])
def test_gradients_agree_with_finite_differences(loss):
    with jax.enable_x64(True):
        rng = np.random.default_rng(3)
        batch = batch_of(
            labels=jnp.array([0, 1, 2]),
            targets=jnp.array(np.where(rng.uniform(size=(3, 3)) < 0.3, np.nan, 1.0)),
            weight=jnp.array([1.0, 0.5, 2.0]),
        )
        f = lambda x: loss.score(Prediction(x), batch, 0)[0]
        x, step = jnp.asarray(rng.normal(size=(3, 3))), 1e-6
        around = step * jnp.eye(9).reshape(9, 3, 3)
        slopes = [(f(x + d) - f(x - d)) / (2 * step) for d in around]
        np.testing.assert_allclose(jax.grad(f)(x).ravel(), slopes, atol=1e-8)


# ----------------------------------------------------------------------------------------------- filler rows


class Fragile(eqx.Module):
    """Its derivative is NaN wherever a time or a value is: a mask on its outputs would come too late."""

    weight: jax.Array

    def __call__(self, batch, *, key, regularisers=()):
        values = jnp.where(batch.mask, batch.values, 0.0).sum(1)
        scale = jnp.sqrt(batch.times[:, -1] * self.weight[0, 0] ** 2)
        penalties = {type(r).__name__: scale for r in regularisers}
        return Prediction(values @ self.weight * scale[:, None], penalties=penalties)


@pytest.mark.parametrize(
    "loss", [losses.CrossEntropy(), losses.MaskedMSE(), losses.CrossEntropy() + 0.3 * LocalError()]
)
def test_a_filler_row_of_nan_touches_neither_value_nor_gradient(loss):
    full = series()
    real = np.flatnonzero(full.weight > 0)
    assert len(real) < len(full.weight)
    clean = jax.tree.map(lambda x: x[real], full)
    poison = lambda x: np.where(
        (full.weight == 0).reshape(-1, *(1,) * (x.ndim - 1)), np.nan if x.dtype.kind == "f" else -7, x
    ).astype(x.dtype)
    names = ("times", "values", "mask", "labels", "targets")
    bad = eqx.tree_at(lambda b: [getattr(b, n) for n in names], full, replace_fn=poison)
    assert np.isnan(bad.times).any()

    def f(model, batch):
        return loss(model, batch, jr.key(0), 0)

    model = Fragile(jr.normal(jr.key(0), (2, 3)))
    (value, metrics), slope = eqx.filter_value_and_grad(f, has_aux=True)(model, bad)
    (wanted, wanted_metrics), wanted_slope = eqx.filter_value_and_grad(f, has_aux=True)(model, clean)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    np.testing.assert_allclose(slope.weight, wanted_slope.weight, rtol=1e-5, atol=1e-7)
    assert metrics.keys() == wanted_metrics.keys()
    for name in metrics:
        np.testing.assert_allclose(metrics[name], wanted_metrics[name], rtol=1e-6)
    assert np.isfinite(slope.weight).all()


def test_a_batch_of_filler_alone_costs_nothing():
    batch = batch_of(labels=jnp.array([0, 1]), weight=jnp.zeros(2))
    f = lambda x: losses.CrossEntropy().score(Prediction(x), batch, 0)[0]
    value, slope = jax.value_and_grad(f)(jnp.full((2, 2), jnp.nan))
    assert float(value) == 0.0
    np.testing.assert_array_equal(slope, 0.0)


def test_only_fields_with_a_row_per_series_are_overwritten():
    batch = {
        "weight": np.array([1.0, 0.0]),
        "labels": np.array([3, 4]),
        "grid": np.array([0.0, 1.0]),
        "ids": ["a", "b"],
    }
    safe = without_filler(batch)
    assert safe["labels"].tolist() == [3, 3]
    assert safe["grid"].tolist() == [0.0, 1.0]
    assert safe["ids"] == ["a", "b"]


# ------------------------------------------------------------------------------------------------------ sums


def series_batch():
    rng = np.random.default_rng(0)
    return batch_of(
        values=rng.normal(size=(4, 5, 2)).astype(np.float32),
        labels=np.array([0, 1, 2, 1]),
        targets=rng.normal(size=(4, 3)).astype(np.float32),
        weight=np.array([1.0, 1.0, 2.0, 0.0], np.float32),
    )


def call(loss, model=None, batch=None, step=0):
    return loss(model or Linear(jnp.ones((2, 3))), batch or series_batch(), jr.key(0), step)


def test_a_sum_is_the_sum_and_calls_the_model_once():
    parts = {"CrossEntropy": call(losses.CrossEntropy())[0], "MaskedMSE": call(losses.MaskedMSE())[0]}
    Linear.calls = 0
    value, metrics = call(2 * losses.CrossEntropy() + losses.MaskedMSE() * 0.5 + 0.1 * LocalError())
    assert Linear.calls == 1
    np.testing.assert_allclose(metrics["LocalError"], 12.0, rtol=1e-6)  # cost 2, six weights of 1
    for name, part in parts.items():
        np.testing.assert_allclose(metrics[name], part, rtol=1e-6)
    assert metrics.keys() == {"CrossEntropy", "accuracy", "MaskedMSE", "LocalError"}
    np.testing.assert_allclose(value, 2 * parts["CrossEntropy"] + 0.5 * parts["MaskedMSE"] + 1.2, rtol=1e-6)


def test_weights_may_depend_on_the_step_and_multiply():
    warm = optax.linear_schedule(0.0, 1.0, 10)
    loss = 3.0 * (warm * losses.MaskedMSE() + losses.CrossEntropy())
    mse, entropy = call(losses.MaskedMSE())[0], call(losses.CrossEntropy())[0]
    for step in (0, 5, 20):
        want = 3 * (min(step / 10, 1) * mse + entropy)
        np.testing.assert_allclose(call(loss, step=step)[0], want, rtol=1e-6)
    twice = warm * (warm * losses.MaskedMSE())
    np.testing.assert_allclose(call(twice, step=5)[0], 0.25 * mse, rtol=1e-6)


def test_losses_subtract_divide_and_change_sign():
    value = lambda loss, step=0: float(loss(3.0, 4.0, jr.key(0), step)[0])
    product = FunctionLoss(lambda model, batch, key, step: (jnp.asarray(model * batch), {}))
    total = FunctionLoss(lambda model, batch, key, step: (jnp.asarray(model + batch), {}))
    plain = lambda model, batch, key, step: (jnp.asarray(model - batch), {})
    assert value(-product) == -12
    assert value(product / 2) == 6
    assert value(product - total) == 5
    assert value(product - (total - product / 4)) == 8
    assert value(product - plain) == 13
    assert value(plain - product) == -13
    ramp = optax.linear_schedule(0.0, 1.0, 10)
    assert value(-(ramp * product) / 4, step=5) == -1.5
    for wrong, error in ((0, ValueError), (ramp, TypeError), ("2", TypeError), (True, TypeError)):
        with pytest.raises(error, match="divided by|multiplied by"):
            product / wrong
    with pytest.raises(TypeError):
        product - 1


def test_any_callable_may_join_a_sum_on_either_side():
    def norm(model, batch, key, step):
        return jnp.sum(model.weight**2), {"draw": jr.normal(key)}

    value, metrics = call(losses.CrossEntropy() + norm)
    np.testing.assert_allclose(value, call(losses.CrossEntropy())[0] + 6.0, rtol=1e-6)
    assert {"norm", "draw", "CrossEntropy"} < metrics.keys()
    np.testing.assert_allclose(call(norm + losses.CrossEntropy())[0], value, rtol=1e-6)
    np.testing.assert_allclose(call(0.5 * FunctionLoss(norm))[0], 3.0, rtol=1e-6)
    np.testing.assert_allclose(call(Sum([(norm, 2.0), (losses.CrossEntropy(), 0.0)]))[0], 12.0, rtol=1e-6)
    np.testing.assert_allclose(call(sum([losses.CrossEntropy(), norm]))[0], value, rtol=1e-6)
    # Two functions of one sum draw from keys of their own.
    _, both = call(FunctionLoss(norm) + norm)
    assert float(both["draw"]) != float(both["draw_2"])


def test_a_loss_draws_the_same_noise_alone_and_in_a_sum():
    class Noisy(eqx.Module):
        def __call__(self, batch, *, key, regularisers=()):
            return Prediction(jr.normal(key, (4, 3)), penalties={"LocalError": jnp.zeros(())})

    alone = call(losses.CrossEntropy(), Noisy())[0]
    assert float(alone) == float(call(losses.CrossEntropy() + LocalError(), Noisy())[0])


def test_the_share_of_failed_solves_is_a_metric():
    class Failing(eqx.Module):
        def __call__(self, batch, *, key, regularisers=()):
            bad = jnp.array([False, True, False, True])
            result = jax.vmap(lambda b: RESULTS.where(b, RESULTS.nonfinite, RESULTS.successful))(bad)
            return Prediction(jnp.zeros((4, 3)), result=result)

    # Weights 1, 1, 2 and 0: of the failed rows only the second counts.
    assert float(call(losses.CrossEntropy(), Failing())[1]["failed"]) == 0.25
    assert float(call(1.0 * losses.CrossEntropy(), Failing())[1]["failed"]) == 0.25


def refuse(error, match):
    return pytest.raises(error, match=match)


def test_what_cannot_be_added_or_scaled_is_refused():
    loss = losses.CrossEntropy()
    for wrong in (3, "text", None, losses.MaskedMSE):
        with pytest.raises(TypeError):
            loss + wrong
        with pytest.raises(TypeError):
            wrong + loss
    for wrong in ("2", True, losses.MaskedMSE()):
        with refuse(TypeError, "a weight is a number or a callable"):
            loss * wrong
    with refuse(ValueError, "multiplied by nan"):
        loss * float("nan")
    with refuse(ValueError, "LocalError twice"):
        loss + LocalError() + LocalError()
    with refuse(ValueError, "no term"):
        Sum([])
    with refuse(TypeError, "the class MaskedMSE; call it"):
        Sum([(losses.MaskedMSE, 1.0)])


def test_predictions_that_do_not_fit_are_refused():
    model = lambda out, **kwargs: lambda batch, *, key, regularisers=(): Prediction(out, **kwargs)
    batch = series_batch()
    with refuse(ValueError, "without labels"):
        call(losses.CrossEntropy(), model(jnp.zeros((4, 3))), batch_of(values=batch.values))
    with refuse(ValueError, r"outputs of shape \(4,\)"):
        call(losses.CrossEntropy(), model(jnp.zeros(4)))
    with refuse(ValueError, r"outputs of shape \(4, 1\)"):
        call(losses.CrossEntropy(), model(jnp.zeros((4, 1))))
    with refuse(TypeError, "labels of dtype float32"):
        call(losses.CrossEntropy(), model(jnp.zeros((4, 3))), batch_of(labels=np.zeros(4, np.float32)))
    with refuse(ValueError, r"outputs of shape \(4, 1\) for targets of shape \(4, 3\)"):
        call(losses.MaskedMSE(), model(jnp.zeros((4, 1))))
    with refuse(ValueError, "without targets or values"):
        call(losses.MaskedMSE(), model(jnp.zeros((4, 1))), batch_of(labels=batch.labels))
    with refuse(ValueError, r"weight has shape \(3,\) but the prediction has 4 rows"):
        odd = batch_of(labels=batch.labels, weight=np.ones(3))
        call(losses.CrossEntropy(), model(jnp.zeros((4, 3))), odd)
    with refuse(ValueError, r"mask has shape \(4, 2\)"):
        odd = batch_of(values=batch.values, mask=np.ones((4, 2), bool))
        call(losses.MaskedMSE(), model(jnp.zeros((4, 5, 2))), odd)
    with refuse(ValueError, r"returned penalties for \[\]"):
        call(losses.CrossEntropy() + LocalError(), model(jnp.zeros((4, 3))))
    with refuse(ValueError, r"penalty of LocalError has shape \(4, 2\)"):
        call(
            1.0 * losses.CrossEntropy() + LocalError(),
            model(jnp.zeros((4, 3)), penalties={"LocalError": jnp.ones((4, 2))}),
        )
    with refuse(TypeError, "return a `Prediction`"):
        call(losses.CrossEntropy(), lambda batch, **kwargs: jnp.zeros((4, 3)))
    with refuse(TypeError, "is not callable"):
        call(losses.CrossEntropy(), object())


# -------------------------------------------------------------------------------------------------- with fit


def test_fit_records_every_term_of_a_sum():
    def small(model, batch, key, step):
        return 1e-3 * sum(jnp.sum(x**2) for x in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))), {}

    given = {"optim": optax.adam(1e-2), "steps": 6, "batch_size": 8, "key": jr.key(0), "progress": False}
    found = fit(mlp(), Rows(), FunctionLoss(squares) + small, validation=Rows(5), **given)
    assert {"squares", "small", "bias", "validation_small", "validation_loss"} < found.history.keys()
    np.testing.assert_allclose(found.history["loss"], found.history["squares"] + found.history["small"], rtol=1e-6)


def test_fit_classifies_series():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 60)
    times = [np.sort(rng.uniform(size=n)) for n in rng.integers(3, 9, 60)]
    values = [np.where(label, 1.0, -1.0) + 0.5 * rng.normal(size=(len(t), 2)) for label, t in zip(labels, times)]
    data = TimeSeries.from_arrays(times, values, labels=labels)

    class Mean(eqx.Module):
        layer: eqx.nn.Linear

        def __call__(self, batch, *, key, regularisers=()):
            seen = jnp.where(batch.mask, batch.values, 0.0).sum(1) / batch.mask.sum(1)
            return Prediction(jax.vmap(self.layer)(seen))

    model = Mean(eqx.nn.Linear(2, 2, key=jr.key(0)))
    given = {"optim": optax.adam(0.1), "steps": 60, "batch_size": 16, "key": jr.key(0), "progress": False}
    found = fit(model, data, losses.CrossEntropy(), validation=data, **given)
    assert found.history["validation_accuracy"][-1] > 0.95
    assert found.history["validation_loss"][-1] < 0.3
