r"""A step of a linear equation, given what its driving Brownian motion is known by: its increment W and its area H.

With u in [0, 1] along a step of length h, dX = (A X + b) dt + L dW makes

    X' = x + E x + c + I,      E = exp(A h) - 1,      I = int f(u) dW,      f(u) = exp(A h (1 - u)) L.

W and H are the first two coefficients of dW in Legendre's polynomials P_n(2u - 1), which are independent, so that with
f = g_0 + g_1 P_1 + (what is left)

    I = g_0 W - 2 g_1 H + r,      cov r = h R,      R = int (f - g_0 - g_1 P_1)(f - g_0 - g_1 P_1)' du = O(h^4),

and r is independent of both. R is a sum of squares at every length of the step: taken as the difference of the whole
covariance and what W and H account for, it would be lost in rounding errors where the step is short.

Constant coefficients: Taylor series of g_0, g_1, ... at h / 2^k, doubled k times. Two steps of length h have

    G_0 = (Phi g_0 + g_0) / 2,      G_1 = (2 + E) g_1 / 4 - 3 E g_0 / 4,
    2 R_2 = Phi R Phi' + R + 2 a a' + (b_1 b_1' + b_2 b_2') / 3,
    a = E g_0 / 2 + G_1 / 2,      b_1 = Phi g_1 - G_1 / 2,      b_2 = g_1 - G_1 / 2,

a and the b what a polynomial of degree one in each half is off one in both. Where components do not mix, E, g_0, g_1
and R have closed forms. Coefficients that depend on time are integrated by the rule of `_varying`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from ._varying import Coefficients, driven_nodes, times

_TERMS = 13  # powers of A h, |A h| at most 1/4
_DEGREE = 7
_DOUBLINGS, _GROUP = 40, 8
_NEAR = 2.0  # up to here scalars use their series, whose last terms are below 1e-17


class DrivenStep(NamedTuple):
    """What makes X' of x, W and H; matrices, or vectors where components do not mix.

    Fields:
        grown: E.
        shift: c.
        of_increment: g_0.
        of_area: -2 g_1.
        left_over: R, or for vectors its signed root.
    """

    grown: Array
    shift: Array
    of_increment: Array
    of_area: Array
    left_over: Array


def _series(degree: int, terms: int) -> np.ndarray:
    """Row n: the coefficients in the powers of z of g_n, the n-th Legendre coefficient of exp(z (1 - u))."""
    table = np.zeros((degree + 1, terms))
    for n in range(degree + 1):
        for k in range(n, terms):
            moment = math.factorial(k) / (math.factorial(k - n) * math.factorial(k + n + 1))
            table[n, k] = (2 * n + 1) * (-1) ** n * moment
    return table


_MATRIX, _SCALAR = _series(_DEGREE, _TERMS), _series(12, 26)
_ODD = 2 * np.arange(26) + 1.0


def of_scalars(a: Array, b: Array, noise: Array, h: Array) -> DrivenStep:
    """The step of dX = (a X + b) dt + noise dW, each component by itself."""
    z = a * h
    near = jnp.abs(z) < _NEAR
    small, large = jnp.where(near, z, 0), jnp.where(near, _NEAR, z)
    table = jnp.asarray(_SCALAR, z.dtype)
    powers = [jnp.ones_like(small)]
    for _ in range(table.shape[1] - 1):
        powers.append(powers[-1] * small)
    stacked = jnp.stack(powers)
    sums = lambda rows, powers: jnp.tensordot(rows, powers, 1, precision="highest")
    first = sums(table[:2], stacked)
    # The root of R over z^2, which is positive and smooth.
    beyond = sums(table[2:, 2:], stacked[:-2])
    squares = jnp.tensordot(jnp.asarray(1 / _ODD[2 : table.shape[0]], z.dtype), beyond**2, 1, precision="highest")
    root = small**2 * jnp.sqrt(squares)

    e = jnp.exp(large)
    phi = jnp.expm1(large) / large
    area = 3 * (phi * (1 + 2 / large) - 2 * e / large)
    whole = jnp.expm1(2 * large) / (2 * large)
    far = whole - phi**2 - area**2 / 3
    far_root = jnp.sqrt(jnp.where(far > 0, far, 1)) * (far > 0)

    g0 = jnp.where(near, first[0], phi)
    g1 = jnp.where(near, first[1], area)
    r = jnp.where(near, root, far_root)
    return DrivenStep(jnp.expm1(z), h * g0 * b, noise * g0, -2 * noise * g1, noise * r)


def of_matrices(A: Array, b: Array, L: Array, h: Array) -> DrivenStep:
    """The step of an equation with constant coefficients."""
    size = jnp.maximum(jnp.abs(A).sum(axis=0).max(), jnp.abs(A).sum(axis=1).max())
    norm = jax.lax.stop_gradient(size * jnp.abs(h))
    doublings = jnp.clip(jnp.ceil(jnp.log2(jnp.maximum(4 * norm, 1.0))), 0, _DOUBLINGS)
    step = h * jnp.exp2(-doublings)
    z, m = A * step, L.shape[1]
    powers = [jnp.concatenate([L, b[:, None], z], axis=1)]
    for _ in range(_TERMS - 1):
        powers.append(z @ powers[-1])
    g = jnp.tensordot(jnp.asarray(_MATRIX, z.dtype), jnp.stack(powers), 1)
    E, c, g0, g1 = g[0][:, m + 1 :], step * g[0][:, m], g[0][:, :m], g[1][:, :m]
    weight = jnp.asarray(1 / _ODD[2 : _DEGREE + 1], z.dtype)
    R = jnp.einsum("n,nij,nkj->ik", weight, g[2:, :, :m], g[2:, :, :m])

    def double(state: tuple[Array, ...]) -> tuple[Array, ...]:
        E, c, g0, g1, R = state
        grow = lambda x: x + E @ x
        G0, G1 = g0 + E @ g0 / 2, (2 * g1 + E @ g1 - 3 * E @ g0) / 4
        a, b1, b2 = (E @ g0 + G1) / 2, grow(g1) - G1 / 2, g1 - G1 / 2
        R2 = (grow(grow(R).T) + R) / 2 + a @ a.T + (b1 @ b1.T + b2 @ b2.T) / 6
        return 2 * E + E @ E, c + grow(c), G0, G1, R2

    def level(state: tuple[Array, ...], number: Array) -> tuple[tuple[Array, ...], None]:
        return jax.lax.cond(number < doublings, double, lambda x: x, state), None

    def group(state: tuple[Array, ...], numbers: Array) -> tuple[tuple[Array, ...], None]:
        # Most steps need no doubling: then nothing is looped over.
        return jax.lax.cond(
            numbers[0] < doublings, lambda x: jax.lax.scan(level, x, numbers)[0], lambda x: x, state
        ), None

    levels = jnp.arange(_DOUBLINGS, dtype=z.dtype).reshape(-1, _GROUP)
    (E, c, g0, g1, R), _ = jax.lax.scan(group, (E, c, g0, g1, R), levels)
    return DrivenStep(E, c, g0, -2 * g1, R)


def of_functions(coefficients: Coefficients, start: Array, h: Array, pieces: int) -> DrivenStep:
    """The step of an equation whose coefficients depend on time; NaN where they vary too fast for ``pieces``.

    Arguments:
        coefficients: A, b and L at a time, or their diagonals.
    """
    E, c, f, u, weight = driven_nodes(coefficients, start, h, pieces)
    summed = lambda w, f: jnp.tensordot(w, f, 1, precision="highest")
    line = 2 * u - 1
    g0, g1 = summed(weight, f), 3 * summed(weight * line, f)
    wide = lambda x: x.reshape(-1, *[1] * (f.ndim - 1))
    rest = f - g0 - wide(line) * g1
    if f.ndim == 2:
        square = summed(weight, rest**2)
        okay = square > 0
        # As in the closed form: the noise's sign, where it keeps one.
        R = jnp.sign(g0) * jnp.where(okay, jnp.sqrt(jnp.where(okay, square, 1)), 0)
    else:
        R = summed(weight, jax.vmap(lambda x: times(x, x.T))(rest))
    return DrivenStep(E, c, g0, -2 * g1, R)


def driven_step(equation: Any, start: Array, h: Array, pieces: int | None) -> DrivenStep:
    """The step of a `LinearSDE` from ``start`` over ``h``, which may be negative; in the precision of ``h``."""
    read: Callable[[Any], Any] = equation.diagonals if equation.is_diagonal else equation.coefficients

    def coefficients(t: Any) -> tuple[Array, Array, Array]:
        A, b, L = (jnp.asarray(x, h.dtype) for x in read(t))
        return A, b, L

    if not equation.is_constant:
        return of_functions(coefficients, start, h, equation.pieces if pieces is None else pieces)
    step, (A, b, L) = of_scalars if equation.is_diagonal else of_matrices, coefficients(start)
    with jax.default_matmul_precision("highest"):
        return step(A, b, L, h)


@jax.custom_jvp
def symmetric_root(R: Array) -> Array:
    """The symmetric root of a positive semidefinite matrix, differentiable where its rank does not change."""
    values, vectors = jnp.linalg.eigh(R)
    return (vectors * jnp.sqrt(jnp.maximum(values, 0))) @ vectors.T


@symmetric_root.defjvp
def _root_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    S = symmetric_root(*primals)
    return S, _sylvester(S, *tangents)


@jax.custom_jvp
def _sylvester(S: Array, C: Array) -> Array:
    """X with S X + X S = C, zero along what S has no part in."""
    values, vectors = jnp.linalg.eigh(S)
    both = values[:, None] + values[None, :]
    some = both > jnp.finfo(S.dtype).eps * jnp.abs(values).max()
    within = vectors.T @ C @ vectors
    return vectors @ jnp.where(some, within / jnp.where(some, both, 1), 0) @ vectors.T


@_sylvester.defjvp
def _sylvester_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (S, C), (dS, dC) = primals, tangents
    X = _sylvester(S, C)
    return X, _sylvester(S, dC - dS @ X - X @ dS)
