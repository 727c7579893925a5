"""Linear equations, solved exactly: dX = (A X + b) dt + L dW.

Over a time D the state is Gaussian given its start, X(s+D) | X(s) = x  ~  N(Phi x + c, Q), with

    Phi = exp(A D),   c = int_0^D exp(A u) b du,   Q = int_0^D exp(A u) L L' exp(A' u) du.

They come from Taylor series at D / 2^k, doubled k times by Phi <- Phi^2, c <- c + Phi c, Q <- Q + Phi Q Phi'. Doubling
carries Phi - 1 rather than Phi, so that short times keep all their digits in float32, and no growing exponential
occurs for a stable A, as it does in the usual block matrix of Van Loan (1978). The stationary law of a stable A is the
same doubling carried on until Phi is gone: it solves A P + P A' + L L' = 0 with O(d^3) work and no cancellation.
Coefficients that depend on time are integrated in `_varying`.
"""

import functools
from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
from jaxtyping import Array, Float, PyTree

from .._compat import is_concrete
from .._mesh import on_any_mesh
from ._equation import AbstractEquation
from ._observed import observed
from ._terms import DiffusionTerm, DriftTerm
from ._varying import laws_to_end

_TERMS = 12  # Taylor terms; Q, whose series runs in 2 |A| D <= 1/2, leaves out less than 4e-14 of itself.
_DOUBLINGS = 40
# Some accelerators would round the factors of a product of float32 to half of their digits.
_precise = functools.partial(jax.default_matmul_precision, "highest")
_NOT_STABLE = "{} has no stationary law: pass initial=(mean, covariance), the law of the state at ts[0]."
_PIECES = 32


def _as_float(x: Any) -> Array:
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.result_type(float))


def _value(x: Any, t: Any) -> Array:
    return _as_float(x(t)) if callable(x) else x


def _shapes(*coefficients: Any) -> list[jax.ShapeDtypeStruct]:
    time = jax.ShapeDtypeStruct((), jnp.result_type(float))
    return [jax.eval_shape(lambda t, x=x: _value(x, t), time) for x in coefficients]


class LinearDriftTerm(DriftTerm):
    """The drift of a linear equation; `sdeflow.solvers.Exact` reads the equation instead."""

    equation: Any


