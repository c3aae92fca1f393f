"""A model's cache in fewer bits: every family, the same as stock decoding, the bytes of a context."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, MistralConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import tiny
import tiny_configs
from pocketsize.data.calibration import Windows, evaluation_windows
from pocketsize.data.text import Corpus, Document
from pocketsize.errors import UnsupportedError, UsageError
from pocketsize.exporting.gguf.writer import write
from pocketsize.io.llamacpp import LlamaCpp, installed
from pocketsize.measurement.cache import cache_bytes, cache_quality, parse_caches
from pocketsize.models.cached import cache_for, reading
from pocketsize.models.load import load, tokenizer_of
from pocketsize.models.model import Model
from pocketsize.models.skeleton import materialise
from pocketsize.quantization.kv import Blockwise, Kivi
from pocketsize.quantization.kv_blocks import rounded
from tiny import GENERATORS, write_tiny

CORPUS = Corpus(
    "tales", (Document("a", "A fox, a dog and a model that fits in a pocket met in 2026. " * 20),)
)
COARSE = Kivi(2, 2, group=8, residual=8)


def windows(model: Model, count: int = 4, length: int = 32) -> Windows:
    return evaluation_windows(
        CORPUS, tokenizer_of(model), tokens=count * length, length=length, special=False
    )


@pytest.mark.parametrize("family", GENERATORS)
def test_every_family_reads_its_cache(family: str, tmp_path) -> None:
    model = load(write_tiny(tmp_path, family))
    caches = [Blockwise("f32", "f32"), Kivi(8, 8, 8, 8), COARSE]
    found = cache_quality(model, caches, windows(model), seed=0).measurements
    kl = [m.value for m in found if m.name == "kl_mean"]
    assert abs(kl[0]) < 1e-6 and kl[0] < kl[1] < kl[2] / 10
    assert len({m.subject for m in found}) == 3


class Rounding(DynamicCache):
    """Stock transformers' cache, but keys and values are rounded as they are stored."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        stored = (rounded(x, "q4_0") for x in (key_states, value_states))
        return super().update(*stored, layer_idx, *args, **kwargs)


@torch.no_grad()
def test_a_window_is_stock_decoding_with_a_rounding_cache(tmp_path, monkeypatch) -> None:
    # Heads of 32 are not rotated; queries are rounded in llama.cpp alone.
    monkeypatch.setattr(
        "pocketsize.quantization.kv.rounded", lambda x, kind: x if kind == "q8_0" else rounded(x, kind)
    )
    model = load(write_tiny(tmp_path, "qwen3"))
    module, ids = materialise(model), windows(model, 1).input_ids
    with reading(module, cache_for(model, Blockwise("q4_0", "q4_0"))):
        ours = module(ids).logits[0]
    cache = Rounding()
    stock = [module(ids[:, t : t + 1], past_key_values=cache).logits[0, 0] for t in range(ids.shape[1])]
    assert torch.allclose(ours, torch.stack(stock), atol=1e-3)
    assert not torch.allclose(ours, module(ids).logits[0], atol=1e-2)


@pytest.mark.skipif(installed() is None, reason="llama.cpp is not installed")
@pytest.mark.parametrize("kinds", [("q8_0", "f16"), ("q4_0", "q8_0"), ("q4_1", "q5_1"), ("iq4_nl", "q5_0")])
@torch.no_grad()
def test_it_is_what_llama_cpp_does(kinds: tuple[str, str], tmp_path, monkeypatch) -> None:
    # One block: in deeper ones the last digit of a sum decides on codes, and both go ways of their own.
    one = {"num_hidden_layers": 1, "head_dim": 64, "num_key_value_heads": 2}
    config = MistralConfig(**(tiny_configs._SHAPE | one), **tiny_configs._BPE, sliding_window=None)
    monkeypatch.setattr(tiny, "tiny_config", lambda family, tied: config)
    model = load(write_tiny(tmp_path / "m", "mistral"))
    write(replace(model, dtype=torch.float32), tmp_path / "m.gguf")
    module, ids = materialise(model), windows(model, 1, 64).input_ids
    own = module(ids).logits[0].log_softmax(-1)
    with reading(module, cache_for(model, Blockwise(*kinds))):
        ours = module(ids).logits[0].log_softmax(-1)
    with LlamaCpp(tmp_path / "m.gguf", threads=1, context=256, cache=kinds) as runtime:
        for t in (1, 2, 7, 33, 63):
            told = dict(runtime.top(ids[0, : t + 1].tolist(), ours.shape[1]))
            theirs = torch.tensor([told[i] for i in range(len(told))])
            moved, apart = (float((p[t].exp() * (p[t] - theirs)).sum()) for p in (own, ours))
            assert abs(apart) < max(moved / 20, 2e-5)


def test_attention_is_put_back(tmp_path) -> None:
    model = load(write_tiny(tmp_path, "llama"))
    module, before = materialise(model), dict(ALL_ATTENTION_FUNCTIONS)
    with pytest.raises(UnsupportedError, match="could not be given another cache"), reading(module, COARSE):
        assert dict(ALL_ATTENTION_FUNCTIONS) != before
    with pytest.raises(KeyError), reading(module, COARSE):
        raise KeyError
    assert dict(ALL_ATTENTION_FUNCTIONS) == before


def test_rows_and_protocol(tmp_path) -> None:
    model = load(write_tiny(tmp_path, "llama"))
    found = cache_quality(model, [COARSE], windows(model), seed=0, context=100)
    rows = {m.name: m for m in found.measurements}
    assert set(rows) == {
        *("kl_mean", "kl_p99", "top1", "perplexity_ratio"),
        *("cache_bytes_per_token", "cache_bytes", "cache_saving"),
    }
    # 2 blocks, 2 heads of 16: 96 keys and 92 values of 100 are rounded.
    assert rows["cache_bytes"].value == 2 * 2 * 16 * (96 * 6 + 4 * 16 + 92 * 6 + 8 * 16) / 8
    assert rows["cache_bytes_per_token"].value == 2 * 2 * 16 * 12 / 8
    assert rows["cache_saving"].value == 1 - rows["cache_bytes"].value / (2 * 2 * 16 * 32 * 100 / 8)
    assert rows["kl_mean"].low is not None and "own cache" in rows["kl_mean"].method
    said = " ".join(found.protocol)
    assert "llama.cpp has no such cache" in said and "float32" in said and "original" not in said


def test_sliding_windows_hold_no_more(tmp_path) -> None:
    model = load(write_tiny(tmp_path, "gemma3_text"))  # one block of two sees 8 tokens
    assert cache_bytes(model, Blockwise("f16", "f16"), 100) == 2 * 32 * (8 + 100) * 4


def test_encoders_and_heads_are_refused(tmp_path) -> None:
    bert = load(write_tiny(tmp_path / "bert", "bert"))
    with pytest.raises(UnsupportedError, match="no cache of keys and values"):
        cache_for(bert, COARSE)
    llama = load(write_tiny(tmp_path / "llama", "llama"))
    with pytest.raises(UnsupportedError, match="heads of 16"):
        cache_quality(llama, [Blockwise()], windows(llama), seed=0)


def test_lists_of_caches() -> None:
    assert [c.name for c in parse_caches("q8_0, kivi-2")] == ["q8_0", "kivi-2"]
    for text in ("", ",", "q8_0,q8_0/q8_0"):
        with pytest.raises(UsageError, match="each once"):
            parse_caches(text)
