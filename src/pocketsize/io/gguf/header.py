"""A strict reader of GGUF headers: every count, length, name and place is checked before it is trusted.

Nothing is mapped into memory, so a file that shrinks while it is read is an error and not a signal.
"""

from __future__ import annotations

import io
import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from pocketsize.errors import DataError, RefusedError, UnsupportedError
from pocketsize.io.checkpoint import open_plain
from pocketsize.io.strictjson import refuse_ancestor, refuse_pickle

_T = TypeVar("_T")
# Types that files had once, by the numbers that are no longer given.
_REMOVED = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"} | {
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}
_FORMS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
# Bytes that a field and a tensor take at least, which bounds how many there can be.
_LEAST_FIELD, _LEAST_TENSOR = 13, 32
_HEADER_LIMIT = 1 << 29
_ALIGNMENT, _WIDEST_ALIGNMENT = 32, 1 << 16
_CHUNK = 1 << 20
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where a tensor is: bytes `begin` to `end` of the file `path`; `shape` has the rows first."""

    name: str
    kind: str
    shape: tuple[int, ...]
    path: Path
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The header of a GGUF file, or of all parts of a split one; the tensors stay on disk."""

    paths: tuple[Path, ...]
    fields: Mapping[str, object]
    tensors: Mapping[str, GgufTensor]

    @property
    def path(self) -> Path:
        """The file, or the first of its parts."""
        return self.paths[0]

    @property
    def bytes(self) -> int:
        """The size of the file or its parts."""
        return sum(path.stat().st_size for path in self.paths)

    def of(self, key: str, kind: type[_T]) -> _T:
        """The value of a key that must be there."""
        if key not in self.fields:
            raise DataError(f"{self.path}: no {key}, which a model needs")
        value = self.fields[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise DataError(f"{self.path}: {key} is {str(value)[:80]!r}; needed: {kind.__name__}")
        return value

    def get(self, key: str, kind: type[_T]) -> _T | None:
        """The value of a key that may be absent."""
        return self.of(key, kind) if key in self.fields else None


def open_gguf(path: Path) -> GgufFile:
    """The file, or where its name says that it is split (`NAME-00001-of-00003.gguf`), all parts of it."""
    found = _SPLIT.fullmatch(path.name)
    if found is None:
        file = read_header(path)
        if (count := file.get("split.count", int)) is not None and count > 1:
            raise DataError(f"{path}: part of {count}; give it its name back, NAME-00001-of-{count:05}.gguf")
        return _not_empty(file)
    return _not_empty(_open_parts(path, found))


def _open_parts(path: Path, found: re.Match[str]) -> GgufFile:
    count = int(found["count"])
    names = [f"{found['stem']}-{i + 1:05}-of-{count:05}.gguf" for i in range(min(count, 1000))]
    if not 1 <= int(found["number"]) <= count or count != len(names):
        raise DataError(f"{path}: part {found['number']} of {found['count']} is no sound number")
    for name in names:
        if not os.path.lexists(path.with_name(name)):
            raise DataError(f"{path.with_name(name)}: missing; the model is split into {count} files")
    parts = [read_header(path.with_name(name)) for name in names]
    tensors: dict[str, GgufTensor] = {}
    for i, part in enumerate(parts):
        said = part.of("split.no", int), part.of("split.count", int)
        if said != (i, count):
            raise DataError(f"{part.path}: says that it is part {said[0] + 1} of {said[1]}, not {i + 1}")
        for name, tensor in part.tensors.items():
            if name in tensors:
                raise DataError(f"{part.path}: tensor {_shown(name)} is in {tensors[name].path.name} too")
            tensors[name] = tensor
    total = parts[0].get("split.tensors.count", int)
    if total is not None and total != len(tensors):
        raise DataError(f"{path}: its parts hold {len(tensors)} tensors, the first says {total}")
    paths = tuple(part.path for part in parts)
    return GgufFile(paths, parts[0].fields, MappingProxyType(tensors))


def _not_empty(file: GgufFile) -> GgufFile:
    if not file.tensors:
        raise DataError(f"{file.path}: no tensors")
    return file


def read_header(path: Path) -> GgufFile:
    """The header of one GGUF file, after its whole layout has been checked."""
    descriptor, size = open_plain(path)
    try:
        return _read(_Walk(descriptor, size, path))
    finally:
        os.close(descriptor)


class _Walk:
    """A position in a file of known size; every step is checked against the end."""

    def __init__(self, descriptor: int, size: int, path: Path) -> None:
        self.path, self.size, self.at = path, size, 0
        self._file = io.FileIO(descriptor, closefd=False)
        self._buffer = io.BufferedReader(self._file, _CHUNK)

    def take(self, count: int, what: str) -> bytes:
        left = min(self.size, _HEADER_LIMIT) - self.at
        if count > left:
            limit = "the file ends" if self.size <= _HEADER_LIMIT else f"a header has {_HEADER_LIMIT} bytes"
            raise DataError(
                f"{self.path}: {_shown(what)} at byte {self.at} needs {count} bytes, {left} are left; {limit}"
            )
        try:
            data = self._buffer.read(count)
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror or error}, reading {_shown(what)}") from error
        if len(data) != count:
            raise DataError(f"{self.path}: ends inside {_shown(what)}; it was changed while being read")
        self.at += count
        return data

    def number(self, form: str, what: str) -> int:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(form), what))[0]

    def text(self, what: str) -> str:
        begin = self.at
        data = self.take(self.number("Q", what), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: {_shown(what)} at byte {begin} is not UTF-8") from error

    def count(self, least: int, what: str) -> int:
        """A count of things that take at least so many bytes each."""
        number = self.number("Q", what)
        if number * least > self.size - self.at:
            raise DataError(f"{self.path}: {what} is {number}; the file has {self.size} bytes")
        return number


def _read(walk: _Walk) -> GgufFile:
    path = walk.path
    head = walk.take(min(walk.size, 4), "the magic")
    refuse_pickle(head, path)
    refuse_ancestor(head, path)
    if head != b"GGUF":
        raise DataError(f"{path}: not a GGUF file: it begins with {head!r}")
    if (version := walk.number("I", "the version")) not in (2, 3):
        big = ", big-endian" if version & 0xFFFF == 0 and version else ""
        raise UnsupportedError(f"{path}: GGUF version {version:#x}{big}; 2 and 3, little-endian, are read")
    tensors = walk.count(_LEAST_TENSOR, "the tensor count")
    fields = _fields(walk, walk.count(_LEAST_FIELD, "the field count"))
    alignment = fields.get("general.alignment", _ALIGNMENT)
    sound = isinstance(alignment, int) and 8 <= alignment <= _WIDEST_ALIGNMENT
    if not isinstance(alignment, int) or not sound or alignment & (alignment - 1):
        raise DataError(f"{path}: general.alignment is {str(alignment)[:80]}; a power of two is needed")
    found: dict[str, GgufTensor] = {}
    for _ in range(tensors):
        tensor = _tensor(walk, alignment)
        if tensor.name in found:
            raise DataError(f"{path}: tensor {_shown(tensor.name)} is there twice")
        found[tensor.name] = tensor
    placed = _placed(found, walk, alignment)
    return GgufFile((path,), MappingProxyType(fields), MappingProxyType(placed))


def _fields(walk: _Walk, count: int) -> dict[str, object]:
    fields: dict[str, object] = {}
    for _ in range(count):
        key = walk.text("a key")
        if not key or key in fields:
            raise DataError(f"{walk.path}: key {_shown(key)!r} is {'there twice' if key else 'empty'}")
        kind = walk.number("I", f"the type of {key}")
        if kind == GGUFValueType.ARRAY:
            kind = walk.number("I", f"the type of {key}")
            fields[key] = _array(walk, key, kind)
        else:
            fields[key] = _value(walk, key, kind)
    return fields


def _value(walk: _Walk, key: str, kind: int) -> object:
    if kind == GGUFValueType.STRING:
        return walk.text(key)
    if kind not in _FORMS:
        raise DataError(f"{walk.path}: {_shown(key)}: value type {kind} is not known")
    return walk.number(_FORMS[GGUFValueType(kind)], key)


def _array(walk: _Walk, key: str, kind: int) -> list[object]:
    if kind == GGUFValueType.STRING:
        return [walk.text(key) for _ in range(walk.count(8, f"the length of {_shown(key)}"))]
    if kind not in _FORMS:
        raise DataError(f"{walk.path}: {_shown(key)}: an array of type {kind} is not known")
    dtype = np.dtype(f"<{_FORMS[GGUFValueType(kind)]}")
    count = walk.count(dtype.itemsize, f"the length of {_shown(key)}")
    return np.frombuffer(walk.take(count * dtype.itemsize, key), dtype).tolist()


def _tensor(walk: _Walk, alignment: int) -> GgufTensor:
    """One line of the table of tensors; places are still counted from the start of the data."""
    name = walk.text("a tensor name")
    rank = walk.number("I", name)
    if not name or not 1 <= rank <= 4 or not name.isprintable() or len(name) > 512:
        raise DataError(f"{walk.path}: tensor {_shown(name)!r} of rank {rank} is no sound tensor")
    shape = [walk.number("Q", name) for _ in range(rank)]
    kind, offset = walk.number("I", name), walk.number("Q", name)
    if kind in _REMOVED:
        raise UnsupportedError(
            f"{walk.path}: tensor {name}: type {_REMOVED[kind]} was removed from GGUF; give a newer file, "
            "or the model it was made from"
        )
    if kind not in set(GGMLQuantizationType):
        raise UnsupportedError(f"{walk.path}: tensor {name}: type {kind} is not known")
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if not all(0 < n < 1 << 40 for n in shape) or shape[0] % block or math.prod(shape) >= 1 << 48:
        raise DataError(f"{walk.path}: tensor {name}: shape {shape} is not possible for its type")
    if offset % alignment:
        raise DataError(f"{walk.path}: tensor {name}: offset {offset} is no multiple of {alignment}")
    end = offset + math.prod(shape) // block * size
    return GgufTensor(name, GGMLQuantizationType(kind).name, tuple(reversed(shape)), walk.path, offset, end)


def _placed(found: dict[str, GgufTensor], walk: _Walk, alignment: int) -> dict[str, GgufTensor]:
    """The tensors with their places in the file, which must cover the data: no hole, no overlap."""
    start = _padded(walk.at, alignment)
    at, before = 0, "the header"
    placed: dict[str, GgufTensor] = {}
    for tensor in sorted(found.values(), key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != at:
            fault = "overlap" if tensor.begin < at else "leave a hole"
            raise DataError(f"{walk.path}: {before} and tensor {tensor.name} {fault} at {tensor.begin}")
        if start + tensor.end > walk.size:
            missing = f"{start + tensor.end - walk.size} bytes are missing"
            raise DataError(
                f"{walk.path}: truncated in tensor {tensor.name}: {missing}; fetch the file again"
            )
        place = (walk.path, start + tensor.begin, start + tensor.end)
        placed[tensor.name] = GgufTensor(tensor.name, tensor.kind, tensor.shape, *place)
        at, before = _padded(tensor.end, alignment), f"tensor {tensor.name}"
    if walk.size > start + at:
        more = walk.size - start - at
        raise RefusedError(
            f"{walk.path}: {more} bytes follow {before}; such a file can be two formats at once"
        )
    return placed


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _shown(name: str) -> str:
    """A name from a file, safe to print: escaped and cut."""
    return ascii(name[:80])[1:-1] + ("..." if len(name) > 80 else "")
