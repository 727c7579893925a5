"""Adaptive steps: values are those of diffrax, gradients are exact, whatever is saved and however it is transformed."""

import functools
from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdeflow as sf

pytestmark = [pytest.mark.usefixtures("x64_module"), pytest.mark.slow]

PID = dfx.PIDController(rtol=1e-4, atol=1e-6)
LOOSE = dfx.PIDController(rtol=3e-2, atol=3e-2)
TIMES = (0.0, 0.31, 0.9, 1.0)
SUBS = ("t0", "t1", "ts", "steps", "thirds", "ends and thirds", "fn")
CASES: dict[str, tuple[Any, str]] = {
    "Tsit5": (dfx.Tsit5(), "none"),
    "Heun-ode": (dfx.Heun(), "none"),
    "Kvaerno3": (dfx.Kvaerno3(), "none"),
    "ShARK": (dfx.ShARK(), "additive"),
    "SPaRK": (dfx.SPaRK(), "diagonal"),
    "Heun-sde": (dfx.Heun(), "diagonal"),
}


def _every(*default):
    return [pytest.param(name, marks=[] if name in default else pytest.mark.slow) for name in CASES]


def _controller(name):
    return PID if CASES[name][1] == "none" else LOOSE


def _terms(name, theta, dtype=jnp.float64):
    solver, noise = CASES[name]
    area = isinstance(solver, dfx.AbstractSRK)

    # Fast, then slow: the controller both rejects and grows. The state is a tree.
    def drift(t, y, args):
        fast = args * (jnp.cos(3 * t) - y["a"]) * (1 + 8 * jnp.exp(-20 * (t - 0.4) ** 2))
        return {"a": fast, "b": -y["b"] + theta * jnp.sin(y["a"][0] + 2 * t)}

    ode = dfx.ODETerm(drift)
    if noise == "none":
        return ode
    shape = {"a": jax.ShapeDtypeStruct((2,), dtype), "b": jax.ShapeDtypeStruct((), dtype)}
    area = dfx.SpaceTimeLevyArea if area else dfx.BrownianIncrement
    tree = dfx.VirtualBrownianTree(0.0, 1.0, 1e-3, shape, key=jax.random.key(3), levy_area=area)
    if noise == "additive":
        size = lambda t, y, args: {"a": 0.2 * jnp.array([1.0, theta], dtype) * args, "b": 0.3 * jnp.cos(theta * t)}
    else:
        size = lambda t, y, args: {"a": 0.2 * jnp.cos(theta * y["a"]), "b": 0.1 * args * jnp.sin(y["b"])}
    # Diagonal noise as a term of sdeflow, since diffrax spells it with a lineax operator.
    equation = sf.SDE(drift, size, interpretation="stratonovich", additive=noise == "additive")
    return equation.terms(tree)


def _start(dtype=jnp.float64):
    return (
        {"a": jnp.array([0.3, -0.7], dtype), "b": jnp.array(0.4, dtype)},
        jnp.array(1.7, dtype),
        jnp.array(1.2, dtype),
    )


def _saveat(theta):
    inner = jnp.array([0.0, 0.2, 0.45, 0.46, 0.99])
    fn = lambda t, y, args: {"x": jnp.sin(theta * y["a"]) * args + t, "z": y["b"] * args}
    sub = dfx.SubSaveAt
    asked = (
        sub(t0=True),
        sub(t1=True),
        sub(ts=inner),
        sub(steps=True),
        sub(steps=3),
        sub(t0=True, t1=True, steps=3),
        sub(t0=True, t1=True, ts=inner, fn=fn),
    )
    return dfx.SaveAt(subs=dict(zip(SUBS, asked)))


def _weighted(tree):
    """One number from many; what was never written is infinite and does not count."""
    total = 0.0
    for x in jax.tree.leaves(tree):
        x = jnp.where(jnp.isfinite(x), x, 0.0)
        total += (jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) * x**2).sum()
    return total


