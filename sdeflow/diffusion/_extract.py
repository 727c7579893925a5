r"""``extract_noise``: the noise that makes a sampler end on a given sample, for any sampler that adds noise.

States x_k at the times of the sampler are drawn around the sample x at t_end,

    x_k = a_k x + sqrt(sigma_k^2 - a_k^2 sigma_end^2) eps_k,      a_k = alpha_k / alpha_end,

with independent eps_k, and the noise follows row by row, z = (x_{k+1} - (what the row makes of x_k)) / (its size). From
the first state and this noise the sampler comes to the same end; with other ``args`` it makes another sample that
shares its structure (Huberman-Spiegelglas et al., An edit friendly DDPM noise space, CVPR 2024).
"""

from typing import Any

import diffrax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from ._denoiser import AbstractDenoiser
from ._multistep import AbstractSampler
from ._sample import check_adjoint, check_finite, policy, run, start_of, table_of
from ._table import Points, Table
from ._whole import check_one_sample


def extract_noise(
    denoiser: AbstractDenoiser,
    x: Array,
    *,
    args: Any = None,
    solver: AbstractSampler,
    num_steps: int | None = None,
    grid: Any = "logsnr",
    t_start: float | None = None,
    t_end: float | None = None,
    key: PRNGKeyArray,
    independent: bool = True,
    adjoint: diffrax.AbstractAdjoint | None = None,
) -> tuple[Array, Array]:
    """The start and the noise from which a sampler comes to x: ``sample(..., noise=noise)`` replays them.

    With independent states the noise is not white: its deviation is far above 1 and successive draws are correlated
    by about -1/2, which is what keeps the structure of x when ``args`` change. States along one forward path have noise
    close to white with a good denoiser, as the sampler would draw it.

    Replay ends on x itself if the last row adds noise. With ``t_end`` where the noise vanishes it does not: the end is
    then what the denoiser makes of the last state.

    Arguments:
        denoiser: what predicts data or noise.
        x: a sample at ``t_end``.
        args: passed on to the denoiser.
        solver: a sampler that adds noise, e.g. ``DDIM(1.0)`` or ``DPMSolverPP(2, tau=1.0)``.
        num_steps, grid, t_start, t_end: those of `sample`, to be passed there too. A later ``t_start`` leaves more of x
            to an edit as it is.
        key: for the states on the way.
        independent: whether the states are independent given x; otherwise they lie on one forward path.
        adjoint: that of `sample`.

    Returns:
        The state at ``t_start``, and the noise, shape (rows, *x.shape).

    Raises:
        ValueError, TypeError: for wrong shapes, names and static values, and samplers without noise.
        SolveError: outside of a trace, if the noise is not finite.

    Example:
        >>> import jax, jax.numpy as jnp, sdeflow as sf
        >>> vp, x = sf.diffusion.VP(), jnp.array([0.5, -1.0])
        >>> normal = sf.diffusion.Denoiser(lambda t, x, args: vp.sigma(t) * x, vp)
        >>> options = {"solver": sf.diffusion.DDIM(1.0), "num_steps": 10}
        >>> start, noise = sf.diffusion.extract_noise(normal, x, key=jax.random.key(0), **options)
        >>> again = sf.diffusion.sample(normal, start, noise=noise, **options)
        >>> bool(abs(again - x).max() < 1e-5)
        True
    """
    x, _ = start_of(denoiser, x, solver, False)
    check_adjoint(adjoint, solver)
    schedule = denoiser.schedule
    times = solver.times(schedule, num_steps, grid, t_end, t_start)
    table = table_of(solver, schedule, times, grid, num_steps)
    check_one_sample(x, denoiser)
    if not table.draws:
        raise ValueError(f"{type(solver).__name__} adds no noise with these options, so there is none to extract.")
    if not independent and table.start is not None:
        raise ValueError("a sampler with churn raises the noise between steps, which no forward path does.")
    start, through = _states(schedule, table, times, x, key, independent)
    out = run(denoiser, table, start, None, args, None, policy(adjoint, table, x), through=through)
    check_finite(out.x)
    return start, out.noise  # pyright: ignore[reportReturnType]


def _states(
    schedule: Any, table: Table, times: Any, x: Array, key: PRNGKeyArray, independent: bool
) -> tuple[Array, Array]:
    """The start, and where each draw of noise leads."""
    # The denoiser is evaluated where a step has led, so the next row says when that is.
    at = [times[:1], table.t] if table.start is not None else [table.t]
    last = Points.along(schedule, times)[-1:]
    here = Points.at(schedule, jnp.concatenate([jnp.asarray(t) for t in at]) if not isinstance(times, np.ndarray)
                     else np.concatenate(at))  # fmt: skip
    # In y = x / alpha noise has the variance rho^2, rho = sigma / alpha.
    variance = jnp.asarray(jnp.exp(-2 * here.l) - jnp.where(last.clean, 0, jnp.exp(-2 * last.l)), x.dtype)
    widen = lambda a: jnp.asarray(a, x.dtype).reshape(-1, *[1] * x.ndim)
    eps = jr.normal(key, (len(here), *x.shape), x.dtype)
    if independent:
        noise = widen(jnp.sqrt(variance)) * eps
    else:
        gained = jnp.sqrt(variance - jnp.append(variance[1:], 0))
        noise = jnp.cumsum((widen(gained) * eps)[::-1], axis=0)[::-1]
    mean = jnp.asarray(schedule.mean, x.dtype)
    alpha, end = jnp.exp(jnp.asarray(here.log_alpha)), jnp.exp(jnp.asarray(last.log_alpha))
    states = mean + widen(alpha) * ((x - mean) / jnp.asarray(end[0], x.dtype) + noise)
    return states[0], jnp.concatenate([states[1:], x[None]])
