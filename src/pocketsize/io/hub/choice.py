"""Which files of a repository are fetched: what a model folder needs, and never code or pickles."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from pocketsize.errors import (
    DataError,
    PocketsizeError,
    RefusedError,
    UnsupportedError,
    UsageError,
    did_you_mean,
)
from pocketsize.io.hub.ids import HubId
from pocketsize.io.strictjson import read_json_object

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_BESIDE = re.compile(
    r"generation_config\.json"
    r"|tokenizer(_config)?\.json|tokenizer\.model|special_tokens_map\.json|added_tokens\.json"
    r"|vocab\.(json|txt)|merges\.txt"
    r"|chat_template\.(jinja|json)|additional_chat_templates/[\w-]+\.jinja"
    r"|modules\.json|config_sentence_transformers\.json|sentence_bert_config\.json|\d{1,2}_\w+/config\.json",
    re.ASCII,
)
_PAPERS = re.compile(r"README\.md|(LICEN[CS]E|NOTICE|USE_POLICY)[\w-]*(\.(md|txt))?", re.ASCII)
_SHARD = re.compile(r"\w[\w.+-]*\.safetensors", re.ASCII)
_PART = re.compile(r"(.+-)\d{5}(-of-\d{5}\.gguf)")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
_INDEX_LIMIT_BYTES = 100_000_000


def choose(asked: HubId, names: Collection[str]) -> list[str]:
    """The files to fetch, small ones first. Shards are not among them: their index names them."""
    papers = sorted(name for name in names if _PAPERS.fullmatch(name))
    if asked.file:
        return [*papers, *_parts(asked, names)]
    beside = sorted(name for name in names if _BESIDE.fullmatch(name))
    if CONFIG not in names or not {SINGLE, INDEX} & set(names):
        raise _no_model(asked, names)
    # Where both are there, loaders take the single file.
    return [CONFIG, *papers, *beside, SINGLE if SINGLE in names else INDEX]


def shards(asked: HubId, index: Path, names: Collection[str]) -> list[str]:
    """The files that a fetched index names; all must be in the repository."""
    where = read_json_object(index, limit_bytes=_INDEX_LIMIT_BYTES).get("weight_map")
    named = set(where.values()) if isinstance(where, dict) else set()
    if not named:
        raise DataError(f"{asked}: its {INDEX} has no weight_map that names the file of each tensor")
    for name in sorted(named, key=str):
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise RefusedError(
                f"{asked}: its {INDEX} names {name!r}, which is no .safetensors file beside it"
            )
        if name not in names:
            raise DataError(f"{asked}: its {INDEX} names {name}, which the repository does not hold")
    return sorted(named)


def _parts(asked: HubId, names: Collection[str]) -> list[str]:
    """The GGUF file that was asked for; all parts of one that is split."""
    if asked.file not in names:
        ggufs = [name for name in names if name.endswith(".gguf")]
        hint = did_you_mean(str(asked.file), ggufs) if ggufs else "; it holds no GGUF file"
        raise UsageError(f"{asked.repo}: no file {asked.file!r}{hint}")
    found = _PART.fullmatch(str(asked.file))
    if found is None:
        return [str(asked.file)]
    same = re.compile(re.escape(found[1]) + r"\d{5}" + re.escape(found[2]))
    return sorted(name for name in names if same.fullmatch(name))


def _no_model(asked: HubId, names: Collection[str]) -> PocketsizeError:
    """Why there is nothing to fetch."""
    ggufs = sorted(name for name in names if name.endswith(".gguf"))
    pickles = sorted(name for name in names if name.endswith(_PICKLES))
    others = sorted(name for name in names if name.endswith(".safetensors"))
    if "adapter_config.json" in names:
        return UnsupportedError(
            f"{asked}: an adapter; merge it into its base model first, and give that folder"
        )
    if others:
        what = f"holds {others[0]}, but no {CONFIG} with {SINGLE} or {INDEX}"
        return UnsupportedError(f"{asked}: {what}; it is not in the layout of transformers")
    if ggufs:
        more = f" ({len(ggufs)} there are)" if len(ggufs) > 1 else ""
        return UsageError(f"{asked}: holds GGUF files only; name one{more}: --file {ggufs[0]}")
    if pickles:
        return RefusedError(
            f"{asked}: its weights are pickles only ({pickles[0]}), which can run code; "
            "look for a revision or a model with safetensors"
        )
    return DataError(f"{asked}: no model in it: no {CONFIG} with {SINGLE} or {INDEX}")
