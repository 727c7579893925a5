"""What a call of ``solve`` may pass, checked on the host before anything runs: the state, times, noise and counts."""

from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from .._compat import SdeflowWarning, is_concrete, warn
from ..grids import Grid
from ..grids._build import check_count, check_dt0, check_finite, host_times
from ..grids._grid import check_step
from ..walking import loops_over_stages


def check_y0(y0: Any) -> Any:
    """The start as a tree of floating arrays of at least 32 bits.

    Raises:
        TypeError: if it is anything else than an array or a tree of arrays.
    """
    leaves = jtu.tree_leaves(y0)
    bad = [x for x in leaves if not _is_numeric(x)]
    if not leaves or bad or isinstance(y0, list):
        inner = f" with a leaf of type {type(bad[0]).__name__}" if bad and bad[0] is not y0 else ""
        raise TypeError(
            f"y0 must be an array or a tree of arrays, got {type(y0).__name__}{inner}: wrap it in jnp.asarray."
        )

    def one(x: Any) -> Any:
        dtype = jnp.result_type(x)
        if dtype in (jnp.float16, jnp.bfloat16):
            warn(f"y0 is {dtype}, too coarse for solving: it was promoted to float32.", SdeflowWarning)
            return jnp.asarray(x, jnp.float32)
        if jnp.issubdtype(dtype, jnp.inexact):
            return jnp.asarray(x, dtype)
        # Integers become the default float, as in diffrax.
        return jnp.asarray(x, jnp.result_type(float))

    return jtu.tree_map(one, y0)


def _is_numeric(x: Any) -> bool:
    if not eqx.is_array_like(x):
        return False
    try:
        dtype = jnp.result_type(x)
    except TypeError:
        return False
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.number, jnp.bool_))


def check_precision(y0: Any, solver: diffrax.AbstractSolver, delegated: bool) -> None:
    """Refuse a state of several precisions where the steps would make it one.

    Raises:
        ValueError: naming the precisions.
    """
    kinds = sorted({jnp.finfo(x.dtype).dtype.name for x in jtu.tree_leaves(y0)})
    if len(kinds) == 1:
        return
    cure = f"cast all leaves of y0 to {kinds[-1]}"
    if delegated:
        raise ValueError(
            f"y0 has leaves of {' and '.join(kinds)}, which diffrax would make one precision (adaptive steps, events "
            f"and its own adjoints are its): {cure}, or fix the steps and use sf.adjoints.DiscreteAdjoint()."
        )
    if loops_over_stages(solver):
        raise ValueError(
            f"y0 has leaves of {' and '.join(kinds)}, but {type(solver).__name__} keeps its stages in one precision: "
            f"{cure}, or use a solver of few explicit stages such as diffrax.Tsit5()."
        )


def check_real(y0: Any, stochastic: bool) -> None:
    """Refuse noise on a complex state.

    Raises:
        NotImplementedError: naming what to do instead.
    """
    if stochastic and any(jnp.issubdtype(x.dtype, jnp.complexfloating) for x in jtu.tree_leaves(y0)):
        raise NotImplementedError(
            "y0 is complex, which ordinary equations allow but noise does not: solve for the real and imaginary parts "
            "as a state of their own."
        )


def check_ts(ts: Any, *, repeats: bool) -> Any:
    """The requested times, as a NumPy array unless they are traced.

    Inside ``jit`` what is taken of an array of JAX is traced even if the array is not.

    Arguments:
        repeats: whether the last time may be repeated, as padding that a grid accounts for.

    Raises:
        ValueError, TypeError: if they are not of shape (n,), n >= 1, or (unless they are traced) not finite or not
            strictly monotone.
    """
    if not is_concrete(*jtu.tree_leaves(ts)):
        return _check_shape(jnp.asarray(ts))
    try:
        ts = np.asarray(ts, None if isinstance(ts, np.ndarray | jax.Array) else np.float64)
    except (TypeError, ValueError):
        raise TypeError(f"ts must be real numbers, one a requested time, got {ts!r}.") from None
    _check_shape(ts)
    times = np.asarray(ts, np.float64)
    if ts.shape[0] == 1 or repeats:
        check_finite(times)
    else:
        host_times(times)
    return ts


