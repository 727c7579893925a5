"""Diffrax's explicit and stochastic Runge-Kutta steps with their stages written out one after the other.

diffrax loops over stages, so that large tableaus compile fast. A loop cannot be fused with what surrounds it, its
buffers cost memory traffic, and only some kinds of loop have derivatives of every order. Here the same tableau gives
the same stages,

    k_i = f(t0 + c_i h, y0 + sum_{j<i} a_ij k_j) h,      y1 = y0 + sum_i b_i k_i,

as straight code: one class for ordinary tableaus, which drive drift and noise alike, one for those of Foster, dos Reis
and Strange (2023), where W, H and K have coefficients of their own. Values differ from diffrax's in rounding only. The
solver's own state keeps diffrax's form, so a solve may begin with one and go on with the other.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

LIMIT = 7  # more stages than this would cost more to compile than they save


def unrolled(solver: diffrax.AbstractSolver, times: int = 1) -> diffrax.AbstractSolver | None:
    """The solver with its stages written out; None where that does not apply or the user chose a loop.

    Arguments:
        times: how often what wraps the solver calls it in one step.
    """
    if getattr(solver, "scan_kind", "none") is not None:
        return None
    step, tableau = type(solver).step, getattr(solver, "tableau", None)
    if isinstance(solver, diffrax.AbstractERK) and step is diffrax.AbstractRungeKutta.step:
        few = isinstance(tableau, diffrax.ButcherTableau) and times * tableau.num_stages <= LIMIT
        return UnrolledERK(solver) if few else None
    if isinstance(solver, diffrax.AbstractSRK) and step is diffrax.AbstractSRK.step:
        return UnrolledSRK(solver) if tableau is not None and times * len(tableau.b_sol) <= LIMIT else None
    return None


def with_all_derivatives(solver: Any) -> Any:
    """The solver, which loops over its stages, with a loop that has derivatives of every order.

    Implicit and large tableaus need "bounded" loops for that, stochastic ones "lax" loops; a user's choice is kept.
    """
    if getattr(solver, "scan_kind", "none") is not None:
        return solver
    return dataclasses.replace(solver, scan_kind="lax" if isinstance(solver, diffrax.AbstractSRK) else "bounded")


class StandIn(diffrax.AbstractWrappedSolver):
    """Stands in for a solver, and steps as it does; subclasses change how.

    diffrax asks wrapped solvers what they wrap one level deep only, and then looks for the fields of what it found in
    the wrapper. So ``HalfSolver(Kvaerno3())``, whose root finder it would not find, has to stand behind this.
    """

    solver: Any

    @property
    def term_structure(self) -> Any:
        return self.solver.term_structure

    @property
    def interpolation_cls(self) -> Any:
        return self.solver.interpolation_cls

    @property
    def term_compatible_contr_kwargs(self) -> Any:
        return self.solver.term_compatible_contr_kwargs

    def order(self, terms: Any) -> Any:
        return self.solver.order(terms)

    def strong_order(self, terms: Any) -> Any:
        return self.solver.strong_order(terms)

    def error_order(self, terms: Any) -> Any:
        return self.solver.error_order(terms)

    def init(self, terms: Any, t0: Any, t1: Any, y0: PyTree, args: Any) -> Any:
        return self.solver.init(terms, t0, t1, y0, args)

    def step(
        self, terms: Any, t0: Any, t1: Any, y0: PyTree, args: Any, solver_state: Any, made_jump: Any
    ) -> tuple[Any, Any, Any, Any, Any]:
        return self.solver.step(terms, t0, t1, y0, args, solver_state, made_jump)

    def func(self, terms: Any, t0: Any, y0: PyTree, args: Any) -> Any:
        return self.solver.func(terms, t0, y0, args)


def _combine(coefficients: Sequence[Any], stages: Sequence[Any]) -> PyTree | None:
    """The linear combination of stages; None if every coefficient is zero."""
    terms = [(float(a), k) for a, k in zip(coefficients, stages) if k is not None and float(a) != 0]
    if not terms:
        return None
    scaled = [k if a == 1 else jtu.tree_map(lambda x, a=a: a * x, k) for a, k in terms]
    return jtu.tree_map(lambda *xs: sum(xs[1:], xs[0]), *scaled)


def _plus(y: PyTree, *increments: PyTree | None) -> PyTree:
    given = [x for x in increments if x is not None]
    return jtu.tree_map(lambda y, *xs: y + sum(xs[1:], xs[0]), y, *given) if given else y


def _or_zeros(increment: PyTree | None, y: PyTree) -> PyTree:
    return jtu.tree_map(jnp.zeros_like, y) if increment is None else increment


class UnrolledERK(StandIn):
    """An explicit Runge-Kutta solver with its stages written out."""

    def _reuses(self, terms: Any, t0: Any, t1: Any, y0: PyTree, args: Any) -> bool:
        # A field that is dear to evaluate is only ever asked for its product with the control.
        return self.solver.tableau.fsal and not terms.is_vf_expensive(t0, t1, y0, args)

    def init(self, terms: Any, t0: Any, t1: Any, y0: PyTree, args: Any) -> Any:
        """The first slope, for tableaus whose last stage is the next step's first; else no state."""
        return self.adopt(None, terms, t0, t1, y0, args)

    def adopt(self, state: Any, terms: Any, t0: Any, t1: Any, y0: PyTree, args: Any) -> Any:
        """From diffrax's state of this solver (None: from none) to one whose slope is always valid."""
        if not self._reuses(terms, t0, t1, y0, args):
            return None
        evaluate = lambda: jtu.tree_map(jnp.asarray, terms.vf(t0, y0, args))
        slope = evaluate() if state is None else jax.lax.cond(state[0], evaluate, lambda: state[1])
        return jnp.asarray(False), slope

    def step(
        self, terms: Any, t0: Any, t1: Any, y0: PyTree, args: Any, solver_state: Any, made_jump: Any
    ) -> tuple[Any, Any, Any, Any, Any]:
        """One step."""
        tableau, h, control = self.solver.tableau, t1 - t0, terms.contr(t0, t1)
        reuses = self._reuses(terms, t0, t1, y0, args)
        slope: Any = None
        ks: list[Any] = []
        if reuses:
            slope = solver_state[1]
            if made_jump is not False:
                slope = jax.lax.cond(made_jump, lambda: terms.vf(t0, y0, args), lambda: slope)
            ks.append(terms.prod(slope, control))
        y = y0
        times = [0.0 if tableau.c1 is None else float(tableau.c1), *map(float, tableau.c)]
        for i in range(len(ks), tableau.num_stages):
            y = y0 if i == 0 else _plus(y0, _combine(tableau.a_lower[i - 1], ks))
            t = t1 if times[i] == 1 else t0 + times[i] * h
            if reuses:
                slope = terms.vf(t, y, args)
                ks.append(terms.prod(slope, control))
            else:
                ks.append(terms.vf_prod(t, y, args, control))
        y1 = y if tableau.ssal else _plus(y0, _combine(tableau.b_sol, ks))
        error = _or_zeros(_combine(tableau.b_error, ks), y0)
        dense = {"y0": y0, "y1": y1, "k": jtu.tree_map(lambda *k: jnp.stack(k), *ks)}
        state = (jnp.asarray(False), slope) if reuses else None
        return y1, error, dense, state, diffrax.RESULTS.successful


