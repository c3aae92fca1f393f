"""A cut model beside the whole one: what its linears lack, and that solving for it brings it nearer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import OPTConfig

from pocketsize.measurement.suite import divergence
from pocketsize.models import batches, calls, lockstep, walk
from pocketsize.models.depth import with_blocks
from pocketsize.models.importance import slice_importance
from pocketsize.models.load import load
from pocketsize.models.lockstep import Fit, Pair, bias_of
from pocketsize.models.model import Model
from pocketsize.models.skeleton import materialise
from pocketsize.models.surgery import Selection, Sizes, laid, selection, sizes_of, watched
from pocketsize.pruning.heal import healed
from tiny import VOCAB, weights, write_tiny, write_weights
from tiny_configs import tiny_config


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (lockstep, calls, walk):
        monkeypatch.setattr(module, "forward_dtype", lambda: torch.float32)
    monkeypatch.setattr(batches, "BATCH_TOKENS", 48)


def tokens(windows: int = 16) -> tuple[Tensor, Tensor]:
    ids = torch.randint(5, VOCAB - 1, (windows, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1::2, 17:] = False
    return ids, mask


def narrow(model: Model, **sizes: int) -> Pair:
    wanted = replace(sizes_of(model), **sizes)
    ids, mask = tokens()
    chosen = selection(model, wanted, slice_importance(model, ids, mask, watched(model, wanted)), None)
    return Pair(model, laid(model, wanted, chosen), tuple(range(len(model.blocks))), chosen)


def heal(
    pair: Pair, finished: Mapping[str, Mapping[str, Tensor]] | None = None, windows: int = 16
) -> dict[str, Tensor]:
    known, new = finished or {}, dict[str, Tensor]()
    for fit in lockstep.lockstep(pair, *tokens(windows), finished=known.get):
        done = healed(fit.teach, fit.judge)
        if done.damp:
            fit.changed = fit.weights + done.change
            new |= fit.tensors()
    return new


def inside(model: Model, ids: Tensor, mask: Tensor, paths: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """What modules read and give, in the whole stock module."""
    module, found = materialise(model), dict[str, tuple[Tensor, Tensor]]()

    def note(path: str) -> None:
        def hook(_: object, args: tuple[Tensor, ...], out: Tensor) -> None:
            found[path] = args[0].detach(), out.detach()

        module.get_submodule(path).register_forward_hook(hook)

    for path in paths:
        note(path)
    with torch.no_grad():
        module(input_ids=ids, attention_mask=mask.long())
    return found


LLAMA = {"reads": ("self_attn.q_proj", "mlp.gate_proj"), "after": "post_attention_layernorm"}


def test_what_is_lacking_is_what_the_stock_modules_show(tmp_path: Path) -> None:
    """Readers lack outputs, writers lack what passes the blocks, relative to its size, token by token."""
    model = load(write_tiny(tmp_path / "m", "llama"))
    pair = narrow(model, ffn=64, heads=2, kv_heads=1)
    (ids, mask), path = tokens(), "model.layers.1"
    names = ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "post_attention_layernorm"]
    paths = [f"{path}.{name}" for name in names] + ["model.norm"]
    whole, small = (inside(one, ids, mask, paths) for one in (pair.original, pair.cut))
    fits = {fit.names[0]: fit for fit in lockstep.lockstep(pair, ids, mask)}
    assert pair.chosen.heads is not None
    d, kept = model.head_width, pair.chosen.heads[1].queries
    rows = [h * d + i for h in kept for i in range(d)]
    # A reader.
    X, Y = small[f"{path}.self_attn.q_proj"]
    R = whole[f"{path}.self_attn.q_proj"][1][..., rows] - Y
    _equal(fits[f"{path}.self_attn.q_proj.weight"], X[mask], R[mask], None, first=len(rows))
    # What is added behind attention is what the norm after it reads.
    for writer, norm in (
        ("self_attn.o_proj", f"{path}.post_attention_layernorm"),
        ("mlp.down_proj", "model.norm"),
    ):
        there, here = whole[norm][0], small[norm][0]
        X = small[f"{path}.{writer}"][0]
        _equal(
            fits[f"{path}.{writer}.weight"], X[mask], (there - here)[mask], 1 / there[mask].square().mean(-1)
        )


def _equal(fit: Fit, X: Tensor, R: Tensor, weight: Tensor | None, first: int | None = None) -> None:
    sums = fit.teach.plus(fit.judge)
    weighted = X if weight is None else X * weight[:, None]
    torch.testing.assert_close(sums.inputs, weighted.T @ X, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sums.cross[:first], R.T @ weighted, rtol=1e-3, atol=1e-3)
    assert sums.tokens == len(X) and fit.judge.tokens and fit.teach.tokens


CUTS: dict[str, dict[str, int]] = {
    "llama": {"ffn": 64},
    "qwen2": {"heads": 2, "kv_heads": 1},
    "qwen3": {"ffn": 96, "heads": 2},
    "bert": {"ffn": 64},
    "mpnet": {"hidden": 32, "heads": 2, "kv_heads": 2},
    "distilbert": {"ffn": 64},
    "phi3": {"ffn": 64, "heads": 2, "kv_heads": 1},
    "gpt2": {"ffn": 64},
    "opt": {"ffn": 64},
    "gpt_neox": {"ffn": 64},
    "gemma3_text": {"ffn": 64, "heads": 2, "kv_heads": 1},
    "electra": {"ffn": 64},
    "mobilebert": {"ffn": 64},
    "mixtral": {"heads": 2, "kv_heads": 1},
    "qwen3_moe": {"heads": 2, "kv_heads": 1},
}


@pytest.mark.parametrize("family", CUTS)
def test_a_narrower_model_comes_nearer(family: str, tmp_path: Path) -> None:
    pair = narrow(load(write_tiny(tmp_path / "m", family)), **CUTS[family])
    new = heal(pair)
    done = replace(pair.cut, changed=new)
    assert {n: T.shape for n, T in new.items()} == {n: pair.cut.checkpoint.entries[n].shape for n in new}
    ids, mask = tokens(24)
    ids, mask = ids[16:], mask[16:]
    if pair.cut.config.hidden_size == pair.original.config.hidden_size:
        assert divergence(pair.original, done, ids, mask) < divergence(pair.original, pair.cut, ids, mask)
    assert materialise(done)(input_ids=ids)[0].isfinite().all()


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "bert", "mpnet", "gpt2", "opt", "norms last", "gpt_neox"]
)
@pytest.mark.parametrize("kept", [(0,), (1,)])
def test_states_of_a_shorter_model_come_nearer(family: str, kept: tuple[int, ...], tmp_path: Path) -> None:
    """Behind all blocks, relative to their size, on windows that taught nothing."""
    folder = write_tiny(tmp_path / "m", "opt" if family == "norms last" else family)
    if family == "norms last":  # as OPT 350M
        config = OPTConfig(**{**tiny_config("opt", tied=True).to_dict(), "do_layer_norm_before": False})
        config.save_pretrained(folder)
        write_weights(folder, weights(config, torch.float32, 0))
    model = load(folder)
    pair = Pair(model, with_blocks(model, kept), kept)
    done = replace(pair.cut, changed=heal(pair, windows=96))
    ids, mask = (x[96:] for x in tokens(112))
    wanted, before, after = (states(one, ids, mask) for one in (model, pair.cut, done))
    size = wanted.square().sum(-1)
    assert apart(wanted, after, size) < apart(wanted, before, size)


def states(model: Model, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        out = materialise(model)(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True)
    return out.hidden_states[-1][mask]


def apart(wanted: Tensor, own: Tensor, size: Tensor) -> float:
    return float(((wanted - own).square().sum(-1) / size).mean())


def test_nothing_is_done_where_nothing_was_cut(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    pair = Pair(model, model, (0, 1))
    assert pair.first == 2 and not list(lockstep.lockstep(pair, *tokens()))
    own = sizes_of(model)
    all_channels = {f"{path}.mlp.down_proj": tuple(range(128)) for path in model.blocks}
    same = Pair(model, laid(model, own, Selection()), (0, 1), Selection(ffn=all_channels))
    fits = list(lockstep.lockstep(same, *tokens()))
    assert fits and all(not healed(fit.teach, fit.judge).damp for fit in fits)
    gap = Pair(model, with_blocks(model, (0,)), (0,))
    fits = list(lockstep.lockstep(gap, *tokens(96)))
    changed = {fit.names[0]: healed(fit.teach, fit.judge).damp for fit in fits}
    assert [name for name, damp in changed.items() if damp] == ["model.layers.0.mlp.down_proj.weight"]


def test_finished_blocks_are_run_as_they_are(tmp_path: Path) -> None:
    pair = narrow(load(write_tiny(tmp_path / "m", "qwen2")), ffn=64)
    whole = heal(pair)
    first = {name: T for name, T in whole.items() if ".0." in name}
    rest = heal(pair, {"model.layers.0": first})
    assert {*rest} == {name for name in whole if ".1." in name}
    for name, T in rest.items():
        torch.testing.assert_close(T, whole[name], rtol=1e-4, atol=1e-5)


def test_biases_are_solved_with_their_weights(tmp_path: Path) -> None:
    pair = narrow(load(write_tiny(tmp_path / "m", "bert")), ffn=64)
    fit = next(f for f in lockstep.lockstep(pair, *tokens()) if f.last)
    assert fit.biased and bias_of(fit.names[0]) in fit.tensors()
    W = pair.cut.weight(fit.names[0])
    torch.testing.assert_close(fit.weights[:, :-1], W)
    assert fit.weights.shape == (64, 65)


def test_sizes_of_a_pair_are_those_asked_for(tmp_path: Path) -> None:
    pair = narrow(load(write_tiny(tmp_path / "m", "llama")), hidden=32)
    assert sizes_of(pair.cut) == Sizes(4, 2, 128, 32, VOCAB)
    fits = list(lockstep.lockstep(pair, *tokens()))
    assert all(fit.weights.shape == (sum(fit.rows), fit.weights.shape[1]) for fit in fits)
