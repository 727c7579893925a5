"""Undoing the steps gives the gradient of the steps: `ReversibleAdjoint` beside the scan that stores everything."""

import functools
import inspect

import diffrax as dfx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import sdeflow as sf

pytestmark = pytest.mark.usefixtures("x64_module")

OURS, STORED = sf.adjoints.ReversibleAdjoint(), sf.adjoints.DiscreteAdjoint(None)
COUPLED = sf.solvers.McCallumFoster
SOLVERS = {
    "ReversibleHeun": dfx.ReversibleHeun(),
    "Heun": COUPLED(dfx.Heun()),
    "Euler": COUPLED(dfx.Euler()),
    "EulerHeun": COUPLED(dfx.EulerHeun()),
    "Midpoint": COUPLED(dfx.Midpoint()),
    "Tsit5": COUPLED(dfx.Tsit5()),
    "ShARK": COUPLED(dfx.ShARK()),
    "SPaRK": COUPLED(dfx.SPaRK()),
    "StratonovichMilstein": COUPLED(dfx.StratonovichMilstein()),
}
AREAS = {"ShARK": dfx.SpaceTimeLevyArea, "SPaRK": dfx.SpaceTimeLevyArea}
# Two ends alone; equal intervals, walked as a scan of scans; intervals of 6 and 14 steps, walked as one scan.
ENDS, EQUAL, UNEQUAL = (0.0, 1.0), (0.0, 0.5, 1.0), (0.0, 0.3, 1.0)
BACK = (1.0, 0.7, 0.0)


def _start(dtype="float64"):
    """Parameters that the fields close over, the start, and the arguments."""
    key = jax.random.key(0)
    with jax.enable_x64(True):
        p = {"a": np.asarray(jax.random.normal(key, (4, 4))) * 0.5, "b": np.arange(4.0) * 0.3, "s": np.full(4, 0.4)}
        y0, args = np.array([0.1, 0.2, -0.3, 0.5]), np.array(0.3)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), (p, y0, args))


def _equation(p, noise):
    """A small network that all of its inputs reach: the parameters, time, state and arguments."""
    drift = lambda t, y, args: jnp.tanh(p["a"] @ y + p["b"] * t) - args * y
    diagonal = lambda t, y, args: p["s"] * jnp.cos(y + args * t)
    if noise == "none":
        return sf.ODE(drift)
    if noise == "additive":
        return sf.SDE(drift, lambda t, y, args: p["s"] * jnp.cos(args + t), additive=True)
    if noise == "operator":
        rows = lambda t, y, args: lx.MatrixLinearOperator(jnp.stack([diagonal(t, y, args), args * jnp.sin(y)], axis=1))
        return sf.SDE(drift, rows, interpretation="stratonovich")
    if noise == "tree":
        # The first two numbers and the last two, as a tree.
        join = lambda y: jnp.concatenate([y["u"], y["v"][0]])
        split = lambda x: {"u": x[:2], "v": (x[2:],)}
        return sf.SDE(
            lambda t, y, args: split(drift(t, join(y), args)),
            lambda t, y, args: split(diagonal(t, join(y), args)),
            interpretation="stratonovich",
        )
    return sf.SDE(drift, diagonal, interpretation="stratonovich")


def _weighted(tree):
    return sum(
        (jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) * x**2).sum() for x in jax.tree.leaves(tree)
    )


def _loss(start, noise_key, adjoint, solver, noise, ts, n, grid=None):
    """A scalar of everything that is returned, with what is kept depending on the arguments too."""
    p, y0, args = start
    if noise == "tree":
        y0 = {"u": y0[:2], "v": (y0[2:],)}
    keep = lambda t, y, args: jax.tree.map(lambda x: args * x**2 + t, y)
    steps = {"dt0": (ts[-1] - ts[0]) / n} if grid is None else {"grid": grid}
    drive = {} if noise == "none" else {"key": noise_key}
    sol = sf.solve(
        _equation(p, noise), y0, np.asarray(ts) if isinstance(ts, tuple) else ts, args=args, solver=SOLVERS[solver],
        adjoint=adjoint, save_fn=keep, throw=False, **steps, **drive,
    )  # fmt: skip
    return _weighted((sol.ys, sol.final)), (sol.ys, sol.final)


