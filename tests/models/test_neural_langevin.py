"""`NeuralLangevinSDE`: its structure, its oracles, and the walk against a loop by hand."""

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import sdeflow as sf
from sdeflow.models import NeuralLangevinSDE
from sdeflow.paths import GridBrownian, linear_control

MODES = ["pure", "benchmark"]
TS = np.array([0.0, 0.1, 0.35, 0.5, 1.0])


def control(scale=1.0, channels=2, ts=TS):
    values = np.random.default_rng(0).normal(size=(len(ts), channels)).astype(np.float32)
    values[1, 0] = np.nan
    return linear_control(jnp.asarray(ts, jnp.float32), scale * values)


def small(mode="pure", **kwargs):
    return NeuralLangevinSDE(3, **({"control_size": 2, "width": 8, "mode": mode, "key": jr.key(0)} | kwargs))


class Constant(eqx.Module):
    """A control that does not move."""

    value: jax.Array

    def evaluate(self, t0, t1=None, left=True):
        return self.value


class Affine(eqx.Module):
    """gamma(zeta(z, x)) = -lam z + B x, in the place of the networks."""

    lam: float
    b: jax.Array

    def __call__(self, z, x, t):
        return -self.lam * z + self.b @ x


# ---- Structure. ----


@pytest.mark.parametrize("mode", MODES)
def test_the_noise_sees_neither_state_nor_control(mode):
    sde, z = small(mode), jnp.array([0.5, -1.0, 2.0])
    assert sde.additive
    assert sde.interpretation == "ito"
    jacobian = jax.jacfwd(lambda z: sde.diffusion(0.3, z, control()))(z)
    np.testing.assert_array_equal(jacobian, np.zeros((3, 3)))
    np.testing.assert_array_equal(sde.diffusion(0.3, z, control()), sde.diffusion(0.3, -z, control(scale=9.0)))
    assert bool((sde.diffusion(0.3, z, None) != sde.diffusion(0.9, z, None)).any())


@pytest.mark.parametrize("mode", MODES)
def test_the_drift_sees_time_through_the_control_alone(mode):
    sde, z = small(mode), jnp.array([0.5, -1.0, 2.0])
    still = Constant(jnp.array([0.3, -0.7]))
    np.testing.assert_array_equal(sde.drift(0.1, z, still), sde.drift(0.9, z, still))
    assert bool((sde.drift(0.1, z, control()) != sde.drift(0.9, z, control())).any())


def test_without_a_control_args_are_not_read():
    sde = small(control_size=0)
    np.testing.assert_array_equal(sde.drift(0.1, jnp.ones(3), None), sde.drift(0.2, jnp.ones(3), "anything"))


def test_the_pure_drift_is_bounded_and_the_bound_is_the_rate():
    sde = small(rate=7.0)
    huge = eqx.tree_at(lambda s: s.gamma.gamma.layers[-1].bias, sde, jnp.array([1e9, -1e9, 0.0]))
    value = huge.drift(0.0, jnp.ones(3), control())
    np.testing.assert_allclose(value[:2], [7.0, -7.0])


@pytest.mark.parametrize("solver", [diffrax.Euler(), diffrax.EulerHeun(), diffrax.ShARK(), diffrax.SEA()])
def test_every_solver_serves_additive_noise(solver):
    sol = sf.solve(small(), jnp.zeros(3), TS, args=control(), dt0=0.05, solver=solver, key=jr.key(1))
    assert bool(sf.is_okay(sol.result))
    assert sol.ys.shape == (5, 3)


# ---- Oracles. ----


def test_a_shift_of_the_start_decays_as_the_discrete_equation_says():
    lam, h, n = 2.0, 0.05, 20
    sde = eqx.tree_at(lambda s: s.gamma, small(), Affine(lam, jr.normal(jr.key(2), (3, 2))))
    run = lambda z0: sf.solve(sde, z0, [0.0, n * h], args=control(), dt0=h, solver=diffrax.Euler(), key=jr.key(3))
    z0, shift = jnp.array([0.5, -1.0, 2.0]), jnp.array([1.0, -2.0, 0.5])
    gap = run(z0 + shift).final - run(z0).final
    assert int(run(z0).stats["num_steps"]) == n
    np.testing.assert_allclose(gap, (1 - lam * h) ** n * shift, rtol=1e-5, atol=1e-6)


