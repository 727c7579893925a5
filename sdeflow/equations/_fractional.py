"""Equations driven by fractional noise of few factors, written as ordinary equations for the state and the factors.

    dX = b(t, X) dt + g(t, X) o dB,        B = sum_k w_k (Y_k - Y_k(0)),        dY_k = -rate_k Y_k dt + u dt + dW,

so that dX = [b + g (sum_k (w_k' - w_k rate_k) Y_k + w u)] dt + w g o dW with w = sum_k w_k; w_k' is not zero where H
depends on time. The integral against B is meant in the sense of Stratonovich: for H > 1/2 it becomes Young's as factors
are added. For H < 1/2 the Ito form, which adds w^2/2 g'g to the drift, has no limit, as w grows without bound.

u is a control, by which a posterior differs from its prior; its price is int |u|^2 / 2 dt (Girsanov), with no division
by g. The factors of type I may start in a law of their own too, at the price of its divergence. Source: Daems et al.,
"Variational inference for SDEs driven by fractional noise", ICLR 2024.
"""

from collections.abc import Callable
from typing import Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import lineax as lx
import numpy as np
from jaxtyping import Array, PRNGKeyArray, PyTree

from .._compat import is_concrete
from ..paths import FactorLaw, MarkovFractionalNoise
from ._chart import Chart
from ._equation import AbstractEquation, stratonovich_correction
from ._terms import check_like, check_noise, check_operator

STIFF = 0.5  # rate * step from which an explicit method inflates the variance of a factor by a third and more


class FractionalState(eqx.Module):
    """The state of a `FractionalSDE` with its memory; a solve continues from it.

    Arguments:
        x: the state of the equation.
        factors: leaves (num_factors, *shape), one set for every dimension of the noise.
        path_kl: int |u|^2 / 2 dt so far, in nats, and the divergence of the law in which the factors started; None
            without either.
        martingale: int u . dW so far, and by how much the start exceeded its divergence; its mean is zero.
    """

    x: PyTree[Array]
    factors: PyTree[Array]
    path_kl: Any = None
    martingale: Any = None


