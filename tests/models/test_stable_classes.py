"""What the stable classes promise, against closed forms, and what those that are not stable do instead."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import sdeflow as sf
from sdeflow.models import NeuralCDE, NeuralGeometricSDE, NeuralLangevinSDE, NeuralLinearNoiseSDE, NeuralODE, NeuralSDE
from sdeflow.paths import linear_control

STABLE = [NeuralLangevinSDE, NeuralLinearNoiseSDE, NeuralGeometricSDE]
EULER = diffrax.Euler()
TS = np.array([0.0, 0.1, 0.35, 0.5, 1.0])


class Given(eqx.Module):
    """A function in the place of gamma."""

    fn: object = eqx.field(static=True)

    def __call__(self, z, x, t):
        return self.fn(t, z)


class Level(eqx.Module):
    """A constant in the place of sigma."""

    value: jax.Array

    def __call__(self, t):
        return self.value


def with_parts(kind, gamma, sigma, size=1):
    """A class with a given gamma(t, z) and a constant sigma."""
    sde = kind(size, width=4, key=jr.key(0))
    return eqx.tree_at(lambda s: (s.gamma, s.sigma), sde, (Given(gamma), Level(jnp.full(size, sigma))))


def control(scale=1.0, channels=2, ts=TS):
    values = np.random.default_rng(0).normal(size=(len(ts), channels)).astype(np.float32)
    return linear_control(jnp.asarray(ts, jnp.float32), scale * values)


def paths(sde, z0, end, h, count, seed=0, **options):
    """``count`` paths of one step length at their end."""
    run = lambda key: sf.solve(sde, z0, [0.0, end], dt0=h, solver=EULER, key=key, **options).final
    return jax.jit(jax.vmap(run))(jr.split(jr.key(seed), count))


# ---- Structure. ----


@pytest.mark.parametrize("mode", ["pure", "benchmark"])
@pytest.mark.parametrize("kind", STABLE)
def test_sigma_multiplies_what_the_class_says(kind, mode):
    sde, z = kind(3, control_size=2, width=8, mode=mode, key=jr.key(0)), jnp.array([0.5, -1.0, 2.0])
    slope = jax.jacfwd(lambda z: sde.diffusion(0.3, z, control()))(z)
    strength = sde.sigma.unbounded(0.3)
    if kind is NeuralLangevinSDE:
        wanted = jnp.zeros((3, 3))
    elif mode == "pure":
        wanted = jnp.diag(strength)
    else:
        wanted = jnp.diag(strength * (1 - jnp.tanh(strength * z) ** 2))
    np.testing.assert_allclose(slope, wanted, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(sde.diffusion(0.3, z, control()), sde.diffusion(0.3, z, control(scale=9.0)))
    if kind is not NeuralLangevinSDE:
        assert bool((sde.drift(0.1, z, _Still()) != sde.drift(0.9, z, _Still())).any())
        np.testing.assert_array_equal(sde.diffusion(0.3, 0 * z, None), np.zeros(3))


class _Still(eqx.Module):
    def evaluate(self, t0, t1=None, left=True):
        return jnp.array([0.3, -0.7])


@pytest.mark.parametrize("mode", ["pure", "benchmark"])
def test_the_geometric_drift_vanishes_at_zero(mode):
    sde = NeuralGeometricSDE(3, width=8, mode=mode, key=jr.key(0))
    np.testing.assert_array_equal(sde.drift(0.4, jnp.zeros(3), None), np.zeros(3))


def test_the_benchmark_mode_is_the_published_formula():
    z, t = jnp.array([0.5, -1.0, 2.0]), 0.4
    for kind in (NeuralLinearNoiseSDE, NeuralGeometricSDE):
        sde = kind(3, control_size=2, width=3, depth=2, mode="benchmark", key=jr.key(1))
        gamma, x = sde.gamma, control().evaluate(t)
        a = gamma.lift(jnp.concatenate([jnp.array([jnp.sin(t), jnp.cos(t)]), z]))
        hidden = jax.nn.relu(gamma.zeta(jnp.concatenate([a, gamma.embed(x)])))
        f = gamma.gamma.layers[1](jax.nn.relu(gamma.gamma.layers[0](hidden)))
        f = f * jnp.tanh(z) if kind is NeuralGeometricSDE else f
        np.testing.assert_allclose(sde.drift(t, z, control()), jnp.tanh(f), rtol=1e-5)
        first, second = sde.sigma.net.layers
        n = jax.nn.relu(second(jax.nn.relu(first(jnp.array([jnp.sin(t), jnp.cos(t)]))))) * z
        np.testing.assert_allclose(sde.diffusion(t, z, None), jnp.tanh(jax.nn.sigmoid(1.0) * n), rtol=1e-5)


# ---- Linear noise. ----


def test_linear_noise_draws_two_solutions_together_at_the_known_rate():
    sde = with_parts(NeuralLinearNoiseSDE, lambda t, z: -z + jnp.sin(3 * t), 0.5)
    h, steps, count = 0.005, 400, 4096
    gaps = [
        np.asarray(
            paths(sde, jnp.array([1.0]), steps * h, h, count, seed)
            - paths(sde, jnp.array([1.3]), steps * h, h, count, seed)
        )
        for seed in range(8)
    ]
    square = np.array([float((gap**2).mean()) for gap in gaps])
    euler = 0.09 * ((1 - h) ** 2 + 0.25 * h) ** steps
    np.testing.assert_allclose(euler, 0.09 * np.exp(-2 * 2 + 0.25 * 2), rtol=0.01)
    np.testing.assert_allclose(0.09 * np.exp((-2 + 0.25) * 2), 0.0027178, rtol=1e-4)
    assert abs(square.mean() - euler) < 5 * square.std(ddof=1) / np.sqrt(8)


@pytest.mark.parametrize(("h", "factor"), [(0.55, 0.9945), (0.6, 1.024)])
def test_linear_noise_has_the_known_limit_of_euler_s_steps(h, factor):
    sde = with_parts(NeuralLinearNoiseSDE, lambda t, z: -z, 1.2)
    z = jnp.array([1.0])
    ends = [z + h * sde.drift(0.0, z, None) + sign * np.sqrt(h) * sde.diffusion(0.0, z, None) for sign in (-1, 1)]
    np.testing.assert_allclose(np.mean(np.square(ends)), factor, rtol=1e-4)


# ---- The geometric class. ----


def test_the_geometric_class_keeps_signs_where_euler_loses_them():
    gamma = lambda t, z: 1.5 * jnp.sin(z) - 0.5
    sde = with_parts(NeuralGeometricSDE, gamma, 1.0)
    plain = sf.SDE(lambda t, z, args: z * gamma(t, z), lambda t, z, args: z)

    def ever(equation, h, start=0.5):
        grid = np.arange(0.0, 2.0 + h / 2, h)
        states = jax.vmap(lambda key: sf.solve(equation, jnp.array([start]), grid, dt0=h, solver=EULER, key=key).ys)
        return np.asarray(jax.jit(states)(jr.split(jr.key(1), 20000)))[..., 0]

    for h in (0.05, 0.25, 1.0):
        assert (ever(sde, h) > 0).all()
        assert (ever(sde, h, -0.5) < 0).all()
    lost = (ever(plain, 0.25) <= 0).any(axis=1).mean()
    # Five standard errors of 20 000 paths.
    assert abs(lost - 0.162) < 5 * np.sqrt(0.162 * 0.838 / 20000) + 0.0005
    fine = ever(sde, 0.05)[:, -1]
    assert abs(fine.mean() - 0.8111) < 5 * fine.std() / np.sqrt(20000) + 0.002
    coarse = ever(sde, 0.25)[:, -1]
    assert abs(coarse.mean() - 0.8345) < 5 * coarse.std() / np.sqrt(20000) + 0.002


@pytest.mark.parametrize("steps", [1, 100])
def test_the_geometric_class_is_exact_for_constants(steps):
    grid = sf.grids.through([0.0, 2.0], dt0=2.0 / steps)
    z0 = jnp.array([0.7, -1.3, 0.0])
    sde = with_parts(NeuralGeometricSDE, lambda t, z: jnp.full(3, 0.3), 0.8, size=3)
    path = sf.paths.GridBrownian(grid, z0, key=jr.key(3))
    sol = sf.solve(sde, z0, [0.0, 2.0], grid=grid, path=path, solver=EULER)
    wanted = z0 * np.exp((0.3 - 0.32) * 2.0 + 0.8 * np.asarray(path.table.W).sum(axis=0))
    np.testing.assert_allclose(sol.final, wanted, rtol=1e-5)
    np.testing.assert_allclose(sol.ys[-1], wanted, rtol=1e-5)
    assert float(sol.final[2]) == 0.0


def test_the_geometric_class_decays_at_the_known_rate():
    sde = with_parts(NeuralGeometricSDE, lambda t, z: jnp.full(1, 0.3), 1.2)
    end, count = 50.0, 4096
    rates = np.log(np.abs(np.asarray(paths(sde, jnp.array([1.0]), end, 1.0, count)))) / end
    assert abs(rates.mean() + 0.42) < 5 * 1.2 / np.sqrt(end * count)


def test_a_start_has_its_gradient_at_zero_and_below_it():
    sde = with_parts(NeuralGeometricSDE, lambda t, z: jnp.full(3, 0.3), 0.8, size=3)
    final = lambda z0: sf.solve(sde, z0, [0.0, 1.0], dt0=0.1, key=jr.key(5)).final
    slope = jax.jacrev(final)(jnp.array([0.7, -1.3, 0.0]))
    growth = final(jnp.ones(3))
    np.testing.assert_allclose(slope, jnp.diag(growth), rtol=1e-5, atol=1e-6)


def test_what_leaves_the_floats_is_held_and_counted():
    sde = with_parts(NeuralGeometricSDE, lambda t, z: jnp.array([2.0, 0.0]), 0.1, size=2)
    sol = sf.solve(sde, jnp.ones(2), [0.0, 100.0], dt0=1.0, key=jr.key(0))
    assert int(sol.stats["clamped"]) == 1
    assert bool(jnp.isfinite(sol.final).all())


def test_events_and_saved_functions_of_the_geometric_class_see_its_state():
    sde = with_parts(NeuralGeometricSDE, lambda t, z: jnp.full(1, 1.0), 1e-6)
    above = diffrax.Event(lambda t, y, args, **kwargs: y[0] > 2.0)
    sol = sf.solve(sde, jnp.ones(1), [0.0, 2.0], dt0=0.01, key=jr.key(0), event=above, save_fn=lambda t, y, args: y**2)
    np.testing.assert_allclose(sol.final, 2.0, rtol=0.02)
    np.testing.assert_allclose(sol.ys[0], [1.0], rtol=1e-6)


# ---- Nothing explodes. ----


@pytest.mark.parametrize("kind", STABLE[1:])
@pytest.mark.parametrize("h", [pytest.param(0.01, marks=pytest.mark.slow), 0.1, 1.0])
def test_no_class_explodes_at_random_initial_weights(kind, h):
    args = control(scale=100.0, ts=100 * h * TS)
    models = eqx.filter_vmap(lambda key: kind(64, control_size=2, key=key))(jr.split(jr.key(4), 10))

    @eqx.filter_jit
    @eqx.filter_vmap(in_axes=(eqx.if_array(0), 0))
    def final(sde, key):
        start = sde.start_from(10.0 * jr.normal(key, (64,)))
        return sf.solve(sde, start, [0.0, 100 * h], args=args, dt0=h, solver=EULER, key=key).final

    assert bool(jnp.isfinite(final(models, jr.split(jr.key(5), 10))).all())


def test_the_known_bad_diffusion_explodes_as_often_as_it_should():
    cubic = sf.SDE(lambda t, z, args: -z, lambda t, z, args: z**3)
    run = lambda key: (
        sf.solve(
            cubic, jr.normal(jr.fold_in(key, 1), (1,)), [0.0, 5.0], dt0=0.05, solver=EULER, key=key, throw=False
        ).final
    )
    lost = ~np.isfinite(np.asarray(jax.jit(jax.vmap(run))(jr.split(jr.key(6), 20000))))
    assert abs(lost.mean() - 0.080) < 5 * np.sqrt(0.08 * 0.92 / 20000) + 0.002


# ---- The peers. ----


@pytest.mark.parametrize("mode", ["pure", "benchmark"])
def test_the_naive_classes_solve_with_and_without_a_control(mode):
    for channels in (0, 2):
        args = control() if channels else None
        ode = NeuralODE(3, control_size=channels, width=8, mode=mode, key=jr.key(0))
        sde = NeuralSDE(3, control_size=channels, width=8, mode=mode, key=jr.key(0))
        assert not ode.is_stochastic
        assert sf.solve(ode, jnp.ones(3), TS, args=args, solver=EULER).ys.shape == (5, 3)
        assert sf.solve(sde, jnp.ones(3), TS, args=args, solver=EULER, key=jr.key(1)).ys.shape == (5, 3)
        slope = jax.jacfwd(lambda z: sde.diffusion(0.3, z, None))(jnp.ones(3))  # noqa: B023
        assert float(jnp.abs(slope).max()) > 0


def test_a_controlled_equation_is_driven_by_every_increment():
    cde = NeuralCDE(2, control_size=1, width=4, key=jr.key(0))
    ts = jnp.array([0.0, 0.2, 1.0])
    values = jnp.array([[0.0], [1.0], [-1.0]])
    end = lambda values: (
        sf.solve(cde, jnp.ones(2), ts, args=linear_control(ts, values), solver=diffrax.Midpoint()).final
    )
    slopes = jax.jacrev(end)(values)
    assert bool((jnp.abs(slopes).max(axis=(0, 2)) > 1e-3).all())
    # A constant matrix gives its product with the increment of (t, X).
    matrix = jnp.array([0.3, -0.2, 0.5, 0.1])
    net = eqx.tree_at(lambda c: c.field.layers[-1].weight, cde, jnp.zeros_like(cde.field.layers[-1].weight))
    net = eqx.tree_at(lambda c: c.field.layers[-1].bias, net, jnp.arctanh(matrix))
    got = sf.solve(net, jnp.ones(2), ts, args=linear_control(ts, values), solver=diffrax.Midpoint()).final
    np.testing.assert_allclose(got, 1.0 + matrix.reshape(2, 2) @ jnp.array([1.0, -1.0]), rtol=1e-5)


def test_a_controlled_equation_wants_a_path_with_a_slope():
    with pytest.raises(TypeError, match=r"args must be a path with \.derivative\(t\)"):
        sf.solve(NeuralCDE(2, control_size=1, key=jr.key(0)), jnp.ones(2), [0.0, 1.0], dt0=0.1, solver=EULER)
