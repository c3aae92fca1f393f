"""`pocketsize measure` on tiny models: rows, protocol, refusals."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from pocketsize.cli.main import main
from pocketsize.exporting.compressed_tensors import write
from pocketsize.models.load import load
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import Scheme
from tiny import write_tiny

TEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 40


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path / "tiny", "llama")
    (tmp_path / "held-out.txt").write_text(TEXT)
    return tmp_path


def facts(capsys, *words: str) -> dict:
    assert main(["measure", *words, "--data", "*.txt", "--tokens", "1024", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def subjects(found: dict, name: str) -> list[str]:
    return [row["subject"] for row in found["measurements"] if row["name"] == name]


def test_a_model_alone_has_perplexity_size_and_speed(place, capsys):
    found = facts(capsys, "tiny")
    assert subjects(found, "perplexity") == subjects(found, "bits_per_byte") == ["model"]
    assert subjects(found, "kl_mean") == []
    assert (subjects(found, "bytes"), subjects(found, "decode_rate")) == (["original"], ["model"])
    assert "4 windows of 256 tokens" in " ".join(found["protocol"])
    assert "KL" not in " ".join(found["protocol"])
    assert found["machine"]["threads"] == torch.get_num_threads()


def test_a_small_model_is_measured_against_its_original(place, capsys):
    model = load("tiny")
    small = model.with_quantized({n: rtn(model.original(n), Scheme(4, 32)) for n in model.linears})
    (place / "small").mkdir()
    write(small, place / "small")
    found = facts(capsys, "small", "--against", "tiny")
    rows = {(r["name"], r["subject"]): r for r in found["measurements"]}
    assert rows["kl_mean", "compressed"]["value"] > 0
    assert rows["perplexity_ratio", "compressed"]["low"] is not None
    assert rows["ratio_to_download", "."]["value"] > 1
    assert subjects(facts(capsys, "small"), "perplexity") == ["model"]


def test_caches_are_measured_against_the_models_own(place, capsys):
    found = facts(capsys, "tiny", "--cache", "f16,kivi-2-g16-r32", "--context", "1000")
    rows = {(r["name"], r["subject"]): r["value"] for r in found["measurements"]}
    assert rows["kl_mean", "cache kivi-2-g16-r32"] > 10 * abs(rows["kl_mean", "cache f16"])
    assert rows["cache_bytes", "cache f16"] == 2 * 2 * 2 * 16 * 2 * 1000
    assert rows["cache_saving", "cache kivi-2-g16-r32"] > 0.6
    assert "llama-server -ctk f16 -ctv f16" in " ".join(found["protocol"])
    write_tiny(place / "bert", "bert")
    assert main(["measure", "bert", "--cache", "f16", "--data", "*.txt"]) == 4
    assert "no cache of keys and values" in capsys.readouterr().err
    assert main(["measure", "tiny", "--context", "10"]) == 2
    assert "name one with --cache" in capsys.readouterr().err


def test_an_encoder_has_sentences(place, capsys, tmp_path):
    write_tiny(place / "bert", "bert")
    assert subjects(facts(capsys, "bert"), "sentence_rate") == ["model"]


def test_the_table_shows_value_and_interval(place, capsys):
    assert main(["measure", "tiny", "--data", "held-out.txt", "--tokens", "1024"]) == 0
    out = capsys.readouterr().out
    assert "perplexity" in out and " .. " in out and "tokens/s" in out and "SHA-256" in out


def test_other_tokens_and_other_tasks_are_refused(place, capsys):
    shutil.copytree(place / "tiny", place / "other")
    path = place / "other" / "tokenizer.json"
    raw = json.loads(path.read_text())
    vocabulary = raw["model"]["vocab"]
    a, b = [token for token, number in vocabulary.items() if number in (50, 60)]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    path.write_text(json.dumps(raw))
    assert main(["measure", "other", "--against", "tiny", "--data", "*.txt"]) == 4
    assert "first at id 50" in capsys.readouterr().err
    write_tiny(place / "bert", "bert")
    assert main(["measure", "bert", "--against", "tiny", "--data", "*.txt"]) == 2


def test_bad_text_is_one_line_with_its_place(place, capsys):
    (place / "bad.txt").write_bytes(b"fine\n\x00")
    assert main(["measure", "tiny", "--data", "bad.txt"]) == 3
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "bad.txt: line 2" in err


def test_a_folder_with_a_gguf_alone_has_the_size_and_the_speed_of_that(place, capsys):
    words = ["--method", "rtn", "--target", "gguf", "--tokens", "256", "--evaluate", "held-out.txt"]
    assert main(["quantize", "tiny", "-o", "out", *words]) == 0
    capsys.readouterr()
    (file,) = (place / "out").glob("*.gguf")
    found = facts(capsys, "out", "--against", "tiny")
    rows = {(r["name"], r["subject"]): r["value"] for r in found["measurements"]}
    assert rows["bytes", file.name] == file.stat().st_size and ("bytes", ".") not in rows
    assert rows["decode_rate", file.name] > 0
    alone = facts(capsys, str(file), "--against", "tiny")
    assert subjects(alone, "bytes") == subjects(found, "bytes")
