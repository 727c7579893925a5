r"""``Table``: a sampler as numbers, one row for each evaluation of the denoiser.

A row evaluates at (t, x) and keeps the output m; with the outputs m_0 = m, m_1, ... from the newest on,

    base' = x + sum_j fix_j m_j + fix_offset        (or base, within a step of several stages)
    x'    = keep base' + back base + sum_j out_j m_j + offset + noise z,      z ~ N(0, I).

All samplers of this room are such tables. Multistep methods have ``base' = x``; a corrector fills ``fix``, with what it
adds to the predicted point once the output there is known; stages keep the base, where their step began; two-point
methods fill ``back``. Weights may be arrays like the state, for methods that treat its components differently.
"""

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from ..walking import Checkpoints, checkpointed_scan
from ._denoiser import AbstractDenoiser
from ._schedule import AbstractSchedule, module_of


class Table(eqx.Module):
    """The rows of a sampler; None stands for zeros, and ``fresh`` None for True.

    Arguments:
        t: shape (R,), when the denoiser is evaluated.
        keep: shape (R,) or (R, *state).
        out: shape (R, K) or (R, K, *state).
        noise: shape (R,).
        fix: like ``out``.
        back: shape (R,).
        fresh: shape (R,), whether a step begins with this row.
        offset, fix_offset: shape (R, *state).
        reads: "noise" or "data", or None for a mixture of state and noise, ``read_x x + read_noise eps``.
        read_x, read_noise: shapes (R, *state) and (R,).
        start: what happens to the state before the first row, a factor and the deviation of noise; None for nothing.
        width: K, how many outputs are kept.
    """

    t: Any
    keep: Any
    out: Any
    noise: Any = None
    fix: Any = None
    back: Any = None
    fresh: Any = None
    offset: Any = None
    fix_offset: Any = None
    reads: Literal["noise", "data"] | None = eqx.field(default="noise", static=True)
    read_x: Any = None
    read_noise: Any = None
    start: tuple[Any, Any] | None = None
    width: int = eqx.field(default=1, static=True)

    @property
    def num_rows(self) -> int:
        """R, the number of evaluations."""
        return self.t.shape[0]

    @property
    def draws(self) -> bool:
        """Whether the sampler draws noise."""
        return self.noise is not None or self.start is not None

    @property
    def num_draws(self) -> int:
        """How many normal arrays like the state it takes: one a row, and one before the first if noise is there."""
        return (0 if self.noise is None else self.num_rows) + (self.start is not None)

    @property
    def two_point(self) -> bool:
        """Whether a state is a pair."""
        return self.back is not None

    def cast(self, dtype: Any) -> "Table":
        """The table on the device, its numbers of this dtype."""
        put = lambda x: jnp.asarray(x) if x.dtype == bool else jnp.asarray(x, dtype)
        return jax.tree.map(put, self)

    def drop(self, count: int) -> "Table":
        """The table without its first rows."""
        return jax.tree.map(lambda x: x[count:] if np.ndim(x) else x, self)


class Points(eqx.Module):
    """Times with what the schedule says of them; ``clean`` is where there is no noise."""

    t: Any
    log_alpha: Any
    log_sigma: Any
    l: Any
    clean: Any

    @classmethod
    def at(cls, schedule: AbstractSchedule, t: Any) -> "Points":
        """The points at these times."""
        with np.errstate(divide="ignore"):
            log_alpha, log_sigma = schedule.log_alpha(t), schedule.log_sigma(t)
            l = log_alpha - log_sigma
            return cls(t, log_alpha, log_sigma, l, module_of(l)[0].isposinf(l))

    @classmethod
    def along(cls, schedule: AbstractSchedule, times: Any) -> "Points":
        """The points between the steps of a sampler.

        Where traced times end without noise, the last point has finite numbers of a time nearby in place of infinite
        ones, which what is made of them leaves out: derivatives in the other times stay finite, that in the end is 0.
        """
        if isinstance(times, np.ndarray):
            return cls.at(schedule, times)
        end = cls.at(schedule, jax.lax.stop_gradient(times[-1:]))
        clean = end.clean[0]
        near = jax.lax.stop_gradient(times[-2]) / 2
        points = cls.at(schedule, times.at[-1].set(jnp.where(clean, near, times[-1])))
        log_alpha = points.log_alpha.at[-1].set(jnp.where(clean, end.log_alpha[0], points.log_alpha[-1]))
        marks = jnp.zeros(times.shape, bool).at[-1].set(clean)
        return cls(times, log_alpha, points.log_sigma, points.l, marks)

    def __getitem__(self, i: Any) -> "Points":
        return Points(self.t[i], self.log_alpha[i], self.log_sigma[i], self.l[i], self.clean[i])

    @property
    def noiseless(self) -> Any:
        """Whether there is no noise at the last point; traced for traced times."""
        return bool(self.clean[-1]) if isinstance(self.clean, np.ndarray) else self.clean[-1]

    def __len__(self) -> int:
        return self.t.shape[0]


