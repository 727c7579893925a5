r"""Entropic transport between two clouds of points: ``sinkhorn``, the solver that bridges use too.

With the cost C_ij = |x_i - y_j|^2 / 2 and weights a and b it finds the plan P that minimises
``<P, C> + epsilon KL(P | a b)`` among those with marginals a and b (Cuturi 2013, NeurIPS), or, with ``rho``, that
minimises ``<P, C> + epsilon KL(P | a b) + rho KL(P 1 | a) + rho KL(P' 1 | b)`` (Chizat et al. 2018, Math. Comp. 87).
It is the static Schrödinger bridge of Brownian motion with variance ``epsilon`` at time 1. The cost is half of that
which OTT, POT and TorchCFM take: the ``epsilon`` of theirs is twice ours.

One iteration takes one exponential for each pair. Relative to the weights the plan has the density
``E_ij = exp((f_i + g_j - C_ij) / epsilon)``, and both steps,

    f_i <- f_i - epsilon log s_i,  s_i = sum_j b_j E_ij,
    g_j <- g_j - epsilon log t_j,  t_j = sum_i a_i E_ij / s_i,

are products of one matrix with vectors: E is also the kernel of the second step, with rows divided by their sums. As
the sums are 1 at the solution no maximum need be taken out of the logarithms; on the way there a step of more than 40
epsilon is cut to that, which still climbs the concave dual. The error of the second marginal comes with it for free.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._compat import is_concrete
from .._mesh import on_any_mesh
from .._results import RESULTS, SolveError, is_okay
from ._blocks import DENSE, block_rows, clouds, join, masses, over_blocks, products, split
from ._coupling import Coupling, within


@on_any_mesh
def sinkhorn(
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
) -> Coupling:
    r"""The entropic plan between two clouds for the cost |x - y|^2 / 2, balanced or with soft marginals.

    The regularisation starts at about the largest cost and falls by the factor ``anneal`` with each iteration down to
    ``epsilon``. In the end the first marginal is met but for rounding, and ``error`` is the other's.

    Rounding: the clouds are centred, each around its own mean, and of the density of the plan it spoils about
    ``1.2e-7 R^2 / epsilon`` of 1 in float32, R^2 / 2 being the largest cost of centred points. Beyond 5% the plan is
    called not converged, whatever its error; take float64 then.

    Arguments:
        x: shape (n, D), or (n,) on a line.
        y: shape (m, D), or (m,). None for the plan of x with itself: by symmetry its two potentials are one, and a few
            iterations find it.
        epsilon: positive, in units of the cost. The blur of the plan is sqrt(epsilon) wide.
        a: the weights of x, shape (n,), equal if None. Without ``rho`` they are divided by their sum; 0 is allowed,
            and such points change nothing.
        b: the weights of y, shape (m,); those of x where y is None.
        rho: a positive number, or one for each marginal, for marginals that are only near a and b; the weights are
            masses then and kept as they are. Infinite for a marginal that is prescribed.
        tolerance: for the error, ``sum_j |P_j - b_j|`` of a balanced plan; with ``rho`` the distance of the marginals
            from ``a exp(-f / rho)`` and ``b exp(-g / rho)``, relative to their mass.
        max_iterations: the most that are made.
        anneal: between 0 and 1.
        chunk: how many rows to compute at a time. If None, up to 2^24 pairs keep their inner products; more do not,
            and memory then grows with n + m.
        throw: called eagerly, raise if the plan did not converge. Inside a trace ``result`` says so.

    Returns:
        A `Coupling`.

    Raises:
        ValueError: if the points, weights or numbers are not as described.
        SolveError: eagerly with ``throw=True``, if the error stays above the tolerance.

    Example:
        >>> import numpy as np, sdeflow as sf
        >>> x = np.linspace(-2.0, 2.0, 200)
        >>> coupling = sf.metrics.sinkhorn(x, x + 1.0, 0.5)
        >>> round(float(coupling.transport()[100, 0] - x[100]), 2)
        1.0
    """
    itself, soft = y is None, rho is not None
    x, y = clouds(x, x if itself else y)
    if soft:
        rho = rho if isinstance(rho, tuple | list) else (rho, rho)
        if len(rho) != 2 or (itself and rho[0] is not rho[1]):
            raise ValueError("rho must be one number, or one for each marginal of two clouds.")
    if itself and b is not None:
        raise ValueError("b must be None where y is: the cloud has the weights a in both places.")
    for name, value in (("epsilon", epsilon), ("tolerance", tolerance), *(("rho", r) for r in rho or ())):
        _positive(name, value)
    if not 0 < anneal < 1:
        raise ValueError(f"anneal must lie between 0 and 1, both excluded, got {anneal}.")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {max_iterations}.")
    if soft and is_concrete(*rho) and np.isinf(np.asarray(rho, float)).all():
        soft = False
    a = masses("a", a, x, not soft)
    b = a if itself else masses("b", b, y, not soft)
    epsilon = jnp.asarray(epsilon, x.dtype)
    rho = tuple(jnp.asarray(r, x.dtype) for r in (rho if soft else (jnp.inf, jnp.inf)))
    rows = block_rows(len(x), len(y), chunk)
    stored = chunk is None and len(x) * len(y) <= DENSE
    constants = jax.lax.stop_gradient((x, y, a, b, epsilon, rho))
    limits = (jnp.asarray(tolerance, x.dtype), jnp.asarray(max_iterations), jnp.asarray(anneal, x.dtype))
    solved = _solve(*constants, *limits, soft, itself, rows, stored)
    centres, potentials, error, resolution, count = solved
    converged = (error <= limits[0]) & (resolution <= _RESOLUTION)
    okay: Any = RESULTS.successful
    result = RESULTS.where(converged, okay, RESULTS.sinkhorn_not_converged)
    coupling = Coupling(x, y, a, b, epsilon, rho, centres, potentials, error, count, result, rows)
    if throw and is_concrete(error) and not bool(is_okay(result)):
        raise SolveError(result, _sentence(coupling, tolerance, float(resolution)))
    return coupling


# The rounding of the plan's density, relative to 1, beyond which no marginal error says that the plan is right; and
# the longest step of a potential, in units of epsilon.
_RESOLUTION = 0.05
_STEP = 40.0


@on_any_mesh
@eqx.filter_jit
def _solve(
    x: Array,
    y: Array,
    a: Array,
    b: Array,
    epsilon: Array,
    rho: tuple[Array, Array],
    tolerance: Array,
    max_iterations: Array,
    anneal: Array,
    soft: bool,
    itself: bool,
    rows: int,
    stored: bool,
) -> tuple:
    centres = (a @ x) / a.sum(), (b @ y) / b.sum()
    if soft:
        # The potentials are damped as they are, and moving the clouds apart would change them.
        centres = ((a @ x + b @ y) / (a.sum() + b.sum()),) * 2
    x, y = x - centres[0], y - centres[1]
    # What leaves inner products of the costs; a point without weight counts neither here nor in the centres.
    xx, yy = (x**2).sum(axis=1) / 2, (y**2).sum(axis=1) / 2
    reach = (jnp.sqrt(jnp.where(a > 0, xx, 0).max()) + jnp.sqrt(jnp.where(b > 0, yy, 0).max())) ** 2
    resolution = jnp.finfo(x.dtype).eps * reach / epsilon
    blocks = split(x, rows)
    if stored:
        blocks = jax.lax.map(lambda block: products(block, y), blocks)
    aa = split(a, rows)

    def step(f: Array, g: Array, eps: Array) -> tuple:
        tau = tuple(1 / (1 + eps / r) for r in rho)

        def half(block: tuple) -> tuple:
            inner, f, xx, a = block
            E = jnp.exp(within(inner if stored else products(inner, y), f - xx, g - yy, eps))
            s = E @ b
            # Where the sum is not 0 this is tau (f - eps log s) - f.
            change = jnp.clip((tau[0] - 1) * (f / eps) - tau[0] * _log(s), -_STEP, _STEP)
            if itself:
                # Halfway (Feydy et al. 2019), with the error before the step: the plan has one potential twice.
                off = a * jnp.abs(s - jnp.exp(-f / rho[0]))
                return (off.sum(), (a * jnp.exp(-f / rho[0])).sum()), f + eps * change / 2
            new = f + eps * change
            off = a * jnp.abs(s * jnp.exp(change) - jnp.exp(-new / rho[0]))
            return ((a * jnp.exp(change)) @ E, off.sum()), new

        (t, off), after = over_blocks(half, (blocks, f, split(xx, rows), aa))
        if itself:
            return f, after, join(after, len(x)), t / off
        wanted = b * jnp.exp(-g / rho[1])
        error = jnp.maximum(jnp.abs(b * t - wanted).sum(), off) / wanted.sum()
        change = jnp.clip((tau[1] - 1) * (g / eps) - tau[1] * _log(t), -_STEP, _STEP)
        return after, after, g + eps * change, error

    def going(state: tuple) -> Array:
        k, eps, *_, error = state
        return (k < max_iterations) & ((eps > epsilon) | ~(error <= tolerance)) & (resolution <= _RESOLUTION)

    def body(state: tuple) -> tuple:
        k, _, _, _, f, g, _ = state
        eps = jnp.maximum(epsilon, reach * anneal**k)
        if soft and not itself:
            f, g = _balance(f, g, aa, b, rho)
        solution, *following, error = step(f, g, eps)
        return k + 1, eps, solution, g, *following, error

    zero, inf = jnp.zeros_like(yy), jnp.asarray(jnp.inf, x.dtype)
    # The potentials of the plan that the error is of, then those that follow.
    start = (jnp.asarray(0), inf, jnp.zeros_like(aa), zero, jnp.zeros_like(aa), zero, inf)
    count, _, f, g, _, _, error = jax.lax.while_loop(going, body, start)
    return centres, (join(f, len(x)), g), error, resolution, count


def _balance(f: Array, g: Array, a: Array, b: Array, rho: tuple[Array, Array]) -> tuple[Array, Array]:
    """The best f + c and g - c: the steps alone would approach it at the rate epsilon / rho (Séjourné et al. 2022)."""
    # The masses of the two marginals, a exp(-f / rho), are to be equal.
    first = jax.scipy.special.logsumexp(-f / rho[0], b=a)
    second = jax.scipy.special.logsumexp(-g / rho[1], b=b)
    stiffness = 1 / rho[0] + 1 / rho[1]
    shift = jnp.where(stiffness > 0, (first - second) / jnp.where(stiffness > 0, stiffness, 1), 0)
    return f + shift, g - shift


def _log(sums: Array) -> Array:
    return jnp.log(jnp.maximum(sums, jnp.finfo(sums.dtype).tiny))


def _positive(name: str, value: Any) -> None:
    if jnp.ndim(value) != 0:
        raise ValueError(f"{name} must be one number, got shape {jnp.shape(value)}.")
    if is_concrete(value) and not float(value) > 0:
        raise ValueError(f"{name} must be positive, got {float(value)}.")


def _sentence(coupling: Coupling, tolerance: float, resolution: float) -> str:
    if not resolution <= _RESOLUTION:
        dtype, least = coupling.x.dtype, float(coupling.epsilon) * resolution / _RESOLUTION
        return (
            f"epsilon = {float(coupling.epsilon):.3g} is too small for {dtype} and these points: rounding spoils "
            f"{resolution:.1%} of the plan's density. Take epsilon of at least {least:.3g}, or float64."
        )
    return (
        f"Sinkhorn's iterations did not converge: after {int(coupling.num_iterations)} the marginal error is "
        f"{float(coupling.error):.3g}, above the tolerance {tolerance:.3g}. Raise epsilon, tolerance or max_iterations."
    )
