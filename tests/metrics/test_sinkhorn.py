"""Sinkhorn: Gaussian and two-point closed forms, other solvers, derivatives, rounding, and bad input."""

import warnings

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers.processes import PEAK_GIB, last_number
from helpers.stats import assert_mean

import sdeflow as sf

pytestmark = pytest.mark.usefixtures("x64_module")

sinkhorn, sinkhorn_divergence = sf.metrics.sinkhorn, sf.metrics.sinkhorn_divergence


def two_clouds(n=30, m=40, D=3, seed=0):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, D)), 0.7 * rng.normal(size=(m, D)) + 0.5
    a, b = rng.uniform(0.2, 1, n), rng.uniform(0.2, 1, m)
    return x, y, a / a.sum(), b / b.sum()


def costs(x, y):
    return ((x[:, None] - y) ** 2).sum(-1) / 2


def kl(p, q):
    positive = p > 0
    return (p[positive] * np.log(p[positive] / q[positive])).sum() - p.sum() + q.sum()


def value(P, C, a, b, epsilon, rho=None):
    """The functional that the plan minimises, from its definition."""
    out = (P * C).sum() + epsilon * kl(P, np.outer(a, b))
    return out if rho is None else out + rho[0] * kl(P.sum(1), a) + rho[1] * kl(P.sum(0), b)


# ---- Against closed forms. ----


def test_the_covariance_between_gaussians_is_that_of_the_bridge():
    # 1500 quantiles in place of draws, so that no noise is left; the rest is the tails, which they cut.
    from scipy.stats import norm

    z = norm.ppf((np.arange(1500) + 0.5) / 1500)
    x, y = z, 1 + 0.5 * z[np.random.default_rng(0).permutation(1500)]
    coupling = sinkhorn(x, y, 0.5, tolerance=1e-8)
    found = (x - x.mean()) @ np.asarray(coupling.plan()) @ (y - y.mean())
    wanted = (np.sqrt(4 * x.var() * y.var() + 0.25) - 0.5) / 2
    np.testing.assert_allclose(found, wanted, atol=2e-4)
    # And of draws, as it is not their Gaussian's.
    x, y = np.random.default_rng(0).normal(size=(2, 1500)) * [[1], [0.5]]
    found = (x - x.mean()) @ np.asarray(sinkhorn(x, y, 0.5, tolerance=1e-8).plan()) @ (y - y.mean())
    np.testing.assert_allclose(found, (np.sqrt(4 * x.var() * y.var() + 0.25) - 0.5) / 2, atol=1e-3)


@pytest.mark.parametrize(
    ("masses", "cost", "epsilon", "rho", "mass"),
    [((1.0, 1.0), 1.0, 0.5, 2.0, 0.8007374), ((2.0, 0.7), 0.3, 0.1, 1.0, 1.0339539)],
)
def test_two_points_of_soft_mass(masses, cost, epsilon, rho, mass):
    a, b = (np.array([m]) for m in masses)
    x, y = np.zeros((1, 2)), np.array([[np.sqrt(2 * cost), 0]])
    closed = np.prod(masses) ** ((epsilon + rho) / (epsilon + 2 * rho)) * np.exp(-cost / (epsilon + 2 * rho))
    np.testing.assert_allclose(closed, mass, atol=1e-7)
    tight = sinkhorn(x, y, epsilon, a=a, b=b, rho=rho, tolerance=1e-10)
    np.testing.assert_allclose(tight.plan(), [[mass]], atol=1e-6)
    np.testing.assert_allclose(tight.plan(), [[closed]], rtol=1e-9)
    np.testing.assert_allclose(sinkhorn(x, y, epsilon, a=a, b=b, rho=rho).plan(), [[closed]], rtol=2e-3)


def test_the_soft_plan_tends_to_the_balanced_one_and_infinite_rho_is_balanced():
    x, y, a, b = two_clouds()
    balanced = sinkhorn(x, y, 0.3, a=a, b=b, tolerance=1e-9)
    off = [
        abs(sinkhorn(x, y, 0.3, a=a, b=b, rho=rho, tolerance=1e-9).plan() - balanced.plan()).sum() for rho in (1e2, 1e4)
    ]
    assert off[1] < 2e-4
    np.testing.assert_allclose(off[0] / off[1], 100, rtol=0.1)
    infinite = sinkhorn(x, y, 0.3, a=3 * a, b=b, rho=(np.inf, np.inf), tolerance=1e-9)
    np.testing.assert_array_equal(infinite.plan(), sinkhorn(x, y, 0.3, a=3 * a, b=b, tolerance=1e-9).plan())


