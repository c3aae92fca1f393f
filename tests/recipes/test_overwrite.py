"""Replacing a finished output: when, and that nothing is lost on the way."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from pocketsize.cli.main import main
from pocketsize.exporting.verify import Check
from pocketsize.recipes import run as running
from pocketsize.recipes.record import read_record
from tiny import write_tiny

KILLER = """
import os, signal, sys
from pocketsize.cli.main import main
from pocketsize.recipes import run
run.verify_folder = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
sys.exit(main(sys.argv[1:]))
"""


def recipe(folder: Path, **changes: object) -> Path:
    raw = {
        "model": "model",
        "data": {"calibrate": "a.txt", "evaluate": "b.txt", "sequences": 2, "length": 32, "tokens": 64},
        "steps": [{"rtn": {"scheme": "W4A16"}}],
        "export": ["folder"],
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw | changes))
    return path


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, texts, a recipe, and the folder that a run of 4 bits left; the recipe is now one of 8 bits."""
    base = tmp_path_factory.mktemp("finished")
    write_tiny(base / "model", "llama")
    for name in "ab":
        (base / f"{name}.txt").write_text("".join(f"{name} text number {i}\n" for i in range(400)))
    assert main(["run", str(recipe(base)), "-o", str(base / "out")]) == 0
    recipe(base, steps=[{"rtn": {"scheme": "W8A16"}}])
    return base


@pytest.fixture
def finished(template: Path, tmp_path: Path) -> Path:
    """The finished folder of a copy of the template."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    return tmp_path / "out"


def state(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def again(out: Path, *options: str) -> int:
    return main(["run", str(out.parent / "recipe.yaml"), "-o", str(out), *options])


def bits(out: Path) -> int:
    return read_record(out / "record.json").steps[0].layers[0].bits


def test_a_finished_output_is_replaced_when_asked(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = state(finished.parent)
    assert again(finished) == 2
    assert "--overwrite" in capsys.readouterr().err and state(finished.parent) == before
    assert bits(finished) == 4 and again(finished, "--overwrite") == 0 and bits(finished) == 8
    assert main(["verify", str(finished)]) == 0
    assert {p.name for p in finished.parent.iterdir()} == {"a.txt", "b.txt", "model", "out", "recipe.yaml"}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda out: (out / "notes.txt").write_text("mine"), "holds notes.txt, which no run wrote"),
        (lambda out: (out / "empty").mkdir(), "holds empty, which no run wrote"),
        (lambda out: (out / "link").symlink_to("record.json"), "holds link, which no run wrote"),
        (lambda out: (out / "MANIFEST.json").unlink(), "is not a finished output"),
        (lambda out: (out / "record.json").unlink(), "is not a finished output"),
    ],
)
def test_what_no_run_wrote_is_left_alone(
    spoil: object, words: str, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(finished)  # type: ignore[operator]
    before = state(finished.parent)
    assert again(finished, "--overwrite") == 2
    assert words in capsys.readouterr().err and state(finished.parent) == before


def test_the_model_itself_is_never_replaced(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (finished.parent / "model").rename(finished / "model")
    table = finished / "MANIFEST.json"
    names = [p.relative_to(finished).as_posix() for p in finished.rglob("*") if p.is_file() and p != table]
    table.write_text("{" + ", ".join(f'"{name}": "x"' for name in names) + "}")
    recipe(finished.parent, model="out/model")
    before = state(finished.parent)
    assert again(finished, "--overwrite") == 2
    assert "holds the model itself" in capsys.readouterr().err and state(finished.parent) == before


def test_a_new_folder_that_is_not_sound_replaces_nothing(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = state(finished)
    monkeypatch.setattr(running, "verify_folder", lambda folder: [Check("weights", False, "not as written")])
    assert again(finished, "--overwrite") == 7
    assert "not as written" in capsys.readouterr().err and state(finished) == before
    monkeypatch.undo()
    assert again(finished, "--overwrite") == 0 and bits(finished) == 8  # goes on where it was


def test_what_comes_in_during_the_run_is_not_lost(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = running.verify_folder

    def late(folder: Path) -> list[Check]:
        (finished / "notes.txt").write_text("mine")
        return real(folder)

    monkeypatch.setattr(running, "verify_folder", late)
    assert again(finished, "--overwrite") == 2
    assert bits(finished) == 4 and (finished / "notes.txt").read_text() == "mine"


def test_killed_before_it_is_verified_the_old_one_is_there(
    finished: Path, source_env: dict[str, str]
) -> None:
    before = state(finished)
    call = [sys.executable, "-c", KILLER, "run", str(finished.parent / "recipe.yaml"), "-o", str(finished)]
    env = source_env | {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # an unfinished run is of one number
    done = subprocess.run([*call, "--overwrite"], env=env, capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL and state(finished) == before
    assert ".out.partial" in os.listdir(finished.parent)
    assert again(finished, "--overwrite") == 0 and bits(finished) == 8
    assert not [name for name in os.listdir(finished.parent) if name.startswith(".")]


def test_leftovers_go_before_the_work_begins(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = finished.parent / ".new.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(bytes(100))
    recipe(finished.parent, data={"calibrate": "absent.txt"})
    assert main(["run", str(finished.parent / "recipe.yaml"), "-o", str(finished.parent / "new")]) == 3
    assert "absent.txt" in capsys.readouterr().err and not left.exists()


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_the_dtype_of_a_recipe_is_that_of_the_folder(finished: Path, dtype: str) -> None:
    path = recipe(finished.parent, dtype=dtype)
    assert main(["run", str(path), "-o", str(finished.parent / dtype)]) == 0
    record = read_record(finished.parent / dtype / "record.json")
    assert record.recipe["dtype"] == dtype and "gives the same logits" in record.artifacts[0].checks[0]
    assert main(["verify", str(finished.parent / dtype)]) == 0
