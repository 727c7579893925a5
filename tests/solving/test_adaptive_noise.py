"""Adaptive steps with noise: replayed, they are diffrax's to the bit; their gradients are those of the frozen steps.

Rejected steps would bias the noise of the accepted ones, unless their ends are visited again, as
``ClipStepSizeController(store_rejected_steps=...)`` has it; then the accepted steps are a grid like any other.
"""

import dataclasses
import functools
from typing import Any

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdeflow as sf
from sdeflow.grids import Grid

pytestmark = pytest.mark.usefixtures("x64_module")

AREA = dfx.SpaceTimeLevyArea
NOISE = {"Heun": "diagonal", "ShARK": "additive", "SPaRK": "diagonal"}
FEW = [pytest.param(name, marks=[] if name == "ShARK" else pytest.mark.slow) for name in NOISE]
ADAPT = dfx.ClipStepSizeController(dfx.PIDController(rtol=2e-2, atol=2e-2, dtmin=2.0**-12), store_rejected_steps=64)


def _solver(name, loops=False):
    solver = getattr(dfx, name)()
    # A loop that the user chose keeps diffrax's arithmetic, sum by sum.
    kind = "lax" if isinstance(solver, dfx.AbstractSRK) else "bounded"
    return dataclasses.replace(solver, scan_kind=kind) if loops else solver


@functools.cache
def _tree():
    with jax.ensure_compile_time_eval():
        return dfx.VirtualBrownianTree(0.0, 1.0, 2.0**-13, (2,), key=jax.random.key(11), levy_area=AREA)


def _equation(name, theta):
    # Fast in the middle, so that steps are both rejected and grown.
    drift = lambda t, y, rate: rate * (jnp.cos(theta * t) - y) * (1 + 12 * jnp.exp(-40 * (t - 0.5) ** 2))
    if NOISE[name] == "additive":
        return sf.SDE(drift, lambda t, y, rate: 0.4 * jnp.array([1.0, theta]) * jnp.cos(rate * t), additive=True)
    return sf.SDE(drift, lambda t, y, rate: 0.4 * jnp.cos(theta * y) * rate, interpretation="stratonovich")


def _start(backwards=False):
    # What decays forwards grows backwards.
    return jnp.array([0.3, -0.7]), jnp.array(0.3 if backwards else 1.3), jnp.array(0.9)


@functools.cache
def _diffrax(name, backwards=False, adjoint=None):
    """diffrax's own adaptive solve, saving all of its steps."""
    ends = (1.0, 0.0, -0.1) if backwards else (0.0, 1.0, 0.1)

    def run(start, name=name):
        y0, rate, theta = start
        return dfx.diffeqsolve(
            _equation(name, theta).terms(_tree()), _solver(name), *ends, y0, rate, max_steps=160, throw=False,
            saveat=dfx.SaveAt(t0=True, steps=True), stepsize_controller=ADAPT,
            adjoint=dfx.ForwardMode() if adjoint is None else adjoint,
        )  # fmt: skip

    return run


@functools.cache
def _recorded(name, backwards=False):
    """The grid of the accepted steps, the states at its knots, and how many steps were rejected."""
    sol = jax.jit(_diffrax(name, backwards))(_start(backwards))
    ts = np.asarray(sol.ts)
    keep = np.isfinite(ts)
    ts, n = ts[keep], keep.sum() - 1
    grid = Grid(ts[:-1], ts[1:], np.ones(n, bool), np.arange(n + 1))
    return grid, ts, np.asarray(sol.ys)[keep], int(sol.stats["num_rejected_steps"])


def _replay(name, loops=False, backwards=False, adjoint=None):
    """Our walk along the recorded grid; what leads it to its noise is the tree itself."""
    grid, ts, _, _ = _recorded(name, backwards)

    def run(start):
        y0, rate, theta = start
        return sf.solve(
            _equation(name, theta), y0, ts, args=rate, grid=grid, path=_tree(), solver=_solver(name, loops),
            adjoint=adjoint,
        ).ys  # fmt: skip

    return run


def _rows(name):
    """The same increments, asked for once and fed as the rows of a path of the grid."""
    grid, _, _, _ = _recorded(name)
    left, right = jnp.asarray(grid.left), jnp.asarray(grid.right)
    rows = jax.jit(jax.vmap(lambda a, b: _tree().evaluate(a, b, use_levy=True)))(left, right)
    path: Any = sf.paths.GridBrownian(grid, (2,), key=jax.random.key(0), levy_area=AREA)
    return eqx.tree_at(lambda p: p.table, path, rows)


