"""What a failed solve returns inside of a trace: no number beyond the time reached, and no derivative at all."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdeflow as sf

pytestmark = pytest.mark.usefixtures("x64_module")

PID = dfx.PIDController(rtol=1e-6, atol=1e-9)
SQUARE = sf.ODE(lambda t, y, k: k * y**2)  # from 1 it is 1 / (1 - k t)
BREAKS = sf.ODE(lambda t, y, k: jnp.where(t > 0.8, jnp.nan, -k * y))
TS = np.array([0.0, 0.5, 1.0, 2.0])
MAX = 2**31 - 1

WAYS = {
    "fixed, implicit": dict(dt0=0.05, solver=dfx.Kvaerno3()),
    "fixed, explicit": dict(dt0=0.05, solver=dfx.Heun()),
    "adaptive": dict(solver=dfx.Tsit5(), stepsize_controller=PID),
    "adaptive, implicit": dict(solver=dfx.Kvaerno3(), stepsize_controller=dfx.PIDController(rtol=1e-3, atol=1e-6)),
    "fixed, by diffrax": dict(dt0=0.05, solver=dfx.Heun(), adjoint=dfx.RecursiveCheckpointAdjoint()),
    "adaptive, by diffrax": dict(
        solver=dfx.Tsit5(), stepsize_controller=PID, adjoint=dfx.RecursiveCheckpointAdjoint()
    ),
    "sqrt": dict(dt0=0.05, solver=dfx.Heun(), adjoint=sf.adjoints.DiscreteAdjoint("sqrt")),
    "reversible": dict(dt0=0.05, solver=dfx.ReversibleHeun(), adjoint=sf.adjoints.ReversibleAdjoint()),
    "interpolating": dict(dt0=0.05, solver=dfx.Heun(), adjoint=sf.adjoints.InterpolatingAdjoint()),
    "two ends": dict(dt0=0.05, solver=dfx.Kvaerno3(), ts=TS[[0, -1]]),
    "event": dict(dt0=0.05, solver=dfx.Heun(), event=dfx.Event(lambda t, y, args, **_: y > 1e30)),
}  # fmt: skip
QUICK = ("fixed, implicit", "adaptive", "fixed, explicit")


def _run(options, k, field=BREAKS):
    options = {"ts": TS, **options}
    return sf.solve(field, jnp.array(1.0), args=k, throw=False, **options)


@pytest.mark.parametrize(
    "way", [w if w in QUICK else pytest.param(w, marks=pytest.mark.slow) for w in WAYS]
)  # fmt: skip
def test_after_a_failure_nothing_is_a_number_but_what_was_reached(way):
    def loss(k):
        sol = _run(WAYS[way], k)
        return sol.ys[0], sol

    (_, sol), of_start = jax.jit(jax.value_and_grad(loss, has_aux=True))(1.0)
    finals = jax.jit(jax.grad(lambda k: _run(WAYS[way], k).final))(1.0)
    assert not bool(sf.is_okay(sol.result))
    assert np.isnan(sol.final)
    assert np.isnan(finals)
    reached, seen = float(sol.stats["time_reached"]), np.asarray(sol.ts) <= 0.8
    print(f"{way}: reached {reached:.4g}, last {float(sol.last):.4g}, ys {np.asarray(sol.ys)}, gradient {of_start}")
    assert 0 <= reached <= 0.85
    np.testing.assert_allclose(sol.ys[seen], np.exp(-sol.ts[seen]), rtol=2e-3)
    assert np.isnan(np.asarray(sol.ys)[~seen]).all()
    np.testing.assert_allclose(sol.last, np.exp(-reached), rtol=2e-3)


def test_every_derivative_of_a_failed_solve_is_nan_also_that_of_states_before_the_failure():
    before = jax.jit(jax.grad(lambda k: _run(WAYS["fixed, implicit"], k).ys[1]))
    assert np.isnan(before(1.0))
    assert np.isnan(jax.jit(jax.grad(lambda k: _run(WAYS["adaptive"], k, SQUARE).ys[1]))(1.0))


def test_a_solution_past_its_blow_up_is_no_number_and_has_no_gradient():
    run = lambda k: _run({}, k, SQUARE)
    value, grad = jax.jit(jax.value_and_grad(lambda k: run(k).final))(1.0)
    assert np.isnan(value)
    assert np.isnan(grad)
    sol = jax.jit(run)(1.0)
    np.testing.assert_allclose(sol.stats["time_reached"], 1.0, atol=0.02)
    np.testing.assert_allclose(sol.ys[1], 2.0, rtol=2e-3)
    assert np.isnan(sol.ys[3])
    # The same solve, short of it, is as it was.
    value, grad = jax.jit(jax.value_and_grad(lambda k: run(k).final))(0.25)
    np.testing.assert_allclose((value, grad), (2.0, 8.0), rtol=2e-2)


@pytest.mark.parametrize("way", ["fixed, implicit", "adaptive"])
def test_in_a_batch_only_the_failed_members_are_nan(way):
    field = sf.ODE(lambda t, y, k: jnp.where((t > 0.8) & (k > 1.5), jnp.nan, -k * y))
    one = lambda k: (lambda sol: (sol.final, sol.stats["time_reached"], sol.last))(_run(WAYS[way], k, field))
    ks = jnp.array([1.0, 2.0])
    final, reached, last = jax.jit(jax.vmap(one))(ks)
    grads = jax.jit(jax.vmap(jax.grad(lambda k: one(k)[0])))(ks)
    np.testing.assert_allclose(final, [np.exp(-2), np.nan], rtol=2e-3)
    np.testing.assert_allclose(grads, [-2 * np.exp(-2), np.nan], rtol=5e-3)
    assert reached[0] == 2.0
    assert reached[1] <= 0.8
    np.testing.assert_allclose(last, np.exp(-ks * reached), rtol=2e-3)


@pytest.mark.parametrize("way", ["fixed, implicit", "adaptive"])
def test_integers_that_were_not_reached_are_the_largest_of_their_type(way):
    counts = lambda t, y, args: {"n": jnp.asarray(10 * t, jnp.int32), "y": y}
    sol = jax.jit(lambda k: _run({**WAYS[way], "save_fn": counts}, k))(1.0)
    assert sol.ys["n"].tolist() == [0, 5, MAX, MAX]
    assert np.isnan(sol.ys["y"]).tolist() == [False, False, True, True]


def test_an_event_that_ends_a_solve_is_no_failure():
    event = dfx.Event(lambda t, y, args, **_: y < 0.5)
    field = sf.ODE(lambda t, y, k: -k * y)
    final = lambda k: _run({**WAYS["adaptive"], "event": event}, k, field)
    sol = jax.jit(final)(1.0)
    assert bool(sf.is_okay(sol.result))
    assert np.isfinite(sol.final)
    np.testing.assert_allclose(sol.last, sol.final)
    assert np.isfinite(jax.jit(jax.grad(lambda k: final(k).final))(1.0))


def test_integrals_beside_a_failed_solve_are_nan_and_a_walk_says_when_it_ended():
    run = lambda k: _run({**WAYS["fixed, implicit"], "regularisers": (sf.regularisers.Kinetic(),)}, k)
    sol = jax.jit(run)(1.0)
    assert np.isnan(sol.penalties["Kinetic"])
    np.testing.assert_allclose(sol.stats["time_reached"], 0.8, atol=0.051)
    good = sf.solve(sf.ODE(lambda t, y, args: -y), jnp.array(1.0), [2.0, 0.0], dt0=-0.1)
    assert float(good.stats["time_reached"]) == 0.0
    np.testing.assert_allclose(good.last, good.final, rtol=0)


def test_a_loss_that_leaves_failed_paths_out_has_its_gradient():
    field = sf.ODE(lambda t, y, k: jnp.where((t > 0.8) & (k > 1.5), jnp.nan, -k * y))

    def loss(ks):
        sol = jax.vmap(lambda k: _run(WAYS["adaptive"], k, field))(ks)
        return jnp.where(sf.is_okay(sol.result), sol.final, 0.0).sum()

    np.testing.assert_allclose(jax.jit(jax.grad(loss))(jnp.array([1.0, 2.0])), [-2 * np.exp(-2), 0.0], rtol=5e-3)


def test_second_derivatives_and_forward_mode_know_of_a_failure_too():
    final = lambda k: _run(WAYS["fixed, implicit"], k).final
    assert np.isnan(jax.jit(jax.grad(jax.grad(final)))(1.0))
    assert np.isnan(jax.jit(lambda k: jax.jvp(final, (k,), (1.0,))[1])(1.0))


@pytest.mark.parametrize("options", [{"dt0": 0.1}, {"stepsize_controller": PID}], ids=["fixed", "adaptive"])
def test_gradients_of_implicit_steps_never_call_the_host_and_keep_a_cotangent_of_nan(options):
    field = sf.ODE(lambda t, y, k: -k * y**3)
    final = lambda k, scale: scale * _run({"solver": dfx.Kvaerno3(), **options}, k, field).final
    gradient = jax.jit(jax.grad(final))
    assert "callback" not in gradient.lower(1.0, 1.0).as_text()
    assert np.isnan(gradient(1.0, jnp.nan))
    # y = (1 + 2 k t)^(-1/2), at t = 2.
    np.testing.assert_allclose(gradient(1.0, 1.0), -2 * 5**-1.5, rtol=1e-3)


def test_the_record_of_a_gradient_grows_with_the_requested_times():
    ts = np.linspace(0.0, 10.0, 301)

    def loss(k, **options):
        sol = sf.solve(sf.ODE(lambda t, y, k: -k * y), jnp.array(1.0), ts, args=k, **options)
        return ((sol.ys - jnp.exp(-0.3 * ts)) ** 2).mean()

    value, grad = jax.jit(jax.value_and_grad(loss))(0.5)
    exact = lambda k: ((np.exp(-k * ts) - np.exp(-0.3 * ts)) ** 2).mean()
    np.testing.assert_allclose((value, grad), (exact(0.5), (exact(0.5001) - exact(0.4999)) / 2e-4), rtol=1e-3)
    for options, words in (
        ({"adjoint": sf.adjoints.DiscreteAdjoint(record=256)}, "record is 256: use DiscreteAdjoint"),
        ({"max_steps": 299}, "max_steps is 299: use max_steps="),
    ):
        with pytest.raises(ValueError, match=f"at least 300 of them, and {words}"):
            jax.jit(lambda k, options=options: loss(k, **options))(0.5)
