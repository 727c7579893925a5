"""What all controls share: padding bitwise, batches, gradients, refusals; and straight lines against NumPy's."""

import functools

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sdeflow as sf
from sdeflow.paths import AbstractControl, hermite_control, linear_control, rectilinear_control

TIMES = np.array([0.0, 0.3, 0.4, 1.0, 1.7], np.float32)
MAKERS = [linear_control, hermite_control, rectilinear_control]
SMOOTH = MAKERS[:2]
every = pytest.mark.parametrize("make", MAKERS)


def reference(times, values, t):
    """Channel by channel with numpy.interp, which holds the ends."""
    out = []
    for x in values.T:
        seen = ~np.isnan(x)
        out.append(np.interp(t, times[seen], x[seen]) if seen.any() else 0.0)
    return np.array(out)


def some_values(seed, length=5, channels=3, missing=0.4):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(length, channels)).astype(np.float32)
    values[rng.random(values.shape) < missing] = np.nan
    return values


def pad(times, values, count, filler):
    rows = np.full((count, values.shape[1]), filler, np.float32)
    return np.append(times, np.repeat(times[-1:], count)), np.concatenate([values, rows])


@eqx.filter_jit
def at_fractions(times, values, count, fractions):
    """X at fractions of the time from the first to the last real knot, of series padded to one shape."""
    path = linear_control(times, values)
    end = times[count - 1]
    return jax.vmap(path.evaluate)(times[0] + fractions * (end - times[0]))


@settings(deadline=None, max_examples=100)
@given(
    seed=st.integers(0, 10_000),
    length=st.integers(1, 12),
    fractions=st.lists(st.floats(0, 1, width=32), min_size=4, max_size=4),
)
def test_equals_channelwise_interpolation(seed, length, fractions):
    times = np.cumsum(0.05 + np.random.default_rng(seed).random(length)).astype(np.float32)
    values = some_values(seed, length)
    fractions = np.array(fractions, np.float32)
    found = at_fractions(*pad(times, values, 12 - length, np.nan), length, fractions)
    for s, x in zip(fractions, found):
        t = times[0] + s * (times[-1] - times[0])
        np.testing.assert_allclose(x, reference(times, values, t), rtol=2e-5, atol=2e-5)


@every
def test_knots_are_met_to_the_last_bit(make):
    values = some_values(3, missing=0.0)
    path = make(TIMES, values)
    assert isinstance(path, AbstractControl)
    assert isinstance(path, diffrax.AbstractPath)
    for t, x in zip(TIMES, values):
        np.testing.assert_array_equal(path.evaluate(t), x)
    np.testing.assert_array_equal(path.at(np.arange(5)), values)
    np.testing.assert_array_equal(path.knots, values)
    assert (float(path.t0), float(path.t1)) == (0.0, TIMES[-1])


