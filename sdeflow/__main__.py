"""``python -m sdeflow demo`` shows what the package does; ``python -m sdeflow info`` says what it runs on."""

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from . import _demo
from ._compat import _BAD_JAX

_PACKAGES = ("sdeflow", "jax", "jaxlib", "diffrax", "equinox", "optax", "numpy")
_OWN = ("data", "time", "rep", "label")
# Sizes for which jax 0.10.2 gets rows wrong on CPU.
_CANARY_ROWS = (32_769, 40_000)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0, or 1 if ``info`` finds a fault."""
    parser = argparse.ArgumentParser(prog="python -m sdeflow", description="Differentiable SDE and ODE solving.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="train a model, score it and draw what it does")
    demo.add_argument("--job", choices=sorted(_demo.JOBS), default="series", help="what to show")
    demo.add_argument("--out", type=Path, default=Path("demo-output"), help="the directory of the figure")
    demo.add_argument("--seed", type=int, default=2, help="the seed of everything random (2: a typical one)")
    demo.add_argument("--quick", action="store_true", help="a few steps on a small simulated data set")
    own = demo.add_argument_group("your own cells, for --job bridges")
    own.add_argument("--data", type=Path, help="an AnnData file (.h5ad), which is left as it is")
    own.add_argument("--time", help='the column of obs with the time of each cell ("day")')
    own.add_argument("--rep", help='the entry of obsm to work in ("X_pca")')
    own.add_argument("--label", help="the column of obs with the type of each cell, for fates")
    commands.add_parser("info", help="versions, devices, and whether the installed jax computes what it should")
    chosen = parser.parse_args(argv)
    if chosen.command == "info":
        return info()
    given = {name: value for name in _OWN if (value := getattr(chosen, name)) is not None}
    if given and chosen.job != "bridges":
        demo.error(f"--{next(iter(given))} goes with --job bridges.")
    if given and "data" not in given:
        demo.error(f"--{next(iter(given))} says what is in a file; name the file, --data.")
    keep_programs()
    try:
        for line in _demo.JOBS[chosen.job](chosen.out, seed=chosen.seed, quick=chosen.quick, **given):
            print(line, flush=True)
    except _demo.InputError as error:
        demo.exit(2, f"{error}\n")
    return 0


def keep_programs() -> None:
    """Keep compiled programs on disk for the next process, unless a place for them, or none, has been chosen."""
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdeflow"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def info() -> int:
    """Print what this installation runs on; 1 if a fault of the installed jax is known or seen, else 0."""
    versions = {name: _version(name) for name in _PACKAGES} | {"python": platform.python_version()}
    bad = _BAD_JAX.get(jax.__version__)
    wrong = {rows: wrong_rows(rows) for rows in _CANARY_ROWS}
    seen = "; ".join(f"{count} of {rows} rows are wrong" for rows, count in wrong.items() if count)
    for name, version in versions.items():
        print(f"{name}: {version}")
    print(f"devices: {', '.join(str(device) for device in jax.devices())}")
    print(f"64-bit numbers: {'on' if jax.config.read('jax_enable_x64') else 'off'}")
    print(f"known faults of this jax: {bad or 'none'}")
    print(f"canary: {seen or 'okay'}")
    return 1 if bad or seen else 0


def wrong_rows(rows: int) -> int:
    """How many rows of a jitted, vmapped matrix-vector product and sum disagree with NumPy, in float32."""
    rng = np.random.default_rng(0)
    matrix, points = rng.normal(size=(3, 3)).astype(np.float32), rng.normal(size=(rows, 3)).astype(np.float32)
    got = np.asarray(jax.jit(jax.vmap(lambda r: jnp.sum((matrix @ r) ** 2)))(points))
    want = ((points.astype(np.float64) @ matrix.T.astype(np.float64)) ** 2).sum(axis=1)
    return rows - int((np.abs(got - want) <= 1e-5 * (1 + want)).sum())


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    sys.exit(main())
