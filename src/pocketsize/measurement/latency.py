"""How fast a model runs in torch: prompt and decode for generators, sentences for encoders."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor, nn

from pocketsize.measurement.machine import load_average
from pocketsize.measurement.measurement import Measurement
from pocketsize.models.model import Model
from pocketsize.models.products import stock_products
from pocketsize.models.skeleton import materialise

REPEATS = 5
INPUT = 128
SENTENCES = 16


def torch_latency(
    model: Model, subject: str, *, threads: int, prompt: int = 256, tokens: int = 64
) -> list[Measurement]:
    """Speed of the model in torch, float32, batch 1, on `threads` threads; medians over repeats.

    Generators: prompt and decode tokens per second, and the 99th percentile of the prompt's time and of the
    time per token.
    Encoders: milliseconds for one input of 128 tokens, and sentences per second in batches of 16.
    The number of threads is put back afterwards.
    """
    return module_latency(materialise(model), model.arch.task, (subject, threads), prompt, tokens)


def module_latency(
    module: nn.Module, task: str, who: tuple[str, int], prompt: int = 256, tokens: int = 64
) -> list[Measurement]:
    """The same of a module that is in memory already; `who` is the subject, and how many threads."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(cast(Any, module).config.vocab_size)

    def ids(batch: int, length: int) -> Int64[Tensor, "batch length"]:
        return torch.randint(vocabulary, (batch, length), generator=generator)

    with torch.no_grad(), _threads(who[1]), stock_products():
        if task == "generate":
            return _generator(module, ids(1, prompt), tokens, who)
        return _encoder(module, ids, who)


def row(name: str, value: float, how: str, subject: str, samples: int) -> Measurement:
    """A timing as a measurement; `how` says runtime, threads and sizes; the load is added."""
    unit, better = _UNITS[name]
    how = f"{how}, load {load_average()}"
    return Measurement(name, value, unit, better, how, subject, samples=samples)


_UNITS: dict[str, tuple[str, Literal["lower", "higher"]]] = {
    "prompt_rate": ("tokens/s", "higher"),
    "prompt_p99": ("ms", "lower"),
    "decode_rate": ("tokens/s", "higher"),
    "decode_p99": ("ms/token", "lower"),
    "sentence_rate": ("sentences/s", "higher"),
    "input_time": ("ms", "lower"),
}


def _generator(
    module: nn.Module, ids: Int64[Tensor, "1 s"], tokens: int, who: tuple[str, int]
) -> list[Measurement]:
    subject, threads = who
    length = ids.shape[1]
    module(input_ids=ids, use_cache=True, logits_to_keep=1)
    prompts = _timed(lambda: module(input_ids=ids, use_cache=True, logits_to_keep=1), REPEATS)
    steps = _decode(module, ids, tokens)
    how = f"torch float32, {threads} threads, batch 1, "

    def told(name: str, value: float, what: str, samples: int) -> Measurement:
        return row(name, value, f"{how}{what} of {samples}", subject, samples)

    at_once, after = f"{length} tokens at once", f"after {length} tokens"
    return [
        told("prompt_rate", length / _median(prompts), f"{at_once}, median", REPEATS),
        told("prompt_p99", 1e3 * _late(prompts), f"{at_once}, 99th percentile", REPEATS),
        told("decode_rate", 1 / _median(steps), f"{after}, median", tokens),
        told("decode_p99", 1e3 * _late(steps), f"{after}, 99th percentile", tokens),
    ]


def _decode(module: nn.Module, ids: Int64[Tensor, "1 s"], tokens: int) -> list[float]:
    out = module(input_ids=ids, use_cache=True, logits_to_keep=1)
    seconds: list[float] = []
    for _ in range(tokens):
        start = time.perf_counter()
        best = out.logits[:, -1:].argmax(-1)
        out = module(input_ids=best, past_key_values=out.past_key_values, use_cache=True)
        seconds.append(time.perf_counter() - start)
    return seconds


def _encoder(
    module: nn.Module, ids: Callable[[int, int], Int64[Tensor, "b s"]], who: tuple[str, int]
) -> list[Measurement]:
    subject, threads = who
    one, many = ids(1, INPUT), ids(SENTENCES, INPUT)
    module(input_ids=one)
    single = _timed(lambda: module(input_ids=one), 4 * REPEATS)
    batch = _timed(lambda: module(input_ids=many), REPEATS)
    how = f"torch float32, {threads} threads, {INPUT} tokens each, "
    return [
        row(
            "input_time",
            1e3 * _median(single),
            f"{how}one at a time, median of {len(single)}",
            subject,
            len(single),
        ),
        row(
            "sentence_rate",
            SENTENCES / _median(batch),
            f"{how}{SENTENCES} at a time, median of {REPEATS}",
            subject,
            REPEATS,
        ),
    ]


def _timed(call: Callable[[], object], repeats: int) -> list[float]:
    seconds: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def _median(seconds: list[float]) -> float:
    return float(np.median(seconds))


def _late(seconds: list[float]) -> float:
    return float(np.quantile(seconds, 0.99))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
