"""The tokenizer of a GGUF file as `tokenizer.json` and `tokenizer_config.json`.

Written as text: no tokenizer library reads what the file holds before `load` tries it in a process
of its own. A way of cutting text that is not known is refused, since another one gives other
tokens without any error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from pocketsize.errors import DataError, UnsupportedError
from pocketsize.io.gguf.header import GgufFile
from pocketsize.io.gguf.pretokenizers import PRE_TOKENIZERS, rule

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_BLANK = "▁"
_NAMES = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}


@dataclass(frozen=True, slots=True)
class _Words:
    """The tokens of a file by id, their kinds, and their ids by text."""

    file: GgufFile
    tokens: list[str]
    kinds: list[int]
    ids: dict[str, int]

    def named(self, word: str) -> str | None:
        """The token that the file gives a role, None where it gives it to none."""
        key = f"tokenizer.ggml.{_NAMES[word]}_token_id"
        number = self.file.get(key, int)
        if number is None:
            return None
        if not 0 <= number < len(self.tokens):
            raise DataError(f"{self.file.path}: {key} is {number}; there are {len(self.tokens)} tokens")
        return self.tokens[number]


def tokenizer_of(file: GgufFile, rows: int) -> dict[str, Any]:
    """The contents of `tokenizer.json`, for a model whose embedding has so many rows."""
    kind = file.of("tokenizer.ggml.model", str)
    if kind == "gpt2":
        return _byte_level(file, _words(file, rows))
    if kind == "llama":
        return _sentencepiece(file, _words(file, rows, blanks=True))
    raise UnsupportedError(f"{file.path}: tokenizer {kind[:80]!a}; gpt2 and llama are read")


def settings_of(file: GgufFile, rows: int, positions: int) -> dict[str, Any]:
    """The contents of `tokenizer_config.json`."""
    words = _words(file, rows, blanks=file.of("tokenizer.ggml.model", str) == "llama")
    named = {f"{word}_token": words.named(word) for word in _NAMES}
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {key: token for key, token in named.items() if token is not None}
    settings |= {"clean_up_tokenization_spaces": False, "model_max_length": positions}
    if (template := file.get("tokenizer.chat_template", str)) is not None:
        settings["chat_template"] = template
    return settings


def _words(file: GgufFile, rows: int, *, blanks: bool = False) -> _Words:
    """The tokens, which must be as many as the embedding has rows, and no two alike.

    With `blanks`, a token of several spaces is spelled as SentencePiece does.
    """
    tokens = _texts(file, "tokenizer.ggml.tokens")
    if len(tokens) != rows:
        raise DataError(f"{file.path}: {len(tokens)} tokens, the embedding has {rows} rows")
    kinds: list[Any] = file.get("tokenizer.ggml.token_type", list) or [_NORMAL] * len(tokens)
    if len(kinds) != len(tokens) or not all(kind in range(7) for kind in kinds):
        raise DataError(f"{file.path}: tokenizer.ggml.token_type is no list of {len(tokens)} kinds")
    if blanks:
        tokens = [_BLANK * len(t) if " " in t and not t.strip(" ") else t for t in tokens]
    ids: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if (other := ids.setdefault(token, i)) != i:
            raise DataError(f"{file.path}: tokens {other} and {i} are both {token[:40]!a}")
    return _Words(file, tokens, kinds, ids)


def _byte_level(file: GgufFile, words: _Words) -> dict[str, Any]:
    """Byte-level BPE, with the cut that the file names."""
    name = file.get("tokenizer.ggml.pre", str)
    if name is None or name not in PRE_TOKENIZERS:
        known = ", ".join(PRE_TOKENIZERS)
        raise UnsupportedError(
            f"{file.path}: tokenizer gpt2/{ascii((name or 'unnamed')[:80])[1:-1]}; gpt2 is read with {known}"
        )
    pre = PRE_TOKENIZERS[name]
    steps = [rule(step) for step in pre.steps]
    merges = [_merge(file, i, text, words) for i, text in enumerate(_texts(file, "tokenizer.ggml.merges"))]
    return _json(
        words,
        {"ignore_merges": pre.whole},
        merges,
        normalizer={"type": pre.normalizer} if pre.normalizer else None,
        pre_tokenizer=steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps},
        post_processor=_ends(words, first=pre.first),
        decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    )


def _sentencepiece(file: GgufFile, words: _Words) -> dict[str, Any]:
    """BPE of SentencePiece: bytes for what is not in the vocabulary, merges from the scores."""
    for i, kind in enumerate(words.kinds):
        if kind == _BYTE and not re.fullmatch("<0x[0-9A-F]{2}>", words.tokens[i]):
            raise DataError(f"{file.path}: token {i} is byte {words.tokens[i][:40]!a}, not <0x00> to <0xFF>")
    prefix = file.get("tokenizer.ggml.add_space_prefix", bool)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _BLANK}
    back: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _BLANK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix is not False:
        replace = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": _BLANK}, replace]}
        back.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _json(
        words,
        {"unk_token": words.named("unk"), "fuse_unk": True, "byte_fallback": _BYTE in words.kinds},
        _merges_of_scores(file, words),
        normalizer=replace,
        pre_tokenizer=None,
        post_processor=_ends(words, first=True),
        decoder={"type": "Sequence", "decoders": back},
    )


def _json(words: _Words, own: dict[str, Any], merges: list[tuple[str, str]], **rules: Any) -> dict[str, Any]:
    """A whole `tokenizer.json`: the rules in the order they run around a BPE model."""
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
    }
    model |= own | {"vocab": words.ids, "merges": merges}
    start = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": _added(words)}
    return start | rules | {"model": model}


def _added(words: _Words) -> list[dict[str, Any]]:
    """Tokens that are found in the text before it is cut: special ones, and those a user defined."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return [
        {"id": i, "content": token, **plain, "special": kind in (_CONTROL, _UNKNOWN)}
        for i, (token, kind) in enumerate(zip(words.tokens, words.kinds, strict=True))
        if kind in (_CONTROL, _UNKNOWN) or (kind == _USER and token.strip(_BLANK))
    ]