class FractionalSDE(AbstractEquation):
    """dX = b(t, X, args) dt + g(t, X, args) o dB with fractional noise B, in the sense of Stratonovich.

    `sdeflow.solve` walks it together with the factors of the noise, by default with `sdeflow.solvers.ExponentialHeun`,
    which is exact for them at any step length. What is saved is x; ``sol.final`` is a `FractionalState`, from which a
    later solve continues with the same memory. With any diffrax solver the factors are ordinary states, and steps must
    be short against the fastest rate: ``max_rate * dt0 < 0.5``.

    Arguments:
        drift: ``b(t, x, args)``, returns exactly x's structure, shapes and dtypes.
        diffusion: ``g(t, x, args)``, returns an array (tree) of x's exact structure for diagonal noise, or a lineax
            operator from the noise to x.
        noise: a `sdeflow.paths.MarkovFractionalNoise` whose horizon covers the solve.
        control: ``u(t, state, args)``, from a `FractionalState` to something like the noise, added to the Brownian
            motion behind it; then ``sol.final.path_kl`` is the integral of |u|^2 / 2, and ``sol.final.martingale`` that
            of u dW, without gradients in the control's own arrays: a bound on the evidence from which both are
            subtracted has the same mean as without the second, and at the best control no variance.
        past: ``past(t, x, args)``, a `sdeflow.paths.FactorLaw` in which the factors of type I start, given the x they
            start with; or the law itself. ``path_kl`` then starts at its divergence, and the martingale at the rest of
            log q / p for the draw.
        additive: promise that g does not depend on x; then every solver is right.

    Raises:
        TypeError: if a function is not callable or the noise is of another kind.
        ValueError: for type II with a past, which it has not.

    Example:
        >>> import jax, jax.numpy as jnp, sdeflow as sf
        >>> noise = sf.paths.MarkovFractionalNoise(0.3, horizon=1.0)
        >>> sde = sf.equations.FractionalSDE(lambda t, x, args: -x, lambda t, x, args: 0.3 * x, noise)
        >>> sol = sf.solve(sde, jnp.ones(2), [0.0, 0.5, 1.0], dt0=0.05, key=jax.random.key(0))
        >>> sol.ys.shape, sol.final.factors.shape
        ((3, 2), (6, 2))
    """

    drift: Callable[[Any, PyTree, Any], PyTree]
    diffusion: Callable[[Any, PyTree, Any], Any]
    noise: MarkovFractionalNoise
    control: Callable[[Any, FractionalState, Any], PyTree] | None
    past: Callable[[Any, PyTree, Any], FactorLaw] | FactorLaw | None
    interpretation: str = eqx.field(static=True)
    additive: bool = eqx.field(static=True)

    def __init__(
        self,
        drift: Callable[[Any, PyTree, Any], PyTree],
        diffusion: Callable[[Any, PyTree, Any], Any],
        noise: MarkovFractionalNoise,
        *,
        control: Callable[[Any, FractionalState, Any], PyTree] | None = None,
        past: Callable[[Any, PyTree, Any], FactorLaw] | FactorLaw | None = None,
        additive: bool = False,
    ):
        for name, fn in (("drift", drift), ("diffusion", diffusion), ("control", control)):
            if not callable(fn) and not (name == "control" and fn is None):
                raise TypeError(f"The {name} must be callable as {name}(t, x, args), got {type(fn).__name__}.")
        if not isinstance(noise, MarkovFractionalNoise):
            raise TypeError(
                f"noise must be a sf.paths.MarkovFractionalNoise, got {type(noise).__name__}: other paths drive an "
                "sf.SDE through path=."
            )
        if not (past is None or callable(past) or isinstance(past, FactorLaw)):
            raise TypeError(f"past must be a sf.paths.FactorLaw or a function that returns one, got {past!r}.")
        if past is not None and noise.kind == "II":
            raise ValueError('Noise of kind="II" starts at time 0 and has no past: leave past= out.')
        self.drift, self.diffusion, self.noise, self.control, self.past = drift, diffusion, noise, control, past
        self.interpretation, self.additive = "stratonovich", additive

    def start(
        self, x: PyTree, *, key: PRNGKeyArray | None = None, t: Any = 0.0, args: PyTree = None
    ) -> FractionalState:
        """The state and its memory at the start.

        Arguments:
            x: the state.
            key: a JAX random key, for the long past of type I.
            t, args: where the diffusion is asked what noise it takes, and ``past`` for its law.

        Raises:
            ValueError: for type I without a key.
        """
        if key is None and self.noise.kind == "I":
            raise ValueError(
                'The factors of kind="I" start at random: pass key=, or start from equation.start(x, key=...) where '
                "the noise is given by path=."
            )
        structure = noise_structure(self.diffusion, t, x, args)
        law = self.past(t, x, args) if callable(self.past) else self.past
        factors, kl, excess = self.noise.start_of(structure, jax.random.key(0) if key is None else key, law)
        if self.control is None and law is None:
            return FractionalState(x, factors)
        dtype = jnp.result_type(*jtu.tree_leaves(x))
        return FractionalState(x, factors, jnp.asarray(kl, dtype), jnp.asarray(excess, dtype))

    def terms(self, path: diffrax.AbstractPath | None = None) -> diffrax.AbstractTerm:
        """The terms for the state and its factors, a `FractionalState`.

        Steps of an explicit method that are too long for the fastest factor give NaN rather than a wrong law.
        """
        if path is None:
            raise ValueError("A stochastic equation needs a path for its terms, e.g. noise.path(grid, shape, key=...).")
        return diffrax.MultiTerm(FactorDriftTerm(self), FactorNoiseTerm(self, path))  # pyright: ignore

    def chart(self, y0: PyTree) -> Chart | None:
        """The state with its factors."""
        return Chart(WithFactors(self), _Start(self, y0), _ReadState())  # pyright: ignore[reportCallIssue]

    def to_ito(self, *, elementwise: bool = False) -> "FractionalSDE":
        """The same process for Ito solvers; the correction grows with the number and the speed of the factors.

        Arguments:
            elementwise: see `AbstractEquation.to_stratonovich`.
        """
        if self.additive or self.interpretation == "ito":
            return self
        drift = _ItoDrift(self.drift, self.diffusion, self.noise, elementwise)  # pyright: ignore[reportCallIssue]
        out = FractionalSDE(drift, self.diffusion, self.noise, control=self.control, past=self.past)
        object.__setattr__(out, "interpretation", "ito")
        return out

    def to_stratonovich(self, *, elementwise: bool = False) -> "FractionalSDE":
        """Itself; only what `to_ito` returned is of the other kind, and its origin is what to keep."""
        if self.interpretation == "ito":
            raise ValueError("Keep the equation that to_ito() was called on: it is the one of Stratonovich.")
        return self

    def fields(self, t: Any, x: PyTree, args: Any) -> tuple[PyTree, Any]:
        """The drift and the diffusion, checked against the state."""
        b = check_like(self.drift(t, x, args), x, "drift")
        g = self.diffusion(t, x, args)
        if isinstance(g, lx.AbstractLinearOperator):
            check_operator(g, x)
            return b, g
        return b, check_like(g, x, "diffusion", " Return an array of the state's structure, or a lineax operator.")

    def push(self, t: Any, state: FractionalState, args: Any) -> PyTree | None:
        """The control, checked against the noise; None without one."""
        if self.control is None:
            return None
        like = jtu.tree_map(lambda y: y[0], state.factors)
        return check_like(self.control(t, state, args), like, "control")

    def held_push(self, t: Any, state: FractionalState, args: Any) -> PyTree | None:
        """The control without gradients in its own arrays (Roeder, Wu and Duvenaud 2017)."""
        stop = lambda x: jax.lax.stop_gradient(x) if eqx.is_inexact_array(x) else x
        return eqx.tree_at(lambda e: e.control, self, jtu.tree_map(stop, self.control)).push(t, state, args)


