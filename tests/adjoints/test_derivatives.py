"""Derivatives of every order, in either direction, executed and compared with closed forms.

For a linear equation every step multiplies by a polynomial in the parameter, so the numerical solution is a polynomial
in it, and NumPy knows all of that polynomial's derivatives.
"""

import functools

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.polynomial import Polynomial

import sdeflow as sf

pytestmark = pytest.mark.usefixtures("x64_module")

N, T, SIGMA, AT = 5, 1.5, 0.4, 0.8
GRID = sf.grids.uniform(0.0, T, N)
SOLVERS = {
    "Euler": dfx.Euler(),
    "Heun": dfx.Heun(),
    "EulerHeun": dfx.EulerHeun(),
    "Tsit5": dfx.Tsit5(),
    "Kvaerno3": dfx.Kvaerno3(),
    "ShARK": dfx.ShARK(),
    "SPaRK": dfx.SPaRK(),
    "ReversibleHeun": dfx.ReversibleHeun(),
}
MODES = {
    "grad": jax.grad,
    "jvp": jax.jacfwd,
    "forward over reverse": lambda f: jax.jacfwd(jax.grad(f)),
    "reverse over reverse": lambda f: jax.grad(jax.grad(f)),
    "reverse over forward": lambda f: jax.grad(jax.jacfwd(f)),
    "third": lambda f: jax.jacfwd(jax.grad(jax.grad(f))),
}
ORDINARY = ("Tsit5", "Kvaerno3")
# Solvers whose solution is no polynomial that is known: their derivatives are held against differences.
DIFFERENCES = ("SPaRK", "Kvaerno3")
ORDERS = {"grad": 1, "jvp": 1, "third": 3}
# One solver of each family; the highest derivative goes through both directions of all lower ones.
DEFAULT = {("EulerHeun", "third"), ("Heun", "reverse over reverse"), ("Heun", "third"), ("ShARK", "third")}


def _cases(default):
    return [
        pytest.param(name, mode, marks=[] if (name, mode) in default else pytest.mark.slow)
        for name in SOLVERS
        for mode in MODES
    ]


def _equation(name):
    drift = lambda t, y, a: -a * y
    if name in ORDINARY:
        return sf.ODE(drift)
    if name == "ShARK":
        return sf.SDE(drift, lambda t, y, a: jnp.full_like(y, SIGMA), additive=True)
    calculus = "ito" if name == "Euler" else "stratonovich"
    return sf.SDE(drift, lambda t, y, a: SIGMA * y, interpretation=calculus)


@functools.cache
def _path(name):
    if name in ORDINARY:
        return None
    area = dfx.BrownianIncrement if "Heun" in name or name == "Euler" else dfx.SpaceTimeLevyArea
    # Asked for inside a trace, but kept: it must not be part of it.
    with jax.ensure_compile_time_eval():
        return sf.paths.GridBrownian(GRID, (), key=jax.random.key(5), levy_area=area)


def _by_solve(name):
    return lambda a: (
        sf.solve(
            _equation(name), jnp.array(1.0), [0.0, T], args=a, grid=GRID, path=_path(name), solver=SOLVERS[name]
        ).final
    )


def _inside(name):
    # Fixed steps give an implicit solver no tolerances to take: diffrax asks for its own.
    finder = dfx.VeryChord(rtol=1e-13, atol=1e-13)
    solver = dfx.Kvaerno3(root_finder=finder) if name == "Kvaerno3" else SOLVERS[name]

    def final(a):
        sol = dfx.diffeqsolve(
            _equation(name).terms(_path(name)),
            solver,
            0.0,
            T,
            T / N,
            jnp.array(1.0),
            a,
            adjoint=sf.adjoints.DiscreteAdjoint(),
            max_steps=N,
            throw=False,
        )
        return sol.ys[-1]

    return final


