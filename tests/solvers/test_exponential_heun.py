"""The exponential method for fractional noise: weak error without Monte Carlo, exact solutions, trees, gradients."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.stats import assert_mean
from scipy import integrate, linalg
from scipy.special import eval_legendre

import sdeflow as sf
from sdeflow.equations import FractionalSDE
from sdeflow.paths._factor_brownian import FactorIncrement
from sdeflow.paths._markov_fractional import factor_covariance
from sdeflow.paths._rows import RowPath
from sdeflow.solvers._exponential_heun import _legendre

pytestmark = pytest.mark.usefixtures("x64_module")
Noise = sf.paths.MarkovFractionalNoise
Heun = sf.solvers.ExponentialHeun
decay = lambda t, x, args: -x
half = lambda t, x, args: jnp.full_like(x, 1.0)
growing = lambda t, x, args: 0.5 * x


def noise_of(hurst, fastest, **options):
    return Noise(hurst, 1.0, kind="II", rates=np.geomspace(0.05, fastest, 5), normalise=False, **options)


# ---- Weak error: the solver's step is linear here, so its moments are a recursion. ----


def variance_after(noise, n):
    """Of the Ornstein-Uhlenbeck equation from 0 at time 1, in n steps."""
    sde, h, K = FractionalSDE(decay, half, noise, additive=True), jnp.asarray(1 / n), noise.num_factors

    def step(z, driven):
        row = FactorIncrement(h, jnp.zeros(()), driven)
        terms = sde.terms(RowPath(jnp.zeros(()), h, row, FactorIncrement))
        state = sf.equations.FractionalState(z[0], z[1:])
        y1, *_ = Heun().step(terms, terms.terms[1].control.left, h, state, None, None, False)
        return jnp.concatenate([y1.x[None], y1.factors])

    A, B = (np.asarray(jax.jit(jax.jacfwd(step, i))(jnp.zeros(K + 1), jnp.zeros(K))) for i in (0, 1))
    Q, P = np.asarray(factor_covariance(tuple(noise.rates), h)), np.zeros((K + 1, K + 1))
    for _ in range(n):
        P = A @ P @ A.T + B @ Q @ B.T
    return P[0, 0]


def exact_variance(noise):
    """Of the linear equation for X and the factors, by Lyapunov's equation."""
    g, w = noise.rates, np.asarray(noise.coefficients())
    F = np.block([[-np.ones((1, 1)), -(w * g)[None]], [np.zeros((5, 1)), -np.diag(g)]])
    G = np.append(w.sum(), np.ones(5))
    stationary, E = linalg.solve_continuous_lyapunov(F, -np.outer(G, G)), linalg.expm(F)
    return (stationary - E @ stationary @ E.T)[0, 0]


@pytest.mark.parametrize(
    ("hurst", "fastest", "exact", "errors"),
    [
        (0.3, 20.0, 0.59914, {16: -2.7e-3, 32: -6.8e-4}),
        (0.3, 200.0, 0.60017, {128: -8e-5}),
        (0.7, 20.0, 0.36103, {16: -1.0e-3}),
        (0.7, 200.0, 0.36129, {64: -6.2e-5}),
    ],
)
def test_the_weak_error_is_of_order_two(hurst, fastest, exact, errors):
    noise = noise_of(hurst, fastest)
    truth = exact_variance(noise)
    assert truth == pytest.approx(exact, abs=1e-5)
    for n, error in errors.items():
        assert variance_after(noise, n) / truth - 1 == pytest.approx(error, rel=0.06)
    assert variance_after(noise, 32) - truth == pytest.approx((variance_after(noise, 16) - truth) / 4, rel=0.3)


# ---- Exact solutions. ----


def solved(noise, n, paths, drift=decay, diffusion=growing, **options):
    """Values at time 1 of that many paths, and the noise that they were driven by."""
    sde = FractionalSDE(drift, diffusion, noise)
    w = noise.coefficients()

    @jax.jit
    @jax.vmap
    def one(key):
        final = sf.solve(sde, jnp.ones(1), [0.0, 1.0], dt0=1 / n, key=key, **options).final
        start = noise.start((1,), key=key) if noise.kind == "I" else 0.0
        return final.x[0], (w @ (final.factors - start))[0]

    return [np.asarray(v) for v in one(jax.random.split(jax.random.key(0), paths))]


@pytest.mark.parametrize(
    ("hurst", "fastest", "size"), [(0.3, 20.0, 1.1e-2), (0.7, 20.0, 1.5e-4), (0.3, 200.0, 1.6e-2), (0.7, 200.0, 1.5e-4)]
)
def test_strong_error_of_a_geometric_equation(hurst, fastest, size):
    """Where explicit Euler is NaN at the faster rates."""
    x, b = solved(noise_of(hurst, fastest), 64, 400)
    error = np.sqrt(np.mean((x - np.exp(-1 + 0.5 * b)) ** 2))
    assert 0.7 * size < error < 1.4 * size


