"""The statistics of DPM-Solver-v3, and what it does with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdeflow.diffusion import DDIM, EDM, VP, Denoiser, DPMSolverV3, Statistics, model_statistics, sample
from tests.helpers import diffusion as gmm

pytestmark = pytest.mark.usefixtures("x64_module")

MEANS, VARIANCES = np.array([1.0, -0.5]), np.array([0.04, 0.5])


def normal(schedule):
    def noise(t, x, args):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        means, variances = jnp.asarray(MEANS, x.dtype), jnp.asarray(VARIANCES, x.dtype)
        return sigma * (x - alpha * means) / (alpha**2 * variances + sigma**2)

    return Denoiser(noise, schedule)


@pytest.mark.parametrize("schedule", [VP(), EDM()])
def test_normal_data_has_its_statistics_and_one_step_is_exact(schedule):
    x = schedule.prior_std() * gmm.starts(32)
    found = model_statistics(normal(schedule), jnp.asarray(x[:8]), num_cells=2400)
    alpha, sigma = (fn(schedule.t_of_log_snr(found.knots))[:, None] for fn in (schedule.alpha, schedule.sigma))
    np.testing.assert_allclose(found.l, sigma**2 / (alpha**2 * VARIANCES + sigma**2), atol=1e-12)
    np.testing.assert_array_equal(found.s, 0)
    (a0, a1), (s0, s1) = (np.array([v[0, 0], v[-1, 0]]) for v in (alpha, sigma))
    stretch = np.sqrt((a1**2 * VARIANCES + s1**2) / (a0**2 * VARIANCES + s0**2))
    wanted = a1 * MEANS + stretch * (x - a0 * MEANS)
    for steps in (1, 3):
        run = lambda solver, steps=steps: jax.vmap(
            lambda x: sample(normal(schedule), x, solver=solver, num_steps=steps)
        )(jnp.asarray(x))
        # As exact as the quadrature of the statistics.
        assert gmm.rms(run(DPMSolverV3(found, 1)), wanted) < 3e-6
        assert gmm.rms(run(DDIM()), wanted) > 0.02


@functools.cache
def of_the_mixture(cells):
    x = np.random.default_rng(7).standard_normal((256, 2))
    return model_statistics(gmm.denoiser(), jnp.asarray(x), num_cells=cells)


def error(steps, measure=gmm.rms, count=512, cells=1200, **options):
    solver = DPMSolverV3(of_the_mixture(cells), lower_order_final=True, **options)
    run = lambda x: sample(gmm.denoiser(), x, solver=solver, num_steps=steps)
    return measure(jax.vmap(run)(jnp.asarray(gmm.starts(count))), gmm.reference(count))


@pytest.mark.parametrize(
    ("options", "steps", "wanted"),
    [
        ({"order": 2}, 10, 0.117),
        ({"order": 3}, 10, 0.106),
        ({"order": 3, "corrector": True}, 10, 0.0508),
        ({"order": 3, "pseudo": True}, 10, 0.113),
    ],
)
def test_errors_on_the_mixture_have_their_known_digits(options, steps, wanted):
    # Other samples for the statistics move them by an eighth.
    assert error(steps, **options) == pytest.approx(wanted, rel=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, 2, 3])
def test_orders(order):
    errors = [error(n, gmm.median, 128, 9600, order=order) for n in (75, 150, 300)]
    assert np.log2(errors[-2] / errors[-1]) > order - 0.25


def test_random_probes_find_the_diagonal():
    x = jnp.asarray(gmm.starts(64))
    exact = model_statistics(gmm.denoiser(), x, num_cells=12)
    probed = model_statistics(gmm.denoiser(), x, num_cells=12, key=jax.random.key(0), num_probes=64)
    assert np.abs(np.asarray(probed.l) - exact.l).max() < 0.05
    assert np.abs(np.asarray(probed.l) - exact.l).max() > 0


def test_single_precision():
    found = model_statistics(normal(VP()), jnp.asarray(gmm.starts(8), jnp.float32), num_cells=50)
    np.testing.assert_array_equal(found.s, 0)
    out = sample(normal(VP()), jnp.asarray(gmm.starts(1)[0], jnp.float32), solver=DPMSolverV3(found, 2), num_steps=4)
    assert out.dtype == jnp.float32


@pytest.mark.parametrize(
    ("make", "error_type", "match"),
    [
        (lambda: Statistics(np.ones((2, 2)), *[np.ones((2, 2))] * 3), ValueError, "knots"),
        (lambda: Statistics(np.arange(3.0), *[np.ones((2, 2))] * 3), ValueError, "3 knots"),
        (lambda: Statistics(np.array([5.0, -5.0]), *[np.ones((2, 2))] * 3), ValueError, "increase"),
        (lambda: DPMSolverV3(3.0), TypeError, "statistics"),
        (lambda: model_statistics(normal(VP()), jnp.ones((1, 2))), ValueError, "two starts"),
        (lambda: model_statistics(gmm.denoiser(), jnp.ones((2, 100))), ValueError, "key"),
        (lambda: model_statistics(normal(VP()), jnp.ones((2, 2)), t_end=0.0), ValueError, "t_end"),
    ],
)
def test_bad_statistics(make, error_type, match):
    with pytest.raises(error_type, match=match):
        make()
