"""Fractional noise of few factors: weights, laws and densities against tables, quadrature and dense Gaussians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.stats import assert_mean
from scipy import integrate, stats
from scipy.special import gamma

import sdeflow as sf
from sdeflow.paths import _fractional_fit as fit
from sdeflow.paths import _markov_fractional as module

Noise = sf.paths.MarkovFractionalNoise
pytestmark = pytest.mark.usefixtures("x64_module")
OFFICIAL = tuple(np.geomspace(1 / 20, 20, 5))
HURSTS = (0.1, 0.3, 0.5, 0.7, 0.9)
rng = np.random.default_rng(0)
TS = np.sort(rng.uniform(0, 1, 12))
XS = 0.3 * rng.normal(size=12)

# Type, H -> weights on the official rates with horizon 2, and J / T.
TABLE = {
    ("I", 0.1): ([0.466292, -0.096238, 0.925002, -0.301268, 4.618551], 0.904709),
    ("I", 0.3): ([0.786455, -0.075706, 0.449183, 0.108593, 1.176625], 0.0171001),
    ("I", 0.5): ([1.399739, -0.540362, 0.188914, -0.109219, 0.060928], 0.0253236),
    ("I", 0.7): ([2.270514, -1.477389, 0.097276, -0.407027, -0.111625], 0.160435),
    ("I", 0.9): ([3.256614, -2.785925, 0.232665, -0.646308, 0.042447], 1.39861),
    ("II", 0.1): ([9.631152, -13.919071, 7.106579, -2.556715, 5.593531], 0.443536),
    ("II", 0.3): ([2.612558, -2.78969, 1.623409, -0.301716, 1.34883], 0.00644894),
    ("II", 0.5): ([1.435927, -0.478965, 0.046603, -0.004276, 0.000867], 4.97161e-9),
    ("II", 0.7): ([2.179896, -1.06607, -0.351565, -0.127759, -0.263463], 5.47324e-5),
    ("II", 0.9): ([3.60521, -2.711606, -0.356117, -0.211033, -0.202604], 1.78743e-5),
}
# Type, rates on [0, 1] -> J / c at H = .3 and .7, or at all five.
COSTS = {
    ("I", OFFICIAL): (0.307, 0.0166, 0.0128, 0.0979, 0.510),
    ("II", OFFICIAL): (0.229, 0.00776, 1.7e-11, 1.34e-4, 5.91e-5),
    ("I", (0.0, *np.geomspace(1e-3, 100, 7))): (0.225, 0.0061075, 0.0, 6.0440e-4, 0.101),
    ("I", (0.0, *np.geomspace(0.01, 100, 5))): (0.225, 0.00616, 0.0, 0.00234, 0.160),
    ("II", (0.0, *np.geomspace(1, 100, 5))): (0.170, 0.00317, 0.0, 1.6246e-5, 4.0e-6),
}

both = jax.jit(
    jax.value_and_grad(lambda hurst, ts, xs, kind: Noise(hurst, 1.0, spacing=1 / 64, kind=kind).log_prob(ts, xs)),
    static_argnums=3,
)


def log_prob(*arguments):
    return float(both(*arguments)[0])


def slope(*arguments):
    return float(both(*arguments)[1])


# ---- Weights. ----


@pytest.mark.parametrize(("kind", "hurst"), TABLE)
def test_the_weights_of_the_official_rates(kind, hurst):
    weights, cost = TABLE[kind, hurst]
    noise = Noise(hurst, 2.0, kind=kind, rates=OFFICIAL, normalise=False)
    np.testing.assert_allclose(noise.coefficients(), weights, atol=1e-5)
    _, c = fit.moments(kind, OFFICIAL, 2.0, hurst)
    # The table has six digits, of which a cost of 5e-9 is the difference of numbers of size one.
    assert noise.cost() * c / 2 == pytest.approx(cost, rel=1e-4)


@pytest.mark.parametrize(("kind", "rates"), COSTS)
def test_the_relative_costs(kind, rates):
    found = [Noise(hurst, 1.0, kind=kind, rates=rates).cost() for hurst in HURSTS]
    np.testing.assert_allclose(found, COSTS[kind, rates], rtol=6e-3, atol=2e-9)


def test_the_entries_of_the_normal_equations_are_integrals():
    H, T = 0.3, 2.0
    a = H + 0.5
    for kind, rates in (("I", (0.05, 1.0, 20.0)), ("II", (0.0, 0.05, 20.0))):
        b, _ = fit.moments(kind, rates, T, H)
        for rate, value in zip(rates, b):
            # E[(Y(t) - Y(0)) B(t)] from the kernels, the long past of type I apart.
            near = integrate.quad(lambda s: (T - s) * np.exp(-rate * s), 0, T, weight="alg", wvar=(a - 1, 0))[0]
            past = 0.0
            if kind == "I":
                kernel = lambda t, r: (np.exp(-rate * t) - 1) * np.exp(-rate * r) * ((t + r) ** (a - 1) - r ** (a - 1))
                inner = lambda t: integrate.quad(lambda r: kernel(t, r), 0, np.inf, limit=200)[0]
                past = integrate.quad(inner, 0, T, epsabs=1e-7)[0]
            assert value == pytest.approx((near + past) / gamma(a), rel=1e-5)


@pytest.mark.parametrize("kind", ["I", "II"])
def test_half_is_brownian_motion_and_the_kernel_has_its_variance(kind):
    noise = Noise(0.5, 3.0, kind=kind)
    np.testing.assert_allclose(noise.coefficients(), np.eye(6)[0], atol=1e-9)
    np.testing.assert_allclose(noise.covariance(TS[:, None], TS[None]), np.minimum(TS[:, None], TS[None]), atol=1e-9)
    assert noise.cost() < 1e-12
    known = {"I": [3.52448, 1.38338, 1, 0.99509, 1.93026], "II": [2.25459, 1.22962, 1, 0.84728, 0.70570]}[kind]
    np.testing.assert_allclose(fit.variance(np.array(HURSTS), kind), known, atol=6e-6)
    for hurst in (0.3, 0.7):
        plain = Noise(hurst, 3.0, kind=kind, normalise=False).coefficients()
        scaled = Noise(hurst, 3.0, kind=kind).coefficients()
        np.testing.assert_allclose(scaled * np.sqrt(fit.variance(hurst, kind)), plain, rtol=1e-12)


@pytest.mark.parametrize("kind", ["I", "II"])
def test_the_variance_at_the_horizon_can_be_matched(kind):
    for hurst, missing in ((0.1, {"I": 0.753, "II": 0.843}), (0.9, {"I": 0.463, "II": 0.998})):
        options = {"kind": kind, "rates": OFFICIAL}
        plain = Noise(hurst, 1.0, **options).covariance(1.0, 1.0)
        assert float(plain) == pytest.approx(missing[kind], abs=6e-4)  # what is known of the nearest weights
        matched = Noise(hurst, 3.0, **options, match_variance=True)
        assert float(matched.covariance(3.0, 3.0)) == pytest.approx(3 ** (2 * hurst), rel=1e-10)
        kernel = Noise(hurst, 3.0, **options, match_variance=True, normalise=False).covariance(3.0, 3.0)
        assert float(kernel) == pytest.approx(3 ** (2 * hurst) * float(fit.variance(hurst, kind)), rel=1e-10)
        # All weights are scaled alike, away from the nearest ones, at the cost that the moments say.
        w = matched.coefficients()
        nearest = Noise(hurst, 3.0, **options)
        np.testing.assert_allclose(w / nearest.coefficients(), (w / nearest.coefficients())[0], rtol=1e-10)
        b, c = fit.moments(kind, OFFICIAL, 3.0, hurst)
        w = np.asarray(w) * np.sqrt(fit.variance(hurst, kind))
        exact = (w @ fit.gram(kind, OFFICIAL, 3.0) @ w - 2 * b @ w + c) / c
        assert matched.cost() == pytest.approx(exact, rel=1e-5, abs=1e-9)
        assert matched.cost() >= nearest.cost()
    make = jax.jit(lambda h: Noise(h, 1.0, kind=kind, match_variance=True).coefficients())
    step = (make(0.3 + 1e-6) - make(0.3 - 1e-6)) / 2e-6
    np.testing.assert_allclose(jax.jacrev(make)(0.3), step, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["I", "II"])
def test_weights_scale_with_the_horizon(kind):
    one, seven = Noise(0.3, 1.0, kind=kind), Noise(0.3, 7.0, kind=kind)
    np.testing.assert_allclose(seven.rates, one.rates / 7)
    np.testing.assert_allclose(seven.coefficients(), 7 ** (0.3 - 0.5) * one.coefficients(), rtol=1e-7, atol=1e-8)
    assert seven.cost() == pytest.approx(one.cost(), rel=1e-7)


@pytest.mark.parametrize("kind", ["I", "II"])
def test_the_series_in_h_and_its_derivative(kind):
    rates = Noise(0.5, 1.0, kind=kind).rates
    exact = lambda h: fit.solve_weights(kind, tuple(rates), 1.0, np.array([h]))[0]
    table = jax.jit(lambda h: Noise(h, 1.0, kind=kind, normalise=False).coefficients())
    for h in (0.03, 0.2, 0.62, 0.97):
        np.testing.assert_allclose(table(h), exact(h), atol=2e-8)
    derivative = jax.jacfwd(table)(0.3)
    np.testing.assert_allclose(derivative, (exact(0.3 + 1e-5) - exact(0.3 - 1e-5)) / 2e-5, atol=1e-5)


def test_float32_has_the_digits_of_float64_and_finite_slopes_at_fast_rates():
    for kind in ("I", "II"):
        make = lambda h, kind=kind: Noise(h, 1.0, kind=kind, max_rate=1e4).coefficients()
        make = jax.jit(make)
        value, derivative = make(0.3), jax.jacfwd(make)(0.3)
        with jax.enable_x64(False):
            rough, steep = make(jnp.float32(0.3)), jax.jacrev(make)(jnp.float32(0.3))
            assert rough.dtype == jnp.float32
        np.testing.assert_allclose(rough, value, rtol=2e-6, atol=2e-6)
        np.testing.assert_allclose(steep, derivative, rtol=1e-4, atol=1e-3)


def test_the_stationary_factor_is_that_of_cauchy():
    rates = (0.0, *np.geomspace(1 / 20, 20, 15))
    g = np.array(rates)[1:]
    L = module.stationary_factor(rates)
    np.testing.assert_allclose(L[1:, 1:] @ L[1:, 1:].T * (g[:, None] + g), 1, rtol=1e-12)
    assert not L[0].any()
    assert not L[:, 0].any()
    # Where a numerical one has no number left.
    assert not np.isfinite(np.asarray(jnp.linalg.cholesky(jnp.asarray(1 / (g[:, None] + g), jnp.float32)))).all()
    rough = L.astype(np.float32).astype(float)
    np.testing.assert_allclose(rough[1:, 1:] @ rough[1:, 1:].T * (g[:, None] + g), 1, rtol=4e-7)


# ---- Laws. ----


def test_the_law_of_a_step():
    g = np.array([0.3, 2.0, 40.0])
    whole, half = (np.asarray(module.factor_covariance(tuple(g), jnp.asarray(h))) for h in (0.2, 0.1))
    decay = np.exp(-g * 0.1)
    np.testing.assert_allclose(whole, decay[:, None] * half * decay + half, rtol=0, atol=1e-14)
    stationary, full = 1 / (g[:, None] + g), np.exp(-g * 0.2)
    np.testing.assert_allclose(full[:, None] * stationary * full + whole, stationary, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rates", [(0.0, *np.geomspace(0.01, 512, 5)), OFFICIAL], ids=["with zero", "official"])
def test_the_joint_factor_of_a_step_in_either_precision(rates):
    from sdeflow.paths._factor_brownian import joint_factor

    every = np.array(rates if rates[0] == 0 else (0.0, *rates))
    factor = jax.jit(lambda h: joint_factor(rates, h))
    derivative = jax.jit(jax.jacrev(lambda h: (lambda L: L @ L.T)(joint_factor(rates, h))))
    for h in (1e-4, 1 / 256, 0.1, 1.0):
        x = (every[:, None] + every) * h
        exact = -np.expm1(-x) / np.where(x == 0, 1, x) + (x == 0)
        size = np.sqrt(np.diag(exact))
        L = np.asarray(factor(h))
        np.testing.assert_allclose(L @ L.T / size / size[:, None], exact / size / size[:, None], rtol=0, atol=1e-9)
        slope = (np.exp(-x) - exact) / h
        np.testing.assert_allclose(derivative(h), slope, rtol=1e-6, atol=1e-7 / h)
        with jax.enable_x64(False):
            L = np.asarray(factor(jnp.float32(h)), np.float64)
        np.testing.assert_allclose(L @ L.T / size / size[:, None], exact / size / size[:, None], rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["I", "II"])
def test_samples_have_the_covariance(kind):
    noise, ts = Noise(0.3, 1.0, spacing=0.1, kind=kind), np.array([0.1, 0.13, 0.6, 1.0])
    keys = jax.random.split(jax.random.key(1), 8)
    draws = np.asarray(jax.vmap(lambda key: noise.sample(ts, (1000,), key=key))(keys))
    exact = np.asarray(noise.covariance(ts[:, None], ts[None]))
    for i, j in ((0, 0), (0, 1), (1, 2), (3, 3), (0, 3)):
        assert_mean(draws[:, i] * draws[:, j], exact[i, j])
    assert_mean(draws[:, 3, :500] * draws[:, 3, 500:], 0.0)  # entries are independent


def test_coarser_rows_are_the_same_path():
    grid = sf.grids.uniform(0.0, 1.0, 8)
    noise = Noise(0.3, 1.0)
    fine = noise.path(grid, (2,), key=jax.random.key(0))
    coarse = fine.coarsen(4)
    y = np.zeros((6, 2))
    for h, driven in zip(grid.right - grid.left, fine.table.factors):
        y = np.exp(-noise.rates * h)[:, None] * y + driven
    z = np.zeros((6, 2))
    for h, driven in zip(coarse.grid.right - coarse.grid.left, coarse.table.factors):
        z = np.exp(-noise.rates * h)[:, None] * z + driven
    np.testing.assert_allclose(z, y, atol=1e-13)
    np.testing.assert_allclose(coarse.table.W.sum(0), fine.table.W.sum(0), atol=1e-14)


def test_rows_do_not_depend_on_padding_and_counters_have_the_same_law():
    grid = sf.grids.uniform(0.0, 1.0, 6)
    rates = Noise(0.3, 1.0).rates
    short = sf.paths.FactorBrownian(grid, (2,), rates=rates, key=jax.random.key(0))
    longer = sf.paths.FactorBrownian(grid.pad(9), (2,), rates=rates, key=jax.random.key(0))
    np.testing.assert_array_equal(short.table.factors, longer.table.factors[:6])
    np.testing.assert_array_equal(short.table.W, short.table.factors[:, 0])
    counter = sf.paths.FactorBrownian(grid, (8000,), rates=rates, key=jax.random.key(0), storage="counter")
    row = counter.row(3, 1 / 6)
    exact = np.asarray(module.factor_covariance(tuple(rates), jnp.asarray(1 / 6)))
    for j in (0, 2, 5):
        assert_mean((row.factors[j] * row.factors[5]).reshape(8, -1), exact[j, 5])
    back = counter.evaluate(2 / 6, 1 / 6, use_levy=True)
    assert np.isnan(back.factors).all()
    np.testing.assert_allclose(back.W, -counter.evaluate(1 / 6, 2 / 6))


# ---- Densities. ----


@pytest.mark.parametrize("kind", ["I", "II"])
def test_the_density_is_that_of_the_covariance(kind):
    for hurst in (0.3, 0.8):
        C = np.asarray(Noise(hurst, 1.0, spacing=1 / 64, kind=kind).covariance(TS[:, None], TS[None]))
        exact = stats.multivariate_normal(np.zeros(12), C).logpdf(XS)
        assert log_prob(hurst, TS, XS, kind) == pytest.approx(exact, rel=1e-9)
        difference = (log_prob(hurst + 1e-5, TS, XS, kind) - log_prob(hurst - 1e-5, TS, XS, kind)) / 2e-5
        assert slope(hurst, TS, XS, kind) == pytest.approx(difference, rel=1e-5)


def test_noise_gaps_copies_and_the_start():
    noise = Noise(0.3, 1.0)
    C = np.asarray(noise.covariance(TS[:, None], TS[None]))
    seen = np.delete(np.arange(12), [3, 7])
    some = XS.copy()
    some[[3, 7]] = np.nan
    exact = stats.multivariate_normal(np.zeros(10), C[np.ix_(seen, seen)] + 0.04 * np.eye(10)).logpdf(XS[seen])
    assert noise.log_prob(TS, some, obs_std=0.2) == pytest.approx(exact, rel=1e-9)
    plain = float(noise.log_prob(TS, XS))
    assert noise.log_prob(np.append(0, TS), np.append(0, XS)) == pytest.approx(plain, rel=1e-12)
    copies = noise.log_prob(TS, np.stack([XS, 2 * XS], axis=1))
    assert copies == pytest.approx(plain + float(noise.log_prob(TS, 2 * XS)), rel=1e-12)
    batch = jax.vmap(lambda h: Noise(h, 1.0).log_prob(TS, XS))(jnp.array([0.3, 0.6]))
    assert batch[0] == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize("kind", ["I", "II"])
def test_the_density_in_float32(kind):
    exact, steep = log_prob(0.3, TS, XS, kind), slope(0.3, TS, XS, kind)
    with jax.enable_x64(False):
        arguments = (jnp.float32(0.3), jnp.asarray(TS, jnp.float32), jnp.asarray(XS, jnp.float32), kind)
        assert both(*arguments)[0].dtype == jnp.float32
        assert log_prob(*arguments) == pytest.approx(exact, abs=2e-4)
        assert slope(*arguments) == pytest.approx(steep, rel=1e-3)


def test_an_index_that_depends_on_time():
    """Against the covariances of multifractional Brownian motion, to the three digits that six factors give."""
    noise = Noise(lambda t: 0.3 + 0.5 * t, 1.0, kind="II", max_rate=200.0, normalise=False)
    known = {(0.1, 0.1): 0.2304, (0.5, 0.5): 0.4475, (1.0, 1.0): 0.7753, (0.1, 0.5): 0.1476, (0.5, 1.0): 0.4820}
    for (s, t), value in known.items():
        assert noise.covariance(s, t) == pytest.approx(value, abs=1e-4)
    C = np.asarray(noise.covariance(TS[:, None], TS[None]))
    exact = stats.multivariate_normal(np.zeros(12), C).logpdf(XS)
    assert noise.log_prob(TS, XS) == pytest.approx(exact, rel=1e-9)
    draws = noise.sample(np.array([0.1, 1.0]), (20_000,), key=jax.random.key(0)).reshape(2, 8, -1)
    assert_mean(draws[0] * draws[1], float(noise.covariance(0.1, 1.0)))
    assert np.isnan(Noise(lambda t: 1.0 + t, 1.0, kind="II").coefficients(0.0)).all()


def test_an_optimiser_cannot_leave_the_interval_nor_move_the_rates():
    import equinox as eqx

    noise = Noise(0.3, 1.0)
    leaves = jax.tree_util.tree_leaves(eqx.filter(noise, eqx.is_array))
    assert len(leaves) == 1
    for step in (50.0, -50.0):
        moved = jax.tree_util.tree_map(lambda x, step=step: x + step, noise)
        assert np.isfinite(moved.coefficients()).all()
        assert 0.0199 < moved.hurst < 0.9801


# ---- Bad input. ----


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Noise(0.0, 1.0), "hurst must lie strictly between"),
        (lambda: Noise(1.2, 1.0), "hurst must lie strictly between"),
        (lambda: Noise(np.ones(2), 1.0), "hurst must be a scalar"),
        (lambda: Noise(lambda t: t, 1.0), 'needs kind="II"'),
        (lambda: Noise(0.3, -1.0), "horizon must be positive"),
        (lambda: Noise(0.3, 1.0, kind="III"), "kind must be"),
        (lambda: Noise(0.3, 1.0, spacing=0.1, max_rate=3.0), "give one of them"),
        (lambda: Noise(0.3, 1.0, spacing=500.0), "must exceed the slowest"),
        (lambda: Noise(0.3, 1.0, num_factors=1), "at least 2"),
        (lambda: Noise(0.3, 1.0, rates=[1.0, 1.0]), "distinct"),
        (lambda: Noise(0.3, 1.0, kind="II").structure(0.1), "not stationary"),
        (lambda: Noise(0.3, 1.0).log_prob([0.5, 2.0], [0.1, 0.2]), "horizon that covers"),
        (lambda: Noise(0.3, 1.0).log_prob([0.5, 0.5], [0.1, 0.2]), "must increase"),
        (lambda: Noise(0.3, 1.0).log_prob([-0.5, 0.5], [0.1, 0.2]), "not negative"),
        (lambda: Noise(0.3, 1.0).log_prob([0.0, 0.5], [0.1, 0.2]), "relative to B"),
        (lambda: Noise(0.3, 1.0).log_prob([0.5], [0.1, 0.2]), "xs must have shape"),
        (lambda: Noise(0.3, 1.0).log_prob(0.5, [0.1]), "ts must have shape"),
        (lambda: Noise(0.3, 1.0).log_prob([0.5], [0.1], obs_std=-0.1), "not negative, got -0.1"),
        (lambda: Noise(0.3, 1.0).log_prob([0.5], [0.1], obs_std=[0.1]), "obs_std must be a scalar"),
        (lambda: Noise(0.3, 1.0).log_prob([0.5], [0.1], obs_std=None), "obs_std must be a scalar"),
    ],
)
def test_bad_input(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_traced_times_that_do_not_fit_give_nan():
    log_prob = jax.jit(lambda ts: Noise(0.3, 1.0).log_prob(ts, jnp.zeros(2)))
    assert np.isfinite(log_prob(jnp.array([0.5, 1.0])))
    assert np.isnan(log_prob(jnp.array([0.5, 1.5])))
    assert np.isnan(log_prob(jnp.array([0.5, 0.5])))


def test_weights_that_cancel_are_warned_of_in_float32():
    with jax.enable_x64(False), pytest.warns(sf.SdeflowWarning, match="float32 cannot follow"):
        Noise(0.3, 1.0, kind="II", rates=np.geomspace(1 / 20, 20, 8))


@pytest.mark.parametrize("hurst", [None, "0.3"])
def test_what_is_no_number_is_no_index(hurst):
    with pytest.raises(TypeError, match="hurst must be a number, got (NoneType|str)"):
        Noise(hurst, 1.0)


def test_an_infinite_observation_is_not_a_missing_one():
    assert not np.isfinite(Noise(0.5, 1.0).log_prob([0.5, 1.0], [np.inf, 0.1]))
