"""A law of the factors of fractional noise at the start, other than the stationary one of the long past.

    Y(0) = L (m + S e),      S = diag(exp(l)) + N,      e ~ N(0, 1),

with L the Cholesky factor of the stationary covariance and N below the diagonal; m, l and N of zero are the stationary
law. In these coordinates the divergence from it needs no inverse,

    KL = sum (m^2 + N^2 + exp(2 l) - 1 - 2 l) / 2.

A posterior that leaves the past as in the prior gives up the mean divergence of p(Y(0) | observations) from p(Y(0)).
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jaxtyping import Array, PyTree


class FactorLaw(eqx.Module):
    """A normal law of the factors at the start: what a posterior believes about the long past of type I.

    It is in units of the stationary law: zeros everywhere are that law itself.

    Arguments:
        mean: leaves (num_factors, *shape), with one factor of the noise of the given shape.
        log_scale: leaves alike.
        mixing: leaves (num_factors, num_factors, *shape), of which what lies below the diagonal is used; None for
            coordinates that are independent, which leaves a gap where several of them are seen through one number.

    Raises:
        ValueError: if the shapes do not fit each other.

    Example:
        >>> import jax, jax.numpy as jnp, sdeflow as sf
        >>> law = sf.paths.FactorLaw(jnp.full((6, 2), 0.1), jnp.zeros((6, 2)))
        >>> round(float(law.kl()), 3)
        0.06
        >>> noise = sf.paths.MarkovFractionalNoise(0.7, 1.0)
        >>> noise.start((2,), key=jax.random.key(0), law=law).shape
        (6, 2)
    """

    mean: PyTree[Array]
    log_scale: PyTree[Array]
    mixing: PyTree[Array] | None

    def __init__(self, mean: PyTree, log_scale: PyTree, mixing: PyTree | None = None):
        def fits(m: Any, other: Any, lead: tuple[int, ...], name: str) -> None:
            if jnp.ndim(m) < 1 or jnp.shape(other) != (*lead, *jnp.shape(m)):
                raise ValueError(
                    f"mean has shape {jnp.shape(m)}, (num_factors, *shape), with which {name} should have "
                    f"{(*lead, *jnp.shape(m))}, got {jnp.shape(other)}."
                )

        jtu.tree_map(lambda m, s: fits(m, s, (), "log_scale"), mean, log_scale)
        if mixing is not None:
            jtu.tree_map(lambda m, n: fits(m, n, jnp.shape(m)[:1], "mixing"), mean, mixing)
        self.mean, self.log_scale, self.mixing = mean, log_scale, mixing

    def kl(self) -> Array:
        """The divergence from the stationary law, in nats."""

        def one(m: Array, l: Array, S: Array) -> Array:
            return (jnp.sum(m**2) + jnp.sum(S**2) - l.size) / 2 - jnp.sum(l)

        parts = jtu.tree_map(one, self.mean, self.log_scale, self._matrices())
        return sum(jtu.tree_leaves(parts), jnp.zeros(()))

    def at(self, e: PyTree[Array]) -> PyTree[Array]:
        """M + S e."""
        with jax.default_matmul_precision("highest"):
            return jtu.tree_map(
                lambda m, S, e: m.astype(e.dtype) + jnp.einsum("kj...,j...->k...", S.astype(e.dtype), e),
                self.mean,
                self._matrices(),
                e,
            )

    def log_ratio(self, z: PyTree[Array]) -> Array:
        """The log density of m + S e = z less that of the stationary law, in nats."""

        def one(m: Array, l: Array, S: Array, z: Array) -> Array:
            each = lambda x, count: jnp.moveaxis(x.reshape(*x.shape[:count], -1), -1, 0)
            e = jax.scipy.linalg.solve_triangular(each(S, 2), each(z - m, 1)[..., None], lower=True)
            return (jnp.sum(z**2) - jnp.sum(e**2)) / 2 - jnp.sum(l)

        parts = jtu.tree_map(one, self.mean, self.log_scale, self._matrices(), z)
        return sum(jtu.tree_leaves(parts), jnp.zeros(()))

    def _matrices(self) -> PyTree[Array]:
        """S, leaves (num_factors, num_factors, *shape)."""

        def one(l: Array, N: Any) -> Array:
            place = jnp.eye(l.shape[0], dtype=l.dtype).reshape(*l.shape[:1] * 2, *(1,) * (l.ndim - 1))
            below = 0 if N is None else jnp.tril(jnp.ones(l.shape[:1] * 2, l.dtype), -1).reshape(place.shape) * N
            return place * jnp.exp(l) + below

        if self.mixing is None:
            return jtu.tree_map(lambda l: one(l, None), self.log_scale)
        return jtu.tree_map(one, self.log_scale, self.mixing)
