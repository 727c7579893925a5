"""``Coupling``: the plan of an entropic transport problem, read from its potentials."""

import functools as ft
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, PRNGKeyArray

from .._mesh import on_any_mesh
from ._blocks import BLOCK, join, over_blocks, products, split


class Coupling(eqx.Module):
    r"""The plan ``P_ij = a_i b_j exp((f_i + g_j - |x_i - y_j|^2 / 2) / epsilon)`` that `sinkhorn` found.

    `regularised` has exact first derivatives in the points, the weights, ``epsilon`` and ``rho``. To a gradient all
    else that a coupling holds or tells is constant, as the targets of a regression are.

    Arguments:
        x, y: the points, (n, D) and (m, D).
        a, b: their weights, (n,) and (m,), as the problem has them: with sum 1 where it is balanced.
        epsilon: the regularisation.
        rho: how strongly the two marginals are held; infinite where they are prescribed.
        centres: of the two clouds. Between clouds around 0 the plan is the same and rounding hurts less.
        potentials: of the plan between the centred clouds; see ``f`` and ``g``.
        error: the marginals' error of the plan; see `sinkhorn`.
        num_iterations: how many were made.
        result: ``RESULTS.successful`` or ``RESULTS.sinkhorn_not_converged``.
        rows: how many rows are in memory at a time.
    """

    x: Float[Array, "n D"]
    y: Float[Array, "m D"]
    a: Float[Array, " n"]
    b: Float[Array, " m"]
    epsilon: Float[Array, ""]
    rho: tuple[Float[Array, ""], Float[Array, ""]]
    centres: tuple[Float[Array, " D"], Float[Array, " D"]]
    potentials: tuple[Float[Array, " n"], Float[Array, " m"]]
    error: Float[Array, ""]
    num_iterations: Int[Array, ""]
    result: Any
    rows: int = eqx.field(static=True)

    @property
    def f(self) -> Float[Array, " n"]:
        """The potential of the points x, for the cost |x - y|^2 / 2 between the points as they are."""
        far = self.centres[0] - self.centres[1]
        return jax.lax.stop_gradient(self.potentials[0] + (self.x - self.centres[0]) @ far + far @ far / 2)

    @property
    def g(self) -> Float[Array, " m"]:
        """The potential of the points y. If the plan is balanced, f + c and g - c are one for every number c."""
        far = self.centres[0] - self.centres[1]
        return jax.lax.stop_gradient(self.potentials[1] - (self.y - self.centres[1]) @ far)

    def plan(self) -> Float[Array, "n m"]:
        """The plan as a matrix."""
        f, g, x, y, a, b, epsilon = _constants(self)
        return a[:, None] * jnp.exp(log_density(x, f, y, g, epsilon)) * b

    def logits(self, points: Float[Array, "k D"]) -> Float[Array, "k m"]:
        """The logarithm, up to a constant for each point, of the probability that a point goes to y_j.

        The points may be new ones: it is ``(g_j - |x - y_j|^2 / 2) / epsilon + log b_j``.

        Arguments:
            points: shape (k, D).
        """
        _, g, _, y, _, b, epsilon = _constants(self)
        inner = products(jax.lax.stop_gradient(points) - self.centres[0], y)
        return (inner + (g - (y**2).sum(axis=1) / 2)) / epsilon + jnp.log(b)

    def sample(self, indices: Int[Array, "..."], *, key: PRNGKeyArray) -> Int[Array, "..."]:
        """For each index i of a point x_i draw the index of the point y_j that it goes to, from row i of the plan.

        The plan is not formed. With i from ``jax.random.choice(key, n, p=coupling.a)`` the pair is a draw from a
        balanced plan. Draw k takes the key ``fold_in(key, k)``.

        Arguments:
            indices: integers, of any shape.
            key: a random key.
        """
        return _draws(self, jnp.asarray(indices), key)

    def transport(self) -> Float[Array, "n D"]:
        """Where each point x_i goes in the mean, ``sum_j P_ij y_j / sum_j P_ij``."""
        *_, s, py = moments(*_constants(self), self.rows)
        return py / s[:, None] + jax.lax.stop_gradient(self.centres[1])

    def marginals(self) -> tuple[Float[Array, " n"], Float[Array, " m"]]:
        """The sums of the plan over y and over x."""
        _, (t, _), s, _ = moments(*_constants(self), self.rows)
        return jax.lax.stop_gradient((self.a * s, self.b * t))

    def cost(self) -> Float[Array, ""]:
        """What the plan moves, ``sum_ij P_ij |x_i - y_j|^2 / 2``, without the entropy."""
        constants, far = _constants(self), jax.lax.stop_gradient(self.centres[0] - self.centres[1])
        _, _, x, y, a, b, _ = constants
        _, (t, _), s, py = moments(*constants, self.rows)
        r, c = a * s, b * t
        squares = r @ (x**2).sum(axis=1) + c @ (y**2).sum(axis=1)
        return squares / 2 - a @ (x * py).sum(axis=1) + (r @ x - c @ y) @ far + r.sum() * (far @ far) / 2

    def regularised(self) -> Float[Array, ""]:
        r"""The value of the problem, ``<P, C> + epsilon KL(P | a b) + rho KL(P 1 | a) + rho KL(P' 1 | b)``, by its dual

            ``<a, rho (1 - e^(-f/rho))> + <b, rho (1 - e^(-g/rho))> - epsilon sum_ij (P_ij - a_i b_j)``,

        whose first term is <a, f> where the marginal is prescribed. A small error of the potentials changes it only
        in second order. Its derivatives are those at constant potentials (the envelope theorem), so nothing goes
        back through the iterations; second derivatives are refused.
        """
        return _value(self)


