"""The one problem every row is measured on, and its hand-written limits.

dY = f(Y) dt + g(Y) dW with diagonal noise, f = MLP(D, W, W, D) with tanh between its layers, g = 0.3 tanh(MLP
alike), on [0, 1] in n equal Euler-Maruyama steps. The state is (B, D): B paths at once. The loss is
mean(Y(1)^2), and gradients are with respect to all weights and y0. Arithmetic per step, forward: 2 networks x
2 (2 D W + W^2) x B.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr


@dataclasses.dataclass(frozen=True)
class Size:
    """A size of the problem: B paths of dimension D, networks of width W, n steps."""

    name: str
    batch: int
    dim: int
    width: int
    steps: int

    @property
    def step_size(self) -> float:
        """The length of one step."""
        return 1.0 / self.steps

    @property
    def flops_per_step(self) -> float:
        """Floating-point operations of the networks in one forward step."""
        return 2 * 2 * (2 * self.dim * self.width + self.width**2) * self.batch

    def __str__(self) -> str:
        return f"{self.name}: n={self.steps} B={self.batch} D={self.dim} W={self.width} float32, Euler"


#: small is bound by overhead, medium is a usual batch, large by its matrix products (cost is linear in n)
SIZES = {
    size.name: size
    for size in (
        Size("small", batch=1, dim=1, width=8, steps=1000),
        Size("mid", batch=64, dim=32, width=64, steps=200),
        Size("medium", batch=256, dim=32, width=64, steps=200),
        Size("large", batch=1024, dim=128, width=256, steps=20),
    )
}


def make(size: Size) -> tuple[dict, jax.Array, jax.Array]:
    """Parameters, initial state (B, D) and a key for the noise, always the same ones for a size."""
    k_drift, k_diffusion, k_y0, key = jr.split(jr.key(0), 4)
    params = {"drift": _network(size, k_drift), "diffusion": _network(size, k_diffusion)}
    return params, jr.normal(k_y0, (size.batch, size.dim)), key


def _network(size: Size, key: jax.Array) -> list[dict]:
    widths = (size.dim, size.width, size.width, size.dim)
    keys = jr.split(key, 3)
    return [
        {"weight": jr.normal(k, (i, o)) / math.sqrt(i), "bias": jnp.zeros(o)}
        for k, i, o in zip(keys, widths[:-1], widths[1:], strict=True)
    ]


def _apply(layers: list[dict], y: jax.Array) -> jax.Array:
    for layer in layers[:-1]:
        y = jnp.tanh(y @ layer["weight"] + layer["bias"])
    return y @ layers[-1]["weight"] + layers[-1]["bias"]


def drift(t: Any, y: jax.Array, args: dict) -> jax.Array:
    """f(Y), (B, D)."""
    return _apply(args["drift"], y)


def diffusion(t: Any, y: jax.Array, args: dict) -> jax.Array:
    """g(Y), (B, D): diagonal."""
    return 0.3 * jnp.tanh(_apply(args["diffusion"], y))


def loss(ys: jax.Array) -> jax.Array:
    """The mean square of the last state, or of all saved ones."""
    return jnp.mean(ys**2)


def draw(size: Size, key: jax.Array) -> jax.Array:
    """The increments of a Brownian motion over every step, (n, B, D), in one draw."""
    return math.sqrt(size.step_size) * jr.normal(key, (size.steps, size.batch, size.dim))


def hand_scan(
    size: Size, params: dict, y0: jax.Array, increments: jax.Array, *, remat: bool = False, save: bool = False
) -> jax.Array:
    """What an expert writes without any library: one scan of Euler-Maruyama steps.

    Returns the last state, or with ``save`` all n + 1 states. With ``remat`` the backward pass recomputes
    each step from its state instead of storing what the networks computed.
    """
    h = size.step_size

    def step(y: jax.Array, dw: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        y1 = y + drift(None, y, params) * h + diffusion(None, y, params) * dw
        return y1, (y1 if save else None)

    if remat:
        # inside a scan the barrier against common subexpressions is not needed and only costs
        step = jax.checkpoint(step, prevent_cse=False)
    final, ys = jax.lax.scan(step, y0, increments)
    return jnp.concatenate([y0[None], ys]) if save else final


def layers(key: Any, *sizes: int) -> list[tuple[jax.Array, jax.Array]]:
    """Weights and biases of a network with these widths."""
    keys = jr.split(key, len(sizes) - 1)
    return [(jr.normal(k, (a, b)) / math.sqrt(a), jnp.zeros(b)) for k, a, b in zip(keys, sizes, sizes[1:])]


def network(params: list[tuple[Any, Any]], x: Any, tanh: Any = jnp.tanh) -> Any:
    """The network, with tanh between its layers; in torch with that of torch."""
    *hidden, (w, b) = params
    for v, c in hidden:
        x = tanh(x @ v + c)
    return x @ w + b