class WithFactors(AbstractEquation):
    """The equation of a `FractionalState`, which is what `sdeflow.solve` walks."""

    of: FractionalSDE
    interpretation: str = eqx.field(static=True)
    additive: bool = eqx.field(static=True)

    def __init__(self, of: FractionalSDE):
        self.of, self.interpretation, self.additive = of, of.interpretation, of.additive

    @property
    def rates(self) -> tuple[float, ...]:
        """The rates of the factors."""
        return tuple(float(r) for r in self.of.noise.rates)

    def drift(self, t: Any, y: FractionalState, args: Any) -> FractionalState:
        """All that multiplies dt."""
        return _all_drift(self.of, t, y, args)

    def diffusion(self, t: Any, y: FractionalState, args: Any) -> lx.AbstractLinearOperator:
        """From the Brownian motion to the state and to every factor."""
        return _all_noise(self.of, t, y, args)

    def terms(self, path: diffrax.AbstractPath | None = None) -> diffrax.AbstractTerm:
        """Those of the equation."""
        return self.of.terms(path)


class FactorDriftTerm(diffrax.AbstractTerm):
    """All that multiplies dt; `sdeflow.solvers.ExponentialHeun` reads the equation instead."""

    equation: FractionalSDE

    def vf(self, t: Any, y: FractionalState, args: Any) -> FractionalState:
        """The drift of the state and of the factors."""
        return _all_drift(self.equation, t, y, args)

    def contr(self, t0: Any, t1: Any, **kwargs: Any) -> Any:
        """The length of the step; NaN where an explicit method would be wrong about the fastest factor."""
        h = t1 - t0
        return jnp.where(jnp.abs(h) * self.equation.noise.rates[-1] < STIFF, h, jnp.nan)

    def prod(self, vf: FractionalState, control: Any) -> FractionalState:
        """The drift times the length of the step."""
        return jtu.tree_map(lambda v: jnp.asarray(control, v.dtype) * v, vf)


class FactorNoiseTerm(diffrax.AbstractTerm):
    """All that multiplies dW."""

    equation: FractionalSDE
    control: diffrax.AbstractPath

    def vf(self, t: Any, y: FractionalState, args: Any) -> lx.AbstractLinearOperator:
        """The operator from the Brownian motion to the state and the factors."""
        return _all_noise(self.equation, t, y, args)

    def contr(self, t0: Any, t1: Any, **kwargs: Any) -> Any:
        """The increment of the driving path."""
        return self.control.evaluate(t0, t1, **kwargs)

    def prod(self, vf: lx.AbstractLinearOperator, control: Any) -> FractionalState:
        """The operator applied to an increment."""
        check_noise(control, vf.in_structure())
        return vf.mv(control)


def apply_noise(g: Any, w: PyTree) -> PyTree:
    """The diffusion times something like the noise."""
    return g.mv(w) if isinstance(g, lx.AbstractLinearOperator) else jtu.tree_map(jnp.multiply, g, w)


def noise_structure(diffusion: Callable, t: Any, x: PyTree, args: Any) -> PyTree:
    """What the noise looks like: the state for a diagonal diffusion, else what the operator takes."""
    g = eqx.filter_eval_shape(diffusion, t, x, args)
    if isinstance(g, lx.AbstractLinearOperator):
        return g.in_structure()
    return jtu.tree_map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), x)


def _weights(noise: MarkovFractionalNoise, t: Any) -> tuple[Array, Array]:
    """The weights at time t and their derivative in time."""
    if not callable(noise.hurst):
        w = noise.coefficients()
        return w, jnp.zeros_like(w)
    t = jnp.asarray(t, jnp.result_type(float))
    return jax.jvp(noise.coefficients, (t,), (jnp.ones_like(t),))


