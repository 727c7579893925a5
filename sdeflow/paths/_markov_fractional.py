"""Fractional noise as a sum of Ornstein-Uhlenbeck factors that share one Brownian motion.

    dY_k = -rate_k Y_k dt + dW,          B(t) = sum_k w_k(H) (Y_k(t) - Y_k(0)),

with the weights of `_fractional_fit`. Given W, the factors are integrated exactly over any step, so that rates as fast
as 1 / spacing cost nothing. With a rate of zero among them H = 1/2 is Brownian motion, exactly. Type I starts the
factors in their stationary law, N(0, C) with C_ij = 1 / (rate_i + rate_j), whose Cholesky factor has a closed form
(Cauchy's), accurate in float32 where a numerical one is NaN:

    L_ij = sqrt(2 rate_j) / (rate_i + rate_j) prod_(m < j) (rate_i - rate_m) / (rate_i + rate_m).

Source: Daems, Opper, Crevecoeur and Birdal, "Variational inference for SDEs driven by fractional noise", ICLR 2024,
which takes rates without zero that depend on neither the horizon nor the spacing: ``rates=np.geomspace(1/20, 20, 5)``.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np
from jax.scipy.special import gammaln
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from .._compat import SdeflowWarning, is_concrete, warn
from ..grids import Grid
from ._factor_brownian import FactorBrownian, factor_increment
from ._factor_law import FactorLaw
from ._fractional_fit import HIGHEST, LOWEST, Kind, chebyshev_table, check_number, end_covariance, relative_cost
from ._grid_brownian import as_structure, normals
from ._kalman import kalman
from ._threefry import written_out

_STREAM = 0x6672  # keeps the draw of the start apart from that of the steps


class MarkovFractionalNoise(eqx.Module):
    """Fractional noise with Hurst index H as the weighted sum of K factors of one Brownian motion.

    It is the noise of `sdeflow.equations.FractionalSDE`, and a process with an exact likelihood. ``hurst`` can be
    learned: what is stored is its logit between 0.02 and 0.98, so that no step of an optimiser leaves the interval. The
    rates are 0 and K - 1 more in equal ratios up to the fastest, from 1/100 of 1/horizon for type I (1/1000 with 8
    factors or more) and from 1/horizon for type II.

    Arguments:
        hurst: H, between 0.02 and 0.98; below 1/2 the noise turns back, above 1/2 it persists. For type II also a
            function of time, where its roughness changes, and B(t) = sum_k w_k(H(t)) Y_k(t).
        horizon: T; the law is right on [0, T].
        spacing: the shortest time between observations at which the law matters: the fastest rate is 2 / spacing.
        kind: "I", stationary increments and a long past; "II", nothing before time 0.
        num_factors: K.
        max_rate: the fastest rate itself, in place of ``spacing``. By default 100 / horizon.
        normalise: scale to Var B(t) = t^(2H); otherwise the kernel is (t - s)^(H - 1/2) / Gamma(H + 1/2), whose
            variance at t = 1 changes with H, so that a learned H is confounded with the scale of the noise.
        rates: the rates themselves, in place of the grid, distinct and not negative.
        match_variance: scale the weights so that Var B(T) at the horizon is that of fractional Brownian motion. The
            nearest weights have less variance where few factors do not reach it, near H = 0.1 and for type I near 0.9.

    Raises:
        TypeError: if H is neither a number nor a function.
        ValueError: for H outside of its interval, a horizon, spacing or rates that are not positive, fewer than two
            factors, or H as a function of time with type I.

    Example:
        >>> import jax, jax.numpy as jnp, sdeflow as sf
        >>> noise = sf.paths.MarkovFractionalNoise(0.7, 1.0, spacing=1 / 64)
        >>> ts = jnp.linspace(1 / 64, 1.0, 64)
        >>> xs = noise.sample(ts, (), key=jax.random.key(0))
        >>> score = jax.grad(lambda H: sf.paths.MarkovFractionalNoise(H, 1.0, spacing=1 / 64).log_prob(ts, xs))(0.7)
        >>> bool(jnp.isfinite(score))
        True
    """

    _logit: Array | None
    _function: Callable[[Any], Any] | None
    kind: Kind = eqx.field(static=True)
    horizon: float = eqx.field(static=True)
    normalise: bool = eqx.field(static=True)
    match_variance: bool = eqx.field(static=True)
    _rates: tuple[float, ...] = eqx.field(static=True)

    def __init__(
        self,
        hurst: Any,
        horizon: float,
        *,
        spacing: float | None = None,
        kind: Kind = "I",
        num_factors: int = 6,
        max_rate: float | None = None,
        normalise: bool = True,
        rates: Sequence[float] | np.ndarray | None = None,
        match_variance: bool = False,
    ):
        if kind not in ("I", "II"):
            raise ValueError(f'kind must be "I" or "II", got {kind!r}.')
        self.kind, self.horizon, self.normalise = kind, _positive(horizon, "horizon"), bool(normalise)
        self.match_variance = bool(match_variance)
        self._rates = _grid(self.horizon, kind, spacing, num_factors, max_rate, rates)
        self._logit, self._function = None, None
        if callable(hurst):
            if kind == "I":
                raise ValueError('A Hurst index that depends on time needs kind="II", noise that starts at time 0.')
            self._function = hurst
        else:
            self._logit = _logit_of(hurst)
        # Of the largest in units of the horizon, where noise itself is of size one.
        largest = np.abs(chebyshev_table(kind, tuple(r * self.horizon for r in self._rates), 1.0)).sum(axis=0).max()
        if largest > 1e3 and not jax.config.read("jax_enable_x64"):
            warn(
                f"The rates are so close to each other on [0, {self.horizon:g}] that their weights reach {largest:.0e} "
                "and cancel, which float32 cannot follow: take fewer factors or leave rates= and max_rate= out.",
                SdeflowWarning,
            )

    @property
    def hurst(self) -> Any:
        """H, a scalar, or the function of time that was given."""
        if self._logit is None:
            return self._function
        return LOWEST + (HIGHEST - LOWEST) * jax.nn.sigmoid(self._logit)

    @property
    def rates(self) -> np.ndarray:
        """The rates of the factors, shape (num_factors,)."""
        return np.asarray(self._rates)

    @property
    def num_factors(self) -> int:
        """K."""
        return len(self._rates)

    def coefficients(self, t: Any = None) -> Float[Array, " num_factors"]:
        """The weights w(H) of the factors, shape (num_factors,).

        Arguments:
            t: the time, where H depends on it.

        Raises:
            ValueError: if H depends on time and none is given.
        """
        if self._function is None:
            hurst = self.hurst
        elif t is None:
            raise ValueError("The Hurst index depends on time: ask for coefficients(t).")
        else:
            hurst = jnp.asarray(self._function(t), jnp.result_type(float))
        return _weights(hurst, self.kind, self._rates, self.horizon, self.normalise, self.match_variance)

    def covariance(self, s: Any, t: Any) -> Array:
        """E B(s) B(t), of arrays that broadcast.

        Arguments:
            s, t: times from 0 to the horizon.
        """
        s, t = jnp.broadcast_arrays(_times(s), _times(t))
        if self.kind == "I":
            between = jnp.abs(s - t)
            return (self.structure(s) + self.structure(t) - self.structure(between)) / 2
        first, later = jnp.minimum(s, t), jnp.maximum(s, t)
        g = jnp.asarray(self._rates, first.dtype)
        of = lambda at: jnp.vectorize(self.coefficients, signature="()->(k)")(at)
        u, v = of(first), of(later)
        joint = first[..., None, None] * _e1((g[:, None] + g[None, :]) * first[..., None, None])
        decay = jnp.exp(-g * (later - first)[..., None])
        return jnp.einsum("...i,...ij,...j->...", u, joint, v * decay, precision="highest")

    def structure(self, lag: Any) -> Array:
        """E (B(t + lag) - B(t))^2, which for type I does not depend on t.

        Raises:
            ValueError: for type II, whose increments are not stationary.
        """
        if self.kind == "II":
            raise ValueError('The increments of kind="II" are not stationary: use covariance(s, t).')
        lag = jnp.abs(_times(lag))
        g, w = jnp.asarray(self._rates, lag.dtype), self.coefficients().astype(lag.dtype)
        total = g[:, None] + g[None, :]
        gone = g * lag[..., None] * _e1(g * lag[..., None])  # 1 - exp(-rate lag)
        both_zero = total == 0
        pair = (gone[..., :, None] + gone[..., None, :]) / jnp.where(both_zero, 1, total)
        pair = jnp.where(both_zero, lag[..., None, None], pair)
        return jnp.einsum("i,...ij,j->...", w, pair, w, precision="highest")

    def cost(self) -> float:
        """The share of the variance by which B misses fractional Brownian motion, averaged over the horizon.

        Raises:
            ValueError: if H is traced or depends on time.
        """
        if self._logit is None or not is_concrete(self._logit):
            raise ValueError("cost() needs a Hurst index that is a number, known outside of any trace.")
        return relative_cost(self.kind, self._rates, self.horizon, float(self.hurst), self.match_variance)

    def start(
        self, structure: PyTree | tuple[int, ...], *, key: PRNGKeyArray, law: FactorLaw | None = None
    ) -> PyTree[Array]:
        """The factors at time 0: a draw of their stationary law for type I, zeros for type II.

        Arguments:
            structure: what one factor looks like: an array or tree of arrays, or a shape tuple.
            key: a JAX random key.
            law: what to draw type I from instead.

        Returns:
            Leaves (num_factors, *shape).

        Raises:
            ValueError: for type II with a law, or one whose shapes are not those of the factors.
        """
        return self.start_of(structure, key, law)[0]

    def start_of(self, structure: Any, key: PRNGKeyArray, law: FactorLaw | None) -> tuple[PyTree[Array], Any, Any]:
        """The factors at time 0, the divergence of their law from the prior, and by how much this draw exceeds it.

        The excess has mean zero, and so has its gradient; with it the law's own density is held (Roeder, Wu and
        Duvenaud 2017).
        """
        one = lambda x: jax.ShapeDtypeStruct((self.num_factors, *x.shape), x.dtype)
        several = jtu.tree_map(one, as_structure(structure))
        if self.kind == "II":
            if law is not None:
                raise ValueError('The factors of kind="II" start at zero and have no law to choose: leave it out.')
            return jtu.tree_map(lambda x: jnp.zeros(x.shape, x.dtype), several), 0, 0
        key = jax.random.fold_in(written_out(key), _STREAM)
        z, kl, excess = normals(key, several, diffrax.BrownianIncrement)["W"], 0, 0
        if law is not None:
            expected, found = (jtu.tree_map(jnp.shape, x) for x in (several, law.mean))
            if expected != found:
                raise ValueError(f"The law of the factors should have a mean of shape {expected}, got {found}.")
            z, kl = law.at(z), law.kl()
            excess = jax.lax.stop_gradient(law).log_ratio(z) - kl
        return jtu.tree_map(lambda z: _mix(stationary_factor(self._rates), z), z), kl, excess

    def path(self, grid: Grid, structure: PyTree | tuple[int, ...], *, key: PRNGKeyArray) -> FactorBrownian:
        """What drives the factors on a grid, for `sdeflow.solvers.ExponentialHeun`.

        Arguments:
            grid: the grid.
            structure: what one increment looks like: an array or tree of arrays, or a shape tuple.
            key: a JAX random key.
        """
        return FactorBrownian(grid, structure, rates=self._rates, key=key)

    def sample(self, ts: Any, shape: tuple[int, ...] = (), *, key: PRNGKeyArray) -> Array:
        """B at increasing times, drawn exactly.

        Arguments:
            ts: shape (n,), times from 0 to the horizon.
            shape: of one value; its entries are independent.
            key: a JAX random key.

        Returns:
            Shape (n, *shape).
        """
        times = self._check_times(ts)
        return _sample(self, times, _gaps(times), tuple(shape), key)

    def log_prob(self, ts: Any, xs: Any, *, obs_std: Any = 0.0) -> Float[Array, ""]:
        """The log density in nats of observations of B at irregular times, by the exact Kalman recursion.

        It is differentiable in H, ``xs`` and ``obs_std``; it costs O(n K^3).

        Arguments:
            ts: shape (n,), increasing times from 0 to the horizon; B(0) = 0 need not be listed.
            xs: shape (n,), or (n, d) for d independent copies; NaN is what was not observed.
            obs_std: the standard deviation of the observations' noise, a scalar.

        Raises:
            ValueError: for times that repeat, decrease, are negative or lie beyond the horizon, other shapes, or a
                negative ``obs_std``.

        Example:
            >>> import sdeflow as sf
            >>> half = sf.paths.MarkovFractionalNoise(0.5, 2.0)  # Brownian motion
            >>> round(float(half.log_prob([1.0, 2.0], [0.5, 0.0])), 3)
            -2.088
        """
        times = self._check_times(ts)
        xs = xs if isinstance(xs, jax.Array) else np.asarray(xs)
        if xs.ndim not in (1, 2) or xs.shape[0] != times.shape[0]:
            raise ValueError(f"xs must have shape ({times.shape[0]},) or ({times.shape[0]}, d), got {xs.shape}.")
        if np.ndim(obs_std) != 0 or obs_std is None or (is_concrete(obs_std) and not float(obs_std) >= 0):
            raise ValueError(f"obs_std must be a scalar that is not negative, got {obs_std}.")
        if is_concrete(times, xs) and times.shape[0] and float(times[0]) == 0:
            first = np.asarray(xs[0])
            if is_concrete(obs_std) and float(obs_std) == 0 and np.any(first != 0):
                raise ValueError(f"xs must be relative to B(0) = 0, but at t = 0 it is {first}: subtract it.")
        return _log_prob(self, times, _gaps(times), xs, obs_std)

    def _check_times(self, ts: Any) -> Any:
        """The times, on the host where they are known."""
        if not is_concrete(ts):
            return _check_one_dimensional(jnp.asarray(ts))
        times = _check_one_dimensional(np.asarray(ts, np.float64))
        if not np.isfinite(times).all() or (times.size and times[0] < 0):
            raise ValueError("ts must be finite and not negative: the noise starts at time 0.")
        bad = np.flatnonzero(np.diff(times) <= 0) + 1
        if bad.size:
            raise ValueError(f"ts must increase, but ts[{bad[0]}] = {times[bad[0]]} follows {times[bad[0] - 1]}.")
        self.check_horizon(times)
        return times

    def check_horizon(self, ts: Any) -> None:
        """Refuse times beyond the horizon, where the weights say nothing.

        Raises:
            ValueError: naming the horizon that would do.
        """
        if is_concrete(ts) and np.size(ts) and float(np.max(ts)) > self.horizon * (1 + 1e-5):
            raise ValueError(
                f"The noise has horizon={self.horizon:g}, but the times reach {float(np.max(ts)):g}: build it with a "
                "horizon that covers them."
            )


# Compiled, so that a call outside of any trace does not compile its operations one by one.
@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _weights(
    hurst: Array, kind: Kind, rates: tuple[float, ...], horizon: float, normalise: bool, match_variance: bool
) -> Array:
    x = (hurst - (HIGHEST + LOWEST) / 2) / ((HIGHEST - LOWEST) / 2)
    # A polynomial is no answer outside of its interval, which only a function of time can leave.
    x = jnp.where(jnp.abs(x) <= 1, x, jnp.nan)
    table = jnp.asarray(chebyshev_table(kind, rates, horizon), x.dtype)
    later, last = jnp.zeros_like(table[0]), jnp.zeros_like(table[0])
    for row in table[:0:-1]:  # Clenshaw
        later, last = row + 2 * x * later - last, later
    w = table[0] + x * later - last
    if match_variance:
        each = jnp.asarray(end_covariance(kind, rates, horizon), x.dtype)
        w = w * horizon**hurst / jnp.sqrt(jnp.einsum("i,ij,j", w, each, w, precision="highest"))
        return w if normalise else w / _unit_scale(hurst, kind)
    # Not in the series: its roots at the ends of (0, 1) would spoil the convergence.
    return w * _unit_scale(hurst, kind) if normalise else w


def stationary_factor(rates: tuple[float, ...]) -> np.ndarray:
    """The Cholesky factor of the stationary covariance of the factors, shape (K, K); a rate of zero starts at 0."""
    g = np.asarray(rates)
    L, positive = np.zeros((len(g), len(g))), np.flatnonzero(g > 0)
    for n, j in enumerate(positive):
        before = g[positive[:n]]
        i = positive[n:]
        ratio = np.prod((g[i, None] - before) / (g[i, None] + before), axis=1)
        L[i, j] = np.sqrt(2 * g[j]) / (g[i] + g[j]) * ratio
    return L


def factor_covariance(rates: tuple[float, ...], h: Array) -> Array:
    """The covariance of what a step of length ``h`` adds to the factors, shape (K, K)."""
    g = jnp.asarray(rates, h.dtype)
    return h * _e1((g[:, None] + g[None, :]) * h)


@eqx.filter_jit
def _sample(noise: MarkovFractionalNoise, ts: Any, h: Any, shape: tuple[int, ...], key: PRNGKeyArray) -> Array:
    ts, h = (jnp.asarray(x, jnp.result_type(float)) for x in (ts, h))
    count = noise.num_factors + (noise._rates[0] != 0)
    z = normals(written_out(key), as_structure((count, *shape)), diffrax.BrownianIncrement, h.shape)["W"]
    driven = factor_increment(noise._rates, h, z).factors
    start = noise.start(shape, key=key)
    begin, end = _weights_along(noise, ts)

    def step(carry: tuple[Array, Array], row: Any) -> tuple[tuple[Array, Array], Array]:
        y, x = carry
        h, added, w0, w1 = row
        y1, moved = advance(noise._rates, h, y, added, w0, w1)
        return (y1, x + moved), x + moved

    return jax.lax.scan(step, (start, jnp.zeros(shape, start.dtype)), (h, driven, begin, end))[1]


def advance(rates: tuple[float, ...], h: Array, y: Array, driven: Array, w0: Array, w1: Array) -> tuple[Array, Array]:
    """The factors after a step, and by how much B moves.

    Arguments:
        y: shape (K, *shape), the factors before.
        driven: shape (K, *shape), what the noise of the step adds to them.
        w0, w1: shape (K,), the weights before and after.
    """
    tall = lambda v: v.reshape(-1, *(1,) * (y.ndim - 1)).astype(y.dtype)
    # Of the change rather than the difference of values: slow factors are large and move little.
    change = tall(jnp.expm1(-jnp.asarray(rates, h.dtype) * h)) * y + driven
    y1 = y + change
    moved = (tall(w0) * change).sum(axis=0)
    return y1, moved if w0 is w1 else moved + (tall(w1 - w0) * y1).sum(axis=0)


def _weights_along(noise: MarkovFractionalNoise, ts: Array) -> tuple[Array, Array]:
    """The weights before and after each gap from time 0 on, shapes (n, K)."""
    if noise._function is None:
        w = jnp.broadcast_to(noise.coefficients(), (ts.shape[0], noise.num_factors))
        return w, w
    w = jax.vmap(noise.coefficients)(jnp.concatenate([jnp.zeros(1, ts.dtype), ts]))
    return w[:-1], w[1:]


@eqx.filter_jit
def _log_prob(noise: MarkovFractionalNoise, ts: Any, h: Any, xs: Any, obs_std: Any) -> Array:
    dtype = jnp.result_type(*[x for x in (xs, noise._logit) if x is not None and jnp.issubdtype(x.dtype, jnp.floating)])
    ts, h, xs, std = (jnp.asarray(x, dtype) for x in (ts, h, xs, obs_std))
    # Checked on the host unless traced; there a wrong order or too long a time gives NaN.
    h = jnp.where((h > 0) | ((h == 0) & (jnp.arange(len(h)) == 0)), h, jnp.nan)
    h = jnp.where(ts <= noise.horizon * (1 + 1e-5), h, jnp.nan)
    begin, end = (w.astype(dtype) for w in _weights_along(noise, ts))
    K, g = noise.num_factors, jnp.asarray(noise._rates, dtype)

    def gap(h: Array, w0: Array, w1: Array) -> tuple[Array, Array]:
        decay = jnp.exp(-g * h)
        moves = w0 * jnp.expm1(-g * h) + (w1 - w0) * decay
        Phi = jnp.zeros((K + 1, K + 1), dtype).at[0, 0].set(1).at[0, 1:].set(moves).at[1:, 1:].set(jnp.diag(decay))
        lift = jnp.concatenate([w1[None], jnp.eye(K, dtype=dtype)])
        return Phi, lift @ factor_covariance(noise._rates, h) @ lift.T

    with jax.default_matmul_precision("highest"):
        Phi, Q = jax.vmap(gap)(h, begin, end)
    L = stationary_factor(noise._rates) if noise.kind == "I" else np.zeros((K, K))
    C = np.zeros((K + 1, K + 1))
    C[1:, 1:] = L @ L.T
    observe = np.eye(1, K + 1)
    exact = std == 0

    def one(x: Array) -> Array:
        # What is known exactly, B(0) = 0, says nothing.
        seen = ~jnp.isnan(x) & ~((ts == 0) & exact)
        gaps = (Phi, jnp.zeros(Phi.shape[:2], dtype), Q)
        return kalman(gaps, observe, std[None, None] ** 2, x[:, None], seen[:, None], np.zeros(K + 1), C)

    return one(xs) if xs.ndim == 1 else jax.vmap(one, in_axes=1)(xs).sum()


def _gaps(ts: Any) -> Any:
    """The time before each entry, in float64 where the times are known, so that large ones lose nothing."""
    return jnp.diff(ts, prepend=jnp.zeros(1, ts.dtype)) if isinstance(ts, jax.Array) else np.diff(ts, prepend=0.0)


def _mix(L: np.ndarray, z: Array) -> Array:
    with jax.default_matmul_precision("highest"):
        return (jnp.asarray(L, z.dtype) @ z.reshape(z.shape[0], -1)).reshape(z.shape)


def _e1(x: Array) -> Array:
    """(1 - exp(-x)) / x, which is 1 at 0."""
    small = x < 1e-4
    safe = jnp.where(small, 1, x)
    return jnp.where(small, 1 - x / 2 * (1 - x / 3), -jnp.expm1(-safe) / safe)


def _unit_scale(hurst: Array, kind: Kind) -> Array:
    """1 / sqrt of the variance of B(1) with the kernel that is not normalised."""
    if kind == "I":
        return jnp.exp(gammaln(2 * hurst + 1) / 2) * jnp.sqrt(jnp.sin(jnp.pi * hurst))
    return jnp.sqrt(2 * hurst) * jnp.exp(gammaln(hurst + 0.5))


def _times(t: Any) -> Array:
    t = jnp.asarray(t)
    return t if jnp.issubdtype(t.dtype, jnp.floating) else t.astype(jnp.result_type(float))


def _check_one_dimensional(ts: Any) -> Any:
    if ts.ndim != 1:
        raise ValueError(f"ts must have shape (n,), got {ts.shape}.")
    return ts


def _positive(x: Any, name: str) -> float:
    if not is_concrete(x):
        raise ValueError(f"{name} must be a number known outside of any trace, as the weights are made from it.")
    x = float(x)
    if not (np.isfinite(x) and x > 0):
        raise ValueError(f"{name} must be positive and finite, got {x}.")
    return x


def _logit_of(hurst: Any) -> Array:
    check_number(hurst)
    if jnp.ndim(hurst) != 0:
        raise ValueError(f"hurst must be a scalar, got shape {jnp.shape(hurst)}: use jax.vmap for several.")
    if is_concrete(hurst) and not LOWEST < float(hurst) < HIGHEST:
        raise ValueError(
            f"hurst must lie strictly between {LOWEST} and {HIGHEST}, got {float(hurst)}: outside of (0, 1) there "
            "is no such noise, and at its ends nothing that a few factors can follow."
        )
    hurst = jnp.asarray(hurst, jnp.result_type(float))
    return jnp.log(hurst - LOWEST) - jnp.log(HIGHEST - hurst)


def _grid(horizon: float, kind: Kind, spacing: Any, num_factors: int, max_rate: Any, rates: Any) -> tuple[float, ...]:
    if rates is not None:
        if spacing is not None or max_rate is not None:
            raise ValueError("rates= are the rates themselves: leave spacing= and max_rate= out.")
        given = np.sort(np.asarray(rates, np.float64).ravel())
        if given.size < 1 or not np.isfinite(given).all() or given[0] < 0 or (np.diff(given) <= 0).any():
            raise ValueError(f"rates must be distinct, finite and not negative, got {np.asarray(rates).tolist()}.")
        return tuple(float(rate) for rate in given)
    if spacing is not None and max_rate is not None:
        raise ValueError("spacing= and max_rate= both fix the fastest rate: give one of them.")
    if num_factors < 2:
        raise ValueError(f"num_factors must be at least 2, got {num_factors}: one has the rate 0.")
    slowest = 1.0 if kind == "II" else 1e-2 if num_factors < 8 else 1e-3
    fastest = 100.0
    if spacing is not None:
        fastest = 2 * horizon / _positive(spacing, "spacing")
    elif max_rate is not None:
        fastest = _positive(max_rate, "max_rate") * horizon
    if fastest <= slowest * (1 + 1e-6):
        raise ValueError(
            f"The fastest rate, {fastest / horizon:g}, must exceed the slowest, {slowest / horizon:g}: take a smaller "
            "spacing, a larger max_rate, or give the rates."
        )
    return (0.0, *(float(r) for r in np.geomspace(slowest, fastest, num_factors - 1) / horizon))
