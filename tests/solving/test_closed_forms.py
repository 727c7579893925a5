"""Solutions against closed forms: path by path, and by their moments."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from helpers.problems import PROBLEMS, THETA
from helpers.stats import assert_mean, assert_normal, assert_variance, z_of_mean

import sdeflow as sf

pytestmark = pytest.mark.usefixtures("x64_module")

TS = np.array([0.0, 0.25, 1.0])


@pytest.mark.parametrize("name", ["decay", "logistic", "clock"])
@pytest.mark.parametrize(("solver", "tolerance"), [(None, 1e-9), (dfx.Dopri8(), 1e-12), (dfx.Heun(), 1e-4)], ids=str)
def test_ordinary_equations(name, solver, tolerance):
    problem = PROBLEMS[name]
    sol = sf.solve(problem.equation(), jnp.array(problem.y0), TS, dt0=1 / 64, solver=solver)
    np.testing.assert_allclose(sol.ys, problem.exact(problem.y0, TS, 0.0), rtol=tolerance)


@pytest.mark.parametrize(
    ("name", "solver", "tolerance"),
    [
        ("gbm", None, 0.03),
        ("arctan", None, 0.005),
        ("gbm_stratonovich", None, 1e-3),
        ("gbm_stratonovich", dfx.SPaRK(), 1e-3),
    ],
    ids=str,
)
def test_stochastic_equations_path_by_path(name, solver, tolerance):
    problem = PROBLEMS[name]
    grid = sf.grids.through(TS, 1 / 1024)
    path = sf.paths.GridBrownian(grid, (50,), key=jr.key(1), levy_area=dfx.SpaceTimeLevyArea)
    sol = sf.solve(problem.equation(), jnp.full(50, problem.y0), TS, path=path, solver=solver)
    w = jnp.concatenate([jnp.zeros((1, 50)), jnp.cumsum(path.table.W, axis=0)])[grid.save]
    wanted = problem.exact(problem.y0, TS[:, None], w)
    assert np.sqrt(((sol.ys - wanted) ** 2).mean()) < tolerance
    assert np.sqrt(((wanted[-1] - wanted[0]) ** 2).mean()) > 0.3


def _samples(equation, y0, dt0, paths, solver=None, keys=16, ts=TS):
    """Final states: (keys, paths)."""
    start = jnp.full((paths,), y0)
    run = lambda key: sf.solve(equation, start, ts, dt0=dt0, key=key, solver=solver).final
    return np.asarray(jax.jit(jax.vmap(run))(jr.split(jr.key(17), keys)))


def test_geometric_brownian_motion_has_its_moments():
    # The means of Heun's solution are off by order h^2 only, far below the standard error.
    problem = PROBLEMS["gbm_stratonovich"]
    x = _samples(problem.equation(), 1.0, 1 / 128, 2000)
    assert_mean(x, problem.mean(1.0))
    assert_variance(x, problem.variance(1.0), problem.mean(1.0))
    # The other calculus would be seen at once.
    assert abs(z_of_mean(x, float(np.exp(0.5 - 0.32)))) > 10


def test_ornstein_uhlenbeck_is_normal_with_its_moments_at_every_saved_time():
    problem = PROBLEMS["ou"]
    start = jnp.full((1000,), problem.y0)
    run = lambda key: sf.solve(problem.equation(), start, TS, dt0=1 / 32, key=key).ys
    ys = np.asarray(jax.jit(jax.vmap(run))(jr.split(jr.key(23), 16)))
    for i in (1, 2):
        assert_mean(ys[:, i], problem.mean(TS[i]))
        assert_variance(ys[:, i], problem.variance(TS[i]), problem.mean(TS[i]))
        assert_normal(ys[:, i], problem.mean(TS[i]), problem.variance(TS[i]))
    # And the covariance of two times: exp(-theta (t - s)) var(X(s)).
    a, b = (ys[:, i] - problem.mean(TS[i]) for i in (1, 2))
    assert_mean(a * b, float(np.exp(-THETA * 0.75)) * problem.variance(0.25))


def test_noise_that_changes_with_time_has_the_integrated_variance():
    # dX = cos(3t) dW: the variance at 1 is the integral of cos(3t)^2.
    sde = sf.SDE(lambda t, y, a: 0 * y, lambda t, y, a: jnp.cos(3 * t) * jnp.ones_like(y), additive=True)
    x = _samples(sde, 0.0, 1 / 64, 1000)
    assert_mean(x, 0.0)
    assert_variance(x, 0.5 + np.sin(6.0) / 12, 0.0)


def test_the_spread_of_two_starts_under_one_noise_contracts_at_the_known_rate():
    # dX = (-X + sin 3t) dt + s X dW: the squared distance of two paths has mean d^2 ((1-h)^2 + s^2 h)^N under Euler.
    s, n, horizon = 0.5, 100, 2.0
    sde = sf.SDE(lambda t, y, a: -y + jnp.sin(3 * t), lambda t, y, a: s * y)
    grid = sf.grids.uniform(0.0, horizon, n)

    def distance(key):
        path = sf.paths.GridBrownian(grid, (2000,), key=key)
        one, two = (sf.solve(sde, jnp.full(2000, y0), [0.0, horizon], path=path).final for y0 in (1.0, 1.3))
        return (one - two) ** 2

    d2 = np.asarray(jax.jit(jax.vmap(distance))(jr.split(jr.key(2), 16)))
    h = horizon / n
    assert_mean(d2, 0.09 * ((1 - h) ** 2 + s**2 * h) ** n)


def test_additive_noise_cancels_exactly_between_two_starts():
    # dX = -lam X dt + s dW under Euler: the distance of two paths is (1 - lam h)^N to rounding.
    sde = sf.equations.OrnsteinUhlenbeck(0.7, 0.0, 0.9)
    run = lambda y0: sf.solve(sde, jnp.array([y0]), [0.0, 1.0], dt0=0.02, key=jr.key(0), solver=dfx.Euler()).final
    np.testing.assert_allclose(run(1.3) - run(1.0), 0.3 * (1 - 0.014) ** 50, rtol=1e-12)


def test_time_backwards_retraces_a_stratonovich_path():
    # Reversible Heun is its own inverse when both of its states are kept; a fine walk there and back returns.
    sde = PROBLEMS["gbm_stratonovich"].equation()
    forward = sf.grids.uniform(0.0, 1.0, 512)
    backward = sf.grids.uniform(1.0, 0.0, 512)
    w = sf.paths.GridBrownian(forward, (20,), key=jr.key(4)).table.W
    there = sf.solve(
        sde, jnp.ones(20), [0.0, 1.0], path=sf.paths.GridBrownian(forward, (20,), key=jr.key(4)), solver=dfx.Heun()
    ).final
    path = sf.paths.GridBrownian(backward, (20,), key=jr.key(4))
    path = eqx.tree_at(lambda p: p.table.W, path, -w[::-1])
    back = sf.solve(sde, there, [1.0, 0.0], path=path, solver=dfx.Heun()).final
    np.testing.assert_allclose(back, 1.0, atol=2e-3)
    assert np.abs(there - 1.0).min() > 5e-3


NFE = {
    "Euler": (dfx.Euler(), "ito"),
    "ReversibleHeun": (dfx.ReversibleHeun(), "stratonovich"),
    "SPaRK": (dfx.SPaRK(), "stratonovich"),
    "ShARK": (dfx.ShARK(), "additive"),
    "Tsit5": (dfx.Tsit5(), "none"),
    "HalfSolver": (dfx.HalfSolver(dfx.Bosh3()), "none"),
    **{
        name: pytest.param(getattr(dfx, name)(), kind, marks=pytest.mark.slow)
        for name, kind in {
            "Heun": "stratonovich",
            "Midpoint": "stratonovich",
            "Ralston": "stratonovich",
            "EulerHeun": "stratonovich",
            "ItoMilstein": "ito",
            "StratonovichMilstein": "stratonovich",
            "SRA1": "additive",
            "SEA": "additive",
            "SlowRK": "stratonovich",
            "GeneralShARK": "stratonovich",
            "Bosh3": "none",
            "Dopri5": "none",
            "Dopri8": "none",
        }.items()
    },
}


@pytest.mark.parametrize(("solver", "noise"), NFE.values(), ids=NFE)
def test_the_cost_is_the_number_of_times_the_drift_was_called(solver, noise):
    calls = []

    def drift(t, y, args):
        jax.debug.callback(lambda: calls.append(None))
        return -y

    diffusion = lambda t, y, args: 0.1 * (jnp.ones_like(y) if noise == "additive" else y)
    additive = noise == "additive"
    if noise == "none":
        equation, key = sf.ODE(drift), None
    else:
        calculus = "ito" if additive else noise
        equation, key = sf.SDE(drift, diffusion, interpretation=calculus, additive=additive), jr.key(0)
    sol = sf.solve(equation, jnp.ones(2), [0.0, 1.0], dt0=0.2, solver=solver, key=key)
    jax.effects_barrier()
    assert int(sol.stats["num_steps"]) == 5
    assert int(sol.stats["nfe"]) == len(calls)
