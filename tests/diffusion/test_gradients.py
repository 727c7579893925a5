"""Gradients through samplers: against finite differences in weights, noise, guidance and the grid, and each other."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdeflow as sf
from sdeflow.diffusion import (
    BDIA,
    DDIM,
    DEIS,
    VP,
    Denoiser,
    DPMSolver,
    DPMSolverPP,
    DPMSolverV3,
    Guided,
    MeanReverting,
    Multistep,
    Singlestep,
    Statistics,
    UniPC,
    iPNDM,
    sample,
)
from sdeflow.diffusion._times import knots

pytestmark = pytest.mark.usefixtures("x64_module")

rng = np.random.default_rng(0)
FITTED = Statistics(np.linspace(-6, 6, 40), *(c + 0.1 * rng.normal(size=(40, 2)) for c in (0.6, -0.2, 0.1)))
SAMPLERS = {
    "DDIM": DDIM(),
    "DDIM eta": DDIM(0.5),
    "DEIS t": DEIS(3, "t"),
    "DEIS rho": DEIS(3, "rho"),
    "DPMSolver": DPMSolver(2),
    "DPMSolver 3S": DPMSolver(3, steps="single"),
    "DPMSolverPP": DPMSolverPP(3),
    "DPMSolverPP SDE": DPMSolverPP(2, tau=1.0),
    "UniPC": UniPC(3),
    "UniPC noise": UniPC(2, reads="noise", lower_order_final=True),
    "iPNDM": iPNDM(3),
    "rho-Heun": Singlestep(method="heun"),
    "BDIA": BDIA(0.9),
    "DPMSolverV3": DPMSolverV3(FITTED, 3, corrector=True),
}
SCHEDULE = VP()


class Net(eqx.Module):
    """A little network, near to the noise of normal data."""

    weights: jax.Array

    def __call__(self, t, x, args):
        return x / (1 + jnp.exp(-3 * t)) + 0.3 * jnp.tanh(self.weights @ jnp.append(x, t))


def guided(weights, scale):
    one = lambda t, x, args: jnp.tanh(2 * x + t)
    return Guided(Denoiser(one, SCHEDULE), Denoiser(Net(weights), SCHEDULE), scale)


TIMES = knots(SCHEDULE, 4, "logsnr", 0.01)
GRID = sf.grids.through(TIMES)
# Weights, noise, the scale of guidance, times: NumPy, as this file is read before 64-bit numbers are switched on.
START = (np.array([[0.3, -0.4, 0.2], [0.1, 0.5, -0.7]]), np.array([0.4, -1.1]), np.array(2.0), TIMES)


def on(times):
    return sf.grids.Grid(times[:-1], times[1:], GRID.live, GRID.save)


def loss(solver, weights, x, scale, times):
    out = sample(guided(weights, scale), x, solver=solver, grid=on(times), key=jax.random.key(1))
    return (out * jnp.array([1.0, -0.7])).sum()


# Those left to the slow run are of the family of another one here.
_AKIN = ("DDIM", "DPMSolverV3", "DEIS rho", "DPMSolver 3S", "DPMSolverPP SDE", "UniPC noise", "iPNDM")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in _AKIN)) for name in SAMPLERS])
def test_gradients_are_finite_differences(name):
    # In weights, noise, the scale of guidance and all times at once.
    both = jax.jit(jax.value_and_grad(lambda v: loss(SAMPLERS[name], *v)))
    start = tuple(map(jnp.asarray, START))
    gradient = both(start)[1]
    h = 1e-4
    for i, part in enumerate(start):
        direction = np.random.default_rng(i).normal(size=part.shape)
        if i == 3:
            direction = direction * TIMES / 10
        move = lambda step, i=i, part=part, d=direction: (*start[:i], part + step * d, *start[i + 1 :])
        # Fourth order, so that the differences are as exact as what they judge.
        f = [both(move(k * h))[0] for k in (1, -1, 2, -2)]
        wanted = (8 * (f[0] - f[1]) - (f[2] - f[3])) / (12 * h)
        assert float((gradient[i] * direction).sum()) == pytest.approx(float(wanted), rel=1e-6, abs=1e-10)


@pytest.mark.parametrize("name", ["UniPC", "BDIA"])
def test_a_traced_grid_gives_what_a_known_one_gives(name):
    known = sample(guided(START[0], START[2]), START[1], solver=SAMPLERS[name], grid=GRID)
    traced = jax.jit(lambda v: loss(SAMPLERS[name], *v))(tuple(map(jnp.asarray, START)))
    assert float((known * jnp.array([1.0, -0.7])).sum()) == pytest.approx(float(traced), rel=1e-12)


@pytest.mark.parametrize("policy", ["sqrt", None])
def test_what_is_kept_does_not_change_the_gradient(policy):
    run = lambda adjoint: jax.grad(
        lambda w: sample(
            guided(w, START[2]), START[1], solver=UniPC(2), num_steps=5, adjoint=sf.adjoints.DiscreteAdjoint(adjoint)
        ).sum()
    )(jnp.asarray(START[0]))
    np.testing.assert_allclose(run(policy), run("step"), rtol=1e-12)


def test_second_derivatives_and_forward_mode():
    f = lambda scale: sample(guided(START[0], scale), START[1], solver=UniPC(2), num_steps=4).sum()
    first, second = jax.jit(jax.grad(f)), jax.jit(jax.grad(jax.grad(f)))
    assert float(jax.jit(jax.jacfwd(f))(2.0)) == pytest.approx(float(first(2.0)), rel=1e-12)
    assert float(second(2.0)) == pytest.approx(float((first(2.0 + 1e-4) - first(2.0 - 1e-4)) / 2e-4), rel=1e-6)


def test_a_gradient_in_the_mean():
    def end(mean):
        schedule = MeanReverting(VP(), mean, scale=0.5)
        noise = lambda t, x, args: jnp.tanh(x - 2 * mean)
        return sample(Denoiser(noise, schedule), jnp.array([0.4, -1.1]), solver=DDIM(), num_steps=4).sum()

    m, h = jnp.array([0.2, 0.1]), 1e-5
    wanted = (end(m + h) - end(m - h)) / (2 * h)
    assert float(jax.grad(end)(m).sum()) == pytest.approx(float(wanted), rel=1e-7)


def test_in_single_precision_the_grid_can_be_learned():
    def final(times):
        x = jnp.asarray(START[1], times.dtype)
        net = lambda t, x, args: jnp.tanh(2 * x + t)
        return sample(Denoiser(net, SCHEDULE), x, solver=UniPC(2), grid=on(times)).sum()

    single, double = (jax.jit(jax.grad(final))(jnp.asarray(TIMES, dtype)) for dtype in (jnp.float32, jnp.float64))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, double, rtol=1e-4, atol=1e-4 * float(jnp.abs(double).max()))


# ---- Steps that are undone. ----


UNDO = sf.adjoints.ReversibleAdjoint()


def ends(adjoint, gamma=1.0, steps=12, x=START[1]):
    def f(weights, x):
        out = sample(
            Denoiser(Net(weights), SCHEDULE), x, solver=BDIA(gamma), num_steps=steps, adjoint=adjoint, return_state=True
        )
        return (out[0] * jnp.array([1.0, -0.7])).sum() + 0.3 * out[1][0]

    return jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(*map(jnp.asarray, (START[0], x)))


@pytest.mark.parametrize("gamma", [1.0, 0.8])
def test_undone_steps_have_the_gradients_of_kept_ones(gamma):
    kept, undone = ends(sf.adjoints.DiscreteAdjoint(), gamma), ends(sf.adjoints.ReversibleAdjoint(), gamma)
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(undone)):
        np.testing.assert_allclose(a, b, rtol=1e-11)


def test_a_pair_has_gradients_too():
    def f(pair, adjoint):
        return sample(Denoiser(Net(START[0]), SCHEDULE), pair, solver=BDIA(), num_steps=8, adjoint=adjoint).sum()

    pair = (jnp.asarray(START[1]), jnp.asarray(0.99 * START[1]))
    a, b = (jax.grad(f)(pair, adjoint) for adjoint in (None, sf.adjoints.ReversibleAdjoint()))
    np.testing.assert_allclose(a[0], b[0], rtol=1e-11)
    np.testing.assert_allclose(a[1], b[1], rtol=1e-11)


def test_batches_of_undone_steps():
    xs = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2)))

    def f(weights, adjoint):
        one = lambda x: sample(Denoiser(Net(weights), SCHEDULE), x, solver=BDIA(), num_steps=8, adjoint=adjoint).sum()
        return jax.vmap(one)(xs).sum()

    a, b = (jax.jit(jax.grad(f), static_argnums=1)(jnp.asarray(START[0]), adjoint) for adjoint in (None, UNDO))
    np.testing.assert_allclose(a, b, rtol=1e-10)


def test_undoing_needs_memory_for_one_state():
    def temporary(steps, adjoint):
        f = lambda w, x: sample(Denoiser(Net(w), SCHEDULE), x, solver=BDIA(), num_steps=steps, adjoint=adjoint).sum()
        wide = lambda w: jax.vmap(lambda k: f(w, jnp.zeros(2) + k))(jnp.arange(500.0)).sum()
        return jax.jit(jax.grad(wide)).lower(jnp.asarray(START[0])).compile().memory_analysis().temp_size_in_bytes

    small, large = (temporary(n, UNDO) for n in (10, 200))
    assert large < 1.2 * small
    assert temporary(200, sf.adjoints.DiscreteAdjoint()) > 5 * large


def test_what_undoing_cannot_do():
    with pytest.raises(ValueError, match="BDIA"):
        sample(guided(START[0], 1.0), START[1], solver=UniPC(2), num_steps=4, adjoint=sf.adjoints.ReversibleAdjoint())

    def in_times(times):
        return sample(
            guided(START[0], 1.0), START[1], solver=BDIA(), grid=on(times), adjoint=sf.adjoints.ReversibleAdjoint()
        ).sum()

    with pytest.raises(ValueError, match="grid"):
        jax.grad(in_times)(jnp.asarray(TIMES))
    # Rounding that has grown beyond what is allowed gives no gradient, not a wrong one.
    _, (lost, _) = ends(sf.adjoints.ReversibleAdjoint(), gamma=0.3, steps=60)
    assert bool(jnp.isnan(lost).all())


@pytest.mark.parametrize("solver", [Multistep(4), DPMSolverV3(FITTED, 2)], ids=["Multistep", "v3"])
def test_gradients_at_the_end_without_noise(solver):
    f = lambda x: sample(guided(START[0], 2.0), x, solver=solver, num_steps=5, t_end=0.0).sum()
    x, h = jnp.asarray(START[1]), 1e-5
    wanted = (f(x + h) - f(x - h)) / (2 * h)
    assert float(jax.grad(f)(x).sum()) == pytest.approx(float(wanted), rel=1e-7)
