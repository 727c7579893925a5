"""What a walk costs: closed forms, finite differences, unbiasedness, and solutions that do not notice."""

import functools

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sdeflow as sf
from sdeflow import regularisers as reg

pytestmark = pytest.mark.usefixtures("x64_module")

LOCALS = [kind(time=time) for kind in (reg.LocalError, reg.LocalStiffness) for time in ("biased", "unbiased")]
KEY = jax.random.key(3)
UNEVEN = np.array([0.0, 0.1, 0.35, 0.4, 0.75, 1.0])


def _penalty(regulariser, equation, y0, ts, **kwargs):
    key = {"key": KEY} if regulariser.draws else {}
    sol = sf.solve(equation, y0, ts, regularisers=(regulariser,), **{**key, **kwargs})
    return sol.penalties[type(regulariser).__name__]


def _penalties(regularisers, *args, **kwargs):
    """All of them from one solve, which compiles once for what would be a solve each."""
    sol = sf.solve(*args, regularisers=tuple(regularisers), **kwargs)
    return jnp.stack([sol.penalties[type(r).__name__] for r in regularisers])


def _gradients(fn, at, count):
    """The gradient of each of ``count`` numbers, one after the other by one program."""
    one = jax.jit(jax.grad(lambda at, weights: (weights * fn(at)).sum()))
    return np.stack([one(at, weights) for weights in jnp.eye(count)])


LINEAR = sf.ODE(lambda t, y, rate: rate * y)

# y' = lambda y, z = lambda h: the embedded errors are polynomials in z (coefficient, power).
EMBEDDED = {
    dfx.Tsit5: ((-4.26476368e-4, 5), (1.55953320e-4, 6), (-2.17001716e-5, 7)),
    dfx.Dopri5: ((-5.38888889e-4, 5), (2.16666667e-4, 6), (-2.77777778e-5, 7)),
    dfx.Bosh3: ((-1 / 48, 3), (-1 / 48, 4)),
    dfx.Heun: ((-1 / 2, 2),),
}


@pytest.mark.parametrize("solver", EMBEDDED, ids=lambda s: s.__name__)
def test_the_error_of_a_linear_equation_is_its_polynomial(solver):
    def closed(rate):
        z = rate * 0.4
        return jnp.abs(2.0 * sum(c * z**k for c, k in EMBEDDED[solver])) * 0.4

    for regulariser in (reg.GlobalError(), reg.LocalError()):
        run = lambda rate, r=regulariser: _penalty(r, LINEAR, jnp.array([2.0]), [0.0, 0.4], args=rate, solver=solver())
        ours, exact = jax.value_and_grad(run)(-1.3), jax.value_and_grad(closed)(-1.3)
        np.testing.assert_allclose(ours, exact, rtol=1e-6)


def test_the_error_of_tsit5_has_the_known_digits():
    run = lambda rate: _penalty(
        reg.GlobalError(), LINEAR, jnp.array([2.0]), [0.0, 0.4], args=rate, solver=dfx.Tsit5()
    )  # fmt: skip
    value, slope = jax.value_and_grad(run)(-1.3)
    np.testing.assert_allclose(value, 1.5616951205e-5, rtol=1e-8)
    np.testing.assert_allclose(slope, -6.22371839e-5, rtol=1e-8)


@pytest.mark.parametrize("solver", [dfx.Tsit5(), dfx.Dopri5(), dfx.Bosh3(), dfx.Heun(), dfx.Kvaerno3()], ids=repr)
def test_the_stiffness_of_a_linear_equation_is_its_rate(solver):
    for regulariser in (reg.GlobalStiffness(aggregate="mean"), reg.LocalStiffness()):
        value = _penalty(regulariser, LINEAR, jnp.array([2.0]), [0.0, 0.4, 0.9], args=-1.3, solver=solver)
        np.testing.assert_allclose(value, 1.3, rtol=1e-6)


def _noisy(solver):
    additive = isinstance(solver, dfx.ShARK | dfx.SRA1)
    drift = lambda t, y, a: -a[0] * y + jnp.sin(a[1] * t + y[::-1])
    diffusion = (
        (lambda t, y, a: 0.3 * a[1] * jnp.ones_like(y)) if additive else (lambda t, y, a: 0.3 * jnp.cos(a[1] * y))
    )
    return sf.SDE(drift, diffusion, interpretation="stratonovich", additive=additive)


