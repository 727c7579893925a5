"""Claim: every stiff problem that diffrax solves is solved, in the same steps, and its gradient is right.

Eight classical problems, four implicit solvers, three tolerances (atol a thousandth of rtol), in float64. The error is
that against scipy's Radau at rtol 1e-12, relative to the largest component; the gradient of the first component with
respect to the parameter stands beside a central difference of Radau. A line passes if its steps are those of
``diffeqsolve``; where diffrax itself gives up nothing is asked for.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np

import sdeflow as sf

from . import _harness as harness
from ._harness import Claim, Options, Within

MAX_STEPS = 20_000
TOLERANCES = (1e-3, 1e-5, 1e-7)


class Problem(NamedTuple):
    """y' = field(t, y, k) from ``y0`` at time 0 to ``t1``, written for NumPy as for JAX."""

    field: Callable[[Any, Any, Any], list]
    y0: list[float]
    t1: float
    k: float


def _robertson(t: Any, y: Any, k: Any) -> list:
    made, spent = 1e4 * y[1] * y[2], 3e7 * y[1] ** 2
    return [-k * y[0] + made, k * y[0] - made - spent, spent]


def _van_der_pol(t: Any, y: Any, k: Any) -> list:
    return [y[1], k * (1 - y[0] ** 2) * y[1] - y[0]]


def _oregonator(t: Any, y: Any, k: Any) -> list:
    first = k * (y[1] - y[0] * y[1] + y[0] - 8.375e-6 * y[0] ** 2)
    return [first, (y[2] - y[1] - y[0] * y[1]) / k, 0.161 * (y[0] - y[2])]


def _hires(t: Any, y: Any, k: Any) -> list:
    bound = 280 * y[5] * y[7]
    return [
        -k * y[0] + 0.43 * y[1] + 8.32 * y[2] + 0.0007,
        k * y[0] - 8.75 * y[1],
        -10.03 * y[2] + 0.43 * y[3] + 0.035 * y[4],
        8.32 * y[1] + k * y[2] - 1.12 * y[3],
        -1.745 * y[4] + 0.43 * y[5] + 0.43 * y[6],
        -bound + 0.69 * y[3] + k * y[4] - 0.43 * y[5] + 0.69 * y[6],
        bound - 1.81 * y[6],
        -bound + 1.81 * y[6],
    ]


def _enzyme(t: Any, y: Any, k: Any) -> list:
    bind = 1e3 * y[0] * y[1]
    return [-bind + 10 * y[2], -bind + (10 + k) * y[2], bind - (10 + k) * y[2], k * y[2]]


def _cubic(t: Any, y: Any, k: Any) -> list:
    return [-k * (y[0] ** 3 - (np if isinstance(t, float) else jnp).cos(t))]


def _prothero(t: Any, y: Any, k: Any) -> list:
    return [-k * (y[0] - y[1]) + y[2], y[2], -y[1]]


PROBLEMS = {
    "Robertson": Problem(_robertson, [1.0, 0.0, 0.0], 1e4, 0.04),
    "van der Pol 1e3": Problem(_van_der_pol, [2.0, 0.0], 1e3, 1e3),
    "van der Pol 1e6": Problem(_van_der_pol, [2.0, 0.0], 1e6, 1e6),
    "Oregonator": Problem(_oregonator, [1.0, 2.0, 3.0], 30.0, 77.27),
    "HIRES": Problem(_hires, [1.0, 0, 0, 0, 0, 0, 0, 0.0057], 321.8122, 1.71),
    "enzyme kinetics": Problem(_enzyme, [1.0, 0.1, 0.0, 0.0], 20.0, 1.0),
    "cubic": Problem(_cubic, [2.0], 10.0, 10.0),
    "Prothero and Robinson": Problem(_prothero, [0.5, 0.0, 1.0], 10.0, 1e4),
}
SOLVERS = (diffrax.Kvaerno3(), diffrax.Kvaerno4(), diffrax.Kvaerno5(), diffrax.KenCarp4())


def radau(problem: Problem, k: float) -> np.ndarray:
    """The end, by scipy's Radau."""
    from scipy.integrate import solve_ivp

    field = lambda t, y: problem.field(float(t), y, k)
    found = solve_ivp(field, (0, problem.t1), problem.y0, method="Radau", rtol=1e-12, atol=1e-14)
    return found.y[:, -1]


def _terms(problem: Problem, solver: Any) -> diffrax.AbstractTerm:
    term = diffrax.ODETerm(lambda t, y, k: jnp.stack([jnp.asarray(x) for x in problem.field(t, y, k)]))
    if isinstance(solver, diffrax.KenCarp4):
        return diffrax.MultiTerm(diffrax.ODETerm(lambda t, y, k: jnp.zeros_like(y)), term)
    return term


def compare(problem: Problem, solver: Any, tol: float, exact: np.ndarray, slope: float | None) -> Within:
    """One line."""
    terms, controller = _terms(problem, solver), diffrax.PIDController(rtol=tol, atol=tol * 1e-3)
    y0 = jnp.array(problem.y0, jnp.float64)
    peer = diffrax.diffeqsolve(
        terms, solver, 0.0, problem.t1, None, y0, problem.k, stepsize_controller=controller, max_steps=MAX_STEPS,
        throw=False,
    )  # fmt: skip
    solved = bool(peer.result == diffrax.RESULTS.successful)

    def end(k: Any) -> tuple[Any, Any]:
        sol = sf.solve(
            terms, y0, [0.0, problem.t1], args=k, solver=solver, stepsize_controller=controller, max_steps=MAX_STEPS,
            adjoint=sf.adjoints.DiscreteAdjoint(record=MAX_STEPS), throw=False,
        )  # fmt: skip
        return sol.final[0], (sol.final, sol.stats["num_steps"])

    ask = jax.jit(end) if slope is None else jax.jit(jax.value_and_grad(end, has_aux=True))
    out = ask(problem.k)
    final, steps = out[1] if slope is None else out[0][1]
    error = float(np.abs(final - exact).max() / np.abs(exact).max())
    theirs = int(peer.stats["num_accepted_steps"])
    note = f"error {error:.1e}, {int(steps)} steps, diffrax {theirs}" + ("" if solved else " (gives up)")
    if slope is not None:
        note += f", gradient {float(out[1]):.6g} ({slope:.6g})"
    bounds = (1.0, 1.0 + 1e-12) if solved else (0.0, 0.0)
    name = f"{type(solver).__name__}, rtol {tol:g}"
    return harness.line(name, int(steps) / max(theirs, 1), bounds, note)


def run(options: Options) -> list[Claim]:
    """All problems; two of them, at one tolerance, when quick."""
    claims = []
    names = list(PROBLEMS)[::6] if options.quick else list(PROBLEMS)
    with jax.enable_x64(True):
        for name in names:
            problem = PROBLEMS[name]
            exact, h = radau(problem, problem.k), 1e-4 * problem.k
            slope = float((radau(problem, problem.k + h) - radau(problem, problem.k - h))[0] / (2 * h))
            rows = [
                compare(problem, solver, tol, exact, slope if tol == TOLERANCES[1] else None)
                for solver in SOLVERS
                for tol in (TOLERANCES[1:2] if options.quick else TOLERANCES)
            ]
            claims.append(Claim("stiff", name, f"to t = {problem.t1:g}, k = {problem.k:g}", "steps of diffrax", rows))
    return claims
