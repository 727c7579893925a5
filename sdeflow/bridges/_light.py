r"""``light_sb``: Light Schrödinger bridge (Korotin, Gushchin and Burnaev, ICLR 2024, arXiv 2310.01174).

The potential is a Gaussian mixture v, so all that a bridge needs is in closed form, and the only thing to learn is v,
by one objective without simulation,

    loss = E_x0 log c(x0) - E_x1 log v(x1),   c(x) = sum_k a_k exp((x' S_k x + 2 r_k' x) / (2 epsilon)),

whose excess over its least value is the divergence KL(bridge || learned bridge). Batches of both samples are taken
inside the compiled loop, in one random order of the rows, so that each is seen before any is seen twice.

By default the covariances are full and the components match moments (see `_moments`), which takes a third of the rows
that the same number of updates by Adam would see; in few dimensions, where more accuracy is to be had, Adam has the
rest. The official way, diagonal covariances by Adam, is there too; two things differ from its defaults, which
``spread`` and ``optim`` bring back: the components start with S = 1 rather than .1, from which many never recover, and
the rate falls to 0 along a cosine.
"""

import functools
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from .._compat import is_concrete
from .._mesh import on_any_mesh
from .._results import RESULTS, SolveError
from ..equations import LinearSDE
from ..metrics._blocks import masses
from ..training._progress import make_progress
from ._bridge import Bridge
from ._descent import Descent, Diagonal, Full
from ._mixture import MixturePotential
from ._moments import Components, Moments, tiles
from ._samples import prepared
from ._sinkhorn import points

_FULL = 128  # Dimensions up to which covariances are full.
_POLISHED = 8  # Those up to which Adam improves on moments.
_LEAST = 100  # Updates by moments, if there are so many steps: they are few, so that short trainings need a share more.
_PILOT = 4096  # Rows for the first guess.
_RATE, _POLISH = 5e-3, 2e-3
_SHARE = 33  # Updates by Adam for one by moments.
_CHUNKS = 20
_ORDER, _BACK = 0, 2  # What keys are folded in for.


