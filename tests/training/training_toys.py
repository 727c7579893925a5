"""Small models, data sets and losses that the tests of training share."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jax.tree_util as jtu
import numpy as np

from sdeflow.training import Prediction


class Batch(NamedTuple):
    x: np.ndarray
    y: np.ndarray
    ids: np.ndarray
    weight: np.ndarray


class Rows:
    """``count`` rows of a noisy linear map, shuffled by the key; the last batch of an epoch is short."""

    def __init__(self, count=20, features=3, seed=0, name="rows"):
        rng = np.random.default_rng(seed)
        self.x = rng.normal(size=(count, features)).astype(np.float32)
        self.y = self.x @ np.arange(1.0, features + 1, dtype=np.float32) + rng.normal(size=count).astype(np.float32)
        self.name = name

    def fingerprint(self):
        return self.name

    def order(self, key):
        return np.asarray(jr.permutation(key, len(self.x)))

    def batches(self, size, key):
        order = self.order(key)
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            yield Batch(self.x[rows], self.y[rows], rows, np.ones(len(rows), np.float32))


class Full(Rows):
    """The same, without the short batch: every batch has one shape."""

    def batches(self, size, key):
        return (batch for batch in super().batches(size, key) if len(batch.x) == size)


def mlp(seed=0, activation=jnp.tanh, depth=1, width=4, features=3):
    return eqx.nn.MLP(features, "scalar", width, depth, activation=activation, key=jr.key(seed))


def squares(model, batch, key, step):
    """A noisy mean squared error: its value depends on the key, so a wrong key shows."""
    error = jax.vmap(model)(batch.x) - batch.y + 0.1 * jr.normal(key, batch.y.shape)
    return jnp.mean(error**2), {"bias": jnp.mean(error)}


class Linear(eqx.Module):
    """A model of series that follows the protocol of the losses, and records how it was called."""

    weight: jax.Array
    cost: float = 2.0

    def __call__(self, batch, *, key, regularisers=()):
        Linear.calls += 1
        outputs = batch.values[:, -1] @ self.weight
        penalties = {
            type(r).__name__: self.cost * jnp.ones(len(outputs)) * jnp.sum(self.weight**2) for r in regularisers
        }
        return Prediction(outputs, penalties=penalties)


Linear.calls = 0


def equal(one, two):
    """Bitwise equality of all arrays of two trees."""
    one, two = jtu.tree_leaves(eqx.filter(one, eqx.is_array)), jtu.tree_leaves(eqx.filter(two, eqx.is_array))
    return len(one) == len(two) and all(
        a.dtype == b.dtype and a.shape == b.shape and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(one, two)
    )


def same_history(one, two):
    return one.keys() == two.keys() and all(
        np.array_equal(one[k], two[k], equal_nan=True) and one[k].dtype == two[k].dtype for k in one
    )
