r"""``DPMSolverV3``: a linear part for each component, chosen by statistics of the model (Zheng et al., NeurIPS 2023).

With f = (sigma eps - l x) / alpha, L and S the integrals of l and s from the start s of a step, and

    beta(lam) = int_s^lam e^-S b,      g(lam) = e^-S f - beta,

    x_t = (alpha_t / alpha_s) e^-L x_s - alpha_t e^-L int_s^t e^{L + S} (beta + g) dlam,

and g is replaced by a polynomial through its last values. It is the `Multistep` method with another kernel: l = 1 and
s = b = 0 give DPM-Solver++, l = 0, s = -1 and b = 0 DPM-Solver; order 1 is exact for Gaussian data of diagonal
covariance, in one step.
"""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np

from ._multistep import AbstractSampler, adams, check_order
from ._schedule import AbstractSchedule, module_of
from ._statistics import Curves, Statistics
from ._table import Points, Table
from ._weights import basis, rule_on


class DPMSolverV3(AbstractSampler):
    """A multistep sampler whose linear part is fitted to the model, one evaluation a step.

    Arguments:
        statistics: of the model, from `model_statistics`; the state of the sample has their shape.
        order: how many outputs are combined, 1 to 4.
        corrector: whether a point is corrected once the output there is known, which costs no evaluation.
        pseudo: use powers in place of products of distances, which is steadier with few steps.
        lower_order_final: whether the last steps combine fewer outputs; None lets the grid decide.

    Raises:
        TypeError: for what are no statistics.
        ValueError: for another order.

    Example:
        >>> import numpy as np, sdeflow as sf
        >>> knots, one = np.array([-6.0, 6.0]), np.ones((2, 3))
        >>> as_data = sf.diffusion.DPMSolverV3(sf.diffusion.Statistics(knots, one, 0 * one, 0 * one), 2)
        >>> as_data.order
        2
    """

    statistics: Statistics
    order: int = eqx.field(default=3, static=True)
    corrector: bool = eqx.field(default=False, static=True)
    pseudo: bool = eqx.field(default=False, static=True)
    lower_order_final: bool | None = eqx.field(default=None, static=True)

    def __check_init__(self):
        check_order(self.order)
        if not isinstance(self.statistics, Statistics):
            raise TypeError(
                f"statistics must come from sf.diffusion.model_statistics, got {type(self.statistics).__name__}."
            )

    def table(self, schedule: AbstractSchedule, times: Any, grid: Any, num_steps: int | None = None) -> Table:
        """The table of this sampler."""
        curves = self.statistics.curves()
        # Statistics that are traced make a traced table.
        points = Points.along(schedule, times if isinstance(curves.knots, np.ndarray) else jnp.asarray(times))
        xp, _ = module_of(points.l)
        form = FittedForm(points, curves, self.pseudo)
        columns = adams(form, points, self.order, self.lower_order_final, self.corrector)
        rho = xp.exp(-points.l[:-1])
        l = curves.at(points.l[:-1])[0]
        read_x = -l / widen(xp.exp(points.log_alpha[:-1]), l)
        return Table(points.t[:-1], reads=None, read_x=read_x, read_noise=rho, **columns)


class FittedForm(eqx.Module):
    """The exact form of a step, with a polynomial for g."""

    points: Points
    curves: Curves
    pseudo: bool = eqx.field(default=False, static=True)

    def step(self, start: Any, end: Any, nodes: Any, first: int) -> tuple[Any, Any, Any]:
        """What steps do with state and outputs; see `Form.step`."""
        del first
        p = self.points
        xp, _ = module_of(p.l)
        a, b, n = p.l[start], p.l[end], p.l[nodes]
        _, L_a, S_a, B_a = self.curves.at(a)
        _, L_b, _, _ = self.curves.at(b)
        _, _, S_n, B_n = self.curves.at(n)
        points, weights = rule_on(a, b)
        _, L, S, B = self.curves.at(points)
        one = lambda x: x[:, None]
        kernel = widen(weights, L) * xp.exp(L + S - one(L_a + S_a))
        beta, beta_n = xp.exp(one(S_a)) * (B - one(B_a)), xp.exp(one(S_a)) * (B_n - one(B_a))
        w = xp.einsum("rkq,rq...->rk...", basis(n, points, self.pseudo), kernel)
        shrink = xp.exp(L_a - L_b)
        gain = -widen(xp.exp(p.log_alpha[end]), shrink) * shrink
        keep = widen(xp.exp(p.log_alpha[end] - p.log_alpha[start]), shrink) * shrink
        offset = gain * ((kernel * beta).sum(axis=1) - (w * beta_n).sum(axis=1))
        return keep, one(gain) * w * xp.exp(one(S_a) - S_n), offset

    def last(self, start: int, end: int) -> tuple[Any, Any]:
        """The step that ends without noise, where only the data is left: alpha_t ((1 - l) x / alpha - f)."""
        p = self.points
        xp, _ = module_of(p.l)
        l = self.curves.at(p.l[start])[0]
        alpha = xp.exp(p.log_alpha[end])
        return xp.exp(p.log_alpha[end] - p.log_alpha[start]) * (1 - l), -alpha * xp.ones_like(l)


def widen(x: Any, like: Any) -> Any:
    """Numbers with axes of length 1 for the state."""
    return x.reshape(*np.shape(x), *[1] * (np.ndim(like) - np.ndim(x)))