@on_any_mesh
@eqx.filter_jit
def _draws(c: Coupling, indices: Array, key: PRNGKeyArray) -> Array:
    def draw(place: tuple[Array, Array]) -> Array:
        i, k = place
        return jr.categorical(jr.fold_in(key, k), c.logits(c.x[i][None])[0])

    places = indices.ravel(), jnp.arange(indices.size)
    return jax.lax.map(draw, places, batch_size=max(BLOCK // len(c.y), 1)).reshape(indices.shape)


@on_any_mesh
@eqx.filter_jit
def _value(c: Coupling) -> Array:
    (f, g), (here, there) = jax.lax.stop_gradient((c.potentials, c.centres))
    x, y, far = c.x - here, c.y - there, here - there
    ends = (c.a * _relaxed(f, c.rho[0])).sum() + (c.b * _relaxed(g, c.rho[1])).sum()
    mass = _mass(f, g, x, y, c.a, c.b, c.epsilon, c.rows)
    apart = (c.a @ x - c.b @ y) @ far + c.a.sum() * (far @ far) / 2
    return ends - c.epsilon * (mass - c.a.sum() * c.b.sum()) + apart


def log_density(x: Array, f: Array, y: Array, g: Array, epsilon: Array) -> Array:
    """The logarithm of the plan's density with respect to the weights, between centred points."""
    return within(products(x, y), f - (x**2).sum(axis=1) / 2, g - (y**2).sum(axis=1) / 2, epsilon)


def within(inner: Array, f: Array, g: Array, epsilon: Array) -> Array:
    """The same from inner products, and from potentials that the squares were taken from."""
    # Near the solution nothing comes close to the bound, which keeps all finite on the way there.
    return jnp.minimum((inner + f[:, None] + g) / epsilon, 60.0)


def _constants(c: Coupling) -> tuple[Array, Array, Array, Array, Array, Array, Array]:
    """The potentials, centred points, weights and epsilon, without a gradient."""
    x, y = c.x - c.centres[0], c.y - c.centres[1]
    return jax.lax.stop_gradient((*c.potentials, x, y, c.a, c.b, c.epsilon))


def _relaxed(f: Array, rho: Array) -> Array:
    finite = jnp.where(jnp.isinf(rho), 1, rho)
    return jnp.where(jnp.isinf(rho), f, -finite * jnp.expm1(-f / finite))


@on_any_mesh
@eqx.filter_jit
def moments(f: Array, g: Array, x: Array, y: Array, a: Array, b: Array, epsilon: Array, rows: int) -> tuple:
    """Sums over the density E of the plan, block by block.

    Returns:
        ``sum_ij a_i b_j E_ij log E_ij``; ``(a E, (a x)' E)``, shapes (m,) and (m, D); ``E b``; ``E (b y)``.
    """
    values = jnp.concatenate([b[:, None], b[:, None] * y], axis=1)

    def step(block: tuple) -> tuple:
        x, f, a = block
        logarithm = log_density(x, f, y, g, epsilon)
        E = jnp.exp(logarithm)
        down = products(jnp.concatenate([a[:, None], a[:, None] * x], axis=1).T, E.T)
        entropy = a @ ((E * logarithm) @ b)
        return (entropy, down[0], down[1:].T), products(E, values.T)

    (entropy, t, px), across = over_blocks(step, (split(x, rows), split(f, rows), split(a, rows)))
    across = join(across, len(x))
    return entropy, (t, px), across[:, 0], across[:, 1:]


@jax.custom_jvp
def _first(*slopes: Array) -> tuple:
    return slopes


@_first.defjvp
def _refuse(primals: tuple, tangents: tuple) -> tuple:
    raise NotImplementedError(
        "Coupling.regularised has first derivatives only: its second ones need those of the potentials."
    )


@ft.partial(jax.custom_jvp, nondiff_argnums=(7,))
def _mass(f: Array, g: Array, x: Array, y: Array, a: Array, b: Array, epsilon: Array, rows: int) -> Array:
    """The mass of the plan at these potentials, which are constants to its derivative."""

    def step(block: tuple) -> tuple:
        x, f, a = block
        return a @ (jnp.exp(log_density(x, f, y, g, epsilon)) @ b), ()

    return over_blocks(step, (split(x, rows), split(f, rows), split(a, rows)))[0]


@_mass.defjvp
def _mass_jvp(rows: int, primals: tuple, tangents: tuple) -> tuple:
    f, g, x, y, a, b, epsilon = primals
    entropy, (t, px), s, py = moments(f, g, x, y, a, b, epsilon, rows)
    dx, dy = (a[:, None] * (py - s[:, None] * x)) / epsilon, (b[:, None] * (px - t[:, None] * y)) / epsilon
    slopes = _first(dx, dy, s, t, -entropy / epsilon)
    return (a * s).sum(), sum((slope * tangent).sum() for slope, tangent in zip(slopes, tangents[2:], strict=True))
