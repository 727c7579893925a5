r"""``Clock``: the coordinates in which every linear reference is Brownian motion.

Let a linear equation have X(t1) | X(t) = x ~ N(Phi x + c, Q), with Phi, c and Q of what is left from t to t1. The mean
of the end, in units of the noise of the whole horizon,

    z(t) = G (Phi x + c) - shift,    G Q(t0 -> t1) G' = epsilon I,

is a martingale with additive noise, so a Brownian motion whose clock is a matrix: what is left of its variance at t is
``epsilon B(t)`` with ``B = G Q(t -> t1) G' / epsilon``, from I at t0 down to 0 at t1. Seen backwards from the end, what
is left is ``epsilon (I - B)``, at the same z. The static problem is hence that of a Brownian kernel with variance
epsilon, and a potential need only know z and B; for Brownian motion itself B is the number (t1 - t) / (t1 - t0).
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from .._compat import is_concrete
from ..equations import BrownianMotion, LinearSDE, OrnsteinUhlenbeck


class Clock(eqx.Module):
    """A linear reference on [t0, t1] in coordinates in which it is Brownian motion.

    Arguments:
        reference: a `LinearSDE`.
        t0, t1: the horizon, t0 < t1.
        epsilon: the variance of the Brownian kernel in the coordinates; by default the mean over the components of the
            variance that the reference gains over the horizon, so that for Brownian motion with one sigma the
            coordinates are the user's own.
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

    def __init__(self, reference: LinearSDE, t0: Any = 0.0, t1: Any = 1.0, *, epsilon: Any = None, shift: Any = None):
        if not isinstance(reference, LinearSDE):
            raise TypeError(f"the reference of a bridge must be a LinearSDE, got {type(reference).__name__}.")
        if is_concrete(t0, t1) and not (np.isfinite(t0) and np.isfinite(t1) and t0 < t1):
            raise ValueError(f"a bridge needs t0 < t1, both finite, got t0={t0} and t1={t1}.")
        dtype = reference.b.dtype
        self.reference = reference
        self.t0, self.t1 = jnp.asarray(t0, dtype), jnp.asarray(t1, dtype)
        _, _, q = transition(reference, self.t0, self.t1)
        variance = q if q.ndim == 1 else jnp.diagonal(q)
        if is_concrete(q) and not _positive(q):
            raise ValueError(
                "the reference leaves a direction without noise between t0 and t1, and a bridge needs noise in all."
            )
        self.epsilon = variance.mean() if epsilon is None else jnp.asarray(epsilon, dtype)
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
            vector or a matrix.
        """
        phi, c, q = transition(self.reference, jnp.asarray(t, self.t1.dtype), self.t1)
        jacobian, offset = times(self.scale, phi), apply(self.scale, c) - self.shift
        if isinstance(self.reference, BrownianMotion):
            return jacobian, offset, (self.t1 - t) / (self.t1 - self.t0)
        if q.ndim == 1:
            return jacobian, offset, self.scale**2 * q / self.epsilon
        left = self.scale @ q @ self.scale.T / self.epsilon
        return jacobian, offset, left

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

    def noise(self) -> Array:
        """L L', a vector where components do not mix."""
        L = self.reference.L
        return jnp.diagonal(L) ** 2 if _apart(self.reference) else L @ L.T


def apply(m: Array, x: Array) -> Array:
    """A diagonal (d,) or a matrix (d, d) on vectors (..., d)."""
    return m * x if m.ndim == 1 else jnp.einsum("ij,...j->...i", m, x, precision="highest")


def times(m: Array, n: Array) -> Array:
    """The product of two diagonals, or of two matrices."""
    return m * n if m.ndim == 1 else jnp.matmul(m, n, precision="highest")


def transition(reference: LinearSDE, s: Any, t: Any) -> tuple[Array, Array, Array]:
    """``reference.transition(s, t)``; vectors, and no series, where components do not mix."""
    if not _apart(reference):
        return reference.transition(s, t)
    a, variance, duration = jnp.diagonal(reference.A), jnp.diagonal(reference.L) ** 2, t - s
    if isinstance(reference, BrownianMotion):
        return jnp.ones_like(a), jnp.zeros_like(a), variance * duration
    return (
        jnp.exp(a * duration),
        reference.b * duration * _mean_exp(a * duration),
        variance * duration * _mean_exp(2 * a * duration),
    )


def _mean_exp(u: Array) -> Array:
    """(exp(u) - 1) / u, 1 at 0."""
    small = jnp.abs(u) < 1e-4
    return jnp.where(small, 1 + u / 2 + u**2 / 6, jnp.expm1(u) / jnp.where(small, 1, u))


def _apart(reference: LinearSDE) -> bool:
    if isinstance(reference, OrnsteinUhlenbeck):
        return reference.theta.ndim < 2 and reference.sigma.ndim < 2
    return isinstance(reference, BrownianMotion)


def _positive(q: Array) -> bool:
    known = np.asarray(q, np.float64)
    if known.ndim == 1:
        return bool((known > 0).all())
    size = np.sqrt(np.diagonal(known))
    # Relative to its own diagonal: positions and velocities have units of their own.
    return bool((size > 0).all() and np.linalg.eigvalsh(known / np.outer(size, size)).min() > 0)
