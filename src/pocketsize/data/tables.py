"""Rows of parquet and arrow files, and of the folders that `datasets` saves."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pocketsize.data.sources import Source
from pocketsize.errors import DataError, RefusedError, UnsupportedError, UsageError
from pocketsize.io.strictjson import read_json_object

SUFFIXES = (".parquet", ".arrow")
STATE, SPLITS = "state.json", "dataset_dict.json"
_BATCH = 1000
_ARROW_FILE = b"ARROW1"


def is_dataset(folder: Path) -> bool:
    """Whether `datasets` saved this folder."""
    return (folder / STATE).is_file() or (folder / SPLITS).is_file()


def dataset_files(folder: Path) -> list[Path]:
    """The arrow files of a folder made by `save_to_disk`, in the order of its rows."""
    if (folder / SPLITS).is_file():
        splits = read_json_object(folder / SPLITS).get("splits")
        names = ", ".join(map(str, splits)) if isinstance(splits, list) else "none named"
        raise UsageError(f"{folder}: holds several splits ({names}); name the folder of one of them")
    state = read_json_object(folder / STATE)
    if state.get("_indices_data_files"):
        raise UnsupportedError(f"{folder}: a selection of rows; save it with flatten_indices() and name that")
    files = state.get("_data_files")
    if not isinstance(files, list) or not files:
        raise DataError(f"{folder / STATE}: no _data_files; save the data set again")
    names = [file.get("filename") if isinstance(file, dict) else file for file in files]
    return [_inside(folder, name) for name in names]


def _inside(folder: Path, name: object) -> Path:
    if not isinstance(name, str) or not name.endswith(".arrow"):
        raise DataError(f"{folder / STATE}: {name!r} is not the name of an arrow file")
    if Path(name).name != name or "\\" in name or not name.isprintable():
        raise RefusedError(f"{folder / STATE}: {name!r} leaves the folder")
    if (folder / name).is_symlink() and not (folder / name).resolve().is_relative_to(folder.resolve()):
        raise RefusedError(f"{folder / name}: a link out of the folder; copy the file")
    return folder / name


def table_rows(path: Path, source: Source) -> Iterator[dict[str, object]]:
    """Each row as an object with the keys `text` or `messages`, and `generated`, `label` and `pair` where
    there are such columns.

    The columns that `source` names are read in place of them; at most its first `rows` rows are.
    """
    arrow = _pyarrow(path)
    try:
        for number, row in enumerate(_rows(arrow, path, source)):
            if number == source.rows:
                return
            yield row
    # Arrow raises its own classes, OSError and ValueError, each for some way of being damaged.
    except (arrow.ArrowException, OSError, ValueError) as error:
        kind = path.suffix.removeprefix(".")
        raise DataError(f"{path}: not a readable {kind} file: {_line(error)}") from error


def _rows(arrow: Any, path: Path, source: Source) -> Iterator[dict[str, object]]:
    """Rows of a file. Nothing is mapped into memory: a file that shrinks is then an error, not a signal."""
    if path.suffix == ".parquet":
        with arrow.OSFile(str(path)) as raw:
            file = importlib.import_module("pyarrow.parquet").ParquetFile(raw, pre_buffer=False)
            names = _columns(path, file.schema_arrow.names, source)
            for batch in file.iter_batches(_BATCH, columns=names, use_threads=False):
                yield from _named(batch, source)
        return
    with path.open("rb") as head:
        whole = head.read(len(_ARROW_FILE)) == _ARROW_FILE
    with arrow.OSFile(str(path)) as raw:
        reader = arrow.ipc.open_file(raw) if whole else arrow.ipc.open_stream(raw)
        names = _columns(path, reader.schema.names, source)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if whole else reader
        for batch in batches:
            yield from _named(batch.select(names), source)


def _named(batch: Any, source: Source) -> Iterator[dict[str, object]]:
    """The rows of a batch; a chosen column is called by what it holds."""
    for row in batch.to_pylist():
        beside = {key: row.pop(name) for key, name in labels_of(source).items() if name in row}
        if source.column is not None:
            value = row.pop(source.column)
            row["messages" if isinstance(value, list) else "text"] = value
        yield row | beside


def labels_of(source: Source) -> dict[str, str]:
    """What the columns of label and pair are called."""
    return {"label": source.label or "label", "pair": source.pair or "pair"}


def _columns(path: Path, names: Sequence[str], source: Source) -> list[str]:
    """The columns to read; each must be there once."""
    column = source.column
    wanted = [column] if column else [name for name in ("text", "messages") if name in names][:1]
    has = f"it has {', '.join(names)}" if names else "it has none"
    if not wanted:
        raise DataError(f"{path}: no column text or messages; {has}: name one of them with `column:`")
    for name in (wanted[0], source.label, source.pair):
        if name is not None and name not in names:
            raise DataError(f"{path}: no column {name}; {has}")
    beside = ("generated", *labels_of(source).values())
    wanted += [name for name in beside if name in names and name not in wanted]
    for name in wanted:
        if list(names).count(name) > 1:
            raise DataError(f"{path}: column {name} is there twice")
    return wanted


def _pyarrow(path: Path) -> Any:
    try:
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise UnsupportedError(
            f"{path}: is read by pyarrow, which is not installed; python -m pip install 'pocketsize[data]'"
        ) from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