def test_equals_diffrax_without_gaps():
    values = some_values(4, missing=0.0)
    ours, theirs = (
        linear_control(TIMES, values),
        diffrax.LinearInterpolation(ts=jnp.asarray(TIMES), ys=values),
    )
    assert isinstance(ours, diffrax.AbstractPath)
    for t in np.linspace(0, 1.7, 23, dtype=np.float32):
        np.testing.assert_allclose(ours.evaluate(t), theirs.evaluate(t), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(ours.derivative(t), theirs.derivative(t), rtol=1e-5)
    np.testing.assert_allclose(ours.evaluate(0.1, 1.2), theirs.evaluate(0.1, 1.2), rtol=1e-5)


def test_one_sided_derivatives_at_a_knot():
    path = linear_control(np.array([0.0, 1.0, 3.0]), np.array([[0.0], [2.0], [3.0]]))
    assert float(path.derivative(1.0)[0]) == 2.0
    assert float(path.derivative(1.0, left=False)[0]) == 0.5
    assert float(path.derivative(0.0)[0]) == 2.0
    assert float(path.derivative(3.0, left=False)[0]) == 0.5
    assert float(jax.jvp(path.evaluate, (2.0,), (1.0,))[1][0]) == 0.5


def test_derivative_at_the_end_sees_the_last_piece():
    path = linear_control(np.array([0.0, 1.0, 3.0]), np.array([[0.0], [2.0], [3.0]]))
    assert float(jax.jvp(path.evaluate, (jnp.float32(3.0),), (jnp.float32(1.0),))[1][0]) == 0.5


@every
def test_all_missing_channel_is_zero_and_ends_are_held(make):
    values = np.array([[np.nan, np.nan], [1.0, np.nan], [np.nan, np.nan]])
    path = make(np.array([0.0, 1.0, 2.0]), values)
    first = 0.0 if make is rectilinear_control else 1.0
    np.testing.assert_array_equal(path.knots, [[first, 0.0], [1.0, 0.0], [1.0, 0.0]])


@every
def test_a_missing_channel_changes_no_other(make):
    values = some_values(9)
    wider = np.insert(values, 1, np.nan, axis=1)
    queries = np.linspace(0, 1.7, 23, dtype=np.float32)
    ours, theirs = (jax.vmap(make(TIMES, x).evaluate)(queries) for x in (values, wider))
    np.testing.assert_array_equal(theirs[:, [0, 2, 3]], ours)
    np.testing.assert_array_equal(theirs[:, 1], 0)


@every
@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 999), scale=st.floats(1e-3, 1e3), shift=st.floats(-100, 100))
def test_an_affine_map_of_time_moves_the_path_along(make, seed, scale, shift):
    with jax.enable_x64(True):
        times, values = TIMES.astype(np.float64), some_values(seed).astype(np.float64)
        path, moved = (_of_times(make, t, values) for t in (times, scale * times + shift))
        # Not at the knots, where a path of steps may fall on either side of a rounding.
        queries = np.append((times[1:] + times[:-1]) / 2, times[:-1] + 1e-3)
        np.testing.assert_allclose(_at(moved, scale * queries + shift), _at(path, queries), rtol=1e-8, atol=1e-8)


_of_times = eqx.filter_jit(lambda make, times, values: make(times, values))
_at = eqx.filter_jit(lambda path, queries: jax.vmap(path.evaluate)(queries))


@every
def test_single_observation(make):
    path = make(np.array([2.0]), np.array([[5.0, np.nan]]))
    np.testing.assert_array_equal(path.evaluate(2.0), [5.0, 0.0])
    if make is not rectilinear_control:
        np.testing.assert_array_equal(path.derivative(2.0), [0.0, 0.0])
    gradient = jax.grad(lambda t, x: make(t, x).evaluate(2.0).sum(), argnums=(0, 1))
    assert all(np.isfinite(g).all() for g in gradient(np.array([2.0]), np.array([[5.0, np.nan]])))


PADDINGS = [(1, np.nan), (7, np.nan), (7, 3.0), (7, 0.0), (300, np.nan)]


@functools.cache
def _slopes(make, name):
    def loss(times, values, queries):
        x = jax.vmap(getattr(make(times, values), name))(queries)
        return jnp.sin(x).sum(), x

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))


@pytest.mark.parametrize(
    ("make", "name", "count", "filler"),
    [
        *((linear_control, name, *padding) for name in ("evaluate", "derivative") for padding in PADDINGS),
        *((hermite_control, name, *padding) for name in ("evaluate", "derivative") for padding in PADDINGS[1::2]),
        (hermite_control, "evaluate", 300, np.nan),
        *((rectilinear_control, "evaluate", *padding) for padding in PADDINGS[1:]),
    ],
)
def test_padding_is_invisible_bitwise(make, name, count, filler):
    values = some_values(1)
    queries = np.concatenate([np.linspace(0, 1.7, 9, dtype=np.float32), TIMES])
    run = _slopes(make, name)
    (value, outputs), (by_times, by_values, by_queries) = run(TIMES, values, queries)
    (padded, padded_outputs), gradients = run(*pad(TIMES, values, count, filler), queries)
    for a, b in zip((value, outputs, by_queries), (padded, padded_outputs, gradients[2])):
        np.testing.assert_array_equal(a, b)
    for mine, theirs in ((by_times, gradients[0]), (by_values, gradients[1])):
        assert np.isfinite(mine).all()
        np.testing.assert_array_equal(mine, theirs[: len(mine)])
        np.testing.assert_array_equal(theirs[len(mine) :], 0)
    # A path of steps does not move with a small change of its times.
    assert (np.abs(by_times).max() > 0) == (make is not rectilinear_control)
    assert np.abs(by_values).max() > 0