def _polynomial(name):
    """The numerical solution, as a polynomial in the parameter."""
    h, y = T / N, Polynomial([1.0])
    z = Polynomial([0.0, h])
    table = None if name == "Tsit5" else _path(name).table
    for i in range(N):
        if name == "Tsit5":
            # R(-z) = 1 + sum_k b' A^k 1 (-z)^(k+1), from the tableau.
            tableau = dfx.Tsit5.tableau
            s = tableau.num_stages
            A = np.zeros((s, s))
            for row, coefficients in enumerate(tableau.a_lower):
                A[row + 1, : row + 1] = coefficients
            weights = [tableau.b_sol @ np.linalg.matrix_power(A, k) @ np.ones(s) for k in range(s)]
            y = y * (1 + sum(w * (-z) ** (k + 1) for k, w in enumerate(weights)))
            continue
        w = float(table.W[i])
        if name == "Euler":
            y = y * (1 - z + SIGMA * w)
        elif name == "Heun":
            x = SIGMA * w - z
            y = y * (1 + x + x**2 / 2)
        elif name == "EulerHeun":
            y = y * (1 - z + SIGMA * w + (SIGMA * w) ** 2 / 2)
        elif name == "ShARK":
            noise = SIGMA * (1 - z / 2) * (w - float(table.H[i]) * z)
            y = (1 - z + z**2 / 2) * y + noise
        elif name == "ReversibleHeun":
            x = SIGMA * w - z
            other = Polynomial([1.0]) if i == 0 else other  # noqa: F821
            previous, other = other, 2 * y - other + x * other
            y = y + x * (previous + other) / 2
        else:
            raise KeyError(name)
    return y


def _wanted(name, order, final):
    if name in DIFFERENCES:
        # A central difference of the derivative one order lower, by Richardson.
        lower = jax.jit({1: final, 2: jax.grad(final), 3: jax.jacfwd(jax.grad(final))}[order])
        slope = lambda e: (lower(AT + e) - lower(AT - e)) / (2 * e)
        return float((4 * slope(1e-3) - slope(2e-3)) / 3)
    return _polynomial(name).deriv(order)(AT)


@pytest.mark.parametrize(("name", "mode"), _cases(DEFAULT))
def test_derivatives_of_every_order_through_solve(name, mode):
    final = _by_solve(name)
    got = jax.jit(MODES[mode](final))(jnp.array(AT))
    wanted = _wanted(name, ORDERS.get(mode, 2), final)
    np.testing.assert_allclose(got, wanted, rtol=1e-9 if name in DIFFERENCES else 1e-12)
    assert abs(wanted) > 0.05


@pytest.mark.parametrize(("name", "mode"), _cases({("Heun", "reverse over reverse"), ("ShARK", "third")}))
def test_derivatives_of_every_order_through_diffeqsolve(name, mode):
    final = _inside(name)
    got = jax.jit(MODES[mode](final))(jnp.array(AT))
    np.testing.assert_allclose(
        got, _wanted(name, ORDERS.get(mode, 2), final), rtol=1e-9 if name in DIFFERENCES else 1e-12
    )


