"""The one problem in sdeflow, in diffrax as it comes, and in diffrax on our path.

Each function returns the last state, or with ``save`` all n + 1 states, and draws its own noise from ``key``.
"""

from collections.abc import Callable

import diffrax
import jax
import jax.numpy as jnp
import lineax
import numpy as np

import sdeflow as sf

from . import _problems as problems
from ._problems import Size


def times(size: Size, save: bool) -> np.ndarray:
    """The requested times, known on the host: the ends, or every grid point."""
    return np.linspace(0.0, 1.0, size.steps + 1 if save else 2)


def sdeflow(size: Size, params: dict, y0: jax.Array, key: jax.Array, *, save: bool = False) -> jax.Array:
    """Ours, as a user writes it; ``adjoint=None`` chooses how it is differentiated."""
    equation = sf.SDE(problems.drift, problems.diffusion)
    sol = sf.solve(
        equation,
        y0,
        times(size, save),
        args=params,
        key=key,
        dt0=size.step_size,
        solver=diffrax.Euler(),
    )
    return sol.ys if save else sol.final


def grid_path(size: Size, y0: jax.Array, key: jax.Array) -> diffrax.AbstractBrownianPath:
    """Our Brownian path over the grid of the problem."""
    grid = sf.grids.through(times(size, False), dt0=size.step_size)
    return sf.paths.GridBrownian(grid, jax.ShapeDtypeStruct(y0.shape, y0.dtype), key=key)


def sdeflow_increments(size: Size, y0: jax.Array, key: jax.Array) -> jax.Array:
    """The increments (n, B, D) of our path: given these, the hand scan must agree with us."""
    path = grid_path(size, y0, key)
    return jax.vmap(path.evaluate)(jnp.asarray(path.grid.left), jnp.asarray(path.grid.right))


def diffrax_default(size: Size, params: dict, y0: jax.Array, key: jax.Array, *, save: bool = False) -> jax.Array:
    """The way diffrax comes, every default kept: ``VirtualBrownianTree``, recursive checkpointing."""
    path = diffrax.VirtualBrownianTree(
        0.0, 1.0, tol=size.step_size / 2, shape=jax.ShapeDtypeStruct(y0.shape, y0.dtype), key=key
    )
    return _diffeqsolve(size, _terms(path), params, y0, save)


def diffrax_our_path(size: Size, params: dict, y0: jax.Array, key: jax.Array, *, save: bool = False) -> jax.Array:
    """The loop and the adjoint of diffrax; only the Brownian path is ours."""
    return _diffeqsolve(size, _terms(grid_path(size, y0, key)), params, y0, save)


def _terms(path: diffrax.AbstractBrownianPath) -> diffrax.MultiTerm:
    # the batch is inside the state, diffrax's faster layout
    def diffusion(t: jax.Array, y: jax.Array, args: dict) -> lineax.AbstractLinearOperator:
        return lineax.DiagonalLinearOperator(problems.diffusion(t, y, args))

    return diffrax.MultiTerm(diffrax.ODETerm(problems.drift), diffrax.ControlTerm(diffusion, path))


def _diffeqsolve(size: Size, terms: diffrax.MultiTerm, params: dict, y0: jax.Array, save: bool) -> jax.Array:
    saveat = diffrax.SaveAt(ts=times(size, True).astype(np.float32)) if save else diffrax.SaveAt(t1=True)
    sol = diffrax.diffeqsolve(terms, diffrax.Euler(), 0.0, 1.0, size.step_size, y0, args=params, saveat=saveat)
    return sol.ys if save else sol.ys[-1]


def hand_draws(
    size: Size, params: dict, y0: jax.Array, key: jax.Array, *, remat: bool = False, save: bool = False
) -> jax.Array:
    """The hand-written scan that draws its noise."""
    return problems.hand_scan(size, params, y0, problems.draw(size, key), remat=remat, save=save)


#: the hand-written scan that is handed its noise, drawn outside the timing
hand_given = problems.hand_scan


def program(implementation: Callable, size: Size, *, gradient: bool, **options: bool) -> Callable:
    """The loss as a function of (params, y0, key or increments), with its gradient if asked."""

    def value(params: dict, y0: jax.Array, noise: jax.Array) -> jax.Array:
        return problems.loss(implementation(size, params, y0, noise, **options))

    return jax.value_and_grad(value, argnums=(0, 1)) if gradient else value
