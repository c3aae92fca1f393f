"""What a student is told of a batch: the loss of each task, differentiable."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from pocketsize.data.labels import UNKNOWN
from pocketsize.distillation.divergence import Divergence, cross_entropy, divergence
from pocketsize.distillation.ensemble import blended, by_loss
from pocketsize.distillation.feature import pair_distance
from pocketsize.distillation.signal import Signal, signal_divergence
from pocketsize.errors import DataError
from pocketsize.linalg import narrow_products
from pocketsize.models.body import body_of, uncached
from pocketsize.training.early import Early, heard_early
from pocketsize.training.examples import Batch
from pocketsize.training.features import Features, followed
from pocketsize.training.head import Head, Score, head_of, mean_over_vocabulary

Rows = Float[Tensor, "t vocab"]


class Objective(Protocol):
    """A loss. `extra` holds parameters that are trained with the student and are no part of it."""

    @property
    def extra(self) -> nn.Module | None:
        """What is trained beside the student."""
        ...

    def count(self, batch: Batch) -> int:
        """How many items the mean is over."""
        ...

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """The mean loss of a batch."""
        ...


@dataclass(frozen=True, slots=True)
class Losses:
    """What counts: `soft` times the divergence from the teacher, `hard` times the loss of the true tokens or
    labels, `pairs` times the distance of similarities of texts (embedders)."""

    divergence: Divergence = field(default_factory=Divergence)
    soft: float = 1.0
    hard: float = 0.0
    pairs: float = 1.0


@dataclass(frozen=True)
class Teacher:
    """A frozen model. `ids` maps the student's tokens to its own where they differ; `share` is its weight."""

    module: nn.Module
    ids: Int64[Tensor, "vocab"] | None = None
    share: float = 1.0

    def reads(self, ids: Int64[Tensor, "n s"]) -> Int64[Tensor, "n s"]:
        """A batch in this teacher's own tokens."""
        return ids if self.ids is None else self.ids[ids]

    def head(self, vocabulary: int) -> Head:
        """Its head, with a row for each of the student's tokens."""
        own = head_of(self.module)
        if self.ids is not None:
            bias = None if own.bias is None else own.bias[self.ids]
            return Head(own.weight[self.ids], bias, own.cap)
        bias = None if own.bias is None else own.bias[:vocabulary]
        return Head(own.weight[:vocabulary], bias, own.cap)


@dataclass
class NextToken:
    """Causal language models: KL or another divergence at every position whose next token is real.

    Teachers are several models mixed by their shares, or by their loss on each text where `by_loss`; or
    `signals` gives what a teacher said earlier. With no teacher at all only the true tokens teach. What the
    student wrote itself is nobody's truth: there true tokens do not count. Behind `early` blocks it is to say
    the same.
    """

    student: nn.Module
    losses: Losses
    teachers: Sequence[Teacher] = ()
    signals: Callable[[Batch, Bool[Tensor, "n s"]], Signal] | None = None
    extra: Features | None = None
    weigh_by_loss: bool = False
    dtype: torch.dtype = torch.float32
    early: Early | None = None

    def __post_init__(self) -> None:
        width = head_of(self.student).weight.shape[0]
        self.panel = Panel(self.teachers, width, self.weigh_by_loss, self.dtype)

    def count(self, batch: Batch) -> int:
        """Predicted tokens."""
        return int(_predicted(batch.mask).sum())

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """The mean over predicted tokens, and what features add."""
        kept = _predicted(batch.mask)
        targets = batch.ids.roll(-1, dims=1)[kept]
        with (
            followed(self.extra, self.student, *(one.module for one in self.teachers[:1])) as apart,
            heard_early(self.early, self.student, batch) as behind,
        ):
            hidden = states(self.student, batch.ids, batch.mask, self.dtype)[kept]
            said = self.panel.says(batch, kept) if self.teachers else None
        signal = self.signals(batch, kept) if self.signals is not None else None
        hard = 0.0 if batch.written else self.losses.hard
        # Asked for anew: a head on a grid is made of what has learned.
        head, score = head_of(self.student), self._score(targets, said, signal, hard)
        with narrow_products(self.dtype):
            found = mean_over_vocabulary(hidden, head, score) + behind(kept, head, score)
        return found + apart(batch.mask)

    def _score(
        self,
        targets: Int64[Tensor, "t"],
        said: Callable[[slice], Rows] | None,
        signal: Signal | None,
        hard: float,
    ) -> Score:
        def score(logits: Rows, part: slice) -> tuple[Float[Tensor, "t"], Rows]:
            pieces: list[tuple[float, tuple[Float[Tensor, "t"], Rows]]] = []
            if self.losses.soft and signal is not None:
                pieces.append((self.losses.soft, signal_divergence(logits, _cut(signal, part))))
            elif self.losses.soft and said is not None:
                pieces.append((self.losses.soft, divergence(logits, said(part), self.losses.divergence)))
            if hard:
                pieces.append((hard, cross_entropy(logits, targets[part])))
            return _summed(pieces, logits)

        return score