@functools.cache
def _program(name, adjoint):
    def loss(start, chosen):
        y0, args, theta = start
        sol = dfx.diffeqsolve(
            _terms(name, theta), CASES[name][0], 0.0, 1.0, 0.1, y0, args, saveat=_saveat(theta),
            stepsize_controller=_controller(name), adjoint=adjoint, max_steps=160, throw=False,
        )  # fmt: skip
        each = jnp.stack([_weighted(sol.ys[sub]) for sub in SUBS])  # pyright: ignore
        return each @ chosen, (sol.ts, sol.ys, sol.stats["num_accepted_steps"], sol.stats["num_rejected_steps"])

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def _close(a, b, rtol=1e-12, atol=0.0):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(a) == len(b)
    for x, y in zip(a, b):
        x, y = np.asarray(x), np.asarray(y)
        finite = np.isfinite(y)
        assert (np.isfinite(x) == finite).all()
        scale = np.abs(y[finite]).max(initial=0.0)
        np.testing.assert_allclose(x[finite], y[finite], rtol=0, atol=atol + rtol * scale)


def _alive(tree):
    return all(np.isfinite(x).all() and (np.abs(np.asarray(x)) > 1e-6).all() for x in jax.tree.leaves(tree))


# SPaRK adds nothing here to the areas of ShARK and the diagonal noise of Heun; below it is solved too.
@pytest.mark.parametrize("name", [p for p in _every("Tsit5") if getattr(p, "values", p) != ("SPaRK",)])
def test_values_and_gradients_inside_diffeqsolve_equal_diffrax_whatever_is_saved(name):
    ours = _program(name, sf.adjoints.DiscreteAdjoint())
    theirs = _program(name, dfx.RecursiveCheckpointAdjoint())
    for i, sub in enumerate(SUBS):
        chosen = jnp.eye(len(SUBS))[i]
        (value, aux), grads = ours(_start(), chosen)
        (value_r, aux_r), grads_r = theirs(_start(), chosen)
        # The stages of a tableau are summed in another order: the error estimate, a difference of nearly equal sums,
        # feels that, and so do the times of the steps. The states at fixed times do not.
        moved = CASES[name][1] == "none" and sub in ("steps", "thirds", "ends and thirds")
        _close((value, aux[2:]), (value_r, aux_r[2:]), rtol=1e-10 if moved else 1e-13)
        _close([x[sub] for x in aux[:2]], [x[sub] for x in aux_r[:2]], rtol=1e-10 if moved else 1e-13)
        _close(grads, grads_r, rtol=1e-10 if moved else 1e-12)
        assert sub == "t0" or _alive(grads[:2]), sub
    accepted, rejected = int(aux[2]), int(aux[3])
    assert accepted > 6
    assert name != "Tsit5" or accepted % 3, "the last step must not be a third one, so that t1 is saved by itself"
    assert rejected > 0, "a test of rejected steps must have some"


@functools.cache
def _solve_program(name, adjoint, **kwargs):
    def loss(start):
        y0, args, theta = start
        sol = sf.solve(
            _terms(name, theta), y0, np.asarray(TIMES), args=args, dt0=0.1, solver=CASES[name][0],
            stepsize_controller=_controller(name),
            adjoint=adjoint, **kwargs,
        )  # fmt: skip
        return _weighted((sol.ys, sol.final)), (sol.ys, sol.stats["num_steps"], sf.is_okay(sol.result))

    return loss


@functools.cache
def _diffrax_program(name):
    def loss(start):
        y0, args, theta = start
        ts = jnp.asarray(TIMES)
        sol = dfx.diffeqsolve(
            _terms(name, theta), CASES[name][0], 0.0, 1.0, 0.1, y0, args, saveat=dfx.SaveAt(ts=ts), max_steps=512,
            stepsize_controller=dfx.ClipStepSizeController(_controller(name), step_ts=ts),
        )  # fmt: skip
        last = jax.tree.map(lambda x: x[-1], sol.ys)
        return _weighted((sol.ys, last)), (sol.ys, sol.stats["num_accepted_steps"], jnp.array(True))

    return loss