def test_one_marginal_may_be_held_and_the_other_soft():
    x, y, a, b = two_clouds()
    coupling = sinkhorn(x, y, 0.3, a=2 * a, b=b, rho=(np.inf, 1.0), tolerance=1e-10)
    np.testing.assert_allclose(coupling.plan().sum(1), 2 * a, rtol=1e-9)
    r, c = coupling.marginals()
    np.testing.assert_allclose(c, b * np.exp(-coupling.g), rtol=1e-8)
    np.testing.assert_allclose(r, 2 * a, rtol=1e-9)


@pytest.mark.parametrize("rho", [None, 0.5, (5.0, 0.2), 1000.0])
def test_the_plan_minimises_its_functional_and_the_dual_has_its_value(rho):
    x, y, a, b = two_clouds()
    if rho is not None:
        a = 2 * a
    coupling = sinkhorn(x, y, 0.3, a=a, b=b, rho=rho, tolerance=1e-11)
    P, C = np.asarray(coupling.plan()), costs(x, y)
    pair = rho if isinstance(rho, tuple | None) else (rho, rho)
    np.testing.assert_allclose(coupling.regularised(), value(P, C, a, b, 0.3, pair), rtol=1e-9)
    np.testing.assert_allclose(coupling.cost(), (P * C).sum(), rtol=1e-12)
    np.testing.assert_allclose(coupling.transport(), P @ y / P.sum(1, keepdims=True), rtol=1e-10)
    np.testing.assert_allclose(a[:, None] * b * np.exp((coupling.f[:, None] + coupling.g - C) / 0.3), P, rtol=1e-9)
    # Against other plans: those that keep the marginals, or any.
    rng = np.random.default_rng(1)
    for _ in range(5):
        other = P * (1 + 1e-3 * rng.normal(size=P.shape))
        if rho is None:
            # Scaled back to the marginals.
            for _ in range(500):
                other *= (a / other.sum(1))[:, None]
                other *= b / other.sum(0)
        assert value(other, C, a, b, 0.3, pair) > value(P, C, a, b, 0.3, pair)


# ---- Against other solvers. ----


@pytest.mark.parametrize("epsilon", [1.0, 0.1])
def test_pot_finds_the_same_plans(epsilon):
    ot = pytest.importorskip("ot")
    x, y, a, b = two_clouds()
    C = costs(x, y)
    coupling = sinkhorn(x, y, epsilon, a=a, b=b, tolerance=1e-11, max_iterations=20_000)
    other = ot.sinkhorn(a, b, C, epsilon, method="sinkhorn_log", stopThr=1e-13, numItermax=100_000)
    np.testing.assert_allclose(coupling.plan(), other, atol=1e-10)
    soft = sinkhorn(x, y, epsilon, a=2 * a, b=b, rho=1.5, tolerance=1e-11)
    other = ot.unbalanced.sinkhorn_knopp_unbalanced(2 * a, b, C, epsilon, 1.5, stopThr=1e-14, numItermax=100_000)
    np.testing.assert_allclose(soft.plan(), other, atol=1e-10)


def test_a_small_epsilon_gives_the_exact_cost():
    ot = pytest.importorskip("ot")
    x, y, a, b = two_clouds(20, 20)
    exact = ot.emd2(a, b, costs(x, y))
    coupling = sinkhorn(x, y, 1e-3, a=a, b=b, tolerance=1e-6, max_iterations=100_000)
    assert exact <= coupling.cost() + 1e-5
    np.testing.assert_allclose(coupling.cost(), exact, rtol=1e-3)


def test_ott_finds_the_same_plan_for_twice_the_epsilon():
    pytest.importorskip("ott")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ott.geometry import pointcloud
        from ott.problems.linear import linear_problem
        from ott.solvers.linear import sinkhorn as other

        x, y, a, b = two_clouds()
        geometry = pointcloud.PointCloud(jnp.asarray(x), jnp.asarray(y), epsilon=2 * 0.3)
        problem = linear_problem.LinearProblem(geometry, jnp.asarray(a), jnp.asarray(b))
        out = other.Sinkhorn(threshold=1e-11, max_iterations=20_000)(problem)
        # Its soft problem is another one: there the entropy is not relative to the weights.
        np.testing.assert_allclose(sinkhorn(x, y, 0.3, a=a, b=b, tolerance=1e-11).plan(), out.matrix, atol=1e-9)


