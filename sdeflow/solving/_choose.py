"""Defaults and their reasons: which solver, which noise, and what is refused.

Every choice is returned with the sentence that explains it, so that ``repr(sol)`` can say it.
"""

import dataclasses
from typing import Any

import diffrax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from jaxtyping import PyTree

from .._compat import is_concrete, use_stepsize_tol
from ..adjoints import AbstractWalkAdjoint, DiscreteAdjoint
from ..equations import AbstractEquation, UnderdampedLangevin
from ..equations._fractional import STIFF, WithFactors
from ..equations._linear import LinearSDE
from ..grids import Grid
from ..paths import FactorBrownian, GridBrownian, LinearBrownian
from ..solvers import Exact, ExponentialAdams, ExponentialHeun, McCallumFoster
from ..solvers._charging import Charging
from ..solvers._newton import StageNewton
from ..solvers._unrolled import unrolled
from ..walking import asks_otherwise

TABLE_LIMIT = 4096
_ONE_SLOPE = (
    diffrax.Euler, diffrax.EulerHeun, diffrax.ItoMilstein, diffrax.StratonovichMilstein, ExponentialAdams
)  # fmt: skip
STATES_LIMIT = 32 * 2**20  # bytes: what the states before all steps may take before they are thinned out


def choose_solver(equation: AbstractEquation, fixed: bool) -> tuple[diffrax.AbstractSolver, str]:
    """The solver for an equation when none is given.

    Arguments:
        fixed: whether the steps are fixed.

    Raises:
        ValueError: for adaptive steps of an Ito equation with state-dependent noise, which no solver takes.
    """
    if not equation.is_stochastic:
        return diffrax.Tsit5(), "order 5, the usual choice for ordinary equations"
    if isinstance(equation, UnderdampedLangevin):
        return diffrax.ALIGN(0.1), "strong order 2 for underdamped Langevin dynamics"
    if isinstance(equation, WithFactors) and equation.interpretation == "stratonovich":
        return ExponentialHeun(), "exact for the factors of fractional noise at any step length"
    if equation.additive:
        return diffrax.ShARK(), "strong order 1.5 for additive noise"
    if equation.interpretation == "ito":
        if not fixed:
            raise ValueError(
                "Adaptive steps of an Ito equation with state-dependent noise have no default solver, as none of them "
                "estimates its error: solve equation.to_stratonovich(), or fix the steps with dt0=."
            )
        return diffrax.Euler(), "converges to the Ito solution for any noise"
    return diffrax.Heun(), "converges to the Stratonovich solution for any noise"


_STEPWISE = (DiscreteAdjoint, diffrax.RecursiveCheckpointAdjoint, diffrax.DirectAdjoint, diffrax.ForwardMode)


def is_solved_exactly(equation: Any, path: Any, adjoint: Any, regularisers: Any) -> bool:
    """Whether `sdeflow.solvers.Exact` is to take the fixed steps of an equation for which no solver was given.

    Not on a path that has too few normals for it, and not where stages of a step are to be read: by penalties, and by
    adjoints that do not differentiate the steps.
    """
    if not isinstance(equation, LinearSDE) or regularisers or not (adjoint is None or isinstance(adjoint, _STEPWISE)):
        return False
    if path is None or isinstance(path, LinearBrownian):
        return True
    return equation.is_diagonal and getattr(path, "levy_area", None) is diffrax.SpaceTimeTimeLevyArea


def resolve_pieces(solver: Exact, equation: Any, grid: Grid) -> Exact:
    """Give `sdeflow.solvers.Exact`, where it has no pieces of its own, those of the equation for the whole time.

    What `LinearSDE.transition` resolves from end to end, steps then resolve too, at the same cost.
    """
    if solver.pieces is not None or not isinstance(equation, LinearSDE):
        return solver
    if equation.is_constant or not grid.is_concrete or grid.num_rows == 0:
        return solver
    left, right = np.asarray(grid.left, np.float64), np.asarray(grid.right, np.float64)
    share = np.abs(right - left).max() / np.abs(right[-1] - left[0])
    return Exact(max(1, int(np.ceil(equation.pieces * share * (1 - 1e-6)))))


