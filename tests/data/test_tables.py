"""Parquet and arrow files, and folders of `datasets`: what is read, and what is refused."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pocketsize.data import reading
from pocketsize.data.sources import Source
from pocketsize.data.text import read_corpus, require_evaluable
from pocketsize.errors import (
    DataError,
    PocketsizeError,
    RefusedError,
    ResourceError,
    UnsupportedError,
    UsageError,
)

pa = pytest.importorskip("pyarrow", reason="needs the extra data")
pq = pytest.importorskip("pyarrow.parquet")

ROWS = [{"id": i, "text": f"text {i}"} for i in range(5)]
CHATS = [[{"role": "user", "content": f"question {i}"}] for i in range(3)]


def parquet(path: Path, columns: dict[str, list[Any]], **options: Any) -> Path:
    pq.write_table(pa.table(columns), path, **options)
    return path


def arrow(path: Path, columns: dict[str, list[Any]], *, whole: bool = False, batch: int = 2) -> Path:
    """An arrow stream, as `datasets` writes; or an arrow file."""
    table = pa.table(columns)
    make = pa.ipc.new_file if whole else pa.ipc.new_stream
    with pa.OSFile(str(path), "wb") as sink, make(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch)
    return path


def dataset(folder: Path, parts: list[dict[str, list[Any]]]) -> Path:
    """A folder as `save_to_disk` of `datasets` leaves it."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{len(parts):05}.arrow" for i in range(len(parts))]
    for name, columns in zip(names, parts, strict=True):
        arrow(folder / name, columns)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def texts(source: Source | list[str], base: Path) -> list[str]:
    return [d.text for d in read_corpus(source, base).documents]


TEXTS = {"text": [row["text"] for row in ROWS]}
FIVE = {"id": [row["id"] for row in ROWS]} | TEXTS


@pytest.mark.parametrize("options", [{}, {"compression": "zstd", "row_group_size": 2}, {"version": "1.0"}])
def test_rows_of_parquet_are_documents_named_by_row(tmp_path: Path, options: dict[str, Any]) -> None:
    parquet(tmp_path / "a.parquet", FIVE, **options)
    documents = read_corpus(["a.parquet"], tmp_path).documents
    assert [d.text for d in documents] == FIVE["text"]
    assert documents[2].name == f"{tmp_path / 'a.parquet'}: row 3"


@pytest.mark.parametrize("whole", [True, False])
def test_arrow_files_and_streams(tmp_path: Path, whole: bool) -> None:
    arrow(tmp_path / "a.arrow", FIVE, whole=whole)
    assert texts(["*.arrow"], tmp_path) == FIVE["text"]


def test_a_saved_dataset_is_read_in_its_own_order(tmp_path: Path) -> None:
    dataset(tmp_path / "set", [{"text": ["z", "y"]}, {"text": ["a"]}])
    assert texts(["set"], tmp_path) == ["z", "y", "a"]
    assert read_corpus(["set"], tmp_path).documents[2].name.endswith("data-00001-of-00002.arrow: row 1")


