"""The schedulers of diffusers, driven as its pipelines do, and the samplers of ours with the same formulas."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
from diffusers import DEISMultistepScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

import sdeflow as sf

from . import diffusion_speed as speed

TABLE = 1000
#: diffusers reads DEIS as a polynomial in log(sigma / alpha), which is that of DPM-Solver in exact integrals
_OURS = {
    "DPMSolverMultistep": sf.diffusion.DPMSolverPP(2, lower_order_final=False),
    "UniPC": sf.diffusion.UniPC(3, lower_order_final=True),
    "DEIS": sf.diffusion.Multistep(3, "noise", lower_order_final=False),
}


def schedulers() -> dict[str, Callable[[], Any]]:
    """What makes each of them, with its defaults but for the order."""
    return {
        "DPMSolverMultistep": lambda: DPMSolverMultistepScheduler(TABLE, solver_order=2),
        "UniPC": lambda: UniPCMultistepScheduler(TABLE, solver_order=3),
        "DEIS": lambda: DEISMultistepScheduler(TABLE, solver_order=3),
    }


def call(make: Callable[[], Any], weights: list[Any], x: np.ndarray) -> Callable[[], Any]:
    """The loop of a pipeline; set_timesteps is a part of it, as schedulers keep a state that it resets."""
    scheduler = make()
    params = [{name: torch.from_numpy(array) for name, array in layer.items()} for layer in weights]
    start = torch.from_numpy(x)

    def network(t: Any, x: Any) -> Any:
        y = torch.cat([x, ((t + 1) / TABLE).to(x.dtype).expand(len(x), 1)], dim=1)
        for layer in params[:-1]:
            y = torch.tanh(torch.addmm(layer["bias"], y, layer["weight"]))
        return torch.addmm(params[-1]["bias"], y, params[-1]["weight"])

    def run() -> Any:
        with torch.inference_mode():
            scheduler.set_timesteps(speed.STEPS)
            x = start
            for t in scheduler.timesteps:
                x = scheduler.step(network(t, x), t, x, return_dict=False)[0]
            return x

    return run


def equivalent(name: str) -> Callable[[Any, Any], Any]:
    """Ours, on the table of rates and the times of the scheduler."""
    scheduler = schedulers()[name]()
    schedule = sf.diffusion.Tabulated(scheduler.betas.double().numpy())
    scheduler.set_timesteps(speed.STEPS)
    # DEIS ends where the table begins, the others on the data.
    last = 0.0 if float(scheduler.sigmas[-1]) == 0 else 1 / TABLE
    times = np.append((scheduler.timesteps.double().numpy() + 1) / TABLE, last)
    grid = sf.grids.Grid(times[:-1], times[1:], np.ones(speed.STEPS, bool), np.array([0, speed.STEPS]))
    denoiser = sf.diffusion.Denoiser(lambda t, x, args: speed.network(args, t, x), schedule)
    return lambda params, x: sf.diffusion.sample(denoiser, jnp.asarray(x), args=params, solver=_OURS[name], grid=grid)
