"""Exponential Adams methods against closed forms, for stiff linear parts, uneven steps and both directions."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdeflow as sf
from sdeflow.solvers import ExponentialAdams
from tests.helpers.orders import slope

pytestmark = pytest.mark.usefixtures("x64_module")

RATE = np.array([-3.0, 1.0])
EQUATION = sf.ODE(lambda t, y, args: jnp.asarray(RATE, y.dtype) * y + jnp.cos(2 * t))


def exact(t, y0=1.0):
    # y' = r y + cos 2t
    part = lambda t: (2 * np.sin(2 * t) - RATE * np.cos(2 * t)) / (RATE**2 + 4)
    return part(t) + (y0 - part(0.0)) * np.exp(RATE * t)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("rate", [RATE, -1.0], ids=["components", "number"])
def test_orders(order, rate):
    final = jax.jit(
        lambda ts: sf.solve(EQUATION, jnp.ones(2), ts, steps_per_interval=1, solver=ExponentialAdams(order, rate)).final
    )
    sizes = [1 / n for n in (40, 80, 160)]
    errors = [np.abs(final(jnp.linspace(0, 1, round(1 / h) + 1)) - exact(1.0)).max() for h in sizes]
    assert slope(sizes, errors) > order - 0.1


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_a_step_with_its_history_is_exact_for_polynomials(order):
    # y' = r y + p(t) from t = 0.2 to 0.7, the earlier nodes anywhere.
    rates = np.array([0.0, 1e-9, 0.3, -2.0, -5.9, -6.1, -11.9, -12.1, 9.0, -1e6])
    p = np.polynomial.Polynomial([0.5, -1.0, 2.0, 0.7][:order])
    history = np.append(np.array([0.2, 0.05, -0.4, -0.5])[1:order], 0.0)
    state = (jnp.asarray(history), jnp.asarray(p(history)), jnp.array(order - 1))

    def step(rate):
        term = diffrax.ODETerm(lambda t, y, args: rate * y + jnp.polyval(jnp.asarray(p.coef[::-1]), t))
        solver = ExponentialAdams(order, rate)
        return solver.step(term, jnp.array(0.2), jnp.array(0.7), jnp.array(1.5), None, state, False)[0]

    found = jax.jit(jax.vmap(step))(jnp.asarray(rates))
    x, w = np.polynomial.legendre.leggauss(60)
    for y1, rate in zip(found, rates):
        t = 0.45 + 0.25 * x
        wanted = 1.5 * np.exp(rate * 0.5) + 0.25 * (w * np.exp(rate * (0.7 - t)) * p(t)).sum()
        if rate < -100:
            # The slow manifold, in powers of 1 / r.
            wanted = -sum(p.deriv(k)(0.7) / rate ** (k + 1) for k in range(order))
        assert float(y1) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("order", [1, 3])
def test_a_constant_remainder_is_exact_however_stiff(order):
    stiff = sf.ODE(lambda t, y, args: -1e6 * (y - 3.0))
    out = sf.solve(stiff, jnp.array([5.0]), [0.0, 1.0], dt0=0.25, solver=ExponentialAdams(order, -1e6))
    np.testing.assert_allclose(out.ys[-1], 3.0, rtol=1e-9)


@pytest.mark.parametrize("order", [2, 3])
def test_a_rate_broadcasts_from_the_right(order):
    # Two rows of three components: a rate for each component is not one for each slope.
    rates = jnp.array([-1.0, -2.0, -3.0])
    equation = sf.ODE(lambda t, y, args: rates * y + jnp.sin(3 * t))
    run = lambda rate: (
        sf.solve(
            equation, jnp.arange(6.0).reshape(2, 3), [0.0, 1.0], dt0=0.1, solver=ExponentialAdams(order, rate)
        ).final
    )
    np.testing.assert_allclose(run(rates), run(jnp.tile(rates, (2, 1))), rtol=1e-13)


def test_rate_zero_is_adams_bashforth():
    equation, h = sf.ODE(lambda t, y, args: jnp.sin(3 * t) * y), 0.1
    out = sf.solve(equation, jnp.array(1.0), [0.0, 1.0], dt0=h, solver=ExponentialAdams(2, 0.0)).final
    y, slopes = 1.0, []
    for n in range(10):
        slopes.insert(0, np.sin(3 * n * h) * y)
        y += h * (1.5 * slopes[0] - 0.5 * slopes[1] if n else slopes[0])
    assert float(out) == pytest.approx(y, rel=1e-13)


def test_backwards_in_time_and_inside_diffrax():
    back = sf.solve(EQUATION, jnp.asarray(exact(1.0)), [1.0, 0.0], dt0=-0.00125, solver=ExponentialAdams(2, RATE)).final
    np.testing.assert_allclose(back, 1.0, atol=1e-4)
    terms, solver = EQUATION.terms(), ExponentialAdams(3, RATE)
    walked = sf.solve(EQUATION, jnp.ones(2), [0.0, 1.0], dt0=0.005, solver=solver).final
    by_diffrax = diffrax.diffeqsolve(terms, solver, 0.0, 1.0, 0.005, jnp.ones(2)).ys[0]
    np.testing.assert_allclose(walked, by_diffrax, atol=1e-12)
    down = diffrax.diffeqsolve(terms, ExponentialAdams(2, RATE), 1.0, 0.0, -0.00125, jnp.asarray(exact(1.0))).ys[0]
    np.testing.assert_allclose(back, down, atol=1e-12)


def test_a_jump_starts_afresh():
    switched = sf.ODE(lambda t, y, args: jnp.where(t < 0.5, 1.0, -20.0) * jnp.ones_like(y))
    grid = sf.grids.through([0.0, 1.0], dt0=0.1, jumps=[0.5])
    out = sf.solve(switched, jnp.array(0.0), [0.0, 1.0], grid=grid, solver=ExponentialAdams(3)).final
    assert float(out) == pytest.approx(0.5 - 10.0, abs=1e-9)
    across = sf.solve(switched, jnp.array(0.0), [0.0, 1.0], dt0=0.1, solver=ExponentialAdams(3)).final
    assert abs(float(across) + 9.5) > 0.1


def test_gradients_batches_and_trees():
    def f(rate, y0):
        equation = sf.ODE(lambda t, y, args: jax.tree.map(lambda y: rate * y + jnp.sin(y), y))
        out = sf.solve(equation, (y0, 2 * y0), [0.0, 1.0], dt0=0.2, solver=ExponentialAdams(3, rate)).final
        return out[0].sum() - out[1].sum()

    at, h = (jnp.array(-2.0), jnp.array([0.3, 0.7])), 1e-5
    gradient = jax.jit(jax.grad(f, argnums=(0, 1)))(*at)
    for i, g in enumerate(gradient):
        move = lambda s, i=i: f(*(x + s * h if k == i else x for k, x in enumerate(at)))
        assert float(g.sum()) == pytest.approx(float((move(1) - move(-1)) / (2 * h)), rel=1e-7)
    batch = jax.vmap(lambda y0: f(at[0], y0))(jnp.array([[0.3, 0.7], [0.1, 0.2]]))
    assert float(batch[0]) == pytest.approx(float(f(*at)), rel=1e-12)


def test_single_precision():
    out = sf.solve(EQUATION, jnp.ones(2, jnp.float32), [0.0, 1.0], dt0=0.01, solver=ExponentialAdams(3, RATE)).final
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, exact(1.0), rtol=1e-4)


@pytest.mark.parametrize("order", [0, 5, 2.0, True])
def test_bad_orders(order):
    with pytest.raises(ValueError, match="order"):
        ExponentialAdams(order)


def test_it_is_no_one_step_method():
    with pytest.raises(ValueError, match="not an explicit one-step"):
        sf.solvers.McCallumFoster(ExponentialAdams())
