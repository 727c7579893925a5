"""Exact steps of linear equations: the law at every step, the path as steps shrink, gradients, and what is refused."""

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import sdeflow as sf
from sdeflow.equations._driven import driven_step

KEY = jr.key(0)
RNG = np.random.default_rng(0)
A, B, L = RNG.normal(size=(3, 3)) - 1.5 * np.eye(3), RNG.normal(size=3), RNG.normal(size=(3, 2))
OU, EXACT = sf.equations.OrnsteinUhlenbeck, sf.solvers.Exact()
AREA = dfx.SpaceTimeTimeLevyArea
EQUATIONS = {
    "scalars": lambda: OU(jnp.array([1.0, 0.0, -0.5]), 0.3, 0.7),
    "matrices": lambda: sf.equations.LinearSDE(A, B, L),
    "one noise, three components": lambda: sf.equations.LinearSDE(
        [[0.0, 1, 0], [0, 0, 1], [-6, -11, -6]], [0.0, 0, 1], [[0.0], [0], [1]]
    ),
    "momentum": lambda: sf.equations.Momentum(2, 0.5),
    "brownian": lambda: sf.equations.BrownianMotion(3, 0.4),
    "scalars of time": lambda: OU(lambda t: 1 + t, jnp.sin, lambda t: jnp.exp(-t)),
    "matrices of time": lambda: sf.equations.LinearSDE(lambda t: A * jnp.cos(t), B, lambda t: L * jnp.exp(t / 4)),
}


def _law(equation, s, t):
    """Phi, c and Q of one step, from the parts that the step is made of."""
    h = jnp.asarray(t - s)
    step = driven_step(equation, jnp.asarray(s, h.dtype), h, None)
    if equation.is_diagonal:
        squares = step.of_increment**2 + step.of_area**2 / 12 + step.left_over**2
        return jnp.diag(1 + step.grown), step.shift, jnp.diag(h * squares)
    g, a = step.of_increment, step.of_area
    return jnp.eye(len(step.shift)) + step.grown, step.shift, h * (g @ g.T + a @ a.T / 12 + step.left_over)


@pytest.mark.parametrize("name", EQUATIONS)
def test_a_step_has_the_law_of_the_transition(x64, name):
    equation = EQUATIONS[name]()
    for t in (0.2001, 0.7, 3.0):
        for ours, theirs in zip(_law(equation, 0.2, t), equation.transition(0.2, t)):
            np.testing.assert_allclose(ours, theirs, rtol=1e-11, atol=1e-12 * np.abs(theirs).max() + 1e-15)


@pytest.mark.parametrize("rate", [1e3, 1e6, 1e-9, 0.0])
def test_rates_of_every_size(x64, rate):
    # Closed form; in float32 too, where most of what is left over at short steps would be lost in a difference.
    h, variance = 0.01, (-np.expm1(-2 * rate * 0.01) / (2 * rate) if rate else 0.01)
    for equation in (OU(rate, 1.0, 0.5), OU(rate * jnp.eye(2), 1.0, 0.5)):
        _, _, q = _law(equation, 0.0, h)
        np.testing.assert_allclose(jnp.diagonal(q), 0.25 * variance, rtol=1e-12)
        narrow = driven_step(equation, jnp.float32(0.0), jnp.float32(h), None)
        wide = driven_step(equation, jnp.asarray(0.0), jnp.asarray(h), None)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-30), narrow, wide)


def test_what_is_left_over_is_the_integral_of_a_square(x64):
    # exp(z (1 - u)) off its best line, by quadrature, for steps so short that Q - Q_W - Q_H would have no digit left.
    u, w = (x / 2 for x in np.polynomial.legendre.leggauss(40))
    u = u + 0.5
    for z in (-1e-4, 0.3, -1.999, -2.001, -30.0):
        f, line = np.exp(z * (1 - u)), 2 * u - 1
        rest = f - (w @ f) - 3 * (w @ (f * line)) * line
        want = z**2 / np.sqrt(720) if abs(z) < 1e-3 else np.sqrt(w @ rest**2)
        scalar = driven_step(OU(-z, 0.0, 1.0), jnp.asarray(0.0), jnp.asarray(1.0), None).left_over[0]
        matrix = driven_step(OU(-z * jnp.eye(1), 0.0, 1.0), jnp.asarray(0.0), jnp.asarray(1.0), None).left_over[0, 0]
        np.testing.assert_allclose([scalar, np.sqrt(matrix)], want, rtol=1e-4 if abs(z) < 1e-3 else 1e-9)