def check_interpretation(equation: AbstractEquation, solver: diffrax.AbstractSolver, decreasing: bool) -> None:
    """Refuse a solver that converges to another process than the equation means.

    Raises:
        ValueError: for state-dependent noise and a solver of the other calculus, or of neither, or Ito noise run
            backwards in time.
    """
    if not equation.is_stochastic or equation.additive:
        return
    name = type(solver).__name__
    if isinstance(solver, McCallumFoster) and isinstance(solver.solver, diffrax.Euler):
        # Backwards in time it tends to another process, from which the first copy drifts away.
        raise ValueError(  # noqa: TRY004
            "Euler steps taken back and forth, as McCallumFoster takes them, converge to no solution when the noise "
            "depends on the state: use McCallumFoster(diffrax.Heun()) on a Stratonovich equation, or "
            "McCallumFoster(sf.solvers.DiagonalMilstein()) on an Ito one."
        )
    ito = isinstance(solver, diffrax.AbstractItoSolver)
    stratonovich = isinstance(solver, diffrax.AbstractStratonovichSolver)
    if equation.interpretation == "ito" and not ito:
        # A method made for ordinary equations carries no mark; with noise it tends to the Stratonovich solution.
        known = "converges to the Stratonovich" if stratonovich else "is not known to converge to the Ito"
        raise ValueError(
            f"{name} {known} solution, but the equation is Ito with state-dependent noise: solve "
            "equation.to_stratonovich() instead, or say additive=True if the diffusion does not depend on the state."
        )
    if equation.interpretation == "stratonovich" and ito and not stratonovich:
        raise ValueError(
            f"{name} converges to the Ito solution, but the equation is Stratonovich with state-dependent noise: solve "
            "equation.to_ito() instead, or say additive=True if the diffusion does not depend on the state."
        )
    if decreasing and equation.interpretation == "ito":
        raise ValueError(
            "An Ito equation with state-dependent noise has two inequivalent limits when ts decreases: solve "
            "equation.to_stratonovich(), whose reverse-time limit is unique."
        )


def check_stiff(equation: Any, solver: diffrax.AbstractSolver, grid: Grid) -> None:
    """Refuse steps too long for a known decay: of the fastest factor of fractional noise, or of a linear equation.

    Raises:
        ValueError: for an explicit method at ``max_rate * h >= 0.5``, which inflates that factor's variance, and for
            one that grows where the solution of a constant A decays.
    """
    if not grid.is_concrete or grid.num_rows == 0:
        return
    longest = float(np.abs(np.asarray(grid.right) - np.asarray(grid.left)).max())
    if isinstance(equation, LinearSDE) and equation.is_constant and is_concrete(equation.A):
        sign = np.sign(float(grid.right[-1]) - float(grid.left[0]))
        _check_unstable(np.linalg.eigvals(np.asarray(equation.A, np.float64)) * sign, solver, longest)
    if not isinstance(equation, WithFactors) or _has(solver, ExponentialHeun):
        return
    fastest = equation.rates[-1]
    if longest * fastest >= STIFF:
        raise ValueError(
            f"{type(solver).__name__} takes steps of {longest:g}, but the fastest factor of the noise has the rate "
            f"{fastest:g}, and explicit steps are wrong about it from {STIFF / fastest:g} on: use "
            "sf.solvers.ExponentialHeun(), which is exact for the factors, or a smaller dt0."
        )


def _check_unstable(rates: Any, solver: diffrax.AbstractSolver, longest: float) -> None:
    z = rates[(rates.real < 0) & (np.abs(rates) * longest > 1)] * longest
    growth = np.abs(_growth(solver, z))
    if (growth > 1).any():
        fastest = z[np.argmax(growth)] / longest
        raise ValueError(
            f"{type(solver).__name__} takes steps of {longest:g}, over which it grows where the equation decays at the "
            f"rate {-fastest.real:g}: drop solver= (and regularisers=, and adjoint=) for sf.solvers.Exact(), stable at "
            "any step, or take a smaller dt0."
        )


def _growth(solver: diffrax.AbstractSolver, z: Any) -> Any:
    """What a step of an explicit method makes of y' = y z, y = 1, where it is known; else 0."""
    tableau = getattr(solver, "tableau", None)
    if type(solver) in (diffrax.Euler, diffrax.EulerHeun, diffrax.ItoMilstein, diffrax.StratonovichMilstein):
        return 1 + z
    if isinstance(solver, diffrax.AbstractERK) and isinstance(tableau, diffrax.ButcherTableau):
        rows, last = tableau.a_lower, tableau.b_sol
    elif isinstance(solver, diffrax.AbstractSRK) and tableau is not None:
        rows, last = tableau.a, tableau.b_sol
    else:
        return np.zeros_like(z)
    slopes = [np.ones_like(z) * z]
    for row in rows:
        slopes.append(z * (1 + sum(a * k for a, k in zip(np.asarray(row), slopes))))
    return 1 + sum(b * k for b, k in zip(np.asarray(last), slopes))


