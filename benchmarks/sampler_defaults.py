"""Claim: what `sample` chooses by itself is among the best tenth of all choices, for 5 to 50 evaluations.

Mixtures of Gaussians are drawn at random, in 2 to 16 dimensions, under several schedules; their denoisers are exact.
The error of a candidate, which is a solver with its order, a grid and an ending, is the root mean square of its
difference from the ordinary equation solved to 1e-9; candidates are ranked by the geometric mean over the mixtures.
The rules of `sf.diffusion.default_sampler` were chosen on draws with seeds below 100; others are ranked here.
"""

from typing import Any

import numpy as np
import scipy.integrate
import scipy.special

import sdeflow as sf
from sdeflow.diffusion._sample import table_of
from sdeflow.diffusion._table import Table

from ._harness import Claim, Options, line

COUNTS = (5, 8, 10, 20, 50)
GRIDS = ("logsnr", "t", "quadratic", "edm")
SCHEDULES = {
    "VP": sf.diffusion.VP(),
    "Cosine": sf.diffusion.Cosine(),
    "EDM": sf.diffusion.EDM(),
    "Flow": sf.diffusion.Flow(),
    "SubVP": sf.diffusion.SubVP(),
    "Tabulated": sf.diffusion.Tabulated(np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2),
}


class Mixture:
    """A mixture of Gaussians with diagonal covariances, its exact denoiser, starts and where they lead."""

    def __init__(self, schedule: Any, dim: int, seed: int, starts: int = 48):
        rng = np.random.default_rng(seed)
        count = int(rng.integers(2, 7))
        self.schedule = schedule
        self.log_weights = np.log(rng.dirichlet(np.full(count, 3.0)))
        self.means = rng.normal(size=(count, dim))
        self.variances = rng.uniform(0.05, 0.5, (count, dim)) ** 2
        sizes = (
            np.exp(schedule.log_alpha(np.float64(schedule.t_max))),
            np.exp(schedule.log_sigma(np.float64(schedule.t_max))),
        )
        # From the law of the model, as N(0, I) is not what a sampler of flows starts from exactly.
        which = rng.choice(count, starts, p=np.exp(self.log_weights))
        data = self.means[which] + np.sqrt(self.variances[which]) * rng.normal(size=(starts, dim))
        self.x = sizes[0] * data + sizes[1] * rng.normal(size=(starts, dim))
        self.end = self._exact()

    def data(self, log_alpha: Any, log_sigma: Any, x: np.ndarray) -> np.ndarray:
        """The expected data given x."""
        alpha, sigma2 = np.exp(log_alpha), np.exp(2 * log_sigma)
        total = alpha**2 * self.variances + sigma2
        away = x[:, None] - alpha * self.means
        logits = self.log_weights - 0.5 * (away**2 / total + np.log(total)).sum(-1)
        share = scipy.special.softmax(logits, 1)
        return (share[..., None] * (self.means + alpha * self.variances / total * away)).sum(1)

    def _exact(self) -> np.ndarray:
        schedule = self.schedule
        first, last = (float(schedule.log_snr(np.float64(t))) for t in (schedule.t_max, schedule.t_min))

        def field(l: float, y: np.ndarray) -> np.ndarray:
            t = schedule.t_of_log_snr(np.float64(l))
            log_alpha, log_sigma = schedule.log_alpha(t), schedule.log_sigma(t)
            data = self.data(log_alpha, log_sigma, np.exp(log_sigma) * y.reshape(self.x.shape))
            return (np.exp(l) * data).ravel()

        start = (self.x / np.exp(schedule.log_sigma(np.float64(schedule.t_max)))).ravel()
        solved = scipy.integrate.solve_ivp(field, (first, last), start, method="DOP853", rtol=1e-9, atol=1e-9)
        return solved.y[:, -1].reshape(self.x.shape) * np.exp(schedule.log_sigma(np.float64(schedule.t_min)))

    def error(self, table: Table) -> float:
        """The error of a table."""
        x, base, outputs = self.x, self.x, np.zeros((table.width, *self.x.shape))
        log_alpha, log_sigma = self.schedule.log_alpha(table.t), self.schedule.log_sigma(table.t)
        for i in range(table.num_rows):
            data = self.data(log_alpha[i], log_sigma[i], x)
            new = data if table.reads == "data" else (x - np.exp(log_alpha[i]) * data) / np.exp(log_sigma[i])
            outputs = np.concatenate([new[None], outputs[:-1]])
            begun = x if table.fix is None else x + np.tensordot(table.fix[i], outputs, 1)
            base = begun if table.fresh is None or table.fresh[i] else base
            x = table.keep[i] * base + np.tensordot(table.out[i], outputs, 1)
        return float(np.sqrt(np.mean((x - self.end) ** 2)))