SOLVERS = {
    "Tsit5": (dfx.Tsit5(), None),
    "Heun-ode": (dfx.Heun(), None),
    "ShARK": (dfx.ShARK(), _noisy),
    "SPaRK": (dfx.SPaRK(), _noisy),
    "SRA1": (dfx.SRA1(), _noisy),
    "Heun": (dfx.Heun(), _noisy),
}
FROZEN = [
    reg.GlobalError(rtol=1e-2, atol=1e-2),
    reg.GlobalStiffness(),
    reg.LocalError(detach_state=False, rtol=1e-2, atol=1e-2),
    reg.LocalStiffness(detach_state=False, time="biased", weighting="sum"),
]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("Tsit5", "SPaRK") else pytest.mark.slow) for n in SOLVERS]
)
def test_gradients_are_finite_differences_along_a_frozen_grid(name):
    solver, build = SOLVERS[name]
    equation = sf.ODE(lambda t, y, a: -a[0] * y + jnp.sin(a[1] * t + y[::-1])) if build is None else build(solver)
    y0 = jnp.array([0.4, -0.9])
    run = jax.jit(lambda a: _penalties(FROZEN, equation, y0, UNEVEN, args=a, solver=solver, key=KEY))
    a, d, h = jnp.array([1.3, 0.8]), jnp.array([0.6, -0.8]), 1e-4
    slopes = _gradients(run, a, len(FROZEN)) @ np.asarray(d)
    wide, narrow = ((run(a + s * d) - run(a - s * d)) / (2 * s) for s in (2 * h, h))
    np.testing.assert_allclose(slopes, (4 * narrow - wide) / 3, rtol=1e-6)
    assert (np.abs(slopes) > 1e-9).all()


@functools.cache
def _charges(kind):
    """Every step's charge, one after the other, along the uneven grid."""
    equation = sf.ODE(lambda t, y, a: jnp.sin(3 * t + y[::-1]) - y)
    y = sf.solve(equation, jnp.array([0.4, -0.9]), UNEVEN, solver=dfx.Bosh3()).ys
    return np.array(
        [_penalty(kind(), equation, y[i], UNEVEN[i : i + 2], solver=dfx.Bosh3()) for i in range(len(UNEVEN) - 1)]
    )


@pytest.mark.parametrize(
    ("local", "total"), [(reg.LocalError, reg.GlobalError), (reg.LocalStiffness, reg.GlobalStiffness)]
)
@pytest.mark.parametrize("time", ["biased", "unbiased"])
def test_what_is_drawn_is_an_unbiased_estimate_of_the_sum(local, total, time):
    equation = sf.ODE(lambda t, y, a: jnp.sin(3 * t + y[::-1]) - y)
    charges, h = _charges(total), np.diff(UNEVEN)
    regulariser = local(time=time, weighting="sum")
    one = lambda key: _penalty(regulariser, equation, jnp.array([0.4, -0.9]), UNEVEN, solver=dfx.Bosh3(), key=key)
    drawn = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 4000)))
    # By enumeration: each step's weight is one over its probability.
    chance = np.full(5, 0.2) if time == "biased" else h / h.sum()
    possible = charges / chance
    np.testing.assert_allclose(chance @ possible, charges.sum(), rtol=1e-12)
    which = np.argmin(np.abs(drawn[:, None] - possible), axis=1)
    np.testing.assert_allclose(drawn, possible[which], rtol=1e-7)
    counts = np.bincount(which, minlength=5)
    assert (np.abs(counts - 4000 * chance) < 5 * np.sqrt(4000 * chance * (1 - chance))).all()
    whole = _penalty(total(), equation, jnp.array([0.4, -0.9]), UNEVEN, solver=dfx.Bosh3())
    np.testing.assert_allclose(whole, charges.sum(), rtol=1e-9)


