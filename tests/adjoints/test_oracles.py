"""Gradients whose values are known: by closed forms, path by path, and by moments; under every adjoint."""

import functools
from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.stats import assert_mean, assert_variance

import sdeflow as sf

pytestmark = pytest.mark.usefixtures("x64_module")

COUPLED = sf.solvers.McCallumFoster
REVERSIBLE, DISCRETE = sf.adjoints.ReversibleAdjoint(), sf.adjoints.DiscreteAdjoint
ADJOINTS = {
    "step": DISCRETE("step"),
    "sqrt": DISCRETE("sqrt"),
    "stored": DISCRETE(None),
    "reversible": REVERSIBLE,
    "diffrax": dfx.RecursiveCheckpointAdjoint(),
    "direct": dfx.DirectAdjoint(),
    "forward": dfx.ForwardMode(),
}


def _grad(adjoint, f, argnums=0):
    return (jax.jacfwd if adjoint == "forward" else jax.grad)(f, argnums=argnums)


def _every(default, *, but=()):
    return [pytest.param(a, marks=[] if a in default else pytest.mark.slow) for a in ADJOINTS if a not in but]


# ---- Ornstein-Uhlenbeck: dX = theta (m - X) dt + s dW, from x0 to time T. ----

THETA, MEAN, S, X0, T = 1.5, 0.4, 0.6, 2.0, 1.0
# Mean, variance and second moment at time T, and the derivatives of the last in theta, m, s, x0 and T.
MOMENTS = (0.7570082562, 0.1140255518, 0.6870870518)
SLOPES = (-0.6045845332, 1.1761937656, 0.3800851727, 0.3378227469, -0.7928512479)


def _ou(additive=True):
    return sf.SDE(lambda t, x, a: a[0] * (a[1] - x), lambda t, x, a: a[2] * jnp.ones_like(x), additive=additive)


def test_the_closed_forms_of_the_moments_are_these_numbers():
    e = np.exp(-THETA * T)
    mean = MEAN + (X0 - MEAN) * e
    variance = S**2 * (1 - e**2) / (2 * THETA)
    np.testing.assert_allclose((mean, variance, mean**2 + variance), MOMENTS, rtol=1e-9)
    in_theta = -2 * mean * (X0 - MEAN) * T * e + S**2 * (2 * THETA * T * e**2 - (1 - e**2)) / (2 * THETA**2)
    in_t = -2 * mean * (X0 - MEAN) * THETA * e + S**2 * e**2
    slopes = (in_theta, 2 * mean * (1 - e), S * (1 - e**2) / THETA, 2 * mean * e, in_t)
    np.testing.assert_allclose(slopes, SLOPES, rtol=1e-9)


@pytest.mark.parametrize("adjoint", ["step", pytest.param("reversible", marks=pytest.mark.slow)])
def test_the_second_moment_and_its_derivatives_are_those_of_the_law(adjoint):
    paths = 20_000
    solver = COUPLED(dfx.ShARK()) if adjoint == "reversible" else dfx.ShARK()
    timed = adjoint == "step"

    def squares(parameters, t1, key):
        # One parameter for each path, so that the gradient of the sum is that of every path.
        theta, mean, s, x0 = parameters
        ts = jnp.stack([jnp.zeros(()), t1]) if timed else np.array([0.0, T])
        sol = sf.solve(
            _ou(), x0, ts, args=(theta, mean, s), key=key, steps_per_interval=32, solver=solver, adjoint=ADJOINTS[adjoint],
            throw=False,
        )  # fmt: skip
        return (sol.final**2).sum(), sol.final

    full = tuple(jnp.full(paths, v) for v in (THETA, MEAN, S, X0))
    run = jax.jit(jax.grad(squares, argnums=(0, 1) if timed else 0, has_aux=True))
    out = [run(full, jnp.array(T), k) for k in jax.random.split(jax.random.key(2), 8)]
    x = np.stack([np.asarray(final) for _, final in out])
    assert_mean(x, MOMENTS[0])
    assert_variance(x, MOMENTS[1], MOMENTS[0])
    assert_mean(x**2, MOMENTS[2])
    in_parameters = [g[0] if timed else g for g, _ in out]
    for i in range(4):
        assert_mean(np.stack([np.asarray(g[i]) for g in in_parameters]), SLOPES[i])
    if timed:
        assert_mean(np.stack([np.asarray(g[1]) / paths for g, _ in out]), SLOPES[4])


