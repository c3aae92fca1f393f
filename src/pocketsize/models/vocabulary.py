"""A tokenizer with some of its tokens: the file that stock loaders read, and how the others are spelled."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from pocketsize.errors import UnsupportedError, UsageError

KINDS = ("BPE", "WordPiece", "Unigram")
# Keys of configs that hold the number of a token, or several.
_NUMBERS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "sep_token_id")
_LISTS = ("suppress_tokens", "begin_suppress_tokens")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What tokenizer.json says of tokens: their numbers, how pieces become one, and what was added."""

    raw: Mapping[str, Any]

    def __post_init__(self) -> None:
        kind = self.raw.get("model", {}).get("type")
        if kind not in KINDS:
            raise UnsupportedError(
                f"vocabulary: a tokenizer of type {kind!r} cannot be trimmed; {', '.join(KINDS)} can"
            )

    @property
    def kind(self) -> str:
        """BPE, WordPiece or Unigram."""
        return str(self.raw["model"]["type"])

    @property
    def own(self) -> dict[str, int]:
        """The number of each token of the model."""
        vocabulary = self.raw["model"]["vocab"]
        if self.kind == "Unigram":
            return {piece: i for i, (piece, _) in enumerate(vocabulary)}
        return dict(vocabulary)

    @property
    def added(self) -> dict[str, int]:
        """The number of each token that is cut out of a text before the model sees it."""
        return {entry["content"]: entry["id"] for entry in self.raw.get("added_tokens", [])}

    @property
    def numbers(self) -> dict[str, int]:
        """The number of each token."""
        return self.own | self.added

    @property
    def merges(self) -> list[tuple[str, str]]:
        """Which neighbours become one, in their order."""
        found = self.raw["model"].get("merges", [])
        pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in found]
        return [(str(a), str(b)) for a, b in pairs]

    def indispensable(self) -> set[str]:
        """Tokens that stay whatever a text uses: added ones, the unknown, bytes, single ASCII characters."""
        model, latin = self.raw["model"], 128
        if "ByteLevel" in json.dumps([self.raw.get("pre_tokenizer"), self.raw.get("decoder")]):
            latin = 324  # GPT-2's alphabet, which writes each byte as one character below this number
        prefix = model.get("continuing_subword_prefix") or ""
        found = set(self.added)
        if isinstance(model.get("unk_token"), str):
            found.add(model["unk_token"])
        if self.kind == "Unigram" and model.get("unk_id") is not None:
            found.add(model["vocab"][model["unk_id"]][0])
        for token in self.own:
            bare = token.removeprefix(prefix) if prefix else token
            byte = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
            if byte or (len(bare) == 1 and ord(bare) < latin):
                found.add(token)
        return found & set(self.numbers)


def derivation(token: str, ranks: Mapping[tuple[str, str], int]) -> tuple[list[str], set[str]]:
    """What a string becomes by merging neighbours, least rank first; and all that was made on the way."""
    parts, seen = list(token), set(token)
    while len(parts) > 1:
        pairs = [ranks.get(pair) for pair in pairwise(parts)]
        known = [rank for rank in pairs if rank is not None]
        if not known:
            break
        i = pairs.index(min(known))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        seen.add(parts[i])
    return parts, seen


def kept_tokens(vocabulary: Vocabulary, counts: Mapping[int, int], limit: int | None = None) -> list[int]:
    """The numbers of the tokens that stay, rising.

    Those that are indispensable, those that a text uses (`counts`), and of BPE those that they are made
    from. A text that used only such tokens is cut as before: of all merges that it needs none is missing,
    and no other one comes in between. `limit`: exactly so many, the most used first, then those of the
    lowest numbers.
    """
    numbers = vocabulary.numbers
    names = {number: token for token, number in numbers.items()}
    ranks = {pair: rank for rank, pair in enumerate(vocabulary.merges)}
    kept = vocabulary.indispensable()
    if limit is not None and len(kept) > limit:
        raise UsageError(
            f"vocabulary: {limit} is too few; special tokens, single characters and bytes alone are "
            f"{len(kept)}; give at least that many"
        )
    used = sorted(counts, key=lambda number: (-counts[number], number))
    rest = [] if limit is None else sorted(set(names) - set(used))
    for number in (*used, *rest):
        token = names.get(number)
        if token is None or token in kept:
            continue
        needs = {token}
        if ranks and token not in vocabulary.added:
            needs |= {part for part in derivation(token, ranks)[1] if part in numbers} - kept
        if limit is None or len(kept) + len(needs - kept) <= limit:
            kept |= needs
    return sorted(numbers[token] for token in kept)


