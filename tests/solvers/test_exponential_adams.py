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
EQUATION = sf.ODE(lambda t, y, args: jnp.asarray(RATE) * y + jnp.cos(2 * t))


def exact(t, y0=1.0):
    # y' = r y + cos 2t
    part = lambda t: (2 * np.sin(2 * t) - RATE * np.cos(2 * t)) / (RATE**2 + 4)
    return part(t) + (y0 - part(0.0)) * np.exp(RATE * t)


def final(order, ts, rate=RATE):
    grid = sf.grids.through(ts)
    return sf.solve(EQUATION, jnp.ones(2), np.asarray(ts)[[0, -1]],
                    grid=sf.grids.Grid(grid.left, grid.right, grid.live, np.array([0, len(ts) - 1])),
                    solver=ExponentialAdams(order, rate)).final  # fmt: skip


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("rate", [RATE, -1.0], ids=["components", "number"])
def test_orders_with_a_start_of_short_steps(order, rate):
    sizes, errors = [], []
    for n in (10, 20, 40):
        # The first steps, of lower orders, are as short as their errors ask for.
        ts = np.linspace(0, 1, n + 1)
        first = ts[1] * (1.0 / n) ** np.arange(order - 1, 0, -1) if order > 2 else []
        ts = np.concatenate([ts[:1], first, ts[1:]])
        sizes.append(1 / n)
        errors.append(np.abs(final(order, ts, rate) - exact(1.0)).max())
    assert slope(sizes, errors) > order - 0.35


@pytest.mark.parametrize("order", [1, 3])
def test_a_constant_remainder_is_exact_however_stiff(order):
    stiff = sf.ODE(lambda t, y, args: -1e6 * (y - 3.0))
    out = sf.solve(stiff, jnp.array([5.0]), [0.0, 1.0], dt0=0.25, solver=ExponentialAdams(order, -1e6))
    np.testing.assert_allclose(out.ys[-1], 3.0, rtol=1e-9)


def test_rate_zero_is_adams_bashforth():
    equation, h = sf.ODE(lambda t, y, args: jnp.sin(3 * t) * y), 0.1
    out = sf.solve(equation, jnp.array(1.0), [0.0, 1.0], dt0=h, solver=ExponentialAdams(2, 0.0)).final
    y, slopes = 1.0, []
    for n in range(10):
        slopes.insert(0, np.sin(3 * n * h) * y)
        y += h * (1.5 * slopes[0] - 0.5 * slopes[1] if n else slopes[0])
    assert float(out) == pytest.approx(y, rel=1e-13)


def test_backwards_in_time_and_inside_diffrax():
    there = np.linspace(0.0, 1.0, 201)
    back = sf.solve(EQUATION, jnp.asarray(exact(1.0)), [1.0, 0.0], dt0=-0.005, solver=ExponentialAdams(2, RATE)).final
    np.testing.assert_allclose(back, 1.0, atol=1e-4)
    terms, solver = EQUATION.terms(), ExponentialAdams(3, RATE)
    walked = final(3, there)
    by_diffrax = diffrax.diffeqsolve(terms, solver, 0.0, 1.0, 0.005, jnp.ones(2)).ys[0]
    np.testing.assert_allclose(walked, by_diffrax, atol=1e-12)
    down = diffrax.diffeqsolve(terms, ExponentialAdams(2, RATE), 1.0, 0.0, -0.005, jnp.asarray(exact(1.0))).ys[0]
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
