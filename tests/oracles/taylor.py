"""Slow, plainly right first-order costs: w * dL/dw of the whole module, token by token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pocketsize.models.model import Model
from pocketsize.models.skeleton import materialise


def slice_cost_slow(
    model: Model, ids: Tensor, mask: Tensor, names: list[str], width: int, seed: int
) -> list[float]:
    """sqrt(sum over tokens of (first-order change of the loss once a slice is gone)^2).

    A gate of 1 stands before the input of each of `names`, one for each token and slice: its gradient.
    """
    module = materialise(model)
    columns = model.matrix_shape(f"{names[0]}.weight")[1]
    gates = torch.ones(*ids.shape, columns // width, requires_grad=True)

    def gated(_: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        return args[0] * gates.repeat_interleave(width, -1)

    for name in names:
        module.get_submodule(name).register_forward_pre_hook(gated)
    loss_slow(model, module, ids, mask, seed).backward()
    assert gates.grad is not None
    return gates.grad[mask].square().sum(0).sqrt().tolist()


def loss_slow(model: Model, module: nn.Module, ids: Tensor, mask: Tensor, seed: int) -> Tensor:
    """The negative log-likelihood of what the model itself says, likeliest; of an encoder its embeddings
    along directions drawn by chance. What is told of a window counts by the root of its tokens."""
    out = module(input_ids=ids, attention_mask=mask.long())
    worth = (mask.sum(1) / mask.sum(1).float().mean()).sqrt()
    if model.arch.task == "embed":
        kept = mask[..., None]
        found = F.normalize((out.last_hidden_state * kept).sum(1) / kept.sum(1), dim=-1)
        generator = torch.Generator().manual_seed(seed)
        parts = [torch.randn(len(one), found.shape[1], generator=generator) for one in found.split(2)]
        return (found * torch.cat(parts)).sum(1) @ worth
    writes = model.arch.task == "generate"
    p = (out.logits[mask] if writes else out.logits).log_softmax(-1)
    told = -p.gather(-1, p.detach().argmax(-1, keepdim=True))[:, 0]
    return told.sum() if writes else told @ worth
