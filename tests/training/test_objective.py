from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from oracles import distillation as oracle
from pocketsize.data.labels import UNKNOWN
from pocketsize.distillation.divergence import Divergence
from pocketsize.distillation.signal import top_k
from pocketsize.errors import UnsupportedError, UsageError
from pocketsize.models.body import body_of
from pocketsize.models.depth import with_blocks
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.models.skeleton import materialise
from pocketsize.training.early import Early
from pocketsize.training.examples import Batch, of_rows
from pocketsize.training.features import Features, Weights
from pocketsize.training.objective import Classes, Embedding, Losses, NextToken, Teacher, pooled, states
from tiny import GENERATORS, VOCAB, write_tiny


def batch(*lengths: int) -> Batch:
    draw = np.random.default_rng(0)
    rows = [draw.integers(5, VOCAB, n) for n in lengths]
    return of_rows(rows, 2, "tokens").batch(range(len(lengths)))


def module(model: Model) -> nn.Module:
    return materialise(model).requires_grad_(True)


@pytest.mark.parametrize("family", GENERATORS)
def test_next_token_losses_are_those_of_whole_logits(family: str, tmp_path: Path) -> None:
    student, teacher = (load(write_tiny(tmp_path / str(i), family, seed=i)) for i in range(2))
    taught, frozen = module(student), materialise(teacher)
    given = batch(9, 6)
    how = Divergence("js", 2.0)
    objective = NextToken(taught, Losses(how, soft=0.7, hard=0.3), [Teacher(frozen)])
    found = objective.loss(given)
    found.backward()
    scale = max(float(p.grad.abs().max()) for p in taught.parameters() if p.grad is not None)
    slopes = {name: p.grad.clone() for name, p in taught.named_parameters() if p.grad is not None}
    taught.zero_grad()

    x, y = (m(input_ids=given.ids, attention_mask=given.mask.long()).logits for m in (taught, frozen))
    kept = [(n, i) for n, length in enumerate((9, 6)) for i in range(length - 1)]
    rows, columns = map(list, zip(*kept, strict=True))
    targets = given.ids[rows, [i + 1 for i in columns]]
    soft = oracle.divergence(x[rows, columns], y[rows, columns].detach(), "js", 2.0, 0.5).mean()
    wanted = 0.7 * soft + 0.3 * F.cross_entropy(x[rows, columns].double(), targets)
    wanted.backward()
    assert objective.count(given) == 13 and float(found.detach()) == pytest.approx(
        float(wanted.detach()), rel=1e-4
    )
    for name, p in taught.named_parameters():
        if p.grad is not None:
            assert torch.allclose(slopes[name], p.grad, atol=1e-4 * scale), name


def test_features_alone_may_teach_a_generator(tmp_path: Path) -> None:
    student, teacher = (load(write_tiny(tmp_path / str(i), "llama", seed=i)) for i in range(2))
    features = Features(student, teacher, Weights(hidden=1))
    taught, frozen = module(student), materialise(teacher)
    given = batch(9, 6)
    both, alone, plain = (
        NextToken(taught, Losses(soft=soft), [Teacher(frozen)], extra=extra).loss(given)
        for soft, extra in ((1.0, features), (0.0, features), (1.0, None))
    )
    assert float(alone.detach()) == pytest.approx(float((both - plain).detach()), rel=1e-4)


