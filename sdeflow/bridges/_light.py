r"""``light_sb``: Light Schrödinger bridge (Korotin, Gushchin and Burnaev, ICLR 2024, arXiv 2310.01174).

The potential is a Gaussian mixture v, so all that a bridge needs is in closed form, and the only thing to learn is v,
by one objective without simulation,

    loss = E_x0 log c(x0) - E_x1 log v(x1),   c(x) = sum_k a_k exp((x' S_k x + 2 r_k' x) / (2 epsilon)),

whose excess over its least value is the divergence KL(bridge || learned bridge). Batches of both samples are drawn
inside the compiled loop. ``log a_k`` is stored times epsilon, as in the official code: its rate is then 1 / epsilon of
the others'. Two things differ from the official defaults, which ``spread`` and ``optim`` bring back: the components
start with S = 1 rather than .1, from which many never recover, and the rate falls to 0 along a cosine.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from .._compat import is_concrete
from .._results import RESULTS, SolveError
from ..equations import LinearSDE
from ..training._progress import make_progress
from ._bridge import Bridge
from ._mixture import MixturePotential
from ._samples import prepared
from ._sinkhorn import points

_RATE = 5e-3
_SMALLEST, _LARGEST = -12.0, 6.0  # Of log S, so that no component collapses or explodes.
_CHUNKS = 20
_START, _TRAIN, _BACK = 0, 1, 2  # What keys are folded in for.


def light_sb(
    x0: Any,
    x1: Any,
    *,
    epsilon: Any = None,
    num_components: int = 50,
    steps: int = 10_000,
    key: PRNGKeyArray,
    reference: LinearSDE | None = None,
    backward: Literal["samples", "fit"] | None = None,
    covariance: Literal["diagonal", "full"] = "diagonal",
    spread: float = 1.0,
    optim: optax.GradientTransformation | None = None,
    batch_size: int = 128,
    t0: Any = 0.0,
    t1: Any = 1.0,
    progress: bool = False,
    throw: bool = True,
) -> Bridge:
    """Learn the Schrödinger bridge between two samples as a Gaussian mixture.

    Arguments:
        x0: shape (n, d), at t0.
        x1: shape (m, d), at t1; nothing pairs the rows.
        epsilon: the variance of Brownian motion over the horizon, where no reference is given.
        num_components: K.
        steps: updates.
        key: a random key.
        reference: a `LinearSDE` instead of ``epsilon``.
        backward: the way back, which ``velocity`` needs too: "samples" takes it from the rows of x0, exactly but at a
            cost of O(n d) an evaluation, and at t0 it is not finite; "fit" learns a second mixture with the ends
            exchanged.
        covariance: of the components in the coordinates of the clock; "full" costs O(K d^2) for each row.
        spread: the S that the components start with.
        optim: an optax optimiser; by default Adam from the rate .005, times the mean standard deviation of x1 in the
            coordinates, falling to 0 along a cosine. Official: ``optax.adam(1e-3)`` at epsilon .1, 3e-3 at 1.
        batch_size: rows of each sample in an update.
        t0, t1: the horizon.
        progress: show it.
        throw: called eagerly, raise if the loss becomes infinite or NaN; else see ``result``.

    Returns:
        A `Bridge` whose ``history["loss"]`` is the mean loss of each twentieth of the updates.

    Raises:
        TypeError: if ``optim`` is not an optax optimiser.
        ValueError: if the samples or numbers are not as described.
        SolveError: if the loss became infinite or NaN.

    Example:
        >>> import jax, sdeflow as sf
        >>> x0, x1 = jax.random.normal(jax.random.key(0), (2, 500, 2))
        >>> bridge = sf.bridges.light_sb(x0, x1 + 2, epsilon=0.5, num_components=4, steps=200, key=jax.random.key(1))
        >>> bridge.drift(1.0, x0[0]).shape
        (2,)
    """
    for name, value in (("num_components", num_components), ("steps", steps), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}.")
    if backward not in (None, "samples", "fit"):
        raise ValueError(f'backward must be "samples", "fit" or None, got {backward!r}.')
    if covariance not in ("diagonal", "full"):
        raise ValueError(f'covariance must be "diagonal" or "full", got {covariance!r}.')
    if not spread > 0:
        raise ValueError(f"spread must be positive, got {spread}.")
    if optim is not None and not isinstance(optim, optax.GradientTransformation):
        raise TypeError(f"optim must be an optax optimiser, got {type(optim).__name__}.")
    clock, z0, z1 = prepared(x0, x1, epsilon, reference, t0, t1)
    kind = _Full if covariance == "full" else _Diagonal

    def learn(source: Array, target: Array, key: PRNGKeyArray) -> tuple[MixturePotential, Array, Array]:
        rows = jr.choice(jr.fold_in(key, _START), len(target), (num_components,), replace=num_components > len(target))
        start = kind.start(target[rows], spread, clock.epsilon)
        rule, size = optim, jnp.ones((), target.dtype)
        if rule is None:
            rule, size = _default(steps), jax.lax.stop_gradient(target.std(axis=0).mean())
        train_key = jr.fold_in(key, _TRAIN)
        best, losses = _train(start, source, target, clock.epsilon, rule, size, steps, batch_size, train_key, progress)
        return best.potential(clock.epsilon), losses, jnp.isfinite(losses).all()

    potential, losses, finite = learn(z0, z1, key)
    history = {"loss": losses}
    back = None
    if backward == "samples":
        ones = jnp.ones((), z0.dtype)
        back = points(z0, -jax.vmap(lambda z: potential.log_value(z, ones))(z0), clock.epsilon)
    elif backward == "fit":
        back, history["backward_loss"], okay = learn(z1, z0, jr.fold_in(key, _BACK))
        finite &= okay
    fine: Any = RESULTS.successful
    result = RESULTS.where(finite, fine, RESULTS.nonfinite_loss)
    if throw and is_concrete(finite) and not bool(finite):
        raise SolveError(
            result, "The loss of light_sb became infinite or NaN: lower the rate of `optim`, or scale the data."
        )
    return Bridge(clock, potential, back, history=history, result=result)


@functools.lru_cache
def _default(steps: int) -> optax.GradientTransformation:
    # One object for equal numbers of steps, so that a second fit finds the compiled program of the first.
    return optax.adam(optax.cosine_decay_schedule(_RATE, steps))


def light_loss(potential: MixturePotential, z0: Float[Array, "n d"], z1: Float[Array, "m d"]) -> Float[Array, ""]:
    """LightSB's objective E log c(z0) - E log v(z1) of a potential; its excess is a divergence of bridges.

    Arguments:
        potential: with S > 0.
        z0: samples at t0, in the coordinates of the clock.
        z1: samples at t1.

    Example:
        >>> import jax.numpy as jnp, sdeflow as sf
        >>> one = sf.bridges.MixturePotential(jnp.zeros(1), jnp.zeros((1, 1)), jnp.ones((1, 1)), jnp.array(1.0))
        >>> round(float(sf.bridges.light_loss(one, jnp.ones((2, 1)), jnp.ones((2, 1)))), 4)
        1.9189
    """
    epsilon, one = potential.epsilon, jnp.ones((), z0.dtype)
    spread = jnp.broadcast_to(potential.spread, potential.centres.shape)

    def log_density(z: Array) -> Array:
        gap = z - potential.centres
        if potential.basis is not None:
            gap = (potential.basis.mT @ gap[..., None])[..., 0]
        quadratic = gap**2 / spread + epsilon * jnp.log(2 * jnp.pi * epsilon * spread)
        return jax.nn.logsumexp(potential.log_weights - quadratic.sum(axis=1) / (2 * epsilon))

    normaliser = jax.vmap(lambda z: potential.log_value(z, one) + z @ z / (2 * epsilon))
    return normaliser(z0).mean() - jax.vmap(log_density)(z1).mean()


class _Diagonal(eqx.Module):
    """Log weights times epsilon, centres, and log S."""

    weights: Array
    centres: Array
    logs: Array

    @classmethod
    def start(cls, centres: Array, spread: float, epsilon: Array) -> "_Diagonal":
        K, dtype = len(centres), centres.dtype
        return cls(epsilon * jnp.full(K, -np.log(K), dtype), centres, jnp.full(centres.shape, np.log(spread), dtype))

    def loss(self, x: Array, y: Array, epsilon: Array) -> Array:
        logs = jnp.clip(self.logs, _SMALLEST, _LARGEST)
        spread, weights = jnp.exp(logs), self.weights / epsilon
        c = weights + (x**2 @ (spread.T / 2) + x @ self.centres.T) / epsilon
        # The squares of differences, not the difference of squares: that would lose all digits where S is small.
        gap = y[:, None] - self.centres
        v = weights - logs.sum(axis=1) / 2 - (gap**2 * (1 / spread)).sum(axis=-1) / (2 * epsilon)
        return jax.nn.logsumexp(c, axis=1).mean() - jax.nn.logsumexp(v, axis=1).mean()

    def potential(self, epsilon: Array) -> MixturePotential:
        spread = jnp.exp(jnp.clip(self.logs, _SMALLEST, _LARGEST))
        return MixturePotential(self.weights / epsilon, self.centres, spread, epsilon)


class _Full(eqx.Module):
    """Log weights times epsilon, centres, and the lower factor of S with its diagonal as logarithms."""

    weights: Array
    centres: Array
    logs: Array
    lower: Array

    @classmethod
    def start(cls, centres: Array, spread: float, epsilon: Array) -> "_Full":
        base = _Diagonal.start(centres, spread, epsilon)
        K, d = centres.shape
        return cls(base.weights, centres, base.logs / 2, jnp.zeros((K, d, d), centres.dtype))

    def _factor(self) -> tuple[Array, Array]:
        logs = jnp.clip(self.logs, _SMALLEST / 2, _LARGEST / 2)
        return jnp.tril(self.lower, -1) + jax.vmap(jnp.diag)(jnp.exp(logs)), logs

    def loss(self, x: Array, y: Array, epsilon: Array) -> Array:
        factor, logs = self._factor()
        weights = self.weights / epsilon
        turned = jnp.einsum("bd,kde->bke", x, factor)
        c = weights + ((turned**2).sum(axis=-1) / 2 + x @ self.centres.T) / epsilon
        gap = jnp.swapaxes(y[:, None] - self.centres, 0, 1)
        # K small inverses and a product are many times faster on a CPU than one solve for all rows.
        eye = jnp.broadcast_to(jnp.eye(x.shape[1], dtype=x.dtype), factor.shape)
        inverse = jax.lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)
        solved = gap @ inverse.mT
        v = weights - logs.sum(axis=1) - (solved**2).sum(axis=-1).T / (2 * epsilon)
        return jax.nn.logsumexp(c, axis=1).mean() - jax.nn.logsumexp(v, axis=1).mean()

    def potential(self, epsilon: Array) -> MixturePotential:
        factor, _ = self._factor()
        spread, basis = jnp.linalg.eigh(factor @ factor.mT)
        return MixturePotential(self.weights / epsilon, self.centres, jnp.maximum(spread, 0), epsilon, basis)


def _train(
    params: Any,
    x: Array,
    y: Array,
    epsilon: Array,
    optim: optax.GradientTransformation,
    size: Array,
    steps: int,
    batch_size: int,
    key: PRNGKeyArray,
    wanted: bool,
) -> tuple[Any, Array]:
    """The last parameters, moved by ``size`` times what ``optim`` says, and the mean loss of each chunk of steps."""
    length = -(-steps // min(_CHUNKS, steps))
    bounds = [(a, min(a + length, steps)) for a in range(0, steps, length)]
    bar, state, losses = make_progress(wanted, steps, 0), optim.init(params), []
    try:
        for first, last in bounds:
            params, state, loss = _chunk(
                params, state, x, y, epsilon, size, key, jnp.asarray(first), last - first, batch_size, optim.update
            )
            losses.append(loss)
            if wanted:
                bar.update(last, float(loss))
    finally:
        bar.close()
    return params, jnp.stack(losses)


@eqx.filter_jit
def _chunk(
    params: Any,
    state: Any,
    x: Array,
    y: Array,
    epsilon: Array,
    size: Array,
    key: PRNGKeyArray,
    first: Array,
    count: int,
    batch_size: int,
    update: Callable,
) -> tuple[Any, Any, Array]:
    def one(carry: tuple[Any, Any], step: Array) -> tuple[tuple[Any, Any], Array]:
        params, state = carry
        for_x, for_y = jr.split(jr.fold_in(key, step))
        rows = jr.randint(for_x, (batch_size,), 0, len(x)), jr.randint(for_y, (batch_size,), 0, len(y))
        value, grads = jax.value_and_grad(lambda p: p.loss(x[rows[0]], y[rows[1]], epsilon))(params)
        moves, state = update(grads, state, params)
        moves = jax.tree.map(lambda move: size * move, moves)
        return (optax.apply_updates(params, moves), state), value

    (params, state), values = jax.lax.scan(one, (params, state), first + jnp.arange(count))
    return params, state, values.mean()
