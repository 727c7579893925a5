"""Which cells a model is fitted to and which it is judged on: the protocols of the single-cell literature, as data."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ._snapshots import Snapshots

_SETUPS = ((2.0, 3.0, 4.0), (3.0, 4.0, 7.0))


class HeldOut(NamedTuple):
    """Snapshots without one time, that time, and its cells, in the units of the snapshots.

    Arguments:
        train: the snapshots to fit to; their ``unstandardise`` goes back to the user's units.
        time: when the held-out cells were seen.
        cells: shape (n, d), the held-out cells.

    Example:
        >>> from sdeflow.data import HeldOut, Snapshots
        >>> setup = HeldOut(Snapshots([2.0, 4.0], [[1.0, 2.0], [3.0, 4.0]]), 3.0, [[2.0], [3.0]])
        >>> setup.before, setup.after, setup.fraction
        (2.0, 4.0, 0.5)
    """

    train: Snapshots
    time: float
    cells: np.ndarray

    @property
    def before(self) -> float:
        """The last training time before the one that is held out."""
        return float(self.train.times[self.train.times < self.time].max())

    @property
    def after(self) -> float:
        """The first training time after the one that is held out."""
        return float(self.train.times[self.train.times > self.time].min())

    @property
    def fraction(self) -> float:
        """Where the held-out time lies between its neighbours, from 0 to 1: what a bridge on [0, 1] calls t."""
        return (self.time - self.before) / (self.after - self.before)


def leave_one_out(snapshots: Snapshots) -> list[HeldOut]:
    """Every interior time held out once: T - 2 triples of training snapshots, held-out time and held-out cells.

    The usual protocol standardises with the cells of all times, then keeps five components:
    ``leave_one_out(snapshots.standardise().keep(5))``. It pushes the cells ``before`` to the held-out time and
    compares.

    Raises:
        ValueError: for fewer than three times.

    Example:
        >>> import jax
        >>> from sdeflow.data import leave_one_out, simulated_cells
        >>> for train, time, cells in leave_one_out(simulated_cells(50, key=jax.random.key(0))):
        ...     print(time, train.times.tolist(), cells.shape)
        1.0 [0.0, 2.0, 3.0, 4.0] (50, 5)
        2.0 [0.0, 1.0, 3.0, 4.0] (50, 5)
        3.0 [0.0, 1.0, 2.0, 4.0] (50, 5)
    """
    if len(snapshots) < 3:
        raise ValueError(f"Leaving out an interior time takes at least three times, got {snapshots.times.tolist()}.")
    return [HeldOut(snapshots.drop(t), float(t), snapshots.at(t)) for t in snapshots.times[1:-1]]


def msci_setups(days: Snapshots | Mapping[float, Any]) -> tuple[HeldOut, HeldOut]:
    """The two setups of the Multimodal Single-Cell Integration data: day 3 between 2 and 4, day 4 between 3 and 7.

    In each setup all three days are divided by one number, the mean over the components of the standard deviations of
    their cells together. Report the two apart: the second hardly tells methods from one another. Scores are in the
    units of the data: multiply back with ``train.unstandardise``.

    Arguments:
        days: the cells of days 2, 3, 4 and 7, in the units of the data: snapshots, or ``{2: array, 3: ...}`` of arrays
            of shape (n, d). Other days are left alone.

    Raises:
        ValueError: for a day that is missing, or snapshots that were standardised already.

    Example:
        >>> import numpy as np
        >>> from sdeflow.data import msci_setups
        >>> rng = np.random.default_rng(0)
        >>> for setup in msci_setups({day: day * rng.normal(size=(90, 2)) for day in (2, 3, 4, 7)}):
        ...     print(setup.train.times.tolist(), setup.time, setup.fraction)
        [2.0, 4.0] 3.0 0.5
        [3.0, 7.0] 4.0 0.25
    """
    if not isinstance(days, Snapshots):
        days = {float(day): x for day, x in days.items()}
        lacks = sorted({t for setup in _SETUPS for t in setup} - set(days))
        if lacks:
            raise ValueError(f"The setups need days 2, 3, 4 and 7, but there is no day {lacks[0]:g} in {list(days)}.")
        order = sorted(days)
        days = Snapshots(order, [days[day] for day in order])
    if days.is_standardised:
        raise ValueError("The setups have a scale each; give the cells in the units of the data, not standardised.")
    return _setup(days, *_SETUPS[0]), _setup(days, *_SETUPS[1])


def _setup(days: Snapshots, start: float, held_out: float, end: float) -> HeldOut:
    three = days.take([start, held_out, end]).standardise("scalar")
    return HeldOut(three.drop(held_out), held_out, three.at(held_out))
