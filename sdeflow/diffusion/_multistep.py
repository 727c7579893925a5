r"""``Multistep``: exponential Adams methods, of which most fast samplers are presets.

In l = log(alpha / sigma) the way back has two exact forms from s to t, with h = l_t - l_s,

    noise:  x_t = (alpha_t / alpha_s) x_s - sigma_t int e^{l_t - l} eps dl,
    data:   x_t = (sigma_t / sigma_s) e^{-tau^2 h} x_s + alpha_t k int e^{k (l - l_t)} x0 dl
                                                       + sigma_t sqrt(1 - e^{-2 tau^2 h}) z,      k = 1 + tau^2,

and a method replaces eps or x0 by a polynomial through its last values, in l, t or rho = sigma / alpha:

| preset | form | polynomial in | order |
|---|---|---|---|
| `DDIM` | either | | 1 |
| `DEIS` (tAB, rhoAB) | noise | t or rho | 1 to 4 |
| `DPMSolver` (multistep) | noise | l | 1 to 4 |
| `DPMSolverPP` (multistep), its SDE variants | data | l | 1 to 4 |
| `UniPC` | data or noise | l, with a corrector | 1 to 4 |
| `iPNDM` | noise | fixed weights of uniform steps | 1 to 4 |

Each evaluates the denoiser once a step. Sources: Song et al. 2021 (DDIM), Zhang and Chen 2023 (DEIS), Lu et al. 2022
(DPM-Solver, DPM-Solver++), Zhao et al. 2023 (UniPC), Liu et al. 2022 (PNDM).
"""

import abc
from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from ._schedule import AbstractSchedule, module_of, number
from ._table import Points, Table, joined
from ._times import drops_order, knots
from ._weights import half_weights, scalar_weights, whole_weight

Coordinate = Literal["l", "t", "rho"]
# Adams-Bashforth weights of uniform steps, from the newest output on.
_UNIFORM = (
    np.array([1.0]),
    np.array([3.0, -1.0]) / 2,
    np.array([23.0, -16.0, 5.0]) / 12,
    np.array([55.0, -59.0, 37.0, -9.0]) / 24,
)


class AbstractSampler(eqx.Module):
    """The base class of samplers: a way to make a `Table` for a schedule and times."""

    @abc.abstractmethod
    def table(self, schedule: AbstractSchedule, times: Any, grid: Any, num_steps: int | None = None) -> Table:
        """The table of this sampler.

        Arguments:
            schedule: of the noise.
            times: shape (N + 1,), monotone: from noise to data, or back for an inversion.
            grid: the name of the rule that made the times; None for a Grid.
            num_steps: the number that was asked for.
        """

    def times(
        self, schedule: AbstractSchedule, num_steps: int | None, grid: Any, t_end: Any, t_start: Any = None
    ) -> Any:
        """The times between steps."""
        return knots(schedule, num_steps, grid, t_end, t_start)


def check_order(order: Any, highest: int = 4) -> None:
    """Refuse orders that there are none of.

    Raises:
        ValueError: for what is not an integer from 1 to ``highest``.
    """
    if isinstance(order, bool) or not isinstance(order, int) or not 1 <= order <= highest:
        raise ValueError(f"order must be an integer from 1 to {highest}, got {order!r}.")


class Form(eqx.Module):
    """One of the two exact forms between points, with a polynomial in a coordinate.

    Arguments:
        schedule: of the noise.
        points: between steps.
        reads: "noise" or "data".
        coordinate: of the polynomial.
        half: whether two nodes take the slope at half of the step.
        tau: how much of the noise is kept; the form of the data only.
    """

    schedule: AbstractSchedule
    points: Points
    reads: Literal["noise", "data"] = eqx.field(static=True)
    coordinate: Coordinate = eqx.field(default="l", static=True)
    half: bool = eqx.field(default=False, static=True)
    tau: float = eqx.field(default=0.0, static=True)

    @property
    def rate(self) -> float:
        """Of the kernel."""
        return -1.0 if self.reads == "noise" else 1 + self.tau**2

    def keep(self, start: Any, end: Any) -> Any:
        """What is left of the state."""
        xp, _ = module_of(self.points.l)
        a, b = self.points[start], self.points[end]
        if self.reads == "noise":
            return xp.exp(b.log_alpha - a.log_alpha)
        return xp.exp(b.log_sigma - a.log_sigma - self.tau**2 * (b.l - a.l))

    def gain(self, end: Any) -> Any:
        """The factor of the integral."""
        xp, _ = module_of(self.points.l)
        p = self.points[end]
        return -xp.exp(p.log_sigma) if self.reads == "noise" else self.rate * xp.exp(p.log_alpha)

    def noise(self, start: Any, end: Any) -> Any:
        """The deviation of the noise."""
        xp, _ = module_of(self.points.l)
        a, b = self.points[start], self.points[end]
        return xp.exp(b.log_sigma) * xp.sqrt(-xp.expm1(-2 * self.tau**2 * (b.l - a.l)))

    def step(self, start: Any, end: Any, nodes: Any, first: int) -> tuple[Any, Any, None]:
        """What steps do with state and outputs.

        Arguments:
            start, end: shape (R,), indices of points.
            nodes: shape (R, k), likewise.
            first: in which column of the nodes the steps start.

        Returns:
            What is left of the state (R,), the weights (R, k), and no offset.
        """
        l = self.points.l
        a, b, n = l[start], l[end], l[nodes]
        k = nodes.shape[1]
        if k == 1:
            weights = whole_weight(a, b, self.rate)[:, None]
        elif k == 2 and self.half:
            weights = half_weights(a, b, n, first, self.rate)
        else:
            weights = scalar_weights(a, b, n, self.rate, self._coordinate)
        return self.keep(start, end), self.gain(end)[:, None] * weights, None

    def last(self, start: int, end: int) -> tuple[Any, Any]:
        """The step that ends without noise, where only the newest data is left."""
        xp, _ = module_of(self.points.l)
        a, b = self.points[start], self.points[end]
        if self.reads == "data":
            return xp.zeros_like(b.log_alpha), xp.exp(b.log_alpha)
        keep = xp.exp(b.log_alpha - a.log_alpha)
        return keep, -keep * xp.exp(a.log_sigma)

    def _coordinate(self, l: Any, shift: Any) -> Any:
        xp, l = module_of(l)
        if self.coordinate == "rho":
            return xp.exp(shift - l)
        return self.schedule.t_of_log_snr(l) if self.coordinate == "t" else l


