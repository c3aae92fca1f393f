"""The safetensors reader and writer: agrees with the format's own library, refuses every fault."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import socket
import struct
import weakref
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pocketsize.errors import DataError, PocketsizeError, RefusedError, UnsupportedError
from pocketsize.io import checkpoint as checkpoint_module
from pocketsize.io.checkpoint import TensorSpec, open_checkpoint, open_file, write_safetensors
from pocketsize.io.publish import sha256_of

_DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.int64]


def _tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 100, (3, 5), generator=generator)
    return {f"t.{i}": raw.to(dtype) for i, dtype in enumerate(_DTYPES)} | {"one": torch.tensor(3.5)}


def _specs(tensors: dict[str, torch.Tensor]) -> list[TensorSpec]:
    return [TensorSpec(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()]


def _raw(path: Path, header: object, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def _line(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape or [(end - begin) // 4], "data_offsets": [begin, end]}


def test_written_file_is_read_by_the_reference_library(tmp_path: Path) -> None:
    tensors = _tensors()
    digest = write_safetensors(tmp_path / "a.safetensors", _specs(tensors), {"format": "pt"})
    read = load_file(tmp_path / "a.safetensors")
    assert digest == sha256_of(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    assert all(read[name].dtype == t.dtype and torch.equal(read[name], t) for name, t in tensors.items())
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_file_of_the_reference_library_is_read(tmp_path: Path) -> None:
    tensors = _tensors()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = checkpoint.read(name)
        assert read.dtype == tensor.dtype and torch.equal(read, tensor)


def test_order_alignment_and_bytes_are_fixed(tmp_path: Path) -> None:
    specs = _specs({"b": torch.ones(3, dtype=torch.int8), "z": torch.ones(2), "a": torch.zeros(2)})
    first = write_safetensors(tmp_path / "1", specs, {"b": "1", "a": "2"})
    second = write_safetensors(tmp_path / "2", specs, {"a": "2", "b": "1"})
    entries = open_file(tmp_path / "1").entries
    assert first == second
    assert list(entries) == ["z", "a", "b"]
    assert entries["z"].begin % 64 == 0


def test_one_tensor_is_made_at_a_time(tmp_path: Path) -> None:
    alive: list[int] = []

    def make() -> torch.Tensor:
        made = torch.ones(1000)
        alive.append(1)
        assert len(alive) == 1
        weakref.finalize(made, alive.pop)
        return made

    specs = [TensorSpec(f"t{i}", torch.float32, (1000,), make) for i in range(3)]
    write_safetensors(tmp_path / "a", specs, {})
    assert len(open_file(tmp_path / "a").entries) == 3


def test_a_spec_that_lies_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="announced"):
        write_safetensors(tmp_path / "a", [TensorSpec("t", torch.float32, (2,), lambda: torch.ones(3))], {})
    assert os.listdir(tmp_path) == []


def test_shards(tmp_path: Path) -> None:
    _shards(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.files == ["one.safetensors", "two.safetensors"]
    assert torch.equal(checkpoint.read("b"), torch.full((2,), 2.0))
    digest = checkpoint.sha256()
    save_file({"b": torch.full((2,), 3.0)}, tmp_path / "two.safetensors")
    assert open_checkpoint(tmp_path).sha256() != digest


def test_links_into_a_hub_cache_are_followed(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "rev"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, blobs / "0123")
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123")
    assert torch.equal(open_checkpoint(snapshot).read("a"), torch.ones(2))


def test_file_shortened_while_open(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    os.truncate(tmp_path / "model.safetensors", checkpoint.entries["b"].begin + 1)
    with pytest.raises(DataError, match=r"model\.safetensors: ends inside b"):
        checkpoint.read("b")


def test_reading_an_unknown_tensor(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="no tensor c"):
        open_checkpoint(tmp_path).read("c")


_HEADERS: dict[str, tuple[object, bytes, type[PocketsizeError], str]] = {
    "hole": (
        {"a": _line(0, 8), "b": _line(12, 16)},
        bytes(16),
        DataError,
        "tensor a and tensor b leave a hole",
    ),
    "first hole": ({"a": _line(4, 8)}, bytes(8), DataError, "the header and tensor a leave a hole"),
    "overlap": ({"a": _line(0, 8), "b": _line(4, 12)}, bytes(12), DataError, "tensor a and tensor b overlap"),
    "same range": (
        {"a": _line(0, 8), "b": _line(0, 8)},
        bytes(8),
        DataError,
        "tensor a and tensor b overlap",
    ),
    "begin after end": ({"a": _line(8, 0, [2])}, bytes(8), DataError, "tensor a: data_offsets"),
    "shape": ({"a": _line(0, 8, [3])}, bytes(8), DataError, "tensor a: F32 [3] is 12 bytes, its range has 8"),
    "shape overflow": ({"a": _line(0, 8, [2**40, 2**40])}, bytes(8), DataError, "tensor a: shape"),
    "negative": ({"a": _line(0, 8, [-2, -1])}, bytes(8), DataError, "tensor a: shape"),
    "bool as size": ({"a": _line(0, 4, [True])}, bytes(4), DataError, "tensor a: shape"),
    "dtype": (
        {"a": _line(0, 8, [2], "F31")},
        bytes(8),
        UnsupportedError,
        "tensor a: dtype 'F31'; known: BOOL",
    ),
    "dtype list": ({"a": _line(0, 8) | {"dtype": []}}, bytes(8), UnsupportedError, "tensor a: dtype []"),
    "extra key": ({"a": _line(0, 8) | {"x": 1}}, bytes(8), DataError, "tensor a: needs dtype"),
    "not a line": ({"a": 3}, bytes(8), DataError, "tensor a: needs dtype"),
    "twice": (b'{"a":1,"a":2}', b"", DataError, "key 'a' is there twice"),
    "blank first": (b'  {"a":1}', b"", DataError, "does not begin with '{'"),
    "not utf-8": (b'{"\xff":1}', b"", DataError, "not sound JSON"),
    "not closed": (b'{"a":1', b"", DataError, "not sound JSON"),
    "nested": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b"", DataError, "nested too deep"),
    "metadata": ({"__metadata__": {"a": 1}, "a": _line(0, 8)}, bytes(8), DataError, "__metadata__"),
    "no tensors": ({"__metadata__": {"format": "pt"}}, b"", DataError, "no tensors"),
    "cut by one": (
        {"a": _line(0, 8), "b": _line(8, 16)},
        bytes(15),
        DataError,
        "in tensor b: 1 bytes are missing",
    ),
    "cut in half": (
        {"a": _line(0, 8), "b": _line(8, 16)},
        bytes(4),
        DataError,
        "in tensor a: 12 bytes are missing",
    ),
    "cut at a page": (
        {"a": _line(0, 4096), "b": _line(4096, 8192)},
        bytes(4096 - 8 - 128),
        DataError,
        "in tensor a: ",
    ),
    "trailing": ({"a": _line(0, 8)}, bytes(8) + b"PK\x03\x04", RefusedError, "4 bytes follow tensor a"),
    "pickle header": (pickle.dumps({"a": 1}), b"", RefusedError, "can run code"),
    "path name": ({"../../x": _line(0, 8)}, bytes(8), RefusedError, "tensor name ../../x"),
    "absolute name": ({"/etc/x": _line(0, 8)}, bytes(8), RefusedError, "tensor name /etc/x"),
    "nul name": ({"a\0b": _line(0, 8)}, bytes(8), RefusedError, r"tensor name a\x00b"),
    "escape name": ({"a\x1b[31m": _line(0, 8)}, bytes(8), RefusedError, r"tensor name a\x1b[31m"),
    "long name": ({"a" * 1_000_000: _line(0, 8)}, bytes(8), RefusedError, "a..."),
}


@pytest.mark.parametrize("fault", _HEADERS)
def test_bad_layouts(tmp_path: Path, fault: str) -> None:
    header, data, kind, words = _HEADERS[fault]
    path = _raw(tmp_path / "model.safetensors", header, data)
    _refuses(tmp_path, path, kind, words)


_FILES: dict[str, tuple[bytes, type[PocketsizeError], str]] = {
    "empty": (b"", DataError, "0 bytes; a safetensors file has at least 8"),
    "7 bytes": (b"1234567", DataError, "7 bytes"),
    "header 2^63": (struct.pack("<Q", 2**63) + b"{}", DataError, str(2**63)),
    "header 101 MB": (struct.pack("<Q", 101_000_000) + b"{}" * 6, DataError, "at most 100000000 is sound"),
    "header 99 MB": (struct.pack("<Q", 99_000_000) + b"{}", DataError, "the file has 10"),
    "zeros": (bytes(4096), DataError, "begins with zeros"),
    "pickle": (pickle.dumps({"a": 1}) + bytes(64), RefusedError, "can run code"),
    "lfs pointer": (b"version https://git-lfs.example/spec/v1\noid sha256:0\n", DataError, "header length"),
}


@pytest.mark.parametrize("fault", _FILES)
def test_bad_files(tmp_path: Path, fault: str) -> None:
    data, kind, words = _FILES[fault]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    _refuses(tmp_path, path, kind, words)


def test_zip_in_disguise(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"cos\nsystem\n")
    _refuses(tmp_path, path, RefusedError, "can run code")


@pytest.mark.parametrize("kind", ["folder", "fifo", "socket", "dangling", "outside", "device"])
def test_not_a_plain_file(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    path = folder / "model.safetensors"
    expected: type[PocketsizeError] = DataError
    match kind:
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as server:
                monkeypatch.chdir(folder)  # the name of a socket may not be long
                server.bind(path.name)
        case "dangling":
            path.symlink_to(folder / "absent")
        case "outside":
            save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
            path.symlink_to(tmp_path / "x.safetensors")
            expected = RefusedError
        case "device":
            path.symlink_to("/dev/zero")
            expected = RefusedError
    with pytest.raises(expected, match=re.escape(str(path))):
        open_checkpoint(folder)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")

    def refuse(path: object, *_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)  # root may read everything
    with pytest.raises(DataError, match=r"model\.safetensors: cannot be read: Permission denied"):
        open_checkpoint(tmp_path)


def test_a_hard_link_is_a_file_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    os.link(tmp_path / "x.safetensors", tmp_path / "model" / "model.safetensors")
    assert torch.equal(open_checkpoint(tmp_path / "model").read("a"), torch.ones(2))


def test_much_metadata_is_read_and_goes_no_further(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors", metadata={"x": "y" * 20_000_000})
    checkpoint = open_checkpoint(tmp_path)
    write_safetensors(tmp_path / "out", _specs({"a": checkpoint.read("a")}), {})
    assert (tmp_path / "out").stat().st_size < 200


def test_more_tensors_than_a_header_holds_are_refused_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_module, "_HEADER_LIMIT", 500)
    specs = _specs({f"t{i}": torch.ones(1) for i in range(20)})
    for spec in specs:
        object.__setattr__(spec, "make", pytest.fail)
    with pytest.raises(UnsupportedError, match=r"20 tensors need a header of .* bytes; use shards"):
        write_safetensors(tmp_path / "a", specs, {})
    assert os.listdir(tmp_path) == []


def _shards(folder: Path) -> dict[str, str]:
    save_file({"a": torch.ones(2)}, folder / "one.safetensors")
    save_file({"b": torch.full((2,), 2.0)}, folder / "two.safetensors")
    where = {"a": "one.safetensors", "b": "two.safetensors"}
    _index(folder, where)
    return where


def _index(folder: Path, where: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


_INDEXES: dict[str, tuple[object, type[PocketsizeError], str]] = {
    "outside": ({"a": "../x.safetensors"}, RefusedError, "tensor a: ../x.safetensors leaves the folder"),
    "absolute": ({"a": "/x.safetensors"}, RefusedError, "tensor a: /x.safetensors leaves"),
    "backslash": ({"a": "..\\x.safetensors"}, RefusedError, "leaves the folder"),
    "nul": ({"a": "x\0.safetensors"}, RefusedError, "leaves the folder"),
    "pickle shard": ({"a": "x.bin"}, RefusedError, "x.bin is not a .safetensors file"),
    "number": ({"a": 3}, DataError, "tensor a: 3 is not a file name"),
    "empty": ({}, DataError, "no weight_map"),
    "not a map": ([1], DataError, "no weight_map"),
    "shard missing": (
        {"a": "one.safetensors", "b": "two.safetensors", "c": "three.safetensors"},
        DataError,
        "three.safetensors: missing; tensor c",
    ),
    "tensor missing": (
        {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"},
        DataError,
        "two.safetensors: tensor c is missing",
    ),
    "not listed": (
        {"a": "one.safetensors", "c": "two.safetensors"},
        DataError,
        "tensor b is in two.safetensors",
    ),
    "wrong shard": (
        {"a": "two.safetensors", "b": "one.safetensors"},
        DataError,
        "tensor a is in one.safetensors, the index says two.safetensors",
    ),
}


@pytest.mark.parametrize("fault", _INDEXES)
def test_bad_indexes(tmp_path: Path, fault: str) -> None:
    where, kind, words = _INDEXES[fault]
    _shards(tmp_path)
    _index(tmp_path, where)
    with pytest.raises(kind, match=re.escape(words)):
        open_checkpoint(tmp_path)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    _shards(tmp_path)
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "two.safetensors")
    with pytest.raises(DataError, match=r"tensor a is in both one\.safetensors and two\.safetensors"):
        open_checkpoint(tmp_path)


def test_single_file_and_index_together(tmp_path: Path) -> None:
    _shards(tmp_path)
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match="holds both"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name,kind",
    [
        ("pytorch_model.bin", RefusedError),
        ("adapter_config.json", UnsupportedError),
        ("model.gguf", DataError),
        ("README.md", DataError),
    ],
)
def test_folders_without_safetensors(tmp_path: Path, name: str, kind: type[PocketsizeError]) -> None:
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(kind):
        open_checkpoint(tmp_path)


def _refuses(folder: Path, path: Path, kind: type[PocketsizeError], words: str) -> None:
    """One line that names the file and says these words; nothing changed."""
    before = path.read_bytes()
    with pytest.raises(kind, match=re.escape(words)) as caught:
        open_checkpoint(folder)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert path.read_bytes() == before and os.listdir(folder) == [path.name]
