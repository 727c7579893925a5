"""The adjoint equation alone, solved backwards along the solution as it was found.

With y(t) between the steps from the solver's own interpolation, and a = dL/dy,

    da/dt = -a f_y(t, y(t)),      dL/dtheta = int a(t) f_theta(t, y(t)) dt + int a(t) g_theta(t) dW,

where a jumps by dL/dy_i at every time at which y_i was kept. The first equation is linear, as stiff as the equation and
stable in the direction in which it is solved, so it is given to the same solver on the same steps. No parameter enters
an implicit solve, however many there are: the first integral is a sum over nodes of each row, for which there are two
choices, and the second takes a to be linear within a row.

* "stages": the solver's own nodes, weights and values of a there, as if it had integrated the gradient as well.
* "gauss": the Gauss-Legendre nodes m + {-sqrt(3/5), 0, sqrt(3/5)} h / 2 with weights {5, 8, 5} / 18, and a from the
  solver's interpolation.

Both agree where the steps resolve a. In a stiff equation they may not just before a time at which a jumps: there a
stiff direction of a decays, backwards, within a step. Stages stay bounded then; an interpolation of them does not, and
on Robertson's reactions three nodes of it were wrong by a factor of ten where the stages missed by a few percent.

Sources: Ma, Dixit, Innes, Guo and Rackauckas, A comparison of automatic differentiation and continuous sensitivity
analysis for derivatives of differential equation solutions, 2021, arXiv:1812.01892; Norcliffe and Deisenroth, Faster
training of neural ODEs using Gauss-Legendre quadrature, 2023, arXiv:2308.10644.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
import optimistix as optx
from jaxtyping import PyTree

from .._results import is_okay, promote
from ..walking import Carry, Rows, prepare_solver
from ._adaptive import can_record, check_record, length_of_record, replaying_loop
from ._backwards import Backwards, Problem, check_terms, walk_backwards
from ._base import AbstractWalkAdjoint
from ._fields import Field, noise_charge
from ._freeze import freeze
from ._lanes import dot

_KINDS = (
    diffrax.AbstractRungeKutta,
    diffrax.AbstractSRK,
    diffrax.Euler,
    diffrax.ImplicitEuler,
    diffrax.EulerHeun,
    diffrax.ItoMilstein,
    diffrax.StratonovichMilstein,
)
_NAME = "InterpolatingAdjoint"
NODES = np.array([-np.sqrt(0.6), 0.0, np.sqrt(0.6)]) / 2 + 0.5
WEIGHTS = np.array([5.0, 8.0, 5.0]) / 18


class InterpolatingAdjoint(AbstractWalkAdjoint):
    """Solve the adjoint equation along the stored solution: for stiff equations with many parameters.

    Optimise, then discretise: gradients are as good as the steps and the solver's interpolation are, and differ from
    those of the numbers that the solve returns, which `DiscreteAdjoint` gives. Nothing is reconstructed, so that the
    equation may be stiff and may forget its start, unlike with `ContinuousAdjoint`; memory is the states and stages of
    all steps. A stiff equation wants short steps after its start, and for its gradient also before the times at which
    states are kept, as from there the fast directions of dL/dy decay backwards.

    For ordinary equations with implicit and explicit one-step solvers, and for additive noise, along which the adjoint
    is an ordinary equation (solved by Heun's method where the solver is one for noise alone, with order 1, as the path
    within a step is taken to be linear). An adaptive solve is recorded and walked once more along its accepted steps.

    Gradients are of first order, in reverse mode, and with respect to all but noise; with respect to times by
    dL/dt1 = a f(t1, y1) and dL/dt0 = -a f(t0, y0), where time alone drives the equation.

    Arguments:
        quadrature: "stages" or "gauss", where gradients with respect to what the equation holds are summed up: at the
            solver's own stages, or at three nodes of Gauss and Legendre, which fail in stiff equations where dL/dy
            decays within a step.
        record: for adaptive steps only: how many accepted steps the record holds. Default: 256, and 4 more for every
            requested time of `sdeflow.solve`, at most ``max_steps``.

    Raises:
        ValueError: for another ``quadrature`` or a ``record`` below 1; while tracing, for a wrapped, multi-step or
            implicit-explicit solver, for noise that depends on the state, and for controls other than time and noise.

    Example:
        >>> import diffrax, jax, jax.numpy as jnp, sdeflow as sf
        >>> stiff = sf.ODE(lambda t, y, rate: -rate * (y - jnp.cos(t)))
        >>> final = lambda rate: sf.solve(stiff, jnp.array(0.0), [0.0, 1.0], args=rate, dt0=0.1,
        ...                               solver=diffrax.Kvaerno5(), adjoint=sf.adjoints.InterpolatingAdjoint()).final
        >>> round(float(jax.grad(final)(jnp.array(20.0))), 4)
        -0.002
    """

    quadrature: Literal["stages", "gauss"] = eqx.field(default="stages", static=True)
    record: int | None = eqx.field(default=None, static=True)

    def __check_init__(self):
        if self.quadrature not in ("stages", "gauss"):
            raise ValueError(f'quadrature must be "stages" or "gauss", got {self.quadrature!r}.')
        check_record(self.record)

    def walk(
        self,
        solver: diffrax.AbstractSolver,
        terms: Any,
        args: Any,
        y0: PyTree,
        rows: Rows,
        *,
        every: int | None,
        emit: Callable[[Any, Carry, Any], Any],
        start: Carry | None = None,
    ) -> tuple[Carry, Any, dict[str, Any]]:
        """Walk all rows, keeping what the solver's interpolation needs of each."""
        check_solver(solver)
        check_terms(_NAME, terms)
        carry, emitted, _ = walk_backwards(
            _AlongPath, _NAME, solver, terms, args, y0, rows, every=every, emit=emit, start=start, keep_dense=True,
            check=lambda fields: _Pair(*_followers(solver, fields, rows.left.dtype), self.quadrature),
        )  # fmt: skip
        return carry, emitted, {}

    def check_solver(self, solver: diffrax.AbstractSolver) -> None:
        """Refuse a solver whose steps it cannot follow."""
        check_solver(solver)

    def loop(self, **kwargs: Any) -> Any:
        """The loop of ``diffrax.diffeqsolve``: by walking, adaptive steps a second time along those accepted."""
        if can_record(kwargs):
            check_solver(kwargs["solver"])
            return replaying_loop(self, length_of_record(self.record, kwargs), **kwargs)
        return super().loop(**kwargs)


