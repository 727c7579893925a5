"""What every adjoint of ours is: a way to differentiate one walk, in `sdeflow.solve` or inside ``diffeqsolve``."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import diffrax
from jaxtyping import PyTree

from ..walking import Carry, Rows
from ._within_diffrax import loop_by_walking


class AbstractWalkAdjoint(diffrax.AbstractAdjoint):
    """A diffrax adjoint that walks a grid.

    Give it to `sdeflow.solve`, or to ``diffrax.diffeqsolve(..., adjoint=...)``, where it replaces diffrax's loop for
    steps that do not adapt; adaptive steps, events and dense output go on with diffrax's default adjoint.
    """

    keeps_states: ClassVar[bool] = False
    """Whether the reverse pass keeps a state a row, so that a walk may as well be cut into chunks."""

    @abc.abstractmethod
    def walk(
        self,
        solver: diffrax.AbstractSolver,
        terms: Any,
        args: Any,
        y0: PyTree,
        rows: Rows,
        *,
        every: int | None,
        emit: Callable[[Any, Carry, Any], Any],
        start: Carry | None = None,
    ) -> tuple[Carry, Any, dict[str, Any]]:
        """Walk all rows; the arguments are those of `sdeflow.walking.walk`.

        Returns:
            The last carry, what was emitted, and what the adjoint has to say of the walk, for ``sol.stats``.
        """

    def check_solver(self, solver: diffrax.AbstractSolver) -> None:
        """Refuse a solver whose steps this adjoint cannot differentiate, before anything is traced.

        Raises:
            ValueError: naming the solver and what can be used.
        """

    def loop(self, **kwargs: Any) -> Any:
        """The loop of ``diffrax.diffeqsolve``, by walking."""
        return loop_by_walking(self, **kwargs)
