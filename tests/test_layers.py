"""Imports go down only: the tree is the architecture."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "pocketsize"

# From the top; a file may import from its own row only what WITHIN allows, and from any row below.
ROWS = (
    ("__main__",),
    ("cli", "serving"),
    ("api",),
    ("search",),
    ("reporting",),
    ("recipes",),
    ("measurement", "exporting"),
    ("training", "data", "models", "io", "distributed"),
    ("quantization", "pruning", "distillation"),
    ("linalg", "errors"),
)
WITHIN = {
    "cli": {"serving"},
    "training": {"data", "models", "io", "distributed"},
    "data": {"models", "io", "distributed"},
    "models": {"io", "distributed"},
    "linalg": {"errors"},
}
# Types of a result that a lower row may name: a record is built of them.
PURE = {"quantization", "pruning", "distillation", "linalg"}
FORBIDDEN_IN_PURE = {"transformers", "safetensors", "gguf", "os", "pathlib", "io", "socket", "rich", "click"}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part(module: str) -> str | None:
    words = module.split(".")
    return words[1] if len(words) > 1 and words[0] == "pocketsize" else None


def row(name: str) -> int:
    return next(i for i, names in enumerate(ROWS) if name in names)


FILES = sorted(SRC.rglob("*.py"))
PARTS = {name for names in ROWS for name in names}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_go_down(path: Path) -> None:
    relative = path.relative_to(SRC)
    own = relative.parts[0].removesuffix(".py")
    if own == "__init__":
        return
    assert own in PARTS, f"{relative}: not a place in the design"
    for target in {part(m) for m in imports(path)} & PARTS - {own}:
        below = row(target) > row(own)
        assert below or target in WITHIN.get(own, set()), f"{relative} imports {target}"


@pytest.mark.parametrize("name", ["quantization", "pruning", "distillation"])
def test_maths_packages_do_not_import_one_another(name: str) -> None:
    for path in (SRC / name).glob("*.py"):
        targets = {part(m) for m in imports(path)} - {None, name}
        assert targets <= {"linalg", "errors"}, f"{path.name} imports {targets}"
        assert not {m.split(".")[0] for m in imports(path)} & FORBIDDEN_IN_PURE, path.name


def test_archs_are_literals() -> None:
    for path in (SRC / "models" / "archs").glob("*.py"):
        if path.name == "__init__.py":
            continue
        kinds = [type(node).__name__ for node in ast.parse(path.read_text()).body]
        assert kinds == ["Expr", "ImportFrom", "Assign"], f"{path.name}: a family is one literal"


CHANGES_FILES = {
    *("write_text", "write_bytes", "mkdir", "makedirs", "touch", "unlink", "rmdir", "rmtree", "rename"),
    *("symlink_to", "hardlink_to", "ftruncate", "truncate", "fsync", "copyfile", "copytree", "mkstemp"),
    *("TemporaryDirectory", "NamedTemporaryFile"),
}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_one_place_writes_files(path: Path) -> None:
    # A download goes on in the file where it was cut off; only the whole folder is published.
    if str(path.relative_to(SRC)) in ("io/publish.py", "io/lock.py", "io/hub/download.py"):
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        given = [*node.args, *(keyword.value for keyword in node.keywords)]
        modes = [str(a.value) for a in given if isinstance(a, ast.Constant)]
        opens = name == "open" and any(re.fullmatch(r"[wax]b?\+?|rb?\+b?", mode) for mode in modes)
        where = f"{path.name}:{node.lineno}"
        assert name not in CHANGES_FILES and not opens, f"{where}: {name} writes past io/publish.py"
        assert ast.unparse(node.func) != "os.replace", f"{where}: os.replace writes past io/publish.py"


NETWORK = {
    "huggingface_hub",
    "httpx",
    "httpx2",
    "requests",
    "urllib3",
    "aiohttp",
    "http",
    "socket",
    "urllib.request",
}
# One talks to hubs; the other to llama.cpp's server, in this machine alone.
TALKING = {"io/hub/http.py", "io/llamacpp.py"}


def test_one_file_talks_to_hubs() -> None:
    talking = {
        path.relative_to(SRC).as_posix()
        for path in FILES
        if {m for m in imports(path) if m in NETWORK or m.split(".")[0] in NETWORK}
    }
    assert talking == TALKING
