"""A one-step method made reversible keeps its order, under every adjoint and every path that diffrax has."""

import functools

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.orders import slope, strong_order
from helpers.problems import PROBLEMS

import sdeflow as sf

pytestmark = pytest.mark.usefixtures("x64_module")

COUPLED = sf.solvers.McCallumFoster
ENDS = (0.0, 1.0)


# ---- The method. ----


def test_a_step_is_the_one_of_the_formula_and_its_inverse_undoes_it():
    c, h, y, z = 0.98, 0.1, 0.7, 0.6
    term = dfx.ODETerm(lambda t, y, args: jnp.sin(t + 2 * y))
    f = lambda t, y: np.sin(t + 2 * y)
    midpoint = lambda t, y, h: h * f(t + h / 2, y + h / 2 * f(t, y))
    solver = COUPLED(dfx.Midpoint(), coupling=c)
    y1, error, dense, z1, result = solver.step(term, 0.3, 0.3 + h, jnp.array(y), None, jnp.array(z), False)
    y1_hand = c * y + (1 - c) * z + midpoint(0.3, z, h)
    z1_hand = z - midpoint(0.3 + h, y1_hand, -h)
    np.testing.assert_allclose((y1, z1), (y1_hand, z1_hand), rtol=1e-14)
    assert error is not None
    assert result is dfx.RESULTS.successful
    assert (float(dense["y0"]), float(dense["y1"])) == (y, float(y1))
    z0 = z1 + midpoint(0.3 + h, float(y1), -h)
    np.testing.assert_allclose((z0, (float(y1) - (1 - c) * z0 - midpoint(0.3, z0, h)) / c), (z, y), rtol=1e-13)


def _field(t, y, args):
    return jnp.stack([y[1] * jnp.cos(3 * t), jnp.sin(2 * y[0]) - y[1]])


@functools.cache
def _finals(solver):
    """The solution at time 1, as a function of the step."""
    run = lambda dt0: dfx.diffeqsolve(
        dfx.ODETerm(_field), solver, 0.0, 1.0, dt0, jnp.array([1.0, 0.4]), max_steps=512
    ).ys[0]  # fmt: skip
    return jax.jit(run)


@pytest.mark.parametrize(
    ("solver", "order"),
    [(dfx.Heun(), 2), (dfx.Tsit5(), 5), *(pytest.param(*c, marks=pytest.mark.slow) for c in
     ((dfx.Euler(), 1), (dfx.Midpoint(), 2), (dfx.Ralston(), 2), (dfx.Bosh3(), 3), (dfx.Dopri5(), 5)))],
    ids=lambda x: type(x).__name__ if isinstance(x, dfx.AbstractSolver) else None,
)  # fmt: skip
def test_the_order_for_ordinary_equations_is_that_of_the_solver(solver, order):
    exact = np.asarray(_finals(dfx.Dopri5())(1 / 500))
    counts = np.array([16, 24, 32, 48, 64]) if order > 3 else np.array([32, 48, 64, 128, 256])
    errors = [np.linalg.norm(np.asarray(_finals(COUPLED(solver))(1.0 / n)) - exact) for n in counts]
    found = slope(1 / counts, errors)
    print(f"{type(solver).__name__}: {found:.2f}")
    assert abs(found - order) < 0.35


def _bent():
    drift = lambda t, y, args: jnp.sin(2 * y) - y + 0.5 * t
    return sf.SDE(drift, lambda t, y, args: jnp.full_like(y, 0.4) * (1 + t), additive=True)


