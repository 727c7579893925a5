r"""``gaussian_sb``: the bridge between two Gaussians, in closed form.

In the coordinates of the clock, with covariances V0 and V1, the plan's conditional law is N(r + S x, epsilon S) with

    S = V1^1/2 h(V1^1/2 V0 V1^1/2) V1^1/2,   h(l) = 2 / (sqrt(4 l + epsilon^2) + epsilon),   r = m1 - S m0,

which solves S V0 S + epsilon S = V1 (Bunne, Hsieh, Cuturi and Krause, AISTATS 2023, in the form that needs no inverse).
It is a mixture of one component; so is the potential of the way back, with the two ends exchanged.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._compat import is_concrete
from .._mesh import on_any_mesh
from .._results import RESULTS
from ..equations import LinearSDE
from ._bridge import Bridge
from ._clock import Clock, apply
from ._mixture import MixturePotential


@on_any_mesh
def gaussian_sb(m0: Any, S0: Any, m1: Any, S1: Any, reference: LinearSDE, *, t0: Any = 0.0, t1: Any = 1.0) -> Bridge:
    """The Schrödinger bridge from N(m0, S0) at t0 to N(m1, S1) at t1.

    Arguments:
        m0: shape (d,).
        S0: shape (d, d), a covariance; directions without variance are allowed.
        m1: shape (d,).
        S1: shape (d, d).
        reference: any `LinearSDE` of d components with noise in all directions over the horizon.
        t0, t1: the horizon.

    Returns:
        A `Bridge` with its way back; its drift is affine in x.

    Raises:
        ValueError: if shapes disagree, or a covariance is not symmetric or has a negative eigenvalue.

    Example:
        >>> import jax.numpy as jnp, sdeflow as sf
        >>> eye = jnp.eye(1)
        >>> wiener = sf.equations.BrownianMotion(1, 0.5**0.5)
        >>> bridge = sf.bridges.gaussian_sb(jnp.zeros(1), eye, jnp.ones(1), eye / 4, wiener)
        >>> round(float(bridge.potential.spread[0, 0]), 6)
        0.309017
    """
    dtype = jnp.result_type(reference.dtype, jnp.asarray(m0))
    m0, S0, m1, S1 = (jnp.asarray(v, dtype) for v in (m0, S0, m1, S1))
    d = reference.dim
    for name, value, shape in (("m0", m0, (d,)), ("S0", S0, (d, d)), ("m1", m1, (d,)), ("S1", S1, (d, d))):
        if value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, like the reference, got {value.shape}.")
        if len(shape) == 2 and is_concrete(value):
            _check_covariance(name, np.asarray(value, np.float64))
    clock = Clock(reference, t0, t1)
    clock = clock.around(clock.end(m1))
    jacobian, _, _ = clock.map(clock.t0)
    inside = lambda m, S: m[:, None] * S * m if m.ndim == 1 else m @ S @ m.T
    here, there = (clock.start(m0), inside(jacobian, S0)), (clock.end(m1), inside(clock.scale, S1))
    potential = _component(*here, *there, clock.epsilon)
    backward = _component(*there, *here, clock.epsilon)
    okay: Any = RESULTS.successful
    return Bridge(clock, potential, backward, result=okay)


def _component(m0: Array, V0: Array, m1: Array, V1: Array, epsilon: Array) -> MixturePotential:
    root = _root(V1)
    l, W = jnp.linalg.eigh(root @ V0 @ root)
    l = jnp.maximum(l, 0)
    half = root @ (W * jnp.sqrt(2 / (jnp.sqrt(4 * l + epsilon**2) + epsilon)))
    S = half @ half.T
    s, U = jnp.linalg.eigh((S + S.T) / 2)
    r = m1 - apply(S, m0)
    return MixturePotential(jnp.zeros(1, r.dtype), r[None], jnp.maximum(s, 0)[None], epsilon, U[None])


def _root(V: Array) -> Array:
    l, U = jnp.linalg.eigh(V)
    return (U * jnp.sqrt(jnp.maximum(l, 0))) @ U.T


def _check_covariance(name: str, V: np.ndarray) -> None:
    size = np.abs(V).max()
    if not np.isfinite(size) or np.abs(V - V.T).max() > 1e-5 * size:
        raise ValueError(f"{name} must be a finite symmetric matrix.")
    if np.linalg.eigvalsh(V).min() < -1e-5 * size:
        raise ValueError(f"{name} is no covariance: an eigenvalue is negative.")