def _check_shape(ts: Any) -> Any:
    if ts.ndim != 1 or ts.shape[0] < 1:
        raise ValueError(
            f"ts must be one-dimensional with at least one time, got shape {ts.shape}; use vmap for batches."
        )
    if not (jnp.issubdtype(ts.dtype, jnp.floating) or jnp.issubdtype(ts.dtype, jnp.integer)):
        raise TypeError(f"ts must be real numbers, one a requested time, got dtype {ts.dtype}.")
    return ts


def check_counts(dt0: Any, grid: Any, steps_per_interval: Any, max_steps: Any) -> None:
    """Check the kinds of what fixes or bounds the steps.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    if max_steps is not None:
        check_count(max_steps, "max_steps")
    if steps_per_interval is not None:
        check_count(steps_per_interval, "steps_per_interval")
    if grid is not None and not isinstance(grid, Grid):
        raise TypeError(f"grid must be a Grid such as sf.grids.through(ts, dt0=0.1), got {type(grid).__name__}.")
    if dt0 is not None and is_concrete(dt0):
        check_dt0(dt0)


def check_first_step(ts: Any, dt0: Any, dtype: Any) -> None:
    """Check the first step of adaptive steps, and that the requested times can be told apart.

    Raises:
        ValueError: for a ``dt0`` of the wrong sign, or steps below the resolution of the times.
    """
    if not is_concrete(ts):
        return
    times = np.asarray(ts, np.float64)
    largest, gaps = np.abs(times).max(), np.diff(times)
    if gaps.size:
        check_step(np.abs(gaps).min(), largest, dtype, "shortest interval of ts")
    if dt0 is not None and is_concrete(dt0):
        dt0 = check_dt0(dt0, gaps[0] if gaps.size else None)
        check_step(abs(dt0), largest, dtype, "first step, dt0,")


def check_enough_steps(ts: Any, max_steps: int | None, record: int | None) -> None:
    """Check that adaptive steps can lead through all requested times, each of which ends a step.

    Arguments:
        record: how many steps are recorded for gradients; None if that is left to the solve.

    Raises:
        ValueError: naming the option that is too small.
    """
    least = len(ts) - 1
    for name, most in (("max_steps", max_steps), ("record", record)):
        if is_concrete(ts) and most is not None and most < least:
            option = "max_steps=" if name == "max_steps" else "DiscreteAdjoint(record=...)"
            raise ValueError(
                f"Adaptive steps end at every requested time, so there are at least {least} of them, and {name} is "
                f"{most}: use {option} with a larger number."
            )


def check_still(grid: Grid | None) -> None:
    """Check a solve of one time, in which nothing moves.

    Raises:
        ValueError: if there is a grid, which has steps.
    """
    if grid is not None:
        raise ValueError(f"The grid saves {grid.save.shape[-1]} times but ts has 1: drop grid=, as nothing moves.")


def check_noise_given(stochastic: bool, raw: bool, key: Any, path: Any) -> Any:
    """Check that a stochastic equation, and no other, is given its noise, once.

    Returns:
        The key, as a JAX array.

    Raises:
        ValueError, TypeError: naming what to pass or to drop.
    """
    if key is not None and path is not None:
        raise ValueError("Pass key or path, not both: the path holds a key of its own.")
    if stochastic and key is None and path is None:
        raise ValueError("A stochastic equation needs noise: pass key=jax.random.key(0), or path=.")
    if not stochastic and path is not None:
        raise ValueError("Only a stochastic equation is driven by a path; drop path=.")
    if raw and key is not None:
        raise ValueError("Raw diffrax terms carry their own noise; drop key=.")
    if not stochastic and key is not None:
        raise ValueError("An ordinary equation has no noise; drop key=.")
    if key is None:
        return None
    if isinstance(key, np.ndarray) and key.dtype == np.uint32:
        key = jnp.asarray(key)
    if not isinstance(key, jax.Array) or not (
        jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or (key.dtype == jnp.uint32 and key.shape[-1:] == (2,))
    ):
        raise TypeError(f"key must be a JAX random key such as jax.random.key(0), got {key!r}.")
    batch = key.shape if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key.shape[:-1]
    if batch:
        raise TypeError(f"key is a batch of keys of shape {batch}: use jax.vmap over keys, one path per call.")
    return key