@pytest.mark.parametrize(
    "name", [n if n in ("Tsit5", "Euler") else pytest.param(n, marks=pytest.mark.slow) for n in SOLVERS]
)
def test_the_value_is_that_of_the_polynomial(name):
    if name in DIFFERENCES:
        pytest.skip("no polynomial is known")
    np.testing.assert_allclose(jax.jit(_by_solve(name))(AT), _polynomial(name)(AT), rtol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", ["sqrt", None, 2])
def test_second_derivatives_whatever_is_recomputed(checkpoints):
    adjoint = sf.adjoints.DiscreteAdjoint(checkpoints)
    final = lambda a: (
        sf.solve(
            _equation("Heun"), jnp.array(1.0), [0.0, T], args=a, path=_path("Heun"), solver=dfx.Heun(), adjoint=adjoint
        ).final
    )
    got = jax.jit(jax.grad(jax.grad(final)))(jnp.array(AT))
    np.testing.assert_allclose(got, _wanted("Heun", 2, final), rtol=1e-12)


@pytest.mark.slow
def test_hessians_of_several_parameters_are_symmetric_and_alike_in_every_mode():
    sde = lambda p: sf.SDE(
        lambda t, y, args: jnp.sin(p[0] * y), lambda t, y, args: 0.3 * jnp.cos(p[1] * y), interpretation="stratonovich"
    )
    final = lambda p: sf.solve(sde(p), jnp.array(0.5), [0.0, T], path=_path("Heun"), solver=dfx.Heun()).final
    at = jnp.array([0.8, 1.1])
    one, two = jax.jit(lambda p: (jax.jacfwd(jax.grad(final))(p), jax.jacrev(jax.grad(final))(p)))(at)
    np.testing.assert_allclose(one, one.T, rtol=1e-12)
    np.testing.assert_allclose(one, two, rtol=1e-12)


# ---- Gradients in the times. ----


def _in_times(padded, checkpoints="step"):
    """A scalar of all states of an Ito equation, as a function of its requested times."""
    sde = sf.SDE(lambda t, y, a: -y + jnp.sin(3 * t), lambda t, y, a: 0.3 + 0.2 * jnp.cos(y + t))
    adjoint = sf.adjoints.DiscreteAdjoint(checkpoints)

    def scalar(ts):
        if padded:
            ts = jnp.concatenate([ts, jnp.repeat(ts[-1:], 3)])
        sol = sf.solve(
            sde,
            jnp.array([0.3, 0.7]),
            ts,
            key=jax.random.key(3),
            steps_per_interval=3,
            solver=dfx.Euler(),
            adjoint=adjoint,
        )
        return (sol.ys[1:4] ** 2).sum() + sol.final.sum()

    return scalar


@pytest.fixture(scope="module")
def times():
    ts = jnp.array([0.1, 0.5, 1.3, 1.7])
    value = jax.jit(_in_times(False))
    slopes = []
    for i in range(4):
        e = np.zeros(4)
        e[i] = 1e-5
        slopes.append((value(ts + e) - value(ts - e)) / 2e-5)
    return ts, np.array(slopes)


@pytest.mark.parametrize("padded", [False, True], ids=["bare", "padded with repeats"])
def test_gradients_in_times_are_those_of_finite_differences_at_fixed_noise(times, padded):
    ts, wanted = times
    got = jax.jit(jax.grad(_in_times(padded)))(ts)
    np.testing.assert_allclose(got, wanted, rtol=1e-7)
    assert np.abs(wanted).min() > 0.1


def test_gradients_in_times_in_forward_mode(times):
    ts, wanted = times
    np.testing.assert_allclose(jax.jit(jax.jacfwd(_in_times(False)))(ts), wanted, rtol=1e-7)


@pytest.mark.slow
def test_second_derivatives_in_times_are_finite_and_symmetric(times):
    hessian = jax.jit(jax.jacfwd(jax.grad(_in_times(True))))(times[0])
    assert np.isfinite(hessian).all()
    np.testing.assert_allclose(hessian, hessian.T, rtol=1e-10)


def test_gradients_in_the_times_of_an_ode_equal_its_vector_field():
    # d y(t1) / d t1 = f(y(t1)) and d y(t1) / d t0 = -f(y(t1)) for an autonomous equation and an accurate solver.
    ode = sf.ODE(lambda t, y, args: -jnp.sin(y))
    final = lambda ts: sf.solve(ode, jnp.array(1.0), ts, steps_per_interval=20, solver=dfx.Tsit5()).final
    ts = jnp.array([0.2, 1.5])
    y, grad = jax.jit(jax.value_and_grad(final))(ts)
    np.testing.assert_allclose(grad, [np.sin(y), -np.sin(y)], rtol=1e-7)
