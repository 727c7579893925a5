"""What every bridge does: exact paths, transformations, and words for bad input."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers.bridges import MOSTLY_SLOW, ROTATING, case, closed_form, one

import sdeflow as sf
from sdeflow.bridges import Bridge, Clock, gaussian_sb, light_sb, sinkhorn_bridge

pytestmark = pytest.mark.usefixtures("x64_module")


@pytest.mark.parametrize(("name", "d", "i"), [c for c in MOSTLY_SLOW if c.values[1] == 2])
def test_exact_paths_have_the_moments_of_the_bridge(name, d, i):
    bridge, (m0, S0, m1, S1), reference = case(d, i)
    n, ts = 40_000, jnp.array([0.2, 0.6, 1.1, 1.5])
    x0 = jnp.asarray(np.random.default_rng(0).multivariate_normal(m0, S0, n))
    paths = jax.jit(jax.vmap(lambda x, key: bridge.sample_path(x, ts, key=key)))(x0, jr.split(jr.key(0), n))
    np.testing.assert_array_equal(paths[:, 0], x0)
    # The score is affine, so it gives mean and covariance at every time.
    affine = jax.jit(lambda t: (bridge.score(t, jnp.zeros(d)), jax.jacfwd(lambda x: bridge.score(t, x))(jnp.zeros(d))))
    for k, t in enumerate(ts):
        offset, slope = affine(t)
        S = np.linalg.inv(-np.asarray(slope))
        m = S @ np.asarray(offset)
        size = np.sqrt(np.diagonal(S))
        assert (np.abs((paths[:, k].mean(0) - m) / size) < 5 / np.sqrt(n)).all()
        error = (np.cov(paths[:, k].T) - S) / np.outer(size, size)
        assert (np.abs(error) < 5 * np.sqrt(2 / n)).all()
    # Two times together: the plan of the reference tied to its ends.
    C, *_ = closed_form(m0, S0, m1, S1, reference, 1.3)
    both = np.cov(np.concatenate([paths[:, 0], paths[:, -1]], axis=1).T)[:d, d:]
    size = np.sqrt(np.outer(np.diagonal(S0), np.diagonal(S1)))
    assert (np.abs(both - C) / size < 5 * np.sqrt(2 / n)).all()


def test_a_path_of_the_sde_reaches_the_target_of_a_rotating_reference():
    A, b, L = ROTATING
    m1, S1 = jnp.array([1.0, -0.5]), jnp.array([[0.5, 0.1], [0.1, 0.3]])
    bridge = gaussian_sb(jnp.zeros(2), jnp.eye(2), m1, S1, sf.equations.LinearSDE(A, b, L), t1=1.3)
    x0 = jr.normal(jr.key(0), (20_000, 2))
    grid = sf.grids.uniform(0.0, 1.3, 60)
    run = lambda x, key: sf.solve(bridge.equation(), x, [0.0, 1.3], grid=grid, key=key).final
    y = jax.jit(jax.vmap(run))(x0, jr.split(jr.key(1), len(x0)))
    np.testing.assert_allclose(y.mean(0), m1, atol=0.02)
    np.testing.assert_allclose(jnp.cov(y.T), S1, atol=0.02)


def test_bridges_go_through_jit_vmap_and_grad():
    bridge = case(2, 0)[0]
    xs = jr.normal(jr.key(0), (5, 2))
    batch = jax.jit(jax.vmap(bridge.velocity, in_axes=(None, 0)))(0.7, xs)
    np.testing.assert_allclose(batch[3], bridge.velocity(0.7, xs[3]), rtol=1e-12)

    def end(mean):
        made = gaussian_sb(
            jnp.zeros(2), jnp.diag(jnp.array([1.0, 2.0])), mean, jnp.diag(jnp.array([0.5, 0.7])), bridge.reference
        )
        return made.drift(0.5, xs[0]).sum()

    m, h = jnp.ones(2), 1e-5
    slope = (end(m.at[0].add(h)) - end(m.at[0].add(-h))) / (2 * h)
    np.testing.assert_allclose(jax.grad(end)(m)[0], slope, rtol=1e-7)


X = np.random.default_rng(0).normal(size=(10, 2))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: light_sb(X, X, epsilon=0.0, key=jr.key(0)), ValueError, "epsilon must be positive"),
        (lambda: sinkhorn_bridge(X, X, -1.0), ValueError, "epsilon must be positive"),
        (lambda: sinkhorn_bridge(X, X), ValueError, "one of them, not both"),
        (lambda: sinkhorn_bridge(X, X[:, :1], 1.0), ValueError, "as many columns"),
        (lambda: sinkhorn_bridge(X[:1], X, 1.0), ValueError, "at least two rows"),
        (lambda: sinkhorn_bridge(np.where(X > 2, np.nan, X) * np.nan, X, 1.0), ValueError, "first in row 0"),
        (lambda: light_sb(X, X, epsilon=1.0, num_components=0, key=jr.key(0)), ValueError, "num_components"),
        (lambda: light_sb(X, X, epsilon=1.0, key=jr.key(0), optim=3), TypeError, "optax"),
        (lambda: light_sb(X, X, epsilon=1.0, key=jr.key(0), backward="yes"), ValueError, "backward"),
        (lambda: Clock(sf.equations.BrownianMotion(2), 1.0, 1.0), ValueError, "t0 < t1"),
        (
            lambda: Clock(sf.equations.LinearSDE(np.zeros((2, 2)), np.zeros(2), np.eye(2)[:, :1])),
            ValueError,
            "without noise",
        ),
        (lambda: Clock(sf.ODE(lambda t, y, args: y)), TypeError, "LinearSDE"),
        (lambda: case(2, 0)[0].drift(0.5, X), ValueError, "use jax.vmap"),
        (lambda: case(2, 0)[0].sample_path(X[0], [0.0, 1.0], key=jr.key(0)), ValueError, "must lie between"),
        (
            lambda: gaussian_sb(X[0], np.eye(2), X[1], -np.eye(2), sf.equations.BrownianMotion(2)),
            ValueError,
            "negative",
        ),
        (lambda: gaussian_sb(X[0], np.eye(3), X[1], np.eye(2), sf.equations.BrownianMotion(2)), ValueError, "shape"),
    ],
)
def test_bad_input_is_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_what_needs_a_way_back_says_how_to_get_one():
    bridge = Bridge(Clock(sf.equations.BrownianMotion(2)), one(0.5, 0.0))
    for call in (bridge.velocity, bridge.backward_drift, bridge.score):
        with pytest.raises(ValueError, match="backward="):
            call(0.5, jnp.zeros(2))


def test_times_outside_of_the_horizon_are_refused():
    bridge = gaussian_sb(jnp.zeros(1), jnp.eye(1), jnp.ones(1), jnp.eye(1), sf.equations.BrownianMotion(1), t0=2, t1=4)
    x = jnp.zeros(1)
    for t in (1.0, 7.0):
        for field in (bridge.drift, bridge.backward_drift, bridge.velocity, bridge.score, bridge.endpoint_mean):
            with pytest.raises(ValueError, match=f"t={t:g} lies outside of the bridge's horizon, 2 to 4"):
                field(t, x)
        assert np.isnan(jax.jit(lambda t: bridge.drift(t, x))(t)).all()
    with pytest.raises(ValueError, match="one time"):
        bridge.drift(jnp.array([2.0, 3.0]), x)
    with pytest.raises(sf.SolveError):
        sf.solve(bridge.equation(), x, [0.0, 1.0], dt0=0.5, key=jr.key(0))
    assert np.isfinite(bridge.drift(jnp.nextafter(bridge.t1, 5.0), x)).all()