@pytest.mark.slow
def test_the_strong_order_is_one():
    noise = noise_of(0.3, 20.0)
    sizes = [2.0**-k for k in range(6, 10)]
    errors = []
    for h in sizes:
        x, b = solved(noise, round(1 / h), 400)
        errors.append(np.sqrt(np.mean((x - np.exp(-1 + 0.5 * b)) ** 2)))
    assert 0.8 < np.polyfit(np.log(sizes), np.log(errors), 1)[0] < 1.2


@pytest.mark.parametrize("kind", ["I", "II"])
def test_noise_alone_is_reproduced_and_has_its_variance(kind):
    noise = Noise(0.3, 1.0, kind=kind)
    x, b = solved(noise, 8, 4000, drift=lambda t, x, args: 0 * x, diffusion=half)  # rate * h = 12.5
    np.testing.assert_allclose(x - 1, b, atol=1e-12)
    assert_mean((x - 1) ** 2, float(noise.covariance(1.0, 1.0)))


def test_an_index_that_depends_on_time_moves_the_level():
    noise = Noise(lambda t: 0.3 + 0.5 * t, 1.0, kind="II")
    sde = FractionalSDE(lambda t, x, args: 0 * x, half, noise, additive=True)
    exact = sf.solve(sde, jnp.zeros(2), [0.0, 1.0], dt0=0.05, key=jax.random.key(0)).final
    np.testing.assert_allclose(exact.x, noise.coefficients(1.0) @ exact.factors, atol=1e-12)
    # As ordinary terms, whose drift holds the derivative of the weights.
    ordinary = sf.solve(sde, jnp.zeros(2), [0.0, 1.0], dt0=1 / 512, key=jax.random.key(0), solver=dfx.Heun()).final
    np.testing.assert_allclose(ordinary.x, noise.coefficients(1.0) @ ordinary.factors, atol=2e-4)


# ---- Trees and adaptive steps. ----


def test_the_weights_of_the_areas_are_moments_and_miss_what_they_should():
    z = np.array([1e-4, 0.1, 1.0, 1.4999, 1.5001, 3.0, 20.0])
    legendre = jax.jit(_legendre, static_argnums=1)
    a = [np.asarray(legendre(jnp.asarray(z), n)) for n in range(3)]
    for n in range(3):
        exact = [
            integrate.quad(lambda x, v=v, n=n: np.exp(-v * (1 - x)) * eval_legendre(n, 2 * x - 1), 0, 1)[0] for v in z
        ]
        np.testing.assert_allclose(a[n], exact, rtol=2e-10, atol=1e-14)
        with jax.enable_x64(False):
            rough = legendre(jnp.asarray(z, jnp.float32), n)
        np.testing.assert_allclose(rough, exact, rtol=2e-4, atol=1e-7)
        slopes = jax.jit(jax.grad(lambda v, n=n: _legendre(v, n).sum()))(jnp.asarray(np.append(0.0, z)))
        assert np.isfinite(slopes).all()
    whole = -np.expm1(-2 * z) / (2 * z)
    missed = 1 - (a[0] ** 2 + 3 * a[1] ** 2) / whole
    np.testing.assert_allclose(missed[[2, 5, 6]], [1.2e-3, 0.049, 0.66], rtol=0.05)
    np.testing.assert_allclose(
        missed[[2, 5, 6]] - 5 * (a[2] ** 2 / whole)[[2, 5, 6]], [8.7e-6, 2.9e-3, 0.39], rtol=0.05
    )


@pytest.mark.parametrize("area", [dfx.SpaceTimeLevyArea, dfx.SpaceTimeTimeLevyArea])
def test_a_step_over_areas_is_near_to_many_steps_over_its_parts(area):
    """The signs of H and K are those of diffrax: what one step misses is the residual variance, and no more."""
    noise = Noise(0.3, 1.0, kind="II", rates=(0.0, 1.0, 3.0))
    sde = FractionalSDE(lambda t, x, args: 0 * x, half, noise, additive=True)
    grid = sf.grids.uniform(0.0, 1.0, 64)

    @jax.jit
    @jax.vmap
    def factors(key):
        path = sf.paths.GridBrownian(grid, (), key=key, levy_area=area)
        run = lambda path: sf.solve(sde, jnp.zeros(()), [0.0, 1.0], path=path, solver=Heun()).final.factors
        return run(path), run(path.coarsen(64))

    fine, coarse = factors(jax.random.split(jax.random.key(0), 8 * 250))
    np.testing.assert_allclose(fine[:, 0], coarse[:, 0], atol=1e-12)
    z = np.array([1.0, 3.0])
    share = {dfx.SpaceTimeLevyArea: [1.2e-3, 0.049], dfx.SpaceTimeTimeLevyArea: [8.7e-6, 2.9e-3]}[area]
    missed = np.mean((np.asarray(fine) - np.asarray(coarse))[:, 1:] ** 2, axis=0) / (-np.expm1(-2 * z) / (2 * z))
    # A sample variance of 2000 paths is known to 3%.
    np.testing.assert_allclose(missed, share, rtol=0.2)


