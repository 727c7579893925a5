"""``sample``: from noise to data along a grid of times, by a sampler of choice; ``invert``: back again.

The sampler becomes a table of numbers on the host, in float64; one scan follows it, with one evaluation of the denoiser
a row. Gradients go through the scan, in everything that is traced: weights, the start, guidance, the grid.
"""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from .._compat import is_concrete, warn
from .._results import RESULTS, SolveError
from ..adjoints import DiscreteAdjoint, ReversibleAdjoint
from ..solving._choose import choose_adjoint
from ..walking import checkpointed_scan
from ._bdia import BDIA, lost_digits
from ._defaults import default_sampler
from ._denoiser import AbstractDenoiser, Denoiser, check_denoiser
from ._moves import AbstractConstraint, AbstractCorrector, Moves
from ._multistep import AbstractSampler, Multistep
from ._once import once
from ._schedule import check_mean
from ._singlestep import Singlestep
from ._table import Table, Walked, follow, read
from ._times import noiseless
from ._undo import follow_to_undo
from ._whole import check_one_sample

State = Array | tuple[Array, Array]
# How far the last iteration may still move a state, relative to its size.
_DEFECT = 1e-3
_NOT_FINITE = (
    "the sampler did not stay finite: the network returned infinite numbers or NaN, or its predictions drove the state "
    "there. Check what it returns for x_T at t_start, whether prediction= and the schedule are those that it was "
    "trained with, and its weights; take more steps if it is right."
)
_NOT_UNDONE = (
    "the steps of the sampler were not undone: the iterations of fixed_point= still moved the state by more than a "
    "thousandth of its size. Raise fixed_point=, or take shorter steps with num_steps= or a larger t_end=."
)


def sample(
    denoiser: AbstractDenoiser,
    x_T: State,
    *,
    args: Any = None,
    solver: AbstractSampler | None = None,
    num_steps: int | None = None,
    grid: Any = None,
    t_start: float | None = None,
    t_end: float | None = None,
    key: PRNGKeyArray | None = None,
    noise: Array | None = None,
    corrector: AbstractCorrector | None = None,
    constraint: AbstractConstraint | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    return_state: bool = False,
    unroll: int | bool = 1,
) -> Any:
    """Draw a sample: from noise ``x_T`` at ``t_start`` to data at ``t_end``.

    One sample per call; use ``jax.vmap`` for batches. A batch in ``x_T`` with a batch-wise denoiser works, too; what
    looks at a whole sample then asks for ``sample_ndim``: `Thresholded`, `DPS` and `Langevin` with norms of the sample.
    Multistep samplers evaluate the denoiser once a step.

    Arguments:
        denoiser: what predicts data or noise.
        x_T: the start, e.g. ``denoiser.schedule.sample_prior(shape, key=key)``; for `BDIA` perhaps a pair, as `invert`
            returns it.
        args: passed on to the denoiser.
        solver: a sampler, e.g. ``UniPC(3)``; by default the one that `default_sampler` names.
        num_steps: how many steps.
        grid: "logsnr", "t", "quadratic" or "edm", what has equal steps, by default "logsnr", and without a solver what
            `default_sampler` names; or a `sdeflow.grids.Grid` of decreasing times.
            Its times may be traced, and the sample differentiated in them (an end without noise counts as fixed);
            traced times that do not decrease, or are padded, give NaN.
        t_start: where to start, by default the schedule's ``t_max``; later with a state that is known there, as from
            `GaussianDenoiser` or `extract_noise`.
        t_end: where to end, by default the schedule's ``t_min``. Where the noise vanishes, as at 0, one last step of
            order 1 leads there, on "logsnr" and "edm" from ``t_min``, on the others as long as the rest.
        key: for samplers, correctors and constraints that add noise.
        noise: what a sampler adds instead, as `extract_noise` returns it; a key is then for the others alone.
        corrector: what moves the state before each step, e.g. `Langevin`. It and a constraint are for samplers that
            evaluate the denoiser once a step and correct nothing later; past order 1 these go on with outputs from
            before the moves.
        constraint: what binds the state to what is known, after each move and each step, e.g. `Replacement`.
        adjoint: `sdeflow.adjoints.DiscreteAdjoint`, which says what a gradient keeps, by default as in `sdeflow.solve`;
            for `BDIA` also `sdeflow.adjoints.ReversibleAdjoint`, which keeps nothing but the end.
        return_state: for `BDIA`, return the pair of the sample and the state one knot before it.
        unroll: how many evaluations are written out in the body of the loop over them; True writes all of them out,
            which compiles longer, but on a CPU runs networks with convolutions some ten times faster.

    Returns:
        The sample, an array like ``x_T``.

    Raises:
        ValueError, TypeError: for wrong shapes, names and static values, before anything runs.
        SolveError: outside of a trace, if the sample is not finite.

    Example:
        >>> import jax, jax.numpy as jnp, sdeflow as sf
        >>> vp = sf.diffusion.VP()
        >>> point = sf.diffusion.Denoiser(lambda t, x, args: 0 * x + 3.0, vp, prediction="data")
        >>> noise = vp.sample_prior((2,), key=jax.random.key(0))
        >>> sf.diffusion.sample(point, noise, num_steps=5, t_end=0.0).tolist()
        [3.0, 3.0]
    """
    check_denoiser(denoiser)
    if solver is None:
        if corrector is not None or constraint is not None:
            raise ValueError("corrector= and constraint= ask for a sampler of yours: pass solver=, e.g. DDIM(1.0).")
        solver, chosen = default_sampler(denoiser.schedule, num_steps, grid)
        grid = chosen if grid is None else grid
    grid = "logsnr" if grid is None else grid
    x, base = start_of(denoiser, x_T, solver, return_state)
    check_adjoint(adjoint, solver)
    check_unroll(unroll, adjoint)
    times, table = once(_planned, solver, denoiser.schedule, num_steps, grid, t_end, t_start)
    check_one_sample(x, denoiser, corrector, constraint)
    _check_signal(denoiser, times)
    moves = _moves(denoiser, table, times, solver, corrector, constraint)
    if noise is not None:
        noise = _check_noise(noise, table, x, solver)
    elif table.draws and key is None:
        raise ValueError(f"{type(solver).__name__} adds noise with these options: pass key=.")
    drawn = corrector is not None or (constraint is not None and constraint.draws)
    if drawn and key is None:
        raise ValueError(f"{type(corrector or constraint).__name__} draws noise: pass key=.")
    table = table if base is None else table.drop(1)
    key = key if drawn or (table.draws and noise is None) else None
    return _followed(denoiser, table, x, base, args, key, adjoint, return_state, noise, moves, unroll)


