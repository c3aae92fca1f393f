"""How much each head, inner channel and channel of a model carries, on calibration text."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from pocketsize.distillation.slices import Importance
from pocketsize.models.batches import in_batches
from pocketsize.models.body import body_of, uncached
from pocketsize.models.device import working_device
from pocketsize.models.model import Model
from pocketsize.models.stream import stream, without_blocks


@torch.no_grad()
def slice_importance(
    model: Model,
    input_ids: Int64[Tensor, "n length"],
    mask: Bool[Tensor, "n length"],
    watched: Mapping[str, int],
) -> dict[str, Importance]:
    """The importance of the slices of what each of these linears reads; one block in memory at a time.

    `watched` has the linears by path, each with the width of a slice.
    """
    device = working_device()
    module = without_blocks(model, model.weight)
    body = body_of(module)
    found = {
        path: Importance.zeros(model.matrix_shape(f"{path}.weight")[1] // width, width)
        for path, width in watched.items()
    }
    # Batches take turns at every block, so that each is read once.
    kept: dict[greenlet, Bool[Tensor, "b s"]] = {}

    def see(path: str, _: nn.Module, args: Any) -> None:
        real = kept[getcurrent()]
        found[path].update(_by_text(*args, real=real), real)

    def run(ids: Int64[Tensor, "b s"], real: Bool[Tensor, "b s"]) -> None:
        kept[getcurrent()] = real
        body(input_ids=ids, attention_mask=real.long(), **uncached(body))

    handles = [module.get_submodule(p).register_forward_pre_hook(partial(see, p)) for p in watched]
    try:
        calls = [partial(run, ids.to(device), real.to(device)) for ids, real in in_batches(input_ids, mask)]
        stream(module, model, model.weight, calls)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _by_text(
    X: Float[Tensor, "*tokens in"], rows: Int64[Tensor, "n"] | None = None, *, real: Bool[Tensor, "b s"]
) -> Float[Tensor, "b s in"]:
    """What a linear reads, token by token of each text: an expert nothing of all but the tokens at `rows`."""
    if rows is not None:
        X = X.new_zeros(real.numel(), X.shape[-1]).index_copy_(0, rows, X)
    return X.view(*real.shape, -1)
