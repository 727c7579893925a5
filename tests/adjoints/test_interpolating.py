"""The adjoint equation along the stored solution: stiff equations, many parameters, additive noise."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdeflow as sf

pytestmark = pytest.mark.usefixtures("x64_module")

INTERPOLATING, DISCRETE = sf.adjoints.InterpolatingAdjoint(), sf.adjoints.DiscreteAdjoint()
V = np.array([0.3, -0.7])
LINEAR = sf.ODE(lambda t, y, a: a @ y)
OF_Y0 = np.array([0.18823072, 0.20751785])
OF_A = np.array([[0.200353, -0.10269662], [0.01070587, 0.09163665]])
THETA, MEAN, SIGMA, X0 = 1.5, 0.4, 0.6, 2.0


def _close(found, wanted, rtol, atol=0.0):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), found, wanted)


def _gap(found, wanted):
    flat = lambda tree: np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])
    return np.linalg.norm(flat(found) - flat(wanted)) / np.linalg.norm(flat(wanted))


def _both(loss, *params):
    argnums = tuple(range(len(params)))
    grad = lambda adjoint: jax.jit(jax.grad(lambda *p: loss(*p, adjoint), argnums))(*params)
    return grad(INTERPOLATING), grad(DISCRETE)


# ---- Ordinary equations. ----


GAUSS = sf.adjoints.InterpolatingAdjoint(quadrature="gauss")


@pytest.mark.parametrize(
    ("solver", "n", "order", "adjoint"),
    [
        pytest.param(dfx.Euler(), 32, 1, INTERPOLATING, id="Euler"),
        pytest.param(dfx.Heun(), 32, 2, INTERPOLATING, id="Heun"),
        pytest.param(dfx.ImplicitEuler(), 32, 1, INTERPOLATING, id="ImplicitEuler", marks=pytest.mark.slow),
        pytest.param(dfx.Tsit5(), 4, 4, INTERPOLATING, id="Tsit5", marks=pytest.mark.slow),
        pytest.param(dfx.Tsit5(), 4, 4, GAUSS, id="Tsit5, gauss"),
        pytest.param(dfx.Dopri8(), 4, 4, INTERPOLATING, id="Dopri8", marks=pytest.mark.slow),
        pytest.param(dfx.Kvaerno3(), 8, 3, INTERPOLATING, id="Kvaerno3", marks=pytest.mark.slow),
        pytest.param(dfx.Kvaerno5(), 4, 4, INTERPOLATING, id="Kvaerno5", marks=pytest.mark.slow),
        pytest.param(dfx.Kvaerno5(), 4, 4, GAUSS, id="Kvaerno5, gauss", marks=pytest.mark.slow),
    ],
)
def test_gradients_of_a_linear_equation_converge_to_the_known_ones(solver, n, order, adjoint):
    def loss(a, y0, n):
        return V @ sf.solve(LINEAR, y0, [0.0, 1.0], args=a, dt0=1 / n, solver=solver, adjoint=adjoint).final

    matrix, y0 = jnp.array([[-1.0, 2.0], [-2.0, -1.0]]), jnp.array([1.0, 0.5])
    errors = [_gap(jax.grad(loss, (0, 1))(matrix, y0, m), (OF_A, OF_Y0)) for m in (n, 2 * n)]
    # The known values have eight digits.
    assert errors[1] < 5e-8 or np.log2(errors[0] / errors[1]) > order - 0.3


AT = (0.04, 3e4, 1e3), (1.0, 0.0, 0.0)


def _robertson(rates, y0, ts, adjoint):
    """Robertson's reactions, with milder rates: the fast and the slow are 1e4 apart."""

    def drift(t, y, k):
        a, b, c = k[0] * y[0], k[1] * y[1] ** 2, k[2] * y[1] * y[2]
        return jnp.stack([-a + c, a - b - c, b])

    return sf.solve(sf.ODE(drift), y0, ts, args=rates, solver=dfx.Kvaerno5(), adjoint=adjoint).ys


