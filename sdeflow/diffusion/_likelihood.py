r"""``log_prob``: the density that the ordinary equation of a diffusion model gives to a sample.

The equation carries every density of the model (Song et al., ICLR 2021). For u = x / alpha and rho = sigma / alpha it
is du/drho = eps, so that along it

    dc/drho = alpha div eps,
    log p(x at t_end) = log p(x at t_start) + d (log alpha_start - log alpha_end) + c,      c from t_end to t_start.

alpha c obeys the same form as x with alpha div eps for its noise: every sampler takes it along as one more component.
Adaptive solves take x / sigma and c in the time l = log(alpha / sigma), dc/dl = -sigma div eps.

Three numbers that are easily taken for one another: the density of this equation from its own law at t_start, which
``log_prior`` can give; from N(mean, prior_std^2) there, which is the default and what a sampler starts from; and the
density of the data, for which ``t_end`` is too late by as much as the noise at t_end blurs.
"""

import math
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from .._compat import is_concrete, varies_over, vary
from ..equations import AbstractEquation
from ..grids import Grid
from ..grids._build import check_count
from ..solving import solve
from ._denoiser import AbstractDenoiser, check_denoiser
from ._equations import LogSNRFlow
from ._multistep import AbstractSampler
from ._sample import check_noisy, invert
from ._schedule import AbstractSchedule, check_mean, number
from ._schedules import MeanReverting
from ._times import knots
from ._v3 import DPMSolverV3
from ._whole import check_one_sample


def log_prob(
    denoiser: AbstractDenoiser,
    x: Array,
    *,
    exact: bool = True,
    key: PRNGKeyArray | None = None,
    num_probes: int = 1,
    args: Any = None,
    solver: AbstractSampler | diffrax.AbstractSolver | None = None,
    num_steps: int | None = None,
    grid: Any = "logsnr",
    t_start: float | None = None,
    t_end: float | None = None,
    log_prior: Callable[[Array], Array] | None = None,
    tolerance: float = 1e-5,
    adjoint: diffrax.AbstractAdjoint | None = None,
    unroll: int | bool = 1,
) -> Array:
    """The log-density of one sample at ``t_end``, in nats; use ``jax.vmap`` for batches.

    Without ``num_steps`` and a Grid the solve is adaptive, which is the first choice: on a mixture of five components
    in the plane it misses by less than .0002. Samplers are made for the other direction: there 40 steps of
    ``Singlestep(method="rk4")`` miss by .008 and of ``UniPC(3)`` by .04, and 20 steps of ``UniPC(3)`` have nothing
    right. The divergence costs one Jacobian-vector product for each
    component of x with ``exact=True``, and for each probe otherwise: an estimate without bias of the log-density,
    though not of the density, with one draw of the probes for the whole solve.

    Arguments:
        denoiser: what predicts data or noise.
        x: a sample at ``t_end``.
        exact: whether the divergence is exact, which suits some tens of components; otherwise it is Hutchinson's
            estimate with random signs.
        key: for the probes, with ``exact=False``.
        num_probes: how many of them.
        args: passed on to the denoiser.
        solver: a sampler without noise, e.g. ``UniPC(3)``, with ``num_steps`` or a Grid; or a diffrax solver, by
            default Tsit5, for adaptive steps or, with these, for fixed ones.
        num_steps, grid, t_start, t_end: those of `sample`.
        log_prior: ``log_prior(x)``, the log-density at ``t_start``; by default that of N(mean, prior_std^2), which is
            for a start at the schedule's ``t_max`` alone.
        tolerance: relative and absolute, of an adaptive solve.
        adjoint: that of `sample`, or for a diffrax solver that of `sdeflow.solve`.
        unroll: that of `sample`, for a sampler.

    Returns:
        A scalar.

    Raises:
        ValueError, TypeError: for wrong shapes, names and static values, samplers with noise, and an end without any.
        SolveError: outside of a trace, if the result is not finite or the solve failed.

    Example:
        >>> import jax.numpy as jnp, sdeflow as sf
        >>> vp = sf.diffusion.VP()
        >>> normal = sf.diffusion.Denoiser(lambda t, x, args: vp.sigma(t) * x, vp)  # data with variance 1
        >>> round(float(sf.diffusion.log_prob(normal, jnp.zeros(2))), 3)  # -log(2 pi)
        -1.838
    """
    check_denoiser(denoiser)
    if isinstance(solver, DPMSolverV3):
        raise ValueError("the statistics of DPMSolverV3 say nothing of the divergence: use another sampler.")  # noqa: TRY004
    if not isinstance(solver, AbstractSampler | diffrax.AbstractSolver | None):
        raise TypeError(f"solver must be a sampler, a diffrax solver or None, got {solver!r}.")
    if not isinstance(x, jax.Array | np.ndarray) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError("x must be an array of a real floating dtype.")
    x = jnp.asarray(x)
    check_mean(denoiser.schedule, x.shape)
    check_one_sample(x, denoiser)
    if is_concrete(tolerance) and number(tolerance, "tolerance") <= 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}.")
    schedule, probes = denoiser.schedule, None
    if not exact:
        if key is None:
            raise ValueError("exact=False draws random probes: pass key=.")
        probes = jr.rademacher(key, (check_count(num_probes, "num_probes"), *x.shape), x.dtype)
    elif key is not None:
        raise ValueError("key= is for the probes of exact=False: an exact divergence draws nothing.")
    adaptive = num_steps is None and not isinstance(grid, Grid)
    if isinstance(solver, AbstractSampler):
        if adaptive:
            raise ValueError(f"{type(solver).__name__} takes a fixed number of steps: pass num_steps= or a Grid.")
        times = solver.times(schedule, num_steps, grid, t_end, t_start)
        _check_start(schedule, times, log_prior)
        noise, count = _by_table(
            denoiser, x, probes, args, solver, times, num_steps, grid, t_start, t_end, adjoint, unroll
        )
    else:
        if unroll is True or unroll > 1:
            raise ValueError("unroll= is for samplers: pass solver=, e.g. UniPC(3), and num_steps=.")
        times = knots(schedule, 1 if adaptive else num_steps, grid, t_end, t_start)
        check_noisy(schedule, times)
        _check_start(schedule, times, log_prior)
        noise, count = _by_solve(denoiser, x, probes, args, solver, times, adaptive, tolerance, adjoint)
    start = _normal_log_prob(schedule, noise) if log_prior is None else log_prior(noise)
    shift = schedule.log_alpha(times[0]) - schedule.log_alpha(times[-1])
    return start + x.size * jnp.asarray(shift, x.dtype) + count


