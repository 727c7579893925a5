"""The bits of JAX's default generator, with its rounds written out.

On a CPU JAX loops over the rounds of the hash, and each pass reads and writes all of the counters. Written out, the
compiler makes one loop of counters, hash and what becomes of the bits: the same bits in a third of the time or less,
and without arrays beside those that are asked for. Normal numbers made of them are JAX's up to rounding, which the
compiler may do otherwise in another loop. It costs a little more to compile.

Source: Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3, 2011 (Threefry-2x32-20).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jax.extend.random import define_prng_impl, threefry_prng_impl
from jaxtyping import Array, PRNGKeyArray

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def written_out(key: PRNGKeyArray) -> PRNGKeyArray:
    """A key that draws what this one draws, sooner; keys of other generators are returned as they are."""
    return jr.wrap_key_data(jr.key_data(key), impl=_IMPL) if jr.key_impl(key) == "threefry2x32" else key


def _hash(key: Array, high: Any, low: Any) -> tuple[Array, Array]:
    schedule = (key[0], key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
    x, y = high + schedule[0], low + schedule[1]
    for i in range(5):
        for r in _ROTATIONS[i % 2]:
            x = x + y
            y = x ^ (y << np.uint32(r) | y >> np.uint32(32 - r))
        x, y = x + schedule[(i + 1) % 3], y + schedule[(i + 2) % 3] + np.uint32(i + 1)
    return x, y


def _fold_in(key: Array, data: Any) -> Array:
    return jnp.stack(_hash(key, np.uint32(0), jnp.asarray(data).astype(jnp.uint32)))


def _counts(shape: tuple[int, ...]) -> Array:
    # Summed over the axes rather than counted flat, so that a draw that is split over devices needs no exchange.
    strides = [np.uint32(math.prod(shape[i + 1 :])) for i in range(len(shape))]
    return sum((s * jax.lax.broadcasted_iota(jnp.uint32, shape, i) for i, s in enumerate(strides)), jnp.uint32(0))


def _falls_back(shape: tuple[int, ...]) -> bool:
    return not jax.config.jax_threefry_partitionable or math.prod(shape) >= 2**32  # pyright: ignore


def _split(key: Array, shape: tuple[int, ...]) -> Array:
    if _falls_back(shape):
        return threefry_prng_impl.split(key, shape)
    return jnp.stack(_hash(key, np.uint32(0), _counts(shape)), axis=-1)


def _random_bits(key: Array, bit_width: int, shape: tuple[int, ...]) -> Array:
    if _falls_back(shape):
        return threefry_prng_impl.random_bits(key, bit_width, shape)
    x, y = _hash(key, np.uint32(0), _counts(shape))
    if bit_width == 64:
        return x.astype(jnp.uint64) << np.uint64(32) | y.astype(jnp.uint64)
    return (x ^ y).astype(f"uint{bit_width}")


_IMPL = define_prng_impl(
    key_shape=threefry_prng_impl.key_shape,
    seed=threefry_prng_impl.seed,
    split=_split,
    random_bits=_random_bits,
    fold_in=_fold_in,
    name="threefry2x32, written out",
    tag="fry-out",
)
