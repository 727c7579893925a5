"""Paired timing, compiled once, and the table that is printed.

Every figure is a ratio. A pair times the reference and the method one after the other in the same process;
the order flips from pair to pair, and the median of the ratios of the pairs is reported with their smallest
and largest. Other load on the machine then hits both sides alike. Wall time and CPU time are both shown: with
several threads spinning they can tell different stories.
"""

import collections
import dataclasses
import math
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Options:
    """How a run measures: the least number of pairs per row, seconds in a timed block, what is left out.

    Rows whose pairs are short take more of them, up to five times as many, to fill ``span`` seconds.
    """

    pairs: int = 7
    block: float = 0.02
    span: float = 2.0
    quick: bool = False
    full: bool = False
    torch: bool = True
    only: frozenset[str] = frozenset()

    def wants(self, number: str) -> bool:
        """Whether the claim of this number is to be measured: all are unless some were named."""
        return not self.only or number in self.only


@dataclasses.dataclass(frozen=True)
class Spread:
    """The median of some figures, with the smallest and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, figures: Sequence[float]) -> "Spread":
        """Summarise ``figures``.

        Example:
            >>> Spread.of([1.0, 3.0, 2.0])
            Spread(median=2.0, low=1.0, high=3.0)
        """
        return cls(statistics.median(figures), min(figures), max(figures))

    def __format__(self, spec: str) -> str:
        return f"{_short(self.median):>6} [{_short(self.low)}-{_short(self.high)}]"


@dataclasses.dataclass(frozen=True)
class Method:
    """Something to time: ``call`` runs it once and returns when the result is there.

    ``trace_s`` and ``compile_s`` are what it cost to get ready, ``temp_mb`` the temporary memory of the compiled
    program in megabytes, ``loop_ops`` what its loops execute per trip; None or empty where they do not apply.
    """

    name: str
    call: Callable[[], Any]
    note: str = ""
    trace_s: float | None = None
    compile_s: float | None = None
    temp_mb: float | None = None
    loop_ops: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table. ``target`` bounds the columns named in ``judged`` from above, by their medians.

    ``more`` are columns of a part's own, by their names.
    """

    method: str
    wall: Spread | None = None
    cpu: Spread | None = None
    ms: float | None = None
    trace_s: float | None = None
    compile_s: float | None = None
    temp_mb: float | None = None
    loop_ops: str = ""
    note: str = ""
    target: float | None = None
    judged: tuple[str, ...] = ("wall", "cpu")
    more: dict[str, Spread] = dataclasses.field(default_factory=dict)

    def figure(self, column: str) -> float | None:
        """What is judged of a column: the median where there is a spread."""
        value = self.more[column] if column in self.more else getattr(self, column, None)
        return value.median if isinstance(value, Spread) else value

    @property
    def verdict(self) -> str:
        """PASS or MISS per judged column; empty without a target. A row that could not be measured misses."""
        if self.target is None:
            return ""
        words = []
        for column in self.judged:
            figure = self.figure(column)
            met = figure is not None and figure <= self.target
            words.append(f"{column} {'PASS' if met else 'MISS'}")
        return ", ".join(words)


@dataclasses.dataclass(frozen=True)
class Within(Row):
    """A figure that has to lie between two bounds."""

    value: float = 0.0
    bounds: tuple[float, float] = (0.0, 0.0)

    @property
    def verdict(self) -> str:
        """PASS or MISS; empty where nothing is asked for."""
        low, high = self.bounds
        return "" if low == high else ("PASS" if low <= self.value <= high else "MISS")


def line(name: str, value: float, bounds: tuple[float, float], note: str = "") -> Within:
    """One figure."""
    asked = "" if bounds[0] == bounds[1] else f"{bounds[0]:g} to {bounds[1]:g}"
    more = {"value": Spread.of([value])}
    return Within(name, note="; ".join(x for x in (asked, note) if x), more=more, value=value, bounds=bounds)


