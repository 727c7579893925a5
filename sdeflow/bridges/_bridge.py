"""``Bridge``: the equation of a Schrödinger bridge, its exact paths, and its way back."""

from collections.abc import Callable
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray

from .._compat import is_concrete
from .._mesh import on_any_mesh
from .._results import failure_in_brackets
from ..equations import ODE, SDE
from ._clock import Clock, apply, transition
from ._mixture import MixturePotential


class Bridge(eqx.Module):
    r"""The law nearest to a linear reference dX = (A X + b) dt + L dW that carries one population into another.

        dX = (A X + b + L L' grad log phi(t, X)) dt + L dW,      t0 <= t <= t1,

    with the potential phi a Gaussian mixture in the coordinates of a `Clock`. With a potential of the other end too,
    phi^, the density is phi phi^, the way back has the drift A x + b - L L' grad log phi^, and the ordinary equation
    with the mean of both drifts has the same densities. Made by `gaussian_sb`, `light_sb` and `sinkhorn_bridge`.

    Arguments:
        clock: the reference and its horizon.
        potential: phi.
        backward: phi^, or None.
        history: what the training recorded, a dict of arrays.
        result: how the computation of the potential ended.

    Raises:
        ValueError: from what needs a backward potential, where there is none.
    """

    clock: Clock
    potential: MixturePotential
    backward: MixturePotential | None = None
    history: dict[str, Any] = eqx.field(default_factory=dict)
    result: Any = None

    @property
    def reference(self) -> Any:
        """The linear equation that the bridge stays near to."""
        return self.clock.reference

    @property
    def t0(self) -> Array:
        """When the bridge starts."""
        return self.clock.t0

    @property
    def t1(self) -> Array:
        """When it ends."""
        return self.clock.t1

    @property
    def epsilon(self) -> Array:
        """The variance of the reference over the horizon, per component."""
        return self.clock.epsilon

    @on_any_mesh
    def drift(self, t: Any, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """The drift at one state; use ``vmap`` for more. From samples it is finite before t1 only, else up to t1."""
        return self._reference_drift(t, x) + self._noise(t, self._ahead(*self._place(t, x)))

    @on_any_mesh
    def backward_drift(self, t: Any, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """The drift for decreasing times, whose noise is L dW of a Brownian motion that runs backwards."""
        return self._reference_drift(t, x) - self._noise(t, self._behind(*self._place(t, x)))

    @on_any_mesh
    def velocity(self, t: Any, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """The velocity of the ordinary equation with the same densities: the mean of drift and backward drift."""
        place = self._place(t, x)
        return self._reference_drift(t, x) + self._noise(t, self._ahead(*place) - self._behind(*place)) / 2

    @on_any_mesh
    def score(self, t: Any, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """The gradient of the log density at time t."""
        place = self._place(t, x)
        return self._ahead(*place) + self._behind(*place)

    @on_any_mesh
    def endpoint_mean(self, t: Any, x: Float[Array, " d"]) -> Float[Array, " d"]:
        """The mean of X(t1) given X(t) = x."""
        x = self._state(x)
        return self.clock.state(self.potential.mean(*self.clock.at(t, x)))

    @on_any_mesh
    def sample_endpoint(self, x0: Float[Array, " d"], *, key: PRNGKeyArray) -> Float[Array, " d"]:
        """Draw X(t1) given X(t0) = x0, exactly."""
        x0 = self._state(x0)
        return self.clock.state(self.potential.sample(self.clock.start(x0), key=key))

    @on_any_mesh
    def sample_path(self, x0: Float[Array, " d"], ts: Float[Array, " n"], *, key: PRNGKeyArray) -> Float[Array, "n d"]:
        """Draw the states at times ``ts`` given X(t0) = x0, exactly: the end first, then the reference tied to it.

        A free path of the reference is drawn, and its miss of the end is taken out: ``X(t) + H(t) (y - X(t1))`` with
        ``H = Q(t0 -> t) Phi(t -> t1)' Q(t0 -> t1)^-1``.

        Arguments:
            x0: one state.
            ts: not decreasing, between t0 and t1.
            key: a random key.

        Raises:
            ValueError: for times that decrease or lie outside of the horizon.
        """
        x0, ts = self._state(x0), jnp.asarray(ts, self.t1.dtype)
        check_times(ts, self.t0, self.t1)
        for_end, for_path = jr.split(key)
        end = self.sample_endpoint(x0, key=for_end)
        stops = jnp.append(ts, self.t1)

        def step(carry: tuple[Array, Array], row: tuple[Array, Array]) -> tuple[tuple[Array, Array], Array]:
            (s, x), (t, normal) = carry, row
            phi, c, q = transition(self.reference, s, t)
            moved = apply(phi, x) + c + apply(_root(q), normal)
            x = jnp.where(t > s, moved, x)
            return (t, x), x

        normals = jr.normal(for_path, (len(stops), *x0.shape), x0.dtype)
        (_, missed), free = jax.lax.scan(step, (self.t0, x0), (stops, normals))
        _, _, whole = transition(self.reference, self.t0, self.t1)
        gap = end - missed
        share = gap / whole if whole.ndim == 1 else jnp.linalg.solve(whole, gap)

        def tied(t: Array, x: Array) -> Array:
            _, _, q = transition(self.reference, self.t0, t)
            phi, _, _ = transition(self.reference, t, self.t1)
            return x + (q * phi * share if q.ndim == 1 else q @ (phi.T @ share))

        path = jax.vmap(tied)(ts, free[:-1])
        return jnp.where((ts == self.t1)[:, None], end, path)

    def equation(self, direction: Literal["forward", "backward", "flow"] = "forward") -> SDE | ODE:
        """The bridge for `sdeflow.solve`: the SDE from t0 to t1, its way back, or the ordinary equation.

        Arguments:
            direction: "forward"; "backward", for times from t1 down to t0; "flow", for either direction.

        Example:
            >>> import jax, jax.numpy as jnp, sdeflow as sf
            >>> one, eye = jnp.ones(2), jnp.eye(2)
            >>> bridge = sf.bridges.gaussian_sb(-one, eye, one, 0.25 * eye, sf.equations.BrownianMotion(2))
            >>> sol = sf.solve(bridge.equation(), -one, [0.0, 0.5, 1.0], dt0=0.05, key=jax.random.key(0))
            >>> sol.ys.shape
            (3, 2)
        """
        if direction in ("backward", "flow"):
            self._backward()
        return as_equation(self, direction, self.reference.diffusion)

    def _place(self, t: Any, x: Array) -> tuple[Array, Array, Array]:
        """The derivative of the coordinates in x, the coordinates, and what is left of the clock."""
        jacobian, offset, left = self.clock.map(t)
        return jacobian, apply(jacobian, self._state(x)) + offset, left

    def _ahead(self, jacobian: Array, z: Array, left: Array) -> Array:
        """The gradient of log phi in x."""
        return apply(jacobian.T, self.potential.gradient(z, left))

    def _behind(self, jacobian: Array, z: Array, left: Array) -> Array:
        """The gradient of log phi^ in x: the same coordinates, with what has passed of the clock left to go."""
        potential = self._backward()
        passed = jnp.eye(len(z), dtype=z.dtype) - left if jnp.ndim(left) == 2 else 1 - left
        return apply(jacobian.T, potential.gradient(z, passed))

    def _noise(self, t: Any, gradient: Array) -> Array:
        return apply(self.clock.noise(t), gradient)

    def _reference_drift(self, t: Any, x: Array) -> Array:
        return self.reference.drift(t, self._state(x), None)

    def _backward(self) -> MixturePotential:
        if self.backward is None:
            raise ValueError(
                "this bridge has no backward potential, which its backward drift, velocity and score need: pass "
                'backward="samples" or backward="fit" to `light_sb`.'
            )
        return self.backward

    def _state(self, x: Any) -> Array:
        x = jnp.asarray(x)
        if x.shape != self.clock.shift.shape:
            raise ValueError(
                f"a bridge in {self.clock.shift.shape[0]} dimensions takes one state of shape "
                f"{self.clock.shift.shape}, got {x.shape}; use jax.vmap for many."
            )
        return x.astype(jnp.result_type(x, self.clock.shift.dtype))

    def __repr__(self) -> str:
        kind = type(self.reference).__name__
        d, K = self.clock.shift.shape[0], self.potential.log_weights.shape[0]
        way = "and back" if self.backward is not None else "forward only"
        told = failure_in_brackets(self.result)
        return f"Bridge({d} dimensions, {kind}, t from {self.t0} to {self.t1}, {K} components, {way}){told}"


def check_times(ts: Array, t0: Array, t1: Array) -> None:
    """That known times of a path are one row, do not decrease, and lie in the horizon."""
    if not is_concrete(ts, t0, t1):
        return
    known, begin, end = np.asarray(ts), float(t0), float(t1)
    if known.ndim != 1 or known.size == 0 or (np.diff(known) < 0).any():
        raise ValueError("ts must be one row of times that do not decrease.")
    if not (begin <= known[0] and known[-1] <= end):
        raise ValueError(f"ts must lie between t0={begin:g} and t1={end:g}, got {known[0]:g} to {known[-1]:g}.")


def as_equation(bridge: Any, direction: str, diffusion: Callable[..., Any]) -> SDE | ODE:
    """What has the drifts of a bridge, and its noise, as an equation."""
    if direction not in ("forward", "backward", "flow"):
        raise ValueError(f'direction must be "forward", "backward" or "flow", got {direction!r}.')
    if direction == "flow":
        return ODE(lambda t, y, args: bridge.velocity(t, y))
    drift = bridge.drift if direction == "forward" else bridge.backward_drift
    return SDE(lambda t, y, args: drift(t, y), diffusion, additive=True)


def _root(q: Array) -> Array:
    """A root of a covariance; of units of its own in each component, and 0 for 0."""
    if q.ndim == 1:
        return jnp.sqrt(jnp.maximum(q, 0))
    size = jnp.sqrt(jnp.maximum(jnp.diagonal(q), 0))
    safe = jnp.where(size > 0, size, 1)
    none = jnp.diag((size == 0).astype(q.dtype))
    return safe[:, None] * jnp.linalg.cholesky(q / (safe[:, None] * safe) + none) * (size > 0)[:, None]