def test_stiff_reactions_have_the_gradients_of_the_steps():
    """On steps that are short after the start, and before the end, where the loss reads the fast reaction too."""
    ts = np.concatenate([[0.0], np.geomspace(1e-4, 9.0, 25), 10 - np.geomspace(1e-4, 0.9, 20)[::-1], [10.0]])

    def loss(rates, y0, adjoint):
        final = _robertson(rates, y0, ts, adjoint)[-1]
        return 1e3 * final[1] + final[2] ** 2 + 2 * final[0]

    found, wanted = _both(loss, *map(jnp.array, AT))
    _close(found[0], wanted[0], 1e-3)
    np.testing.assert_allclose(found[1], wanted[1], atol=1e-3 * np.abs(wanted[1]).max())


@pytest.mark.slow
def test_stages_bear_what_decays_within_a_step_and_gauss_does_not():
    ts = np.concatenate([[0.0], np.geomspace(1e-4, 10.0, 25)])
    gradient = lambda adjoint: jax.jit(
        jax.grad(lambda rates: (_robertson(rates, jnp.array(AT[1]), ts, adjoint)[10:, 2] ** 2).sum())
    )(jnp.array(AT[0]))
    wanted = gradient(DISCRETE)
    assert np.abs(gradient(INTERPOLATING) / wanted - 1).max() < 0.1
    assert np.abs(gradient(GAUSS) / wanted - 1).min() > 1


def test_what_forgets_its_start_keeps_its_gradient():
    """y' = -lambda y^3 in float32, lambda = 1e4, which the adjoint that reconstructs y gets wrong."""
    ts = np.concatenate([[0.0], np.geomspace(1e-5, 1.0, 60)]).astype(np.float32)
    cubic = sf.ODE(lambda t, y, a: -a * y**3)
    loss = lambda p: sf.solve(cubic, p[0], ts, args=p[1], solver=dfx.Tsit5(), adjoint=INTERPOLATING).final
    found = jax.grad(loss)((jnp.array(1.0, jnp.float32), jnp.array(1e4, jnp.float32)))
    exact = (1 + 2e4) ** -1.5
    np.testing.assert_allclose(found, [exact, -exact], rtol=2e-3)


def _params():
    keys = jax.random.split(jax.random.key(0), 2)
    weights = jax.random.normal(keys[0], (3, 2)), jax.random.normal(keys[1], (2, 3))
    return weights, jnp.array(0.7), jnp.array([0.4, -0.2])


