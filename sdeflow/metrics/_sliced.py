"""``sliced_wasserstein``: transport along random lines, with a control variate."""

import math
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, PRNGKeyArray

from .._mesh import on_any_mesh
from ._average import absolute
from ._blocks import clouds, masses


def sliced_wasserstein(
    x: Any,
    y: Any,
    *,
    key: PRNGKeyArray,
    p: float = 2,
    num_projections: int = 100,
    control_variate: Literal["auto", "upper", "lower"] | None = "auto",
    regression: Literal["centred", "official"] = "centred",
    a: Any = None,
    b: Any = None,
    constant_slope: bool = False,
) -> Float[Array, ""]:
    r"""The sliced Wasserstein distance, ``(E W_p^p(<u, X>, <u, Y>))^(1/p)`` over directions u of the unit sphere.

    Over L directions the mean W of W_p^p, exact for each, is corrected to ``W - alpha (C - B)`` with a control variate
    C whose mean B is known (Nguyen and Ho 2024, ICLR): ``(<u, m_x - m_y>)^2``, "lower", or that and the variances of
    both clouds along u, "upper". Its slope alpha is fitted to the same directions, with a bias of order 1/L. Between
    two isotropic Gaussians (D = 5, n = 4000, L = 20) the standard deviation over directions falls from 0.25 to 0.005.

    It is in the units of the points, and shrinks with the dimension: a shift by s gives ``s / sqrt(D)`` for p = 2. From
    n points it is too large, by O(1 / sqrt(n)) where the laws agree, whatever D. O(L (n log n + D n)) time.

    Arguments:
        x: shape (n, D).
        y: shape (m, D).
        key: a random key, of the directions.
        p: at least 1.
        num_projections: L.
        control_variate: for p = 2 alone; "auto" is "upper" there, and None otherwise. It takes at least 4 directions.
        regression: "centred" fits alpha by least squares about the mean over the directions, and with "lower" is exact
            for clouds that differ by a shift. "official" has C - B in place of C - mean C, as the published code does,
            and measured up to ten times less reduction.
        a: the weights of x, shape (n,), equal if None; they are divided by their sum.
        b: the weights of y, shape (m,).
        constant_slope: make alpha constant to the gradient, which is then that of the textbook's estimator; by
            default it is the gradient of the number returned.

    Returns:
        A scalar, with gradient 0 where it is 0.

    Raises:
        ValueError: if the points or weights are not as described, or a control variate is asked of another p.

    Example:
        >>> import jax, numpy as np, sdeflow as sf
        >>> x = np.random.default_rng(0).normal(size=(50, 4))
        >>> round(float(sf.metrics.sliced_wasserstein(x, x + 1.0, key=jax.random.key(0))), 2)
        1.0
    """
    x, y = clouds(x, y)
    if not 1 <= p < math.inf:
        raise ValueError(f"p must be at least 1 and finite, got {p}.")
    if control_variate not in ("auto", "upper", "lower", None) or regression not in ("centred", "official"):
        raise ValueError(
            'control_variate must be "auto", "upper", "lower" or None and regression "centred" or "official", '
            f"got {control_variate!r} and {regression!r}."
        )
    if control_variate == "auto":
        control_variate = "upper" if p == 2 and num_projections >= 4 else None
    if control_variate and p != 2:
        raise ValueError(f"The control variates are those of p = 2, got p = {p}: pass control_variate=None.")
    if num_projections < (4 if control_variate else 1):
        raise ValueError(f"num_projections must be at least 1, and 4 with a control variate, got {num_projections}.")
    weighted = a is not None or b is not None
    a, b = masses("a", a, x), masses("b", b, y)
    centred = regression == "centred"
    return _distance(x, y, a, b, key, p, num_projections, control_variate, centred, constant_slope, weighted)


@on_any_mesh
@eqx.filter_jit
def _distance(
    x: Array,
    y: Array,
    a: Array,
    b: Array,
    key: PRNGKeyArray,
    p: float,
    num_projections: int,
    control_variate: str | None,
    centred: bool,
    constant_slope: bool,
    weighted: bool,
) -> Array:
    # About one centre: squares of what is far from 0 would lose the difference.
    centre = jax.lax.stop_gradient(a @ x + b @ y) / 2
    x, y = x - centre, y - centre
    u = jr.normal(key, (num_projections, x.shape[1]), x.dtype)
    u = u / jnp.linalg.norm(u, axis=1, keepdims=True)
    along = [jnp.matmul(u, z.T, precision="highest") for z in (x, y)]
    if len(x) == len(y) and not weighted:
        first, second = (jnp.sort(z, axis=1) for z in along)
        costs = (absolute(first - second) ** p).mean(axis=1)
    else:
        costs = jax.vmap(lambda s, t: _quantiles(s, t, a, b, p))(*along)
    mean = costs.mean()
    if control_variate:
        C, B = _control(u, along, x, y, a, b, control_variate == "upper")
        alpha = _slope(costs, C, B, (x**2).sum(axis=1).mean() + (y**2).sum(axis=1).mean(), centred)
        alpha = jax.lax.stop_gradient(alpha) if constant_slope else alpha
        mean = jnp.maximum(mean - alpha * (C.mean() - B), 0)
    return jnp.where(mean > 0, jnp.where(mean > 0, mean, 1) ** (1 / p), 0)


def _quantiles(x: Array, y: Array, a: Array, b: Array, p: float) -> Array:
    """W_p^p on a line: the quantile functions are constant between the merged jumps of both."""
    i, j = jnp.argsort(x), jnp.argsort(y)
    below, under = jnp.cumsum(a[i]), jnp.cumsum(b[j])
    below, under = below / below[-1], under / under[-1]
    jumps = jnp.sort(jnp.concatenate([jnp.zeros(1, x.dtype), below, under]))
    middle, widths = (jumps[1:] + jumps[:-1]) / 2, jnp.diff(jumps)
    k = jnp.minimum(jnp.searchsorted(below, middle), len(x) - 1)
    l = jnp.minimum(jnp.searchsorted(under, middle), len(y) - 1)
    return (widths * absolute(x[i][k] - y[j][l]) ** p).sum()


def _control(u: Array, along: list[Array], x: Array, y: Array, a: Array, b: Array, upper: bool) -> tuple[Array, Array]:
    """The control variate for every direction, and its mean over the sphere."""
    shift = a @ x - b @ y
    C, B = jnp.matmul(u, shift, precision="highest") ** 2, shift @ shift
    if upper:
        for line, z, w in zip(along, (x, y), (a, b)):
            C = C + ((line - (line @ w)[:, None]) ** 2) @ w
            B = B + w @ ((z - w @ z) ** 2).sum(axis=1)
    return C, B / u.shape[1]


def _slope(costs: Array, C: Array, B: Array, scale: Array, centred: bool) -> Array:
    about = C - (C.mean() if centred else B)
    spread = (about**2).mean()
    # A variate that varies by rounding alone, as with equal means and "lower", tells nothing: its slope is 0.
    least = (8 * jnp.finfo(C.dtype).eps * scale) ** 2
    told = spread > least
    return jnp.where(told, ((costs - costs.mean()) * about).mean() / jnp.where(told, spread, 1), 0)
