"""A strict reader and writer of safetensors files and of folders of them.

The reader checks what the format promises before any byte of a tensor is trusted, never maps a
file into memory (a file that shrinks is then an error, not a signal) and never opens a pickle or a
file outside the folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import torch
from torch import Tensor

from pocketsize.errors import DataError, RefusedError, UnsupportedError
from pocketsize.io.publish import publish_stream, sha256_of
from pocketsize.io.strictjson import parse_json_object, read_json_object, refuse_pickle

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "U16": torch.uint16,
        "I16": torch.int16,
        "U32": torch.uint32,
        "I32": torch.int32,
        "U64": torch.uint64,
        "I64": torch.int64,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F32": torch.float32,
        "F64": torch.float64,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
    }
)
_HEADER_LIMIT = 100_000_000
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor is: bytes `begin` to `end` of `file`, counted from the file's start.

    `packed_as` says how it is stored where it has to be unpacked; `end` is then the bytes it takes.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    packed_as: str | None = None


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written; `make` is called once, when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


@dataclass(frozen=True, slots=True)
class Packed:
    """A tensor that others stand for: `make` unpacks it, `files` hold what it is made of."""

    make: Callable[[], Tensor]
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a folder of safetensors files; they stay on disk until they are read.

    `packed` are those that no file holds as they are, by the name of their entry.
    """

    folder: Path
    entries: Mapping[str, Entry]
    packed: Mapping[str, Packed] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def files(self) -> list[str]:
        """Names of the files that hold tensors, sorted."""
        plain = {entry.file for entry in self.entries.values()}
        return sorted(plain.union(*(packed.files for packed in self.packed.values())))

    def read(self, name: str) -> Tensor:
        """A tensor in memory of its own, in the dtype it is stored in."""
        if name not in self.entries:
            raise DataError(f"{self.folder}: no tensor {_shown(name)}")
        entry = self.entries[name]
        if entry.name in self.packed:
            return self.packed[entry.name].make()
        path = self.folder / entry.file
        buffer = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
        descriptor, _ = open_plain(path)
        try:
            read_into(descriptor, buffer.numpy().data, entry.begin, path, name)
        finally:
            os.close(descriptor)
        return buffer.view(DTYPES[entry.dtype]).reshape(entry.shape)

    def sha256(self) -> str:
        """One hash of the names and contents of all files."""
        total = hashlib.sha256()
        for file in self.files:
            total.update(f"{file} {sha256_of(self.folder / file)}\n".encode())
        return total.hexdigest()


def open_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint of a model folder: `model.safetensors`, or the shards that its index names."""
    single, index = folder / SINGLE, folder / INDEX
    if os.path.lexists(single) and os.path.lexists(index):
        raise DataError(f"{folder}: holds both {SINGLE} and {INDEX}; remove the one that is stale")
    if os.path.lexists(single):
        return open_file(single)
    if os.path.lexists(index):
        return _open_shards(folder, index)
    raise nothing_to_open(folder)


def open_file(path: Path) -> Checkpoint:
    """The checkpoint in one safetensors file."""
    entries = _entries_of(path)
    return Checkpoint(path.parent, MappingProxyType({entry.name: entry for entry in entries}))


def write_safetensors(path: Path, tensors: Iterable[TensorSpec], metadata: Mapping[str, str]) -> str:
    """The SHA-256 of the file that now holds the tensors.

    Each tensor is made when its turn comes and let go after, so memory holds one. Data is laid out
    in the order given, wider dtypes first, which keeps every tensor aligned to its own elements.
    """
    ordered = sorted(tensors, key=lambda spec: -spec.dtype.itemsize)
    if twice := _first_twice([spec.name for spec in ordered]):
        raise ValueError(f"{path}: tensor {twice} is given twice")
    header = _header(path, ordered, metadata)

    def write(out: BinaryIO) -> None:
        out.write(header)
        for spec in ordered:
            out.write(_data(spec))

    return publish_stream(path, write)


def file_bytes(tensors: Iterable[TensorSpec], metadata: Mapping[str, str]) -> int:
    """The exact size of the file that `write_safetensors` would make; no tensor is made."""
    ordered = sorted(tensors, key=lambda spec: -spec.dtype.itemsize)
    data = sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in ordered)
    return len(_header(Path("predicted"), ordered, metadata)) + data


def _data(spec: TensorSpec) -> memoryview:
    """The bytes of a tensor that is as announced."""
    tensor = spec.make()
    if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
        found = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{spec.name}: announced {spec.dtype} {spec.shape}, made {found}")
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _header(path: Path, tensors: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON, padded with blanks so that the data begins at a multiple of 64 bytes."""
    words = {dtype: word for word, dtype in DTYPES.items()}
    table: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at = 0
    for spec in tensors:
        end = at + math.prod(spec.shape) * spec.dtype.itemsize
        table[spec.name] = {"dtype": words[spec.dtype], "shape": spec.shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % 64)
    if len(text) > _HEADER_LIMIT:
        raise UnsupportedError(
            f"{path}: {len(tensors)} tensors need a header of {len(text)} bytes; use shards"
        )
    return len(text).to_bytes(8, "little") + text


