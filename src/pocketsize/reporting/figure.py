"""How figures read on a page: names, units and numbers in words a user would use."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from pocketsize.measurement.measurement import Measurement

Group = Literal["quality", "size", "speed", "other"]
Form = Literal["plain", "percent", "bytes", "times"]

NBSP = "\u00a0"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_FORM_OF_UNIT: Mapping[str, Form] = MappingProxyType(
    {
        "share": "percent",
        "fraction": "percent",
        "bytes": "bytes",
        "byte": "bytes",
        "x": "times",
        "×": "times",
        "ratio": "times",
        "times": "times",
    }
)


@dataclass(frozen=True, slots=True)
class Words:
    """What a measurement is called, one sentence that explains it, and the table it stands in."""

    label: str
    note: str
    group: Group
    form: Form | None = None


_WORDS: Mapping[str, Words] = MappingProxyType(
    {
        "perplexity_ratio": Words("Perplexity kept", "the figure that --keep asks for", "quality", "percent"),
        "perplexity": Words("Perplexity", "", "quality"),
        "kl_mean": Words(
            "KL divergence, mean",
            "how far the next-token distribution moved; 0 when nothing changed",
            "quality",
        ),
        "kl_p99": Words(
            "KL divergence, 99th percentile", "the hundredth of the tokens that moved most", "quality"
        ),
        "top1": Words("Same first choice", "", "quality", "percent"),
        "bits_per_byte": Words("Bits per byte", "cost of the text, whatever the tokenizer", "quality"),
        "spearman": Words("Similarity ranking kept", "1 when the order of all pairs is the same", "quality"),
        "one_minus_cosine": Words("Distance of embeddings", "0 when they are equal", "quality"),
        "accuracy_ratio": Words("Accuracy kept", "the figure that --keep asks for", "quality", "percent"),
        "accuracy": Words("Accuracy", "", "quality", "percent"),
        "macro_f1": Words("F1, mean over classes", "", "quality"),
        "above_chance": Words("Accuracy above chance", "0 for always naming the commonest class", "quality"),
        "agreement": Words("Same class", "texts that both models put into one class", "quality", "percent"),
        "class_kl": Words("KL divergence of classes", "0 when nothing changed", "quality"),
        "bytes": Words("Size on disk", "", "size", "bytes"),
        "bf16_bytes": Words("Size in bf16", "", "size", "bytes"),
        "ratio_to_download": Words("Smaller than the download", "", "size", "times"),
        "ratio_to_bf16": Words("Smaller than bf16", "", "size", "times"),
        "bits_per_weight": Words("Bits per weight", "", "size"),
        "prompt_rate": Words("Reading the prompt", "", "speed"),
        "decode_rate": Words("Writing the answer", "", "speed"),
        "prompt_p99": Words("Time for the prompt, 99th percentile", "", "speed"),
        "decode_p99": Words("Time per token, 99th percentile", "", "speed"),
        "input_time": Words("One input", "", "speed"),
        "sentence_rate": Words("Sentences in batches", "", "speed"),
    }
)
ORDER = tuple(_WORDS)
FORMATS: Mapping[str, str] = MappingProxyType(
    {
        "folder": "safetensors folder for transformers",
        "sparse": "safetensors folder with zeros left out, for pocketsize",
        "gguf": "GGUF file for llama.cpp",
        "gptq": "GPTQ checkpoint for GPTQModel and vLLM",
        "gptq_v2": "GPTQ checkpoint (second version) for GPTQModel",
        "awq": "AWQ checkpoint for transformers and vLLM",
        "bitsandbytes": "NF4 checkpoint for transformers with bitsandbytes",
    }
)


def words_of(name: str, *, timed: bool = False) -> Words:
    """The words for a measurement; one that is not known here keeps its own name as label."""
    if name in _WORDS:
        return _WORDS[name]
    return Words(name.replace("_", " "), "", "speed" if timed else "other")


def form_of(measurement: Measurement) -> Form:
    """How its value is written: by its name where that is known, else by its unit."""
    form = words_of(measurement.name).form
    return form or _FORM_OF_UNIT.get(measurement.unit.strip().lower(), "plain")


def unit_of(measurement: Measurement) -> str:
    """The unit to print after the value, empty where the form already says it."""
    unit = measurement.unit.strip()
    silent = form_of(measurement) != "plain" or unit.lower() in (measurement.name, "ppl", "1", "")
    return "" if silent else unit


def written(value: float, form: Form = "plain", *, like: float | None = None) -> str:
    """A value in one of the four forms: `30.78`, `96.1 %`, `77.2 MB`, `3.47×`; decimals as for `like`."""
    match form:
        case "percent":
            return percent(value, like=like)
        case "bytes":
            return size(value)
        case "times":
            return f"{number(value, like=like, digits=3)}×"
        case _:
            return number(value, like=like)


def number(value: float, *, like: float | None = None, digits: int = 4) -> str:
    """A number with its first digits: `134,515,008`, `30.78`, `0.0412`, `3.1 × 10⁻⁵`.

    `like` is the number whose decimals it shares: the ends of an interval look like its middle.
    """
    if not math.isfinite(value):
        return "not a number"
    if value < 0:
        return "−" + number(-value, like=like, digits=digits)
    model = abs(value if like is None else like)
    if value >= 1e15 or (0 < value < 1e-3 and model < 1e-3):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}{NBSP}×{NBSP}10{str(int(exponent)).translate(_SUPERSCRIPT)}"
    return f"{value:,.{_decimals(model, digits)}f}"


def percent(share: float, *, like: float | None = None) -> str:
    """A share as a percentage, with the digits that matter: `96.1 %`, `0.32 %`, `0.0041 %`."""
    if not math.isfinite(share):
        return "not a number"
    model = 100 * abs(share if like is None else like)
    decimals = 1 if model >= 1 or model == 0 else min(1 - math.floor(math.log10(model)), 9)
    return f"{100 * share:.{decimals}f}{NBSP}%".replace("-", "−")


def _decimals(model: float, digits: int) -> int:
    """Decimals that show `digits` digits of a number above one, and three of one below."""
    if model == int(model) or model >= 10 ** (digits - 1):
        return 0
    if model >= 1:
        return digits - 1 - math.floor(math.log10(model))
    return 2 - math.floor(math.log10(model)) if model >= 1e-9 else 9


def size(value: float) -> str:
    """Bytes in decimal units, as file managers and model hubs count them: `77.2 MB`."""
    sign, value = ("−", -value) if value < 0 else ("", value)
    if round(value) < 1000:
        return f"{sign}{value:.0f}{NBSP}bytes"
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.5 or unit == "TB":
            break
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{sign}{value:,.{digits}f}{NBSP}{unit}"


def clean(text: str) -> str:
    """Text without characters that no page can hold: control characters and lone surrogates."""
    if text.isprintable():
        return text
    return "".join(c if c in "\n\t" or c.isprintable() or c == NBSP else _visible(c) for c in text)


def _visible(character: str) -> str:
    """A space character stays; anything else that does not print becomes the replacement character."""
    return character if unicodedata.category(character) == "Zs" else "\ufffd"
