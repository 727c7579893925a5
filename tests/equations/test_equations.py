"""Equations: closed forms of the named ones, their diffrax terms, and what they refuse."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import sdeflow as sf

_Y = jnp.array([0.3, -0.7, 1.1])


def _path(structure, **kwargs):
    return sf.paths.GridBrownian(sf.grids.uniform(0.0, 1.0, 4), structure, key=jax.random.key(0), **kwargs)


# ---- The named equations. ----


def test_fields_of_geometric_brownian_motion():
    gbm = sf.equations.GeometricBrownianMotion(0.5, jnp.array([0.1, 0.2, 0.3]))
    np.testing.assert_allclose(gbm.drift(0.0, _Y, None), 0.5 * _Y)
    np.testing.assert_allclose(gbm.diffusion(0.0, _Y, None), np.array([0.1, 0.2, 0.3]) * _Y, rtol=1e-6)
    assert (gbm.interpretation, gbm.additive, gbm.is_stochastic) == ("ito", False, True)
    np.testing.assert_allclose(gbm.exact(2.0, 0.5, 0.3), 2 * np.exp((0.5 - gbm.sigma**2 / 2) * 0.5 + gbm.sigma * 0.3))


def test_fields_of_ornstein_uhlenbeck():
    ou = sf.equations.OrnsteinUhlenbeck(jnp.array([1.0, 2.0, 3.0]), 0.5, jnp.array([0.1, 0.2, 0.3]))
    np.testing.assert_allclose(ou.drift(0.0, _Y, None), np.array([1.0, 2, 3]) * (0.5 - _Y), rtol=1e-6)
    np.testing.assert_allclose(ou.diffusion(0.0, _Y, None), np.array([0.1, 0.2, 0.3]), rtol=1e-6)
    np.testing.assert_allclose(ou.A @ _Y + ou.b, ou.drift(0.0, _Y, None), rtol=1e-6)
    np.testing.assert_allclose(ou.L, np.diag([0.1, 0.2, 0.3]), rtol=1e-6)
    assert (ou.additive, ou.is_stochastic) == (True, True)


def test_fields_of_ornstein_uhlenbeck_with_matrices():
    theta, sigma = jnp.array([[1.0, 0.5], [-0.5, 2.0]]), jnp.array([[0.3, 0.1, 0.0], [0.0, 0.2, 0.4]])
    ou = sf.equations.OrnsteinUhlenbeck(theta, jnp.array([1.0, -1.0]), sigma)
    y = jnp.array([0.3, 0.7])
    np.testing.assert_allclose(ou.drift(0.0, y, None), theta @ (jnp.array([1.0, -1.0]) - y), rtol=1e-6)
    assert isinstance(ou.diffusion(0.0, y, None), lx.MatrixLinearOperator)
    np.testing.assert_allclose(ou.A @ y + ou.b, ou.drift(0.0, y, None), rtol=1e-5)
    sol = sf.solve(ou, y, [0.0, 1.0], dt0=0.1, key=jax.random.key(0))
    assert sol.final.shape == (2,)


def test_a_batch_of_states_is_one_state_for_elementwise_equations():
    y = jnp.ones((5, 3))
    for sde in (
        sf.equations.OrnsteinUhlenbeck(1.0, 0.0, jnp.array([0.1, 0.2, 0.3])),
        sf.equations.BrownianMotion(3, jnp.array([0.1, 0.2, 0.3])),
        sf.equations.GeometricBrownianMotion(0.1, jnp.array([0.1, 0.2, 0.3])),
    ):
        assert sde.drift(0.0, y, None).shape == sde.diffusion(0.0, y, None).shape == (5, 3)


def test_equations_are_modules_whose_parameters_are_leaves():
    ou = sf.equations.OrnsteinUhlenbeck(1.0, 0.5, 0.3)
    grad = eqx.filter_grad(lambda e: e.drift(0.0, _Y, None).sum())(ou)
    np.testing.assert_allclose(grad.theta, (0.5 - _Y).sum(), rtol=1e-6)
    with pytest.raises(AttributeError):
        ou.theta = 2.0


def test_dtypes_of_the_fields_are_those_of_the_state(x64):
    y = _Y.astype(jnp.float32)
    for sde in (
        sf.equations.OrnsteinUhlenbeck(1.0, 0.5, 0.3),
        sf.equations.GeometricBrownianMotion(0.1, 0.2),
        sf.equations.BrownianMotion(3, 0.2),
        sf.equations.LinearSDE(np.eye(3), np.ones(3), np.ones((3, 2))),
    ):
        out = sde.diffusion(0.0, y, None)
        dtype = out.matrix.dtype if isinstance(out, lx.MatrixLinearOperator) else out.dtype
        assert sde.drift(0.0, y, None).dtype == dtype == jnp.float32


# ---- Terms. ----


@pytest.mark.parametrize("solver", [dfx.Euler(), dfx.EulerHeun(), dfx.ReversibleHeun(), dfx.ShARK()])
def test_terms_work_in_a_plain_diffeqsolve(solver):
    # Promise (a): every equation, path and solver of ours in diffrax's own call.
    ou = sf.equations.OrnsteinUhlenbeck(1.0, 0.5, 0.3)
    path = _path((3,), levy_area=dfx.SpaceTimeLevyArea)
    sol = dfx.diffeqsolve(ou.terms(path), solver, 0.0, 1.0, 0.25, _Y)
    ours = sf.solve(ou, _Y, [0.0, 1.0], path=path, solver=solver)
    np.testing.assert_allclose(sol.ys[-1], ours.final, rtol=1e-5)


def test_terms_of_an_ode_need_no_path():
    term = sf.ODE(lambda t, y, args: -y).terms()
    np.testing.assert_allclose(term.vf(0.0, _Y, None), -_Y)
    assert sf.ODE(lambda t, y, args: -y).is_stochastic is False


def test_terms_of_an_sde_need_a_path():
    with pytest.raises(ValueError, match="A stochastic equation needs a path for its terms"):
        sf.equations.BrownianMotion(3).terms()


# ---- What is refused. ----


def test_an_unknown_interpretation_is_refused():
    with pytest.raises(ValueError, match='interpretation must be "ito" or "stratonovich", got \'strat\''):
        sf.SDE(lambda t, y, args: y, lambda t, y, args: y, interpretation="strat")


def test_fields_that_cannot_be_called_are_refused():
    with pytest.raises(TypeError, match=r"The drift must be callable as drift\(t, y, args\), got float"):
        sf.SDE(1.0, lambda t, y, args: y)
    with pytest.raises(TypeError, match=r"The diffusion must be callable as diffusion\(t, y, args\), got float"):
        sf.SDE(lambda t, y, args: y, 1.0)
    with pytest.raises(TypeError, match=r"The vector field must be callable as f\(t, y, args\), got int"):
        sf.ODE(3)


_TREE = {"a": jnp.ones(2), "b": jnp.ones((), jnp.float32)}
_FIELDS = {
    "a shorter vector": (_Y, lambda y: y[:1], r"must return the state's shape \(3,\), but returned shape \(1,\); "),
    "a scalar": (_Y, lambda y: 1.0, r"must return the state's shape \(3,\), but returned shape \(\)"),
    "integers": (_Y, lambda y: jnp.arange(3), "must return dtype float32, but returned int32"),
    "complex numbers": (_Y, lambda y: 1j * y, "must return dtype float32, but returned complex64"),
    "another structure": (_Y, lambda y: (y, y), r"must return the structure of the state, f32\[3\], but returned \("),
    "nothing": (_Y, lambda y: None, r"must return the structure of the state, f32\[3\], but returned None"),
    "a wrong leaf": (
        _TREE,
        lambda y: {"a": y["a"], "b": y["a"]},
        r"must return the state's shape \(\) at leaf y\['b'\], but returned shape \(2,\)",
    ),
}


@pytest.mark.parametrize(("y", "field", "message"), _FIELDS.values(), ids=_FIELDS)
def test_a_drift_unlike_the_state_is_refused(y, field, message):
    with pytest.raises(ValueError, match="The drift " + message):
        sf.solve(sf.ODE(lambda t, y, args: field(y)), y, [0.0, 1.0], dt0=0.5)


@pytest.mark.parametrize(("y", "field", "message"), _FIELDS.values(), ids=_FIELDS)
def test_a_diffusion_unlike_the_state_is_refused_and_operators_are_named(y, field, message):
    sde = sf.SDE(lambda t, y, args: y, lambda t, y, args: field(y))
    with pytest.raises(ValueError, match="The diffusion " + message + ".*diagonal noise, or a lineax operator"):
        sf.solve(sde, y, [0.0, 1.0], dt0=0.5, key=jax.random.key(0))


def test_a_matrix_is_not_diagonal_noise():
    sde = sf.SDE(lambda t, y, args: y, lambda t, y, args: jnp.ones((3, 2)))
    with pytest.raises(ValueError, match=r"shape \(3,\), but returned shape \(3, 2\).* or a lineax operator"):
        sf.solve(sde, _Y, [0.0, 1.0], dt0=0.5, key=jax.random.key(0))


def test_an_operator_into_something_else_is_refused():
    sde = sf.SDE(lambda t, y, args: y, lambda t, y, args: lx.MatrixLinearOperator(jnp.ones((2, 3))))
    with pytest.raises(ValueError, match=r"operator must map the noise to the state f32\[3\], but maps to"):
        sf.solve(sde, _Y, [0.0, 1.0], dt0=0.5, key=jax.random.key(0))


@pytest.mark.parametrize("shape", [(), (1,), (4,), (3, 1)], ids=str)
def test_noise_of_another_shape_is_never_broadcast(shape):
    gbm = sf.equations.GeometricBrownianMotion(0.1, 0.2)
    with pytest.raises(ValueError, match=r"applied to noise like f32\[3\], but the path's increments are"):
        sf.solve(gbm, _Y, [0.0, 1.0], path=_path(shape))


def test_an_operator_and_a_path_of_other_sizes_are_refused():
    sde = sf.SDE(lambda t, y, args: y, lambda t, y, args: lx.MatrixLinearOperator(jnp.ones((3, 2))))
    with pytest.raises(ValueError, match=r"applied to noise like .*2.*, but the path's increments are f32\[4\]"):
        sf.solve(sde, _Y, [0.0, 1.0], path=_path((4,)))


def test_dtypes_below_the_state_are_promoted_and_above_refused(x64):
    y32, y64 = _Y.astype(jnp.float32), _Y.astype(jnp.float64)
    single, double = (sf.ODE(lambda t, y, args, d=d: -y.astype(d)) for d in ("float32", "float64"))
    assert sf.solve(single, y64, [0.0, 1.0], dt0=0.5).final.dtype == jnp.float64
    with pytest.raises(ValueError, match="The drift must return dtype float32, but returned float64"):
        sf.solve(double, y32, [0.0, 1.0], dt0=0.5)
