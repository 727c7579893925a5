"""Log-densities against closed forms: of normal data and of a mixture, three numbers apart."""

import functools
import math

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.stats import multivariate_normal

import sdeflow as sf
from sdeflow.diffusion import (
    BDIA,
    DDIM,
    EDM,
    VP,
    Denoiser,
    DPMSolverPP,
    DPMSolverV3,
    GaussianDenoiser,
    MeanReverting,
    Singlestep,
    Statistics,
    bits_per_dim,
    log_prob,
)
from tests.helpers import diffusion as gmm

pytestmark = pytest.mark.usefixtures("x64_module")

END = 1e-3
MEAN, COVARIANCE = np.array([1.0, -0.5]), np.array([[0.3, 0.1], [0.1, 0.5]])


def normal(schedule=None, covariance=COVARIANCE):
    return GaussianDenoiser.from_covariance(schedule or VP(), jnp.asarray(MEAN), jnp.asarray(covariance))


def mixture_log_prob(t, x):
    alpha, sigma = (float(f(np.float64(t))) for f in (VP().alpha, VP().sigma))
    parts = [
        np.log(w) + multivariate_normal.logpdf(x, alpha * m, alpha**2 * turn @ np.diag(d**2) @ turn.T + sigma**2 * np.eye(2))
        for w, m, d, turn in zip(gmm.WEIGHTS, gmm.MEANS, gmm.DEVIATIONS, gmm._TURNS)
    ]  # fmt: skip
    return np.logaddexp.reduce(parts)


def mixture_prior(z):
    # The law of the mixture at the start, in one jittable expression.
    alpha, sigma = VP().alpha(1.0), VP().sigma(1.0)
    parts = []
    for w, m, d, turn in zip(gmm.WEIGHTS, gmm.MEANS, gmm.DEVIATIONS, gmm._TURNS):
        v = alpha**2 * d**2 + sigma**2
        parts.append(jnp.log(w) - (((z - alpha * m) @ turn) ** 2 / v + jnp.log(2 * jnp.pi * v)).sum() / 2)
    return jax.nn.logsumexp(jnp.stack(parts))


@functools.cache
def points(count=64):
    return jnp.asarray(MEAN + np.random.default_rng(1).standard_normal((count, 2)) @ np.linalg.cholesky(COVARIANCE).T)


def tight(denoiser, xs, own):
    """From the own law at the start, and from N(0, I) there, by one solve."""
    both = lambda z: jnp.stack([own(z), jax.scipy.stats.norm.logpdf(z).sum()])
    one = lambda x: log_prob(denoiser, x, t_end=END, tolerance=1e-11, solver=diffrax.Dopri8(), log_prior=both)
    return np.asarray(jax.jit(jax.vmap(one))(xs)).T


def test_three_numbers_of_normal_data():
    g, xs = normal(), points()
    here = np.asarray(jax.vmap(lambda x: g.log_prob(END, x))(xs))
    # From its own law at the start the equation gives the density at t_end.
    own, default = tight(g, xs, lambda z: g.log_prob(1.0, z))
    np.testing.assert_allclose(own, here, atol=1e-8)
    # From N(0, I) it is off by exactly as much as the laws at the start differ there.
    z = jax.vmap(lambda x: g.transport(x, END, 1.0))(xs)
    gap = jax.vmap(lambda z: jax.scipy.stats.norm.logpdf(z).sum() - g.log_prob(1.0, z))(z)
    np.testing.assert_allclose(default - own, gap, atol=1e-8)
    assert 0.01 < np.abs(gap).max() < 0.1
    # And the density at t_end is not that of the data.
    data = multivariate_normal.logpdf(xs, MEAN, COVARIANCE)
    assert 1e-3 < np.abs(here - data).max() < 0.02


