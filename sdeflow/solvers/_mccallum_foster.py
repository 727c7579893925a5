"""Any explicit one-step method made reversible, by coupling two copies of the solution.

With the increment of the method, Psi(t, y, h, W) = y(t + h) - y,

    y' = c y + (1 - c) z + Psi(t, z, h, W),      z' = z - Psi(t + h, y', -h, -W),      z_0 = y_0,

which keeps the order of the method and can be undone exactly:

    z = z' + Psi(t + h, y', -h, -W),      y = (y' - (1 - c) z - Psi(t, z, h, W)) / c.

Undoing N steps multiplies rounding errors by c^-N, and stability needs c < 1, so 1 - c should be about 1/N.

Source: McCallum and Foster, Efficient, accurate and stable gradients for neural ODEs, 2024, arXiv:2410.11648.
"""

from typing import Any, ClassVar

import diffrax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import PyTree

from ..paths._rows import both_ways
from ._exponential_adams import ExponentialAdams
from ._unrolled import unrolled, with_all_derivatives

COUPLING = 0.999  # where nobody says how many steps there will be
_NOT_ONE_STEP = (diffrax.AbstractImplicitSolver, diffrax.ReversibleHeun, diffrax.LeapfrogMidpoint, ExponentialAdams)


class McCallumFoster(diffrax.AbstractWrappedSolver):
    """An explicit one-step solver made reversible: its order, for two of its steps each.

    For `sdeflow.adjoints.ReversibleAdjoint`, whose gradients need memory for one state, however many steps there are.

    Arguments:
        solver: an explicit one-step solver of diffrax, e.g. ``diffrax.Heun()`` or ``diffrax.Tsit5()``.
        coupling: c, below 1. Default: 1 - 1/N where `sdeflow.solve` takes N fixed steps (N = 100 if they are fewer),
            0.999 elsewhere.

    Raises:
        ValueError: for an implicit, wrapped or multi-step solver, and for a coupling that is not between 0 and 1.

    Example:
        >>> import diffrax, jax.numpy as jnp, sdeflow as sf
        >>> decay = sf.ODE(lambda t, y, args: -y)
        >>> sol = sf.solve(decay, jnp.array(1.0), [0.0, 1.0], dt0=0.01,
        ...                solver=sf.solvers.McCallumFoster(diffrax.Heun()), adjoint=sf.adjoints.ReversibleAdjoint())
        >>> round(float(sol.final), 4)
        0.3679
    """

    solver: diffrax.AbstractSolver
    coupling: Any = None

    interpolation_cls: ClassVar = diffrax.LocalLinearInterpolation

    def __check_init__(self):
        name = type(self.solver).__name__
        if not isinstance(self.solver, diffrax.AbstractSolver):
            raise ValueError(f"solver must be an instance of a diffrax solver, got {self.solver!r}.")  # noqa: TRY004
        wrapper = isinstance(self.solver, diffrax.HalfSolver | McCallumFoster)
        if wrapper or isinstance(self.solver, _NOT_ONE_STEP):
            raise ValueError(
                f"{name} is not an explicit one-step method, so McCallumFoster cannot make it reversible: give it one "
                "such as diffrax.Heun() or diffrax.Tsit5()."
            )
        if isinstance(self.coupling, float | int) and not 0 < self.coupling < 1:
            raise ValueError(f"coupling must lie between 0 and 1, e.g. 1 - 1/N for N steps, got {self.coupling!r}.")

    @property
    def term_structure(self) -> Any:
        """That of the solver."""
        return self.solver.term_structure

    @property
    def term_compatible_contr_kwargs(self) -> Any:
        """Those of the solver."""
        return self.solver.term_compatible_contr_kwargs

    @property
    def scan_kind(self) -> Any:
        """How the solver loops over its stages, which some of diffrax's adjoints look up here and replace."""
        return self.solver.scan_kind  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def c(self) -> Any:
        """The coupling."""
        return COUPLING if self.coupling is None else self.coupling

    def order(self, terms: Any) -> Any:
        """Order for ordinary equations."""
        return self.solver.order(terms)

    def strong_order(self, terms: Any) -> Any:
        """Strong order."""
        return self.solver.strong_order(terms)

    def error_order(self, terms: Any) -> Any:
        """Order of the error estimate."""
        return self.solver.error_order(terms)

    def init(self, terms: Any, t0: Any, t1: Any, y0: PyTree, args: Any) -> PyTree:
        """The second copy of the start."""
        del terms, t0, t1, args
        return jtu.tree_map(jnp.asarray, y0)

    def increment(self, terms: Any, t0: Any, t1: Any, y: PyTree, args: Any) -> tuple[PyTree, PyTree | None]:
        """Psi, from ``t0`` to ``t1`` (which may lie before it), and the solver's error estimate."""
        # No slope is carried over from step to step: it would belong to the other copy.
        method: Any = unrolled(self.solver) or with_all_derivatives(self.solver)
        state = method.init(terms, t0, t1, y, args)
        y1, error, _, _, _ = method.step(terms, t0, t1, y, args, state, False)
        return jtu.tree_map(jnp.subtract, y1, y), error

    def step(
        self, terms: Any, t0: Any, t1: Any, y0: PyTree, args: Any, solver_state: PyTree, made_jump: Any
    ) -> tuple[PyTree, PyTree | None, dict[str, Any], PyTree, Any]:
        """One step."""
        del made_jump
        terms, z0, c = both_ways(terms), solver_state, self.c
        ahead, error = self.increment(terms, t0, t1, z0, args)
        y1 = jtu.tree_map(lambda y, z, psi: c * y + (1 - c) * z + psi, y0, z0, ahead)
        back, _ = self.increment(terms, t1, t0, y1, args)
        z1 = jtu.tree_map(jnp.subtract, z0, back)
        return y1, error, {"y0": y0, "y1": y1}, z1, diffrax.RESULTS.successful

    def func(self, terms: Any, t0: Any, y0: PyTree, args: Any) -> Any:
        """The vector field."""
        return self.solver.func(terms, t0, y0, args)
