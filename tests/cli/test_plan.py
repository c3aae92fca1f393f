"""`pocketsize plan`: its table, its JSON, its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pocketsize.cli.main import main
from pocketsize.exporting import table
from pocketsize.recipes import room as rooms
from tiny import write_texts, write_tiny

SHORT = ["--length", "64", "--sequences", "4", "--tokens", "256"]
SHORT += ["--calibrate", "calibrate.txt", "--evaluate", "evaluate.txt"]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(table, "reload_check", lambda *_: ())
    write_texts(tmp_path)


def test_a_recipe_is_planned_and_the_table_tells_all(capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny(Path("m"), "bert")
    Path("r.yaml").write_text(
        "model: m\nsteps: [rtn]\n"
        "data: {length: 64, sequences: 2, tokens: 64, calibrate: calibrate.txt, evaluate: evaluate.txt}\n"
    )
    assert main(["plan", "r.yaml"]) == 0
    said = capsys.readouterr().out
    for words in (
        "folder: 0.1 MB of weights in .",
        "gguf: not among the exports, and could not be: no GGUF is written for the family bert",
        "memory: ",
        "disk: ",
        "time: ",
        "unquantized: norm",
        "rehearsal: encoder.layer.1 was quantized, measured",
    ):
        assert words in said, said
    assert said.rstrip().endswith("fits")
    assert sorted(p.name for p in Path().iterdir()) == ["calibrate.txt", "evaluate.txt", "m", "r.yaml"]


def test_json_is_one_object_with_the_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(Path("m"), "llama")
    monkeypatch.setattr(rooms, "available_bytes", lambda: 1)
    assert main(["plan", "m", "--json", *SHORT]) == 5
    found = json.loads(capsys.readouterr().out)
    assert found["exit_code"] == 5 and found["way_out"] and found["time_s"] is None
    assert {"peak_ram_bytes", "needed_ram_bytes", "output_disk_bytes", "peak_disk_bytes"} <= set(found)
    assert [export["format"] for export in found["exports"]] == ["gguf", "folder"]


def test_what_cannot_be_done_ends_with_4(capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny(Path("m"), "llama")
    assert main(["plan", "m", "--target", "gguf", "--scheme", "W3A16", *SHORT]) == 4
    said = capsys.readouterr().out
    assert (
        "gguf: cannot be written: gptq: gguf cannot store 3-bit weights" in said and "cannot be done" in said
    )


def test_no_room_ends_with_5_and_says_what_would_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(Path("m"), "llama")
    monkeypatch.setattr(rooms, "available_bytes", lambda: 1)
    assert main(["plan", "m", "--fit", "1GB", *SHORT]) == 5
    assert "does not fit: stage " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["r.yaml", "--scheme", "W3A16"], "--scheme: r.yaml says it itself"),
        (["r.yaml", "--fit", "80MB"], "--fit: a recipe says its steps, no goal"),
        (["m", "--fit", "80MB", "--group", "32"], "--group: a goal chooses the scheme itself"),
        (["m", "--fit", "80 parsecs"], "80MB"),
        (["m", "--group", "some"], "--group: a number or one of auto, row"),
        (["nothing"], "no such folder"),
    ],
)
def test_bad_options(words: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny(Path("m"), "llama")
    Path("r.yaml").write_text("model: m\nsteps: [rtn]\n")
    assert main(["plan", *words]) == 2
    assert hint in capsys.readouterr().err


def test_a_size_that_no_file_reaches_ends_with_5(capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny(Path("m"), "llama")
    assert main(["plan", "m", "--fit", "1kB"]) == 5
    assert "below the smallest gguf file possible" in capsys.readouterr().err
