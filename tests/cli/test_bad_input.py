"""Whole commands with bad input: one line that names the file, the right exit code, and no change on disk.

What `run` answers to bad texts, keys and outputs is in `recipes/test_run.py`, bad models are in
`test_bad_input_models.py`; here is the rest of the recipe file, and the other commands.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from pocketsize.cli.main import main
from tiny import write_tiny

FILES = {
    "empty.txt": b"",
    "binary.txt": bytes(range(256)) * 8,
    "file": b"x",
    "full/precious": b"x",
    "folder.yaml/inside": b"x",
    "syntax.yaml": b"steps: [",
    "binary.yaml": bytes(range(256)),
    "empty.yaml": b"",
    "list.yaml": b"- a\n",
    "key.yaml": b"model: m\nstpes: [rtn]\n",
    "step.yaml": b"model: m\nsteps: [gptk]\n",
    "option.yaml": b"model: m\nsteps:\n- gptq: {gruop: 64}\n",
    "twice.yaml": b"model: m\nsteps: [rtn]\nmodel: n\n",
    "data.yaml": b"model: m\ndata: {sequnces: 3}\nsteps: [rtn]\n",
}
CASES = [
    ("run absent.yaml -o out", 3, "absent.yaml: cannot be read as a recipe"),
    ("plan absent.yaml", 3, "absent.yaml: cannot be read as a recipe"),
    ("run folder.yaml -o out", 3, "folder.yaml: cannot be read as a recipe"),
    ("run binary.yaml -o out", 3, "binary.yaml: cannot be read as a recipe"),
    ("run syntax.yaml -o out", 2, "syntax.yaml: not YAML"),
    ("run empty.yaml -o out", 2, "empty.yaml: a recipe is a mapping"),
    ("plan list.yaml", 2, "list.yaml: a recipe is a mapping"),
    ("plan key.yaml", 2, "key.yaml: unknown key 'stpes'; did you mean 'steps'?"),
    ("run step.yaml -o out", 2, "step.yaml: unknown step 'gptk'; did you mean 'gptq'?"),
    ("plan option.yaml", 2, "option.yaml: gptq: unknown option 'gruop'; did you mean 'group'?"),
    ("run data.yaml -o out", 2, "data.yaml: data: unknown option 'sequnces'"),
    ("quantize m --calibrate empty.txt -o out", 3, "empty.txt: is empty"),
    ("shrink m --fit 1GB --evaluate binary.txt -o out", 3, "binary.txt: line 1 holds the byte 0x00"),
    ("measure m --data empty.txt", 3, "empty.txt: is empty"),
    ("measure m --data absent.txt", 3, "absent.txt: no such file"),
    ("quantize m -o full", 2, "full: exists and is not an empty folder"),
    ("shrink m --fit 1GB -o file", 2, "file: exists and is not an empty folder"),
    ("quantize m -o file/out", 5, "file/.out.work: Not a directory; a part of that path is a file"),
    ("shrink m --fit 1GB -o file/out", 5, "file/.out.work: Not a directory; a part of that path is a file"),
    ("plan m -o file/out", 5, "file: is a file, so no output can be made there"),
    ("plan m --fit 1GB -o file", 5, "file: is a file, so no output can be made there"),
    ("shrink m --ratio 1000x -o out", 5, "is below the smallest gguf file possible"),
    ("quantize m --seed -1 -o out", 2, "data: seed must be a whole number from 0 upwards, got -1"),
    ("run twice.yaml -o out", 2, "twice.yaml: not YAML: key 'model' is there twice"),
    ("shrink m --keep 95 -o out", 2, "keep is a share of at most 100 %, got '95'; did you mean 95%?"),
    ("quantize m -o m/small", 2, "m/small: lies in the model's own folder"),
    (
        "quantize m --embeddings 4 --target folder -o out",
        4,
        "no width of its own for embedding and head; use same",
    ),
    ("quantize m --sequences -1 -o out", 2, "data: sequences must be a positive number, got -1"),
    ("verify file", 2, "file: is a file; name the folder it was written in"),
    ("report m", 3, "m/record.json: not there"),
    ("chat m --prompt x", 2, "m: no GGUF files here"),
    ("measure m --against absent", 2, "absent: no such folder or file"),
]


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and all that is wrong."""
    folder = tmp_path_factory.mktemp("bad")
    write_tiny(folder / "m", "llama")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def state(folder: Path) -> dict[str, str | None]:
    """Every file by its hash, and every folder."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else None
        for p in folder.rglob("*")
    }


@pytest.mark.parametrize(("line", "code", "said"), CASES, ids=[line for line, _, _ in CASES])
def test_one_line_the_right_code_and_nothing_changed(
    line: str,
    code: int,
    said: str,
    tree: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tree)
    before = state(tree)
    assert main(line.split()) == code
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert state(tree) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="run as root, who may write anywhere")
@pytest.mark.parametrize("line", ["quantize m", "shrink m --fit 1GB"])
def test_a_folder_that_may_not_be_written(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path / "m", "llama")
    (tmp_path / "locked").mkdir(mode=0o500)
    monkeypatch.chdir(tmp_path)
    before = state(tmp_path)
    assert main([*line.split(), "-o", "locked/out"]) == 5
    error = capsys.readouterr().err
    assert "locked/.out.work: Permission denied" in error and error.count("\n") == 1
    assert main(["plan", "m", "-o", "locked/out"]) == 5
    assert "locked: may not be written to" in capsys.readouterr().err
    assert state(tmp_path) == before
