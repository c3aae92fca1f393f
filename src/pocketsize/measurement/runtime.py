"""How fast a GGUF file runs in llama.cpp, the runtime it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pocketsize.io.llamacpp import LlamaCpp
from pocketsize.measurement.latency import row
from pocketsize.measurement.measurement import Measurement

RUNS = 10
# Speed does not depend on what the text says; it only has to be tokens of this very file.
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. "


def llamacpp_latency(
    path: Path, subject: str, *, threads: int, prompt: int = 256, tokens: int = 32
) -> list[Measurement]:
    """Prompt and decode speed of the file in llama.cpp, batch 1, on `threads` threads.

    Medians over ten runs, after one that is not counted; `prompt_p99` and `decode_p99` are the 99th
    percentile over the runs of the prompt's time and of the mean time per token, since llama.cpp tells
    times by run.
    """
    with LlamaCpp(path, threads=threads, context=prompt + tokens + 8) as engine:
        some = engine.tokenize(TEXT)
        ids = (some * (prompt // len(some) + 1))[:prompt]
        engine.timings(ids, tokens)
        runs = [engine.timings(ids, tokens) for _ in range(RUNS)]
        package = engine.package
    read, decode = (
        np.array([getattr(run, f"{part}_per_s") for run in runs]) for part in ("prompt", "decode")
    )
    how = f"llama.cpp ({package}), {threads} threads, batch 1, "

    def told(name: str, value: np.floating[Any], what: str) -> Measurement:
        return row(name, float(value), f"{how}{what} of {RUNS} runs", subject, RUNS)

    at_once, after = f"{prompt} tokens at once", f"{tokens} after {prompt} tokens"
    return [
        told("prompt_rate", np.median(read), f"{at_once}, median"),
        told("prompt_p99", np.quantile(1e3 * prompt / read, 0.99), f"{at_once}, 99th percentile"),
        told("decode_rate", np.median(decode), f"{after}, median"),
        told("decode_p99", np.quantile(1e3 / decode, 0.99), f"{after}, 99th percentile"),
    ]
