"""Normal data: predictions, flow and density in closed form, and jumps over the first part of a solve."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

import sdeflow as sf
from sdeflow.diffusion import EDM, VE, VP, GaussianDenoiser, MeanReverting, ProbabilityFlow, UniPC, sample
from tests.helpers import diffusion as gmm

pytestmark = pytest.mark.usefixtures("x64_module")

MEAN, COVARIANCE = np.array([1.0, -1.0]), np.array([[1.0, 0.8], [0.8, 1.0]])


def normal(schedule):
    return GaussianDenoiser.from_covariance(schedule, MEAN, COVARIANCE)


@pytest.mark.parametrize(
    ("schedule", "x", "s", "t", "wanted"),
    [
        (EDM(), [30.0, -50.0], 80.0, 0.5, [1.14807223, -1.50596743]),
        (VP(), [0.7, -1.3], 1.0, 0.3, [1.10624669, -1.79481592]),
    ],
    ids=["EDM", "VP"],
)
def test_the_jump_has_its_known_digits(schedule, x, s, t, wanted):
    g, x = normal(schedule), jnp.array(x)
    np.testing.assert_allclose(g.transport(x, s, t), wanted, atol=6e-9)
    np.testing.assert_allclose(g.transport(g.transport(x, s, t), t, s), x, rtol=1e-12)


@pytest.mark.parametrize(
    "schedule", [VP(), VE(), MeanReverting(VP(), np.array([2.0, 0.5]), scale=0.6)], ids=["VP", "VE", "mean"]
)
def test_predictions_density_and_flow_agree(schedule):
    g, x, t = normal(schedule), jnp.array([0.3, 0.9]), 0.4 * schedule.t_max
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    shift = np.asarray(schedule.mean)
    law = multivariate_normal(shift + alpha * (MEAN - shift), alpha**2 * COVARIANCE + sigma**2 * np.eye(2))
    assert float(g.log_prob(t, x)) == pytest.approx(law.logpdf(x), rel=1e-10)
    score = -np.linalg.solve(law.cov, np.asarray(x) - law.mean)
    np.testing.assert_allclose(g.predict("score", t, x), score, rtol=1e-10)
    data, noise = g.parts(t, x, None)
    np.testing.assert_allclose(alpha * data + sigma * noise, x - shift, rtol=1e-10)
    end = sf.solve(
        ProbabilityFlow(g), x, [t, 0.1 * schedule.t_max], solver=diffrax.Dopri8(),
        stepsize_controller=diffrax.PIDController(rtol=1e-9, atol=1e-9),
    ).final  # fmt: skip
    np.testing.assert_allclose(g.transport(x, t, 0.1 * schedule.t_max), end, rtol=1e-6)


def test_fewer_directions_than_components():
    # Three samples in five dimensions span a plane; across it data does not vary.
    samples = np.random.default_rng(0).standard_normal((3, 5))
    g = GaussianDenoiser.fit(VP(), samples)
    assert g.basis.shape == (5, 2)
    full = GaussianDenoiser.from_covariance(VP(), samples.mean(axis=0), np.cov(samples.T))
    x = jnp.linspace(-1, 1, 5)
    for kind in ("data", "noise"):
        np.testing.assert_allclose(g.predict(kind, 0.2, x), full.predict(kind, 0.2, x), atol=1e-10)
    np.testing.assert_allclose(g.transport(x, 1.0, 0.2), full.transport(x, 1.0, 0.2), atol=1e-10)
    assert float(g.log_prob(0.2, x)) == pytest.approx(float(full.log_prob(0.2, x)), rel=1e-9)
    one = GaussianDenoiser.fit(VP(), samples, rank=1)
    assert float(one.variances[0]) == pytest.approx(float(g.variances.max()))


def test_states_of_any_shape_in_single_precision():
    samples = np.random.default_rng(0).standard_normal((50, 2, 3)).astype(np.float32)
    g = GaussianDenoiser.fit(VP(), samples)
    x = jnp.ones((2, 3), jnp.float32)
    out = jax.jit(lambda x: g.transport(x, 1.0, 1e-3))(x)
    assert out.shape == (2, 3)
    assert out.dtype == jnp.float32
    wide = g.transport(x.astype(jnp.float64), 1.0, 1e-3)
    np.testing.assert_allclose(out, wide, rtol=1e-4, atol=1e-4)


def like_the_mixture():
    w, m = gmm.WEIGHTS, gmm.MEANS
    mean = w @ m
    inner = np.einsum("k,kij,kj,klj->il", w, gmm._TURNS, gmm.DEVIATIONS**2, gmm._TURNS)
    return GaussianDenoiser.from_covariance(VP(), mean, inner + np.einsum("k,ki,kj->ij", w, m - mean, m - mean))


def test_the_error_of_a_jump_falls_with_the_noise_that_is_left():
    g, x = like_the_mixture(), jnp.asarray(gmm.starts(128))
    errors = []
    for t in (0.2, 0.4, 0.6, 0.8):
        jump = jax.vmap(lambda x, t=t: g.transport(x, 1.0, t))(x)
        errors.append(gmm.rms(jump, sample(gmm.denoiser(), x, solver=UniPC(3), num_steps=60, t_end=t)))
    # Measured: .17, .021, .0009 and .00001.
    assert errors[0] > 5 * errors[1] > 50 * errors[2] > 500 * errors[3]
    assert errors[0] < 0.2


def test_a_jump_spares_steps():
    g, x = like_the_mixture(), jnp.asarray(gmm.starts(128))
    jump = jax.vmap(lambda x: g.transport(x, 1.0, 0.5))(x)
    of = lambda x, **options: gmm.rms(
        sample(gmm.denoiser(), x, solver=UniPC(3), **options), gmm.reference(128)
    )  # fmt: skip
    # Measured: .102 and .023 with 10 evaluations; with many the error of the jump itself is left, .025.
    assert of(jump, num_steps=10, t_start=0.5) < 0.3 * of(x, num_steps=10)
    assert 0.01 < of(jump, num_steps=60, t_start=0.5) < 0.04


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: GaussianDenoiser(VP(), jnp.zeros(2), jnp.eye(3), jnp.ones(3)), ValueError, "basis"),
        (lambda: GaussianDenoiser(VP(), jnp.zeros(2), jnp.eye(2), jnp.array([1.0, -1.0])), ValueError, "negative"),
        (lambda: GaussianDenoiser(VP(), jnp.zeros(2), jnp.tri(2), jnp.ones(2)), ValueError, "orthonormal"),
        (lambda: GaussianDenoiser.from_covariance(VP(), jnp.zeros(2), jnp.tri(2)), ValueError, "symmetric"),
        (
            lambda: GaussianDenoiser.from_covariance(VP(), jnp.zeros(2), jnp.ones((2, 2)) - jnp.eye(2)),
            ValueError,
            "eig",
        ),
        (lambda: GaussianDenoiser.from_covariance(VP(), jnp.zeros(2), jnp.ones(2)), ValueError, "square"),
        (lambda: GaussianDenoiser.fit(VP(), np.zeros((1, 3))), ValueError, "two samples"),
        (lambda: GaussianDenoiser.fit(VP(), np.zeros((4, 3)), rank=5), ValueError, "rank"),
        (lambda: GaussianDenoiser(None, jnp.zeros(2), jnp.eye(2), jnp.ones(2)), TypeError, "schedule"),
        (lambda: normal(VP()).transport(jnp.zeros((4, 2)), 1.0, 0.5), ValueError, "vmap"),
        (lambda: sample(normal(VP()), jnp.zeros(2), solver=UniPC(2), num_steps=3, t_start=1.5), ValueError, "t_start"),
        (
            lambda: sample(normal(VP()), jnp.zeros(2), solver=UniPC(2), num_steps=3, t_start=0.1, t_end=0.2),
            ValueError,
            "t_start=0.1",
        ),
        (
            lambda: sample(
                normal(VP()), jnp.zeros(2), solver=UniPC(2), t_start=0.5, grid=sf.diffusion.sampling_grid(VP(), 3)
            ),
            ValueError,
            "drop",
        ),
    ],
)
def test_bad_calls(call, error, match):
    with pytest.raises(error, match=match):
        call()