@functools.cache
def _gradients(adjoint, solver, noise="diagonal", ts=UNEQUAL, n=20, dtype="float64"):
    """Value, what was returned, and gradients in parameters, start and arguments."""
    with jax.enable_x64(dtype == "float64"):
        run = jax.value_and_grad(lambda s, k: _loss(s, k, adjoint, solver, noise, ts, n), has_aux=True)
        return jax.block_until_ready(jax.jit(run)(_start(dtype), jax.random.key(3)))


def _apart(a, b):
    """The largest difference of two trees, leaf by leaf, relative to the leaf."""
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    assert len(a) == len(b)
    assert all(x.dtype == y.dtype and np.isfinite(x).all() and np.isfinite(y).all() for x, y in zip(a, b))
    return max(float(np.abs(x - y).max() / np.maximum(np.abs(y).max(), 1e-30)) for x, y in zip(a, b))


def _alive(grads):
    return all((np.abs(np.asarray(x)) > 1e-8).any() for x in jax.tree.leaves(grads))


# ---- The gradient of the stored scan. ----

_CASES = [
    *((s, "diagonal", ts) for s in ("ReversibleHeun", "Heun") for ts in (ENDS, EQUAL, UNEQUAL)),
    ("EulerHeun", "diagonal", UNEQUAL),
    *((s, noise, UNEQUAL) for s in ("ReversibleHeun", "Heun") for noise in ("none", "additive", "operator", "tree")),
    *((s, "diagonal", BACK) for s in ("ReversibleHeun", "Heun")),
    *((s, "none", UNEQUAL) for s in ("Euler", "Tsit5")),
    *((s, "none", BACK) for s in ("ReversibleHeun", "Tsit5")),
    *((s, "additive", EQUAL) for s in ("Euler", "ShARK")),
    *((s, "diagonal", UNEQUAL) for s in ("SPaRK", "Midpoint", "StratonovichMilstein")),
    ("ShARK", "additive", BACK),
]
_OFTEN = {
    ("ReversibleHeun", "tree", UNEQUAL),
    ("Heun", "operator", UNEQUAL),
}


@pytest.mark.parametrize(
    ("solver", "noise", "ts"), [pytest.param(*c, marks=[] if c in _OFTEN else pytest.mark.slow) for c in _CASES]
)
def test_the_gradient_is_that_of_the_stored_scan(solver, noise, ts):
    (value, out), grads = _gradients(OURS, solver, noise, ts)
    (value_s, out_s), grads_s = _gradients(STORED, solver, noise, ts)
    assert _apart((value, out), (value_s, out_s)) < 1e-14
    assert _apart(grads, grads_s) < 1e-12
    if noise == "none":
        grads[0].pop("s")
    assert _alive(grads)


@functools.cache
def _long(adjoint, solver, n, dtype):
    """Gradients of a scalar of the last state alone, as one vector."""
    with jax.enable_x64(dtype == "float64"):

        def loss(start, key):
            p, y0, args = start
            sol = sf.solve(
                _equation(p, "diagonal"), y0, ENDS, args=args, key=key, dt0=1 / n, solver=SOLVERS[solver], adjoint=adjoint,
                throw=False,
            )  # fmt: skip
            return _weighted(sol.final)

        grads = jax.tree.leaves(jax.jit(jax.grad(loss))(_start(dtype), jax.random.key(3)))
    assert all(x.dtype == dtype for x in grads)
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in grads])


