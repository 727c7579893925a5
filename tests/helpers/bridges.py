"""Potentials, pairs of Gaussians and references that the tests of bridges share."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

import sdeflow as sf
from helpers.frames import A, L, b, rotating
from sdeflow.bridges import MixturePotential, gaussian_sb

ROTATING = (A, b, L)


def mixture(K=4, d=3, epsilon=0.7, full=True, seed=0):
    rng = np.random.default_rng(seed)
    basis = np.stack([np.linalg.qr(rng.normal(size=(d, d)))[0] for _ in range(K)]) if full else None
    return MixturePotential(
        jnp.asarray(rng.normal(size=K)),
        jnp.asarray(rng.normal(size=(K, d))),
        jnp.asarray(rng.uniform(0.2, 1.8, size=(K, d))),
        jnp.asarray(epsilon),
        None if basis is None else jnp.asarray(basis),
    )


def one(S, r):
    """One component on a line, with the epsilon of the example p0 = N(0, 1), p1 = N(1, 1/4), epsilon = 1/2."""
    return MixturePotential(jnp.zeros(1), jnp.full((1, 1), r), jnp.full((1, 1), S), jnp.asarray(0.5))


def gaussians(d, seed=0):
    rng = np.random.default_rng(seed)
    A, B = rng.normal(size=(2, d, d))
    return rng.normal(size=d), A @ A.T / d + 0.2 * np.eye(d), rng.normal(size=d), B @ B.T / d + 0.1 * np.eye(d)


def references(d):
    rng = np.random.default_rng(3)
    yield "brownian", sf.equations.BrownianMotion(d, 0.8)
    yield "each its own", sf.equations.BrownianMotion(d, np.linspace(0.5, 1.5, d))
    yield (
        "ou",
        sf.equations.OrnsteinUhlenbeck(0.7, 0.3, 0.9)
        if d == 1
        else sf.equations.OrnsteinUhlenbeck(np.linspace(0.2, 2.0, d), 0.3, np.linspace(0.5, 1.5, d)),
    )
    yield "rotating", sf.equations.LinearSDE(0.5 * rng.normal(size=(d, d)), rng.normal(size=d), rng.normal(size=(d, d)))
    if d == 2:
        yield "momentum", sf.equations.Momentum(1, 0.8)
        yield "turning", rotating(1.7)
        yield "growing", sf.equations.BrownianMotion(2, lambda t: jnp.exp(t / 2) * jnp.array([0.5, 0.8]))


CASES = [(name, d, i) for d in (2, 3) for i, (name, _) in enumerate(references(d))]
#: All of them, of which only the kinds that differ most in how they are computed are quick.
MOSTLY_SLOW = [
    pytest.param(*c, marks=[pytest.mark.slow] * (c[0] not in ("ou", "rotating", "turning") or c[1] == 3)) for c in CASES
]


def case(d, i, T=1.3):
    m0, S0, m1, S1 = gaussians(d)
    reference = list(references(d))[i][1]
    return gaussian_sb(m0, S0, m1, S1, reference, t0=0.2, t1=0.2 + T), (m0, S0, m1, S1), reference


def closed_form(m0, S0, m1, S1, reference, T):
    """The covariance of the two ends, by the formula in whitened coordinates, in NumPy."""
    phi, c, q = (np.asarray(v) for v in reference.transition(0.2, 0.2 + T))
    iq = np.linalg.inv(linalg.sqrtm(q).real)
    F = iq @ phi
    V0, V1 = F @ S0 @ F.T, iq @ S1 @ iq
    h = linalg.sqrtm(V0).real
    D = linalg.sqrtm(4 * h @ V1 @ h + np.eye(len(c))).real
    C = (h @ D @ np.linalg.inv(h) - np.eye(len(c))) / 2
    return np.linalg.inv(F) @ C @ linalg.sqrtm(q).real, phi, c, q
