"""`inspect` as people and as programs see it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pocketsize.cli.main import main
from tiny import FAMILIES, write_tiny


def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    write_tiny(tmp_path / "tiny-model", "llama", shards=2)
    assert main(["inspect", str(tmp_path / "tiny-model")]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "tiny-model: llama, to generate" in out and "the head is the embedding" in out
    assert "groups that divide every width: 64, 32" in out
    assert "*.self_attn.q_proj.weight" in out and "* stands for model.layers.0 to 1" in out
    assert all(len(line) <= 80 for line in out.splitlines())


@pytest.mark.parametrize("family", FAMILIES)
def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str) -> None:
    write_tiny(tmp_path, family)
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["family"] == family and facts["groups"][-1] == 32 and facts["refuses"] is None
    assert sum(row["bytes"] for row in facts["rows"]) == sum(total["bytes"] for total in facts["totals"])
    assert facts["origin"]["parameters"] == sum(total["parameters"] for total in facts["totals"])


def test_experts_are_one_line_for_each_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(write_tiny(tmp_path, "qwen3_moe"))]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if ".experts." in line]
    assert len(lines) == 3 and all("*.mlp.experts.*." in line and " 8 " in line for line in lines)


def test_a_family_that_cannot_be_compressed_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiny(tmp_path / "in", "squeezebert")
    assert main(["inspect", str(folder)]) == 0
    assert "nothing in it can be compressed: its blocks are grouped convolutions" in capsys.readouterr().out
    assert main(["quantize", str(folder), "-o", str(tmp_path / "out")]) == 4
    assert "nothing in it can be quantized: its blocks are grouped" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_layout_that_the_literal_does_not_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, word in ((2, "no encoder.layer.0.ffn.1"), (5, "also encoder.layer.0.ffn.3")):
        folder = write_tiny(tmp_path / str(number), "mobilebert")
        raw = json.loads((folder / "config.json").read_text()) | {"num_feedforward_networks": number}
        (folder / "config.json").write_text(json.dumps(raw))
        assert main(["inspect", str(folder)]) == 4
        assert word in capsys.readouterr().err


def test_names_from_files_cannot_command_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path, "bert")
    (tmp_path / "origin.json").write_text(json.dumps({"name": "a\x1b[31mred[bold]"}))
    assert main(["inspect", str(tmp_path)]) == 0
    assert "a?[31mred[bold]: bert" in capsys.readouterr().out


def test_fetch_of_an_unknown_sample(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fetch", "sample:minilm"]) == 2
    assert "did you mean 'sample:minilm-l6'?" in capsys.readouterr().err
