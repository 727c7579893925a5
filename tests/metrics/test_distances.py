"""Distances that a loss may use: energy distance, MMD and sliced transport against sums by hand and closed forms."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers.stats import assert_mean

import sdeflow as sf

pytestmark = pytest.mark.usefixtures("x64_module")

energy_distance, mmd, sliced_wasserstein = sf.metrics.energy_distance, sf.metrics.mmd, sf.metrics.sliced_wasserstein


def pairs(x, y, kernel):
    return np.array([[kernel(np.linalg.norm(u - v)) for v in y] for u in x])


def by_pairs(x, y, kernel, biased):
    def inside(x):
        K = pairs(x, x, kernel)
        return K.mean() if biased else (K.sum() - np.trace(K)) / (len(x) * (len(x) - 1))

    return pairs(x, y, kernel).mean() - inside(x) / 2 - inside(y) / 2


def clouds(n=9, m=13, D=3, seed=0):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, D)), 0.7 * rng.normal(size=(m, D)) + 0.5
    y[1] = y[0]
    return x, y


# ---- Sums over pairs. ----


@pytest.mark.parametrize("biased", [False, True])
def test_both_are_the_sums_over_pairs(biased):
    x, y = clouds()
    np.testing.assert_allclose(energy_distance(x, y, biased=biased), by_pairs(x, y, lambda d: d, biased), rtol=1e-7)
    widths = (0.3, 1.0, 10.0)
    kernel = lambda d: sum(np.exp(-(d**2) / (2 * h**2)) for h in widths)
    wanted = -2 * by_pairs(x, y, kernel, biased)
    np.testing.assert_allclose(mmd(x, y, bandwidths=widths, biased=biased), wanted, rtol=1e-10)
    both = np.vstack([x, y])
    median = np.median(np.linalg.norm(both[:, None] - both, axis=-1)[np.triu_indices(len(both), 1)])
    np.testing.assert_allclose(mmd(x, y, biased=biased), mmd(x, y, bandwidths=median, biased=biased), rtol=1e-10)


def test_they_have_no_bias_whatever_the_numbers_of_points():
    # On a line the energy distance is the integral of (F - G)^2; of normal laws with a shift s it is in closed form.
    from scipy.stats import norm

    s = 0.8
    mean = lambda m, v: m * (2 * norm.cdf(m / np.sqrt(v)) - 1) + 2 * np.sqrt(v) * norm.pdf(m / np.sqrt(v))
    wanted = mean(s, 2.0) - mean(0.0, 2.0)
    x, y = jr.normal(jr.key(0), (20_000, 3, 1)), s + jr.normal(jr.key(1), (20_000, 5, 1))
    assert_mean(jax.jit(jax.vmap(energy_distance))(x, y), wanted)
    # E exp(-(X - Y)^2 / (2 h^2)) for X - Y ~ N(m, 2).
    kernel = lambda m: np.exp(-(m**2) / (2 * (1 + 2))) / np.sqrt(1 + 2)
    assert_mean(jax.jit(jax.vmap(lambda x, y: mmd(x, y, bandwidths=1.0)))(x, y), 2 * kernel(0) - 2 * kernel(s))


def test_equal_samples_have_distance_zero_when_counted_with_bias():
    x, _ = clouds()
    np.testing.assert_allclose(energy_distance(x, x[::-1], biased=True), 0, atol=1e-8)
    np.testing.assert_allclose(mmd(x, x[::-1], biased=True), 0, atol=1e-14)


def test_their_gradients_are_finite_differences_and_finite_at_ties():
    x, y = clouds()
    way = np.random.default_rng(1).normal(size=x.shape)
    for distance in (energy_distance, lambda x, y: mmd(x, y, bandwidths=(0.5, 2.0))):
        distance = jax.jit(distance)
        along = (jax.grad(distance)(x, y) * way).sum()
        wanted = (distance(x + 1e-6 * way, y) - distance(x - 1e-6 * way, y)) / 2e-6
        np.testing.assert_allclose(along, wanted, rtol=1e-6)
        assert all(
            np.isfinite(g).all() for g in jax.grad(distance, argnums=(0, 1))(jnp.zeros((3, 2)), jnp.zeros((3, 2)))
        )


def test_they_stream_over_blocks(monkeypatch):
    from sdeflow.metrics import _blocks

    x, y = clouds()
    wanted = energy_distance(x, y), mmd(x, y), jax.grad(energy_distance)(x, y)
    monkeypatch.setattr(_blocks, "BLOCK", 1)
    assert _blocks.block_rows(9, 13, None) == 5
    found = energy_distance(x, y), mmd(x, y), jax.grad(energy_distance)(x, y)
    for u, v in zip(found, wanted):
        np.testing.assert_allclose(u, v, rtol=1e-10)


def test_no_matrix_of_pairs_is_kept():
    # 8000 points in 50 dimensions: a matrix of pairs would take 256 MB in float32, and its gradient more.
    cloud = jax.ShapeDtypeStruct((8000, 50), jnp.float32)
    compiled = jax.jit(jax.grad(energy_distance)).lower(cloud, cloud).compile()
    memory = compiled.memory_analysis()
    assert memory is None or memory.temp_size_in_bytes < 6e7


def test_float32_keeps_its_digits_far_from_zero():
    x, y = clouds(50, 60)
    with jax.enable_x64(False):
        u, v = np.float32(x) + np.float32(1e3), np.float32(y) + np.float32(1e3)
        found = energy_distance(u, v), mmd(u, v), sliced_wasserstein(u, v, key=jr.key(0))
    x, y = np.float64(u) - 1e3, np.float64(v) - 1e3
    np.testing.assert_allclose(found[0], energy_distance(x, y), rtol=1e-4)
    np.testing.assert_allclose(found[1], mmd(x, y), rtol=1e-4)
    assert found[2].dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x, y: energy_distance(x, y[:, :2]), "one dimension, got 3 and 2"),
        (lambda x, y: energy_distance(x[:1], y), "at least 2 points"),
        (lambda x, y: mmd(x * np.nan, y), "x has points that are infinite or NaN"),
        (lambda x, y: mmd(x, y, bandwidths=0.0), "bandwidths must be positive"),
        (lambda x, y: mmd(x, y, bandwidths="mean"), 'numbers or "median"'),
        (lambda x, y: sliced_wasserstein(x, y[:0], key=jr.key(0)), "n and D at least 1"),
        (lambda x, y: sliced_wasserstein(x, y, key=jr.key(0), p=0.5), "p must be at least 1"),
        (lambda x, y: sliced_wasserstein(x, y, key=jr.key(0), p=1, control_variate="lower"), "those of p = 2"),
        (lambda x, y: sliced_wasserstein(x, y, key=jr.key(0), control_variate="both"), "control_variate must be"),
        (lambda x, y: sliced_wasserstein(x, y, key=jr.key(0), regression="ridge"), "regression"),
        (
            lambda x, y: sliced_wasserstein(x, y, key=jr.key(0), control_variate="upper", num_projections=3),
            "and 4 with",
        ),
        (lambda x, y: sliced_wasserstein(x, y, key=jr.key(0), a=-np.ones(9)), "none is negative"),
    ],
)
def test_bad_input_is_an_error_that_says_what(call, says):
    with pytest.raises(ValueError, match=says):
        call(*clouds())


# ---- Sliced transport. ----

SHIFT = np.array([1.0, 0, 0, -0.5, 2.0])


def squares(num, L, **options):
    """SW^2 of fresh samples of N(shift, 1.3^2 I) and N(0, 0.6^2 I), whose truth is |shift|^2 / 5 + 0.7^2 = 1.54."""

    @jax.jit
    def once(key):
        first, second, third = jr.split(key, 3)
        x = SHIFT + 1.3 * jr.normal(first, (4000, 5), jnp.float32)
        y = 0.6 * jr.normal(second, (4000, 5), jnp.float32)
        return sliced_wasserstein(x, y, key=third, num_projections=L, **options) ** 2

    return np.stack([once(key) for key in jr.split(jr.key(3), num)])


def test_control_variates_reduce_the_noise_about_the_truth():
    plain, upper = squares(24, 20, control_variate=None), squares(24, 20)
    assert_mean(plain, 1.54)
    np.testing.assert_allclose(upper, 1.54, atol=0.12)
    assert 0.15 < plain.std(ddof=1) < 0.38
    # What remains is the noise of the clouds themselves.
    assert upper.std(ddof=1) < 0.2 * plain.std(ddof=1)


@pytest.mark.slow
def test_the_noise_over_directions_is_that_of_the_regression():
    # On one pair of clouds. What a slope cannot tell is the residual of a regression over many directions, in NumPy.
    x = SHIFT + 1.3 * jr.normal(jr.key(10), (4000, 5))
    y = 0.6 * jr.normal(jr.key(100), (4000, 5))
    u = np.random.default_rng(0).normal(size=(2000, 5))
    along = [np.sort(np.asarray(z) @ (u / np.linalg.norm(u, axis=1, keepdims=True)).T, axis=0) for z in (x, y)]
    costs = ((along[0] - along[1]) ** 2).mean(0)
    lower = (along[0].mean(0) - along[1].mean(0)) ** 2
    upper = lower + along[0].var(0) + along[1].var(0)
    mean = (((x.mean(0) - y.mean(0)) ** 2).sum() + x.var(0).sum() + y.var(0).sum()) / 5
    truth = costs.mean() - np.polyfit(upper, costs, 1)[0] * (upper.mean() - mean)
    residual = lambda C: (costs - np.polyval(np.polyfit(C, costs, 1), C)).std() / np.sqrt(20)

    def squared(variate, regression="centred"):
        at = lambda key: sliced_wasserstein(
            x, y, key=key, num_projections=20, control_variate=variate, regression=regression
        )
        return np.asarray(jax.jit(lambda keys: jax.lax.map(at, keys))(jr.split(jr.key(2), 150))) ** 2

    for variate, wanted in ((None, costs.std() / np.sqrt(20)), ("lower", residual(lower)), ("upper", residual(upper))):
        found = squared(variate)
        np.testing.assert_allclose(found.std(ddof=1), wanted, rtol=0.3)
        # No further from the truth of these clouds than five standard errors, and the bias of a fitted slope.
        np.testing.assert_allclose(found.mean(), truth, atol=5 * wanted / np.sqrt(150) + wanted / 2)
    # The published slope, whose noise an independent program measured on other clouds of these laws.
    for variate, wanted in (("lower", 0.0491), ("upper", 0.0465)):
        np.testing.assert_allclose(squared(variate, "official").std(ddof=1), wanted, rtol=0.35)


def test_a_shift_is_exact_with_the_lower_variate_and_centred_regression():
    x = np.random.default_rng(0).normal(size=(50, 4))
    y = x + np.sqrt([1.0, 2.0, 0.0, 3.0])
    at = lambda key, **options: sliced_wasserstein(
        x, y, key=key, num_projections=10, control_variate="lower", **options
    )
    for key in jr.split(jr.key(0), 5):
        np.testing.assert_allclose(at(key), np.sqrt(1.5), rtol=1e-12)
    assert np.std([at(key, regression="official") for key in jr.split(jr.key(0), 5)]) > 0.01


def test_two_anisotropic_clouds_in_the_plane_against_quadrature():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 2)) * [2.0, 0.5], rng.normal(size=(40, 2)) * [0.3, 1.0] + [0.5, 0.0]
    angles = (np.arange(20_000) + 0.5) * np.pi / 20_000
    u = np.stack([np.cos(angles), np.sin(angles)])
    gaps = np.sort(x @ u, axis=0) - np.sort(y @ u, axis=0)
    for p in (1, 2, 3):
        exact = (np.abs(gaps) ** p).mean() ** (1 / p)
        found = sliced_wasserstein(x, y, key=jr.key(0), p=p, num_projections=20_000)
        np.testing.assert_allclose(found, exact, rtol=1e-2 if p != 2 else 1e-3)


def test_weights_and_unequal_sizes_are_repeated_points():
    x, y = clouds(6, 9)
    options = {"key": jr.key(0), "num_projections": 8}
    for variate in ("auto", "lower", None):
        if variate == "auto":
            equal = sliced_wasserstein(x.repeat(3, 0), y.repeat(2, 0), control_variate=variate, **options)
            np.testing.assert_allclose(sliced_wasserstein(x, y, control_variate=variate, **options), equal, rtol=1e-12)
        counts = np.array([1, 0, 2, 3, 1, 2])
        weighted = sliced_wasserstein(x, y, a=counts, control_variate=variate, **options)
        repeated = sliced_wasserstein(x.repeat(counts, 0), y, control_variate=variate, **options)
        np.testing.assert_allclose(weighted, repeated, rtol=1e-12)
    one = np.random.default_rng(0).normal(size=(2, 20, 1)) * [[[1.0]], [[2.0]]]
    np.testing.assert_allclose(
        sliced_wasserstein(one[0], one[1], **options), sf.metrics.wasserstein(one[0], one[1], 2), rtol=1e-12
    )


def test_equal_clouds_and_equal_means_are_no_division_by_zero():
    x, y = clouds(10, 10)
    y = y - y.mean(0) + x.mean(0)
    for variate in ("upper", "lower"):
        for regression in ("centred", "official"):
            at = jax.jit(
                lambda x, y, v=variate, r=regression: sliced_wasserstein(
                    x, y, key=jr.key(0), num_projections=8, control_variate=v, regression=r
                )
            )
            slope = jax.jit(jax.grad(at))
            assert float(at(x, x)) == 0
            assert not np.asarray(slope(x, x)).any()
            assert float(at(x, y)) >= 0
            assert np.isfinite(slope(x, y)).all()
    lower = sliced_wasserstein(x, y, key=jr.key(0), control_variate="lower")
    plain = sliced_wasserstein(x, y, key=jr.key(0), control_variate=None)
    np.testing.assert_allclose(lower, plain, rtol=1e-10)


@pytest.mark.parametrize("constant", [False, True])
def test_the_gradient_of_sliced_transport(constant):
    x, y = clouds(6, 9)
    way = np.random.default_rng(1).normal(size=x.shape)
    at = jax.jit(lambda x: sliced_wasserstein(x, y, key=jr.key(0), num_projections=8, constant_slope=constant))
    along = (jax.grad(at)(x) * way).sum()
    wanted = (at(x + 1e-6 * way) - at(x - 1e-6 * way)) / 2e-6
    if constant:
        assert abs(along - wanted) > 1e-6 * abs(wanted)
    else:
        np.testing.assert_allclose(along, wanted, rtol=1e-6)
