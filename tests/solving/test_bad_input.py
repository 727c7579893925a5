"""Bad input: what is refused before anything runs, what ends as a result, and what is meant well and works.

Each refusal is one sentence that names the culprit and the cure.
"""

import diffrax as dfx
import jax
import jax.numpy as jnp
import lineax as lx
import numpy as np
import pytest

import sdeflow as sf

DECAY = sf.ODE(lambda t, y, args: -y)
NOISY = sf.SDE(lambda t, y, args: -y, lambda t, y, args: jnp.ones_like(y), additive=True)
ITO = sf.SDE(lambda t, y, args: -y, lambda t, y, args: 0.2 * y)
STRATONOVICH = sf.SDE(lambda t, y, args: -y, lambda t, y, args: 0.2 * y, interpretation="stratonovich")
PID = dfx.PIDController(rtol=1e-3, atol=1e-6)
KEY = jax.random.key(0)
SPAN = [0.0, 1.0]
Y = jnp.ones(2)
GRID = sf.grids.through(SPAN, 0.25)


def _tree(t1, tol, **options):
    return dfx.VirtualBrownianTree(0.0, t1, tol, (2,), key=KEY, **options)


def _rows(shape=(2,), **options):
    return sf.paths.GridBrownian(GRID, shape, key=KEY, **options)


def _operator(rows, columns):
    return lambda t, y, args: lx.MatrixLinearOperator(jnp.ones((rows, columns)))


def _with(diffusion):
    return sf.SDE(lambda t, y, args: -y, diffusion, additive=True)


def _raw(path, size=2):
    return dfx.MultiTerm(dfx.ODETerm(lambda t, y, a: -y), dfx.ControlTerm(_operator(2, size), path))


def _adaptive(equation=DECAY, y0=Y, ts=SPAN, solver=None, **kwargs):
    return sf.solve(equation, y0, ts, solver=solver or dfx.Tsit5(), stepsize_controller=PID, **kwargs)