def adams(form: Any, points: Points, order: int, lower_order_final: bool | None, corrector: bool) -> dict[str, Any]:
    """The columns of a multistep table.

    Arguments:
        form: has ``step``, and ``last`` if the last point is noiseless.
        points: between steps.
        order: how many outputs are combined.
        lower_order_final: whether the last steps combine fewer; None lets the points decide.
        corrector: whether every point is corrected once the output there is known.
    """
    lower, clean = lower_order_final, points.noiseless
    if lower is None:
        # The integral of the noise weighs the far end less, which bears more.
        lower = drops_order(points.l, clean, 1.5 if getattr(form, "reads", "data") == "noise" else 1.25)
    made = lambda lower, clean: _columns(form, points, order, lower, clean, corrector)
    if isinstance(points.l, np.ndarray):
        return made(lower, clean)
    # Of traced times it is not known how they end: all ways are made, and the right one is taken.
    if not isinstance(lower, bool):
        out = _chosen(lower, made(True, False), made(False, False))
        return _chosen(clean, made(True, True), out)
    return _chosen(clean, made(lower, True), made(lower, False))


def _chosen(which: Any, one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The columns of one table or the other; what one of them lacks is 0, and so are weights beyond its width."""
    out: dict[str, Any] = {"width": max(one["width"], other["width"])}
    for name in {**one, **other}:
        if name == "width":
            continue
        a, b = one.get(name), other.get(name)
        if name in ("out", "fix"):
            widen = lambda x: x if x is None else joined([([*range(len(x))], x)], out["width"])
            a, b = widen(a), widen(b)
        out[name] = jnp.where(which, 0 if a is None else a, 0 if b is None else b)
    return out


def _columns(
    form: Any, points: Points, order: int, lower_order_final: bool, ends_clean: bool, corrector: bool
) -> dict[str, Any]:
    """The columns, once it is known how the times end."""
    count, (xp, _) = len(points) - 1, module_of(points.l)
    orders = [min(order, i + 1, count - i if lower_order_final else order) for i in range(count)]
    if ends_clean:
        orders[-1] = 1
    plain = range(count - 1) if ends_clean else range(count)
    width = max(order, max((orders[i - 1] + 1 for i in range(1, count)), default=1)) if corrector else max(orders)

    def groups(sizes: dict[int, int]) -> list[tuple[list[int], int]]:
        return [([i for i in sizes if sizes[i] == k], k) for k in sorted(set(sizes.values()))]

    keep, out, offset = [], [], []
    for rows, k in groups({i: orders[i] for i in plain}):
        i = np.asarray(rows)
        kept, weights, shift = form.step(i, i + 1, i[:, None] - np.arange(k), 0)
        keep.append((rows, kept))
        out.append((rows, weights))
        offset.append((rows, shift))
    if ends_clean:
        kept, weight = form.last(count - 1, count)
        keep.append(([count - 1], kept[None]))
        out.append(([count - 1], weight[None, None]))
        offset.append(([count - 1], None if not offset or offset[0][1] is None else xp.zeros_like(kept)[None]))
    columns = {"keep": joined(keep), "out": joined(out, width), "width": width}
    if offset and offset[0][1] is not None:
        columns["offset"] = joined(offset)
    if not corrector or len(plain) < 2:
        return columns
    fix, fix_offset = [], []
    # What ends on the data takes it from where it was predicted.
    for rows, k in groups({i: orders[i - 1] + 1 for i in range(1, len(plain))}):
        i = np.asarray(rows)
        _, weights, shift = form.step(i - 1, i, i[:, None] - np.arange(k), 1)
        # What the corrected step takes more than the predicted one did.
        before = columns["out"][i - 1][:, : k - 1]
        fix.append((rows, xp.concatenate([weights[:, :1], weights[:, 1:] - before], axis=1)))
        if shift is not None:
            fix_offset.append((rows, shift - columns["offset"][i - 1]))
    left_out = [0, *range(max(len(plain), 1), count)]
    nothing = lambda x: (left_out, xp.zeros((len(left_out), *x.shape[1:]), x.dtype))
    columns["fix"] = joined([nothing(fix[0][1]), *fix], width)
    if fix_offset:
        columns["fix_offset"] = joined([nothing(fix_offset[0][1]), *fix_offset])
    return columns


class Multistep(AbstractSampler):
    """An exponential Adams method: one evaluation of the denoiser a step.

    `DDIM`, `DEIS`, `DPMSolver`, `DPMSolverPP`, `UniPC` and `iPNDM` are presets.

    Arguments:
        order: how many outputs are combined, 1 to 4.
        reads: "data" or "noise", what the polynomial goes through.
        coordinate: "l", "t" or "rho", what it is a polynomial in.
        half: whether two nodes take the slope at half of the step, as official codes do, and not the exact integral.
        corrector: whether a point is corrected once the output there is known, which costs no evaluation.
        tau: how much of the noise of the reverse equation is kept, for ``reads="data"``.
        eta: the same in the convention of DDIM, for order 1.
        uniform: whether the weights are those of uniform steps (iPNDM).
        lower_order_final: whether the last steps combine fewer outputs; None lets the grid decide: yes where its last
            step is longer than the one before, as with equal steps in t or sqrt(t), and no where steps are even.

    Raises:
        ValueError: for choices that do not exist or do not go together.

    Example:
        >>> import sdeflow as sf
        >>> sf.diffusion.DPMSolverPP(2) == sf.diffusion.Multistep(2, "data", half=True)
        True
    """

    order: int = eqx.field(static=True)
    reads: Literal["noise", "data"] = eqx.field(default="data", static=True)
    coordinate: Coordinate = eqx.field(default="l", static=True)
    half: bool = eqx.field(default=False, static=True)
    corrector: bool = eqx.field(default=False, static=True)
    tau: float = eqx.field(default=0.0, static=True)
    eta: float = eqx.field(default=0.0, static=True)
    uniform: bool = eqx.field(default=False, static=True)
    lower_order_final: bool | None = eqx.field(default=None, static=True)

    def __check_init__(self):
        check_order(self.order)
        if self.reads not in ("noise", "data"):
            raise ValueError(f'reads must be "noise" or "data", got {self.reads!r}.')
        if self.coordinate not in ("l", "t", "rho"):
            raise ValueError(f'coordinate must be "l", "t" or "rho", got {self.coordinate!r}.')
        for name in ("tau", "eta"):
            object.__setattr__(self, name, number(getattr(self, name), name))
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if self.tau > 0 and (self.reads != "data" or self.corrector):
            raise ValueError('tau > 0 goes with reads="data" and no corrector.')
        if self.eta > 0 and (self.order != 1 or self.tau > 0 or self.reads != "data" or self.eta > 1):
            raise ValueError('eta goes with order 1, reads="data" and tau = 0, and is at most 1.')
        if self.uniform and (self.reads != "noise" or self.corrector):
            raise ValueError('uniform weights go with reads="noise" and no corrector.')
        if self.uniform and (self.half or self.coordinate != "l" or self.lower_order_final):
            raise ValueError("uniform weights are fixed: half, coordinate and lower_order_final do not go with them.")
        if self.lower_order_final not in (None, True, False):
            raise ValueError(f"lower_order_final must be True, False or None, got {self.lower_order_final!r}.")

    def table(self, schedule: AbstractSchedule, times: Any, grid: Any, num_steps: int | None = None) -> Table:
        """The table of this sampler."""
        points = Points.along(schedule, times)
        form = Form(schedule, points, self.reads, self.coordinate, self.half, self.tau)
        order = 1 if self.uniform else self.order
        columns = adams(form, points, order, self.lower_order_final, self.corrector)
        xp, _ = module_of(points.l)
        count = len(points) - 1
        if self.uniform:
            orders = [min(self.order, i + 1) for i in range(count)]
            share = np.stack([np.pad(_UNIFORM[k - 1], (0, self.order - k)) for k in orders])
            share = xp.where(points.clean[1:, None], np.eye(1, self.order), share)
            columns |= {"out": columns["out"] * share, "width": self.order}
        i = np.arange(count)
        if self.tau > 0:
            columns["noise"] = xp.where(points.clean[1:], 0, form.noise(i, i + 1))
        if self.eta > 0:
            a, b = points[:-1], points[1:]
            gone = -xp.expm1(-2 * (b.l - a.l))
            keep = columns["keep"] * xp.sqrt(1 - self.eta**2 * gone)
            columns |= {
                "keep": keep,
                "out": (xp.exp(b.log_alpha) - xp.exp(a.log_alpha) * keep)[:, None],
                "noise": xp.where(b.clean, 0, self.eta * xp.exp(b.log_sigma) * xp.sqrt(gone)),
            }
        return Table(times[:-1], reads=self.reads, **columns)
