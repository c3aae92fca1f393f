"""Experts as linears of their own, under the names that checkpoints have; stock modules fuse them."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pocketsize.models.arch import Arch


class Routed(nn.Linear):
    """A linear that is told which tokens its rows are, so that padding can be told from text."""

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "n in"], rows: Int64[Tensor, "n"]
    ) -> Float[Tensor, "n out"]:
        """The product; `rows` are the places of the n tokens among all."""
        return super().forward(x)


class Expert(nn.Module):
    """down(act(gate(x)) * up(x)), its linears named as the family names them."""

    def __init__(
        self, names: tuple[str, str, str], hidden: int, inner: int, act: Callable[..., Tensor]
    ) -> None:
        super().__init__()
        self.names, self.act = names, act
        for name, (inputs, outputs) in zip(names, [(hidden, inner)] * 2 + [(inner, hidden)], strict=True):
            self.add_module(name, Routed(inputs, outputs, bias=False))

    def forward(self, x: Float[Tensor, "n hidden"], rows: Int64[Tensor, "n"]) -> Float[Tensor, "n hidden"]:
        """The answer to the tokens at `rows`."""
        gate, up, down = (self.get_submodule(name) for name in self.names)
        return down(self.act(gate(x, rows)) * up(x, rows), rows)


class Experts(nn.ModuleList):
    """All experts of a block. Each is run, even on no token at all: a walk waits at every one in turn."""

    def forward(
        self,
        hidden_states: Float[Tensor, "tokens hidden"],
        top_k_index: Int64[Tensor, "tokens k"],
        top_k_weights: Float[Tensor, "tokens k"],
    ) -> Float[Tensor, "tokens hidden"]:
        """The weighted sum of what each token's experts answer."""
        total = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            rows, place = torch.where(top_k_index == number)
            answer = expert(hidden_states[rows], rows) * top_k_weights[rows, place, None]
            total.index_add_(0, rows, answer.to(total.dtype))
        return total


def unfuse(module: nn.Module, arch: Arch) -> None:
    """Put `Experts` in the place of each fused module of experts; nothing is computed."""
    if arch.experts is None:
        return
    names = tuple(name.rpartition(".")[2] for name in arch.linears if "*" in name)
    gate, up, down = names
    for block in cast(nn.ModuleList, module.get_submodule(arch.blocks)):
        parent, _, attribute = arch.experts.rpartition(".")
        owner = block.get_submodule(parent)
        fused = getattr(owner, attribute, None)
        if fused is None:  # a block without experts; loading says that its layout is not known
            continue
        count, hidden, inner = fused.down_proj.shape
        with torch.device("meta"):
            each = [Expert((gate, up, down), hidden, inner, fused.act_fn) for _ in range(count)]
        setattr(owner, attribute, Experts(each))
