"""`fit`: what it computes, how often it compiles, and what it refuses."""

import dataclasses
import signal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest
from training_toys import Batch, Full, Rows, equal, mlp, same_history, squares

from sdeflow._compat import SdeflowWarning
from sdeflow._results import RESULTS
from sdeflow.training import _loop, fit

# One optimiser for all: with it, `fit` finds the programs of the fit before.
ADAM = optax.adam(1e-2)


@pytest.fixture(autouse=True)
def _interruptible():
    """A shell that puts the tests in the background makes them deaf to SIGINT, which some of them send themselves."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run(model=None, data=None, loss=squares, **kwargs):
    given = {"optim": ADAM, "steps": 12, "batch_size": 8, "key": jr.key(7), "progress": False}
    return fit(mlp() if model is None else model, data or Rows(), loss, **(given | kwargs))


def by_hand(model, data, loss, optim, steps, size, key):
    """The documented meaning of `fit` in a plain loop."""
    key_loss, key_data = jr.fold_in(key, 0), jr.fold_in(key, 1)
    state = optim.init(eqx.filter(model, eqx.is_inexact_array))
    batches, epoch, losses = iter(()), 0, []
    for step in range(steps):
        batch = next(batches, None)
        if batch is None:
            batches = iter(data.batches(size, jr.fold_in(key_data, epoch)))
            epoch, batch = epoch + 1, next(batches)
        (value, _), grads = eqx.filter_jit(eqx.filter_value_and_grad(loss, has_aux=True))(
            model, batch, jr.fold_in(key_loss, step), jnp.asarray(step)
        )
        updates, state = optim.update(grads, state, eqx.filter(model, eqx.is_inexact_array))
        model = eqx.apply_updates(model, updates)
        losses.append(float(value))
    return model, losses


def test_fit_is_the_documented_loop():
    data, optim = Rows(), optax.adamw(optax.cosine_decay_schedule(1e-2, 12))
    model, losses = by_hand(mlp(), data, squares, optim, 12, 8, jr.key(7))
    found = run(optim=optim)
    np.testing.assert_allclose(found.history["loss"], losses, rtol=1e-5)
    for one, two in zip(*(jax.tree.leaves(eqx.filter(m, eqx.is_array)) for m in (found.model, model))):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-6)
    assert bool(found.result == RESULTS.successful)
    assert found.num_steps == 12
    np.testing.assert_array_equal(found.history["step"], np.arange(12))
    assert found.history.keys() == {"step", "loss", "bias"}


def test_nothing_is_mutated_and_runs_repeat_bitwise():
    model = mlp()
    before = jax.tree.map(lambda x: np.array(x) if eqx.is_array(x) else x, model)
    one, two = run(model), run(model)
    assert equal(model, before)
    assert not equal(one.model, model)
    assert equal(one.model, two.model)
    assert same_history(one.history, two.history)
    assert not equal(one.model, run(model, key=jr.key(8)).model)


def test_a_prefix_of_steps_is_a_prefix_of_the_history():
    short, long = run(steps=5), run(steps=12)
    np.testing.assert_array_equal(short.history["loss"], long.history["loss"][:5])


def test_only_floating_arrays_are_trained_and_any_pytree_will_do():
    model = {"w": jnp.zeros(3), "count": jnp.arange(2), "name": "linear", "half": np.float32(0.5)}

    def loss(model, batch, key, step):
        assert model["name"] == "linear"
        return jnp.mean((batch.x @ model["w"] * model["half"] - batch.y) ** 2), {}

    found = run(model, loss=loss, optim=optax.sgd(0.05), steps=900, batch_size=20)
    np.testing.assert_array_equal(found.model["count"], [0, 1])
    assert found.model["name"] == "linear"
    data = Rows()
    exact = np.linalg.lstsq(data.x, data.y, rcond=None)[0]
    np.testing.assert_allclose(found.model["w"] * found.model["half"], exact, rtol=1e-4)


def test_raw_keys_and_plain_numbers_in_batches_are_accepted():
    class Numbers:
        def batches(self, size, key):
            yield {"target": 3.0, "label": "not for the program"}

    def loss(w, batch, key, step):
        assert batch["label"] is None
        return (w - batch["target"]) ** 2, {}

    found = run(jnp.zeros(()), Numbers(), loss, optim=optax.sgd(0.25), steps=30, key=jr.PRNGKey(0))
    assert abs(float(found.model) - 3.0) < 1e-6


class Buckets:
    """Three lengths in turn."""

    def batches(self, size, key):
        for length in (4, 8, 16):
            yield {"x": np.ones((size, length), np.float32)}


def test_two_hundred_steps_on_three_buckets_trace_three_times():
    traces = []

    def loss(w, batch, key, step):
        traces.append(batch["x"].shape)
        return jnp.mean((batch["x"].mean(1) * w - 2.0) ** 2), {}

    weak = jnp.full((), 1.0)
    assert weak.weak_type
    optim = optax.chain(optax.scale_by_adam(), optax.contrib.reduce_on_plateau(), optax.scale(-1e-2))
    found = run(weak, Buckets(), loss, optim=optim, steps=200, batch_size=4)
    assert len(found.history["loss"]) == 200
    assert sorted(traces) == [(4, 4), (4, 8), (4, 16)]
    # A second fit with the same loss and optimiser finds the programs of the first, whatever its numbers are.
    run(jnp.zeros(()), Buckets(), loss, optim=optim, steps=7, batch_size=4, key=jr.key(1), skip_nonfinite=3)
    assert len(traces) == 3


def test_optimisers_that_want_the_loss_or_gather_gradients_are_served():
    def loss(w, batch, key, step):
        return (w - 1.0) ** 2, {}

    search = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=4))
    for optim in (search, optax.polyak_sgd()):
        assert abs(float(run(jnp.zeros(()), loss=loss, optim=optim, steps=20).model) - 1.0) < 1e-2
    assert run(optim=optax.MultiSteps(optax.sgd(1e-2), 2)).num_steps == 12
    assert run(optim=optax.add_noise(0.1, 0.5, jr.key(0))).num_steps == 12


def test_an_optimiser_may_not_change_the_kind_of_its_state():
    def changing(first):
        def update(updates, state, params=None):
            return updates, state + jnp.float32(0.5)

        return optax.GradientTransformation(lambda params: jnp.zeros((), first), update)

    traces = []

    def loss(w, batch, key, step):
        traces.append(1)
        return w**2, {}

    with pytest.raises(TypeError, match="began as int32 and became float32"):
        run(jnp.ones(()), loss=loss, optim=changing(jnp.int32))
    traces.clear()
    found = run(jnp.ones(()), loss=loss, optim=changing(jnp.float16), data=Full(8))
    assert found.num_steps == 12
    assert len(traces) == 1


# ------------------------------------------------------------------------------------------------ validation


def test_the_best_model_by_validation_is_returned():
    data, check = Rows(), Rows(11, seed=1)
    kept = []

    def diverge(event):
        kept.append(event.model)

    schedule = lambda count: jnp.where(count < 6, 1e-1, -3e-1)  # after six steps it climbs
    found = run(
        data=data,
        validation=check,
        validate_every=1,
        optim=optax.sgd(schedule),
        callbacks=[diverge],
        steps=10,
    )
    scores = found.history["validation_loss"]
    assert len(scores) == 10
    assert found.best_step == int(np.argmin(scores)) < 9
    assert equal(found.model, kept[found.best_step])
    assert found.history["validation_step"].tolist() == list(range(10))


def test_a_validation_score_is_the_weighted_mean_over_all_rows():
    check = Rows(11, seed=1)

    def loss(model, batch, key, step):
        error = (jax.vmap(model)(batch.x) - batch.y) ** 2
        return jnp.sum(error * batch.weight) / jnp.sum(batch.weight), {"one": jnp.ones(())}

    class Weighted(Rows):
        def batches(self, size, key):
            for batch in super().batches(size, key):
                yield batch._replace(weight=np.where(batch.ids % 2, 0.0, 1.0 + batch.ids).astype(np.float32))

    weighted = Weighted(11, seed=1)
    for data, weight in (
        (check, np.ones(11)),
        (weighted, np.where(np.arange(11) % 2, 0.0, 1.0 + np.arange(11))),
    ):
        found = run(loss=loss, validation=data, steps=3)
        last = run(loss=loss, steps=3).model
        error = (np.asarray(jax.vmap(last)(check.x)) - check.y) ** 2
        np.testing.assert_allclose(found.history["validation_loss"], [np.average(error, weights=weight)], rtol=1e-5)
        np.testing.assert_allclose(found.history["validation_one"], [1.0], rtol=1e-6)


def test_validation_is_once_an_epoch_and_after_the_last_step():
    found = run(validation=Rows(5, seed=1), steps=8)  # three batches an epoch
    assert found.history["validation_step"].tolist() == [2, 5, 7]
    assert run(validation=Rows(5, seed=1), steps=6).history["validation_step"].tolist() == [2, 5]


def test_evaluations_share_their_keys_and_the_weights_of_one_step():
    def loss(w, batch, key, step):
        return w * 0.0 + step + jr.normal(key), {"draw": jr.normal(key)}

    found = run(jnp.zeros(()), loss=loss, validation=Rows(5), validate_every=2, validate_at=7, steps=8)
    for name in ("validation_loss", "validation_draw"):
        assert len(set(found.history[name].tolist())) == 1
    assert abs(found.history["validation_loss"][0] - found.history["validation_draw"][0] - 7) < 1e-5
    assert len(set(found.history["draw"].tolist())) == 8


@pytest.mark.parametrize("steps", [3, 8])
def test_schedules_have_ended_where_validation_looks(steps):
    weight = optax.linear_schedule(0.0, 3.0, 1000)

    def loss(w, batch, key, step):
        return weight(step) * (1.0 + 0.0 * w), {}

    found = run(jnp.zeros(()), loss=loss, validation=Rows(5), steps=steps)
    np.testing.assert_allclose(found.history["validation_loss"], 3.0, rtol=1e-6)


def test_running_statistics_are_refused_by_name_and_may_be_closed_over():
    layers = eqx.nn.make_with_state(lambda key: eqx.nn.BatchNorm(3, "batch", mode="batch"))
    model, state = layers(jr.key(0))
    with pytest.raises(ValueError, match=r"an equinox.nn.State \(at \[1\]\).*LayerNorm"):
        run((model, state), loss=lambda m, batch, key, step: (jnp.sum(m[0].weight), {}))

    def loss(model, batch, key, step):
        normalise = jax.vmap(eqx.nn.inference_mode(model), axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        return jnp.mean((normalise(batch.x, state)[0] - 1.0) ** 2), {}

    found = run(model, loss=loss, steps=3)
    assert np.isfinite(found.history["loss"]).all()


def test_dropout_is_off_in_validation():
    layers = eqx.nn.Sequential([eqx.nn.Linear(3, 1, key=jr.key(0)), eqx.nn.Dropout(0.5)])

    def loss(model, batch, key, step):
        out = jax.vmap(lambda x: model(x, key=key))(batch.x)
        return jnp.mean(out**2), {"zero": jnp.mean(out == 0.0)}

    found = run(layers, loss=loss, validation=Rows(40, seed=1), steps=8, batch_size=1)
    assert found.history["zero"].max() == 1.0
    assert found.history["validation_zero"].max() == 0.0
    assert found.model.layers[1].inference is False


def test_patience_stops_after_evaluations_without_improvement():
    def loss(w, batch, key, step):
        return (w - 1.0) ** 2, {}

    # Every step overshoots by more: the first evaluation stays the best.
    found = run(
        jnp.zeros(()),
        loss=loss,
        optim=optax.sgd(1.5),
        validation=Rows(5),
        validate_every=2,
        patience=3,
        steps=50,
    )
    assert found.num_steps == 8
    assert found.best_step == 1
    assert "3 evaluations" in repr(found)
    assert bool(found.result == RESULTS.successful)


# --------------------------------------------------------------------------------------- callbacks and faults


@pytest.mark.parametrize("answer", [np.True_, np.array(True), jnp.array(True), 1, np.int32(1)], ids=repr)
def test_any_truth_value_of_a_callback_stops(answer):
    found = run(steps=5, callbacks=[lambda event: answer])
    assert len(found.history["loss"]) == 1
    assert "asked to stop" in found.message


@pytest.mark.parametrize("answer", [None, False, np.False_, jnp.array(False), 0], ids=repr)
def test_any_other_truth_value_goes_on(answer):
    assert len(run(steps=3, callbacks=[lambda event: answer]).history["loss"]) == 3


@pytest.mark.parametrize("answer", ["no", 2, 0.3, np.ones(2, bool), jnp.array(0.0), [], {}], ids=repr)
def test_an_answer_that_is_no_truth_value_is_refused(answer):
    with pytest.raises(TypeError, match="return True to stop"):
        run(steps=3, callbacks=[lambda event: answer])


def test_callbacks_see_every_step_and_can_stop():
    seen = []

    def watch(event):
        seen.append((event.step, event.loss, event.metrics["bias"], event.model))
        assert isinstance(event.loss, float)
        with pytest.raises(dataclasses.FrozenInstanceError):
            event.step = 3

    def enough(event):
        return event.step == 4

    found = run(callbacks=[watch, enough])
    assert [s[0] for s in seen] == list(range(5))
    np.testing.assert_array_equal([s[1] for s in seen], found.history["loss"])
    assert equal(seen[-1][3], found.model)
    assert not equal(seen[0][3], found.model)
    assert "enough asked to stop" in repr(found)


def test_the_model_of_an_event_is_read_within_its_callback():
    events = []
    run(callbacks=[events.append], steps=3)
    with pytest.raises(RuntimeError, match="step 0 was read after"):
        _ = events[0].model


def bad_at(bad):
    def loss(model, batch, key, step):
        value, metrics = squares(model, batch, key, step)
        return jnp.where(jnp.isin(step, jnp.asarray(bad)), jnp.nan, value), metrics

    return loss


@pytest.fixture(params=["read at once", "read late"])
def lag(request, monkeypatch):
    """Losses that are read as late as may be show what the steps after a failure do."""
    if request.param == "read late":
        monkeypatch.setattr(_loop, "_is_ready", lambda report: False)


@pytest.mark.usefixtures("lag")
@pytest.mark.parametrize("watched", [False, True])
def test_a_nonfinite_loss_stops_and_keeps_the_parameters_before_it(watched):
    calls = []
    with pytest.warns(SdeflowWarning, match=r"step 6 \(epoch 2, batch 0, ids \[") as caught:
        found = run(loss=bad_at([6]), steps=500, callbacks=[calls.append] if watched else [])
    assert len(caught) == 1
    assert bool(found.result == RESULTS.nonfinite_loss)
    assert found.num_steps == 6
    assert len(found.history["loss"]) == 7
    assert np.isnan(found.history["loss"][-1])
    assert equal(found.model, run(steps=6).model)
    assert len(calls) == (6 if watched else 0)
    expected = Rows().order(jr.fold_in(jr.fold_in(jr.key(7), 1), 2))[:8]
    np.testing.assert_array_equal(found.failure["ids"], expected)
    assert (found.failure["step"], found.failure["epoch"], found.failure["position"]) == (6, 2, 0)


@pytest.mark.usefixtures("lag")
def test_a_nonfinite_loss_stops_within_a_bounded_number_of_steps():
    drawn = []

    class Counting(Full):
        def batches(self, size, key):
            for batch in super().batches(size, key):
                drawn.append(1)
                yield batch

    with pytest.warns(SdeflowWarning):
        run(data=Counting(40), loss=bad_at([3]), steps=10_000)
    assert len(drawn) <= 3 + 1 + 33


@pytest.mark.parametrize("where", ["gradient", "update"])
def test_a_finite_loss_with_a_nonfinite_gradient_or_update_stops_too(where):
    def loss(w, batch, key, step):
        root = jnp.sqrt(jnp.where(step == 3, 0.0, 1.0) * jnp.abs(w))  # an infinite slope at step 3
        return (root if where == "gradient" else w) + 0.0, {}

    rate = optax.sgd(lambda count: jnp.where(count == 3, jnp.inf, 1e-3)) if where == "update" else optax.sgd(1e-3)
    with pytest.warns(SdeflowWarning, match="step 3"):
        found = run(jnp.ones(()), loss=loss, optim=rate)
    assert np.isfinite(found.history["loss"]).all()
    assert bool(jnp.isfinite(found.model))
    assert found.num_steps == 3


@pytest.mark.usefixtures("lag")
def test_nonfinite_steps_can_be_skipped_up_to_a_number_in_a_row():
    found = run(loss=bad_at([2, 3, 6]), skip_nonfinite=2)
    assert bool(found.result == RESULTS.successful)
    assert np.flatnonzero(np.isnan(found.history["loss"])).tolist() == [2, 3, 6]
    with pytest.warns(SdeflowWarning, match="step 4"):
        stopped = run(loss=bad_at([2, 3, 4]), skip_nonfinite=2)
    assert equal(stopped.model, run(steps=2).model)
    assert len(stopped.history["loss"]) == 5


def test_a_keyboard_interrupt_returns_what_there_is():
    def press(event):
        if event.step == 4:
            raise KeyboardInterrupt

    found = run(callbacks=[press])
    assert bool(found.result == RESULTS.interrupted)
    assert found.num_steps == 5
    assert equal(found.model, run(steps=5).model)
    assert "interrupted after 5 of 12 steps" in repr(found)


def test_a_signal_is_held_back_to_the_end_of_the_step():
    before = signal.getsignal(signal.SIGINT)

    class Pressing(Rows):
        def batches(self, size, key):
            for index, batch in enumerate(super().batches(size, key)):
                if index == 1:
                    signal.raise_signal(signal.SIGINT)
                yield batch

    found = run(data=Pressing())
    assert bool(found.result == RESULTS.interrupted)
    assert found.num_steps == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_signal_acts_at_once():
    class Pressing(Rows):
        def batches(self, size, key):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("not reached")
            yield

    found = run(data=Pressing())
    assert bool(found.result == RESULTS.interrupted)
    assert found.num_steps == 0


def test_failed_solves_are_reported():
    def loss(model, batch, key, step):
        value, _ = squares(model, batch, key, step)
        return value, {"failed": jnp.where(step == 2, 0.25, 0.0)}

    with pytest.warns(SdeflowWarning, match="In 1 of 12 steps a solve failed .* first at step 2"):
        run(loss=loss)


# -------------------------------------------------------------------------------------------------- refusals


class Empty:
    def batches(self, size, key):
        return iter(())


class Nothing:
    def batches(self, size, key):
        yield "text"


REFUSED = {
    "optim": ({"optim": 1e-3}, TypeError, "optim=float"),
    "optim class": ({"optim": optax.adam}, TypeError, "optax.adam"),
    "steps": ({"steps": 1.5}, TypeError, "steps=1.5"),
    "negative steps": ({"steps": -1}, ValueError, "steps=-1"),
    "batch size": ({"batch_size": 0}, ValueError, "batch_size=0"),
    "patience": ({"validation": Rows(), "patience": 0}, ValueError, "patience=0"),
    "no validation": ({"patience": 3}, ValueError, "without validation"),
    "key": ({"key": 0}, TypeError, "jax.random.key"),
    "keys": ({"key": jr.split(jr.key(0))}, TypeError, r"\(2,\) PRNG keys"),
    "callbacks": ({"callbacks": [3]}, TypeError, "callbacks"),
    "callback": ({"callbacks": print}, TypeError, "list of callables"),
    "data": ({"data": np.ones((3, 2))}, TypeError, r"data=float64\[3, 2\]"),
    "validation": ({"validation": 3}, TypeError, "validation=int"),
    "loss": ({"loss": 3}, TypeError, "loss=int"),
    "empty data": ({"data": Empty()}, ValueError, "no batch in epoch 0"),
    "empty validation": ({"validation": Empty()}, ValueError, "0 batches of total weight"),
    "no arrays": ({"data": Nothing()}, TypeError, "without numeric arrays"),
    "integer model": ({"model": {"n": jnp.arange(3)}}, ValueError, r"\['n'\]: int32\[3\]"),
    "empty model": ({"model": jnp.tanh}, ValueError, "no floating-point array"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused_with_a_sentence(case):
    kwargs, error, match = REFUSED[case]
    kwargs = dict(kwargs)
    given = {"optim": optax.sgd(1e-2), "steps": 2, "batch_size": 4, "key": jr.key(0), "progress": False}
    given |= {k: v for k, v in kwargs.items() if k not in ("model", "data", "loss")}
    with pytest.raises(error, match=match):
        fit(kwargs.get("model", mlp()), kwargs.get("data", Rows()), kwargs.get("loss", squares), **given)


def test_nan_parameters_are_named():
    model = eqx.tree_at(lambda m: m.layers[1].bias, mlp(), jnp.full((), jnp.nan), is_leaf=lambda x: x is None)
    with pytest.raises(ValueError, match=r"NaN in the parameters \.layers\[1\]\.bias;"):
        run(model)


def bad_loss(returned):
    def wrong_loss(model, batch, key, step):
        return returned(squares(model, batch, key, step)[0])

    return wrong_loss


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda v: (v[None], {}), r"shape \(1,\)"),
        (lambda v: (v.astype(int), {}), "int32"),
        (lambda v: (v + 1j, {}), "complex64"),
        (lambda v: (None, {}), "NoneType"),
        (lambda v: v, "pair"),
        (lambda v: (v, {"m": jnp.ones(2)}), r"metric 'm': an array of shape \(2,\)"),
    ],
)
def test_what_a_loss_returns_is_checked_and_the_loss_named(returned, said):
    with pytest.raises(TypeError, match=f"wrong_loss returned.*{said}"):
        run(loss=bad_loss(returned))


@pytest.mark.parametrize("name", ["loss", "step", "validation_loss"])
def test_a_metric_with_a_reserved_name_is_refused(name):
    with pytest.raises(ValueError, match=f"{name!r}; that name is taken"):
        run(loss=lambda m, b, k, s: (squares(m, b, k, s)[0], {name: jnp.ones(())}))


def test_metrics_that_change_between_batches_are_refused():
    def loss(model, batch, key, step):
        value, metrics = squares(model, batch, key, step)
        return value, metrics if len(batch.x) == 8 else {}

    with pytest.raises(ValueError, match=r"metrics \[\] at step 2 but \['bias'\] before"):
        run(loss=loss)


def test_an_unhashable_loss_object_will_do():
    @dataclasses.dataclass
    class Scaled:
        scale: float

        def __call__(self, model, batch, key, step):
            value, metrics = squares(model, batch, key, step)
            return self.scale * value, metrics

    found = run(loss=Scaled(2.0), steps=1)
    np.testing.assert_allclose(found.history["loss"], 2 * run(steps=1).history["loss"], rtol=1e-6)
    with pytest.raises(TypeError, match="Scaled returned"):
        run(loss=dataclasses.make_dataclass("Scaled", [], namespace={"__call__": lambda *a: 3})())


def test_zero_steps_give_the_model_back():
    model = mlp()
    found = run(model, steps=0)
    assert equal(found.model, model)
    assert len(found.history["loss"]) == 0
    assert "0 of 0 steps" in repr(found)


def test_progress_is_on_stderr_and_silent_when_asked(capsys):
    run()
    assert capsys.readouterr() == ("", "")
    run(progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "12/12" in err


def test_lines_are_written_where_tqdm_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
    found = run(progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"step 12 of 12, loss {found.history['loss'][-1]:.4g}\n"


def test_the_repr_says_how_it_ended():
    text = repr(run(validation=Rows(5, seed=1)))
    assert text.startswith("FitResult(\n  successful: 12 of 12 steps.\n  loss ")
    assert "validation loss" in text
    assert "best" in text


def test_two_fits_at_once_do_not_meddle():
    import concurrent.futures

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda seed: run(key=jr.key(seed)), [1, 2])
    assert equal(one.model, run(key=jr.key(1)).model)
    assert equal(two.model, run(key=jr.key(2)).model)


def test_batches_that_are_on_devices_stay_there():
    batch = next(iter(Rows().batches(8, jr.key(0))))

    class OnDevice:
        def batches(self, size, key):
            yield Batch(*(jax.device_put(leaf) for leaf in batch))

    class OnHost:
        def batches(self, size, key):
            yield batch

    assert equal(run(data=OnDevice()).model, run(data=OnHost()).model)


# ------------------------------------------------------------------------------------ complex numbers, validation


def test_complex_parameters_go_downhill():
    target = lambda w, batch, key, step: (jnp.sum(jnp.abs(w - jnp.array([1 + 1j, -2j])) ** 2), {})
    found = run(model=jnp.zeros(2, jnp.complex64), loss=target, optim=optax.sgd(0.1), steps=60)
    np.testing.assert_allclose(found.model, [1 + 1j, -2j], atol=1e-4)
    # The value function of a line search sees the same numbers.
    found = run(model=jnp.zeros(2, jnp.complex64), loss=target, optim=optax.adam(0.1), steps=300)
    np.testing.assert_allclose(found.model, [1 + 1j, -2j], atol=1e-2)


class Given:
    """Batches as they are given."""

    def __init__(self, *batches):
        self.given = batches

    def batches(self, size, key):
        return iter(self.given)


def _mean(model, batch, key, step):
    return jnp.mean(batch["x"]) + 0 * jnp.sum(model), {}


@pytest.mark.parametrize("name", ["a_grid", "zgrid"])
def test_validation_batches_are_weighted_by_their_rows(name):
    grid = np.linspace(0, 1, 100)
    rows = lambda count, value: {name: grid, "x": np.full((count, 1), value, np.float32)}
    data = Given(rows(30, 1.0), rows(2, 31.0))
    found = run(model=jnp.ones(3), data=data, loss=_mean, steps=2, validation=data)
    np.testing.assert_allclose(found.history["validation_loss"], (30 * 1 + 2 * 31) / 32)
    data = Given(rows(2, 1.0), rows(2, 31.0))
    found = run(model=jnp.ones(3), data=data, loss=_mean, steps=2, validation=data)
    np.testing.assert_allclose(found.history["validation_loss"], 16.0)


def test_a_number_of_rows_that_cannot_be_told_is_refused():
    ragged = lambda n, m: {"x": np.ones((n, 1), np.float32), "y": np.ones((m, 1), np.float32)}
    with pytest.raises(ValueError, match="give it a `weight`"):
        run(
            model=jnp.ones(3),
            loss=_mean,
            data=Given(ragged(2, 2)),
            steps=2,
            validation=Given(ragged(2, 3), ragged(3, 2)),
        )


def test_a_validation_loss_that_is_not_finite_is_named_and_no_reason_to_stop():
    validation = Full(16, seed=3)
    validation.x[5] = np.nan
    with pytest.warns(SdeflowWarning, match="not finite in batch"):
        found = run(model=mlp(), validation=validation, steps=12, patience=2, validate_every=2)
    assert len(found.history["loss"]) == 12
    assert found.result == RESULTS.nonfinite_validation
    assert "no finite validation loss" in repr(found)
    assert found.best_step is None


class Named(eqx.Module):
    inference: eqx.nn.Linear
    drop: eqx.nn.Dropout

    def __call__(self, x):
        return jnp.sum(self.drop(self.inference(x), key=jr.key(0)))


def test_a_layer_called_inference_is_no_switch():
    model = Named(eqx.nn.Linear(3, 2, key=jr.key(0)), eqx.nn.Dropout(0.5))
    found = run(model=model, validation=Full(8), steps=3)
    whole = eqx.tree_at(lambda m: m.drop.inference, found.model, True)
    key = jr.fold_in(jr.key(7), 2)
    (batch,) = Full(8).batches(8, key)
    score, _ = squares(whole, batch, jr.fold_in(key, 0), 2)
    np.testing.assert_allclose(found.history["validation_loss"][-1], score, rtol=1e-5)
