"""A walk over a GGUF header that trusts nothing, before a reader that trusts lengths is let at it."""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from pocketsize.errors import DataError

_SIZES = {
    GGUFValueType.UINT8: 1,
    GGUFValueType.INT8: 1,
    GGUFValueType.BOOL: 1,
    GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2,
    GGUFValueType.UINT32: 4,
    GGUFValueType.INT32: 4,
    GGUFValueType.FLOAT32: 4,
    GGUFValueType.UINT64: 8,
    GGUFValueType.INT64: 8,
    GGUFValueType.FLOAT64: 8,
}
_ALIGNMENT = 32


class _Walk:
    """A position in a file of known size; every step is checked against the end."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.at = file, path, 0
        self.size = os.fstat(file.fileno()).st_size

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            raise DataError(
                f"{self.path}: {what} at byte {self.at} needs {count} bytes, {self.size - self.at} are left"
            )
        self.at += count
        return self.file.read(count)

    def skip(self, count: int, what: str) -> None:
        if count > self.size - self.at:
            raise DataError(
                f"{self.path}: {what} at byte {self.at} needs {count} bytes, {self.size - self.at} are left"
            )
        self.at += count
        self.file.seek(self.at)

    def number(self, form: str, what: str) -> int:
        return struct.unpack(f"<{form}", self.take(struct.calcsize(form), what))[0]

    def text(self, what: str) -> str:
        data = self.take(self.number("Q", what), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{self.path}: {what} at byte {self.at - len(data)} is not UTF-8") from error


def scan(path: Path) -> None:
    """Refuses a file whose header, or the places it gives its tensors, cannot be right."""
    try:
        with path.open("rb") as file:
            _scan(_Walk(file, path))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def _scan(walk: _Walk) -> None:
    if walk.take(4, "the magic") != b"GGUF":
        raise DataError(f"{walk.path}: not a GGUF file")
    if (version := walk.number("I", "the version")) not in (2, 3):
        raise DataError(f"{walk.path}: GGUF version {version}; 2 and 3 are known")
    tensors, fields = walk.number("Q", "the tensor count"), walk.number("Q", "the field count")
    seen: set[str] = set()
    for _ in range(fields):
        key = walk.text("a key")
        if not key or key in seen:
            raise DataError(f"{walk.path}: key {key[:80]!r} is {'there twice' if key else 'empty'}")
        seen.add(key)
        _skip_value(walk, key)
    places = [_tensor(walk, seen) for _ in range(tensors)]
    start = -(-walk.at // _ALIGNMENT) * _ALIGNMENT
    end = 0
    for name, offset, size in sorted(places, key=lambda place: place[1]):
        if offset % _ALIGNMENT or offset < end or start + offset + size > walk.size:
            raise DataError(
                f"{walk.path}: tensor {name}: its {size} bytes at {offset} overlap or leave the file"
            )
        end = offset + size


def _skip_value(walk: _Walk, key: str) -> None:
    kind = walk.number("I", f"the type of {key}")
    count = 1
    if kind == GGUFValueType.ARRAY:
        kind, count = walk.number("I", f"the type of {key}"), walk.number("Q", f"the length of {key}")
    if kind == GGUFValueType.STRING:
        for _ in range(count):
            walk.skip(walk.number("Q", key), key)
    elif kind in _SIZES:
        walk.skip(_SIZES[GGUFValueType(kind)] * count, key)
    else:
        raise DataError(f"{walk.path}: {key}: value type {kind} is not known")


def _tensor(walk: _Walk, seen: set[str]) -> tuple[str, int, int]:
    """Name, offset and size of one tensor."""
    name = walk.text("a tensor name")
    rank = walk.number("I", name)
    if not name or name in seen or not 1 <= rank <= 4:
        raise DataError(f"{walk.path}: tensor {name[:80]!r}: there twice, without a name, or of rank {rank}")
    seen.add(name)
    shape = [walk.number("Q", name) for _ in range(rank)]
    kind, offset = walk.number("I", name), walk.number("Q", name)
    if kind not in set(GGMLQuantizationType):
        raise DataError(f"{walk.path}: tensor {name}: type {kind} is not known")
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    if not all(0 < n < 1 << 40 for n in shape) or shape[0] % block:
        raise DataError(f"{walk.path}: tensor {name}: shape {shape} is not possible for its type")
    return name, offset, math.prod(shape) // block * size
