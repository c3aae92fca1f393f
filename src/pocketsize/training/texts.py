"""A corpus as training examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import cast

import numpy as np
from transformers import PreTrainedTokenizerBase

from pocketsize.data.calibration import frame_of
from pocketsize.data.labels import UNKNOWN, by_labels, class_numbers, is_labelled
from pocketsize.data.text import Corpus, Document
from pocketsize.errors import UsageError
from pocketsize.training.examples import Examples, of_rows

# Shorter texts than this tell an encoder nothing.
LEAST = 4


def examples_of(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int,
    task: str,
    classes: Sequence[str] = (),
) -> Examples:
    """Packed windows for a generator, texts of at most `length` tokens for an encoder.

    For a classifier those of a labelled set, each with the number of its class among `classes`, and those of
    files without labels beside it. The texts of a pair are one for a classifier, two for an embedder.
    """
    if task == "generate":
        return packed(corpus, tokenizer, length=length)
    if task == "classify" and is_labelled(corpus):
        return labelled(corpus, tokenizer, length=length, classes=classes)
    return separate(corpus, tokenizer, length=length, paired=task == "classify")


def packed(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, length: int) -> Examples:
    """The documents one after the other, the end-of-text token behind each, cut into windows of `length`.

    Nothing is padded; what is left behind the last whole window is a shorter one, if it is not a mere end.
    """
    end = [] if tokenizer.eos_token_id is None else [cast(int, tokenizer.eos_token_id)]
    parts = [
        np.array([*_ids(tokenizer, d.text), *end], dtype=np.int32) for d in corpus.documents if d.text.strip()
    ]
    flat = np.concatenate([np.empty(0, np.int32), *parts])
    pieces = [flat[a : a + length] for a in range(0, len(flat), length)]
    if len(pieces) > 1 and len(pieces[-1]) < max(2, length // 4):
        pieces.pop()
    pieces = [piece for piece in pieces if len(piece) >= 2]
    return of_rows(pieces, end[0] if end else 0, corpus.name)


def separate(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, length: int, paired: bool = False
) -> Examples:
    """Every paragraph by itself, framed as the tokenizer frames a text; long ones in pieces of `length`.

    The second text of a pair is one of its own. `paired`: it is read with the first, both cut at `length`.
    """
    pairs = [document for document in corpus.documents if document.pair]
    whole = _whole(pairs, tokenizer, length) if paired else []
    apart: list[Document] = []
    for document in corpus.documents:
        if not (paired and document.pair):
            apart += [document, replace(document, text=document.pair)]
    pieces = [*whole, *(_apart(apart, tokenizer, length) if apart else [])]
    return of_rows(pieces, _pad(tokenizer), corpus.name)


def labelled(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, *, length: int, classes: Sequence[str]
) -> Examples:
    """Every text by itself, or with its pair, framed as the tokenizer frames it and cut at `length`.

    Those of files without labels follow, rows in the same way, plain text as `separate` takes it apart; their
    class is `UNKNOWN`.
    """
    named, others = by_labels(corpus)
    labels, rest = class_numbers(named, classes), () if others is None else others.documents
    more = _whole([document for document in rest if document.file], tokenizer, length)
    if plain := [document for document in rest if not document.file]:
        more += _apart(plain, tokenizer, length)
    pieces = [*_whole(named.documents, tokenizer, length), *more]
    return of_rows(pieces, _pad(tokenizer), corpus.name, np.append(labels, np.full(len(more), UNKNOWN)))


def _apart(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int
) -> list[np.ndarray]:
    """The tokens of each paragraph."""
    frame = frame_of(tokenizer)
    if length - len(frame[0]) - len(frame[1]) < LEAST:
        raise UsageError(f"length {length} leaves no room for text; give at least 16")
    return [
        np.array(ids, dtype=np.int32)
        for document in documents
        for text in _paragraphs(document.text)
        for ids in _framed(tokenizer, text, length, frame)
    ]


def _whole(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, length: int
) -> list[np.ndarray]:
    """The tokens of each document and of its pair, cut at `length`."""
    told = (
        tokenizer(d.text, d.pair or None, truncation=True, max_length=length)["input_ids"] for d in documents
    )
    return [np.array(ids, dtype=np.int32) for ids in told]


def _pad(tokenizer: PreTrainedTokenizerBase) -> int:
    return 0 if tokenizer.pad_token_id is None else cast(int, tokenizer.pad_token_id)


def _paragraphs(text: str) -> Iterator[str]:
    for part in text.split("\n\n"):
        if line := " ".join(part.split()):
            yield line


def _framed(
    tokenizer: PreTrainedTokenizerBase, text: str, length: int, frame: tuple[list[int], list[int]]
) -> Iterator[list[int]]:
    prefix, suffix = frame
    ids, inner = _ids(tokenizer, text), length - len(prefix) - len(suffix)
    for a in range(0, len(ids), inner):
        part = ids[a : a + inner]
        if len(part) >= LEAST:
            yield [*prefix, *part, *suffix]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False)["input_ids"])  # type: ignore[arg-type]
