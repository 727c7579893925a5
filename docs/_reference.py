"""A hook for mkdocs: one page of reference for each public room, made from the names that the room exports.

A name is public because a room says ``from ._file import Name as Name``. The pages are written from those
lines, so a new name, or a new room, is on them without anyone listing it a second time. The changelog and the
guide for contributors stand in the root of the repository and become pages too.
"""

import ast
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sdeflow"


def exported(path: Path) -> list[str]:
    """The names that a file re-exports with ``as``, or defines itself, in order."""
    names, pending = [], ast.parse(path.read_text()).body
    while pending:
        node = pending.pop(0)
        if isinstance(node, ast.If):  # names that are imported on first use are listed for type checkers
            pending = node.body + pending
        elif isinstance(node, ast.ImportFrom) and node.module and node.level:
            names += [alias.asname for alias in node.names if alias.asname == alias.name]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
    return [name for name in names if not name.startswith("_")]


def rooms() -> dict[str, list[str]]:
    """Every public module of the package and its public names."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        folders = [folder for folder in path.parents if folder.is_relative_to(PACKAGE)]
        whole = all((folder / "__init__.py").exists() for folder in folders)
        if whole and not any(part.startswith("_") for part in name.split(".")) and (names := exported(path)):
            found[name] = names
    return found


def page(room: str, names: list[str]) -> str:
    """The markdown of one room: its docstring, then every name."""
    bare = "{show_root_heading: false, show_root_toc_entry: false, members: false}"
    head = f"# {room}\n\n::: {room}\n    options: {bare}\n"
    return head + "".join(f"\n::: {room}.{name}\n" for name in names)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages of the reference into the navigation."""
    for entry in config.nav or []:
        if "Reference" in entry:
            entry["Reference"] = [{room: f"api/{_file(room)}"} for room in rooms()]
    return config


def on_files(files: Files, config: MkDocsConfig, **kwargs: Any) -> Files:
    """Add the pages that are made here to those of the folder."""
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        files.append(File.generated(config, name.lower(), content=(ROOT / name).read_text()))
    for room, names in rooms().items():
        files.append(File.generated(config, f"api/{_file(room)}", content=page(room, names)))
    return files


def _file(room: str) -> str:
    return f"{room.removeprefix('sdeflow.')}.md"
