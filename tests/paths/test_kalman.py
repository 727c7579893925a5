"""The Kalman recursion against the dense normal law of all observations, to the bit where nothing is observed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sdeflow.paths._kalman import kalman, kalman_smoother

pytestmark = pytest.mark.usefixtures("x64_module")


def problem(n=7, d=3, p=2, seed=0, noise=0.3, missing=0.3):
    """Random gaps, observations and a mask: all in one dictionary of numpy arrays."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(n, d, d)) * 0.4
    start = rng.normal(size=(d, d))
    mask = rng.uniform(size=(n, p)) > missing
    R = np.diag(np.full(p, noise**2))
    return dict(
        gaps=(rng.normal(size=(n, d, d)) * 0.5, rng.normal(size=(n, d)), root @ root.swapaxes(1, 2)),
        H=rng.normal(size=(p, d)),
        R=R,
        ys=np.where(mask, rng.normal(size=(n, p)), np.nan),
        mask=mask,
        mean=rng.normal(size=d),
        covariance=start @ start.T,
    )


def joint(gaps, mean, covariance):
    """Mean (n, d) and covariance (n, d, n, d) of the states at all rows, straight from the recursion of the law."""
    Phi, c, Q = (np.asarray(x) for x in gaps)
    n, d = c.shape
    means, cross = np.zeros((n, d)), np.zeros((n, d, n, d))
    m, P = np.asarray(mean), np.asarray(covariance)
    for k in range(n):
        m, P = Phi[k] @ m + c[k], Phi[k] @ P @ Phi[k].T + Q[k]
        means[k], cross[k, :, k] = m, P
        for j in range(k):
            cross[k, :, j] = Phi[k] @ cross[k - 1, :, j]
            cross[j, :, k] = cross[k, :, j].T
    return means, cross


def dense(gaps, H, R, ys, mask, mean, covariance):
    """The log density of what was observed and the law of all states given it, with the other rows left out."""
    means, cross = joint(gaps, mean, covariance)
    n, d = means.shape
    H = np.broadcast_to(H, (n, *H.shape[-2:]))
    R = np.broadcast_to(R, (n, *R.shape[-2:]))
    of_states = cross.reshape(n * d, n * d)
    seen = np.ravel(mask)
    G = np.zeros((n, H.shape[1], n, d))
    noise = np.zeros((n, H.shape[1], n, H.shape[1]))
    for k in range(n):
        G[k, :, k], noise[k, :, k] = H[k], R[k]
    G, noise = G.reshape(seen.size, n * d)[seen], noise.reshape(seen.size, seen.size)[seen][:, seen]
    S, y = G @ of_states @ G.T + noise, np.ravel(ys)[seen]
    expected = G @ means.ravel()
    gain = np.linalg.solve(S, G @ of_states).T
    log_prob = stats.multivariate_normal(expected, S).logpdf(y) if seen.any() else 0.0
    smoothed = (means.ravel() + gain @ (y - expected)).reshape(n, d)
    left = (of_states - gain @ G @ of_states).reshape(n, d, n, d)
    return log_prob, smoothed, np.stack([left[k, :, k] for k in range(n)])


