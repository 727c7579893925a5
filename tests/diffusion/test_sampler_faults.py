"""Traced grids, ends without noise, batches in a state, starts without signal, meshes of devices, unrolled loops."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import sdeflow as sf
from sdeflow.diffusion import (
    BDIA,
    DDIM,
    DEIS,
    DPS,
    EDM,
    VP,
    ClassifierGuided,
    Cosine,
    Denoiser,
    DPMSolverPP,
    EDMLoss,
    Flow,
    Guided,
    Langevin,
    Multistep,
    Precondition,
    Singlestep,
    Tabulated,
    Thresholded,
    UniPC,
    invert,
    sample,
)
from tests.helpers import diffusion as gmm

pytestmark = pytest.mark.usefixtures("x64_module")

SCHEDULE = VP()
MEAN, DEVIATION = 2.0, 0.5
NORMAL = Denoiser(
    lambda t, x, args: (
        SCHEDULE.sigma(t)
        * (x - MEAN * SCHEDULE.alpha(t))
        / (SCHEDULE.alpha(t) ** 2 * DEVIATION**2 + SCHEDULE.sigma(t) ** 2)
    ),
    SCHEDULE,
)
X = np.random.default_rng(0).standard_normal((20, 3))


def grid_of(times):
    n = len(times) - 1
    return sf.grids.Grid(times[:-1], times[1:], np.ones(n, bool), np.array([0, n]))


def at_zero(x):
    """Where the ordinary equation leads from t = 1, for normal data."""
    alpha, sigma = SCHEDULE.alpha(1.0), SCHEDULE.sigma(1.0)
    return MEAN + DEVIATION * (x - MEAN * alpha) / np.sqrt(alpha**2 * DEVIATION**2 + sigma**2)


@pytest.mark.parametrize(
    "solver",
    [
        pytest.param(UniPC(3), id="UniPC"),
        pytest.param(Singlestep(2, "data"), id="2S"),
        pytest.param(DPMSolverPP(2, tau=1.0), id="SDE", marks=pytest.mark.slow),
        pytest.param(DEIS(3), id="DEIS", marks=pytest.mark.slow),
        pytest.param(BDIA(), id="BDIA", marks=pytest.mark.slow),
        pytest.param(Singlestep(method="heun", churn=3.0), id="Heun", marks=pytest.mark.slow),
    ],
)
def test_a_traced_grid_is_the_known_one(solver):
    draws = getattr(solver, "tau", 0) or getattr(solver, "churn", 0)
    key = jr.key(1) if draws else None
    loss = lambda times: (sample(NORMAL, X, solver=solver, grid=grid_of(times), key=key) * X[::-1]).sum()
    traced = jax.jit(jax.value_and_grad(loss))
    wanted = lambda times: float(loss(times))
    for end in (1e-3, 0.0):
        times, h = np.linspace(1, end, 6), 1e-6
        value, gradient = traced(jnp.asarray(times))
        assert float(value) == pytest.approx(wanted(times), rel=1e-8)
        assert bool(jnp.isfinite(gradient).all())
        for i in (2, 4):
            e = h * np.eye(6)[i]
            assert float(gradient[i]) == pytest.approx((wanted(times + e) - wanted(times - e)) / (2 * h), rel=1e-5)


def test_a_traced_grid_by_subdivide_and_what_cannot_be_right():
    draw = jax.jit(lambda times: sample(NORMAL, X, solver=UniPC(3), grid=sf.grids.subdivide(times, 1)))
    times = np.linspace(1, 0, 9)
    wanted = sample(NORMAL, X, solver=UniPC(3), grid=grid_of(times))
    np.testing.assert_allclose(draw(jnp.asarray(times)), wanted, rtol=1e-9)
    padded, turned = np.append(times[:-1], times[-2]), times[[0, 1, 2, 4, 3, 5, 6, 7, 8]]
    for wrong in (padded, turned, times - 0.1):
        assert bool(jnp.isnan(draw(jnp.asarray(wrong))).all())
    back = jax.jit(lambda times: invert(NORMAL, X, solver=UniPC(3), grid=sf.grids.subdivide(times, 1)))
    assert bool(jnp.isnan(back(jnp.asarray(times))).all())


@pytest.mark.parametrize("grid", ["t", "quadratic"])
def test_equal_steps_go_all_the_way_to_zero(grid):
    found = sf.diffusion.sampling_grid(SCHEDULE, 5, grid, t_end=0.0)
    np.testing.assert_allclose(found.right, np.linspace(1, 0, 6)[1:] ** (2 if grid == "quadratic" else 1), atol=1e-12)
    errors = [
        float(jnp.abs(sample(NORMAL, X, solver=DPMSolverPP(2), num_steps=n, grid=grid, t_end=0.0) - at_zero(X)).mean())
        for n in (10, 20, 40)
    ]
    # A wasted step cost a factor of five at twenty steps.
    assert errors[0] < 0.09
    assert errors[1] < 0.025
    assert errors[2] < errors[1] / 3


def test_steps_are_undone_in_either_form_and_what_diverges_is_an_error():
    x = jnp.array([2.3, 1.6, 2.0])
    for solver in (DDIM(), Multistep(1, "noise")):
        options = {"solver": solver, "num_steps": 50, "grid": "t"}
        noise = invert(NORMAL, x, fixed_point=20, **options)
        np.testing.assert_allclose(sample(NORMAL, noise, **options), x, atol=1e-12)
        with pytest.raises(sf.SolveError, match="fixed_point"):
            invert(gmm.denoiser(), jnp.asarray(gmm.reference(2)), solver=solver, num_steps=6, fixed_point=8)
    # Nothing is all of its size.
    even = Denoiser(lambda t, x, args: SCHEDULE.sigma(t) * x, SCHEDULE)
    assert not invert(even, jnp.zeros(2), solver=DDIM(), num_steps=4, fixed_point=2).any()
    lost = jax.jit(lambda x: invert(gmm.denoiser(), x, solver=DDIM(), num_steps=6, fixed_point=8).sum())
    value, slope = jax.value_and_grad(lost)(jnp.asarray(gmm.reference(2)))
    assert bool(jnp.isnan(value))
    assert bool(jnp.isnan(slope).all())


def test_a_batch_is_never_taken_for_one_sample():
    draw = lambda denoiser, x, **options: sample(denoiser, x, solver=DDIM(), num_steps=6, **options)
    whole, last = Thresholded(NORMAL, 0.9), Thresholded(NORMAL, 0.9, sample_ndim=1)
    wanted = jax.vmap(lambda x: draw(whole, x))(X)
    np.testing.assert_allclose(draw(last, X), wanted, rtol=1e-12)
    np.testing.assert_allclose(jax.vmap(jax.jit(lambda x: draw(last, x)))(X), wanted, rtol=1e-12)
    within = Guided(NORMAL, ClassifierGuided(whole, lambda t, x, args: x.sum()), 1.0)
    for call in (
        lambda: draw(whole, X),
        lambda: draw(within, X),
        lambda: invert(whole, X, solver=DDIM(), num_steps=3),
        lambda: sf.diffusion.log_prob(whole, X),
        lambda: sf.diffusion.extract_noise(whole, X, solver=DDIM(1.0), num_steps=3, key=jr.key(0)),
        lambda: draw(NORMAL, X, corrector=Langevin(norms="sample"), key=jr.key(0)),
        lambda: draw(NORMAL, X, constraint=DPS(lambda x: 2 * x, X)),
        lambda: jax.jit(lambda x: draw(whole, x))(X),
    ):
        with pytest.raises(ValueError, match=r"jax.vmap.*sample_ndim"):
            call()
    with pytest.raises(ValueError, match="4 axes"):
        draw(Thresholded(NORMAL, sample_ndim=4), X)
    with pytest.raises(ValueError, match="sample_ndim"):
        Thresholded(NORMAL, sample_ndim=-1)


def test_what_looks_at_a_sample_of_a_batch_looks_at_each():
    observe = lambda x: x[..., :2]
    one = lambda x, y: sample(NORMAL, x, solver=DDIM(), num_steps=6, constraint=DPS(observe, y, 0.3))
    many = sample(NORMAL, X, solver=DDIM(), num_steps=6, constraint=DPS(observe, X[:, :2], 0.3, sample_ndim=1))
    np.testing.assert_allclose(many, jax.vmap(one)(X, X[:, :2]), rtol=1e-10)
    # One key for all: only the sizes of the noises differ from those of a single sample.
    move = lambda x, ndim: Langevin(norms="sample", sample_ndim=ndim)(NORMAL, 0.5, jnp.asarray(x), None, jr.key(3))
    np.testing.assert_allclose(move(X, 2), move(X, None), rtol=1e-12)
    apart = move(jnp.asarray(X).at[0].multiply(100), 1)
    np.testing.assert_allclose(apart[1:], move(X, 1)[1:], rtol=1e-12)


ZERO = Tabulated(np.append(np.linspace(1e-4, 0.02, 999), 1.0))


@pytest.mark.parametrize("schedule", [Flow(t_max=1.0), Cosine(t_max=1.0), ZERO], ids=["Flow", "Cosine", "table"])
def test_schedules_that_start_from_pure_noise(schedule):
    def data(t, x):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return (MEAN * sigma**2 + alpha * DEVIATION**2 * x) / (sigma**2 + alpha**2 * DEVIATION**2)

    def flow(t, x, args):
        denoiser = Denoiser(lambda t, x, args: data(t, x), schedule, prediction="data")
        return denoiser.predict("flow", t, x)

    x = jr.normal(jr.key(1), (200,))
    for denoiser in (
        Denoiser(lambda t, x, args: data(t, x), schedule, prediction="data"),
        Denoiser(flow, schedule, prediction="flow"),
    ):
        for solver in (DPMSolverPP(2), Singlestep(2)):
            out = sample(denoiser, x, solver=solver, num_steps=200, grid="t")
            np.testing.assert_allclose(out, MEAN + DEVIATION * x, atol=0.08)
    with pytest.raises(ValueError, match="no signal"):
        sample(Denoiser(lambda t, x, args: x, schedule), x, solver=DDIM(), num_steps=3)


def test_rates_that_no_table_has():
    with pytest.raises(ValueError, match=r"betas\[1\]=1"):
        Tabulated([0.1, 1.0, 0.5])
    with pytest.raises(ValueError, match="t_max"):
        Flow(t_max=1.1)


def test_guidance_changes_with_time():
    to = lambda m: Denoiser(lambda t, x, args: m + 0 * x, SCHEDULE, prediction="data")
    guided = Guided(to(1.0), to(0.0), lambda t: jnp.where(t > 0.5, 3.0, 0.0))
    assert [float(guided.predict("data", t, jnp.array(0.2))) for t in (0.9, 0.1)] == [3.0, 0.0]
    fixed, likely = ClassifierGuided(to(0.0), lambda t, x, args: x, 2.0), lambda t, x, args: x
    moving = ClassifierGuided(to(0.0), likely, lambda t: 2.0)
    assert float(moving.predict("data", 0.3, jnp.array(0.2))) == float(fixed.predict("data", 0.3, jnp.array(0.2)))
    with pytest.raises(ValueError, match="one number"):
        Guided(to(1.0), to(0.0), lambda t: jnp.ones(2)).predict("data", 0.5, jnp.array(0.2))


def test_half_precision():
    best = Precondition(lambda label, y, args: 0 * y, EDM())
    values = (0.5 * jr.normal(jr.key(0), (4096, 2))).astype(jnp.bfloat16)
    loss, _ = EDMLoss()(best, values, jr.key(1), 0)
    assert float(loss) == pytest.approx(1, abs=0.1)
    # A network of low precision in a state of high precision costs what the network's rounding costs.
    low = Denoiser(lambda t, x, args: NORMAL.fn(t, x, args).astype(jnp.bfloat16), SCHEDULE)
    draw = lambda denoiser, x: sample(denoiser, x, solver=UniPC(2), num_steps=10)
    np.testing.assert_allclose(draw(low, X), draw(NORMAL, X), atol=0.01)
    np.testing.assert_allclose(draw(NORMAL, jnp.asarray(X, jnp.bfloat16)).astype(float), draw(NORMAL, X), atol=0.06)


def test_a_network_that_is_nan_is_named():
    with pytest.raises(sf.SolveError, match="network") as caught:
        sample(Denoiser(lambda t, x, args: x * jnp.nan, SCHEDULE), X, solver=DDIM(), num_steps=3)
    assert "drift" not in str(caught.value)


@pytest.mark.parametrize("unroll", [True, 3, 100])
def test_unrolled_loops_give_the_same(unroll):
    options = {"solver": UniPC(2), "num_steps": 7}
    both = lambda **o: jax.value_and_grad(lambda x: sample(NORMAL, x, **options, **o).sum())(X[0])
    np.testing.assert_allclose(both(unroll=unroll)[1], both()[1], rtol=1e-10)
    back = lambda **o: invert(NORMAL, X[0], solver=DDIM(), num_steps=7, grid="t", t_end=0.1, fixed_point=30, **o)
    np.testing.assert_allclose(back(unroll=unroll), back(), rtol=1e-10)


def test_unrolling_is_no_loop_whatever_was_compiled_before():
    loops = lambda unroll: str(
        jax.make_jaxpr(lambda x: sample(NORMAL, x, solver=DDIM(), num_steps=4, unroll=unroll))(X)
    )
    assert "unroll=1" in loops(1)
    assert "unroll=4" in loops(True)
    with pytest.raises(ValueError, match="unroll"):
        sample(NORMAL, X, solver=DDIM(), num_steps=4, unroll=0)
    with pytest.raises(ValueError, match="undoes"):
        sample(NORMAL, X, solver=BDIA(), num_steps=4, unroll=True, adjoint=sf.adjoints.ReversibleAdjoint())


@pytest.mark.parametrize("checked", [True, False])
def test_samplers_within_a_mesh_of_devices(checked):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("b",))
    spec = jax.sharding.PartitionSpec("b")

    def jobs(x, key):
        return (
            sample(NORMAL, x, solver=UniPC(3), num_steps=4),
            # What varies from device to device is not the start, but the noise.
            sample(NORMAL, jnp.ones(3), solver=DDIM(1.0), num_steps=4, key=key),
            invert(NORMAL, x, solver=DDIM(), num_steps=4, grid="t", t_end=0.3, fixed_point=30),
            sf.diffusion.log_prob(NORMAL, x, solver=DDIM(), num_steps=4),
        )

    keys = jr.split(jr.key(0), len(X))
    f = jax.shard_map(jax.vmap(jobs), mesh=mesh, in_specs=(spec, spec), out_specs=spec, check_vma=checked)
    for found, wanted in zip(jax.jit(f)(X, keys), jax.vmap(jobs)(X, keys)):
        np.testing.assert_allclose(found, wanted, rtol=1e-9)


def test_samplers_over_an_explicit_mesh():
    mesh = jax.make_mesh((1,), ("b",))
    with jax.set_mesh(mesh):
        x = jax.device_put(X, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("b")))
        draw = lambda x: sample(NORMAL, x, solver=UniPC(3), num_steps=4)
        np.testing.assert_allclose(jax.jit(draw)(x), draw(X), rtol=1e-9)
        back = jax.vmap(lambda x: invert(NORMAL, x, solver=DDIM(), num_steps=4, grid="t", t_end=0.3, fixed_point=30))
        np.testing.assert_allclose(jax.jit(back)(x), back(X), rtol=1e-9)
