r"""``Clock``: the coordinates in which every linear reference is Brownian motion.

Let a linear equation have X(t1) | X(t) = x ~ N(Phi x + c, Q), with Phi, c and Q of what is left from t to t1. The mean
of the end, in units of the noise of the whole horizon,

    z(t) = G (Phi x + c) - shift,    G Q(t0 -> t1) G' = epsilon I,

is a martingale with additive noise, so a Brownian motion whose clock is a matrix: what is left of its variance at t is
``epsilon B(t)`` with ``B = G Q(t -> t1) G' / epsilon``, from I at t0 down to 0 at t1. Seen backwards from the end, what
is left is ``epsilon (I - B)``, at the same z. The static problem is hence that of a Brownian kernel with variance
epsilon, and a potential need only know z and B; for Brownian motion itself B is the number (t1 - t) / (t1 - t0).
Epsilon is the mean over the components of the variance that the reference gains over the horizon, so that for Brownian
motion with one sigma the coordinates are the user's own.

Where the reference depends on time, the laws from a number of knots to t1 are integrated once. From any other time only
the rest of its piece is, which costs a few small products and, unlike a table that is interpolated, loses no digits.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._compat import is_concrete
from ..equations import BrownianMotion, LinearSDE
from ..equations._varying import Law, apply, compose, identity, laws_to_end, over_piece, times


class Clock(eqx.Module):
    """A linear reference on [t0, t1] in coordinates in which it is Brownian motion.

    Arguments:
        reference: a `LinearSDE`.
        t0, t1: the horizon, t0 < t1.
        shift: shape (d,), subtracted from the coordinates: near the middle of the data rounding hurts least.

    Raises:
        TypeError: if the reference is not linear.
        ValueError: for a horizon that is empty or not finite, or a reference that leaves a direction without noise.

    Example:
        >>> import jax.numpy as jnp, sdeflow as sf
        >>> clock = sf.bridges.Clock(sf.equations.BrownianMotion(2, 0.5), 0.0, 4.0)
        >>> z, left = clock.at(1.0, jnp.array([1.0, 2.0]))
        >>> float(clock.epsilon), z.tolist(), float(left)
        (1.0, [1.0, 2.0], 0.75)
    """

    reference: LinearSDE
    t0: Float[Array, ""]
    t1: Float[Array, ""]
    epsilon: Float[Array, ""]
    scale: Array
    shift: Float[Array, " d"]
    knots: Float[Array, " n"] | None
    laws: Law | None

    def __init__(self, reference: LinearSDE, t0: Any = 0.0, t1: Any = 1.0, *, shift: Any = None):
        if not isinstance(reference, LinearSDE):
            raise TypeError(
                f"the reference of a bridge must be a LinearSDE, such as BrownianMotion(dim, sigma), got "
                f"{type(reference).__name__}."
            )
        if is_concrete(t0, t1) and not (np.isfinite(t0) and np.isfinite(t1) and t0 < t1):
            raise ValueError(f"a bridge needs t0 < t1, both finite, got t0={t0} and t1={t1}.")
        dtype = reference.dtype
        self.reference = reference
        self.t0, self.t1 = jnp.asarray(t0, dtype), jnp.asarray(t1, dtype)
        self.knots = self.laws = None
        if reference.is_constant:
            _, _, q = transition(reference, self.t0, self.t1)
        else:
            horizon = self.t1 - self.t0
            laws = laws_to_end(_coefficients(reference), self.t0, horizon, reference.pieces)
            _, _, q = first = jax.tree.map(lambda x: x[0], laws)
            self.laws = jax.tree.map(lambda x, none: jnp.concatenate([x[1:], none[None]]), laws, identity(first))
            knots = self.t0 + horizon * (jnp.arange(1, reference.pieces + 1) / reference.pieces).astype(dtype)
            self.knots = knots.at[-1].set(self.t1)
        variance = q if q.ndim == 1 else jnp.diagonal(q)
        if is_concrete(q) and not _positive(q):
            raise ValueError(
                "the reference leaves a direction without noise between t0 and t1, and a bridge needs noise in all."
            )
        self.epsilon = variance.mean()
        # For a matrix the inverse of its Cholesky factor: any G with G Q G' = epsilon will do.
        if q.ndim == 1:
            self.scale = jnp.sqrt(self.epsilon / q)
        else:
            factor = jnp.linalg.cholesky(q)
            self.scale = jnp.sqrt(self.epsilon) * jax.scipy.linalg.solve_triangular(
                factor, jnp.eye(len(q), dtype=dtype), lower=True
            )
        self.shift = jnp.zeros(len(variance), dtype) if shift is None else jnp.asarray(shift, dtype)

    def around(self, z: Array) -> "Clock":
        """The same clock with what has the coordinates z (d,) for its origin."""
        return eqx.tree_at(lambda clock: clock.shift, self, (self.shift + z).astype(self.shift.dtype))

    def map(self, t: Any) -> tuple[Array, Array, Array]:
        """The map from states at t to coordinates, and what is left of the noise.

        Returns:
            J and c with ``z = J x + c`` (J a vector where components do not mix, else a matrix) and B, a number, a
            vector or a matrix; NaN for a traced time outside of the horizon.

        Raises:
            ValueError: for such a time that is known, or more than one.
        """
        t = self._inside(jnp.asarray(t, self.t1.dtype))
        phi, c, q = self._rest(t)
        jacobian, offset = times(self.scale, phi), apply(self.scale, c) - self.shift
        if isinstance(self.reference, BrownianMotion) and self.reference.is_constant:
            return jacobian, offset, (self.t1 - t) / (self.t1 - self.t0)
        if q.ndim == 1:
            return jacobian, offset, self.scale**2 * q / self.epsilon
        left = self.scale @ q @ self.scale.T / self.epsilon
        return jacobian, offset, left

    def _inside(self, t: Array) -> Array:
        """A time of the horizon, up to rounding; any other would have a drift of its own that means nothing."""
        if t.ndim:
            raise ValueError(f"a bridge is evaluated at one time, got times of shape {t.shape}: use jax.vmap for many.")
        slack = 8 * jnp.finfo(t.dtype).eps * jnp.maximum(jnp.abs(self.t0), jnp.abs(self.t1))
        fine = (t >= self.t0 - slack) & (t <= self.t1 + slack)
        if is_concrete(fine) and not bool(fine):
            raise ValueError(f"t={t:g} lies outside of the bridge's horizon, {self.t0:g} to {self.t1:g}.")
        return jnp.where(fine, t, jnp.nan)

    def _rest(self, t: Array) -> Law:
        """The law of the reference from t to t1."""
        if self.knots is None or self.laws is None:
            return transition(self.reference, t, self.t1)
        # What is left of the piece that t lies in, then the pieces after it. The last has none, so that near t1 no
        # digit is lost, and at t1 no time is left.
        count = len(self.knots)
        piece = jnp.clip(jnp.searchsorted(self.knots, t, side="right"), 0, count - 1)
        stop = self.knots[piece]
        within, _ = over_piece(_coefficients(self.reference), t, stop - t)
        return compose(within, jax.tree.map(lambda x: x[piece], self.laws))

    def at(self, t: Any, x: Array) -> tuple[Array, Array]:
        """The coordinates z of a state x (d,) at time t, and B."""
        jacobian, offset, left = self.map(t)
        return apply(jacobian, x) + offset, left

    def end(self, x: Array) -> Array:
        """The coordinates of states (..., d) at t1."""
        return apply(self.scale, x) - self.shift

    def start(self, x: Array) -> Array:
        """The coordinates of states (..., d) at t0."""
        jacobian, offset, _ = self.map(self.t0)
        return apply(jacobian, x) + offset

    def state(self, z: Array) -> Array:
        """The state at t1 with coordinates z (..., d)."""
        if self.scale.ndim == 1:
            return (z + self.shift) / self.scale
        return jnp.linalg.solve(self.scale, (z + self.shift)[..., None])[..., 0]

    def noise(self, t: Any) -> Array:
        """L L' at time t, a vector where components do not mix."""
        if self.reference.is_diagonal:
            return self.reference.diagonals(t)[2] ** 2
        L = self.reference.coefficients(t)[2]
        return times(L, L.T)


