"""The adjoint equation, solved backwards in time together with the equation itself.

For dy = f(t, y) dt + g(t, y) o dW and a = dL/dy, from the end to the start, along the same noise,

    dy = f dt + g o dW,    da = -a f_y dt - a g_y o dW,    dq = -a f_theta dt - a g_theta o dW,

where a jumps by dL/dy_i at every time at which y_i was kept; then q is the gradient with respect to theta. All three
are solved on the same steps by the same solver, so that nothing of the way there is stored. What comes back is the
gradient of the equation, up to the error of the steps; that of the numbers which the solve returned is another one.

Sources: Chen, Rubanova, Bettencourt and Duvenaud, 2018, arXiv:1806.07366; Li, Wong, Chen and Duvenaud, Scalable
gradients for stochastic differential equations, 2020, arXiv:2001.01328.
"""

import math
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from ..walking import Carry, Rows
from ._adaptive import can_record, check_record, length_of_record, replaying_loop
from ._backwards import Backwards, Problem, check_terms, walk_backwards
from ._base import AbstractWalkAdjoint
from ._fields import Adjoined, Field, noise_charge
from ._freeze import freeze
from ._lanes import where

_KINDS = (diffrax.AbstractERK, diffrax.AbstractSRK, diffrax.Euler, diffrax.EulerHeun, diffrax.StratonovichMilstein)
_NAME = "ContinuousAdjoint"


class ContinuousAdjoint(AbstractWalkAdjoint):
    """Solve the adjoint equation backwards: the gradient of the equation, with memory that does not grow with steps.

    Optimise, then discretise: gradients are as good as the steps are fine, and differ from those of the numbers that
    the solve returns, which `DiscreteAdjoint` gives. They serve where the two are to be compared, and to reproduce work
    that used them; `ReversibleAdjoint` takes no more memory and is exact.

    For ordinary equations, Stratonovich equations, and additive noise, with any explicit solver: Euler, Heun, Tsit5,
    ShARK and their like. The state is reconstructed from the end, which fails where the equation forgets where it came
    from: how far the start is missed, relative to the size of the solution, is ``sol.stats["defect"]``, and above about
    1e-3 gradients with respect to ``y0`` deserve no trust. An adaptive solve is recorded (times alone) and walked once
    more along its accepted steps.

    Gradients are of first order, in reverse mode, and with respect to all but noise; with respect to times by
    dL/dt1 = a f(t1, y1) and dL/dt0 = -a f(t0, y0), where time alone drives the equation.

    Arguments:
        max_defect: above this defect gradients are NaN; by default none is.
        record: for adaptive steps only: how many accepted steps the record holds. Default: 256, and 4 more for every
            requested time of `sdeflow.solve`, at most ``max_steps``.

    Raises:
        ValueError: for a ``max_defect`` that is not positive or a ``record`` below 1; while tracing, for an implicit,
            wrapped or multi-step solver, and for Ito noise that depends on the state.

    Example:
        >>> import jax, jax.numpy as jnp, sdeflow as sf
        >>> decay = sf.ODE(lambda t, y, rate: -rate * y)
        >>> final = lambda rate: sf.solve(decay, jnp.array(1.0), [0.0, 1.0], args=rate, dt0=0.1,
        ...                               adjoint=sf.adjoints.ContinuousAdjoint()).final
        >>> round(float(jax.grad(final)(jnp.array(1.0))), 5)
        -0.36788
    """

    max_defect: float = eqx.field(default=math.inf, static=True)
    record: int | None = eqx.field(default=None, static=True)

    def __check_init__(self):
        if not isinstance(self.max_defect, float | int) or not self.max_defect > 0:
            raise ValueError(f"max_defect must be a positive number, got {self.max_defect!r}.")
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
        """Walk all rows, to be solved backwards."""
        check_solver(solver)
        check_terms(_NAME, terms)
        carry, emitted, problem = walk_backwards(
            _Augmented, _NAME, solver, terms, args, y0, rows, every=every, emit=emit, start=start, keep_dense=False,
            check=lambda fields: check_noise(solver, fields),
            judge=lambda problem, found: ~(_relative_gap(found, problem.start, problem.final) <= self.max_defect),
        )  # fmt: skip
        return carry, emitted, {"defect": _defect(freeze(problem))}

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
    """Refuse a solver that cannot take the adjoint equation.

    Raises:
        ValueError: naming the solver and what can be used.
    """
    name = type(solver).__name__
    if isinstance(solver, diffrax.AbstractImplicitSolver):
        raise ValueError(  # noqa: TRY004
            f"ContinuousAdjoint runs the equation backwards, where {name} is not stable either: use "
            "adjoint=sf.adjoints.InterpolatingAdjoint(), or DiscreteAdjoint()."
        )
    # A wrapper passes for what it wraps.
    if not isinstance(solver, _KINDS) or isinstance(solver, diffrax.AbstractWrappedSolver):
        raise ValueError(  # noqa: TRY004
            f"ContinuousAdjoint cannot take {name} backwards: use an explicit one-step solver such as diffrax.Heun() "
            "or diffrax.Tsit5(), or adjoint=sf.adjoints.DiscreteAdjoint()."
        )


