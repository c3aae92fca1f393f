"""A tokenizer as GGUF metadata: tokens, their kinds, merges, pre-tokenizer, special and stop tokens.

llama.cpp has its own tokenizers and picks one by name. The name is found by comparing the rules in
`tokenizer.json` with those llama.cpp is known to implement; rules it does not know are refused,
since a wrong name gives wrong tokens without any error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from pocketsize.errors import DataError, UnsupportedError
from pocketsize.io.gguf.pretokenizers import PRE_TOKENIZERS
from pocketsize.io.strictjson import read_json_object
from pocketsize.models.load import tokenizer_of
from pocketsize.models.model import Model

_SENTENCEPIECE = [
    {"type": "Prepend", "prepend": "▁"},
    {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
]
_TOKENIZER_LIMIT = 256 << 20


def add_vocabulary(writer: GGUFWriter, model: Model) -> None:
    """Add everything llama.cpp has to know of the model's tokenizer."""
    path = model.folder / "tokenizer.json"
    rules: dict[str, Any] = read_json_object(path, limit_bytes=_TOKENIZER_LIMIT)
    core = rules.get("model")
    if not isinstance(core, dict) or core.get("type") != "BPE" or not isinstance(core.get("vocab"), dict):
        found = core.get("type") if isinstance(core, dict) else core
        raise UnsupportedError(f"{path}: GGUF export knows BPE tokenizers, not {found!r}; export folder")
    size = model.config.vocab_size
    if model.outlined:
        rules = _lowest(rules, size)
        core = rules["model"]
    tokens, types = _tokens(path, rules, size)
    merges = [_merge(m) for m in core["merges"]]
    if core.get("byte_fallback"):
        _require_sentencepiece(path, rules)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_scores(_scores(path, tokens, types, merges))
        writer.add_token_types(types)
        writer.add_add_space_prefix(True)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(path, rules))
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges([f"{a} {b}" for a, b in merges])
        writer.add_add_space_prefix(False)
    _add_special(writer, model, tokenizer_of(model))


def _lowest(rules: dict[str, Any], size: int) -> dict[str, Any]:
    """The rules with the tokens of the lowest numbers, in place of those that a student will keep.

    Which those are its training text will tell; what they take in the header differs little.
    """
    core = rules["model"]
    vocabulary = {token: i for token, i in core["vocab"].items() if i < size}
    merges = [m for m in core["merges"] if "".join(_merge(m)) in vocabulary]
    added = [one for one in rules.get("added_tokens") or [] if one["id"] < size]
    return rules | {"model": core | {"vocab": vocabulary, "merges": merges}, "added_tokens": added}


