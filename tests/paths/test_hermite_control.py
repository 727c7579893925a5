"""Cubics with backward differences against a loop by hand, diffrax's, and what they promise: C1, causal at knots."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sdeflow as sf
from sdeflow.paths import hermite_control, linear_control

pytestmark = pytest.mark.usefixtures("x64_module")

LENGTH, CHANNELS = 9, 3
NAN = np.nan


def by_hand(times, values, t):
    """Value and slope of one channel at a time, from the formula of each piece; NaN filled by straight lines."""
    seen = ~np.isnan(values)
    x = np.interp(times, times[seen], values[seen]) if seen.any() else np.zeros_like(values)
    for i in range(len(times) - 1):
        h = times[i + 1] - times[i]
        slope = (x[i + 1] - x[i]) / h
        before = slope if i == 0 else (x[i] - x[i - 1]) / (times[i] - times[i - 1])
        if t <= times[i + 1]:
            break
    u = t - times[i]
    a, b, c, d = x[i], before, 2 * (slope - before) / h, (before - slope) / h**2
    return a + b * u + c * u**2 + d * u**3, b + 2 * c * u + 3 * d * u**2


def series(seed, missing=0.0, length=LENGTH):
    rng = np.random.default_rng(seed)
    times = np.cumsum(0.05 + rng.random(length))
    values = rng.normal(size=(length, CHANNELS))
    values[rng.random(values.shape) < missing] = NAN
    return times, values


@eqx.filter_jit
def read(times, values, queries):
    path = hermite_control(times, values)
    return jax.vmap(path.evaluate)(queries), jax.vmap(path.derivative)(queries)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10_000),
    missing=st.sampled_from([0.0, 0.4, 0.8]),
    fractions=st.lists(st.floats(0, 1), min_size=5, max_size=5),
)
def test_equals_the_formula_in_a_loop(seed, missing, fractions):
    times, values = series(seed, missing)
    queries = times[0] + np.array(fractions) * (times[-1] - times[0])
    for found, part in zip(read(times, values, queries), (0, 1)):
        expected = [[by_hand(times, x, t)[part] for x in values.T] for t in queries]
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_equals_diffrax_where_nothing_is_missing():
    times, values = series(1)
    path = hermite_control(times, values)
    theirs = diffrax.CubicInterpolation(times, diffrax.backward_hermite_coefficients(times, values))
    for t in np.append(np.linspace(times[0], times[-1], 31), times):
        np.testing.assert_allclose(path.evaluate(t), theirs.evaluate(t), rtol=1e-11, atol=1e-11)
        np.testing.assert_allclose(path.derivative(t), theirs.derivative(t), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(path.evaluate(times[1], times[4]), theirs.evaluate(times[1], times[4]), rtol=1e-11)


def test_two_knots_make_a_straight_line():
    times, values = series(2, length=2)
    line, path = linear_control(times, values), hermite_control(times, values)
    for t in np.linspace(*times, 7):
        np.testing.assert_allclose(path.evaluate(t), line.evaluate(t), rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(path.derivative(t), line.derivative(t), rtol=1e-12)


# Gaps: filled by straight lines first, as torchcde does and diffrax does not.

TIMES = np.array([0.0, 1.0, 1.5, 3.0])


def at(values, t):
    return float(hermite_control(TIMES, np.array(values)[:, None]).evaluate(t)[0])


def test_a_gap_inside_is_filled_by_a_straight_line():
    values = np.array([1.0, NAN, 0.0, 4.0])
    assert at(values, 1.0) == pytest.approx(1 / 3, abs=1e-15)
    theirs = diffrax.CubicInterpolation(TIMES, diffrax.backward_hermite_coefficients(TIMES, values))
    # Both go through the gap in a straight line if it is the first piece, and differ in a later one.
    assert float(theirs.evaluate(1.25)) == pytest.approx(at(values, 1.25), abs=1e-15)
    later = np.array([1.0, 0.0, NAN, 4.0])
    theirs = diffrax.CubicInterpolation(TIMES, diffrax.backward_hermite_coefficients(TIMES, later))
    assert at(later, 1.5) == pytest.approx(1.0, abs=1e-15)
    assert abs(float(theirs.evaluate(1.5)) - 1.0) > 0.1


def test_a_gap_at_the_start_is_held():
    path = hermite_control(TIMES, np.array([[NAN], [2.0], [0.0], [4.0]]))
    np.testing.assert_array_equal(path.knots[:, 0], [2.0, 2.0, 0.0, 4.0])
    assert path.evaluate(0.5).tolist() == [2.0]
    assert path.derivative(1.0).tolist() == [0.0]


def test_a_gap_at_the_end_swings_back_within_one_step_and_holds():
    times = np.append(TIMES, 4.0)
    values = np.array([[1.0], [2.0], [0.0], [NAN], [NAN]])
    path = hermite_control(times, values)
    b, c, d = -4.0, 16 / 3, -16 / 9  # as diffrax has it with fill_forward_nans_at_end
    for u in (0.3, 0.75, 1.2):
        np.testing.assert_allclose(path.evaluate(1.5 + u), [b * u + c * u**2 + d * u**3], rtol=1e-12)
    for t in (3.0, 3.5, 4.0):
        assert path.evaluate(t).tolist() == [0.0]
        assert path.derivative(t).tolist() == [0.0]


def test_a_channel_without_observations_is_zero_and_finite():
    path = hermite_control(TIMES, np.full((4, 1), NAN))
    assert path.evaluate(0.7).tolist() == path.derivative(0.7).tolist() == [0.0]


# What it promises.


def test_value_and_slope_are_continuous_and_the_slope_is_the_derivative():
    times, values = series(3, missing=0.3)
    path = hermite_control(times, values)
    for t in times[1:-1]:
        low, high = np.nextafter(t, 0), np.nextafter(t, 10)
        np.testing.assert_allclose(path.evaluate(low), path.evaluate(high), atol=1e-12)
        np.testing.assert_allclose(path.derivative(low), path.derivative(high), atol=1e-11)
        np.testing.assert_array_equal(path.derivative(t), path.derivative(t, left=False))
    for t in np.append(np.linspace(times[0], times[-1], 13), times):
        slope = jax.jvp(path.evaluate, (t,), (1.0,))[1]
        np.testing.assert_allclose(path.derivative(t), slope, rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 999), row=st.integers(1, LENGTH - 2))
def test_up_to_a_knot_what_comes_after_it_is_not_seen(seed, row):
    times, values = series(seed)
    other = values.copy()
    other[row + 1 :] += 1.0
    # Of one length for all rows, so that there is one program.
    queries = np.append(times[np.minimum(np.arange(LENGTH), row)], np.linspace(times[0], times[row], 5))
    after = times[np.maximum(np.arange(LENGTH + 5) % LENGTH, row + 1)]
    for one, two in zip(read(times, values, queries), read(times, other, queries)):
        np.testing.assert_allclose(one, two, rtol=1e-12, atol=1e-12)
    later = [read(times, x, after)[0] for x in (values, other)]
    assert np.abs(later[0] - later[1]).min() > 0.9


def test_equations_driven_by_it_end_where_it_ends():
    """dz = X'(t) dt: Tsit5 is exact on each cubic; dz = dX sees increments alone."""
    times, values = series(4)
    path = hermite_control(times, values)
    ode = sf.ODE(lambda t, y, path: path.derivative(t))
    final = sf.solve(ode, path.knots[0], times, args=path, solver=diffrax.Tsit5(), steps_per_interval=1).final
    np.testing.assert_allclose(final, path.knots[-1], rtol=1e-12, atol=1e-12)
    change = diffrax.diffeqsolve(
        diffrax.ControlTerm(lambda t, y, args: jnp.eye(CHANNELS), path), diffrax.Heun(), times[0], times[-1], None,
        jnp.zeros(CHANNELS), stepsize_controller=diffrax.StepTo(times),
    ).ys[-1]  # fmt: skip
    np.testing.assert_allclose(change, values[-1] - values[0], rtol=1e-12, atol=1e-12)


def test_single_precision_is_as_good_as_its_numbers():
    times, values = series(5)
    times32, values32 = times.astype(np.float32), values.astype(np.float32)
    queries = np.linspace(times32[0], times32[-1], 41, dtype=np.float32)
    found = read(times32, values32, queries)
    expected = read(times32.astype(np.float64), values32.astype(np.float64), queries.astype(np.float64))
    assert found[0].dtype == np.float32
    np.testing.assert_allclose(found[0], expected[0], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4, atol=1e-4)
