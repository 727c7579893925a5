"""Moves between steps: Langevin correctors, and what is known overwritten; both with their known bias."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from sdeflow.diffusion import (
    BDIA,
    DDIM,
    VP,
    AbstractConstraint,
    AbstractSampler,
    Denoiser,
    GaussianDenoiser,
    Langevin,
    MeanReverting,
    Replacement,
    Singlestep,
    UniPC,
    sample,
)
from sdeflow.diffusion._table import Table

pytestmark = pytest.mark.usefixtures("x64_module")

# Two components with variance 1 and correlation .8; the first is observed at 1.
COVARIANCE = np.array([[1.0, 0.8], [0.8, 1.0]])


def pair_noise(t, x, args):
    alpha, sigma = VP().alpha(t), VP().sigma(t)
    # Of a sum and of a difference, which are independent.
    u, v = x[..., :1] + x[..., 1:], x[..., :1] - x[..., 1:]
    u, v = u / (1.8 * alpha**2 + sigma**2), v / (0.2 * alpha**2 + sigma**2)
    return sigma * jnp.concatenate([u + v, u - v], -1) / 2


PAIR = Denoiser(pair_noise, VP())


class ReverseDiffusion(AbstractSampler):
    """The predictor of the original code: x <- (2 - sqrt(1 - b)) x + b score + sqrt(b) z, b the step's noise."""

    def table(self, schedule, times, grid, num_steps=None):
        t = times[:-1]
        b = (0.1 + 19.9 * t) * (t - times[1:])
        return Table(t, 2 - np.sqrt(1 - b), (-b / schedule.sigma(t))[:, None], np.sqrt(b))


def inpaint(steps, corrections, norms, count=20_000, solver=None):
    known = Replacement(jnp.array([1.0, 0.0]), jnp.array([True, False]))
    corrector = Langevin(num_steps=corrections, norms=norms) if corrections else None
    first, then = jr.split(jr.key(5))
    x = sample(
        PAIR, jr.normal(first, (count, 2)), solver=solver or ReverseDiffusion(), num_steps=steps, grid="t", t_end=1e-3,
        corrector=corrector, constraint=known, key=then,
    )  # fmt: skip
    return float(x[:, 1].mean()), float(x[:, 1].var())


@pytest.mark.parametrize(
    ("steps", "corrections", "mean", "variance"),
    [
        (200, 0, 0.501, 0.501),
        (200, 1, 0.712, 0.392),
        pytest.param(200, 5, 0.796, 0.372, marks=pytest.mark.slow),
        pytest.param(1000, 0, 0.500, 0.500, marks=pytest.mark.slow),
        pytest.param(1000, 1, 0.797, 0.365, marks=pytest.mark.slow),
    ],
)
def test_replacement_is_biased_as_it_is_known_to_be(steps, corrections, mean, variance):
    # The posterior has mean .8 and variance .36: without a corrector more steps do not lead there.
    out = inpaint(steps, corrections, "batch")
    assert out == pytest.approx((mean, variance), abs=0.02)


@pytest.mark.slow
def test_the_bias_with_expected_norms():
    # Smaller steps where the score is smaller than that of pure noise: more of them are needed.
    for steps, corrections, wanted in ((200, 1, (0.588, 0.440)), (1000, 1, (0.693, 0.410)), (1000, 5, (0.761, 0.377))):
        count = 10_000 if corrections == 5 else 20_000
        assert inpaint(steps, corrections, "expected", count, solver=DDIM(1.0)) == pytest.approx(wanted, abs=0.02)


def test_langevin_has_its_stationary_variance():
    # An update is affine, c x + k z; it keeps the variance k^2 / (1 - c^2) = v / (1 - e / (2 v)).
    g, t = GaussianDenoiser(VP(), jnp.zeros(1), jnp.ones((1, 1)), jnp.full(1, 0.3)), 0.3
    alpha, sigma = float(VP().alpha(t)), float(VP().sigma(t))
    v, e = alpha**2 * 0.3 + sigma**2, 2 * (0.4 * sigma) ** 2
    step, key = Langevin(snr=0.4), jr.key(0)
    one = jax.jit(lambda x: step(g, t, x, None, key))
    at = lambda x: float(one(jnp.full(1, x))[0])
    c, k = at(1.0) - at(0.0), at(0.0) / float(jr.normal(key, (1,))[0])
    assert k**2 / (1 - c**2) == pytest.approx(v / (1 - e / (2 * v)), rel=1e-10)
    # As many updates as it says, and each with noise of its own.
    run = lambda n, key: sample(
        g, jnp.zeros(1), solver=DDIM(), num_steps=1, t_start=t, t_end=0.9 * t, corrector=Langevin(0.4, n), key=key
    )[0]  # fmt: skip
    draws = np.asarray(jax.jit(jax.vmap(lambda key: run(12, key)))(jr.split(jr.key(1), 4000)))
    still = (k**2) * (1 - c**24) / (1 - c**2)
    stretch = float(g.predict("data", t, jnp.ones(1))[0])
    moved = float(VP().sigma(0.9 * t)) / sigma
    factor = moved + (float(VP().alpha(0.9 * t)) - alpha * moved) * stretch
    assert draws.var() == pytest.approx(factor**2 * still, rel=5 * np.sqrt(2 / 4000))


def test_norms():
    x, key, t = jr.normal(jr.key(0), (6, 2)), jr.key(1), 0.5
    noise, sigma, z = pair_noise(t, x, None), VP().sigma(t), jr.normal(key, (6, 2))

    def update(ratio):
        e = 2 * (0.16 * ratio) ** 2
        return x - e / sigma * noise + jnp.sqrt(2 * e) * z

    norm = jnp.linalg.norm
    ratios = {
        "expected": sigma,
        "sample": norm(z) / norm(noise / sigma),
        "batch": norm(z, axis=1).mean() / norm(noise / sigma, axis=1).mean(),
    }
    for norms, ratio in ratios.items():
        out = Langevin(norms=norms)(PAIR, t, x, None, key)
        np.testing.assert_allclose(out, update(ratio), rtol=1e-12)


