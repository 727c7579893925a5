r"""``MixturePotential``: Gaussian mixtures, the potentials of LightSB, of Gaussians and of samples.

The potential phi of a bridge with a Brownian kernel of variance epsilon ends as ``phi_1 = v(y) exp(|y|^2 / 2 epsilon)``
with the mixture ``v(y) = sum_k a_k N(y | r_k, epsilon S_k)`` (Korotin, Gushchin and Burnaev, ICLR 2024).
Before the end, where ``epsilon B`` of the variance is left, with ``M_k = B + (1 - B) S_k``,

    log phi(z)  = logsumexp_k [ log a_k - log det(M_k) / 2
                                + (z' M_k^-T (S_k - 1) z + 2 z' M_k^-T r_k - r_k' M_k^-1 (1 - B) r_k) / (2 epsilon) ],
    grad        = sum_k w_k M_k^-T ((S_k - 1) z + r_k) / epsilon,    w = softmax of the bracket,
    E[y | z]    = z + epsilon B grad.

Nothing divides by B: the end is like any other time. With S = 0 the mixture is a sum of points, the potential of
Sinkhorn's plan, and only there must B be positive. One component is the bridge between two Gaussians.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray


class MixturePotential(eqx.Module):
    """A mixture of K Gaussians N(r_k, epsilon S_k) with S_k = U_k diag(s_k) U_k'.

    Arguments:
        log_weights: shape (K,), the logarithms of a_k, up to a constant.
        centres: shape (K, d), r_k.
        spread: shape (K, d), the eigenvalues s_k; (K, 1) if they are equal, 0 for points.
        epsilon: the variance of the kernel, positive.
        basis: shape (K, d, d), U_k, whose columns are the eigenvectors; None for the axes.

    Example:
        >>> import jax.numpy as jnp, sdeflow as sf
        >>> one = sf.bridges.MixturePotential(jnp.zeros(1), jnp.ones((1, 1)), jnp.full((1, 1), 0.5), jnp.array(0.5))
        >>> float(one.mean(jnp.array([2.0]), jnp.array(1.0))[0])
        2.0
    """

    log_weights: Float[Array, " K"]
    centres: Float[Array, "K d"]
    spread: Float[Array, "K s"]
    epsilon: Float[Array, ""]
    basis: Float[Array, "K d d"] | None = None

    def log_value(self, z: Float[Array, " d"], left: Array) -> Float[Array, ""]:
        """Log phi at z, up to a constant, with ``left`` = B: a number, (d,) or (d, d)."""
        return jax.nn.logsumexp(self._parts(z, left)[0])

    def gradient(self, z: Float[Array, " d"], left: Array) -> Float[Array, " d"]:
        """The gradient of log phi at z."""
        logits, pull = self._parts(z, left)
        return jax.nn.softmax(logits) @ pull / self.epsilon

    def mean(self, z: Float[Array, " d"], left: Array) -> Float[Array, " d"]:
        """The mean of the end given z."""
        logits, pull = self._parts(z, left)
        gap = jax.nn.softmax(logits) @ pull
        return z + (left @ gap if jnp.ndim(left) == 2 else left * gap)

    def weights(self, z: Float[Array, " d"], left: Array) -> Float[Array, " K"]:
        """The probability of each component given z."""
        return jax.nn.softmax(self._parts(z, left)[0])

    def sample(self, z: Float[Array, " d"], *, key: PRNGKeyArray) -> Float[Array, " d"]:
        """Draw the end given z at the start, from sum_k w_k(z) N(r_k + S_k z, epsilon S_k)."""
        which, what = jr.split(key)
        k = jr.categorical(which, self._parts(z, jnp.ones((), z.dtype))[0])
        spread = jnp.broadcast_to(self.spread[k], z.shape)
        noise = jnp.sqrt(self.epsilon * spread) * jr.normal(what, z.shape, z.dtype)
        if self.basis is None:
            return self.centres[k] + spread * z + noise
        basis = self.basis[k]
        return self.centres[k] + basis @ (spread * (basis.T @ z) + noise)

    def covariances(self) -> Float[Array, "K d d"]:
        """S_k as matrices."""
        spread = jnp.broadcast_to(self.spread, self.centres.shape)
        if self.basis is None:
            return jax.vmap(jnp.diag)(spread)
        return (self.basis * spread[:, None]) @ self.basis.mT

    def _parts(self, z: Array, left: Array) -> tuple[Array, Array]:
        """For each component the bracket and ``M^-T ((S - 1) z + r)``, epsilon times the gradient."""
        with jax.default_matmul_precision("highest"):
            left = jnp.asarray(left, z.dtype)
            if left.ndim == 2 or (left.ndim == 1 and self.basis is not None):
                return self._mixed(z, jnp.diag(left) if left.ndim == 1 else left)
            u, r, s = z, self.centres, self.spread
            if self.basis is not None:
                u, r = self.basis.mT @ z, (self.basis.mT @ r[..., None])[..., 0]
            M = left + (1 - left) * s
            squares = ((s - 1) * u**2 + 2 * u * r - (1 - left) * r**2) / M
            determinant = jnp.broadcast_to(jnp.log(M), r.shape).sum(axis=1)
            logits = self.log_weights - determinant / 2 + squares.sum(axis=1) / (2 * self.epsilon)
            pull = ((s - 1) * u + r) / M
            return logits, pull if self.basis is None else (self.basis @ pull[..., None])[..., 0]

    def _mixed(self, z: Array, left: Array) -> tuple[Array, Array]:
        S, r, eye = self.covariances(), self.centres, jnp.eye(z.shape[0], dtype=z.dtype)
        M = left + (eye - left) @ S
        solve = lambda A, b: jnp.linalg.solve(A, b[..., None])[..., 0]
        pull = solve(M.mT, S @ z - z + r)
        inner = solve(M, r @ (eye - left))
        squares = pull @ z + (solve(M.mT, r) * z).sum(axis=1) - (r * inner).sum(axis=1)
        logits = self.log_weights - jnp.linalg.slogdet(M)[1] / 2 + squares / (2 * self.epsilon)
        return logits, pull
