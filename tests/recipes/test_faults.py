"""Nothing is lost: tiny runs killed, stopped, starved and failed, each in a laboratory of its own process."""

from __future__ import annotations

import json
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


def found(name: str, tmp_path: Path, env: dict[str, str]) -> dict[str, Any]:
    """What an experiment found."""
    call = [sys.executable, "-W", "ignore", str(EXPERIMENTS), str(tmp_path / "lab"), name]
    done = subprocess.run(call, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("name", "cases", "resumed"),
    [
        ("killed", 150, 40),
        ("killed-overwriting", 150, 40),
        ("full-disk", 100, 20),
        ("failed-fsync", 45, 10),
    ],
)
def test_every_file_operation(
    name: str, cases: int, resumed: int, tmp_path: Path, source_env: dict[str, str]
) -> None:
    result = found(name, tmp_path, source_env)
    assert result["problems"] == []
    assert result["cases"] >= cases and result["resumed"] >= resumed
    assert result["states"]["old"] > 40 and sum(result["states"].values()) == result["cases"]
    assert name == "full-disk" or result["states"]["new"] > 0


def test_forty_kills_at_random_moments(tmp_path: Path, source_env: dict[str, str]) -> None:
    result = found("shots", tmp_path, source_env)
    assert result["problems"] == [] and result["cases"] >= 40
    assert len({row["kept"] for row in result["rows"]}) > 2, "not all stages were hit"


@pytest.mark.parametrize("name", ["stops", "words", "changes", "memory"])
def test_interruptions(name: str, tmp_path: Path, source_env: dict[str, str]) -> None:
    result = found(name, tmp_path, source_env)
    assert result["problems"] == []
    assert name != "changes" or result["cases"] >= 25


def test_a_torn_output_would_be_found(tmp_path: Path, source_env: dict[str, str]) -> None:
    result = found("sabotaged", tmp_path, source_env)
    assert len(result["problems"]) > 40 and all("torn" in said for said in result["problems"])


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
