"""The grid: a list of steps of static length, built on the host, all padding at its end.

Row ``i`` is one step from ``left[i]`` to ``right[i]``. Padding rows have ``live = False`` and repeat the last live
step, because a step of length zero is not the identity for every solver. ``save[j]`` says how many live steps come
before the ``j``-th requested time, so ``save[0] = 0`` and ``save[-1]`` is the number of live steps.
"""

from typing import Any

import equinox as eqx
import jax
import jax.dtypes
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from .._compat import is_concrete

ULPS = 8  # A step shorter than this many units in the last place of its time is noise, not a step.


def time_dtype() -> Any:
    """The floating dtype that times take when they reach the device."""
    return jax.dtypes.canonicalize_dtype(np.float64)


def check_resolution(left: np.ndarray, right: np.ndarray, dtype: Any) -> None:
    """Refuse steps that the dtype cannot tell apart from rounding.

    Raises:
        ValueError: if a step is shorter than 8 units in the last place of the largest time.
    """
    if left.size:
        largest = max(np.abs(left).max(), np.abs(right).max())
        check_step(np.abs(right - left).min(), largest, dtype, "shortest step of the grid")


def check_step(shortest: float, largest: float, dtype: Any, what: str) -> None:
    """Refuse a step that the dtype cannot tell apart from rounding.

    Arguments:
        shortest: the length of the step.
        largest: the largest time.
        what: what the step is called in the error.

    Raises:
        ValueError: if it is shorter than 8 units in the last place of the largest time.
    """
    limit = ULPS * np.spacing(np.asarray(largest, dtype=dtype))
    if shortest < limit:
        raise ValueError(
            f"The {what} is {shortest:.3g}, below {ULPS} units in the last place of the largest "
            f"time {largest:.6g} in {np.dtype(dtype).name} ({float(limit):.3g}): shift and scale the times to O(1), "
            "or switch on 64-bit floats."
        )


def beside(t: Any, towards: Any) -> Any:
    """The next number of the dtype of ``t`` in that direction, which is normal: XLA takes smaller ones for zero."""
    xp = jnp if isinstance(t, jax.Array) else np
    tiny = np.finfo(t.dtype).tiny
    # A shift by a constant, so that gradients in the times go through; nextafter has none.
    at, towards = jax.lax.stop_gradient((t, towards)) if xp is jnp else (t, towards)
    near = xp.where(at == 0, xp.where(towards > at, tiny, -tiny), xp.nextafter(at, towards))
    return t + (near - at)


def cast(grid: "Grid", dtype: Any) -> "Grid":
    """The grid on the device, its times of this dtype; the ends on either side of a jump stay on their sides."""
    left, right = jnp.asarray(grid.left, dtype), jnp.asarray(grid.right, dtype)
    if grid.jump is not None:
        jump, last = jnp.asarray(grid.jump), jnp.asarray(grid.live).sum() - 1
        closed = jump[1:] & (right[:-1] == left[1:])
        # Rounding may have put the first and the last end onto their jumps again; one unit more does no harm.
        at_left = jnp.concatenate([jump[:1], closed])
        at_right = jnp.concatenate([closed, jnp.zeros(1, bool)])
        if grid.ends_at_jump is not None:
            at_right |= jnp.asarray(grid.ends_at_jump) & (jnp.arange(left.shape[0]) >= last)
        left, right = (
            jnp.where(at_left, beside(left, right), left),
            jnp.where(at_right, beside(right, left), right),
        )
    return Grid(left, right, grid.live, grid.save, grid.jump, grid.ends_at_jump)