@pytest.mark.parametrize("name", ["matrices", "one noise, three components"])
def test_the_law_of_many_paths_is_that_of_one_transition(x64, name):
    equation, y0 = EQUATIONS[name](), jnp.array([1.0, -1.0, 0.5])
    keys, ts = jr.split(KEY, 20_000), np.array([0.0, 0.9])
    run = lambda dt0: np.asarray(jax.vmap(lambda k: sf.solve(equation, y0, ts, dt0=dt0, key=k).final)(keys))
    phi, c, q = (np.asarray(x) for x in equation.transition(0.0, 0.9))
    for dt0 in (None, 0.3):
        x = run(dt0)
        error = np.sqrt(np.diag(q) / len(x))
        assert (np.abs(x.mean(0) - phi @ y0 - c) < 5 * error).all()
        spread = np.sqrt((q**2 + np.outer(np.diag(q), np.diag(q))) / len(x))
        assert (np.abs(np.cov(x.T) - q) < 5 * spread).all()


def _errors(equation, y0, ts, size):
    """How far exact steps of several lengths are from fine steps of ShARK on the same Brownian motion."""
    fine = sf.grids.uniform(*ts, 4096)
    path = sf.paths.GridBrownian(fine, (size,), key=jr.key(5), levy_area=AREA)
    want = sf.solve(equation, y0, ts, path=path, solver=dfx.ShARK()).final
    out, scale = [], jnp.maximum(jnp.abs(want).max(), 1)  # backwards these equations grow
    for k in (512, 32):
        coarse = path.coarsen(k)
        if not equation.is_diagonal:
            known = coarse.table
            coarse = sf.paths.LinearBrownian(coarse.grid, (size,), dim=len(y0), key=KEY)
            coarse = eqx.tree_at(lambda p: (p.table.W, p.table.H), coarse, (known.W, known.H))
        out.append(float(jnp.abs(sf.solve(equation, y0, ts, path=coarse, solver=EXACT).final - want).max() / scale))
    return out


@pytest.mark.parametrize(
    "ts", [[0.0, 1.0], pytest.param([1.0, 0.0], marks=pytest.mark.slow)], ids=["forwards", "backwards"]
)
@pytest.mark.parametrize(
    "name", ["scalars", "matrices", "momentum", pytest.param("scalars of time", marks=pytest.mark.slow)]
)
def test_as_steps_shrink_the_path_is_that_of_the_same_brownian_motion(x64, name, ts):
    equation = EQUATIONS[name]()
    size = {"matrices": 2, "momentum": 2}.get(name, 3)
    errors = _errors(equation, jnp.ones(4 if name == "momentum" else 3), ts, size)
    if name == "momentum":
        np.testing.assert_allclose(errors, 0, atol=1e-12)
        return
    # Sixteen times shorter steps, a 256th of the distance, up to chance and the error of ShARK.
    assert errors[0] < 0.1
    assert errors[1] < max(errors[0] / 50, 1e-6)


def test_a_key_draws_the_brownian_motion_that_other_solvers_see(x64):
    grid = sf.grids.uniform(0.0, 1.0, 8)
    own = sf.paths.LinearBrownian(grid, (2,), dim=3, key=KEY)
    plain = sf.paths.GridBrownian(grid, (2,), key=KEY, levy_area=dfx.SpaceTimeLevyArea)
    np.testing.assert_array_equal(own.table.W, plain.table.W)
    np.testing.assert_array_equal(own.table.H, plain.table.H)
    counted = sf.paths.LinearBrownian(grid, (2,), dim=3, key=KEY, storage="counter")
    assert counted.row(2, 0.125).normals.shape == (3,)
    merged, whole = own.coarsen(4), plain.coarsen(4)
    np.testing.assert_allclose(merged.table.H, whole.table.H, rtol=1e-12)
    np.testing.assert_allclose(merged.table.normals[0], own.table.normals[:4].sum(0), rtol=1e-12)
    equation = EQUATIONS["matrices"]()
    by_key = sf.solve(equation, jnp.ones(3), [0.0, 1.0], grid=grid, key=KEY)
    by_path = sf.solve(equation, jnp.ones(3), [0.0, 1.0], path=own)
    np.testing.assert_allclose(by_key.final, by_path.final, rtol=1e-12)
    assert "Exact" in repr(by_path)


