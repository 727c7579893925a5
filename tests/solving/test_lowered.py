"""What is compiled holds no call back to the host, so that JAX's persistent cache can keep it; lowered, never run."""

from typing import Any

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdeflow as sf

TS = np.array([0.0, 0.4, 1.0])
ODE = sf.ODE(lambda t, y, rate: -rate * y)
NOISY = sf.SDE(lambda t, y, rate: -rate * y, lambda t, y, rate: 0.1 * rate * jnp.cos(y), interpretation="stratonovich")
HALF = dfx.HalfSolver(dfx.EulerHeun())
PID = dfx.PIDController(rtol=1e-3, atol=1e-6)
JUMPS = dfx.ClipStepSizeController(PID, jump_ts=np.array([0.3]))


def _path(storage):
    grid = sf.grids.through(TS, 0.1)
    return sf.paths.GridBrownian(grid, (2,), key=jax.random.key(0), storage=storage)


def _tree():
    return dfx.VirtualBrownianTree(0.0, 1.0, 2.0**-8, (2,), key=jax.random.key(0))


SOLVES: dict[str, tuple[Any, Any]] = {
    "fixed steps": (ODE, lambda: {"dt0": 0.1}),
    "a grid with jumps": (ODE, lambda: {"grid": sf.grids.through(TS, 0.1, jumps=[0.3]), "solver": dfx.Tsit5()}),
    "adaptive steps": (ODE, dict),
    "adaptive steps and jumps": (ODE, lambda: {"solver": dfx.Tsit5(), "stepsize_controller": JUMPS, "dt0": 0.1}),
    "adaptive steps, higher order": (ODE, lambda: {"adjoint": sf.adjoints.DiscreteAdjoint(higher_order=True)}),
    "adaptive steps, implicit": (ODE, lambda: {"solver": dfx.Kvaerno3(), "stepsize_controller": PID, "dt0": 0.1}),
    "implicit steps": (ODE, lambda: {"dt0": 0.1, "solver": dfx.Kvaerno3()}),
    "half steps": (ODE, lambda: {"dt0": 0.1, "solver": dfx.HalfSolver(dfx.Tsit5())}),
    "steps to be undone": (
        ODE,
        lambda: {"dt0": 0.1, "solver": dfx.ReversibleHeun(), "adjoint": sf.adjoints.ReversibleAdjoint()},
    ),
    "noise from a key": (NOISY, lambda: {"dt0": 0.1, "key": jax.random.key(0)}),
    "noise from a table": (NOISY, lambda: {"path": _path("table")}),
    "noise from a counter": (NOISY, lambda: {"path": _path("counter")}),
    "noise from the tree's rows": (NOISY, lambda: {"path": _path("tree")}),
    "noise from diffrax's tree": (NOISY, lambda: {"path": _tree(), "dt0": 0.1}),
    "noise in half steps": (NOISY, lambda: {"dt0": 0.1, "key": jax.random.key(0), "solver": HALF}),
    "adaptive noise": (
        NOISY,
        lambda: {"path": _tree(), "dt0": 0.1, "solver": dfx.Heun(), "stepsize_controller": PID},
    ),
}


@pytest.mark.parametrize("name", SOLVES)
def test_neither_a_solve_nor_its_gradient_calls_back(name):
    equation, options = SOLVES[name]
    kwargs = options()

    def final(y0, rate):
        return sf.solve(equation, y0, TS, args=rate, **kwargs).final.sum()

    # The derivative of an implicit solve comes from optimistix, which checks its linear solve by a call back.
    implicit = isinstance(kwargs.get("solver"), dfx.AbstractImplicitSolver)
    for fn in (final,) if implicit else (final, jax.grad(final, (0, 1))):
        assert "callback" not in jax.jit(fn).lower(jnp.ones(2), jnp.array(0.7)).as_text()
