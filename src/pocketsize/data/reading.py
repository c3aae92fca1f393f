"""Files of text, read strictly: what is no text is refused with its file and line or row."""

from __future__ import annotations

import csv
import glob
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pocketsize.data import tables
from pocketsize.data.sources import Source
from pocketsize.errors import DataError, RefusedError, ResourceError, UsageError

TEXTS = (".txt", ".md")
SEPARATED = {".csv": ",", ".tsv": "\t"}
SUFFIXES = (*TEXTS, ".jsonl", *SEPARATED, *tables.SUFFIXES)
# Text beyond this never changes a calibration, but would fill the memory.
LIMIT_BYTES = 64 * 2**20

_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")
_SURROGATE = re.compile("[\ud800-\udfff]")

Message = Mapping[str, object]
# Rows of tables come with their columns called by what they hold.
_AS_NAMED = Source(("table",))


@dataclass(frozen=True, slots=True)
class Row:
    """One text of a file, and whether it is marked as written by a model.

    A row of a chat has `messages` and no text until a chat template gives it one. `label` is what the file
    says that the text is, of whatever type; `pair` a second text beside it. `file` was named to hold the row,
    empty where the text is all of a file.
    """

    name: str
    text: str
    generated: bool
    messages: tuple[Message, ...] = ()
    label: object = None
    pair: str = ""
    file: str = ""


def read_documents(source: Source, base: Path) -> Iterator[Row]:
    """The texts of all files of a source, in the order of their paths."""
    total, files = 0, _files(source.files, base)
    said = [key for key in ("column", "label", "pair", "rows") if getattr(source, key)]
    if said and all(path.suffix in TEXTS for path in files):
        raise UsageError(f"{files[0]}: is plain text, which has no rows; leave {said[0]} out")
    for path in files:
        for part in tables.dataset_files(path) if path.is_dir() else [path]:
            for row, size in _rows_of(part, source, total):
                total += size
                _require_room(part, total)
                yield row if row.name == str(path) else replace(row, file=str(path))


def _rows_of(path: Path, source: Source, total: int) -> Iterator[tuple[Row, int]]:
    """The texts of a file, each with the bytes that it adds to what has been read."""
    generated = path.stem.endswith(".generated")
    if path.suffix in tables.SUFFIXES:
        _require_table(path)
        for number, raw in enumerate(tables.table_rows(path, source), start=1):
            row = _table_row(f"{path}: row {number}", raw, generated)
            if row is not None:
                texts = [row.text, *(str(message["content"]) for message in row.messages)]
                yield row, sum(len(text.encode()) for text in texts)
        return
    _require_file(path)
    _require_room(path, total + path.stat().st_size)
    text = _decode(path)
    size = path.stat().st_size
    if path.suffix in TEXTS:
        yield Row(str(path), text, generated), size
        return
    read = _separated if path.suffix in SEPARATED else _jsonl
    for number, row in enumerate(read(path, text, source, generated)):
        if number == source.rows:
            return
        yield row, 0 if number else size


def _require_room(path: Path, total: int) -> None:
    if total > LIMIT_BYTES:
        raise ResourceError(
            f"{path}: the data files hold more than {LIMIT_BYTES // 2**20} MiB, a few are enough; "
            "name fewer of them, or read the first rows of each with `rows:`"
        )


def _files(patterns: Sequence[str], base: Path) -> list[Path]:
    found: set[Path] = set()
    for pattern in patterns:
        literal = base / pattern
        if literal.is_dir() and not tables.is_dataset(literal):
            raise UsageError(f"{literal}: is a folder; write {pattern.rstrip('/')}/*.txt")
        # A file whose name holds brackets is itself before it is a glob.
        matched = [literal] if literal.exists() else _glob(pattern, base)
        if not matched:
            raise DataError(f"{literal}: no such file, and no file matches it")
        found.update(matched)
    for path in found:
        if not path.is_dir() and path.suffix not in SUFFIXES:
            _require_file(path)
            raise UsageError(
                f"{path}: text is read from {', '.join(SUFFIXES)} files, not {path.suffix or 'this'}"
            )
    return sorted(found)


def _glob(pattern: str, base: Path) -> list[Path]:
    whole = pattern if Path(pattern).is_absolute() else f"{glob.escape(str(base))}/{pattern}"
    return [path for name in glob.glob(whole, recursive=True) if (path := Path(name)).is_file()]


def _require_file(path: Path) -> None:
    """Refuses what is no regular file, and what is a pickle whatever it is called."""
    if not path.is_file():
        raise DataError(f"{path}: is not a regular file")
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")) or head[
        :4
    ] == b"PK\x03\x04":
        raise RefusedError(f"{path}: is a pickle or a zip archive, which could run code; give text")


def _require_table(path: Path) -> None:
    _require_file(path)
    if not path.stat().st_size:
        raise DataError(f"{path}: is empty; give a file with rows in it")