_STRONG = {
    "Heun": (PROBLEMS["gbm_stratonovich"].equation, dfx.Heun(), 1.0, {"exact": PROBLEMS["gbm"].exact}),
    "EulerHeun": (PROBLEMS["gbm_stratonovich"].equation, dfx.EulerHeun(), 1.0, {"exact": PROBLEMS["gbm"].exact}),
    "DiagonalMilstein": (
        PROBLEMS["gbm"].equation,
        sf.solvers.DiagonalMilstein(),
        1.0,
        {"exact": PROBLEMS["gbm"].exact},
    ),
    "Euler": (_bent, dfx.Euler(), 1.0, {"reference": dfx.ShARK(), "levy_area": dfx.SpaceTimeLevyArea}),
    "ShARK": (_bent, dfx.ShARK(), 1.5, {"reference": dfx.ShARK(), "levy_area": dfx.SpaceTimeLevyArea}),
    "SPaRK": (_bent, dfx.SPaRK(), 1.5, {"reference": dfx.ShARK(), "levy_area": dfx.SpaceTimeLevyArea}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", _STRONG)
def test_the_strong_order_is_that_of_the_solver(name, record_property):
    equation, solver, order, options = _STRONG[name]
    keys = jax.random.split(jax.random.key(7), 600)
    found = strong_order(
        equation(), COUPLED(solver), jnp.array(1.0), fine=1024, factors=(4, 8, 16, 32, 64), keys=keys, **options
    )
    record_property("order", found)
    print(f"{name}: {found:.3f}")
    assert -0.2 < found - order < 0.3, found


# ---- As a solver of diffrax. ----


def _sde(parameter, additive=False):
    g = (
        (lambda t, y, a: 0.3 * jnp.cos(t) * jnp.ones_like(y))
        if additive
        else (lambda t, y, a: 0.3 * jnp.cos(parameter * y))
    )
    drift = lambda t, y, a: jnp.sin(parameter * y[::-1]) - a * y + t
    return sf.SDE(drift, g, interpretation="stratonovich", additive=additive)


def _call(adjoint, solver, path, controller=None, dt0=0.1):
    controller = dfx.ConstantStepSize() if controller is None else controller

    def loss(parameter, y0):
        equation = (
            sf.ODE(_sde(parameter).drift) if path is None else _sde(parameter, isinstance(solver.solver, dfx.ShARK))
        )
        sol = dfx.diffeqsolve(
            equation.terms(path) if path is not None else equation.terms(), solver, 0.0, 1.0, dt0, y0, 0.7,
            adjoint=adjoint, stepsize_controller=controller, max_steps=128, saveat=dfx.SaveAt(ts=np.array([0.33, 1.0])),
        )  # fmt: skip
        return (sol.ys**2).sum(), (sol.ys, sol.stats["num_accepted_steps"], sol.stats["num_rejected_steps"])

    mode = jax.jacfwd if isinstance(adjoint, dfx.ForwardMode) else jax.grad
    return jax.jit(mode(loss, argnums=(0, 1), has_aux=True))(jnp.array(1.2), jnp.array([0.3, -0.6]))


def _tree(area=dfx.BrownianIncrement):
    return dfx.VirtualBrownianTree(0.0, 1.0, 1e-4, (2,), jax.random.key(4), levy_area=area)


def _grid(area=dfx.BrownianIncrement):
    return sf.paths.GridBrownian(sf.grids.uniform(0.0, 1.0, 10), (2,), key=jax.random.key(4), levy_area=area)


_NOISE = {
    "ode": ("Heun", lambda: None),
    "tree": ("Heun", _tree),
    "grid": ("Heun", _grid),
    "tree, areas": ("ShARK", lambda: _tree(dfx.SpaceTimeLevyArea)),
    "grid, areas": ("ShARK", lambda: _grid(dfx.SpaceTimeLevyArea)),
}
_ADJOINTS = {
    "direct": dfx.DirectAdjoint(),
    "forward": dfx.ForwardMode(),
    "discrete": sf.adjoints.DiscreteAdjoint(),
    "reversible": sf.adjoints.ReversibleAdjoint(),
}


@functools.cache
def _by_default(noise):
    solver, path = _NOISE[noise]
    return _call(dfx.RecursiveCheckpointAdjoint(), COUPLED(getattr(dfx, solver)()), path())


@pytest.mark.slow
# Through the tree `DirectAdjoint` compiles for a minute; the rows of a grid show it as well.
@pytest.mark.parametrize(
    ("adjoint", "noise"), [(a, n) for a in _ADJOINTS for n in _NOISE if not (a == "direct" and "tree" in n)]
)
def test_every_adjoint_gives_one_value_and_one_gradient(adjoint, noise):
    solver, path = _NOISE[noise]
    if adjoint == "forward" and noise == "ode":
        # A plain solve must differ from that of the solver within, and only by its error.
        grads, (ys, *_) = _call(_ADJOINTS[adjoint], COUPLED(dfx.Heun()), None)
        plain = dfx.diffeqsolve(
            sf.ODE(_sde(1.2).drift).terms(), dfx.Heun(), 0.0, 1.0, 0.1, jnp.array([0.3, -0.6]), 0.7
        ).ys[-1]  # fmt: skip
        assert 1e-7 < np.abs(ys[-1] - plain).max() < 1e-2
    grads, (ys, *_) = _call(_ADJOINTS[adjoint], COUPLED(getattr(dfx, solver)()), path())
    wanted, (ys_d, *_) = _by_default(noise)
    np.testing.assert_allclose(ys, ys_d, rtol=1e-12, atol=1e-14)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(a, b, rtol=1e-11)


@pytest.mark.parametrize("solver", ["Tsit5", pytest.param("Heun", marks=pytest.mark.slow)])
def test_a_controller_sees_the_error_estimate_of_the_solver(solver):
    errors, steps = [], []
    for tolerance in (1e-4, 1e-7):
        controller = dfx.PIDController(rtol=tolerance, atol=tolerance)
        sol = dfx.diffeqsolve(
            dfx.ODETerm(lambda t, y, args: jnp.cos(12 * t) * y), COUPLED(getattr(dfx, solver)()), 0.0, 1.0, 0.5,
            jnp.array(1.0), stepsize_controller=controller, max_steps=8192,
        )  # fmt: skip
        errors.append(abs(float(sol.ys[0]) / np.exp(np.sin(12.0) / 12) - 1))
        steps.append((int(sol.stats["num_accepted_steps"]), int(sol.stats["num_rejected_steps"])))
    print(solver, errors, steps)
    assert errors[0] < 1e-2
    assert errors[1] < 1e-5
    assert steps[0][1] > 0
    assert steps[1][0] > 1.5 * steps[0][0]


@pytest.mark.slow
def test_a_controller_with_noise_on_a_tree_is_stepped_alike_by_every_adjoint():
    controller = dfx.PIDController(rtol=3e-2, atol=3e-2)
    call = lambda adjoint: _call(adjoint, COUPLED(dfx.Heun()), _tree(), controller)
    (grads, aux), (grads_d, aux_d) = call(sf.adjoints.ReversibleAdjoint()), call(dfx.RecursiveCheckpointAdjoint())
    for a, b in zip(jax.tree.leaves((grads, aux)), jax.tree.leaves((grads_d, aux_d))):
        np.testing.assert_allclose(a, b, rtol=1e-10)


@pytest.mark.slow
def test_an_unsafe_path_answers_in_both_directions():
    path = dfx.UnsafeBrownianPath((2,), jax.random.key(4))
    (_, (ys, *_)), (_, (ys_w, *_)) = (
        _call(adjoint, COUPLED(dfx.Heun()), path) for adjoint in (dfx.ForwardMode(), sf.adjoints.DiscreteAdjoint())
    )
    np.testing.assert_allclose(ys, ys_w, rtol=1e-12)


# ---- The coupling, and what is refused. ----


def test_the_coupling_is_chosen_by_the_number_of_steps_unless_it_is_given():
    final = lambda solver, n: float(
        sf.solve(sf.ODE(lambda t, y, args: -y), jnp.array(1.0), ENDS, steps_per_interval=n, solver=solver).final
    )
    heun = dfx.Heun()
    for n, c in ((10, 0.99), (250, 1 - 1 / 250)):
        assert final(COUPLED(heun), n) == pytest.approx(final(COUPLED(heun, coupling=c), n), rel=1e-15)
        assert final(COUPLED(heun), n) != final(COUPLED(heun, coupling=0.95), n)


def _refused():
    return {
        "KenCarp4": lambda: dfx.KenCarp4(),
        "ImplicitEuler": lambda: dfx.ImplicitEuler(),
        "HalfSolver": lambda: dfx.HalfSolver(dfx.Heun()),
        "McCallumFoster": lambda: COUPLED(dfx.Heun()),
        "ReversibleHeun": lambda: dfx.ReversibleHeun(),
        "LeapfrogMidpoint": lambda: dfx.LeapfrogMidpoint(),
    }


@pytest.mark.parametrize("name", _refused())
def test_methods_that_are_not_explicit_one_step_methods_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is not an explicit one-step method") as raised:
        COUPLED(_refused()[name]())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("coupling", [0.0, 1.0, 1.5, -0.1, 1])
def test_a_coupling_outside_of_its_range_is_refused(coupling):
    with pytest.raises(ValueError, match="coupling must lie between 0 and 1"):
        COUPLED(dfx.Heun(), coupling=coupling)


def test_something_that_is_no_solver_is_refused():
    with pytest.raises(ValueError, match="must be an instance of a diffrax solver"):
        COUPLED(dfx.Heun)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("interpretation", ["ito", "stratonovich"])
def test_euler_is_refused_for_noise_that_depends_on_the_state(interpretation):
    # Backwards in time it tends to another process: the two copies would drift apart.
    sde = sf.SDE(lambda t, y, args: -y, lambda t, y, args: 0.5 * y, interpretation=interpretation)
    with pytest.raises(ValueError, match="converge to no solution") as raised:
        sf.solve(sde, jnp.ones(2), ENDS, dt0=0.5, solver=COUPLED(dfx.Euler()), key=jax.random.key(0))
    assert "McCallumFoster(diffrax.Heun())" in str(raised.value)


@pytest.mark.parametrize(("solver", "meant"), [(dfx.Heun(), "ito"), (sf.solvers.DiagonalMilstein(), "stratonovich")])
def test_a_solver_of_the_other_calculus_is_refused(solver, meant):
    sde = sf.SDE(lambda t, y, args: -y, lambda t, y, args: 0.5 * y, interpretation=meant)
    with pytest.raises(ValueError, match="solution, but the equation is"):
        sf.solve(sde, jnp.ones(2), ENDS, dt0=0.5, solver=COUPLED(solver), key=jax.random.key(0))
