"""Every test that docs/promises.md names is there, with its case."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
NAMED = re.findall(
    r"`([\w/]+\.py)::(\w+)(?:\[([^`]+)\])?`", (TESTS.parent / "docs" / "promises.md").read_text()
)


def test_the_table_is_read() -> None:
    assert len(NAMED) > 100


@pytest.mark.parametrize(("file", "name", "case"), NAMED)
def test_named_tests_exist(file: str, name: str, case: str) -> None:
    tree = ast.parse((TESTS / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, (
        f"{file}: no {name}"
    )
    words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert not case or case in words, f"{file}: {name} has no case {case!r}"