@pytest.mark.parametrize("solver", [dfx.Tsit5(), dfx.Heun()], ids=repr)
def test_gradients_are_finite_where_there_is_no_error_and_nothing_moves(solver):
    errors, stiffness = [reg.GlobalError(), reg.LocalError()], [reg.GlobalStiffness(), reg.LocalStiffness()]
    for field in (lambda t, y, a: a * jnp.ones_like(y), lambda t, y, a: 0.0 * a * y):
        run = lambda a, f=field: _penalties(
            errors + stiffness, sf.ODE(f), jnp.array([1.0, 2.0]), [0.0, 0.5, 1.0], args=a, solver=solver, key=KEY
        )
        values, slopes = jax.jit(run)(0.7), _gradients(run, 0.7, 4)
        assert np.isfinite(values).all()
        assert np.isfinite(slopes).all()
        assert (np.abs(values[:2]) < 1e-6).all()


# Integrals along the solution.


def test_integrals_have_their_closed_forms():
    y0, rate, ts = jnp.array([1.0, -2.0]), -0.7, np.linspace(0.0, 1.0, 21)
    energy = 5 * (1 - np.exp(2 * rate)) / (-2 * rate)
    run = lambda r: _penalty(r, LINEAR, y0, ts, args=rate, solver=dfx.Tsit5())
    np.testing.assert_allclose(run(reg.Kinetic()), rate**2 * energy, rtol=1e-9)
    np.testing.assert_allclose(run(reg.TaylorDerivative(1)), rate**2 * energy, rtol=1e-9)
    np.testing.assert_allclose(run(reg.TaylorDerivative(3)), rate**6 * energy, rtol=1e-9)
    np.testing.assert_allclose(run(reg.JacobianFrobenius()), 2 * rate**2, rtol=1e-12)


def test_the_taylor_derivative_sees_the_time_in_the_field():
    # y' = t^2 has y'' = 2 t, whose square integrates to 4/3.
    value = _penalty(reg.TaylorDerivative(2), sf.ODE(lambda t, y, a: t**2 + 0 * y), jnp.array(0.0), [0.0, 1.0], dt0=0.1)
    np.testing.assert_allclose(value, 4 / 3, rtol=1e-12)


def test_the_mean_over_signs_is_the_frobenius_norm():
    matrix = jnp.array([[0.3, -1.0], [0.5, 0.2]])
    equation = sf.ODE(lambda t, y, a: matrix @ y)
    one = lambda key: _penalty(reg.JacobianFrobenius(), equation, jnp.ones(2), [0.0, 1.0], dt0=0.5, key=key)
    values = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(KEY, 400)))
    assert abs(values.mean() - (matrix**2).sum()) < 5 * values.std() / 20
    assert values.std() > 0.05


ALL = (reg.GlobalError(), reg.GlobalStiffness(), reg.LocalError(), reg.LocalStiffness(), reg.Kinetic(), reg.JacobianFrobenius(), reg.TaylorDerivative(2))  # fmt: skip


def test_a_solution_does_not_notice_that_it_is_charged_for():
    solver = dfx.SPaRK()
    run = lambda r: sf.solve(_noisy(solver), jnp.array([0.4, -0.9]), UNEVEN, dt0=0.03, args=jnp.array([1.3, 0.8]),
                             solver=solver, key=KEY, regularisers=r, save_fn=lambda t, y, a: (y, t))  # fmt: skip
    plain, all_of_them = run(()), run(ALL)
    assert set(all_of_them.penalties) == {type(r).__name__ for r in ALL}
    assert all(np.isfinite(x) and x > 0 for x in all_of_them.penalties.values())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13),
        (plain.ys, plain.final),
        (all_of_them.ys, all_of_them.final),
    )
    assert plain.stats["nfe"] == all_of_them.stats["nfe"]


