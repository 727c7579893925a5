"""Padding is invisible, bit for bit: in the states, and in every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.battery import CASES, SLOW, equation_of, largest_difference, path_of, solved

import sdeflow as sf

# Those left to the slow run are of the family of another one here.
AKIN = ("EulerHeun", "Midpoint", "SRA1", *SLOW)
NAMES = [pytest.param(name, marks=pytest.mark.slow) if name in AKIN else name for name in CASES]
# One solver of each family by default; the two whose steps of length zero are not the identity among them.
FAMILIES = ("Euler", "ShARK", "ReversibleHeun", "LeapfrogMidpoint")
FEW = [pytest.param(name, marks=[] if name in FAMILIES else pytest.mark.slow) for name in CASES]


def _bits(out):
    return {k: x.tobytes() for k, x in out.items()}


@pytest.mark.parametrize("name", NAMES)
def test_seven_rows_of_padding_change_no_bit(name):
    padded = solved(name, "solve-step", padding=7)
    assert _bits(padded) == _bits(solved(name, "solve-step", padding=0))


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("name", FEW)
def test_one_and_a_hundred_rows_of_padding_change_no_bit(name, rows):
    padded = solved(name, "solve-step", padding=rows)
    assert _bits(padded) == _bits(solved(name, "solve-step", padding=0))


@pytest.mark.parametrize("name", NAMES)
def test_the_masked_walk_is_the_unmasked_one(name):
    masked, bare = solved(name, "solve-step", padding=7), solved(name, "solve-step")
    assert largest_difference(masked, bare) < 1e-15


@pytest.mark.parametrize("checkpoints", ["sqrt", *(pytest.param(c, marks=pytest.mark.slow) for c in ("3", "None"))])
def test_padding_is_invisible_whatever_is_recomputed(checkpoints):
    padded = solved("ReversibleHeun", f"solve-{checkpoints}", padding=7)
    assert largest_difference(padded, solved("ReversibleHeun", "solve-step", padding=0)) < 1e-15


def test_float32_padding_changes_no_bit():
    bare = solved("ShARK", "solve-step", "float32", padding=0)
    assert _bits(solved("ShARK", "solve-step", "float32", padding=7)) == _bits(bare)
    assert all(x.dtype == np.float32 for x in bare.values())


@pytest.mark.parametrize(
    ("solver", "checkpoints"),
    [
        ("Euler", "sqrt"),
        pytest.param("Heun", "step", marks=pytest.mark.slow),
        pytest.param("ReversibleHeun", 2, marks=pytest.mark.slow),
    ],
)
def test_a_nested_scan_over_equal_intervals_is_the_flat_one(solver, checkpoints):
    # Equal numbers of steps in every interval are walked as a scan of scans; padding makes it one flat scan.
    case = CASES[solver]
    with jax.enable_x64(True):
        ts = np.array([0.0, 0.3, 1.0, 1.2, 1.5, 1.6])
        fine = sf.grids.subdivide(ts, 3)
        grid = sf.grids.Grid(*(np.asarray(x) for x in (fine.left, fine.right, fine.live, fine.save)))
        path = path_of(case, grid, "float64")

        def loss(y0, args, grid, path):
            equation = equation_of(case.noise, 1.1)
            adjoint = sf.adjoints.DiscreteAdjoint(checkpoints)
            sol = sf.solve(equation, y0, ts, args=args, grid=grid, path=path, solver=case.solver, adjoint=adjoint)
            return (jnp.cos(jnp.arange(6.0))[:, None] * sol.ys).sum(), sol.ys

        run = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        start = (jnp.array([0.3, 0.7]), jnp.array(0.7))
        nested = jax.jit(lambda: run(*start, grid, path))()
        flat = jax.jit(lambda grid, path: run(*start, grid, path))(grid, path)
    for a, b in zip(jax.tree.leaves(nested), jax.tree.leaves(flat)):
        np.testing.assert_allclose(a, b, rtol=1e-13)
