"""A model cut down to one block, and what a batch that waits in it holds."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pocketsize.errors import NumericalError
from pocketsize.exporting import compressed_tensors
from pocketsize.models.depth import excerpt, names_of_whole
from pocketsize.models.dtype import forward_dtype
from pocketsize.models.load import load
from pocketsize.models.skeleton import materialise
from pocketsize.models.waiting import waiting_bytes
from pocketsize.models.walk import walk
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import Scheme
from tiny import FAMILIES, HIDDEN, write_tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_one_block_of_any_family_runs_and_is_the_one_asked_for(family: str, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", family))
    short = excerpt(model, 1)
    assert len(short.blocks) == 1 and not any(f"{model.blocks[1]}." in name for name in short.linears)
    for mine, theirs in zip(short.linears, model.linears_of(model.blocks[1]), strict=True):
        assert torch.equal(short.weight(mine), model.weight(theirs))
        assert "1" not in short.checkpoint.entries[mine].name.split(".")[:4]
    others = {n for n in model.checkpoint.entries if not n.startswith(f"{model.arch.blocks}.")}
    assert others <= set(short.checkpoint.entries)
    ids = torch.arange(2 * 16).view(2, 16) % 100 + 5
    assert bool(materialise(short)(input_ids=ids)[0].isfinite().all())
    sites = [site.names for site in walk(short, ids, torch.ones_like(ids, dtype=torch.bool))]
    assert [name for names in sites for name in names] == short.linears


def test_a_block_keeps_its_own_kind_of_attention(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "gemma2"))
    kinds = [excerpt(model, i).config.layer_types for i in range(2)]
    assert kinds == [["sliding_attention"], ["full_attention"]]
    assert model.config.layer_types == ["sliding_attention", "full_attention"]


def test_waiting_bytes_of_a_block_that_can_be_counted_by_hand(tmp_path: Path) -> None:
    """At the output of attention: the block's input, attention's, queries, keys and values of half the heads,
    and their answer; the token's number and its mask."""
    model = load(write_tiny(tmp_path / "m", "llama"))
    width = forward_dtype().itemsize
    assert waiting_bytes(model, 64) == width * 5 * HIDDEN + 8 + 1


def test_a_block_that_overflows_is_named_as_the_whole_model_names_it(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m", "llama", blocks=6)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.mlp.down_proj.weight"][0] = 3e38
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericalError, match=r"^model\.layers\.3: NaN or infinity"):
        waiting_bytes(load(folder), 64)


def test_what_goes_wrong_with_some_blocks_is_told_by_the_names_of_all(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama", blocks=6))
    error = NumericalError("model.layers.1.mlp.up_proj: no; model.layers.0, not model.layers.10x")
    error.facts = {"at": 1}
    with pytest.raises(NumericalError) as found, names_of_whole(model, [2, 4]):
        raise error
    assert str(found.value) == "model.layers.4.mlp.up_proj: no; model.layers.2, not model.layers.10x"
    assert found.value.facts == {"at": 1} and found.value.__cause__ is error


def test_scores_that_a_block_keeps_make_long_windows_dearer(tmp_path: Path) -> None:
    plain, scores = (load(write_tiny(tmp_path / name, name)) for name in ("llama", "mpnet"))
    assert waiting_bytes(plain, 128) == waiting_bytes(plain, 64)
    heads, width = int(scores.config.num_attention_heads), forward_dtype().itemsize
    assert waiting_bytes(scores, 128) - waiting_bytes(scores, 64) >= heads * 64 * width


@pytest.mark.parametrize("enabled", [True, False])
def test_measuring_leaves_the_collector_as_it_was(enabled: bool, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        waiting_bytes(model, 64)
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_a_packed_model_is_cut_down_as_what_it_stands_for(tmp_path: Path) -> None:
    plain = load(write_tiny(tmp_path / "plain", "llama"))
    scheme = Scheme(4, 32, symmetric=True)
    done = plain.with_quantized({name: rtn(plain.matrix(name), scheme) for name in plain.linears})
    (tmp_path / "packed").mkdir()
    compressed_tensors.write(done, tmp_path / "packed")
    model = load(tmp_path / "packed")
    short = excerpt(model, 1)
    for mine, theirs in zip(short.linears, model.linears_of(model.blocks[1]), strict=True):
        assert torch.equal(short.weight(mine), done.weight(theirs))
    assert bool(materialise(short)(input_ids=torch.tensor([[5, 6, 7]]))[0].isfinite().all())