def invert(
    denoiser: AbstractDenoiser,
    x: State,
    *,
    args: Any = None,
    solver: AbstractSampler,
    num_steps: int | None = None,
    grid: Any = "logsnr",
    t_start: float | None = None,
    t_end: float | None = None,
    adjoint: diffrax.AbstractAdjoint | None = None,
    fixed_point: int = 0,
    return_state: bool = False,
    unroll: int | bool = 1,
) -> Any:
    """The noise that a sample came from: from data at ``t_end`` back to noise at ``t_start``.

    `BDIA` undoes its own steps, exactly with gamma = 1 from the pair that ``sample(..., return_state=True)`` returns. A
    sampler for the ordinary equation is run over its times reversed, which inverts the equation and with it the sampler
    up to the error of the steps; ``fixed_point`` undoes the steps of `DDIM` instead.

    Arguments:
        denoiser: what predicts data or noise.
        x: a sample, or the pair of `BDIA`.
        args: passed on to the denoiser.
        solver: a sampler without noise.
        num_steps, grid, t_start, t_end: those of `sample`.
        adjoint: that of `sample`.
        fixed_point: for `DDIM`, the number of iterations for each step that is undone, each with one evaluation. Where
            the last one still moves the state by a thousandth of its size the result is an error, in a trace NaN.
        return_state: for `BDIA`, return the pair of the noise and the state one knot before it, which `sample` takes.
        unroll: that of `sample`.

    Returns:
        The noise, an array like x.

    Raises:
        ValueError, TypeError: for wrong shapes, names and static values, samplers with noise, and an end without any.
        SolveError: outside of a trace, if the noise is not finite, or ``fixed_point`` iterations did not converge.

    Warns:
        SdeflowWarning: if rounding errors of `BDIA` with this gamma grow beyond a thousandth of the state.

    Example:
        >>> import jax.numpy as jnp, sdeflow as sf
        >>> edm = sf.diffusion.EDM()
        >>> normal = sf.diffusion.Denoiser(lambda t, x, args: x / (1 + t**2), edm, prediction="data")
        >>> x, ddim = jnp.array([0.5]), sf.diffusion.DDIM()
        >>> there = sf.diffusion.invert(normal, x, solver=ddim, num_steps=40, fixed_point=20)
        >>> back = sf.diffusion.sample(normal, there, solver=ddim, num_steps=40)
        >>> bool(abs(back - x) < 1e-4)
        True
    """
    x, base = start_of(denoiser, x, solver, return_state)
    check_adjoint(adjoint, solver)
    check_unroll(unroll, adjoint)
    _refuse_noise(solver)
    schedule = denoiser.schedule
    times = solver.times(schedule, num_steps, grid, t_end, t_start)
    times = check_noisy(schedule, times)
    check_one_sample(x, denoiser)
    if isinstance(solver, BDIA):
        lost = lost_digits(solver.gamma, times.shape[0] - 1, x.dtype)
        if lost > 1e-3:
            warn(
                f"undoing {times.shape[0] - 1} steps of BDIA with gamma={solver.gamma:g} magnifies rounding to about "
                f"{lost:.1g} of the state: use gamma=1, fewer steps or 64-bit floats."
            )
        table = solver.inverse(schedule, times)
        table = table if base is None else table.drop(1)
        return _followed(denoiser, table, x, base, args, None, adjoint, return_state, unroll=unroll)
    if fixed_point:
        if isinstance(fixed_point, bool) or not isinstance(fixed_point, int) or fixed_point < 1:
            raise ValueError(f"fixed_point must be a positive number of iterations, got {fixed_point!r}.")
        if not isinstance(solver, Multistep) or solver.order > 1 or solver.corrector:
            raise ValueError("fixed_point undoes the steps of order 1 alone: use it with DDIM().")
        # In this form an iteration changes by what the noise changes, not by 1 / sigma of it.
        table = table_of(Multistep(1, "noise"), schedule, times, grid, num_steps)
        out, undone = _undo(
            denoiser, table, x, args, policy(adjoint, table, x), fixed_point, _written_out(unroll, table)
        )
        if is_concrete(undone) and not bool(undone):
            raise SolveError(RESULTS.nonlinear_max_steps_reached, _NOT_UNDONE)  # pyright: ignore[reportArgumentType]
        check_finite(out)
        return out
    if isinstance(solver, Singlestep) and solver.fast:
        raise ValueError('steps="fast" is made for one direction: invert with steps="single" or "multi".')
    table = table_of(solver, schedule, times[::-1], grid, num_steps)
    return _followed(denoiser, table, x, base, args, None, adjoint, False, unroll=unroll)


