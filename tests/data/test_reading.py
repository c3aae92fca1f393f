"""Text files: what is read, in which order, and what is refused with its place."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace

import pytest

from pocketsize.data import reading
from pocketsize.data.sources import Source
from pocketsize.data.text import read_corpus
from pocketsize.errors import DataError, RefusedError, ResourceError, UsageError


def texts(patterns, base):
    return [document.text for document in read_corpus(patterns, base).documents]


def test_files_are_sorted_and_read_once(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.md", "sub/c.txt"):
        (tmp_path / name).write_text(name)
    assert texts(["*.txt", "a.md", "**/*.txt", "b.txt"], tmp_path) == ["a.md", "b.txt", "sub/c.txt"]
    assert texts([str(tmp_path / "b.txt")], tmp_path / "elsewhere") == ["b.txt"]


def test_brackets_in_names_are_names_first(tmp_path):
    folder = tmp_path / "odd [name]"
    folder.mkdir()
    (folder / "a[1].txt").write_text("one")
    assert texts(["a[1].txt"], folder) == ["one"]
    assert texts(["*.txt"], folder) == ["one"]


def test_jsonl_rows_are_documents_named_by_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one\\ntwo", "id": 3}\n\n{"text": "three"}\n')
    documents = read_corpus(["a.jsonl"], tmp_path).documents
    assert [d.text for d in documents] == ["one\ntwo", "three"]
    assert documents[1].name.endswith("a.jsonl: line 3")


def test_line_ends_and_byte_order_mark_do_not_matter(tmp_path):
    (tmp_path / "dos.txt").write_bytes("\ufeffone\r\ntwo\rthree\tfour\f\n".encode())
    assert texts(["dos.txt"], tmp_path) == ["one\ntwo\nthree\tfour\f\n"]


@pytest.mark.parametrize(
    "name, data, error, message",
    [
        ("a.txt", b"", DataError, "a.txt: is empty"),
        ("a.txt", b" \n\t\n", DataError, "a.txt: is empty"),
        ("a.txt", b"fine\nnot\x00fine", DataError, "a.txt: line 2 holds the byte 0x00"),
        ("a.md", b"\x1bPNG", DataError, "a.md: line 1 holds the byte 0x1b"),
        ("a.txt", b"one\ntwo\n\xff\xfe", DataError, "a.txt: line 3: byte 0xff is not UTF-8"),
        ("a.txt", "é".encode("latin-1"), DataError, "a.txt: line 1: byte 0xe9 is not UTF-8"),
        ("a.txt", pickle.dumps([1], protocol=4), RefusedError, "a.txt: is a pickle"),
        ("a.jsonl", b'{"text": "a"}\n{"text": }\n', DataError, "a.jsonl: line 2: is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', DataError, "a.jsonl: line 2: needs an object"),
        ("a.jsonl", b'{"txt": "a"}\n', DataError, 'string "text"'),
        ("a.jsonl", b'{"text": " "}\n', DataError, "line 1: .text. is empty"),
        ("a.jsonl", b'{"text": "a", "generated": "yes"}\n', DataError, "true or false"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', DataError, "surrogate"),
        ("a.jsonl", b"[" * 100_000, DataError, "line 1: is not JSON"),
        ("a.csv", b"a,b\n1,2\n", DataError, "a.csv: no column text; it has a, b; name the one that holds"),
        ("a.csv", b"text;b\n1;2\n", DataError, "it has text;b; values of a .csv file are separated by ','"),
        ("a.tsv", b"messages\n1\n", DataError, "messages are read from .jsonl, .parquet and .arrow"),
        (
            "a.csv",
            b"text,label\nfine,1\nno label\n",
            DataError,
            "a.csv: line 3: has another number of values",
        ),
        ("a.csv", b'text,label\n"fine,1\n', DataError, "a.csv: line 1: unexpected end"),
        ("a.tsv", b"text\tlabel\n \t1\n", DataError, "a.tsv: line 2: .text. is empty"),
        ("a.xls", b"a,b", UsageError, "not .xls"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(tmp_path, name, data, error, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(error, match=message):
        read_corpus([name], tmp_path)


def test_nothing_matched_a_folder_a_pipe_no_names(tmp_path):
    with pytest.raises(DataError, match=r"none\*.txt: no such file"):
        read_corpus(["none*.txt"], tmp_path)
    with pytest.raises(UsageError, match=r"is a folder; write \./\*\.txt"):
        read_corpus(["./"], tmp_path)
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(DataError, match="not a regular file"):
        read_corpus(["pipe.txt"], tmp_path)
    with pytest.raises(UsageError, match="no data files"):
        read_corpus([], tmp_path)


def test_a_column_of_plain_text_is_refused_unless_there_are_rows_too(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"said": "two"}\n')
    with pytest.raises(UsageError, match=r"a\.txt: is plain text, which has no rows; leave column out"):
        read_corpus(Source(("*.txt",), column="said"), tmp_path)
    found = read_corpus(Source(("*",), column="said"), tmp_path)
    assert [document.text for document in found.documents] == ["one", "two"]


def test_too_much_text_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LIMIT_BYTES", 2**20)
    (tmp_path / "a.txt").write_text("a" * (2**20 + 1))
    with pytest.raises(ResourceError, match="more than 1 MiB"):
        read_corpus(["a.txt"], tmp_path)


def test_rows_say_what_a_text_is_and_what_it_is_paired_with(tmp_path):
    rows = '{"text": "a", "label": "x", "pair": "b"}\n{"text": "c", "label": 3, "pair": null}\n'
    (tmp_path / "a.jsonl").write_text(rows)
    (tmp_path / "a.csv").write_text('text,label,pair\n"a,\nb",x,\nc,3,d\n')
    jsonl, csv = (read_corpus([name], tmp_path).documents for name in ("a.jsonl", "a.csv"))
    assert [(d.text, d.label, d.pair) for d in jsonl] == [("a", "x", "b"), ("c", 3, "")]
    assert [(d.text, d.label, d.pair) for d in csv] == [("a,\nb", "x", ""), ("c", "3", "d")]
    assert csv[1].name.endswith("a.csv: line 4")


def test_columns_of_labels_can_be_named_and_then_must_be_there(tmp_path):
    (tmp_path / "a.tsv").write_text("says\tis\twith\none\tyes\ttwo\n")
    source = Source(("a.tsv",), column="says", label="is", pair="with")
    (document,) = read_corpus(source, tmp_path).documents
    assert (document.text, document.label, document.pair) == ("one", "yes", "two")
    with pytest.raises(DataError, match="no column kind; it has says, is, with"):
        read_corpus(replace(source, label="kind"), tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "a", "is": 1}\n{"text": "b"}\n')
    with pytest.raises(DataError, match='line 2: has no "is"'):
        read_corpus(Source(("a.jsonl",), label="is"), tmp_path)


def test_labels_count_in_the_hash_and_their_absence_changes_none(tmp_path):
    for name, row in (
        ("a", '{"text": "a"}'),
        ("b", '{"text": "a", "label": 1}'),
        ("c", '{"text": "a", "label": 2}'),
    ):
        (tmp_path / f"{name}.jsonl").write_text(row)
    (tmp_path / "d.txt").write_text("a")
    a, b, c, d = (read_corpus([f], tmp_path).sha256 for f in ("a.jsonl", "b.jsonl", "c.jsonl", "d.txt"))
    assert a == d and len({a, b, c}) == 3


def test_a_value_may_be_as_long_as_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"text\n{'long ' * 60_000}\n")
    (document,) = read_corpus(["a.csv"], tmp_path).documents
    assert len(document.text) == 300_000
