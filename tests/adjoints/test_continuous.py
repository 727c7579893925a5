"""The adjoint equation solved backwards: gradients of the equation, as good as the steps are fine."""

import functools

import diffrax as dfx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import sdeflow as sf

pytestmark = pytest.mark.usefixtures("x64_module")

CONTINUOUS, DISCRETE = sf.adjoints.ContinuousAdjoint(), sf.adjoints.DiscreteAdjoint()
V = np.array([0.3, -0.7])
LINEAR = sf.ODE(lambda t, y, a: a @ y)
# The derivative of <v, expm(A) y0>, to eight digits.
OF_Y0 = np.array([0.18823072, 0.20751785])
OF_A = np.array([[0.200353, -0.10269662], [0.01070587, 0.09163665]])


def _matrix():
    return jnp.array([[-1.0, 2.0], [-2.0, -1.0]])


def _linear(a, y0, adjoint, n, solver):
    return V @ sf.solve(LINEAR, y0, [0.0, 1.0], args=a, dt0=1 / n, solver=solver, adjoint=adjoint).final


def _close(found, wanted, rtol, atol=0.0):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, wanted)


def _gap(found, wanted):
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    return np.linalg.norm(flat(found) - flat(wanted)) / np.linalg.norm(flat(wanted))


# ---- Ordinary equations. ----


def test_a_linear_equation_has_the_known_value_and_gradients():
    y0 = jnp.array([1.0, 0.5])
    f = jax.jit(jax.grad(lambda a, y0: _linear(a, y0, CONTINUOUS, 20, dfx.Tsit5()), (0, 1)))
    of_a, of_y0 = f(_matrix(), y0)
    np.testing.assert_allclose(of_a, OF_A, atol=1e-7)
    np.testing.assert_allclose(of_y0, OF_Y0, atol=1e-7)
    sol = sf.solve(LINEAR, y0, [0.0, 1.0], args=_matrix(), dt0=0.05, adjoint=CONTINUOUS)
    np.testing.assert_allclose(sol.final, [0.01416405, -0.41105776], atol=1e-7)
    assert 0 < sol.stats["defect"] < 1e-7


@pytest.mark.parametrize(("solver", "order"), [(dfx.Euler(), 1), (dfx.Heun(), 2)])
def test_gradients_converge_with_the_order_of_the_solver(solver, order):
    errors = []
    for n in (32, 64):
        found = jax.grad(functools.partial(_linear, adjoint=CONTINUOUS, n=n, solver=solver), (0, 1))(
            _matrix(), jnp.array([1.0, 0.5])
        )
        errors.append(_gap(found, (OF_A, OF_Y0)))
    assert abs(np.log2(errors[0] / errors[1]) - order) < 0.2


def _solve_network(params, adjoint, **options):
    """What the drift closes over, what it gets as args, and the start."""
    weights, args, y0 = params
    drift = sf.ODE(lambda t, y, args: weights[1] @ jnp.tanh(weights[0] @ y + args * t) - y)
    options = {"dt0": 0.05, "solver": dfx.Tsit5()} | options
    return sf.solve(drift, y0, options.pop("ts", [0.0, 1.0]), args=args, adjoint=adjoint, **options)