# What is passed -> the exception, and words that its sentence must hold.
ROWS = {
    # ---- Equations, terms and options. ----
    "a tuple that holds something other than terms": (
        lambda: sf.solve((dfx.ODETerm(lambda t, y, a: y), None), Y, SPAN, dt0=0.1, solver=dfx.Euler()),
        TypeError, "equation must be an sdeflow equation or diffrax terms, got tuple",
    ),
    "an empty tuple of terms": (
        lambda: sf.solve((), Y, SPAN, dt0=0.1, solver=dfx.Euler()),
        TypeError, "got tuple",
    ),
    "raw terms without a solver": (
        lambda: sf.solve(dfx.ODETerm(lambda t, y, a: y), Y, SPAN, dt0=0.1),
        ValueError, "Raw diffrax terms need a solver",
    ),
    "raw terms with a key": (
        lambda: sf.solve(dfx.ODETerm(lambda t, y, a: y), Y, SPAN, dt0=0.1, solver=dfx.Euler(), key=KEY),
        ValueError, "carry their own noise",
    ),
    "a grid for an adaptive controller": (
        lambda: _adaptive(grid=sf.grids.uniform(0, 1, 4)),
        ValueError, "chooses its own steps",
    ),
    "steps between times for an adaptive controller": (
        lambda: _adaptive(steps_per_interval=4),
        ValueError, "chooses its own steps",
    ),
    "diffrax's own fixed steps": (
        lambda: sf.solve(DECAY, Y, SPAN, solver=dfx.Tsit5(), stepsize_controller=dfx.StepTo(jnp.array(SPAN))),
        ValueError, "StepTo does not adapt",
    ),
    "something that is not an adjoint": (
        lambda: sf.solve(DECAY, Y, SPAN, dt0=0.1, adjoint="backsolve"),
        TypeError, "adjoint must be one such as",
    ),
    # ---- Times too large for their precision. ----
    "a dt0 below the resolution of large times": (
        lambda: sf.solve(DECAY, Y, [1e5, 1e5 + 1], dt0=0.01),
        ValueError, "step of the grid is 0.01, below 8 units in the last place of the largest time 100001 in float32",
    ),
    "a grid through large times": (
        lambda: sf.grids.through([1e6, 1e6 + 1], dt0=0.01),
        ValueError, "shift and scale the times to O(1)",
    ),
    "steps per interval of large times": (
        lambda: sf.solve(DECAY, Y, [1e5, 1e5 + 0.02], steps_per_interval=4),
        ValueError, "below 8 units in the last place of the largest time 100000 in float32",
    ),
    "seconds since 1970": (
        lambda: sf.solve(DECAY, Y, [1.7e9, 1.7e9 + 3600], dt0=60.0),
        ValueError, "below 8 units in the last place of the largest time 1.7e+09 in float32",
    ),
    "an adaptive first step below the resolution of large times": (
        lambda: _adaptive(ts=[1e5, 1e5 + 1], dt0=0.01),
        ValueError, "first step, dt0, is 0.01, below 8 units in the last place of the largest time 100001 in float32",
    ),
    "adaptive steps between seconds since 1970": (
        lambda: sf.solve(DECAY, Y, [1.7e9, 1.7e9 + 60, 1.7e9 + 3600]),
        ValueError, "shortest interval of ts is 60, below 8 units in the last place",
    ),
    # ---- The state. ----
    "a list for a state": (
        lambda: sf.solve(DECAY, [1.0, 2.0], SPAN, dt0=0.1),
        TypeError, "y0 must be an array or a tree of arrays, got list: wrap it in jnp.asarray",
    ),
    "None for a state": (
        lambda: sf.solve(DECAY, None, SPAN, dt0=0.1),
        TypeError, "y0 must be an array or a tree of arrays, got NoneType",
    ),
    "text for a state": (
        lambda: sf.solve(DECAY, "one", SPAN, dt0=0.1),
        TypeError, "y0 must be an array or a tree of arrays, got str",
    ),
    "text within a state": (
        lambda: sf.solve(DECAY, {"x": Y, "name": "one"}, SPAN, dt0=0.1),
        TypeError, "got dict with a leaf of type str",
    ),
    "an array of objects for a state": (
        lambda: sf.solve(DECAY, np.array([None, 1.0]), SPAN, dt0=0.1),
        TypeError, "y0 must be an array or a tree of arrays, got ndarray",
    ),
    "a random key for a state": (
        lambda: sf.solve(DECAY, KEY, SPAN, dt0=0.1),
        TypeError, "y0 must be an array or a tree of arrays",
    ),
    "a start of NaN for adaptive steps": (
        lambda: sf.solve(DECAY, jnp.array([1.0, jnp.nan]), SPAN),
        sf.SolveError, "infinite or NaN",
    ),
    "a start of NaN for fixed steps": (
        lambda: sf.solve(DECAY, jnp.array([1.0, jnp.nan]), SPAN, dt0=0.1),
        sf.SolveError, "It was finite at none of the requested times",
    ),
    "noise on a complex state": (
        lambda: sf.solve(NOISY, jnp.array([1j]), SPAN, dt0=0.1, key=KEY),
        NotImplementedError, "solve for the real and imaginary parts",
    ),
    "raw terms with noise on a complex state": (
        lambda: sf.solve(_raw(_tree(1.0, 1e-2)), jnp.array([1j, 1j]), SPAN, dt0=0.1, solver=dfx.Heun()),
        NotImplementedError, "solve for the real and imaginary parts",
    ),
    # ---- What the drift returns. ----
    "a drift that is NaN from the middle on": (
        lambda: sf.solve(sf.ODE(lambda t, y, a: jnp.where(t > 0.5, jnp.nan, -y)), Y, [0.0, 0.4, 0.8, 1.0], dt0=0.1),
        sf.SolveError, "It was finite last at the requested time 0.4",
    ),
    "a drift of another shape": (
        lambda: sf.solve(sf.ODE(lambda t, y, a: {"a": -y["a"][:1]}), {"a": Y}, SPAN, dt0=0.1),
        ValueError, "must return the state's shape (2,) at leaf y['a'], but returned shape (1,); sdeflow never broad",
    ),
    "a drift of another shape, adaptive": (
        lambda: sf.solve(sf.ODE(lambda t, y, a: -y[:1]), Y, SPAN),
        ValueError, "must return the state's shape (2,), but returned shape (1,)",
    ),
    "a scalar drift": (
        lambda: sf.solve(sf.ODE(lambda t, y, a: -1.0), Y, SPAN, dt0=0.1),
        ValueError, "must return the state's shape (2,), but returned shape ()",
    ),
    "a drift of integers": (
        lambda: sf.solve(sf.ODE(lambda t, y, a: {"a": jnp.ones(2, int)}), {"a": Y}, SPAN, dt0=0.1),
        ValueError, "must return dtype float32 at leaf y['a'], but returned int32",
    ),
    "a complex drift of a real state": (
        lambda: sf.solve(sf.ODE(lambda t, y, a: 1j * y), Y, SPAN, dt0=0.1),
        ValueError, "must return dtype float32, but returned complex64",
    ),
    "a drift of another structure": (
        lambda: sf.solve(sf.ODE(lambda t, y, a: (y, y)), Y, SPAN, dt0=0.1),
        ValueError, "must return the structure of the state, f32[2], but returned (f32[2], f32[2])",
    ),
    "an ODETerm of another shape": (
        lambda: sf.solve(dfx.ODETerm(lambda t, y, a: -y[:1]), Y, SPAN, dt0=0.1, solver=dfx.Tsit5()),
        ValueError, "shapes of the state, f32[2], but is f32[1]; sdeflow never broadcasts",
    ),
    "a scalar ODETerm, adaptive": (
        lambda: _adaptive(dfx.ODETerm(lambda t, y, a: -1.0)),
        ValueError, "shapes of the state, f32[2], but is -1.0; sdeflow never broadcasts",
    ),
    # ---- What the diffusion returns, and the noise it meets. ----
    "a vector where a matrix is meant": (
        lambda: sf.solve(_with(lambda t, y, a: jnp.ones(3)), Y, SPAN, dt0=0.1, key=KEY),
        ValueError, "Return an array of the state's structure for diagonal noise, or a lineax operator from the noise",
    ),
    "a matrix that is no operator": (
        lambda: sf.solve(_with(lambda t, y, a: jnp.eye(2)), Y, SPAN, dt0=0.1, key=KEY),
        ValueError, "but returned shape (2, 2)",
    ),
    "an operator that maps elsewhere": (
        lambda: sf.solve(_with(_operator(3, 2)), Y, SPAN, dt0=0.1, key=KEY),
        ValueError, "must map the noise to the state f32[2], but maps to f32[3]: return a lineax operator",
    ),
    "an operator for more noise than the path has": (
        lambda: sf.solve(_with(_operator(2, 3)), Y, SPAN, solver=dfx.Euler(), path=_rows()),
        ValueError, "noise size m=3, path has k=2",
    ),
    "a diagonal for less noise than the path has": (
        lambda: sf.solve(NOISY, Y, SPAN, solver=dfx.Euler(), path=_rows((3,))),
        ValueError, "noise size m=2, path has k=3",
    ),
    "raw terms for more noise than the path has": (
        lambda: sf.solve(_raw(_tree(1.0, 1e-2), 3), Y, SPAN, dt0=0.1, solver=dfx.Heun()),
        ValueError, "noise size m=3, path has k=2",
    ),
    # ---- Solvers of the other calculus, or without what the steps need. ----
    "a Stratonovich solver for Ito noise": (
        lambda: sf.solve(ITO, Y, SPAN, dt0=0.1, key=KEY, solver=dfx.Heun()),
        ValueError, "Heun converges to the Stratonovich solution, but the equation is Ito with state-dependent noise: "
        "solve equation.to_stratonovich()",
    ),
    "an Ito solver for Stratonovich noise": (
        lambda: sf.solve(STRATONOVICH, Y, SPAN, dt0=0.1, key=KEY, solver=dfx.Euler()),
        ValueError, "solve equation.to_ito() instead",
    ),
    "a solver of neither calculus for Ito noise": (
        lambda: sf.solve(ITO, Y, SPAN, dt0=0.1, key=KEY, solver=dfx.Tsit5()),
        ValueError, "Tsit5 is not known to converge to the Ito solution",
    ),
    "adaptive steps of Euler with noise": (
        lambda: _adaptive(ITO, solver=dfx.Euler(), key=KEY),
        ValueError, "use diffrax.Heun() on equation.to_stratonovich(), or fix the steps with dt0=",
    ),
    "adaptive half steps of Euler with noise": (
        lambda: _adaptive(ITO, solver=dfx.HalfSolver(dfx.Euler()), key=KEY),
        ValueError, "An SDE should not be solved with adaptive step sizes with Euler's method",
    ),
    "adaptive steps of Ito noise without a solver": (
        lambda: sf.solve(ITO, Y, SPAN, stepsize_controller=PID, key=KEY),
        ValueError, "solve equation.to_stratonovich(), or fix the steps with dt0=",
    ),
    "adaptive steps of a solver without an error estimate": (
        lambda: _adaptive(solver=dfx.Euler()),
        ValueError, "estimates its error, and Euler does not: use diffrax.HalfSolver(diffrax.Euler())",
    ),
    # ---- Paths. ----
    "adaptive steps on the rows of a grid": (
        lambda: _adaptive(STRATONOVICH, solver=dfx.Heun(), path=_rows()),
        ValueError, "the GridBrownian knows the steps of its grid only: pass key= instead, or path=diffrax.Virtual",
    ),
    "adaptive steps on the rows of a grid within raw terms": (
        lambda: _adaptive(_raw(_rows()), solver=dfx.Heun()),
        ValueError, "the GridBrownian knows the steps of its grid only",
    ),
    "adaptive steps on noise that is not kept": (
        lambda: _adaptive(STRATONOVICH, solver=dfx.Heun(), path=dfx.UnsafeBrownianPath((2,), key=KEY)),
        ValueError, "UnsafeBrownianPath cannot take a step again: pass key= instead",
    ),
    "steps that the rows of a grid are not": (
        lambda: sf.solve(NOISY, Y, SPAN, dt0=0.1, solver=dfx.Euler(), path=_rows()),
        ValueError, "knows the steps of its own grid, Grid(4 steps from 0 to 1, 2 saved times), and none from 0 to 0.1",
    ),
    "a path without the Levy area that a solver needs": (
        lambda: sf.solve(NOISY, Y, SPAN, solver=dfx.ShARK(), path=_rows()),
        ValueError, "ShARK needs levy_area=diffrax.SpaceTimeLevyArea",
    ),
    "a tree without the Levy area that a solver needs": (
        lambda: _adaptive(NOISY, solver=dfx.ShARK(), path=_tree(1.0, 1e-3)),
        ValueError, "ShARK needs levy_area=diffrax.SpaceTimeLevyArea",
    ),
    "raw terms without the Levy area that a solver needs": (
        lambda: sf.solve(_raw(_tree(1.0, 1e-2)), Y, SPAN, dt0=0.25, solver=dfx.SPaRK()),
        ValueError, "SPaRK needs levy_area=diffrax.SpaceTimeLevyArea",
    ),
    "a path that is shorter than the times": (
        lambda: sf.solve(NOISY, Y, [0.0, 3.0], dt0=0.25, solver=dfx.Euler(), path=_tree(1.0, 1e-3)),
        ValueError, "covers times from 0 to 1, but ts runs from 0 to 3: build it to cover all of ts",
    ),
    "a path that begins too late": (
        lambda: sf.solve(NOISY, Y, [-1.0, 1.0], dt0=0.25, solver=dfx.Euler(), path=_tree(1.0, 1e-3)),
        ValueError, "covers times from 0 to 1, but ts runs from -1 to 1",
    ),
    "a path that is shorter than the times, adaptive": (
        lambda: _adaptive(STRATONOVICH, ts=[0.0, 3.0], solver=dfx.Heun(), path=_tree(1.0, 1e-3)),
        ValueError, "covers times from 0 to 1, but ts runs from 0 to 3",
    ),
    "a path within raw terms that is shorter than the times": (
        lambda: sf.solve(_raw(_tree(1.0, 1e-3)), Y, [0.0, 3.0], dt0=0.25, solver=dfx.Heun()),
        ValueError, "covers times from 0 to 1, but ts runs from 0 to 3",
    ),
    "a tree too coarse for steps on a short interval": (
        lambda: sf.solve(NOISY, Y, [0.0, 1 / 16], dt0=1 / 64, solver=dfx.Euler(), path=_tree(1 / 16, 1 / 64)),
        ValueError, "tol=0.015625 is more than half of the shortest step 0.015625",
    ),
    "a tree too coarse for steps on a long interval": (
        lambda: sf.solve(NOISY, Y, [0.0, 100.0], dt0=1.0, solver=dfx.Euler(), path=_tree(100.0, 2.0)),
        ValueError, "tol=2 is more than half of the shortest step 1",
    ),
    "a tree too coarse for an adaptive first step": (
        lambda: _adaptive(STRATONOVICH, solver=dfx.Heun(), dt0=0.1, path=_tree(1.0, 0.25)),
        ValueError, "tol=0.25 is more than half of the shortest step 0.1",
    ),
    "a tree within raw terms that is too coarse": (
        lambda: sf.solve(_raw(_tree(1.0, 0.25)), Y, SPAN, dt0=0.1, solver=dfx.Heun()),
        ValueError, "tol=0.25 is more than half of the shortest step 0.1, so its increments would have the wrong",
    ),
    # ---- Keys. ----
    "a number for a key": (
        lambda: sf.solve(NOISY, Y, SPAN, dt0=0.1, key=0),
        TypeError, "key must be a JAX random key such as jax.random.key(0), got 0",
    ),
    "a batch of keys": (
        lambda: sf.solve(NOISY, Y, SPAN, dt0=0.1, key=jax.random.split(KEY, 3)),
        TypeError, "a batch of keys of shape (3,): use jax.vmap over keys",
    ),
    "a batch of old keys": (
        lambda: sf.solve(NOISY, Y, SPAN, dt0=0.1, key=jax.random.split(jax.random.PRNGKey(0), 3)),
        TypeError, "a batch of keys of shape (3,): use jax.vmap over keys",
    ),
    # ---- Steps. ----
    "a dt0 of zero": (lambda: sf.solve(DECAY, Y, SPAN, dt0=0.0), ValueError, "finite, not zero, got 0.0"),
    "a dt0 of NaN": (lambda: sf.solve(DECAY, Y, SPAN, dt0=float("nan")), ValueError, "finite, not zero, got nan"),
    "an infinite dt0": (lambda: sf.solve(DECAY, Y, SPAN, dt0=jnp.inf), ValueError, "finite, not zero, got inf"),
    "an adaptive dt0 of zero": (lambda: _adaptive(dt0=0.0), ValueError, "finite, not zero, got 0.0"),
    "an adaptive dt0 of NaN": (lambda: _adaptive(dt0=jnp.array(jnp.nan)), ValueError, "finite, not zero, got nan"),
    "a dt0 against the times": (
        lambda: sf.solve(DECAY, Y, SPAN, dt0=-0.1),
        ValueError, "of the sign of ts[1]-ts[0]=1, got -0.1",
    ),
    "a dt0 against decreasing times": (
        lambda: sf.solve(DECAY, Y, [1.0, 0.0], dt0=0.1),
        ValueError, "of the sign of ts[1]-ts[0]=-1, got 0.1",
    ),
    "an adaptive dt0 against the times": (
        lambda: _adaptive(dt0=-0.1),
        ValueError, "of the sign of ts[1]-ts[0]=1, got -0.1",
    ),
    "text for dt0": (lambda: sf.solve(DECAY, Y, SPAN, dt0="0.1"), TypeError, "dt0 must be a number"),
    "two steps for dt0": (lambda: sf.solve(DECAY, Y, SPAN, dt0=[0.1, 0.2]), TypeError, "dt0 must be a number"),
    "no steps per interval": (
        lambda: sf.solve(DECAY, Y, SPAN, steps_per_interval=0),
        ValueError, "steps_per_interval must be a positive integer, got 0",
    ),
    "a float of steps per interval": (
        lambda: sf.solve(DECAY, Y, SPAN, steps_per_interval=2.0),
        ValueError, "steps_per_interval must be a positive integer, got 2.0",
    ),
    "a flag for steps per interval": (
        lambda: jax.jit(lambda ts: sf.solve(DECAY, Y, ts, steps_per_interval=True).final)(jnp.array(SPAN)),
        ValueError, "steps_per_interval must be a positive integer, got True",
    ),
    "no rows of a grid": (
        lambda: sf.grids.through(SPAN, 0.5, num_steps=0),
        ValueError, "num_steps must be a positive integer, got 0",
    ),
    "a float of rows of a grid": (
        lambda: sf.grids.through(SPAN, 0.5, num_steps=4.0),
        ValueError, "num_steps must be a positive integer, got 4.0",
    ),
    "no steps at most": (
        lambda: sf.solve(DECAY, Y, SPAN, max_steps=0),
        ValueError, "max_steps must be a positive integer, got 0",
    ),
    "less than no steps at most": (
        lambda: sf.solve(DECAY, Y, SPAN, dt0=0.1, max_steps=-5),
        ValueError, "max_steps must be a positive integer, got -5",
    ),
    "a float of steps at most": (
        lambda: sf.solve(DECAY, Y, SPAN, max_steps=1e3),
        ValueError, "max_steps must be a positive integer, got 1000.0",
    ),
    "a record of no steps": (
        lambda: sf.adjoints.DiscreteAdjoint(record=0),
        ValueError, "record must be a positive number of steps, got 0",
    ),
    "a record of a float of steps": (
        lambda: sf.adjoints.DiscreteAdjoint(record=10.0),
        ValueError, "record must be a positive number of steps, got 10.0",
    ),
    "a flag for a record": (
        lambda: sf.adjoints.DiscreteAdjoint(record=True),
        ValueError, "record must be a positive number of steps, got True",
    ),
    "something that is no grid": (
        lambda: sf.solve(DECAY, Y, SPAN, grid=[0.0, 0.5, 1.0]),
        TypeError, "grid must be a Grid such as sf.grids.through(ts, dt0=0.1), got list",
    ),
    "too few steps at most": (
        lambda: sf.solve(sf.ODE(lambda t, y, a: jnp.cos(500 * t) - y), Y, SPAN, max_steps=8),
        sf.SolveError, "Try increasing `max_steps`. 5 steps were accepted and 3 rejected; of length dt=0.0156 on "
        "average, they went from t=0 to t=0.0780729, 7.81% of the way to t=1.",
    ),
    # ---- Requested times. ----
    "an end of NaN": (lambda: sf.solve(DECAY, Y, [0.0, np.nan], dt0=0.1), ValueError, "finite; entry 1 is not"),
    "an infinite end": (lambda: sf.solve(DECAY, Y, [0.0, np.inf], dt0=0.1), ValueError, "finite; entry 1 is not"),
    "an infinite end, adaptive": (lambda: sf.solve(DECAY, Y, [0.0, np.inf]), ValueError, "finite; entry 1 is not"),
    "an end of NaN with a grid": (
        lambda: sf.solve(DECAY, Y, [0.0, np.nan], grid=GRID),
        ValueError, "finite; entry 1 is not",
    ),
    "one time of NaN": (lambda: sf.solve(DECAY, Y, [np.nan], dt0=0.1), ValueError, "finite; entry 0 is not"),
    "no times": (lambda: sf.solve(DECAY, Y, [], dt0=0.1), ValueError, "at least one time, got shape (0,)"),
    "no times, adaptive": (lambda: sf.solve(DECAY, Y, np.zeros(0)), ValueError, "at least one time, got shape (0,)"),
    "no times with steps per interval": (
        lambda: sf.solve(DECAY, Y, [], steps_per_interval=2),
        ValueError, "at least one time, got shape (0,)",
    ),
    "one number for times": (lambda: sf.solve(DECAY, Y, 1.0, dt0=0.1), ValueError, "one-dimensional"),
    "text for times": (lambda: sf.solve(DECAY, Y, ["a", "b"], dt0=0.1), TypeError, "ts must be real numbers"),
    "complex times": (lambda: sf.solve(DECAY, Y, np.array([0j, 1j]), dt0=0.1), TypeError, "ts must be real numbers"),
    "times outside of the grid": (
        lambda: sf.solve(DECAY, Y, [0.0, 2.0], grid=GRID),
        ValueError, "The grid reaches 1 where ts[1]=2: build it with sf.grids.through(ts, ...)",
    ),
    "times outside of the grid of the path": (
        lambda: sf.solve(NOISY, Y, [0.0, 2.0], solver=dfx.Euler(), path=_rows()),
        ValueError, "The grid reaches 1 where ts[1]=2",
    ),
    "a grid for one time": (
        lambda: sf.solve(DECAY, Y, [0.0], grid=GRID),
        ValueError, "The grid saves 2 times but ts has 1: drop grid=",
    ),
    # ---- Data that ends before the solve does. ----
    "a query outside of the data": (
        lambda: sf.solve(FORCED, jnp.ones(1), [0.0, 1.0, 3.0], dt0=0.5, args=_data("error")),
        sf.SolveError, "It was finite last at the requested time 1. A LinearControl covers times from 0 to 2, but ts "
        'runs from 0 to 3: use extrapolate="flat" to hold its ends.',
    ),
    "a query outside of the data, adaptive": (
        lambda: sf.solve(FORCED, jnp.ones(1), [0.0, 3.0], args=_data("error")),
        sf.SolveError, 'use extrapolate="flat" to hold its ends',
    ),
    # ---- Adjoints that do not go with the path. ----
    "a continuous adjoint with noise that is not kept": (
        lambda: sf.solve(
            STRATONOVICH, Y, SPAN, dt0=0.1, solver=dfx.Heun(), path=dfx.UnsafeBrownianPath((2,), key=KEY),
            adjoint=dfx.BacksolveAdjoint(),
        ),
        ValueError, "BacksolveAdjoint needs noise that can be asked again, which an UnsafeBrownianPath cannot: pass "
        "key= or path=diffrax.VirtualBrownianTree(...), or use adjoint=sf.adjoints.DiscreteAdjoint().",
    ),
    "diffrax's checkpoints with noise that is not kept": (
        lambda: sf.solve(
            STRATONOVICH, Y, SPAN, dt0=0.1, solver=dfx.Heun(), path=dfx.UnsafeBrownianPath((2,), key=KEY),
            adjoint=dfx.RecursiveCheckpointAdjoint(),
        ),
        ValueError, "or use adjoint=sf.adjoints.DiscreteAdjoint()",
    ),
    "a continuous adjoint with a solver that does not run backwards": (
        lambda: sf.solve(
            NOISY, Y, SPAN, dt0=0.1, solver=dfx.ShARK(), key=KEY, adjoint=dfx.BacksolveAdjoint(),
        ),
        ValueError, "BacksolveAdjoint cannot run ShARK backwards with noise",
    ),
    "a stochastic Runge-Kutta solver that diffrax would run backwards": (
        lambda: sf.solve(
            NOISY, Y, [1.0, 0.0], dt0=-0.1, solver=dfx.ShARK(), key=KEY, adjoint=dfx.RecursiveCheckpointAdjoint(),
        ),
        ValueError, "diffrax runs ShARK backwards in time with the wrong sign of the drift, and this solve leaves the "
        "steps to diffrax: drop adjoint= and event= (and set max_steps=), or use a solver such as diffrax.Heun().",
    ),
    "half steps of it that an event would have diffrax run backwards": (
        lambda: sf.solve(
            NOISY, Y, [1.0, 0.0], dt0=-0.1, solver=dfx.HalfSolver(dfx.SEA()), key=KEY,
            event=dfx.Event(lambda t, y, args, **kwargs: y[0] > 100.0),
        ),
        ValueError, "or use a solver such as diffrax.Heun()",
    ),
    "adaptive steps of it without a bound that diffrax would run backwards": (
        lambda: _adaptive(NOISY, ts=[1.0, 0.0], solver=dfx.ShARK(), key=KEY, max_steps=None),
        ValueError, "drop adjoint= and event= (and set max_steps=)",
    ),
}  # fmt: skip

