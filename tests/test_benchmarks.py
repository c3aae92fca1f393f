"""Benchmarks run for hours on machines of their own; here only whether what they import is there."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).parents[1]
ALL = TOP / "benchmarks"
# What they leave lies deeper.
SCRIPTS = sorted([*ALL.glob("*.py"), *ALL.glob("*/*.py")])
# What only the environments of other tools have.
PEERS = {"auto_round", "compressed_tensors", "datasets", "gptqmodel", "hqq", "llmcompressor", "nncf", "trl"}


def imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Every `from module import name`, and `import module` without a name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


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


def missing(script: Path, text: str) -> list[str]:
    """What a script imports that is nowhere: beside it, in all benchmarks, the tests, or a package."""
    folders, lacking = (script.parent, ALL, TOP / "tests"), list[str]()
    for module, name in imported(ast.parse(text)):
        place = next((one for folder in folders if (one := folder / f"{module}.py").exists()), None)
        if place is not None:
            there = not name or name in defined(place)
        elif module.split(".")[0] == "pocketsize":
            found = importlib.import_module(module)
            inside = hasattr(found, "__path__") and importlib.util.find_spec(f"{module}.{name}")
            there = not name or hasattr(found, name) or bool(inside)
        else:
            top = module.split(".")[0]
            known = top in sys.stdlib_module_names or top in PEERS
            there = known or importlib.util.find_spec(top) is not None
        lacking += [] if there else [f"{module}: {name}"]
    return lacking


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ALL)))
def test_what_a_benchmark_imports_is_there(script: Path) -> None:
    assert not missing(script, script.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "line",
    [
        "from summary import row",
        "import summary",
        "from bars import Bars",
        "from pocketsize.models.load import lode",
    ],
)
def test_what_is_not_there_is_found(line: str) -> None:
    """A module of another benchmark's folder, and names that a module has not."""
    assert missing(ALL / "floor" / "run.py", line)