def test_a_teacher_that_is_the_student_leaves_nothing_to_learn(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    features = Features(model, model, Weights(hidden=1, cosine=1, relations=1, heads=2))
    objective = NextToken(module(model), Losses(), [Teacher(materialise(model))], extra=features)
    assert float(objective.loss(batch(8, 5)).detach()) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_behind_an_earlier_block_the_loss_is_that_of_a_model_that_ends_there(
    family: str, tmp_path: Path
) -> None:
    student, teacher = (load(write_tiny(tmp_path / str(i), family, seed=i)) for i in range(2))
    taught, frozen = module(student), Teacher(materialise(teacher))
    early = Early((student.blocks[0],), body_of(taught).get_submodule("norm"), 0.3)
    plain, both = (NextToken(taught, Losses(), [frozen], early=e) for e in (None, early))
    given = batch(9, 6)
    whole, found = plain.loss(given), both.loss(given)
    shallow = module(with_blocks(student, [0]))
    alone = NextToken(shallow, Losses(), [frozen]).loss(given)
    assert float(found.detach()) == pytest.approx(float((whole + 0.3 * alone).detach()), rel=1e-5)

    taught.zero_grad()
    (found - whole).backward()
    (0.3 * alone).backward()
    for name, p in shallow.named_parameters():
        ours = taught.get_parameter(name).grad
        assert (p.grad is None) == (ours is None)
        assert p.grad is None or torch.allclose(ours, p.grad, atol=1e-6 + 1e-4 * float(p.grad.abs().max())), (
            name
        )
    last = dict(taught.get_submodule(student.blocks[-1]).named_parameters())
    assert all(p.grad is None or float(p.grad.abs().max()) < 1e-6 for p in last.values())


def test_batches_take_turns_behind_blocks_and_a_model_that_is_done_there_has_nothing_to_learn(
    tmp_path: Path,
) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    taught = module(model)
    for name, p in taught.get_submodule(model.blocks[-1]).named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            p.data.zero_()
    early = Early((model.blocks[-2],), body_of(taught).get_submodule("norm"), 1.0)
    frozen = Teacher(copy.deepcopy(taught))
    assert float(
        NextToken(taught, Losses(), [frozen], early=early).loss(batch(8, 5)).detach()
    ) == pytest.approx(0, abs=1e-5)
    turns = Early(("a", "b", "c"), early.norm, 1.0)
    assert [turns.path(replace(batch(4), turn=number)) for number in range(4)] == ["a", "b", "c", "a"]


def test_several_teachers_are_a_mixture_and_the_better_one_counts_more(tmp_path: Path) -> None:
    models = [load(write_tiny(tmp_path / str(i), "llama", seed=i)) for i in range(3)]
    given, (student, *teachers) = batch(7, 7), [materialise(model) for model in models]
    logits = [m(input_ids=given.ids).logits[:, :-1].flatten(0, 1).double() for m in (student, *teachers)]
    for shares in ((1.0, 1.0), (3.0, 1.0)):
        objective = NextToken(
            student, Losses(), [Teacher(t, share=s) for t, s in zip(teachers, shares, strict=True)]
        )
        p = sum(s / sum(shares) * x.softmax(-1) for s, x in zip(shares, logits[1:], strict=True))
        wanted = (p * (p.log() - logits[0].log_softmax(-1))).sum(-1).mean()
        assert float(objective.loss(given)) == pytest.approx(float(wanted), rel=1e-4)
    by_loss = NextToken(student, Losses(), [Teacher(t) for t in teachers], weigh_by_loss=True)
    nll = [
        F.cross_entropy(x, given.ids[:, 1:].flatten(), reduction="none").view(2, -1).mean(1)
        for x in logits[1:]
    ]
    weights = torch.softmax(-torch.stack(nll), 0).repeat_interleave(6, dim=1)[..., None]
    p = sum(w * x.softmax(-1) for w, x in zip(weights, logits[1:], strict=True))
    wanted = (p * (p.log() - logits[0].log_softmax(-1))).sum(-1).mean()
    assert float(by_loss.loss(given)) == pytest.approx(float(wanted), rel=1e-4)


def test_a_teacher_reads_and_answers_in_its_own_tokens(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    frozen, turned = materialise(model), materialise(model)
    order = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))
    embedding = turned.get_input_embeddings().weight  # type: ignore[operator]
    embedding.data[order] = embedding.data.clone()  # token i is now number order[i]
    objective = NextToken(frozen, Losses(), [Teacher(turned, ids=order)])
    assert float(objective.loss(batch(8))) == pytest.approx(0, abs=1e-5)


