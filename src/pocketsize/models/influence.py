"""How much each block changes what passes through it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from greenlet import getcurrent, greenlet
from jaxtyping import Bool, Int64
from torch import Tensor, nn

from pocketsize.models.batches import in_batches
from pocketsize.models.body import body_of, uncached
from pocketsize.models.device import working_device
from pocketsize.models.model import Model
from pocketsize.models.stream import stream, without_blocks


@torch.no_grad()
def block_influence(
    model: Model, input_ids: Int64[Tensor, "n length"], mask: Bool[Tensor, "n length"]
) -> list[float]:
    """1 - E cos(input, output) of each block over real tokens, in running order; one block in memory.

    ShortGPT (arXiv:2403.03853, section 3.1): a block whose output points where its input did can go first.
    """
    device = working_device()
    module = without_blocks(model, model.weight)
    body = body_of(module)
    sums = dict.fromkeys(model.blocks, 0.0)
    # Batches take turns at every block, so what each brought there is kept by the batch.
    before: dict[tuple[str, greenlet], Tensor] = {}
    real: dict[greenlet, Bool[Tensor, "b s"]] = {}

    def enter(path: str, _: nn.Module, args: Any, options: Any) -> None:
        before[path, getcurrent()] = args[0] if args else options["hidden_states"]

    def leave(path: str, _: nn.Module, __: Any, output: Any) -> None:
        after, here = output[0] if isinstance(output, tuple) else output, getcurrent()
        alike = F.cosine_similarity(before.pop((path, here)).float(), after.float(), dim=-1)
        sums[path] += float(alike[real[here]].sum())

    def run(ids: Int64[Tensor, "b s"], kept: Bool[Tensor, "b s"]) -> None:
        real[getcurrent()] = kept
        body(input_ids=ids, attention_mask=kept.long(), **uncached(body))

    calls = [partial(run, ids.to(device), kept.to(device)) for ids, kept in in_batches(input_ids, mask)]
    blocks = [(path, module.get_submodule(path)) for path in model.blocks]
    handles = [b.register_forward_pre_hook(partial(enter, path), with_kwargs=True) for path, b in blocks]
    handles += [b.register_forward_hook(partial(leave, path)) for path, b in blocks]
    try:
        stream(module, model, model.weight, calls)
    finally:
        for handle in handles:
            handle.remove()
    count = int(mask.sum())
    return [1 - sums[path] / count for path in model.blocks]
