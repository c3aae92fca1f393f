"""Benchmarks run for hours on machines of their own; here only whether what they import is there."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
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


def test_what_was_not_run_again_stays_in_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other models always, other widths of the same model where those that were run are named."""
    monkeypatch.syspath_prepend(str(ALL))
    from bars import Bar, not_run_again

    rows = [{"model": model, "bits": bits, "side": "a"} for model in ("m", "n") for bits in (4, 3)]
    one = Bar("", 0.5, "ratio", "lower", 1.0).as_dict()
    names = ("m, 4 bit, worst of 3 seeds: loss", "m, 3 bit, worst of 3 seeds: loss", "n: loss", "m: seconds")
    path = tmp_path / "record.json"
    bars = [one | {"name": name} for name in names]
    path.write_text(json.dumps({"rows": rows, "bars": bars, "commit": "0123456789", "versions": {"a": "1"}}))
    left, kept, versions = not_run_again(path, {"m"})
    assert [row["model"] for row in left] == ["n", "n"] and [bar.name for bar in kept] == ["n: loss"]
    assert versions == {"a": "1"} and left[0]["commit"] == "0123456"
    left, kept, _ = not_run_again(path, {"m"}, {3})
    assert [(row["model"], row["bits"]) for row in left] == [("m", 4), ("n", 4), ("n", 3)]
    assert [bar.name for bar in kept] == [names[0], "n: loss"]
    assert not_run_again(tmp_path / "none.json", {"m"}, {3}) == ([], [], {})
