"""Simulated cells that differentiate, for demonstrations and tests where no real data are at hand.

A cell has a progress ``s`` and, as one complex number, a state ``z`` that chooses between K fates:

    ds = dt + 0.2 dW,    dz = (mu(s) z + c conj(z)^(K-1) - |z|^2 z) dt + 0.3 dW,    mu(s) = 1.5 (s - 1.5),  c = 0.5

in days. This is the normal form of a bifurcation with the symmetry of K fates: ``z`` stays near 0, the progenitor,
until ``mu`` grows positive, and then falls into one of K valleys, at the angles ``2 pi k / K``. Cells decide on
different days, since their progress differs. All start from ``s = 0, z = 0`` with standard deviations 0.3 and 0.1. The
three numbers ``(s, Re z, Im z)`` are embedded into ``dim`` by orthonormal directions, the same for every key, and noise
is added. Euler's steps of 0.02 days are part of the definition: they are what the cells follow.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import PRNGKeyArray

from ._cells import check_count
from ._random import SIMULATE, generators
from ._snapshots import Snapshots

_STEP = 0.02
_PULL = 0.5
_DECIDED = 0.6  # Progenitors have |z| of order 0.2, decided cells of order 1.5.
_FATES = "ABC"


def simulated_cells(
    num_cells: int,
    *,
    key: PRNGKeyArray,
    times: Sequence[float] = (0.0, 1.0, 2.0, 3.0, 4.0),
    num_fates: int = 2,
    dim: int = 5,
    noise: float = 0.1,
) -> Snapshots:
    """Seeded snapshots of one progenitor that branches into two or three fates.

        ds = dt + 0.2 dW,    dz = (1.5 (s - 1.5) z + 0.5 conj(z)^(K-1) - |z|^2 z) dt + 0.3 dW

    The progress ``s`` and the complex ``z``, near 0 for progenitors and in one of K valleys later on, are embedded into
    ``dim`` components. Labels say which valley a cell is in: "A", "B" or "C", or "progenitor" if |z| < 0.6. Every time
    has cells of its own, which depend on the key and that time alone.

    Arguments:
        num_cells: cells of each time, at least 2.
        key: a JAX key.
        times: days, not negative and increasing.
        num_fates: K, two or three.
        dim: d, at least 3.
        noise: the standard deviation of what is added to every component.

    Returns:
        Snapshots of ``num_cells`` cells of ``dim`` components at each time, with labels.

    Raises:
        TypeError: if ``key`` is not a JAX key, or a number of cells, fates or components no integer.
        ValueError: for fewer than 2 cells or 3 components, other numbers of fates, or days that are negative or do not
            increase.

    Example:
        >>> import jax
        >>> from sdeflow.data import simulated_cells
        >>> cells = simulated_cells(100, key=jax.random.key(0))
        >>> cells
        Snapshots: 500 cells of 5 components at 5 times (0: 100, 1: 100, 2: 100, 3: 100, 4: 100), with 3 labels.
    """
    num_cells, dim = check_count(num_cells, "num_cells", 2), check_count(dim, "dim", 3)
    if check_count(num_fates, "num_fates", 1) not in (2, 3):
        raise ValueError(f"num_fates must be 2 or 3, got {num_fates}.")
    if not 0 <= noise < np.inf:
        raise ValueError(f"noise must be a standard deviation, finite and not negative, got {noise}.")
    days = [float(t) for t in times]
    if any(not 0 <= t <= 100 for t in days):
        raise ValueError(f"times must be days between 0 and 100, got {days}.")
    # Directions that belong to the dimension, not to the key: sets of different keys lie in one space.
    directions = np.linalg.qr(np.random.default_rng(dim).standard_normal((dim, 3)))[0]
    samples, labels = [], []
    for day, rng in zip(days, generators(key, SIMULATE, days)):
        state = _simulate(num_cells, day, num_fates, rng)
        samples.append(state @ directions.T + noise * rng.standard_normal((num_cells, dim)))
        labels.append(_fates(state, num_fates))
    return Snapshots(days, samples, labels=labels)


def _simulate(count: int, day: float, fates: int, rng: np.random.Generator) -> np.ndarray:
    """Shape (n, 3), progress and the real and imaginary part of z after so many days, by Euler's steps."""
    normal = lambda: rng.standard_normal(count) + 1j * rng.standard_normal(count)
    s, z = 0.3 * rng.standard_normal(count), 0.1 * normal()
    steps = int(np.ceil(day / _STEP - 1e-9))
    h = day / max(steps, 1)
    for _ in range(steps):
        drift = 1.5 * (s - 1.5) * z + _PULL * np.conj(z) ** (fates - 1) - np.abs(z) ** 2 * z
        s, z = s + h + 0.2 * np.sqrt(h) * rng.standard_normal(count), z + h * drift + 0.3 * np.sqrt(h) * normal()
    return np.stack([s, z.real, z.imag], axis=1)


def _fates(state: np.ndarray, fates: int) -> np.ndarray:
    z = state[:, 1] + 1j * state[:, 2]
    valley = np.round(np.angle(z) * fates / (2 * np.pi)).astype(int) % fates
    return np.where(np.abs(z) < _DECIDED, "progenitor", np.array(list(_FATES))[valley])
