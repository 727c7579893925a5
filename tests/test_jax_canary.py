"""Faults of jax releases that reach this package: each would make all other tests meaningless or slow."""

import re
import tomllib
import warnings
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdeflow._compat import _BAD_JAX, SdeflowWarning, warn_if_bad_jax

# ---- A vmapped matrix-vector product, then a sum: wrong on CPU in jax 0.10.2, for a window of sizes. ----


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [16_385, 32_769, 40_000])
def test_matvec_then_sum_agrees_with_numpy(n, dtype):
    # jax 0.10.2 gets 0, 1, 7232 rows wrong in float32 and 1, 16385, 23616 in float64, grossly so.
    rng = np.random.default_rng(0)
    matrix, rows = rng.normal(size=(3, 3)).astype(dtype), rng.normal(size=(n, 3)).astype(dtype)
    got = jax.jit(jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2)))(rows)
    assert got.dtype == dtype
    want = ((rows.astype(np.float64) @ matrix.T.astype(np.float64)) ** 2).sum(axis=1)
    # Three roundings of each of nine products; the condition number of a square is 2.
    np.testing.assert_allclose(got, want, rtol=64 * np.finfo(dtype).eps, atol=64 * np.finfo(dtype).eps)


# ---- A loop that saves one row a step must not touch the other rows. ----
# This reads the compiled program, so it sees the copies that a program asks for. What jax 0.11.1 does (65536
# rows take 1700 ms, elsewhere 1.3) happens inside one instruction and shows in no text; it is refused
# by name.

_ROWS = 1031  # a prime, so that no other array of the program has this length by chance
# What may yield an array as long as the buffer without touching its rows one by one.
_FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "call", "conditional"}
_ONE_ROW = "dynamic-update-slice"


def _computations(compiled_text: str) -> dict[str, list[str]]:
    """The instructions of each computation of a compiled program, by the computation's name."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in compiled_text.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line)
        if head:
            lines = found[head.group(1)] = []
        elif " = " in line:
            lines.append(line.strip())
    return found


def _called(instruction: str) -> list[str]:
    """The computations that an instruction names."""
    named = re.findall(r"(?:calls|to_apply|body|condition|\w+_computation)=%?([\w.\-]+)", instruction)
    branches = re.findall(r"branch_computations=\{([^}]*)\}", instruction)
    return named + [name.strip().lstrip("%") for group in branches for name in group.split(",")]


def _inside_loops(computations: dict[str, list[str]]) -> set[str]:
    """The names of the computations that run once a round of some loop."""
    every = [line for lines in computations.values() for line in lines]
    pending = [body for line in every for body in re.findall(r"body=%?([\w.\-]+)", line)]
    assert pending, "the program has no loop"
    reached: set[str] = set()
    while pending:
        name = pending.pop()
        if name not in reached:
            reached.add(name)
            # What a fusion does inside is judged by what it yields.
            outer = [line for line in computations[name] if " fusion(" not in line]
            pending += [callee for line in outer for callee in _called(line)]
    return reached


def _work_on_the_whole_buffer(compiled_text: str) -> list[str]:
    """The instructions that, every round of a loop, compute or copy an array as long as the buffer."""
    computations = _computations(compiled_text)
    found = []
    for line in [line for name in _inside_loops(computations) for line in computations[name]]:
        made = re.search(rf" = \w+\[{_ROWS}\b[\d,]*\](?:\{{[^}}]*\}})? ([\w\-]+)\(", line)
        kind = made.group(1) if made else "tuple"
        if kind == "fusion":
            (root,) = [inner for inner in computations[_called(line)[0]] if inner.startswith("ROOT")]
            kind = _ONE_ROW if f" {_ONE_ROW}(" in root else "fusion"
        if kind not in _FREE | {_ONE_ROW}:
            found.append(line)
    return found


def _text(fn, *args) -> str:
    return jax.jit(fn).lower(*args).compile().as_text()


def _scan(step):
    start = (jnp.ones(4), jnp.zeros((_ROWS, 4)), jnp.ones((_ROWS, 4)))
    return lambda: jax.lax.scan(step, start, jnp.arange(_ROWS))[0][1:]


def _writes_a_row(carry, i):
    y, buffer, other = carry
    return (0.99 * y, buffer.at[i].set(y), other), None


def _keeps_the_previous_buffer(carry, i):
    y, buffer, _ = carry
    return (0.99 * y, buffer.at[i].set(y), buffer), None


def _decays_the_buffer(carry, i):
    y, buffer, other = carry
    return (0.99 * y, (0.99 * buffer).at[i].set(y), other), None


def test_a_scan_writes_one_row_a_step():
    assert _work_on_the_whole_buffer(_text(_scan(_writes_a_row))) == []


@pytest.mark.parametrize("step", [_keeps_the_previous_buffer, _decays_the_buffer])
def test_the_check_sees_work_on_the_whole_buffer(step):
    assert _work_on_the_whole_buffer(_text(_scan(step))) != []


def test_a_diffrax_solve_writes_one_row_a_saved_time():
    def solve(ts):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, args: -y),
            diffrax.Heun(),
            ts[0],
            ts[-1],
            0.01,
            jnp.ones(4),
            saveat=diffrax.SaveAt(ts=ts),
            max_steps=2 * _ROWS,
            throw=False,
        ).ys

    assert _work_on_the_whole_buffer(_text(solve, jnp.linspace(0.0, 10.0, _ROWS))) == []


# ---- Releases that must not be used. ----


@pytest.mark.parametrize("version", ["0.10.2", "0.11.0", "0.11.1"])
def test_a_bad_release_warns_with_the_way_out(version):
    with pytest.warns(SdeflowWarning, match=rf"jax {re.escape(version)} .*pip install"):
        warn_if_bad_jax(version)


@pytest.mark.parametrize("version", ["0.10.0", "0.10.1", "0.11.2", "0.12.0.1", jax.__version__])
def test_a_good_release_is_silent(version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_bad_jax(version)


def test_pyproject_excludes_the_releases_that_warn():
    root = Path(__file__).resolve().parent.parent
    wanted = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    (jax_line,) = [line for line in wanted if line.startswith("jax>")]
    assert set(re.findall(r"!=([\d.]+)", jax_line)) == set(_BAD_JAX)