FORCED = sf.ODE(lambda t, y, control: control.evaluate(t) - y)


def _data(extrapolate):
    return sf.paths.linear_control(jnp.array([0.0, 1.0, 2.0]), jnp.ones((3, 1)), extrapolate=extrapolate)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(row, marks=pytest.mark.slow if row == "a query outside of the data, adaptive" else [])
        for row in ROWS
    ],
)
def test_it_is_refused_in_a_sentence_that_names_the_fault(name):
    call, kind, words = ROWS[name]
    with pytest.raises(kind) as raised:
        call()
    assert words in str(raised.value)
    assert "\n" not in str(raised.value).split("--------------------")[0].strip()


# ---- What ends as a result, inside of a trace. ----


@pytest.mark.parametrize("kwargs", [{"dt0": 0.1}, {}], ids=["fixed", "adaptive"])
def test_a_start_of_nan_is_a_result_inside_of_a_trace(kwargs):
    sol = jax.jit(lambda y: sf.solve(DECAY, y, np.array(SPAN), **kwargs))(jnp.array([1.0, jnp.nan]))
    assert sol.result == sf.RESULTS.nonfinite
    assert int(sol.stats["num_steps"]) == (10 if kwargs else 0)


@pytest.mark.parametrize("kwargs", [{"dt0": 0.1}, pytest.param({}, marks=pytest.mark.slow)], ids=["fixed", "adaptive"])
def test_a_query_outside_of_the_data_is_a_result_inside_of_a_trace(kwargs):
    run = jax.jit(lambda control: sf.solve(FORCED, jnp.zeros(1), np.array([0.0, 1.0, 3.0]), args=control, **kwargs))
    sol = run(_data("error"))
    assert sol.result == sf.RESULTS.nonfinite
    assert not np.isfinite(sol.ys[2]).any()
    np.testing.assert_allclose(run(_data("flat")).ys[:, 0], 1 - np.exp([0.0, -1.0, -3.0]), rtol=1e-3, atol=1e-3)


