"""Every accepted step, and the solution between the steps: what diffrax saves, and closed forms."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdeflow as sf

pytestmark = pytest.mark.usefixtures("x64_module")

Y0 = np.array([1.0, 0.2])
PID = dfx.PIDController(rtol=1e-5, atol=1e-7)
ADJOINTS = {
    "discrete": sf.adjoints.DiscreteAdjoint(),
    "stored": dfx.RecursiveCheckpointAdjoint(),
}


def field(t, y, args):
    return args * jnp.stack([y[1], -y[0]]) * (1 + t)


def solved(ts, args=2.0, **options):
    return sf.solve(sf.ODE(field), Y0, ts, args=args, **{"solver": dfx.Tsit5(), **options})


def exact(t, args=2.0):
    angle = args * (t + t**2 / 2)
    return jnp.stack([jnp.cos(angle) + 0.2 * jnp.sin(angle), 0.2 * jnp.cos(angle) - jnp.sin(angle)], axis=-1)


def theirs(t0, t1, saveat, args=2.0, **options):
    options = {"stepsize_controller": PID, "dt0": None, **options}
    dt0 = options.pop("dt0")
    return dfx.diffeqsolve(dfx.ODETerm(field), dfx.Tsit5(), t0, t1, dt0, Y0, args, saveat=saveat, **options)


STEPS = {
    "fixed": {"dt0": 0.125},
    "adaptive": {"stepsize_controller": PID, "max_steps": 64},
    "backwards": {"dt0": -0.125},
    "adaptive backwards": {"stepsize_controller": PID, "max_steps": 64},
}


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("kind", STEPS)
def test_every_step_is_that_of_diffrax(kind, adjoint):
    ends = (1.0, 0.0) if "backwards" in kind else (0.0, 1.0)
    how = {"adjoint": ADJOINTS[adjoint], **STEPS[kind]}
    ours = solved(ends, save="steps", **how)
    controller = {k: v for k, v in STEPS[kind].items() if k == "stepsize_controller"}
    if not controller:
        controller = {"stepsize_controller": dfx.ConstantStepSize(), "dt0": STEPS[kind]["dt0"]}
    other = theirs(*ends, dfx.SaveAt(t0=True, steps=True), max_steps=64, **controller)
    count = int(ours.stats["num_steps"])
    assert count == int(other.stats["num_accepted_steps"])
    # The controller magnifies how the stages are rounded.
    np.testing.assert_allclose(ours.ts[: count + 1], other.ts[: count + 1], rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(ours.ys[: count + 1], other.ys[: count + 1], rtol=1e-9)
    assert np.isinf(ours.ts[count + 1 :]).all()
    assert np.isinf(ours.ys[count + 1 :]).all()
    assert len(ours.ts) == (9 if "adaptive" not in kind else 65)
    assert f"{count + 1} times" in repr(ours)


@pytest.mark.parametrize("kind", ["fixed", "adaptive"])
def test_gradients_of_all_steps_are_those_of_diffrax(kind):
    how = STEPS[kind]

    def of(solve):
        def loss(args):
            sol = solve(args)
            keep = jnp.isfinite(sol.ts)
            return jnp.where(keep[:, None], sol.ys, 0).sum() + jnp.where(keep, sol.ts, 0).sum()

        return jax.jit(jax.value_and_grad(loss))(jnp.array(2.0))

    controller = {"max_steps": 64} if kind == "adaptive" else {
        "max_steps": 64, "stepsize_controller": dfx.ConstantStepSize(), "dt0": 0.125
    }  # fmt: skip
    value, grad = of(lambda args: solved((0.0, 1.0), args, save="steps", **how))
    value_d, grad_d = of(lambda args: theirs(0.0, 1.0, dfx.SaveAt(t0=True, steps=True), args, **controller))
    np.testing.assert_allclose(value, value_d, rtol=1e-10)
    np.testing.assert_allclose(grad, grad_d, rtol=1e-8)


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("kind", STEPS)
def test_between_the_steps_is_the_interpolation_of_diffrax(kind, adjoint):
    ends = (1.0, 0.0) if "backwards" in kind else (0.0, 1.0)
    sol = solved(ends, dense=True, adjoint=ADJOINTS[adjoint], **STEPS[kind])
    controller = {k: v for k, v in STEPS[kind].items() if k == "stepsize_controller"}
    if not controller:
        controller = {"stepsize_controller": dfx.ConstantStepSize(), "dt0": STEPS[kind]["dt0"]}
    other = theirs(*ends, dfx.SaveAt(dense=True), max_steps=64, **controller)
    at = jnp.array([[0.0, 0.03, 0.25], [0.5, 0.77, 1.0]])
    want = jax.vmap(jax.vmap(other.evaluate))(at)
    np.testing.assert_allclose(sol.evaluate(at), want, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(jax.jit(lambda s, t: s.evaluate(t))(sol, 0.77), want[1, 1], rtol=1e-9)
    assert np.isnan(sol.evaluate(jnp.array([-0.1, 1.1]))).all()
    np.testing.assert_allclose(sol.ys[-1], sol.final, rtol=1e-12)


@pytest.mark.parametrize("kind", ["fixed", "adaptive"])
def test_gradients_between_the_steps(kind):
    value = lambda args: solved((0.0, 1.0), args, dense=True, **STEPS[kind]).evaluate(0.33).sum()
    right = lambda args: exact(0.33, args).sum()
    np.testing.assert_allclose(jax.jit(jax.grad(value))(2.0), jax.grad(right)(2.0), rtol=1e-3)
    eps = 1e-6
    np.testing.assert_allclose(
        jax.grad(value)(2.0), (value(2.0 + eps) - value(2.0 - eps)) / (2 * eps), rtol=1e-6 if kind == "fixed" else 1e-3
    )


def test_padding_is_no_step():
    grid = sf.grids.through([0.0, 0.4, 1.0], dt0=0.25, num_steps=12)
    plain = solved([0.0, 0.4, 1.0], dt0=0.25, save="steps", dense=True)
    sol = solved([0.0, 0.4, 1.0], grid=grid, save="steps", dense=True)
    count = int(sol.stats["num_steps"])
    assert count == int(plain.stats["num_steps"]) < 12
    np.testing.assert_array_equal(sol.ts[: count + 1], plain.ts)
    np.testing.assert_array_equal(sol.ys[: count + 1], plain.ys)
    assert np.isinf(sol.ys[count + 1 :]).all()
    np.testing.assert_array_equal(sol.evaluate(jnp.array([0.1, 0.4, 1.0])), plain.evaluate(jnp.array([0.1, 0.4, 1.0])))


def test_what_save_fn_makes_is_saved_and_evaluated():
    how = {"dt0": 0.125, "dense": True, "save": "steps", "save_fn": lambda t, y, args: {"sum": y.sum() + t}}
    sol = solved((0.0, 1.0), **how)
    assert sol.ys["sum"].shape == (9,)
    np.testing.assert_allclose(sol.evaluate(sol.ts[1:])["sum"], sol.ys["sum"][1:], rtol=1e-10)
    charged = solved((0.0, 1.0), regularisers=[sf.regularisers.Kinetic()], **how)
    np.testing.assert_allclose(charged.evaluate(0.4)["sum"], sol.evaluate(0.4)["sum"], rtol=1e-10)
    np.testing.assert_allclose(charged.ys["sum"], sol.ys["sum"], rtol=1e-10)


def test_an_event_ends_the_steps():
    event = dfx.Event(lambda t, y, args, **kwargs: y[0])
    for how in (STEPS["fixed"], STEPS["adaptive"]):
        sol = solved((0.0, 2.0), event=event, save="steps", dense=True, **how)
        count = int(sol.stats["num_steps"])
        reached = float(sol.stats["time_reached"])
        assert 0 < reached < 2
        assert sol.ts[count] == reached
        assert np.isinf(sol.ts[count + 1 :]).all()
        np.testing.assert_allclose(sol.evaluate(0.1), exact(0.1), rtol=1e-3)


def test_noise_linear_equations_and_batches():
    ou = sf.equations.OrnsteinUhlenbeck(theta=2.0, sigma=0.5)
    key = jax.random.key(0)
    sol = sf.solve(ou, jnp.ones(2), [0.0, 1.0], dt0=0.25, key=key, save="steps", dense=True)
    np.testing.assert_allclose(sol.evaluate(sol.ts), sol.ys, rtol=1e-12)
    run = lambda key: sf.solve(ou, jnp.ones(2), [0.0, 1.0], dt0=0.25, key=key, save="steps", dense=True).evaluate(1.0)
    finals = jax.vmap(run)(jax.random.split(key, 3))
    assert len(np.unique(finals)) == 6


def test_nothing_is_left_of_what_failed():
    blow = sf.ODE(lambda t, y, args: args * y**2)
    run = lambda args: sf.solve(
        blow, jnp.array(1.0), [0.0, 2.0], args=args, stepsize_controller=PID, max_steps=40, throw=False, save="steps",
        dense=True,
    )  # fmt: skip
    sol = run(1.0)
    assert not sf.is_okay(sol.result)
    assert float(sol.stats["time_reached"]) < 1
    np.testing.assert_allclose(sol.evaluate(0.5), 2.0, rtol=1e-4)
    assert np.isnan(sol.evaluate(1.5))
    count = int(sol.stats["num_steps"])
    np.testing.assert_allclose(sol.ys[: count + 1], 1 / (1 - sol.ts[: count + 1]), rtol=1e-2)
    assert not np.isfinite(sol.ys[count + 1 :]).any()
    assert np.isnan(jax.grad(lambda args: run(args).evaluate(0.5))(1.0))


def test_what_cannot_be_saved_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r'save must be "requested" or "steps", got "all"|got .all.'):
        solved((0.0, 1.0), dt0=0.1, save="all")
    with pytest.raises(ValueError, match=r"BacksolveAdjoint knows no states .*DiscreteAdjoint"):
        solved((0.0, 1.0), dt0=0.1, save="steps", adjoint=dfx.BacksolveAdjoint())
    with pytest.raises(ValueError, match=r"ContinuousAdjoint does not keep what is between"):
        solved((0.0, 1.0), dt0=0.1, dense=True, adjoint=sf.adjoints.ContinuousAdjoint())
    with pytest.raises(ValueError, match=r"give max_steps="):
        solved((0.0, 1.0), stepsize_controller=PID, dense=True, max_steps=None)
    with pytest.raises(ValueError, match=r"pass dense=True to sf.solve"):
        solved((0.0, 1.0), dt0=0.1).evaluate(0.5)
