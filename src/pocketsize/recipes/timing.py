"""The largest body that is quick enough on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from pocketsize.errors import UsageError
from pocketsize.io.publish import make_folder
from pocketsize.io.source import cache_folder
from pocketsize.measurement.latency import module_latency
from pocketsize.measurement.machine import machine, versions
from pocketsize.models.arch import arch_of
from pocketsize.models.grouped import regroup
from pocketsize.models.student import Body, Family, config_of, ladder, module_of
from pocketsize.recipes.kept import kept_bytes


def quickest_within(limit_ms: float, start: Callable[[int, int], Body], family: Family) -> Body:
    """The largest of the family's usual shapes that takes at most `limit_ms`: a search by halves.

    Times are those of a text of 128 tokens, or of one token of a model that generates, in torch, float32.
    """
    shapes = list(ladder(family))
    if (first := milliseconds(start(*shapes[0]))) > limit_ms:
        raise UsageError(
            f"student: latency_ms: {limit_ms:g} is too little: the smallest that is asked for takes "
            f"{first:.1f} ms on this machine"
        )
    low, high = 0, 1
    while high < len(shapes) and milliseconds(start(*shapes[high])) <= limit_ms:
        low, high = high, 2 * high
    high = min(high, len(shapes))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if milliseconds(start(*shapes[middle])) <= limit_ms else (low, middle)
    return start(*shapes[low])


def milliseconds(body: Body) -> float:
    """How long a body takes here; measured once, and kept beside fetched models."""
    raw, threads = config_of(body), torch.get_num_threads()
    folder = cache_folder() / "latency"
    make_folder(folder)
    what = (json.dumps(raw, sort_keys=True, default=str), threads, machine(), sorted(versions().items()))

    def measure() -> bytes:
        task = arch_of(body.family).task
        module = module_of(raw, arch_of(body.family), "cpu").eval()
        regroup(module)
        rows = {
            row.name: row.value for row in module_latency(module, task, (body.family, threads), tokens=16)
        }
        return json.dumps(rows["input_time"] if task == "embed" else 1e3 / rows["decode_rate"]).encode()

    return float(json.loads(kept_bytes(folder, "latency", what, "json", measure)))