class UnrolledSRK(StandIn):
    """A stochastic Runge-Kutta solver with its stages written out."""

    @property
    def minimal_levy_area(self) -> Any:
        """What the solver needs of its Brownian path."""
        return self.solver.minimal_levy_area

    def step(
        self, terms: Any, t0: Any, t1: Any, y0: PyTree, args: Any, solver_state: None, made_jump: Any
    ) -> tuple[Any, Any, Any, Any, Any]:
        """One step."""
        tableau, h = self.solver.tableau, t1 - t0
        drift, diffusion = terms.terms
        noise = diffusion.contr(t0, t1, use_levy=True)
        if not isinstance(noise, self.minimal_levy_area):
            raise ValueError(  # noqa: TRY004
                f"{type(self.solver).__name__} needs levy_area=diffrax.{self.minimal_levy_area.__name__}, but the "
                f"path's increments are of type {type(noise).__name__}: build the path with that levy_area."
            )
        fields = (("W", tableau.coeffs_w), ("H", tableau.coeffs_hh), ("K", tableau.coeffs_kk))
        parts = [(getattr(noise, name), coeffs) for name, coeffs in fields if coeffs is not None]
        count = len(tableau.b_sol)
        times = [0.0, *map(float, tableau.c)]
        skip_f = tableau.ignore_stage_f if tableau.ignore_stage_f is not None else [False] * count
        skip_g = tableau.ignore_stage_g if tableau.ignore_stage_g is not None else [False] * count
        additive = tableau.is_additive_noise()

        fs: list[Any] = []
        gs: list[list[Any]] = [[] for _ in parts]
        if additive:
            first, last = diffusion.vf(t0, y0, args), diffusion.vf(t1, y0, args)
            shared = [diffusion.prod(first, x) for x, _ in parts]

        def from_noise(stage: int) -> list[Any]:
            if additive:
                return [_combine([c.a[stage]], [g]) for (_, c), g in zip(parts, shared)]
            return [] if stage == 0 else [_combine(c.a[stage - 1], g) for (_, c), g in zip(parts, gs)]

        for i in range(count):
            from_drift = None if i == 0 else _combine(tableau.a[i - 1], fs)
            y, t = _plus(y0, from_drift, *from_noise(i)), t0 + times[i] * h
            fs.append(None if skip_f[i] else drift.vf_prod(t, y, args, h))
            for (x, _), g in zip(parts, gs):
                g.append(None if additive or skip_g[i] else diffusion.vf_prod(t, y, args, x))

        if additive:
            noisy = [_combine([c.b_sol], [g]) for (_, c), g in zip(parts, shared)]
            # The diffusion may change with time: half of its change meets W, or W - 2 H where H is known.
            middle = noise.W
            if tableau.coeffs_hh is not None:
                middle = jtu.tree_map(lambda w, a: w - 2 * a, noise.W, noise.H)
            ends = [diffusion.prod(g, middle) for g in (first, last)]
            noisy.append(jtu.tree_map(lambda a, b: (b - a) / 2, *ends))
        else:
            noisy = [_combine(c.b_sol, g) for (_, c), g in zip(parts, gs)]
        y1 = _plus(y0, _combine(tableau.b_sol, fs), *noisy)

        error = None
        if tableau.b_error is not None:
            shares = [_combine(tableau.b_error, fs)]
            if not additive:
                shares += [_combine(c.b_error, g) for (_, c), g in zip(parts, gs)]
            error = _plus(jtu.tree_map(jnp.zeros_like, y0), *shares)
        return y1, error, {"y0": y0, "y1": y1}, None, diffrax.RESULTS.successful
