"""What every regulariser is: something that a solve charges for, and that a loss adds up."""

from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx

Weight = float | Callable[[Any], Any]


class AbstractRegulariser(eqx.Module):
    """A charge for what a model costs to solve.

    ``sdeflow.solve(..., regularisers=(LocalError(),))`` returns it in ``sol.penalties["LocalError"]``. In a loss it is
    added with ``+`` and weighted with ``*``, by a number or an optax schedule:
    ``CrossEntropy() + optax.exponential_decay(100.0, 1000, 0.1) * LocalError()``.
    """

    is_regulariser: ClassVar[bool] = True
    draws: ClassVar[bool] = False

    def __mul__(self, weight: Weight) -> "Scaled":
        return Scaled(self, weight)

    def __rmul__(self, weight: Weight) -> "Scaled":
        return Scaled(self, weight)


class Scaled(eqx.Module):
    """A regulariser with the weight that a loss gives it.

    Arguments:
        regulariser: what is charged.
        weight: a number or an optax schedule.
    """

    is_regulariser: ClassVar[bool] = True
    regulariser: AbstractRegulariser
    weight: Any
