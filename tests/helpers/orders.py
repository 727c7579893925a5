"""Strong and weak orders of convergence, by regression over levels of one Brownian path."""

from collections.abc import Callable, Sequence
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import sdeflow as sf


def slope(steps: Sequence[float], errors: Sequence[float]) -> float:
    """The slope of log(error) over log(step length), by least squares."""
    return float(np.polyfit(np.log(np.asarray(steps)), np.log(np.asarray(errors)), 1)[0])


def path_errors(
    equation: Any,
    solver: Any,
    y0: Any,
    *,
    fine: int,
    factors: Sequence[int],
    keys: Any,
    levy_area: type = diffrax.BrownianIncrement,
    exact: Callable[[Any, Any, Any], Any] | None = None,
    reference: Any = None,
    t1: float = 1.0,
) -> tuple[list[float], np.ndarray]:
    """Signed errors at ``t1`` of solves on coarsenings of one fine Brownian path a key.

    Arguments:
        fine: rows of the fine grid on [0, t1].
        factors: how many fine rows each level merges.
        exact: ``exact(y0, t1, W(t1))``; without it the reference is a solve on the fine path.
        reference: the solver of the fine path.

    Returns:
        The step lengths, and errors of shape (levels, keys, *y0.shape).
    """
    grid = sf.grids.uniform(0.0, t1, fine)
    y0 = jnp.asarray(y0)

    def one(key: Any) -> list[Any]:
        path = sf.paths.GridBrownian(grid, y0, key=key, levy_area=levy_area)
        solve = lambda path, solver: sf.solve(equation, y0, [0.0, t1], path=path, solver=solver).final
        if exact is None:
            truth = solve(path, solver if reference is None else reference)
        else:
            truth = exact(y0, t1, path.table.W.sum(axis=0))
        return [solve(path.coarsen(k), solver) - truth for k in factors]

    errors = jax.jit(jax.vmap(one))(keys)
    return [t1 * k / fine for k in factors], np.asarray(jnp.stack(errors))


def strong_order(*args: Any, **kwargs: Any) -> float:
    """The slope of the root mean square error; the arguments are those of `path_errors`."""
    steps, errors = path_errors(*args, **kwargs)
    assert errors.shape[0] >= 5, "an order needs at least five levels"
    assert errors.shape[1] >= 500, "a strong order needs at least 500 paths"
    return slope(steps, np.sqrt((errors.reshape(errors.shape[0], -1) ** 2).mean(axis=1)))
