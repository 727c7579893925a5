"""Linear equations that are seen in part: known digits, Gaussian process regression, the dense normal law."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
import scipy.linalg
from helpers.stats import assert_mean
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import sdeflow as sf

pytestmark = pytest.mark.usefixtures("x64_module")

LinearSDE, OrnsteinUhlenbeck = sf.equations.LinearSDE, sf.equations.OrnsteinUhlenbeck
TS = np.array([0.3, 0.5, 1.4, 1.5, 2.9, 3.0, 4.2])
YS = np.array([-1.195, -0.277, -0.594, -0.205, 1.072, 0.118, 1.425])
STD = np.sqrt(0.2)
OSCILLATOR = ([[0.0, 1.0], [-4.0, -0.3]], [0.1, -0.2], [[0.0], [0.5]])
DENSE = ([[-1.0, 0.4, 0.0], [0.2, -0.7, -0.9], [0.0, 1.1, -0.2]], [0.3, -0.1, 0.2], np.arange(6).reshape(3, 2) / 5)


def linear(arrays):
    return LinearSDE(*(np.asarray(x, float) for x in arrays))


# ---- The stationary law. ----


@pytest.mark.parametrize("arrays", [OSCILLATOR, DENSE, ([[-1e-6, 1.0], [0.0, -3e3]], [1.0, 2.0], np.eye(2))])
def test_the_stationary_law_solves_lyapunovs_equation(arrays):
    A, b, L = (np.asarray(x, float) for x in arrays)
    mean, covariance = linear(arrays).stationary()
    np.testing.assert_allclose(mean, -np.linalg.solve(A, b), rtol=1e-9)
    wanted = scipy.linalg.solve_continuous_lyapunov(A, -L @ L.T)
    np.testing.assert_allclose(covariance, wanted, rtol=1e-8, atol=1e-12 * np.abs(wanted).max())


def test_the_stationary_law_of_float32_has_its_digits():
    A, b, L = (np.asarray(x, np.float32) for x in DENSE)
    with jax.enable_x64(False):
        mean, covariance = LinearSDE(A, b, L).stationary()
    assert mean.dtype == covariance.dtype == jnp.float32
    wanted = scipy.linalg.solve_continuous_lyapunov(*(np.asarray(x, float) for x in (A, -L @ L.T)))
    np.testing.assert_allclose(covariance, wanted, rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(mean, -np.linalg.solve(A, b), rtol=2e-6)


def test_the_stationary_law_of_ornstein_uhlenbeck_and_its_derivatives_are_known():
    variance = lambda theta, sigma: OrnsteinUhlenbeck(theta, 0.3, sigma).stationary()[1][0, 0]
    value, (by_theta, by_sigma) = jax.jit(jax.value_and_grad(variance, argnums=(0, 1)))(0.7, 0.9)
    np.testing.assert_allclose(value, 0.81 / 1.4, rtol=1e-13)
    np.testing.assert_allclose(by_theta, -0.81 / 0.98, rtol=1e-12)
    np.testing.assert_allclose(by_sigma, 1.8 / 1.4, rtol=1e-12)


UNSTABLE = {
    "growing": [[0.1, 0.0], [0.0, -1.0]],
    "undamped": [[0.0, 1.0], [-1.0, 0.0]],
    "standing": [[0.0, 0.0], [0.0, -1.0]],
    "zero": [[0.0, 0.0], [0.0, 0.0]],
    "drifting": [[0.0, 1.0], [0.0, 0.0]],
}


@pytest.mark.parametrize("name", UNSTABLE)
def test_without_a_stationary_law_there_is_an_error_or_nan(name):
    A = np.array(UNSTABLE[name])
    with pytest.raises(ValueError, match="no stationary law.*pass initial="):
        linear((A, np.zeros(2), np.eye(2))).log_prob([0.0, 1.0], np.zeros((2, 2)))
    found = jax.jit(lambda A: linear_of(A).log_prob([0.0, 1.0], np.zeros((2, 2))))(A)
    assert np.isnan(found)


def linear_of(A):
    return LinearSDE(A, np.zeros(2), np.eye(2))


@pytest.mark.parametrize("make", [sf.equations.BrownianMotion, sf.equations.Momentum])
def test_brownian_motion_and_momentum_have_no_stationary_law_in_any_trace(make):
    call = lambda sigma: make(1, sigma).log_prob([0.0, 1.0], np.zeros(2), observe=[0])
    for run in (call, jax.jit(call), jax.grad(call)):
        with pytest.raises(ValueError, match=f"{make.__name__} has no stationary law: pass initial="):
            run(1.0)


# ---- Known digits. ----


def ou(a=0.7, s=0.9, **options):
    return OrnsteinUhlenbeck(a, 0.0, s).log_prob(TS, YS, obs_std=STD, **options)


def test_the_likelihood_of_ornstein_uhlenbeck_has_its_digits():
    np.testing.assert_allclose(ou(), -8.315163432, atol=5e-10)
    np.testing.assert_allclose(jax.grad(ou)(0.7), -0.176982236, atol=5e-10)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(ou))(0.7), -0.176982236, atol=5e-10)


def test_the_filter_and_the_smoother_of_ornstein_uhlenbeck_have_their_digits():
    sde = OrnsteinUhlenbeck(0.7, 0.0, 0.9)
    mean, covariance = sde.filter(TS, YS, obs_std=STD)
    assert mean.shape == (7, 1)
    assert covariance.shape == (7, 1, 1)
    np.testing.assert_allclose(mean[-1, 0], 1.06187098, atol=5e-9)
    np.testing.assert_allclose(covariance[-1, 0, 0], 0.14197884, atol=5e-9)
    smoothed = [-0.75457559, -0.51005825, -0.37471658, -0.28065994, 0.59782622, 0.47988827, 1.06187098]
    found, spread = sde.smooth(TS, YS, obs_std=STD)
    np.testing.assert_allclose(found[:, 0], smoothed, atol=5e-9)
    np.testing.assert_allclose(spread[-1], covariance[-1], rtol=1e-14)


def test_without_noise_of_the_observations_it_is_the_product_of_the_transitions():
    theta, mean, sigma, x0 = 1.5, 0.4, 0.6, 0.9
    sde = OrnsteinUhlenbeck(theta, mean, sigma)
    before = np.concatenate([[x0], YS[:-1]])
    gap = np.diff(TS, prepend=0.1)
    spread = sigma * np.sqrt(-np.expm1(-2 * theta * gap) / (2 * theta))
    wanted = stats.norm(mean + (before - mean) * np.exp(-theta * gap), spread).logpdf(YS).sum()
    found = sde.log_prob(TS, YS, initial=([x0], np.zeros((1, 1))), t0=0.1)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_a_brownian_path_whose_velocity_is_seen_too_is_exact():
    # Every state is known, in several dimensions: only the noise of the gaps is left.
    sde = sf.equations.Momentum(1, 0.7)
    rng = np.random.default_rng(0)
    ys, gap = rng.normal(size=(7, 2)), np.diff(TS)
    start = np.zeros(2), np.eye(2)
    wanted = stats.multivariate_normal(*start).logpdf(ys[0])
    for k, h in enumerate(gap):
        Q = 0.49 * np.array([[h**3 / 3, h**2 / 2], [h**2 / 2, h]])
        wanted += stats.multivariate_normal([ys[k, 0] + h * ys[k, 1], ys[k, 1]], Q).logpdf(ys[k + 1])
    np.testing.assert_allclose(sde.log_prob(TS, ys, initial=start), wanted, rtol=1e-11)


# ---- Gaussian process regression. ----


def matern(length, scale):
    lam = np.sqrt(3) / length
    return LinearSDE([[0.0, 1.0], [-(lam**2), -2 * lam]], np.zeros(2), [[0.0], [2 * lam**1.5 * scale]])


def matern_kernel(s, t, length, scale):
    r = np.sqrt(3) * np.abs(s[:, None] - t[None, :]) / length
    return scale**2 * (1 + r) * np.exp(-r)


@pytest.mark.parametrize(("length", "scale"), [(0.8, 1.3), (5.0, 0.4)])
def test_a_matern_process_is_gaussian_process_regression(length, scale):
    rng = np.random.default_rng(0)
    ts, wanted_at = np.sort(rng.uniform(0, 6, 60)), np.linspace(-0.5, 7, 31)
    ys, std = np.sin(ts) + 0.1 * rng.normal(size=60), rng.uniform(0.05, 0.3, 60)
    sde = matern(length, scale)
    lam = np.sqrt(3) / length
    np.testing.assert_allclose(sde.stationary()[1], np.diag([scale**2, lam**2 * scale**2]), atol=1e-12)
    S = matern_kernel(ts, ts, length, scale) + np.diag(std**2)
    evidence = stats.multivariate_normal(np.zeros(60), S).logpdf(ys)
    np.testing.assert_allclose(sde.log_prob(ts, ys, obs_std=std, observe=[0]), evidence, atol=1e-8)
    # Rows of NaN ask for the state there.
    order = np.argsort(both := np.concatenate([ts, wanted_at]))
    rows = np.concatenate([ys, np.full(31, np.nan)])[order], np.concatenate([std, np.full(31, np.nan)])[order]
    cross = matern_kernel(wanted_at, ts, length, scale)
    mean, covariance = sde.smooth(both[order], rows[0], obs_std=rows[1], observe=[0])
    at = np.argsort(order)[60:]
    np.testing.assert_allclose(mean[at, 0], cross @ np.linalg.solve(S, ys), atol=1e-8)
    spread = matern_kernel(wanted_at, wanted_at, length, scale) - cross @ np.linalg.solve(S, cross.T)
    np.testing.assert_allclose(covariance[at, 0, 0], np.diag(spread), atol=1e-8)


# ---- The dense normal law. ----


def dense(sde, ts, ys, std, H, mask):
    """The log density of what was observed, from the stationary covariance function, other rows left out."""
    A, b, L = (np.asarray(x) for x in (sde.A, sde.b, sde.L))
    P, m, n = scipy.linalg.solve_continuous_lyapunov(A, -L @ L.T), -np.linalg.solve(A, b), len(ts)
    S = np.zeros((n, len(H), n, len(H)))
    for i in range(n):
        for j in range(i + 1):
            S[i, :, j] = H @ scipy.linalg.expm(A * (ts[i] - ts[j])) @ P @ H.T
            S[j, :, i] = S[i, :, j].T
    seen = mask.ravel()
    S = S.reshape(seen.size, seen.size) + np.diag(np.broadcast_to(std, ys.shape).ravel() ** 2)
    mean = np.broadcast_to(H @ m, ys.shape).ravel()
    return stats.multivariate_normal(mean[seen], S[seen][:, seen]).logpdf(ys.ravel()[seen])


@pytest.mark.parametrize("seed", range(3))
def test_missing_values_are_rows_left_out(seed):
    rng, sde = np.random.default_rng(seed), linear(DENSE)
    H, ys, std = rng.normal(size=(2, 3)), rng.normal(size=(7, 2)), rng.uniform(0.1, 1.0, 2)
    nan, mask = rng.uniform(size=(7, 2)) < 0.3, rng.uniform(size=(7, 2)) < 0.7
    wanted = dense(sde, TS, ys, std, H, mask & ~nan)
    found = sde.log_prob(TS, np.where(nan, np.nan, ys), mask, obs_std=std, observe=H)
    np.testing.assert_allclose(found, wanted, rtol=1e-11)
    # A mask of rows takes every entry of a row.
    rows = mask.any(axis=1)
    found = sde.log_prob(TS, ys, rows, obs_std=std, observe=H)
    np.testing.assert_allclose(found, dense(sde, TS, ys, std, H, np.repeat(rows[:, None], 2, 1)), rtol=1e-11)


def test_the_gradient_at_a_missing_entry_is_zero_and_no_other_is_nan():
    ys = np.where(np.arange(7) == 3, np.nan, YS)

    def value(theta, sigma, std, ys, ts):
        return OrnsteinUhlenbeck(theta, 0.0, sigma).log_prob(ts, ys, obs_std=std)

    std = np.where(np.arange(7) == 3, np.nan, STD)
    gradient = jax.jit(jax.grad(value, argnums=range(5)))(0.7, 0.9, std, ys, TS)
    assert all(np.isfinite(x).all() for x in gradient)
    assert gradient[2][3] == gradient[3][3] == 0.0
    assert gradient[3][2] != 0.0


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(3)), st.floats(-1e3, 1e3), st.integers(0, 100))
def test_the_order_of_channels_and_the_origin_of_time_do_not_matter(order, shift, seed):
    rng, sde, order = np.random.default_rng(seed), linear(DENSE), list(order)
    ys, std = rng.normal(size=(7, 3)), rng.uniform(0.1, 1.0, 3)
    ys[rng.uniform(size=(7, 3)) < 0.3] = np.nan
    value = sde.log_prob(TS, ys, obs_std=std)
    eye = np.eye(3)
    permuted = sde.log_prob(TS, ys[:, order], obs_std=std[order], observe=eye[order])
    np.testing.assert_allclose(permuted, value, rtol=1e-10)
    np.testing.assert_array_equal(sde.log_prob(TS, ys[:, order], obs_std=std[order], observe=order), permuted)
    np.testing.assert_allclose(sde.log_prob(TS + shift, ys, obs_std=std), value, rtol=1e-8)


def test_simulated_observations_are_as_likely_as_the_law_says():
    # The score of the true parameter has mean zero: simulated by the solver, judged by the likelihood.
    sde = OrnsteinUhlenbeck(0.7, 0.0, 0.9)

    def score(key):
        start, noise, path = jr.split(key, 3)
        x0 = 0.9 / np.sqrt(1.4) * jr.normal(start, (1,))
        xs = sf.solve(sde, x0, TS, dt0=0.02, key=path).ys
        ys = xs + 0.1 * jr.normal(noise, xs.shape)
        return jax.grad(lambda a: OrnsteinUhlenbeck(a, 0.0, 0.9).log_prob(TS, ys, obs_std=0.1))(0.7)

    assert_mean(jax.jit(jax.vmap(score))(jr.split(jr.key(0), 1000)), 0.0)


# ---- Float32, padding, batches. ----


def test_float32_keeps_its_digits_over_a_thousand_close_times():
    rng = np.random.default_rng(0)
    # Times since 1970, in seconds: their differences are taken on the host, whatever the precision of the device.
    ts = 1.7e9 + np.cumsum(rng.uniform(0.0005, 0.0015, 1000).round(6))
    x = np.sin(ts - ts[0]) + np.cumsum(rng.normal(size=1000)) * 0.02
    ys = np.float32(x + 0.1 * rng.normal(size=1000))

    def value(length, scale, std):
        lam, zero, dtype = np.sqrt(3) / length, jnp.zeros_like(length), length.dtype
        A = jnp.array([[zero, zero + 1], [-(lam**2), -2 * lam]])
        sde = LinearSDE(A, jnp.zeros(2, dtype), jnp.array([[zero], [2 * lam**1.5 * scale]]))
        return sde.log_prob(ts, ys.astype(dtype), obs_std=std, observe=[0])

    wanted, found = {}, {}
    for out, dtype, x64 in ((wanted, "float64", True), (found, "float32", False)):
        with jax.enable_x64(x64):
            run = jax.jit(jax.value_and_grad(value, argnums=(0, 1)))
            for std in (0.1, 0.0):
                out[std] = run(*(jnp.asarray(x, dtype) for x in (0.8, 1.3, std)))
    for std in (0.1, 0.0):
        assert found[std][0].dtype == jnp.float32
        np.testing.assert_allclose(found[std][0], wanted[std][0], rtol=4e-6)
        np.testing.assert_allclose(found[std][1], wanted[std][1], rtol=1e-5)


def test_a_padded_tail_changes_no_bit():
    value = lambda a, ts, ys: OrnsteinUhlenbeck(a, 0.2, 0.9).log_prob(ts, ys, obs_std=STD)
    longer = np.append(TS, np.full(5, TS[-1])), np.append(YS, np.full(5, np.nan))
    assert float(value(0.7, *longer)) == float(value(0.7, TS, YS))
    gradient = jax.jit(jax.grad(value))
    assert float(gradient(0.7, *longer)) == float(gradient(0.7, TS, YS))
    sde = linear(DENSE)
    for method in (sde.filter, sde.smooth):
        short = method(TS, YS, obs_std=STD, observe=[0])
        for a, b in zip(method(*longer, obs_std=STD, observe=[0]), short):
            np.testing.assert_array_equal(a[:7], b)
            np.testing.assert_array_equal(a[7:], np.broadcast_to(b[-1], a[7:].shape))


def test_a_batch_of_series_is_its_members():
    data = sf.TimeSeries.from_arrays([TS, TS[:4], TS[1:]], [YS, YS[:4] + 1, YS[1:]])
    batch = data.with_buckets(7).batch([0, 1, 2])
    sde = OrnsteinUhlenbeck(0.7, 0.0, 0.9)
    one = lambda ts, ys, mask: sde.log_prob(ts, ys, mask, obs_std=STD)
    times, values = np.float64(batch.times), np.float64(batch.values)
    found = jax.jit(jax.vmap(one))(times, values, batch.mask)
    for i, n in enumerate([7, 4, 6]):
        wanted = sde.log_prob(times[i, :n], values[i, :n], obs_std=STD)
        np.testing.assert_allclose(found[i], wanted, rtol=1e-12)


def test_a_batch_of_equations_is_its_members():
    thetas = jnp.array([0.3, 0.7, 2.0])
    found = jax.vmap(ou)(thetas)
    np.testing.assert_allclose(found, [ou(a) for a in thetas], rtol=1e-12)


# ---- What is refused. ----


def refused(match, *args, error=ValueError, sde=None, **options):
    sde = OrnsteinUhlenbeck(np.array([0.7, 0.3]), 0.0, 0.9) if sde is None else sde
    for method in (sde.log_prob, sde.filter, sde.smooth):
        with pytest.raises(error, match=match):
            method(*args, **options)


def test_times_that_do_not_increase_are_refused():
    ys = np.zeros((3, 2))
    refused(r"ts must increase, but ts\[2\] = 0.5 follows 1.0", [0.0, 1.0, 0.5], ys)
    refused(r"ts must increase, but ts\[1\] = 0.0 follows 0.0", [0.0, 0.0, 1.0], ys)
    refused("ts must be finite", [0.0, np.nan, 1.0], ys)
    refused(r"ts must have shape \(n,\) with n >= 1, got \(1, 3\)", np.zeros((1, 3)), ys)
    refused(r"ts must have shape \(n,\) with n >= 1, got \(0,\)", [], np.zeros((0, 2)))
    refused(r"t0 = 0.5 must not lie after ts\[0\] = 0.0", [0.0, 1.0, 2.0], ys, t0=0.5)
    # In a trace the sentence is NaN.
    value = jax.jit(lambda ts: OrnsteinUhlenbeck(0.7).log_prob(ts, jnp.zeros(3), obs_std=1.0))
    assert np.isnan(value(jnp.array([0.0, 1.0, 0.5])))
    assert np.isfinite(value(jnp.array([0.0, 0.5, 1.0])))


def test_shapes_that_disagree_are_refused():
    ts = [0.0, 1.0, 2.0]
    refused(r"ys must have shape \(3, 2\), got \(3, 1\)", ts, np.zeros((3, 1)))
    refused(r"ys must have shape \(3, 2\), got \(3,\)", ts, np.zeros(3))
    refused(r"ys must have shape \(3, 1\) or \(3,\), got \(2,\)", ts, np.zeros(2), observe=[0])
    refused(r"mask must have shape \(3, 2\) or \(3,\), got \(2,\)", ts, np.zeros((3, 2)), np.ones(2, bool))
    refused(r"obs_std must broadcast to \(3, 2\), got \(3,\)", ts, np.zeros((3, 2)), obs_std=np.ones(3))
    refused(
        r"observe must be a matrix \(p, 2\) or a list of p of the numbers 0..1", ts, np.zeros((3, 2)), observe=np.eye(3)
    )
    refused(
        r"observe must be a matrix \(p, 2\) or a list of p of the numbers 0..1", ts, np.zeros((3, 2)), observe=[0, 2]
    )
    refused(
        r"observe must be a matrix \(p, 2\) or a list of p of the numbers 0..1", ts, np.zeros((3, 2)), observe=[0.0]
    )


def test_values_that_make_no_law_are_refused():
    ts, ys = [0.0, 1.0, 2.0], np.zeros((3, 2))
    refused("obs_std must not be negative or NaN where there are observations, got -1.0", ts, ys, obs_std=-1.0)
    refused("obs_std must not be negative or NaN", ts, ys, obs_std=np.array([1.0, np.nan]))
    refused("initial must be", ts, ys, initial="steady")
    refused("initial must be", ts, ys, initial=np.zeros(2))
    shapes = r"initial must be a mean of shape \(2,\) and a covariance of shape \(2, 2\), got \(2,\) and \(2,\)"
    refused(shapes, ts, ys, initial=(np.zeros(2), np.ones(2)))
    refused("covariance of initial must be symmetric and", ts, ys, initial=(np.zeros(2), np.diag([1.0, -1.0])))
    refused(
        "covariance of initial must be symmetric and", ts, ys, initial=(np.zeros(2), np.array([[1.0, 0.5], [0, 1]]))
    )


def test_observing_exactly_what_is_known_is_refused_and_nan_in_a_trace():
    known = np.zeros(1), np.zeros((1, 1))
    refused("density is not finite", [0.0, 1.0], np.zeros(2), sde=OrnsteinUhlenbeck(0.7), initial=known)
    refused("density is not finite", [0.0, 1.0], [0.0, np.inf], sde=OrnsteinUhlenbeck(0.7), obs_std=0.1)
    value = jax.jit(lambda ys: OrnsteinUhlenbeck(0.7).log_prob([0.0, 1.0], ys, initial=known))
    assert np.isnan(value(jnp.zeros(2)))
