"""`pocketsize doctor`: what it prints and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pocketsize.cli.main import main
from pocketsize.measurement import doctor


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every package imports but the one of an extra; importing them all for real takes seconds."""
    faults = {"xllamacpp": "not installed", "llama_cpp": "not installed"}
    monkeypatch.setattr(doctor, "import_faults", lambda names: dict.fromkeys(names) | faults)
    monkeypatch.setattr(doctor, "available_bytes", lambda: 10**10)
    monkeypatch.setattr(doctor, "DISK_BYTES", 1)
    monkeypatch.setenv("POCKETSIZE_CACHE", str(tmp_path))


def test_ready(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "-o", str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert "a model can be shrunk here" in captured.out and captured.err == ""
    assert "absent  extra llamacpp: xllamacpp: not installed" in captured.out
    assert "-> python -m pip install 'pocketsize[llamacpp]'" in captured.out
    assert "instruction sets: avx2" in captured.out and list(tmp_path.iterdir()) == []


def test_ready_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "-o", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["ok"] and facts["cores"] >= 1 and facts["memory_available_bytes"] == 10**10
    assert {"avx2", "avx512", "bf16", "vnni", "amx"} == set(facts["instruction_sets"])
    assert {part["name"] for part in facts["parts"] if not part["ok"]} == {"extra llamacpp"}


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_not_ready(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["doctor", "-o", str(tmp_path / "file" / "out"), *flags]) == 5
    captured = capsys.readouterr()
    assert captured.err.startswith("error[resources]: disk for output: ") and captured.err.count("\n") == 1
    if flags:
        facts = json.loads(captured.out)
        assert (facts["ok"], facts["error"], facts["exit_code"]) == (False, "resources", 5)
        assert "give another folder with -o" in facts["message"]
    else:
        assert "MISSING disk for output" in captured.out and "cannot be shrunk here yet" in captured.out
