"""GPTQ of one block of a 1B and of a 7B llama on a GPU, against what its products alone would take.

    python benchmarks/gpu/run.py

Without a GPU that CUDA sees it says so and measures nothing; `--device cpu --shapes tiny` tries the script.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from bars import ratio_bars, write_record
from torch import Tensor

from pocketsize.linalg import Gram, feedback_factor
from pocketsize.quantization.gptq import gptq
from pocketsize.quantization.scheme import Scheme

T = TypeVar("T")
QUESTION = (
    "What does GPTQ of one block of a 1B and of a 7B llama take on a GPU, and what would its products take?"
)
TOKENS, BATCH, REPEATS, TARGET = 65536, 8192, 3, 2.0
SCHEME = Scheme(4, 128, symmetric=False)


@dataclass(frozen=True, slots=True)
class Shape:
    """The widths of a block, and how many blocks the model has."""

    hidden: int
    inner: int
    keys: int
    blocks: int

    def sites(self) -> Iterator[tuple[int, int]]:
        """Outputs and inputs of the matrices that read one tensor, stacked."""
        yield self.hidden + 2 * self.keys, self.hidden
        yield self.hidden, self.hidden
        yield 2 * self.inner, self.hidden
        yield self.hidden, self.inner


SHAPES = {
    "1B": Shape(2048, 8192, 512, 16),
    "7B": Shape(4096, 11008, 4096, 32),
    "tiny": Shape(128, 256, 64, 2),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=tuple(SHAPES), default=["1B", "7B"])
    parser.add_argument("--tokens", type=int, default=TOKENS)
    chosen = parser.parse_args()
    if chosen.device != "cpu" and not torch.cuda.is_available():
        print("no GPU that CUDA sees: nothing was measured")
        return
    device = torch.device(chosen.device)
    rates = {dtype: rate(device, dtype) for dtype in (torch.bfloat16, torch.float32)}
    rows = [row(name, chosen.tokens, device, rates) for name in chosen.shapes]
    for one in rows:
        print(one)
    if device.type != "cpu" and chosen.tokens == TOKENS and chosen.shapes == ["1B", "7B"]:
        record(rows, torch.cuda.get_device_name(device))


def row(
    name: str, tokens: int, device: torch.device, rates: Mapping[torch.dtype, float]
) -> dict[str, object]:
    """One block: seconds for each part, and the floor."""
    shape = SHAPES[name]
    parts = {"Gram": 0.0, "factorisation": 0.0, "sweep": 0.0}
    floor = 0.0
    for outputs, inputs in shape.sites():
        g = torch.Generator(device).manual_seed(0)
        X = torch.randn(min(BATCH, tokens), inputs, generator=g, device=device, dtype=torch.bfloat16)
        W = torch.randn(outputs, inputs, generator=g, device=device)
        took, H = best(lambda X=X: collected(X, tokens), device)
        parts["Gram"] += took
        factoring, _ = best(lambda H=H: feedback_factor(H, 0.01), device)
        whole, done = best(lambda W=W, H=H: gptq(W, H, SCHEME), device)
        assert bool(torch.isfinite(done.weight.scale).all())
        parts["factorisation"] += factoring
        parts["sweep"] += whole - factoring
        floor += tokens * inputs**2 / rates[torch.bfloat16]
        floor += (inputs**3 / 3 + outputs * inputs**2) / rates[torch.float32]
    spent = sum(parts.values())
    return {
        "shape": name,
        "blocks": shape.blocks,
        "tokens": tokens,
        "block_s": round(spent, 4),
        "floor_s": round(floor, 4),
        "ratio": round(spent / floor, 3),
        "parts_s": {part: round(seconds, 4) for part, seconds in parts.items()},
        "tflop_per_s": {str(d).removeprefix("torch."): round(r / 1e12, 1) for d, r in rates.items()},
        "peak_mb": round(torch.cuda.max_memory_allocated(device) / 1e6) if device.type == "cuda" else None,
    }


def collected(X: Tensor, tokens: int) -> Tensor:
    """The Gram matrix of so many tokens, batch by batch."""
    gram = Gram.zeros(X.shape[1], X.device)
    for _ in range(0, tokens, len(X)):
        gram.update(X)
    return gram.mean()


def best(call: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """The least seconds of several calls after one that compiles; and what the last gave."""
    call()
    seconds = []
    for _ in range(REPEATS):
        wait(device)
        start = time.perf_counter()
        out = call()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds), out


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(device: torch.device, dtype: torch.dtype) -> float:
    """The best rate of square products, in operations a second."""
    n = 4096 if device.type == "cuda" else 512
    A = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / best(lambda: A @ A, device)[0]


def record(rows: Sequence[Mapping[str, object]], gpu: str) -> None:
    """The rows, and a bar for each shape."""
    write_record(
        Path(__file__).with_name("record.json"),
        question=QUESTION,
        threads=1,
        protocol=[
            f"{gpu}; random weights and inputs, W4A16, group 128, asymmetric; least of {REPEATS} runs",
            "floor: a triangle of each Gram matrix at the best rate of bfloat16 products; a Cholesky factor "
            "of each and the feedback of all columns (outputs x inputs^2) at that of float32 products",
        ],
        versions={name: version(name) for name in ("torch", "triton")},
        rows=rows,
        bars=ratio_bars({f"GPTQ of a {one['shape']} block against its floor": one for one in rows}, TARGET),
    )


if __name__ == "__main__":
    main()