class LinearSDE(AbstractEquation):
    """dX = (A X + b) dt + L dW with A (d, d), b (d,) and L (d, m), constant or functions of time; additive noise.

    Where one of them depends on time, what is exact otherwise is integrated: to about 1e-13 if A, b and L are smooth,
    and refused if they vary too fast for ``pieces``.

    Arguments:
        A: shape (d, d), or a function of t that returns it, written in jax; an `equinox.Module` can be trained.
        b: shape (d,), or a function of t.
        L: shape (d, m), from the m noises to the state, or a function of t.
        pieces: into how many an interval is divided to integrate what depends on time. Each can hold a quarter of an
            oscillation, and |A| times its length must stay below 1.8.

    Raises:
        ValueError: if the shapes disagree.

    Example:
        >>> import jax.numpy as jnp, sdeflow as sf
        >>> rotation = jnp.array([[0.0, 1.0], [-1.0, 0.0]])
        >>> phi, c, q = sf.equations.LinearSDE(rotation, jnp.zeros(2), jnp.eye(2)).transition(0.0, 2.0)
        >>> [round(float(x), 4) for x in (phi[0, 0], phi[0, 1], q[0, 0])]
        [-0.4161, 0.9093, 2.0]
        >>> growing = sf.equations.LinearSDE(-jnp.eye(2), jnp.zeros(2), lambda t: jnp.exp(t) * jnp.eye(2))
        >>> round(float(growing.transition(0.0, 1.0)[2][0, 0]), 4)  # (e^2 - e^-2) / 4
        1.8134
    """

    A: Float[Array, "d d"] | Callable
    b: Float[Array, " d"] | Callable
    L: Float[Array, "d m"] | Callable
    pieces: int = eqx.field(default=_PIECES, init=False, static=True)
    interpretation: str = eqx.field(default="ito", init=False, static=True)
    additive: bool = eqx.field(default=True, init=False, static=True)

    def __init__(self, A: Any, b: Any, L: Any, *, pieces: int = _PIECES):
        self.A, self.b, self.L = (x if callable(x) else _as_float(x) for x in (A, b, L))
        self.pieces, self.interpretation, self.additive = pieces, "ito", True
        A, b, L = _shapes(self.A, self.b, self.L)
        d = b.shape[0] if b.ndim == 1 else -1
        if A.shape != (d, d) or L.ndim != 2 or L.shape[0] != d:
            raise ValueError(
                f"A, b and L must have shapes (d, d), (d,) and (d, m), got {A.shape}, {b.shape} and {L.shape}."
            )
        if isinstance(pieces, bool) or not isinstance(pieces, int) or pieces < 1:
            raise ValueError(f"pieces must be a positive integer, got {pieces!r}.")

    @property
    def dim(self) -> int:
        """d, the number of components."""
        return _shapes(self.b)[0].shape[0]

    @property
    def dtype(self) -> Any:
        """The precision of the coefficients together."""
        return jnp.result_type(*(x.dtype for x in _shapes(self.A, self.b, self.L)))

    @property
    def is_constant(self) -> bool:
        """Whether none of A, b and L is a function of time."""
        return not any(callable(x) for x in (self.A, self.b, self.L))

    @property
    def is_diagonal(self) -> bool:
        """Whether A and L are known to be diagonal, so that components do not mix."""
        return False

    def coefficients(self, t: Any) -> tuple[Array, Array, Array]:
        """A, b and L at a time."""
        A, b, L = (_value(x, t) for x in (self.A, self.b, self.L))
        return A, b, L

    def diagonals(self, t: Any) -> tuple[Array, Array, Array]:
        """The diagonal of A, b, and the diagonal of L at a time: all that counts where `is_diagonal`."""
        A, b, L = self.coefficients(t)
        return jnp.diagonal(A), b, jnp.diagonal(L)

    def drift(self, t: Any, y: PyTree, args: Any) -> PyTree:
        """A y + b."""
        return _value(self.A, t).astype(y.dtype) @ y + _value(self.b, t).astype(y.dtype)

    def diffusion(self, t: Any, y: PyTree, args: Any) -> Any:
        """L, an operator from m noises to the state."""
        return lx.MatrixLinearOperator(_value(self.L, t).astype(y.dtype))

    def terms(self, path: diffrax.AbstractPath | None = None) -> diffrax.AbstractTerm:
        """The diffrax terms of this equation; `sdeflow.solvers.Exact` knows by them that it is linear.

        Arguments:
            path: what drives the equation.

        Raises:
            ValueError: if no path is given.
        """
        if path is None:
            return super().terms()
        drift: Any = LinearDriftTerm(self.drift, self)  # pyright: ignore[reportCallIssue]
        return diffrax.MultiTerm(drift, DiffusionTerm(self.diffusion, path))  # pyright: ignore

    def transition(self, s: Any, t: Any) -> tuple[Array, Array, Array]:
        """The law of X(t) given X(s) = x is normal with mean Phi x + c and covariance Q.

        Arguments:
            s, t: times, s <= t.

        Returns:
            Phi (d, d), c (d,), Q (d, d). In a trace they are NaN where coefficients vary too fast for ``pieces``.

        Raises:
            ValueError: for known times that decrease; called eagerly, if coefficients vary too fast.
        """
        if is_concrete(s, t) and float(t) < float(s):
            raise ValueError(f"transition(s, t) needs s <= t, got s = {float(s)} and t = {float(t)}: swap them.")
        with _precise():
            if not self.is_constant:
                s, t = jnp.asarray(s, self.dtype), jnp.asarray(t, self.dtype)
                phi, c, q = laws_to_end(self.coefficients, s, t - s, self.pieces)
                return phi[0], c[0], q[0]
            A, b, L = self.coefficients(s)
            return _transition(A, b, L @ L.T, jnp.asarray(t) - jnp.asarray(s))

    def bridge(self, s: Any, t: Any, u: Any) -> tuple[Array, Array, Array, Array]:
        """The law of X(t) given X(s) = x and X(u) = z, for s <= t <= u.

        Returns:
            F (d, d), G (d, d), c (d,) and C (d, d): the law is normal with mean F x + G z + c and covariance C.
        """
        phi1, c1, q1 = self.transition(s, t)
        phi2, c2, q2 = self.transition(t, u)
        with _precise():
            # The gain of seeing X(u): cov(X(t), X(u)) cov(X(u))^-1 given X(s). It is 0 at t = s and 1 at t = u.
            total = phi2 @ q1 @ phi2.T + q2
            gain = jnp.linalg.solve(total, phi2 @ q1).T
            keep = jnp.eye(len(c1), dtype=gain.dtype) - gain @ phi2
            # Joseph's form stays symmetric and positive near both ends.
            covariance = keep @ q1 @ keep.T + gain @ q2 @ gain.T
            return keep @ phi1, gain, keep @ c1 - gain @ c2, covariance

    def stationary(self) -> tuple[Array, Array]:
        """The law that the equation keeps and is drawn to: mean -A^-1 b, covariance P with A P + P A' + L L' = 0.

        Returns:
            The mean (d,) and P (d, d). NaN where A is traced and has no such law.

        Raises:
            ValueError: if A is known and an eigenvalue of it does not lie left of the imaginary axis, or if A, b or L
                depends on time.
        """
        if not self.is_constant:
            raise ValueError(_NOT_STABLE.format(f"{type(self).__name__} that depends on time"))
        if is_concrete(self.A):
            known = np.asarray(self.A, np.float64)
            if np.linalg.eigvals(known).real.max() >= -8 * np.finfo(np.float64).eps * np.abs(known).max():
                raise ValueError(_NOT_STABLE.format(type(self).__name__))
        with _precise():
            A, b, L = self.coefficients(0.0)
            return _stationary(A, b, L @ L.T)

    def log_prob(
        self,
        ts: Any,
        ys: Any,
        mask: Any = None,
        obs_std: Any = 0.0,
        *,
        observe: Any = None,
        initial: Any = "stationary",
        t0: Any = None,
    ) -> Float[Array, ""]:
        """The log density, in nats, of y_k = H X(ts[k]) + obs_std N(0, 1), by the Kalman recursion: O(n d^3).

        A row that sees nothing adds nothing, and rows at the end that repeat the last time and see nothing are padding:
        they change no bit. Use ``vmap`` for batches.

        Arguments:
            ts: shape (n,), increasing. Known times are subtracted in float64, so they may be large.
            ys: shape (n, p), NaN where missing; (n,) will do if p is 1.
            mask: shape (n, p) or (n,), False where a value is to be left out too.
            obs_std: the standard deviation of the observations' noise, which broadcasts to (n, p); or (n,) if ys is.
                0, the default, observes exactly.
            observe: H (p, d), or a list of the p components that are seen; by default all, p = d.
            initial: the law of X(t0), a mean (d,) and a covariance (d, d), or "stationary".
            t0: the time of ``initial``, by default ts[0].

        Returns:
            A scalar. In a trace it is NaN for an equation without a stationary law, times that decrease, and exact
            observations of what is known.

        Raises:
            ValueError: for shapes that disagree, times that do not increase, a negative ``obs_std``, a covariance
                that is none, an equation without a stationary law, and a density that is not finite.

        Example:
            >>> import jax, jax.numpy as jnp, sdeflow as sf
            >>> ts, ys = [0.0, 0.5, 1.2, 3.0], jnp.array([0.3, 0.1, jnp.nan, -0.4])
            >>> density = lambda theta: sf.equations.OrnsteinUhlenbeck(theta).log_prob(ts, ys, obs_std=0.1)
            >>> round(float(density(1.0)), 4), round(float(jax.grad(density)(1.0)), 4)
            (-1.7875, 0.9627)
        """
        return observed("log_prob", self, ts, ys, mask, obs_std, observe, initial, t0)

    def filter(
        self,
        ts: Any,
        ys: Any,
        mask: Any = None,
        obs_std: Any = 0.0,
        *,
        observe: Any = None,
        initial: Any = "stationary",
        t0: Any = None,
    ) -> tuple[Float[Array, "n d"], Float[Array, "n d d"]]:
        """Means and covariances of X(ts[k]) given the observations up to ts[k]; arguments as in `log_prob`."""
        return observed("filter", self, ts, ys, mask, obs_std, observe, initial, t0)

    def smooth(
        self,
        ts: Any,
        ys: Any,
        mask: Any = None,
        obs_std: Any = 0.0,
        *,
        observe: Any = None,
        initial: Any = "stationary",
        t0: Any = None,
    ) -> tuple[Float[Array, "n d"], Float[Array, "n d d"]]:
        """Means and covariances of X(ts[k]) given all observations; arguments as in `log_prob`.

        A row of NaN in ``ys`` asks for the state at its time: between observations, or after them as a forecast. In
        float32 the covariance before the first observation loses the digits by which an ``initial`` covariance exceeds
        it, so a vague one should not be vaguer than it must.

        Example:
            >>> import jax.numpy as jnp, sdeflow as sf
            >>> wiener = sf.equations.BrownianMotion(1)
            >>> known = jnp.zeros(1), jnp.zeros((1, 1))
            >>> mean, covariance = wiener.smooth([1.0, 2.0, 3.0], [jnp.nan, 1.0, jnp.nan], initial=known, t0=0.0)
            >>> mean[:, 0].round(4).tolist(), covariance[:, 0, 0].round(4).tolist()
            ([0.5, 1.0, 1.0], [0.5, 0.0, 1.0])
        """
        return observed("smooth", self, ts, ys, mask, obs_std, observe, initial, t0)


