"""The strength of the noise, as a function of time alone or of time and state."""

import math
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_mode, check_size
from ._mlp import MLP
from ._time import bounded_time, circular_time


class _AbstractNoise(eqx.Module):
    net: MLP
    theta: Array | None
    sigma_min: float = eqx.field(static=True)
    sigma_max: float = eqx.field(static=True)

    def __init__(
        self,
        size: int,
        seen: int,
        width: int,
        mode: Literal["pure", "benchmark"],
        sigma_min: float,
        sigma_max: float,
        key: PRNGKeyArray,
    ):
        check_size("size", size)
        if not 0 < sigma_min < sigma_max < math.inf:
            raise ValueError(f"The bounds of sigma must be 0 < sigma_min < sigma_max, got {sigma_min} and {sigma_max}.")
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)
        if check_mode(mode) == "benchmark":
            self.net = MLP(2 + seen, size, width=width, depth=1, activation=jax.nn.relu, key=key)
            self.theta = jnp.ones(())
            return
        net = MLP(1 + seen, size, width=width, depth=1, key=key)
        # Half-way between the bounds on a logarithmic scale: on a linear one the noise would drown a drift that has
        # yet to learn.
        start = jnp.full(size, -math.log(sigma_max / sigma_min) / 2)
        self.net = eqx.tree_at(lambda n: n.layers[-1].bias, net, start)
        self.theta = None

    def _unbounded(self, t: Any, *seen: Array) -> Array:
        """What goes into the last tanh of the benchmark mode; in the pure mode the strength itself."""
        if self.theta is None:
            share = jax.nn.sigmoid(self.net(jnp.concatenate([bounded_time(t), *seen])))
            return self.sigma_min + (self.sigma_max - self.sigma_min) * share
        return jax.nn.sigmoid(self.theta) * jax.nn.relu(self.net(jnp.concatenate([circular_time(t), *seen])))


class NoiseScale(_AbstractNoise):
    r"""sigma(t), one number for each entry of the state; it is given no state to depend on.

        "pure":      sigma(t) = sigma_min + (sigma_max - sigma_min) sigmoid(MLP(t / (1 + |t|)))
        "benchmark": sigma(t) = tanh(sigmoid(theta) relu(MLP(sin t, cos t)))

    The first is Lipschitz in t, bounded, away from zero, and has a limit as t grows: what the theorems on existence
    and robustness ask for. The second repeats the published experiments; it is below 1 and may vanish.

    Arguments:
        size: length of the state.
        width: length of the one hidden layer.
        mode: "pure" or "benchmark".
        sigma_min, sigma_max: the bounds of the pure mode. Training starts near their geometric mean.
        key: a JAX random key for the initial weights.

    Raises:
        ValueError: for a size out of range, another mode, or bounds that are not 0 < sigma_min < sigma_max.

    Example:
        >>> import jax
        >>> from sdeflow.models.fields import NoiseScale
        >>> sigma = NoiseScale(4, sigma_min=0.1, sigma_max=0.4, key=jax.random.key(0))
        >>> bool(((sigma(3.0) > 0.1) & (sigma(3.0) < 0.4)).all())
        True
    """

    def __init__(
        self,
        size: int,
        *,
        width: int = 64,
        mode: Literal["pure", "benchmark"] = "pure",
        sigma_min: float = 0.1,
        sigma_max: float = 10.0,
        key: PRNGKeyArray,
    ):
        super().__init__(size, 0, width, mode, sigma_min, sigma_max, key)

    def __call__(self, t: Any) -> Float[Array, " size"]:
        """The strength of the noise at time ``t``."""
        strength = self._unbounded(t)
        return strength if self.theta is None else jnp.tanh(strength)

    def unbounded(self, t: Any) -> Float[Array, " size"]:
        """What goes into the last tanh of the benchmark mode; in the pure mode the strength itself."""
        return self._unbounded(t)


class NoiseField(_AbstractNoise):
    r"""g(t, z): as `NoiseScale`, with the state beside the time.

    Arguments: those of `NoiseScale`, and it raises what that raises.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from sdeflow.models.fields import NoiseField
        >>> NoiseField(4, key=jax.random.key(0))(0.5, jnp.ones(4)).shape
        (4,)
    """

    def __init__(
        self,
        size: int,
        *,
        width: int = 64,
        mode: Literal["pure", "benchmark"] = "pure",
        sigma_min: float = 0.1,
        sigma_max: float = 1.0,
        key: PRNGKeyArray,
    ):
        super().__init__(size, size, width, mode, sigma_min, sigma_max, key)

    def __call__(self, t: Any, z: Float[Array, " size"]) -> Float[Array, " size"]:
        """The strength of the noise at time ``t`` and state ``z``."""
        strength = self._unbounded(t, z)
        return strength if self.theta is None else jnp.tanh(strength)