def test_adaptive_steps_and_trees():
    noise = Noise(0.7, 1.0, kind="II", max_rate=50.0)
    sde = FractionalSDE(decay, growing, noise)
    controller = dfx.PIDController(rtol=3e-4, atol=3e-5)

    @jax.vmap
    def solved(key):
        tree = dfx.VirtualBrownianTree(0.0, 1.0, 1e-4, (2,), key, dfx.SpaceTimeLevyArea)
        adaptive = sf.solve(sde, jnp.ones(2), [0.0, 1.0], path=tree, stepsize_controller=controller, dt0=0.01)
        fixed = sf.solve(sde, jnp.ones(2), [0.0, 1.0], path=tree, dt0=1 / 512, solver=Heun())
        return sf.is_okay(adaptive.result), adaptive.ys[-1], fixed.ys[-1]

    okay, adaptive, fixed = solved(jax.random.split(jax.random.key(1), 8))
    assert okay.all()
    # The root mean square over trees: one path's error hangs on which steps are accepted, and so on the last bit.
    np.testing.assert_array_less(np.sqrt(np.mean((adaptive / fixed - 1) ** 2, axis=0)), 5e-3)


# ---- Gradients, and diffrax itself. ----


def test_gradients_agree_and_diffrax_takes_the_same_steps():
    """In the index, the weights of a control and the law of the past, whichever way the walk is differentiated."""
    grid = sf.grids.uniform(0.0, 1.0, 12)
    path = Noise(0.3, 1.0).path(grid, (2,), key=jax.random.key(0))

    def equation(params):
        push = lambda w, t, state, args: jnp.tanh(w[0, 0] * t + w[1] @ state.factors + w[2, 0] * state.x)
        control = eqx.Partial(push, params["control"])
        return FractionalSDE(decay, growing, Noise(params["hurst"], 1.0), control=control, past=params["past"])

    def value(params, low, adjoint):
        sde = equation(params)
        start = sde.start(jnp.ones(2), key=jax.random.key(1))
        final = sf.solve(sde, start, [0.0, 1.0], path=path, adjoint=adjoint).final
        return final.x.sum() - final.path_kl - low * final.martingale

    size = np.random.default_rng(0).normal
    params = {
        "hurst": jnp.asarray(0.3),
        "control": 0.3 * jnp.asarray(size(size=(3, 6))),
        "past": sf.paths.FactorLaw(*(0.3 * jnp.asarray(size(size=shape)) for shape in ((6, 2), (6, 2), (6, 6, 2)))),
    }
    adjoints = (sf.adjoints.DiscreteAdjoint(), dfx.RecursiveCheckpointAdjoint(), dfx.DirectAdjoint())
    slopes = [jax.jit(jax.grad(lambda p, low, a=a: value(p, low, a))) for a in adjoints]
    forward = jax.jit(jax.jacfwd(lambda p, low: value(p, low, dfx.ForwardMode())))
    for low in (0.0, 1.0):
        exact = forward(params, low)
        for slope in slopes:
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), slope(params, low), exact
            )
    # The martingale holds the control's own arrays and those of the law; without it all of them are seen.
    plain, exact = jax.jit(lambda p: value(p, 0.0, None)), forward(params, 0.0)
    direction = jax.tree.map(lambda x: jnp.asarray(size(size=x.shape)), params)
    moved = [plain(jax.tree.map(lambda x, v, e=e: x + e * v, params, direction)) for e in (1e-5, -1e-5)]
    along = sum(jax.tree.leaves(jax.tree.map(lambda g, v: jnp.sum(g * v), exact, direction)))
    assert float(along) == pytest.approx(float(moved[0] - moved[1]) / 2e-5, rel=1e-6)

    sde = equation(params)
    sol = dfx.diffeqsolve(sde.terms(path), Heun(), 0.0, 1.0, 1 / 12, sde.start(jnp.ones(2), key=jax.random.key(1)))
    assert float(sol.ys.x[-1].sum() - sol.ys.path_kl[-1]) == pytest.approx(float(plain(params)), rel=1e-9)


def test_gradients_in_the_times():
    sde = FractionalSDE(decay, growing, Noise(0.3, 1.0))

    @jax.jit
    def value(end):
        ts = jnp.stack([jnp.zeros(()), end])
        return sf.solve(sde, jnp.ones(2), ts, steps_per_interval=8, key=jax.random.key(0)).ys[-1].sum()

    difference = (value(0.8 + 1e-5) - value(0.8 - 1e-5)) / 2e-5
    assert float(jax.jit(jax.grad(value))(0.8)) == pytest.approx(float(difference), rel=1e-5)


def test_other_equations_and_noise_without_an_area_are_refused():
    with pytest.raises(TypeError, match="knows no other equation"):
        sf.solve(
            sf.SDE(decay, half, additive=True), jnp.ones(2), [0.0, 1.0], dt0=0.1, key=jax.random.key(0), solver=Heun()
        )
    sde = FractionalSDE(decay, half, Noise(0.3, 1.0, kind="II"))
    path = sf.paths.GridBrownian(sf.grids.uniform(0.0, 1.0, 4), (2,), key=jax.random.key(0))
    with pytest.raises(ValueError, match="SpaceTimeLevyArea"):
        sf.solve(sde, jnp.ones(2), [0.0, 1.0], path=path)