@pytest.mark.parametrize(
    ("solver", "n", "dtype", "bound"),
    [
        pytest.param("ReversibleHeun", 100, "float32", 1e-5, marks=pytest.mark.slow),
        pytest.param("ReversibleHeun", 100, "float64", 1e-12, marks=pytest.mark.slow),
        pytest.param("ReversibleHeun", 1000, "float64", 1e-12, marks=pytest.mark.slow),
        pytest.param("ReversibleHeun", 10_000, "float64", 1e-12, marks=pytest.mark.slow),
        pytest.param("ReversibleHeun", 1000, "float32", 1e-5, marks=pytest.mark.slow),
        pytest.param("ReversibleHeun", 10_000, "float32", 1e-5, marks=pytest.mark.slow),
        pytest.param("Heun", 10_000, "float64", 1e-11, marks=pytest.mark.slow),
        pytest.param("Heun", 10_000, "float32", 1e-4, marks=pytest.mark.slow),
    ],
)
def test_over_many_steps_the_gradient_stays_that_of_the_stored_scan(solver, n, dtype, bound):
    ours, stored = _long(OURS, solver, n, dtype), _long(STORED, solver, n, dtype)
    apart = np.linalg.norm(ours - stored) / np.linalg.norm(stored)
    print(f"{solver}, {n} steps, {dtype}: {apart:.1e}")
    assert apart < bound


@pytest.mark.parametrize(
    "solver", ["Heun", *(pytest.param(s, marks=pytest.mark.slow) for s in ("ReversibleHeun", "EulerHeun"))]
)
def test_a_thousand_steps_are_undone_to_rounding(solver):
    p, y0, args = _start()
    sol = sf.solve(
        _equation(p, "diagonal"),
        y0,
        ENDS,
        args=args,
        dt0=1e-3,
        solver=SOLVERS[solver],
        adjoint=OURS,
        key=jax.random.key(1),
    )
    assert float(sol.stats["defect"]) < 1e-13


# ---- Padding and batches. ----


@functools.cache
def _padded(adjoint, solver, rows):
    """The loss and its gradients along a grid with so many rows of padding, which the walk cannot see are none."""
    grid = sf.grids.through(np.asarray(UNEQUAL), 0.05)
    grid = grid.pad(grid.num_rows + rows)
    run = lambda s, k, g: jax.value_and_grad(_loss, has_aux=True)(
        s, k, adjoint, solver, "diagonal", jnp.asarray(UNEQUAL), 0, g
    )
    return jax.jit(run)(_start(), jax.random.key(3), grid)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "rows"),
    [("ReversibleHeun", 7), *(pytest.param(s, r, marks=pytest.mark.slow) for s, r in
      (("ReversibleHeun", 1), ("ReversibleHeun", 100), ("Heun", 1), ("Heun", 7), ("Heun", 100), ("EulerHeun", 7)))],
)  # fmt: skip
def test_padding_is_invisible(solver, rows):
    value, grads = _padded(OURS, solver, rows)
    bare, grads_bare = _padded(OURS, solver, 0)
    assert [np.asarray(x).tobytes() for x in jax.tree.leaves(value)] == [
        np.asarray(x).tobytes() for x in jax.tree.leaves(bare)
    ]
    assert _apart(grads, grads_bare) < 1e-12


def _batch():
    grids = [
        sf.grids.through(np.asarray(ts), dt0) for ts, dt0 in ((UNEQUAL, 0.05), ((0.0, 0.2, 0.4), 0.1), (BACK, -0.2))
    ]
    times = jnp.stack([jnp.asarray(ts) for ts in (UNEQUAL, (0.0, 0.2, 0.4), BACK)])
    p, y0, args = _start()
    return p, y0 + 0.1 * jnp.arange(3.0)[:, None], args, jax.random.split(jax.random.key(5), 3), times, grids


def _one(adjoint, solver, p, y0, args, key, ts, grid):
    return _loss((p, y0, args), key, adjoint, solver, "diagonal", ts, 0, grid)[0]