def check_solver(solver: Any) -> None:
    """Refuse a solver whose steps cannot be followed.

    Raises:
        ValueError: naming the solver and what can be used.
    """
    # A wrapper passes for what it wraps.
    wrapped = isinstance(solver, diffrax.AbstractWrappedSolver)
    split = isinstance(getattr(solver, "tableau", None), diffrax.MultiButcherTableau)
    if wrapped or split or not isinstance(solver, _KINDS):
        raise ValueError(
            f"InterpolatingAdjoint cannot follow {type(solver).__name__}: use a one-step solver such as "
            "diffrax.Tsit5() or diffrax.Kvaerno5(), or adjoint=sf.adjoints.DiscreteAdjoint()."
        )


class _Pair(eqx.Module):
    """How the path is interpolated, and what solves the adjoint equation along it."""

    path: Any
    follower: Any
    quadrature: str = eqx.field(static=True)


def _followers(solver: Any, fields: tuple[Field, ...], dtype: Any) -> tuple[Any, Any]:
    """The solver of the path and that of the adjoint equation along it.

    Raises:
        ValueError: for what drives the equation beside time, unless it is additive noise; for want of a drift.
    """
    for field in fields:
        if field.kind == "control" or (field.kind == "noise" and not field.additive):
            what = "noise that depends on the state" if field.kind == "noise" else "a control other than time and noise"
            raise ValueError(
                f"InterpolatingAdjoint follows a smooth adjoint, and {what} makes it rough: use "
                "adjoint=sf.adjoints.DiscreteAdjoint(), or ContinuousAdjoint()."
            )
    if all(field.kind == "noise" for field in fields):
        raise ValueError(
            "InterpolatingAdjoint follows the drift of an equation, and this one has none: use "
            "adjoint=sf.adjoints.DiscreteAdjoint()."
        )
    prepared = prepare_solver(solver)
    if solver.term_structure is diffrax.AbstractTerm:
        return prepared, _for_linear(prepared, dtype)
    # Other methods are for noise alone.
    return prepared, prepare_solver(diffrax.Heun())


def _for_linear(solver: Any, dtype: Any) -> Any:
    """The solver, with what an implicit one needs for a linear equation: one step of Newton's method, and another.

    Its own root finder compares what is left with absolute tolerances, which a stiff linear equation, however well
    solved, need not meet; and chord methods would go on with the Jacobian of another time.
    """
    finder = getattr(solver, "root_finder", None)
    if finder is None:
        return solver
    tolerance = float(jnp.finfo(dtype).eps) ** 0.5
    options = {"linear_solver": finder.linear_solver} if hasattr(finder, "linear_solver") else {}
    newton = optx.Newton(tolerance, tolerance, norm=optx.rms_norm, cauchy_termination=False, **options)
    return dataclasses.replace(solver, root_finder=newton)


