"""Scores of tokens: equal to their oracle, to transformers' own loss, and to themselves in other chunks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from oracles.divergence import scores_slow
from pocketsize.data.calibration import Windows, evaluation_windows
from pocketsize.data.text import Corpus, Document
from pocketsize.errors import NumericalError, UnsupportedError
from pocketsize.measurement import tokens
from pocketsize.measurement.tokens import compare, token_scores
from pocketsize.models.load import load, tokenizer_of
from pocketsize.models.model import Model
from pocketsize.models.stream import Read, without_blocks
from pocketsize.quantization.grid import QWeight
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import Scheme
from tiny import GENERATORS, write_tiny

TEXT = "The quick brown fox jumps over the lazy dog; a model is small when it fits in a pocket. " * 12


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Model:
    return load(write_tiny(tmp_path_factory.mktemp("llama"), "llama"))


@pytest.fixture(scope="module")
def held_out(model) -> Windows:
    corpus = Corpus("test", (Document("a", TEXT),))
    return evaluation_windows(corpus, tokenizer_of(model), tokens=7 * 24, length=24, special=False)


def rounded(model: Model, bits: int) -> Model:
    scheme = Scheme(bits=bits, group=32)
    return model.with_quantized({name: rtn(model.original(name), scheme) for name in model.linears})


def test_scores_equal_their_oracle():
    generator = torch.Generator().manual_seed(3)
    p, q = (3 * torch.randn(9, 17, generator=generator) for _ in range(2))
    targets = torch.randint(17, (9,), generator=generator)
    rows = scores_slow(p.tolist(), q.tolist(), targets.tolist())
    kl, nll, agrees = token_scores(p, q, targets, torch.empty(9, 17))
    assert kl == pytest.approx([row[0] for row in rows], abs=1e-5)
    assert nll[0] == pytest.approx([row[1] for row in rows], abs=1e-5)
    assert nll[1] == pytest.approx([row[2] for row in rows], abs=1e-5)
    assert agrees.tolist() == [row[3] for row in rows]


def test_small_divergences_are_not_lost_in_rounding():
    p = 5 * torch.randn(4, 50_000, generator=torch.Generator().manual_seed(1))
    q = p + 1e-3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2))
    exact = torch.nn.functional.kl_div(
        q.double().log_softmax(-1), p.double().log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    kl, _, _ = token_scores(p.clone(), q, torch.zeros(4, dtype=torch.int64), torch.empty_like(p))
    assert (exact < 1e-6).all()
    assert kl == pytest.approx(exact.numpy(), abs=1e-7)


def test_a_whole_comparison_equals_plain_forwards_and_the_oracle(model, held_out):
    small = rounded(model, 3)
    got = compare(model, small, held_out, torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(model.folder).eval()
    logits = [reference(held_out.input_ids).logits]
    reference.load_state_dict(
        {name: weight.dequantize() for name, weight in small.quantized.items()}, strict=False
    )
    logits.append(reference(held_out.input_ids).logits)
    p, q = (x[:, :-1].flatten(0, 1).tolist() for x in logits)
    rows = scores_slow(p, q, held_out.input_ids[:, 1:].flatten().tolist())
    assert got.kl == pytest.approx([row[0] for row in rows], abs=1e-5)
    assert got.nll[1] == pytest.approx([row[2] for row in rows], abs=1e-4)
    assert got.agrees.mean() == pytest.approx(np.mean([row[3] for row in rows]), abs=0.02)
    assert np.bincount(got.window).tolist() == [23] * 7


@pytest.mark.parametrize("family", GENERATORS)
def test_perplexity_is_that_of_transformers_own_loss(family, tmp_path, held_out):
    model = load(write_tiny(tmp_path, family))
    got = compare(model, model, held_out, torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(model.folder).eval()
    with torch.no_grad():
        loss = reference(held_out.input_ids, labels=held_out.input_ids).loss
    assert got.nll[0].mean() == pytest.approx(loss.item(), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_identical_models_differ_by_exactly_nothing(model, held_out, dtype):
    twin = load(model.folder)
    for other in (model, twin):
        got = compare(model, other, held_out, dtype)
        assert not got.kl.any() and got.agrees.all() and np.array_equal(*got.nll)


def test_batches_and_chunks_do_not_change_the_answer(model, held_out, monkeypatch):
    small = rounded(model, 4)
    whole = compare(model, small, held_out, torch.float32)
    monkeypatch.setattr(tokens, "BATCH_TOKENS", 50)  # two windows
    monkeypatch.setattr(tokens, "LOGITS", 320 * 5)
    parts = compare(model, small, held_out, torch.float32)
    assert np.array_equal(whole.window, parts.window)
    assert np.array_equal(whole.agrees, parts.agrees)
    assert whole.kl == pytest.approx(parts.kl, abs=1e-5)


def test_half_precision_matrices_equal_autocast_over_float32(model, held_out):
    reference = AutoModelForCausalLM.from_pretrained(model.folder).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden = reference.model(held_out.input_ids).last_hidden_state
    with torch.no_grad():
        logits = reference.lm_head(hidden.float())[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, held_out.input_ids[:, 1:].flatten(), reduction="none")
    assert compare(model, model, held_out, torch.bfloat16).nll[0] == pytest.approx(loss.numpy(), abs=1e-5)


def test_padding_is_never_counted(model, held_out):
    padded = Windows(
        torch.cat([held_out.input_ids[:2], torch.full((2, 6), 2)], dim=1),
        torch.cat([held_out.mask[:2], torch.zeros(2, 6, dtype=torch.bool)], dim=1),
        held_out.text_bytes[:2],
        "padded",
        "",
        1,
    )
    small = rounded(model, 4)
    got, full = compare(model, small, padded, torch.float32), compare(model, small, held_out, torch.float32)
    assert got.kl == pytest.approx(full.kl[: 2 * 23], abs=1e-5)


def test_what_lies_outside_the_blocks_is_held_once(model):
    def read(one: Model, shared: object) -> Read:
        return tokens._reading(one, torch.float32, shared)  # type: ignore[arg-type]

    loaded, small = without_blocks(model, read(model, lambda name: None)), rounded(model, 4)
    embedded = model.with_quantized(
        {model.arch.embedding: rtn(model.original(model.arch.embedding), Scheme(8, 32))}
    )
    for other, same in ((small, True), (embedded, False)):
        second = without_blocks(other, read(other, tokens._shared(model, loaded, other)))
        first, other_one = (m.get_parameter(model.arch.embedding) for m in (loaded, second))
        assert (first.data_ptr() == other_one.data_ptr()) is same
        norms = [m.get_parameter("model.norm.weight").data_ptr() for m in (loaded, second)]
        assert norms[0] == norms[1]


@pytest.mark.parametrize("states", [1, 2**28])
def test_rounds_do_not_change_the_scores(model, held_out, states, monkeypatch):
    whole = compare(model, rounded(model, 4), held_out, torch.float32)
    monkeypatch.setattr(tokens, "STATES", states)
    monkeypatch.setattr(tokens, "BATCH_TOKENS", 24)
    again = compare(model, rounded(model, 4), held_out, torch.float32)
    assert again.kl == pytest.approx(whole.kl, abs=1e-5)
    assert again.window.tolist() == whole.window.tolist() and again.agrees.tolist() == whole.agrees.tolist()


def test_overflow_says_which_model_and_where(model, held_out):
    name = model.linears[-1]
    weight = rtn(model.original(name), Scheme(bits=4, group=32))
    broken = QWeight(weight.codes, weight.scale * float("inf"), weight.zero, weight.scheme)
    with pytest.raises(NumericalError, match=r"the compressed model gives NaN .* window 0"):
        compare(model, model.with_quantized({name: broken}), held_out, torch.float32)


def test_models_that_cannot_be_compared_are_refused(model, held_out, tmp_path):
    encoder = load(write_tiny(tmp_path / "bert", "bert"))
    with pytest.raises(UnsupportedError, match="no causal language model"):
        compare(encoder, encoder, held_out, torch.float32)
    strange = Windows(held_out.input_ids + 1000, held_out.mask, held_out.text_bytes, "x", "", 1)
    with pytest.raises(UnsupportedError, match="the tokenizer gives token"):
        compare(model, model, strange, torch.float32)