def check_noisy(schedule: Any, times: Any) -> Any:
    """Refuse to go back from where there is no noise: the times, which are NaN where traced ones end there.

    Raises:
        ValueError: if the last of the times is known to be such.
    """
    if not isinstance(times, np.ndarray):
        return times * jnp.where(jnp.isfinite(schedule.log_snr(jax.lax.stop_gradient(times[-1]))), 1, jnp.nan)
    if noiseless(schedule, times[-1]):
        raise ValueError(
            f"there is no noise at t={times[-1]:g}, so nothing leads back from there: pass a larger t_end=."
        )
    return times


def _moves(denoiser: Any, table: Table, times: Any, solver: Any, corrector: Any, constraint: Any) -> Moves | None:
    """The moves between steps, if there are any.

    Raises:
        TypeError: for what is none.
        ValueError: for samplers that cannot take them.
    """
    if corrector is None and constraint is None:
        return None
    if not isinstance(corrector, AbstractCorrector | None):
        raise TypeError(f"corrector must be one such as sf.diffusion.Langevin(), got {type(corrector).__name__}.")
    if not isinstance(constraint, AbstractConstraint | None):
        raise TypeError(
            f"constraint must be one such as sf.diffusion.Replacement(value, known), got {type(constraint).__name__}."
        )
    if table.fresh is not None or table.two_point or table.fix is not None:
        raise ValueError(
            f"{type(solver).__name__} with these options keeps more than the state between evaluations, so nothing "
            "else may move it: corrector and constraint go with DDIM, DEIS, DPMSolver, DPMSolverPP and iPNDM."
        )
    return Moves(denoiser, corrector, constraint, times)


def _check_noise(noise: Any, table: Table, x: Array, solver: Any) -> Array:
    """The noise as an array.

    Raises:
        ValueError: if the sampler takes none, or of another shape.
    """
    if not table.draws:
        raise ValueError(f"{type(solver).__name__} adds no noise with these options: drop noise=.")
    noise, wanted = jnp.asarray(noise, x.dtype), (table.num_draws, *x.shape)
    if noise.shape != wanted:
        raise ValueError(f"noise must have shape {wanted}, one array for each row of the sampler, got {noise.shape}.")
    return noise