@pytest.mark.parametrize("name", _every("Tsit5", "Heun-sde"))
def test_solve_equals_diffeqsolve_in_value_and_gradient(name):
    # Heun takes more steps than the record holds by default.
    adjoint = sf.adjoints.DiscreteAdjoint(record=512) if name == "Heun-ode" else None
    ours = jax.jit(jax.value_and_grad(_solve_program(name, adjoint), has_aux=True))(_start())
    theirs = jax.jit(jax.value_and_grad(_diffrax_program(name), has_aux=True))(_start())
    _close(ours, theirs)
    assert _alive(ours[1])


def _decay_terms(theta):
    # Rates two hundred apart need very different numbers of steps.
    return dfx.ODETerm(lambda t, y, rate: -rate * (y - theta * jnp.cos(t)))


def _decay(start, adjoint=None):
    y0, rate, theta = start
    sol = sf.solve(
        _decay_terms(theta), y0, np.array([0.0, 0.4, 1.0]), args=rate, dt0=0.05, solver=dfx.Tsit5(),
        stepsize_controller=PID, adjoint=adjoint, save_fn=lambda t, y, args: theta * y**2 + args,
    )  # fmt: skip
    return sol.ys[1] + 2 * sol.ys[2], sol.stats["num_steps"]


def _batch():
    return (jnp.array([1.0, -0.5, 2.0]), jnp.array([0.5, 10.0, 100.0]), jnp.array([0.3, 1.0, -0.4]))


@functools.cache
def _batched_gradients():
    return jax.jit(jax.vmap(jax.value_and_grad(_decay, has_aux=True)))(_batch())


def test_under_vmap_every_path_has_its_own_steps_value_and_gradient():
    (values, steps), grads = _batched_gradients()
    one = jax.jit(jax.value_and_grad(_decay, has_aux=True))
    assert len(set(np.asarray(steps).tolist())) == 3
    for i in range(3):
        (value, count), grad = one(jax.tree.map(lambda x: x[i], _batch()))
        assert int(count) == int(steps[i])
        # The gradient in the start of a stiff path is 1e-9: the product of many factors, beside gradients of order one.
        _close((values[i], jax.tree.map(lambda g: g[i], grads)), (value, grad), atol=1e-14)


def test_the_gradient_of_a_batched_solve_is_the_batch_of_gradients():
    total = lambda batch: jax.vmap(lambda s: _decay(s)[0])(batch).sum()
    _close(jax.jit(jax.grad(total))(_batch()), _batched_gradients()[1])


def test_one_parameter_shared_by_a_batch_collects_all_gradients():
    y0, rates, thetas = _batch()
    total = lambda theta: jax.vmap(lambda y, r: _decay((y, r, theta))[0])(y0, rates).sum()
    each = [jax.jit(jax.grad(lambda th, i=i: _decay((y0[i], rates[i], th))[0]))(thetas[0]) for i in range(3)]
    _close(jax.jit(jax.grad(total))(thetas[0]), sum(each))


def test_without_jit_the_gradient_is_the_same():
    start = jax.tree.map(lambda x: x[1], _batch())
    eager = jax.grad(lambda s: _decay(s)[0])(start)
    _close(eager, jax.tree.map(lambda g: g[1], _batched_gradients()[1]))


def test_the_default_number_of_steps_allowed_is_in_no_number():
    def run(max_steps, record):
        def loss(start):
            y0, rate, theta = start
            return sf.solve(
                _decay_terms(theta), y0, np.array([0.0, 1.0]), args=rate, dt0=0.05, solver=dfx.Tsit5(),
                stepsize_controller=PID, max_steps=max_steps, adjoint=sf.adjoints.DiscreteAdjoint(record=record),
            ).final  # fmt: skip

        return jax.jit(jax.value_and_grad(loss))(jax.tree.map(lambda x: x[1], _batch()))

    few = run(256, 64)
    for other in (run(4096, 64), run(256, 300)):
        assert [np.asarray(x).tobytes() for x in jax.tree.leaves(other)] == [
            np.asarray(x).tobytes() for x in jax.tree.leaves(few)
        ]


