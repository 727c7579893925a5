"""``fate``: what cells become, as the share of each label around the ends of their exact paths."""

from collections.abc import Hashable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from ..data._long import is_missing
from ..metrics._blocks import block_rows, clouds, join, split


class Fates(NamedTuple):
    """How likely each cell is to become what; see `fate`.

    Arguments:
        names: the K labels, sorted.
        probabilities: shape (n, K), rows with sum 1.

    Example:
        >>> import numpy as np, sdeflow as sf
        >>> fates = sf.bridges.Fates(("A", "B"), np.array([[0.2, 0.8], [0.6, 0.4]]))
        >>> fates.names[int(fates.probabilities[0].argmax())]
        'B'
    """

    names: tuple[Hashable, ...]
    probabilities: Float[Array, "n K"]


def fate(
    bridge: Any,
    x0: Any,
    cells: Any,
    labels: Any,
    *,
    key: PRNGKeyArray,
    num_paths: int = 100,
    neighbours: int = 5,
) -> Fates:
    """The probability that each cell becomes what the labels of the last day say.

        P(label | x0) = E[share of the label among the nearest cells to X(t1) | X(t0) = x0],

    the mean over ends that are drawn exactly, so with a standard error of at most ``0.5 / sqrt(num_paths)``. No label
    of ``x0`` is used. What is drawn for a cell depends on the key and its row.

    Arguments:
        bridge: a `Bridge`, or a `PiecewiseBridge` over many days.
        x0: shape (n, d), cells at the bridge's t0; of a later day, with ``PiecewiseBridge(bridge.bridges[k:])``.
        cells: shape (m, d), the cells at its t1.
        labels: m labels, such as types; cells with None or NaN have no vote. Leave out cells to ask about some types
            only.
        key: a random key.
        num_paths: ends for each cell.
        neighbours: how many of the nearest cells have a vote on an end.

    Returns:
        `Fates`: the names of the K labels, and probabilities of shape (n, K).

    Raises:
        ValueError: for shapes that disagree, or numbers that are not positive integers.

    Example:
        >>> import jax, jax.numpy as jnp, sdeflow as sf
        >>> x0, x1 = jnp.array([[-1.0], [1.0]]), jnp.array([[-3.0], [3.0]])
        >>> bridge = sf.bridges.sinkhorn_bridge(x0, x1, 1.0)
        >>> fates = sf.bridges.fate(bridge, x0, x1, ["left", "right"], neighbours=1, key=jax.random.key(0))
        >>> fates.names, [fates.names[k] for k in fates.probabilities.argmax(axis=1)]
        (('left', 'right'), ['left', 'right'])
    """
    x0, cells = clouds(x0, cells)
    for name, value in (("num_paths", num_paths), ("neighbours", neighbours)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    labels = np.asarray(labels)
    if labels.shape != (len(cells),):
        raise ValueError(f"There are {len(cells)} cells but labels of shape {labels.shape}; give one for each cell.")
    known = np.array([not is_missing(label) for label in labels.tolist()])
    if not known.any():
        raise ValueError("no cell has a label, so there is nothing to become.")
    cells, labels = cells[known], labels[known]
    if neighbours > len(cells):
        raise ValueError(
            f"neighbours must be at most {len(cells)}, the number of cells with a label, got {neighbours}."
        )
    names, kinds = np.unique(labels, return_inverse=True)
    votes = jnp.asarray(np.eye(len(names))[kinds] / neighbours, cells.dtype)
    return Fates(tuple(names.tolist()), _shares(bridge, x0, cells, votes, key, int(num_paths), int(neighbours)))


@eqx.filter_jit
def _shares(
    bridge: Any, x0: Array, cells: Array, votes: Float[Array, "m K"], key: PRNGKeyArray, num_paths: int, neighbours: int
) -> Float[Array, "n K"]:
    def share(x: Array, i: Int[Array, ""]) -> Array:
        keys = jr.split(jr.fold_in(key, i), num_paths)
        ends = jax.vmap(lambda key: bridge.sample_endpoint(x, key=key))(keys)
        # Squares of differences: nearest of all is where the difference of squares has no digits left.
        gaps = ((ends[:, None] - cells) ** 2).sum(axis=-1)
        _, nearest = jax.lax.top_k(-gaps, neighbours)
        return votes[nearest].sum(axis=1).mean(axis=0)

    # Blocks without a rest, which would be a program of its own.
    rows = block_rows(len(x0), num_paths * len(cells), None)
    blocks = split(x0, rows), split(jnp.arange(len(x0)), rows)
    return join(jax.lax.map(lambda block: jax.vmap(share)(*block), blocks), len(x0))
