"""The diagonal Milstein method is Milstein's: diffrax's numbers, order one, at the cost of Euler."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest
from helpers.orders import slope, strong_order
from helpers.problems import PROBLEMS

import sdeflow as sf


def _solve(equation, solver, y0, n=37):
    path = sf.paths.GridBrownian(sf.grids.uniform(0.0, 1.0, n), y0, key=jax.random.key(4))
    return sf.solve(equation, y0, [0.0, 1.0], path=path, solver=solver).final


def _gbm(sigma):
    return sf.equations.GeometricBrownianMotion(0.3, sigma)


@pytest.mark.usefixtures("x64")
def test_it_equals_the_method_of_diffrax_in_value_and_gradient():
    y0 = jnp.array([1.0, 0.4, -2.0])
    for equation in (
        lambda s: _gbm(s),
        lambda s: sf.SDE(lambda t, y, args: jnp.cos(y) - t, lambda t, y, args: s * jnp.sin(y + t) + y**2 / 9),
    ):
        run = lambda s, y, solver, e=equation: _solve(e(s), solver, y).sum()
        ours, theirs = (
            jax.jit(jax.value_and_grad(lambda s, y, solver=solver: run(s, y, solver), argnums=(0, 1)))(0.5, y0)
            for solver in (sf.solvers.DiagonalMilstein(), dfx.ItoMilstein())
        )
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
            np.testing.assert_allclose(a, b, rtol=1e-12)


@pytest.mark.usefixtures("x64")
def test_a_diagonal_operator_and_a_tree_of_states_are_the_same_noise():
    y0 = jnp.array([1.0, 0.4])
    drift = lambda t, y, args: -y
    vector = sf.SDE(drift, lambda t, y, args: 0.5 * jnp.cos(y))
    operator = sf.SDE(drift, lambda t, y, args: lx.DiagonalLinearOperator(0.5 * jnp.cos(y)))
    tree = sf.SDE(
        lambda t, y, args: jax.tree.map(jnp.negative, y), lambda t, y, args: jax.tree.map(lambda x: 0.5 * jnp.cos(x), y)
    )
    milstein = sf.solvers.DiagonalMilstein()
    expected = _solve(vector, milstein, y0)
    np.testing.assert_allclose(_solve(operator, milstein, y0), expected, rtol=1e-14)
    grid = sf.grids.uniform(0.0, 1.0, 16)
    path = sf.paths.GridBrownian(grid, {"a": y0, "b": y0[0]}, key=jax.random.key(4))
    out = sf.solve(tree, {"a": y0, "b": y0[0]}, [0.0, 1.0], path=path, solver=milstein).final
    for name, start in (("a", y0), ("b", y0[0])):
        leaf = sf.paths.GridBrownian(grid, start, key=jax.random.key(0))
        pick = lambda p: (p.table.dt, p.table.W)
        leaf = eqx.tree_at(pick, leaf, (path.table.dt[name], path.table.W[name]))
        alone = sf.solve(vector, start, [0.0, 1.0], solver=dfx.ItoMilstein(), path=leaf).final
        np.testing.assert_allclose(out[name], alone, rtol=1e-12)


def test_it_converges_with_order_one_where_euler_has_one_half():
    problem = PROBLEMS["gbm"]
    kwargs = {
        "fine": 256, "factors": (4, 8, 16, 32, 64), "keys": jax.random.split(jax.random.key(0), 1000),
        "exact": lambda y0, t, w: problem.exact(y0, t, w),
    }  # fmt: skip
    equation = problem.equation()
    assert abs(strong_order(equation, sf.solvers.DiagonalMilstein(), 1.0, **kwargs) - 1.0) < 0.1
    assert abs(strong_order(equation, dfx.Euler(), 1.0, **kwargs) - 0.5) < 0.1
    assert slope([1, 2, 4], [1, 2, 4]) == pytest.approx(1.0)


@pytest.mark.parametrize("how", ["solve", "diffeqsolve"])
def test_noise_that_is_not_diagonal_is_refused(how):
    equation = sf.SDE(lambda t, y, args: -y, lambda t, y, args: lx.MatrixLinearOperator(jnp.ones((2, 2)) * y[0]))
    path = sf.paths.GridBrownian(sf.grids.uniform(0.0, 1.0, 4), (2,), key=jax.random.key(0))
    with pytest.raises(ValueError, match="DiagonalMilstein needs diagonal noise, but the diffusion is a MatrixLinear"):
        if how == "solve":
            sf.solve(equation, jnp.ones(2), [0.0, 1.0], path=path, solver=sf.solvers.DiagonalMilstein())
        else:
            dfx.diffeqsolve(
                equation.terms(path), sf.solvers.DiagonalMilstein(), 0.0, 1.0, 0.25, jnp.ones(2),
                adjoint=dfx.ForwardMode(),
            )  # fmt: skip


def test_a_stratonovich_equation_is_refused():
    equation = sf.SDE(lambda t, y, args: -y, lambda t, y, args: y, interpretation="stratonovich")
    with pytest.raises(ValueError, match="DiagonalMilstein converges to the Ito solution"):
        sf.solve(
            equation, jnp.ones(2), [0.0, 1.0], dt0=0.1, key=jax.random.key(0), solver=sf.solvers.DiagonalMilstein()
        )


def test_noise_whose_entries_depend_on_each_other_needs_the_full_method():
    # The documented limit, shown: the cheap method is another discretisation there, so it must not pass for Milstein's.
    equation = sf.SDE(lambda t, y, args: -y, lambda t, y, args: 0.5 + y[::-1])
    y0 = jnp.array([1.0, 0.4])
    gap = _solve(equation, sf.solvers.DiagonalMilstein(), y0) - _solve(equation, dfx.ItoMilstein(), y0)
    assert np.abs(np.asarray(gap)).max() > 1e-3


def test_it_is_counted_and_interpolated():
    sol = sf.solve(
        _gbm(0.4), jnp.ones(2), [0.0, 1.0], dt0=0.1, key=jax.random.key(0), solver=sf.solvers.DiagonalMilstein()
    )
    assert int(sol.stats["num_steps"]) == 10
    assert "DiagonalMilstein" in repr(sol)
