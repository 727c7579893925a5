"""The strength of the noise as a function of time alone."""

from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_size
from ._mlp import MLP


class NoiseScale(eqx.Module):
    r"""sigma(t), one positive number for each entry of the state; it is given no state to depend on.

        "pure":      sigma(t) = sigma_min + (sigma_max - sigma_min) sigmoid(MLP(tau)),  tau = t / (1 + |t|)
        "benchmark": sigma(t) = tanh(sigmoid(theta) relu(MLP(sin t, cos t)))

    The first is bounded and Lipschitz in t, away from zero, and has a limit as t grows: what the theorems on
    existence and robustness ask for. The second repeats the published experiments, where it may vanish.

    Arguments:
        size: length of the state.
        width: length of the one hidden layer.
        mode: "pure" or "benchmark".
        sigma_min, sigma_max: the bounds of the pure mode, 0 < sigma_min < sigma_max. Training starts near their
            geometric mean.
        key: a JAX random key for the initial weights.

    Raises:
        ValueError: for another mode, or bounds out of order.

    Example:
        >>> import jax
        >>> from sdeflow.models.fields import NoiseScale
        >>> sigma = NoiseScale(4, width=8, sigma_min=0.1, sigma_max=0.4, key=jax.random.key(0))
        >>> bool(((sigma(3.0) > 0.1) & (sigma(3.0) < 0.4)).all())
        True
    """

    net: MLP
    theta: Array | None
    sigma_min: float = eqx.field(static=True)
    sigma_max: float = eqx.field(static=True)

    def __init__(
        self,
        size: int,
        *,
        width: int = 64,
        mode: Literal["pure", "benchmark"] = "pure",
        sigma_min: float = 0.01,
        sigma_max: float = 1.0,
        key: PRNGKeyArray,
    ):
        check_size("size", size)
        check_mode(mode)
        if not 0 < sigma_min < sigma_max < float("inf"):
            raise ValueError(
                f"0 < sigma_min < sigma_max is needed for the noise to be bounded, got {sigma_min} and {sigma_max}."
            )
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)
        if mode == "benchmark":
            self.net = MLP(2, size, width=width, depth=1, activation=jax.nn.relu, key=key)
            self.theta = jnp.ones(())
        else:
            net = MLP(1, size, width=width, depth=1, key=key)
            # Half of the range in the logarithm, not in the value: noise as strong as sigma_max / 2 would drown
            # the drift before it has learned anything.
            share = 1 / (1 + (sigma_max / sigma_min) ** 0.5)
            start = jnp.full(size, jnp.log(share / (1 - share)))
            self.net = eqx.tree_at(lambda n: n.layers[-1].bias, net, start)
            self.theta = None

    def __call__(self, t: Any) -> Float[Array, " size"]:
        """The noise strength at time ``t``."""
        t = jnp.asarray(t, jnp.result_type(float)) if not hasattr(t, "dtype") else t
        if self.theta is not None:
            value = jax.nn.relu(self.net(jnp.stack([jnp.sin(t), jnp.cos(t)])))
            return jnp.tanh(jax.nn.sigmoid(self.theta) * value)
        share = jax.nn.sigmoid(self.net(jnp.stack([t / (1 + jnp.abs(t))])))
        return self.sigma_min + (self.sigma_max - self.sigma_min) * share


def check_mode(mode: Any) -> None:
    """Refuse a mode that does not exist.

    Raises:
        ValueError: naming the two that do.
    """
    if mode not in ("pure", "benchmark"):
        raise ValueError(f'mode must be "pure" (as in the theorems) or "benchmark" (as in the tables), got {mode!r}.')
