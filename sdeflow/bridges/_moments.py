r"""``Moments``: steps down LightSB's loss that match moments and need no rate.

The loss is E log c(x) - E log v(y). Let w_k(x) and rho_k(y) be the weights of the components now. As log u <= u - 1,

    E log c'(x) <= E log c(x) + E [c'(x) / c(x)] - 1 = const + sum_k E [w_k(x) exp(l_k'(x) - l_k(x))]

with ``l_k(x) = log a_k + (x' S_k x + 2 r_k' x) / (2 epsilon)``, and -E log v is bounded as in expectation maximisation.
Both bounds touch at the present parameters. If the x that belong to component k are taken for Gaussian, with mean m,
covariance C and mass w, the sum of the bounds has its minimum in closed form: where the tilted x of each component,
moved by its plan, have the mass rho, the mean n and the covariance D of the y that belong to it,

    P = C^-1 + S / epsilon,    h = C^-1 m - r / epsilon,
    S' = (epsilon D^-1 + (epsilon P)^-1)^-1,    r' = n - S' P^-1 (n / epsilon + h),
    log a' = log a + log (rho / w) - log of the mass of the tilted x.

A step costs as much as two evaluations of the loss and goes much farther than one of Adam. The moments are running
means over batches, each with its own centre, so nothing cancels; the window is short while the components move and in
the end as long as what is left of the training. Covariances are drawn towards their mean over the components by half as
many imaginary rows as there are dimensions: without that, components of few rows turn into needles.
"""

from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_WINDOW = 20  # Batches in the running means while the components move.
_SETTLE = 0.6  # The share of the updates after which the window grows.
_WAIT = 0.08  # The share of them that only gathers moments.
_PRIOR = 0.5  # Imaginary rows for each dimension.
_FLOOR = 32  # Of a variance, in units of rounding of the data's total variance: less, and inverses fail.
_SMALL = 1e-12  # Weights below are 0: subnormal numbers make products crawl.


class Components(NamedTuple):
    """A potential in training: log a (K,), r (K, d), S (K, d, d)."""

    logs: Float[Array, " K"]
    centres: Float[Array, "K d"]
    spread: Float[Array, "K d d"]


@eqx.filter_jit
def tiles(x: Float[Array, "n d"], y: Float[Array, "m d"], plain: Components, epsilon: Array) -> Components:
    r"""The bridge between two Gaussians, its end cut into K equal pieces.

    The Gaussians with the moments of x and y have the bridge with one component, ``r = m - S m0`` and

        S = C0^-1/2 [ (C0^1/2 C1 C0^1/2 + epsilon^2 / 4)^1/2 - epsilon / 2 ] C0^-1/2.

    Its potential v, times N(y_k, tau^2 C1) / N(m, C1) with ``tau = K^(-1/d)``, is component k, for the centres y_k of
    ``plain``: the starts of each piece are then where the whole bridge has them, though S is far from 1 or epsilon
    small. It is ``plain`` itself where rounding leaves S without an inverse, as in many directions without variance.
    """
    centres = plain.centres
    K, d = centres.shape
    (m0, c0), (m1, c1) = ((z.mean(axis=0), jnp.cov(z.T, bias=True).reshape(d, d)) for z in (x, y))
    c0, c1 = (c + _least(c, epsilon) * jnp.eye(d, dtype=c.dtype) for c in (c0, c1))
    values, turn = jnp.linalg.eigh(c0)
    values = jnp.maximum(values, _least(c0, epsilon))
    root, back = (turn * values**power @ turn.T for power in (0.5, -0.5))
    values, turn = jnp.linalg.eigh(root @ c1 @ root)
    values = jnp.maximum(values, jnp.finfo(values.dtype).eps * values[-1])
    # The difference of the root and epsilon / 2 without cancellation.
    inner = values / (jnp.sqrt(values + epsilon**2 / 4) + epsilon / 2)
    whole = back @ (turn * inner @ turn.T) @ back
    # The inverses have the same eigenvectors, between the roots.
    across, tau = root @ turn, K ** (-1 / d)
    precision, narrow = ((across / x) @ across.T for x in (epsilon * inner, values))
    widened = back @ turn
    covariance = (widened / (1 / (epsilon * inner) + (tau**-2 - 1) / values)) @ widened.T
    shifted = precision @ (m1 - whole @ m0) - narrow @ m1 + centres @ narrow / tau**2
    r = shifted @ covariance
    logs = ((r * shifted).sum(axis=1) - ((centres @ narrow) * centres).sum(axis=1) / tau**2) / 2
    pieces = Components(logs - jax.nn.logsumexp(logs), r, jnp.broadcast_to(covariance / epsilon, (K, d, d)))
    fine = jnp.stack([jnp.isfinite(leaf).all() for leaf in pieces]).all()
    return jax.tree.map(lambda a, b: jnp.where(fine, a, b), pieces, plain)