@functools.cache
def _alone(solver):
    """The gradients of the padded series, solved one by one by the stored scan."""
    p, y0, args, keys, times, grids = _batch()
    padded = sf.grids.stack(grids)
    one = jax.jit(jax.value_and_grad(functools.partial(_one, STORED, solver), argnums=(0, 1, 2)))
    return [
        one(p, y0[i], args, keys[i], times[i], jax.tree.map(lambda x, i=i: x[i], padded)) for i in range(len(grids))
    ]


_BATCHED = ["ReversibleHeun", pytest.param("Heun", marks=pytest.mark.slow)]


@pytest.mark.slow
@pytest.mark.parametrize("solver", _BATCHED)
def test_every_path_of_a_batch_has_its_own_grid_value_and_gradient(solver):
    p, y0, args, keys, times, grids = _batch()
    one = jax.value_and_grad(functools.partial(_one, OURS, solver), argnums=(0, 1, 2))
    axes = (None, 0, None, 0, 0, 0)
    batched = jax.jit(jax.vmap(one, in_axes=axes))(p, y0, args, keys, times, sf.grids.stack(grids))
    for i, alone in enumerate(_alone(solver)):
        assert _apart(jax.tree.map(lambda x, i=i: x[i], batched), alone) < 1e-12


@pytest.mark.parametrize("solver", _BATCHED)
def test_what_a_batch_shares_has_one_gradient_and_the_rest_each_their_own(solver):
    p, y0, args, keys, times, grids = _batch()

    def mean(p, y0, args):
        one = functools.partial(_one, OURS, solver)
        return jax.vmap(one, in_axes=(None, 0, None, 0, 0, 0))(p, y0, args, keys, times, sf.grids.stack(grids)).mean()

    in_p, in_y0, in_args = jax.jit(jax.grad(mean, argnums=(0, 1, 2)))(p, y0, args)
    alone = [grads for _, grads in _alone(solver)]
    average = lambda i: jax.tree.map(lambda *x: sum(x) / 3, *(grads[i] for grads in alone))
    assert _apart((in_p, in_args), (average(0), average(2))) < 1e-12
    assert _apart(in_y0, jnp.stack([grads[1] / 3 for grads in alone])) < 1e-12


# ---- What moves the solution besides: data, jumps. ----


def _driven(adjoint, solver, form):
    """A controlled equation whose data are differentiated: as a control, or by its slope in a drift."""

    def loss(values, weight, y0):
        control = sf.paths.linear_control(jnp.linspace(0.0, 1.0, 6), values)
        field = lambda t, y, args: jnp.tanh((weight * y)[:, None] + jnp.array([0.1, -0.4]))
        if form == "control":
            equation = dfx.ControlTerm(field, control)
        else:
            equation = sf.ODE(lambda t, y, args: field(t, y, args) @ control.derivative(t))
        sol = sf.solve(equation, y0, UNEQUAL, dt0=0.05, solver=SOLVERS[solver], adjoint=adjoint)
        return _weighted(sol.ys)

    values = jnp.stack([jnp.sin(jnp.arange(6.0)), jnp.cos(2 * jnp.arange(6.0))], axis=1)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(
        values, jnp.array([0.7, 1.3, -0.4]), jnp.array([0.2, -0.1, 0.6])
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "form"),
    [("ReversibleHeun", "control"),
     *(pytest.param(*c, marks=pytest.mark.slow) for c in (("Heun", "control"), ("Tsit5", "slope"), ("Heun", "slope")))],
)  # fmt: skip
def test_data_that_drive_the_equation_have_gradients(solver, form):
    ours, stored = _driven(OURS, solver, form), _driven(STORED, solver, form)
    assert _apart(ours, stored) < 1e-12
    assert _alive(ours[1])


