"""Plain sentences: those that teach, and those that judge, of three kinds and of one that need not teach.

    fiction     Jane Austen teaches, Moby Dick judges
    speeches    State of the Union messages, every fifth of which judges
    glosses     definitions of WordNet, split by hash
    opinions    on hotels, medicine, products and lecturers: they judge alone, or teach too, split by hash

Nobody labelled them, and no two of them are pairs.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from corpus import domains
from tasks import rows_of

JUDGES = 512
# Words of a sentence that teaches, and of a definition.
WORDS, LEAST = range(4, 101), 6
# Shares of what teaches: as much of each kind as there is of the shortest, twice for the two others.
SPEECHES, GLOSSES = 28_000, 45_000


def texts(downloads: Path) -> tuple[list[str], list[str], dict[str, list[str]]]:
    """Sentences that teach, the same with opinions, both in an order of chance; by kind those that judge."""
    fiction, speeches = domains(downloads)
    glosses, opinions = (
        by_hash({text for text, _ in rows_of(name, downloads) if len(text.split()) >= LEAST})
        for name in ("glosses", "domains")
    )
    teach = by_hash(
        [
            *sentences(fiction.calibrate),
            *by_hash(sentences(speeches.calibrate))[:SPEECHES],
            *glosses[JUDGES : JUDGES + GLOSSES],
        ]
    )
    judge = {one.name: by_hash({*sentences(one.evaluate)} - {*teach})[:JUDGES] for one in (fiction, speeches)}
    return (
        teach,
        by_hash([*teach, *opinions[JUDGES:]]),
        judge | {"glosses": glosses[:JUDGES], "opinions": opinions[:JUDGES]},
    )


def sentences(documents: Iterable[str]) -> list[str]:
    """The different sentences of documents."""
    found: dict[str, None] = {}
    for document in documents:
        for raw in re.split(r"(?<=[.!?])\s+|\n\s*\n", document):
            sentence = " ".join(raw.split())
            if len(sentence.split()) in WORDS:
                found[sentence] = None
    return list(found)


def by_hash(found: Iterable[str]) -> list[str]:
    """In an order that has nothing to do with what they say."""
    return sorted(found, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
