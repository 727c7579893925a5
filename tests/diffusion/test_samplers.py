"""Samplers against digits that are known, closed forms, orders, and each other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdeflow as sf
from sdeflow.diffusion import (
    BDIA,
    DDIM,
    DEIS,
    EDM,
    VE,
    VP,
    Cosine,
    Denoiser,
    DPMSolver,
    DPMSolverPP,
    DPMSolverV3,
    Flow,
    MeanReverting,
    Multistep,
    Singlestep,
    Statistics,
    SubVP,
    Tabulated,
    UniPC,
    iPNDM,
    sample,
)
from sdeflow.diffusion._times import knots
from tests.helpers import diffusion as gmm

pytestmark = pytest.mark.usefixtures("x64_module")

RHO_HEUN, KUTTA, RK4 = (Singlestep(method=name) for name in ("heun", "kutta", "rk4"))
MULTISTEP = {
    "DDIM": DDIM(),
    "DEIS t": DEIS(3, "t"),
    "DEIS rho": DEIS(3, "rho"),
    "DPMSolver": DPMSolver(3),
    "DPMSolverPP": DPMSolverPP(2),
    "UniPC": UniPC(3),
    "UniPC noise": UniPC(2, reads="noise"),
    "iPNDM": iPNDM(4),
    "BDIA": BDIA(0.9),
}
v3 = lambda l, s, order=3: DPMSolverV3(
    Statistics(np.array([-6.0, 6.0]), *(np.full((2, 2), x) for x in (l, s, 0.0))), order
)


# ---- Digits on the mixture: three grids, two scales of guidance. ----

DIGITS = [
    ("DDIM", DDIM(), 10, "logsnr", None, 0.272),
    ("iPNDM", iPNDM(4), 10, "logsnr", None, 0.0731),
    ("tAB3", DEIS(4, "t"), 10, "edm", None, 0.0956),
    ("DPM 2M", DPMSolver(2, lower_order_final=False), 10, "logsnr", None, 0.153),
    ("DPM++ 2M", DPMSolverPP(2, lower_order_final=False), 10, "t", None, 0.404),
    ("DPM++ 2M, exact", Multistep(2, "data", lower_order_final=False), 10, "t", None, 0.621),
    ("DPM++ 3M, short", DPMSolverPP(3, lower_order_final=True), 8, "logsnr", None, 0.196),
    ("UniPC-3", UniPC(3, lower_order_final=True), 10, "logsnr", None, 0.0723),
    ("UniPC-3 noise", UniPC(3, reads="noise", lower_order_final=True), 10, "edm", None, 0.0866),
    ("UniPC-3, guided", UniPC(3, lower_order_final=True), 10, "t", 3.0, 0.103),
    ("DPM++ 2M, guided", DPMSolverPP(2, lower_order_final=False), 10, "t", 7.5, 0.329),
    ("BDIA 1", BDIA(1.0), 10, "logsnr", None, 0.257),
    ("DPM-Solver-2S", Singlestep(2), 5, "logsnr", None, 0.262),
    ("DPM++ 2S", Singlestep(2, "data"), 5, "t", None, 0.188),
    ("DPM-Solver-fast, t", DPMSolver(3, steps="fast"), 8, "t", None, 0.919),
    ("rho-Heun, odd", Singlestep(method="heun", lower_order_final=True), 3, "t", None, 0.255),
    ("rhoRK3", KUTTA, 4, "logsnr", None, 0.21),
]


@pytest.mark.parametrize(
    ("solver", "steps", "grid", "scale", "wanted"), [d[1:] for d in DIGITS], ids=[d[0] for d in DIGITS]
)
def test_errors_on_the_mixture_have_their_known_digits(solver, steps, grid, scale, wanted):
    error = gmm.error(solver, steps, grid, scale)
    # As many digits as are known.
    assert float(f"{error:.3g}") == pytest.approx(wanted, abs=1.01 * 10.0 ** (np.floor(np.log10(wanted)) - 2))


# ---- Orders: the median error, which a few samples between two modes do not decide. ----

ORDERS = [
    ("DDIM", DDIM(), "logsnr", 1, 64),
    ("DPM++3M", DPMSolverPP(3), "logsnr", 3, 64),
    ("rho-RK4", RK4, "logsnr", 4, 64),
    ("DPM-3S", Singlestep(3), "logsnr", 3, 64),
    ("BDIA 1", BDIA(1.0), "logsnr", 2, 64),
]


@pytest.mark.parametrize(("solver", "grid", "order", "steps"), [o[1:] for o in ORDERS], ids=[o[0] for o in ORDERS])
def test_orders(solver, grid, order, steps):
    errors = [gmm.error(solver, n, grid, count=64, measure=gmm.median) for n in (steps, 2 * steps)]
    assert np.log2(errors[0] / errors[1]) > order - 0.25


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "grid", "wanted"),
    [
        (DDIM(), "logsnr", 1.00),
        (DPMSolverPP(2), "logsnr", 2.00),
        (DPMSolverPP(3), "logsnr", 3.05),
        (Multistep(3, "noise", lower_order_final=False), "logsnr", 2.98),
        (DEIS(3, "rho"), "logsnr", 2.95),
        (DEIS(4, "rho"), "logsnr", 3.89),
        (DEIS(3, "t"), "quadratic", 2.91),
        (DEIS(4, "t"), "quadratic", 3.12),
        (UniPC(1, lower_order_final=False), "logsnr", 2.00),
        (UniPC(2, lower_order_final=False), "logsnr", 3.01),
        (UniPC(3, lower_order_final=False), "logsnr", 3.84),
        (RHO_HEUN, "logsnr", 2.01),
        (RK4, "logsnr", 4.00),
        (BDIA(1.0), "logsnr", 2.00),
        (BDIA(0.5), "logsnr", 1.00),
    ],
)
def test_slopes_at_the_last_doubling(solver, grid, wanted):
    errors = [gmm.error(solver, n, grid, measure=gmm.median) for n in (256, 512)]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(wanted, abs=0.08)


# ---- Gaussian data, in closed form. ----

MEANS, VARIANCES = np.array([1.0, -0.5]), np.array([0.04, 0.5])


def normal_denoiser(schedule, means=MEANS, variances=VARIANCES):
    def noise(t, x, args):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return sigma * (x - schedule.mean - alpha * means) / (alpha**2 * variances + sigma**2)

    return Denoiser(noise, schedule)


def normal_flow(schedule, x, t_end=None):
    """Where the ordinary equation carries x."""
    t = np.array([schedule.t_max, schedule.t_min if t_end is None else t_end])
    (a0, a1), (s0, s1) = schedule.alpha(t), schedule.sigma(t)
    mean = np.asarray(schedule.mean)
    stretch = np.sqrt((a1**2 * VARIANCES + s1**2) / (a0**2 * VARIANCES + s0**2))
    return mean + a1 * MEANS + stretch * (x - mean - a0 * MEANS)


@pytest.mark.parametrize(("steps", "wanted"), [(10, 0.0241), (20, 0.00143), (40, 0.0000900)])
def test_normal_data_has_its_known_digits(steps, wanted):
    x = gmm.starts()
    out = sample(normal_denoiser(VP()), jnp.asarray(x), solver=DPMSolverPP(3), num_steps=steps)
    assert gmm.rms(out, normal_flow(VP(), x)) == pytest.approx(wanted, rel=5e-3)


SCHEDULES = {
    "VP": VP(),
    "SubVP": SubVP(),
    "Cosine": Cosine(),
    "VE": VE(),
    "EDM": EDM(),
    "Flow": Flow(),
    "Tabulated": Tabulated(np.linspace(1e-4, 0.02, 1000)),
    "MeanReverting": MeanReverting(VP(), np.array([2.0, -1.0]), scale=0.3),
}
THIRD = {"UniPC": UniPC(3), "DPM-Solver-3S": Singlestep(3)}


@pytest.mark.parametrize(("name", "grid"), [*((name, "logsnr") for name in SCHEDULES), ("VP", "edm"), ("Flow", "edm")])
def test_every_schedule_reaches_the_data(name, grid):
    schedule = SCHEDULES[name]
    x = schedule.mean + schedule.prior_std() * gmm.starts(16)
    wanted = normal_flow(schedule, x)
    for solver in THIRD.values():
        out = sample(normal_denoiser(schedule), jnp.asarray(x), solver=solver, num_steps=100, grid=grid)
        np.testing.assert_allclose(out, wanted, atol=2e-4)


@pytest.mark.parametrize("grid", ["t", "quadratic"])
@pytest.mark.parametrize("name", ["VP", "Flow"])
def test_grids_in_time_reach_the_data(name, grid):
    schedule = SCHEDULES[name]
    x = gmm.starts(16)
    out = sample(normal_denoiser(schedule), jnp.asarray(x), solver=UniPC(2), num_steps=200, grid=grid)
    np.testing.assert_allclose(out, normal_flow(schedule, x), atol=3e-3)


LAST = [("VP", name, solver) for name, solver in MULTISTEP.items()] + [
    (name, kind, solver)
    for name in ("VP", "EDM", "Flow")
    for kind, solver in (
        ("UniPC", UniPC(3)),
        ("3S", Singlestep(3)),
        ("3S data", Singlestep(3, "data")),
        ("Heun", RHO_HEUN),
    )
]


@pytest.mark.parametrize(("name", "solver"), [(a, c) for a, _, c in LAST], ids=[f"{a}-{b}" for a, b, _ in LAST])
def test_the_last_step_to_no_noise_is_the_data(name, solver):
    schedule = SCHEDULES[name]
    # With data in one point every step that only keeps the data is exact.
    point = Denoiser(to_the_means, schedule, prediction="data")
    x = jnp.asarray(gmm.starts(1)[0] * schedule.prior_std())
    out = sample(point, x, solver=solver, num_steps=6, t_end=0.0)
    # Noise far from the data is a difference of large numbers.
    np.testing.assert_allclose(out, MEANS, atol=1e-11 if getattr(solver, "reads", "noise") == "data" else 1e-6)


@pytest.mark.parametrize("solver", [UniPC(3), Singlestep(3), RHO_HEUN, BDIA()], ids=["UniPC", "3S", "Heun", "BDIA"])
def test_one_step_to_no_noise_is_the_data(solver):
    point = Denoiser(to_the_means, VP(), prediction="data")
    out = sample(point, jnp.asarray(gmm.starts(1)[0]), solver=solver, num_steps=1, t_end=0.0)
    np.testing.assert_allclose(out, MEANS, atol=1e-6)


def to_the_means(t, x, args):
    return jnp.asarray(MEANS) + 0 * x


def test_v3_ends_on_the_data_too():
    point = Denoiser(to_the_means, VP(), prediction="data")
    for corrector in (True, False):
        solver = DPMSolverV3(v3(0.7, -0.2).statistics, 3, corrector=corrector)
        out = sample(point, jnp.asarray(gmm.starts(1)[0]), solver=solver, num_steps=6, t_end=0.0)
        np.testing.assert_allclose(out, MEANS, atol=1e-9)


# ---- Identities. ----


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("reads", ["noise", "data"])
def test_weights_are_those_of_the_phi_functions(order, reads):
    # Moments int_0^h e^{s (h - u)} u^k / k! du against mpmath-free closed forms: polynomials of low degree are exact.
    l = np.array([-1.0, -0.3, 0.1, 0.65])
    form = sf.diffusion._multistep.Form(VP(), sf.diffusion._table.Points.at(VP(), VP().t_of_log_snr(l)), reads, "l")
    nodes = np.array([[2, 1, 0][:order]])
    _, weights, _ = form.step(np.array([2]), np.array([3]), nodes, 0)
    rate = -1.0 if reads == "noise" else 1.0
    u = np.polynomial.Polynomial([0, 1])
    for degree in range(order):
        f = (u - 0.2) ** degree
        # int e^{rate (l - 0.65)} f(l) dl by parts.
        total, sign, derivative = 0.0, 1.0, f
        for k in range(degree + 1):
            total += sign / rate ** (k + 1) * (derivative(0.65) - np.exp(rate * (0.1 - 0.65)) * derivative(0.1))
            sign, derivative = -sign, derivative.deriv()
        gain = form.gain(np.array([3]))[0]
        assert (weights[0] * f(l[nodes[0]])).sum() == pytest.approx(gain * total, rel=1e-12)


@pytest.mark.parametrize("solver", [UniPC(3), DPMSolver(3), DDIM(1.0)], ids=["data", "noise", "eta"])
def test_a_mean_is_a_shift(solver):
    mean, key = np.array([2.0, -1.0]), jax.random.key(0)
    x = jnp.asarray(gmm.starts(8))
    plain = sample(normal_denoiser(VP()), x, solver=solver, num_steps=6, key=key)
    shifted = sample(normal_denoiser(MeanReverting(VP(), mean)), x + mean, solver=solver, num_steps=6, key=key)
    np.testing.assert_allclose(shifted - mean, plain, atol=1e-13)


def test_the_posterior_is_the_first_order_stochastic_step():
    times = knots(VP(), 6, "logsnr", None)
    alpha, sigma = VP().alpha(times), VP().sigma(times)
    for solver in (DPMSolverPP(1, tau=1.0), DDIM(1.0)):
        table = solver.table(VP(), times, "logsnr")
        a, b = slice(0, -1), slice(1, None)
        # q(x_t | x_s, x_0): precision-weighted means of the forward step and of the marginal.
        ratio = alpha[a] / alpha[b]
        step = sigma[a] ** 2 - ratio**2 * sigma[b] ** 2
        np.testing.assert_allclose(table.keep, ratio * sigma[b] ** 2 / sigma[a] ** 2, rtol=1e-12)
        np.testing.assert_allclose(table.out[:, 0], alpha[b] * step / sigma[a] ** 2, rtol=1e-12)
        np.testing.assert_allclose(table.noise, np.sqrt(sigma[b] ** 2 * step / sigma[a] ** 2), rtol=1e-12)


def test_ddim_has_its_formula():
    times, eta = knots(VP(), 5, "t", None), 0.6
    alpha, sigma = VP().alpha(times), VP().sigma(times)
    table = DDIM(eta).table(VP(), times, "t")
    size = eta * sigma[1:] / sigma[:-1] * np.sqrt(1 - (alpha[:-1] / alpha[1:]) ** 2)
    left = np.sqrt(sigma[1:] ** 2 - size**2) / sigma[:-1]
    np.testing.assert_allclose(table.noise, size, rtol=1e-10)
    np.testing.assert_allclose(table.keep, left, rtol=1e-10)
    np.testing.assert_allclose(table.out[:, 0], alpha[1:] - alpha[:-1] * left, rtol=1e-9)


def test_first_order_is_the_same_in_both_forms():
    x = jnp.asarray(gmm.starts(16))
    runs = [Multistep(1, "noise"), DDIM(), Singlestep(1), Singlestep(1, "data"), v3(0.3, 0.0, 1), v3(1.0, 0.0, 1)]
    out = [jax.vmap(lambda x, s=s: sample(gmm.denoiser(), x, solver=s, num_steps=7))(x) for s in runs[:4] + runs[5:]]
    for other in out[1:]:
        np.testing.assert_allclose(other, out[0], atol=1e-13)


@pytest.mark.parametrize(("l", "s", "reads"), [(1.0, 0.0, "data"), (0.0, -1.0, "noise")])
def test_v3_with_constant_statistics_is_a_dpm_solver(l, s, reads):
    x = jnp.asarray(gmm.starts(16))
    out = jax.vmap(lambda x: sample(gmm.denoiser(), x, solver=v3(l, s), num_steps=10))(x)
    wanted = sample(gmm.denoiser(), x, solver=Multistep(3, reads), num_steps=10)
    np.testing.assert_allclose(out, wanted, atol=1e-12)


# ---- Evaluations. ----


class Counted:
    """A network that counts its evaluations, and keeps their times."""

    def __init__(self, fn):
        self.fn, self.times = fn, []

    def __call__(self, t, x, args):
        jax.debug.callback(lambda t: self.times.append(float(t)), t)
        return self.fn(t, x, args)


def evaluations(solver, **options):
    net = Counted(lambda t, x, args: 0.3 * x)
    sample(Denoiser(net, VP()), jnp.ones(2), solver=solver, key=jax.random.key(0), **options).block_until_ready()
    jax.effects_barrier()
    return net.times


COUNTED = {name: MULTISTEP[name] for name in ("DDIM", "UniPC", "BDIA")} | {"v3": v3(0.7, -0.2)}


@pytest.mark.parametrize("solver", COUNTED.values(), ids=COUNTED)
def test_a_multistep_sampler_evaluates_once_a_step(solver):
    times = evaluations(solver, num_steps=7)
    np.testing.assert_allclose(sorted(times)[::-1], knots(VP(), 7, "logsnr", None)[:-1], rtol=1e-12)


@pytest.mark.parametrize("solver", [*MULTISTEP.values(), v3(0.7, -0.2)], ids=[*MULTISTEP, "v3"])
def test_a_multistep_table_has_a_row_a_step(solver):
    # One row is one evaluation, which is what the test above counts.
    times = knots(VP(), 7, "logsnr", None)
    np.testing.assert_array_equal(solver.table(VP(), times, "logsnr").t, times[:-1])


SINGLE = [
    (Singlestep(2), 4, 8),
    (Singlestep(3, "data"), 4, 12),
    (RK4, 3, 12),
    (KUTTA, 3, 9),
    *[(DPMSolver(3, steps="fast"), n, n) for n in (1, 2, 3, 10, 11)],
]


@pytest.mark.parametrize(("solver", "steps", "count"), SINGLE)
def test_singlestep_tables_have_as_many_rows_as_they_say(solver, steps, count):
    times = solver.times(VP(), steps, "logsnr", None)
    assert solver.table(VP(), times, "logsnr", steps).num_rows == count


def test_singlestep_samplers_evaluate_once_a_row():
    assert len(evaluations(Singlestep(3, "data"), num_steps=4)) == 12
    assert len(evaluations(DPMSolver(3, steps="fast"), num_steps=11)) == 11


def test_karras_sampler_evaluates_twice_but_for_the_last_step():
    assert len(evaluations(RHO_HEUN, num_steps=6, grid="edm", t_end=0.0)) == 11


# ---- Noise. ----

M, V = 0.8, 0.3
VARIANCE_ERRORS = {
    (1.0, 1): [-1.1e-1, -6.2e-2, -3.3e-2, -1.7e-2],
    (1.0, 2): [5.3e-2, 1.25e-2, 3.0e-3, 7.3e-4],
    (1.0, 3): [1.6e-2, 2.4e-3, 5.1e-4, 1.2e-4],
    (0.0, 3): [1.7e-3, 1.1e-4, 6.7e-6, 4.2e-7],
}


def traced_by_hand(table, state, affine):
    """A table followed on coefficient vectors (constant, start, noise at the start, noise of each row).

    Arguments:
        affine: ``affine(t, state)``, the data as another such vector, the denoiser being affine.
    """
    base, outputs = state, []
    if table.start is not None:
        state = table.start[0] * state
        state[2] += table.start[1]
    for i, t in enumerate(table.t):
        outputs.insert(0, affine(t, state))
        base = state if table.fresh is None or table.fresh[i] else base
        state = table.keep[i] * base + sum(w * m for w, m in zip(table.out[i], outputs))
        if table.noise is not None:
            state[3 + i] += table.noise[i]
    return state


def affine_moments(solver, steps, schedule=None, grid="logsnr", t_end=None, mean=M, variance=V):
    """Mean and variance at the end, from the exact law at the start, and those of the data as they should be there."""
    schedule = VP() if schedule is None else schedule
    times = knots(schedule, steps, grid, t_end)
    table = solver.table(schedule, times, grid)
    read = lambda t, y, shift: (
        schedule.sigma(t) * (y - shift) / (schedule.alpha(t) ** 2 * variance + schedule.sigma(t) ** 2)
    )

    def affine(t, state):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        shift = np.zeros_like(state)
        shift[0] = alpha * mean
        noise = read(t, state, shift)
        return noise if table.reads == "noise" else (state - sigma * noise) / alpha

    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    state = np.zeros(len(table.t) + 3)
    state[:2] = alpha[0] * mean, np.sqrt(alpha[0] ** 2 * variance + sigma[0] ** 2)
    state = traced_by_hand(table, state, affine)
    return state[0], (state[1:] ** 2).sum(), alpha[-1] * mean, alpha[-1] ** 2 * variance + sigma[-1] ** 2


@pytest.mark.parametrize(("tau", "order"), VARIANCE_ERRORS)
def test_variances_of_stochastic_steps_have_their_known_errors(tau, order):
    solver = Multistep(order, "data", tau=tau, lower_order_final=False)
    for steps, wanted in zip((20, 40, 80, 160), VARIANCE_ERRORS[tau, order]):
        mean, variance, true_mean, true_variance = affine_moments(solver, steps)
        assert abs(mean - true_mean) < 1e-14
        assert variance - true_variance == pytest.approx(wanted, rel=0.05)


CHURN = Singlestep(method="heun", churn=4.0, churn_from=0.05, churn_to=50.0, churn_noise=1.003)


@pytest.mark.parametrize(
    ("solver", "schedule", "grid"),
    [(DPMSolverPP(2, tau=1.0), VP(), "logsnr"), (DDIM(0.7), VP(), "logsnr"), (CHURN, EDM(), "edm")],
    ids=["SDE", "DDIM", "churn"],
)
def test_samples_have_the_law_of_their_table(solver, schedule, grid):
    denoiser = normal_denoiser(schedule, M, V)
    t = schedule.t_max
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))

    def one(key):
        first, then = jax.random.split(key)
        x = alpha * M + jnp.sqrt(alpha**2 * V + sigma**2) * jax.random.normal(first, ())
        return sample(denoiser, x, solver=solver, num_steps=10, grid=grid, key=then)

    draws = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(3), 20_000)))
    mean, variance, _, _ = affine_moments(solver, 10, schedule, grid)
    assert abs(draws.mean() - mean) < 5 * np.sqrt(variance / len(draws))
    assert abs(draws.var() / variance - 1) < 5 * np.sqrt(2 / len(draws))


def test_churn_is_the_published_algorithm():
    schedule, steps = EDM(), 6
    times = knots(schedule, steps, "edm", 0.0)
    table = CHURN.table(schedule, times, "edm")
    rng = np.random.default_rng(0)
    z = rng.standard_normal(steps)
    denoise = lambda x, s: x / (1 + s**2)
    start = reference = 80.0 * rng.standard_normal()
    # Karras et al., algorithm 2.
    for i in range(steps):
        s, after = times[i], times[i + 1]
        gamma = min(4.0 / steps, np.sqrt(2) - 1) if 0.05 <= s <= 50 else 0.0
        hat = s * (1 + gamma)
        lifted = reference + np.sqrt(hat**2 - s**2) * 1.003 * z[i]
        slope = (lifted - denoise(lifted, hat)) / hat
        reference = lifted + (after - hat) * slope
        if after > 0:
            reference = lifted + (after - hat) * (slope + (reference - denoise(reference, after)) / after) / 2
    state = np.zeros(len(table.t) + 3)
    state[1] = 1.0
    state = traced_by_hand(table, state, lambda t, y: (y - denoise(y, t)) / t)
    # The noise of a step is added at the end of the one before.
    drawn = np.zeros_like(state)
    drawn[1], drawn[2] = start, z[0]
    drawn[3 + np.flatnonzero(table.fresh)[1:] - 1] = z[1:]
    assert state @ drawn == pytest.approx(reference, rel=1e-12)


# ---- Everyday use. ----


def test_jit_and_vmap_change_nothing():
    x = jnp.asarray(gmm.starts(4))
    run = functools.partial(sample, gmm.denoiser(), solver=UniPC(3), num_steps=6)
    whole = run(x)
    np.testing.assert_allclose(jax.vmap(run)(x), whole, atol=1e-14)
    np.testing.assert_allclose(jax.jit(run)(x), whole, atol=1e-14)
    for policy in ("step", "sqrt", None, 2):
        kept = run(x, adjoint=sf.adjoints.DiscreteAdjoint(policy))
        np.testing.assert_allclose(kept, whole, atol=1e-14)


def test_a_grid_gives_the_times():
    x, times = jnp.asarray(gmm.starts(4)), knots(VP(), 9, "logsnr", None)
    named = sample(gmm.denoiser(), x, solver=UniPC(3), num_steps=9)
    given = sample(gmm.denoiser(), x, solver=UniPC(3), grid=sf.grids.through(times))
    np.testing.assert_array_equal(named, given)
    traced = jax.jit(lambda grid: sample(gmm.denoiser(), x, solver=UniPC(3), grid=grid))
    grid = sf.grids.through(times)
    live = lambda left, right: sf.grids.Grid(left, right, grid.live, grid.save)
    np.testing.assert_allclose(
        jax.jit(lambda a, b: sample(gmm.denoiser(), x, solver=UniPC(3), grid=live(a, b)))(
            jnp.asarray(grid.left), jnp.asarray(grid.right)
        ),
        named,
        atol=1e-12,
    )
    np.testing.assert_allclose(traced(jax.tree.map(jnp.asarray, grid)), named, atol=1e-12)


SINGLE_PRECISION = {name: MULTISTEP[name] for name in ("DEIS t", "UniPC", "UniPC noise", "BDIA")} | {
    "3S": Singlestep(3)
}


@pytest.mark.parametrize("solver", SINGLE_PRECISION.values(), ids=SINGLE_PRECISION)
def test_single_precision_is_near_double(solver):
    run = lambda x: sample(gmm.denoiser(), x, solver=solver, num_steps=20)
    x = gmm.starts(64)
    double, single = run(jnp.asarray(x)), run(jnp.asarray(x, jnp.float32))
    assert single.dtype == jnp.float32
    assert gmm.median(single, np.asarray(double)) < 3e-6


def test_the_grid_decides_on_lower_orders():
    error = lambda grid, lower: gmm.error(DPMSolverPP(3, lower_order_final=lower), 10, grid)
    assert error("t", None) == error("t", True) < error("t", False) / 10
    assert error("logsnr", None) == error("logsnr", False)


BAD = {
    "no denoiser": (lambda x: sample(jnp.sin, x, solver=DDIM(), num_steps=3), TypeError, "denoiser"),
    "no solver": (lambda x: sample(gmm.denoiser(), x, solver=3, num_steps=3), TypeError, "sampler"),
    "no steps": (lambda x: sample(gmm.denoiser(), x, solver=DDIM()), ValueError, "num_steps"),
    "no such grid": (lambda x: sample(gmm.denoiser(), x, solver=DDIM(), num_steps=3, grid="lam"), ValueError, "grid"),
    "grid and steps": (
        lambda x: sample(gmm.denoiser(), x, solver=DDIM(), num_steps=3, grid=sf.grids.through([1.0, 0.1])),
        ValueError,
        "drop num_steps",
    ),
    "rising grid": (
        lambda x: sample(gmm.denoiser(), x, solver=DDIM(), grid=sf.grids.through([0.1, 1.0])), ValueError, "decrease"
    ),
    "grid before the start": (
        lambda x: sample(gmm.denoiser(), x, solver=DDIM(), grid=sf.grids.through([2.0, 0.1])), ValueError, "t_max=1"
    ),
    "wide mean": (
        lambda x: sample(normal_denoiser(MeanReverting(VP(), np.zeros((5, 2)))), x[0], solver=DDIM(), num_steps=3),
        ValueError,
        "broadcast",
    ),
    "end too late": (lambda x: sample(gmm.denoiser(), x, solver=DDIM(), num_steps=3, t_end=2.0), ValueError, "t_end"),
    "no key": (lambda x: sample(gmm.denoiser(), x, solver=DDIM(1.0), num_steps=3), ValueError, "key"),
    "integers": (
        lambda x: sample(gmm.denoiser(), x.astype(int), solver=DDIM(), num_steps=3), TypeError, "floating"
    ),
    "adjoint": (
        lambda x: sample(gmm.denoiser(), x, solver=DDIM(), num_steps=3, adjoint=sf.adjoints.ContinuousAdjoint()),
        ValueError,
        "adjoint",
    ),
    "state": (
        lambda x: sample(gmm.denoiser(), x, solver=DDIM(), num_steps=3, return_state=True), ValueError, "BDIA"
    ),
    "statistics": (lambda x: sample(gmm.denoiser(), x, solver=v3(1.0, 0.0), num_steps=3), ValueError, "statistics"),
    "fast with a grid": (
        lambda x: sample(gmm.denoiser(), x, solver=DPMSolver(3, steps="fast"), grid=sf.grids.through([1.0, 0.1])),
        ValueError,
        "fast",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_calls(name):
    call, error, match = BAD[name]
    with pytest.raises(error, match=match):
        call(jnp.asarray(gmm.starts(3)))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Multistep(5), "order"),
        (lambda: Multistep(2, "score"), "reads"),
        (lambda: Multistep(2, coordinate="lam"), "coordinate"),
        (lambda: Multistep(2, "noise", tau=1.0), "tau"),
        (lambda: Multistep(2, "data", eta=1.0), "eta"),
        (lambda: DDIM(-0.1), "eta"),
        (lambda: DEIS(2, "l"), "coordinate"),
        (lambda: DPMSolver(4, steps="single"), "order"),
        (lambda: DPMSolver(2, steps="fast"), "order=3"),
        (lambda: DPMSolver(2, steps="double"), "steps"),
        (lambda: DPMSolverPP(2, steps="single", tau=1.0), "tau"),
        (lambda: Singlestep(method="midpoint"), "method"),
        (lambda: Singlestep(2, churn=1.0), "churn"),
        (lambda: Singlestep(method="heun", churn=1.0, churn_from=2.0, churn_to=1.0), "churn_from"),
        (lambda: Multistep(3, "noise", uniform=True, lower_order_final=True), "uniform"),
        (lambda: Multistep(3, "noise", "t", uniform=True), "uniform"),
        (lambda: BDIA(0.0), "gamma"),
        (lambda: BDIA(1.1), "gamma"),
    ],
)
def test_bad_samplers(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_what_does_not_stay_finite_is_an_error():
    broken = Denoiser(lambda t, x, args: x / 0.0, VP())
    with pytest.raises(sf.SolveError, match="finite"):
        sample(broken, jnp.ones(2), solver=DDIM(), num_steps=3)
