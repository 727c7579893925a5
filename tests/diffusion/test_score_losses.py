"""Losses of denoisers: exact minima by quadrature, weightings, levels, and a fit that learns a score."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sdeflow as sf

d = sf.diffusion
KEY = jax.random.key(0)
SCHEDULES = {
    "VP": d.VP(),
    "VE": d.VE(),
    "SubVP": d.SubVP(),
    "Cosine": d.Cosine(),
    "EDM": d.EDM(),
    "Flow": d.Flow(),
    "MeanReverting": d.MeanReverting(d.VP(), 0.75, scale=0.5),
}
#: data are N(MEAN, DEVIATION^2)
MEAN, DEVIATION = 0.3, 0.5
PREDICTIONS = ("noise", "data", "velocity", "score", "flow")
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(6)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()
#: from the error of the noise to that of each prediction
FACTORS = {
    "noise": lambda s, a, o, f, l: 1,
    "data": lambda s, a, o, f, l: o / a,
    "score": lambda s, a, o, f, l: 1 / o,
    "velocity": lambda s, a, o, f, l: a * s + o**2 / (a * s),
    "flow": lambda s, a, o, f, l: o * l,
    "likelihood": lambda s, a, o, f, l: jnp.sqrt(-2 * l),
}


pytestmark = pytest.mark.usefixtures("x64_module")


def best(schedule, kind, gain=1.0, shift=0.0):
    """The exact denoiser of normal data for one prediction; ``gain`` and ``shift`` spoil the output."""

    def fn(t, x, args):
        alpha, sigma, mean = schedule.alpha(t), schedule.sigma(t), float(schedule.mean)
        total = alpha**2 * DEVIATION**2 + sigma**2
        y = x - mean - alpha * (MEAN - mean)
        noise, data = sigma / total * y, MEAN + alpha * DEVIATION**2 / total * y
        f, slope = schedule.rates(t)
        out = {
            "noise": noise,
            "data": data,
            "score": -noise / sigma,
            "velocity": alpha * schedule.scale * noise - sigma / schedule.scale * (data - mean),
            "flow": f * (x - mean) - sigma * slope * noise,
        }
        return gain * out[kind] + shift

    return d.Denoiser(fn, schedule, prediction=kind)


def expected(loss, model, t):
    """The mean of a loss at time t over data and noise: exact, as the error is a polynomial of degree 2."""
    x0, z = (x.ravel() for x in np.meshgrid(MEAN + DEVIATION * _NODES, _NODES))
    weights = np.outer(_WEIGHTS, _WEIGHTS).ravel()
    return jnp.asarray(weights) @ jax.vmap(lambda x, z: loss.error(model, t, x, z))(jnp.asarray(x0), jnp.asarray(z))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_exact_denoiser_is_the_minimum_of_the_loss(name):
    schedule = SCHEDULES[name]
    times = jnp.linspace(0.1, 0.9, 3) * schedule.t_max

    @jax.jit
    def slopes(spoil):
        def total(spoil, kind):
            return jax.vmap(lambda t: expected(d.ScoreMatching(), best(schedule, kind, *spoil), t))(times).sum()

        out = [jax.value_and_grad(total)(spoil, kind) for kind in PREDICTIONS]
        return jnp.stack([v for v, _ in out]), jnp.stack([g for _, g in out])

    values, gradients = slopes(jnp.array([1.0, 0.0]))
    np.testing.assert_allclose(values, values[0], rtol=1e-9)
    np.testing.assert_allclose(gradients, 0.0, atol=1e-9 * float(values[0]))
    assert jnp.all(slopes(jnp.array([1.0, 0.05]))[0] > values)
    assert jnp.all(slopes(jnp.array([1.05, 0.0]))[0] > values)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_weighting_counts_the_error_of_the_prediction_of_its_name(name):
    schedule = SCHEDULES[name]
    t, x0, z = (jnp.asarray(x) for x in (0.3 * schedule.t_max, 0.4, -0.6))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    mean = float(schedule.mean)
    x = mean + alpha * (x0 - mean) + sigma * z
    exact = d.Denoiser(lambda t, x, args: z, schedule)
    model = best(schedule, "noise", 0.9, 0.1)
    for kind, factor in FACTORS.items():
        got = d.ScoreMatching(kind).error(model, t, x0, z)
        error = model.predict("noise", t, x) - z
        wanted = (factor(schedule.scale, alpha, sigma, *schedule.rates(t)) * error) ** 2
        np.testing.assert_allclose(got, wanted, rtol=1e-10)
        if kind != "likelihood":
            np.testing.assert_allclose(got, (model.predict(kind, t, x) - exact.predict(kind, t, x)) ** 2, rtol=1e-8)
    f, slope = schedule.rates(t)
    g2 = jax.grad(lambda t: schedule.sigma(t) ** 2)(t) - 2 * f * sigma**2
    likelihood = g2 * (model.predict("score", t, x) + z / sigma) ** 2
    np.testing.assert_allclose(d.ScoreMatching("likelihood").error(model, t, x0, z), likelihood, rtol=1e-8)


def test_flow_matching_is_the_square_to_the_straight_velocity():
    model = d.Denoiser(lambda t, x, args: 0.3 * x + t, d.Flow(), prediction="flow")
    t, x0, z = (jnp.asarray(x) for x in (0.3, 0.4, -0.6))
    got = d.ScoreMatching("flow").error(model, t, x0, z)
    np.testing.assert_allclose(got, (0.3 * ((1 - t) * x0 + t * z) + t - (z - x0)) ** 2, rtol=1e-12)


@pytest.mark.parametrize("schedule", [d.EDM(), d.VP()], ids=["EDM", "VP"])
def test_the_loss_of_karras_is_that_of_the_network_and_best_at_0_for_normal_data(schedule):
    model = lambda w: d.Precondition(lambda label, y, args: w[0] * y + w[1], schedule, sigma_data=DEVIATION)
    loss = d.EDMLoss()
    t, x0, z = (jnp.asarray(x) for x in (0.2, 0.4, -0.6))
    r = jnp.exp(-schedule.log_snr(t))
    size = jnp.sqrt(r**2 + DEVIATION**2)
    target = (x0 - DEVIATION**2 / size**2 * (x0 + r * z)) / (r * DEVIATION / size)
    w = jnp.array([0.2, -0.1])
    np.testing.assert_allclose(
        loss.error(model(w), t, x0, z), (w[0] * (x0 + r * z) / size + w[1] - target) ** 2, rtol=1e-10
    )
    # The data are centred here; the weight is that of the data.
    x0, z = (jnp.asarray(x.ravel()) for x in np.meshgrid(DEVIATION * _NODES, _NODES))
    weights = jnp.asarray(np.outer(_WEIGHTS, _WEIGHTS).ravel())
    mean = lambda w: weights @ jax.vmap(lambda x, z: loss.error(model(w), t, x, z))(x0, z)
    value, gradient = jax.value_and_grad(mean)(jnp.zeros(2))
    np.testing.assert_allclose(value, 1.0, rtol=1e-12)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-12)
    own, given = d.Denoiser(lambda t, x, args: 0 * x, schedule), d.EDMLoss(sigma_data=DEVIATION)
    error = own.predict("data", t, schedule.alpha(t) * 0.4 - schedule.sigma(t) * 0.6) - 0.4
    np.testing.assert_allclose(
        given.error(own, t, jnp.asarray(0.4), jnp.asarray(-0.6)), (size / (r * DEVIATION) * error) ** 2, rtol=1e-9
    )


def test_levels_are_of_the_law_that_is_asked_for():
    schedule, u = d.EDM(), jnp.linspace(0, 1, 4001)[:-1] + 1 / 8000
    model = d.Denoiser(lambda t, x, args: x, schedule)
    logs = jnp.log(d.EDMLoss().time(model, u))
    np.testing.assert_allclose((logs.mean(), logs.std()), (-1.2, 1.2), rtol=2e-3)
    times = d.ScoreMatching(t_min=0.5).time(model, u)
    np.testing.assert_allclose((times.min(), times.max(), times.mean()), (0.5, 80, 40.25), rtol=1e-3, atol=0.02)
    ends = d.EDMLoss().time(model, jnp.array([0.0, 1.0], jnp.float32))
    np.testing.assert_allclose(ends, jnp.clip(ends, schedule.t_min, schedule.t_max))


def test_stratified_levels_have_the_mean_of_independent_ones_and_less_variance():
    model = d.Denoiser(lambda t, x, args: t * x, d.VP())
    data = jnp.full((16, 64), 1.0)

    def draws(loss):
        return jax.jit(jax.vmap(lambda key: loss(model, data, key, 0)[0]))(jax.random.split(KEY, 2000))

    even, free = draws(d.ScoreMatching("data")), draws(d.ScoreMatching("data", stratified=False))
    assert abs(even.mean() - free.mean()) < 5 * float(jnp.sqrt((even.var() + free.var()) / 2000))
    assert even.var() < 0.2 * free.var()


def test_the_loss_of_a_batch_is_the_weighted_mean_and_passes_the_arguments_on():
    data = sf.data.Samples(np.ones((3, 2)), args=np.array([0.0, 1.0, 2.0]))
    model = d.Denoiser(lambda t, x, args: 0 * x + args, d.VP())
    (whole,) = data.batches(3)
    loss = d.ScoreMatching()
    value, metrics = loss(model, whole, KEY, 0)
    assert metrics == {}
    z = jax.random.normal(jax.random.split(KEY)[1], (3, 2))
    np.testing.assert_allclose(value, ((data.args[:, None] - z) ** 2).mean(), rtol=1e-12)
    light = sf.data.SamplesBatch(whole.values, whole.args, whole.ids, np.array([1.0, 0.0, 3.0]))
    errors = ((data.args[:, None] - z) ** 2).mean(axis=1)
    np.testing.assert_allclose(loss(model, light, KEY, 0)[0], (errors[0] + 3 * errors[2]) / 4, rtol=1e-12)


def test_what_is_wrong_is_refused():
    model, loss = d.Denoiser(lambda t, x, args: x, d.VP()), d.ScoreMatching()
    with pytest.raises(ValueError, match="weighting must be one of 'noise'"):
        d.ScoreMatching("sigma")
    with pytest.raises(ValueError, match="must be below the end of the schedule"):
        d.ScoreMatching(t_min=1.0)(model, jnp.ones((2, 1)), KEY, 0)
    with pytest.raises(ValueError, match="deviation must be positive"):
        d.EDMLoss(deviation=0.0)
    with pytest.raises(ValueError, match="a Denoiser does not say what the deviation of the data is"):
        d.EDMLoss()(model, jnp.ones((2, 1)), KEY, 0)
    with pytest.raises(TypeError, match="a denoiser must be"):
        loss(lambda t, x: x, jnp.ones((2, 1)), KEY, 0)
    with pytest.raises(TypeError, match="without real samples"):
        loss(model, {"labels": np.ones(3)}, KEY, 0)
    with pytest.raises(TypeError, match="without real samples"):
        loss(model, jnp.arange(3), KEY, 0)


class Normal(eqx.Module):
    """What predicts the noise or the flow of a normal law with unknown mean and deviation."""

    mean: jax.Array
    log: jax.Array
    schedule: d.AbstractSchedule
    flow: bool = eqx.field(static=True)

    def __call__(self, t, x, args):
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        noise = sigma * (x - alpha * self.mean) / ((alpha * jnp.exp(self.log)) ** 2 + sigma**2)
        f, slope = self.schedule.rates(t)
        return f * x - sigma * slope * noise if self.flow else noise


@pytest.mark.parametrize("kind", ["noise", "flow"])
def test_a_fit_learns_the_score_of_a_gaussian(kind):
    with jax.enable_x64(False):
        schedule = d.Flow() if kind == "flow" else d.VP()
        mean, deviation = np.array([0.5, -1.0]), np.array([0.3, 0.6])
        data = mean + deviation * np.random.default_rng(0).normal(size=(4096, 2))
        fit = sf.fit(
            d.Denoiser(Normal(jnp.zeros(2), jnp.zeros(2), schedule, kind == "flow"), schedule, prediction=kind),
            sf.data.Samples(data.astype(np.float32)),
            d.ScoreMatching(kind),
            optim=optax.adam(optax.cosine_decay_schedule(0.1, 300)),
            steps=300,
            batch_size=256,
            key=KEY,
            progress=False,
        )
        assert fit.model.fn.mean.dtype == jnp.float32
        # 4096 samples say as much: 5 standard errors of the mean are .05 at the most, of the deviation .03.
        np.testing.assert_allclose(fit.model.fn.mean, mean, atol=0.05)
        np.testing.assert_allclose(jnp.exp(fit.model.fn.log), deviation, atol=0.05)
        best = d.Denoiser(Normal(jnp.asarray(mean), jnp.log(deviation), schedule, False), schedule)
        t, x = 0.4, jnp.array([0.2, -0.4])
        np.testing.assert_allclose(fit.model.predict("score", t, x), best.predict("score", t, x), atol=0.1)