def bits_per_dim(log_prob: Any, size: int, *, levels: int = 256, width: float = 1.0) -> Array:
    """Bits for each component of data with discrete levels: ``-log_prob / (size log 2) + log2(levels / width)``.

    Arguments:
        log_prob: in nats, of data that was dequantised, i.e. lies anywhere within its level.
        size: how many components a sample has.
        levels: how many levels a component has.
        width: of the interval that they fill after scaling: 2 for [-1, 1].

    Raises:
        ValueError: for numbers that are not positive.

    Example:
        >>> import math, sdeflow as sf
        >>> float(sf.diffusion.bits_per_dim(0.0, 3072))
        8.0
        >>> float(sf.diffusion.bits_per_dim(-3072 * math.log(2), 3072, width=2))
        8.0
    """
    check_count(size, "size")
    check_count(levels, "levels")
    if number(width, "width") <= 0:
        raise ValueError(f"width must be positive, got {width}.")
    return -jnp.asarray(log_prob) / (size * math.log(2)) + math.log2(levels / width)


def _check_start(schedule: AbstractSchedule, times: Any, log_prior: Any) -> None:
    """Refuse the density of the prior where the prior is not."""
    if log_prior is None and isinstance(times, np.ndarray) and times[0] < schedule.t_max * (1 - 1e-6):
        raise ValueError(
            f"the default prior is that of t_max={schedule.t_max:g}, but the solve begins at t={times[0]:g}: pass "
            "log_prior=, or a schedule with that t_max."
        )


def _normal_log_prob(schedule: AbstractSchedule, x: Array) -> Array:
    std = schedule.prior_std()
    z = (x - jnp.asarray(schedule.mean, x.dtype)) / std
    return -(z**2).sum() / 2 - x.size * (math.log(2 * math.pi) / 2 + math.log(std))