def _merge(file: GgufFile, number: int, text: str, words: _Words) -> tuple[str, str]:
    """Both halves of a merge; they and the whole must be tokens."""
    a, blank, b = text.partition(" ")
    if not a or not blank or not b or " " in b:
        raise DataError(f"{file.path}: merge {number} is {text[:40]!a}; two tokens and a blank are needed")
    for token in (a, b, a + b):
        if token not in words.ids:
            raise DataError(f"{file.path}: merge {number}: {token[:40]!a} is not a token")
    return a, b


def _merges_of_scores(file: GgufFile, words: _Words) -> list[tuple[str, str]]:
    """Every pair of tokens that makes a token, best first: SentencePiece joins by the score of the whole.

    Tokens of blanks that a user defined come first, as SentencePiece never cuts them.
    """
    scores: list[Any] = file.of("tokenizer.ggml.scores", list)
    if len(scores) != len(words.tokens) or not all(isinstance(score, float) for score in scores):
        raise DataError(f"{file.path}: {len(scores)} scores for {len(words.tokens)} tokens")
    found: list[tuple[tuple[float, ...], str, str]] = []
    for i, (token, kind) in enumerate(zip(words.tokens, words.kinds, strict=True)):
        if kind not in (_NORMAL, _USER) or (kind == _USER and token.strip(_BLANK)):
            continue
        best = (0.0, float(i)) if kind == _USER else (1.0, -scores[i])
        for cut in range(1, len(token)):
            a, b = token[:cut], token[cut:]
            if a in words.ids and b in words.ids:
                found.append(((*best, -cut, words.ids[a], words.ids[b]), a, b))
    found.sort(key=lambda merge: merge[0])
    return [(a, b) for _, a, b in found]


def _ends(words: _Words, *, first: bool) -> dict[str, Any] | None:
    """What is put before and after each text; None for nothing.

    `first`: whether the first token is put before it where the file does not say.
    """
    before, after = [], []
    for word, standard, side in (("bos", first, before), ("eos", False, after)):
        said = words.file.get(f"tokenizer.ggml.add_{word}_token", bool)
        if standard if said is None else said:
            if (token := words.named(word)) is None:
                raise DataError(f"{words.file.path}: add_{word}_token is set, and no token is named {word}")
            side.append(token)
    if not before and not after:
        return None

    def around(sequence: str, kind: int) -> list[dict[str, Any]]:
        front = [{"SpecialToken": {"id": token, "type_id": kind}} for token in before]
        back = [{"SpecialToken": {"id": token, "type_id": kind}} for token in after]
        return [*front, {"Sequence": {"id": sequence, "type_id": kind}}, *back]

    special = {t: {"id": t, "ids": [words.ids[t]], "tokens": [t]} for t in (*before, *after)}
    return {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": special,
    }


def _texts(file: GgufFile, key: str) -> list[str]:
    texts = file.of(key, list)
    if not all(isinstance(text, str) for text in texts):
        raise DataError(f"{file.path}: {key} is no list of texts")
    return texts
