"""The laws of the house that a reader would otherwise have to check by eye."""

import ast
import functools
import importlib
import inspect
import pkgutil
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

import sdeflow

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = sorted((ROOT / "sdeflow").rglob("*.py"))
SOURCES = MODULES + sorted(
    path for folder in ("tests", "benchmarks", "examples", "docs") for path in (ROOT / folder).rglob("*.py")
)
# Where the private parts of other packages may be used.
_COMPAT = ROOT / "sdeflow" / "_compat.py"
_PROPERTIES = (property, functools.cached_property)


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


# ---- Public names. ----


def _public_modules() -> list[Any]:
    """The package, its rooms, and the public modules inside them."""
    found, pending = [], [sdeflow]
    while pending:
        module = pending.pop()
        found.append(module)
        names = [info.name for info in pkgutil.iter_modules(getattr(module, "__path__", []))]
        pending += [importlib.import_module(f"{module.__name__}.{name}") for name in names if not name.startswith("_")]
    return found


def _public_objects() -> dict[str, Any]:
    """Every public class and function of the package, once, by the longest name that reaches it."""
    found: dict[int, tuple[str, Any]] = {}
    for module in _public_modules():
        for name, value in vars(module).items():
            ours = str(getattr(value, "__module__", "")).split(".")[0] == "sdeflow"
            if not name.startswith("_") and ours and callable(value):
                full = f"{module.__name__}.{name}"
                found[id(value)] = max(found.get(id(value), ("", None)), (full, value), key=lambda x: len(x[0]))
    return dict(sorted(found.values(), key=lambda x: x[0]))


PUBLIC = _public_objects()


def _public_methods(cls: type) -> dict[str, Any]:
    """What a class adds under a public name; what it overrides of a foreign class is described there."""
    foreign = [base for base in cls.__mro__ if not base.__module__.startswith("sdeflow")]
    values = {
        name: inspect.getattr_static(cls, name)
        for name in vars(cls)
        if not name.startswith("_") and not any(hasattr(base, name) for base in foreign)
    }
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, _PROPERTIES) or inspect.isroutine(getattr(cls, name))
    }


def _unannotated(call: Any) -> list[str]:
    parameters = inspect.signature(call).parameters.values()
    return [p.name for p in parameters if p.annotation is inspect.Parameter.empty and p.name not in ("self", "cls")]


def test_there_are_public_names():
    assert {"sdeflow.equations.SDE", "sdeflow.solving.solve", "sdeflow.grids.Grid"} <= set(PUBLIC)


def test_every_name_that_a_module_lists_is_there():
    missing = [
        f"{module.__name__}.{name}"
        for module in _public_modules()
        for name in dir(module)
        if not name.startswith("_") and not _has(module, name)
    ]
    assert missing == []


def _has(module: Any, name: str) -> bool:
    # Not `hasattr`: a room that is imported on first use may fail with another error than AttributeError.
    try:
        getattr(module, name)
    except (AttributeError, ImportError):
        return False
    return True


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_says_what_it_is(name):
    thing = PUBLIC[name]
    text = thing.__doc__ or ""
    short = thing.__name__
    # A dataclass without a docstring gets its signature for one.
    assert text.strip(), f"{name} has no docstring"
    assert not text.startswith(f"{short}("), f"{name} has no docstring of its own"
    if inspect.isclass(thing):
        silent = [method for method in _public_methods(thing) if not inspect.getdoc(getattr(thing, method))]
        assert silent == [], f"{name} has methods without a docstring"


@pytest.mark.parametrize("name", PUBLIC)
def test_the_arguments_of_a_public_name_are_annotated(name):
    thing = PUBLIC[name]
    if inspect.isclass(thing):
        bare = {
            method: _unannotated(getattr(thing, method))
            for method, value in _public_methods(thing).items()
            if not isinstance(value, _PROPERTIES)
        }
        bare["__init__"] = _unannotated(thing.__init__) if "__init__" in vars(thing) else []
    else:
        bare = {"call": _unannotated(thing)}
    assert {method: names for method, names in bare.items() if names} == {}


