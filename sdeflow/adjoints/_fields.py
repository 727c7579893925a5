"""The right-hand side of an equation as a reverse pass needs it: term by term, with all that it closes over.

The adjoint equations of dy = f(t, y) dt + g(t, y) o dW, for a = dL/dy and the gradient of what f and g hold, are

    da = -a f_y dt - a g_y o dW,      dq = -a f_theta dt - a g_theta o dW,

run from the end to the start. A solver takes them as it takes any equation: terms for the state (y, a, s) with

    ds = -<a, f(t, y; theta') dt + g(t, y; theta') o dW>

whose derivative in theta', at theta, is q. So the solver carries a number in place of a gradient, and the gradient is
one vector-Jacobian product for each step, for all lanes of a batch at once.
"""

from typing import Any, Literal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree

from .._compat import dce_jaxpr
from ..equations._terms import DriftTerm
from ..paths._rows import RowNoise
from ..solvers._charging import _DriftBeside
from ..walking import Rows
from ._lanes import dot, zeros


def depends(f: Any, x: Any) -> bool:
    """Whether any floating output of ``f(x)`` is computed from the floating arrays of ``x``."""
    moving, rest = eqx.partition(x, eqx.is_inexact_array)
    run = lambda moving: jtu.tree_leaves(eqx.filter(f(eqx.combine(moving, rest)), eqx.is_inexact_array))
    jaxpr = jax.make_jaxpr(run)(moving).jaxpr
    return any(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[1])


class Field(eqx.Module):
    """One term of an equation, as an increment of (t, y) and of what drives it.

    Arguments:
        call: of kind "time" ``(t, y)``, the slope; "noise" ``(t, y, increment)``; "control" ``(t, y, t0, t1)``, driven
            by anything else from t0 to t1.
        additive: whether it is noise that does not depend on the state.
    """

    call: Any
    kind: Literal["time", "noise", "control"] = eqx.field(static=True)
    additive: bool = eqx.field(static=True)

    def increment(self, t: Any, y: PyTree, control: Any) -> PyTree:
        """The increment for a control as `Adjoined` hands it out."""
        if self.kind == "time":
            return _scaled(self.call(t, y), control)
        return self.call(t, y, *control) if self.kind == "control" else self.call(t, y, control)


def parts(terms: Any) -> tuple[Any, ...]:
    """The terms of a sum of terms."""
    return terms.terms if isinstance(terms, diffrax.MultiTerm) else (terms,)


def read_fields(terms: Any, args: Any, rows: Rows, y: PyTree, levy: bool) -> tuple[tuple[Field, ...], Any]:
    """The terms as fields, and ``controls(noise, left, right)``: what drives those of them that are noise, backwards.

    Arguments:
        levy: whether the solver asks for the Levy area of a row beside its increment.
    """
    t, noise = rows.left[0], jtu.tree_map(lambda x: x[0], rows.noise)
    noisy = [bool(RowNoise.of(term).paths) for term in parts(terms)]

    def controls(noise: Any, left: Any, right: Any) -> list[Any]:
        increments = rows.source.increments(noise, left, right, rows.own_grid)
        here = parts(rows.source.install(terms, increments, left, right))
        options = {"use_levy": True} if levy else {}
        return [term.contr(right, left, **options) if is_noise else None for term, is_noise in zip(here, noisy)]

    ends = (rows.left[0], rows.right[0])
    shapes = eqx.filter_eval_shape(controls, noise, *ends)
    samples = jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    convert = eqx.filter_closure_convert
    fields = []
    for term, is_noise, sample in zip(parts(terms), noisy, samples):
        if is_noise:
            x = sample.W if levy else sample
            call = lambda t, y, x, term=term: term.prod(term.vf(t, y, args), x)
            additive = not depends(lambda y, call=call, x=x: call(t, y, x), y)
            fields.append(Field(convert(call, t, y, x), "noise", additive))
        elif _is_drift(term):
            fields.append(Field(convert(lambda t, y, term=term: term.vf(t, y, args), t, y), "time", False))
        else:
            call = lambda t, y, t0, t1, term=term: term.vf_prod(t, y, args, term.contr(t0, t1))
            fields.append(Field(convert(call, t, y, *ends), "control", False))
    return tuple(fields), convert(controls, noise, *ends)


def _is_drift(term: Any) -> bool:
    """Whether a term is a slope times the length of a step; what regularisers integrate beside the state is, too."""
    return isinstance(term.term if isinstance(term, _DriftBeside) else term, DriftTerm | diffrax.ODETerm)


class Adjoined(diffrax.AbstractTerm):
    """A field for the state (y, a, s); a or s may be None.

    Arguments:
        field: what s reads, with theta'.
        frozen: the same with theta, which moves y and a.
        noise: the increment of a row from its end to its start.
    """

    field: Field
    frozen: Field
    noise: Any

    def vf(self, t: Any, y: PyTree, args: Any) -> Any:
        """The slope; where it is only known times its control, the place to compute it at."""
        if self.field.additive:
            # The same everywhere; solvers for such noise make sure of that.
            return t, zeros(y)
        if self.field.kind != "time":
            return t, y
        return self._moves(lambda field, y: field.call(t, y), y)

    def contr(self, t0: Any, t1: Any, **kwargs: Any) -> Any:
        """What drives the field."""
        return {"time": t1 - t0, "control": (t0, t1), "noise": self.noise}[self.field.kind]

    def prod(self, vf: Any, control: Any) -> PyTree:
        """The increment."""
        if self.field.kind == "time":
            return _scaled(vf, control)
        t, state = vf
        return self._moves(lambda field, y: field.increment(t, y, control), state)

    def is_vf_expensive(self, t0: Any, t1: Any, y: PyTree, args: Any) -> bool:
        """Places are no slopes, so they must not be stored as such."""
        return self.field.kind != "time"

    def _moves(self, of: Any, state: Any) -> Any:
        y, a, s = state
        if a is None:
            return of(self.frozen, y), None, None
        if self.field.additive:
            # What it holds is charged for by `noise_charge`, which knows both ends of the row.
            return of(self.frozen, y), zeros(a), zeros(s)
        dy, pull = jax.vjp(lambda y: of(self.frozen, y), y)
        (da,) = pull(a)
        ds = None if s is None else -dot(a, of(self.field, y))
        return dy, jtu.tree_map(jnp.negative, da), ds


def noise_charge(fields: tuple[Field, ...], controls: Any, ends: Any, levy: bool) -> Array | float:
    """<a, g dW> integrated over a row for noise that does not depend on the state, with a linear in time.

    With m(x) = <a, g x> at either end it is (m_0(W) + m_1(W)) / 2 - (m_1(H) - m_0(H)); without H, the trapezoidal rule.

    Arguments:
        controls: the row's noise from its end to its start.
        ends: (t, y, a) at the start and at the end.
    """
    total: Any = 0.0
    for field, row in zip(fields, controls):
        if field.additive:
            at = lambda end, x, field=field: dot(end[2], field.call(end[0], end[1], x))
            back, area = (row.W, getattr(row, "H", None)) if levy else (row, None)
            total = total - (at(ends[0], back) + at(ends[1], back)) / 2
            if area is not None:
                total = total - (at(ends[1], area) - at(ends[0], area))
    return total


def _scaled(tree: PyTree, h: Any) -> PyTree:
    return jtu.tree_map(lambda x: jnp.asarray(h, x.dtype) * x, tree)