@on_any_mesh
@jax.jit
def _transition(A: Array, b: Array, noise: Array, duration: Array) -> tuple[Array, Array, Array]:
    dtype = jnp.result_type(A, b, noise, jnp.asarray(duration, A.dtype))
    A, b, noise, duration = (jnp.asarray(x, dtype) for x in (A, b, noise, duration))
    # A stands on both sides of Q, so both its largest column and its largest row count.
    size = jnp.maximum(jnp.abs(A).sum(axis=0).max(), jnp.abs(A).sum(axis=1).max())
    norm = jax.lax.stop_gradient(size * jnp.abs(duration))
    doublings = jnp.clip(jnp.ceil(jnp.log2(jnp.maximum(4 * norm, 1.0))), 0, _DOUBLINGS)
    h = duration * jnp.exp2(-doublings)
    eye = jnp.eye(A.shape[0], dtype=dtype)
    # Horner's rule for (exp(Ah) - 1) and int exp(Au) b du; Q's series is sum_n M_n h^(n+1) / (n+1)!.
    grown, power = jnp.zeros_like(A), eye
    integral, v = jnp.zeros_like(b), b
    Q, M, scale = jnp.zeros_like(A), noise, h
    for n in range(1, _TERMS + 1):
        power = power @ A * (h / n)
        grown = grown + power
        integral = integral + v * scale
        Q = Q + M * scale
        v, M, scale = A @ v, A @ M + M @ A.T, scale * h / (n + 1)

    def double(state: tuple[Array, Array, Array], level: Array) -> tuple[tuple[Array, Array, Array], None]:
        E, c, Q = state
        phi = eye + E
        twice = (2 * E + E @ E, c + phi @ c, Q + phi @ Q @ phi.T)
        return jax.tree_util.tree_map(lambda a, b: jnp.where(level < doublings, a, b), twice, state), None

    (grown, integral, Q), _ = jax.lax.scan(double, (grown, integral, Q), jnp.arange(_DOUBLINGS, dtype=dtype))
    return eye + grown, integral, (Q + Q.T) / 2


