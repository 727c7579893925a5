r"""``sinkhorn_bridge``: the bridge between samples, without training.

Sinkhorn's potential g of the static problem makes the end's potential a sum of points, the mixture with S = 0 and
``log a_j = g_j / epsilon + log b_j - |y_j|^2 / (2 epsilon)`` in the coordinates of the clock: the drift pulls towards
the mean of the points that a state may still reach. By symmetry f makes the potential of the way back.

With soft marginals the plan moves ``P 1`` to ``P' 1``, which are only near the weights, and is the same product of a, b
and the two potentials: the same formulas then make the bridge between its own marginals.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from ..equations import LinearSDE
from ..metrics import sinkhorn
from ._bridge import Bridge
from ._mixture import MixturePotential
from ._samples import prepared


def sinkhorn_bridge(
    x0: Any,
    x1: Any,
    epsilon: Any = None,
    reference: LinearSDE | None = None,
    *,
    t0: Any = 0.0,
    t1: Any = 1.0,
    a: Any = None,
    b: Any = None,
    rho: Any = None,
    tolerance: float = 1e-3,
    max_iterations: int = 2000,
    throw: bool = True,
) -> Bridge:
    """The exact Schrödinger bridge between the empirical laws of two samples.

    It ends on the points x1: the drift is finite before t1 only, and the backward drift after t0. Every evaluation
    costs O(n d); an SDE solver should stop a little before t1, or paths be drawn exactly with ``sample_path``.

    Arguments:
        x0: shape (n, d), at t0.
        x1: shape (m, d), at t1.
        epsilon: the variance of Brownian motion over the horizon, where no reference is given.
        reference: a `LinearSDE` instead.
        t0, t1: the horizon.
        a: weights of x0, shape (n,), equal if None; where cells divide and die, `sdeflow.data.growth_weights`.
        b: weights of x1, shape (m,).
        rho: as in `sdeflow.metrics.sinkhorn`, a positive number or one for each end, for ends that are only near a and
            b, which are masses with it. What can hardly be reached is left to growth and death.
        tolerance: of Sinkhorn's marginal error.
        max_iterations: of Sinkhorn.
        throw: called eagerly, raise if Sinkhorn did not converge; else see ``result``.

    Returns:
        A `Bridge`. Its ``history["source"]`` and ``history["target"]`` are the masses that leave and reach the points:
        a start is drawn with the former for its weights.

    Raises:
        ValueError: if the samples, weights or numbers are not as described.
        SolveError: if Sinkhorn did not converge.

    Example:
        >>> import jax, sdeflow as sf
        >>> x = jax.random.normal(jax.random.key(0), (100, 2))
        >>> bridge = sf.bridges.sinkhorn_bridge(x, x + 1.0, 0.5)
        >>> bridge.velocity(0.5, x[0] + 0.5).shape
        (2,)
    """
    clock, z0, z1 = prepared(x0, x1, epsilon, reference, t0, t1)
    coupling = sinkhorn(
        z0, z1, clock.epsilon, a=a, b=b, rho=rho, tolerance=tolerance, max_iterations=max_iterations, throw=throw
    )
    source, target = coupling.marginals()
    return Bridge(
        clock,
        points(z1, coupling.g / clock.epsilon + jnp.log(coupling.b), clock.epsilon),
        points(z0, coupling.f / clock.epsilon + jnp.log(coupling.a), clock.epsilon),
        history={
            "error": coupling.error,
            "num_iterations": coupling.num_iterations,
            "source": source,
            "target": target,
        },
        result=coupling.result,
    )


def points(z: Array, log_density: Array, epsilon: Array) -> MixturePotential:
    """The potential whose end has the density ``exp(log_density)`` relative to counting the points z."""
    return MixturePotential(
        log_density - (z**2).sum(axis=1) / (2 * epsilon), z, jnp.zeros((len(z), 1), z.dtype), epsilon
    )
