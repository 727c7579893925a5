"""Claim: compiling is cheap, once for all processes, and importing adds little.

Every figure comes from a fresh process. The persistent compilation cache of JAX skips programs that call back
to the host; diffrax's defaults plant such calls, a default `sdeflow.solve` plants none.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from . import _harness as harness
from . import _problems as problems
from ._harness import Claim, Options, Row, Spread

HAND = "hand scan, rematerialised, draws its noise"
IMPLEMENTATIONS = {
    "sdeflow": "sdeflow",
    HAND: "hand_draws",
    "diffrax": "diffrax_default",
    "diffrax on sdeflow's path": "diffrax_our_path",
}


def run(options: Options) -> list[Claim]:
    """Measure the three targets: cached compile, cold compile, import."""
    measures = {"12a": _cached, "12b": _cold, "12c": _import}
    return [measure(options) for number, measure in measures.items() if options.wants(number)]


def child(*arguments: str) -> dict:
    """Run one measurement in a fresh interpreter.

    Raises:
        RuntimeError: if it fails, with the last line it wrote.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks._child", *arguments],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def _setting() -> str:
    return f"value and gradient, {problems.SIZES['medium']}"


def _repeats(name: str, options: Options) -> int:
    # a fresh process takes seconds; diffrax is measured once
    return 1 if options.quick or name not in ("sdeflow", HAND) else 3


def _cached(options: Options) -> Claim:
    def measure(name: str, implementation: str) -> Row:
        pairs = []
        for _ in range(_repeats(name, options)):
            with tempfile.TemporaryDirectory() as cache:
                pairs.append([child("compile", implementation, cache) for _ in range(2)])
        ratio = {c: Spread.of([b["compile"][c] / a["compile"][c] for a, b in pairs]) for c in ("wall", "cpu")}
        first, second = (statistics.median(p[i]["compile"]["cpu"] for p in pairs) for i in (0, 1))
        stored = pairs[0][0]["stored"]
        note = f"cpu {first:.2f} s, then {second:.2f} s; {stored} cache files after the first process"
        target = 0.1 if name == "sdeflow" else None
        return Row(name, ratio["wall"], ratio["cpu"], note=note, target=target, judged=("cpu",))

    rows = [harness.attempt(n, lambda n=n, i=i: measure(n, i)) for n, i in IMPLEMENTATIONS.items()]
    return Claim(
        "12a",
        "compile, second process / first",
        _setting(),
        "its own first process, empty cache directory",
        rows,
    )


def _cold(options: Options) -> Claim:
    taken: dict[str, list[dict]] = {}
    failed: dict[str, str] = {}
    for repeat in range(_repeats("sdeflow", options)):
        for name, implementation in IMPLEMENTATIONS.items():
            if name in failed or repeat >= _repeats(name, options):
                continue
            try:
                taken.setdefault(name, []).append(child("compile", implementation))
            except RuntimeError as error:
                failed[name] = f"failed: {error}"
    reference = taken[HAND]

    def total(figures: dict, column: str) -> float:
        return figures["trace"][column] + figures["compile"][column]

    def make(name: str) -> Row:
        target = 2.5 if name == "sdeflow" else None
        if name in failed:
            return Row(name, note=failed[name], target=target)
        ratio = {
            c: Spread.of([total(x, c) / total(r, c) for x, r in zip(taken[name], reference, strict=False)])
            for c in ("wall", "cpu")
        }
        seconds = {k: statistics.median(x[k]["wall"] for x in taken[name]) for k in ("trace", "compile")}
        cpu = statistics.median(total(x, "cpu") for x in taken[name])
        return Row(
            name,
            ratio["wall"],
            ratio["cpu"],
            trace_s=seconds["trace"],
            compile_s=seconds["compile"],
            note=f"trace and compile: {sum(seconds.values()):.2f} s wall, {cpu:.2f} s cpu",
            target=target,
        )

    return Claim(
        "12b",
        "cold trace and compile",
        _setting(),
        "the hand scan, rematerialised, that draws its noise; no cache",
        [make(name) for name in IMPLEMENTATIONS],
    )


def _import(options: Options) -> Claim:
    repeats = 3 if options.quick else max(options.pairs, 7)
    # both in one process: the difference of two processes is the same figure with the noise of two diffrax imports
    taken = [child("import", "sdeflow") for _ in range(repeats)]
    rest = {column: Spread.of([figures["rest"][column] for figures in taken]) for column in ("wall", "cpu")}
    base = {column: statistics.median(figures["diffrax"][column] for figures in taken) for column in ("wall", "cpu")}
    note = f"import diffrax itself: {base['wall']:.2f} s wall, {base['cpu']:.2f} s cpu"
    return Claim(
        "12c",
        "import sdeflow minus import diffrax, seconds",
        f"{repeats} fresh processes, each imports diffrax, then sdeflow",
        "nothing: the figures are seconds that sdeflow adds",
        [Row("sdeflow", rest["wall"], rest["cpu"], note=note, target=0.15)],
    )