def _tokens(path: Path, rules: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every token by id with its kind; ids that the tokenizer leaves free are marked unused."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [int(TokenType.UNUSED)] * size
    core, owner = rules["model"], dict[int, str]()
    added = {a["id"]: a for a in rules.get("added_tokens") or []}
    for token, i in [*core["vocab"].items(), *((a["content"], i) for i, a in added.items())]:
        if not 0 <= i < size:
            raise DataError(f"{path}: token {token!r} has id {i}, the embedding has {size} rows")
        if owner.setdefault(i, token) != token:
            raise DataError(f"{path}: tokens {owner[i]!r} and {token!r} share id {i}")
        tokens[i], types[i] = token, int(TokenType.NORMAL)
        if core.get("byte_fallback") and len(token) == 6 and token.startswith("<0x"):
            types[i] = int(TokenType.BYTE)
    for i, token in added.items():
        types[i] = int(TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED)
        if not token["special"] and (token["lstrip"] or token["rstrip"] or token["single_word"]):
            raise UnsupportedError(
                f"{path}: added token {token['content']!r} strips its surroundings; llama.cpp cannot"
            )
    if core.get("byte_fallback") and core.get("unk_token") in core["vocab"]:
        types[core["vocab"][core["unk_token"]]] = int(TokenType.UNKNOWN)
    return tokens, types


def _merge(raw: str | list[str]) -> tuple[str, str]:
    """Both halves of a merge; older files join them by a blank."""
    a, b = raw.split(" ") if isinstance(raw, str) else raw
    return a, b


def _pre_tokenizer(path: Path, rules: dict[str, Any]) -> str:
    """llama.cpp's name of the rules by which text is cut before the merges."""
    core = rules["model"]
    odd = [
        k for k in ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix") if core.get(k)
    ]
    if rules.get("normalizer") or odd:
        what = f"model.{odd[0]}" if odd else "a normalizer"
        raise UnsupportedError(
            f"{path}: {what} is set; no llama.cpp tokenizer known here does that; export folder"
        )
    node = rules.get("pre_tokenizer") or {}
    steps = tuple(_step(n) for n in (node["pretokenizers"] if node.get("type") == "Sequence" else [node]))
    whole = bool(core.get("ignore_merges"))
    found = next(
        (name for name, pre in PRE_TOKENIZERS.items() if (pre.steps, pre.whole) == (steps, whole)), None
    )
    if found is None:
        shown = json.dumps(node, ensure_ascii=False)[:200]
        raise UnsupportedError(
            f"{path}: no llama.cpp pre-tokenizer with these rules is known here ({shown}); export folder"
        )
    return found


def _step(node: Mapping[str, Any]) -> tuple[object, ...]:
    match node.get("type"):
        case "ByteLevel":
            return ("ByteLevel", node["add_prefix_space"], node.get("use_regex", True))
        case "Digits":
            return ("Digits", node["individual_digits"])
        case "Split":
            return ("Split", node["pattern"].get("Regex"), node["behavior"], node["invert"])
        case _:
            return (json.dumps(dict(node), sort_keys=True),)


def _require_sentencepiece(path: Path, rules: dict[str, Any]) -> None:
    """Refuses byte-fallback tokenizers whose blanks are not treated as in Llama 2."""
    normalizer = rules.get("normalizer") or {}
    steps = normalizer.get("normalizers", []) if normalizer.get("type") == "Sequence" else [normalizer]
    if steps != _SENTENCEPIECE or rules.get("pre_tokenizer"):
        raise UnsupportedError(
            f"{path}: a SentencePiece tokenizer with other rules for blanks than Llama 2's; export folder"
        )


def _scores(path: Path, tokens: list[str], types: list[int], merges: list[tuple[str, str]]) -> list[float]:
    """Scores under which llama.cpp merges in the order of the merge list: minus the rank."""
    rank: dict[str, int] = {}
    for i, (a, b) in enumerate(merges):
        rank.setdefault(a + b, i)
    for token, kind in zip(tokens, types, strict=True):
        if kind == TokenType.NORMAL and len(token) > 1 and token not in rank:
            raise UnsupportedError(
                f"{path}: no merge gives token {token!r}, which llama.cpp would form; export folder"
            )
    return [-float(rank.get(token, len(merges))) for token in tokens]


def _add_special(writer: GGUFWriter, model: Model, tokenizer: PreTrainedTokenizerBase) -> None:
    """Special ids, whether a start token is put in front, the chat template, and the stop tokens."""
    special: dict[str, int | None] = {
        word: getattr(tokenizer, f"{word}_token_id") for word in ("bos", "eos", "unk", "pad")
    }
    for word, i in special.items():
        if i is not None:
            getattr(writer, f"add_{word}_token_id")(i)
    ids = list(tokenizer("a").input_ids)
    writer.add_add_bos_token(bool(ids) and ids[0] == special["bos"])
    writer.add_add_eos_token(len(ids) > 1 and ids[-1] == special["eos"])
    template = tokenizer.chat_template
    if isinstance(template, dict):
        writer.add_chat_template(
            [{"name": name, "template": text} for name, text in sorted(template.items())]
        )
        template = template.get("default", "")
    elif template:
        writer.add_chat_template(template)
    # The end of a turn: the stop token that the chat template writes, else the end of text.
    named = [i for i in stop_ids(model) if str(tokenizer.convert_ids_to_tokens(i)) in (template or "")]
    turn_end = named[-1] if named else special["eos"]
    if turn_end is not None:
        writer.add_eot_token_id(turn_end)


def stop_ids(model: Model) -> list[int]:
    """The ids at which generation stops, by `generation_config.json` or else the config."""
    path = model.folder / "generation_config.json"
    said: dict[str, Any] = read_json_object(path) if path.is_file() else {}
    raw = said.get("eos_token_id", getattr(model.config, "eos_token_id", None))
    return [] if raw is None else [int(i) for i in raw] if isinstance(raw, list) else [int(raw)]
