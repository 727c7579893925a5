"""What adaptive solves, raw terms and paths must refuse, each in one sentence that names the fault."""

import diffrax as dfx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdeflow as sf

DECAY = sf.ODE(lambda t, y, args: -y)
NOISY = sf.SDE(lambda t, y, args: -y, lambda t, y, args: jnp.ones_like(y), additive=True)
PID = dfx.PIDController(rtol=1e-3, atol=1e-6)
KEY = jax.random.key(0)
SPAN = [0.0, 1.0]


def _tree(t1, tol):
    return dfx.VirtualBrownianTree(0.0, t1, tol, (2,), key=KEY)


# What is passed -> the exception, and words that its sentence must hold.
ROWS = {
    "a tuple that holds something other than terms": (
        lambda: sf.solve((dfx.ODETerm(lambda t, y, a: y), None), jnp.ones(2), SPAN, dt0=0.1, solver=dfx.Euler()),
        TypeError, "equation must be an sdeflow equation or diffrax terms, got tuple",
    ),
    "an empty tuple of terms": (
        lambda: sf.solve((), jnp.ones(2), SPAN, dt0=0.1, solver=dfx.Euler()),
        TypeError, "got tuple",
    ),
    "raw terms without a solver": (
        lambda: sf.solve(dfx.ODETerm(lambda t, y, a: y), jnp.ones(2), SPAN, dt0=0.1),
        ValueError, "Raw diffrax terms need a solver",
    ),
    "raw terms with a key": (
        lambda: sf.solve(dfx.ODETerm(lambda t, y, a: y), jnp.ones(2), SPAN, dt0=0.1, solver=dfx.Euler(), key=KEY),
        ValueError, "carry their own noise",
    ),
    "a grid for an adaptive controller": (
        lambda: sf.solve(DECAY, jnp.ones(2), SPAN, grid=sf.grids.uniform(0, 1, 4), solver=dfx.Tsit5(), stepsize_controller=PID),
        ValueError, "chooses its own steps",
    ),
    "steps between times for an adaptive controller": (
        lambda: sf.solve(DECAY, jnp.ones(2), SPAN, steps_per_interval=4, solver=dfx.Tsit5(), stepsize_controller=PID),
        ValueError, "chooses its own steps",
    ),
    "diffrax's own fixed steps": (
        lambda: sf.solve(DECAY, jnp.ones(2), SPAN, solver=dfx.Tsit5(), stepsize_controller=dfx.StepTo(jnp.array(SPAN))),
        ValueError, "StepTo does not adapt",
    ),
    "a tree too coarse for steps on a short interval": (
        lambda: sf.solve(NOISY, jnp.ones(2), [0.0, 1 / 16], dt0=1 / 64, solver=dfx.Euler(), path=_tree(1 / 16, 1 / 64)),
        ValueError, "tol=0.015625 is more than half of the shortest step 0.015625",
    ),
    "a tree too coarse for steps on a long interval": (
        lambda: sf.solve(NOISY, jnp.ones(2), [0.0, 100.0], dt0=1.0, solver=dfx.Euler(), path=_tree(100.0, 2.0)),
        ValueError, "tol=2 is more than half of the shortest step 1",
    ),
    "something that is not an adjoint": (
        lambda: sf.solve(DECAY, jnp.ones(2), SPAN, dt0=0.1, adjoint="backsolve"),
        TypeError, "adjoint must be one such as",
    ),
    "a record of no steps": (lambda: sf.adjoints.DiscreteAdjoint(record=0), ValueError, "record must be a positive number"),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_it_is_refused_in_a_sentence_that_names_the_fault(name):
    call, kind, words = ROWS[name]
    with pytest.raises(kind) as raised:
        call()
    assert words in str(raised.value)
    assert "\n" not in str(raised.value).split("--------------------")[0].strip()


@pytest.mark.parametrize(("span", "steps"), [(1 / 16, 4), (100.0, 100)])
def test_a_tree_that_is_just_fine_enough_is_taken_on_intervals_of_any_length(span, steps):
    h = span / steps
    sol = sf.solve(NOISY, jnp.ones(2), [0.0, span], dt0=h, solver=dfx.Euler(), path=_tree(span, h / 2))
    assert np.isfinite(sol.final).all()