@every
def test_vmap_over_a_padded_batch_equals_the_loop(make):
    lengths = [2, 5, 3]
    series = [(TIMES[:n], some_values(n, n)) for n in lengths]
    batch = [pad(t, x, 5 - len(t), np.nan) for t, x in series]
    times, values = (np.stack(part) for part in zip(*batch))

    def run(times, values):
        path = make(times, values)
        return jax.vmap(lambda s: path.evaluate(path.t0 + s * (path.t1 - path.t0)))(jnp.linspace(0, 1, 6))

    together = jax.jit(jax.vmap(run))(times, values)
    for row, (t, x) in zip(together, series):
        np.testing.assert_array_equal(row, jax.jit(run)(t, x))
    paths = jax.vmap(make)(times, values)
    assert paths.knots.shape == values.shape
    assert jax.vmap(lambda p: p.evaluate(p.t1))(paths).shape == (3, 3)


@every
def test_gradients_match_finite_differences(make):
    with jax.enable_x64(True):
        values = some_values(5).astype(np.float64)
        times = TIMES.astype(np.float64)
        observed = np.argwhere(~np.isnan(values))

        @jax.jit
        def loss(times, values, t):
            path = make(times, values)
            slope = 0.0 if make is rectilinear_control else path.derivative(t)
            return jnp.sum(jnp.sin(path.evaluate(t))) + jnp.sum(slope**2)

        t = 0.77
        by_times, by_values, by_t = jax.grad(loss, argnums=(0, 1, 2))(times, values, t)
        step = 1e-6
        for i, c in observed:
            change = np.zeros_like(values)
            change[i, c] = step
            expected = (loss(times, values + change, t) - loss(times, values - change, t)) / (2 * step)
            np.testing.assert_allclose(by_values[i, c], expected, rtol=1e-6, atol=1e-8)
        np.testing.assert_array_equal(by_values[np.isnan(values)], 0)
        for i in range(times.size):
            change = np.eye(times.size)[i] * step
            expected = (loss(times + change, values, t) - loss(times - change, values, t)) / (2 * step)
            np.testing.assert_allclose(by_times[i], expected, rtol=1e-6, atol=1e-8)
        expected = (loss(times, values, t + step) - loss(times, values, t - step)) / (2 * step)
        np.testing.assert_allclose(by_t, expected, rtol=1e-6)


@every
def test_out_of_range(make):
    values = some_values(6)
    strict, flat = make(TIMES, values), make(TIMES, values, extrapolate="flat")
    for t in (-0.1, 1.8):
        with pytest.raises(ValueError, match=r'outside the data.*extrapolate="flat"'):
            strict.evaluate(t)
        assert np.isnan(eqx.filter_jit(strict.evaluate)(jnp.float32(t))).all()
        early = np.zeros(3) if make is rectilinear_control else flat.knots[0]
        np.testing.assert_array_equal(flat.evaluate(t), early if t < 0 else flat.knots[-1])
        if make is rectilinear_control:
            continue
        with pytest.raises(ValueError, match="outside the data"):
            strict.derivative(t)
        assert np.isnan(eqx.filter_jit(strict.derivative)(jnp.float32(t))).all()
        np.testing.assert_array_equal(flat.derivative(t), 0)
    assert np.isnan(eqx.filter_jit(flat.evaluate)(jnp.nan)).all()
    # A solver's last stage may overshoot by rounding.
    barely = np.nextafter(TIMES[-1], np.float32(2))
    np.testing.assert_array_equal(strict.evaluate(barely), strict.knots[-1])


@every
def test_a_solve_beyond_the_data_says_which_control_ends(make):
    path = make(np.array([0.0, 1.0, 2.0]), np.ones((3, 1)))
    forced = sf.ODE(lambda t, y, control: control.evaluate(t) - y)
    words = f'A {type(path).__name__} covers times from 0 to 2, but ts runs from 0 to 3: use extrapolate="flat"'
    with pytest.raises(sf.SolveError, match=words):
        sf.solve(forced, jnp.ones(1), [0.0, 1.0, 3.0], dt0=0.5, args=path)
    held = make(path.times, path.knots, extrapolate="flat")
    final = sf.solve(forced, jnp.ones(1), [0.0, 1.0, 3.0], dt0=0.5, args=held).final
    np.testing.assert_allclose(final, 1.0, rtol=1e-6)


def test_index_out_of_range():
    path = linear_control(TIMES, some_values(7))
    for index in (5, -1, 1.5):
        with pytest.raises(ValueError, match=r"indices must be integers in \[0, 5\)"):
            path.at(index)
    assert np.isnan(eqx.filter_jit(path.at)(jnp.int32(5))).all()
    assert np.isnan(eqx.filter_jit(path.at)(jnp.int32(-1))).all()
    assert path.at(np.array([[0, 1], [2, 3]])).shape == (2, 2, 3)