# ---- What must not matter. ----


def test_points_of_weight_zero_and_the_order_change_nothing():
    x, y, a, b = two_clouds()
    plain = sinkhorn(x, y, 0.3, a=a, b=b, tolerance=1e-9)
    far = np.full((5, 3), 1e3)
    padded = sinkhorn(
        np.vstack([x, far]),
        np.vstack([far, y]),
        0.3,
        a=np.r_[a, 0 * far[:, 0]],
        b=np.r_[0 * far[:, 0], b],
        tolerance=1e-9,
    )
    assert int(padded.num_iterations) == int(plain.num_iterations)
    np.testing.assert_allclose(padded.plan()[:30, 5:], plain.plan(), rtol=1e-10, atol=1e-17)
    assert not np.asarray(padded.plan()[30:]).any()
    assert not np.asarray(padded.plan()[:, :5]).any()
    np.testing.assert_allclose(padded.regularised(), plain.regularised(), rtol=1e-12)
    order = np.random.default_rng(0).permutation(30)
    turned = sinkhorn(x[order], y, 0.3, a=a[order], b=b, tolerance=1e-9)
    np.testing.assert_allclose(turned.plan(), plain.plan()[order], rtol=1e-10)


@pytest.mark.parametrize(("rho", "chunk"), [(None, 1), (None, 7), (1.0, 7), (None, 100)])
def test_blocks_of_any_size_find_the_same(rho, chunk):
    x, y, a, b = two_clouds()
    plain = sinkhorn(x, y, 0.3, a=a, b=b, rho=rho, tolerance=1e-9)
    blocks = sinkhorn(x, y, 0.3, a=a, b=b, rho=rho, tolerance=1e-9, chunk=chunk)
    for read in (lambda c: c.plan(), lambda c: c.cost(), lambda c: c.transport(), lambda c: c.regularised()):
        np.testing.assert_allclose(read(blocks), read(plain), rtol=1e-9)


def test_far_clouds_are_as_exact_in_float32_as_near_ones():
    x, y, a, b = two_clouds()
    wanted = sinkhorn(x, y, 0.3, tolerance=1e-6).plan()
    with jax.enable_x64(False):
        for there in (0.0, 1e4):
            u, v = np.float32(x) + np.float32(there), np.float32(y) - np.float32(there)
            found = sinkhorn(u, v, 0.3, tolerance=1e-5)
            assert found.plan().dtype == jnp.float32
            assert float(found.error) <= 1e-5
            rounded = (x, y) if there == 0 else (np.float64(u) - there, np.float64(v) + there)
            with jax.enable_x64(True):
                wanted = sinkhorn(*rounded, 0.3, tolerance=1e-6).plan()
            np.testing.assert_allclose(found.plan(), wanted, atol=1e-6)


def test_it_works_under_jit_and_vmap():
    x, y, a, b = two_clouds()
    plan = lambda x, epsilon: (lambda c: (c.plan(), c.result, c.num_iterations))(
        sinkhorn(x, y, epsilon, a=a, b=b, tolerance=1e-8)
    )
    xs = np.stack([x, x[::-1] + 1])
    epsilons = jnp.array([0.3, 0.6])
    plans, results, counts = jax.jit(jax.vmap(plan))(xs, epsilons)
    assert bool(sf.is_okay(results).all())
    for k in range(2):
        alone = sinkhorn(xs[k], y, float(epsilons[k]), a=a, b=b, tolerance=1e-8)
        np.testing.assert_allclose(plans[k], alone.plan(), rtol=1e-10)
        assert int(counts[k]) == int(alone.num_iterations)


# ---- Derivatives. ----


@pytest.mark.parametrize(("rho", "chunk"), [(None, None), (0.8, 7)])
def test_the_derivatives_of_the_value_are_finite_differences(rho, chunk):
    x, y, a, b = two_clouds(12, 15)
    rng = np.random.default_rng(2)

    def loss(p):
        x, y, a, b, epsilon, rho = p
        return sinkhorn(
            x, y, epsilon, a=a, b=b, rho=rho, tolerance=1e-12, max_iterations=5000, chunk=chunk
        ).regularised()

    at = (x, y + 3, 2 * a, b, np.float64(0.4), None if rho is None else np.float64(rho))
    gradient = jax.jit(jax.grad(loss))(at)
    loss = jax.jit(loss)
    for k in range(6 if rho else 5):
        way = list(jax.tree.map(np.zeros_like, at))
        way[k] = rng.normal(size=np.shape(at[k])) * at[k]
        move = lambda e: tuple(None if u is None else u + e * v for u, v in zip(at, way))
        h = 1e-5
        wanted = (float(loss(move(h))) - float(loss(move(-h)))) / (2 * h)
        np.testing.assert_allclose(np.sum(gradient[k] * way[k]), wanted, rtol=1e-6, atol=1e-9)


