"""Every example that a reader can copy runs: docstrings, pages, scripts. Every link leads somewhere."""

import ast
import doctest
import importlib
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SCRIPTS = sorted(path for path in (ROOT / "examples").glob("*.py") if not path.name.startswith("_"))
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ---- Docstrings. ----


def _docstrings() -> dict[str, tuple[Path, int, str]]:
    """Every docstring with an example, read from the source: doctest's own search misses wrapped methods."""
    found = {}
    for path in sorted((ROOT / "sdeflow").rglob("*.py")):
        pending: list[tuple[str, ast.AST]] = [(_name(path), ast.parse(path.read_text()))]
        while pending:
            name, node = pending.pop()
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and ">>>" in text:
                    found[name] = (path, node.body[0].lineno - 1, text)
                pending += [(f"{name}::{getattr(child, 'name', '')}", child) for child in node.body]
    return dict(sorted(found.items()))


EXAMPLES = _docstrings()


def _run_session(text: str, name: str, path: Path, line: int) -> None:
    """Run a doctest session as a reader would: nothing is defined but what it defines itself."""
    session = doctest.DocTestParser().get_doctest(text, {"__name__": "__main__"}, name, str(path), line)
    report: list[str] = []
    doctest.DocTestRunner(optionflags=_FLAGS).run(session, out=report.append)
    assert not report, "".join(report)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_docstring_example_runs(name):
    path, line, text = EXAMPLES[name]
    _run_session(text, name, path, line)


# ---- Pages. ----


def _blocks(text: str, *languages: str) -> list[tuple[int, str]]:
    """The fenced blocks in these languages, each with the line it starts on."""
    pattern = rf"^```(?:{'|'.join(languages)})\b[^\n]*\n(.*?)^```$"
    found = re.finditer(pattern, text, re.MULTILINE | re.DOTALL)
    return [(text[: block.start(1)].count("\n"), block.group(1)) for block in found]


# These train or fit on the way.
_LONG = {"bridges.md", "diffusion.md", "fractional.md", "series.md"}
_RUNS = [pytest.param(page, marks=[pytest.mark.slow] * (page.name in _LONG), id=_name(page)) for page in PAGES]


@pytest.mark.parametrize("page", _RUNS)
def test_the_python_of_a_page_runs(page, tmp_path, monkeypatch, request):
    # The blocks of a page are one program, read from the top.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    names: dict[str, object] = {"__name__": "__main__"}
    before = jax.config.read("jax_enable_x64")
    request.addfinalizer(lambda: jax.config.update("jax_enable_x64", before))
    for line, block in _blocks(page.read_text(), "python", "py", "pycon"):
        if ">>>" in block:
            _run_session(block, page.name, page, line)
        else:
            # Blank lines first, so that a traceback shows the line of the page.
            exec(compile("\n" * line + block, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_the_commands_of_a_page_exist(page):
    text = page.read_text()
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    shell = "\n".join(block for _, block in _blocks(text, "bash", "console", "sh", "shell"))
    inline = "\n".join(re.findall(r"`([^`\n]+)`", text))
    named = set(re.findall(r"\bmake ([a-z][\w-]*)", shell + "\n" + inline))
    assert named <= targets
    modules = set(re.findall(r"\bpython -m (sdeflow|benchmarks)\b", shell + "\n" + inline))
    assert all((ROOT / module / "__main__.py").exists() for module in modules)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_the_requirements_of_a_page_are_those_of_pyproject(page):
    text = page.read_text()
    lowest = PROJECT["requires-python"].removeprefix(">=")
    assert set(re.findall(r"\bPython (3\.\d+)(?: or newer|\+)", text)) <= {lowest}
    extras = {extra for group in re.findall(r"\bsdeflow\[([\w,-]+)\]", text) for extra in group.split(",")}
    assert extras <= set(PROJECT["optional-dependencies"])


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_the_links_of_a_file_lead_to_files(name):
    # Those of docs/ are checked by the strict build of the pages.
    prose = re.sub(r"```.*?```", "", (ROOT / name).read_text(), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose)
    assert [link for link in links if not re.match(r"[a-z]+:", link) and not (ROOT / link).exists()] == []


def test_the_roadmap_promises_only_what_is_not_there():
    text = (ROOT / "docs" / "roadmap.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|([^|]*)\|", text, re.MULTILINE)
    assert rows
    built = []
    for room, promised in rows:
        try:
            module = importlib.import_module(f"sdeflow.{room}")
        except ModuleNotFoundError:
            continue
        names = re.findall(r"`(\w+)`", promised)
        assert names, f"sdeflow.{room} exists: say by name what is still missing from it, or take out the row"
        built += [f"{room}.{name}" for name in names if hasattr(module, name)]
    assert built == [], "take these off the roadmap"


def test_the_readme_says_how_to_start():
    named = set(re.findall(r"\bmake ([a-z][\w-]*)", (ROOT / "README.md").read_text()))
    assert {"demo", "test"} <= named


# ---- Scripts. ----


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=_name)
def test_an_example_script_runs(script, tmp_path):
    environment = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
