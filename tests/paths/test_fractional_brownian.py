"""Exact fractional Brownian motion: covariances, spectra, draws, forecasts, and the Hurst index from data."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.stats import assert_mean
from scipy import integrate, stats
from scipy.linalg import toeplitz
from scipy.special import gamma

import sdeflow as sf
from sdeflow.paths import _fractional_brownian as draws
from sdeflow.paths import _fractional_gaussian as gaussian
from sdeflow.paths._fractional_fit import variance

HURSTS = (0.1, 0.3, 0.5, 0.7, 0.9)
KEYS = jax.random.split(jax.random.key(0), 8)
paths = jax.jit(lambda hurst, key: sf.paths.FractionalBrownian(np.arange(257.0), (500,), key=key, hurst=hurst).values)
log_prob = jax.jit(jax.value_and_grad(sf.paths.fgn_log_prob, 1))
autocovariance = jax.jit(gaussian.autocovariance, static_argnums=1)


def long_autocovariance(hurst, n):
    k, power = np.arange(n, dtype=np.longdouble), 2 * np.longdouble(hurst)
    return np.asarray(((k + 1) ** power - 2 * k**power + np.abs(k - 1) ** power) / 2, np.float64)


# ---- Covariances. ----


@pytest.mark.parametrize("hurst", [0.05, *HURSTS, 0.99])
def test_the_spectrum_of_4096_steps_is_positive_in_float32(hurst):
    """Where the plain formula has a third of its eigenvalues negative."""
    found = autocovariance(jnp.float32(hurst), 4096)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, long_autocovariance(np.float32(hurst), 4096), rtol=1e-5, atol=3e-6)
    eigenvalues = np.asarray(jax.jit(lambda h: draws.circulant_eigenvalues(h, 4096))(jnp.float32(hurst)))
    assert eigenvalues.min() > 0


def test_the_autocovariance_and_its_slope_in_float64(x64):
    for hurst in (0.2, 0.8):
        np.testing.assert_allclose(autocovariance(hurst, 600), long_autocovariance(hurst, 600), rtol=0, atol=2e-14)
        slope = jax.jit(jax.jacfwd(lambda h: gaussian.autocovariance(h, 20)))(hurst)
        difference = (long_autocovariance(hurst + 1e-5, 20) - long_autocovariance(hurst - 1e-5, 20)) / 2e-5
        np.testing.assert_allclose(slope, difference, atol=1e-9)


def test_the_covariances_of_both_types():
    known = {0.1: 0.49674192, 0.3: 0.57690566, 0.7: 0.57434130, 0.9: 0.51412713}
    for hurst, value in known.items():
        assert gaussian.covariance(0.6, 1.7, hurst, "II") * variance(hurst, "II") == pytest.approx(value, rel=1e-7)
        inner = integrate.quad(lambda u, h=hurst: (1.7 - u) ** (h - 0.5), 0, 0.6, weight="alg", wvar=(0, hurst - 0.5))[
            0
        ]
        assert gaussian.covariance(0.6, 1.7, hurst, "II") == pytest.approx(inner * 2 * hurst, rel=1e-6)
        assert gaussian.covariance(1.7, 1.7, hurst, "II") == pytest.approx(1.7 ** (2 * hurst), rel=1e-9)
    assert gamma(0.8) > 1  # the kernel's constant, which the variance of one replaces
    traced = jax.jit(lambda h: gaussian.covariance(0.6, 1.7, h))(0.3)
    assert traced == pytest.approx(float(gaussian.covariance(0.6, 1.7, 0.3)), rel=1e-6)


# ---- Draws. ----


@pytest.mark.parametrize("hurst", [0.1, 0.7, 0.9])
def test_draws_on_equal_steps(hurst):
    values = np.asarray(jax.vmap(lambda key: paths(hurst, key))(KEYS))
    assert values.shape == (8, 257, 500)
    assert not values[:, 0].any()
    for s, t in ((1, 1), (256, 256), (10, 200)):
        assert_mean(values[:, s] * values[:, t], float(gaussian.covariance(s, t, hurst)))
    steps = np.diff(values, axis=1)
    r = long_autocovariance(hurst, 12)
    for lag in (0, 1, 10):
        assert_mean(steps[:, 5] * steps[:, 5 + lag], r[lag])
    # Pairs come from the real and the imaginary part of one transform.
    assert_mean(values[:, 256, :250] * values[:, 256, 250:], 0.0)


@pytest.mark.parametrize("kind", ["I", "II"])
def test_draws_at_irregular_times(kind):
    ts = np.array([2.0, 2.1, 2.5, 3.7])
    for hurst in (0.2, 0.8):
        make = lambda key, h=hurst: sf.paths.FractionalBrownian(ts, (500,), key=key, hurst=h, kind=kind).values
        values = np.asarray(jax.vmap(make)(KEYS))
        for i, j in ((1, 1), (1, 3), (3, 3)):
            exact = float(gaussian.covariance(ts[i] - 2, ts[j] - 2, hurst, kind))
            assert_mean(values[:, i] * values[:, j], exact)


def test_draws_are_differentiable_in_the_index(x64):
    for ts in (np.linspace(0, 1, 9), np.array([0.0, 0.3, 0.4, 1.0])):
        last = jax.jit(lambda h, ts=ts: sf.paths.FractionalBrownian(ts, (2,), key=KEYS[0], hurst=h).values[-1].sum())
        slope = jax.jit(jax.grad(last))(0.3)
        assert slope == pytest.approx(float(last(0.3 + 1e-6) - last(0.3 - 1e-6)) / 2e-6, rel=1e-6)


def test_it_drives_an_equation_of_stratonovich(x64):
    ts = np.linspace(0.0, 1.0, 257)
    path = sf.paths.FractionalBrownian(ts, (2,), key=KEYS[0], hurst=0.7)
    sde = sf.SDE(lambda t, y, args: -y, lambda t, y, args: 0.5 * y, interpretation="stratonovich")
    exact = np.exp(-1 + 0.5 * path.values[-1])
    sol = sf.solve(sde, jnp.ones(2), [0.0, 1.0], dt0=1 / 256, path=path, solver=dfx.Heun())
    np.testing.assert_allclose(sol.ys[-1], exact, rtol=2e-4)
    plain = dfx.diffeqsolve(sde.terms(path), dfx.Heun(), 0.0, 1.0, 1 / 256, jnp.ones(2))
    np.testing.assert_allclose(plain.ys[-1], exact, rtol=2e-4)
    assert path.evaluate(0.5 / 256)[0] == pytest.approx(float(path.values[1, 0]) / 2)
    assert np.isnan(path.evaluate(0.0, 1.5)).all()


# ---- Conditional laws. ----


def test_the_bridge_has_its_variance():
    """An observation of 0 at time 2 with deviation .1."""
    known = {
        0.1: [0.6820, 0.7153, 0.6839],
        0.3: [0.5270, 0.6236, 0.5311],
        0.5: [0.3756, 0.5025, 0.3806],
        0.7: [0.2306, 0.3427, 0.2358],
        0.9: [0.0816, 0.1319, 0.0867],
    }
    for hurst, values in known.items():
        mean, cov = sf.paths.fractional_posterior([2.0], [0.0], [0.5, 1.0, 1.5], hurst=hurst, obs_std=0.1)
        np.testing.assert_allclose(np.diag(cov), values, atol=6e-5)
        assert not np.asarray(mean).any()
    traced = jax.jit(
        lambda h, ts: sf.paths.fractional_posterior(ts, jnp.ones(1), jnp.array([1.0]), hurst=h, obs_std=0.1)
    )
    (mean, cov), H = traced(0.7, jnp.array([2.0])), 0.7
    assert cov[0, 0] == pytest.approx(0.3427, abs=6e-5)
    assert mean[0] == pytest.approx(float(gaussian.covariance(1, 2, H)) / (2 ** (2 * H) + 0.01), rel=1e-5)


def test_forecasts_are_those_of_the_joint_law():
    ts, at, xs = np.array([0.4, 0.9, 1.0]), np.array([1.0, 1.3]), np.array([0.2, -0.1, 0.3])
    for kind in ("I", "II"):
        mean, cov = sf.paths.fractional_posterior(ts, xs, at, hurst=0.3, kind=kind)
        assert mean[0] == pytest.approx(0.3, rel=1e-5)
        assert abs(float(cov[0, 0])) < 1e-6
        every = np.append(ts, at[1:])
        C = gaussian.covariance(every[:, None], every[None], 0.3, kind)
        joint = stats.multivariate_normal(np.zeros(4), C)
        peak = joint.logpdf(np.append(xs, mean[1]))
        assert peak > joint.logpdf(np.append(xs, mean[1] + 0.05))
        assert peak > joint.logpdf(np.append(xs, mean[1] - 0.05))
        assert cov[1, 1] == pytest.approx(1 / np.linalg.inv(C)[3, 3], rel=1e-5)


# ---- The index from data. ----


def test_the_density_of_increments(x64):
    x = np.random.default_rng(0).normal(size=40)
    for hurst in (0.2, 0.5, 0.8):
        value, slope = log_prob(x, hurst)
        exact = lambda h: stats.multivariate_normal(np.zeros(40), toeplitz(long_autocovariance(h, 40))).logpdf(x)
        assert value == pytest.approx(float(exact(hurst)), rel=1e-10)
        assert slope == pytest.approx((exact(hurst + 1e-5) - exact(hurst - 1e-5)) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("method", ["mle", "whittle"])
def test_the_index_is_recovered(method):
    """Thirty paths of 512 steps: within three standard errors and a hundredth, and as spread as theory has it."""
    make = jax.jit(lambda h: sf.paths.FractionalBrownian(np.linspace(0, 1, 513), (30,), key=KEYS[1], hurst=h).values)
    estimate = jax.jit(jax.vmap(lambda x: sf.paths.estimate_hurst(x, method=method), in_axes=1))
    spread = {0.1: 0.014, 0.3: 0.026, 0.5: 0.029, 0.7: 0.023, 0.9: 0.026}
    for hurst, sd in spread.items():
        if method == "mle" and hurst != 0.3:
            continue  # the benchmark has the others
        found = np.asarray(estimate(make(hurst)))
        assert abs(found.mean() - hurst) < 3 * sd / np.sqrt(30) + 0.01
        assert 0.6 * sd < found.std() < 1.6 * sd


def test_a_known_scale_says_more_and_a_free_one_is_ignored():
    values = sf.paths.FractionalBrownian(np.linspace(0, 1, 513), (), key=KEYS[1], hurst=0.3).values
    known = float(sf.paths.estimate_hurst(values, spacing=1 / 512, method="whittle"))
    assert known == pytest.approx(0.3, abs=0.015)
    free, scaled = (float(sf.paths.estimate_hurst(c * values, method="whittle")) for c in (1.0, 1e4))
    assert free == pytest.approx(scaled, abs=1e-3)
    assert np.isnan(sf.paths.estimate_hurst(values.at[3].set(jnp.nan), method="whittle"))


# ---- Bad input. ----


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: sf.paths.FractionalBrownian([0, 1], (), key=KEYS[0], hurst=1.0), "strictly between 0 and 1"),
        (lambda: sf.paths.FractionalBrownian([0, 1], (), key=KEYS[0], hurst=np.ones(2)), "must be a scalar"),
        (lambda: sf.paths.FractionalBrownian([0, 1], (), key=KEYS[0], hurst=0.5, kind="III"), "kind must be"),
        (lambda: sf.paths.FractionalBrownian([0, 1, 1], (), key=KEYS[0], hurst=0.5), "increase without repeats"),
        (lambda: sf.paths.FractionalBrownian([0], (), key=KEYS[0], hurst=0.5), "n >= 2"),
        (
            lambda: jax.jit(lambda h: sf.paths.FractionalBrownian([0, 1], (), key=KEYS[0], hurst=h, kind="II").ts)(0.3),
            "needs a number for hurst",
        ),
        (lambda: sf.paths.fractional_posterior([1.0, 1.0], [0, 0], [2.0], hurst=0.5), "without repeats"),
        (lambda: sf.paths.fractional_posterior([0.0, 1.0], [0, 0], [2.0], hurst=0.5), "B\\(0\\) = 0 is known"),
        (lambda: sf.paths.fractional_posterior([1.0], [0, 0], [2.0], hurst=0.5), "xs must have shape"),
        (lambda: sf.paths.fractional_posterior([1.0], [np.nan], [2.0], hurst=0.5), "xs must be finite"),
        (lambda: sf.paths.fractional_posterior([1.0], [0.1], 2.0, hurst=0.5), "at must have shape"),
        (lambda: sf.paths.fgn_log_prob(np.ones((2, 2)), 0.5), "must have shape"),
        (lambda: sf.paths.estimate_hurst(np.ones(4)), "at least 8"),
        (lambda: sf.paths.estimate_hurst(np.ones(9), method="rs"), "method must be"),
        (lambda: sf.paths.estimate_hurst(np.ones(9), spacing=-1.0), "spacing must be positive"),
    ],
)
def test_bad_input(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_an_index_that_depends_on_time_is_refused():
    with pytest.raises(TypeError, match="hurst must be a number, got function"):
        sf.paths.FractionalBrownian([0, 1], (), key=KEYS[0], hurst=lambda t: 0.3)


def test_what_it_cannot_drive_is_refused():
    path = sf.paths.FractionalBrownian(np.linspace(0, 1, 9), (2,), key=KEYS[0], hurst=0.7)
    ito = sf.SDE(lambda t, y, args: -y, lambda t, y, args: y)
    with pytest.raises(ValueError, match="no Ito integral"):
        sf.solve(ito, jnp.ones(2), [0.0, 1.0], dt0=1 / 8, path=path)
    noise = sf.paths.MarkovFractionalNoise(0.7, 1.0, kind="II")
    fractional = sf.equations.FractionalSDE(lambda t, y, args: -y, lambda t, y, args: y, noise)
    with pytest.raises(ValueError, match="factors of its own noise"):
        sf.solve(fractional, jnp.ones(2), [0.0, 1.0], dt0=1 / 8, path=path)
    with pytest.raises(ValueError, match="covers times from 0 to 1"):
        stratonovich = sf.SDE(lambda t, y, args: -y, lambda t, y, args: y, interpretation="stratonovich")
        sf.solve(stratonovich, jnp.ones(2), [0.0, 2.0], dt0=1 / 8, path=path, solver=dfx.Heun())
