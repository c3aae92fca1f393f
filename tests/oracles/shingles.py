"""Overlap of two texts with sets of tuples of words: nothing hashed, nothing vectorised."""

import re


def overlap_slow(calibrate: list[str], evaluate: list[str], width: int = 13) -> float:
    known = {shingle for text in calibrate for shingle in _shingles(text, width)}
    asked = [shingle for text in evaluate for shingle in _shingles(text, width)]
    return sum(shingle in known for shingle in asked) / len(asked) if asked else 0.0


def _shingles(text: str, width: int) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    width = min(width, len(words))
    return [tuple(words[i : i + width]) for i in range(len(words) - width + 1)] if words else []
