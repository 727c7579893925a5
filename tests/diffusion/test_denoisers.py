"""Denoisers: every prediction gives every other, guidance, thresholding, preconditioning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdeflow.diffusion import EDM, VE, VP, Denoiser, Flow, Guided, MeanReverting, Precondition, SubVP, Thresholded
from tests.helpers.diffusion import noise_of

pytestmark = pytest.mark.usefixtures("x64_module")

KINDS = ("noise", "data", "velocity", "score", "flow")
MEAN = np.array([2.0, -1.0])
SCHEDULES = {
    "VP": VP(),
    "SubVP": SubVP(),
    "VE": VE(),
    "Flow": Flow(),
    "MeanReverting": MeanReverting(VP(), MEAN, scale=0.3),
}


def exact(schedule):
    y = lambda x: x - jnp.asarray(schedule.mean)
    return Denoiser(lambda t, x, args: noise_of(y(x), schedule.alpha(t), schedule.sigma(t)), schedule)


@pytest.mark.parametrize("name", ["VE", "Flow", "MeanReverting"])
def test_every_prediction_gives_every_other(name):
    schedule, t = SCHEDULES[name], 0.02
    first, x = exact(schedule), jnp.array([0.4, -0.7])
    for source in KINDS:
        again = Denoiser(lambda t, x, args, source=source: first.predict(source, t, x), schedule, prediction=source)
        found, wanted = jax.jit(lambda x, a=again: [[d.predict(k, t, x) for k in KINDS] for d in (a, first)])(x)
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", SCHEDULES)
def test_predictions_are_what_they_are_called(name):
    schedule, t = SCHEDULES[name], 0.3
    x = jnp.array([0.4, -0.7])
    first = exact(schedule)
    data, noise, score = (first.predict(kind, t, x) for kind in ("data", "noise", "score"))
    alpha, sigma, mean = schedule.alpha(t), schedule.sigma(t), jnp.asarray(schedule.mean)
    np.testing.assert_allclose(x - mean, alpha * (data - mean) + sigma * noise, rtol=1e-12)
    np.testing.assert_allclose(score, -noise / sigma, rtol=1e-12)
    # The velocity of restoration models, whose noise is scaled.
    v = alpha * schedule.scale * noise - sigma / schedule.scale * (data - mean)
    np.testing.assert_allclose(first.predict("velocity", t, x), v, rtol=1e-12)
    h = 1e-5
    rate = lambda fn: (fn(t + h) - fn(t - h)) / (2 * h)
    u = rate(schedule.alpha) * (data - mean) + rate(schedule.sigma) * noise
    np.testing.assert_allclose(first.predict("flow", t, x), u, rtol=1e-7)


def test_the_velocity_of_straight_lines():
    denoiser, x = exact(Flow()), jnp.array([0.4, -0.7])
    data, noise = denoiser.predict("data", 0.3, x), denoiser.predict("noise", 0.3, x)
    np.testing.assert_allclose(denoiser.predict("flow", 0.3, x), noise - data, rtol=1e-10)


@pytest.mark.parametrize("schedule", [EDM(), VP()])
def test_the_best_network_for_normal_data_is_zero(schedule):
    d, x = 0.5, jnp.array([0.4, -3.0])
    best = Precondition(lambda label, y, args: 0 * y, schedule, sigma_data=d)
    for t in (0.01, 0.4, 0.9):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        mean = alpha * d**2 / (alpha**2 * d**2 + sigma**2) * x
        np.testing.assert_allclose(best.predict("data", t, x), mean, rtol=1e-12)
        np.testing.assert_allclose(best.predict("noise", t, x), sigma / (alpha**2 * d**2 + sigma**2) * x, rtol=1e-12)


def test_preconditioning_gives_inputs_and_outputs_of_unit_variance():
    d, rng = 0.5, np.random.default_rng(0)
    for t in (0.01, 0.5, 20.0):
        seen = []
        net = Precondition(lambda label, y, args: seen.append((label, y)) or 0 * y, EDM(), sigma_data=d)
        data, noise = rng.normal(0, d, 40_000), rng.normal(size=40_000)
        x = jnp.asarray(data + t * noise)
        left = data - net.predict("data", t, x)
        label, y = seen[0]
        assert float(label) == pytest.approx(np.log(t) / 4)
        assert abs(float((y**2).mean()) - 1) < 5 * np.sqrt(2 / 40_000)
        # What is left for the network, in units of its factor.
        unit = left * np.sqrt(t**2 + d**2) / (t * d)
        assert abs(float((unit**2).mean()) - 1) < 5 * np.sqrt(2 / 40_000)


def test_guidance_is_the_same_for_noise_and_data():
    vp, x = VP(), jnp.array([0.4, -0.7])
    rows = [np.array([0, 1]), slice(None)]
    one, every = (Denoiser(lambda t, x, a, r=r: noise_of(x, vp.alpha(t), vp.sigma(t), r), vp) for r in rows)
    guided = Guided(one, every, 3.0)
    for kind in KINDS[:2]:
        a, b = one.predict(kind, 0.4, x), every.predict(kind, 0.4, x)
        np.testing.assert_allclose(guided.predict(kind, 0.4, x), b + 3 * (a - b), rtol=1e-12)
    np.testing.assert_allclose(Guided(one, every, 1.0).predict("score", 0.4, x), one.predict("score", 0.4, x))
    slope = jax.grad(lambda w: Guided(one, every, w).predict("data", 0.4, x)[0])(3.0)
    np.testing.assert_allclose(slope, (one.predict("data", 0.4, x) - every.predict("data", 0.4, x))[0], rtol=1e-10)


def test_thresholding_clips_to_the_box():
    vp, x = VP(), jnp.linspace(-1, 1, 1000)
    data = jnp.linspace(-4, 4, 1000)
    clipped = Thresholded(Denoiser(lambda t, x, args: data, vp, prediction="data"))
    s = np.quantile(np.abs(np.asarray(data)), 0.995)
    out = clipped.predict("data", 0.5, x)
    np.testing.assert_allclose(out, np.clip(data, -s, s) / s, rtol=1e-12)
    noise = clipped.predict("noise", 0.5, x)
    np.testing.assert_allclose(vp.alpha(0.5) * out + vp.sigma(0.5) * noise, x, atol=1e-12)
    small = Thresholded(Denoiser(lambda t, x, args: data / 10, vp, prediction="data"))
    np.testing.assert_allclose(small.predict("data", 0.5, x), data / 10, rtol=1e-12)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Denoiser(3.0, VP()), TypeError, "callable"),
        (lambda: Denoiser(jnp.sin, 3.0), TypeError, "schedule"),
        (lambda: Denoiser(lambda t, x: x, VP()), TypeError, r"fn must be callable as fn\(t, x, args\), but"),
        (lambda: Precondition(jnp.sin, EDM()), TypeError, "network must be callable as"),
        (lambda: Denoiser(jnp.sin, VP(), prediction="epsilon"), ValueError, "prediction must be one of"),
        (lambda: exact(VP()).predict("eps", 0.5, jnp.ones(2)), ValueError, "prediction must be one of"),
        (lambda: Denoiser(lambda t, x, a: x[:1], VP()).predict("data", 0.5, jnp.ones(2)), ValueError, "shape"),
        (lambda: Guided(exact(VP()), exact(EDM()), 2.0), ValueError, "schedule"),
        (lambda: Guided(exact(VP()), exact(VP(0.1, 10.0)), 2.0), ValueError, "schedule"),
        (lambda: Guided(exact(VP()), jnp.sin, 2.0), TypeError, "denoiser"),
        (lambda: Thresholded(exact(VP()), quantile=99.5), ValueError, "quantile"),
        (lambda: Thresholded(exact(VP()), bound=0.0), ValueError, "bound"),
        (lambda: Precondition(jnp.sin, EDM(), sigma_data=0.0), ValueError, "sigma_data"),
    ],
)
def test_bad_denoisers(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_single_precision():
    vp, x = VP(), jnp.array([0.4, -0.7], jnp.float32)
    denoiser = Denoiser(lambda t, x, args: noise_of(x, vp.alpha(t), vp.sigma(t)).astype(x.dtype), vp)
    out = jax.eval_shape(lambda x: [denoiser.predict(kind, 0.01, x) for kind in KINDS], x)
    assert {o.dtype for o in out} == {np.dtype("float32")}