def joined(parts: list[tuple[list[int], Any]], width: int | None = None) -> Any:
    """Rows that were made in groups, in their order; missing weights at the end of a row are 0."""
    xp, _ = module_of(parts[0][1])
    arrays = []
    for _, array in parts:
        if width is not None:
            pads = [(0, 0), (0, width - array.shape[1])] + [(0, 0)] * (array.ndim - 2)
            array = xp.pad(array, pads)
        arrays.append(array)
    order = np.argsort(np.concatenate([np.asarray(rows) for rows, _ in parts]))
    return xp.concatenate(arrays)[order]


class Walked(eqx.Module):
    """Where a table leads: the last state, for two-point methods the one before, and noise that was asked for."""

    x: Array
    base: Array | None
    noise: Array | None = None


def follow(
    table: Table,
    denoiser: AbstractDenoiser,
    x: Array,
    base: Array | None,
    args: Any,
    key: PRNGKeyArray | None,
    checkpoints: Checkpoints,
    *,
    given: Array | None = None,
    through: Array | None = None,
    moves: Any = None,
    unroll: int = 1,
) -> Walked:
    """Follow the rows of a table.

    Arguments:
        x: the state, less the schedule's mean.
        base: the state before it, for two-point methods; None otherwise.
        key: for the noise, if there is any.
        given: shape (num_draws, *state), noise to take instead.
        through: of the same shape, states that noise is to lead through, which is then returned.
        moves: what else moves the state, between steps; only where each step is one row.
        unroll: how many rows are written out in the body of the loop.
    """
    table = table.cast(x.dtype)
    if moves is not None:
        key, for_moves = (None, None) if key is None else jr.split(key)
        moves = moves.for_rows(table.num_rows, x.dtype, for_moves)
        x = moves.begin(x, args)
    replayed = given if through is None else through
    if replayed is not None:
        first, normals = (replayed[0], replayed[1:]) if table.start is not None else (None, replayed)
    else:
        first, normals = _draw(table, x, key)
    found = None
    if table.start is not None:
        factor, size = table.start
        if through is not None:
            found = first = _leading(factor * x, size, first)
        x = factor * x + size * first
    holds = table.back is not None or table.fresh is not None
    base = (x if base is None else base) if holds else None
    # Anything finite that lies where the state lies: weights of outputs that are not there yet are 0.
    outputs = jnp.broadcast_to(x, (table.width, *x.shape))
    rows = (table.t, table.keep, table.out, table.noise, table.fix, table.back, table.fresh, table.offset,
            table.fix_offset, table.read_x, table.read_noise, normals, moves.rows if moves else None)  # fmt: skip

    def body(carry: Any, row: Any) -> Any:
        x, base, outputs = carry
        t, keep, out, noise, fix, back, fresh, offset, fix_offset, read_x, read_noise, normal, move = row
        if moves is not None:
            x = moves.before(move, t, x, args)
        outputs = jnp.concatenate([read(table, denoiser, t, x, args, read_x, read_noise)[None], outputs[:-1]])
        begun = x
        if fix is not None:
            begun = begun + _total(fix, outputs)
        if fix_offset is not None:
            begun = begun + fix_offset
        if fresh is not None:
            begun = jnp.where(fresh, begun, base)
        new = keep * begun + _total(out, outputs)
        if back is not None:
            new = new + back * base
        if offset is not None:
            new = new + offset
        if noise is not None:
            if through is not None:
                normal = _leading(new, noise, normal)
            new = new + noise * normal
        if moves is not None:
            new = moves.after(move, new, args, (t, x))
        return (new, begun if holds else None, outputs), normal if through is not None else None

    (x, base, _), led = checkpointed_scan(body, (x, base, outputs), rows, table.num_rows, checkpoints, unroll)
    if found is not None:
        led = jnp.concatenate([found[None], led])
    return Walked(x, base, led)


def _draw(table: Table, x: Array, key: PRNGKeyArray | None) -> tuple[Any, Any]:
    """The noise before the first row, and that of all rows."""
    normals = None
    if table.noise is not None:
        for_rows, key = jr.split(key)  # pyright: ignore[reportArgumentType]
        # Time leads, so that a row's noise does not depend on how many rows there are.
        normals = jr.normal(for_rows, (table.num_rows, *x.shape), x.dtype)
    first = None if table.start is None else jr.normal(key, x.shape, x.dtype)  # pyright: ignore[reportArgumentType]
    return first, normals


def _leading(x: Array, size: Array, target: Any) -> Array:
    """The noise that leads from x to the target; 0 where none is added."""
    return jnp.where(size > 0, (target - x) / jnp.where(size > 0, size, 1), 0)


def _total(weights: Array, outputs: Array) -> Array:
    if weights.ndim == 1:
        return jnp.tensordot(weights, outputs, 1, precision="highest")
    return (weights * outputs).sum(axis=0)


def read(table: Table, denoiser: Any, t: Any, x: Array, args: Any, read_x: Any = None, read_noise: Any = None) -> Array:
    """What is kept of the prediction at the state x, less the mean."""
    mean = jnp.asarray(denoiser.schedule.mean, x.dtype)
    data, noise = denoiser.parts(t, x + mean, args)
    if table.reads is None:
        return read_x * x + read_noise * noise
    return data if table.reads == "data" else noise