def start_of(denoiser: Any, x: Any, solver: Any, return_state: bool) -> tuple[Array, Array | None]:
    """The state to start from, and for a pair its neighbour."""
    check_denoiser(denoiser)
    if not isinstance(solver, AbstractSampler):
        raise TypeError(f"solver must be a sampler such as sf.diffusion.UniPC(3), got {solver!r}.")
    if return_state and not isinstance(solver, BDIA):
        raise ValueError(f"return_state=True is for BDIA, whose state is a pair, not for {type(solver).__name__}.")
    if isinstance(x, tuple):
        if not isinstance(solver, BDIA) or len(x) != 2:
            raise ValueError("a pair of states is for BDIA: the state at the end of the grid, and its neighbour.")
        end, inner = (_floating(one) for one in x)
        if end.shape != inner.shape or end.dtype != inner.dtype:
            raise ValueError(f"the states of a pair must be alike, got {end.shape} and {inner.shape}.")
        check_mean(denoiser.schedule, inner.shape)
        return inner, end
    x = _floating(x)
    check_mean(denoiser.schedule, x.shape)
    return x, None


def _floating(x: Any) -> Array:
    if not isinstance(x, jax.Array | np.ndarray):
        raise TypeError(f"the state must be an array, got {type(x).__name__}.")
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"the state must be of a real floating dtype, got {x.dtype}.")
    return x


def check_adjoint(adjoint: Any, solver: Any) -> None:
    """Refuse what differentiates no sampler, or not this one.

    Raises:
        ValueError: always then.
    """
    if isinstance(adjoint, ReversibleAdjoint) and not isinstance(solver, BDIA):
        raise ValueError(  # noqa: TRY004
            f"ReversibleAdjoint undoes steps, which those of {type(solver).__name__} cannot be: use BDIA()."
        )
    if adjoint is not None and not isinstance(adjoint, DiscreteAdjoint | ReversibleAdjoint):
        raise ValueError(
            f"adjoint must be sf.adjoints.DiscreteAdjoint(...), ReversibleAdjoint() or None, got "
            f"{type(adjoint).__name__}."
        )


def check_unroll(unroll: Any, adjoint: Any) -> None:
    """Refuse what is no number of evaluations, and the reverse pass that cannot be unrolled.

    Raises:
        ValueError: always then.
    """
    if not isinstance(unroll, bool | int) or (unroll is not False and unroll < 1):
        raise ValueError(f"unroll must be True, False or a positive number of evaluations, got {unroll!r}.")
    if isinstance(adjoint, ReversibleAdjoint) and (unroll is True or unroll > 1):
        raise ValueError("ReversibleAdjoint undoes steps in a loop: unroll= goes with DiscreteAdjoint().")


def _written_out(unroll: int | bool, table: Table) -> int:
    # A number, as True and 1 are the same key of what was compiled before.
    return table.num_rows if unroll is True else max(int(unroll), 1)


def _check_signal(denoiser: Any, times: Any) -> None:
    """Refuse to ask for the data in pure noise what predicts the noise alone.

    Raises:
        ValueError: always then.
    """
    schedule = denoiser.schedule
    if not schedule.ends_without_signal or not isinstance(times, np.ndarray) or times[0] < schedule.t_max:
        return

    def look(node: Any) -> bool:
        if isinstance(node, Denoiser) and node.prediction in ("noise", "score"):
            raise ValueError(
                f"there is no signal at t={times[0]:g}, where a network with prediction={node.prediction!r} says "
                "nothing of the data: pass an earlier t_start=, or a network that predicts data, velocity or flow."
            )
        return False

    jax.tree.leaves(denoiser, is_leaf=look)


def _planned(
    solver: AbstractSampler, schedule: Any, num_steps: int | None, grid: Any, t_end: Any, t_start: Any
) -> tuple[Any, Table]:
    """The times that were asked for, and the table over them."""
    times = solver.times(schedule, num_steps, grid, t_end, t_start)
    return times, table_of(solver, schedule, times, grid, num_steps)


def table_of(solver: AbstractSampler, schedule: Any, times: Any, grid: Any, num_steps: int | None) -> Table:
    """The table: on the host, or for traced times compiled as one program."""
    name = grid if isinstance(grid, str) else None
    if isinstance(times, np.ndarray):
        return solver.table(schedule, times, name, num_steps)
    return _traced_table(solver, schedule, times, name, num_steps)