def _weighted(ys):
    return (jnp.cos(jnp.arange(ys.size, dtype=ys.dtype)).reshape(ys.shape) * ys**2).sum()


def test_rows_asked_for_all_at_once_are_those_asked_for_one_by_one():
    grid = _recorded("ShARK")[0]
    left, right = jnp.asarray(grid.left), jnp.asarray(grid.right)
    one = lambda ends: _tree().evaluate(*ends, use_levy=True)
    apart = jax.jit(lambda *ends: jax.lax.map(one, ends))(left, right)
    for a, b in zip(jax.tree.leaves(_rows("ShARK").table), jax.tree.leaves(apart), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", FEW)
def test_the_recorded_steps_reproduce_every_state_to_the_bit(name):
    grid, ts, ys, rejected = _recorded(name)
    assert grid.num_rows > 10
    assert rejected > 2, "a test of rejected steps must have some"

    # All that is solved for comes in as an argument, as it does there: constants are folded in another order.
    def fed(start, path):
        y0, rate, theta = start
        solver = _solver(name, loops=True)
        return sf.solve(_equation(name, theta), y0, ts, args=rate, path=path, solver=solver).ys

    # In another loop the compiler contracts a product and a sum of SPaRK differently, also if diffrax walks it.
    limit = 2.0**-52 if name == "SPaRK" else 0.0
    assert np.abs(ys).max() < 2
    for again in (jax.jit(_replay(name, loops=True))(_start()), jax.jit(fed)(_start(), _rows(name))):
        assert np.abs(again - ys).max() <= limit


@pytest.mark.parametrize("name", FEW)
def test_stages_written_out_reproduce_every_state_to_rounding(name):
    _, _, ys, _ = _recorded(name)
    np.testing.assert_allclose(jax.jit(_replay(name))(_start()), ys, rtol=0, atol=4e-15)


@functools.cache
def _gradient_of_diffrax(name):
    steps = _recorded(name)[0].num_rows
    run = _diffrax(name, adjoint=dfx.RecursiveCheckpointAdjoint())
    return jax.jit(jax.grad(lambda start: _weighted(run(start).ys[: steps + 1])))(_start())


@pytest.mark.slow
@pytest.mark.parametrize("name", NOISE)
def test_the_gradient_along_the_recorded_steps_is_diffrax_s(name):
    theirs = _gradient_of_diffrax(name)
    replay = _replay(name, loops=True)  # its steps are recorded here, outside of any trace
    ours = jax.jit(jax.grad(lambda start: _weighted(replay(start))))(_start())
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a, b, rtol=0, atol=4e-15 * np.abs(b).max())


@functools.cache
def _adaptive(name, higher_order=False, backwards=False):
    """The adaptive solve through `sdeflow.solve`, as a number: the path is the recorded one at its start parameters."""
    ts, dt0 = (np.array([1.0, 0.0]), -0.1) if backwards else (np.array([0.0, 1.0]), 0.1)
    adjoint = sf.adjoints.DiscreteAdjoint(higher_order=higher_order, record=160)

    def run(start):
        y0, rate, theta = start
        sol = sf.solve(
            _equation(name, theta), y0, ts, args=rate, dt0=dt0, path=_tree(), solver=_solver(name),
            stepsize_controller=ADAPT, adjoint=adjoint, max_steps=160, throw=False,
        )  # fmt: skip
        return (sol.final * jnp.array([1.0, -0.7])).sum(), sol.stats["num_steps"]

    return run


def _frozen(name, backwards=False):
    replay = _replay(name, backwards=backwards)
    return lambda start: (replay(start)[-1] * jnp.array([1.0, -0.7])).sum()


@pytest.mark.slow
@pytest.mark.parametrize("name", NOISE)
def test_the_gradient_of_an_adaptive_solve_is_diffrax_s(name):
    (value, steps), ours = jax.jit(jax.value_and_grad(_adaptive(name), has_aux=True))(_start())
    assert int(steps) == _recorded(name)[0].num_rows
    run = _diffrax(name, adjoint=dfx.RecursiveCheckpointAdjoint())
    last = lambda start: (run(start).ys[int(steps)] * jnp.array([1.0, -0.7])).sum()
    value_r, theirs = jax.jit(jax.value_and_grad(last))(_start())
    np.testing.assert_allclose(value, value_r, rtol=1e-12)
    for a, b in zip(ours, theirs):
        np.testing.assert_allclose(a, b, rtol=1e-10)
        assert np.abs(b).min() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Heun", "ShARK"])