class Grid(eqx.Module):
    """A list of steps of static length N, with all padding at the end.

    Usually built by `sdeflow.grids.through`. Arrays built on the host stay float64 NumPy arrays until a solve casts
    them, so the same grid serves every precision. A batch of grids is one ``Grid`` whose arrays lead with the batch
    axis (see `sdeflow.grids.stack`), to be used under ``jax.vmap``.

    Arguments:
        left: shape (N,), where each step begins.
        right: shape (N,), where each step ends.
        live: shape (N,), False for padding, which comes last and repeats the last live step.
        save: shape (n,), how many live steps precede each requested time.
        jump: shape (N,), whether the field may be discontinuous where the step begins; None if it never is. Such a step
            begins just after the discontinuity, and the one before ends just before it.
        ends_at_jump: shape (), whether the field may be discontinuous where the last live step ends; None if it is not.

    Raises:
        ValueError: for concrete arrays whose shapes disagree, whose steps do not all go one way or leave gaps,
            whose padding is not at the end, or whose steps are below the resolution of the default float dtype.

    Example:
        >>> import sdeflow as sf
        >>> sf.grids.through([0.0, 0.5, 2.0], dt0=0.5)
        Grid(4 steps from 0 to 2, 3 saved times)
    """

    left: Float[Array | np.ndarray, "*batch N"]
    right: Float[Array | np.ndarray, "*batch N"]
    live: Bool[Array | np.ndarray, "*batch N"]
    save: Int[Array | np.ndarray, "*batch n"]
    jump: Bool[Array | np.ndarray, "*batch N"] | None = None
    ends_at_jump: Bool[Array | np.ndarray, "*batch"] | None = None

    def __check_init__(self):
        arrays = [x for x in self._arrays if x is not None]
        if not all(hasattr(x, "shape") for x in arrays) or not is_concrete(*arrays) or np.ndim(self.left) != 1:
            return
        left, right, live, save = (np.asarray(x) for x in (self.left, self.right, self.live, self.save))
        if not left.shape == right.shape == live.shape or left.size == 0:
            raise ValueError(
                f"left, right and live must be of one shape (N,) with N >= 1, got {left.shape}, {right.shape}, "
                f"{live.shape}."
            )
        count = int(live.sum())
        if count == 0 or not live[:count].all():
            raise ValueError("The padding of a grid (live = False) must come after all its live steps.")
        steps = right[:count] - left[:count]
        if not (np.isfinite(steps).all() and ((steps > 0).all() or (steps < 0).all())):
            bad = int(np.argmax(~(steps * np.sign(steps[0]) > 0)))
            raise ValueError(
                f"Steps must be finite and all go one way; step {bad} is from {left[bad]} to {right[bad]}."
            )
        # Two units in the last place are allowed: a step may end just before a jump, at which the next one begins.
        apart = np.abs(left[1:count] - right[: count - 1])
        slack = 1e-3 * np.abs(steps).min() + 2 * np.spacing(np.abs(right[:count]).max().astype(time_dtype()))
        if (apart > slack).any():
            bad = int(np.argmax(apart > slack)) + 1
            raise ValueError(
                f"Steps must join: step {bad} begins at {left[bad]:g}, but step {bad - 1} ends at {right[bad - 1]:g}."
            )
        if save.ndim != 1 or save.size < 1 or (np.diff(save) < 0).any() or save[0] != 0 or save[-1] != count:
            raise ValueError(f"save must rise from 0 to the number of live steps ({count}), got {save.tolist()[:8]}.")
        check_resolution(left[:count], right[:count], time_dtype())

    @property
    def num_rows(self) -> int:
        """N, padding included: a static number."""
        return self.left.shape[-1]

    @property
    def num_steps(self) -> Any:
        """The number of live steps."""
        return self.live.sum(axis=-1)

    @property
    def t0(self) -> Any:
        """Where the first step begins."""
        return self.left[..., 0]

    @property
    def t1(self) -> Any:
        """Where the last live step ends."""
        return self.right[..., -1]

    @property
    def is_concrete(self) -> bool:
        """Whether the grid is a single one whose numbers can be read on the host."""
        return is_concrete(*(x for x in self._arrays if x is not None)) and (np.ndim(self.left) == 1)

    @property
    def _arrays(self) -> tuple[Any, ...]:
        return (self.left, self.right, self.live, self.save, self.jump, self.ends_at_jump)

    @property
    def may_jump(self) -> bool:
        """Whether the field may jump anywhere, as far as that is known."""
        flags = [x for x in (self.jump, self.ends_at_jump) if x is not None]
        return bool(flags) and not (is_concrete(*flags) and not any(np.any(np.asarray(x)) for x in flags))

    def pad(self, num_rows: int) -> "Grid":
        """The same grid with padding added up to ``num_rows`` rows.

        Raises:
            ValueError: if the grid already has more rows.
        """
        extra = num_rows - self.num_rows
        if extra < 0:
            raise ValueError(f"The grid has {self.num_rows} rows already, which is more than num_steps={num_rows}.")
        if extra == 0:
            return self
        xp = np if self.is_concrete else jnp
        repeat = lambda x: xp.concatenate([x, xp.repeat(x[..., -1:], extra, axis=-1)], axis=-1)
        live = xp.concatenate([self.live, xp.zeros((*self.live.shape[:-1], extra), bool)], axis=-1)
        jump = None if self.jump is None else repeat(self.jump)
        return Grid(repeat(self.left), repeat(self.right), live, self.save, jump, self.ends_at_jump)

    def coarsen(self, k: int) -> "Grid":
        """Merge every ``k`` consecutive steps into one; for studies of convergence on one Brownian path.

        Raises:
            ValueError: if the grid is traced or padded, or if ``k`` does not divide the steps before every saved time.
        """
        if not self.is_concrete or not np.asarray(self.live).all():
            raise ValueError("Only a concrete grid without padding can be coarsened.")
        save = np.asarray(self.save)
        if k < 1 or (save % k).any():
            raise ValueError(f"k={k} must divide the number of steps before every saved time, {save.tolist()[:8]}.")
        left, right = np.asarray(self.left), np.asarray(self.right)
        jump = None
        if self.jump is not None:
            jump = np.asarray(self.jump).reshape(-1, k)
            if jump[:, 1:].any():
                raise ValueError(f"Merging {k} steps would hide a jump inside a step.")
            jump = jump[:, 0]
        ones = np.ones(left.size // k, bool)
        return Grid(left[::k], right[k - 1 :: k], ones, save // k, jump, self.ends_at_jump)

    def __repr__(self) -> str:
        if not self.is_concrete:
            return f"Grid({self.num_rows} rows, traced or batched, {self.save.shape[-1]} saved times)"
        steps = int(np.asarray(self.num_steps))
        padding = "" if steps == self.num_rows else f" (+{self.num_rows - steps} of padding)"
        return f"Grid({steps} steps{padding} from {self.t0:g} to {self.t1:g}, {self.save.shape[-1]} saved times)"
