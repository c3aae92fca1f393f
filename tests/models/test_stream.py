"""Streaming: every family answers as a model that is whole in memory, and one block is there at a time."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pocketsize.errors import UnsupportedError
from pocketsize.models.load import load, tokenizer_of
from pocketsize.models.model import Model
from pocketsize.models.skeleton import materialise
from pocketsize.models.stream import stream, surroundings, without_blocks
from tiny import FAMILIES, TEXT, write_tiny


def ids_of(model: Model) -> list[Tensor]:
    tokenizer = tokenizer_of(model)
    return [torch.tensor([tokenizer(text).input_ids[: 9 + 4 * i]]) for i, text in enumerate(TEXT[:3])]


def present(module: nn.Module, model: Model) -> list[str]:
    """Blocks with any parameter in memory."""
    return [
        path for path in model.blocks if any(not p.is_meta for p in module.get_submodule(path).parameters())
    ]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_answers_are_those_of_the_whole_model(tmp_path: Path, family: str) -> None:
    model = load(write_tiny(tmp_path, family, seed=5))
    texts, whole, module = ids_of(model), materialise(model), without_blocks(model, model.weight)
    calls = [partial(lambda ids: module(input_ids=ids)[0], ids) for ids in texts]
    for ids, answer in zip(texts, stream(module, model, model.weight, calls), strict=True):
        assert torch.equal(answer, whole(input_ids=ids)[0])
    assert present(module, model) == []


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_each_block_is_read_once_and_alone(tmp_path: Path, family: str) -> None:
    model = load(write_tiny(tmp_path, family))
    reads: list[str] = []
    alone: list[list[str]] = []

    def read(name: str) -> Tensor:
        reads.append(name)
        return model.weight(name)

    module = without_blocks(model, read)
    assert reads == [n for n in surroundings(module, model) if n in model.checkpoint.entries]
    for path in model.blocks:
        module.get_submodule(path).register_forward_hook(lambda *_: alone.append(present(module, model)))
    texts = ids_of(model)
    stream(module, model, read, [partial(module, input_ids=ids) for ids in texts])
    assert alone == [[path] for path in model.blocks for _ in texts]
    assert sorted(reads) == sorted(model.checkpoint.entries)


def test_an_error_in_a_call_comes_through_and_leaves_no_hooks(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path, "llama"))
    module = without_blocks(model, model.weight)
    with pytest.raises(IndexError):
        stream(module, model, model.weight, [partial(module, input_ids=torch.tensor([[10**6]]))])
    assert not any(module.get_submodule(path)._forward_pre_hooks for path in model.blocks)


def test_a_forward_pass_in_another_order_is_refused(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path, "llama"))
    module = without_blocks(model, model.weight)
    layers = module.get_submodule(model.arch.blocks)
    ids = torch.tensor([[1, 2, 3]])

    def backwards() -> None:
        layers.__dict__["_modules"] = dict(reversed(layers._modules.items()))
        module(input_ids=ids)

    with pytest.raises(UnsupportedError, match=r"layers\.0: the forward pass"):
        stream(module, model, model.weight, [backwards])

    def twice() -> None:
        module(input_ids=ids)
        module(input_ids=ids)

    layers.__dict__["_modules"] = dict(reversed(layers._modules.items()))
    with pytest.raises(UnsupportedError, match="goes on to another block"):
        stream(module, model, model.weight, [twice])
