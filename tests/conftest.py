"""What every test runs under: one compilation cache for all workers, slices of the slow tests, and 64-bit numbers."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

# Set in the environment, before jax is imported, so that the programs which tests start read the same cache.
_ENVIRONMENT = {
    "JAX_COMPILATION_CACHE_DIR": str(Path(__file__).resolve().parent.parent / ".jax_cache"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    # Every hit on the cache would log a screen about tuning flags that are not features of the host.
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
for _name, _value in _ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

import jax  # noqa: E402
import pytest  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--slow-slice 3/12``: the third of twelve slices of the slow tests, and nothing else."""
    parser.addoption("--slow-slice", metavar="K/N", help="run slice K of N of the slow tests alone, K from 1 to N")


def _slice_of(item: pytest.Item, count: int) -> int:
    """The slice of a test, by its file and its function, whose cases share what they compile."""
    name = item.nodeid.split("[", 1)[0]
    return int.from_bytes(hashlib.sha256(f"{_SALT}{name}".encode()).digest()[:8]) % count + 1


# Chosen so that the slices take about equally long.
_SALT = 11675


# Cases whose siblings are quick tests, and which take long; by their ids, as one case of many cannot carry a mark.
_SLOW_CASES = frozenset((Path(__file__).parent / "slow_cases.txt").read_text().splitlines())


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the slow cases, and keep the slow tests of the slice that was asked for."""
    for item in items:
        if item.nodeid in _SLOW_CASES:
            item.add_marker(pytest.mark.slow)
    asked = config.getoption("--slow-slice")
    if asked is None:
        return
    chosen, _, count = asked.partition("/")
    if not (chosen.isdecimal() and count.isdecimal() and 1 <= int(chosen) <= int(count)):
        raise pytest.UsageError(f"--slow-slice takes K/N with 1 <= K <= N, e.g. 3/12; got {asked!r}.")
    mine = [x.get_closest_marker("slow") is not None and _slice_of(x, int(count)) == int(chosen) for x in items]
    config.hook.pytest_deselected(items=[x for x, keep in zip(items, mine, strict=True) if not keep])
    items[:] = [x for x, keep in zip(items, mine, strict=True) if keep]


def pytest_configure(config: pytest.Config) -> None:
    """Let a torn cache entry be what it is: a miss."""
    # jax writes an entry in place, so a worker may read what another is still writing, or a killed one left.
    # It then compiles as if nothing had been there, and says so in a warning.
    config.addinivalue_line("filterwarnings", "ignore:Error (reading|writing) persistent compilation cache:UserWarning")


@pytest.fixture(scope="module", autouse=True)
def _programs_go_with_their_file() -> Iterator[None]:
    """Drop compiled programs after each file: each costs memory and maps, of which a process has few."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64() -> Iterator[None]:
    """64-bit numbers for one test, and what was there before when it ends."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)


@pytest.fixture(scope="module")
def x64_module() -> Iterator[None]:
    """64-bit numbers for a whole file, its module-scoped fixtures included: list it in ``pytestmark``."""
    before = jax.config.read("jax_enable_x64")
    jax.config.update("jax_enable_x64", True)
    try:
        yield
    finally:
        jax.config.update("jax_enable_x64", before)