@dataclass
class Panel:
    """Several teachers as one: the mixture of what they say, by their shares or their loss on each text."""

    teachers: Sequence[Teacher]
    vocabulary: int
    weigh_by_loss: bool = False
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        self.heads = [one.head(self.vocabulary) for one in self.teachers]

    @torch.no_grad()
    def says(self, batch: Batch, kept: Bool[Tensor, "n s"]) -> Callable[[slice], Rows]:
        """Logits at the positions `kept` of a batch, or those of the mixture, a slice at a time."""
        said = [states(t.module, t.reads(batch.ids), batch.mask, self.dtype)[kept] for t in self.teachers]
        shares = self._shares(batch, kept, said)

        def logits(part: slice) -> Rows:
            own = [head.logits(h[part]) for head, h in zip(self.heads, said, strict=True)]
            return own[0] if len(own) == 1 else blended(own, shares[:, part])

        return logits

    def _shares(
        self, batch: Batch, kept: Bool[Tensor, "n s"], said: Sequence[Tensor]
    ) -> Float[Tensor, "teachers t"]:
        """How much each teacher counts at each position: the same in all of a text."""
        targets = batch.ids.roll(-1, dims=1)[kept]
        shares = _fixed(self.teachers, targets)
        if len(self.teachers) < 2 or not self.weigh_by_loss:
            return shares
        text = kept.nonzero()[:, 0]
        losses = torch.stack([_nll(h, head, targets) for h, head in zip(said, self.heads, strict=True)])
        totals = losses.new_zeros(len(losses), batch.ids.shape[0]).index_add_(1, text, losses)
        return by_loss(totals / kept.sum(1).clamp_min(1))[:, text]


@dataclass
class Embedding:
    """Encoders of sentences: the mean of the last states is to point where the teacher's points.

    Over a `bridge` the student's embedding is compared with that of a teacher of another width. The
    similarities of all pairs of a batch, which need none, are compared beside.
    """

    student: nn.Module
    teacher: Teacher
    losses: Losses
    bridge: Float[Tensor, "b a"] | None = None
    extra: Features | None = None
    dtype: torch.dtype = torch.float32

    def count(self, batch: Batch) -> int:
        """Texts."""
        return len(batch.ids)

    def embeddings(self, batch: Batch) -> tuple[Float[Tensor, "n a"], Float[Tensor, "n b"]]:
        """What the student makes of the texts, and what the teacher does."""
        x = pooled(states(self.student, batch.ids, batch.mask, self.dtype), batch.mask)
        with torch.no_grad():
            ids = self.teacher.reads(batch.ids)
            return x, pooled(states(self.teacher.module, ids, batch.mask, self.dtype), batch.mask)

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """1 - cosine of the embeddings, the distance of their similarities, and what features add."""
        with followed(self.extra, self.student, self.teacher.module) as apart:
            x, y = self.embeddings(batch)
        found = self.losses.pairs * pair_distance(x, y)
        if self.losses.soft:
            there = x if self.bridge is None else x @ self.bridge.T
            found = found + self.losses.soft * (1 - F.cosine_similarity(there, y, dim=-1)).mean()
        return found + apart(batch.mask)


