"""What a batch of calibration text holds while it waits inside a block: measured on one block."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pocketsize.models.batches import windows_per_batch
from pocketsize.models.depth import excerpt, names_of_whole
from pocketsize.models.model import Model
from pocketsize.models.walk import walk

_TENSORS = (Tensor, nn.Parameter)


def waiting_bytes(model: Model, length: int) -> float:
    """The most bytes that a token of a waiting batch holds at any site of the middle block.

    One batch of windows of `length` tokens is walked through the block, then two; what the second
    adds is what a batch costs: hidden states, arguments of its own, and all that the frames it waits
    in refer to. The memory where that lies stays with the walk, so the most at any site counts at
    all of them. What a batch needs only while it runs is not in it.
    """
    middle = len(model.blocks) // 2
    short = excerpt(model, middle)
    windows = windows_per_batch(length)
    with _young(), names_of_whole(model, [middle]):
        one, two = (_held(short, count * windows, length) for count in (1, 2))
    more = [(b - a) / (windows * length) for a, b in zip(one, two, strict=True)]
    return max(more)


@contextmanager
def _young() -> Iterator[None]:
    """While it is entered, whatever is made stays in the collector's first generation."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _held(model: Model, windows: int, length: int) -> list[int]:
    """Bytes of all tensors that are made and are alive at each site."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (windows, length), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    found: list[int] = []
    for site in walk(model, ids, mask):
        del site
        found.append(_alive())
    return found


def _alive() -> int:
    """Bytes of the tensors of the first generation, what several share counted once."""
    sizes: dict[int, int] = {}
    for thing in gc.get_objects(generation=0):
        # Not isinstance: some objects warn when they are asked for their class.
        if type(thing) in _TENSORS and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