def _solve_network(weights, args, y0, adjoint, **options):
    drift = sf.ODE(lambda t, y, args: weights[1] @ jnp.tanh(weights[0] @ y + args * t) - y)
    options = {"dt0": 0.05, "solver": dfx.Tsit5()} | options
    return sf.solve(drift, y0, options.pop("ts", [0.0, 1.0]), args=args, adjoint=adjoint, **options)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"ts": [0.0, 0.25, 0.5, 0.75, 1.0]}, id="equal intervals", marks=pytest.mark.slow),
        pytest.param({"ts": [1.0, 0.6, 0.0], "dt0": -0.05}, id="reverse time", marks=pytest.mark.slow),
        pytest.param({"ts": [0.0, 0.3, 1.0], "dt0": None, "grid": True}, id="padding"),
        pytest.param(
            {"ts": [0.0, 0.4, 1.0], "save_fn": lambda t, y, args: {"a": jnp.sin(y) * args, "b": t * y[0]}},
            id="save_fn",
            marks=pytest.mark.slow,
        ),
        pytest.param({"ts": [0.0, 0.4, 1.0], "solver": dfx.Kvaerno5()}, id="implicit", marks=pytest.mark.slow),
        pytest.param(
            {"ts": [0.0, 0.4, 1.0], "dt0": None, "stepsize_controller": dfx.PIDController(rtol=1e-7, atol=1e-9)},
            id="adaptive",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_gradients_are_those_of_the_steps_where_these_are_fine(options):
    if options.get("grid"):
        options = options | {"grid": sf.grids.through(options["ts"], dt0=0.05, num_steps=32)}

    def loss(weights, args, y0, adjoint):
        ys = _solve_network(weights, args, y0, adjoint, **options).ys
        weigh = lambda y: jnp.arange(1, len(y) + 1)[(..., *[None] * (y.ndim - 1))]
        return sum((jnp.cos(3 * y) * weigh(y)).sum() for y in jax.tree.leaves(ys))

    _close(*_both(loss, *_params()), 1e-5, 1e-6)


@pytest.mark.slow
def test_gradients_with_respect_to_times_follow_the_closed_rule():
    def loss(ts, adjoint):
        ys = _solve_network(*_params(), adjoint, ts=ts, dt0=None, steps_per_interval=10).ys
        return (jnp.sin(ys) * jnp.arange(1.0, 4.0)[:, None]).sum()

    _close(*_both(loss, jnp.array([0.1, 0.5, 1.0])), 1e-6)


@pytest.mark.slow
def test_a_batch_has_the_gradients_of_its_members():
    weights, args, _ = _params()
    starts = jnp.array([[0.4, -0.2], [1.0, 0.3], [-0.5, 0.8]])
    one = lambda p, y0: (_solve_network(*p, y0, INTERPOLATING, ts=[0.0, 1.0], dt0=0.2, solver=dfx.Heun()).ys ** 2).sum()
    each = jax.vmap(jax.grad(one, (0, 1)), in_axes=(None, 0))((weights, args), starts)
    inside = lambda params, starts: jax.vmap(one, in_axes=(None, 0))(params, starts).sum()
    of_params, of_starts = jax.grad(inside, (0, 1))((weights, args), starts)
    _close(of_params, jax.tree.map(lambda x: x.sum(0), each[0]), 1e-10)
    _close(of_starts, each[1], 1e-10)


@pytest.mark.slow
def test_it_goes_into_diffeqsolve():
    def loss(weights, args, y0, adjoint):
        term = dfx.ODETerm(lambda t, y, args: weights[1] @ jnp.tanh(weights[0] @ y + args * t) - y)
        saveat = dfx.SaveAt(t0=True, t1=True, ts=[0.23, 0.71])
        grid = dfx.StepTo(ts=jnp.linspace(0.0, 1.0, 41))
        sol = dfx.diffeqsolve(
            term, dfx.Heun(), 0.0, 1.0, None, y0, args, saveat=saveat, stepsize_controller=grid, adjoint=adjoint
        )
        return (jnp.cos(3 * sol.ys) * jnp.arange(1.0, 5.0)[:, None]).sum()

    _close(*_both(loss, *_params()), 1e-2, 2e-3)


# ---- Additive noise. ----


def _ou(x0, args, adjoint, solver, n, fine=256):
    theta, mean, sigma = args
    sde = sf.SDE(lambda t, y, a: theta * (mean - y), lambda t, y, a: sigma * jnp.ones_like(y), additive=True)
    area = dfx.SpaceTimeLevyArea if isinstance(solver, dfx.AbstractSRK) else dfx.BrownianIncrement
    with jax.ensure_compile_time_eval():
        path = sf.paths.GridBrownian(sf.grids.uniform(0.0, 1.0, fine), (), key=jax.random.key(3), levy_area=area)
        path = path.coarsen(fine // n)
    return sf.solve(sde, x0, [0.0, 1.0], path=path, solver=solver, adjoint=adjoint).final, path


@pytest.mark.parametrize("solver", [dfx.Euler(), dfx.Heun(), dfx.ShARK()], ids=lambda s: type(s).__name__)
def test_an_ornstein_uhlenbeck_path_has_its_exact_gradients(solver):
    """X = m + (x0 - m) e^-T + s int e^-(T - t) dW, path by path."""
    args, n = tuple(map(jnp.array, (THETA, MEAN, SIGMA))), 256
    f = lambda x0, args: _ou(x0, args, INTERPOLATING, solver, n)[0]
    of_x0, (of_theta, of_mean, of_sigma) = jax.grad(f, (0, 1))(jnp.array(X0), args)
    x, path = _ou(jnp.array(X0), args, DISCRETE, solver, n)
    e, tolerance = np.exp(-THETA), 1e-2 if isinstance(solver, dfx.Euler) else 1e-4
    np.testing.assert_allclose([of_x0, of_mean], [e, 1 - e], rtol=tolerance)
    # The integrals over the noise of smooth weights, from what is known of the path within its finest steps.
    w, h = path.table.W, getattr(path.table, "H", 0.0)

    def integral(k):
        k0, k1 = k(1 - path.grid.left), k(1 - path.grid.right)
        return ((k0 + k1) / 2 * w - (k1 - k0) * h).sum()

    # Order one: within a step the path itself is taken to be linear.
    tolerance = max(tolerance, 5e-4)
    decay, later = integral(lambda s: jnp.exp(-THETA * s)), integral(lambda s: s * jnp.exp(-THETA * s))
    np.testing.assert_allclose(of_sigma, decay, atol=tolerance)
    np.testing.assert_allclose(of_theta, -(X0 - MEAN) * e - SIGMA * later, atol=tolerance)
    np.testing.assert_allclose(x, MEAN + (X0 - MEAN) * e + SIGMA * decay, atol=tolerance)


def test_additive_noise_with_a_bent_drift_has_the_gradients_of_fine_steps():
    def loss(y0, a, n, adjoint):
        sde = sf.SDE(
            lambda t, y, _: a[0] * jnp.sin(y), lambda t, y, _: a[1] * (1 + t) * jnp.ones_like(y), additive=True
        )
        with jax.ensure_compile_time_eval():
            path = sf.paths.GridBrownian(
                sf.grids.uniform(0.0, 1.0, 256), (2,), key=jax.random.key(3), levy_area=dfx.SpaceTimeLevyArea
            ).coarsen(256 // n)
        return (sf.solve(sde, y0, [0.0, 1.0], path=path, solver=dfx.ShARK(), adjoint=adjoint).final ** 2).sum()

    at = jnp.array([0.5, -0.3]), jnp.array([-1.6, 0.4])
    grad = lambda n, adjoint: jax.jit(jax.grad(lambda y0, a: loss(y0, a, n, adjoint), (0, 1)))(*at)
    exact = grad(256, DISCRETE)
    gaps = [_gap(grad(n, INTERPOLATING), exact) for n in (16, 256)]
    assert gaps[1] < 2e-3
    assert gaps[1] < gaps[0] / 4


# ---- What it refuses. ----

GBM = sf.SDE(lambda t, y, a: y, lambda t, y, a: y, interpretation="stratonovich")


@pytest.mark.parametrize(
    ("equation", "solver", "words"),
    [
        (GBM, dfx.Heun(), "noise that depends on the state makes it rough"),
        (LINEAR, dfx.ReversibleHeun(), "cannot follow ReversibleHeun"),
        (LINEAR, dfx.LeapfrogMidpoint(), "cannot follow LeapfrogMidpoint"),
        (LINEAR, dfx.HalfSolver(dfx.Heun()), "cannot follow HalfSolver"),
        (LINEAR, dfx.KenCarp3(), "cannot follow KenCarp3"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_sentence(equation, solver, words):
    options = {"key": jax.random.key(0)} if equation.is_stochastic else {}
    with pytest.raises(ValueError, match=words):
        sf.solve(
            equation, jnp.ones(2), [0.0, 1.0], args=jnp.eye(2), dt0=0.1, solver=solver, adjoint=INTERPOLATING, **options
        )


def test_a_control_made_of_data_is_refused_in_one_sentence():
    ts = jnp.linspace(0.0, 1.0, 5)
    term = dfx.ControlTerm(lambda t, y, args: y[:, None], dfx.LinearInterpolation(ts, ts[:, None]))
    with pytest.raises(ValueError, match="a control other than time and noise"):
        sf.solve(term, jnp.ones(2), ts, solver=dfx.Heun(), adjoint=INTERPOLATING)


@pytest.mark.parametrize(("options", "words"), [({"record": 0}, "must be a positive"), ({"quadrature": "x"}, "stages")])
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        sf.adjoints.InterpolatingAdjoint(**options)


def test_a_reverse_step_that_fails_is_nan_and_no_gradient(monkeypatch):
    monkeypatch.setattr("sdeflow.adjoints._interpolating.is_okay", lambda result: jnp.asarray(False))
    loss = lambda rate: sf.solve(
        sf.ODE(lambda t, y, a: -a * y), jnp.array(1.0), [0.0, 1.0], args=rate, dt0=0.5, solver=dfx.Heun(),
        adjoint=INTERPOLATING,
    ).final  # fmt: skip
    assert np.isnan(jax.grad(loss)(jnp.array(1.0)))