@on_any_mesh
@jax.jit
def _stationary(A: Array, b: Array, noise: Array) -> tuple[Array, Array]:
    size = jnp.maximum(jnp.abs(A).sum(axis=0).max(), jnp.abs(A).sum(axis=1).max())
    # As far as the doublings reach, so that whatever decays has done so.
    phi, mean, P = _transition(A, b, noise, jax.lax.stop_gradient(2.0 ** (_DOUBLINGS - 3) / size))
    gone = (jnp.abs(phi) < 0.5).all()
    return jnp.where(gone, mean, jnp.nan), jnp.where(gone, P, jnp.nan)


def _dimension(dim: int) -> int:
    if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
        raise ValueError(f"dim must be a positive integer, got {dim!r}.")
    return dim


def _per_dimension(dim: int, sigma: Any) -> Any:
    """One sigma for each of ``dim`` dimensions; a function of time stays what it is."""
    sigma = sigma if callable(sigma) else _as_float(sigma)
    (shape,) = (x.shape for x in _shapes(sigma))
    if shape not in ((), (_dimension(dim),)):
        raise ValueError(f"sigma must be a scalar or of shape ({dim},), got {shape}.")
    return sigma if callable(sigma) else jnp.broadcast_to(sigma, (dim,))


class _Made(eqx.Module):
    """A coefficient that a subclass makes out of its own parameters, some of which depend on time."""

    make: Callable = eqx.field(static=True)
    dim: int = eqx.field(static=True)
    parameters: tuple

    def __call__(self, t: Any) -> Array:
        return self.make(self.dim, *(_value(x, t) for x in self.parameters))