# Every discretisation of it is linear: what one step does to the solution and to its derivatives is known by hand.


def _by_hand(solver, n, w, parameters):
    """The numerical solution at time T and its derivatives in theta, m, s and x0, by recursion."""
    theta, m, s, x0 = parameters
    h = T / n

    # Every quantity is its value, then its four derivatives.
    def vector(value, which=None):
        return np.eye(5)[0] * value + (0 if which is None else np.eye(5)[which + 1])

    def times(a, b):
        return np.concatenate([[a[0] * b[0]], a[0] * b[1:] + a[1:] * b[0]])

    theta, m, s, x = (vector(v, i) for i, v in enumerate((theta, m, s, x0)))
    move = lambda x, h, w: h * times(theta, m - x) + w * s
    if solver == "Euler":
        for k in range(n):
            x = x + move(x, h, w[k])
    elif solver == "Heun":
        for k in range(n):
            x = x + (move(x, h, w[k]) + move(x + move(x, h, w[k]), h, w[k])) / 2
    elif solver == "ReversibleHeun":
        z = x
        for k in range(n):
            new = 2 * x - z + move(z, h, w[k])
            x, z = x + (move(z, h, w[k]) + move(new, h, w[k])) / 2, new
    else:
        heun = lambda x, h, w: (move(x, h, w) + move(x + move(x, h, w), h, w)) / 2
        psi = {"coupled Euler": move, "coupled Heun": heun}[solver]
        z, c = x, 1 - 1 / max(n, 100)
        for k in range(n):
            x = c * x + (1 - c) * z + psi(z, h, w[k])
            z = z - psi(x, -h, -w[k])
    return x


STEPS = {
    "Euler": dfx.Euler(),
    "Heun": dfx.Heun(),
    "ReversibleHeun": dfx.ReversibleHeun(),
    "coupled Euler": COUPLED(dfx.Euler()),
    "coupled Heun": COUPLED(dfx.Heun()),
}


@functools.cache
def _linear(solver, adjoint, n, dtype="float64"):
    """The solution and its derivatives in theta, m, s and x0, as the solve has them, and the increments of its noise."""
    with jax.enable_x64(dtype == "float64"):
        grid = sf.grids.uniform(0.0, T, n)
        path = sf.paths.GridBrownian(grid, jax.ShapeDtypeStruct((), dtype), key=jax.random.key(9))

        def final(parameters):
            args, x0 = parameters[:3], parameters[3]
            return sf.solve(
                _ou(), x0, [0.0, T], args=args, path=path, solver=STEPS[solver], adjoint=ADJOINTS[adjoint], throw=False
            ).final

        at = jnp.array([THETA, MEAN, S, X0], dtype)
        run = jax.jit(lambda p: jnp.concatenate([final(p)[None], _grad(adjoint, final)(p)]))
        return np.asarray(run(at)), np.asarray(path.table.W, np.float64)


_SOLVED = [
    *((s, a) for s in ("Euler", "Heun") for a in ADJOINTS if a != "reversible"),
    *((s, a) for s in ("ReversibleHeun", "coupled Euler", "coupled Heun") for a in ("step", "reversible", "diffrax")),
]
_OFTEN = {("Euler", "step"), ("ReversibleHeun", "reversible"), ("coupled Euler", "reversible")}


@pytest.mark.parametrize("n", [10, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("solver", "adjoint"), [pytest.param(*c, marks=[] if c in _OFTEN else pytest.mark.slow) for c in _SOLVED]
)
def test_every_path_has_the_derivatives_of_its_own_recursion(solver, adjoint, n):
    found, w = _linear(solver, adjoint, n)
    np.testing.assert_allclose(found, _by_hand(solver, n, w, (THETA, MEAN, S, X0)), rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "adjoint"), [("Euler", "sqrt"), ("ReversibleHeun", "reversible"), ("coupled Euler", "reversible")]
)
def test_in_single_precision_to_five_digits(solver, adjoint):
    found, w = _linear(solver, adjoint, 100, "float32")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, _by_hand(solver, 100, w, (THETA, MEAN, S, X0)), rtol=1e-5, atol=1e-6)


