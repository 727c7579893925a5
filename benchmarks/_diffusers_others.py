"""Schedulers of diffusers that set their own levels of noise, and those that go back to noise, beside ours."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

import sdeflow as sf

from ._harness import Row, line
from .diffusers_table import SHAPE, STEPS, Comparison, noise_from

d = sf.diffusion


class Draws:
    """The noise that both packages get, in the order in which it is asked for."""

    def __init__(self):
        self.taken: list[np.ndarray] = []

    def __call__(self, *_: Any, **__: Any) -> Any:
        import torch

        self.taken.append(np.random.default_rng(100 + len(self.taken)).normal(size=SHAPE))
        return torch.from_numpy(self.taken[-1])

    def stacked(self, count: int) -> np.ndarray:
        return np.stack((self.taken + [np.zeros(SHAPE)] * count)[:count])


def _apart(ours: Any, theirs: Any) -> float:
    ours, theirs = np.asarray(ours).reshape(SHAPE), np.asarray(theirs).reshape(SHAPE)
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def preconditioned(comparison: Comparison, name: str, config: dict[str, Any], solver: Any) -> float:
    """Schedulers whose network is wrapped as Karras does it, on their levels of noise."""
    import diffusers
    import torch

    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(STEPS)
    sigmas, draws = scheduler.sigmas.double().numpy(), Draws()
    scheduler.noise_sampler = lambda *_: draws()
    size, sign = scheduler.config.sigma_data, -1 if scheduler.config.prediction_type == "v_prediction" else 1
    x = torch.from_numpy(comparison.x * float(scheduler.init_noise_sigma))
    with noise_from(draws):
        for sigma, t in zip(sigmas, scheduler.timesteps):
            seen = np.asarray(x)
            data = comparison.mixture.data(0.0, np.log(sigma), seen)
            total = sigma**2 + size**2
            output = sign * (data - size**2 / total * seen) * np.sqrt(total) / (sigma * size)
            scheduler.scale_model_input(x, t)
            x = scheduler.step(torch.from_numpy(output), t, x, return_dict=False)[0]
    schedule = d.EDM(0.5 * sigmas[-2], 2 * sigmas[0])
    options = {"noise": draws.stacked(STEPS)} if getattr(solver, "tau", 0) else {}
    start = jnp.asarray(comparison.x * float(scheduler.init_noise_sigma))
    ours = d.sample(comparison.denoiser(schedule), start, solver=solver, grid=sf.grids.subdivide(sigmas, 1), **options)
    return _apart(ours, x)


def flow(comparison: Comparison, name: str, shift: float, solver: Any) -> float:
    """Straight lines from noise to data."""
    import diffusers
    import torch

    scheduler = getattr(diffusers, name)(shift=shift)
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas.double().numpy()
    x = torch.from_numpy(comparison.x)
    schedule = d.Flow(t_max=1 - 1e-9)
    for sigma, t in zip(sigmas, scheduler.timesteps):
        seen = np.asarray(x)
        level = min(sigma, 1 - 1e-12)
        data = comparison.mixture.data(np.log1p(-level), np.log(level), seen)
        x = scheduler.step(torch.from_numpy((seen - data) / sigma), t, x, return_dict=False)[0]
    times = np.minimum(sigmas, 1 - 1e-9)
    ours = d.sample(
        comparison.denoiser(schedule), jnp.asarray(comparison.x), solver=solver, grid=sf.grids.subdivide(times, 1)
    )
    return _apart(ours, x)


def _levels(scheduler: Any, t: Any) -> tuple[float, float]:
    rate = float(scheduler.alphas_cumprod.double()[int(t)])
    return 0.5 * np.log(rate), 0.5 * np.log1p(-rate)


def _noise_in(comparison: Comparison, scheduler: Any, x: Any, t: Any) -> Any:
    import torch

    log_alpha, log_sigma = _levels(scheduler, t)
    data = comparison.mixture.data(log_alpha, log_sigma, np.asarray(x))
    return torch.from_numpy((np.asarray(x) - np.exp(log_alpha) * data) / np.exp(log_sigma))


def consistency(comparison: Comparison) -> float:
    """LCM: data, and noise anew, at each of a few times."""
    import diffusers
    import torch

    scheduler = diffusers.LCMScheduler()
    scheduler.set_timesteps(4)
    draws, x = Draws(), torch.from_numpy(comparison.x)
    with noise_from(draws):
        for t in scheduler.timesteps:
            x = scheduler.step(_noise_in(comparison, scheduler, x, t), t, x, return_dict=False)[0]
    size, scaling = scheduler.sigma_data, scheduler.config.timestep_scaling

    def change(t: Any, x: Any, data: Any) -> Any:
        at = scaling * (1000 * t - 1)
        return (size**2 * x + at * jnp.sqrt(at**2 + size**2) * data) / (at**2 + size**2)

    schedule = d.Tabulated(scheduler.betas.double().numpy())
    times = np.append((scheduler.timesteps.double().numpy() + 1) / 1000, 0.0)
    ours = d.sample(
        comparison.denoiser(schedule, change), jnp.asarray(comparison.x), solver=d.DPMSolverPP(1, tau=100.0),
        grid=sf.grids.subdivide(times, 1), noise=draws.stacked(4),
    )  # fmt: skip
    return _apart(ours, x)


def _data(comparison: Comparison) -> np.ndarray:
    """Draws of the mixture."""
    mixture, rng = comparison.mixture, np.random.default_rng(3)
    which = rng.choice(len(mixture.means), SHAPE[0], p=np.exp(mixture.log_weights))
    return mixture.means[which] + np.sqrt(mixture.variances[which]) * rng.normal(size=SHAPE)


def back_to_noise(comparison: Comparison, solver: Any) -> float:
    """The inverse of DPM-Solver++, from data to noise, with its rates in double precision."""
    import diffusers
    import torch

    scheduler = diffusers.DPMSolverMultistepInverseScheduler()
    scheduler.set_timesteps(STEPS)
    scheduler.alphas_cumprod = torch.cumprod(1 - scheduler.betas.double(), 0)
    rates = scheduler.alphas_cumprod.numpy()
    labels = np.append(scheduler.timesteps.numpy(), 999)
    scheduler.sigmas = torch.from_numpy(np.sqrt((1 - rates) / rates)[labels])
    x = torch.from_numpy(_data(comparison))
    for t in scheduler.timesteps:
        x = scheduler.step(_noise_in(comparison, scheduler, x, t), t, x, return_dict=False)[0]
    schedule = d.Tabulated(scheduler.betas.double().numpy())
    grid = sf.grids.subdivide((labels[::-1] + 1) / 1000, 1)
    return _apart(d.invert(comparison.denoiser(schedule), jnp.asarray(_data(comparison)), solver=solver, grid=grid), x)


def second_order(comparison: Comparison) -> float:
    """DPM-Solver++(2M) as k-diffusion writes it: from the logarithms of Karras' sigmas."""
    schedule = d.EDM()
    ends = np.array([schedule.t_max, schedule.t_min]) ** (1 / 7)
    sigmas = np.append((ends[0] + np.linspace(0, 1, STEPS) * (ends[1] - ends[0])) ** 7, 0.0)
    x, before, last = schedule.t_max * comparison.x, None, 0.0
    for now, then in zip(sigmas[:-1], sigmas[1:]):
        data = comparison.mixture.data(0.0, np.log(now), x)
        h = np.log(now / then) if then > 0 else np.inf
        ahead = data if before is None or then == 0 else data + h / (2 * last) * (data - before)
        x, before, last = then / now * x + (1 - then / now) * ahead, data, h
    start = jnp.asarray(schedule.t_max * comparison.x)
    solver = d.DPMSolverPP(2, lower_order_final=False)
    return _apart(
        d.sample(comparison.denoiser(schedule), start, solver=solver, num_steps=STEPS, grid="edm", t_end=0.0), x
    )