CASES = {
    "random": {},
    "one": dict(n=1, d=1, p=1, missing=0.0),
    "scalar observations": dict(d=3, p=1),
    "more observations than states": dict(d=2, p=4),
    "nothing missing": dict(missing=0.0),
    "nothing observed": dict(missing=1.0),
    "noise-free": dict(d=4, p=2, noise=0.0),
    "noise-free scalar": dict(d=3, p=1, noise=0.0),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_filter_and_smoother_are_the_dense_normal_law(name, seed):
    given = problem(seed=seed, **CASES[name])
    log_prob, mean, covariance = dense(**given)
    found, (filtered_mean, filtered_covariance) = kalman(**given, moments=True)
    np.testing.assert_allclose(found, log_prob, rtol=1e-10, atol=1e-12)
    np.testing.assert_array_equal(found, kalman(**given))
    smoothed = kalman_smoother(**given)
    np.testing.assert_allclose(smoothed[1][0], mean, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(smoothed[1][1], covariance, rtol=1e-8, atol=1e-9)
    np.testing.assert_array_equal(smoothed[0], found)
    # The filter at row k knows rows up to k.
    for k in range(len(given["ys"])):
        past = given | {"mask": np.where(np.arange(len(given["ys"]))[:, None] <= k, given["mask"], False)}
        _, mean, covariance = dense(**past)
        np.testing.assert_allclose(filtered_mean[k], mean[k], rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(filtered_covariance[k], covariance[k], rtol=1e-8, atol=1e-9)


def test_operators_and_noise_may_change_from_row_to_row():
    given, rng = problem(), np.random.default_rng(5)
    root = rng.normal(size=(7, 2, 2))
    given |= dict(H=rng.normal(size=(7, 2, 3)), R=root @ root.swapaxes(1, 2))
    log_prob, mean, covariance = dense(**given)
    found, smoothed = kalman_smoother(**given)
    np.testing.assert_allclose(found, log_prob, rtol=1e-11)
    np.testing.assert_allclose(smoothed[0], mean, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(smoothed[1], covariance, rtol=1e-9, atol=1e-10)


def padded(given, count):
    """More rows after the last one: no time passes and nothing is observed."""
    Phi, c, Q = given["gaps"]
    d, p = c.shape[1], given["ys"].shape[1]
    longer = lambda x, row: np.concatenate([x, np.broadcast_to(row, (count, *np.shape(row))).astype(x.dtype)])
    return given | dict(
        gaps=(longer(Phi, np.eye(d)), longer(c, np.zeros(d)), longer(Q, np.zeros((d, d)))),
        ys=longer(given["ys"], np.full(p, np.nan)),
        mask=longer(given["mask"], np.zeros(p, bool)),
    )


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("random", "float32"),
        ("scalar observations", "float64"),
        pytest.param("random", "float64", marks=pytest.mark.slow),
        pytest.param("scalar observations", "float32", marks=pytest.mark.slow),
        pytest.param("noise-free", "float32", marks=pytest.mark.slow),
        ("noise-free", "float64"),
    ],
)
def test_a_padded_tail_changes_no_bit(name, dtype):
    given = jax.tree.map(lambda x: x if x.dtype == bool else x.astype(dtype), problem(**CASES[name]))
    run = jax.jit(lambda given: (kalman(**given, moments=True), kalman_smoother(**given)))
    gradient = jax.jit(jax.grad(lambda m, P, given: kalman(**given | dict(mean=m, covariance=P)), argnums=(0, 1)))
    wanted = run(given), gradient(given["mean"], given["covariance"], given)
    for count in (1, 100) if name == "random" else (100,):
        longer = padded(given, count)
        found = run(longer), gradient(longer["mean"], longer["covariance"], longer)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            assert a.dtype == dtype
            np.testing.assert_array_equal(a[: len(b)] if a.ndim else a, b)


def test_nothing_observed_contributes_exactly_nothing():
    given = problem(missing=1.0)
    assert float(kalman(**given)) == 0.0


def test_derivatives_are_finite_where_entries_are_missing_and_equal_finite_differences():
    given = problem()
    arrays = {k: v for k, v in given.items() if k != "mask"}
    value = lambda arrays: kalman(**arrays, mask=given["mask"])
    gradient = jax.jit(jax.grad(value))(arrays)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
    assert not np.asarray(gradient["ys"])[~given["mask"]].any()
    rng = np.random.default_rng(3)
    # Covariances move as symmetric matrices.
    both = lambda x: x + np.swapaxes(x, -1, -2)
    way = jax.tree.map(lambda x: rng.normal(size=x.shape), arrays)
    way["ys"] = np.where(given["mask"], way["ys"], 0.0)
    way["gaps"] = (*way["gaps"][:2], both(way["gaps"][2]))
    way["R"], way["covariance"] = both(way["R"]), both(way["covariance"])
    along = sum(float((g * w).sum()) for g, w in zip(jax.tree.leaves(gradient), jax.tree.leaves(way)))
    at = lambda e: float(value(jax.tree.map(lambda x, w: x + e * w, arrays, way)))
    np.testing.assert_allclose(along, (at(1e-5) - at(-1e-5)) / 2e-5, rtol=1e-6)
    np.testing.assert_allclose(jax.jvp(value, (arrays,), (way,))[1], along, rtol=1e-9)


@pytest.mark.parametrize("name", ["noise-free", "noise-free scalar", "scalar observations"])
def test_the_gradients_of_noise_free_and_smoothed_moments_are_finite(name):
    given = problem(**CASES[name])
    mask = given.pop("mask")

    def value(given):
        log_prob, (mean, covariance) = kalman_smoother(**given, mask=mask)
        return log_prob + jnp.sin(mean).sum() + jnp.cos(covariance).sum()

    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.jit(jax.grad(value))(given)))


def test_a_batch_is_its_members():
    members = [problem(seed=seed) for seed in range(3)]
    batch = jax.tree.map(lambda *x: np.stack(x), *members)
    found = jax.jit(jax.vmap(lambda given: kalman_smoother(**given)))(batch)
    for i, given in enumerate(members):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(kalman_smoother(**given))):
            np.testing.assert_allclose(a[i], b, rtol=1e-10, atol=1e-12)


def test_singular_covariances_between_rows_are_smoothed():
    # A start that is known, a state without noise of its own, and rows at one time: no inverse of a prediction exists.
    given = problem(n=5, d=2, p=1, missing=0.0, noise=0.5)
    Phi, c, Q = given["gaps"]
    Q = Q * np.array([[1.0, 0.0], [0.0, 0.0]])
    Phi[2], c[2], Q[2] = np.eye(2), 0.0, 0.0
    given |= dict(gaps=(Phi, c, Q), covariance=np.zeros((2, 2)))
    _, mean, covariance = dense(**given)
    _, (found_mean, found_covariance) = kalman_smoother(**given)
    np.testing.assert_allclose(found_mean, mean, atol=1e-12)
    np.testing.assert_allclose(found_covariance, covariance, atol=1e-12)