def _across_a_jump(adjoint, solver):
    """A drift that jumps at 1/3, known to the grid."""
    grid = sf.grids.through(np.array([0.0, 1 / 3, 1.0]), 0.05)
    jump = np.zeros(grid.num_rows, bool)
    jump[np.asarray(grid.save)[1]] = True
    grid = sf.grids.Grid(grid.left, grid.right, grid.live, grid.save, jump)

    def loss(rate):
        ode = sf.ODE(lambda t, y, rate: jnp.where(t < 1 / 3, -rate * y, jnp.sin(rate * y) + 2))
        return sf.solve(
            ode, jnp.array([1.0]), [0.0, 1 / 3, 1.0], args=rate, grid=grid, solver=solver, adjoint=adjoint
        ).final[0]

    return jax.jit(jax.value_and_grad(loss))(jnp.array(0.8))


@pytest.mark.slow
def test_coupled_copies_cross_jumps_and_reversible_heun_says_that_it_cannot():
    assert _apart(_across_a_jump(OURS, SOLVERS["Heun"]), _across_a_jump(STORED, SOLVERS["Heun"])) < 1e-12
    with pytest.raises(ValueError, match="takes its slope afresh where the field jumps") as raised:
        _across_a_jump(OURS, dfx.ReversibleHeun())
    assert "McCallumFoster(diffrax.Heun())" in str(raised.value)


# ---- Inside of diffrax. ----

OFF = np.array([0.03, 0.4, 0.41, 0.99])
KNOTS = np.array([0.0, 0.1, 0.15, 0.6, 1.0])
# Made when they are needed, in the precision that is then in force.
SAVES = {
    "end": lambda: dfx.SaveAt(t1=True),
    "times": lambda: dfx.SaveAt(t0=True, ts=OFF, fn=lambda t, y, args: args * y**2 + t),
    "steps": lambda: dfx.SaveAt(t0=True, t1=True, steps=True),
    "thirds": lambda: dfx.SaveAt(t1=True, steps=3, fn=lambda t, y, args: {"z": jnp.sin(y) * args}),
}


def _path(name):
    if name == "grid":
        return sf.paths.GridBrownian(sf.grids.through(ENDS, 0.125), (4,), key=jax.random.key(4))
    return dfx.VirtualBrownianTree(0.0, 1.0, 1e-4, (4,), jax.random.key(4))


def _diffeqsolve(adjoint, solver, path, save, stepping):
    """Gradients through a plain call of diffrax's function."""
    dt0, controller = (0.125, dfx.ConstantStepSize()) if stepping == "constant" else (None, dfx.StepTo(KNOTS))

    def loss(start):
        p, y0, args = start
        terms = _equation(p, "none").terms() if path == "none" else _equation(p, "diagonal").terms(_path(path))
        sol = dfx.diffeqsolve(
            terms, SOLVERS[solver], 0.0, 1.0, dt0, y0, args, saveat=SAVES[save](), stepsize_controller=controller,
            adjoint=adjoint, max_steps=64,
        )  # fmt: skip
        return _weighted(jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0.0), sol.ys)), sol.ys

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(_start())


_CALLS = [
    ("ReversibleHeun", "none", "times", "constant"),
    ("Heun", "grid", "thirds", "constant"),
    *(("ReversibleHeun", "grid", save, "constant") for save in SAVES),
    *((s, "tree", "end", how) for s in ("ReversibleHeun", "Heun") for how in ("constant", "given")),
    *((s, "tree", "times", "given") for s in ("ReversibleHeun", "Heun")),
    *((s, "none", "steps", "constant") for s in ("Heun", "Tsit5")),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "path", "save", "stepping"),
    _CALLS,
)
def test_inside_diffeqsolve_the_gradient_is_that_of_diffrax(solver, path, save, stepping):
    ours = _diffeqsolve(OURS, solver, path, save, stepping)
    theirs = _diffeqsolve(dfx.RecursiveCheckpointAdjoint(), solver, path, save, stepping)
    (value, ys), grads = ours
    (value_d, ys_d), grads_d = theirs
    np.testing.assert_allclose(value, value_d, rtol=1e-12)
    for a, b in zip(jax.tree.leaves(ys), jax.tree.leaves(ys_d)):
        np.testing.assert_allclose(a, b, rtol=1e-11)
    assert _apart(grads, grads_d) < 1e-11


