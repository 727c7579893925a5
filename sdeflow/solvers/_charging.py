"""A solver that writes down what its steps cost, beside the state.

The state becomes a pair (y, notes). The solver inside sees y alone, so values and steps are its own; after each step
``watch`` makes the next notes of what the step computed. Rejected steps leave no notes, as they leave no state.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from ._unrolled import StandIn


class _Beside(diffrax.AbstractTerm):
    """A term of pairs; its control is that of the term of y."""

    term: Any

    def contr(self, t0: Any, t1: Any, **kwargs: Any) -> Any:
        return self.term.contr(t0, t1, **kwargs)


class _DriftBeside(_Beside):
    """(f(t, y), rates(t, y)) dt."""

    rates: Callable[[Any, PyTree], Any]

    def vf(self, t: Any, y: PyTree, args: Any) -> PyTree:
        return self.term.vf(t, y[0], args), self.rates(t, y[0])

    def prod(self, vf: PyTree, control: Any) -> PyTree:
        return self.term.prod(vf[0], control), jtu.tree_map(lambda r: r * control, vf[1])


class _NoiseBeside(_Beside):
    """(g(t, y) dW, 0)."""

    nothing: Any

    def vf(self, t: Any, y: PyTree, args: Any) -> PyTree:
        return self.term.vf(t, y[0], args)

    def prod(self, vf: PyTree, control: Any) -> PyTree:
        return self.term.prod(vf, control), self.nothing


def beside(terms: Any, rates: Callable[[Any, PyTree], Any], nothing: Any) -> Any:
    """The terms of an equation for pairs (y, x), where ``dx = rates(t, y) dt``; ``nothing`` are zeros like x."""
    several = isinstance(terms, diffrax.MultiTerm)
    first, *rest = terms.terms if several else (terms,)
    noise = [_NoiseBeside(term, nothing) for term in rest]  # pyright: ignore[reportCallIssue]
    new: Any = _DriftBeside(first, rates)  # pyright: ignore[reportCallIssue]
    return diffrax.MultiTerm(new, *noise) if several else new


def _without(terms: Any) -> Any:
    """The terms of y; diffrax's loop is shown terms of pairs, as it compares them with the state."""
    is_beside = lambda x: isinstance(x, _Beside)
    return jtu.tree_map(lambda x: x.term if is_beside(x) else x, terms, is_leaf=is_beside)


class NotedInterpolation(diffrax.AbstractLocalInterpolation):
    """The solver's interpolation of y, and the notes of the step's end."""

    inner: Any
    notes: Any

    @property
    def t0(self) -> Any:
        """Where the step begins."""
        return self.inner.t0

    @property
    def t1(self) -> Any:
        """Where the step ends."""
        return self.inner.t1

    def evaluate(self, t0: Any, t1: Any = None, left: bool = True) -> PyTree:
        """The value at ``t0``, or the increment from ``t0`` to ``t1``."""
        notes = self.notes if t1 is None else jtu.tree_map(jnp.zeros_like, self.notes)
        return self.inner.evaluate(t0, t1, left), notes


class _Interpolate:
    """Makes a `NotedInterpolation`; equal for equal solvers, as it is a static part of what is compiled."""

    def __init__(self, inner: Any):
        self.inner = inner

    def __call__(self, *, t0: Any, t1: Any, dense: Any, notes: Any) -> NotedInterpolation:
        return NotedInterpolation(self.inner(t0=t0, t1=t1, **dense), notes)  # pyright: ignore[reportCallIssue]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Interpolate) and self.inner == other.inner

    def __hash__(self) -> int:
        return hash(self.inner)


class Charging(StandIn):
    """A solver of pairs (y, notes).

    Arguments:
        solver: the solver of y.
        paired: whether the terms are those of pairs, as `beside` makes them.
        watch: ``watch(solver, terms, t0, t1, y0, args, y1, error, dense, notes) -> notes``.
    """

    watch: Callable[..., Any]
    paired: bool = eqx.field(default=False, static=True)

    def own(self, terms: Any) -> Any:
        """The terms of y."""
        return _without(terms) if self.paired else terms

    @property
    def interpolation_cls(self) -> Any:
        """That of the solver, with the notes beside it."""
        return _Interpolate(self.solver.interpolation_cls)

    def init(self, terms: Any, t0: Any, t1: Any, y0: PyTree, args: Any) -> Any:
        """The state of the solver."""
        return self.solver.init(self.own(terms), t0, t1, y0[0], args)

    def step(
        self, terms: Any, t0: Any, t1: Any, y0: PyTree, args: Any, solver_state: Any, made_jump: Any
    ) -> tuple[Any, Any, Any, Any, Any]:
        """One step of the solver, and what was noted of it."""
        y, notes = y0
        terms = self.own(terms)
        y1, error, dense, state, result = self.solver.step(terms, t0, t1, y, args, solver_state, made_jump)
        notes = self.watch(self.solver, terms, t0, t1, y, args, y1, error, dense, notes)
        both = None if error is None else (error, jtu.tree_map(jnp.zeros_like, notes))
        return (y1, notes), both, {"dense": dense, "notes": notes}, state, result

    def func(self, terms: Any, t0: Any, y0: PyTree, args: Any) -> Any:
        """The vector field; notes stand still between steps."""
        return self.solver.func(self.own(terms), t0, y0[0], args), jtu.tree_map(jnp.zeros_like, y0[1])
