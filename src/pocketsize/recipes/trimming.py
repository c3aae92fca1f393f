"""The files beside a student whose vocabulary is a part of its teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pocketsize.exporting.companions import companions, copy_companions
from pocketsize.exporting.plain import as_json
from pocketsize.io.publish import make_folder, publish_bytes
from pocketsize.io.strictjson import read_json_object
from pocketsize.models.model import Model
from pocketsize.models.vocabulary import (
    read_vocabulary,
    renumbered_config,
    renumbered_tokenizer_config,
    trimmed,
)

TOKENIZER = "tokenizer.json"
# Older forms of the same vocabulary, which loaders do not need beside tokenizer.json.
_OLD = ("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "added_tokens.json")


def copy_trimmed(source: Path, out: Path, kept: Sequence[int] | None) -> None:
    """The companions of `source`, the tokenizer's with these of its tokens alone (None: all)."""
    if kept is None:
        copy_companions(source, out)
        return
    new = {old: number for number, old in enumerate(kept)}
    for name in companions(source):
        if name in _OLD:
            continue
        data = (source / name).read_bytes()
        if name == TOKENIZER:
            data = as_json(trimmed(read_vocabulary(data), kept))
        elif name == "tokenizer_config.json":
            data = as_json(renumbered_tokenizer_config(read_json_object(source / name), new))
        elif name == "generation_config.json":
            data = as_json(renumbered_config(read_json_object(source / name), new))
        make_folder((out / name).parent)
        publish_bytes(out / name, data)


def same_words(one: Model, other: Model) -> bool:
    """Whether two models number their tokens alike, told by their tokenizers' files."""
    if one.folder == other.folder:
        return True
    files = [model.folder / TOKENIZER for model in (one, other)]
    return not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes()