def test_correctors_alone_keep_the_law():
    # Where the steps of the sampler are exact, as on normal data with many of them, correctors add next to nothing.
    draw = lambda x, key: sample(PAIR, x, solver=DDIM(1.0), num_steps=100, corrector=Langevin(), key=key)
    x = draw(jr.normal(jr.key(0), (8000, 2)), jr.key(1))
    np.testing.assert_allclose(np.cov(x.T), COVARIANCE, atol=5 * np.sqrt(2 / 8000) + 0.02)


def test_what_is_known_is_exact_where_no_noise_is_left():
    known = Replacement(jnp.array([[1.5, 0.0]]), jnp.array([True, False]))
    options = {"solver": DDIM(1.0), "num_steps": 10, "t_end": 0.0, "constraint": known, "corrector": Langevin()}
    x = sample(PAIR, jnp.zeros((5, 2)), key=jr.key(0), **options)
    np.testing.assert_allclose(x[:, 0], 1.5, rtol=1e-12)
    assert float(x[:, 1].std()) > 0.1
    # The same from the start of a key on, for one sample as for many.
    options["constraint"] = Replacement(jnp.array([1.5, 0.0]), jnp.array([True, False]))
    each = jax.vmap(lambda x, key: sample(PAIR, x, key=key, **options))(jnp.zeros((5, 2)), jr.split(jr.key(0), 5))
    np.testing.assert_allclose(each[:, 0], 1.5, rtol=1e-12)


def test_colours_of_a_grey_image():
    q, _ = np.linalg.qr(np.array([[1.0, 0, 0], [1, 1, 0], [1, 0, 1]]))
    grey = jnp.ones((4, 3)) * 0.7
    schedule = MeanReverting(VP(), np.array(0.5))
    image = GaussianDenoiser(schedule, jnp.full((4, 3), 0.3), jnp.eye(12), jnp.full(12, 0.1))
    known = Replacement(grey, jnp.array([True, False, False]), q)
    x = sample(
        image, schedule.sample_prior((4, 3), key=jr.key(0)), solver=DDIM(1.0), num_steps=10, t_end=0.0,
        constraint=known, key=jr.key(1),
    )  # fmt: skip
    np.testing.assert_allclose(x.mean(axis=1), 0.7, rtol=1e-10)
    assert float(x.std()) > 0.05


def test_moves_leave_the_noise_of_a_sampler_given():
    class Nothing(AbstractConstraint):
        draws = False

        def __call__(self, denoiser, t, x, args, key, before):
            return x

    x, noise = jnp.ones(2), jr.normal(jr.key(0), (6, 2))
    options = {"solver": DDIM(1.0), "num_steps": 6, "noise": noise}
    np.testing.assert_array_equal(
        sample(PAIR, x, constraint=Nothing(), **options), sample(PAIR, x, **options)
    )  # fmt: skip


def test_single_precision_and_gradients():
    x = jnp.ones(2, jnp.float32)

    def f(value):
        known = Replacement(value, jnp.array([True, False]))
        return sample(
            PAIR, x, solver=DDIM(1.0), num_steps=5, constraint=known, corrector=Langevin(norms="sample"), key=jr.key(0)
        )  # fmt: skip

    value = jnp.array([1.0, 0.0], jnp.float32)
    (x, slope) = jax.jit(lambda v: jax.value_and_grad(lambda v: f(v)[1])(v))(value)
    assert x.dtype == jnp.float32
    assert float(slope[0]) > 0.05
    assert float(slope[1]) == 0


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"solver": DDIM(), "corrector": Langevin()}, ValueError, "Langevin draws"),
        ({"solver": DDIM(), "constraint": Replacement(1.0, jnp.array(True))}, ValueError, "Replacement draws"),
        ({"solver": UniPC(2), "corrector": Langevin(), "key": jr.key(0)}, ValueError, "Multistep"),
        ({"solver": BDIA(), "corrector": Langevin(), "key": jr.key(0)}, ValueError, "BDIA"),
        ({"solver": Singlestep(2), "corrector": Langevin(), "key": jr.key(0)}, ValueError, "Singlestep"),
        (
            {"solver": DDIM(), "constraint": Replacement(1.0, jnp.ones((4, 1), bool)), "key": jr.key(0)},
            ValueError,
            "broadcast",
        ),
        ({"solver": DDIM(), "corrector": 0.16}, TypeError, "corrector"),
        ({"solver": DDIM(), "constraint": Langevin()}, TypeError, "constraint"),
    ],
)
def test_bad_calls(options, error, match):
    with pytest.raises(error, match=match):
        sample(PAIR, jnp.zeros(2), num_steps=4, **options)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: Langevin(snr=0.0), ValueError, "snr"),
        (lambda: Langevin(num_steps=0), ValueError, "num_steps"),
        (lambda: Langevin(norms="mean"), ValueError, "norms"),
        (lambda: Replacement(1.0, jnp.array([1, 0])), TypeError, "boolean"),
        (lambda: Replacement(1.0, jnp.array(True), np.ones((2, 2))), ValueError, "orthonormal"),
        (lambda: Replacement(1.0, jnp.array(True), jnp.ones((2, 2))), ValueError, "orthonormal"),
        (lambda: Replacement(1.0, jnp.array([True]), np.ones((3, 1)) / np.sqrt(3)), ValueError, "square"),
    ],
)
def test_bad_moves(call, error, match):
    with pytest.raises(error, match=match):
        call()
