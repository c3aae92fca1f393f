"""Scores of classifiers, class by class and text by text."""

from __future__ import annotations

from collections.abc import Sequence


def macro_f1_slow(labels: Sequence[int], said: Sequence[int]) -> float:
    """F1 from precision and recall of each class that is a label or was said."""
    found = []
    for c in sorted({*labels, *said}):
        hits = sum(a == b == c for a, b in zip(labels, said, strict=True))
        precision = hits / said.count(c) if said.count(c) else 0.0  # type: ignore[attr-defined]
        recall = hits / labels.count(c) if labels.count(c) else 0.0  # type: ignore[attr-defined]
        found.append(2 * precision * recall / (precision + recall) if hits else 0.0)
    return sum(found) / len(found)


def above_chance_slow(labels: Sequence[int], said: Sequence[int]) -> float:
    """How far the accuracy is from that of always naming the commonest label, on the way to 1."""
    accuracy = sum(a == b for a, b in zip(labels, said, strict=True)) / len(labels)
    chance = max(sum(a == c for a in labels) for c in labels) / len(labels)
    return (accuracy - chance) / (1 - chance)
