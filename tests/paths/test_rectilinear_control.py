"""Values held until the next one: causal everywhere, against a loop by hand and diffrax's rectilinear path."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sdeflow as sf
from sdeflow.paths import rectilinear_control

LENGTH, CHANNELS = 7, 3
NAN = np.nan
TIMES = np.array([0.0, 1.0, 1.5, 3.0])


def series(seed, missing=0.4):
    rng = np.random.default_rng(seed)
    times = np.cumsum(0.05 + rng.random(LENGTH)).astype(np.float32)
    values = rng.normal(size=(LENGTH, CHANNELS)).astype(np.float32)
    values[rng.random(values.shape) < missing] = NAN
    return times, values


def by_hand(times, values, t, before=0.0):
    """The last observed value of one channel at or before a time."""
    found = before
    for s, x in zip(times, values):
        if s <= t and not np.isnan(x):
            found = x
    return found


@eqx.filter_jit
def read(times, values, queries, left=False):
    return jax.vmap(lambda t: rectilinear_control(times, values).evaluate(t, left=left))(queries)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), fractions=st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4))
def test_equals_a_loop_over_the_observations(seed, fractions):
    times, values = series(seed)
    queries = np.append(times, times[0] + np.array(fractions, np.float32) * (times[-1] - times[0]))
    queries = np.clip(queries, times[0], times[-1])
    expected = [[by_hand(times, x, t) for x in values.T] for t in queries]
    np.testing.assert_array_equal(read(times, values, queries), np.array(expected, np.float32))


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), s=st.floats(0, 1, width=32), t=st.floats(0, 1, width=32))
def test_what_is_observed_later_is_never_seen(seed, s, t):
    """Between observations and at them; values that appear, change or vanish."""
    times, values = series(seed)
    _, other = series(seed + 1)
    low, high = (times[0] + np.float32(x) * (times[-1] - times[0]) for x in sorted((s, t)))
    changed = np.where((times > high)[:, None], other, values)
    queries = np.array([times[0], min(low, times[-1]), min(high, times[-1])])
    np.testing.assert_array_equal(read(times, values, queries), read(times, changed, queries))
    # From the left, not even what is observed at that very time.
    changed = np.where((times >= high)[:, None], other, values)
    if high > times[0]:
        one, two = (read(times, x, queries[-1:], left=True) for x in (values, changed))
        np.testing.assert_array_equal(one, two)


def test_the_limits_at_an_observation():
    path = rectilinear_control(TIMES, np.array([[1.0], [2.0], [NAN], [3.0]]))
    assert [path.evaluate(t).tolist() for t in (1.0, 3.0)] == [[2.0], [3.0]]
    assert [path.evaluate(t, left=True).tolist() for t in (1.0, 1.5, 3.0)] == [[1.0], [2.0], [2.0]]
    # At the first time there is nothing on the left.
    assert path.evaluate(0.0, left=True).tolist() == [1.0]
    assert path.evaluate(0.5, 1.0).tolist() == [1.0]
    assert path.evaluate(0.5, 1.0, left=True).tolist() == [0.0]


def test_before_the_first_observation():
    values = np.array([[NAN, 5.0], [2.0, NAN], [NAN, NAN], [4.0, 6.0]])
    assert rectilinear_control(TIMES, values).evaluate(0.9).tolist() == [0.0, 5.0]
    path = rectilinear_control(TIMES, values, before=np.array([7.0, 8.0]), extrapolate="flat")
    assert path.evaluate(0.9).tolist() == [7.0, 5.0]
    assert path.evaluate(-0.1).tolist() == path.evaluate(0.0, left=True).tolist() == [7.0, 8.0]
    assert path.evaluate(9.0).tolist() == [4.0, 6.0]
    learned = jax.grad(lambda before: rectilinear_control(TIMES, values, before=before).evaluate(0.5).sum())
    assert learned(jnp.zeros(2)).tolist() == [1.0, 0.0]
    for before, words in ((np.zeros(3), r"shape \(2,\), got shape \(3,\)"), (NAN, "must be finite")):
        with pytest.raises(ValueError, match=words):
            rectilinear_control(TIMES, values, before=before)


def test_a_derivative_is_refused_rather_than_zero():
    path = rectilinear_control(TIMES, np.ones((4, 1)))
    with pytest.raises(ValueError, match="use linear_control or hermite_control"):
        path.derivative(0.5)
    with pytest.raises(ValueError, match="moves in jumps alone"):
        diffrax.ControlTerm(lambda t, y, args: jnp.eye(1), path).to_ode().vf(0.5, jnp.zeros(1), None)


def test_it_is_the_path_of_diffrax_with_time_as_the_parameter():
    times, values = series(3)
    values[0] = np.where(np.isnan(values[0]), 0.0, values[0])
    new_times, new_values = diffrax.rectilinear_interpolation(times, values)
    for t in np.append(np.linspace(times[0], times[-1], 17, dtype=np.float32), times):
        t = min(t, times[-1])
        row = np.searchsorted(new_times, t, side="right") - 1
        np.testing.assert_array_equal(rectilinear_control(times, values).evaluate(t), new_values[row])


def _driven(values, solver, jumps=None, path=rectilinear_control):
    """Up to shortly before the last observation."""
    control = path(TIMES, jnp.asarray(values, jnp.float32)[:, None])
    ode = sf.ODE(lambda t, y, control: control.evaluate(t) - y)
    grid = sf.grids.through(ENDS, 0.1, jumps=jumps)
    return np.asarray(sf.solve(ode, jnp.zeros(1), ENDS, args=control, grid=grid, solver=solver).ys[:, 0])


ENDS = np.array([0.0, 1.0, 1.5, 2.9])


def test_states_are_causal_along_a_solve():
    one, two = np.array([1.0, 2.0, -1.0, 4.0]), np.array([1.0, 2.0, 3.0, -7.0])
    early, late = (_driven(x, diffrax.Euler()) for x in (one, two))
    # The observation at 1.5 acts from 1.5 on.
    np.testing.assert_array_equal(early[:3], late[:3])
    assert abs(early[3] - late[3]) > 0.5
    straight = [_driven(x, diffrax.Euler(), path=sf.paths.linear_control) for x in (one, two)]
    assert abs(straight[0][2] - straight[1][2]) > 0.1


def test_steps_that_stop_short_of_the_jumps_are_causal_and_exact_with_any_solver():
    values = np.array([1.0, 2.0, -1.0, 4.0])
    exact, y = [0.0], 0.0
    for gap, x in zip(np.diff(ENDS), values):
        y = x + (y - x) * np.exp(-gap)
        exact.append(y)
    error = lambda jumps: np.abs(_driven(values, diffrax.Tsit5(), jumps) - np.array(exact)).max()
    assert error(TIMES[1:-1]) < 2e-6
    assert error(None) > 1e-3