def _made(make: Callable, dim: int, *parameters: Any) -> Any:
    return _Made(make, dim, parameters) if any(map(callable, parameters)) else make(dim, *parameters)


def _matrix(d: int, x: Array) -> Array:
    return x if x.ndim == 2 else jnp.diag(jnp.broadcast_to(x, (d,)))


def _rate(d: int, theta: Array) -> Array:
    return -_matrix(d, theta)


def _pull(d: int, theta: Array, mean: Array) -> Array:
    return _matrix(d, theta) @ jnp.broadcast_to(mean, (d,))


class BrownianMotion(LinearSDE):
    """dX = sigma dW in ``dim`` dimensions.

    Arguments:
        dim: the number of dimensions, a positive integer.
        sigma: scalar or shape (dim,), or a function of time.
        pieces: as in `LinearSDE`.

    Raises:
        ValueError: if ``dim`` is not a positive integer or ``sigma`` does not broadcast to (dim,).

    Example:
        >>> import sdeflow as sf
        >>> sf.equations.BrownianMotion(2, 0.5).transition(0.0, 4.0)[2].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """

    def __init__(self, dim: int, sigma: Any = 1.0, *, pieces: int = _PIECES):
        size = _per_dimension(dim, sigma)
        (dtype,) = (x.dtype for x in _shapes(size))
        zero = jnp.zeros(dim, dtype)
        super().__init__(jnp.diag(zero), zero, _made(_matrix, dim, size), pieces=pieces)

    @property
    def is_diagonal(self) -> bool:
        """True."""
        return True

    def drift(self, t: Any, y: PyTree, args: Any) -> PyTree:
        """Zero."""
        return jnp.zeros_like(y)

    def diffusion(self, t: Any, y: PyTree, args: Any) -> Any:
        """Sigma, as diagonal noise; a batch of states (..., dim) is allowed."""
        return jnp.broadcast_to(jnp.diagonal(_value(self.L, t)).astype(y.dtype), y.shape)

    def stationary(self) -> tuple[Array, Array]:
        """There is none: a ValueError."""
        raise ValueError(_NOT_STABLE.format(type(self).__name__))


