"""Text files, read strictly: what is no text is refused with its file and line."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pocketsize.errors import DataError, RefusedError, ResourceError, UsageError

SUFFIXES = (".txt", ".md", ".jsonl")
# Text beyond this never changes a calibration, but would fill the memory.
LIMIT_BYTES = 64 * 2**20

_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Row:
    """One text of a file, and whether it is marked as written by a model."""

    name: str
    text: str
    generated: bool


def read_documents(patterns: Sequence[str], base: Path) -> Iterator[Row]:
    """The texts of all files that the patterns name, in the order of their paths."""
    total = 0
    for path in _files(patterns, base):
        total += path.stat().st_size
        if total > LIMIT_BYTES:
            raise ResourceError(
                f"{path}: the data files hold more than {LIMIT_BYTES // 2**20} MiB, a few are enough; "
                "name fewer of them"
            )
        text = _decode(path)
        generated = path.stem.endswith(".generated")
        if path.suffix == ".jsonl":
            yield from _jsonl(path, text, generated)
        else:
            yield Row(str(path), text, generated)


def _files(patterns: Sequence[str], base: Path) -> list[Path]:
    found: set[Path] = set()
    for pattern in patterns:
        literal = base / pattern
        if literal.is_dir():
            raise UsageError(f"{literal}: is a folder; write {pattern.rstrip('/')}/*.txt")
        # A file whose name holds brackets is itself before it is a glob.
        matched = [literal] if literal.exists() else _glob(pattern, base)
        if not matched:
            raise DataError(f"{literal}: no such file, and no file matches it")
        found.update(matched)
    for path in found:
        if path.suffix not in SUFFIXES:
            raise UsageError(
                f"{path}: text is read from {', '.join(SUFFIXES)} files, not {path.suffix or 'this'}"
            )
    return sorted(found)


def _glob(pattern: str, base: Path) -> list[Path]:
    whole = pattern if Path(pattern).is_absolute() else f"{glob.escape(str(base))}/{pattern}"
    return [path for name in glob.glob(whole, recursive=True) if (path := Path(name)).is_file()]


def _decode(path: Path) -> str:
    """The file as text: UTF-8 (a byte order mark is dropped), line ends as `\\n`."""
    if not path.is_file():
        raise DataError(f"{path}: is not a regular file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if data[:1] == b"\x80" and data[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise RefusedError(f"{path}: is a pickle, which could run code; give text")
    if not data.strip():
        raise DataError(f"{path}: is empty; give a file with text in it")
    if control := _CONTROL.search(data):
        place = _line(data, control.start())
        raise DataError(
            f"{path}: line {place} holds the byte 0x{control[0][0]:02x}: a binary file? give plain text"
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place, byte = _line(data, error.start), data[error.start]
        raise DataError(
            f"{path}: line {place}: byte 0x{byte:02x} is not UTF-8; convert the file to UTF-8"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _line(data: bytes, position: int) -> int:
    return data.count(b"\n", 0, position) + 1


def _jsonl(path: Path, text: str, generated: bool) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        name = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}: is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise DataError(f'{name}: needs an object with a string "text"')
        if not row["text"].strip():
            raise DataError(f'{name}: "text" is empty; leave the row out')
        if re.search("[\ud800-\udfff]", row["text"]):
            raise DataError(f'{name}: "text" holds half of a surrogate pair, which is no character')
        mark = row.get("generated", False)
        if not isinstance(mark, bool):
            raise DataError(f'{name}: "generated" must be true or false, not {mark!r}')
        yield Row(name, row["text"], generated or mark)