def _all_drift(equation: FractionalSDE, t: Any, y: FractionalState, args: Any) -> FractionalState:
    b, g = equation.fields(t, y.x, args)
    u = equation.push(t, y, args)
    w, change = _weights(equation.noise, t)
    rates = jnp.asarray(equation.noise.rates, w.dtype)
    tall = lambda v, y: v.reshape(-1, *(1,) * (y.ndim - 1)).astype(y.dtype)
    moved = jtu.tree_map(lambda y: (tall(change - w * rates, y) * y).sum(axis=0), y.factors)
    factors = jtu.tree_map(lambda y: -tall(rates, y) * y, y.factors)
    kl, still = jtu.tree_map(jnp.zeros_like, (y.path_kl, y.martingale))
    if u is not None:
        moved = jtu.tree_map(lambda m, u: m + w.sum().astype(u.dtype) * u, moved, u)
        factors = jtu.tree_map(lambda y, u: y + u, factors, u)
        kl = half_square(u, y.path_kl)
    return FractionalState(jtu.tree_map(jnp.add, b, apply_noise(g, moved)), factors, kl, still)


def _all_noise(equation: FractionalSDE, t: Any, y: FractionalState, args: Any) -> lx.AbstractLinearOperator:
    _, g = equation.fields(t, y.x, args)
    whole = _weights(equation.noise, t)[0].sum()
    u = None if equation.control is None else equation.held_push(t, y, args)

    def apply(w: PyTree) -> FractionalState:
        factors = jtu.tree_map(lambda y, w: jnp.broadcast_to(w, y.shape), y.factors, w)
        scaled = jtu.tree_map(lambda w: whole.astype(w.dtype) * w, w)
        kl, excess = jtu.tree_map(jnp.zeros_like, (y.path_kl, y.martingale))
        return FractionalState(apply_noise(g, scaled), factors, kl, excess if u is None else inner(u, w, y.martingale))

    one = jtu.tree_map(lambda y: jax.ShapeDtypeStruct(y.shape[1:], y.dtype), y.factors)
    return lx.FunctionLinearOperator(apply, one)


def half_square(u: PyTree, like: Array) -> Array:
    """|u|^2 / 2, what a control costs in unit time."""
    return sum((jnp.sum(x**2) for x in jtu.tree_leaves(u)), jnp.zeros_like(like)) / 2


def inner(u: PyTree, w: PyTree, like: Array) -> Array:
    """U . w."""
    products = jtu.tree_map(lambda u, w: jnp.sum(u * w), u, w)
    return sum(jtu.tree_leaves(products), jnp.zeros_like(like))


class _ItoDrift(eqx.Module):
    """The drift with half of w^2 sum_j (dg_j/dx) g_j."""

    drift: Callable
    diffusion: Callable
    noise: MarkovFractionalNoise
    elementwise: bool = eqx.field(static=True)

    def __call__(self, t: Any, x: PyTree, args: Any) -> PyTree:
        square = _weights(self.noise, t)[0].sum() ** 2
        correction = stratonovich_correction(self.diffusion, t, x, args, self.elementwise)
        return jtu.tree_map(lambda b, c: b + square.astype(c.dtype) * c, self.drift(t, x, args), correction)


class _Start(eqx.Module):
    """Makes the start of a solve, once its times and its key are known."""

    equation: FractionalSDE
    y0: PyTree

    def __call__(self, ts: Any, args: Any, key: Any) -> FractionalState:
        # On the host where they are known, as slices of a known array are traced inside of a trace.
        ts = np.asarray(ts, np.float64) if is_concrete(ts) else ts
        horizon = self.equation.noise.horizon
        known = isinstance(ts, np.ndarray) and ts.ndim == 1 and ts.size > 0
        if known and ts[-1] < ts[0]:
            raise ValueError(
                "A FractionalSDE is not solved backwards in time: its factors forget, and cannot be run in reverse."
            )
        if known:
            self.equation.noise.check_horizon(ts - ts[0])
        y0 = self.y0
        if not isinstance(y0, FractionalState):
            t = ts[0] if ts.ndim == 1 and ts.shape[0] else 0.0
            y0 = _started(self.equation, y0, t, args, key)
        if known or ts.ndim != 1:
            return y0
        # Where the times are traced, too long a solve fails as one that is not finite.
        within = ts[-1] - ts[0] <= horizon * (1 + 1e-5)
        return eqx.tree_at(lambda y: y.factors, y0, jtu.tree_map(lambda y: jnp.where(within, y, jnp.nan), y0.factors))


# Compiled, so that a solve outside of any trace does not compile the draw one operation at a time.
@eqx.filter_jit
def _started(equation: FractionalSDE, x: Any, t: Any, args: Any, key: Any) -> FractionalState:
    return equation.start(x, key=key, t=t, args=args)


class _ReadState(eqx.Module):
    """x alone at the requested times, everything at the end."""

    def __call__(self, y: FractionalState) -> PyTree:
        return y.x

    def final(self, y: FractionalState) -> FractionalState:
        """With its memory."""
        return y
