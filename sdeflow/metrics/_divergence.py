"""``sinkhorn_divergence``: entropic transport without its bias."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from .._compat import is_concrete
from .._mesh import on_any_mesh
from .._results import is_okay
from ._blocks import clouds
from ._sinkhorn import sinkhorn


@on_any_mesh
def sinkhorn_divergence(
    x: Any,
    y: Any,
    epsilon: Any,
    *,
    a: Any = None,
    b: Any = None,
    rho: Any = None,
    tolerance: float = 1e-3,
    max_iterations: int = 2000,
    anneal: float = 0.5,
    chunk: int | None = None,
    throw: bool = True,
) -> Float[Array, ""]:
    r"""The divergence ``OT(x, y) - (OT(x, x) + OT(y, y)) / 2`` of entropic transport for the cost |x - y|^2 / 2.

    It is 0 for equal clouds and positive for others (Feydy et al. 2019, AISTATS). For small ``epsilon`` it tends to
    ``W_2^2 / 2`` of the samples, and for large to ``|m_x - m_y|^2 / 2`` of their means: a loss between the two, in
    squared units of the points. From n points of one law it is O(1/n) for fixed ``epsilon``, and like W_2^2,
    O(n^(-2/D)), for a small one. With ``rho`` the masses add ``epsilon (sum a - sum b)^2 / 2`` (Séjourné et al. 2019).
    Its gradient is exact up to the marginals' error, and nothing goes back through the iterations. Second derivatives
    are refused.

    Arguments:
        x: shape (n, D).
        y: shape (m, D).
        epsilon: positive, in units of the cost.
        a: the weights of x, shape (n,); see `sinkhorn`, also for what follows.
        b: the weights of y, shape (m,).
        rho: a positive number for soft marginals.
        tolerance: for the marginals' error of each of the three plans.
        max_iterations: the most for each of them.
        anneal: between 0 and 1.
        chunk: how many rows to compute at a time.
        throw: called eagerly, raise if a plan did not converge; in a trace the divergence is NaN then. If False, it
            is what the plans say as they are.

    Returns:
        A scalar.

    Raises:
        ValueError: if the points, weights or numbers are not as described.
        SolveError: eagerly with ``throw=True``, if a plan does not converge.

    Example:
        >>> import numpy as np, sdeflow as sf
        >>> x = np.random.default_rng(0).normal(size=(100, 2))
        >>> round(float(sf.metrics.sinkhorn_divergence(x, x + np.array([1.0, 0.0]), 0.5)), 3)
        0.5
    """
    x, y = clouds(x, y)
    if rho is not None and jnp.ndim(rho):
        raise ValueError(f"rho must be one number here, as each cloud takes both places, got shape {jnp.shape(rho)}.")
    options = {
        "rho": rho,
        "tolerance": tolerance,
        "max_iterations": max_iterations,
        "anneal": anneal,
        "chunk": chunk,
        "throw": throw,
    }
    plans = (
        sinkhorn(x, y, epsilon, a=a, b=b, **options),
        sinkhorn(x, None, epsilon, a=a, **options),
        sinkhorn(y, None, epsilon, a=b, **options),
    )
    both, first, second = (plan.regularised() for plan in plans)
    value = both - (first + second) / 2
    if rho is not None:
        value = value + plans[0].epsilon * (plans[0].a.sum() - plans[0].b.sum()) ** 2 / 2
    if throw and not is_concrete(value):
        okay = is_okay(plans[0].result) & is_okay(plans[1].result) & is_okay(plans[2].result)
        value = jnp.where(okay, value, jnp.nan)
    return value
