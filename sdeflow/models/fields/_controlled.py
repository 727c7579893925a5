"""gamma(zeta(z, X)): a drift in which a learned mixture of state and control takes the place of the state."""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_mode, check_size
from ._mlp import MLP, lipswish
from ._time import bounded_time, circular_time

_RATE = 30.0


def _identity(x: Array) -> Array:
    return x


class ControlledDrift(eqx.Module):
    r"""rate gamma(zeta([tau(t),] z, x)) with zeta affine and gamma a network; x is the value of the control.

        "pure":      gamma = tanh(MLP(lipswish)),     tau = t / (1 + |t|)
        "benchmark": gamma = tanh(MLP(relu)(relu)),   tau = (sin t, cos t)

    Both are Lipschitz in z and x, and no entry exceeds the rate: however large the weights, the steps or the control,
    the state grows at most linearly in time. The second is that of the published experiments, with one more affine
    map in front of zeta; the first is also smooth.

    Arguments:
        state_size: H, the length of z and of the output.
        control_size: C, the length of x; 0 for no control.
        sees_time: whether zeta is given the time.
        width, depth: hidden layers of gamma; in the benchmark mode the output of zeta counts as the first.
        mode: "pure" or "benchmark".
        rate: the largest speed; by default 30, and 1 in the benchmark mode.
        key: a JAX random key for the initial weights.

    Raises:
        ValueError: for a size out of range, another mode, or a rate that is not positive.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from sdeflow.models.fields import ControlledDrift
        >>> drift = ControlledDrift(4, control_size=2, key=jax.random.key(0))
        >>> drift(jnp.zeros(4), jnp.ones(2), 0.5).shape
        (4,)
    """

    embed: eqx.nn.Linear | None
    lift: eqx.nn.Linear | None
    zeta: eqx.nn.Linear
    gamma: MLP
    first: Callable
    time: Callable | None
    rate: float = eqx.field(static=True)

    def __init__(
        self,
        state_size: int,
        *,
        control_size: int = 0,
        sees_time: bool = False,
        width: int = 64,
        depth: int = 2,
        mode: Literal["pure", "benchmark"] = "pure",
        rate: float | None = None,
        key: PRNGKeyArray,
    ):
        size, channels = (
            check_size("state_size", state_size),
            check_size("control_size", control_size, least=0),
        )
        depth, published = check_size("depth", depth), check_mode(mode) == "benchmark"
        rate = (1.0 if published else _RATE) if rate is None else float(rate)
        if not 0 < rate < float("inf"):
            raise ValueError(f"rate must be positive and finite, got {rate}.")
        embed, lift, zeta, gamma = jax.random.split(key, 4)
        self.embed = eqx.nn.Linear(channels, size, key=embed) if channels else None
        self.time = (circular_time if published else bounded_time) if sees_time else None
        extra = 0 if self.time is None else self.time(0.0).size
        self.lift = eqx.nn.Linear(extra + size, size, key=lift) if published or sees_time else None
        self.zeta = eqx.nn.Linear(2 * size if channels else size, size, key=zeta)
        layers, activation = (depth - 1, jax.nn.relu) if published else (depth, lipswish)
        self.gamma = MLP(size, size, width=width, depth=layers, activation=activation, key=gamma)
        self.first = jax.nn.relu if published else _identity
        self.rate = rate

    def __call__(self, z: Float[Array, " H"], x: Float[Array, " C"] | None = None, t: Any = None) -> Float[Array, " H"]:
        """The drift at state ``z`` under the control's value ``x``; ``t`` is read only if the drift sees the time."""
        return self.rate * jnp.tanh(self.unbounded(z, x, t))

    def unbounded(self, z: Float[Array, " H"], x: Float[Array, " C"] | None = None, t: Any = None) -> Any:
        """What goes into the last tanh."""
        a = z if self.time is None else jnp.concatenate([self.time(t), z])
        a = a if self.lift is None else self.lift(a)
        mixed = a if self.embed is None else jnp.concatenate([a, self.embed(x)])  # pyright: ignore[reportArgumentType]
        return self.gamma(self.first(self.zeta(mixed)))
