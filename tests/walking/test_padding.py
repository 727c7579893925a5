"""Padding is invisible, bit for bit: in the states, and in every gradient."""

import numpy as np
import pytest
from helpers.battery import CASES, DEFAULT, SLOW, largest_difference, solved

NAMES = DEFAULT + [pytest.param(name, marks=pytest.mark.slow) for name in SLOW]
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


@pytest.mark.parametrize("checkpoints", ["sqrt", "3", pytest.param("None", marks=pytest.mark.slow)])
def test_padding_is_invisible_whatever_is_recomputed(checkpoints):
    padded = solved("ReversibleHeun", f"solve-{checkpoints}", padding=7)
    assert largest_difference(padded, solved("ReversibleHeun", "solve-step", padding=0)) < 1e-15


def test_float32_padding_changes_no_bit():
    bare = solved("ShARK", "solve-step", "float32", padding=0)
    assert _bits(solved("ShARK", "solve-step", "float32", padding=7)) == _bits(bare)
    assert all(x.dtype == np.float32 for x in bare.values())
