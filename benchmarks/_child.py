"""One figure from a fresh process, printed as a line of JSON: ``python -m benchmarks._child import NAME`` and
``python -m benchmarks._child compile IMPLEMENTATION [CACHE]``.

Imports and cold compiles can be measured only once in a process, and a persistent cache is for the next
process.
"""

import importlib
import json
import sys
import time


def _clock() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(start: tuple[float, float]) -> dict[str, float]:
    wall, cpu = _clock()
    return {"wall": wall - start[0], "cpu": cpu - start[1]}


def import_time(name: str) -> dict:
    """Seconds of ``import diffrax``, and of ``import name`` after it, in a process that has imported nothing."""
    start = _clock()
    importlib.import_module("diffrax")
    base = _since(start)
    start = _clock()
    importlib.import_module(name)
    return {"diffrax": base, "rest": _since(start)}


def compile_time(name: str, cache: str | None) -> dict:
    """Seconds to trace and to compile the medium value and gradient, and the files it left in the cache."""
    import os

    import jax

    if cache is None:
        jax.config.update("jax_enable_compilation_cache", False)
    else:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    from . import _peers as peers
    from . import _problems as problems

    size = problems.SIZES["medium"]
    # making the arguments starts the backend, so that the start is in nobody's time
    args = jax.block_until_ready(problems.make(size))
    options = {"remat": True} if name == "hand_draws" else {}
    fn = peers.program(getattr(peers, name), size, gradient=True, **options)
    before = len(os.listdir(cache)) if cache else 0
    start = _clock()
    lowered = jax.jit(fn).lower(*args)
    trace = _since(start)
    start = _clock()
    lowered.compile()
    out = {"trace": trace, "compile": _since(start)}
    if cache:
        out["stored"] = len(os.listdir(cache)) - before
    return out


if __name__ == "__main__":
    mode, name, *rest = sys.argv[1:]
    print(json.dumps(import_time(name) if mode == "import" else compile_time(name, *(rest or [None]))))
