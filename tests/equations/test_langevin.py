"""Langevin dynamics keeps the density it should; momentum moves by its closed form."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.stats import assert_mean
from scipy.integrate import quad

import sdeflow as sf


def _double_well(x):
    return jnp.sum((x**2 - 1) ** 2)


def _moments(temperature):
    """Second and fourth moment of exp(-U/T), by quadrature."""
    density = lambda x: np.exp(-((x**2 - 1) ** 2) / temperature)
    total = quad(density, -6, 6)[0]
    return [quad(lambda x, p=p: x**p * density(x), -6, 6)[0] / total for p in (2, 4)]


@pytest.mark.parametrize(("temperature", "known"), [(1.0, (0.832745, 1.082745)), (0.5, (0.852136, 0.977136))])
def test_quadrature_gives_the_known_moments(temperature, known):
    np.testing.assert_allclose(_moments(temperature), known, atol=1e-6)


def _stationary_start(key, n, temperature):
    """Draws from exp(-U/T) by inverting its distribution function on a fine grid."""
    x = np.linspace(-4, 4, 20001)
    cdf = np.cumsum(np.exp(-((x**2 - 1) ** 2) / temperature))
    uniform = np.asarray(jax.random.uniform(key, (n,)))
    return jnp.asarray(np.interp(uniform, cdf / cdf[-1], x), jnp.float32)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_overdamped_dynamics_keeps_the_moments_of_a_double_well(temperature):
    well = sf.equations.Langevin(_double_well, temperature)
    start = _stationary_start(jax.random.key(1), 20_000, temperature)
    x = sf.solve(well, start, [0.0, 2.0], dt0=1 / 64, key=jax.random.key(2)).final
    assert np.abs(np.corrcoef(start, x)[0, 1]) < 0.95, "the states have moved"
    for power, moment in zip((2, 4), _moments(temperature)):
        np.testing.assert_allclose(np.mean(np.asarray(x) ** power), moment, atol=0.015 if power == 2 else 0.03)
        assert_mean(np.asarray(x) ** power, moment)


@pytest.mark.slow
def test_overdamped_dynamics_reaches_the_moments_of_a_double_well_from_anywhere():
    well = sf.equations.Langevin(_double_well, 1.0)
    x = sf.solve(well, jnp.full(20_000, 0.3), [0.0, 10.0], dt0=1 / 100, key=jax.random.key(3)).final
    for power, moment in zip((2, 4), _moments(1.0)):
        assert_mean(np.asarray(x) ** power, moment)


@pytest.mark.parametrize(
    "solver", [pytest.param(s, marks=m) for s, m in ((dfx.ALIGN(0.1), []), (dfx.ShOULD(0.1), pytest.mark.slow),
                                                     (dfx.QUICSORT(0.1), pytest.mark.slow), (dfx.ShARK(), []))],
    ids=lambda s: type(s).__name__,
)  # fmt: skip
def test_underdamped_dynamics_keeps_positions_and_velocities(solver):
    temperature = 0.5
    well = sf.equations.UnderdampedLangevin(_double_well, friction=1.5, temperature=temperature)
    x0 = _stationary_start(jax.random.key(4), 20_000, temperature)
    v0 = jnp.sqrt(temperature) * jax.random.normal(jax.random.key(5), x0.shape)
    x, v = sf.solve(well, (x0, v0), [0.0, 2.0], dt0=1 / 32, key=jax.random.key(6), solver=solver).final
    for power, moment in zip((2, 4), _moments(temperature)):
        assert_mean(np.asarray(x) ** power, moment)
    assert_mean(np.asarray(v) ** 2, temperature)
    assert_mean(np.asarray(v) * np.asarray(x), 0.0)
    assert np.abs(np.corrcoef(v0, v)[0, 1]) < 0.5


def test_underdamped_terms_are_those_of_the_drift_and_the_diffusion():
    well = sf.equations.UnderdampedLangevin(_double_well, friction=1.5, temperature=0.7)
    plain = sf.SDE(well.drift, well.diffusion, additive=True)
    grid = sf.grids.uniform(0.0, 1.0, 2048)
    path = sf.paths.GridBrownian(grid, (2,), key=jax.random.key(0), levy_area=dfx.SpaceTimeTimeLevyArea)
    start = (jnp.array([0.5, -1.0]), jnp.array([0.2, 0.1]))
    ours = sf.solve(well, start, [0.0, 1.0], path=path, solver=dfx.ALIGN(0.1)).final
    theirs = sf.solve(plain, start, [0.0, 1.0], path=path, solver=dfx.Heun()).final
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a, b, atol=1e-3)


def test_the_state_may_be_a_tree_and_a_parameter_has_a_gradient():
    potential = lambda x, k: k * (jnp.sum(x["p"] ** 2) + x["q"] ** 4)

    @jax.jit
    def final(k, temperature):
        well = sf.equations.Langevin(lambda x: potential(x, k), temperature)
        start = {"p": jnp.array([1.0, 2.0]), "q": jnp.array(0.5)}
        return sf.solve(well, start, [0.0, 0.5], dt0=1 / 16, key=jax.random.key(0)).final["p"].sum()

    gradient = jax.jit(jax.grad(final, argnums=(0, 1)))(0.4, 0.3)
    step = 1e-2
    by_difference = (final(0.4 + step, 0.3) - final(0.4 - step, 0.3)) / (2 * step)
    np.testing.assert_allclose(gradient[0], by_difference, rtol=1e-3)
    by_difference = (final(0.4, 0.3 + step) - final(0.4, 0.3 - step)) / (2 * step)
    np.testing.assert_allclose(gradient[1], by_difference, rtol=1e-2)


@pytest.mark.parametrize("name", ["friction", "temperature"])
def test_what_must_be_a_scalar_is_checked(name):
    with pytest.raises(ValueError, match=f"{name} must be a scalar, got shape \\(2,\\)"):
        sf.equations.UnderdampedLangevin(_double_well, **{name: jnp.ones(2)})


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("sigma", [0.7, (0.7, 1.3)])
def test_momentum_moves_by_its_closed_form(sigma):
    equation = sf.equations.Momentum(2, sigma)
    for t in (1e-3, 0.5, 3.0):
        phi, c, q = equation.transition(0.0, t)
        eye, s2 = np.eye(2), np.diag(np.broadcast_to(np.asarray(sigma) ** 2, (2,)))
        np.testing.assert_allclose(phi, np.block([[eye, t * eye], [0 * eye, eye]]), atol=1e-15)
        assert not np.asarray(c).any()
        exact = np.block([[s2 * t**3 / 3, s2 * t**2 / 2], [s2 * t**2 / 2, s2 * t]])
        np.testing.assert_allclose(q, exact, rtol=1e-13, atol=1e-25)


def test_momentum_is_solved_to_its_own_law():
    equation = sf.equations.Momentum(1, 0.7)
    phi, _, q = equation.transition(0.0, 2.0)
    run = lambda key: sf.solve(equation, jnp.array([1.0, -0.5]), [0.0, 2.0], dt0=0.5, key=key).final
    states = np.asarray(jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(0), 10_000)), np.float64)
    errors = states - np.asarray(phi) @ [1.0, -0.5]
    for i in range(2):
        assert_mean(errors[:, i], 0.0)
        for j in range(2):
            assert_mean(errors[:, i] * errors[:, j], float(q[i, j]))


def test_euler_s_steps_keep_a_variance_of_their_own():
    """Of dX = -X dt + 0.8 dW steps of length h keep s^2 / (2 - h), not s^2 / 2."""
    h, size = 0.1, 0.8
    wanted = size**2 / (2 - h)
    np.testing.assert_allclose(wanted, 0.336842, atol=1e-6)
    sde = sf.equations.OrnsteinUhlenbeck(1.0, 0.0, size)
    x = sf.solve(sde, jnp.zeros(200_000), [0.0, 8.0], dt0=h, solver=dfx.Euler(), key=jax.random.key(5)).final
    assert_mean(np.asarray(x) ** 2, wanted)
    assert abs(np.mean(np.asarray(x) ** 2) - size**2 / 2) > 10 * np.std(np.asarray(x) ** 2) / np.sqrt(x.size)