# ---- Adaptive steps. ----

PID = dfx.PIDController(rtol=1e-3, atol=1e-5)


def _adaptive(adjoint, solver, engine, noise="none", record=256):
    controller = PID if noise == "none" else dfx.PIDController(rtol=3e-2, atol=3e-2)
    if solver == "Tsit5":  # its fifth order would cross the whole in two steps
        controller = dfx.PIDController(rtol=1e-7, atol=1e-9)

    def loss(start):
        p, y0, args = start
        equation = _equation(p, noise)
        terms = equation.terms() if noise == "none" else equation.terms(_path("tree"))
        if engine == "solve":
            sol = sf.solve(
                terms, y0, UNEQUAL, args=args, dt0=0.1, solver=SOLVERS[solver], stepsize_controller=controller,
                adjoint=adjoint, throw=False, save_fn=lambda t, y, args: args * y**2,
            )  # fmt: skip
            return _weighted((sol.ys, sol.final)), (sol.stats["num_steps"], sol.result)
        sol = dfx.diffeqsolve(
            terms, SOLVERS[solver], 0.0, 1.0, 0.1, y0, args, saveat=dfx.SaveAt(ts=OFF, t1=True), adjoint=adjoint,
            stepsize_controller=controller, max_steps=512,
        )  # fmt: skip
        return _weighted(sol.ys), (sol.stats["num_accepted_steps"], sol.result)

    (value, (steps, result)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(_start())
    return value, grads, int(steps), result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("solver", "engine", "noise"),
    [("ReversibleHeun", "solve", "none"),
     *(pytest.param(*c, marks=pytest.mark.slow) for c in
       (("Heun", "solve", "none"), ("Tsit5", "solve", "none"), ("ReversibleHeun", "diffeqsolve", "none"),
        ("Heun", "diffeqsolve", "none"), ("Tsit5", "diffeqsolve", "none"), ("Heun", "solve", "diagonal"),
        ("ReversibleHeun", "diffeqsolve", "diagonal")))],
)  # fmt: skip
def test_adaptive_steps_are_undone_too(solver, engine, noise):
    other = STORED if engine == "solve" else dfx.RecursiveCheckpointAdjoint()
    value, grads, steps, _ = _adaptive(OURS, solver, engine, noise)
    value_d, grads_d, steps_d, _ = _adaptive(other, solver, engine, noise)
    assert steps == steps_d
    assert steps > 2
    np.testing.assert_allclose(value, value_d, rtol=1e-12)
    assert _apart(grads, grads_d) < (1e-12 if engine == "solve" else 1e-10)


@pytest.mark.slow
def test_a_record_that_is_too_short_is_a_failure_and_no_gradient():
    value, grads, steps, result = _adaptive(sf.adjoints.ReversibleAdjoint(record=4), "Heun", "solve")
    assert steps > 4
    assert result == sf.RESULTS.record_overflow
    assert all(np.isnan(x).all() for name, x in zip("sp", (grads[1], grads[2])))
    with pytest.raises(RuntimeError, match="record="):
        _adaptive(sf.adjoints.ReversibleAdjoint(record=4), "Heun", "diffeqsolve")


# ---- Where it would be wrong. ----


def _stiff(adjoint, rate, solver="ReversibleHeun", n=100, dtype="float64", y0=1.0):
    """A fast decay or growth with a slow nonlinear part, whose slope a wrong state would have wrong."""

    def loss(theta, y0):
        ode = sf.ODE(lambda t, y, args: -rate * y + jnp.sin(theta * y) + theta)
        sol = sf.solve(ode, y0, ENDS, dt0=1 / n, solver=SOLVERS[solver], adjoint=adjoint, throw=False)
        return sol.final, sol.stats.get("defect", 0.0)

    with jax.enable_x64(dtype == "float64"):
        start = (jnp.array(1.3, dtype), jnp.array(y0, dtype))
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*start)


