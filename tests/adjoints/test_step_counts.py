"""How many steps a plain ``diffeqsolve`` takes, known or not while it is traced, with ``adjoint=DiscreteAdjoint()``."""

import diffrax
import jax
import jax.numpy as jnp
import jax.random as jr
import lineax as lx
import numpy as np
import pytest

import sdeflow as sf

DISCRETE = sf.adjoints.DiscreteAdjoint()


def _counted(adjoint, max_steps, saveat, noisy=False):
    """Values at an end that is traced or known."""

    def run(y0, end, rate):
        drift = diffrax.ODETerm(lambda t, y, rate: -rate * y * (1 + 0.1 * t))
        path = diffrax.VirtualBrownianTree(0.0, 4.0, tol=0.02, shape=(2,), key=jr.key(0))
        noise = diffrax.ControlTerm(lambda t, y, rate: lx.DiagonalLinearOperator(0.1 * y), path)
        sol = diffrax.diffeqsolve(
            diffrax.MultiTerm(drift, noise) if noisy else drift, diffrax.Heun() if noisy else diffrax.Tsit5(), 0.0, end,
            0.1, y0, args=rate, saveat=saveat, max_steps=max_steps, adjoint=adjoint, throw=False,
        )  # fmt: skip
        return sol.ys, sol.ts, sol.stats["num_steps"]

    return run


SAVES = {
    "end": lambda: diffrax.SaveAt(t1=True),
    "few times": lambda: diffrax.SaveAt(t0=True, ts=jnp.array([0.0, 0.05, 0.1, 0.33, 1.0])),
    "many times": lambda: diffrax.SaveAt(ts=jnp.linspace(0.0, 1.0, 150), t1=True),
    "steps": lambda: diffrax.SaveAt(steps=True),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("save", SAVES)
def test_a_traced_number_of_steps_gives_what_a_known_one_and_diffrax_give(save, noisy):
    y0, rate = jnp.array([1.0, -0.5]), jnp.array(0.7)
    theirs = jax.jit(_counted(diffrax.RecursiveCheckpointAdjoint(), 100, SAVES[save](), noisy))
    ours = jax.jit(_counted(DISCRETE, 100, SAVES[save](), noisy))
    known = jax.jit(lambda y0, rate: _counted(DISCRETE, 100, SAVES[save](), noisy)(y0, 1.0, rate))
    expected = theirs(y0, 1.0, rate)
    for found in (ours(y0, 1.0, rate), known(y0, rate)):
        for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
            np.testing.assert_allclose(one, two, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("x64")
def test_derivatives_of_every_order_go_through_a_traced_number_of_steps():
    saveat = SAVES["few times"]()
    loss = lambda run: lambda y0, rate: (run(y0, 1.0 + 0 * jnp.sum(y0), rate)[0] ** 2).sum()
    ours = loss(jax.jit(_counted(DISCRETE, 4096, saveat)))
    known = lambda y0, rate: (_counted(DISCRETE, 4096, saveat)(y0, 1.0, rate)[0] ** 2).sum()
    y0, rate = jnp.array([1.0, -0.5]), jnp.array(0.7)
    for derivative in (jax.grad(ours, argnums=(0, 1)), jax.hessian(ours, argnums=1), jax.jacfwd(ours, argnums=1)):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(derivative(y0, rate)))
    np.testing.assert_allclose(jax.grad(ours, 1)(y0, rate), jax.grad(known, 1)(y0, rate), rtol=1e-12)
    np.testing.assert_allclose(jax.hessian(ours, 1)(y0, rate), jax.hessian(known, 1)(y0, rate), rtol=1e-10)
    step = 1e-5
    slope = (ours(y0, rate + step) - ours(y0, rate - step)) / (2 * step)
    np.testing.assert_allclose(jax.grad(ours, 1)(y0, rate), slope, rtol=1e-8)


@pytest.mark.usefixtures("x64")
def test_every_member_of_a_batch_takes_its_own_number_of_steps():
    y0, rate = jnp.array([1.0, -0.5]), jnp.array(0.7)
    ends = jnp.array([0.05, 0.1, 0.85, 1.7, 4.0])
    run = _counted(DISCRETE, 50, diffrax.SaveAt(ts=jnp.array([0.01, 0.02, 0.05]), t1=True), noisy=True)
    together = jax.jit(jax.vmap(run, in_axes=(None, 0, None)))(y0, ends, rate)
    assert together[2].tolist() == [1, 1, 9, 17, 40]
    for i, end in enumerate(ends):
        alone = jax.jit(run)(y0, end, rate)
        for one, two in zip(jax.tree.leaves(together), jax.tree.leaves(alone)):
            np.testing.assert_allclose(one[i], two, rtol=1e-12)
    alone = lambda rate, end: (run(y0, end, rate)[0] ** 2).sum()
    slopes = jax.jit(jax.vmap(jax.grad(alone), in_axes=(None, 0)))(rate, ends)
    np.testing.assert_allclose(slopes[2], jax.jit(jax.grad(alone))(rate, ends[2]), rtol=1e-12)


@pytest.mark.parametrize("known", [True, False])
def test_memory_follows_the_steps_and_not_their_bound(known):
    y0 = jnp.ones(2000)

    def memory(max_steps):
        def run(y0, end):
            return diffrax.diffeqsolve(
                diffrax.ODETerm(lambda t, y, args: -y), diffrax.Tsit5(), 0.0, 1.0 if known else end, 0.1, y0,
                saveat=SAVES["few times"](), max_steps=max_steps, adjoint=DISCRETE,
            ).ys.sum()  # fmt: skip

        lowered = jax.jit(jax.grad(run)).lower(y0, jnp.array(1.0))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert memory(10**6) <= memory(16) + 100 * y0.nbytes


@pytest.mark.parametrize("adjoint", [DISCRETE, sf.adjoints.ContinuousAdjoint(), sf.adjoints.InterpolatingAdjoint()])
@pytest.mark.parametrize("times", [[0.5, 1.0, 2.0], [0.0, 0.5, 1.0], [0.0, 0.5, 3.0], [0.0, 2.3, 2.0]])
def test_times_to_step_to_must_span_the_solve_as_in_diffrax(times, adjoint):
    with pytest.raises(Exception, match="StepTo|Must have"):
        diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -y), diffrax.Tsit5(), 0.0, 2.0, None, jnp.array(1.0),
            stepsize_controller=diffrax.StepTo(ts=jnp.array(times)), adjoint=adjoint,
        )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*is not marked as converging")
@pytest.mark.parametrize("seed", [0, 1])
def test_a_solver_that_looks_two_steps_back_has_the_noise_of_both(seed):
    path = diffrax.VirtualBrownianTree(0.0, 1.0, 1e-3, (), jax.random.key(seed))
    noise = diffrax.ControlTerm(lambda t, y, args: 0.3, path)
    terms = diffrax.MultiTerm(diffrax.ODETerm(lambda t, y, args: -args * y), noise)

    def final(args, adjoint):
        return diffrax.diffeqsolve(terms, diffrax.LeapfrogMidpoint(), 0.0, 1.0, 0.1, 1.0, args, adjoint=adjoint).ys[0]

    ours, theirs = (
        jax.value_and_grad(final)(jnp.array(1.0), adjoint)
        for adjoint in (sf.adjoints.DiscreteAdjoint(), diffrax.RecursiveCheckpointAdjoint())
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