class _Cloud(NamedTuple):
    """What belongs to each component: masses (K,), means (K, d), covariances (K, d, d)."""

    mass: Array
    mean: Array
    covariance: Array


class _State(NamedTuple):
    now: Components
    x: _Cloud
    y: _Cloud
    batches: Array  # As many equally weighted ones would know as much.


class Moments(eqx.Module):
    """One stage of training: ``start``, then ``step`` for each batch.

    Arguments:
        epsilon: the variance of the kernel.
        updates: how many steps there will be.
        batch_size: rows of each sample in a step.
    """

    epsilon: Array
    updates: int = eqx.field(static=True)
    batch_size: int = eqx.field(static=True)
    first: ClassVar[int] = -1

    def start(self, now: Components) -> _State:
        """Before any batch."""
        none = _Cloud(jnp.zeros_like(now.logs), jnp.zeros_like(now.centres), jnp.zeros_like(now.spread))
        return _State(now, none, none, jnp.ones_like(now.logs[0]))

    def step(self, state: _State, x: Array, y: Array, number: Array) -> tuple[_State, Array]:
        """Move the components by a batch; the loss before.

        Step -1 only looks at its batch.
        """
        new_x, new_y, loss = self._clouds(state.now, x, y, state.x.mean)
        late = jnp.maximum(number - int(_SETTLE * self.updates), 0)
        share = (1 / jnp.maximum(jnp.minimum(number + 2, _WINDOW) + late, 1)).astype(x.dtype)
        batches = 1 / ((1 - share) ** 2 / state.batches + share**2)
        clouds = _mix(state.x, new_x, share), _mix(state.y, new_y, share)
        moved = _moved(state.now, *clouds, self.epsilon, batches * self.batch_size)
        waits = number < int(_WAIT * self.updates)
        now = jax.tree.map(lambda old, new: jnp.where(waits, old, new), state.now, moved)
        return _State(now, *clouds, batches), loss

    def _clouds(self, now: Components, x: Array, y: Array, middle: Array) -> tuple[_Cloud, _Cloud, Array]:
        for_x, for_y = _x_logits(now, x, self.epsilon), _y_logits(now, y, self.epsilon)
        loss = jax.nn.logsumexp(for_x, axis=1).mean() - jax.nn.logsumexp(for_y, axis=1).mean()
        return _gather(for_x, x, middle), _gather(for_y, y, now.centres), loss


def _x_logits(now: Components, x: Array, epsilon: Array) -> Array:
    pulled = jnp.einsum("bd,kde->kbe", x, now.spread)
    return now.logs + ((pulled * x).sum(axis=-1).T + 2 * x @ now.centres.T) / (2 * epsilon)


def _y_logits(now: Components, y: Array, epsilon: Array) -> Array:
    precision, log_determinant = inverse(now.spread)
    gap = y - now.centres[:, None]
    distance = (jnp.einsum("kbd,kde->kbe", gap, precision) * gap).sum(axis=-1).T
    return now.logs - log_determinant / 2 - distance / (2 * epsilon)


def _gather(logits: Array, rows: Array, middle: Array) -> _Cloud:
    weights = jax.nn.softmax(logits, axis=1).T
    weights = jnp.where(weights < _SMALL, 0, weights)
    total = weights.sum(axis=1)
    weights = weights / jnp.where(total > 0, total, 1)[:, None]
    gap = rows - middle[:, None]
    mean = jnp.einsum("kb,kbd->kd", weights, gap)
    square = jnp.einsum("kbd,kbe->kde", weights[:, :, None] * gap, gap)
    return _Cloud(total / len(rows), middle + mean, square - mean[:, :, None] * mean[:, None])


