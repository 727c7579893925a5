"""Equal calls of `sample`: one table, one program, and nothing kept that belongs to a trace."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdeflow.diffusion import VP, Denoiser, DPMSolverPP, MeanReverting, Multistep, UniPC, sample, sampling_grid
from sdeflow.diffusion._once import once

X = jnp.array([0.3, -1.2])


def test_a_second_equal_call_makes_no_table_and_compiles_nothing(monkeypatch):
    traces, tables = [], []
    table = Multistep.table
    monkeypatch.setattr(Multistep, "table", lambda self, *args: tables.append(1) or table(self, *args))

    def network(t, x, args):
        traces.append(1)
        return args * x

    run = lambda solver, gain: sample(Denoiser(network, VP()), X, args=gain, solver=solver, num_steps=7)
    first = run(UniPC(3), jnp.array(0.5))
    seen = len(traces)
    again = run(UniPC(3), jnp.array(0.25))
    assert (len(traces), len(tables)) == (seen, 1)
    assert bool((first != again).all())
    # Another table of the same shape is another table, but the same program.
    run(UniPC(3, lower_order_final=True), jnp.array(0.5))
    assert (len(traces), len(tables)) == (seen, 2)
    run(DPMSolverPP(3), jnp.array(0.5))
    assert len(tables) == 3


def test_equal_arguments_are_those_of_equal_values_and_types():
    made = []
    make = lambda *args: made.append(args) or np.zeros(1)
    for args in ((1,), (1.0,), (True,), (np.array([1.0]),), (np.array([1.0], np.float32),), (jnp.array([2.0]),)):
        first = once(make, *args)
        assert once(make, *args) is first
    assert len(made) == 6
    once(make, np.array([2.0]))
    assert len(made) == 7


def test_what_is_large_or_of_jax_is_made_anew():
    made = []
    for args, out in (((np.zeros(100_000),), np.zeros(1)), ((1.0,), jnp.zeros(1))):
        make = lambda *args, out=out: made.append(args) or out
        once(make, *args)
        once(make, *args)
    assert len(made) == 4


def test_old_tables_go():
    made = []
    make = lambda i: made.append(i) or np.zeros(1)
    for i in range(65):
        once(make, i)
    once(make, 64)
    assert made == list(range(65))
    once(make, 0)
    assert made[-1] == 0


@pytest.mark.parametrize("schedule", [VP(), MeanReverting(VP(), jnp.array([1.0, 2.0]))], ids=["VP", "MeanReverting"])
def test_calls_within_and_outside_of_a_program_agree_in_any_order(schedule):
    model = Denoiser(lambda t, x, args: 0.5 * x, schedule)
    run = lambda x: sample(model, x, solver=UniPC(3), num_steps=6)
    within = jax.jit(run)(X)
    np.testing.assert_allclose(run(X), within, rtol=1e-5)
    grid = sampling_grid(schedule, 6)

    def on(left, right):
        moved = type(grid)(left, right, grid.live, grid.save)
        return sample(model, X, solver=UniPC(3), grid=moved)

    np.testing.assert_allclose(jax.jit(on)(grid.left, grid.right), on(grid.left, grid.right), rtol=1e-4)
    np.testing.assert_allclose(on(grid.left, grid.right), within, rtol=1e-4)
