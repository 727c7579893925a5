"""What must not matter to a model of series: padding, the order of a batch, units of time, channels without data."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sdeflow.data import TimeSeries
from sdeflow.models import NeuralLangevinSDE, SeriesModel

KEY = jr.key(11)
COUNT, CHANNELS, LONGEST = 5, 3, 7
few = settings(deadline=None, max_examples=25)


def model_of(channels=CHANNELS):
    dynamics = NeuralLangevinSDE(4, control_size=channels, width=8, key=jr.key(0))
    return SeriesModel(dynamics, channels=channels, num_outputs=2, key=jr.key(1))


MODEL = model_of()


def arrays(seed, missing=0.4):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, LONGEST, size=COUNT, endpoint=True)
    times = [np.cumsum(rng.uniform(0.1, 1.0, size=n)) for n in lengths]
    values = [np.where(rng.random((n, CHANNELS)) < missing, np.nan, rng.normal(size=(n, CHANNELS))) for n in lengths]
    for x in values:
        x[0, 0] = 1.0
    return times, values


def batch_of(times, values, length=LONGEST, **options):
    data = TimeSeries.from_arrays(times, values, **options)
    return data.batch(np.arange(len(data)), length=length)


@eqx.filter_jit
def run(model, batch):
    """Outputs (B, K), and gradients of one number, as one list of arrays."""

    def loss(model):
        outputs = model(batch, key=KEY).outputs
        return jnp.sum(jnp.sin(outputs) * jnp.asarray(batch.weight)[:, None]), outputs

    (_, outputs), gradient = eqx.filter_value_and_grad(loss, has_aux=True)(model)
    return outputs, gradient


def assert_same_bits(one, two):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two)):
        np.testing.assert_array_equal(a, b)


@few
@given(seed=st.integers(0, 999), extra=st.sampled_from([1, 6, 30]))
def test_padding_changes_no_bit_of_outputs_and_gradients(seed, extra):
    times, values = arrays(seed)
    short, long = (run(MODEL, batch_of(times, values, n)) for n in (LONGEST, LONGEST + extra))
    assert np.isfinite(short[0]).all()
    assert_same_bits(short, long)


@few
@given(seed=st.integers(0, 999), order=st.permutations(range(COUNT)))
def test_the_order_of_a_batch_is_the_order_of_its_outputs(seed, order):
    batch = batch_of(*arrays(seed))
    order = np.array(order)
    moved = jax.tree.map(lambda x: x[order], batch)
    (one, by_weights), (two, by_weights_moved) = run(MODEL, batch), run(MODEL, moved)
    np.testing.assert_array_equal(two, np.asarray(one)[order])
    # Sums over the batch are taken in another order.
    for a, b in zip(jax.tree.leaves(by_weights), jax.tree.leaves(by_weights_moved)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


@few
@given(seed=st.integers(0, 999), row=st.integers(0, COUNT - 1))
def test_what_the_other_series_are_changes_no_bit(seed, row):
    batch, other = batch_of(*arrays(seed)), batch_of(*arrays(seed + 1))
    mixed = jax.tree.map(lambda x, y: np.concatenate([y[:row], x[row : row + 1], y[row + 1 :]]), batch, other)
    np.testing.assert_array_equal(run(MODEL, mixed)[0][row], run(MODEL, batch)[0][row])


@few
@given(
    seed=st.integers(0, 999),
    power=st.integers(-20, 20),
    shift=st.integers(-1000, 1000),
    align=st.sampled_from(["global", "start"]),
)
def test_units_of_time_and_its_origin_are_no_matter(seed, power, shift, align):
    times, values = arrays(seed)
    # Multiples of 2^-16, so that the moved times are exact, and equal bits can be asked for.
    times = [np.round(t * 2**16) / 2**16 for t in times]
    moved = [2.0**power * (t + shift) for t in times]
    one, two = (batch_of(t, values, align=align) for t in (times, moved))
    assert_same_bits(one, two)
    assert_same_bits(run(MODEL, one)[0], run(MODEL, two)[0])


@few
@given(seed=st.integers(0, 999), scale=st.floats(1e-3, 1e3), shift=st.floats(-1e3, 1e3))
def test_any_affine_map_of_time_moves_outputs_by_rounding_alone(seed, scale, shift):
    times, values = arrays(seed)
    one, two = (batch_of(t, values) for t in (times, [scale * t + shift for t in times]))
    np.testing.assert_allclose(one.times, two.times, atol=2e-7)
    np.testing.assert_allclose(run(MODEL, one)[0], run(MODEL, two)[0], rtol=1e-3, atol=1e-3)


@few
@given(seed=st.integers(0, 999), fill=st.floats(-100, 100, width=32))
def test_a_channel_without_data_has_no_say(seed, fill):
    """Whatever the weights that read it: outputs are the same to the last bit, and their gradient is 0."""
    times, values = arrays(seed)
    for x in values:
        x[:, 1] = np.nan
    batch = batch_of(times, values)
    readers = lambda m: (m.encoder.weight, m.dynamics.gamma.embed.weight)
    other = eqx.tree_at(readers, MODEL, replace_fn=lambda w: w.at[:, 1].set(fill))
    (one, by_weights), (two, _) = run(MODEL, batch), run(other, batch)
    np.testing.assert_array_equal(one, two)
    for gradient in readers(by_weights):
        np.testing.assert_array_equal(gradient[:, 1], 0)
        assert np.isfinite(gradient).all()


@few
@given(seed=st.integers(0, 999))
def test_a_channel_without_data_changes_no_other_in_the_data(seed):
    times, values = arrays(seed)
    wider = [np.insert(x, 1, np.nan, axis=1) for x in values]
    others = [0, 2, 3]
    one, two = TimeSeries.from_arrays(times, values), TimeSeries.from_arrays(times, wider)
    pairs = [
        (one, two),
        (one.standardise(), two.standardise()),
        *((x.drop_observations(0.5, key=KEY, per="step"), y.drop_observations(0.5, key=KEY, per="step"))
          for x, y in [(one, two)]),
    ]  # fmt: skip
    for a, b in pairs:
        for x, y in zip(a.values, b.values):
            np.testing.assert_array_equal(y[:, others], x)
            assert np.isnan(y[:, 1]).all()
    counted = zip(one.with_intensity().values, two.with_intensity().values)
    for x, y in counted:
        np.testing.assert_array_equal(y[:, [4, 6, 7]], x[:, 3:])
        np.testing.assert_array_equal(y[:, 5], 0)


# ---- Every mode that jax has to find mistakes, and both precisions. ----

MODES = {
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "no rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "debug nans": lambda: jax.debug_nans(True),
    "debug infs": lambda: jax.debug_infs(True),
    "leaks": lambda: jax.checking_leaks(),
    "x64": lambda: jax.enable_x64(True),
}


@pytest.mark.parametrize(
    "mode",
    [pytest.param(m, marks=[pytest.mark.slow] * (m in ("no rank promotion", "debug infs", "leaks"))) for m in MODES],
)
def test_values_and_gradients_are_the_same_in_every_mode(mode):
    batch = batch_of(*arrays(3), length=LONGEST + 2)
    outputs, gradient = run(MODEL, batch)
    with MODES[mode]():
        found, by_weights = eqx.filter_jit(run.__wrapped__)(MODEL, batch)
    np.testing.assert_allclose(found, outputs, rtol=1e-4, atol=1e-5)
    for a, b in zip(jax.tree.leaves(by_weights), jax.tree.leaves(gradient)):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
