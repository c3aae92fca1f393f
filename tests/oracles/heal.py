"""Slow, plainly right ways to solve a linear anew, and to leave parts of a model out."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from pocketsize.models.left_out import Part
from pocketsize.models.model import Model
from pocketsize.models.skeleton import materialise


def healed_slow(W: Tensor, X: Tensor, Y: Tensor, weight: Tensor, damp: float) -> Tensor:
    """argmin over V of sum_t w_t |y_t - V x_t|^2 + damp * m |V - W|^2, float64, as one stacked least squares.

    m is the mean of sum_t w_t x_ti^2 over the inputs i.
    """
    W, X, Y, root = (A.double() for A in (W, X, Y, weight.sqrt()[:, None]))
    m = float(((X * root) ** 2).sum(0).mean())
    pull = (damp * m) ** 0.5 * torch.eye(X.shape[1], dtype=torch.float64)
    rows = torch.cat((X * root, pull))
    wanted = torch.cat((Y * root, pull @ W.T))
    return torch.linalg.lstsq(rows, wanted).solution.T


def distances_slow(
    model: Model, ids: Tensor, mask: Tensor, parts: list[Part], gone: Collection[int] = ()
) -> list[float]:
    """Each part left out of a whole stock module, window by window, and its outputs compared in float64.

    Each window counts by its tokens.
    """
    whole = materialise(model)
    wanted = [_said(model, whole, row, real) for row, real in zip(ids, mask, strict=True)]
    found = []
    for part in parts:
        module = materialise(model)
        layers = module.get_submodule(model.arch.blocks)
        if part.linear is not None:
            linear = module.get_submodule(f"{model.arch.blocks}.{part.block}.{part.linear}")
            with torch.no_grad():
                linear.get_parameter("weight")[:, part.inputs[0] : part.inputs[1]] = 0
        for number in {*gone, *([part.block] if part.linear is None else [])}:
            block = layers[number]
            block.forward = _hands_on(block)
        own = [_said(model, module, row, real) for row, real in zip(ids, mask, strict=True)]
        apart = [_apart(model.arch.task, a, b) for a, b in zip(wanted, own, strict=True)]
        rows = [len(one) for one in apart] if model.arch.task == "generate" else mask.sum(1).tolist()
        total = sum(float(one.mean()) * n for one, n in zip(apart, rows, strict=True))
        found.append(total / sum(rows))
    return found


def _hands_on(block: nn.Module) -> Callable[..., Any]:
    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        return (hidden_states,) if type(block).__name__ in TUPLES else hidden_states

    return forward


# Blocks whose callers read the first of several things.
TUPLES = ("MPNetLayer",)


@torch.no_grad()
def _said(model: Model, module: nn.Module, row: Tensor, real: Tensor) -> Tensor:
    out = module(input_ids=row[None], attention_mask=real[None].long())
    if model.arch.task == "embed":
        return out.last_hidden_state[0, real].double().mean(0, keepdim=True)
    return (out.logits[0, real] if model.arch.task == "generate" else out.logits).double()


def _apart(task: str, wanted: Tensor, own: Tensor) -> Tensor:
    if task == "embed":
        return 1 - torch.cosine_similarity(wanted, own, dim=-1)
    p = wanted.softmax(-1)
    return (p * (wanted.log_softmax(-1) - own.log_softmax(-1))).sum(-1)
