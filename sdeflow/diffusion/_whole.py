"""Whether what looks at a whole sample is given one sample: a batch in a state cannot be told from its shape."""

from typing import Any

import jax.tree_util as jtu
from jaxtyping import Array

from .._compat import under_vmap


def check_sample_ndim(sample_ndim: Any) -> None:
    """Refuse what is no number of axes.

    Raises:
        ValueError: always then.
    """
    if sample_ndim is not None and (
        isinstance(sample_ndim, bool) or not isinstance(sample_ndim, int) or sample_ndim < 0
    ):
        raise ValueError(f"sample_ndim must be the number of axes of one sample or None, got {sample_ndim!r}.")


def axes_of_sample(x: Array, sample_ndim: int | None) -> tuple[int, ...]:
    """The axes of a state that one sample has."""
    return tuple(range(0 if sample_ndim is None else x.ndim - sample_ndim, x.ndim))


def check_one_sample(x: Array, *pieces: Any) -> None:
    """Refuse a state that may be a batch, for all among the pieces that look at a whole sample.

    A vector is one sample, and so is what ``jax.vmap`` has taken out of a batch.

    Raises:
        ValueError: for any other state, where it was not said how many axes a sample has; or that it has more.
    """

    def look(node: Any) -> bool:
        if not getattr(node, "looks_at_whole", False):
            return False
        name, ndim = type(node).__name__, node.sample_ndim
        if ndim is not None and ndim > x.ndim:
            raise ValueError(f"{name} was told that a sample has {ndim} axes, but the state has shape {x.shape}.")
        if ndim is None and x.ndim > 1 and not under_vmap(x):
            raise ValueError(
                f"{name} looks at one whole sample, and a state of shape {x.shape} may be one or a batch: use jax.vmap "
                f"for a batch, or say how many axes a sample has, {name}(..., sample_ndim={x.ndim - 1}) or {x.ndim}."
            )
        return False

    jtu.tree_leaves(pieces, is_leaf=look)
