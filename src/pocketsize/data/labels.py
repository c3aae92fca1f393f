"""Labelled texts: which classes there are, which each text has, and what of them is held out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pocketsize.data.text import Corpus, Document
from pocketsize.errors import DataError, did_you_mean

# Of the texts, one in so many is held out where none were named to evaluate with.
HELD_OUT = 10
# A class needs so many texts to be learned.
LEAST = 2
# The number of the class of a text that nobody labelled.
UNKNOWN = -100
# Names that stock configs give classes which nobody named.
_UNNAMED = "LABEL_"


def is_labelled(corpus: Corpus) -> bool:
    """Whether any of its texts has a label."""
    return any(document.label is not None for document in corpus.documents)


def file_of(document: Document) -> str:
    """The file that a document is a row of, or all of."""
    return document.file or document.name


def by_labels(corpus: Corpus) -> tuple[Corpus, Corpus | None]:
    """The texts of files that have labels, and those of files that have none, if there are such.

    A file of which some texts have labels is to have them all; what it lacks, `class_numbers` tells. Of a
    corpus without any label all is in the first part.
    """
    known = {file_of(document) for document in corpus.documents if document.label is not None}
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document in corpus.documents:
        sides[bool(known) and file_of(document) not in known].append(document)
    first, second = (replace(corpus, documents=tuple(side)) if side else None for side in sides)
    assert first is not None
    return first, second


def classes_of(corpus: Corpus) -> tuple[str, ...]:
    """The names of the classes of a corpus: numbers rising, names in the order of the alphabet.

    Every text needs a label, there must be two classes, and two texts of each.
    """
    counts = Counter(_label(document) for document in corpus.documents)
    if len(counts) < 2:
        raise DataError(f"{corpus.name}: all texts have the label {next(iter(counts))!r}; two are needed")
    whole = all(name.isdecimal() for name in counts)
    names = sorted(counts, key=int) if whole else sorted(counts)
    if rare := [name for name in names if counts[name] < LEAST]:
        where = next(d.name for d in corpus.documents if _label(d) == rare[0])
        more = f" (and {len(rare) - 1} more labels)" if len(rare) > 1 else ""
        raise DataError(
            f"{where}: the only text with the label {rare[0]!r}{more}; {LEAST} of each are needed"
        )
    return tuple(names)


def class_numbers(corpus: Corpus, classes: Sequence[str]) -> np.ndarray:
    """The number of each text's class among `classes`: by name, or by number where names are no numbers."""
    known = {name: i for i, name in enumerate(classes)}
    unnamed = all(name == f"{_UNNAMED}{i}" for i, name in enumerate(classes))
    by_number = unnamed or not all(name.isdecimal() for name in classes)
    found = np.empty(len(corpus.documents), dtype=np.int64)
    for i, document in enumerate(corpus.documents):
        label = _label(document)
        if label in known:
            found[i] = known[label]
        elif by_number and label.isdecimal() and int(label) < len(classes):
            found[i] = int(label)
        else:
            hint = f"; known: 0 to {len(classes) - 1}" if unnamed else did_you_mean(label, known)
            raise DataError(f"{document.name}: label {label!r} is no class of the model{hint}")
    return found


def held_out(corpus: Corpus) -> tuple[Corpus, Corpus]:
    """The texts that teach and the tenth that evaluates: chosen by the hash of each, so equal ones stay
    together, and a text that is added moves no other. Files without labels teach, but for equal texts."""
    named, others = by_labels(corpus)
    sides: tuple[list[Document], list[Document]] = ([], [])
    for document in named.documents:
        digest = hashlib.sha256(f"{document.text}\0{document.pair}".encode()).digest()
        sides[int.from_bytes(digest[:8], "big") % HELD_OUT == 0].append(document)
    if not all(sides):
        raise DataError(
            f"{corpus.name}: {len(named.documents)} texts are too few to hold a tenth out; "
            "name other labelled files as `evaluate`"
        )
    judges = {(document.text, document.pair) for document in sides[1]}
    for document in others.documents if others is not None else ():
        if (document.text, document.pair) not in judges:
            sides[0].append(document)
    parts = f"nine of {HELD_OUT} parts", f"one of {HELD_OUT} parts"
    teach, judge = (
        replace(corpus, name=f"{corpus.name}, {part}", documents=tuple(side))
        for part, side in zip(parts, sides, strict=True)
    )
    return teach, judge


def _label(document: Document) -> str:
    """The label as the name of a class."""
    label = document.label
    if isinstance(label, bool):
        return str(label).lower()
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, int) and label >= 0:
        return str(label)
    if isinstance(label, str) and label.strip():
        return label.strip()
    if label is None:
        raise DataError(f"{document.name}: has no label; every text of a labelled set needs one")
    raise DataError(
        f"{document.name}: label {label!r} is no class; give a name or a whole number from 0 upwards"
    )
