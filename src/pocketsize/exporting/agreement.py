"""How far llama.cpp and our own forward agree on the next token, position by position.

llama.cpp multiplies quantized matrices with activations that it first rounds to 8 bits in blocks
of 32, or of 256 where the matrix has super-blocks. That is no fault of the file, but it moves logits:
`Agreement.floor` is the share of positions at which our forward agrees with itself when it does the same
rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pocketsize.io.llamacpp import LlamaCpp

CLEAR = 0.1
# So many disagreements are told.
WORST = 8
WANTED = 0.97
# Two forwards that both round activations differ from each other as much as from one that does
# not, so counts scatter around the floor; this many standard deviations of their difference are allowed.
SIGMAS = 3
_PROMPT = 8
# Blocks in which activations are rounded, by the blocks of the matrix.
SMALL, SUPER = 32, 256
_BATCH = 4


@dataclass(frozen=True, slots=True)
class Agreement:
    """Positions compared, and the reference's margin (best logit less the second) where they disagree.

    `clear` counts positions whose margin exceeds 0.1, `floor` is None where activations are not rounded.
    """

    positions: int
    clear: int
    apart: tuple[float, ...]
    floor: float | None

    @property
    def share(self) -> float:
        """The share of positions that agree."""
        return 1 - len(self.apart) / self.positions

    @property
    def clear_share(self) -> float:
        """The share of agreeing positions among those with a margin above 0.1."""
        return 1 - sum(margin > CLEAR for margin in self.apart) / max(self.clear, 1)

    @property
    def holds(self) -> bool:
        """Float files: no clear position differs. Quantized: 97 %, or what rounding leaves, less scatter."""
        if self.floor is None:
            return self.clear_share == 1
        # Of few positions all may agree in one forward: the scatter is never taken as less than at 97 %.
        expected = min(WANTED, self.floor)
        scatter = math.sqrt(2 * expected * (1 - expected) / self.positions)
        return self.share >= expected - SIGMAS * scatter

    @property
    def sentence(self) -> str:
        """The result in words, the worst disagreements with their margins."""
        said = (
            f"llama.cpp picks our forward's token at {self.share:.1%} of {self.positions} positions, "
            f"{self.clear_share:.1%} where the margin exceeds {CLEAR}"
        )
        if self.floor is not None:
            said += (
                f"; rounding activations to 8 bits, as llama.cpp does, leaves {self.floor:.1%} in our forward"
            )
        if self.apart:
            worst = ", ".join(f"{margin:.2f}" for margin in self.apart[:WORST])
            of = f", the largest {WORST}" if len(self.apart) > WORST else ""
            said += f"; margins of the {len(self.apart)} others{of}: {worst}"
        return said


def agreement(
    runtime: LlamaCpp,
    module: nn.Module,
    ids: Sequence[Sequence[int]],
    *,
    tokens: int,
    rounded: Mapping[str, int],
) -> Agreement:
    """Compare next tokens along our own greedy continuations of the prompts `ids`.

    The continuation is ours at every position, so that one difference does not lead to others.
    `rounded` names the linears whose inputs llama.cpp rounds, and says in blocks of how many.
    """
    length = min(_PROMPT, *(len(prompt) for prompt in ids))
    prompts = torch.tensor([list(prompt)[:length] for prompt in ids])
    chosen, margins = _continue(module, prompts, tokens)
    text = torch.cat([prompts, chosen], dim=1)
    floor = _floor(module, text, chosen, rounded) if rounded else None
    apart = [
        float(margins[i, j])
        for i, row in enumerate(text.tolist())
        for j in range(tokens)
        if runtime.top(row[: length + j])[0][0] != row[length + j]
    ]
    return Agreement(chosen.numel(), int((margins > CLEAR).sum()), tuple(sorted(apart, reverse=True)), floor)


@torch.no_grad()
def _continue(
    module: nn.Module, prompts: Int64[Tensor, "n length"], tokens: int
) -> tuple[Int64[Tensor, "n tokens"], Float[Tensor, "n tokens"]]:
    """The greedy continuation of each prompt, and the margin of each choice."""
    chosen, margins, ids, past = [], [], prompts, None
    for _ in range(tokens):
        out = module(input_ids=ids, past_key_values=past, use_cache=True)
        past, best = out.past_key_values, out.logits[:, -1].topk(2, dim=-1)
        ids = best.indices[:, :1]
        chosen.append(ids)
        margins.append(best.values[:, :1] - best.values[:, 1:])
    return torch.cat(chosen, dim=1), torch.cat(margins, dim=1)


@torch.no_grad()
def _floor(
    module: nn.Module,
    text: Int64[Tensor, "n length"],
    chosen: Int64[Tensor, "n tokens"],
    rounded: Mapping[str, int],
) -> float:
    """The share of tokens that stay the likeliest when the inputs of these linears are rounded to 8 bits."""

    def rounding(block: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        return lambda _, inputs: (_round(inputs[0], block), *inputs[1:])

    handles = [
        module.get_submodule(name).register_forward_pre_hook(rounding(block))
        for name, block in rounded.items()
    ]
    try:
        # A few texts at a time: logits are large.
        parts = [module(input_ids=part[:, :-1]).logits.argmax(dim=-1) for part in text.split(_BATCH)]
    finally:
        for handle in handles:
            handle.remove()
    return float((torch.cat(parts)[:, -chosen.shape[1] :] == chosen).float().mean())


def _round(X: Float[Tensor, "*batch in"], block: int) -> Float[Tensor, "*batch in"]:
    """Each block on 255 levels around zero, its scale in float16, of larger blocks than 32 in float32."""
    if X.shape[-1] % block:
        return X
    blocks = X.reshape(*X.shape[:-1], -1, block)
    peak = blocks.abs().amax(dim=-1, keepdim=True)
    codes = torch.where(peak > 0, blocks * (127 / peak), 0).round()
    scale = peak / 127
    scale = scale.to(torch.float16).to(X.dtype) if block == SMALL else scale
    return (codes * scale).reshape(X.shape)