def test_three_numbers_of_the_mixture():
    xs = gmm.reference(64)
    here = np.array([mixture_log_prob(END, x) for x in xs])
    own, default = tight(gmm.denoiser(), jnp.asarray(xs), mixture_prior)
    np.testing.assert_allclose(own, here, atol=2e-10)
    # They were reached from known noise.
    z = gmm.starts(64)
    gap = multivariate_normal.logpdf(z, np.zeros(2)) - np.asarray(jax.vmap(mixture_prior)(jnp.asarray(z)))
    np.testing.assert_allclose(default - own, gap, atol=1e-8)
    data = np.array([mixture_log_prob(1e-9, x) for x in xs])
    assert 0.01 < np.abs(here - data).max() < 0.4


@pytest.mark.parametrize(
    ("solver", "order", "steps"),
    [(Singlestep(method="rk4"), 4, 40), (DPMSolverPP(2), 2, 80)],
    ids=["rk4", "DPM++2M"],
)
def test_samplers_take_the_density_along(solver, order, steps):
    xs = jnp.asarray(gmm.reference(32))
    exact = np.array([mixture_log_prob(END, x) for x in gmm.reference(32)])
    errors = []
    for n in (steps, 2 * steps):
        one = lambda x, n=n: log_prob(gmm.denoiser(), x, t_end=END, solver=solver, num_steps=n, log_prior=mixture_prior)
        errors.append(np.median(np.abs(jax.vmap(one)(xs) - exact)))
    assert np.log2(errors[0] / errors[1]) > order - 0.5
    assert errors[1] < 0.01


def test_bdia_and_a_grid():
    g, x = normal(), points()[0]
    wanted = float(g.log_prob(END, x))
    options = {"log_prior": lambda z: g.log_prob(1.0, z)}
    assert float(log_prob(g, x, t_end=END, solver=BDIA(), num_steps=400, **options)) == pytest.approx(wanted, abs=0.05)
    grid = sf.diffusion.sampling_grid(VP(), 60, t_end=END)
    assert float(log_prob(g, x, grid=grid, solver=diffrax.Dopri8(), **options)) == pytest.approx(wanted, abs=1e-5)
    halfway = log_prob(g, x, t_start=0.4, t_end=END, log_prior=lambda z: g.log_prob(0.4, z), tolerance=1e-7)
    assert float(halfway) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("name", ["EDM", "MeanReverting"])
def test_other_schedules(name):
    schedule = {"EDM": EDM(), "MeanReverting": MeanReverting(VP(), np.array([2.0, -1.0]), scale=0.7)}[name]
    g, x = normal(schedule), points()[1]
    start = schedule.t_max
    for options in ({"tolerance": 1e-8}, {"solver": Singlestep(method="rk4"), "num_steps": 100}):
        out = log_prob(g, x, t_end=0.01, log_prior=lambda z: g.log_prob(start, z), **options)
        assert float(out) == pytest.approx(float(g.log_prob(0.01, x)), abs=1e-4)
    # What a sampler starts from, with its mean and deviation.
    z = np.asarray(g.transport(x, 0.01, start))
    std = schedule.prior_std()
    gap = multivariate_normal.logpdf(z, np.broadcast_to(schedule.mean, 2), std**2) - float(g.log_prob(start, z))
    assert float(log_prob(g, x, t_end=0.01, tolerance=1e-8)) == pytest.approx(
        float(g.log_prob(0.01, x)) + gap, abs=1e-4
    )


@eqx.filter_jit
def estimates(g, x, keys, num_probes=1):
    options = {"t_end": END, "solver": Singlestep(method="rk4"), "num_steps": 60}
    prior = lambda z: g.log_prob(1.0, z)
    one = lambda k: log_prob(g, x, exact=False, key=k, num_probes=num_probes, log_prior=prior, **options)
    return jax.vmap(one)(keys)


def test_hutchinson_is_an_estimate_without_bias():
    g, x, keys = normal(), points()[2], jr.split(jr.key(0), 128)
    draws = np.asarray(estimates(g, x, keys))
    assert draws.std() > 0.05
    assert abs(draws.mean() - float(g.log_prob(END, x))) < 5 * draws.std() / np.sqrt(128)
    # Signs give the trace of a diagonal matrix at once.
    diagonal = normal(covariance=np.diag([0.04, 0.5]))
    alone = estimates(diagonal, x, keys)
    np.testing.assert_allclose(alone, float(diagonal.log_prob(END, x)), atol=1e-3)
    # More probes, less spread.
    assert np.asarray(estimates(g, x, keys, 16)).std() < 0.4 * draws.std()


