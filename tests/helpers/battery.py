"""One battery over every solver: a smooth problem for each kind of noise, solved in every way there is.

``solved(case, how)`` gives the states at the steps, and the gradients of a scalar of them in the start, the arguments
and a parameter that the fields close over. Results are kept, so that several tests may look at the same solve.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np

import sdeflow as sf

# Three intervals of 3, 6 and 2 steps: eleven rows, a prime number.
TS, DT0 = (0.0, 0.3, 1.0, 1.2), 0.13


class Case(NamedTuple):
    """A solver and the kind of noise it is tried with: "none", "ito", "stratonovich", "additive" or "operator"."""

    name: str
    solver: dfx.AbstractSolver
    noise: str
    slow: bool = False


CASES = {
    case.name: case
    for case in (
        Case("Euler", dfx.Euler(), "ito"),
        Case("Heun", dfx.Heun(), "stratonovich"),
        Case("EulerHeun", dfx.EulerHeun(), "stratonovich"),
        Case("Midpoint", dfx.Midpoint(), "stratonovich"),
        Case("Tsit5", dfx.Tsit5(), "none"),
        Case("ShARK", dfx.ShARK(), "additive"),
        Case("SRA1", dfx.SRA1(), "additive"),
        Case("SPaRK", dfx.SPaRK(), "stratonovich"),
        Case("ReversibleHeun", dfx.ReversibleHeun(), "stratonovich"),
        Case("LeapfrogMidpoint", dfx.LeapfrogMidpoint(), "none"),
        Case("ReversibleHeun-ode", dfx.ReversibleHeun(), "none", slow=True),
        Case("Euler-operator", dfx.Euler(), "operator", slow=True),
        Case("ItoMilstein", dfx.ItoMilstein(), "ito", slow=True),
        Case("StratonovichMilstein", dfx.StratonovichMilstein(), "stratonovich", slow=True),
        Case("SEA", dfx.SEA(), "additive", slow=True),
        Case("SlowRK", dfx.SlowRK(), "stratonovich", slow=True),
        Case("GeneralShARK", dfx.GeneralShARK(), "stratonovich", slow=True),
        Case("Ralston", dfx.Ralston(), "stratonovich", slow=True),
        Case("Bosh3", dfx.Bosh3(), "none", slow=True),
        Case("Dopri8", dfx.Dopri8(), "none", slow=True),
        Case("HalfSolver-Tsit5", dfx.HalfSolver(dfx.Tsit5()), "none", slow=True),
    )
}
DEFAULT = [name for name, case in CASES.items() if not case.slow]
SLOW = [name for name, case in CASES.items() if case.slow]


def equation_of(noise: str, parameter: Any) -> Any:
    """A smooth equation on the plane; its drift and diffusion depend on time, state, args and ``parameter``."""
    theta = parameter
    drift = lambda t, y, args: -args * y + theta * jnp.sin(2 * t + y[::-1])
    diagonal = lambda t, y, args: 0.3 + 0.2 * jnp.cos(theta * y + args * t)
    additive = lambda t, y, args: jnp.broadcast_to(0.3 * jnp.cos(theta * t) + 0.1 * args, y.shape)

    def operator(t: Any, y: Any, args: Any) -> Any:
        rows = jnp.stack([jnp.cos(theta * y), jnp.sin(y + args), 0.3 * jnp.ones_like(y)], axis=1)
        return lx.MatrixLinearOperator(0.4 * rows)

    if noise == "none":
        return sf.ODE(drift)
    if noise == "additive":
        return sf.SDE(drift, additive, additive=True)
    if noise == "operator":
        return sf.SDE(drift, operator)
    return sf.SDE(drift, diagonal, interpretation=noise)  # pyright: ignore


def levy_area_of(solver: Any) -> type:
    """What the solver asks of its path."""
    needed = getattr(solver, "minimal_levy_area", dfx.BrownianIncrement)
    areas = (dfx.BrownianIncrement, dfx.SpaceTimeLevyArea, dfx.SpaceTimeTimeLevyArea)
    return next(area for area in areas if issubclass(area, needed))


def path_of(case: Case, grid: sf.grids.Grid, dtype: Any) -> Any:
    """The Brownian path of a case: the same for the same rows, whatever the padding; None without noise."""
    if case.noise == "none":
        return None
    shape, area = (3,) if case.noise == "operator" else (2,), levy_area_of(case.solver)
    path = sf.paths.GridBrownian(grid, jnp.zeros(shape, dtype), key=jax.random.key(7), levy_area=area)
    # In every precision the noise is that of float64, rounded, so that solutions can be compared.
    with jax.enable_x64(True):
        table = sf.paths.GridBrownian(grid, jnp.zeros(shape), key=jax.random.key(7), levy_area=area).table
    return eqx.tree_at(lambda p: p.table, path, jax.tree.map(lambda x: jnp.asarray(np.asarray(x), dtype), table))


Steps = Callable[[Any, Any, Any, Any, Any, Any], Any]


def by_solve(adjoint: Any) -> Steps:
    """`sdeflow.solve` along a grid, with the states at every requested time."""

    def run(case: Case, equation: Any, y0: Any, args: Any, grid: Any, path: Any) -> Any:
        sol = sf.solve(
            equation, y0, np.asarray(TS), args=args, grid=grid, path=path, solver=case.solver, adjoint=adjoint
        )
        return sol.ys

    return run


def by_diffeqsolve(adjoint: Any) -> Steps:
    """A plain ``diffrax.diffeqsolve`` that steps to the same knots."""

    def run(case: Case, equation: Any, y0: Any, args: Any, grid: Any, path: Any) -> Any:
        knots = jnp.concatenate([grid.left[:1], grid.right]).astype(y0.dtype)
        sol = dfx.diffeqsolve(
            equation.terms(path),
            case.solver,
            knots[0],
            knots[-1],
            None,
            y0,
            args,
            saveat=dfx.SaveAt(t0=True, steps=True),
            stepsize_controller=dfx.StepTo(knots),
            adjoint=adjoint,
            max_steps=grid.num_rows,
            throw=False,
        )
        return sol.ys[np.asarray(grid.save)]  # pyright: ignore

    return run


HOW: dict[str, Steps] = {
    "diffrax": by_diffeqsolve(dfx.RecursiveCheckpointAdjoint()),
    # Compiles in a third of the time, and its gradients come the other way round.
    "diffrax-forward": by_diffeqsolve(dfx.ForwardMode()),
    **{f"solve-{c}": by_solve(sf.adjoints.DiscreteAdjoint(c)) for c in ("step", "sqrt", None, 3)},
    **{f"inside-{c}": by_diffeqsolve(sf.adjoints.DiscreteAdjoint(c)) for c in ("step", "sqrt", None, 3)},
}


@functools.cache
def solved(name: str, how: str, dtype: str = "float64", padding: int | None = None) -> dict[str, np.ndarray]:
    """States at the requested times, and gradients, of one case solved in one way.

    Arguments:
        padding: None keeps the grid concrete, so that the walk knows there is no padding. A number adds so many rows
            and passes grid and path as traced arguments, so that the walk must select.
    """
    case = CASES[name]
    if how == "diffrax-forward" and isinstance(case.solver, dfx.HalfSolver):
        # diffrax's forward mode asks wrapped solvers for a field that they do not have.
        how = "diffrax"
    with jax.enable_x64(dtype == "float64"):
        grid = sf.grids.through(np.asarray(TS), DT0)
        if padding is not None:
            grid = grid.pad(grid.num_rows + padding)
        path = path_of(case, grid, dtype)

        def loss(y0: Any, args: Any, theta: Any, grid: Any, path: Any) -> Any:
            ys = HOW[how](case, equation_of(case.noise, theta), y0, args, grid, path)
            weights = jnp.cos(jnp.arange(ys.size, dtype=ys.dtype)).reshape(ys.shape)
            return (weights * ys**2).sum(), ys

        def gradients(grid: Any, path: Any) -> Any:
            start = (jnp.array([0.3, 0.7], dtype), jnp.array(0.7, dtype), jnp.array(1.1, dtype))
            mode = jax.jacfwd if how == "diffrax-forward" else jax.grad
            return mode(loss, argnums=(0, 1, 2), has_aux=True)(*start, grid, path)

        if padding is None:
            out = jax.jit(lambda: gradients(grid, path))()
        else:
            out = jax.jit(gradients)(grid, path)
        grads, ys = out
    return {"ys": np.asarray(ys)} | {k: np.asarray(g) for k, g in zip(("in y0", "in args", "in a closure"), grads)}


def largest_difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """The largest relative difference of any entry, by the size of what it belongs to."""
    assert a.keys() == b.keys()
    assert all(a[k].dtype == b[k].dtype and a[k].shape == b[k].shape for k in a)
    assert all(np.isfinite(x).all() for x in (*a.values(), *b.values()))
    return max(float(np.abs(a[k] - b[k]).max() / np.maximum(np.abs(b[k]).max(), 1e-30)) for k in a)
