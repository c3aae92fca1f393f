"""`pocketsize verify`: what it prints and how it ends."""

from __future__ import annotations

import json

import pytest

from pocketsize.cli.main import main
from pocketsize.exporting import compressed_tensors
from pocketsize.exporting.manifest import write_manifest
from pocketsize.exporting.table import behaviours
from pocketsize.models.load import load
from tiny import write_tiny


@pytest.fixture
def folder(tmp_path):
    """A finished folder with nothing quantized."""
    model, out = load(write_tiny(tmp_path / "in", "bert")), tmp_path / "out"
    out.mkdir()
    artifacts = [compressed_tensors.write(model, out)]
    (out / "record.json").write_text(json.dumps({"behaviour": behaviours(model, artifacts)}))
    write_manifest(out)
    return out


def test_sound(folder, capsys):
    assert main(["verify", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "ok" in out and "every file is as it was written" in out


def test_no_line_is_cut_where_it_is_piped(folder, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert main(["verify", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("ok    ") for line in lines)


def test_sound_as_json(folder, capsys):
    assert main(["verify", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ok"] and [check["name"] for check in facts["checks"]] == ["files", "weights"]


def test_damaged(folder, capsys):
    with (folder / "vocab.extra").open("w") as file:
        file.write("x")
    assert main(["verify", str(folder)]) == 7
    captured = capsys.readouterr()
    assert "WRONG" in captured.out and "vocab.extra" in captured.err and captured.err.count("\n") == 1


def test_damage_as_json_is_every_check_in_one_object(folder, capsys):
    (folder / "vocab.extra").write_text("x")
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert main(["verify", str(folder), "--json"]) == 7
    captured = capsys.readouterr()
    facts = json.loads(captured.out)
    assert [(check["name"], check["ok"]) for check in facts["checks"]] == [
        ("files", False),
        ("weights", False),
    ]
    assert (
        "vocab.extra" in facts["checks"][0]["detail"] and "model.safetensors" in facts["checks"][0]["detail"]
    )
    assert facts["ok"] is False and facts["error"] == "integrity" and facts["exit_code"] == 7
    assert facts["message"].startswith(facts["checks"][0]["detail"]) and captured.err.count("\n") == 1


def test_no_such_folder(tmp_path, capsys):
    assert main(["verify", str(tmp_path / "none")]) == 2
    assert "no such folder" in capsys.readouterr().err
