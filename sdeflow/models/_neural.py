"""What every learned equation has: a length of its state, and a control that it reads by value."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..equations import AbstractEquation


class AbstractNeuralEquation(AbstractEquation):
    """An equation for a state of ``state_size`` numbers, driven by a control of ``control_size`` channels."""

    state_size: eqx.AbstractVar[int]
    control_size: eqx.AbstractVar[int]

    def start_from(self, x: Float[Array, " H"]) -> Float[Array, " H"]:
        """A start of the state from what an encoder made of the data."""
        return x

    def check_state(self, y: Any) -> None:
        """Refuse a state of another shape.

        Raises:
            ValueError: naming both shapes.
        """
        if jnp.shape(y) != (self.state_size,):
            raise ValueError(
                f"{type(self).__name__} was built with state_size={self.state_size}, but the state has shape "
                f"{jnp.shape(y)}; start from an array of shape ({self.state_size},), and use jax.vmap for batches."
            )

    def control(self, t: Any, args: Any, *, method: str = "evaluate") -> Any:
        """The value of the control at ``t`` (or its ``derivative``), None if the equation has none.

        Raises:
            TypeError: if ``args`` is no path.
            ValueError: if the control has another number of channels.
        """
        if self.control_size == 0:
            return None
        if not callable(getattr(args, method, None)):
            raise TypeError(
                f"{type(self).__name__} was built with control_size={self.control_size}, so args must be a path with "
                f".{method}(t), such as sf.paths.linear_control(times, values); got {type(args).__name__}."
            )
        # From the right, so that a step sees the piece that it is about to cross.
        x = args.evaluate(t) if method == "evaluate" else args.derivative(t, left=False)
        if jnp.shape(x) != (self.control_size,):
            raise ValueError(
                f"{type(self).__name__} was built with control_size={self.control_size}, but the control's value has "
                f"shape {jnp.shape(x)}; build both with the same number of channels."
            )
        return x
