"""The equations of a diffusion model under `sdeflow.solve`, against closed forms and exact recursions."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdeflow as sf
from sdeflow.diffusion import (
    EDM,
    VE,
    VP,
    Cosine,
    Denoiser,
    Flow,
    MeanReverting,
    Multistep,
    ProbabilityFlow,
    ReverseSDE,
    SubVP,
)
from tests.helpers import diffusion as gmm

pytestmark = pytest.mark.usefixtures("x64_module")

M, V = 0.8, 0.3
SCHEDULES = {
    "VP": VP(),
    "SubVP": SubVP(),
    "Cosine": Cosine(),
    "VE": VE(),
    "EDM": EDM(),
    "Flow": Flow(),
    "MeanReverting": MeanReverting(VP(), np.array(2.0), scale=0.3),
}


def normal(schedule):
    def noise(t, x, args):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return sigma * (x - schedule.mean - alpha * M) / (alpha**2 * V + sigma**2)

    return Denoiser(noise, schedule)


def flow(schedule, x, s, t):
    (a0, a1), (s0, s1) = schedule.alpha(np.array([s, t])), schedule.sigma(np.array([s, t]))
    stretch = np.sqrt((a1**2 * V + s1**2) / (a0**2 * V + s0**2))
    mean = np.asarray(schedule.mean)
    return mean + a1 * M + stretch * (np.asarray(x) - mean - a0 * M)


@pytest.mark.parametrize("name", ["EDM", "Flow", "MeanReverting"])
def test_the_ordinary_equation_has_its_closed_form(name):
    schedule = SCHEDULES[name]
    ts = np.array([0.9 * schedule.t_max, max(schedule.t_min, 0.05 * schedule.t_max)])
    x = jnp.array([0.3, -1.0, 2.5])
    options = {"stepsize_controller": diffrax.PIDController(rtol=1e-9, atol=1e-9), "solver": diffrax.Dopri8()}
    for span in (ts, ts[::-1]):
        out = sf.solve(ProbabilityFlow(normal(schedule)), x, span, **options).final
        np.testing.assert_allclose(out, flow(schedule, x, *span), rtol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_drifts_are_finite_where_samplers_end(name):
    schedule, x = SCHEDULES[name], jnp.array([0.3, -1.0], jnp.float32)
    for equation in (ProbabilityFlow(normal(schedule)), ReverseSDE(normal(schedule))):
        for t in (schedule.t_min or 1e-6, schedule.t_max):
            out = equation.drift(t, x, None)
            assert out.dtype == jnp.float32
            assert bool(jnp.isfinite(out).all())
    assert bool(jnp.isfinite(ReverseSDE(normal(schedule)).diffusion(schedule.t_max, x, None)).all())


def test_euler_maruyama_has_its_known_moments():
    # An Euler step is affine in the state: its moments follow from the drift at 0 and at 1.
    equation = ReverseSDE(normal(VP()))

    @jax.jit
    def moments(ts):
        def step(carry, row):
            (m, v), (t, h) = carry, row
            f0, f1 = (equation.drift(t, jnp.asarray(y), None) for y in (0.0, 1.0))
            g = equation.diffusion(t, jnp.asarray(0.0), None)
            return (m + h * (f0 + (f1 - f0) * m), v * (1 + h * (f1 - f0)) ** 2 - h * g**2), None

        return jax.lax.scan(step, (0.0, 1.0), (ts[:-1], jnp.diff(ts)))[0]

    for steps, mean, variance in ((50, 0.80971, 0.30965), (100, 0.80485, 0.30461), (1000, 0.80044, 0.30051)):
        np.testing.assert_allclose(moments(jnp.linspace(1.0, 1e-3, steps + 1)), [mean, variance], atol=6e-6)


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_samples_of_the_reverse_equation_have_the_law_of_the_data(tau):
    # Stochastic Heun with 100 steps: a bias far below the Monte Carlo error.
    equation = ReverseSDE(normal(VP()), tau)
    a, s = float(VP().alpha(1.0)), float(VP().sigma(1.0))

    def one(key):
        first, then = jax.random.split(key)
        x = a * M + jnp.sqrt(a**2 * V + s**2) * jax.random.normal(first, ())
        grid = sf.grids.through(np.linspace(1.0, 0.0317, 101) ** 2)
        return sf.solve(
            equation, x, np.linspace(1.0, 0.0317, 101) ** 2, key=then, grid=grid, solver=diffrax.Heun()
        ).final

    draws = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 10_000)))
    t = 0.0317**2
    a, s = float(VP().alpha(t)), float(VP().sigma(t))
    assert abs(draws.mean() - a * M) < 5 * np.sqrt(V / len(draws))
    assert abs(draws.var() / (a**2 * V + s**2) - 1) < 5 * np.sqrt(2 / len(draws))


def test_the_euler_steps_on_the_mixture_have_their_known_digits():
    for steps, wanted in ((10, 0.108), (20, 0.0703)):
        ts = np.linspace(1.0, 1e-3, steps + 1)
        sol = sf.solve(
            ProbabilityFlow(gmm.denoiser()), jnp.asarray(gmm.starts()), ts[[0, -1]],
            grid=sf.grids.uniform(1.0, 1e-3, steps), solver=diffrax.Euler(),
        )  # fmt: skip
        assert float(f"{gmm.rms(sol.final, gmm.reference()):.3g}") == pytest.approx(wanted, rel=0.006)


def test_exponential_adams_takes_the_steps_of_the_samplers():
    order = 3
    x, denoiser = jnp.asarray(gmm.starts(32)), gmm.denoiser()
    equation = ProbabilityFlow(denoiser).reparametrised()
    ls = np.linspace(*VP().log_snr(np.array([1.0, 1e-3])), 21)
    wanted = sf.diffusion.sample(denoiser, x, solver=Multistep(order, "noise"), num_steps=20)
    solver = sf.solvers.ExponentialAdams(order, 1.0)
    start = equation.enter(ls[0], x)
    by_diffrax = diffrax.diffeqsolve(
        equation.terms(), solver, ls[0], ls[-1], None, start, stepsize_controller=diffrax.StepTo(jnp.asarray(ls)),
        max_steps=20,
    ).ys[-1]  # fmt: skip
    np.testing.assert_allclose(equation.leave(ls[-1], by_diffrax), wanted, atol=1e-13)
    sol = sf.solve(equation, start, ls[[0, -1]], grid=sf.grids.uniform(ls[0], ls[-1], 20), solver=solver)
    np.testing.assert_allclose(equation.leave(ls[-1], sol.final), wanted, atol=1e-13)
    assert int(sol.stats["nfe"]) == 20


def test_no_denoiser():
    for make in (ProbabilityFlow, ReverseSDE, sf.diffusion.LogSNRFlow):
        with pytest.raises(TypeError, match="denoiser"):
            make(jnp.sin)
