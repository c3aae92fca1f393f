"""What people write for sizes, shares and ratios, as numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pocketsize.errors import UsageError

UNITS: Mapping[str, float] = {"kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def parse_share(text: str, word: str = "keep") -> float:
    """`95%` or `0.95` as 0.95; `word` is what errors call it."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    if not found:
        raise UsageError(f"{word} is a share such as 95% or 0.95, got {text!r}")
    share = float(found[1]) / (100 if found[2] else 1)
    if share > 1:
        hint = f"; did you mean {found[1]}%?" if not found[2] and share <= 100 else ""
        raise UsageError(f"{word} is a share of at most 100 %, got {text!r}{hint}")
    return share


def parse_bytes(text: str) -> int:
    """`80MB`, `1.5 GiB` or plain bytes as a number of bytes."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    units = {name.lower(): factor for name, factor in UNITS.items()} | {"": 1.0, "b": 1.0}
    if not found or found[2].lower() not in units:
        raise UsageError(f"fit is a size such as 80MB or 1.5GiB, got {text!r}")
    return int(float(found[1]) * units[found[2].lower()])


def parse_ratio(text: str) -> float:
    """`4x` or `4` as 4.0."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*[xX]?\s*", text)
    if not found:
        raise UsageError(f"ratio is a factor such as 4x, got {text!r}")
    return float(found[1])