def test_the_recursions_are_the_powers_that_are_known():
    # (1 - theta h)^N, its derivative -(x0 - m) N h (1 - theta h)^(N - 1), and (1 - theta h + (theta h)^2 / 2)^N.
    for n, power, slope, heun in (
        (10, 0.1968744043, -0.3705871141, 0.2245392921),
        (100, 0.2206089105, -0.3583494992, 0.2231428536),
    ):
        euler = _by_hand("Euler", n, np.zeros(n), (THETA, MEAN, S, X0))
        np.testing.assert_allclose((euler[4], euler[1]), (power, slope), rtol=1e-9)
        np.testing.assert_allclose(_by_hand("Heun", n, np.zeros(n), (THETA, MEAN, S, X0))[4], heun, rtol=1e-9)
        found, _ = _linear("Euler", "step", 10)
        np.testing.assert_allclose(found[4], 0.1968744043, rtol=1e-9)


# ---- Geometric Brownian motion: dX = mu X dt + s X dW, from x0. ----

MU, SIGMA = 0.05, 0.2


def _gbm(calculus):
    return sf.SDE(lambda t, x, a: a[0] * x, lambda t, x, a: a[1] * x, interpretation=calculus)


@functools.cache
def _gbm_paths(solver, adjoint, calculus):
    grid = sf.grids.uniform(0.0, 1.0, 1000)

    def finals(at, key):
        path = sf.paths.GridBrownian(grid, (), key=key)
        final = lambda mu, s, x0: (
            sf.solve(
                _gbm(calculus),
                x0,
                [0.0, 1.0],
                args=(mu, s),
                path=path,
                solver=solver,
                adjoint=ADJOINTS[adjoint],
                throw=False,
            ).final
        )
        return jax.value_and_grad(final, argnums=(0, 1, 2))(*at), path.table.W.sum()

    at = tuple(jnp.array(v) for v in (MU, SIGMA, 1.3))
    return jax.jit(jax.vmap(finals, in_axes=(None, 0)))(at, jax.random.split(jax.random.key(6), 8))


@pytest.mark.parametrize(
    ("solver", "adjoint", "calculus"),
    [
        pytest.param(dfx.ReversibleHeun(), "reversible", "stratonovich", id="ReversibleHeun"),
        *(
            pytest.param(s, a, c, id=f"{type(s).__name__}-{a}", marks=pytest.mark.slow)
            for s, a, c in (
                (sf.solvers.DiagonalMilstein(), "sqrt", "ito"),
                (dfx.Heun(), "step", "stratonovich"),
                (COUPLED(dfx.Heun()), "reversible", "stratonovich"),
                (COUPLED(dfx.EulerHeun()), "reversible", "stratonovich"),
            )
        ),
    ],
)
def test_geometric_brownian_motion_has_the_derivatives_of_its_closed_form(solver, adjoint, calculus):
    (x, (in_mu, in_s, in_x0)), w = jax.tree.map(np.asarray, _gbm_paths(solver, adjoint, calculus))
    shift = SIGMA if calculus == "ito" else 0.0
    exact = 1.3 * np.exp((MU - SIGMA * shift / 2) + SIGMA * w)
    np.testing.assert_allclose(x, exact, rtol=2e-4)
    np.testing.assert_allclose(in_mu, exact, rtol=5e-4)
    np.testing.assert_allclose(in_s, exact * (w - shift), rtol=5e-4, atol=5e-4)
    np.testing.assert_allclose(in_x0, exact / 1.3, rtol=2e-4)


