"""Noise given to samplers, and noise extracted from samples."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from sdeflow.diffusion import (
    DDIM,
    VE,
    VP,
    DPMSolverPP,
    GaussianDenoiser,
    MeanReverting,
    Multistep,
    Singlestep,
    UniPC,
    extract_noise,
    sample,
    sampling_grid,
)
from tests.helpers import diffusion as gmm

pytestmark = pytest.mark.usefixtures("x64_module")

NOISY = {
    "DDIM": DDIM(1.0),
    "DDIM .5": DDIM(0.5),
    "SDE-DPM++ 2M": DPMSolverPP(2, tau=1.0),
    "Multistep": Multistep(3, "data", tau=0.5),
}
CHURNED = Singlestep(method="heun", churn=10.0)


def normal(schedule, mean=0.8):
    return GaussianDenoiser(schedule, jnp.full(1, mean), jnp.ones((1, 1)), jnp.full(1, 0.3))


@pytest.mark.parametrize("name", NOISY)
def test_replay_ends_where_the_noise_was_taken_from(name):
    options = {"solver": NOISY[name], "num_steps": 30}
    x = jnp.asarray(gmm.reference(16))
    start, noise = extract_noise(gmm.denoiser(), x, key=jr.key(0), **options)
    assert noise.shape == (30, 16, 2)
    np.testing.assert_allclose(sample(gmm.denoiser(), start, noise=noise, **options), x, atol=1e-14)


def test_replay_with_churn_ends_on_what_the_last_step_makes():
    x, options = jnp.asarray(gmm.reference(16)), {"solver": CHURNED, "num_steps": 60, "grid": "edm"}
    start, noise = extract_noise(gmm.denoiser(), x, key=jr.key(0), **options)
    # One draw before the first row, and one for each of two rows a step.
    assert noise.shape == (121, 16, 2)
    again = sample(gmm.denoiser(), start, noise=noise, **options)
    assert gmm.rms(again, x) < 0.05


@pytest.mark.parametrize("solver", [*NOISY.values(), CHURNED], ids=[*NOISY, "churn"])
def test_given_noise_is_the_noise_of_the_key(solver):
    x, key = jnp.asarray(gmm.starts(4)), jr.key(3)
    one, two = jr.split(key)
    rows = 6 if solver is not CHURNED else 12
    noise = jr.normal(one, (rows, 4, 2))
    if solver is CHURNED:
        noise = jnp.concatenate([jr.normal(two, (1, 4, 2)).reshape(1, 4, 2), noise])
    drawn = sample(gmm.denoiser(), x, solver=solver, num_steps=6, key=key)
    if solver is CHURNED:
        # The first draw has the state's own shape.
        noise = noise.at[0].set(jr.normal(two, (4, 2)))
    np.testing.assert_array_equal(sample(gmm.denoiser(), x, solver=solver, num_steps=6, noise=noise), drawn)


@pytest.fixture(scope="module")
def many():
    """Noise from one sample of normal data, 50 steps, many keys: independent states, and one forward path."""
    options, x = {"solver": DDIM(1.0), "num_steps": 50}, jnp.full(1, 1.8)
    take = lambda independent: jax.vmap(
        lambda k: extract_noise(normal(VP()), x, key=k, independent=independent, **options)
    )(jr.split(jr.key(1), 400))
    return {independent: take(independent) for independent in (True, False)}


def of_steps(z):
    z = np.asarray(z)[:, :, 0]
    lags = [np.corrcoef(z[:, i], z[:, i + 1])[0, 1] for i in range(z.shape[1] - 1)]
    return z.std(axis=0), np.array(lags)


def exact_statistics(steps, independent):
    """Deviations, and for independent states correlations of neighbours, of the noise: it is linear in the states."""
    vp, times = VP(), sampling_grid(VP(), steps)
    t = np.append(times.left, times.right[-1])
    alpha, sigma = vp.alpha(t), vp.sigma(t)
    a, b, s0, s1 = alpha[:-1], alpha[1:], sigma[:-1], sigma[1:]
    # The posterior of DDPM: its deviation, and the slope of its mean with the best prediction of data of variance .3.
    gone = 1 - (a * s1 / (b * s0)) ** 2
    size, keep = s1 * np.sqrt(gone), a / b * (s1 / s0) ** 2
    slope = keep + b * gone * a * 0.3 / (a**2 * 0.3 + s0**2)
    spread = sigma**2 - (alpha / alpha[-1] * sigma[-1]) ** 2
    both = 0 if independent else 2 * slope * a / b * spread[1:]
    deviations = np.sqrt(spread[1:] + slope**2 * spread[:-1] - both) / size
    shared = -slope[1:] * spread[1:-1] / (size[:-1] * size[1:])
    return deviations, shared / (deviations[:-1] * deviations[1:])


def test_noise_of_independent_states_is_not_white(many):
    deviations, lags = of_steps(many[True][1])
    wanted, lag = exact_statistics(50, independent=True)
    np.testing.assert_allclose(deviations / wanted, 1, atol=5 / np.sqrt(800))
    np.testing.assert_allclose(lags, lag, atol=5 / np.sqrt(400))
    assert 2.3 < np.sqrt((wanted**2).mean()) < 3.1
    assert lag[:-1].mean() == pytest.approx(-0.5, abs=0.01)


def test_noise_of_a_forward_path_is_nearly_white(many):
    deviations, lags = of_steps(many[False][1])
    wanted, _ = exact_statistics(50, independent=False)
    np.testing.assert_allclose(deviations / wanted, 1, atol=5 / np.sqrt(800))
    # At the end the sample itself is what every path leads to.
    assert abs(np.sqrt((wanted[:40] ** 2).mean()) - 1) < 0.05
    assert abs(lags[:40].mean()) < 5 / np.sqrt(400 * 40) + 0.01


def test_the_start_has_its_law(many):
    for start, _ in many.values():
        start = np.asarray(start)[:, 0]
        alpha, sigma = VP().alpha(1.0), VP().sigma(1.0)
        assert abs(start.mean() - float(alpha) * 1.8) < 5 * float(sigma) / 20
        assert abs(start.std() / float(sigma) - 1) < 5 / np.sqrt(800)


def test_an_end_without_noise_is_what_the_denoiser_makes(many):
    options = {"solver": DDIM(1.0), "num_steps": 50, "t_end": 0.0}
    x = jnp.full(1, 1.8)
    start, noise = extract_noise(normal(VP()), x, key=jr.key(2), **options)
    assert float(noise[-1, 0]) == 0
    back = sample(normal(VP()), start, noise=noise, **options)
    assert 1e-5 < float(jnp.abs(back - x)[0]) < 0.1


def test_edits_keep_what_is_behind_a_later_start():
    # With another mean for the data, replay moves towards it; the later it begins, the less.
    x, moved = jnp.full(1, 0.8), []
    for t_start in (1.0, 0.3, 0.05):
        options = {"solver": DDIM(1.0), "num_steps": 40, "t_start": t_start}
        start, noise = extract_noise(normal(VP()), x, key=jr.key(4), **options)
        moved.append(float(sample(normal(VP(), mean=2.0), start, noise=noise, **options)[0] - x[0]))
    assert 1.3 > moved[0] > moved[1] > moved[2] > 0.01


@pytest.mark.parametrize("schedule", [VE(), MeanReverting(VP(), np.array([3.0]), scale=0.5)], ids=["VE", "mean"])
def test_other_schedules_and_single_precision(schedule):
    x = jnp.array([0.4], jnp.float32)
    options = {"solver": DDIM(1.0), "num_steps": 20}
    start, noise = extract_noise(normal(schedule), x, key=jr.key(0), **options)
    assert noise.dtype == jnp.float32
    np.testing.assert_allclose(sample(normal(schedule), start, noise=noise, **options), x, atol=1e-5)


def test_gradients_in_the_noise():
    x, z = jnp.ones(1), jr.normal(jr.key(0), (5, 1))
    f = lambda z: sample(normal(VP()), x, solver=DDIM(1.0), num_steps=5, noise=z)[0]
    slope = jax.grad(f)(z)
    # The sampler is affine in the noise.
    assert float((slope * z).sum()) == pytest.approx(float(f(z) - f(0 * z)), rel=1e-10)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x: extract_noise(gmm.denoiser(), x, solver=DDIM(), num_steps=4, key=jr.key(0)), "adds no noise"),
        (
            lambda x: extract_noise(
                gmm.denoiser(), x, solver=CHURNED, num_steps=4, key=jr.key(0), independent=False
            ),
            "churn",
        ),
        (lambda x: sample(gmm.denoiser(), x, solver=UniPC(2), num_steps=4, noise=x), "drop noise="),
        (lambda x: sample(gmm.denoiser(), x, solver=DDIM(1.0), num_steps=4, noise=x), "noise must have shape"),
    ],
)  # fmt: skip
def test_bad_calls(call, match):
    with pytest.raises(ValueError, match=match):
        call(jnp.asarray(gmm.starts(3)))
