"""Where forward passes and quantization run: a GPU where torch sees one, else the processor."""

from __future__ import annotations

import os

import torch

from pocketsize.errors import UsageError

CPU = torch.device("cpu")
VARIABLE = "POCKETSIZE_DEVICE"


def working_device() -> torch.device:
    """The first GPU that CUDA has, else the processor; or what POCKETSIZE_DEVICE names (cpu, cuda, cuda:1).

    Of processes that torchrun starts each has the next GPU, beginning anew where there are fewer. A GPU
    that was asked for and is not there is a UsageError: nothing falls back to the processor.
    """
    there = torch.cuda.is_available()
    asked = os.environ.get(VARIABLE) or ("cuda" if there else "cpu")
    if asked == "cpu":
        return CPU
    kind, _, number = asked.partition(":")
    if kind != "cuda" or not (number or "0").isdecimal():
        raise UsageError(f"{VARIABLE}: unknown device {asked!r}; it is cpu, cuda or cuda:NUMBER")
    if number and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
        raise UsageError(f"{VARIABLE}: {asked} would be all processes' of torchrun; cuda gives each its own")
    count = torch.cuda.device_count() if there else 0
    if not number and count:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % count)
    if int(number or 0) >= count:
        raise UsageError(
            f"{VARIABLE}: {asked} is not there, torch sees {count} GPUs; look at `pocketsize doctor`"
        )
    return torch.device("cuda", int(number or 0))