def check_rough(equation: Any) -> None:
    """Refuse what exact fractional Brownian motion cannot drive.

    Raises:
        ValueError: for an Ito equation with state-dependent noise, or one that carries factors of its own.
    """
    if isinstance(equation, WithFactors):
        raise ValueError(  # noqa: TRY004
            "A FractionalSDE is driven by the factors of its own noise: pass key=, or path=noise.path(grid, shape, "
            "key=...); a FractionalBrownian drives an sf.SDE."
        )
    if isinstance(equation, AbstractEquation) and equation.interpretation == "ito" and not equation.additive:
        raise ValueError(
            "Fractional Brownian motion has no Ito integral: write the equation with "
            'interpretation="stratonovich", or say additive=True if the diffusion does not depend on the state.'
        )


def noise_of_grid(
    equation: Any, solver: diffrax.AbstractSolver, grid: Grid, structure: PyTree, key: Any, storage: Any
) -> GridBrownian:
    """The noise of a grid: Brownian motion with the Levy area or the integrals that the solver reads."""
    if isinstance(equation, LinearSDE) and not equation.is_diagonal and _has(solver, Exact):
        return LinearBrownian(grid, structure, dim=equation.dim, key=key, storage=storage)
    if isinstance(equation, WithFactors) and _has(solver, ExponentialHeun):
        return FactorBrownian(grid, structure, rates=equation.rates, key=key, storage=storage)
    return GridBrownian(grid, structure, key=key, levy_area=levy_area_for(solver), storage=storage)


def _has(solver: Any, kind: type) -> bool:
    return any(isinstance(one, kind) for one in _solvers_within(solver))


def check_adapts(solver: diffrax.AbstractSolver, noisy: bool) -> None:
    """Refuse a solver that cannot be driven by an adaptive controller.

    Raises:
        ValueError: for Euler's method with noise, whose error estimates choose steps that depend on the noise.
    """
    # diffrax answers for what a HalfSolver wraps, too.
    if noisy and isinstance(solver, diffrax.Euler):
        raise ValueError(
            "An SDE should not be solved with adaptive step sizes with Euler's method, as it may converge to another "
            "process: use diffrax.Heun() on equation.to_stratonovich(), or fix the steps with dt0=."
        )


def wrong_backwards(
    solver: diffrax.AbstractSolver, noisy: bool, adjoint: diffrax.AbstractAdjoint, event: Any, endless: bool
) -> bool:
    """Whether the steps of this solve are right only as long as time increases.

    diffrax mirrors decreasing times, where its stochastic Runge-Kutta solvers have the wrong sign of the drift. A walk
    does not mirror them, and neither do adaptive steps under an adjoint of ours.

    Arguments:
        endless: whether the steps adapt without a bound on their number, which diffrax takes too.
    """
    by_diffrax = event is not None or endless or not isinstance(adjoint, AbstractWalkAdjoint)
    return by_diffrax and noisy and any(isinstance(one, diffrax.AbstractSRK) for one in _solvers_within(solver))


def check_backwards(solver: diffrax.AbstractSolver) -> None:
    """Refuse steps that would be wrong, for times that decrease.

    Raises:
        ValueError: always, with what to do instead.
    """
    raise ValueError(
        f"diffrax runs {type(solver).__name__} backwards in time with the wrong sign of the drift, and this solve "
        "leaves the steps to diffrax: drop adjoint= and event= (and set max_steps=), or use a solver such as "
        "diffrax.Heun()."
    )


def resolve_tolerances(solver: Any, dtype: Any, controller: Any = None) -> Any:
    """Give an implicit solver tolerances for its nonlinear solves, where it has none of its own.

    With adaptive steps they are the controller's. With fixed ones they are a hundredth of a percent in float32 and 1e-8
    in float64, relative, and the root finder is Newton's method: diffrax's chord methods give up where they converge
    slowly, for a controller to take a smaller step, and here there is none.
    """
    changes = {}
    for field in dataclasses.fields(solver):
        inner = getattr(solver, field.name, None)
        if isinstance(inner, diffrax.AbstractSolver):
            changes[field.name] = resolve_tolerances(inner, dtype, controller)
        elif field.name == "root_finder" and inner is not None:
            rtol = 1e-8 if dtype == jnp.float64 else 1e-4
            wanted = {"rtol": rtol, "atol": rtol / 100, "norm": optx.rms_norm}
            if controller is not None:
                wanted = {name: getattr(controller, name) for name in wanted}
            missing = {k: v for k, v in wanted.items() if getattr(inner, k, None) is use_stepsize_tol}
            if missing:
                chord = controller is None and isinstance(inner, diffrax.VeryChord | optx.Chord)
                newton = StageNewton(**wanted, cauchy_termination=False)
                changes[field.name] = newton if chord else dataclasses.replace(inner, **missing)
    return dataclasses.replace(solver, **changes) if changes else solver


