"""Bad GGUF files: one line that names the file and the place, the right exit code, nothing left behind."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from pocketsize.cli.main import main
from pocketsize.errors import PocketsizeError
from pocketsize.io.gguf.header import open_gguf, read_header
from tiny_gguf import write_gguf, write_source


def u(number: int, size: int = 8) -> bytes:
    return number.to_bytes(size, "little")


def text(word: str | bytes) -> bytes:
    data = word.encode() if isinstance(word, str) else word
    return u(len(data)) + data


def header(tensors: int = 0, fields: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + u(version, 4) + u(tensors) + u(fields)


def tensor(name: str | bytes = "t", shape: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + u(len(shape), 4) + b"".join(u(n) for n in shape) + u(kind, 4) + u(offset)


def field(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + u(kind, 4) + value


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 32)


# F28 to F38 of the list of faults: content, exit code, words that the line holds.
FAULTS: dict[str, tuple[bytes, int, str]] = {
    "empty": (b"", 3, "not a GGUF file"),
    "magic": (b"GGML" + bytes(60), 3, "not a GGUF file: it begins with b'GGML'"),
    "archive": (b"PK\x03\x04" + bytes(60), 9, "a pickle or zip archive"),
    "pickle": (pickle.dumps({"a": 1}), 9, "a pickle or zip archive"),
    "version 0": (header(version=0) + bytes(32), 4, "GGUF version 0x0"),
    "version 1": (header(version=1) + bytes(32), 4, "GGUF version 0x1"),
    "version 99": (header(version=99) + bytes(32), 4, "GGUF version 0x63"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + bytes(32), 4, "big-endian"),
    "cut in the counts": (header()[:20], 3, "the field count at byte 16 needs 8 bytes"),
    "tensors 2^63": (header(tensors=1 << 63) + bytes(64), 3, f"the tensor count is {1 << 63}"),
    "fields 2^63": (header(fields=1 << 63) + bytes(64), 3, f"the field count is {1 << 63}"),
    "array 2^63": (header(1, 1) + field("k", 9, u(4, 4) + u(1 << 63)) + bytes(64), 3, "the length of k is"),
    "texts 2^63": (header(1, 1) + field("k", 9, u(8, 4) + u(1 << 63)) + bytes(64), 3, "the length of k is"),
    "text 2^63": (header(1, 1) + u(1 << 63) + b"k" + bytes(64), 3, "a key at byte 32 needs"),
    "text just over the end": (
        header(0, 1) + field("k", 8, u(10) + b"123456789"),
        3,
        "needs 10 bytes, 9 are",
    ),
    "value type": (header(1, 1) + field("k", 77, bytes(64)), 3, "k: value type 77 is not known"),
    "array type": (header(1, 1) + field("k", 9, u(77, 4) + bytes(64)), 3, "k: an array of type 77"),
    "nested array": (header(1, 1) + field("k", 9, u(9, 4) + bytes(64)), 3, "k: an array of type 9"),
    "tensor type": (padded(header(1) + tensor(kind=200)) + bytes(128), 4, "tensor t: type 200"),
    "type that is no more": (padded(header(1) + tensor(kind=4)) + bytes(128), 4, "type Q4_2 was removed"),
    "rank 0": (padded(header(1) + tensor(shape=())) + bytes(128), 3, "'t' of rank 0"),
    "rank 2^31": (header(1) + text("t") + u(1 << 31, 4) + bytes(128), 3, f"of rank {1 << 31}"),
    "size 0": (padded(header(1) + tensor(shape=(32, 0))) + bytes(128), 3, "shape [32, 0] is not possible"),
    "overflow": (padded(header(1) + tensor(shape=(1 << 39, 1 << 39))) + bytes(128), 3, "is not possible"),
    "half a block": (padded(header(1) + tensor(shape=(33,), kind=2)) + bytes(128), 3, "shape [33]"),
    "beyond the end": (padded(header(1) + tensor(offset=1 << 40)) + bytes(128), 3, "t leave a hole"),
    "unaligned": (padded(header(1) + tensor(offset=8)) + bytes(160), 3, "offset 8 is no multiple of 32"),
    "overlap": (
        padded(header(2) + tensor("a") + tensor("b", offset=96)) + bytes(256),
        3,
        "tensor a and tensor b overlap at 96",
    ),
    "hole": (
        padded(header(2) + tensor("a") + tensor("b", offset=256)) + bytes(400),
        3,
        "leave a hole at 256",
    ),
    "key twice": (header(0, 2) + field("k", 0, b"\0") * 2 + bytes(32), 3, "key 'k' is there twice"),
    "tensor twice": (padded(header(2) + tensor() * 2) + bytes(256), 3, "tensor t is there twice"),
    "empty key": (header(0, 1) + field("", 0, b"\0") + bytes(32), 3, "key '' is empty"),
    "empty name": (padded(header(1) + tensor("")) + bytes(128), 3, "tensor ''"),
    "name for a terminal": (padded(header(1) + tensor("\x1b[31m")) + bytes(128), 3, r"\x1b[31m"),
    "key not UTF-8": (
        header(0, 1) + field(b"\xff\xfe", 0, b"\0") + bytes(32),
        3,
        "a key at byte 24 is not UTF-8",
    ),
    "alignment 0": (header(0, 1) + field("general.alignment", 4, u(0, 4)) + bytes(32), 3, "alignment is 0"),
    "alignment 13": (
        header(0, 1) + field("general.alignment", 4, u(13, 4)) + bytes(32),
        3,
        "alignment is 13",
    ),
    "alignment 2^31": (
        header(0, 1) + field("general.alignment", 4, u(1 << 31, 4)) + bytes(32),
        3,
        "power of two",
    ),
    "alignment a text": (
        header(0, 1) + field("general.alignment", 8, text("x")) + bytes(32),
        3,
        "power of two",
    ),
    "no tensors": (padded(header()), 3, "no tensors"),
    "truncated": (
        padded(header(1) + tensor()) + bytes(100),
        3,
        "truncated in tensor t: 28 bytes are missing",
    ),
    "trailing": (padded(header(1) + tensor()) + bytes(129), 9, "1 bytes follow tensor t"),
    "no architecture": (padded(header(1) + tensor()) + bytes(128), 3, "no general.architecture"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_files(
    fault: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POCKETSIZE_CACHE", str(tmp_path / "cache"))
    data, code, words = FAULTS[fault]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    assert main(["inspect", str(path)]) == code
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and f"{path}: " in err and words in err, err
    assert [child.name for child in tmp_path.iterdir()] == ["bad.gguf"]


@pytest.mark.parametrize("cut", range(24, 400, 13))
def test_a_file_cut_anywhere_is_an_error(cut: int, tmp_path: Path) -> None:
    fields = field("k", 9, u(8, 4) + u(2) + text("ab") + text("c")) + field("n", 10, u(7))
    data = padded(header(2, 2) + fields + tensor("a", (32, 2)) + tensor("b", (32,), offset=256)) + bytes(384)
    path = tmp_path / "a.gguf"
    path.write_bytes(data)
    assert list(read_header(path).tensors) == ["a", "b"]
    path.write_bytes(data[: min(cut, len(data) - 1)])
    with pytest.raises(Exception, match=r"needs|ends inside|truncated|count is|length of") as caught:
        read_header(path)
    assert type(caught.value).__name__ == "DataError"


def test_a_sound_header_is_read_as_the_gguf_package_reads_it(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", write_source(tmp_path / "source", "llama"))
    ours, theirs = open_gguf(tmp_path / "a.gguf"), gguf.GGUFReader(tmp_path / "a.gguf")
    fields = {key: f.contents() for key, f in theirs.fields.items() if not key.startswith("GGUF.")}
    assert dict(ours.fields) == fields
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.kind == tensor.tensor_type.name and mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert (mine.begin, mine.end - mine.begin) == (tensor.data_offset, tensor.n_bytes)


def _split(tmp_path: Path, change: Callable[[int, gguf.GGUFWriter], object] | None = None) -> list[Path]:
    """A model of two tensors, one in each of two parts."""
    paths = [tmp_path / f"m-{i + 1:05}-of-00002.gguf" for i in range(2)]
    for i, path in enumerate(paths):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", 2)
        writer.add_tensor(f"t{i}", np.full((2, 32), i, np.float32))
        if change:
            change(i, writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


def test_a_split_file_is_read_whole_from_any_part(tmp_path: Path) -> None:
    for path in _split(tmp_path):
        file = open_gguf(path)
        assert list(file.tensors) == ["t0", "t1"] and len(file.paths) == 2
        assert file.tensors["t1"].path.name == "m-00002-of-00002.gguf"
        assert file.bytes == sum(p.stat().st_size for p in file.paths)


def _foreign(i: int, writer: gguf.GGUFWriter) -> None:
    writer.kv_data[0]["split.no"].value = 0


def _same(i: int, writer: gguf.GGUFWriter) -> None:
    writer.tensors[0] = {"t": next(iter(writer.tensors[0].values()))}


def _more(i: int, writer: gguf.GGUFWriter) -> None:
    writer.kv_data[0]["split.tensors.count"].value = 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_foreign, r"m-00002-of-00002.gguf: says that it is part 1 of 2, not 2"),
        (_same, r"m-00002-of-00002.gguf: tensor t is in m-00001-of-00002.gguf too"),
        (_more, r"its parts hold 2 tensors, the first says 3"),
    ],
)
def test_parts_that_do_not_belong_together(
    change: Callable[[int, gguf.GGUFWriter], object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(Exception, match=words) as caught:
        open_gguf(_split(tmp_path, change)[0])
    assert type(caught.value).__name__ == "DataError"


def test_a_missing_or_renamed_part(tmp_path: Path) -> None:
    first, second = _split(tmp_path)
    second.rename(tmp_path / "second.gguf")
    with pytest.raises(Exception, match=r"m-00002-of-00002.gguf: missing; the model is split into 2 files"):
        open_gguf(first)
    with pytest.raises(Exception, match=r"second.gguf: part of 2; give it its name back"):
        open_gguf(tmp_path / "second.gguf")


def test_mutated_files_are_read_or_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", write_source(tmp_path / "source", "llama"))
    sound = (tmp_path / "a.gguf").read_bytes()
    random = np.random.default_rng(0)
    end = min(tensor.begin for tensor in open_gguf(tmp_path / "a.gguf").tensors.values())
    refused = 0
    for _ in range(300):
        data = bytearray(sound)
        for place in random.integers(0, end, random.integers(1, 6)):
            data[place] = random.integers(0, 256)
        (tmp_path / "b.gguf").write_bytes(data)
        try:
            open_gguf(tmp_path / "b.gguf")
        except PocketsizeError as error:
            assert str(tmp_path / "b.gguf") in str(error) and len(str(error)) < 600
            refused += 1
    assert 50 < refused < 300
