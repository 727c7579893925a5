r"""``Singlestep``: samplers that evaluate the denoiser several times in a step and keep nothing from one to the next.

With r h the way to a stage in l = log(alpha / sigma), E(r) = exp(r h) - 1 and the exact linear part lin(r), for noise:

    order 2:   u = lin(r1) - sigma_1 E(r1) m0,      x_t = lin(1) - sigma_t E(1) (m0 + (m1 - m0) / (2 r1)),
    order 3:   u2 = lin(r2) - sigma_2 (E(r2) m0 + r2 / r1 (E(r2) / (r2 h) - 1) (m1 - m0)),
               x_t = lin(1) - sigma_t (E(1) m0 + (E(1) / h - 1) / r2 (m2 - m0)),

and for data the same with -alpha (exp(-r h) - 1) for -sigma E(r), and alpha ((exp(-r h) - 1) / (r h) + 1) for
-sigma (E / (r h) - 1) (Lu et al., DPM-Solver and DPM-Solver++, 2022). With ``method`` they are Runge-Kutta methods for
d(x / alpha) / d rho = eps, rho = sigma / alpha (Zhang and Chen's rhoRK, 2023); Heun's with ``churn`` is the sampler of
Karras et al. (2022): before a step the noise is raised by a factor 1 + gamma,

    gamma = min(churn / N, sqrt(2) - 1) where churn_from <= rho <= churn_to.
"""

import math
from typing import Any, Literal

import equinox as eqx
import numpy as np

from ..grids import Grid
from ..grids._build import check_count
from ._multistep import AbstractSampler, check_order
from ._schedule import AbstractSchedule, module_of, number
from ._table import Points, Table, joined
from ._times import between, knots