class _Cotangent(diffrax.AbstractTerm):
    """-a f_y(t, y(t)) dt."""

    field: Field
    path: Any

    def vf(self, t: Any, y: PyTree, args: Any) -> PyTree:
        _, pull = jax.vjp(lambda x: self.field.call(t, x), self.path.evaluate(t))
        return jtu.tree_map(jnp.negative, pull(y)[0])

    def contr(self, t0: Any, t1: Any, **kwargs: Any) -> Any:
        return t1 - t0

    def prod(self, vf: PyTree, control: Any) -> PyTree:
        return jtu.tree_map(lambda x: jnp.asarray(control, x.dtype) * x, vf)


def _follow(problem: Problem, a: Any, left: Any, right: Any, noise: Any, dense: Any) -> tuple[Any, Any]:
    """One row from its end to its start: s, and a there with whether its step went well."""
    path = problem.solver.path.interpolation_cls(t0=left, t1=right, **dense)
    smooth = [field for field in problem.fields if field.kind == "time"]
    terms = [_Cotangent(freeze(field), path) for field in smooth]  # pyright: ignore
    solver = problem.solver.follower
    terms = terms[0] if len(terms) == 1 else diffrax.MultiTerm(*terms)
    # The equation is linear, so that tolerances may be those of an a whose largest entry is one.
    size = jnp.max(jnp.stack([jnp.max(jnp.abs(x), initial=0) for x in jtu.tree_leaves(a)]))
    size = jnp.where((size > 0) & jnp.isfinite(size), size, 1)
    times_size = lambda tree: jtu.tree_map(lambda x: size.astype(x.dtype) * x, tree)
    unit = jtu.tree_map(lambda x: x / size.astype(x.dtype), a)
    # The slope of the row before is none for this one where a has jumped between them.
    state = solver.init(terms, right, left, unit, None)
    unit0, _, info, _, result = solver.step(terms, right, left, unit, None, state, False)
    a0 = times_size(unit0)

    h = right - left
    if problem.solver.quadrature == "gauss":
        nodes, weights = NODES, WEIGHTS
        times = left + jnp.asarray(nodes, h.dtype) * h
        along = jax.vmap(solver.interpolation_cls(t0=right, t1=left, **info).evaluate)(times)
    else:
        nodes, weights, along = _stages(solver, unit, unit0, info)
        times = right - jnp.asarray(nodes, h.dtype) * h
    states = jax.vmap(path.evaluate)(times), times_size(along)
    charge = lambda t, y, a: sum(dot(a, field.call(t, y)) for field in smooth)
    s = h * (jnp.asarray(weights, h.dtype) @ jax.vmap(charge)(times, *states))
    ends = (left, dense["y0"], a0), (right, dense["y1"], a)
    s = s + noise_charge(problem.fields, problem.controls(noise, left, right), ends, problem.levy)
    return s, (a0, is_okay(promote(result)))


def _stages(solver: Any, a: Any, a0: Any, info: Any) -> tuple[np.ndarray, np.ndarray, Any]:
    """Nodes, weights and values of the stages of a step from ``a`` to ``a0``, those that count."""
    one = lambda tree: jtu.tree_map(lambda x: x[None], tree)
    if isinstance(solver, diffrax.Euler):
        return np.zeros(1), np.ones(1), one(a)
    if isinstance(solver, diffrax.ImplicitEuler):
        return np.ones(1), np.ones(1), one(a0)
    tableau = getattr(solver, "solver", solver).tableau
    count = tableau.num_stages
    lower = np.zeros((count, count))
    for i, row in enumerate(tableau.a_lower):
        lower[i + 1, : i + 1] = row
    if tableau.a_diagonal is not None:
        lower[np.diag_indices(count)] = tableau.a_diagonal
    nodes = np.concatenate([[0.0 if tableau.c1 is None else tableau.c1], tableau.c])
    counts = np.flatnonzero(np.asarray(tableau.b_sol))
    value = lambda x, k: x + jnp.tensordot(jnp.asarray(lower[counts], x.dtype), k, 1)
    return nodes[counts], np.asarray(tableau.b_sol)[counts], jtu.tree_map(value, a, info["k"])


class _AlongPath(Backwards):
    """The adjoint equation, along the stored solution."""

    def ends(self, y: Any, here: Any, dense: Any) -> tuple[Any, Any]:
        return dense["y0"], dense["y1"]

    def back(self, y: Any, a: Any, here: Any, dense: Any, live: Any) -> tuple[Any, Any, Any, list[Any]]:
        (a0, good), held = self.charged(_follow, (a, *here, dense), live)
        return y, a0, good, held
