"""The walk is diffrax's own loop: on one path, values and every gradient are those of ``diffeqsolve``."""

import numpy as np
import pytest
from helpers.battery import CASES, DEFAULT, DT0, SLOW, TS, largest_difference, solved

import sdeflow as sf

EVERY = DEFAULT + [pytest.param(name, marks=pytest.mark.slow) for name in SLOW]
# Those left to the slow run are of the family of another one.
AKIN = ("EulerHeun", "Midpoint", "SRA1", *SLOW)
FAMILIES = [pytest.param(name, marks=[pytest.mark.slow] * (name in AKIN)) for name in CASES]
# The policies that recompute segments are tried by default on one solver of each family.
SOME = {("Heun", "sqrt"), ("ShARK", "3"), ("Euler", "None")}
POLICIES = [
    pytest.param(name, policy, marks=[] if (name, policy) in SOME else pytest.mark.slow)
    for name in CASES
    for policy in ("sqrt", "None", "3")
]


def test_the_battery_takes_a_prime_number_of_steps_and_unequal_intervals():
    assert np.diff(sf.grids.through(TS, DT0).save).tolist() == [3, 6, 2]


@pytest.mark.parametrize("name", EVERY)
def test_solve_equals_diffeqsolve_in_value_and_gradient(name):
    assert largest_difference(solved(name, "solve-step"), solved(name, "diffrax-forward")) < 1e-12


@pytest.mark.parametrize("name", FAMILIES)
def test_our_adjoint_inside_diffeqsolve_equals_diffrax_in_value_and_gradient(name):
    assert largest_difference(solved(name, "inside-step"), solved(name, "diffrax-forward")) < 1e-12


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "Euler" else pytest.mark.slow) for name in CASES]
)
def test_gradients_equal_those_of_diffrax_s_own_checkpoints(name):
    reference = solved(name, "diffrax")
    assert largest_difference(solved(name, "solve-step"), reference) < 1e-12
    assert largest_difference(solved(name, "inside-step"), reference) < 1e-12


@pytest.mark.parametrize("name", EVERY)
def test_every_gradient_of_the_battery_is_alive(name):
    out = solved(name, "solve-step")
    assert all(np.abs(out[k]).min() > 1e-3 for k in out if k != "ys")


@pytest.mark.parametrize(("name", "policy"), POLICIES)
def test_checkpoints_change_memory_and_no_number(name, policy):
    reference = solved(name, "solve-step")
    assert largest_difference(solved(name, f"solve-{policy}"), reference) < 1e-12


@pytest.mark.parametrize(
    ("name", "policy"),
    [pytest.param(*p.values, marks=[] if p.values == ("Heun", "sqrt") else pytest.mark.slow) for p in POLICIES],
)
def test_checkpoints_change_no_number_inside_diffeqsolve(name, policy):
    assert largest_difference(solved(name, f"inside-{policy}"), solved(name, "solve-step")) < 1e-12


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "Euler" else pytest.mark.slow) for n in CASES])
def test_float32_stays_float32_and_equals_diffeqsolve(name):
    reference, ours = solved(name, "diffrax-forward", "float32"), solved(name, "solve-step", "float32")
    assert all(x.dtype == np.float32 for x in ours.values())
    assert largest_difference(ours, reference) < 1e-5
    exact = solved(name, "solve-step")
    for field, value in ours.items():
        np.testing.assert_allclose(value, exact[field], rtol=0, atol=2e-5 * np.abs(exact[field]).max())