def _described(thing: Any) -> list[str]:
    """The names under the heading ``Arguments:`` of a docstring."""
    section = re.search(r"^Arguments:\n((?: +.*\n|\n)+)", inspect.cleandoc(thing.__doc__ or "") + "\n", re.MULTILINE)
    lines = re.findall(r"^    ([\w*, ]+):", section.group(1), re.MULTILINE) if section else []
    return [name.strip(" *") for line in lines for name in line.split(",")]


@pytest.mark.parametrize("name", PUBLIC)
def test_the_arguments_that_are_described_exist(name):
    thing = PUBLIC[name]
    calls = {"": thing} | (_public_methods(thing) if inspect.isclass(thing) else {})
    unknown = {}
    for method, call in calls.items():
        call = getattr(call, "__func__", call)
        if described := _described(call):
            # A class may describe its properties beside its fields.
            known = {*inspect.signature(call).parameters, *(vars(call) if call is thing else ())}
            unknown[method] = set(described) - known
    assert {method: names for method, names in unknown.items() if names} == {}


# ---- Files. ----


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_a_module_says_what_it_is(path):
    assert ast.get_docstring(_tree(path)), "the file has no module docstring"


def _imports(tree: ast.Module) -> list[str]:
    """Absolute dotted names that a file imports, `from a import b` as a.b."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("path", [path for path in MODULES if path != _COMPAT], ids=_name)
def test_private_parts_of_other_packages_stay_in_compat(path):
    private = [name for name in _imports(_tree(path)) if re.search(r"\._(?!_)|^equinox\.internal", name)]
    assert private == [], "reach for it through sdeflow/_compat.py, with a contract test"


@pytest.mark.parametrize("path", [path for path in MODULES if path.name != "__main__.py"], ids=_name)
def test_a_room_does_not_import_the_whole_package(path):
    # It would be circular, and the check on the order of the rooms sees only imports that name a room.
    assert [name for name in _imports(_tree(path)) if name.split(".")[0] == "sdeflow"] == []


def _tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("only a checkout knows which files are tracked")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and b"\0" not in path.read_bytes()]


def test_no_file_names_a_machine_or_leaves_work_behind():
    machine = re.compile(r"(?<![\w.:/*-])/(?:work|tmp|root|home)/")
    unfinished = re.compile(r"\b(?:TO" r"DO|FIX" r"ME|XX" r"X)\b")
    found = [
        f"{_name(path)}:{number}: {line.strip()[:100]}"
        for path in _tracked()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if machine.search(line) or unfinished.search(line)
    ]
    assert found == []


# ---- What is said in two places is the same. ----


def test_the_version_is_said_once():
    version = PROJECT["version"]
    assert sdeflow.__version__ == version
    assert re.search(rf"^## \[?{re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_citation_is_complete_and_agrees_with_pyproject():
    lines = (ROOT / "CITATION.cff").read_text().splitlines()
    top = dict(line.split(":", 1) for line in lines if re.match(r"[a-z][\w-]*:", line))
    value = {key: text.strip().strip('"') for key, text in top.items()}
    assert {"cff-version", "message", "title", "type", "authors", "version", "license", "abstract"} <= set(value)
    assert value["cff-version"] == "1.2.0"
    assert value["title"].split(":")[0] == PROJECT["name"]
    assert value["version"] == PROJECT["version"]
    assert value["license"] == PROJECT["license"]
    assert not any("\t" in line for line in lines), "YAML does not allow tabs"


def test_every_extra_that_make_installs_exists():
    used = re.findall(r'-e "\.\[([\w,-]+)\]"', (ROOT / "Makefile").read_text())
    assert used
    assert {extra for group in used for extra in group.split(",")} <= set(PROJECT["optional-dependencies"])


def test_make_installs_the_speech_data_that_the_extra_names():
    (pin,) = [line for line in PROJECT["optional-dependencies"]["examples"] if line.startswith("aeon")]
    assert set(re.findall(r'"(aeon[^"]*)"', (ROOT / "Makefile").read_text())) == {pin}
