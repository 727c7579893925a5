"""Schedules against closed forms: inverses, rates of the forward equation, tables, single precision."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdeflow as sf
from sdeflow.diffusion import EDM, VE, VP, Cosine, Flow, MeanReverting, SubVP, Tabulated

BETAS = np.linspace(1e-4, 0.02, 1000)
# g^2 as each paper has it.
NOISE = {
    "VP": (VP(), lambda t: 0.1 + 19.9 * t),
    "SubVP": (SubVP(), lambda t: (0.1 + 19.9 * t) * -np.expm1(-2 * (0.1 * t + 9.95 * t**2))),
    "VE": (VE(), lambda t: (0.01 * 5000**t) ** 2 * 2 * np.log(5000)),
    "EDM": (EDM(), lambda t: 2 * t),
    "Flow": (Flow(), lambda t: 2 * t / (1 - t)),
    "Cosine": (Cosine(), lambda t: np.pi / 1.008 * np.tan(np.pi / 2 * (t + 0.008) / 1.008)),
    "Tabulated": (Tabulated(BETAS), None),
    "MeanReverting": (MeanReverting(VP(), np.ones(2), scale=0.2), lambda t: 0.04 * (0.1 + 19.9 * t)),
}


def times(schedule, count=301):
    return np.linspace(schedule.t_min, schedule.t_max, count)


@pytest.mark.parametrize("name", NOISE)
def test_times_and_log_snr_are_inverses(name, x64):
    schedule, _ = NOISE[name]
    t = times(schedule)
    l = schedule.log_snr(t)
    assert isinstance(l, np.ndarray)
    assert (np.diff(l) < 0).all()
    np.testing.assert_allclose(schedule.log_snr(schedule.t_of_log_snr(l)), l, atol=1e-10)
    np.testing.assert_allclose(schedule.t_of_log_snr(l), t, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(l, np.log(schedule.alpha(t) / schedule.sigma(t)), atol=1e-10)
    # On the device the same numbers.
    np.testing.assert_allclose(schedule.log_snr(jnp.asarray(t)), l, atol=1e-10)
    np.testing.assert_allclose(schedule.t_of_log_snr(jnp.asarray(l)), schedule.t_of_log_snr(l), rtol=1e-10)


@pytest.mark.parametrize("name", [name for name, (_, g2) in NOISE.items() if g2 is not None])
def test_rates_are_those_of_the_forward_equation(name, x64):
    schedule, g2 = NOISE[name]
    t = times(schedule, 41)[1:-1]
    f, slope = jax.vmap(schedule.rates)(jnp.asarray(t))
    np.testing.assert_allclose(-2 * schedule.sigma(t) ** 2 * slope, g2(t), rtol=1e-8)
    # The variance of the noise obeys its own equation.
    moves = jax.vmap(jax.grad(lambda t: schedule.sigma(t) ** 2))(jnp.asarray(t))
    np.testing.assert_allclose(moves, 2 * f * schedule.sigma(t) ** 2 + g2(t), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", NOISE)
def test_single_precision_keeps_its_digits(name):
    schedule, _ = NOISE[name]
    t = times(schedule).astype(np.float32)
    t = t[(t >= schedule.t_min) & (t <= schedule.t_max)]
    exact = t.astype(np.float64)
    for fn in (schedule.alpha, schedule.sigma):
        out = fn(jnp.asarray(t))
        assert out.dtype == jnp.float32
        np.testing.assert_allclose(out, fn(exact), rtol=3e-6)
    l = schedule.log_snr(exact).astype(np.float32)
    wanted = schedule.t_of_log_snr(l.astype(np.float64))
    np.testing.assert_allclose(schedule.t_of_log_snr(jnp.asarray(l)), wanted, rtol=4e-6, atol=1e-8)


def test_sigma_does_not_cancel_near_zero():
    # sqrt(1 - alpha^2) as it stands gives 9.766e-4.
    assert float(VP().sigma(1e-5)) == pytest.approx(1.000497e-3, rel=1e-6)


def test_a_table_has_its_products_at_the_knots(x64):
    schedule = Tabulated(BETAS)
    knots = np.arange(1, 1001) / 1000
    np.testing.assert_allclose(schedule.alpha(knots), np.sqrt(np.cumprod(1 - BETAS)), rtol=1e-12)
    assert schedule.t_min == 1e-3
    with np.errstate(divide="ignore"):
        assert (schedule.alpha(np.array(0.0)), schedule.sigma(np.array(0.0))) == (1.0, 0.0)
    # Not the continuous schedule that it comes from.
    gap = np.abs(schedule.log_alpha(knots) - VP().log_alpha(knots))
    assert schedule.log_alpha(np.array(1.0)) == pytest.approx(-5.0589, abs=5e-5)
    assert gap.max() == pytest.approx(0.034, abs=5e-4)
    wide = Tabulated(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    ratio = np.exp(-wide.log_snr(np.array([1e-3, 1.0])))
    np.testing.assert_allclose(ratio, [0.0292, 14.61], rtol=2e-3)


@pytest.mark.parametrize(
    ("schedule", "mean", "std"),
    [
        (VP(), 0.0, 1.0),
        (EDM(), 0.0, 80.0),
        (VE(), 0.0, 50.0),
        (MeanReverting(VP(), np.full(2, 3.0), scale=0.2), 3.0, 0.2),
    ],
)
def test_priors(schedule, mean, std):
    draws = schedule.sample_prior((20_000, 2), key=jax.random.key(0))
    assert abs(float(draws.mean()) - mean) < 5 * std / 200
    assert abs(float(((draws - mean) ** 2).mean()) / std**2 - 1) < 5 * np.sqrt(2) / 200


def test_a_mean_does_not_widen_the_prior():
    with pytest.raises(ValueError, match="broadcast"):
        MeanReverting(VP(), np.zeros((5, 3))).sample_prior((3,), key=jax.random.key(0))


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: VP(0.0, 20.0), ValueError, "beta_min"),
        (lambda: VP(t_min=0.5, t_max=0.2), ValueError, "t_min < t_max"),
        (lambda: VE(1.0, 0.5), ValueError, "sigma_min"),
        (lambda: Cosine(t_max=1.01), ValueError, "t_max"),
        (lambda: Flow(t_max=1.01), ValueError, "t_max"),
        (lambda: Tabulated([0.1, 1.2]), ValueError, "between 0 and 1"),
        (lambda: MeanReverting(3.0, np.ones(2)), TypeError, "schedule"),
        (lambda: MeanReverting(MeanReverting(VP(), np.ones(2)), np.ones(2)), ValueError, "mean of its own"),
        (lambda: MeanReverting(VP(), np.ones(2), scale=-1.0), ValueError, "positive"),
        (lambda: EDM(t_min=np.nan), ValueError, "finite"),
    ],
)
def test_bad_schedules(make, error, match):
    with pytest.raises(error, match=match):
        make()


@pytest.mark.filterwarnings("ignore:A JAX array is being set as static")
def test_a_traced_schedule_is_an_error():
    with pytest.raises(TypeError, match="known before tracing"):
        jax.jit(lambda b: VP(b).t_min)(0.1)


def test_a_schedule_is_static():
    assert jax.tree.leaves(VP()) == []
    assert VP() == VP()
    assert sf.diffusion.VP(0.1, 10.0) != VP()


def test_products_are_not_taken_for_rates():
    rates = np.linspace(1e-4, 0.02, 1000)
    products = np.cumprod(1 - rates)
    with pytest.raises(ValueError, match="products of 1 - beta"):
        sf.diffusion.Tabulated(products)
    again = sf.diffusion.Tabulated(1 - products / np.append(1.0, products[:-1]))  # as the message says
    np.testing.assert_allclose(again.betas, rates, rtol=1e-9)