# A fast decay, for which neither solver is stable, and growth, beside whose end a wrong start would look small.
_HARD = [
    (s, rate, d, y0)
    for s in ("ReversibleHeun", "Heun")
    for d, rates in (("float32", (60.0, 150.0, -5.0, -10.0, -20.0)), ("float64", (60.0, 300.0, -14.0, -20.0, -45.0)))
    for rate in rates
    for y0 in (1.0, 0.0)
]
_SOME = [("ReversibleHeun", -10.0, "float32", 1.0)]


@pytest.mark.parametrize(
    ("solver", "rate", "dtype", "y0"), [pytest.param(*c, marks=[] if c in _SOME else pytest.mark.slow) for c in _HARD]
)
def test_steps_that_cannot_be_undone_give_nan_and_never_a_wrong_number(solver, rate, dtype, y0):
    (_, defect), grads = _stiff(OURS, rate, solver, dtype=dtype, y0=y0)
    _, stored = _stiff(STORED, rate, solver, dtype=dtype, y0=y0)
    print(
        f"{solver}, rate {rate:g}, {dtype}: defect {float(defect):.1e}, {[float(x) for x in grads]}, {[float(x) for x in stored]}"
    )
    kept = bool(defect <= OURS.max_defect)
    assert kept == (rate in (-5.0, -14.0))
    for mine, wanted in zip(grads, stored):
        if kept:
            np.testing.assert_allclose(mine, wanted, rtol=1e-2)
        else:
            assert np.isnan(mine)


def test_the_largest_defect_is_the_one_that_is_allowed():
    strict = sf.adjoints.ReversibleAdjoint(max_defect=1e-30)
    (value, defect), grads = _stiff(strict, 10.0)
    assert 0 < float(defect) < 1e-12
    assert np.isfinite(value)
    assert all(np.isnan(g) for g in grads)

    # One path that cannot be undone spoils what it shares with the others, and no gradient of theirs.
    def loss(theta, rates, y0):
        final = lambda rate, y0: sf.solve(
            sf.ODE(lambda t, y, args: -rate * y + jnp.sin(theta * y)), y0, ENDS, dt0=0.01, solver=dfx.ReversibleHeun(),
            adjoint=OURS, throw=False).final  # fmt: skip
        return jax.vmap(final)(rates, y0).sum()

    in_theta, in_y0 = jax.jit(jax.grad(loss, argnums=(0, 2)))(jnp.array(1.3), jnp.array([1.0, 400.0]), jnp.ones(2))
    assert np.isnan(in_theta)
    assert np.isnan(in_y0).tolist() == [False, True]


def _all_solvers():
    kinds, todo = [], [dfx.AbstractSolver]
    while todo:
        todo += (kind := todo.pop()).__subclasses__()
        kinds.append(kind)
    return sorted(
        {
            k
            for k in kinds
            if k.__module__.startswith("diffrax") and not inspect.isabstract(k) and getattr(dfx, k.__name__, None) is k
        },
        key=lambda k: k.__name__,
    )


def test_every_irreversible_solver_is_refused_in_a_sentence_that_names_the_cure():
    refused = [k for k in _all_solvers() if k is not dfx.ReversibleHeun and "Abstract" not in k.__name__]
    assert len(refused) > 25
    assert dfx.SemiImplicitEuler in refused
    for kind in refused:
        solver = {
            dfx.HalfSolver: lambda: dfx.HalfSolver(dfx.Heun()),
            dfx.ALIGN: lambda: dfx.ALIGN(0.1),
            dfx.ShOULD: lambda: dfx.ShOULD(0.1),
            dfx.QUICSORT: lambda: dfx.QUICSORT(0.1),
        }.get(kind, kind)()
        with pytest.raises(ValueError, match=f"cannot undo the steps of {kind.__name__}: use") as raised:
            sf.solve(sf.ODE(lambda t, y, args: -y), jnp.ones(2), ENDS, dt0=0.5, solver=solver, adjoint=OURS)
        assert "ReversibleHeun" in str(raised.value)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("engine", ["diffeqsolve", pytest.param("solve", marks=pytest.mark.slow)])
