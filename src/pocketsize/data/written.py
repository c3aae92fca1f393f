"""Calibration text that the model writes itself."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache, DynamicLayer

from pocketsize.models.attention import GroupedRows

BATCH = 64
LIKELIEST = 1024


@torch.no_grad()
def write_windows(
    module: nn.Module, tokenizer: PreTrainedTokenizerBase, *, count: int, length: int, seed: int
) -> Int64[Tensor, "n length"]:
    """`count` windows of `length` tokens sampled from a causal model at temperature 1.

    What a model writes is spread like the text it was trained on, which nobody else has any more
    (self-calibration, arXiv:2410.17170; the random first token is LLM-QAT's, arXiv:2305.17888).
    Each window starts with a token drawn from those that begin a word; what follows is sampled
    among the 1024 likeliest. The same seed gives the same windows on the same machine with the
    same number of threads.
    """
    generator = torch.Generator().manual_seed(seed)
    starts = torch.tensor(_word_starts(tokenizer))
    parts = []
    for a in range(0, count, BATCH):
        size = min(BATCH, count - a)
        ids = starts[torch.randint(len(starts), (size, 1), generator=generator)]
        parts.append(continued(module, ids, length, generator))
    return torch.cat(parts)


def _word_starts(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that are a blank and at least three letters, capital first; where there are none, all."""
    special = set(tokenizer.all_special_ids)
    known = [i for i in range(len(tokenizer)) if i not in special]
    texts = tokenizer.batch_decode([[i] for i in known])
    found = [i for i, text in zip(known, texts, strict=True) if _begins_a_word(str(text))]
    return found or known


def _begins_a_word(text: str) -> bool:
    word = text.removeprefix(" ")
    return len(word) >= 3 and word.isalpha() and word[0].isupper() and word[1:].islower()


@torch.no_grad()
def continued(
    module: nn.Module, ids: Int64[Tensor, "n start"], length: int, generator: torch.Generator
) -> Int64[Tensor, "n length"]:
    """The windows of `length` tokens that begin with these, sampled from a causal model."""
    written, past, device = [ids], _room(module, length), next(module.parameters()).device
    with GroupedRows():
        for _ in range(length - ids.shape[1]):
            out = module(input_ids=written[-1].to(device), past_key_values=past, use_cache=True)
            written.append(_sampled(out.logits[:, -1], generator))
    return torch.cat(written, dim=1)


class _Room(DynamicLayer):
    """Keys and values of a layer, in tensors with room for all that will be written.

    The layer of transformers copies all it has for each token: two thirds of the time of SmolLM2-135M.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length
        self.room: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """All keys and values so far, with these behind them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room = tuple(
                T.new_empty(*T.shape[:-2], self.length, T.shape[-1]) for T in (key_states, value_states)
            )
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for whole, new in zip(self.room, (key_states, value_states), strict=True):
            whole[..., start:end, :] = new
        self.keys, self.values = (whole[..., :end, :] for whole in self.room)
        return self.keys, self.values


def _room(module: nn.Module, length: int) -> DynamicCache:
    """An empty cache for so many tokens; layers with a short look back are those of transformers."""
    cache = DynamicCache(config=cast(Any, module).config)
    cache.layers = [_Room(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def _sampled(logits: Float[Tensor, "n vocab"], generator: torch.Generator) -> Int64[Tensor, "n 1"]:
    """One token of each row, by its probability among the likeliest."""
    values, indices = (x.cpu() for x in logits.float().topk(min(LIKELIEST, logits.shape[1]), dim=-1))
    picked = torch.multinomial(values.softmax(dim=-1), 1, generator=generator)
    return indices.gather(1, picked)