# ---- What is meant well, and works. ----


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_a_state_of_16_bits_is_promoted_with_a_warning(dtype):
    with pytest.warns(sf.SdeflowWarning, match="too coarse for solving: it was promoted to float32"):
        sol = sf.solve(DECAY, jnp.ones(2, dtype), SPAN, dt0=0.25)
    np.testing.assert_array_equal(sol.final, sf.solve(DECAY, Y, SPAN, dt0=0.25).final)


def test_float64_numpy_goes_in_as_float32_while_64_bit_numbers_are_off():
    sol = sf.solve(DECAY, np.ones(2), np.array(SPAN), dt0=0.25)
    np.testing.assert_array_equal(sol.final, sf.solve(DECAY, Y, jnp.array(SPAN), dt0=0.25).final)
    assert sol.final.dtype == sol.ts.dtype == jnp.float32


@pytest.mark.parametrize("old", [jax.random.PRNGKey(3), np.asarray(jax.random.PRNGKey(3))], ids=["jax", "numpy"])
def test_an_old_key_is_the_new_key_of_the_same_seed(old):
    run = lambda key: sf.solve(NOISY, Y, SPAN, dt0=0.25, key=key).final
    np.testing.assert_array_equal(run(old), run(jax.random.key(3)))


@pytest.mark.parametrize(("span", "steps"), [(1 / 16, 4), (100.0, 100)])
def test_a_tree_that_is_just_fine_enough_is_taken_on_intervals_of_any_length(span, steps):
    h = span / steps
    sol = sf.solve(NOISY, jnp.ones(2), [0.0, span], dt0=h, solver=dfx.Euler(), path=_tree(span, h / 2))
    assert np.isfinite(sol.final).all()