def _open_shards(folder: Path, index: Path) -> Checkpoint:
    """The checkpoint of the shards that an index names; index and shards must agree in full."""
    where = read_json_object(index, limit_bytes=_HEADER_LIMIT).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise DataError(f"{index}: no weight_map that names the file of each tensor")
    first: dict[str, str] = {}
    for name, file in where.items():
        _require_plain(name, file, index)
        first.setdefault(file, name)
    entries: dict[str, Entry] = {}
    for file, name in sorted(first.items()):
        if not os.path.lexists(folder / file):
            raise DataError(f"{folder / file}: missing; tensor {_shown(name)} is said to be in it")
        for entry in _entries_of(folder / file):
            if (other := entries.get(entry.name)) is not None:
                raise DataError(f"{folder}: tensor {_shown(entry.name)} is in both {other.file} and {file}")
            entries[entry.name] = entry
    for entry in entries.values():
        if (said := where.get(entry.name)) != entry.file:
            told = f"says {said}" if said else "does not list it"
            raise DataError(f"{index}: tensor {_shown(entry.name)} is in {entry.file}, the index {told}")
    for name, file in where.items():
        if name not in entries:
            raise DataError(
                f"{folder / file}: tensor {_shown(name)} is missing from the file that should hold it"
            )
    return Checkpoint(folder, MappingProxyType(entries))


def _require_plain(name: str, file: object, index: Path) -> None:
    """Refuses a shard name that is not a plain `.safetensors` name inside the folder."""
    if not isinstance(file, str) or not file:
        raise DataError(f"{index}: tensor {_shown(name)}: {file!r} is not a file name")
    outside = "/" in file or "\\" in file or "\0" in file or ":" in file or file in (".", "..")
    if outside or not file.isprintable():
        raise RefusedError(f"{index}: tensor {_shown(name)}: {_shown(file)} leaves the folder")
    if not file.endswith(".safetensors"):
        raise RefusedError(f"{index}: tensor {_shown(name)}: {_shown(file)} is not a .safetensors file")


def nothing_to_open(folder: Path) -> DataError | RefusedError | UnsupportedError:
    """The reason why a folder has no checkpoint."""
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    if "adapter_config.json" in names:
        base = read_json_object(folder / "adapter_config.json").get("base_model_name_or_path", "unknown")
        return UnsupportedError(f"{folder}: an adapter; merge it into its base model {str(base)!r} first")
    if pickles := [name for name in names if name.endswith(_PICKLE_SUFFIXES)]:
        return RefusedError(f"{folder / pickles[0]}: a pickle, which can run code; save it as safetensors")
    return DataError(f"{folder}: neither {SINGLE} nor {INDEX} is there")