def _mix(old: _Cloud, new: _Cloud, share: Array) -> _Cloud:
    mass = (1 - share) * old.mass + share * new.mass
    f = share * new.mass / jnp.where(mass > 0, mass, 1)
    gap = new.mean - old.mean
    between = (f * (1 - f))[:, None, None] * gap[:, :, None] * gap[:, None]
    within = (1 - f)[:, None, None] * old.covariance + f[:, None, None] * new.covariance
    return _Cloud(mass, old.mean + f[:, None] * gap, within + between)


def _steadied(cloud: _Cloud, rows: Array, epsilon: Array) -> Array:
    """The covariances, drawn to their mean, and away from 0."""
    d = cloud.mean.shape[1]
    pooled = jnp.einsum("k,kde->de", cloud.mass, cloud.covariance) / cloud.mass.sum()
    f = (_PRIOR * d / (_PRIOR * d + rows * cloud.mass))[:, None, None]
    return (1 - f) * cloud.covariance + f * pooled + _least(pooled, epsilon) * jnp.eye(d, dtype=pooled.dtype)


def _least(covariance: Array, epsilon: Array) -> Array:
    """What a variance is raised by, so that directions without any have an inverse."""
    return _FLOOR * jnp.finfo(covariance.dtype).eps * (jnp.trace(covariance) + epsilon)


def _moved(now: Components, x: _Cloud, y: _Cloud, epsilon: Array, rows: Array) -> Components:
    """The minimum of the bound."""
    on = lambda matrix, vector: jnp.einsum("kde,ke->kd", matrix, vector)
    both = jnp.concatenate([_steadied(cloud, rows, epsilon) for cloud in (x, y)])
    (precision, y_precision), (x_log_determinant, _) = (jnp.split(part, 2) for part in inverse(both))
    before, h = precision + now.spread / epsilon, on(precision, x.mean) - now.centres / epsilon
    inside, _ = inverse(before)
    spread, _ = inverse(epsilon * y_precision + inside / epsilon)
    centres = y.mean - on(spread, on(inside, y.mean / epsilon + h))
    h = h + centres / epsilon
    inside, log_determinant = inverse(before - spread / epsilon)
    mean = on(inside, h)
    quadratic = (h * mean).sum(axis=1) - (on(precision, x.mean) * x.mean).sum(axis=1)
    log_mass = (quadratic - x_log_determinant - log_determinant) / 2
    gain = jnp.log(jnp.maximum(y.mass, _SMALL)) - jnp.log(jnp.maximum(x.mass, _SMALL))
    logs = now.logs + gain - log_mass
    return Components(logs - jax.nn.logsumexp(logs), centres, spread)


def inverse(matrix: Float[Array, "K d d"]) -> tuple[Float[Array, "K d d"], Float[Array, " K"]]:
    """The inverses of K positive definite matrices, and the logarithms of their determinants."""
    factor = jax.lax.map(jnp.linalg.cholesky, matrix)
    root = lower_inverse(factor)
    return root.mT @ root, 2 * jnp.log(jnp.diagonal(factor, axis1=1, axis2=2)).sum(axis=1)


def lower_inverse(factor: Float[Array, "K d d"]) -> Float[Array, "K d d"]:
    """The inverses of K lower triangular matrices.

    Blocks on the diagonal are inverted two at a time, by products alone. LAPACK's triangular solves take threads of
    their own, which on a busy machine wait for each other a hundred times longer than they work, and side by side in
    one program can wait for ever.
    """
    K, d = factor.shape[:2]
    n = 1 << (d - 1).bit_length()
    padded = jnp.zeros((K, n, n), factor.dtype).at[:, :d, :d].set(factor)
    diagonal = jnp.pad(jnp.diagonal(factor, axis1=1, axis2=2), ((0, 0), (0, n - d)), constant_values=1)
    # Blocks of the inverse, shape (K, n / b, b, b), b doubling.
    blocks, b = (1 / diagonal)[:, :, None, None], 1
    while b < n:
        pairs = jnp.arange(n // (2 * b))
        below = padded.reshape(K, len(pairs), 2, b, len(pairs), 2, b)[:, pairs, 1, :, pairs, 0]
        upper, lower = blocks[:, 0::2], blocks[:, 1::2]
        corner = -lower @ (jnp.moveaxis(below, 0, 1) @ upper)
        blocks, b = jnp.block([[upper, jnp.zeros_like(upper)], [corner, lower]]), 2 * b
    return blocks[:, 0, :d, :d]
