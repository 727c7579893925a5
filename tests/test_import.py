"""What `import sdeflow` touches: no extras, no warnings, no device, nothing that `-O` would strip."""

import json
import os
import subprocess
import sys

import pytest

_EXTRAS = ["anndata", "beartype", "jaxopt", "matplotlib", "ott", "pandas", "torch", "tqdm"]


def _run(code: str, *flags: str) -> str:
    """The standard output of a fresh interpreter, which must end well and say nothing on standard error."""
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def _rooms() -> str:
    """Code that imports the package and every public room of it."""
    return (
        "import importlib, pkgutil, sdeflow\n"
        "rooms = [m.name for m in pkgutil.iter_modules(sdeflow.__path__) if not m.name.startswith('_')]\n"
        "for room in rooms: importlib.import_module('sdeflow.' + room)\n"
    )


def test_the_package_brings_in_no_extra():
    code = "import json, sys, sdeflow; print(json.dumps(sorted(sys.modules)))"
    modules = set(json.loads(_run(code)))
    assert "diffrax" in modules
    assert sorted(modules & set(_EXTRAS)) == []


def test_every_room_imports_without_the_extras():
    missing = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {_EXTRAS!r}: raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
    )
    assert int(_run(missing + _rooms() + "print(len(rooms))")) >= 1


@pytest.mark.parametrize("flags", [["-W", "error"], ["-O"], ["-OO"]], ids=" ".join)
def test_every_room_imports_under(flags):
    assert int(_run(_rooms() + "print(len(rooms))", *flags)) >= 1


def test_no_message_is_lost_under_optimisation():
    # `assert` is stripped by -O: what users are told must not depend on it.
    code = (
        "import sdeflow\n"
        "try:\n"
        "    sdeflow.solve(sdeflow.ODE(lambda t, y, args: -y), 1.0, [0.0, 1.0], dt0=0.0)\n"
        "except ValueError as error:\n"
        "    print('dt0' in str(error))\n"
    )
    assert _run(code, "-O").strip() == "True"


def test_importing_starts_no_backend():
    # A user may still choose the platform or the number of devices after the import.
    code = (
        _rooms()
        + "import jax\n"
        + "jax.config.update('jax_platforms', 'cpu')\n"
        + "jax.config.update('jax_num_cpu_devices', 2)\n"
        + "print(jax.device_count())"
    )
    assert int(_run(code)) == 2