def test_steps_far_beyond_stability_and_none_at_all():
    stiff = OU(1000.0, 2.0, 1.0)
    run = lambda k: sf.solve(stiff, jnp.zeros(2), [0.0, 0.5, 1.0], dt0=0.01, key=k).final
    x = np.asarray(jax.jit(jax.vmap(run))(jr.split(KEY, 4000))).ravel()
    assert abs(x.mean() - 2) < 5 * np.sqrt(1 / 2000 / x.size)
    np.testing.assert_allclose(x.var(), 1 / 2000, rtol=5 * np.sqrt(2 / x.size))
    sol = sf.solve(stiff, jnp.zeros(2), [0.0, 0.5, 1.0], key=KEY)
    assert int(sol.stats["num_steps"]) == 2
    traced = jax.jit(lambda ts: sf.solve(stiff, jnp.zeros(2), ts, key=KEY).final)(jnp.array([0.0, 0.5, 1.0]))
    np.testing.assert_allclose(traced, sol.final, rtol=1e-6)
    with pytest.raises(ValueError, match=r"ShARK takes steps of 0.01, over which it grows .* decays at the rate 1000"):
        sf.solve(stiff, jnp.zeros(2), [0.0, 1.0], dt0=0.01, key=KEY, solver=dfx.ShARK())
    assert sf.is_okay(sf.solve(stiff, jnp.zeros(2), [0.0, 0.1], dt0=0.001, key=KEY, solver=dfx.ShARK()).result)