def trimmed(vocabulary: Vocabulary, kept: Sequence[int]) -> dict[str, Any]:
    """The tokenizer's file with these tokens, numbered from 0 in their order."""
    raw = copy.deepcopy(dict(vocabulary.raw))
    new = {old: number for number, old in enumerate(kept)}
    model = raw["model"]
    if vocabulary.kind == "Unigram":
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
        model["vocab"] = [model["vocab"][old] for old in kept if old < len(model["vocab"])]
    else:
        own = vocabulary.own
        model["vocab"] = {token: new[old] for token, old in own.items() if old in new}
    if "merges" in model:
        there = model["vocab"]
        model["merges"] = [
            form
            for form, (a, b) in zip(model["merges"], vocabulary.merges, strict=True)
            if a in there and b in there and a + b in there
        ]
    raw["added_tokens"] = [
        entry | {"id": new[entry["id"]]} for entry in raw.get("added_tokens", []) if entry["id"] in new
    ]
    raw["post_processor"] = _renumbered(raw.get("post_processor"), new)
    if (padding := raw.get("padding")) is not None:
        padding["pad_id"] = new.get(padding["pad_id"], 0)
    return raw


def _renumbered(processor: Any, new: Mapping[int, int]) -> Any:
    """A post-processor with the new numbers of the tokens that it puts around a text."""
    if isinstance(processor, list):
        return [_renumbered(one, new) for one in processor]
    if not isinstance(processor, dict):
        return processor
    found = {key: _renumbered(value, new) for key, value in processor.items()}
    if found.get("type") == "TemplateProcessing":
        for entry in found.get("special_tokens", {}).values():
            entry["ids"] = [new[old] for old in entry["ids"]]
    for key in ("sep", "cls"):
        if isinstance(found.get(key), list) and len(found[key]) == 2:
            found[key] = [found[key][0], new[found[key][1]]]
    return found


def renumbered_config(raw: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """A config or generation config with the new numbers of its tokens; numbers of dropped ones go."""
    found = dict(raw)
    for key in (*_NUMBERS, *_LISTS):
        value = found.get(key)
        if isinstance(value, list):
            found[key] = [new[old] for old in value if old in new]
        elif isinstance(value, int) and not isinstance(value, bool):
            found[key] = new.get(value)
    return found


def renumbered_tokenizer_config(raw: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    """A tokenizer_config.json with the new numbers of added tokens."""
    found = dict(raw)
    if isinstance(decoder := found.get("added_tokens_decoder"), dict):
        found["added_tokens_decoder"] = {
            str(new[int(old)]): entry for old, entry in decoder.items() if int(old) in new
        }
    return found


@dataclass(frozen=True, slots=True)
class Speller:
    """How a tokenizer with fewer tokens writes those of one with more: each as one token, or as several."""

    large: Vocabulary
    small: Vocabulary

    def table(self, ids: Iterable[int]) -> dict[int, list[int]]:
        """The tokens of the small one that stand for each of these of the large one."""
        names = {number: token for token, number in self.large.numbers.items()}
        there = self.small.numbers
        ranks = {pair: rank for rank, pair in enumerate(self.small.merges)}
        unknown = self.small.raw["model"].get("unk_token")
        fallback = [there[unknown]] if isinstance(unknown, str) and unknown in there else []
        found: dict[int, list[int]] = {}
        for number in set(ids):
            token = names.get(number)
            if token is None:
                found[number] = fallback
                continue
            parts = [token] if token in there else self._parts(token, ranks)
            known = [there[part] for part in parts if part in there]
            found[number] = known if len(known) == len(parts) else fallback or known
        return found

    def _parts(self, token: str, ranks: Mapping[tuple[str, str], int]) -> list[str]:
        if self.small.kind == "BPE":
            return derivation(token, ranks)[0]
        prefix = str(self.small.raw["model"].get("continuing_subword_prefix") or "")
        there, parts = self.small.numbers, []
        bare = token.removeprefix(prefix) if prefix else token
        lead = prefix if prefix and token.startswith(prefix) else ""
        while bare:
            end = next((n for n in range(len(bare), 0, -1) if lead + bare[:n] in there), 1)
            parts.append(lead + bare[:end])
            bare, lead = bare[end:], prefix
        return parts

    def respelled(
        self, ids: Int64[Tensor, "n s"], mask: Bool[Tensor, "n s"]
    ) -> tuple[Int64[Tensor, "n s"], Bool[Tensor, "n s"]]:
        """Windows in the small one's tokens, each cut at its old length."""
        table = self.table(ids.flatten().tolist())
        out, real = torch.zeros_like(ids), torch.zeros_like(mask)
        for row, (tokens, there) in enumerate(zip(ids, mask, strict=True)):
            new = [part for token in tokens[there].tolist() for part in table[token]][: int(there.sum())]
            out[row, : len(new)] = torch.tensor(new, dtype=ids.dtype)
            real[row, : len(new)] = True
        return out, real


def read_vocabulary(text: str | bytes) -> Vocabulary:
    """The vocabulary of the text of a tokenizer.json."""
    return Vocabulary(json.loads(text))
