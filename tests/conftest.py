"""What every test runs under: one compilation cache for all workers, and a way to ask for 64-bit numbers."""

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
