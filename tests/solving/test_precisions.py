"""A state with leaves of several precisions: each keeps its own, or the solve is refused in one sentence."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdeflow as sf

pytestmark = pytest.mark.usefixtures("x64_module")

KEY = jax.random.key(0)
SPAN = np.array([0.0, 0.5, 1.0])


def _start():
    return {"coarse": jnp.ones(2, jnp.float32), "fine": jnp.full(3, 0.5, jnp.float64)}


def _decay(t, y, rate):
    return {"coarse": -rate.astype(jnp.float32) * y["coarse"], "fine": -rate * y["fine"]}


def _one(t, y, rate):
    return jax.tree.map(jnp.ones_like, y)


def _noise(t, y, rate):
    return jax.tree.map(lambda x: 0.3 * x, y)


ADDITIVE = sf.SDE(_decay, _one, additive=True)
ANY = sf.SDE(_decay, _noise, interpretation="stratonovich")
CASES = {
    "Tsit5": (sf.ODE(_decay), dfx.Tsit5()),
    "Heun": (ANY, dfx.Heun()),
    "ShARK": (ADDITIVE, dfx.ShARK()),
    "ReversibleHeun": (ANY, dfx.ReversibleHeun()),
}


def _dtypes(tree):
    return jax.tree.map(lambda x: x.dtype.name, tree)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "ReversibleHeun" else []) for name in CASES]
)
def test_each_leaf_keeps_its_precision_in_value_and_gradient(name):
    equation, solver = CASES[name]

    def final(y0, rate):
        key = KEY if equation.is_stochastic else None
        sol = sf.solve(equation, y0, SPAN, args=rate, dt0=0.05, solver=solver, key=key)
        return sum(x.sum().astype(jnp.float64) for x in jax.tree.leaves(sol.final)), sol

    y0 = _start()
    grad, sol = jax.jit(jax.grad(final, argnums=(0, 1), has_aux=True))(y0, jnp.array(1.2))
    assert _dtypes(sol.final) == _dtypes(sol.ys) == _dtypes(grad[0]) == _dtypes(y0)
    assert sol.ts.dtype == jnp.float64
    assert sf.is_okay(sol.result)
    # Without coupling, the fine leaf is what it is alone in float64, and the coarse one what it is in float32.
    for leaf, rtol in (("fine", 1e-12), ("coarse", 1e-5)):
        wide = jax.tree.map(lambda x: x.astype(jnp.float64), y0)
        if equation.is_stochastic:
            break
        np.testing.assert_allclose(sol.final[leaf], final(wide, jnp.array(1.2))[1].final[leaf], rtol=rtol)


def test_the_noise_of_a_fine_leaf_is_drawn_in_its_own_precision():
    grid = sf.grids.uniform(0.0, 1.0, 8)
    table = sf.paths.GridBrownian(grid, _start(), key=KEY).table.W
    assert _dtypes(table) == _dtypes(_start())
    still = sf.SDE(lambda t, y, a: jax.tree.map(jnp.zeros_like, y), _one, additive=True)
    sol = sf.solve(still, _start(), [0.0, 1.0], grid=grid, key=KEY, solver=dfx.Euler())
    np.testing.assert_allclose(sol.final["fine"] - 0.5, table["fine"].sum(axis=0), rtol=1e-12)
    np.testing.assert_allclose(sol.final["coarse"] - 1.0, table["coarse"].sum(axis=0), rtol=1e-4, atol=1e-6)


REFUSED = {
    "adaptive steps": ({}, "which diffrax would make one precision"),
    "diffrax's adjoint": ({"dt0": 0.1, "adjoint": dfx.DirectAdjoint()}, "fix the steps and use sf.adjoints.Discrete"),
    "an event": (
        {"dt0": 0.1, "event": dfx.Event(lambda t, y, args, **kwargs: t > 0.5)},
        "cast all leaves of y0 to float64",
    ),
    "many stages": ({"dt0": 0.1, "solver": dfx.Dopri8()}, "Dopri8 keeps its stages in one precision: cast all leaves"),
    "implicit stages": ({"dt0": 0.1, "solver": dfx.Kvaerno3()}, "or use a solver of few explicit stages such as"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_where_diffrax_makes_one_precision_of_it_the_solve_is_refused(name):
    kwargs, words = REFUSED[name]
    with pytest.raises(ValueError, match="y0 has leaves of float32 and float64") as raised:
        sf.solve(sf.ODE(_decay), _start(), SPAN, args=jnp.array(1.2), **kwargs)
    assert words in str(raised.value)


def test_complex_and_real_leaves_of_one_precision_go_together():
    field = sf.ODE(lambda t, y, args: {"z": 1j * y["z"], "x": -y["x"]})
    sol = sf.solve(field, {"z": jnp.array(1 + 0j), "x": jnp.array(1.0)}, SPAN, dt0=0.05)
    np.testing.assert_allclose(sol.final["z"], np.exp(1j), rtol=1e-8)
    np.testing.assert_allclose(sol.final["x"], np.exp(-1), rtol=1e-8)
