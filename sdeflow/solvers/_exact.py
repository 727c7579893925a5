"""Linear equations, taken from one time to the next by their own law.

    X' = Phi X + c + g_0 W - 2 g_1 H + r,

with the transition (Phi, c, Q) of a `sdeflow.equations.LinearSDE`, and its noise split into what the step's increment W
and area H of the Brownian motion account for, and an independent rest r, which makes up Q: see `equations._driven`.
"""

import math
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array

from .._compat import unwrap
from ..equations._driven import driven_step, symmetric_root
from ..equations._linear import LinearDriftTerm
from ..paths._increments import backwards


class Exact(diffrax.AbstractItoSolver, diffrax.AbstractStratonovichSolver):
    """The exact steps of a `sdeflow.equations.LinearSDE`, stable and right in law for every length of the step.

    `sdeflow.solve` takes them by default for a LinearSDE with fixed steps and a ``key``. Given the state at the start
    of a step, the state at its end has the mean and the covariance of ``equation.transition``, to rounding; so the
    states at the requested times have the same joint law whatever the steps between them.

    What holds of single paths: the noise of a step is the conditional mean of its stochastic integral given the
    Brownian increment W and the area H of that step, which are those that any solver finds on the same path, plus an
    independent normal that makes up the covariance. That rest has a standard deviation of O(h^2.5), so a path differs
    from the solution driven by the same Brownian motion by O(h^2), the strong order of this method, and from the
    path of other steps on the same Brownian motion by as much. Where the rest vanishes (`BrownianMotion`, `Momentum`)
    the path is that solution at every length of the step.

    The rest is drawn from K, the third normal of a step, and where components mix from normals of its own, which only
    `sdeflow.paths.LinearBrownian` (which ``key=`` makes) has; so it needs a path with
    ``levy_area=diffrax.SpaceTimeTimeLevyArea`` and as many noises as components, or a LinearBrownian. Steps do not
    adapt, and values between steps are interpolated linearly.

    Arguments:
        pieces: into how many each step is divided to integrate coefficients that depend on time; None takes those of
            the equation. A step whose coefficients vary too fast for them ends as ``RESULTS.nonfinite``.

    Raises:
        TypeError: while tracing, for another equation.
        ValueError: while tracing, for noise that knows too little of a step.

    Example:
        >>> import jax, jax.numpy as jnp, sdeflow as sf
        >>> stiff = sf.equations.OrnsteinUhlenbeck(theta=1e6, mean=2.0)
        >>> sol = sf.solve(stiff, jnp.ones(3), [0.0, 1.0], key=jax.random.key(0), solver=sf.solvers.Exact())
        >>> bool(jnp.abs(sol.final - 2).max() < 0.01)
        True
    """

    pieces: int | None = eqx.field(default=None, static=True)

    term_structure: ClassVar = diffrax.MultiTerm[tuple[diffrax.AbstractTerm, diffrax.AbstractTerm]]
    interpolation_cls: ClassVar = diffrax.LocalLinearInterpolation
    minimal_levy_area: ClassVar = diffrax.AbstractSpaceTimeTimeLevyArea

    def __check_init__(self):
        n = self.pieces
        if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
            raise ValueError(f"pieces must be a positive integer or None, got {n!r}.")

    def order(self, terms: Any) -> int:
        """Order for ordinary equations."""
        return 2

    def strong_order(self, terms: Any) -> float:
        """Strong order, on the given Brownian motion."""
        return 2.0

    def init(self, terms: Any, t0: Any, t1: Any, y0: Array, args: Any) -> None:
        """No state."""
        _equation_of(terms)

    def step(
        self, terms: Any, t0: Any, t1: Any, y0: Array, args: Any, solver_state: None, made_jump: Any
    ) -> tuple[Array, None, dict[str, Array], None, Any]:
        """One step."""
        inner, direction = unwrap(terms)
        equation = _equation_of(terms)
        start, stop = t0 * direction, t1 * direction
        h = jnp.asarray(stop - start, y0.dtype)
        law = driven_step(equation, start, h, self.pieces)
        noise = _increment(inner.terms[1], start, stop, direction)
        normals = _normals(noise, y0.shape, equation.is_diagonal)
        with jax.default_matmul_precision("highest"):
            along = jnp.multiply if equation.is_diagonal else jnp.matmul
            rest = law.left_over if equation.is_diagonal else symmetric_root(law.left_over)
            moved = along(law.grown, y0) + law.shift
            driven = along(law.of_increment, noise.W) + along(law.of_area, noise.H) + along(rest, normals)
        y1 = y0 + (moved + driven).astype(y0.dtype)
        return y1, None, {"y0": y0, "y1": y1}, None, diffrax.RESULTS.successful

    def func(self, terms: Any, t0: Any, y0: Array, args: Any) -> Any:
        """The vector fields."""
        return terms.vf(t0, y0, args)


def _equation_of(terms: Any) -> Any:
    first = unwrap(terms)[0].terms[0]
    if not isinstance(first, LinearDriftTerm):
        raise TypeError(
            "Exact takes the steps of a sf.equations.LinearSDE and knows no other equation: use a solver such as "
            "diffrax.ShARK() here."
        )
    return first.equation


def _increment(term: Any, start: Any, stop: Any, direction: Any) -> Any:
    """What is known of the noise from ``start`` to ``stop``, which comes first if time decreases."""
    if isinstance(direction, int):
        return term.contr(start, stop, use_levy=True)
    # diffrax's direction changes the sign of the area, too, which has none.
    row = term.contr(jnp.minimum(start, stop), jnp.maximum(start, stop), use_levy=True)
    return jtu.tree_map(lambda x, y: jnp.where(direction > 0, x, y), row, backwards(row))


def _normals(noise: Any, shape: tuple[int, ...], is_diagonal: bool) -> Array:
    """Normals that are independent of W and H, of the step's variance, one for each component of the state."""
    if not hasattr(noise, "W") or not hasattr(noise, "H"):
        raise ValueError(
            "Exact needs to know more of a step than W: drive it by key=, or by a path with "
            "levy_area=diffrax.SpaceTimeTimeLevyArea."
        )
    if hasattr(noise, "normals"):
        return noise.normals
    count = math.prod(shape)
    if not hasattr(noise, "K") or noise.K.size < count or (is_diagonal and noise.K.shape != shape):
        raise ValueError(
            f"Exact draws {count} normals a step beside W and H, one a component, which this path does not have: drive "
            "it by key=, or by sf.paths.LinearBrownian(grid, structure, dim=..., key=...)."
        )
    scaled = noise.K * math.sqrt(720)
    return scaled if is_diagonal else scaled.reshape(-1)[:count]