# Name -> stages (c, A) and weights.
TABLEAUS: dict[str, tuple[list[float], list[list[float]], list[float]]] = {
    "euler": ([], [], [1.0]),
    "heun": ([1.0], [[1.0]], [0.5, 0.5]),
    "kutta": ([0.5, 1.0], [[0.5], [-1.0, 2.0]], [1 / 6, 4 / 6, 1 / 6]),
    "rk4": ([0.5, 0.5, 1.0], [[0.5], [0.0, 0.5], [0.0, 0.0, 1.0]], [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
}
_STAGES = {1: [], 2: [1 / 2], 3: [1 / 3, 2 / 3]}


class Singlestep(AbstractSampler):
    """A sampler with several evaluations of the denoiser in a step.

    Arguments:
        order: how many evaluations a step takes, 1 to 3; of no meaning with ``method``.
        reads: "noise" or "data".
        fast: spend ``num_steps`` evaluations, most of them in steps of order 3 and the rest in shorter ones at the end;
            the stages within a step are then spaced as the grid is ("edm" as "t").
        method: "heun", "kutta" or "rk4" for Runge-Kutta methods in rho.
        lower_order_final: whether the last step of a Runge-Kutta method is one of Euler's. Where no noise is left at
            the end, it always is.
        churn, churn_from, churn_to, churn_noise: Karras' S_churn, S_min, S_max and S_noise, for "heun".

    Raises:
        ValueError: for choices that do not exist or do not go together.

    Example:
        >>> import sdeflow as sf
        >>> sf.diffusion.DPMSolver(2, steps="single") == sf.diffusion.Singlestep(2, "noise")
        True
    """

    order: int = eqx.field(default=2, static=True)
    reads: Literal["noise", "data"] = eqx.field(default="noise", static=True)
    fast: bool = eqx.field(default=False, static=True)
    method: Literal["heun", "kutta", "rk4"] | None = eqx.field(default=None, static=True)
    lower_order_final: bool = eqx.field(default=False, static=True)
    churn: float = eqx.field(default=0.0, static=True)
    churn_from: float = eqx.field(default=0.0, static=True)
    churn_to: float = eqx.field(default=math.inf, static=True)
    churn_noise: float = eqx.field(default=1.0, static=True)

    def __check_init__(self):
        check_order(self.order, 3)
        if self.reads not in ("noise", "data"):
            raise ValueError(f'reads must be "noise" or "data", got {self.reads!r}.')
        if self.method not in (None, "heun", "kutta", "rk4"):
            raise ValueError(f'method must be "heun", "kutta", "rk4" or None, got {self.method!r}.')
        if self.method is not None and (self.reads != "noise" or self.fast):
            raise ValueError('Runge-Kutta methods go with reads="noise" and fast=False.')
        if number(self.churn, "churn") < 0 or number(self.churn_noise, "churn_noise") < 0:
            raise ValueError("churn and churn_noise must not be negative.")
        if not 0 <= self.churn_from <= self.churn_to:
            raise ValueError(f"churn needs 0 <= churn_from <= churn_to, got {self.churn_from} and {self.churn_to}.")
        if self.churn > 0 and self.method != "heun":
            raise ValueError('churn goes with method="heun".')

    def times(
        self, schedule: AbstractSchedule, num_steps: int | None, grid: Any, t_end: Any, t_start: Any = None
    ) -> Any:
        """The times between steps; of the "fast" kind as many as the evaluations afford."""
        if not self.fast:
            return knots(schedule, num_steps, grid, t_end, t_start)
        if isinstance(grid, Grid):
            raise ValueError(  # noqa: TRY004
                'steps="fast" chooses its steps by the number of evaluations: pass num_steps= and no Grid.'
            )
        orders = _fast_orders(check_count(num_steps, "num_steps"))
        if grid == "logsnr":
            return knots(schedule, len(orders), grid, t_end, t_start)
        return knots(schedule, num_steps, grid, t_end, t_start)[np.append(0, np.cumsum(orders))]

    def table(self, schedule: AbstractSchedule, times: Any, grid: Any, num_steps: int | None = None) -> Table:
        """The table of this sampler."""
        points = Points.along(schedule, times)
        count, xp = len(points) - 1, module_of(points.l)[0]
        clean = points.noiseless
        kinds: list[Any] = [self.method or self.order] * count
        if self.fast:
            kinds = list(_fast_orders(num_steps))  # pyright: ignore[reportArgumentType]
        if clean is True or (self.method is not None and self.lower_order_final):
            kinds[-1] = "euler" if self.method is not None else 1
        begins, start = (points[:-1], None) if not self.churn else self._churned(schedule, points)
        parts: dict[str, list[Any]] = {"t": [], "keep": [], "out": []}
        sizes = [len(TABLEAUS[kind][2]) if isinstance(kind, str) else kind for kind in kinds]
        first_row = np.cumsum([0, *sizes[:-1]])
        for kind in dict.fromkeys(kinds):
            steps = np.asarray([i for i in range(count) if kinds[i] == kind])
            made = self._stages(schedule, begins[steps], points[steps + 1], kind, grid)
            rows = (first_row[steps][:, None] + np.arange(made[0].shape[1])).ravel().tolist()
            for name, value in zip(parts, made):
                parts[name].append((rows, value.reshape(-1, *value.shape[2:])))
        width = max(sizes)
        t, keep, out = joined(parts["t"]), joined(parts["keep"]), joined(parts["out"], width)
        fresh: Any = np.zeros(sum(sizes), bool)
        fresh[first_row] = True
        if not isinstance(clean, bool):
            # Traced times may end without noise: then the last step has one stage, and further rows do nothing.
            a, b, stages = begins[-1], points[-1], sizes[-1]
            whole, weight = (0.0, xp.exp(b.log_alpha)) if self.reads == "data" else _to_data(xp, a, b)
            only = np.arange(stages) == 0
            t = t.at[-stages:].set(xp.where(clean, a.t, t[-stages:]))
            keep = keep.at[-stages:].set(xp.where(clean, xp.where(only, whole, 1), keep[-stages:]))
            first = only[:, None] & (np.arange(width) == 0)
            out = out.at[-stages:].set(xp.where(clean, xp.where(first, weight, 0), out[-stages:]))
            fresh = xp.where(clean & (np.arange(len(fresh)) >= len(fresh) - stages), True, fresh)
        noise = None
        if start is not None:
            # The noise that the next step begins with is added where a step ends.
            ends = first_row[1:] - 1
            grow = xp.exp(begins.log_alpha - points.log_alpha[:-1])
            among = lambda default, values: joined(
                [(ends.tolist(), values), ([*set(range(len(fresh))) - set(ends.tolist())], default)]
            )
            rest = len(fresh) - len(ends)
            factor, noise = among(xp.ones(rest), grow[1:]), among(xp.zeros(rest), start[1:])
            keep, out = keep * factor, out * factor[:, None]
            start = (grow[0], start[0])
        return Table(t, keep, out, noise, fresh=fresh, reads=self.reads, width=width, start=start)

    def _churned(self, schedule: AbstractSchedule, points: Points) -> tuple[Points, Any]:
        """Where steps begin once noise has been added, and the deviations of that noise."""
        xp, _ = module_of(points.l)
        rho = xp.exp(-points.l[:-1])
        inside = (rho >= self.churn_from) & (rho <= self.churn_to)
        gamma = xp.where(inside, min(self.churn / len(rho), math.sqrt(2) - 1), 0.0)
        raised = Points.at(
            schedule, xp.where(gamma > 0, schedule.t_of_log_snr(-xp.log(rho * (1 + gamma))), points.t[:-1])
        )
        size = xp.exp(raised.log_alpha) * self.churn_noise * rho * xp.sqrt(gamma * (2 + gamma))
        return raised, size

    def _stages(self, schedule: AbstractSchedule, a: Points, b: Points, kind: Any, grid: Any) -> tuple[Any, Any, Any]:
        """Times (n, S), factors of the base (n, S) and weights, newest first (n, S, S), of n steps of one kind."""
        xp, _ = module_of(a.l)
        if isinstance(kind, str):
            c, rows = TABLEAUS[kind][0], [*TABLEAUS[kind][1], TABLEAUS[kind][2]]
            rho_a, rho_b = xp.exp(-a.l), xp.exp(-b.l)
            inner = [
                Points.at(schedule, schedule.t_of_log_snr(-xp.log(rho_a + x * (rho_b - rho_a)))) for x in c if x < 1
            ]
            inner += [b] * sum(x == 1 for x in c)
            places = [*inner, b]
            grow = [xp.exp(p.log_alpha - a.log_alpha) for p in places]
            weights = [[w * xp.exp(p.log_alpha) * (rho_b - rho_a) for w in row] for p, row in zip(places, rows)]
            return _stacked(xp, [a, *inner], grow, weights)
        fractions = _STAGES[kind]
        if self.fast and grid != "logsnr":
            # Karras' rule has no stages of its own: they are spaced in t, as known figures have them.
            rule = "t" if grid == "edm" else grid
            inner = [Points.at(schedule, between(schedule, rule, a.t, b.t, x)) for x in fractions]
        else:
            inner = [Points.at(schedule, schedule.t_of_log_snr(a.l + x * (b.l - a.l))) for x in fractions]
        places = [*inner, b]
        h = b.l - a.l
        if self.reads == "noise":
            grow = [xp.exp(p.log_alpha - a.log_alpha) for p in places]
            if kind == 1:
                # In the form that has a limit where no noise is left.
                return _stacked(xp, [a], grow, [[xp.exp(b.log_sigma) - grow[0] * xp.exp(a.log_sigma)]])
            one = [-xp.exp(p.log_sigma) * xp.expm1(p.l - a.l) for p in places]
            two = [-xp.exp(p.log_sigma) * (xp.expm1(p.l - a.l) / (p.l - a.l) - 1) for p in places]
        else:
            grow = [xp.exp(p.log_sigma - a.log_sigma) for p in places]
            one = [-xp.exp(p.log_alpha) * xp.expm1(a.l - p.l) for p in places]
            if kind == 1:
                return _stacked(xp, [a], grow, [one])
            two = [xp.exp(p.log_alpha) * (xp.expm1(a.l - p.l) / (p.l - a.l) + 1) for p in places]
        r = [(p.l - a.l) / h for p in places]
        first = [one[0]]
        if kind == 2:
            share = one[1] / (2 * r[0])
            return _stacked(xp, [a, *inner], grow, [first, [one[1] - share, share]])
        slope, bend = r[1] / r[0] * two[1], two[2] / r[1]
        rows = [first, [one[1] - slope, slope], [one[2] - bend, xp.zeros_like(bend), bend]]
        return _stacked(xp, [a, *inner], grow, rows)


def _to_data(xp: Any, a: Points, b: Points) -> tuple[Any, Any]:
    """The step of order 1 that reads noise and ends without any."""
    keep = xp.exp(b.log_alpha - a.log_alpha)
    return keep, -keep * xp.exp(a.log_sigma)


def _stacked(xp: Any, places: list[Points], grow: list[Any], rows: list[list[Any]]) -> tuple[Any, Any, Any]:
    nothing = xp.zeros_like(places[0].l)
    newest_first = [xp.stack([*row[::-1], *[nothing] * (len(rows) - len(row))], 1) for row in rows]
    return xp.stack([p.t for p in places], 1), xp.stack(grow, 1), xp.stack(newest_first, 1)


def _fast_orders(evaluations: int) -> list[int]:
    whole, rest = divmod(evaluations, 3)
    return {0: [3] * (whole - 1) + [2, 1], 1: [3] * whole + [1], 2: [3] * whole + [2]}[rest]