def resolve_coupling(solver: Any, num_steps: Any, dtype: Any) -> Any:
    """Give `sdeflow.solvers.McCallumFoster`, where it has no coupling of its own, one for this number of steps.

    Undoing N steps magnifies rounding errors by c^-N, which is e for c = 1 - 1/N.
    """
    if not isinstance(solver, McCallumFoster) or solver.coupling is not None:
        return solver
    c = 1 - 1 / jnp.maximum(jnp.asarray(num_steps), 100).astype(dtype)
    return McCallumFoster(solver.solver, c)


def levy_area_for(solver: diffrax.AbstractSolver) -> type:
    """The least Levy area that a solver needs of its Brownian path."""
    for candidate in _solvers_within(solver):
        needed = getattr(candidate, "minimal_levy_area", None)
        if needed is not None:
            for area in (diffrax.BrownianIncrement, diffrax.SpaceTimeLevyArea, diffrax.SpaceTimeTimeLevyArea):
                if issubclass(area, needed):
                    return area
    return diffrax.BrownianIncrement


def choose_storage(num_rows: int, solver: diffrax.AbstractSolver) -> tuple[str | None, str]:
    """Where the noise of ``num_rows`` rows comes from: a function of the padded length alone.

    Returns:
        The storage of a ``GridBrownian``, None for a ``VirtualBrownianTree``, and what is said of it.
    """
    asked = asks_otherwise(solver)
    if asked:
        return None, f"VirtualBrownianTree, as {type(solver).__name__} asks for {asked}"
    if num_rows <= TABLE_LIMIT:
        return "table", f'storage="table", at most {TABLE_LIMIT} rows, so all are drawn at once'
    return "counter", f'storage="counter", more than {TABLE_LIMIT} rows, so each is drawn when needed'


def choose_adjoint(
    y0: PyTree, num_rows: int | None, event: diffrax.Event | None
) -> tuple[diffrax.AbstractAdjoint, str]:
    """How gradients come back, and why.

    Arguments:
        num_rows: the number of fixed steps; None if they adapt.
    """
    if event is not None:
        return diffrax.RecursiveCheckpointAdjoint(), "as an event may end the solve, diffrax takes the steps"
    if num_rows is None:
        adjoint = DiscreteAdjoint()
        return adjoint, "exact gradients of the accepted steps, which are recorded"
    size = num_rows * sum(x.size * x.dtype.itemsize for x in jtu.tree_leaves(y0))
    takes = f"the states before {num_rows} steps take {size / 2**20:.3g} MiB"
    if size > STATES_LIMIT:
        return DiscreteAdjoint("sqrt"), f"exact gradients of the steps; {takes}, so a gradient keeps few of them"
    return DiscreteAdjoint(), f"exact gradients of the steps; {takes}, which a gradient keeps"


def _solvers_within(solver: Any) -> list[Any]:
    inner = getattr(solver, "solver", None)
    return [solver] + (_solvers_within(inner) if isinstance(inner, diffrax.AbstractSolver) else [])


def evaluations(solver: diffrax.AbstractSolver) -> tuple[int, int] | None:
    """Drift evaluations of one step, and those of the start; None if the solver is not known."""
    if isinstance(solver, diffrax.HalfSolver):
        inner = evaluations(solver.solver)
        if inner is None:
            return None
        # diffrax's loop over stages finds its first slope within the first step, which the whole step takes once more.
        twice = isinstance(solver.solver, diffrax.AbstractERK) and unrolled(solver.solver, 3) is None
        return 3 * inner[0], inner[1] * (2 if twice else 1)
    if isinstance(solver, Charging):
        return evaluations(solver.solver)
    if isinstance(solver, McCallumFoster):
        # No slope is carried over to the next step, as it would belong to the other copy.
        inner = evaluations(solver.solver)
        return None if inner is None else (2 * (inner[0] + inner[1]), 0)
    if type(solver) in _ONE_SLOPE:
        return 1, 0
    if type(solver) is ExponentialHeun:
        return 2, 0
    if type(solver) is Exact:
        return 0, 0
    if type(solver) is diffrax.ReversibleHeun:
        return 1, 1
    tableau = getattr(solver, "tableau", None)
    if isinstance(solver, diffrax.AbstractERK) and isinstance(tableau, diffrax.ButcherTableau):
        return (tableau.num_stages - 1, 1) if tableau.fsal else (tableau.num_stages, 0)
    if isinstance(solver, diffrax.AbstractSRK) and tableau is not None:
        skipped = 0 if tableau.ignore_stage_f is None else sum(bool(x) for x in tableau.ignore_stage_f)
        return len(tableau.b_sol) - skipped, 0
    return None
