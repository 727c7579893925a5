"""Orders of convergence: strong by regression over levels of one Brownian path, weak by closed-form moments."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.orders import slope, strong_order
from helpers.problems import PROBLEMS
from helpers.stats import assert_mean, assert_variance

import sdeflow as sf

pytestmark = pytest.mark.usefixtures("x64_module")

FINE, FACTORS = 1024, (4, 8, 16, 32, 64)
WITHIN = 0.15
EXACT = PROBLEMS["gbm"].exact
SPACE_TIME = diffrax.SpaceTimeLevyArea


def _keys(n=600):
    return jax.random.split(jax.random.key(7), n)


def _bent():
    """Additive noise that changes with time, under a drift that is not linear."""
    drift = lambda t, y, args: jnp.sin(2 * y) - y + 0.5 * t
    return sf.SDE(drift, lambda t, y, args: jnp.full_like(y, 0.4) * (1 + t), additive=True)


CASES = {
    "Euler is 1/2 for state-dependent noise": (PROBLEMS["gbm"].equation, diffrax.Euler(), 0.5, {"exact": EXACT}),
    "Euler is 1 for additive noise": (_bent, diffrax.Euler(), 1.0, {"reference": diffrax.SRA1()}),
    "Heun is 1 for commutative Stratonovich noise": (
        PROBLEMS["gbm_stratonovich"].equation,
        diffrax.Heun(),
        1.0,
        {"exact": EXACT},
    ),
    "diagonal Milstein is 1": (PROBLEMS["gbm"].equation, sf.solvers.DiagonalMilstein(), 1.0, {"exact": EXACT}),
    "ShARK is 3/2 for additive noise": (_bent, diffrax.ShARK(), 1.5, {}),
    "SRA1 is 3/2 for additive noise": (_bent, diffrax.SRA1(), 1.5, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_strong_order_of(name, record_property):
    equation, solver, order, options = CASES[name]
    needs_area = order == 1.5 or "reference" in options
    area = SPACE_TIME if needs_area else diffrax.BrownianIncrement
    found = strong_order(
        equation(), solver, jnp.array(1.0), fine=FINE, factors=FACTORS, keys=_keys(), levy_area=area, **options
    )
    record_property("order", found)
    print(f"{name}: {found:.3f}")
    assert abs(found - order) < WITHIN, found


def test_euler_is_of_weak_order_one_by_the_recursion_of_its_moments():
    # One Euler step multiplies the mean of geometric Brownian motion by 1 + mu h and its second moment by
    # (1 + mu h)^2 + sigma^2 h. The recursion is met by the solver, and its error is of order one.
    gbm, n = PROBLEMS["gbm"].equation(), 16
    mu, sigma = float(gbm.mu), float(gbm.sigma)
    keys = jax.random.split(jax.random.key(3), 8)
    path = lambda k: sf.solve(gbm, jnp.ones(40_000), [0.0, 1.0], dt0=1 / n, key=k, solver=diffrax.Euler()).final
    x = np.asarray(jax.jit(jax.vmap(path))(keys))
    step = lambda h: ((1 + mu * h), (1 + mu * h) ** 2 + sigma**2 * h)
    assert_mean(x, step(1 / n)[0] ** n)
    assert_mean(x**2, step(1 / n)[1] ** n)
    counts = np.array([8, 16, 32, 64, 128])
    errors = [abs(step(1 / n)[1] ** n - np.exp(2 * mu + sigma**2)) for n in counts]
    assert abs(slope(1 / counts, errors) - 1) < WITHIN


@pytest.mark.parametrize("solver", [diffrax.ShARK(), diffrax.SRA1()], ids=lambda s: type(s).__name__)
def test_higher_order_solvers_have_the_moments_of_ornstein_uhlenbeck(solver):
    problem = PROBLEMS["ou"]
    keys = jax.random.split(jax.random.key(5), 8)
    path = lambda k: sf.solve(problem.equation(), jnp.ones(20_000), [0.0, 1.0], dt0=1 / 16, key=k, solver=solver).final
    x = np.asarray(jax.jit(jax.vmap(path))(keys))
    assert_mean(x, problem.mean(1.0))
    assert_variance(x, problem.variance(1.0), problem.mean(1.0))


def test_euler_has_its_own_stationary_variance():
    # Not s^2 / (2 lambda) = .32, but s^2 / (lambda (2 - lambda h)) = .336842.
    ou = sf.equations.OrnsteinUhlenbeck(1.0, 0.0, 0.8)
    keys = jax.random.split(jax.random.key(11), 8)
    path = lambda k: sf.solve(ou, jnp.zeros(20_000), [0.0, 12.0], dt0=0.1, key=k, solver=diffrax.Euler()).final
    x = np.asarray(jax.jit(jax.vmap(path))(keys))
    assert_variance(x, 0.336842, 0.0)
    with pytest.raises(AssertionError):
        assert_variance(x, 0.32, 0.0)