@dataclasses.dataclass(frozen=True)
class Claim:
    """One numbered claim: title, problem, what its ratios are relative to, rows.

    ``floor`` is the reference timed against itself: how far from 1 a ratio of equal programs came out.
    """

    number: str
    title: str
    setting: str
    relative_to: str
    rows: list[Row]
    remarks: list[str] = dataclasses.field(default_factory=list)
    floor: Row | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain nested dictionaries for a JSON file, verdicts included."""
        out = dataclasses.asdict(self)
        for row, plain in zip(self.rows, out["rows"], strict=True):
            plain["verdict"] = row.verdict
        return out


def compiled(name: str, fn: Callable, args: Sequence[Any], note: str = "") -> Method:
    """Trace and compile ``fn`` for ``args``, timing both, and make one warm call.

    All of ``args`` are arguments of the compiled program, the random key too: a key inside the closure would
    let XLA draw the noise while it compiles.
    """
    start = time.perf_counter()
    lowered = jax.jit(fn).lower(*args)
    traced = time.perf_counter()
    program = lowered.compile()
    done = time.perf_counter()
    memory = program.memory_analysis()
    method = Method(
        name,
        lambda: jax.block_until_ready(program(*args)),
        note=note,
        trace_s=traced - start,
        compile_s=done - traced,
        temp_mb=None if memory is None else memory.temp_size_in_bytes / 1e6,
        loop_ops=loop_ops(program.as_text() or ""),
    )
    method.call()
    return method


_FREE = {"tuple", "get-tuple-element", "parameter", "constant", "bitcast", "after-all"}


def loop_ops(program: str) -> str:
    """How many instructions that do work the body of each loop of an optimised program holds, the longest first.

    Unlike a time it does not depend on the load of the machine. Loops inside the random number generator count too.

    Arguments:
        program: the text of the compiled program.

    Example:
        >>> import jax
        >>> once = lambda y, _: (2 * y, None)
        >>> loop_ops(jax.jit(lambda y: jax.lax.scan(once, y, None, 5)).lower(1.0).compile().as_text())
        '2'
    """
    counts: dict[str, int] = {}
    name = None
    for line in program.splitlines():
        head = re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line)
        work = re.match(r"\s+(?:ROOT )?%?[\w.\-]+ = .*? ([a-z][\w\-]*)\(", line)
        if head:
            name = head.group(1)
        elif work and name and work.group(1) not in _FREE:
            counts[name] = counts.get(name, 0) + 1
    bodies = set(re.findall(r"body=%?([\w.\-]+)", program))
    sizes = collections.Counter(counts.get(body, 0) for body in bodies)
    return "+".join(f"{size}" if n == 1 else f"{n}x{size}" for size, n in sorted(sizes.items(), reverse=True))


def _repeats(call: Callable[[], Any], block: float) -> int:
    call()
    start = time.perf_counter()
    call()
    once = time.perf_counter() - start
    if once < block / 10:
        # one call of a fraction of a millisecond is too noisy to calibrate on
        count = max(3, math.ceil(block / 10 / max(once, 1e-7)))
        start = time.perf_counter()
        for _ in range(count):
            call()
        once = (time.perf_counter() - start) / count
    return max(1, math.ceil(block / once))


def _timed(call: Callable[[], Any], repeats: int) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats


def _go_on(done: int, seconds: float, options: Options) -> bool:
    return done < options.pairs or (done < 5 * options.pairs and seconds < options.span)


def compare(reference: Method, method: Method, options: Options) -> tuple[Spread, Spread, float]:
    """Time ``method`` against ``reference`` in pairs.

    Returns the wall ratios, the CPU ratios, and the median wall time of one call of ``method`` in
    milliseconds.
    """
    sides = (reference, method)
    repeats = [_repeats(side.call, options.block) for side in sides]
    walls, cpus, times = [], [], []
    start = time.perf_counter()
    while _go_on(len(walls), time.perf_counter() - start, options):
        pair = len(walls)
        order = (0, 1) if pair % 2 == 0 else (1, 0)
        took: dict[int, tuple[float, float]] = {}
        for side in order:
            took[side] = _timed(sides[side].call, repeats[side])
        walls.append(took[1][0] / took[0][0])
        cpus.append(took[1][1] / took[0][1])
        times.append(took[1][0])
    return Spread.of(walls), Spread.of(cpus), 1e3 * statistics.median(times)


def row(reference: Method, method: Method, options: Options, target: float | None = None) -> Row:
    """The line of ``method`` beside ``reference``."""
    wall, cpu, ms = compare(reference, method, options)
    return Row(
        method.name,
        wall,
        cpu,
        ms,
        trace_s=method.trace_s,
        compile_s=method.compile_s,
        temp_mb=method.temp_mb,
        loop_ops=method.loop_ops,
        note=method.note,
        target=target,
    )


def attempt(name: str, make: Callable[[], Row], target: float | None = None) -> Row:
    """Run ``make``; a failure becomes a line that says so, and the report goes on.

    The traceback goes to standard error, so that a row of ours that fails does not pass unnoticed.
    """
    try:
        return make()
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        first = str(error).strip().splitlines() or [""]
        return Row(name, note=f"failed: {type(error).__name__}: {first[0][:120]}", target=target)


def _short(x: float) -> str:
    if x != x:
        return "nan"
    if 0 < abs(x) < 1e-3:
        return f"{x:.0e}".replace("e-0", "e-")
    if abs(x) >= 100:
        return f"{x:.0f}"
    if abs(x) >= 10:
        return f"{x:.1f}"
    return f"{x:.2f}" if abs(x) >= 0.1 else f"{x:.3f}"


_COLUMNS = (
    "method", "wall", "cpu", "ms", "trace s", "compile s", "temp MB", "loop ops", "target", "verdict", "note"
)  # fmt: skip


def table(claim: Claim) -> str:
    """The claim as text: a heading, one line a row, the remarks below."""
    lines = []
    own = list(dict.fromkeys(name for r in claim.rows for name in r.more))
    columns = (*_COLUMNS[:1], *own, *_COLUMNS[1:])
    for r in claim.rows:
        cells = [r.method]
        cells += ["" if s is None else f"{s}" for s in (*(r.more.get(name) for name in own), r.wall, r.cpu)]
        cells += ["" if x is None else _short(x) for x in (r.ms, r.trace_s, r.compile_s, r.temp_mb)]
        cells += [r.loop_ops, "" if r.target is None else f"<= {r.target:g}", r.verdict, r.note]
        lines.append(cells)
    used = [i for i, name in enumerate(columns) if name in ("method", "note") or any(cells[i] for cells in lines)]
    widths = {i: max(len(columns[i]), *(len(cells[i]) for cells in lines)) for i in used}
    rows = [
        "  ".join(cells[i].ljust(widths[i]) for i in used).rstrip()
        for cells in [list(columns), ["-" * widths.get(i, 0) for i in range(len(columns))], *lines]
    ]
    heading = f"[{claim.number}] {claim.title}"
    return "\n".join(
        [heading, f"    {claim.setting}", f"    ratios relative to: {claim.relative_to}"]
        + ["    " + line for line in rows]
        + [f"    * {remark}" for remark in claim.remarks]
    )


def summary(claims: Sequence[Claim]) -> str:
    """One line per target: claim, medians, bound, verdict, and the noise floor they are to be read against."""
    lines = []
    for claim in claims:
        for r in claim.rows:
            if r.target is not None:
                medians = ", ".join(
                    f"{column} {_short(figure)}" for column in r.judged if (figure := r.figure(column)) is not None
                )
                what = f"[{claim.number}] {claim.title}"
                what += "" if r.method == "sdeflow" else f": {r.method}"
                floor = claim.floor
                noise = "" if floor is None else f"limit / itself: wall {floor.wall}, cpu {floor.cpu}"
                lines.append((what, medians or "not measured", f"<= {r.target:g}", r.verdict, noise))
    if not lines:
        return "no targets were measured"
    widths = [max(len(line[i]) for line in lines) for i in range(5)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