@pytest.mark.slow
def test_the_second_moment_of_geometric_brownian_motion_and_its_derivatives():
    def squares(mu, s, key):
        sol = sf.solve(_gbm("ito"), jnp.ones(20_000), [0.0, 1.0], args=(mu, s), key=key, dt0=1 / 64,
                       solver=sf.solvers.DiagonalMilstein(), throw=False)  # fmt: skip
        return (sol.final**2).sum(), sol.final

    run = jax.jit(jax.grad(squares, argnums=(0, 1), has_aux=True))
    full = (jnp.full(20_000, MU), jnp.full(20_000, SIGMA))
    out = [run(*full, k) for k in jax.random.split(jax.random.key(8), 8)]
    assert_mean(np.stack([np.asarray(x) ** 2 for _, x in out]), 1.1502737989)
    assert_mean(np.stack([np.asarray(g[0]) for g, _ in out]), 2.3005475977)
    assert_mean(np.stack([np.asarray(g[1]) for g, _ in out]), 0.4601095195)


# ---- A linear ordinary equation: y' = A y, L = v . y(1). ----


@pytest.mark.parametrize("adjoint", _every(("reversible",), but=("forward",)))
def test_a_linear_equation_has_the_derivative_of_the_matrix_exponential(adjoint):
    ode = sf.ODE(lambda t, y, A: A @ y)
    solver = COUPLED(dfx.Tsit5()) if adjoint == "reversible" else dfx.Tsit5()

    def loss(A, y0):
        y = sf.solve(ode, y0, [0.0, 1.0], args=A, dt0=0.02, solver=solver, adjoint=ADJOINTS[adjoint], throw=False).final
        return y @ jnp.array([0.3, -0.7]), y

    at = (jnp.array([[-1.0, 2.0], [-2.0, -1.0]]), jnp.array([1.0, 0.5]))
    (in_a, in_y0), y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(*at)
    np.testing.assert_allclose(y, (0.01416405, -0.41105776), rtol=1e-6)
    np.testing.assert_allclose(in_y0, (0.18823072, 0.20751785), rtol=1e-7)
    np.testing.assert_allclose(in_a, ((0.200353, -0.10269662), (0.01070587, 0.09163665)), rtol=1e-6)


# ---- One gradient, however it is come by. ----


@functools.cache
def _gradient(adjoint, solver):
    def loss(p, y0):
        sde = sf.SDE(
            lambda t, y, a: jnp.sin(p * y[::-1] + t),
            lambda t, y, a: 0.4 * jnp.cos(p * y),
            interpretation="stratonovich",
        )
        path = sf.paths.GridBrownian(sf.grids.uniform(0.0, 1.0, 30), (3,), key=jax.random.key(1))
        sol = sf.solve(sde, y0, [0.0, 1.0], path=path, solver=solver, adjoint=ADJOINTS[adjoint], throw=False)
        return (sol.final**2).sum()

    return jax.jit(_grad(adjoint, loss, (0, 1)))(jnp.array([0.8, -1.2, 1.7]), jnp.array([0.1, 0.7, -0.4]))


@pytest.mark.slow
@pytest.mark.parametrize("adjoint", [a for a in ADJOINTS if a != "stored"])
def test_every_adjoint_gives_the_one_gradient_of_the_steps(adjoint):
    solvers = [dfx.ReversibleHeun()] if adjoint == "reversible" else [dfx.ReversibleHeun(), dfx.Heun()]
    for solver in solvers:
        for mine, stored in zip(_gradient(adjoint, solver), _gradient("stored", solver)):
            np.testing.assert_allclose(mine, stored, rtol=1e-12)


@pytest.mark.parametrize(
    ("steps", "kept"),
    [(100, 13), *(pytest.param(*c, marks=pytest.mark.slow) for c in ((1000, 44), (4096, 90), (10_000, 140)))],
)
def test_the_default_adjoint_of_diffrax_keeps_about_the_square_root_of_twice_the_steps(steps, kept):
    assert kept == int(-1.5 + np.sqrt(2 * steps + 0.25)) + 1
    shape = (7, 11)

    def loss(y0: Any) -> Any:
        term = dfx.ODETerm(lambda t, y, args: -y)
        return dfx.diffeqsolve(term, dfx.Euler(), 0.0, 1.0, 1 / steps, y0, max_steps=steps, throw=False).ys.sum()  # pyright: ignore

    program = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones(shape)))
    assert f"f64[{kept},7,11]" in program
