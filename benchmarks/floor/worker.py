"""Quantize and write down where the time went: `worker.py MODEL RESULT SEQUENCES LENGTH`."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

os.environ.setdefault("NUMBA_CACHE_DIR", tempfile.mkdtemp())  # compiled code is never reused

import torch
from meter import write_json
from torch import nn

from pocketsize.linalg import Gram
from pocketsize.models import attention
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.models.products import quick_products
from pocketsize.models.walk import walk
from pocketsize.quantization import gptq
from pocketsize.recipes.grids import block_scheme
from pocketsize.recipes.quantize import Gptq, quantize_site

REPEATS, ROWS = 15, 2048


def main() -> None:
    folder, result, (sequences, length) = Path(sys.argv[1]), Path(sys.argv[2]), map(int, sys.argv[3:])
    model = load(folder)
    shapes = [model.matrix_shape(name) for name in model.linears]
    parts: dict[str, float] = {}
    timing(nn.Linear, "forward", "linears", parts)
    timing(Gram, "update", "Gram products", parts)
    timing(attention, "causal", "attention", parts)
    timing(gptq, "feedback_factor", "factorisation", parts)
    timing(gptq, "sweep", "sweep and compilation", parts)
    rates = [rate(set(shapes))]
    start = time.perf_counter()
    quantize(model, sequences, length)
    wall = time.perf_counter() - start
    rates.append(rate(set(shapes)))
    parts["rest"] = wall - sum(parts.values())
    tokens = sequences * length
    cost = {
        "wall_s": round(wall, 2),
        "flop_per_s": max(rates),
        "forward_flop": 2 * tokens * sum(rows * columns for rows, columns in shapes),
        "gram_flop": tokens * sum(width**2 for width in gram_widths(model)),
        "parts_s": {name: round(spent, 2) for name, spent in parts.items()},
    }
    write_json(result, cost)


def quantize(model: Model, sequences: int, length: int) -> None:
    """All linears, kept nowhere."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(int(model.config.vocab_size), (sequences, length), generator=generator)
    step = Gptq("W4A16", group=64, symmetric=False, embeddings=None).resolve(model, ("folder",))
    with quick_products():
        for site in walk(model, ids, torch.ones_like(ids, dtype=torch.bool)):
            for _ in quantize_site(site, block_scheme(step), step):
                pass


def gram_widths(model: Model) -> list[int]:
    """The width of each Gram matrix of the model."""
    return [
        model.matrix_shape(f"{block}.{group.names[0]}.weight")[1]
        for block in model.blocks
        for group in model.groups
    ]


def rate(shapes: set[tuple[int, ...]]) -> float:
    """The best of bfloat16 products per second over the shapes of the linears, for a batch of 2048 tokens."""
    best = 0.0
    for rows, columns in shapes:
        X, W = (
            torch.randn(ROWS, columns, dtype=torch.bfloat16),
            torch.randn(rows, columns, dtype=torch.bfloat16),
        )
        for _ in range(REPEATS):
            start = time.perf_counter()
            X @ W.T
            best = max(best, 2 * ROWS * rows * columns / (time.perf_counter() - start))
    return best


def timing(owner: Any, name: str, part: str, parts: dict[str, float]) -> None:
    """Add the seconds of every call of `owner.name` to a part."""
    real: Callable[..., Any] = getattr(owner, name)

    @wraps(real)
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return real(*args, **kwargs)
        finally:
            parts[part] = parts.get(part, 0.0) + time.perf_counter() - start

    setattr(owner, name, timed)


if __name__ == "__main__":
    main()