def test_the_same_text_has_the_same_hash_in_every_format(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", FIVE)
    dataset(tmp_path / "set", [FIVE])
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert len({read_corpus([name], tmp_path).sha256 for name in ("a.parquet", "set", "a.jsonl")}) == 1


def test_a_column_and_a_number_of_rows_can_be_chosen(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", {"text": ["no"] * 4, "content": list("abcd")})
    (tmp_path / "b.jsonl").write_text("".join(f'{{"content": "{c}"}}\n' for c in "efgh"))
    chosen = Source(("*.parquet", "*.jsonl"), column="content", rows=3)
    assert texts(chosen, tmp_path) == ["a", "b", "c", "e", "f", "g"]


def test_rows_without_text_are_left_out(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", {"text": ["one", "", " \n", None, "two"]})
    documents = read_corpus(["a.parquet"], tmp_path).documents
    assert [(d.text, d.name[-5:]) for d in documents] == [("one", "row 1"), ("two", "row 5")]


def test_generated_rows_do_not_evaluate(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", {"text": ["a", "b"], "generated": [False, True]})
    parquet(tmp_path / "b.generated.parquet", {"text": ["a"]})
    parquet(tmp_path / "c.parquet", {"text": ["a"], "generated": [False]})
    for name in ("a.parquet", "b.generated.parquet"):
        with pytest.raises(UsageError, match="never evaluate"):
            require_evaluable(read_corpus([name], tmp_path))
    require_evaluable(read_corpus(["c.parquet"], tmp_path))


def test_chats_go_to_the_template_with_their_names(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", {"messages": CHATS})
    seen: list[Any] = []

    def render(chats: Any) -> list[str]:
        seen.extend(chats)
        return [f"<{messages[0]['content']}>" for _, messages in chats]

    corpus = read_corpus(["a.parquet"], tmp_path, render)
    assert [d.text for d in corpus.documents] == ["<question 0>", "<question 1>", "<question 2>"]
    assert seen[1] == (f"{tmp_path / 'a.parquet'}: row 2", ({"role": "user", "content": "question 1"},))
    with pytest.raises(UsageError, match="needs the chat template"):
        read_corpus(["a.parquet"], tmp_path)


def test_a_key_that_only_some_messages_have_is_not_null_in_the_others(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "a", "name": None}, {"role": "user", "content": "b", "name": "x"}]
    parquet(tmp_path / "a.parquet", {"messages": [chat]})
    (row,) = reading.read_documents(Source(("a.parquet",)), tmp_path)
    assert [sorted(message) for message in row.messages] == [["content", "role"], ["content", "name", "role"]]


Spoil = Callable[[Path], object]
BAD: dict[str, tuple[Spoil, type[PocketsizeError], str]] = {
    "no text column": (
        lambda p: parquet(p, {"id": [1], "body": ["a"]}),
        DataError,
        "no column text or messages; it has id, body: name one of them",
    ),
    "no rows": (lambda p: parquet(p, {"text": pa.array([], pa.string())}), DataError, "no text in it"),
    "nothing but blanks": (lambda p: parquet(p, {"text": ["", None]}), DataError, "no text in it"),
    "empty file": (lambda p: p.write_bytes(b""), DataError, "is empty"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"a": 1})), RefusedError, "is a pickle"),
    "zip": (lambda p: p.write_bytes(b"PK\x03\x04" + bytes(100)), RefusedError, "zip archive"),
    "not parquet": (lambda p: p.write_bytes(b"text"), DataError, "not a readable parquet file"),
    "binary": (lambda p: p.write_bytes(bytes(range(256)) * 9), DataError, "not a readable parquet file"),
    "cut short": (
        lambda p: p.write_bytes(parquet(p, FIVE).read_bytes()[:-9]),
        DataError,
        "not a readable parquet file",
    ),
    "damaged pages": (
        lambda p: p.write_bytes(b"PAR1" + b"\xff" * 40 + parquet(p, TEXTS).read_bytes()[44:]),
        DataError,
        "not a readable parquet file",
    ),
    "numbers": (lambda p: parquet(p, {"text": [1, 2]}), DataError, "row 1: holds int, not text"),
    "bytes": (lambda p: parquet(p, {"text": [b"a"]}), DataError, "row 1: holds bytes, not text"),
    "not utf-8": (
        lambda p: parquet(p, {"text": pa.array([b"a", b"\xff"]).view(pa.string())}),
        DataError,
        "not a readable parquet file: 'utf-8' codec",
    ),
    "mark": (lambda p: parquet(p, {"text": ["a"], "generated": ["yes"]}), DataError, "true or false"),
    "no messages": (
        lambda p: parquet(p, {"messages": [CHATS[0], []]}),
        DataError,
        'row 2: "messages" has no messages',
    ),
    "message without content": (
        lambda p: parquet(p, {"messages": [[{"role": "user"}]]}),
        DataError,
        'row 1: message 1 of "messages" needs a "content" that is text, found None',
    ),
    "text for messages": (lambda p: parquet(p, {"messages": [["a"]]}), DataError, "message 1 of"),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_tables(fault: str, tmp_path: Path) -> None:
    spoil, kind, words = BAD[fault]
    spoil(tmp_path / "a.parquet")
    with pytest.raises(kind) as caught:
        read_corpus(["a.parquet"], tmp_path)
    assert "a.parquet" in str(caught.value) and words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", FIVE)
    with pytest.raises(DataError, match=r"a\.parquet: no column txt; it has id, text"):
        read_corpus(Source(("a.parquet",), column="txt"), tmp_path)


def state(folder: Path, **keys: object) -> None:
    raw = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(raw | keys))


def outside(folder: Path) -> None:
    arrow(folder.parent / "x.arrow", FIVE)
    (folder / "x.arrow").symlink_to("../x.arrow")
    state(folder, _data_files=[{"filename": "x.arrow"}])


FOLDERS: dict[str, tuple[Spoil, type[PocketsizeError], str]] = {
    "splits": (
        lambda f: (f / "dataset_dict.json").write_text('{"splits": ["train", "test"]}'),
        UsageError,
        "holds several splits (train, test); name the folder of one of them",
    ),
    "selection": (
        lambda f: state(f, _indices_data_files=[{"filename": "i"}]),
        UnsupportedError,
        "a selection",
    ),
    "no files": (lambda f: state(f, _data_files=[]), DataError, "no _data_files"),
    "no names": (lambda f: state(f, _data_files=[{"file": "a"}]), DataError, "None is not the name"),
    "leaves": (
        lambda f: state(f, _data_files=[{"filename": "../x.arrow"}]),
        RefusedError,
        "leaves the folder",
    ),
    "link": (outside, RefusedError, "a link out of the folder"),
    "pickle": (
        lambda f: state(f, _data_files=[{"filename": "a.pkl"}]),
        DataError,
        "not the name of an arrow",
    ),
    "missing": (
        lambda f: state(f, _data_files=[{"filename": "b.arrow"}]),
        DataError,
        "b.arrow: is not a regular",
    ),
    "cut short": (
        lambda f: (f / "data-00000-of-00001.arrow").write_bytes(b"\xff\xff\xff\xff\x10"),
        DataError,
        "not a readable arrow file",
    ),
    "not json": (lambda f: (f / "state.json").write_text("{"), DataError, "state.json: not sound JSON"),
}


@pytest.mark.parametrize("fault", FOLDERS)
def test_bad_datasets(fault: str, tmp_path: Path) -> None:
    spoil, kind, words = FOLDERS[fault]
    spoil(dataset(tmp_path / "set", [FIVE]))
    with pytest.raises(kind) as caught:
        read_corpus(["set"], tmp_path)
    assert str(tmp_path / "set") in str(caught.value) and words in str(caught.value)


def test_much_text_in_a_small_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LIMIT_BYTES", 2**20)
    path = parquet(tmp_path / "a.parquet", {"text": ["a" * 2**17] * 9}, compression="zstd")
    assert path.stat().st_size < 2**17
    with pytest.raises(ResourceError, match=r"more than 1 MiB.*rows:"):
        read_corpus(["a.parquet"], tmp_path)
    assert len(texts(Source(("a.parquet",), rows=8), tmp_path)) == 8


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet(tmp_path / "a.parquet", FIVE)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UnsupportedError, match=r"a\.parquet: .*pip install 'pocketsize\[data\]'"):
        read_corpus(["a.parquet"], tmp_path)
