"""Slow, plainly right training of corrections: W + s B A is made anew for every step of a plain loop."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from pocketsize.models.model import Model
from pocketsize.models.skeleton import materialise


def trained_slow(
    model: Model, begin: dict[str, tuple[Tensor, Tensor]], scale: float, batches: list[Tensor], rate: float
) -> dict[str, Tensor]:
    """All weights after AdamW at one rate on the true next tokens, by parameter name."""
    module = materialise(model)
    parts = {name: [T.clone().requires_grad_() for T in pair] for name, pair in begin.items()}
    optimizer = torch.optim.AdamW(
        [T for pair in parts.values() for T in pair], lr=rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0
    )

    def whole() -> dict[str, Tensor]:
        return {
            name: model.weight(name) + model.as_stored(name, scale * (B @ A))
            for name, (A, B) in parts.items()
        }

    for ids in batches:
        logits = functional_call(module, whole(), (ids,)).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    rest = {name: p.detach() for name, p in module.named_parameters()}
    return rest | {name: W.detach() for name, W in whole().items()}