@pytest.mark.parametrize(
    "kind", ["scalars", *(pytest.param(x, marks=pytest.mark.slow) for x in ("matrices", "of time"))]
)
def test_gradients_are_those_of_finite_differences(x64, kind):
    make = {
        "scalars": lambda p: OU(p[:2], p[2], p[3]),
        "matrices": lambda p: sf.equations.LinearSDE(
            jnp.array([[0.0, 1.0], [-1.0, -1.0]]) * p[0], p[:2], jnp.array([[0.0], [1.0]]) * p[3]
        ),
        "of time": lambda p: OU(lambda t: p[:2] + t, p[2], lambda t: p[3] * jnp.cos(t)),
    }[kind]

    @jax.jit
    def fn(x):
        ts = jnp.array([0.0, 0.3, 1.0]) * x[6]
        sol = sf.solve(make(x[:4]), x[4:6], ts, steps_per_interval=2, key=KEY, solver=sf.solvers.Exact(pieces=2))
        return (sol.ys**2).sum()

    at, e = jnp.array([0.8, 0.3, 0.5, 0.6, 1.0, -1.0, 1.1]), np.eye(7) * 1e-6
    wanted = [(fn(at + d) - fn(at - d)) / 2e-6 for d in e]
    np.testing.assert_allclose(jax.grad(fn)(at), wanted, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(jax.jvp(fn, (at,), (jnp.ones(7),))[1], sum(wanted), rtol=1e-6)


def test_gradients_where_there_is_nothing_left_over(x64):
    fn = lambda s: sf.solve(sf.equations.Momentum(1, s), jnp.ones(2), [0.0, 1.0], dt0=0.5, key=KEY).final.sum()
    np.testing.assert_allclose(jax.grad(fn)(0.7), (fn(0.7 + 1e-6) - fn(0.7 - 1e-6)) / 2e-6, rtol=1e-7)
    rate = lambda r: sf.solve(OU(r, 0.0, 1.0), jnp.ones(2), [0.0, 1.0], dt0=0.5, key=KEY).final.sum()
    np.testing.assert_allclose(jax.grad(rate)(0.0), (rate(1e-6) - rate(-1e-6)) / 2e-6, rtol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("t1", [1.0, -1.0])
def test_within_diffeqsolve(x64, t1):
    # Of one path with diffrax: its tree, and a grid's table, in both directions.
    equation, y0 = EQUATIONS["scalars"](), jnp.ones(3)
    low, high = min(0.0, t1), max(0.0, t1)
    tree = dfx.VirtualBrownianTree(low, high, 1e-3, (3,), KEY, AREA)
    grid = sf.grids.uniform(0.0, t1, 4)
    for path in (tree, sf.paths.GridBrownian(grid, (3,), key=KEY, levy_area=AREA)):
        ours = sf.solve(equation, y0, [0.0, t1], grid=grid, path=path).final
        for adjoint in (dfx.RecursiveCheckpointAdjoint(), sf.adjoints.DiscreteAdjoint()):
            theirs = dfx.diffeqsolve(equation.terms(path), EXACT, 0.0, t1, t1 / 4, y0, adjoint=adjoint, max_steps=8)
            np.testing.assert_allclose(theirs.ys[0], ours, rtol=1e-9)


def test_padding_float32_saving_and_batches():
    equation, y0, ts = sf.equations.LinearSDE(A, B, L), jnp.ones(3, jnp.float32), [0.0, 0.5, 1.0]
    plain = sf.solve(equation, y0, ts, grid=sf.grids.through(ts, 0.25), key=KEY)
    padded = jax.jit(lambda g: sf.solve(equation, y0, ts, grid=g, key=KEY).ys)(sf.grids.through(ts, 0.25, num_steps=9))
    assert plain.final.dtype == jnp.float32
    np.testing.assert_allclose(padded, plain.ys, rtol=1e-5)
    kept = sf.solve(equation, y0, ts, dt0=0.25, key=KEY, save_fn=lambda t, y, args: y[0])
    np.testing.assert_allclose(kept.ys, plain.ys[:, 0], rtol=1e-6)
    many = jax.vmap(lambda y, k: sf.solve(equation, y, ts, dt0=0.25, key=k).final)(jnp.ones((2, 3)), jr.split(KEY, 2))
    assert many.shape == (2, 3)
    brownian = sf.equations.BrownianMotion(3)
    assert sf.solve(brownian, jnp.zeros((5, 3)), ts, dt0=0.25, key=KEY).final.shape == (5, 3)


def test_what_wants_stages_keeps_the_solver_that_has_them():
    equation, y0, ts = OU(1.0, 0.0, 0.5), jnp.ones(2), [0.0, 1.0]
    sol = sf.solve(equation, y0, ts, dt0=0.25, key=KEY, regularisers=(sf.regularisers.Kinetic(),))
    assert "ShARK" in repr(sol)
    assert "ShARK" in repr(sf.solve(equation, y0, ts, dt0=0.25, key=KEY, adjoint=sf.adjoints.ContinuousAdjoint()))
    area = sf.paths.GridBrownian(sf.grids.through(ts, 0.25), (2,), key=KEY, levy_area=dfx.SpaceTimeLevyArea)
    assert "ShARK" in repr(sf.solve(equation, y0, ts, path=area))
    with pytest.raises(ValueError, match="Exact takes terms of its own kind"):
        sf.solve(equation, y0, ts, key=KEY, solver=EXACT, regularisers=(sf.regularisers.Kinetic(),))


def test_what_is_refused():
    y0, ts, grid = jnp.ones(3), [0.0, 1.0], sf.grids.uniform(0.0, 1.0, 2)
    sde = sf.SDE(lambda t, y, args: -y, lambda t, y, args: jnp.ones_like(y), additive=True)
    with pytest.raises(TypeError, match="knows no other equation"):
        sf.solve(sde, y0, ts, dt0=0.5, key=KEY, solver=EXACT)
    narrow = sf.paths.GridBrownian(grid, (2,), key=KEY, levy_area=AREA)
    with pytest.raises(ValueError, match=r"draws 3 normals a step .*LinearBrownian\("):
        sf.solve(EQUATIONS["matrices"](), y0, ts, path=narrow, solver=EXACT)
    with pytest.raises(ValueError, match="pieces must be a positive integer"):
        sf.solvers.Exact(0)
    pid = dfx.PIDController(rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="estimates its error"):
        sf.solve(OU(1.0), y0, ts, key=KEY, solver=EXACT, stepsize_controller=pid)
    rough = OU(1.0, lambda t: jnp.sign(jnp.sin(50 * t)))
    with pytest.raises(sf.SolveError):
        sf.solve(rough, y0, ts, key=KEY)