def test_an_irreversible_solver_is_refused_for_adaptive_steps(engine):
    SOLVERS["irreversible"] = dfx.Tsit5()
    try:
        with pytest.raises(ValueError, match="cannot undo the steps of Tsit5"):
            _adaptive(OURS, "irreversible", engine)
    finally:
        del SOLVERS["irreversible"]


@pytest.mark.parametrize("solver", ["ReversibleHeun", pytest.param("Heun", marks=pytest.mark.slow)])
def test_gradients_in_times_and_in_noise_are_refused(solver):
    p, y0, args = _start()

    def in_times(ts):
        ode = _equation(p, "none")
        return sf.solve(ode, y0, ts, args=args, steps_per_interval=3, solver=SOLVERS[solver], adjoint=OURS).final.sum()

    def in_noise(table):
        path = sf.paths.GridBrownian(sf.grids.uniform(0.0, 1.0, 3), y0, key=jax.random.key(0))
        path = jax.tree.unflatten(jax.tree.structure(path), [
            table if x is path.table.W else x for x in jax.tree.leaves(path)])  # fmt: skip
        return sf.solve(
            _equation(p, "diagonal"), y0, ENDS, args=args, path=path, solver=SOLVERS[solver], adjoint=OURS
        ).final.sum()

    for f, at in ((in_times, jnp.array([0.0, 1.0])), (in_noise, jnp.ones((3, 4)))):
        with pytest.raises(ValueError, match="no gradients with respect to times or noise"):
            jax.grad(f)(at)


def test_second_derivatives_and_forward_mode_are_never_a_silent_wrong_number():
    ode = sf.ODE(lambda t, y, rate: -rate * y + jnp.sin(y))
    final = lambda rate: (
        sf.solve(ode, jnp.array(1.0), ENDS, args=rate, dt0=0.25, solver=dfx.ReversibleHeun(), adjoint=OURS).final
    )
    at = jnp.array(0.7)
    for mode in (
        jax.jacfwd(final),
        jax.jacfwd(jax.grad(final)),
        jax.grad(jax.grad(final)),
        jax.grad(jax.jacfwd(final)),
    ):
        with pytest.raises((ValueError, TypeError)):
            mode(at)


# ---- Memory. ----


def _temporary(n, solver, shape=(64, 32)):
    """Bytes of temporary memory of a compiled gradient."""
    weights = jax.random.normal(jax.random.key(0), (2, shape[1], 64), jnp.float32) * 0.1

    def loss(w, y0, key):
        grid = sf.grids.uniform(0.0, 1.0, n)
        path = sf.paths.GridBrownian(grid, jax.ShapeDtypeStruct(y0.shape, y0.dtype), key=key, storage="counter")
        sde = sf.SDE(
            lambda t, y, args: jnp.tanh(y @ w[0]) @ w[1].T, lambda t, y, args: 0.3 * jnp.tanh(y @ w[1]) @ w[0].T,
            interpretation="stratonovich",
        )  # fmt: skip
        return (sf.solve(sde, y0, ENDS, path=path, solver=SOLVERS[solver], adjoint=OURS, throw=False).final ** 2).mean()

    with jax.enable_x64(False):
        start = (jnp.asarray(weights, jnp.float32), jnp.ones(shape, jnp.float32), jax.random.key(1))
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*start).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("solver", ["ReversibleHeun", pytest.param("Heun", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_number_of_steps(solver):
    state = 4 * 64 * 32
    few, many = (_temporary(n, solver) for n in (100, 10_000))
    print(
        f"{solver}: {few} bytes for 100 steps, {many} for 10 000: {(many - 17 * 10_000) / state:.1f} states and the grid"
    )
    assert many - few <= 17 * (10_000 - 100) + 1024
    if solver == "ReversibleHeun":
        assert many <= 30 * state + 17 * 10_000
