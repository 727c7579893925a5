r"""Statistics of a model along its own trajectories, which DPM-Solver-v3 chooses its linear part by.

With ``f = (sigma eps - l x) / alpha`` and its derivative along the ordinary equation in the time lam = log(alpha /
sigma), ``f1 = e^-lam ((l - 1) eps + eps1) - l' x / alpha`` (eps1 the derivative of eps along it), for each component

    l = E[d eps_i / d x_i] sigma,
    s = Cov(f, f1) / Var(f),      b = E f1 - s E f,

which minimise what is left to be interpolated (Zheng et al., DPM-Solver-v3, NeurIPS 2023). Where f does not vary
between samples, as for Gaussian data, s = 0.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from .._compat import is_concrete
from ..grids._build import check_count
from ..solvers import ExponentialAdams
from ._denoiser import AbstractDenoiser, check_denoiser
from ._equations import ProbabilityFlow
from ._schedule import cell, module_of
from ._times import knots, noiseless

# Up to this many components the diagonal is computed exactly.
_EXACT = 64


class Statistics(eqx.Module):
    """Coefficients l, s and b for each component of the state, piecewise linear in log(alpha / sigma).

    Arguments:
        knots: shape (M + 1,), increasing.
        l, s, b: shape (M + 1, *state).

    Raises:
        ValueError: for shapes that do not fit, and knots that do not increase.

    Example:
        >>> import numpy as np, sdeflow as sf
        >>> knots, one = np.array([-5.0, 5.0]), np.ones((2, 3))
        >>> as_data = sf.diffusion.Statistics(knots, one, 0 * one, 0 * one)  # DPM-Solver++
    """

    knots: Any
    l: Any
    s: Any
    b: Any

    def __check_init__(self):
        if np.ndim(self.knots) != 1 or not np.shape(self.l) == np.shape(self.s) == np.shape(self.b):
            raise ValueError("knots must be one row, and l, s and b of one shape (M + 1, *state).")
        if np.shape(self.l)[0] != np.shape(self.knots)[0] or np.shape(self.knots)[0] < 2:
            raise ValueError(
                f"l, s and b must lead with the {np.shape(self.knots)[0]} knots, got {np.shape(self.l)}; at least two."
            )
        if is_concrete(self.knots) and not (np.diff(np.asarray(self.knots, np.float64)) > 0).all():
            raise ValueError("knots must increase: log(alpha / sigma) from noise to data.")

    def curves(self) -> "Curves":
        """What a step integrates."""
        known = is_concrete(self.knots, self.l, self.s, self.b)
        as_array = (lambda x: np.asarray(x, np.float64)) if known else jnp.asarray
        lam, l, s, b = (as_array(x) for x in (self.knots, self.l, self.s, self.b))
        xp, _ = module_of(lam)
        gaps = xp.diff(lam).reshape(-1, *[1] * (l.ndim - 1))
        whole = lambda y: xp.concatenate([xp.zeros_like(y[:1]), xp.cumsum(gaps * (y[1:] + y[:-1]) / 2, axis=0)])
        S = whole(s)
        return Curves(lam, l, s, b, whole(l), S, whole(xp.exp(-S) * b))


class Curves(eqx.Module):
    """Coefficients with their integrals: L and S of l and s, B of exp(-S) b."""

    knots: Any
    l: Any
    s: Any
    b: Any
    L: Any
    S: Any
    B: Any

    def at(self, lam: Any) -> tuple[Any, Any, Any, Any]:
        """The values of l, L, S and B, each of shape (*lam, *state)."""
        xp, lam = module_of(lam)
        grid = xp.asarray(self.knots, lam.dtype)
        i = cell(grid, lam)
        # Constant beyond the ends.
        inside = xp.clip(lam, grid[0], grid[-1])
        widen = lambda x: x.reshape(*x.shape, *[1] * (self.l.ndim - 1))
        step, beyond = widen(inside - grid[i]), widen(lam - inside)
        share = step / widen(grid[i + 1] - grid[i])
        of = lambda y: (xp.asarray(y, lam.dtype)[i], xp.asarray(y, lam.dtype)[i + 1])
        line = lambda y: of(y)[0] + share * (of(y)[1] - of(y)[0])
        l, s, b = line(self.l), line(self.s), line(self.b)
        L = of(self.L)[0] + step * (of(self.l)[0] + l) / 2 + beyond * l
        S = of(self.S)[0] + step * (of(self.s)[0] + s) / 2
        first = xp.exp(-of(self.S)[0]) * of(self.b)[0]
        B = of(self.B)[0] + step * (first + xp.exp(-S) * b) / 2 + beyond * xp.exp(-S) * b
        return l, L, S + beyond * s, B


def model_statistics(
    denoiser: AbstractDenoiser,
    x_T: Array,
    *,
    args: Any = None,
    num_cells: int = 1200,
    t_end: float | None = None,
    key: PRNGKeyArray | None = None,
    num_probes: int = 1,
) -> Statistics:
    """The statistics of a model for `DPMSolverV3`, along the ordinary equation from many starts.

    Arguments:
        denoiser: what predicts the noise, for one sample.
        x_T: shape (n, *state), the starts; some hundreds.
        args: passed on to the denoiser.
        num_cells: how many steps in log(alpha / sigma); at least 16 for each step of a sampler.
        t_end: where the samplers will end.
        key: for random probes of the diagonal of the Jacobian, needed for more than 64 components; without a key it is
            computed exactly.
        num_probes: how many probes for each sample.

    Returns:
        The statistics.

    Raises:
        ValueError: for fewer than two starts, or a large state without a key.

    Example:
        >>> import jax, jax.numpy as jnp, sdeflow as sf
        >>> vp = sf.diffusion.VP()
        >>> net = sf.diffusion.Denoiser(lambda t, x, args: jnp.tanh(x), vp)
        >>> starts = jax.random.normal(jax.random.key(0), (16, 2))
        >>> sf.diffusion.model_statistics(net, starts, num_cells=20).l.shape
        (21, 2)
    """
    check_denoiser(denoiser)
    x_T = jnp.asarray(x_T)
    if x_T.ndim < 1 or x_T.shape[0] < 2:
        raise ValueError(f"x_T must hold at least two starts, got shape {x_T.shape}.")
    size = int(np.prod(x_T.shape[1:]))
    if key is None and size > _EXACT:
        raise ValueError(f"a state of {size} components is too large for an exact diagonal: pass key=.")
    schedule = denoiser.schedule
    count = check_count(num_cells, "num_cells")
    times = knots(schedule, count, "logsnr", t_end)
    if noiseless(schedule, times[-1]):
        raise ValueError("statistics need noise at t_end: pass a larger t_end=.")
    lam = schedule.log_snr(times)
    moments = _moments(denoiser, x_T, args, lam, key, check_count(num_probes, "num_probes"))
    l, mean_f, mean_f1, mean_x, var_f, cov_f1, cov_x, size = (np.asarray(x, np.float64) for x in moments)
    slope = np.gradient(l, lam, axis=0)
    mean_f1, cov_f1 = mean_f1 - slope * mean_x, cov_f1 - slope * cov_x
    still = var_f <= 1e3 * np.finfo(x_T.dtype).eps * size
    s = np.where(still, 0.0, cov_f1 / np.where(still, 1.0, var_f))
    return Statistics(lam, l, s, mean_f1 - s * mean_f)


@eqx.filter_jit
def _moments(denoiser: Any, x_T: Array, args: Any, lam: Any, key: Any, num_probes: int) -> tuple[Array, ...]:
    schedule, dtype = denoiser.schedule, x_T.dtype
    flow = ProbabilityFlow(denoiser).reparametrised()
    mean = jnp.asarray(schedule.mean, dtype)
    shape = x_T.shape[1:]
    solver, term = ExponentialAdams(3, 1.0), diffrax.ODETerm(jax.vmap(flow.drift, (None, 0, None)))
    keys = None if key is None else jr.split(key, len(lam))

    def at_one(lam: Array, x: Array, key: Any) -> tuple[Array, ...]:
        noise_at = lambda lam, x: denoiser.predict("noise", schedule.t_of_log_snr(lam), x, args)
        t = schedule.t_of_log_snr(lam)
        f, rate = schedule.rates(t)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        eps = noise_at(lam, x)
        along = f / rate * (x - mean) - sigma * eps
        eps1 = jax.jvp(noise_at, (lam, x), (jnp.ones_like(lam), along))[1]
        push = lambda v: jax.jvp(lambda x: noise_at(lam, x), (x,), (v,))[1]
        if key is None:
            basis = jnp.eye(x.size, dtype=dtype).reshape(x.size, *shape)
            diagonal = jax.vmap(lambda v: (v * push(v)).sum())(basis).reshape(shape)
        else:
            probes = jr.rademacher(key, (num_probes, *shape), dtype)
            diagonal = jax.vmap(lambda v: v * push(v))(probes).mean(axis=0)
        return (x - mean) / alpha, eps, eps1, sigma * diagonal, sigma / alpha * eps

    def knot(carry: Any, row: Any) -> Any:
        y, state = carry
        here, there, key = row
        x = jax.vmap(flow.leave, (None, 0))(here, y)
        each = None if key is None else jr.split(key, len(x))
        u, eps, eps1, diagonal, shifted = jax.vmap(at_one, (None, 0, None if key is None else 0))(here, x, each)
        l = diagonal.mean(axis=0)
        f = shifted - l * u
        f1 = jnp.exp(-here) * ((l - 1) * eps + eps1)
        centred = f - f.mean(axis=0)
        size = ((jnp.abs(shifted) + jnp.abs(l * u)) ** 2).mean(axis=0)
        found = (l, f.mean(axis=0), f1.mean(axis=0), u.mean(axis=0), (centred**2).mean(axis=0),
                 (centred * f1).mean(axis=0), (centred * u).mean(axis=0), size)  # fmt: skip
        y, _, _, state, _ = solver.step(term, here, there, y, args, state, False)
        return (y, state), found

    lam = jnp.asarray(lam, dtype)
    y = jax.vmap(flow.enter, (None, 0))(lam[0], x_T)
    # A last step beyond the end, whose outcome is not looked at.
    there = jnp.append(lam[1:], 2 * lam[-1] - lam[-2])
    start = (y, solver.init(term, lam[0], lam[1], y, args))
    _, found = jax.lax.scan(knot, start, (lam, there, keys))
    return found
