"""Guidance by what was observed: exact on normal data, biased as tabulated where it is biased."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import sdeflow as sf
from sdeflow.diffusion import (
    DDIM,
    DPS,
    EDM,
    VP,
    ClassifierGuided,
    Denoiser,
    GaussianDenoiser,
    MeanReverting,
    PosteriorGuided,
    UniPC,
    sample,
)
from tests.helpers import diffusion as gmm

pytestmark = pytest.mark.usefixtures("x64_module")

MEAN, COVARIANCE = np.array([1.0, -1.0]), np.array([[1.0, 0.8], [0.8, 1.0]])
A, SEEN, NOISE = np.array([[1.0, 0.0]]), np.array([2.2]), 0.3
LONG = EDM(t_min=1e-3, t_max=20.0)
STEPS = {"solver": DDIM(1.0), "num_steps": 300, "grid": "edm"}


def posterior(mean, covariance, a, y, noise):
    gain = covariance @ a.T @ np.linalg.inv(a @ covariance @ a.T + noise**2 * np.eye(len(a)))
    return mean + gain @ (y - a @ mean), covariance - gain @ a @ covariance


def normal(schedule, mean=MEAN, covariance=COVARIANCE):
    return GaussianDenoiser.from_covariance(schedule, jnp.asarray(mean), jnp.asarray(covariance))


@eqx.filter_jit
def _predict(denoiser, t, x):
    return {kind: denoiser.predict(kind, t, x) for kind in ("data", "noise", "score")}


def predict(denoiser, kind, t, x):
    # All kinds in one program, whatever t.
    return np.asarray(_predict(denoiser, jnp.asarray(t, x.dtype), x)[kind])


def guided(schedule, method, **options):
    return PosteriorGuided(normal(schedule), A, SEEN, noise_std=NOISE, method=method, **options)


def test_the_posterior_has_its_known_digits():
    mean, covariance = posterior(MEAN, COVARIANCE, A, SEEN, NOISE)
    np.testing.assert_allclose(mean, [2.100917, -0.119266], atol=5e-7)
    np.testing.assert_allclose(covariance, [[0.082569, 0.066055], [0.066055, 0.412844]], atol=5e-7)


@pytest.mark.parametrize(
    "schedule", [VP(), LONG, MeanReverting(VP(), np.array([0.5, 2.0]), scale=0.6)], ids=["VP", "EDM", "mean"]
)
def test_moment_matching_is_exact_on_normal_data(schedule):
    g = guided(schedule, "tmpd")
    exact = normal(schedule, *posterior(MEAN, COVARIANCE, A, SEEN, NOISE))
    x = jnp.array([0.3, 0.7])
    for share in (0.01, 0.3, 1.0):
        t = share * schedule.t_max
        for kind in ("data", "noise", "score"):
            wanted = predict(exact, kind, t, x)
            np.testing.assert_allclose(predict(g, kind, t, x), wanted, rtol=1e-8, atol=1e-9)


# Of other sizes, so that neither runs the program of the other.
@pytest.mark.parametrize(("direct", "count"), [(16, 70), (512, 71)])
def test_many_observations_directly_and_by_conjugate_gradients(monkeypatch, direct, count):
    monkeypatch.setattr(sf.diffusion._inverse, "_DIRECT", direct)
    # Sums of neighbours in 80 components.
    i = np.arange(80)
    covariance = np.exp(-np.abs(i[:, None] - i) / 5)
    a = np.eye(80)[:count] + np.eye(80, k=1)[:count]
    y = np.sin(np.arange(count, dtype=float))
    g = PosteriorGuided(normal(VP(), np.zeros(80), covariance), a, y, noise_std=0.5)
    exact = normal(VP(), *posterior(np.zeros(80), covariance, a, y, 0.5))
    x = jnp.cos(jnp.arange(80.0))
    for t in (0.1, 0.6):
        np.testing.assert_allclose(predict(g, "data", t, x), predict(exact, "data", t, x), atol=1e-4)


def test_precise_observations_take_more_iterations_than_there_are_of_them(monkeypatch):
    monkeypatch.setattr(sf.diffusion._inverse, "_DIRECT", 16)
    # A random square operator, whose equations are ill-conditioned far from the data: stopped early they were off by 6.
    count = 80
    i, x = np.arange(count), 50 * jnp.cos(jnp.arange(80.0))
    covariance = np.exp(-np.abs(i[:, None] - i) / 5)
    a = np.random.default_rng(0).normal(size=(count, count)) / np.sqrt(count)
    g = PosteriorGuided(normal(EDM(), np.zeros(count), covariance), a, np.sin(0.3 * i), noise_std=0.01)
    exact = normal(EDM(), *posterior(np.zeros(count), covariance, a, np.sin(0.3 * i), 0.01))
    np.testing.assert_allclose(predict(g, "data", 50.0, x), predict(exact, "data", 50.0, x), atol=1e-4)


def test_pseudoinverse_guidance_is_exact_on_independent_components():
    covariance = 0.49 * np.eye(2)
    g = PosteriorGuided(normal(VP(), MEAN, covariance), A, SEEN, noise_std=NOISE, method="pigdm", data_std=0.7)
    exact = normal(VP(), *posterior(MEAN, covariance, A, SEEN, NOISE))
    x = jnp.array([0.3, 0.7])
    np.testing.assert_allclose(predict(g, "score", 0.3, x), predict(exact, "score", 0.3, x), rtol=1e-9)


@functools.cache
def moments(method):
    """Exact moments of what 300 steps lead to: they are affine in the start and in the noise."""
    end = lambda x, z: sample(guided(LONG, method), x, noise=z, **STEPS)
    x, z = jnp.asarray(MEAN), jnp.zeros((300, 2))
    mean, pull = jax.vjp(end, x, z)
    by_x, by_z = (np.asarray(j).reshape(2, -1) for j in jax.vmap(pull)(jnp.eye(2)))
    return np.asarray(mean), 400 * by_x @ by_x.T + by_z @ by_z.T


@pytest.mark.parametrize(
    ("method", "mean", "covariance"),
    [
        ("tmpd", (2.1003, -0.1187), (0.0785, 0.0624, 0.4014)),
        ("pigdm", (2.0703, -0.1660), (0.0875, 0.0775, 0.4190)),
    ],
)
def test_bias_of_guidance_has_its_known_digits(method, mean, covariance):
    # Theirs are of 20 000 draws; ours exact.
    m, c = moments(method)
    found = c[[0, 0, 1], [0, 1, 1]]
    errors = np.sqrt(np.array([2 * c[0, 0] ** 2, c[0, 0] * c[1, 1] + c[0, 1] ** 2, 2 * c[1, 1] ** 2]) / 20_000)
    assert (np.abs(m - mean) < 5 * np.sqrt(np.diag(c) / 20_000)).all()
    assert (np.abs(found - covariance) < 5 * errors).all()


def test_one_point_for_the_data_is_most_biased():
    # The same steps by hand: data m + G (x - m), guided by s^2 G' A' (y - A data) / noise^2.
    s = np.linspace(20 ** (1 / 7), 1e-3 ** (1 / 7), 301) ** 7
    mean, covariance = MEAN, 400 * np.eye(2)
    for here, there in zip(s[:-1], s[1:]):
        g = COVARIANCE @ np.linalg.inv(COVARIANCE + here**2 * np.eye(2))
        pull = here**2 * g.T @ A.T / NOISE**2
        slope = (np.eye(2) - pull @ A) @ g
        data = MEAN + slope @ (mean - MEAN) + pull @ (SEEN - A @ MEAN)
        share = (there / here) ** 2
        mean = share * mean + (1 - share) * data
        step = share * np.eye(2) + (1 - share) * slope
        covariance = step @ covariance @ step.T + there**2 * (1 - share) * np.eye(2)
    m, c = moments("point")
    np.testing.assert_allclose(m, mean, atol=1e-8)
    np.testing.assert_allclose(c, covariance, atol=1e-8)
    # It does not know how uncertain the data is: the observation is believed too much.
    assert abs(m[1] + 0.119266) > 0.25
    assert c[0, 1] < 0.25 * 0.066055


@pytest.mark.parametrize(
    ("scale", "mean", "covariance"),
    [(1.0, (2.202, 0.142), (0.313, 0.0085, 0.302)), (0.3, (2.201, 0.081), (0.0299, 0.0007, 0.2935))],
)
def test_bias_of_dps_has_its_known_digits(scale, mean, covariance):
    count, g = 4000, normal(LONG)
    draw = lambda x, key: sample(g, x, constraint=DPS(A, SEEN, scale), key=key, **STEPS)
    x = MEAN + 20 * jr.normal(jr.key(0), (count, 2))
    x = np.asarray(jax.jit(jax.vmap(draw))(x, jr.split(jr.key(1), count)))
    c = np.cov(x.T)
    # Both theirs, of 20 000 draws, and ours have errors.
    scatter = 5 * np.sqrt(1 / count + 1 / 20_000)
    assert (np.abs(x.mean(axis=0) - mean) < scatter * np.sqrt(np.diag(c))).all()
    spread = np.sqrt([2 * c[0, 0] ** 2, c[0, 0] * c[1, 1] + c[0, 1] ** 2, 2 * c[1, 1] ** 2])
    assert (np.abs(c[[0, 0, 1], [0, 1, 1]] - covariance) < scatter * spread).all()


def test_every_sampler_and_equation_takes_guidance():
    g = guided(VP(), "tmpd")
    mean, covariance = posterior(MEAN, COVARIANCE, A, SEEN, NOISE)
    exact, x = normal(VP(), mean, covariance), jnp.array([0.4, -1.2])
    end = exact.transport(x, 1.0, VP().t_min)
    np.testing.assert_allclose(sample(g, x, solver=UniPC(3), num_steps=60), end, atol=2e-4)
    flow = sf.solve(sf.diffusion.ProbabilityFlow(g), x, [1.0, 0.1])
    np.testing.assert_allclose(flow.final, exact.transport(x, 1.0, 0.1), atol=5e-3)


def test_guidance_on_the_mixture_matches_two_moments():
    # With nearly no information its exact likelihood is that of the mean: the gradient is the covariance's row.
    t, x, seen = 0.4, jnp.array([0.2, -0.4]), jnp.array([0.5])
    plain = gmm.denoiser()
    g = PosteriorGuided(plain, A, seen, noise_std=100.0)
    push = predict(g, "score", t, x) - predict(plain, "score", t, x)
    jacobian = np.asarray(jax.jit(jax.jacfwd(lambda x: plain.predict("data", t, x)))(x))
    wanted = jacobian.T @ A.T @ (seen - A @ predict(plain, "data", t, x)) / 100.0**2
    np.testing.assert_allclose(push, wanted, rtol=1e-3)


def test_operators_and_scales():
    x, t = jnp.ones((2, 3)), 0.4
    schedule = VP()
    image = Denoiser(lambda t, x, args: schedule.sigma(t) * x, schedule)
    rows = np.kron(np.eye(2), np.ones((1, 3)) / 3)
    by_matrix = PosteriorGuided(image, rows, jnp.array([1.0, 2.0]), noise_std=0.1)
    by_function = PosteriorGuided(image, lambda x: x.mean(axis=1), jnp.array([1.0, 2.0]), noise_std=0.1)
    np.testing.assert_allclose(predict(by_matrix, "data", t, x), predict(by_function, "data", t, x), rtol=1e-12)
    affine = PosteriorGuided(image, lambda x: 2 * x.mean(axis=1) - 1, jnp.array([1.0, 3.0]), noise_std=0.2)
    np.testing.assert_allclose(predict(affine, "data", t, x), predict(by_matrix, "data", t, x), rtol=1e-12)
    half = PosteriorGuided(image, rows, jnp.array([1.0, 2.0]), noise_std=0.1, scale=0.5)
    push = lambda g: predict(g, "score", t, x) - predict(image, "score", t, x)
    np.testing.assert_allclose(push(half), push(by_matrix) / 2, rtol=1e-10)
    exact = PosteriorGuided(image, rows, jnp.array([1.0, 2.0]), noise_std=0.0)
    assert bool(jnp.isfinite(predict(exact, "data", t, x)).all())
    out = predict(by_matrix, "data", t, x.astype(jnp.float32))
    assert out.dtype == np.float32


def test_classifier_guidance_with_the_true_likelihood_is_conditional():
    # On the mixture the score of one class is the score of all plus the gradient of the class's log-probability.
    both, one = gmm.denoiser(), gmm.denoiser(scale=1.0)

    def log_likelihood(t, x, args):
        alpha, sigma = gmm.SCHEDULE.alpha(t), gmm.SCHEDULE.sigma(t)
        turned = jnp.einsum("kji,kj->ki", gmm._TURNS, x - alpha * gmm.MEANS)
        v = alpha**2 * gmm.DEVIATIONS**2 + sigma**2
        logits = jnp.log(gmm.WEIGHTS) - (turned**2 / v + jnp.log(v)).sum(-1) / 2
        return jax.nn.logsumexp(jnp.where(gmm.CLASSES == 1, logits, -jnp.inf)) - jax.nn.logsumexp(logits)

    g, x = ClassifierGuided(both, log_likelihood), jnp.array([0.3, -0.2])
    for kind in ("noise", "data"):
        np.testing.assert_allclose(predict(g, kind, 0.3, x), predict(one, kind, 0.3, x), rtol=1e-9)
    # A scale goes on along the same line, like that of `Guided`.
    np.testing.assert_allclose(
        predict(ClassifierGuided(both, log_likelihood, 3.0), "noise", 0.3, x),
        predict(gmm.denoiser(scale=3.0), "noise", 0.3, x), rtol=1e-9,
    )  # fmt: skip


def test_gradients_in_what_was_observed():
    x, h = jnp.array([0.4, -1.2]), 1e-5
    f = lambda y: sample(
        PosteriorGuided(normal(VP()), A, y, noise_std=NOISE), x, solver=UniPC(2), num_steps=6
    )[1]  # fmt: skip
    f, y = jax.jit(f), jnp.asarray(SEEN)
    assert float(jax.grad(f)(y)[0]) == pytest.approx(float(f(y + h) - f(y - h)) / (2 * h), rel=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: guided(VP(), "dps"), ValueError, "method"),
        (lambda: PosteriorGuided(normal(VP()), A, SEEN, noise_std=-1.0), ValueError, "noise_std"),
        (lambda: PosteriorGuided(normal(VP()), A, SEEN, noise_std=0.0, method="point"), ValueError, "positive"),
        (lambda: PosteriorGuided(normal(VP()), A, SEEN, noise_std=0.1, data_std=0.0), ValueError, "data_std"),
        (lambda: PosteriorGuided(normal(VP()), A[0], SEEN, noise_std=0.1), TypeError, "operator"),
        (lambda: PosteriorGuided(jnp.sin, A, SEEN, noise_std=0.1), TypeError, "denoiser"),
        (lambda: ClassifierGuided(normal(VP()), 3.0), TypeError, "callable"),
        (
            lambda: PosteriorGuided(normal(VP()), A, SEEN, noise_std=0.1).predict("data", 0.5, jnp.zeros(3)),
            ValueError,
            "shape",
        ),
        (
            lambda: PosteriorGuided(normal(VP()), lambda x: x, SEEN, noise_std=0.1).predict("data", 0.5, jnp.zeros(2)),
            ValueError,
            "returns shape",
        ),
    ],
)
def test_bad_calls(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_a_jacobian_that_is_no_covariance_does_not_run_away():
    # A prediction that falls in x: the equations of its negative "covariance" are singular where it is -noise_std^2.
    slope, noise = 0.25, 0.5

    @jax.jit
    def predicted(x):
        falling = Denoiser(lambda t, x, args: -slope * jnp.sin(x), EDM(), prediction="data")
        return PosteriorGuided(falling, jnp.eye(2), jnp.array([1.0, -2.0]), noise_std=noise).predict("data", 1.0, x)

    np.testing.assert_allclose(predicted(jnp.zeros(2)), [-0.5, 1.0], rtol=1e-10)
    # Equal eigenvalues, and one of each sign.
    for x in (jnp.array([0.3, 0.3]), jnp.array([0.3, 2.5])):
        step = jnp.array([0.6, -0.8])
        slopes = jax.jvp(predicted, (x,), (step,))[1]
        differences = (predicted(x + 1e-5 * step) - predicted(x - 1e-5 * step)) / 2e-5
        np.testing.assert_allclose(slopes, differences, rtol=1e-7, atol=1e-8)


def test_operators_that_are_not_linear_are_refused():
    with pytest.raises(TypeError, match="linear in the sample"):
        PosteriorGuided(normal(LONG), lambda x: x**2, jnp.ones(2), noise_std=NOISE).predict("data", 1.0, jnp.ones(2))