def test_signals_stand_for_a_teacher(tmp_path: Path) -> None:
    student, teacher = (materialise(load(write_tiny(tmp_path / str(i), "llama", seed=i))) for i in range(2))
    given = batch(8, 8)

    def said(some: Batch, kept: torch.Tensor):  # type: ignore[no-untyped-def]
        return top_k(teacher(input_ids=some.ids).logits[kept], VOCAB)

    live = NextToken(student, Losses(), [Teacher(teacher)]).loss(given)
    assert float(NextToken(student, Losses(), signals=said).loss(given)) == pytest.approx(
        float(live), rel=1e-4
    )


@pytest.mark.parametrize("family", ["bert", "mpnet", "distilbert"])
def test_embeddings_follow_whatever_the_padding(family: str, tmp_path: Path) -> None:
    teacher = load(write_tiny(tmp_path / "m", family))
    student = with_blocks(teacher, [0])
    taught, frozen = module(student), materialise(teacher)
    given, alone = batch(9, 5), [batch(9), None]
    objective = Embedding(taught, Teacher(frozen), Losses(pairs=0.0))
    x, y = (pooled(states(m, given.ids, given.mask, torch.float32), given.mask) for m in (taught, frozen))
    assert float(objective.loss(given).detach()) == pytest.approx(
        float((1 - F.cosine_similarity(x, y)).mean().detach()), rel=1e-4
    )
    assert alone[0] is not None
    single = pooled(states(taught, alone[0].ids, alone[0].mask, torch.float32), alone[0].mask)
    assert torch.allclose(single[0], x[0], atol=1e-4)


def test_features_that_a_family_has_no_place_for_are_refused(tmp_path: Path) -> None:
    llama, phi = (load(write_tiny(tmp_path / f, f)) for f in ("llama", "phi3"))
    with pytest.raises(UnsupportedError, match="keeps queries, keys and values in one matrix"):
        Features(phi, phi, Weights(relations=1))
    with pytest.raises(UnsupportedError, match="shares keys between queries"):
        Features(llama, llama, Weights(attention=1))
    with pytest.raises(UsageError, match="heads: 7 do not divide"):
        Features(llama, llama, Weights(relations=1, heads=7))
    with pytest.raises(UsageError, match="hidden must be a number from 0 upwards"):
        Weights(hidden=-1)


def test_a_text_that_nobody_labelled_counts_for_its_teacher_alone(tmp_path: Path) -> None:
    """Each labelled text counts as much as it would in a batch of as many labelled ones."""
    draw = np.random.default_rng(0)
    rows = [draw.integers(5, VOCAB, 8) for _ in range(4)]
    given = of_rows(rows, 2, "texts", np.array([1, UNKNOWN, 0, UNKNOWN])).batch(range(4))
    student, teacher = (
        materialise(load(write_tiny(tmp_path / str(i), "bert", seed=i, classes=("a", "b")))) for i in range(2)
    )
    losses = Losses(Divergence("forward_kl", 2.0), soft=0.7, hard=0.3)
    found = Classes(student, losses, [Teacher(teacher)]).loss(given)
    x, y = (m(input_ids=given.ids, attention_mask=given.mask.long()).logits for m in (student, teacher))
    own = F.cross_entropy(x[[0, 2]], torch.tensor([1, 0]), reduction="none").sum() / 4
    soft = oracle.divergence(x, y, "forward_kl", 2.0, 0.5).mean()
    assert float(found) == pytest.approx(float(0.7 * soft + 0.3 * own), rel=1e-4)
    nobody = replace(given, labels=torch.full((4,), UNKNOWN))
    assert float(Classes(student, losses, [Teacher(teacher)]).loss(nobody)) == pytest.approx(
        float(0.7 * soft), rel=1e-4
    )