def _entries_of(path: Path) -> list[Entry]:
    """All tensors of a file, in the order of their data, after checking the whole layout."""
    descriptor, size = open_plain(path)
    try:
        if size < 8:
            raise DataError(f"{path}: {size} bytes; a safetensors file has at least 8")
        head = _read(descriptor, min(size, 64), 0, path)
        refuse_pickle(head, path)
        if not head.strip(b"\0"):
            raise DataError(f"{path}: begins with zeros; an unfinished download? fetch it again")
        length = int.from_bytes(head[:8], "little")
        if length > _HEADER_LIMIT:
            raise DataError(f"{path}: header length {length}; at most {_HEADER_LIMIT} is sound")
        if 8 + length > size:
            raise DataError(f"{path}: header needs {8 + length} bytes, the file has {size}; fetch it again")
        raw = _read(descriptor, length, 8, path)
    finally:
        os.close(descriptor)
    refuse_pickle(raw, path)
    if not raw.startswith(b"{"):
        raise DataError(f"{path}: the header does not begin with '{{'")
    table = parse_json_object(raw, path)
    _check_metadata(table.pop("__metadata__", {}), path)
    if not table:
        raise DataError(f"{path}: no tensors")
    entries = [_entry(name, raw, 8 + length, path) for name, raw in table.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    _check_layout(entries, 8 + length, size, path)
    return entries


def _check_metadata(metadata: object, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DataError(f"{path}: __metadata__ must map text to text")


def _entry(name: str, raw: object, base: int, path: Path) -> Entry:
    """One line of the header, checked by itself."""
    bad = not name or len(name) > 512 or not name.isprintable() or "/" in name or "\\" in name or ".." in name
    if bad:
        raise RefusedError(f"{path}: tensor name {_shown(name)} is not a plain dotted name")
    if not isinstance(raw, dict) or set(raw) != {"dtype", "shape", "data_offsets"}:
        raise DataError(f"{path}: tensor {name}: needs dtype, shape and data_offsets, nothing else")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UnsupportedError(f"{path}: tensor {name}: dtype {dtype!r}; known: {', '.join(DTYPES)}")
    if not _counts(shape):
        raise DataError(f"{path}: tensor {name}: shape {str(shape)[:80]} is not a list of sizes")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise DataError(f"{path}: tensor {name}: data_offsets {str(offsets)[:80]} are not begin and end")
    needed, given = math.prod(shape) * DTYPES[dtype].itemsize, offsets[1] - offsets[0]
    if needed != given:
        raise DataError(f"{path}: tensor {name}: {dtype} {shape} is {needed} bytes, its range has {given}")
    return Entry(name, path.name, dtype, tuple(shape), base + offsets[0], base + offsets[1])


def _counts(value: object) -> bool:
    """Whether this is a list of numbers that a 64-bit size can be."""
    return (
        isinstance(value, list)
        and len(value) <= 8
        and all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 62 for n in value)
        and math.prod(n for n in value if n) < 1 << 62
    )


def _check_layout(entries: list[Entry], base: int, size: int, path: Path) -> None:
    """The ranges must cover the data exactly: no hole, no overlap, no byte too few or too many."""
    at, before = base, "the header"
    for entry in entries:
        if entry.begin != at:
            fault = "overlap" if entry.begin < at else "leave a hole"
            raise DataError(
                f"{path}: {before} and tensor {entry.name} {fault} at byte {min(entry.begin, at)}"
            )
        if entry.end > size:
            missing = f"{entries[-1].end - size} bytes are missing at the end"
            raise DataError(f"{path}: truncated in tensor {entry.name}: {missing}; fetch it again")
        at, before = entry.end, f"tensor {entry.name}"
    if at != size:
        raise RefusedError(
            f"{path}: {size - at} bytes follow {before}; such a file can be two formats at once"
        )


def open_plain(path: Path) -> tuple[int, int]:
    """A descriptor of a plain file of the folder, and its size. Never blocks on a pipe."""
    target = path
    if path.is_symlink():
        target = path.resolve()
        if not _belongs(target, path.parent):
            raise RefusedError(f"{path}: a link to {target}, outside the folder; copy the file")
    try:
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(target, flags)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode):
        return descriptor, found.st_size
    os.close(descriptor)
    if stat.S_ISCHR(found.st_mode) or stat.S_ISBLK(found.st_mode):
        raise RefusedError(f"{path}: a device, not a file")
    raise DataError(f"{path}: not a plain file")


def _belongs(target: Path, folder: Path) -> bool:
    """Whether a link's target is in the folder, or in the blobs of the same hub cache repository."""
    folder = folder.resolve()
    homes = [folder]
    if folder.parent.name == "snapshots":
        homes.append(folder.parent.parent / "blobs")
    return any(target.is_relative_to(home) for home in homes)


def _read(descriptor: int, count: int, begin: int, path: Path) -> bytes:
    data = bytearray(count)
    read_into(descriptor, memoryview(data), begin, path, "")
    return bytes(data)


def read_into(descriptor: int, view: memoryview, begin: int, path: Path, name: str) -> None:
    """Fills `view` from byte `begin`; a file that has become shorter is an error."""
    done = 0
    while done < len(view):
        try:
            got = os.preadv(descriptor, [view[done:]], begin + done)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}, reading {name or 'the header'}") from error
        if not got:
            raise DataError(f"{path}: ends inside {name or 'the header'}; it was changed while being read")
        done += got


def _first_twice(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _shown(name: str) -> str:
    """A name from a file, safe to print: escaped and cut."""
    return ascii(name[:80])[1:-1] + ("..." if len(name) > 80 else "")