def check_noise(solver: Any, fields: tuple[Field, ...]) -> None:
    """Refuse noise for which the solver does not solve the adjoint equation.

    Raises:
        ValueError: naming the solver and what can be done.
    """
    if not any(field.kind == "noise" and not field.additive for field in fields):
        return
    name = type(solver).__name__
    ito = isinstance(solver, diffrax.AbstractItoSolver) and not isinstance(solver, diffrax.AbstractStratonovichSolver)
    if ito:
        raise ValueError(
            f"{name} solves Ito equations, and with noise that depends on the state these have no adjoint on the same "
            "path: solve equation.to_stratonovich() with a solver such as diffrax.Heun()."
        )
    if isinstance(solver, diffrax.AbstractSRK) and solver.tableau.is_additive_noise():
        raise ValueError(
            f"{name} takes only noise that does not depend on the state, and this does: use a solver such as "
            "diffrax.Heun() or diffrax.SPaRK()."
        )


def _reverse(problem: Problem, y: Any, a: Any, charge: bool, left: Any, right: Any, noise: Any) -> tuple[Any, Any, Any]:
    """One row from its end to its start: s, y and a there."""
    controls = problem.controls(noise, left, right)
    frozen = freeze(problem.fields)
    terms = [Adjoined(*x) for x in zip(problem.fields, frozen, controls)]  # pyright: ignore
    terms = diffrax.MultiTerm(*terms) if problem.multi else terms[0]
    s = jnp.zeros((), jnp.result_type(*jtu.tree_leaves(y))) if charge else None
    # The slope of the row before is none for this one where a has jumped between them.
    state = problem.solver.init(terms, right, left, (y, a, s), None)
    (y0, a0, s), *_ = problem.solver.step(terms, right, left, (y, a, s), None, state, False)
    if charge:
        y0, a0 = freeze((y0, a0))
        s = s + noise_charge(problem.fields, controls, ((left, y0, a0), (right, y, a)), problem.levy)
    return s, y0, a0


def _defect(problem: Problem) -> Any:
    def body(y: Any, row: Any) -> tuple[Any, None]:
        left, right, live, noise, _ = row
        _, y0, _ = _reverse(problem, y, None, False, left, right, noise)
        return (y0 if live is None else where(live, y0, y)), None

    found, _ = jax.lax.scan(body, problem.final, problem.rows, reverse=True)
    return _relative_gap(found, problem.start, problem.final)


def _relative_gap(found: Any, begin: Any, final: Any) -> Any:
    """How far a start that was reconstructed is from the start, relative to the larger of both ends."""
    flat = lambda tree: jnp.concatenate([jnp.abs(x).ravel() for x in jtu.tree_leaves(tree)])
    rms = lambda x: jnp.sqrt(jnp.mean(x**2))
    size = jnp.maximum(rms(flat(begin)), rms(flat(final)))
    gap = rms(flat(jtu.tree_map(jnp.subtract, found, begin)))
    return jnp.where(size > 0, gap / jnp.where(size > 0, size, 1), gap)


class _Augmented(Backwards):
    """The equation and its adjoint, solved together."""

    def ends(self, y: Any, here: Any, dense: Any) -> tuple[Any, Any]:
        if not self.problem.looks_back:
            return y, y
        left, right, noise = here
        before = lambda inputs, y, *row: _reverse(self.build(inputs), y, None, False, *row)[1]
        return self.over(before, self.inputs, y, left, right, noise), y

    def back(self, y: Any, a: Any, here: Any, dense: Any, live: Any) -> tuple[Any, Any, Any, list[Any]]:
        def step(problem: Problem, y: Any, a: Any, left: Any, right: Any, noise: Any) -> Any:
            s, y0, a0 = _reverse(problem, y, a, bool(self.of_step), left, right, noise)
            return s, (y0, a0)

        (y0, a0), held = self.charged(step, (y, a, *here), live)
        return y0, a0, True, held