def nonfinite_share(sde, z0, h, args, keys):
    """The share of paths that leave the finite numbers within 100 Euler steps."""
    run = lambda z, k: sf.solve(sde, z, [0.0, 100 * h], args=args, dt0=h, solver=diffrax.Euler(), key=k).final
    return float((~jnp.isfinite(jax.vmap(run)(z0, keys)).all(axis=-1)).mean())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("h", [0.01, 0.1, 1.0])
def test_nothing_explodes_at_random_initial_weights(mode, h):
    args = control(scale=100.0, ts=100 * h * TS)
    keys = jr.split(jr.key(4), 10)
    make = lambda k: NeuralLangevinSDE(64, control_size=2, mode=mode, key=k)
    models = [make(k) for k in keys]
    arrays = jax.tree.map(lambda *xs: jnp.stack(xs), *[eqx.filter(m, eqx.is_array) for m in models])
    static = eqx.filter(models[0], eqx.is_array, inverse=True)
    run = lambda a, k: nonfinite_share(eqx.combine(a, static), 10.0 * jr.normal(k, (1, 64)), h, args, k[None])
    shares = [run(jax.tree.map(lambda x, i=i: x[i], arrays), k) for i, k in enumerate(keys)]
    assert shares == [0.0] * 10


def test_the_check_for_explosions_sees_a_naive_model_explode():
    naive = sf.SDE(lambda t, z, args: -z, lambda t, z, args: z**3)
    z0 = jr.normal(jr.key(5), (400, 1))
    assert nonfinite_share(naive, z0, 0.05, None, jr.split(jr.key(6), 400)) > 0.03


def test_the_walk_is_a_loop_by_hand_over_the_same_increments():
    sde, args, z0 = small(), control(), jnp.array([0.5, -1.0, 2.0])
    grid = sf.grids.through(TS, dt0=0.05)
    path = GridBrownian(grid, z0, key=jr.key(7))
    sol = sf.solve(sde, z0, TS, args=args, grid=grid, path=path, solver=diffrax.Euler())
    z = z0
    for left, right, dw in zip(grid.left, grid.right, path.table.W):
        z = z + sde.drift(left, z, args) * (right - left) + sde.diffusion(left, z, args) * dw
    np.testing.assert_allclose(sol.final, z, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("mode", MODES)
def test_the_gradient_agrees_with_finite_differences(mode):
    sde, z0 = small(mode), jnp.array([0.5, -1.0, 2.0])
    values = jr.normal(jr.key(8), (len(TS), 2))
    args = linear_control(jnp.asarray(TS), values)
    params, static = eqx.partition(sde, eqx.is_inexact_array)
    flat, unflatten = jax.flatten_util.ravel_pytree(params)
    assert flat.dtype == jnp.float64

    @jax.jit
    def loss(flat):
        model = eqx.combine(unflatten(flat), static)
        sol = sf.solve(model, z0, TS, args=args, dt0=0.05, solver=diffrax.Euler(), key=jr.key(9))
        return jnp.sum(jnp.sin(sol.ys))

    gradient = jax.grad(loss)(flat)
    for i in range(4):
        direction = jr.normal(jr.key(10 + i), flat.shape)
        eps = 1e-5
        difference = (loss(flat + eps * direction) - loss(flat - eps * direction)) / (2 * eps)
        np.testing.assert_allclose(gradient @ direction, difference, rtol=1e-4)


# ---- Refusals. ----


@pytest.mark.parametrize(
    ("args", "y0", "error", "match"),
    [
        (None, jnp.ones(3), TypeError, r"control_size=2, so args must be a path with \.evaluate.*NoneType"),
        (Constant(jnp.ones(3)), jnp.ones(3), ValueError, r"control_size=2, but .* shape \(3,\)"),
        (Constant(jnp.ones(2)), jnp.ones(4), ValueError, r"state_size=3, but the state has shape \(4,\)"),
        (Constant(jnp.ones(2)), jnp.ones((5, 3)), ValueError, r"shape \(5, 3\); .*jax\.vmap"),
    ],
)
def test_what_does_not_fit_the_equation_is_refused(args, y0, error, match):
    with pytest.raises(error, match=match):
        sf.solve(small(), y0, TS, args=args, dt0=0.1, solver=diffrax.Euler(), key=jr.key(0))


def test_a_state_size_must_be_a_positive_integer():
    with pytest.raises(ValueError, match=r"state_size must be an integer of at least 1, got 0"):
        NeuralLangevinSDE(0, key=jr.key(0))