def _params():
    keys = jax.random.split(jax.random.key(0), 2)
    weights = jax.random.normal(keys[0], (3, 2)), jax.random.normal(keys[1], (2, 3))
    return weights, jnp.array(0.7), jnp.array([0.4, -0.2])


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"ts": [0.0, 0.25, 0.5, 0.75, 1.0]}, id="equal intervals"),
        pytest.param({"ts": [0.0, 0.1, 0.5, 1.0]}, id="any intervals", marks=pytest.mark.slow),
        pytest.param({"ts": [1.0, 0.6, 0.0], "dt0": -0.05}, id="reverse time", marks=pytest.mark.slow),
        pytest.param({"ts": [0.0, 0.3, 1.0], "dt0": None, "grid": True}, id="padding", marks=pytest.mark.slow),
        pytest.param(
            {"ts": [0.0, 0.4, 1.0], "save_fn": lambda t, y, args: {"a": jnp.sin(y) * args, "b": t * y[0]}},
            id="save_fn",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_gradients_are_those_of_the_steps_where_these_are_fine(options):
    if options.get("grid"):
        options = options | {"grid": sf.grids.through(options["ts"], dt0=0.05, num_steps=32)}

    def loss(params, adjoint):
        ys = _solve_network(params, adjoint, **options).ys
        return sum(
            (jnp.cos(3 * y) * jnp.arange(1, len(y) + 1)[(..., *[None] * (y.ndim - 1))]).sum()
            for y in jax.tree.leaves(ys)
        )

    found, wanted = (jax.jit(jax.grad(functools.partial(loss, adjoint=a)))(_params()) for a in (CONTINUOUS, DISCRETE))
    _close(found, wanted, 1e-5, 1e-7)


def test_gradients_with_respect_to_times_follow_the_closed_rule():
    def loss(ts, adjoint):
        ys = _solve_network(_params(), adjoint, ts=ts, dt0=None, steps_per_interval=10).ys
        return (jnp.sin(ys) * jnp.arange(1.0, 4.0)[:, None]).sum()

    ts = jnp.array([0.1, 0.5, 1.0])
    found, wanted = (jax.jit(jax.grad(functools.partial(loss, adjoint=a)))(ts) for a in (CONTINUOUS, DISCRETE))
    _close(found, wanted, 1e-6)


@functools.partial(jax.jit, static_argnums=1)
def _cubic(params, adjoint):
    """y' = -lambda y^3 in float32, on steps that grow with time."""
    y0, rate = params
    ts = np.concatenate([[0.0], np.geomspace(1e-5, 1.0, 60)]).astype(np.float32)
    sol = lambda p: sf.solve(
        sf.ODE(lambda t, y, a: -a * y**3), p[0], ts, args=p[1], solver=dfx.Tsit5(), adjoint=adjoint
    )
    return jax.grad(lambda p: sol(p).final)((y0, rate)), sol(params).stats.get("defect")


@pytest.mark.parametrize(("rate", "broken"), [(1.0, False), (100.0, False), (1e4, True)])
def test_an_equation_that_forgets_its_start_spoils_its_gradient_and_the_defect_says_so(rate, broken):
    params = (jnp.array(1.0, jnp.float32), jnp.array(rate, jnp.float32))
    exact = (1 + 2 * rate) ** -1.5
    (of_y0, of_rate), defect = _cubic(params, CONTINUOUS)
    np.testing.assert_allclose(of_rate, -exact, rtol=1e-3)
    assert (abs(of_y0 / exact - 1) > 0.03) == broken
    assert (defect > 1e-2) == broken
    (of_y0, of_rate), _ = _cubic(params, DISCRETE)
    np.testing.assert_allclose([of_y0, of_rate], [exact, -exact], rtol=1e-3)


def test_a_defect_above_the_largest_allowed_is_nan_and_no_gradient():
    allowed = sf.adjoints.ContinuousAdjoint(max_defect=1e-2)
    rates = [jnp.array(rate, jnp.float32) for rate in (1.0, 1e4)]
    good, bad = (_cubic((jnp.array(1.0, jnp.float32), rate), allowed)[0] for rate in rates)
    assert np.isfinite(good).all()
    assert np.isnan(bad).all()


def test_a_batch_has_the_gradients_of_its_members():
    weights, args, _ = _params()
    starts = jnp.array([[0.4, -0.2], [1.0, 0.3], [-0.5, 0.8]])

    def one(params, y0, adjoint=CONTINUOUS):
        return (_solve_network((*params, y0), adjoint, ts=[0.0, 0.3, 1.0], dt0=0.1, solver=dfx.Heun()).ys ** 2).sum()

    each = jax.vmap(jax.grad(one, (0, 1)), in_axes=(None, 0))((weights, args), starts)
    inside = lambda params, starts: jax.vmap(one, in_axes=(None, 0))(params, starts).sum()
    of_params, of_starts = jax.grad(inside, (0, 1))((weights, args), starts)
    _close(of_params, jax.tree.map(lambda x: x.sum(0), each[0]), 1e-10)
    _close(of_starts, each[1], 1e-10)


# ---- Noise. ----


def _on_path(equation, y0, args, adjoint, solver, n, fine=512):
    """The solution at 1, n steps along the coarsened increments of one path."""
    area = dfx.SpaceTimeLevyArea if isinstance(solver, dfx.AbstractSRK) else dfx.BrownianIncrement
    shape = equation.diffusion(0.0, y0, args)
    structure = shape.in_structure() if isinstance(shape, lx.AbstractLinearOperator) else y0
    with jax.ensure_compile_time_eval():
        structure = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), structure)
        path = sf.paths.GridBrownian(
            sf.grids.uniform(0.0, 1.0, fine), structure, key=jax.random.key(3), levy_area=area
        ).coarsen(fine // n)
    return sf.solve(equation, y0, [0.0, 1.0], args=args, path=path, solver=solver, adjoint=adjoint).final


GBM = sf.SDE(lambda t, y, a: a[0] * y, lambda t, y, a: a[1] * y, interpretation="stratonovich")


@pytest.mark.parametrize(
    "solver",
    [dfx.Heun(), *(pytest.param(x, marks=pytest.mark.slow) for x in (dfx.EulerHeun(), dfx.StratonovichMilstein()))],
    ids=lambda s: type(s).__name__,
)
def test_geometric_brownian_motion_has_the_gradients_of_its_closed_form(solver):
    y0, args = jnp.array(1.2), jnp.array([0.3, 0.5])
    errors = []
    for n in (16, 256):
        f = lambda y0, args, n=n: _on_path(GBM, y0, args, CONTINUOUS, solver, n)
        x, found = f(y0, args), jax.grad(f, (0, 1))(y0, args)
        w = (jnp.log(_on_path(GBM, y0, args, DISCRETE, dfx.Heun(), 512) / y0) - args[0]) / args[1]
        x = y0 * jnp.exp(args[0] + args[1] * w)
        errors.append(_gap(found, (x / y0, jnp.array([x, x * w]))))
    # Order one, by the closed form of the same path (known to the error of its finest steps).
    assert errors[1] < 6e-3
    assert errors[1] < errors[0] / 6


def test_noise_that_mixes_has_the_gradients_of_fine_steps():
    g = lambda t, y, a: lx.MatrixLinearOperator(jnp.stack([jnp.sin(a[0] * y), jnp.cos(y), jnp.ones(2) * a[1]], 1))
    sde = sf.SDE(lambda t, y, a: -a[0] * y, g, interpretation="stratonovich")
    grad = lambda adjoint, n: jax.jit(
        jax.grad(lambda y0, a: (_on_path(sde, y0, a, adjoint, dfx.Heun(), n) ** 2).sum(), (0, 1))
    )(jnp.array([0.5, -0.3]), jnp.array([0.6, 0.4]))
    exact = grad(DISCRETE, 512)
    # Both limits are the same where the noise between two times is the same; it converges with half an order.
    assert _gap(grad(CONTINUOUS, 512), exact) < 1e-2
    assert _gap(grad(CONTINUOUS, 64), grad(DISCRETE, 64)) < 1e-1


@pytest.mark.parametrize(
    "solver",
    [dfx.Heun(), dfx.ShARK(), *(pytest.param(x, marks=pytest.mark.slow) for x in (dfx.Euler(), dfx.SRA1()))],
    ids=lambda s: type(s).__name__,
)
def test_additive_noise_goes_with_every_solver(solver):
    sde = sf.SDE(lambda t, y, a: a[0] * jnp.sin(y), lambda t, y, a: a[1] * (1 + t) * jnp.ones_like(y), additive=True)
    grad = lambda adjoint, n: jax.jit(
        jax.grad(lambda y0, a: (_on_path(sde, y0, a, adjoint, solver, n) ** 2).sum(), (0, 1))
    )(jnp.array([0.5, -0.3]), jnp.array([-1.6, 0.4]))
    exact, found, coarse = grad(DISCRETE, 256), grad(CONTINUOUS, 256), grad(CONTINUOUS, 16)
    bounds = {dfx.Euler: (2e-2, 2e-2), dfx.Heun: (1e-3, 1e-3)}.get(type(solver), (2e-5, 5e-4))
    for part, bound in enumerate(bounds):
        assert _gap(found[part], exact[part]) < bound
    assert _gap(found[0], exact[0]) < _gap(coarse[0], exact[0]) / 8


# ---- Inside diffeqsolve, adaptive steps, controls. ----


GRID = dfx.StepTo(ts=np.linspace(0.0, 1.0, 41))


@pytest.mark.parametrize(
    ("controller", "solver", "tolerance"),
    [
        pytest.param(GRID, dfx.Heun(), 1e-2, id="given steps"),
        pytest.param(dfx.ConstantStepSize(), dfx.Tsit5(), 3e-5, id="constant steps", marks=pytest.mark.slow),
        pytest.param(dfx.PIDController(1e-7, 1e-9), dfx.Tsit5(), 3e-5, id="adaptive", marks=pytest.mark.slow),
    ],
)
def test_it_goes_into_diffeqsolve(controller, solver, tolerance):
    def loss(params, adjoint):
        weights, args, y0 = params
        term = dfx.ODETerm(lambda t, y, args: weights[1] @ jnp.tanh(weights[0] @ y + args * t) - y)
        saveat, dt0 = dfx.SaveAt(t0=True, t1=True, ts=[0.23, 0.71]), None if controller is GRID else 0.05
        sol = dfx.diffeqsolve(
            term, solver, 0.0, 1.0, dt0, y0, args, saveat=saveat, stepsize_controller=controller, adjoint=adjoint,
            max_steps=64,
        )  # fmt: skip
        return (jnp.cos(3 * sol.ys) * jnp.arange(1.0, 5.0)[:, None]).sum()

    found, wanted = (jax.jit(jax.grad(functools.partial(loss, adjoint=a)))(_params()) for a in (CONTINUOUS, DISCRETE))
    _close(found, wanted, tolerance, tolerance / 5)


@pytest.mark.slow
def test_an_adaptive_solve_has_the_gradients_of_its_accepted_steps():
    loss = lambda params, adjoint: (
        _solve_network(params, adjoint, ts=[0.0, 0.4, 1.0], dt0=None, solver=None).ys ** 2
    ).sum()
    found, wanted = (jax.jit(jax.grad(functools.partial(loss, adjoint=a)))(_params()) for a in (CONTINUOUS, DISCRETE))
    _close(found, wanted, 5e-3, 1e-3)


def test_a_control_made_of_data_has_gradients_too():
    ts = np.linspace(0.0, 1.0, 11)

    def loss(data, a, adjoint):
        term = dfx.ControlTerm(
            lambda t, y, args: a * jnp.stack([jnp.sin(y), jnp.cos(y)], -1),
            dfx.LinearInterpolation(jnp.asarray(ts), data),
        )
        return (
            sf.solve(term, jnp.array([0.3, 0.9]), ts, solver=dfx.Heun(), steps_per_interval=8, adjoint=adjoint)
            .ys[-1]
            .sum()
        )

    data = jax.random.normal(jax.random.key(1), (11, 2)) / 3
    found, wanted = (
        jax.jit(jax.grad(functools.partial(loss, adjoint=a), (0, 1)))(data, jnp.array(1.1))
        for a in (CONTINUOUS, DISCRETE)
    )
    assert _gap(found, wanted) < 1e-3


# ---- What it takes, and what it refuses. ----


def test_memory_does_not_grow_with_the_number_of_steps():
    def memory(n):
        loss = lambda a: (
            sf.solve(
                LINEAR, jnp.ones((64, 2)).T, [0.0, 1.0], args=a, dt0=1 / n, solver=dfx.Heun(), adjoint=CONTINUOUS
            ).final
        ).sum()
        found = sf.adjoints.estimate_memory(jax.grad(loss), _matrix())
        # The ends of the steps themselves are two numbers each.
        return found.temporaries - 2 * 8 * n

    assert memory(4000) - memory(100) < 4096


ITO = sf.SDE(lambda t, y, a: -y, lambda t, y, a: 0.3 * y)


@pytest.mark.parametrize(
    ("equation", "solver", "words"),
    [
        (ITO, dfx.Euler(), "to_stratonovich"),
        (ITO, dfx.ItoMilstein(), "cannot take ItoMilstein backwards"),
        (LINEAR, dfx.Kvaerno3(), "InterpolatingAdjoint"),
        (LINEAR, dfx.ReversibleHeun(), "cannot take ReversibleHeun backwards"),
        (LINEAR, sf.solvers.McCallumFoster(dfx.Heun()), "cannot take McCallumFoster backwards"),
        (GBM, dfx.HalfSolver(dfx.Heun()), "cannot take HalfSolver backwards"),
    ],
)  # fmt: skip
def test_what_it_cannot_do_is_refused_in_one_sentence(equation, solver, words):
    key = jax.random.key(0) if equation.is_stochastic else None
    with pytest.raises(ValueError, match=words):
        sf.solve(equation, jnp.ones(2), [0.0, 1.0], args=_matrix(), key=key, dt0=0.1, solver=solver, adjoint=CONTINUOUS)


def test_times_of_a_stochastic_equation_are_refused_in_one_sentence():
    def loss(t1):
        ts = jnp.stack([jnp.zeros_like(t1), t1])
        sol = sf.solve(
            GBM, jnp.array(1.0), ts, args=jnp.ones(2), key=jax.random.key(0), steps_per_interval=4, adjoint=CONTINUOUS
        )
        return sol.final

    with pytest.raises(ValueError, match="no gradients with respect to noise"):
        jax.grad(loss)(jnp.array(1.0))


BOTH = pytest.mark.parametrize("adjoint", [CONTINUOUS, sf.adjoints.InterpolatingAdjoint()], ids=["with", "along"])


@BOTH
def test_second_derivatives_are_refused_in_one_sentence(adjoint):
    loss = lambda y0: _linear(_matrix(), y0, adjoint, 2, dfx.Heun())
    with pytest.raises(ValueError, match="first derivatives in reverse mode"):
        jax.hessian(loss)(jnp.ones(2))


@BOTH
@pytest.mark.parametrize("stochastic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_is_integrated_beside_the_state_has_gradients_too(adjoint, stochastic):
    drift = lambda t, y, a: -a * y
    sde = sf.SDE(drift, lambda t, y, a: 0.3 * jnp.ones_like(y), additive=True)
    key = {"key": jax.random.key(0)} if stochastic else {}

    def loss(a, adjoint):
        return sf.solve(
            sde if stochastic else sf.ODE(drift), jnp.ones(2), [0.0, 1.0], args=a, dt0=0.01, solver=dfx.Heun(),
            adjoint=adjoint, regularisers=[sf.regularisers.Kinetic()], **key,
        ).penalties["Kinetic"]  # fmt: skip

    found, wanted = (jax.grad(loss)(jnp.array(0.7), a) for a in (adjoint, DISCRETE))
    np.testing.assert_allclose(found, wanted, rtol=1e-2 if stochastic else 1e-4)


@pytest.mark.parametrize("options", [{"max_defect": 0.0}, {"max_defect": "x"}, {"record": 0}])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match="must be a positive number"):
        sf.adjoints.ContinuousAdjoint(**options)