def test_a_batch_of_adaptive_solves_has_the_gradients_of_diffrax(name):
    # The same solves one by one are no reference: rounding moves the ends of steps, paths are rough at every scale, and
    # the next step feels the noise in the last. Batch is compared with batch here, and single solves are elsewhere.
    y0, rate, theta = _start()
    y0s, rates = jnp.stack([y0, 2 * y0, -y0]), jnp.array([1.3, 0.6, 2.0])
    reference = _diffrax(name, adjoint=dfx.RecursiveCheckpointAdjoint())

    def theirs(start):
        sol = reference(start)
        count = sol.stats["num_accepted_steps"]
        return (sol.ys[count] * jnp.array([1.0, -0.7])).sum(), count

    def total(one):
        def run(y0s, rates, theta):
            values, steps = jax.vmap(lambda y, r: one((y, r, theta)))(y0s, rates)
            return values.sum(), (values, steps)

        return jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(y0s, rates, theta)

    (_, (values, steps)), grads = total(_adaptive(name))
    (_, (values_r, steps_r)), grads_r = total(theirs)
    np.testing.assert_array_equal(steps, steps_r)
    assert len(set(np.asarray(steps).tolist())) > 1
    np.testing.assert_allclose(values, values_r, rtol=1e-12)
    for a, b in zip(grads, grads_r):
        np.testing.assert_allclose(a, b, rtol=1e-10)
    each = jax.jit(jax.vmap(jax.grad(lambda s: _adaptive(name)(s)[0])))((y0s, rates, jnp.full(3, theta)))
    for k in (0, 1):
        np.testing.assert_allclose(each[k], grads[k], rtol=1e-10)
    np.testing.assert_allclose(each[2].sum(), grads[2], rtol=1e-10)


def _difference(f, start, k, e=1e-4):
    """The derivative of f in the k-th of its arguments, to fourth order."""
    move = lambda d: np.asarray(f(tuple(x + d if i == k else x for i, x in enumerate(start))))
    return (8 * (move(e) - move(-e)) - (move(2 * e) - move(-2 * e))) / (12 * e)


@pytest.mark.slow
def test_backwards_a_stratonovich_equation_has_the_gradient_of_its_frozen_steps():
    start = _start(backwards=True)
    # diffrax takes the same steps back, with the same numbers: Heun's sign of the drift is right either way.
    (value, steps), grads = jax.jit(jax.value_and_grad(_adaptive("Heun", backwards=True), has_aux=True))(start)
    grid, _, ys, rejected = _recorded("Heun", backwards=True)
    assert rejected > 0
    assert int(steps) == grid.num_rows
    np.testing.assert_allclose(value, ys[-1] @ np.array([1.0, -0.7]), rtol=1e-10)
    frozen = jax.jit(_frozen("Heun", backwards=True))
    np.testing.assert_allclose(frozen(start), value, rtol=1e-10)
    for k in (1, 2):
        np.testing.assert_allclose(grads[k], _difference(frozen, start, k), rtol=1e-8)
        assert np.abs(grads[k]) > 1e-2
    # The two starts move together, so this is the sum of their gradients.
    np.testing.assert_allclose(grads[0].sum(), _difference(frozen, start, 0), rtol=1e-8)


MODES = {
    "forward": jax.jacfwd,
    "forward over reverse": lambda f: jax.jacfwd(jax.grad(f)),
    "reverse over reverse": lambda f: jax.jacrev(jax.grad(f)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "mode"),
    [*(("Heun", mode) for mode in MODES), ("ShARK", "forward over reverse"), ("SPaRK", "reverse over reverse")],
)
def test_higher_derivatives_of_an_adaptive_solve_are_those_of_its_frozen_steps(name, mode):
    y0, rate, theta = _start()
    of = lambda f: lambda p: f((y0, p[0], p[1]))
    adaptive, frozen = of(lambda s: _adaptive(name, higher_order=True)(s)[0]), of(_frozen(name))
    at = jnp.stack([rate, theta])
    ours, theirs = (jax.jit(MODES[mode](f))(at) for f in (adaptive, frozen))
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)
    lower = jax.jit(frozen if mode == "forward" else jax.grad(frozen))
    for k in (0, 1):
        move = lambda d, k=k: np.asarray(lower(at + d * jnp.eye(2)[k]))
        e = 1e-3
        slope = (8 * (move(e) - move(-e)) - (move(2 * e) - move(-2 * e))) / (12 * e)
        np.testing.assert_allclose(ours[..., k], slope, rtol=1e-6)