def test_second_derivatives_are_refused_and_the_rest_is_constant():
    x, y, *_ = two_clouds(5, 6)
    with pytest.raises(NotImplementedError, match="first derivatives only"):
        jax.hessian(lambda x: sinkhorn(x, y, 0.5).regularised())(x)
    coupling = sinkhorn(x, y, 0.5)
    read = lambda c: c.cost() + c.transport().sum() + c.plan()[0, 0] + c.marginals()[1][0] + c.f[0] + c.g[0]
    constant = eqx.filter_jit(eqx.filter_grad(read))(coupling)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(constant))
    # In forward mode as in reverse.
    along = jax.jit(lambda x: jax.jvp(lambda x: sinkhorn(x, y, 0.5).regularised(), (x,), (x,))[1])(x)
    back = jax.jit(jax.grad(lambda x: sinkhorn(x, y, 0.5).regularised()))(x)
    np.testing.assert_allclose(along, (back * x).sum(), rtol=1e-10)


@pytest.mark.parametrize("rho", [None, 2.0])
def test_the_divergence_is_zero_for_equal_clouds_and_its_gradient_is_exact(rho):
    x, y, a, b = two_clouds(12, 15)
    options = {"rho": rho, "tolerance": 1e-11, "max_iterations": 5000}
    np.testing.assert_allclose(sinkhorn_divergence(x, x, 0.4, a=a, b=a, **options), 0, atol=1e-12)
    at = jax.jit(lambda x, a: sinkhorn_divergence(x, y, 0.4, a=a, b=b, **options))
    assert at(x, 2 * a) > 0
    way, tilt = np.random.default_rng(0).normal(size=(2, *x.shape))
    gradient = jax.grad(at, argnums=(0, 1))(x, 2 * a)
    along = (gradient[0] * way).sum() + (gradient[1] * a * tilt[:, 0]).sum()
    move = lambda e: float(at(x + e * way, a * (2 + e * tilt[:, 0])))
    np.testing.assert_allclose(along, (move(1e-5) - move(-1e-5)) / 2e-5, rtol=1e-6)


def test_the_divergence_lies_between_the_two_distances_that_it_joins():
    x, y, *_ = two_clouds(25, 25)
    np.testing.assert_allclose(
        sinkhorn_divergence(x, y, 1e4, tolerance=1e-9), ((x.mean(0) - y.mean(0)) ** 2).sum() / 2, rtol=1e-3
    )
    exact = sf.metrics.wasserstein(x, y, 2) ** 2 / 2
    small = sinkhorn_divergence(x, y, 2e-3, max_iterations=50_000)
    np.testing.assert_allclose(small, exact, rtol=2e-3)
    np.testing.assert_allclose(sinkhorn_divergence(x, x + 2.0, 0.5, tolerance=1e-9), 6.0, rtol=1e-8)


def test_the_divergence_of_gaussians_is_the_closed_form():
    # OT_eps(N(0, s), N(0, t)) - the two halves, with B(s, t) = sqrt(4 s t + e^2): Janati et al. 2020, for |x - y|^2 / 2.
    from scipy.stats import norm

    z, e, s, t = norm.ppf((np.arange(2000) + 0.5) / 2000), 0.5, 1.0, 0.25
    z = z / z.std()
    B = lambda s, t: np.sqrt(4 * s * t + e**2)
    entropic = lambda s, t: (s + t - B(s, t) + e * np.log(B(s, t) + e) - e * np.log(2 * e) + e) / 2
    wanted = entropic(s, t) - (entropic(s, s) + entropic(t, t)) / 2
    np.testing.assert_allclose(sinkhorn_divergence(z, 0.5 * z, e, tolerance=1e-8), wanted, rtol=3e-3)


