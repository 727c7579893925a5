"""Ito and Stratonovich: the drifts differ by half of sum_j (dg_j/dy) g_j, whatever the shape of the noise."""

import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import sdeflow as sf


def _by_jacobian(matrix, y):
    """Half of sum_j (dg_j/dy) g_j from the full Jacobian of the matrix of columns."""
    g, jacobian = matrix(y), jax.jacfwd(matrix)(y)
    return 0.5 * jnp.einsum("ijk,kj->i", jacobian, g)


_DRIFT = lambda t, y, args: jnp.sin(t) - args * y
_Y, _T, _ARGS = jnp.array([0.3, -0.7, 1.1]), 0.4, 1.3

# name: diffusion as given to SDE, and the same as a matrix of columns.
_MIX = jnp.array([[0.1, 0.4, -0.3], [0.2, -0.1, 0.5], [0.3, 0.2, 0.7]])


def _coupled(t, y, args):
    return jnp.cos(args * (_MIX @ y) + t)


def _wide(y):
    return jnp.stack([y**2, jnp.sin(y[::-1]), jnp.array([y[0] * y[1], y[1], y[2] * y[0]]), jnp.ones(3)], axis=1)


NOISES = {
    "elementwise diagonal": (lambda t, y, args: jnp.sin(y), lambda y: jnp.diag(jnp.sin(y))),
    "coupled diagonal": (_coupled, lambda y: jnp.diag(_coupled(_T, y, _ARGS))),
    "three noises to three states": (
        lambda t, y, args: lx.MatrixLinearOperator(jnp.outer(y, jnp.sin(y))),
        lambda y: jnp.outer(y, jnp.sin(y)),
    ),
    "four noises to three states": (lambda t, y, args: lx.MatrixLinearOperator(_wide(y)), _wide),
    "one noise to three states": (
        lambda t, y, args: lx.MatrixLinearOperator((y**2)[:, None]),
        lambda y: (y**2)[:, None],
    ),
}


@pytest.mark.parametrize(("diffusion", "matrix"), NOISES.values(), ids=NOISES)
def test_the_correction_is_that_of_the_full_jacobian(diffusion, matrix):
    sde = sf.SDE(_DRIFT, diffusion)
    converted = sde.to_stratonovich()
    wanted = _DRIFT(_T, _Y, _ARGS) - _by_jacobian(matrix, _Y)
    np.testing.assert_allclose(converted.drift(_T, _Y, _ARGS), wanted, rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(_by_jacobian(matrix, _Y)).max()) > 0.05
    assert (converted.interpretation, converted.additive) == ("stratonovich", False)
    back = sf.SDE(_DRIFT, diffusion, interpretation="stratonovich").to_ito()
    wanted = _DRIFT(_T, _Y, _ARGS) + _by_jacobian(matrix, _Y)
    np.testing.assert_allclose(back.drift(_T, _Y, _ARGS), wanted, rtol=1e-5, atol=1e-6)
    assert back.interpretation == "ito"


def test_there_and_back_is_the_same_drift():
    for diffusion, _ in NOISES.values():
        sde = sf.SDE(_DRIFT, diffusion)
        again = sde.to_stratonovich().to_ito()
        np.testing.assert_allclose(again.drift(_T, _Y, _ARGS), sde.drift(_T, _Y, _ARGS), atol=1e-6)
        assert again.diffusion is sde.diffusion


def test_geometric_brownian_motion_loses_half_sigma_squared():
    gbm = sf.equations.GeometricBrownianMotion(jnp.array([0.5, 0.1, 0.2]), jnp.array([0.8, 0.3, 1.5]))
    for converted in (gbm.to_stratonovich(), gbm.to_stratonovich(elementwise=False)):
        wanted = (gbm.mu - gbm.sigma**2 / 2) * _Y
        np.testing.assert_allclose(converted.drift(0.0, _Y, None), wanted, rtol=1e-6)
        np.testing.assert_array_equal(converted.diffusion(0.0, _Y, None), gbm.sigma * _Y)


def test_trees_and_mixed_leaves_are_corrected_leaf_by_leaf():
    y = {"a": jnp.array([0.3, -0.7]), "b": jnp.array(1.1)}
    diffusion = lambda t, y, args: {"a": y["b"] * y["a"], "b": jnp.sin(y["b"]) + y["a"][0]}
    sde = sf.SDE(lambda t, y, args: jax.tree.map(jnp.zeros_like, y), diffusion)
    got = sde.to_stratonovich().drift(0.0, y, None)
    flat = lambda v: jnp.diag(jnp.array([v[2] * v[0], v[2] * v[1], jnp.sin(v[2]) + v[0]]))
    wanted = -_by_jacobian(flat, jnp.array([0.3, -0.7, 1.1]))
    np.testing.assert_allclose(got["a"], wanted[:2], rtol=1e-5)
    np.testing.assert_allclose(got["b"], wanted[2], rtol=1e-5)


def test_elementwise_noise_needs_one_product_and_gives_the_same():
    sde = sf.SDE(_DRIFT, NOISES["elementwise diagonal"][0])
    fast, full = (sde.to_stratonovich(elementwise=e).drift(_T, _Y, _ARGS) for e in (True, False))
    np.testing.assert_allclose(fast, full, rtol=1e-6)


def test_elementwise_is_refused_for_operators():
    sde = sf.SDE(_DRIFT, NOISES["one noise to three states"][0]).to_stratonovich(elementwise=True)
    with pytest.raises(ValueError, match="elementwise=True needs a diagonal diffusion, but it returned a lineax"):
        sde.drift(_T, _Y, _ARGS)


def test_what_needs_no_correction_is_not_touched():
    ode, ou = sf.ODE(_DRIFT), sf.equations.OrnsteinUhlenbeck(1.0)
    assert ode.to_ito() is ode
    assert ode.to_stratonovich() is ode
    assert ou.to_ito() is ou
    additive = ou.to_stratonovich()
    assert (additive.interpretation, additive.additive) == ("stratonovich", True)
    np.testing.assert_array_equal(additive.drift(0.0, _Y, None), ou.drift(0.0, _Y, None))
    ito = sf.SDE(_DRIFT, _coupled)
    assert ito.to_ito() is ito


def test_both_calculi_reach_the_same_solution(x64):
    # Euler on the Ito form and Heun on its conversion, on one fine path: they differ by the methods' errors only.
    sde = sf.SDE(lambda t, y, args: -y, lambda t, y, args: 0.8 * jnp.sin(y) + 0.2)
    grid = sf.grids.uniform(0.0, 1.0, 4096)
    path = sf.paths.GridBrownian(grid, (200,), key=jax.random.key(0))
    y0 = jnp.linspace(-1.0, 1.0, 200)
    ito = sf.solve(sde, y0, [0.0, 1.0], path=path).final
    stratonovich = sf.solve(sde.to_stratonovich(elementwise=True), y0, [0.0, 1.0], path=path).final
    wrong = sf.solve(sf.SDE(sde.drift, sde.diffusion, interpretation="stratonovich"), y0, [0.0, 1.0], path=path).final
    rms = lambda x: float(jnp.sqrt((x**2).mean()))
    assert rms(ito - stratonovich) < 0.005
    assert rms(ito - wrong) > 0.05