@pytest.mark.parametrize(
    "adjoint",
    [
        None,
        pytest.param(dfx.RecursiveCheckpointAdjoint(), marks=pytest.mark.slow),
        pytest.param(dfx.DirectAdjoint(), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_adaptive_steps_do_not_notice_either(adjoint):
    control = dfx.PIDController(1e-3, 1e-5)
    run = lambda r: sf.solve(sf.ODE(lambda t, y, a: jnp.sin(3 * t + y[::-1]) - y), jnp.array([0.4, -0.9]), [0.0, 1.0, 2.0],
                             solver=dfx.Tsit5(), stepsize_controller=control, regularisers=r, adjoint=adjoint,
                             key=KEY if r else None)  # fmt: skip
    plain, charged = run(()), run(ALL)
    assert int(plain.stats["num_steps"]) == int(charged.stats["num_steps"])
    np.testing.assert_allclose(charged.ys, plain.ys, rtol=1e-10)


@pytest.mark.slow
def test_adaptive_noise_is_charged_alike_by_our_rule_and_by_diffrax():
    charged = (*ALL[:2], reg.LocalError(time="biased"), ALL[3])
    controller = dfx.PIDController(1e-2, 1e-2, dtmin=2**-12)

    def of(adjoint):
        run = lambda a: _penalties(charged, _noisy(dfx.SPaRK()), jnp.array([0.4, -0.9]), [0.0, 0.5, 1.0], args=a, solver=dfx.SPaRK(),
                                   dt0=0.05, stepsize_controller=controller, adjoint=adjoint, key=KEY, max_steps=256)  # fmt: skip
        at = jnp.array([1.3, 0.8])
        return jax.jit(run)(at), _gradients(run, at, len(charged))

    ours, theirs = of(sf.adjoints.DiscreteAdjoint()), of(dfx.RecursiveCheckpointAdjoint())
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-8)
    for a, b in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7)


REVERSIBLE = {"coupled": sf.solvers.McCallumFoster(dfx.Heun()), "heun": dfx.ReversibleHeun()}
CHARGED = [reg.LocalError(weighting="sum"), reg.Kinetic(), reg.GlobalError(), reg.GlobalStiffness()]


@functools.cache
def _under(adjoint, name, padded):
    """The loss with each regulariser in turn, and its gradient, from one program."""
    grid = sf.grids.through(UNEVEN, 0.05)
    grid = grid.pad(grid.num_rows + 4) if padded else grid
    weights = jnp.array([1.0, 0.3])

    def loss(a, grid, which):
        sol = sf.solve(_noisy(dfx.SPaRK()), jnp.array([0.4, -0.9]), jnp.asarray(UNEVEN), args=a, grid=grid, key=KEY,
                       solver=REVERSIBLE[name], adjoint=adjoint, regularisers=tuple(CHARGED), throw=False)  # fmt: skip
        penalties = jnp.stack([sol.penalties[type(r).__name__] for r in CHARGED])
        return (which * penalties).sum() + (weights * sol.ys**2).sum()

    run = jax.jit(jax.value_and_grad(loss))
    return [run(jnp.array([1.3, 0.8]), grid, which) for which in jnp.eye(len(CHARGED))]


@pytest.mark.parametrize("name", ["heun", pytest.param("coupled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("padded", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_all_of_them_work_under_a_reversible_adjoint(name, padded):
    adjoints = (sf.adjoints.ReversibleAdjoint(), sf.adjoints.DiscreteAdjoint())
    for ours, stored in zip(*(_under(adjoint, name, padded) for adjoint in adjoints), strict=True):
        np.testing.assert_allclose(ours[0], stored[0], rtol=1e-10)
        np.testing.assert_allclose(ours[1], stored[1], rtol=1e-9)


@pytest.mark.slow
def test_global_ones_work_under_a_reversible_adjoint_with_adaptive_steps():
    field = sf.ODE(lambda t, y, a: -a[0] * y + jnp.sin(a[1] * t + y[::-1]))
    run = lambda a, adjoint: _penalty(reg.GlobalError(), field, jnp.array([0.4, -0.9]), [0.0, 0.5, 1.0], args=a,
                                      solver=sf.solvers.McCallumFoster(dfx.Bosh3()), adjoint=adjoint,
                                      stepsize_controller=dfx.PIDController(1e-3, 1e-5))  # fmt: skip
    ours, stored = (jax.jit(jax.value_and_grad(lambda a, adj=adj: run(a, adj)))(jnp.array([1.3, 0.8]))
                    for adj in (sf.adjoints.ReversibleAdjoint(), sf.adjoints.DiscreteAdjoint()))  # fmt: skip
    np.testing.assert_allclose(ours[0], stored[0], rtol=1e-8)
    np.testing.assert_allclose(ours[1], stored[1], rtol=1e-8)


def test_batches_are_charged_series_by_series_and_in_float32():
    def one(y0, key):
        return sf.solve(_noisy(dfx.SPaRK()), y0, UNEVEN, args=jnp.array([1.3, 0.8], y0.dtype), solver=dfx.SPaRK(), key=key,
                        regularisers=ALL[:4]).penalties  # fmt: skip

    starts, keys = jnp.array([[0.4, -0.9], [1.0, 0.1]]), jax.random.split(KEY, 2)
    batch = jax.jit(jax.vmap(one))(starts, keys)
    single = jax.jit(one)(starts[1], keys[1])
    for name, value in single.items():
        np.testing.assert_allclose(batch[name][1], value, rtol=1e-9)
    low = jax.jit(one)(starts[1].astype(jnp.float32), keys[1])
    assert all(x.dtype == jnp.float32 and np.isfinite(x) for x in low.values())


def test_a_regulariser_in_a_loss_is_weighted_by_a_schedule():
    loss = sf.losses.CrossEntropy() + optax.exponential_decay(100.0, 10, 0.1) * reg.LocalError()
    assert len(loss.terms) == 2
    term, weight = loss.terms[1]
    assert isinstance(term, reg.LocalError)
    np.testing.assert_allclose(weight(10), 10.0)
    halved = 0.5 * (reg.Kinetic() + sf.losses.CrossEntropy())
    assert [w for _, w in halved.terms] == [0.5, 0.5]


def test_a_random_end_time_stays_within_its_width():
    ends = jax.vmap(lambda k: sf.grids.steer_end_time(jnp.array([0.0, 0.2, 1.0]), 0.5, key=k)[-1])(
        jax.random.split(KEY, 1000)
    )
    assert 0.5 <= float(ends.min()) < 0.52
    assert 1.48 < float(ends.max()) <= 1.5
    with pytest.raises(ValueError, match="width must lie between 0 and the length of the last interval, 0.8"):
        sf.grids.steer_end_time([0.0, 0.2, 1.0], 0.9, key=KEY)


BAD = {
    "no key": (lambda: _bad(reg.LocalError()), ValueError, "LocalError draws at random: pass key="),
    "twice": (lambda: _bad(reg.Kinetic(), reg.Kinetic()), ValueError, "Kinetic was given twice"),
    "weighted": (lambda: _bad(0.5 * reg.Kinetic()), TypeError, "weight belongs to the loss"),
    "no regulariser": (lambda: _bad(3.0), TypeError, "instances of classes of sf.regularisers, got 3.0"),
    "no estimate": (lambda: _bad(reg.GlobalError(), solver=dfx.LeapfrogMidpoint()), ValueError, "LeapfrogMidpoint estimates no error"),
    "no steps seen": (lambda: _bad(reg.GlobalError(), adjoint=dfx.BacksolveAdjoint(), dt0=0.5), ValueError, "use adjoint=sf.adjoints.DiscreteAdjoint"),
    "own terms": (lambda: sf.solve(sf.equations.GeometricBrownianMotion(0.1, 0.4), jnp.ones(2), [0.0, 1.0], dt0=0.1, key=KEY,
                                   solver=sf.solvers.DiagonalMilstein(), regularisers=(reg.Kinetic(),)), ValueError, "takes terms of its own kind"),
    "order": (lambda: reg.TaylorDerivative(0), ValueError, "order must be a positive integer, got 0"),
    "time": (lambda: reg.LocalError(time="often"), ValueError, 'time must be "unbiased" or "biased"'),
    "weighting": (lambda: reg.LocalError(weighting="none"), ValueError, 'weighting must be "paper" or "sum"'),
    "aggregate": (lambda: reg.GlobalError(aggregate="max"), ValueError, 'aggregate must be "sum" or "mean"'),
}  # fmt: skip


def _bad(*regularisers, **kwargs):
    kwargs = {"solver": dfx.Heun(), **kwargs}
    return sf.solve(LINEAR, jnp.ones(2), [0.0, 1.0], args=-1.0, regularisers=regularisers, **kwargs)


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_charged_is_said_in_one_sentence(name):
    run, kind, match = BAD[name]
    with pytest.raises(kind, match=match):
        run()


INTEGRALS = (reg.Kinetic(), reg.TaylorDerivative(2), reg.JacobianFrobenius())
BOTH_WAYS = {
    "discrete": (sf.adjoints.DiscreteAdjoint(), dfx.Tsit5()),
    "higher-order": (sf.adjoints.DiscreteAdjoint(higher_order=True), dfx.Tsit5()),
    "reversible": (sf.adjoints.ReversibleAdjoint(), sf.solvers.McCallumFoster(dfx.Heun())),
    "interpolating": (sf.adjoints.InterpolatingAdjoint(), dfx.Tsit5()),
    "continuous": (sf.adjoints.ContinuousAdjoint(), dfx.Tsit5()),
    "recursive": (dfx.RecursiveCheckpointAdjoint(), dfx.Tsit5()),
}


_SLOW = pytest.mark.slow
_QUICK = {("reversible", "fixed"), ("interpolating", "fixed")}


@pytest.mark.parametrize(
    ("name", "steps", "integrals"),
    [
        pytest.param(name, steps, INTEGRALS[:1], marks=[] if (name, steps) in _QUICK else [_SLOW])
        for name in BOTH_WAYS
        for steps in ("fixed", "adaptive")
    ]
    + [pytest.param("discrete", "fixed", INTEGRALS[1:], marks=_SLOW), ("higher-order", "fixed", INTEGRALS[2:])],
)
def test_integrals_do_not_mind_the_direction_of_time(name, steps, integrals):
    adjoint, solver = BOTH_WAYS[name]
    if steps == "adaptive" and name == "reversible":
        solver = dfx.ReversibleHeun()
    if steps == "adaptive":
        how = {"stepsize_controller": dfx.PIDController(1e-3, 1e-5), "dt0": 0.02}
    else:
        how = {"steps_per_interval": 10}

    def field(t, y, a):
        return -a[0] * y[::-1] + jnp.sin(a[1] * t) + 0.1 * y**2

    # s = 1 - t turns the one into the other.
    backwards = sf.ODE(field)
    mirrored = sf.ODE(lambda s, y, a: -field(1 - s, y, a))
    key = KEY if any(r.draws for r in integrals) else None
    kl = lambda sign: reg.PathKL(lambda t, y, a: 0.1 * sign * y, lambda t, y, a: 0.5 + y**2)

    def cost(args, equation, ts, sign):
        one = how | ({"dt0": -0.02} if "dt0" in how and ts[0] > ts[1] else {})
        sol = sf.solve(
            equation, jnp.array([0.7, -0.4]), ts, args=args, key=key, solver=solver, adjoint=adjoint,
            regularisers=(*integrals, kl(sign)), **one,
        )  # fmt: skip
        values = jnp.stack(list(sol.penalties.values()))
        return values @ jnp.arange(1.0, 1 + values.shape[0]), values

    run = jax.jit(jax.value_and_grad(cost, has_aux=True), static_argnums=(1, 2, 3))
    args = jnp.array([0.8, 2.0])
    (_, there), grad = run(args, backwards, (1.0, 0.0), 1)
    (_, mirror), exact = run(args, mirrored, (0.0, 1.0), -1)
    assert (there > 0.05).all()
    np.testing.assert_allclose(there, mirror, rtol=1e-7)
    np.testing.assert_allclose(grad, exact, rtol=1e-6, atol=1e-8)


def test_an_integral_over_decreasing_times_has_its_derivatives_in_the_times():
    # int_b^a e^(-2t) dt, whose derivatives are e^(-2a) and -e^(-2b).
    def cost(ts):
        return _penalty(reg.Kinetic(), sf.ODE(lambda t, y, args: -y), jnp.exp(-ts[0]), ts, steps_per_interval=40)

    value, grad = jax.value_and_grad(cost)(jnp.array([1.0, 0.2]))
    a, b = np.exp(-2.0), np.exp(-0.4)
    np.testing.assert_allclose(value, (b - a) / 2, rtol=1e-6)
    np.testing.assert_allclose(grad, [a, -b], rtol=1e-5)