class OrnsteinUhlenbeck(LinearSDE):
    """dX = theta (mean - X) dt + sigma dW, elementwise for scalar or vector theta and sigma.

    Its law: mean + (x - mean) exp(-theta t), and variance sigma^2 (1 - exp(-2 theta t)) / (2 theta) per dimension. Each
    of the three may be a function of time, as in the diffusion models' ``theta = beta(t) / 2, sigma = sqrt(beta(t))``.

    Arguments:
        theta: scalar, shape (d,), or a matrix (d, d); or a function of time.
        mean: scalar or shape (d,); or a function of time.
        sigma: scalar, shape (d,), or a matrix (d, m); or a function of time.
        pieces: as in `LinearSDE`.

    Raises:
        ValueError: if the shapes do not broadcast.

    Example:
        >>> import sdeflow as sf
        >>> phi, c, q = sf.equations.OrnsteinUhlenbeck(2.0, 1.0, 0.5).transition(0.0, 1.0)
        >>> [round(float(x), 6) for x in (phi[0, 0], c[0], q[0, 0])]
        [0.135335, 0.864665, 0.061355]
    """

    theta: Array | Callable
    mean: Array | Callable
    sigma: Array | Callable

    def __init__(self, theta: Any, mean: Any = 0.0, sigma: Any = 1.0, *, pieces: int = _PIECES):
        theta, mean, sigma = (x if callable(x) else _as_float(x) for x in (theta, mean, sigma))
        self.theta, self.mean, self.sigma = theta, mean, sigma
        shapes = [x.shape for x in _shapes(theta, mean, sigma)]
        try:
            (d,) = jnp.broadcast_shapes(*(x if len(x) < 2 else x[:1] for x in shapes), (1,))
        except ValueError as error:
            raise ValueError(
                f"theta, mean and sigma must broadcast to one dimension, got {shapes[0]}, {shapes[1]} and {shapes[2]}."
            ) from error
        d = int(d)
        A, b, L = _made(_rate, d, theta), _made(_pull, d, theta, mean), _made(_matrix, d, sigma)
        super().__init__(A, b, L, pieces=pieces)

    @property
    def is_diagonal(self) -> bool:
        """Whether neither theta nor sigma is a matrix."""
        return all(len(x.shape) < 2 for x in _shapes(self.theta, self.sigma))

    def drift(self, t: Any, y: PyTree, args: Any) -> PyTree:
        """Theta (mean - y)."""
        theta, gap = _value(self.theta, t).astype(y.dtype), _value(self.mean, t).astype(y.dtype) - y
        return theta @ gap if theta.ndim == 2 else theta * gap

    def diffusion(self, t: Any, y: PyTree, args: Any) -> Any:
        """Sigma: diagonal noise unless sigma is a matrix."""
        sigma = _value(self.sigma, t).astype(y.dtype)
        return lx.MatrixLinearOperator(sigma) if sigma.ndim == 2 else jnp.broadcast_to(sigma, y.shape)


class Momentum(LinearSDE):
    """dX = V dt, dV = sigma dW: a state (x, v) of 2 ``dim`` numbers whose velocity is Brownian motion.

    Arguments:
        dim: the number of positions, a positive integer; the state is positions, then velocities.
        sigma: scalar or shape (dim,).

    Raises:
        ValueError: if ``dim`` is not a positive integer or ``sigma`` does not broadcast to (dim,).

    Example:
        >>> import sdeflow as sf
        >>> phi, c, q = sf.equations.Momentum(1, 1.0).transition(0.0, 2.0)
        >>> [round(float(x), 4) for x in (phi[0, 1], q[0, 0], q[0, 1], q[1, 1])]
        [2.0, 2.6667, 2.0, 2.0]
    """

    def __init__(self, dim: int, sigma: Any = 1.0):
        size = _per_dimension(dim, sigma)
        zero, eye = jnp.zeros((dim, dim), size.dtype), jnp.eye(dim, dtype=size.dtype)
        A = jnp.block([[zero, eye], [zero, zero]])
        super().__init__(A, jnp.zeros(2 * dim, size.dtype), jnp.concatenate([zero, jnp.diag(size)]))

    def stationary(self) -> tuple[Array, Array]:
        """There is none: a ValueError."""
        raise ValueError(_NOT_STABLE.format(type(self).__name__))
