"""gamma(zeta(z, X)): a drift in which a learned mixture of state and control takes the place of the state."""

from collections.abc import Callable
from typing import Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_size
from ._mlp import MLP, lipswish
from ._noise import check_mode


def _identity(x: Array) -> Array:
    return x


class ControlledDrift(eqx.Module):
    r"""gamma(zeta([tau,] z, x)) with zeta affine and gamma a network; x is the control's value, tau features of t.

        "pure":      gamma = MLP(lipswish)            , Lipschitz in z and x, linear growth
        "benchmark": gamma = tanh(MLP(relu)(relu(.))) , as in the published experiments, bounded by 1

    Arguments:
        state_size: H, the length of z and of the output.
        control_size: C, the length of x; 0 for no control.
        time_size: how many features of time zeta sees; 0 for a drift that does not depend on t.
        width, depth: hidden layers of gamma; in the benchmark mode the output of zeta counts as the first.
        mode: "pure" or "benchmark".
        key: a JAX random key for the initial weights.

    Raises:
        ValueError: if a size is not an integer in its range, or for another mode.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from sdeflow.models.fields import ControlledDrift
        >>> drift = ControlledDrift(4, control_size=2, key=jax.random.key(0))
        >>> drift(jnp.zeros(4), jnp.ones(2)).shape
        (4,)
    """

    embed: eqx.nn.Linear | None
    lift: eqx.nn.Linear | None
    zeta: eqx.nn.Linear
    gamma: MLP
    first: Callable
    final: Callable

    def __init__(
        self,
        state_size: int,
        *,
        control_size: int = 0,
        time_size: int = 0,
        width: int = 64,
        depth: int = 2,
        mode: Literal["pure", "benchmark"] = "pure",
        key: PRNGKeyArray,
    ):
        size, channels = check_size("state_size", state_size), check_size("control_size", control_size, least=0)
        check_size("time_size", time_size, least=0)
        check_size("depth", depth)
        check_mode(mode)
        published = mode == "benchmark"
        embed, lift, zeta, gamma = jax.random.split(key, 4)
        lifted = published or time_size > 0
        self.embed = eqx.nn.Linear(channels, size, key=embed) if channels else None
        self.lift = eqx.nn.Linear(size + time_size, size, key=lift) if lifted else None
        self.zeta = eqx.nn.Linear(2 * size if channels else size, size, key=zeta)
        layers = depth - 1 if published else depth
        activation = jax.nn.relu if published else lipswish
        self.gamma = MLP(size, size, width=width, depth=layers, activation=activation, key=gamma)
        self.first, self.final = (jax.nn.relu, jnp.tanh) if published else (_identity, _identity)

    def __call__(
        self,
        z: Float[Array, " H"],
        x: Float[Array, " C"] | None = None,
        time: Float[Array, " time_size"] | None = None,
    ) -> Float[Array, " H"]:
        """The drift at state ``z`` under the control's value ``x``."""
        a = z if time is None else jnp.concatenate([time, z])
        a = a if self.lift is None else self.lift(a)
        mixed = a if self.embed is None else jnp.concatenate([a, self.embed(x)])
        return self.final(self.gamma(self.first(self.zeta(mixed))))
