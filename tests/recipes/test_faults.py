"""Nothing is lost: tiny runs killed, stopped, starved and failed, each in a laboratory of its own process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pocketsize.cli.main import main
from pocketsize.recipes import run as running
from pocketsize.recipes.journal import working
from pocketsize.recipes.output import work_folder

EXPERIMENTS = Path(__file__).parents[1] / "experiments.py"
SRC = Path(__file__).parents[2] / "src"
# How many cases there are at least, and from how many states a run has to go on.
OPERATIONS = {
    "killed": (150, 30),
    "killed-overwriting": (150, 30),
    "full-disk": (100, 15),
    "failed-fsync": (45, 8),
}


def experiments(names: list[str], folder: Path) -> dict[str, Any]:
    """What the experiments of one kind found, each by its name."""
    env = os.environ | {"PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    call = [sys.executable, "-W", "ignore", str(EXPERIMENTS), str(folder / "lab"), *names]
    done = subprocess.run(call, env=env, capture_output=True, text=True, check=False)
    shutil.rmtree(folder / "lab", ignore_errors=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def operations(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Faults at every file operation, on runs of which nothing is computed twice."""
    return experiments([*OPERATIONS, "sabotaged"], tmp_path_factory.mktemp("operations"))


@pytest.fixture(scope="module")
def interruptions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Kills at random moments, signals, changed inputs and lack of memory, on runs computed whole."""
    names = ["shots", "stops", "words", "changes", "memory"]
    return experiments(names, tmp_path_factory.mktemp("interruptions"))


@pytest.mark.parametrize("name", ["killed", "killed-overwriting", "full-disk", "failed-fsync"])
def test_every_file_operation(name: str, operations: dict[str, Any]) -> None:
    result, (cases, resumed) = operations[name], OPERATIONS[name]
    assert result["problems"] == []
    assert result["cases"] >= cases and result["resumed"] >= resumed
    assert result["states"]["old"] >= cases / 2 and sum(result["states"].values()) == result["cases"]
    assert name == "full-disk" or result["states"]["new"] > 0


def test_a_torn_output_would_be_found(operations: dict[str, Any]) -> None:
    problems = operations["sabotaged"]["problems"]
    assert len(problems) > 40 and all("torn" in said for said in problems)


def test_forty_kills_at_random_moments(interruptions: dict[str, Any]) -> None:
    result = interruptions["shots"]
    assert result["problems"] == [] and result["cases"] >= 40
    assert len({row["kept"] for row in result["rows"]}) > 1, "all shots fell in one stage"


@pytest.mark.parametrize("name", ["stops", "words", "changes", "memory"])
def test_interruptions(name: str, interruptions: dict[str, Any]) -> None:
    assert interruptions[name]["problems"] == []
    assert name != "changes" or interruptions[name]["cases"] >= 25


def test_a_second_run_onto_one_output_ends_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: model\nsteps: [rtn]\n")
    monkeypatch.setattr(running, "prepare", lambda recipe: pytest.fail("nothing may be loaded"))
    with working(work_folder(tmp_path / "out")):
        for call in (["run", str(recipe)], ["quantize", "model"], ["shrink", "model", "--keep", "95%"]):
            target = [] if call[0] == "run" else ["--target", "folder"]
            assert main([*call, *target, "-o", str(tmp_path / "out")]) == 8
            error = capsys.readouterr().err
            assert "error[busy]" in error and "process" in error and "since" in error
    assert not work_folder(tmp_path / "out").exists()
