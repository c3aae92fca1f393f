"""The ways of cutting text that llama.cpp names, as the rules of a `tokenizer.json`, for both directions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
_TEKKEN = rf"{_WORDS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SHORT}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """Rules in the order they run; `whole`: words found in the vocabulary skip the merges.

    `normalizer` is what the original tokenizers do before, and llama.cpp leaves out. `first`: the
    first token is put in front of a text unless the file says otherwise.
    """

    steps: tuple[tuple[object, ...], ...]
    whole: bool = False
    first: bool = False
    normalizer: str | None = None


def _split(pattern: str) -> tuple[tuple[object, ...], ...]:
    return (("Split", pattern, "Isolated", False), ("ByteLevel", False, False))


_GPT2 = PreTokenizer((("ByteLevel", False, True),))
_OF_LLAMA3 = PreTokenizer(_split(LLAMA3), whole=True, first=True)
_OF_QWEN2 = PreTokenizer(_split(_QWEN2), normalizer="NFC")
# The first name of each kind is the one that is written.
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(
    {
        "gpt-2": _GPT2,
        "smollm": PreTokenizer((("Digits", True), ("ByteLevel", False, True))),
        "llama-bpe": _OF_LLAMA3,
        "llama3": _OF_LLAMA3,
        "llama-v3": _OF_LLAMA3,
        "dbrx": PreTokenizer(_split(LLAMA3)),
        "qwen2": _OF_QWEN2,
        "deepseek-r1-qwen": _OF_QWEN2,
        "tekken": PreTokenizer(_split(_TEKKEN), whole=True, first=True),
        "gpt-4o": PreTokenizer(_split(_GPT4O)),
    }
)


def rule(step: tuple[object, ...]) -> dict[str, object]:
    """A step as `tokenizer.json` writes it."""
    match step:
        case ("ByteLevel", prefix, regex):
            return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": regex}
        case ("Digits", single):
            return {"type": "Digits", "individual_digits": single}
        case ("Split", pattern, behavior, invert):
            return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}
        case _:
            raise ValueError(f"no rule {step}")