def test_float32_stays_float32_and_equals_diffrax():
    with jax.enable_x64(False):
        start = _start(jnp.float32)
        ours = jax.jit(jax.value_and_grad(_solve_program("Tsit5", None), has_aux=True))(start)
        theirs = jax.jit(jax.value_and_grad(_diffrax_program("Tsit5"), has_aux=True))(start)
    for leaf in jax.tree.leaves((ours[0][0], ours[0][1][0], ours[1])):
        assert leaf.dtype == jnp.float32
    _close(ours, theirs, rtol=2e-5)


# y' = -rate y, with the solver so accurate that derivatives of the steps are those of the closed form.
TIGHT = dfx.PIDController(rtol=1e-9, atol=1e-11)


@functools.cache
def _derivatives(name):
    solver = {"Tsit5": dfx.Tsit5(), "Heun": dfx.Heun(), "Dopri8": dfx.Dopri8()}[name]
    controller = dfx.PIDController(rtol=1e-6, atol=1e-8) if name == "Heun" else TIGHT
    adjoint = sf.adjoints.DiscreteAdjoint(higher_order=True, record=1024 if name == "Heun" else 128)

    def final(rate):
        return sf.solve(
            dfx.ODETerm(lambda t, y, r: -r * y), jnp.array(1.3), np.array([0.0, 0.5, 1.0]), args=rate, dt0=0.05,
            solver=solver, stepsize_controller=controller, adjoint=adjoint, save_fn=lambda t, y, r: r * y,
        ).ys[-1]  # fmt: skip

    return final


def _exact(order, r=0.7):
    # d^n/dr^n of 1.3 r exp(-r), by Leibniz.
    return 1.3 * np.exp(-r) * ((-1) ** order * r + order * (-1) ** (order - 1))


@pytest.mark.parametrize("mode", ["reverse", "forward", "forward over reverse"])
def test_second_derivatives_equal_the_closed_form(mode):
    final, rate = _derivatives("Tsit5"), jnp.array(0.7)
    second = {
        "reverse": lambda: jax.grad(jax.grad(final)),
        "forward": lambda: jax.jacfwd(jax.jacfwd(final)),
        "forward over reverse": lambda: jax.jacfwd(jax.grad(final)),
    }[mode]()
    np.testing.assert_allclose(jax.jit(jax.value_and_grad(final))(rate), (_exact(0), _exact(1)), rtol=1e-7)
    np.testing.assert_allclose(jax.jit(second)(rate), _exact(2), rtol=1e-7)


@pytest.mark.slow
def test_third_derivatives_equal_the_closed_form():
    final, rate = _derivatives("Tsit5"), jnp.array(0.7)
    np.testing.assert_allclose(jax.jit(jax.jacfwd(jax.jacfwd(jax.grad(final))))(rate), _exact(3), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(jax.grad(jax.grad(jax.grad(final))))(rate), _exact(3), rtol=1e-6)


@pytest.mark.parametrize("name", ["Tsit5", pytest.param("ShARK", marks=pytest.mark.slow)])
def test_the_replayed_rule_gives_the_numbers_of_the_recorded_one(name):
    replayed = sf.adjoints.DiscreteAdjoint(higher_order=True, record=160)
    for i in (2, 5, 6):
        chosen = jnp.eye(len(SUBS))[i]
        _close(
            _program(name, replayed)(_start(), chosen), _program(name, sf.adjoints.DiscreteAdjoint())(_start(), chosen)
        )


