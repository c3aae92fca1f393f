"""What a user may type for a model, and what each mistake is answered with."""

from __future__ import annotations

from pathlib import Path

import pytest

from pocketsize.errors import DataError, PocketsizeError, UnsupportedError, UsageError
from pocketsize.io.samples import SAMPLES, sample_of
from pocketsize.io.source import cache_folder, cached, resolve


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETSIZE_CACHE", str(tmp_path / "cache"))


def test_folder(tmp_path: Path) -> None:
    assert resolve(str(tmp_path)) == tmp_path


def test_fetched_sample() -> None:
    folder = cached(sample_of("minilm-l6"))
    folder.mkdir(parents=True)
    with pytest.raises(UsageError):
        resolve("sample:minilm-l6")
    (folder / "origin.json").write_text("{}")
    assert resolve("sample:minilm-l6") == folder


@pytest.mark.parametrize(
    ("typed", "kind", "words"),
    [
        ("sample:smollm2-135m", UsageError, "run: pocketsize fetch sample:smollm2-135m"),
        ("sample:smollm", UsageError, "did you mean 'sample:smollm2-135m'?"),
        ("samples:smollm2-135m", UsageError, "did you mean 'sample:smollm2-135m'?"),
        ("sample:nowhere", UsageError, "known: sample:smollm2-135m, sample:minilm-l6, sample:mpnet-base,"),
        ("smollm2-135m", UsageError, "did you mean 'sample:smollm2-135m'?"),
        (
            "org/name",
            UsageError,
            "org/name: no such folder, and not fetched from the hub yet; run: pocketsize",
        ),
        ("hf://org/name@v1", UsageError, "not fetched from the hub yet; run: pocketsize fetch org/name@v1"),
        ("https://example.org/a/b", UsageError, "not a page of huggingface.co"),
        (
            "a/b/c",
            UsageError,
            "a/b/c: no such folder or file; give a folder in Hugging Face layout, a GGUF file, a hub id, or",
        ),
        ("{tmp}/a.txt", UsageError, "a.txt: neither a folder nor a .gguf file"),
        ("{tmp}/a.gguf", DataError, "a.gguf: not a GGUF file"),
        ("{tmp}/a.bin", UnsupportedError, "a.bin: GGJT, which llama.cpp had before GGUF: take the model's"),
    ],
)
def test_mistakes(tmp_path: Path, typed: str, kind: type[PocketsizeError], words: str) -> None:
    for name, data in {"a.txt": b"x", "a.gguf": b"x", "a.bin": b"tjgg\x01"}.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(kind) as caught:
        resolve(typed.format(tmp=tmp_path))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "typed", ["nowhere", "model", "my-model", "small", "base", "a/b/c", "out/model.gguf"]
)
def test_a_mistyped_folder_is_not_taken_for_a_sample(typed: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(typed)
    assert "did you mean" not in str(caught.value)


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_folder() == tmp_path / "cache"
    monkeypatch.delenv("POCKETSIZE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "pocketsize"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "pocketsize"


def test_samples_are_pinned() -> None:
    for name, sample in SAMPLES.items():
        assert sample.name == name and (sample.licence == "apache-2.0") is (sample.terms is None)
        assert all(len(wheel.sha256) == 64 and wheel.version for wheel in sample.wheels)