@eqx.filter_jit
def _traced_table(solver: AbstractSampler, schedule: Any, times: Any, name: Any, num_steps: int | None) -> Table:
    return solver.table(schedule, times, name, num_steps)


def policy(adjoint: Any, table: Table, x: Array) -> Any:
    """What a gradient keeps."""
    if isinstance(adjoint, ReversibleAdjoint):
        return adjoint
    if adjoint is None:
        adjoint, _ = choose_adjoint([x] * (table.width + 1), table.num_rows, None)
    return adjoint.checkpoints


def _refuse_noise(solver: Any) -> None:
    if any(getattr(solver, name, 0) for name in ("tau", "eta", "churn")):
        raise ValueError(f"{type(solver).__name__} adds noise with these options, so it cannot be inverted.")


def _followed(
    denoiser: Any,
    table: Table,
    x: Array,
    base: Array | None,
    args: Any,
    key: Any,
    adjoint: Any,
    pair: bool,
    noise: Any = None,
    moves: Any = None,
    unroll: int | bool = 1,
) -> Any:
    """What the table leads to.

    Raises:
        ValueError: if the table was made for states of another shape.
    """
    made_for = np.shape(table.keep)[1:]
    if made_for and made_for != x.shape:
        raise ValueError(
            f"the statistics are for states of shape {made_for}, but the state has shape {x.shape}: use jax.vmap for "
            "a batch."
        )
    options = {"given": noise, "moves": moves, "unroll": _written_out(unroll, table)}
    out = run(denoiser, table, x, base, args, key, policy(adjoint, table, x), **options)
    check_finite(out.x)
    return (out.x, out.base) if pair else out.x


def check_finite(x: Array) -> None:
    """Raise outside of a trace, if there is something to raise."""
    if is_concrete(x) and not bool(jnp.isfinite(x).all()):
        result: Any = RESULTS.nonfinite
        raise SolveError(result, _NOT_FINITE)


@eqx.filter_jit
def run(
    denoiser: Any,
    table: Table,
    x: Array,
    base: Any,
    args: Any,
    key: Any,
    checkpoints: Any,
    *,
    given: Any = None,
    through: Any = None,
    moves: Any = None,
    unroll: int = 1,
) -> Walked:
    """`follow` for states as they are, compiled."""
    mean = jnp.asarray(denoiser.schedule.mean, x.dtype)
    base = None if base is None else base - mean
    if isinstance(checkpoints, ReversibleAdjoint):
        out = follow_to_undo(table, denoiser, x - mean, base, args, checkpoints.max_defect)
    else:
        through = None if through is None else through - mean
        options = {"given": given, "through": through, "moves": moves, "unroll": unroll}
        out = follow(table, denoiser, x - mean, base, args, key, checkpoints, **options)
    return Walked(out.x + mean, None if out.base is None else out.base + mean, out.noise)


@eqx.filter_jit
def _undo(
    denoiser: Any, table: Table, x: Array, args: Any, checkpoints: Any, iterations: int, unroll: int
) -> tuple[Array, Array]:
    """Undo steps of order 1, the last first: x = (x' - out m(x)) / keep, by iteration, and whether that converged.

    An iteration starts with the noise that undid the step before.
    """
    mean = jnp.asarray(denoiser.schedule.mean, x.dtype)
    rows = jax.tree.map(lambda a: a[::-1], table.cast(x.dtype))
    tolerance = max(_DEFECT, 16 * float(jnp.finfo(x.dtype).eps))

    def undone(carry: tuple[Array, Array, Array], row: Table) -> tuple[tuple[Array, Array, Array], None]:
        after, noise, okay = carry
        before = lambda noise: (after - row.out[0] * noise) / row.keep

        def improve(carry: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
            noise = carry[1]
            return (noise, read(row, denoiser, row.t, before(noise), args)), None

        (last, noise), _ = jax.lax.scan(
            improve, (noise, noise), None, iterations, unroll=iterations if unroll > 1 else 1
        )
        new = before(noise)
        moved, size = (jnp.abs(jax.lax.stop_gradient(a)).max() for a in (new - before(last), new))
        return (new, noise, okay & (moved <= tolerance * size)), None

    x = x - mean
    noise = read(table, denoiser, rows.t[0], x, args)
    start = (x, noise, jnp.isfinite(x).all())
    (x, _, okay), _ = checkpointed_scan(undone, start, rows, table.num_rows, checkpoints, unroll)
    # Not a number rather than a wrong one, derivatives too.
    flag = jnp.asarray(okay, x.dtype)
    return x * (flag / flag) + mean, okay