@pytest.mark.parametrize(
    ("times", "values", "message"),
    [
        ([0.0, 2.0, 1.0], np.zeros((3, 1)), r"times\[2\]=1.0 follows 2.0"),
        ([0.0, 0.0, 1.0], np.zeros((3, 1)), r"times\[1\]=0.0 follows 0.0"),
        ([0.0, np.nan, 1.0], np.zeros((3, 1)), r"times\[1\] is nan"),
        ([1e9, 1e9 + 1, 1e9 + 200], np.zeros((3, 1)), "in float32"),
        ([0.0, 1.0], np.array([[0.0], [np.inf]]), r"values\[1, 0\] is inf"),
        ([0.0, 1.0], np.zeros(2), r"\(2,\) and \(2,\)"),
        ([0.0, 1.0], np.zeros((3, 1)), r"\(2,\) and \(3, 1\)"),
        ([], np.zeros((0, 1)), "L >= 1"),
        ([0.0, 1.0], np.zeros((2, 1), complex), "must be real"),
    ],
)
@every
def test_bad_input(make, times, values, message):
    with pytest.raises(ValueError, match=message):
        make(np.array(times), values)


@every
def test_bad_options(make):
    with pytest.raises(ValueError, match="extrapolate must be"):
        make(TIMES, some_values(0), extrapolate="linear")
    with pytest.raises(ValueError, match=r"use jax\.vmap"):
        make(TIMES, some_values(0)).evaluate(TIMES)


@every
@pytest.mark.parametrize("extrapolate", ["error", "flat"])
def test_falling_times_in_a_trace_give_nan(make, extrapolate):
    run = jax.jit(lambda t, x, s: make(t, x, extrapolate=extrapolate).evaluate(s))
    for s in (0.0, -1.0):
        assert np.isnan(run(np.array([0.0, 2.0, 1.0]), np.zeros((3, 1)), s)).all()


@every
def test_dtypes(make):
    assert make([0, 1], np.array([[1], [3]])).evaluate(0.5).tolist() == [1.0 if make is rectilinear_control else 2.0]
    assert make(TIMES, some_values(0).astype(np.float16)).knots.dtype == np.float32
    with jax.enable_x64(True):
        assert make(TIMES, some_values(0).astype(np.float64)).evaluate(0.1).dtype == np.float64
        assert make(TIMES.astype(np.float64), some_values(0)).evaluate(0.1).dtype == np.float32
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        path = make(TIMES, some_values(0))
        path.evaluate(np.float32(0.2))
        if make is not rectilinear_control:
            path.derivative(np.float32(0.2))


def test_drives_a_diffrax_solve():
    """dz = X(t) dt and dz = dX, in plain diffeqsolve, against the exact integrals of the straight lines."""
    values = some_values(8, missing=0.3)
    path = linear_control(TIMES, values)
    solve = lambda term: diffrax.diffeqsolve(
        term,
        diffrax.Heun(),
        TIMES[0],
        TIMES[-1],
        None,
        jnp.zeros(3),
        stepsize_controller=diffrax.StepTo(TIMES),
    ).ys[-1]
    integral = solve(diffrax.ODETerm(lambda t, y, args: path.evaluate(t)))
    np.testing.assert_allclose(integral, np.trapezoid(path.knots, TIMES, axis=0), rtol=1e-5, atol=1e-6)
    change = solve(diffrax.ControlTerm(lambda t, y, args: jnp.eye(3), path))
    np.testing.assert_allclose(change, path.knots[-1] - path.knots[0], rtol=1e-5, atol=1e-6)


@every
def test_no_loop_and_no_callback_in_the_program(make):
    lowered = jax.jit(lambda t, x, s: make(t, x).evaluate(s)).lower(TIMES, some_values(0), 0.3).as_text()
    assert "callback" not in lowered
    assert "while" not in lowered


@every
def test_one_trace_for_a_shape(make):
    @eqx.filter_jit
    @eqx.debug.assert_max_traces(max_traces=1)
    def run(path, t):
        return path.evaluate(t)

    for seed in range(3):
        run(make(TIMES, some_values(seed)), jnp.float32(0.2 * seed))