def test_a_hessian_vector_product_equals_a_difference_of_gradients():
    adjoint = sf.adjoints.DiscreteAdjoint(higher_order=True)

    # Fixed tolerances choose fixed steps here: the step sizes do not depend on what is differentiated.
    def loss(c):
        field = lambda t, y, args: jnp.stack([-y[0], -(y[0] ** 2) * args[1] * y[1]])
        start = jnp.stack([jnp.array(1.0), args_scale * c[0]])
        return sf.solve(
            dfx.ODETerm(field), start, np.array([0.0, 1.0]), args=c, dt0=0.01, solver=dfx.Tsit5(),
            stepsize_controller=TIGHT, adjoint=adjoint,
        ).final[1]  # fmt: skip

    args_scale = 1.1
    c, v = jnp.array([0.8, 0.6]), jnp.array([0.3, -1.0])
    hvp = jax.jit(lambda c, v: jax.jvp(jax.grad(loss), (c,), (v,))[1])(c, v)
    # y1' = -exp(-2t) k y1, so y1(1) = 1.1 c exp(-k (1 - e^-2)/2).
    q = (1 - np.exp(-2)) / 2
    e = 1.1 * np.exp(-0.6 * q)
    exact = np.array([[0, -q * e], [-q * e, q * q * 0.8 * e]]) @ np.asarray(v)
    np.testing.assert_allclose(hvp, exact, rtol=1e-7)


ROUGH = dfx.PIDController(rtol=1e-3, atol=1e-4)


def _long(record, max_steps=4096):
    def final(rate):
        sol = sf.solve(
            dfx.ODETerm(lambda t, y, r: jnp.cos(40 * t) - r * y), jnp.array(1.0), np.array([0.0, 1.0]), args=rate,
            dt0=0.01, solver=dfx.Heun(), stepsize_controller=ROUGH, max_steps=max_steps,
            adjoint=sf.adjoints.DiscreteAdjoint(record=record), throw=False,
        )  # fmt: skip
        return sol.final, (sol.result, sol.stats["num_steps"])

    return final


def test_a_record_that_overflows_gives_nan_gradients_and_says_which_option():
    (value, (result, steps)), grad = jax.jit(jax.value_and_grad(_long(20), has_aux=True))(jnp.array(1.0))
    assert int(steps) > 20
    assert result == sf.RESULTS.record_overflow
    assert not sf.is_okay(result)
    assert np.isnan(grad)
    whole = jax.jit(_long(256))(jnp.array(1.0))[0]
    assert value == whole, "the value is that of diffrax, overflow or not"
    assert "record=" in sf.RESULTS[sf.RESULTS.record_overflow]


def test_a_record_that_is_just_long_enough_is_enough():
    steps = int(jax.jit(_long(256))(jnp.array(1.0))[1][1])
    gradient = lambda record: jax.jit(jax.value_and_grad(_long(record), has_aux=True))(jnp.array(1.0))
    (_, (result, _)), exact = gradient(256)
    assert sf.is_okay(result)
    (_, (result, _)), grad = gradient(steps)
    assert sf.is_okay(result)
    assert grad == exact
    (_, (result, _)), grad = gradient(steps - 1)
    assert result == sf.RESULTS.record_overflow
    assert np.isnan(grad)


def test_a_value_alone_needs_no_record():
    value, (result, steps) = _long(20)(jnp.array(1.0))
    assert int(steps) > 20
    assert sf.is_okay(result)
    assert value == jax.jit(_long(256))(jnp.array(1.0))[0]


def test_in_a_batch_only_the_paths_that_overflow_lose_their_gradient():
    adjoint = sf.adjoints.DiscreteAdjoint(record=30)
    (_, steps), grads = jax.jit(jax.vmap(jax.value_and_grad(lambda s: _decay(s, adjoint), has_aux=True)))(_batch())
    reference = _batched_gradients()[1]
    over = np.asarray(steps) > 30
    assert over.any()
    assert not over.all()
    for grad, exact in zip(grads, reference):
        assert (np.isnan(grad) == over).all()
        _close(grad[~over], exact[~over])


def _plain(adjoint, throw):
    def final(rate):
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, r: jnp.cos(40 * t) - r * y), dfx.Heun(), 0.0, 1.0, 0.01, jnp.array(1.0), rate,
            stepsize_controller=ROUGH, adjoint=adjoint, throw=throw,
        )  # fmt: skip
        return sol.ys[0]  # pyright: ignore

    return jax.jit(jax.value_and_grad(final))


