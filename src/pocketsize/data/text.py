"""Text that calibrates and evaluates: the default, files, and how much of one is in the other."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from pocketsize.data.chat import Render
from pocketsize.data.reading import Row, read_documents
from pocketsize.data.sources import Source
from pocketsize.errors import DataError, UsageError

SHINGLE = 13

# Modules whose docstrings are prose rather than lists of one-liners; all import-free at the top level.
_MODULES = """
    argparse ast bdb cmd collections configparser contextlib dataclasses datetime difflib doctest enum
    fractions functools heapq inspect ipaddress json logging mimetypes optparse pathlib pdb pickle
    pickletools platform random re shelve shutil smtplib socket ssl statistics subprocess tarfile
    tempfile textwrap threading timeit traceback typing uuid weakref zipfile
"""


@dataclass(frozen=True, slots=True)
class Document:
    """One text with a name a reader can find it by; what it is said to be, and its pair, if it has them.

    `file` holds it as one of its rows; empty where the text is all of a file.
    """

    name: str
    text: str
    label: object = None
    pair: str = ""
    file: str = ""


@dataclass(frozen=True, slots=True)
class Corpus:
    """Texts that are used together. `generated`: a model wrote some of it, so it may not evaluate."""

    name: str
    documents: tuple[Document, ...]
    generated: bool = False

    def __post_init__(self) -> None:
        if not any(document.text.strip() for document in self.documents):
            raise DataError(f"{self.name}: no text in it; give files that hold some")

    @property
    def sha256(self) -> str:
        """Pins the texts, their labels and their order, whatever the files are called."""
        digest = hashlib.sha256()
        for document in self.documents:
            data = document.text.encode()
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
            if document.label is not None or document.pair:
                digest.update(repr((document.label, document.pair)).encode())
        return digest.hexdigest()


def read_corpus(files: Sequence[str] | Source, base: Path, render: Render | None = None) -> Corpus:
    """The text of files, sorted by path, each file once.

    Files are `.txt`, `.md`, `.jsonl`, `.csv`, `.tsv`, `.parquet` and `.arrow` files, globs of them (`**`
    too), and folders that `datasets` saved, relative to `base`. Rows hold a `text`, perhaps with a `label`
    and a second text (`pair`), or the `messages` of a chat, which `render` makes text of. Text
    that a model wrote is marked by `"generated": true` in a row, or by a file name that ends in
    `.generated.txt` (or another of the endings).
    """
    if not files:
        raise UsageError("no data files were named; give at least one file or glob")
    source = files if isinstance(files, Source) else Source(tuple(files))
    rows = _rendered(list(read_documents(source, base)), render)
    documents = tuple(Document(row.name, row.text, row.label, row.pair, row.file) for row in rows)
    return Corpus(source.name, documents, any(row.generated for row in rows))


def _rendered(rows: list[Row], render: Render | None) -> list[Row]:
    """The rows, chats as text."""
    chats = [(row.name, row.messages) for row in rows if row.messages]
    if not chats:
        return rows
    if render is None:
        raise UsageError(f"{chats[0][0]}: a chat; it needs the chat template of a model")
    texts = iter(render(chats))
    return [replace(row, text=next(texts)) if row.messages else row for row in rows]


def joined(corpora: Sequence[Corpus]) -> Corpus:
    """Several corpora as one, in their order."""
    if len(corpora) == 1:
        return corpora[0]
    documents = tuple(document for corpus in corpora for document in corpus.documents)
    return Corpus(" + ".join(c.name for c in corpora), documents, any(c.generated for c in corpora))


def require_evaluable(corpus: Corpus) -> None:
    """Refuses a corpus that a model wrote: its own text is too easy for a model to be judged by."""
    if corpus.generated:
        raise UsageError(
            f"{corpus.name}: holds text that a model wrote (marked `generated`); it may calibrate, "
            "never evaluate. Name other files for the evaluation"
        )


@functools.cache
def default_corpora() -> tuple[Corpus, Corpus]:
    """Text that every machine has, as two corpora that share none: to calibrate, to evaluate.

    It is this Python's own documentation: the topics of `pydoc` and the docstrings of prose-rich
    modules. Texts that repeat a longer one are left out; each of the rest goes, longest first, to
    the side that is further behind its share of two thirds or one third. Documents are then ordered
    by the hash of their name. Another Python version has other text: the hash in the record tells.
    """
    sides: tuple[list[Document], list[Document]] = ([], [])
    filled = [0, 0]
    for document in _without_repeats(sorted(_python_texts(), key=lambda d: (-len(d.text), d.name))):
        side = int(filled[0] > 2 * filled[1])
        sides[side].append(document)
        filled[side] += len(document.text)
    name = f"documentation of Python {platform.python_version()}"
    calibrate, evaluate = (tuple(sorted(side, key=_by_hash)) for side in sides)
    return Corpus(f"{name}, first part", calibrate), Corpus(f"{name}, second part", evaluate)


def overlap(calibrate: Corpus, evaluate: Corpus) -> float:
    """The share of the evaluation text's 13-word shingles that occur in the calibration text.

    Words are runs of letters and digits, lower case. A document of fewer words counts as one shingle.
    """
    ids: dict[str, int] = {}
    known = np.unique(np.concatenate([_shingles(d.text, ids) for d in calibrate.documents]))
    asked = np.concatenate([_shingles(d.text, ids) for d in evaluate.documents])
    return float(np.isin(asked, known).mean()) if asked.size else 0.0


def _shingles(text: str, ids: dict[str, int]) -> np.ndarray:
    """One 64-bit hash per shingle, in order; `ids` numbers the words and grows."""
    words = re.finditer(r"\w+", text.lower())
    numbers = np.fromiter((ids.setdefault(word[0], len(ids) + 1) for word in words), np.uint64)
    if not numbers.size:
        return numbers
    width = min(SHINGLE, numbers.size)
    hashes = np.full(numbers.size - width + 1, width, np.uint64)
    for j in range(width):
        # A step of splitmix64: an odd multiplier and a shift, so that near numbers part at once.
        hashes = (hashes + numbers[j : j + len(hashes)]) * np.uint64(0x9E3779B97F4A7C15)
        hashes ^= hashes >> np.uint64(29)
    return hashes


def _python_texts() -> Iterator[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError("this Python comes without pydoc_data; name text files in `data:` instead") from error
    for name, text in topics.items():
        yield Document(f"pydoc topic {name}", text)
    for name in _MODULES.split():
        spec = importlib.util.find_spec(name)
        source = spec.loader.get_source(name) if spec and hasattr(spec.loader, "get_source") else None  # type: ignore[union-attr]
        if source:
            yield Document(f"docstrings of {name}", _docstrings(source))


def _docstrings(source: str) -> str:
    """The docstrings of at least 20 words in a module, in the order of the file."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    texts = [ast.get_docstring(node) or "" for node in nodes]
    return "\n\n".join(text for text in texts if len(text.split()) >= 20)


def _without_repeats(documents: Sequence[Document]) -> Iterator[Document]:
    """The documents of which at most 2 % of the shingles occur in an earlier one."""
    seen: set[int] = set()
    ids: dict[str, int] = {}
    for document in documents:
        shingles = set(_shingles(document.text, ids).tolist())
        if shingles and len(shingles & seen) <= 0.02 * len(shingles):
            seen |= shingles
            yield document


def _by_hash(document: Document) -> str:
    return hashlib.sha256(document.name.encode()).hexdigest()
