"""Claim: the migration table from diffusers in the documentation: each scheduler beside its spelling here.

The denoiser is that of a mixture of Gaussians in four dimensions, exact; 64 starts, ten steps and the same
noise for both. Figures are the largest difference relative to the largest entry. diffusers works in single precision
within.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

import sdeflow as sf

from ._harness import Claim, Options, line
from .sampler_defaults import Mixture

STEPS = 10
SHAPE = (64, 4)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A scheduler with its config, our spelling, and the bound of the difference; None where there is no equal."""

    name: str
    config: dict[str, Any]
    solver: Any
    bound: float | None = 1e-4
    sigma_space: bool = False
    spelling: str = ""
    clip: float | None = None
    stages: int = 1
    step: dict[str, Any] = dataclasses.field(default_factory=dict)


def pairs() -> list[Pair]:
    """The rows of the table."""
    d = sf.diffusion
    dpm, single = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
    zero = {"final_sigmas_type": "zero"}
    plain = {"clip_sample": False}
    lead = {"timestep_spacing": "leading"}
    trail = {"timestep_spacing": "trailing"}
    karras = {"use_karras_sigmas": True}
    pp = d.DPMSolverPP
    return [
        Pair("DDIMScheduler", plain | lead, d.DDIM(), spelling="DDIM()"),
        Pair("DDIMScheduler", plain | trail, d.DDIM(), spelling="DDIM()"),
        Pair("DDIMScheduler", plain | lead, d.DDIM(0.3), spelling="DDIM(0.3)", step={"eta": 0.3}),
        Pair("DDPMScheduler", plain | lead, d.DDIM(1.0), spelling="DDIM(1.0)"),
        Pair("DDPMScheduler", plain | lead | {"variance_type": "fixed_large"}, d.DDIM(1.0), None, spelling="DDIM(1.0)"),
        Pair(dpm, {}, pp(2, lower_order_final=True), spelling="DPMSolverPP(2)"),
        Pair(dpm, trail, pp(2), spelling="DPMSolverPP(2)"),
        Pair(dpm, karras, pp(2), spelling="DPMSolverPP(2)"),
        Pair(dpm, {"solver_type": "heun"}, d.Multistep(2, "data"), spelling='Multistep(2, "data")'),
        Pair(dpm, {"solver_order": 3}, pp(3), None, spelling="DPMSolverPP(3)"),
        Pair(dpm, karras | {"algorithm_type": "sde-dpmsolver++"}, pp(2, tau=1.0), spelling="DPMSolverPP(2, tau=1.0)"),
        Pair(
            dpm,
            {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
            d.DPMSolver(2, lower_order_final=True),
            spelling="DPMSolver(2, lower_order_final=True)",
        ),
        Pair(dpm, {"thresholding": True}, pp(2), spelling="DPMSolverPP(2), Thresholded(d, quantile=0)", clip=0.0),
        Pair(dpm, {"thresholding": True}, pp(2), None, spelling="DPMSolverPP(2), Thresholded(d)", clip=0.995),
        Pair(
            single,
            {"solver_order": 2} | karras | zero,
            pp(2, steps="single"),
            None,
            spelling='DPMSolverPP(2, steps="single")',
        ),
        Pair("UniPCMultistepScheduler", {"solver_order": 2}, d.UniPC(2, lower_order_final=True), spelling="UniPC(2)"),
        Pair("UniPCMultistepScheduler", {"solver_order": 3}, d.UniPC(3, lower_order_final=True), spelling="UniPC(3)"),
        Pair(
            "UniPCMultistepScheduler",
            {"solver_order": 3, "predict_x0": False, "final_sigmas_type": "sigma_min"},
            d.UniPC(3, reads="noise", lower_order_final=True),
            spelling='UniPC(3, reads="noise")',
        ),
        Pair(
            "DEISMultistepScheduler",
            {"solver_order": 2},
            d.Multistep(2, "noise", lower_order_final=True),
            spelling='Multistep(2, "noise")',
        ),
        Pair(
            "DEISMultistepScheduler",
            {"solver_order": 3},
            d.Multistep(3, "noise", lower_order_final=True),
            1e-2,
            spelling='Multistep(3, "noise")',
        ),
        Pair("EulerDiscreteScheduler", lead, d.DDIM(), sigma_space=True, spelling="DDIM()"),
        Pair("EulerDiscreteScheduler", trail, d.DDIM(), sigma_space=True, spelling="DDIM()"),
        Pair("EulerAncestralDiscreteScheduler", trail, d.DDIM(1.0), sigma_space=True, spelling="DDIM(1.0)"),
        Pair(
            "HeunDiscreteScheduler",
            trail,
            d.Singlestep(method="heun"),
            sigma_space=True,
            stages=2,
            spelling='Singlestep(method="heun")',
        ),
        Pair("LMSDiscreteScheduler", trail, d.DEIS(4, "rho"), None, True, 'DEIS(4, "rho")'),
        Pair(
            "KDPM2DiscreteScheduler",
            trail,
            d.DPMSolver(2, steps="single"),
            sigma_space=True,
            stages=2,
            spelling='DPMSolver(2, steps="single")',
        ),
        Pair("TCDScheduler", {}, d.DDIM(), None, spelling="DDIM()", step={"eta": 0.0}),
        Pair(
            "LMSDiscreteScheduler",
            trail,
            d.DEIS(1, "rho"),
            sigma_space=True,
            spelling='DEIS(1, "rho")',
            step={"order": 1},
        ),
        Pair(
            "UniPCMultistepScheduler",
            {"solver_type": "bh1"},
            d.UniPC(2, lower_order_final=True),
            None,
            spelling="UniPC(2)",
        ),
        Pair("DDIMScheduler", lead, d.DDIM(), None, spelling="DDIM(), Thresholded(d, quantile=0)", clip=0.0),
        Pair(
            "DDIMScheduler",
            lead,
            d.DDIM(),
            spelling="DDIM(), Thresholded(d, quantile=0)",
            clip=0.0,
            step={"use_clipped_model_output": True},
        ),
        Pair("PNDMScheduler", {"skip_prk_steps": True}, d.iPNDM(4), None, stages=0, spelling="iPNDM(4)"),
    ]


class Comparison:
    """The mixture under the rates of a scheduler, in both packages."""

    def __init__(self):
        self.mixture = Mixture(sf.diffusion.VP(), 4, 7, starts=4)
        self.x = np.random.default_rng(1).normal(size=SHAPE)

    def difference(self, pair: Pair) -> float:
        """How far ours ends from theirs, relative to the largest entry."""
        import diffusers
        import torch

        scheduler = getattr(diffusers, pair.name)(num_train_timesteps=1000, **pair.config)
        scheduler.set_timesteps(STEPS)
        schedule = sf.diffusion.Tabulated(scheduler.betas.double().numpy())
        rates = scheduler.alphas_cumprod.double().numpy()
        log_ratios = 0.5 * np.log((1 - rates) / rates)
        karras = pair.config.get("use_karras_sigmas", False)
        labels = scheduler.timesteps.double().numpy()
        draws: list[np.ndarray] = []

        def predict(x: Any, log_ratio: float) -> Any:
            log_alpha = -0.5 * np.logaddexp(0, 2 * log_ratio)
            log_sigma = log_alpha + log_ratio
            flat = np.asarray(x).reshape(SHAPE)
            data = self.mixture.data(log_alpha, log_sigma, flat)
            return torch.from_numpy((flat - np.exp(log_alpha) * data) / np.exp(log_sigma)).reshape(x.shape)

        def drawn(shape: Any, **_: Any) -> Any:
            draws.append(np.random.default_rng(100 + len(draws)).normal(size=SHAPE))
            return torch.from_numpy(draws[-1]).reshape(shape)

        x = torch.from_numpy(self.x * (float(scheduler.init_noise_sigma) if pair.sigma_space else 1.0))[..., None]
        with noise_from(drawn):
            for i, t in enumerate(scheduler.timesteps):
                ratio = (
                    np.log(float(scheduler.sigmas[i])) if karras else np.interp(float(t), np.arange(1000), log_ratios)
                )
                seen = scheduler.scale_model_input(x, t)
                x = scheduler.step(predict(seen, float(ratio)), t, x, return_dict=False, **pair.step)[0]
        theirs = np.asarray(x).reshape(SHAPE)

        knots = labels[:1] if pair.stages == 0 else labels
        if pair.stages == 2:
            knots = np.append(labels[:1], labels[1:][1::2]) if pair.name.startswith("Heun") else labels[::2]
        if pair.stages == 0:
            knots = np.array(sorted(set(labels), reverse=True))
        if karras:
            sigmas = scheduler.sigmas.double().numpy()[: len(knots)]
            times = np.asarray(schedule.t_of_log_snr(-np.log(sigmas)))
        else:
            times = (knots + 1) / 1000
        last = 1 / 1000 if pair.config.get("final_sigmas_type") == "sigma_min" else 0.0
        if pair.stages == 0 or pair.name.startswith("DEIS"):
            last = 0.0 if pair.name.startswith("DEIS") and float(scheduler.sigmas[-1]) == 0 else 1 / 1000
        times = np.append(times, last) if times[-1] > last + 1e-9 else times
        start = self.x
        if pair.sigma_space:
            start = self.x * float(scheduler.init_noise_sigma) * float(np.exp(schedule.log_alpha(times[0])))
        return self._ours(pair, schedule, times, start, draws, theirs)

    def denoiser(self, schedule: Any, change: Callable[..., Any] = lambda t, x, data: data) -> Any:
        """The exact one for ours; ``change(t, x, data)`` may make another prediction of it."""
        mixture = self.mixture
        w, means, variances = (jnp.asarray(a) for a in (mixture.log_weights, mixture.means, mixture.variances))

        def data(t: Any, x: Any, args: Any) -> Any:
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            total = alpha**2 * variances + sigma**2
            away = x[:, None] - alpha * means
            logits = w - 0.5 * (away**2 / total + jnp.log(total)).sum(-1)
            share = jnp.exp(logits - logits.max(1, keepdims=True))
            share = share / share.sum(1, keepdims=True)
            return change(t, x, (share[..., None] * (means + alpha * variances / total * away)).sum(1))

        return sf.diffusion.Denoiser(data, schedule, prediction="data")

    def _ours(self, pair: Pair, schedule: Any, times: Any, start: Any, draws: Any, theirs: np.ndarray) -> float:
        denoiser = self.denoiser(schedule)
        if pair.clip is not None:
            whole: Any = sf.diffusion.Thresholded
            denoiser = whole(denoiser, quantile=pair.clip, sample_ndim=1)
        options: dict[str, Any] = {}
        count = len(times) - 1
        if getattr(pair.solver, "eta", 0) or getattr(pair.solver, "tau", 0):
            options["noise"] = np.stack((draws + [np.zeros(SHAPE)] * count)[:count])
        grid = sf.grids.subdivide(times, 1)
        ours = np.asarray(sf.diffusion.sample(denoiser, jnp.asarray(start), solver=pair.solver, grid=grid, **options))
        return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


class noise_from:  # noqa: N801
    """Within, the schedulers of diffusers draw their noise from this function."""

    def __init__(self, draw: Callable[..., Any]):
        self.draw = draw

    def __enter__(self):
        import sys

        self.kept = {}
        for name, module in list(sys.modules.items()):
            if name.startswith("diffusers.schedulers.") and hasattr(module, "randn_tensor"):
                self.kept[name] = module.randn_tensor
                vars(module)["randn_tensor"] = self.draw

    def __exit__(self, *_: object):
        import sys

        for name, old in self.kept.items():
            vars(sys.modules[name])["randn_tensor"] = old


def run(options: Options) -> list[Claim]:
    """The table; without diffusers it is left out."""
    try:
        import diffusers  # noqa: F401
    except ImportError:
        return []
    import jax

    from . import _diffusers_others as others

    with jax.enable_x64(True):
        comparison, rows = Comparison(), []
        for pair in pairs():
            name = f"{pair.name}({', '.join(f'{k}={v!r}' for k, v in pair.config.items())})"
            bounds = (0.0, 0.0) if pair.bound is None else (0.0, pair.bound)
            note = pair.spelling + ("" if pair.bound is not None else "; not the same formulas")
            try:
                rows.append(line(name, comparison.difference(pair), bounds, note))
            except Exception as error:  # noqa: BLE001
                rows.append(line(name, float("nan"), (0.0, 1e-4), f"{note}; {type(error).__name__}: {error}"))
        rows += others.rows(comparison)
    return [Claim("", "schedulers of diffusers", "largest relative difference", "diffusers", rows)]
