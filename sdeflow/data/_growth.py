"""``growth_weights``: how many descendants a cell leaves, from the rates at which it divides and dies."""

from typing import Any

import numpy as np
from jaxtyping import Float


def growth_weights(birth: Any, death: Any, duration: float) -> Float[np.ndarray, " n"]:
    """The descendants that each cell is expected to have after a while, exp((birth - death) duration).

    A population seen at one time and weighted by them is, but for its motion, the population at the next: they are the
    weights of the earlier cells for a bridge between the two (Schiebinger et al. 2019, Cell 176).

    Arguments:
        birth: shape (n,), or one number: the rate of division of each cell, per unit of time.
        death: likewise the rate of death.
        duration: the time that passes, positive.

    Raises:
        ValueError: for shapes that disagree, rates that are negative or not finite, a duration that is not positive, or
            more descendants than numbers reach.

    Example:
        >>> import sdeflow as sf
        >>> sf.data.growth_weights([0.7, 0.0, 0.35], [0.0, 0.7, 0.35], 1.0).round(2).tolist()
        [2.01, 0.5, 1.0]
    """
    birth, death = np.asarray(birth, np.float64), np.asarray(death, np.float64)
    if not {birth.ndim, death.ndim} <= {0, 1} or len({x.shape for x in (birth, death) if x.ndim}) != 1:
        raise ValueError(
            f"birth and death must be of one shape (n,), or one of them a number, got {birth.shape} and {death.shape}."
        )
    for name, rate in (("birth", birth), ("death", death)):
        if not (np.isfinite(rate) & (rate >= 0)).all():
            raise ValueError(f"{name} must hold rates that are finite and not negative.")
    if not (np.isfinite(duration) and duration > 0):
        raise ValueError(f"duration must be positive and finite, got {duration}.")
    with np.errstate(over="ignore"):
        weights = np.exp((birth - death) * duration)
    if not np.isfinite(weights).all():
        raise ValueError("A cell would have more descendants than numbers reach: birth is a rate per unit of duration.")
    return weights
