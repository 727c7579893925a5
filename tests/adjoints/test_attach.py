"""A rule that stands for a derivative: however it is transformed, first derivatives are right and others an error."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdeflow as sf
from sdeflow.adjoints._attach import attach

pytestmark = pytest.mark.usefixtures("x64_module")

# ---- A rule of three lines: a(x) b(w) with a vector that a batch may share. ----

_seen = []
ADVICE = "Ask another adjoint."


def _exact(x, w, n):
    return jnp.sin(w @ x) * n


def _ruled(x, w, n):
    """The same function, whose value is a constant and whose gradient is a rule."""

    def one(x, w, n, ct):
        slope = ct * jnp.cos(w @ x) * n
        return slope * w, slope * x

    def rule(inputs, cts, wanted, batched):
        _seen.append((wanted, batched))
        if batched is None:
            found = one(*inputs, *cts)
        else:
            axes = [0 if flag else None for flag in batched]
            each = jax.vmap(one, in_axes=(*axes, 0))(*inputs, *cts)
            found = [g if flag else g.sum(axis=0) for g, flag in zip(each, batched)]
        return [g for g, want in zip(found, wanted) if want]

    value = jax.lax.stop_gradient(_exact(x, w, n))
    (value,), _ = attach(rule, [value], [x, w, n], jnp.array(True), ADVICE)
    return value


def _inputs(*lead):
    shape = (*lead, 3)
    return jnp.sin(jnp.arange(float(np.prod(shape)))).reshape(shape), jnp.array([0.3, -0.8, 0.5])


def _scanned(f, x, w):
    return jax.lax.scan(lambda c, _: (c + f(x * c, w, 2), None), 1.0, None, 3)[0]


# What is done to a function of (x, w): what it is applied to leads with a batch of no, one or two axes.
TRANSFORMED = {
    "grad": (lambda f: jax.grad(lambda x, w: f(x, w, 2), (0, 1)), ()),
    "grad in one of two": (lambda f: jax.grad(lambda x, w: f(x, w, 2), 1), ()),
    "grad of jit": (lambda f: jax.grad(jax.jit(lambda x, w: f(x, w, 2)), (0, 1)), ()),
    "jacrev": (lambda f: jax.jacrev(lambda x, w: jnp.stack([f(x, w, 2), f(2 * x, w, 3)]), (0, 1)), ()),
    "grad of a scan": (lambda f: jax.grad(functools.partial(_scanned, f), (0, 1)), ()),
    "grad of recomputed": (lambda f: jax.grad(jax.checkpoint(lambda x, w: f(x, w, 2)), (0, 1)), ()),
    "vmap of grad": (lambda f: jax.vmap(jax.grad(lambda x, w: f(x, w, 2), (0, 1)), (0, None)), (4,)),
    "grad of vmap": (lambda f: jax.grad(lambda x, w: jax.vmap(lambda x: f(x, w, 2))(x).sum(), (0, 1)), (4,)),
    "grad of vmap of jit": (
        lambda f: jax.grad(lambda x, w: jax.vmap(jax.jit(lambda x: f(x, w, 2)))(x).sum(), (0, 1)),
        (4,),
    ),
    "grad of vmap of recomputed": (
        lambda f: jax.grad(lambda x, w: jax.vmap(jax.checkpoint(lambda x: f(x, w, 2)))(x).sum(), (0, 1)),
        (4,),
    ),
    "vmap of grad of recomputed": (
        lambda f: jax.vmap(jax.grad(jax.checkpoint(lambda x, w: f(x, w, 2)), (0, 1)), (0, None)),
        (4,),
    ),
    "jacrev of vmap": (lambda f: jax.jacrev(lambda x, w: jax.vmap(lambda x: f(x, w, 2))(x), (0, 1)), (4,)),
    "grad of vmap of vmap": (
        lambda f: jax.grad(lambda x, w: jax.vmap(jax.vmap(lambda x: f(x, w, 2)))(x).sum(), (0, 1)),
        (2, 4),
    ),
    "vmap of grad of vmap": (
        lambda f: jax.vmap(jax.grad(lambda x, w: jax.vmap(lambda x: f(x, w, 2))(x).sum(), (0, 1)), (0, None)),
        (2, 4),
    ),
    "vmap of vmap of grad": (
        lambda f: jax.vmap(jax.vmap(jax.grad(lambda x, w: f(x, w, 2), (0, 1)), (0, None)), (0, None)),
        (2, 4),
    ),
    "grad of vmap along the last axis": (
        lambda f: jax.grad(lambda x, w: jax.vmap(lambda x: f(x, w, 2), in_axes=1)(x.T).sum(), (0, 1)),
        (4,),
    ),
    "grad of vmap over the shared": (
        lambda f: jax.grad(lambda x, w: jax.vmap(lambda w: f(x, w, 2))(jnp.stack([w, 2 * w])).sum(), (0, 1)),
        (),
    ),
    "grad of vmap over an integer": (
        lambda f: jax.grad(lambda x, w: jax.vmap(lambda n: f(x, w, n))(jnp.arange(3)).sum(), (0, 1)),
        (),
    ),
}


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jitted"])
@pytest.mark.parametrize("how", TRANSFORMED)
def test_first_derivatives_are_those_of_the_function(how, jit):
    transform, lead = TRANSFORMED[how]
    x, w = _inputs(*lead)
    wrap = jax.jit if jit else lambda f: f
    ours, theirs = wrap(transform(_ruled))(x, w), transform(_exact)(x, w)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-15)
        assert np.abs(b).max() > 1e-3


def test_the_rule_of_a_batch_is_asked_once_and_told_what_is_shared():
    x, w = _inputs(4)
    for how, told in (("grad of vmap", (True, False, False)), ("vmap of grad", None)):
        _seen.clear()
        jax.jit(TRANSFORMED[how][0](_ruled))(x, w)
        assert _seen == [((True, True, False), told)]
    _seen.clear()
    jax.jit(TRANSFORMED["grad of vmap of vmap"][0](_ruled))(*_inputs(2, 4))
    assert _seen == [((True, True, False), (True, False, False))]


def test_what_is_not_differentiated_is_not_asked_for():
    x, w = _inputs()
    _seen.clear()
    jax.jit(jax.grad(lambda w: _ruled(x, w, 2)))(w)
    assert _seen == [((False, True, False), None)]


def test_the_note_speaks_where_a_derivative_is_taken_and_is_silent_elsewhere():
    note = lambda x: attach(lambda *_: [x], [x], [x], jnp.array(True), ADVICE)[1]
    assert not note(1.0)
    assert not jax.jit(jax.vmap(note))(jnp.ones(3)).any()
    both = lambda x: attach(lambda i, ct, *_: ct, [x * 1.0], [x], jnp.array(True), ADVICE)
    value_of = lambda x: (both(x)[0][0], both(x)[1])
    assert jax.grad(value_of, has_aux=True)(1.0)[1]


OTHERS = {
    "forward": lambda f: jax.jacfwd(f),
    "forward over reverse": lambda f: jax.jacfwd(jax.grad(f)),
    "reverse over reverse": lambda f: jax.jacrev(jax.grad(f)),
    "reverse over forward": lambda f: jax.jacrev(jax.jacfwd(f)),
    "linearised": lambda f: lambda x: jax.linearize(f, x)[1](x),
}


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jitted"])
@pytest.mark.parametrize("how", OTHERS)
def test_any_other_derivative_is_an_error_that_says_what_to_do(how, jit):
    x, w = _inputs()
    wrap = jax.jit if jit else lambda f: f
    with pytest.raises(ValueError, match=ADVICE):
        wrap(OTHERS[how](lambda x: _ruled(x, w, 2)))(x)
    batch = lambda x: jax.vmap(lambda s: _ruled(s * x, w, 2))(jnp.arange(1.0, 3.0)).sum()
    with pytest.raises(ValueError, match=ADVICE):
        wrap(OTHERS[how](batch))(x)


def test_a_derivative_in_what_the_rule_does_not_see_is_fine():
    # The slope of a loss, as a function of the weight of the loss: the rule is linear in its cotangents.
    x, w = _inputs()
    slope = lambda f: jax.jacfwd(lambda c: jax.grad(lambda x: c * f(x, w, 2))(x))(0.7)
    np.testing.assert_allclose(slope(_ruled), slope(_exact), rtol=1e-13)


# ---- The adaptive solve. ----

PID = dfx.PIDController(rtol=1e-5, atol=1e-7)


def _solve(y0, rate, theta, adjoint=None):
    field = dfx.ODETerm(lambda t, y, rate: -rate * (y - jnp.cos(theta * t)))
    return sf.solve(
        field, y0, np.array([0.0, 0.4, 1.0]), args=rate, dt0=0.05, solver=dfx.Tsit5(), stepsize_controller=PID,
        adjoint=adjoint, throw=False,
    )  # fmt: skip


def _scalar(y0, rate, theta, adjoint=None):
    sol = _solve(y0, rate, theta, adjoint)
    return sol.ys[1] + 2 * sol.final**2, (sol.stats["num_steps"], sol.result)


STARTS, RATES = np.array([1.0, -0.5, 2.0]), np.array([0.5, 10.0, 100.0])


@functools.cache
def _alone():
    """Value, steps and gradients in start, rate and shared parameter of each path by itself."""
    run = jax.jit(jax.value_and_grad(_scalar, (0, 1, 2), has_aux=True))
    return [run(y0, rate, 1.3) for y0, rate in zip(STARTS, RATES)]


def _batched(y0, rate, theta, adjoint=None):
    values, aux = jax.vmap(lambda y, r: _scalar(y, r, theta, adjoint))(y0, rate)
    return values.sum(), (values, aux)


def test_lanes_with_steps_of_their_own_are_a_loop_over_single_solves():
    (_, (values, (steps, _))), grads = jax.jit(jax.value_and_grad(_batched, (0, 1, 2), has_aux=True))(
        STARTS, RATES, 1.3
    )
    alone = _alone()
    assert len({int(s) for s in steps}) == 3
    assert [int(s) for s in steps] == [int(aux[0]) for (_, aux), _ in alone]
    np.testing.assert_allclose(values, [value for (value, _), _ in alone], rtol=1e-12)
    for k in (0, 1):
        np.testing.assert_allclose(grads[k], [g[k] for _, g in alone], rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(grads[2], sum(g[2] for _, g in alone), rtol=1e-10)


def test_one_lane_that_overflows_spoils_what_is_shared_and_no_other_lane():
    most = max(int(aux[0]) for (_, aux), _ in _alone())
    adjoint = sf.adjoints.DiscreteAdjoint(record=most - 1)
    run = jax.jit(jax.value_and_grad(functools.partial(_batched, adjoint=adjoint), (0, 1, 2), has_aux=True))
    (_, (values, (steps, result))), grads = run(STARTS, RATES, 1.3)
    over = np.asarray(steps) >= most
    assert over.sum() == 1
    assert np.isnan(grads[2]), "what the overflowing lane shares has no gradient"
    for k in (0, 1):
        assert (np.isnan(grads[k]) == over).all()
        np.testing.assert_allclose(grads[k][~over], np.array([g[k] for _, g in _alone()])[~over], rtol=1e-10)
    assert (np.asarray(sf.is_okay(result)) == ~over).all()
    assert jax.tree.map(lambda x: x[np.argmax(over)], result) == sf.RESULTS.record_overflow
    np.testing.assert_allclose(values, [value for (value, _), _ in _alone()], rtol=1e-12)


@pytest.mark.slow
def test_a_batch_of_batches_is_a_loop_too():
    twice = lambda theta: jax.vmap(lambda y, r, scale: _batched(scale * y, r, theta)[0], (None, None, 0))(
        STARTS, RATES, jnp.array([1.0, 0.7])
    ).sum()
    once = jax.jit(jax.value_and_grad(lambda theta, scale: _batched(scale * STARTS, RATES, theta)[0]))
    value, grad = jax.jit(jax.value_and_grad(twice))(1.3)
    parts = [once(1.3, scale) for scale in (1.0, 0.7)]
    np.testing.assert_allclose(value, sum(v for v, _ in parts), rtol=1e-12)
    np.testing.assert_allclose(grad, sum(g for _, g in parts), rtol=1e-10)


@pytest.mark.slow
def test_the_jacobian_of_all_saved_states_is_diffrax_s():
    ts = np.array([0.0, 0.4, 1.0])

    def theirs(rate):
        return dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, rate: -rate * (y - jnp.cos(1.3 * t))), dfx.Tsit5(), 0.0, 1.0, 0.05, jnp.array(1.0),
            rate, saveat=dfx.SaveAt(ts=ts), stepsize_controller=dfx.ClipStepSizeController(PID, step_ts=ts),
        ).ys  # fmt: skip

    ours = lambda rate: _solve(jnp.array(1.0), rate, 1.3).ys
    np.testing.assert_allclose(jax.jit(jax.jacrev(ours))(3.0), jax.jit(jax.jacrev(theirs))(3.0), rtol=1e-10)


@pytest.mark.parametrize(
    "how", ["forward over reverse", *(pytest.param(h, marks=pytest.mark.slow) for h in OTHERS if h[0] in "rl")]
)
def test_second_derivatives_of_adaptive_steps_name_the_option_that_has_them(how):
    with pytest.raises(ValueError, match=r"DiscreteAdjoint\(higher_order=True\), or fix the steps"):
        OTHERS[how](lambda rate: _solve(jnp.array(1.0), rate, 1.3).final)(jnp.array(2.0))


def test_second_derivatives_of_undone_steps_name_the_adjoint_that_has_them():
    decay, adjoint = sf.ODE(lambda t, y, rate: -rate * y), sf.adjoints.ReversibleAdjoint()
    final = lambda rate: (
        sf.solve(
            decay, jnp.array(1.0), [0.0, 1.0], args=rate, dt0=0.25, solver=dfx.ReversibleHeun(), adjoint=adjoint
        ).final
    )
    for derivative in (jax.jacfwd(jax.grad(final)), jax.grad(jax.grad(final)), jax.jacfwd(final)):
        with pytest.raises(ValueError, match=r"ReversibleAdjoint has first derivatives.*DiscreteAdjoint\(\)"):
            derivative(jnp.array(0.7))


SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
import test_attach as t
jax.config.update("jax_enable_x64", True)
assert jax.device_count() == 2
mesh = jax.make_mesh((2,), ("paths",))
y0, rates = np.array([1.0, -0.5, 2.0, 0.3]), np.array([0.5, 10.0, 100.0, 3.0])
run = jax.jit(jax.value_and_grad(t._batched, (0, 1, 2), has_aux=True))
(_, (values, (steps, _))), grads = run(y0, rates, 1.3)
over = NamedSharding(mesh, PartitionSpec("paths"))
(_, (spread, (counts, _))), found = run(jax.device_put(y0, over), jax.device_put(rates, over), 1.3)
assert len(spread.sharding.device_set) == 2
assert (counts == steps).all()
np.testing.assert_allclose(spread, values, rtol=1e-12)
for a, b in zip(found, grads):
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14)
print("equal")
"""


@pytest.mark.slow
def test_a_batch_over_two_devices_has_the_gradients_of_one(tmp_path):
    here = Path(__file__).parent
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), str(here.parent.parent)]),
    }
    done = subprocess.run([sys.executable, "-c", SHARDED], env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "equal"