@on_any_mesh
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
    a: Any = None,
    b: Any = None,
    covariance: Literal["diagonal", "full"] | None = None,
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
        steps: updates of ``batch_size`` rows of each sample; the default method sees as many rows at most, in fewer and
            larger ones.
        key: a random key.
        reference: a `LinearSDE` instead of ``epsilon``.
        backward: the way back, which ``velocity`` needs too: "samples" takes it from the rows of x0, exactly but at a
            cost of O(n d) an evaluation, and at t0 it is not finite; "fit" learns a second mixture with the ends
            exchanged.
        a: weights of x0, shape (n,), equal if None; where cells divide and die, `sdeflow.data.growth_weights`.
        b: weights of x1, shape (m,).
        covariance: of the components in the coordinates of the clock; "full" costs O(K d^2) for each row. By default
            full up to 128 dimensions.
        spread: the S that the components start with where an optimiser trains them alone.
        optim: an optax optimiser, in place of moments where covariances are full, and of Adam where they are diagonal,
            with a rate of .005 times the mean standard deviation of x1 in the coordinates, falling to 0 along a cosine.
            The official code has ``optax.adam(1e-3)`` at epsilon .1, 3e-3 at 1, and diagonal covariances.
        batch_size: rows of each sample in an update.
        t0, t1: the horizon.
        progress: show it.
        throw: called eagerly, raise if the loss becomes infinite or NaN; else see ``result``.

    Returns:
        A `Bridge` whose ``history["loss"]`` is the mean loss of each twentieth of the updates; where Adam follows
        moments, twenty more.

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
    if covariance not in (None, "diagonal", "full"):
        raise ValueError(f'covariance must be "diagonal", "full" or None, got {covariance!r}.')
    if not spread > 0:
        raise ValueError(f"spread must be positive, got {spread}.")
    if optim is not None and not isinstance(optim, optax.GradientTransformation):
        raise TypeError(f"optim must be an optax optimiser, got {type(optim).__name__}.")
    clock, z0, z1 = prepared(x0, x1, epsilon, reference, t0, t1)
    weights = [None if w is None else masses(name, w, z) for name, w, z in (("a", a, z0), ("b", b, z1))]
    if covariance is None:
        covariance = "full" if z0.shape[1] <= _FULL else "diagonal"

    def learn(clouds: list[Array], weights: list[Any], key: PRNGKeyArray) -> tuple[MixturePotential, Array, Array]:
        by_moments = covariance == "full" and optim is None
        data, now, size = _lay_out(
            clouds, weights, key, clock.epsilon, num_components, spread, by_moments, optim is None
        )
        losses = []
        updates, batch, rate = steps, batch_size, _RATE
        if by_moments:
            updates = max(min(steps, _LEAST), steps // _SHARE)
            state, loss = _train(Moments(clock.epsilon, updates, 10 * batch_size), now, data, updates, progress)
            losses.append(loss)
            now = state.now
            updates, batch, rate = -(-steps // 5), 4 * batch_size, _POLISH
        learned: Any = now
        if not by_moments or clouds[0].shape[1] <= _POLISHED:
            rule = _default(updates, rate) if optim is None else optim
            kind = Full if covariance == "full" else Diagonal
            stage = Descent(clock.epsilon, size, kind, (rule.init, rule.update), batch)
            (learned, _), loss = _train(stage, now, data, updates, progress)
            losses.append(loss)
        return _potential(learned, losses, clock.epsilon)

    potential, losses, finite = learn([z0, z1], weights, key)
    history = {"loss": losses}
    back = None
    if backward == "samples":
        ones = jnp.ones((), z0.dtype)
        log_density = -jax.vmap(lambda z: potential.log_value(z, ones))(z0)
        back = points(z0, log_density if weights[0] is None else log_density + jnp.log(weights[0]), clock.epsilon)
    elif backward == "fit":
        back, history["backward_loss"], okay = learn([z1, z0], weights[::-1], jr.fold_in(key, _BACK))
        finite &= okay
    fine: Any = RESULTS.successful
    failed = is_concrete(finite) and not bool(finite)
    result = fine
    if failed or not is_concrete(finite):
        result = RESULTS.where(finite, fine, RESULTS.nonfinite_loss)
    if throw and failed:
        raise SolveError(
            result,
            "The loss of light_sb became infinite or NaN: scale the data, lower the rate of an optim=, or take "
            'covariance="diagonal".',
        )
    return Bridge(clock, potential, back, history=history, result=result)


def _order(key: PRNGKeyArray, n: int, weights: Array | None) -> Array:
    """A random order of n rows, in which a row with a weight stands as often as that says, up to one."""
    for_order, for_place = jr.split(key)
    if weights is None:
        return jr.permutation(for_order, n)
    ends = jnp.cumsum(weights)
    places = (jnp.arange(n) + jr.uniform(for_place)) / n * ends[-1]
    return jr.permutation(for_order, jnp.minimum(jnp.searchsorted(ends, places, side="right"), n - 1))


@eqx.filter_jit
def _lay_out(
    clouds: list[Array],
    weights: list[Any],
    key: PRNGKeyArray,
    epsilon: Array,
    num_components: int,
    spread: float,
    by_moments: bool,
    in_units: bool,
) -> tuple[tuple[Array, ...], Components, Array]:
    """Both clouds, an order of the rows of each, the first guess, and what an optimiser's moves are multiplied by."""
    keys = jr.split(jr.fold_in(key, _ORDER))
    orders = [_order(key, len(z), w) for key, z, w in zip(keys, clouds, weights)]
    target, order = clouds[1], orders[1]
    centres = target[order[jnp.arange(num_components) % len(order)]]
    K, d = centres.shape
    logs = jnp.full(K, -np.log(K), target.dtype)
    now = Components(logs, centres, jnp.broadcast_to(spread * jnp.eye(d, dtype=target.dtype), (K, d, d)))
    data = (*clouds, *orders)
    if by_moments:
        now = tiles(*_batch(_PILOT, data, 0), now, epsilon)
    size = jax.lax.stop_gradient(target.std(axis=0).mean()) if in_units else jnp.ones((), target.dtype)
    return data, now, size


@eqx.filter_jit
def _potential(
    learned: Components | Full | Diagonal, losses: list[list[Array]], epsilon: Array
) -> tuple[MixturePotential, Array, Array]:
    """The potential, the losses of all stages, and whether these are finite."""
    if isinstance(learned, Components):
        learned = Full.of(learned, epsilon)
    loss = jnp.stack([loss for stage in losses for loss in stage])
    return learned.potential(epsilon), loss, jnp.isfinite(loss).all()


def _train(
    stage: Moments | Descent, now: Any, data: tuple[Array, ...], updates: int, wanted: bool
) -> tuple[Any, list[Array]]:
    """The last state of a stage of training, and the mean loss of each chunk of its updates."""
    length = -(-updates // min(_CHUNKS, updates))
    state, bar, losses = _begin(stage, now), make_progress(wanted, updates, 0), []
    try:
        for first in range(0, updates, length):
            last = min(first + length, updates)
            start = jnp.asarray(first if first else stage.first)
            state, loss = _chunk(stage, state, data, start, jnp.asarray(last))
            losses.append(loss)
            if wanted:
                bar.update(last, float(loss))
    finally:
        bar.close()
    return state, losses


def _batch(size: int, data: tuple[Array, ...], number: Any) -> tuple[Array, Array]:
    x, y, *orders = data
    places = number * size + jnp.arange(size)
    for_x, for_y = (order[places % len(order)] for order in orders)
    return x[for_x], y[for_y]


@eqx.filter_jit
def _begin(stage: Moments | Descent, now: Components) -> Any:
    return stage.start(now)


@eqx.filter_jit
def _chunk(stage: Moments | Descent, state: Any, data: tuple[Array, ...], first: Array, last: Array) -> Any:
    def one(number: Array, carry: tuple[Any, Array]) -> tuple[Any, Array]:
        state, total = carry
        state, loss = stage.step(state, *_batch(stage.batch_size, data, jnp.maximum(number, 0)), number)
        return state, total + jnp.where(number < 0, 0, loss)

    with jax.default_matmul_precision("highest"):
        state, total = jax.lax.fori_loop(first, last, one, (state, jnp.zeros((), data[0].dtype)))
    return state, total / (last - jnp.maximum(first, 0))


@functools.lru_cache
def _default(steps: int, rate: float) -> optax.GradientTransformation:
    # One object for equal numbers of steps, so that a second fit finds the compiled program of the first.
    return optax.adam(optax.cosine_decay_schedule(rate, steps))


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