@dataclass
class Classes:
    """Classifiers: the divergence of class probabilities, and the loss of the true labels.

    A text that nobody labelled has no such loss; each that is labelled counts the same beside whatever else.
    """

    student: nn.Module
    losses: Losses
    teachers: Sequence[Teacher] = ()
    extra: Features | None = None
    weigh_by_loss: bool = False
    dtype: torch.dtype = torch.float32

    def count(self, batch: Batch) -> int:
        """Texts."""
        return len(batch.ids)

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """The mean over texts, and what features add."""
        with followed(self.extra, self.student, *(one.module for one in self.teachers[:1])) as apart:
            logits = class_logits(self.student, batch.ids, batch.mask, self.dtype)
            with torch.no_grad():
                said = [
                    class_logits(t.module, t.reads(batch.ids), batch.mask, self.dtype) for t in self.teachers
                ]
        found = logits.sum() * 0.0
        if said and self.losses.soft:
            found = found + self.losses.soft * self._soft(logits, said, batch)
        if self.losses.hard and batch.labels is not None:
            told = F.cross_entropy(logits, batch.labels, ignore_index=UNKNOWN, reduction="sum")
            found = found + self.losses.hard * told / len(logits)
        return found + apart(batch.mask)

    def _soft(self, logits: Rows, said: Sequence[Rows], batch: Batch) -> Float[Tensor, ""]:
        shares = _fixed(self.teachers, logits)
        if len(said) > 1 and self.weigh_by_loss:
            if batch.labels is None:
                raise DataError("weigh: loss: these texts have no labels to weigh teachers by; use equal")
            shares = by_loss(torch.stack([F.cross_entropy(x, batch.labels, reduction="none") for x in said]))
        target = said[0] if len(said) == 1 else blended(said, shares)
        return cast(Float[Tensor, ""], _Closed.apply(logits, target, self.losses.divergence))


class _Closed(torch.autograd.Function):
    """The mean of a divergence whose slope is known in closed form."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        logits, target, how = given
        found, slope = divergence(logits, target, how)
        ctx.slope = slope / len(slope)
        return found.mean()

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        return ctx.slope * outputs[0], None, None


def states(
    module: nn.Module, ids: Int64[Tensor, "n s"], mask: Bool[Tensor, "n s"], dtype: torch.dtype
) -> Float[Tensor, "n s width"]:
    """The last hidden states of a batch, float32; `dtype` is that of products inside (autocast)."""
    body = body_of(module)
    with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
        out = body(input_ids=ids, attention_mask=_attends(mask, body), **uncached(body))
    return out.last_hidden_state.float()


def class_logits(
    module: nn.Module, ids: Int64[Tensor, "n s"], mask: Bool[Tensor, "n s"], dtype: torch.dtype
) -> Float[Tensor, "n classes"]:
    """The logits of a classifier, float32."""
    with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
        return module(input_ids=ids, attention_mask=_attends(mask, module)).logits.float()


def pooled(hidden: Float[Tensor, "n s width"], mask: Bool[Tensor, "n s"]) -> Float[Tensor, "n width"]:
    """The mean over real tokens."""
    kept = mask[..., None]
    return (hidden * kept).sum(1) / kept.sum(1).clamp_min(1)


def _attends(mask: Bool[Tensor, "n s"], module: nn.Module) -> Tensor | None:
    """None for a causal batch without padding: attention is then free to take its quick way."""
    causal = hasattr(cast(Any, module).config, "use_cache")
    return None if causal and bool(mask.all()) else mask.long()


def _predicted(mask: Bool[Tensor, "n s"]) -> Bool[Tensor, "n s"]:
    """Positions whose next token is real."""
    following = mask.roll(-1, dims=1)
    following[:, -1] = False
    return mask & following


def _fixed(teachers: Sequence[Teacher], rows: Tensor) -> Float[Tensor, "teachers t"]:
    """The shares that teachers were given, the same for every row."""
    given = torch.tensor([one.share for one in teachers], device=rows.device)
    return (given / given.sum())[:, None].expand(-1, len(rows))


def _cut(signal: Signal, part: slice) -> Signal:
    tail = None if signal.tail is None else signal.tail[part]
    return Signal(signal.ids[part], signal.weight[part], signal.log_p[part], tail)


def _summed(
    pieces: Sequence[tuple[float, tuple[Float[Tensor, "t"], Rows]]], logits: Rows
) -> tuple[Float[Tensor, "t"], Rows]:
    """The weighted sum of losses and slopes; of none, nothing."""
    if not pieces:
        return logits.new_zeros(len(logits)), torch.zeros_like(logits)
    (weight, (found, slope)), *others = pieces
    if weight != 1:
        found, slope = found * weight, slope.mul_(weight)
    for weight, (more, also) in others:
        found, slope = found + more * weight, slope.add_(also, alpha=weight)
    return found, slope


def _nll(hidden: Tensor, head: Head, targets: Int64[Tensor, "t"]) -> Float[Tensor, "t"]:
    """-log p of the true tokens, a chunk at a time."""
    found = torch.empty(len(targets), device=targets.device)
    for a in range(0, len(targets), head.chunk):
        b = min(a + head.chunk, len(targets))
        log_p = torch.log_softmax(head.logits(hidden[a:b]).float(), dim=-1)
        found[a:b] = -log_p.gather(1, targets[a:b, None])[:, 0]
    return found