@pytest.mark.parametrize("higher_order", [False, True])
def test_inside_diffeqsolve_an_overflow_is_an_error_or_nan_and_never_a_number(higher_order):
    adjoint = sf.adjoints.DiscreteAdjoint(record=20, higher_order=higher_order)
    with pytest.raises(RuntimeError, match="record="):
        jax.block_until_ready(_plain(adjoint, True)(jnp.array(1.0)))
    assert np.isnan(_plain(adjoint, False)(jnp.array(1.0))[1])


def test_with_higher_order_an_overflow_is_reported_and_nothing_is_finite():
    def final(rate):
        sol = sf.solve(
            dfx.ODETerm(lambda t, y, r: jnp.cos(40 * t) - r * y), jnp.array(1.0), np.array([0.0, 1.0]), args=rate,
            dt0=0.01, solver=dfx.Heun(), stepsize_controller=ROUGH, throw=False,
            adjoint=sf.adjoints.DiscreteAdjoint(record=20, higher_order=True),
        )  # fmt: skip
        return sol.final, sol.result

    (_, result), grad = jax.jit(jax.value_and_grad(final, has_aux=True))(jnp.array(1.0))
    assert result == sf.RESULTS.record_overflow
    assert np.isnan(grad)
    assert np.isnan(jax.jit(jax.grad(jax.grad(lambda r: final(r)[0])))(jnp.array(1.0)))


def test_gradients_in_times_are_refused_for_adaptive_steps():
    def final(t1):
        return dfx.diffeqsolve(
            _decay_terms(1.0), dfx.Tsit5(), 0.0, t1, 0.1, jnp.array(1.0), 1.0, stepsize_controller=PID,
            adjoint=sf.adjoints.DiscreteAdjoint(),
        ).ys[0]  # fmt: skip

    with pytest.raises(ValueError, match="need a fixed grid"):
        jax.grad(final)(jnp.array(1.0))


# y' = -10 sqrt(y): the first trial steps land on negative numbers, where the field is NaN, and are rejected.
def _root(start, adjoint, engine):
    y0, rate = start
    field = dfx.ODETerm(lambda t, y, rate: -rate * jnp.sqrt(y))
    controller = dfx.PIDController(rtol=1e-5, atol=1e-8)
    if engine == "solve":
        sol = sf.solve(field, y0, np.array([0.0, 0.15]), args=rate, dt0=0.15, solver=dfx.Tsit5(),
                       stepsize_controller=controller, adjoint=adjoint)  # fmt: skip
        return sol.final, sol.stats["num_rejected"]
    sol = dfx.diffeqsolve(field, dfx.Tsit5(), 0.0, 0.15, 0.15, y0, rate, stepsize_controller=controller,
                          adjoint=adjoint)  # fmt: skip
    return sol.ys[0], sol.stats["num_rejected_steps"]


@pytest.mark.parametrize("engine", ["solve", "diffeqsolve"])
@pytest.mark.parametrize("higher_order", [False, True])
def test_rejected_steps_that_hit_nan_reach_neither_value_nor_gradient(engine, higher_order):
    adjoint = sf.adjoints.DiscreteAdjoint(higher_order=higher_order)
    start = (jnp.array(1.0), jnp.array(10.0))
    run = jax.jit(jax.value_and_grad(lambda s: _root(s, adjoint, engine), has_aux=True))
    (value, rejected), (in_y0, in_rate) = run(start)
    assert int(rejected) > 0
    # y(t) = (sqrt(y0) - rate t / 2)^2.
    np.testing.assert_allclose((value, in_y0, in_rate), (0.0625, 0.25, -0.0375), rtol=5e-5)


def test_float32_rejected_steps_that_hit_nan():
    with jax.enable_x64(False):
        start = (jnp.array(1.0), jnp.array(10.0))
        run = jax.jit(jax.value_and_grad(lambda s: _root(s, None, "solve"), has_aux=True))
        (value, _), grads = run(start)
    np.testing.assert_allclose((value, *grads), (0.0625, 0.25, -0.0375), rtol=1e-4)


