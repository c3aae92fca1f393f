"""All that is measured of a model: one line for each measurement."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from pocketsize.data.calibration import Windows
from pocketsize.data.text import Corpus
from pocketsize.measurement.classes import class_distance, class_quality
from pocketsize.measurement.embedding import embedding_quality, window_distance
from pocketsize.measurement.latency import torch_latency
from pocketsize.measurement.measurement import Measurement
from pocketsize.measurement.memory import available_bytes
from pocketsize.measurement.quality import Quality, quality
from pocketsize.measurement.runtime import llamacpp_latency
from pocketsize.measurement.tokens import compare
from pocketsize.models.dtype import forward_dtype
from pocketsize.models.model import Model

PROMPT = 256


def quality_of(original: Model, compressed: Model, windows: Windows, corpus: Corpus, *, seed: int) -> Quality:
    """What is kept, by the model's task: generators read the windows, others texts of the corpus.

    A classifier that was made of something else is scored alone.
    """
    if compressed.arch.task == "classify":
        before = original if original.arch.task == "classify" else None
        return class_quality(before, compressed, corpus, seed=seed)
    if original.arch.task == "generate":
        return quality(original, compressed, windows, seed=seed)
    return embedding_quality(original, compressed, corpus, seed=seed)


def divergence(
    original: Model, compressed: Model, ids: Int64[Tensor, "n s"], mask: Bool[Tensor, "n s"]
) -> float:
    """How far a model is from its original on windows of tokens, in one number.

    Of a generator KL(original || compressed), mean over tokens, nats; of a classifier that of its classes,
    mean over windows; of an encoder 1 - cosine of its embeddings, mean over windows, or how far apart their
    similarities are where the widths differ. Windows count by their tokens.
    """
    if original.arch.task == "classify":
        return class_distance(original, compressed, ids, mask)
    if original.arch.task != "generate":
        return window_distance(original, compressed, ids, mask)
    windows = Windows(ids, mask, torch.zeros(len(ids)), "windows that judge", "", 0)
    return float(compare(original, compressed, windows, forward_dtype()).kl.mean())


def has_room(model: Model) -> bool:
    """Whether the whole model fits into memory in float32."""
    left = available_bytes()
    return left is None or 4 * model.origin.parameters < left


def latency(original: Model, gguf: Sequence[Path], *, threads: int | None = None) -> list[Measurement]:
    """Speed of the original in torch and of each GGUF file in llama.cpp, on the same threads.

    The prompt is 256 tokens, or half of what the model can read if that is less. An original for which
    memory has no room is left out.
    """
    threads = threads or torch.get_num_threads()
    prompt = min(PROMPT, original.positions // 2)
    rows: list[Measurement] = []
    if has_room(original):
        rows += torch_latency(original, "original", threads=threads, prompt=prompt)
    for path in gguf:
        rows += llamacpp_latency(path, path.name, threads=threads, prompt=prompt)
    return rows