def _with_divergence(denoiser: Any, t: Any, x: Array, args: Any, probes: Array | None) -> tuple[Array, Array, Array]:
    """The data, the noise, and the noise's divergence."""
    (data, noise), push = jax.linearize(lambda x: denoiser.parts(t, x, args), x)
    exact = probes is None
    vectors = jnp.eye(x.size, dtype=x.dtype).reshape(x.size, *x.shape) if exact else probes
    # Within jax.shard_map a tangent has to vary as the state does.
    vectors = vary(vectors, varies_over(x))
    total = jax.vmap(lambda v: (v * push(v)[1]).sum())(vectors).sum()
    return data, noise, total if exact else total / len(vectors)


class _Counting(AbstractDenoiser):
    """A denoiser of the flat state, less the mean, with alpha c for one more component."""

    denoiser: AbstractDenoiser
    probes: Array | None
    shape: tuple[int, ...] = eqx.field(static=True)

    @property
    def schedule(self) -> AbstractSchedule:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of the denoiser, around 0."""
        schedule = self.denoiser.schedule
        if isinstance(schedule, MeanReverting):
            return MeanReverting(schedule.schedule, 0.0, scale=schedule.scale)
        return schedule

    def parts(self, t: Any, x: Array, args: Any) -> tuple[Array, Array]:
        """The predicted data and noise, with those of alpha c."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        mean = jnp.asarray(self.denoiser.schedule.mean, x.dtype)
        at = x[:-1].reshape(self.shape) + mean
        data, noise, divergence = _with_divergence(self.denoiser, t, at, args, self.probes)
        gain = alpha * divergence
        last = (x[-1] - sigma * gain) / alpha
        return jnp.append(data.ravel(), last), jnp.append(noise.ravel(), gain)


def _by_table(
    denoiser: Any,
    x: Array,
    probes: Any,
    args: Any,
    solver: Any,
    times: Any,
    num_steps: Any,
    grid: Any,
    t_start: Any,
    t_end: Any,
    adjoint: Any,
    unroll: Any,
) -> tuple[Array, Array]:
    mean = jnp.asarray(denoiser.schedule.mean, x.dtype)
    state = jnp.append((x - mean).ravel(), 0)
    options = {"num_steps": num_steps, "grid": grid, "t_start": t_start, "t_end": t_end, "adjoint": adjoint}
    options["unroll"] = unroll
    counting = _Counting(denoiser, probes, x.shape)  # pyright: ignore[reportCallIssue]
    end = invert(counting, state, args=args, solver=solver, **options)
    alpha = jnp.asarray(denoiser.schedule.alpha(times[0]), x.dtype)
    return end[:-1].reshape(x.shape) + mean, end[-1] / alpha


class _CountingFlow(AbstractEquation):
    """The equation for x / sigma and c in the time l."""

    flow: LogSNRFlow
    probes: Array | None
    interpretation: str = eqx.field(static=True, default="ito")
    additive: bool = eqx.field(static=True, default=True)

    def drift(self, t: Any, y: tuple[Array, Array], args: Any) -> tuple[Array, Array]:
        """The velocities of both."""
        z, _ = y
        l, schedule = jnp.asarray(t, z.dtype), self.flow.denoiser.schedule
        t = schedule.t_of_log_snr(l)
        x = self.flow.leave(l, z)
        _, noise, divergence = _with_divergence(self.flow.denoiser, t, x, args, self.probes)
        return z - noise, -schedule.sigma(t) * divergence


def _by_solve(
    denoiser: Any,
    x: Array,
    probes: Any,
    args: Any,
    solver: Any,
    times: Any,
    adaptive: bool,
    tolerance: float,
    adjoint: Any,
) -> tuple[Array, Array]:
    flow = LogSNRFlow(denoiser)
    ls = denoiser.schedule.log_snr(times[::-1])
    state = (flow.enter(jnp.asarray(ls[0], x.dtype), x), jnp.zeros((), x.dtype))
    steps: dict[str, Any] = {}
    if adaptive:
        steps["stepsize_controller"] = diffrax.PIDController(rtol=tolerance, atol=tolerance)
    else:
        count = len(ls) - 1
        steps["grid"] = Grid(ls[:-1], ls[1:], np.ones(count, bool), np.array([0, count]))
    solver = diffrax.Tsit5() if solver is None else solver
    ends = ls[np.array([0, -1])]
    equation = _CountingFlow(flow, probes)  # pyright: ignore[reportCallIssue]
    sol = solve(equation, state, ends, args=args, solver=solver, adjoint=adjoint, **steps)
    z, count = sol.final
    return flow.leave(jnp.asarray(ls[-1], x.dtype), z), count