def test_its_gradient_is_the_score():
    g, x = normal(), points()[3]

    def f(mean, x):
        g = GaussianDenoiser(VP(), mean, normal().basis, normal().variances)
        return log_prob(g, x, t_end=END, tolerance=1e-7, log_prior=lambda z: g.log_prob(1.0, z))

    by_mean, by_x = jax.jit(jax.grad(f, (0, 1)))(g.mean, x)
    np.testing.assert_allclose(by_x, g.predict("score", END, x), atol=1e-4)
    # And in what the denoiser is made of: the law only moves with alpha times the mean.
    np.testing.assert_allclose(by_mean, -VP().alpha(END) * by_x, atol=1e-4)
    fixed = jax.jit(lambda x: log_prob(g, x, t_end=END, solver=DPMSolverPP(2), num_steps=8))
    h = np.array([1e-5, 0.0])
    difference = (fixed(x + h) - fixed(x - h)) / 2e-5
    assert float(jax.grad(fixed)(x)[0]) == pytest.approx(float(difference), rel=1e-6)


def test_single_precision_and_shapes():
    schedule = VP()
    image = Denoiser(lambda t, x, args: args * schedule.sigma(t) * x, schedule)  # data with variance 1
    x = jnp.ones((2, 3), jnp.float32)
    for options in ({}, {"solver": Singlestep(method="rk4"), "num_steps": 60}):
        out = log_prob(image, x, args=1.0, **options)
        assert out.dtype == jnp.float32
        assert float(out) == pytest.approx(-3 - 3 * math.log(2 * math.pi), abs=2e-3)


def test_bits():
    # 8-bit data, uniform over [0, 1]: density 1, so 8 bits; scaled to [-1, 1] the density is 2^-d.
    assert float(bits_per_dim(0.0, 12)) == 8
    assert float(bits_per_dim(-12 * math.log(2), 12, width=2)) == 8
    assert float(bits_per_dim(0.0, 12, levels=2)) == 1
    for wrong in ({"levels": 0}, {"width": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            bits_per_dim(0.0, 12, **wrong)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"exact": False}, ValueError, "pass key="),
        ({"key": jr.key(0)}, ValueError, "draws nothing"),
        ({"exact": False, "key": jr.key(0), "num_probes": 0}, ValueError, "num_probes"),
        ({"solver": DDIM()}, ValueError, "num_steps"),
        ({"solver": DDIM(1.0), "num_steps": 4}, ValueError, "noise"),
        ({"solver": DDIM(), "num_steps": 4, "t_end": 0.0}, ValueError, "no noise"),
        ({"t_end": 0.0}, ValueError, "no noise"),
        ({"t_start": 2.0}, ValueError, "t_start"),
        # From there on N(0, 1) is not the law of the state: EDM once gave -7.3 for -1.9 from t_start=5.
        ({"t_start": 0.4}, ValueError, "pass log_prior="),
        ({"grid": sf.grids.through([0.9, 0.1])}, ValueError, "pass log_prior="),
        ({"tolerance": -1.0}, ValueError, "tolerance"),
        ({"solver": "UniPC"}, TypeError, "solver"),
        ({"solver": DPMSolverV3(Statistics(np.array([-5.0, 5.0]), *[np.ones((2, 2))] * 3))}, ValueError, "V3"),
    ],
)
def test_bad_calls(options, error, match):
    with pytest.raises(error, match=match):
        log_prob(normal(), points()[0], **options)


def test_no_sample():
    with pytest.raises(TypeError, match="floating"):
        log_prob(normal(), jnp.array([1, 2]))
    with pytest.raises(TypeError, match="denoiser"):
        log_prob(jnp.sin, points()[0])
