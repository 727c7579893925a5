r"""The law of a linear equation whose A, b and L depend on time, by collocation at Gauss's points.

With Psi(u) = Phi(u -> t), which solves Psi' = -Psi A and Psi(t) = 1, all that is wanted is an integral,

    Phi = 1 + int_s^t Psi A du,   c = int_s^t Psi b du,   Q = int_s^t Psi L L' Psi' du,

so that Q is a sum of squares and stays a covariance. From s to t there are equal pieces, each with 6 points of Gauss:
the integrals are of order 12 (Hairer, Lubich and Wanner 2006, II.1), and Psi at the points comes from Picard's
iteration of its own integral equation, whose error after k rounds is |A h|^(k+1) / (k+1)!. Products of pieces make the
whole. Everything is a fixed list of products, so derivatives of every order and in both modes are those of the rule,
in the times too, and no time is the identity exactly.

A piece is not resolved where the last round of Picard still changes Psi by more than 1e-9 of it, or where the highest
of the 6 Legendre coefficients of an integrand exceeds 1e-3 of its size. The error of what is resolved is far below
either, because the order of the integrals is twice their degree, and what is not becomes NaN.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from .._compat import is_concrete
from .._mesh import on_any_mesh

Law = tuple[Array, Array, Array]  # Phi, c and Q; Phi and Q are vectors where components do not mix.
Coefficients = Callable[[Any], Law]  # A, b and L at a time, alike.

_ROUNDS = 16
_CHANGE = 1e-9
# The share of the two highest Legendre coefficients: one alone is 0 for what is odd or even about a piece's middle.
_ROUGHNESS = (1e-2, 1e-3)


def _rule(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """On [0, 1]: points, weights, the weights of int_x_i^1, and those of the last two Legendre coefficients."""
    legendre = np.polynomial.legendre
    x, w = legendre.leggauss(n)
    # A function by its values at the points has the coefficients (k + 1/2) sum_j w_j P_k(x_j) f_j.
    P = legendre.legvander(x, n)
    to_coefficients = (np.arange(n) + 0.5)[:, None] * (w * P[:, :n].T)
    # int_x^1 P_k = (P_(k-1)(x) - P_(k+1)(x)) / (2 k + 1), and 1 - x for k = 0.
    tails = np.stack([1 - x, *((P[:, k - 1] - P[:, k + 1]) / (2 * k + 1) for k in range(1, n))], axis=1)
    return (x + 1) / 2, w / 2, tails @ to_coefficients / 2, to_coefficients[-2:]


_POINTS, _WEIGHTS, _TAILS, _HIGHEST = _rule(6)


def apply(m: Array, x: Array) -> Array:
    """A diagonal (d,) or a matrix (d, d) on vectors (..., d)."""
    return m * x if m.ndim == 1 else jnp.einsum("ij,...j->...i", m, x, precision="highest")


def times(m: Array, n: Array) -> Array:
    """The product of two diagonals, or of two matrices."""
    return m * n if m.ndim == 1 else jnp.matmul(m, n, precision="highest")


def compose(first: Law, then: Law) -> Law:
    """The law over two stretches of time, one after the other."""
    (phi1, c1, q1), (phi2, c2, q2) = first, then
    return times(phi2, phi1), apply(phi2, c1) + c2, times(times(phi2, q1), phi2.T) + q2


def identity(like: Law) -> Law:
    """The law over no time."""
    phi, c, q = like
    return jnp.eye(len(c), dtype=phi.dtype) if phi.ndim == 2 else jnp.ones_like(phi), c * 0, q * 0


# Compiled, so that a call outside of any trace does not build its loop anew.
@on_any_mesh
@eqx.filter_jit
def over_piece(coefficients: Coefficients, s: Array, duration: Array) -> tuple[Law, Array]:
    """The law over one piece, and whether it is resolved."""
    grown, c, q, _, resolved = _collocate(coefficients, s, duration)
    one = jnp.eye(len(c), dtype=grown.dtype) if grown.ndim == 2 else jnp.ones((), grown.dtype)
    return (one + grown, c, q), resolved


def _collocate(coefficients: Coefficients, s: Array, duration: Array) -> tuple[Array, Array, Array, Array, Array]:
    """Phi - 1, c, Q, Psi L at the points of one piece, and whether it is resolved."""
    dtype = duration.dtype
    points, weights, tails, highest = (jnp.asarray(v, dtype) for v in (_POINTS, _WEIGHTS, _TAILS, _HIGHEST))
    A, b, L = (x.astype(dtype) for x in jax.vmap(coefficients)(s + duration * points))
    product, summed = jax.vmap(times), lambda w, f: jnp.tensordot(w, f, axes=1, precision="highest")
    one = jnp.broadcast_to(jnp.eye(A.shape[-1], dtype=dtype) if A.ndim == 3 else jnp.ones((), dtype), A.shape)

    def sweep(psi: Array, _: None) -> tuple[Array, Array]:
        new = one + duration * summed(tails, product(psi, A))
        return new, jnp.abs(new - psi).max() / jnp.abs(new).max()

    psi, changes = jax.lax.scan(sweep, one, None, length=_ROUNDS)
    noise = product(psi, L)
    parts = product(psi, A), jax.vmap(apply)(psi, b), jax.vmap(lambda n: times(n, n.T))(noise)
    grown, c, q = (duration * summed(weights, part) for part in parts)
    size = lambda x: jnp.abs(x).max()
    least = jnp.finfo(dtype).tiny
    smooth = [
        size(summed(weight, part)) <= share * jnp.maximum(size(part), least)
        for weight, share in zip(highest, _ROUGHNESS)
        for part in parts
    ]
    resolved = (changes[-1] <= max(_CHANGE, 16 * float(jnp.finfo(dtype).eps))) & jnp.stack(smooth).all()
    return grown, c, q, noise, resolved


def driven_nodes(
    coefficients: Coefficients, s: Array, duration: Array, pieces: int
) -> tuple[Array, Array, Array, Array, Array]:
    """What the state gains, and how it takes up noise, over ``pieces`` equal pieces.

    Returns:
        Phi - 1, c, and for every point of the rule Psi L, the point's place in [0, 1] and its weight. NaN for the first
        three where a piece is not resolved.
    """
    begin = jnp.arange(pieces, dtype=duration.dtype) / pieces
    piece = lambda u: _collocate(coefficients, s + duration * u, duration / pieces)
    grown, shift, _, noise, resolved = jax.vmap(piece)(begin)

    def step(rest: tuple[Array, Array], here: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        (E, c), (more, moved, noise) = rest, here
        later = lambda x: x + times(E, x)
        return (E + later(more), c + moved + apply(E, moved)), jax.vmap(later)(noise)

    start = jnp.zeros_like(grown[0]), jnp.zeros_like(shift[0])
    (E, c), f = jax.lax.scan(step, start, (grown, shift, noise), reverse=True)
    f = f.reshape(-1, *f.shape[2:])
    E, c, f = (jnp.where(resolved.all(), x, jnp.nan) for x in (E, c, f))
    places = (begin[:, None] + jnp.asarray(_POINTS / pieces, begin.dtype)).reshape(-1)
    return E, c, f, places, jnp.asarray(np.tile(_WEIGHTS / pieces, pieces), begin.dtype)


def laws_to_end(coefficients: Coefficients, s: Array, duration: Array, pieces: int) -> Law:
    """From the start of each of ``pieces`` equal pieces to the end of the last: Phi, c, Q with one axis in front.

    NaN everywhere where a piece is not resolved.

    Raises:
        ValueError: where they are NaN, and known.
    """
    laws = _laws_to_end(coefficients, s, duration, pieces)
    if is_concrete(s, duration, *laws) and not all(np.isfinite(x).all() for x in laws):
        raise ValueError(
            f"the coefficients of the equation vary too fast for {pieces} pieces between {float(s):g} and "
            f"{float(s + duration):g}, or are not finite or not smooth: raise `pieces`, or divide where they jump."
        )
    return laws


@on_any_mesh
@eqx.filter_jit
def _laws_to_end(coefficients: Coefficients, s: Array, duration: Array, pieces: int) -> Law:
    starts = s + duration * (jnp.arange(pieces, dtype=duration.dtype) / pieces)
    laws, resolved = jax.vmap(lambda start: over_piece(coefficients, start, duration / pieces))(starts)

    def step(rest: Law, law: Law) -> tuple[Law, Law]:
        whole = compose(law, rest)
        return whole, whole

    _, whole = jax.lax.scan(step, identity(jax.tree.map(lambda x: x[0], laws)), laws, reverse=True)
    fine = resolved.all()
    return jax.tree.map(lambda x: jnp.where(fine, x, jnp.nan), whole)
