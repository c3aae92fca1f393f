"""SqueezeBERT as it is run here: grouped convolutions as products of matrices, which a CPU does faster."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.squeezebert.modeling_squeezebert import SqueezeBertEncoder


class Grouped(nn.Conv1d):
    """A convolution of width 1 whose channels are in groups: one small matrix for each group.

    The same parameters under the same names as `nn.Conv1d`, and the same numbers to float precision.
    """

    def forward(self, input: Float[Tensor, "n channels s"]) -> Float[Tensor, "n out s"]:
        """The product of each group with its own channels.

        One text: matrices times channels, as they lie. Several: one product for each group over all tokens,
        which does not read the matrices again for each text.
        """
        n, channels, s = input.shape
        g, per, out = self.groups, channels // self.groups, self.out_channels // self.groups
        W = self.weight.view(g, out, per)
        if n == 1:
            y = torch.matmul(W, input.reshape(g, per, s))
            y = y if self.bias is None else y + self.bias.view(g, out, 1)
            return y.view(1, g * out, s)
        parts = input.transpose(1, 2).split(per, dim=-1)
        biases = [None] * g if self.bias is None else self.bias.split(out)
        rows = [F.linear(x, M, b) for x, M, b in zip(parts, W, biases, strict=True)]
        return torch.cat(rows, dim=-1).transpose(1, 2)


class Called(nn.Module):
    """The blocks of a SqueezeBERT encoder, each called as a module.

    The stock encoder runs `forward` of its blocks past their hooks, by which they come into memory.
    """

    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(
        self,
        hidden_states: Float[Tensor, "n s channels"],
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = True,
    ) -> BaseModelOutput:
        """What the last block gives, and on demand what every block was given and gave."""
        x = hidden_states.transpose(1, 2)
        states, attentions = [x], []
        for layer in self.layers:
            given = layer(x, attention_mask, output_attentions)
            x = given["feature_map"]
            states.append(x)
            attentions.append(given.get("attention_score"))
        return BaseModelOutput(
            last_hidden_state=cast(torch.FloatTensor, x.transpose(1, 2)),
            hidden_states=tuple(s.transpose(1, 2) for s in states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


def regroup(module: nn.Module) -> None:
    """Put `Grouped` where a module has grouped convolutions of width 1; parameters stay what they are."""
    for owner in list(module.modules()):
        for name, child in list(owner.named_children()):
            if type(child) is nn.Conv1d and _is_grouped(child):
                setattr(owner, name, _grouped(child))
            elif type(child) is SqueezeBertEncoder:
                setattr(owner, name, Called(child.layers).train(child.training))


def _is_grouped(conv: nn.Conv1d) -> bool:
    plain = (conv.kernel_size, conv.stride, conv.dilation, conv.padding) == ((1,), (1,), (1,), (0,))
    return plain and conv.groups > 1


def _grouped(conv: nn.Conv1d) -> Grouped:
    with torch.device("meta"):
        found = Grouped(
            conv.in_channels, conv.out_channels, 1, groups=conv.groups, bias=conv.bias is not None
        )
    found.weight, found.bias = conv.weight, conv.bias
    return found.train(conv.training)
