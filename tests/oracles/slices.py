"""Slow, plainly right ways to weigh slices, to cut a model, and to share keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def importance_slow(X: Tensor, mask: Tensor, width: int) -> list[float]:
    """sqrt(sum over texts (mean over real tokens of the length of a slice)^2), one number at a time."""
    found = []
    for j in range(X.shape[-1] // width):
        total = 0.0
        for text, real in zip(X, mask, strict=True):
            lengths = [
                math.sqrt(sum(float(v) ** 2 for v in token[j * width : (j + 1) * width]))
                for token, there in zip(text, real, strict=True)
                if there
            ]
            total += (sum(lengths) / len(lengths)) ** 2
        found.append(math.sqrt(total))
    return found


def llama_cut_slow(
    weights: dict[str, Tensor], width: list[int], heads: list[list[int]], ffn: list[list[int]], d: int
) -> dict[str, Tensor]:
    """A llama whose keys keep as many queries each, cut row by row and column by column, name by name."""
    found = {}
    for name, W in weights.items():
        block = int(name.split(".")[2]) if ".layers." in name else -1
        if "norm" in name:
            found[name] = torch.stack([W[i] for i in width])
            continue
        rows, columns = list(range(W.shape[0])), width
        if "q_proj" in name:
            rows = [h * d + i for h in heads[block] for i in range(d)]
        if "k_proj" in name or "v_proj" in name:
            rows = list(range(W.shape[0]))
        if "o_proj" in name:
            rows, columns = width, [h * d + i for h in heads[block] for i in range(d)]
        if "gate_proj" in name or "up_proj" in name:
            rows = ffn[block]
        if "down_proj" in name:
            rows, columns = width, ffn[block]
        found[name] = torch.stack([torch.stack([W[i, j] for j in columns]) for i in rows])
    return found


def fused_rows_slow(family: str, heads: list[int], width: int, d: int) -> list[int]:
    """Which outputs stay of the one matrix that gives queries, keys and values, one number at a time.

    GPT-2 has all queries, then all keys, then all values; GPT-NeoX those of one head after those of another.
    """
    found = []
    if family == "gpt2":
        for part in range(3):
            for head in heads:
                for i in range(d):
                    found.append(part * width + head * d + i)
    if family == "gpt_neox":
        for head in heads:
            for part in range(3):
                for i in range(d):
                    found.append((3 * head + part) * d + i)
    return found


def bpe_slow(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """Byte-pair encoding: the first merge of the list that applies anywhere, at its leftmost place, again."""
    parts = list(word)
    while True:
        for a, b in merges:
            places = [i for i in range(len(parts) - 1) if (parts[i], parts[i + 1]) == (a, b)]
            if places:
                parts[places[0] : places[0] + 2] = [a + b]
                break
        else:
            return parts