# y' = -rate y^3, y(0) = 1: y(1) = (1 + 2 rate)^(-1/2); its derivatives in y0 and rate are + and - (1 + 2 rate)^(-3/2).
@functools.cache
def _cubic(precision, stepped):
    def final(y0, rate):
        sol = sf.solve(
            dfx.ODETerm(lambda t, y, rate: -rate * y**3), y0, np.array([0.0, 1.0]), args=rate,
            dt0=stepped, solver=dfx.Tsit5(), throw=False,
            stepsize_controller=dfx.PIDController(rtol=1e-5, atol=1e-7 if precision == 32 else 1e-9),
        )  # fmt: skip
        return sol.final, (sol.stats["num_steps"], sol.stats["num_rejected"], sol.result)

    return jax.jit(jax.value_and_grad(final, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("precision", [32, 64])
@pytest.mark.parametrize(("rate", "dt0"), [(1.0, None), (100.0, None), (1e4, None), (1e4, 1e-6), (100.0, 0.5)])
def test_a_cubic_decay_from_slow_to_stiff_has_its_value_and_gradients(precision, rate, dt0):
    with jax.enable_x64(precision == 64):
        (value, (steps, _, result)), (in_y0, in_rate) = _cubic(precision, dt0)(jnp.array(1.0), jnp.array(rate))
        assert sf.is_okay(result)
    exact = (1 + 2 * rate) ** -0.5, (1 + 2 * rate) ** -1.5
    print(f"float{precision} rate {rate:6g} dt0 {dt0}: {int(steps)} steps, y {value:.6g} ({exact[0]:.6g}), "
          f"in y0 {in_y0:.6g} ({exact[1]:.6g}), in the rate {in_rate:.6g} ({-exact[1]:.6g})")  # fmt: skip
    np.testing.assert_allclose(value, exact[0], rtol=1e-4)
    # What the discretisation itself is off by, at this tolerance: the gradients of six steps are right to 1.3e-4, and the
    # error of the start is what a stiff decay forgets.
    np.testing.assert_allclose(in_y0, exact[1], rtol=1e-2)
    np.testing.assert_allclose(in_rate, -exact[1], rtol=3e-4 if rate == 1 else 1e-4)


def test_a_trial_step_that_overflows_shrinks_the_step_instead_of_stalling_it():
    with jax.enable_x64(False):
        (value, (accepted, rejected, result)), grads = _cubic(32, 0.5)(jnp.array(1.0), jnp.array(100.0))
        assert sf.is_okay(result)
        stalled = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, rate: -rate * y**3), dfx.Tsit5(), 0.0, 1.0, 0.5, jnp.array(1.0), 100.0,
            stepsize_controller=dfx.PIDController(rtol=1e-5, atol=1e-7), max_steps=64, throw=False,
        )  # fmt: skip
    assert int(accepted) == 20
    assert int(rejected) <= 6
    np.testing.assert_allclose(value, 0.0705346, rtol=5e-5)
    assert int(stalled.stats["num_accepted_steps"]) == 0, "diffrax no longer stalls: the guard may go"


def test_the_record_holds_what_the_requested_times_take():
    ts = np.linspace(0.0, 10.0, 301)
    states = lambda k, adjoint=None: (
        sf.solve(sf.ODE(lambda t, y, k: -k * y), jnp.array(1.0), ts, args=k, adjoint=adjoint).ys
    )
    loss = lambda k: ((states(k) - jnp.exp(-0.3 * ts)) ** 2).mean()
    exact = lambda k: ((jnp.exp(-k * ts) - jnp.exp(-0.3 * ts)) ** 2).mean()
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(0.5), jax.grad(exact)(0.5), rtol=1e-3)
    with pytest.raises(ValueError, match="there are at least 300 of them, and record is 256"):
        jax.jit(lambda k: states(k, sf.adjoints.DiscreteAdjoint(record=256)))(0.5)