def test_steps_that_are_those_of_the_path_are_taken_however_they_are_given():
    given = sf.solve(NOISY, Y, SPAN, solver=dfx.Euler(), path=_rows())
    again = sf.solve(NOISY, Y, SPAN, dt0=0.25, solver=dfx.Euler(), path=_rows())
    np.testing.assert_allclose(again.final, given.final, rtol=1e-6)


# diffrax warns that such a solver carries no mark. A consistent method for ordinary equations reads an increment of the
# path as if the path were smooth, and so tends to the Stratonovich solution.
@pytest.mark.parametrize(("solver", "rtol"), [(dfx.Tsit5(), 1e-4), (dfx.Bosh3(), 1e-3)], ids=["Tsit5", "Bosh3"])
def test_a_method_for_ordinary_equations_tends_to_the_stratonovich_solution(solver, rtol):
    noise = sf.SDE(lambda t, y, a: 0 * y, lambda t, y, a: 0.8 * y, interpretation="stratonovich")
    path = sf.paths.GridBrownian(sf.grids.uniform(0.0, 1.0, 256), (64,), key=KEY)
    exact = np.exp(0.8 * np.asarray(path.table.W).sum(axis=0))
    final = sf.solve(noise, jnp.ones(64), SPAN, solver=solver, path=path).final
    np.testing.assert_allclose(final, exact, rtol=rtol)
    assert np.abs(np.log(exact) - 0.8**2 / 2 - np.log(final)).min() > 0.3, "the Ito solution is another one"