def _decode(path: Path) -> str:
    """The file as text: UTF-8 (a byte order mark is dropped), line ends as `\\n`."""
    data = path.read_bytes()
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


def _jsonl(path: Path, text: str, source: Source, generated: bool) -> Iterator[Row]:
    column = source.column
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        name = f"{path}: line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{name}: is not JSON: {error}") from error
        key = column or ("text" if not isinstance(row, dict) or "text" in row else "messages")
        value = row.get(key) if isinstance(row, dict) else None
        if isinstance(value, list) and (column or key == "messages"):
            yield Row(name, "", generated or _mark(name, row), _messages(name, key, value))
            continue
        if not isinstance(value, str):
            raise DataError(
                f'{name}: needs an object with a string "{column or "text"}", or a list "messages"'
            )
        if not value.strip():
            raise DataError(f'{name}: "{key}" is empty; leave the row out')
        yield _labelled(Row(name, _sound(name, key, value), generated or _mark(name, row)), row, source)


def _separated(path: Path, text: str, source: Source, generated: bool) -> Iterator[Row]:
    """The rows of a table of comma- or tab-separated values whose first line names the columns."""
    csv.field_size_limit(LIMIT_BYTES)
    lines = csv.DictReader(text.splitlines(keepends=True), delimiter=SEPARATED[path.suffix], strict=True)
    names, column = lines.fieldnames or [], source.column or "text"
    for wanted in (column, source.label, source.pair):
        if wanted is not None and wanted not in names:
            raise DataError(
                f"{path}: no column {wanted}; it has {', '.join(names)}"
                f"{_hint(path, names, source) if wanted == column else ''}"
            )
    try:
        for row in lines:
            name = f"{path}: line {lines.line_num}"
            if None in row or None in row.values():
                raise DataError(f"{name}: has another number of values than the first line has names")
            if not row[column].strip():
                raise DataError(f'{name}: "{column}" is empty; leave the row out')
            yield _labelled(Row(name, row[column], generated), {k: v or None for k, v in row.items()}, source)
    except csv.Error as error:
        raise DataError(f"{path}: line {lines.line_num}: {error}") from error


def _hint(path: Path, names: Sequence[str], source: Source) -> str:
    """What may be meant where a column is not there."""
    if len(names) == 1 and ";" in names[0]:
        return f"; values of a {path.suffix} file are separated by {SEPARATED[path.suffix]!r}"
    if "messages" in names:
        return "; messages are read from .jsonl, .parquet and .arrow"
    return "" if source.column else "; name the one that holds text with `column:`"


def _labelled(row: Row, raw: Mapping[str, object], source: Source) -> Row:
    """The row with its label and the second text of a pair, where it has them."""
    label, pair = (raw.get(name) for name in tables.labels_of(source).values())
    if source.label is not None and label is None:
        raise DataError(f'{row.name}: has no "{source.label}"; give every row a label')
    if source.pair is not None and not isinstance(pair, str):
        raise DataError(f'{row.name}: has no text in "{source.pair}"; give every row the pair of its text')
    return replace(row, label=label, pair=pair if isinstance(pair, str) else "")


def _table_row(name: str, raw: Mapping[str, object], generated: bool) -> Row | None:
    """A row of a table; None where it has no text, as tables of lines have for blank ones."""
    generated = generated or _mark(name, raw)
    for key, value in raw.items():
        if key in ("generated", "label", "pair"):
            continue
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        if isinstance(value, str):
            return _labelled(Row(name, value, generated), raw, _AS_NAMED)
        if isinstance(value, list):
            return Row(name, "", generated, _messages(name, key, value))
        raise DataError(f"{name}: holds {type(value).__name__}, not text or a list of messages")
    return None


def _messages(name: str, key: str, raw: list[object]) -> tuple[Message, ...]:
    """The messages of a chat; each needs a role and a content that are text."""
    if not raw:
        raise DataError(f'{name}: "{key}" has no messages; leave the row out')
    for number, message in enumerate(raw, start=1):
        where = f'{name}: message {number} of "{key}"'
        if not isinstance(message, dict):
            raise DataError(f"{where} is no object with a role and a content")
        for word in ("role", "content"):
            if not isinstance(message.get(word), str):
                raise DataError(f'{where} needs a "{word}" that is text, found {message.get(word)!r}')
            _sound(where, word, message[word])
    # A table has each key in every row, null where a message lacks it; templates would print null.
    return tuple({k: v for k, v in m.items() if v is not None} for m in raw if isinstance(m, dict))


def _sound(name: str, key: str, text: str) -> str:
    if _SURROGATE.search(text):
        raise DataError(f'{name}: "{key}" holds half of a surrogate pair, which is no character')
    return text


def _mark(name: str, row: Mapping[str, object]) -> bool:
    mark = row.get("generated", False)
    if not isinstance(mark, bool):
        raise DataError(f'{name}: "generated" must be true or false, not {mark!r}')
    return mark
