"""A multilayer perceptron and the activation that keeps it Lipschitz.

    lipswish(x) = 0.909 x sigmoid(x),    |lipswish'| <= 1

The derivative of x sigmoid(x) is at most 1.0998, so the factor brings it just below 1, and the Lipschitz
constant of a network is at most the product of the spectral norms of its weights. Source: Chen, Behrmann,
Duvenaud and Jacobsen, "Residual flows for invertible generative modeling", NeurIPS 2019.
"""

from collections.abc import Callable

import equinox as eqx
import jax
from jaxtyping import Array, Float, PRNGKeyArray

from .._checks import check_size


def lipswish(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """0.909 x sigmoid(x): smooth, and no two inputs are moved apart.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from sdeflow.models.fields import lipswish
        >>> float(jax.vmap(jax.grad(lipswish))(jnp.linspace(-10.0, 10.0, 2001)).max()) <= 1.0
        True
    """
    return 0.909 * jax.nn.silu(x)


class MLP(eqx.Module):
    """Affine layers with an activation between them: x -> W_d a(... a(W_0 x + b_0) ...) + b_d.

    Arguments:
        in_size, out_size: lengths of the input and the output.
        width: length of each hidden layer.
        depth: number of hidden layers, 0 for one affine map.
        activation: applied after every layer but the last.
        key: a JAX random key for the initial weights, uniform within 1/sqrt(fan-in).

    Raises:
        ValueError: if a size is not an integer in its range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from sdeflow.models.fields import MLP
        >>> MLP(3, 2, width=8, depth=2, key=jax.random.key(0))(jnp.ones(3)).shape
        (2,)
    """

    layers: tuple[eqx.nn.Linear, ...]
    activation: Callable

    def __init__(
        self,
        in_size: int,
        out_size: int,
        *,
        width: int,
        depth: int,
        activation: Callable = lipswish,
        key: PRNGKeyArray,
    ):
        in_size, out_size = check_size("in_size", in_size), check_size("out_size", out_size)
        width, depth = check_size("width", width), check_size("depth", depth, least=0)
        sizes = [in_size, *[width] * depth, out_size]
        keys = jax.random.split(key, depth + 1)
        self.layers = tuple(eqx.nn.Linear(a, b, key=k) for a, b, k in zip(sizes[:-1], sizes[1:], keys))
        self.activation = activation

    def __call__(self, x: Float[Array, " in_size"]) -> Float[Array, " out_size"]:
        """Apply the network."""
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)