def rows(comparison: Comparison) -> list[Row]:
    """One line for each scheduler."""
    karras: dict[str, Any] = {"sigma_schedule": "karras"}
    sde: dict[str, Any] = {"algorithm_type": "sde-dpmsolver++"}
    edm, cosine = "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler"
    euler = "FlowMatchEulerDiscreteScheduler"
    make: list[tuple[str, str, Callable[[], float]]] = [
        ("EDMEulerScheduler", "DDIM()", lambda: preconditioned(comparison, "EDMEulerScheduler", karras, d.DDIM())),
        (edm, "DPMSolverPP(2)", lambda: preconditioned(comparison, edm, karras, d.DPMSolverPP(2))),
        (f"{edm}(sde)", "DPMSolverPP(2, tau=1.0)",
         lambda: preconditioned(comparison, edm, karras | sde, d.DPMSolverPP(2, tau=1.0))),
        (cosine, "DPMSolverPP(2, tau=1.0)", lambda: preconditioned(comparison, cosine, {}, d.DPMSolverPP(2, tau=1.0))),
        (f"{euler}(shift=1)", "DDIM() on Flow(t_max=1 - 1e-9)", lambda: flow(comparison, euler, 1.0, d.DDIM())),
        (f"{euler}(shift=3)", "DDIM() on Flow(t_max=1 - 1e-9)", lambda: flow(comparison, euler, 3.0, d.DDIM())),
        ("LCMScheduler", "DPMSolverPP(1, tau=100.0)", lambda: consistency(comparison)),
        ("DPMSolverMultistepInverseScheduler", "invert(solver=DPMSolverPP(2, lower_order_final=True))",
         lambda: back_to_noise(comparison, d.DPMSolverPP(2, lower_order_final=True))),
        ("k-diffusion, DPM++ 2M on Karras' sigmas", 'DPMSolverPP(2, lower_order_final=False), grid="edm"',
         lambda: second_order(comparison)),
    ]  # fmt: skip
    out: list[Row] = []
    for name, spelling, difference in make:
        try:
            out.append(line(name, difference(), (0.0, 1e-4), spelling))
        except Exception as error:  # noqa: BLE001
            out.append(line(name, float("nan"), (0.0, 1e-4), f"{spelling}; {type(error).__name__}: {error}"))
    return out
