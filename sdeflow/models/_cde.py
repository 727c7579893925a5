"""Neural controlled differential equations: dz = F(z) dX with X(t) = (t, control)."""

from typing import Any, ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from ._checks import check_mode, check_size
from ._neural import AbstractNeuralEquation
from .fields import MLP, lipswish


class NeuralCDE(AbstractNeuralEquation):
    r"""A learned controlled equation: dz/dt = F(z) d(t, X)/dt, F(z) a matrix (H, 1 + C) with entries tanh(MLP(z)).

    It reads the slope of the control, not its value: with straight lines between observations take a solver that reads
    it inside of the steps (``diffrax.Midpoint``, which `sdeflow.models.SeriesModel` takes), with
    `sdeflow.paths.hermite_control` any.

    Arguments:
        state_size: H, the length of z.
        control_size: C, the channels of the control; time is added.
        width, depth: hidden layers of F.
        mode: "pure" has lipswish between the layers, "benchmark" relu, as in the paper.
        key: a JAX random key for the initial weights.

    Raises:
        ValueError: for a size out of range or another mode.

    Source: Kidger, Morrill, Foster and Lyons, "Neural controlled differential equations for irregular time series",
    2020, arXiv 2005.08926.

    Example:
        >>> import diffrax, jax, jax.numpy as jnp, sdeflow as sf
        >>> cde = sf.models.NeuralCDE(8, control_size=1, key=jax.random.key(0))
        >>> ts = jnp.array([0.0, 0.2, 1.0])
        >>> control = sf.paths.linear_control(ts, jnp.array([[0.0], [jnp.nan], [1.0]]))
        >>> sf.solve(cde, jnp.zeros(8), ts, args=control, solver=diffrax.Midpoint()).ys.shape
        (3, 8)
    """

    field: MLP
    state_size: int = eqx.field(static=True)
    control_size: int = eqx.field(static=True)
    interpretation: ClassVar[str] = "ito"  # pyright: ignore
    additive: ClassVar[bool] = True  # pyright: ignore
    reads_slope: ClassVar[bool] = True

    def __init__(
        self,
        state_size: int,
        *,
        control_size: int = 0,
        width: int = 64,
        depth: int = 2,
        mode: Literal["pure", "benchmark"] = "pure",
        key: PRNGKeyArray,
    ):
        self.state_size = check_size("state_size", state_size)
        self.control_size = check_size("control_size", control_size, least=0)
        activation = jax.nn.relu if check_mode(mode) == "benchmark" else lipswish
        size = state_size * (1 + control_size)
        self.field = MLP(state_size, size, width=width, depth=depth, activation=activation, key=key)

    def drift(self, t: Any, y: Float[Array, " H"], args: Any) -> Float[Array, " H"]:
        """F(y) times the slope of (t, X); ``args`` is the control, any path with ``.derivative(t)``.

        Raises:
            TypeError: if there is a control to read and ``args`` is no path.
            ValueError: if the state or the control's value has another length than the equation was built for.
        """
        self.check_state(y)
        matrix = jnp.tanh(self.field(y)).reshape(self.state_size, 1 + self.control_size)
        slope = self.control(t, args, method="derivative")
        return matrix[:, 0] if slope is None else matrix[:, 0] + matrix[:, 1:] @ slope
