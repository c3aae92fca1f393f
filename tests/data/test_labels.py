"""Labels: which classes there are, which each text has, and what is refused with its place."""

from __future__ import annotations

from typing import Any

import pytest

from pocketsize.data.labels import by_labels, class_numbers, classes_of, held_out, is_labelled
from pocketsize.data.text import Corpus, Document
from pocketsize.errors import DataError


def corpus(*labels: Any) -> Corpus:
    rows = (Document(f"f: row {i}", f"text {i}", label, file="f") for i, label in enumerate(labels))
    return Corpus("set", tuple(rows))


def test_names_are_sorted_and_numbers_rise() -> None:
    assert classes_of(corpus("b", "a", "b", "a")) == ("a", "b")
    assert classes_of(corpus(10, 9, 10, 9)) == ("9", "10")
    assert classes_of(corpus("1", 1.0, "0", 0)) == ("0", "1")  # csv has texts, parquet with nulls floats
    assert classes_of(corpus(True, False, True, False)) == ("false", "true")
    assert not is_labelled(corpus(None, None)) and is_labelled(corpus(None, 0))


@pytest.mark.parametrize(
    "labels, message",
    [
        (("a", "a"), "all texts have the label 'a'; two are needed"),
        (("a", "b", "a"), "f: row 1: the only text with the label 'b'; 2 of each"),
        (("a", "b", None), "f: row 2: has no label"),
        (("a", 0.5), "f: row 1: label 0.5 is no class"),
        (("a", -1), "f: row 1: label -1 is no class"),
        (("a", ["b"]), "f: row 1: label .* is no class"),
        (("a", " "), "f: row 1: label ' ' is no class"),
    ],
)
def test_what_is_no_labelled_set_is_refused(labels: tuple[Any, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        classes_of(corpus(*labels))


def test_labels_are_found_by_name_and_by_number() -> None:
    assert class_numbers(corpus("spam", "ham", 1, "0"), ("ham", "spam")).tolist() == [1, 0, 1, 0]
    assert class_numbers(corpus(1, "0"), ("LABEL_0", "LABEL_1")).tolist() == [1, 0]
    assert class_numbers(corpus(5, "1"), ("1", "5")).tolist() == [1, 0]


@pytest.mark.parametrize(
    "label, classes, message",
    [
        ("hamm", ("ham", "spam"), "f: row 0: label 'hamm' is no class of the model; did you mean 'ham'"),
        (2, ("ham", "spam"), "label '2' is no class"),
        (0, ("1", "5"), "label '0' is no class"),  # names are numbers: 0 is none of them
        (7, ("LABEL_0", "LABEL_1"), "known: 0 to 1"),
    ],
)
def test_labels_that_the_model_has_not_are_refused(
    label: Any, classes: tuple[str, ...], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        class_numbers(corpus(label), classes)


def test_a_tenth_is_held_out_and_stays_so_when_texts_are_added() -> None:
    few, many = corpus(*[0, 1] * 300), corpus(*[0, 1] * 600)
    teach, judge = held_out(few)
    assert 30 < len(judge.documents) < 90 and len(teach.documents) + len(judge.documents) == 600
    assert {d.text for d in judge.documents} <= {d.text for d in held_out(many)[1].documents}
    with pytest.raises(DataError, match="2 texts are too few"):
        held_out(corpus(0, 1))


def mixed() -> Corpus:
    """A labelled file of forty texts, plain text, and rows that nobody labelled."""
    rows = [(f"f.jsonl: line {i}", "ab"[i % 2], "f.jsonl") for i in range(40)]
    rows += [("more: a.txt", None, ""), ("g.csv: line 1", None, "g.csv"), ("g.csv: line 2", None, "g.csv")]
    return Corpus("mixed", tuple(Document(n, f"text {n}", label, file=file) for n, label, file in rows))


def test_files_without_labels_stand_beside_those_that_have_them() -> None:
    named, others = by_labels(mixed())
    assert len(named.documents) == 40 and all(one.label for one in named.documents)
    assert others is not None
    assert [one.name for one in others.documents] == ["more: a.txt", "g.csv: line 1", "g.csv: line 2"]
    assert by_labels(corpus("a", "b", "a")) == (corpus("a", "b", "a"), None)
    assert by_labels(corpus(None, None)) == (corpus(None, None), None)


def test_a_file_of_which_some_texts_have_labels_has_to_have_them_all() -> None:
    named, others = by_labels(corpus("a", None, "b"))
    assert others is None and len(named.documents) == 3
    with pytest.raises(DataError, match="f: row 1: has no label"):
        class_numbers(named, ("a", "b"))


def test_texts_without_labels_are_never_held_out() -> None:
    teach, judge = held_out(mixed())
    assert all(one.label for one in judge.documents)
    assert [one for one in teach.documents if one.label is None] == list(mixed().documents[40:])
    alone = held_out(by_labels(mixed())[0])
    assert judge.documents == alone[1].documents


def test_a_text_that_is_held_out_teaches_from_no_other_file() -> None:
    _, judge = held_out(mixed())
    again = Document("all.csv: line 7", judge.documents[0].text, file="all.csv")
    whole = mixed()
    teach, same = held_out(Corpus("mixed", (*whole.documents, again)))
    assert same.documents == judge.documents
    assert again not in teach.documents and len(teach.documents) == len(whole.documents) - len(
        judge.documents
    )
