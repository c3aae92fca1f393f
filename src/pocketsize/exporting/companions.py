"""The files beside the weights: tokenizer, chat template, generation settings, sentence-encoder modules."""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath

from pocketsize.errors import DataError, RefusedError
from pocketsize.io.publish import make_folder, publish_bytes, sha256_of

NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "NOTICE",
)
MODULES = "modules.json"
_OF_SENTENCES = (MODULES, "config_sentence_transformers.json", "sentence_bert_config.json")
_PARTS = ("config.json", "model.safetensors")


def copy_companions(source: Path, out: Path, *, sentences: bool = True) -> dict[str, str]:
    """Copy the companions that `source` has, byte for byte; their SHA-256 by name.

    Without `sentences`, what says how an encoder makes embeddings of sentences is left behind.
    """
    copied: dict[str, str] = {}
    for name in companions(source):
        if not sentences and (name in _OF_SENTENCES or "/" in name):
            continue
        make_folder((out / name).parent)
        try:
            data = (source / name).read_bytes()
        except OSError as error:
            raise DataError(f"{source / name}: {error.strerror or error}") from error
        copied[name] = publish_bytes(out / name, data)
    return copied


def companion_prints(source: Path) -> dict[str, str]:
    """The SHA-256 of each companion in a folder."""
    return {name: sha256_of(source / name) for name in companions(source)}


def companions(source: Path) -> list[str]:
    """Names of the companions in a folder, such as `tokenizer.json` and `1_Pooling/config.json`."""
    names = [name for name in NAMES if (source / name).is_file()]
    if (source / MODULES).is_file():
        names.append(MODULES)
        for part in _modules(source / MODULES):
            names += [f"{part}/{name}" for name in _PARTS if (source / part / name).is_file()]
    return names


def _modules(path: Path) -> list[str]:
    """The subfolders that a modules.json names; the first module is the model itself and has none."""
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        parts = [str(module["path"]) for module in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a list of modules: {error}") from error
    for part in filter(None, parts):
        if PurePosixPath(part).name != part or part in (".", ".."):
            raise RefusedError(f"{path}: module path {part!r} leaves the folder")
    return [part for part in parts if part]