def transition(reference: LinearSDE, s: Any, t: Any) -> tuple[Array, Array, Array]:
    """``reference.transition(s, t)``; vectors, and no series, where components do not mix."""
    if not reference.is_diagonal:
        return reference.transition(s, t)
    if not reference.is_constant:
        phi, c, q = laws_to_end(_coefficients(reference), s, t - s, reference.pieces)
        return phi[0], c[0], q[0]
    a, b, L = reference.diagonals(s)
    variance, duration = L**2, t - s
    if isinstance(reference, BrownianMotion):
        return jnp.ones_like(a), jnp.zeros_like(a), variance * duration
    return (
        jnp.exp(a * duration),
        b * duration * _mean_exp(a * duration),
        variance * duration * _mean_exp(2 * a * duration),
    )


def _coefficients(reference: LinearSDE) -> Any:
    return reference.diagonals if reference.is_diagonal else reference.coefficients


def _mean_exp(u: Array) -> Array:
    """(exp(u) - 1) / u, 1 at 0."""
    small = jnp.abs(u) < 1e-4
    return jnp.where(small, 1 + u / 2 + u**2 / 6, jnp.expm1(u) / jnp.where(small, 1, u))


def _positive(q: Array) -> bool:
    known = np.asarray(q, np.float64)
    if known.ndim == 1:
        return bool((known > 0).all())
    size = np.sqrt(np.diagonal(known))
    # Relative to its own diagonal: positions and velocities have units of their own.
    return bool((size > 0).all() and np.linalg.eigvalsh(known / np.outer(size, size)).min() > 0)
