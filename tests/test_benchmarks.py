"""Benchmarks run for hours on machines of their own; here only whether what they import is there."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
SCRIPTS = sorted((TOP / "benchmarks").rglob("*.py"))


def imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Every `from module import name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.module, alias.name) for alias in node.names)


def defined(path: Path) -> set[str]:
    """The names that a script has at its top."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name for alias in node.names}
        else:
            found |= {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(TOP / "benchmarks")))
def test_what_a_benchmark_imports_is_there(script: Path) -> None:
    """Of its folder, of all benchmarks, of the tests, or of the package; other packages are a peer's."""
    own = {folder: {one.stem for one in folder.glob("*.py")} for folder in folders(script)}
    everywhere = {one.stem for one in SCRIPTS}
    for module, name in imported(ast.parse(script.read_text(encoding="utf-8"))):
        if module.split(".")[0] == "pocketsize":
            found = importlib.import_module(module)
            assert hasattr(found, name) or importlib.util.find_spec(f"{module}.{name}"), f"{module}: {name}"
            continue
        place = next((folder for folder, stems in own.items() if module in stems), None)
        assert place or module not in everywhere, f"{module}: only in another benchmark's folder"
        if place:
            assert name in defined(place / f"{module}.py"), f"{module}: {name}"


def folders(script: Path) -> tuple[Path, ...]:
    """Where a script finds modules, first of all beside itself."""
    return script.parent, TOP / "benchmarks", TOP / "tests"
