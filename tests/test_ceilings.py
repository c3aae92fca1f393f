"""Sizes that keep code readable: files, functions, arguments, nesting."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "pocketsize"
FILE, FUNCTION, ARGUMENTS, NESTING = 400, 50, 6, 3
FILES = sorted(SRC.rglob("*.py"))
BRANCHES = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.Match)
# Compiled loops are written as loops: their nesting is the algorithm, their arguments plain arrays.
COMPILED = {
    SRC / "quantization" / name
    for name in ("compiled.py", "codebook_loops.py", "gpu.py", "superblock_loops.py")
} | {SRC / "pruning" / "gate_loops.py"}
TENSORS = ("Tensor", "Float[", "Int64[", "Bool[", "UInt8[")


def nesting(node: ast.AST, depth: int = 0) -> int:
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.Lambda):
            continue
        chained = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        deepest = max(deepest, nesting(child, depth + (isinstance(child, BRANCHES) and not chained)))
    return deepest


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= FILE, f"{path.name}: split it by idea"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef):
            continue
        where = f"{path.name}:{node.lineno} {node.name}"
        assert (node.end_lineno or 0) - node.lineno + 1 <= FUNCTION, f"{where}: longer than {FUNCTION} lines"
        if path in COMPILED or _is_command(node):
            continue
        assert nesting(node) <= NESTING, f"{where}: nested deeper than {NESTING}"
        plain = [a for a in node.args.args if not _is_tensor(a) and a.arg not in ("self", "cls")]
        assert len(plain) <= ARGUMENTS, f"{where}: more than {ARGUMENTS} positional arguments"


def _is_tensor(argument: ast.arg) -> bool:
    return argument.annotation is not None and ast.unparse(argument.annotation).startswith(TENSORS)


def _is_command(node: ast.FunctionDef) -> bool:
    return any("click.command" in ast.unparse(d) for d in node.decorator_list)