def candidates() -> dict[str, tuple[Any, str, int]]:
    """Solver, grid and evaluations a step, by name."""
    d = sf.diffusion
    solvers: dict[str, tuple[Any, int]] = {"DDIM": (d.DDIM(), 1)}
    for ending in (False, True):
        mark = " lower" if ending else ""
        for order in (2, 3):
            solvers |= {
                f"DPMSolver({order}){mark}": (d.DPMSolver(order, lower_order_final=ending), 1),
                f"DPMSolverPP({order}){mark}": (d.DPMSolverPP(order, lower_order_final=ending), 1),
                f"UniPC({order}){mark}": (d.UniPC(order, lower_order_final=ending), 1),
                f"UniPC({order}, noise){mark}": (d.UniPC(order, reads="noise", lower_order_final=ending), 1),
            }
        for order in (3,):
            solvers[f"DEIS({order}, t){mark}"] = d.DEIS(order, "t", lower_order_final=ending), 1
            solvers[f"DEIS({order}, rho){mark}"] = d.DEIS(order, "rho", lower_order_final=ending), 1
    solvers |= {f"DEIS({k}, t)": (d.DEIS(k, "t"), 1) for k in (2, 4)}
    solvers |= {f"DEIS({k}, rho)": (d.DEIS(k, "rho"), 1) for k in (2, 4)}
    solvers |= {f"iPNDM({k})": (d.iPNDM(k), 1) for k in (2, 3, 4)}
    solvers |= {
        "Heun in rho": (d.Singlestep(method="heun"), 2),
        "DPMSolverPP(2, single)": (d.DPMSolverPP(2, steps="single"), 2),
        "DPMSolver(3, single)": (d.DPMSolver(3, steps="single"), 3),
    }
    return {f"{name} on {grid}": (s, grid, cost) for name, (s, cost) in solvers.items() for grid in GRIDS}


def ranking(problems: list[Mixture], evaluations: int, chosen: Any = None) -> list[tuple[float, str]]:
    """Geometric means of the errors of all candidates, the best first; "chosen" is what the package takes by itself."""
    rows = dict(candidates())
    sums = dict.fromkeys(rows, 0.0)
    if chosen is not None:
        sums["chosen"] = 0.0
    for problem in problems:
        schedule = problem.schedule
        for name in sums:
            if name == "chosen" and chosen is not None:
                solver, grid = chosen(schedule, evaluations)
                cost = 1
            else:
                solver, grid, cost = rows[name]
            steps = max(evaluations // cost, 1)
            times = solver.times(schedule, steps, grid, None, None)
            with np.errstate(all="ignore"):
                error = problem.error(table_of(solver, schedule, times, grid, steps))
            sums[name] += np.log(max(error, 1e-12)) if np.isfinite(error) else np.log(1e6)
    return sorted((float(np.exp(total / len(problems))), name) for name, total in sums.items())


def problems_of(name: str, seeds: Any) -> list[Mixture]:
    """Mixtures under a schedule, in 2, 4, 8 and 16 dimensions in turn."""
    return [Mixture(SCHEDULES[name], (2, 4, 8, 16)[seed % 4], seed) for seed in seeds]


def run(options: Options) -> list[Claim]:
    """The ranks of the defaults, per schedule and number of evaluations, and the best of all."""
    seeds = range(100, 104) if options.quick else range(100, 116)
    out = []
    for name in SCHEDULES:
        problems = problems_of(name, seeds)
        rows = []
        for count in COUNTS:
            order = ranking(problems, count, sf.diffusion.default_sampler)
            names = [n for _, n in order]
            place = names.index("chosen") + 1
            solver, grid = sf.diffusion.default_sampler(SCHEDULES[name], count)
            note = f"{' '.join(str(solver).split())} on {grid}: error {order[place - 1][0]:.2g}; best " + ", ".join(
                f"{n} {e:.2g}" for e, n in order[:3]
            )
            rows.append(line(f"rank at {count} of {len(order)}", place, (1, len(order) // 10), note))
        out.append(Claim("", f"defaults of `sample` under {name}", f"{len(problems)} mixtures", "candidates", rows))
    return out
