r"""``Descent``: steps down LightSB's loss by an optax optimiser, as in the official code.

``log a_k`` is stored times epsilon, as there: its rate is then 1 / epsilon of the others'. S is held as logarithms on
the diagonal, alone or of its lower Cholesky factor.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from ._mixture import MixturePotential
from ._moments import Components, lower_inverse

_SMALLEST, _LARGEST = -12.0, 6.0  # Of log S, so that no component collapses or explodes.


class Descent(eqx.Module):
    """One stage of training: ``start``, then ``step`` for each batch.

    Arguments:
        epsilon: the variance of the kernel.
        size: what the optimiser's moves are multiplied by.
        kind: `Full` or `Diagonal`.
        optim: its two functions.
        batch_size: rows of each sample in a step.
    """

    epsilon: Array
    size: Array
    kind: "type[Full] | type[Diagonal]" = eqx.field(static=True)
    optim: tuple[Callable, Callable] = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)
    first: ClassVar[int] = 0

    def start(self, now: Components) -> tuple[Any, Any]:
        """Before any batch."""
        learned = self.kind.of(now, self.epsilon)
        return learned, self.optim[0](learned)

    def step(self, state: tuple[Any, Any], x: Array, y: Array, number: Array) -> tuple[tuple[Any, Any], Array]:
        """Move the parameters by a batch; the loss before."""
        now, memory = state
        value, grads = jax.value_and_grad(lambda p: p.loss(x, y, self.epsilon))(now)
        moves, memory = self.optim[1](grads, memory, now)
        return (optax.apply_updates(now, jax.tree.map(lambda move: self.size * move, moves)), memory), value


class Diagonal(eqx.Module):
    """Log weights times epsilon, centres, and log S."""

    weights: Array
    centres: Array
    logs: Array

    @classmethod
    def of(cls, now: Components, epsilon: Array) -> "Diagonal":
        """What has the diagonals of S."""
        return cls(epsilon * now.logs, now.centres, jnp.log(jnp.diagonal(now.spread, axis1=1, axis2=2)))

    def loss(self, x: Array, y: Array, epsilon: Array) -> Array:
        """LightSB's objective on two batches."""
        logs = jnp.clip(self.logs, _SMALLEST, _LARGEST)
        spread, weights = jnp.exp(logs), self.weights / epsilon
        c = weights + (x**2 @ (spread.T / 2) + x @ self.centres.T) / epsilon
        # The squares of differences, not the difference of squares: that would lose all digits where S is small.
        gap = y[:, None] - self.centres
        v = weights - logs.sum(axis=1) / 2 - (gap**2 * (1 / spread)).sum(axis=-1) / (2 * epsilon)
        return jax.nn.logsumexp(c, axis=1).mean() - jax.nn.logsumexp(v, axis=1).mean()

    def potential(self, epsilon: Array) -> MixturePotential:
        """The mixture itself."""
        spread = jnp.exp(jnp.clip(self.logs, _SMALLEST, _LARGEST))
        return MixturePotential(self.weights / epsilon, self.centres, spread, epsilon)


class Full(eqx.Module):
    """Log weights times epsilon, centres, and the lower factor of S with its diagonal as logarithms."""

    weights: Array
    centres: Array
    logs: Array
    lower: Array

    @classmethod
    def of(cls, now: Components, epsilon: Array) -> "Full":
        """The same in other parameters."""
        factor = jax.lax.map(jnp.linalg.cholesky, now.spread)
        logs = jnp.log(jnp.diagonal(factor, axis1=1, axis2=2))
        return cls(epsilon * now.logs, now.centres, logs, jnp.tril(factor, -1))

    def spread(self) -> tuple[Array, Array]:
        """The lower factor, and the logarithms on its diagonal."""
        logs = jnp.clip(self.logs, _SMALLEST / 2, _LARGEST / 2)
        return jnp.tril(self.lower, -1) + jax.vmap(jnp.diag)(jnp.exp(logs)), logs

    def loss(self, x: Array, y: Array, epsilon: Array) -> Array:
        """LightSB's objective on two batches."""
        factor, logs = self.spread()
        weights = self.weights / epsilon
        turned = jnp.einsum("bd,kde->bke", x, factor)
        c = weights + ((turned**2).sum(axis=-1) / 2 + x @ self.centres.T) / epsilon
        solved = jnp.swapaxes(y[:, None] - self.centres, 0, 1) @ lower_inverse(factor).mT
        v = weights - logs.sum(axis=1) - (solved**2).sum(axis=-1).T / (2 * epsilon)
        return jax.nn.logsumexp(c, axis=1).mean() - jax.nn.logsumexp(v, axis=1).mean()

    def potential(self, epsilon: Array) -> MixturePotential:
        """The mixture itself."""
        factor, _ = self.spread()
        spread, basis = jnp.linalg.eigh(factor @ factor.mT)
        return MixturePotential(self.weights / epsilon, self.centres, jnp.maximum(spread, 0), epsilon, basis)