@pytest.mark.parametrize("kwargs", [{"dt0": 0.05}, {}], ids=["fixed", "adaptive"])
def test_an_ordinary_equation_may_be_complex(kwargs):
    def loss(rate):
        turn = sf.ODE(lambda t, y, r: 1j * r * y)
        final = sf.solve(turn, jnp.array(1 + 0j), np.array(SPAN), args=rate, **kwargs).final
        return final.real + 2 * final.imag, final

    (value, final), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.array(1.3))
    assert final.dtype == jnp.complex64
    np.testing.assert_allclose(value, np.cos(1.3) + 2 * np.sin(1.3), rtol=1e-3)
    np.testing.assert_allclose(slope, 2 * np.cos(1.3) - np.sin(1.3), rtol=1e-2)


def test_the_gradient_in_a_complex_start_follows_jax():
    turn = lambda y0: sf.solve(sf.ODE(lambda t, y, a: 1j * y), y0, np.array(SPAN), dt0=0.05).final
    loss = lambda final: final.real + 2 * final.imag
    start = jnp.array(1 + 0.5j)
    exact = jax.grad(lambda y0: loss(y0 * np.exp(1j)))(start)
    np.testing.assert_allclose(jax.jit(jax.grad(lambda y0: loss(turn(y0))))(start), exact, rtol=1e-5)