def test_a_cloud_with_itself_has_one_potential_and_few_iterations():
    x, _, a, _ = two_clouds()
    for rho in (None, 1.0):
        pair = sinkhorn(x, x, 0.3, a=a, b=a, rho=rho, tolerance=1e-9, max_iterations=50_000)
        alone = sinkhorn(x, None, 0.3, a=a, rho=rho, tolerance=1e-9)
        np.testing.assert_array_equal(alone.f, alone.g)
        np.testing.assert_allclose(alone.plan(), pair.plan(), atol=1e-8)
        np.testing.assert_allclose(alone.regularised(), pair.regularised(), rtol=1e-8)
        assert int(alone.num_iterations) < 50
        assert rho or int(pair.num_iterations) > 100
        wanted = a * np.exp(-alone.f / rho) if rho else a
        np.testing.assert_allclose(abs(alone.plan().sum(0) - wanted).sum() / wanted.sum(), alone.error, rtol=1e-5)


# ---- Draws. ----


def test_draws_follow_the_rows_of_the_plan_and_depend_on_their_place_alone():
    x, y, a, b = two_clouds(4, 5)
    coupling = sinkhorn(x, y, 0.5, a=a, b=b, tolerance=1e-8)
    drawn = np.asarray(coupling.sample(jnp.full((8, 2000), 2), key=jr.key(0)))
    rows = coupling.plan() / coupling.plan().sum(1, keepdims=True)
    for j in range(5):
        assert_mean(drawn == j, float(rows[2, j]))
    np.testing.assert_array_equal(coupling.sample(jnp.full(10, 2), key=jr.key(0)), drawn.ravel()[:10])
    new = np.exp(coupling.logits(x + 0.3))
    weights = b * np.exp((coupling.g - costs(x + 0.3, y)) / 0.5)
    np.testing.assert_allclose(new / new.sum(1, keepdims=True), weights / weights.sum(1, keepdims=True), rtol=1e-9)


# ---- Failures. ----


def test_what_does_not_converge_says_so():
    x, y, *_ = two_clouds()
    with pytest.raises(sf.SolveError, match=r"after 12 the marginal error is .* above the tolerance 1e-09") as caught:
        sinkhorn(x, y, 0.01, tolerance=1e-9, max_iterations=12)
    assert caught.value.result == sf.RESULTS.sinkhorn_not_converged
    short = sinkhorn(x, y, 0.01, tolerance=1e-9, max_iterations=12, throw=False)
    traced = eqx.filter_jit(sinkhorn)(x, y, 0.01, tolerance=1e-9, max_iterations=12)
    for coupling in (short, traced):
        assert coupling.result == sf.RESULTS.sinkhorn_not_converged
        np.testing.assert_allclose(abs(coupling.plan().sum(0) - 1 / 40).sum(), coupling.error, rtol=1e-8)
        np.testing.assert_allclose(coupling.plan().sum(1), 1 / 30, rtol=1e-10)
        assert np.isfinite(coupling.regularised())
    with pytest.raises(sf.SolveError):
        sinkhorn_divergence(x, y, 0.01, tolerance=1e-9, max_iterations=12)
    loss = lambda x, throw: sinkhorn_divergence(x, y, 0.01, tolerance=1e-9, max_iterations=12, throw=throw)
    assert np.isnan(jax.jit(loss, static_argnums=1)(x, True))
    assert np.isfinite(jax.jit(loss, static_argnums=1)(x, False))


@pytest.mark.parametrize("epsilon", [1e-30, 1e-9, 1e-6])
def test_an_epsilon_below_what_float32_tells_apart_is_no_convergence(epsilon):
    x, y, *_ = two_clouds()
    with jax.enable_x64(False):
        x, y = np.float32(x), np.float32(y)
        with pytest.raises(sf.SolveError, match="too small for float32"):
            sinkhorn(x, y, epsilon)
        coupling = sinkhorn(x, y, epsilon, throw=False)
        assert coupling.result == sf.RESULTS.sinkhorn_not_converged
        assert not np.isnan(coupling.regularised())
        assert not np.isnan(coupling.plan()).any()


def test_a_jump_to_a_small_epsilon_stays_finite_and_converges():
    x, y, *_ = two_clouds()
    jump = sinkhorn(x, y + 5, 0.01, anneal=1e-9, tolerance=1e-6, max_iterations=20_000)
    slow = sinkhorn(x, y + 5, 0.01, tolerance=1e-6, max_iterations=20_000)
    np.testing.assert_allclose(jump.plan(), slow.plan(), atol=1e-6)
    with jax.enable_x64(False):
        assert float(sinkhorn(np.float32(x), np.float32(y + 5), 0.01, max_iterations=20_000).error) <= 1e-3


