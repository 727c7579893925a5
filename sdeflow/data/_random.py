"""Host-side randomness: one NumPy generator for each (key, purpose, series).

Data sets are shuffled, split and thinned on the host, where compiling a JAX program for every ragged shape
would cost more than the work. The generators are seeded with the words of a JAX key, so users still hold keys
only, and with a digest of the series' own id, so that what happens to a series does not depend on its
position among the others.
"""

import hashlib
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

# One number for each use of a key: the same key may shuffle, split and thin without any coupling between the
# three.
SHUFFLE, SPLIT, DROP, SIMULATE, SUBSAMPLE = range(5)


def key_words(key: Any) -> list[int]:
    """The 32-bit words of one JAX key, typed or old-style.

    Raises:
        TypeError: if ``key`` is not one key.
    """
    advice = "pass one key made by jax.random.key(0)"
    if not isinstance(key, jax.Array | np.ndarray):
        raise TypeError(f"key must be a JAX key, got {type(key).__name__} {key!r}: {advice}.")
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    if not typed and key.dtype != np.uint32:
        raise TypeError(f"key must be a JAX key, got an array of {key.dtype}: {advice}.")
    if key.ndim != (0 if typed else 1):
        raise TypeError(f"key must be a single key, got a batch of shape {key.shape}: {advice}.")
    return np.asarray(jax.random.key_data(key) if typed else key).tolist()


def digest(series_id: Any) -> int:
    """64 bits that depend on the id alone: not on its position, the process or ``PYTHONHASHSEED``."""
    plain = series_id.item() if isinstance(series_id, np.generic) else series_id
    text = f"{type(plain).__name__}:{plain!r}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def generator(key: PRNGKeyArray, purpose: int) -> np.random.Generator:
    """The generator of a key for one purpose."""
    return np.random.default_rng([*key_words(key), purpose])


def generators(key: PRNGKeyArray, purpose: int, ids: Iterable[Hashable]) -> Iterator[np.random.Generator]:
    """One generator for each series, a function of the key, the purpose and the series' own id."""
    words = key_words(key)
    for series in map(digest, ids):
        yield np.random.default_rng([*words, purpose, series & 0xFFFFFFFF, series >> 32])