def bad(x=None, y=None, epsilon=0.5, itself=False, **options):
    u, v, *_ = two_clouds()
    return sinkhorn(u if x is None else x, None if itself else v if y is None else y, epsilon, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epsilon": 0.0}, "epsilon must be positive"),
        ({"epsilon": -1.0}, "epsilon must be positive"),
        ({"epsilon": np.nan}, "epsilon must be positive"),
        ({"epsilon": np.ones(2)}, "epsilon must be one number"),
        ({"rho": 0.0}, "rho must be positive"),
        ({"rho": (1.0, 2.0, 3.0)}, "one for each marginal"),
        ({"tolerance": 0.0}, "tolerance must be positive"),
        ({"anneal": 1.0}, "anneal must lie between"),
        ({"max_iterations": 0}, "max_iterations must be at least 1"),
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"x": np.zeros((3, 2))}, "must have one dimension"),
        ({"x": np.zeros((0, 3))}, "shape"),
        ({"x": np.full((3, 3), np.nan)}, "x has points that are infinite or NaN"),
        ({"y": np.full((3, 3), np.inf)}, "y has points that are infinite or NaN"),
        ({"b": np.ones(40), "itself": True}, "b must be None where y is"),
        ({"rho": (1.0, 2.0), "itself": True}, "one for each marginal of two clouds"),
        ({"a": np.ones(3)}, r"a must have shape \(30,\)"),
        ({"a": -np.ones(30)}, "none is negative"),
        ({"b": np.zeros(40)}, "one is positive"),
        ({"b": np.full(40, np.nan), "rho": 1.0}, "finite weights"),
    ],
)
def test_bad_input_is_an_error_that_says_what(options, says):
    with pytest.raises(ValueError, match=says):
        bad(**options)


def test_masses_are_divided_by_their_sum_where_the_plan_is_balanced():
    x, y, a, b = two_clouds()
    found = sinkhorn(x, y, 0.5, a=7 * a, b=0.1 * b, tolerance=1e-9)
    np.testing.assert_allclose(found.plan(), sinkhorn(x, y, 0.5, a=a, b=b, tolerance=1e-9).plan(), rtol=1e-10)
    one = sinkhorn(np.zeros((1, 3)), y, 0.5, b=b)
    np.testing.assert_allclose(one.plan(), b[None], rtol=1e-10)


# ---- Many points, many devices. ----

_BIG = """
import jax, numpy as np, sdeflow as sf
rng = np.random.default_rng(0)
x, y = np.float32(rng.normal(size=(20_000, 50))), np.float32(rng.normal(size=(20_000, 50)) + 0.3)
def loss(x):
    coupling = sf.metrics.sinkhorn(x, y, 10.0, max_iterations=2, throw=False)
    return coupling.regularised(), coupling
gradient, coupling = jax.grad(loss, has_aux=True)(x)
assert np.isfinite(gradient).all() and np.isfinite(coupling.transport()).all() and np.isfinite(coupling.cost())
"""

_DEVICES = """
import jax, numpy as np, sdeflow as sf
from jax.sharding import NamedSharding, PartitionSpec
jax.config.update("jax_enable_x64", True)
rng = np.random.default_rng(0)
x, y = rng.normal(size=(64, 3)), rng.normal(size=(50, 3)) + 0.5
mesh = jax.make_mesh((4,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
shared = jax.device_put(x, NamedSharding(mesh, PartitionSpec("rows")))
for options in ({}, {"chunk": 16}, {"rho": 1.0}):
    solve = lambda x: (lambda c: (c.plan(), c.regularised()))(sf.metrics.sinkhorn(x, y, 0.3, tolerance=1e-9, **options))
    for one, four in zip(solve(x), solve(shared)):
        assert np.abs(np.asarray(one) - np.asarray(four)).max() < 1e-6 * np.abs(one).max()
    one, four = (jax.grad(lambda x: solve(x)[1])(z) for z in (x, shared))
    np.testing.assert_allclose(one, four, atol=1e-8)
print(len(shared.sharding.device_set))
"""


@pytest.mark.slow
def test_twenty_thousand_points_a_side_fit_in_memory():
    assert last_number(_BIG + PEAK_GIB) < 2


@pytest.mark.slow
def test_four_devices_find_what_one_finds():
    assert last_number(_DEVICES, XLA_FLAGS="--xla_force_host_platform_device_count=4") == 4
