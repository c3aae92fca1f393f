"""Recipe step `student`: a narrower body, cut from the model or built to a budget."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

import torch

from pocketsize.distillation.slices import kept_heads
from pocketsize.errors import UnsupportedError, UsageError, did_you_mean
from pocketsize.exporting.plain import CONFIG, as_json
from pocketsize.io.checkpoint import SINGLE, TensorSpec, write_safetensors
from pocketsize.io.publish import publish_bytes
from pocketsize.models.arch import arch_of
from pocketsize.models.load import load, tokenizer_of
from pocketsize.models.lookup import looked_up, require_lookup
from pocketsize.models.model import Model
from pocketsize.models.shares import sizes_without
from pocketsize.models.student import (
    Body,
    Family,
    config_of,
    family_of,
    fitted,
    random_weights,
    shapes_of,
    unlike,
)
from pocketsize.models.surgery import Sizes, cut_config, cuts_of, free_sizes, outlined, promised, sizes_of
from pocketsize.models.vocabulary import Speller, kept_tokens, read_vocabulary, renumbered_config
from pocketsize.recipes import heal as healing
from pocketsize.recipes.lookup import token_vectors
from pocketsize.recipes.record import Finding, StepReport
from pocketsize.recipes.slicing import (
    IMPORTANCES,
    STAGES,
    architectures,
    healed,
    selected,
    stages_of,
    tensor,
    told_of_cut,
)
from pocketsize.recipes.step import Auto, Context
from pocketsize.recipes.timing import quickest_within
from pocketsize.recipes.training import count_of
from pocketsize.recipes.trimming import TOKENIZER, copy_trimmed, same_words
from pocketsize.training.texts import examples_of

RANDOM, TOKENS = "random", "tokens"
_CUT = ("heads", "kv_heads", "ffn", "hidden")
_BUDGETS = ("parameters", "megabytes", "latency_ms")
# Of the file that a budget in megabytes allows, what is left for the names and shapes of tensors.
_HEADER = 20_000
_LENGTH = 512


@dataclass(frozen=True, slots=True)
class Student:
    """Recipe step `student`: a model with a narrower body, for `distill` to teach.

    Without `family` it is cut from the model: `heads`, `kv_heads`, `ffn` and `hidden` are how many query
    heads, keys and values, inner channels and channels stay, the most important ones on the calibration
    text; keys and values become fewer by their mean. Or `remove` is the share of the blocks' parameters that
    goes. `importance` says by what: `activation`, what they carry; `taylor`, what their weights cost to first
    order; `kl`, how much heads are missed, measured, and channels by taylor. `heal`: what is left is solved
    anew to make up for what is gone, and that is kept if it helps. `vocabulary` is how many tokens
    stay, or `corpus`: those that the training text uses. `tied` makes the head the embedding.

    With `family` it is built, with random weights: `layers`, `hidden`, `heads`, `kv_heads` and `ffn` where
    they are given, the rest by a budget: `parameters` (20M), `megabytes` of the folder, or `latency_ms` of a
    text of 128 tokens (of a token, where the model generates) on this machine. `embedding` is the width of a
    factorised embedding, `window` how far attention sees back, `norm` that of MobileBERT. `start: tokens`,
    for embedders: instead of at random it begins as a table of what the model makes of each token alone.
    """

    family: str | None = None
    heads: int | None = None
    kv_heads: int | None = None
    ffn: int | None = None
    hidden: int | None = None
    layers: int | None = None
    vocabulary: int | Literal["corpus"] | None = None
    tied: bool | None = None
    parameters: int | str | None = None
    megabytes: float | None = None
    latency_ms: float | None = None
    embedding: int | None = None
    window: int | None = None
    norm: str | None = None
    start: str = RANDOM
    remove: float | None = None
    importance: str = "activation"
    heal: bool | Auto = "auto"

    kind: ClassVar[str] = "student"

    def __post_init__(self) -> None:
        for name in (*_CUT, "layers", "vocabulary", "embedding", "window", "megabytes", "latency_ms"):
            value = getattr(self, name)
            if value is not None and value != "corpus" and not 0 < value < math.inf:
                raise UsageError(f"student: {name} must be above 0, got {value}")
        if self.parameters is not None:
            count_of(self.parameters, "parameters")
        given = [name for name in _BUDGETS if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(f"student: one budget at a time; keep one of {' and '.join(given)}")
        if self.importance not in IMPORTANCES:
            hint = did_you_mean(self.importance, IMPORTANCES)
            raise UsageError(f"student: unknown importance {self.importance!r}{hint}")
        if self.heal not in (True, False, "auto"):
            raise UsageError(f"student: heal is auto, true or false, got {self.heal!r}")
        if self.start not in (RANDOM, TOKENS):
            hint = did_you_mean(self.start, (RANDOM, TOKENS))
            raise UsageError(f"student: unknown start {self.start!r}{hint}")
        if self.family is None:
            self._check_cut(given)
        elif self.remove is not None or self.heal is True:
            word = "heal" if self.remove is None else "remove"
            raise UsageError(
                f"student: {word} is for a student that is cut; leave it out, or leave out family"
            )
        elif self.vocabulary == "corpus":
            raise UsageError(
                "student: vocabulary: corpus is not known before the text is read, and a body that is built "
                "needs its size before; give a number of tokens"
            )

    def _check_cut(self, budgets: Sequence[str]) -> None:
        """Refuse what only a student has that is built."""
        built = ("layers", "embedding", "window", "norm")
        tokens = ["start"] if self.start == TOKENS else []
        if alone := [*budgets, *(name for name in built if getattr(self, name) is not None), *tokens]:
            way = "use the step layers, or " if alone == ["layers"] else ""
            raise UsageError(f"student: {alone[0]} is for a student that is built; {way}name its family")
        if self.tied is False:
            raise UsageError("student: tied: false would add a head; leave it out, or name a family")
        sizes = [name for name in _CUT if getattr(self, name) is not None]
        if self.remove is not None and not 0 < self.remove < 1:
            raise UsageError(f"student: remove is a share between 0 and 1, got {self.remove}")
        if self.remove is not None and sizes:
            raise UsageError(f"student: remove chooses sizes; leave out it or {' and '.join(sizes)}")
        if self.heal is True and not sizes and self.remove is None:
            raise UsageError("student: heal: no heads and no channels go that could be made up for")
        if not sizes and not any((self.remove, self.vocabulary, self.tied)):
            raise UsageError(
                "student: says nothing; give remove, hidden, heads, kv_heads, ffn, vocabulary or a family"
            )

    @property
    def calibrated(self) -> bool:
        """Whether it looks at the calibration tokens: to tell what is important."""
        return self.family is None and any(getattr(self, name) is not None for name in (*_CUT, "remove"))

    def resolve(self, model: Model, exports: tuple[str, ...]) -> Student:
        """The step with every size chosen; refuses sizes that the model or the family cannot have."""
        if isinstance(self.vocabulary, int):
            self._check_vocabulary(model, self.vocabulary)
        if self.family is None:
            return self._settled(model)
        body = self._body(model)
        names = ("layers", "hidden", "heads", "kv_heads", "ffn", "embedding")
        return replace(
            self,
            **dict.fromkeys(_BUDGETS),
            **{name: getattr(body, name) for name in names},  # type: ignore[arg-type]
        )

    def _settled(self, model: Model) -> Student:
        """The cut with its sizes; refuses those that the model cannot have."""
        if not self.calibrated:
            self.outline(model)
            return replace(self, heal=False)
        if model.pattern is not None:
            raise UsageError(
                "student: slices of a pruned model take its pattern apart; cut first, then prune"
            )
        sizes = self._sizes(model)
        self.outline(model)
        named = {} if self.remove is None else {name: getattr(sizes, name) for name in free_sizes(model)}
        return replace(self, **named, remove=None, heal=healing.chosen(self.heal, model, self.kind))

    def outline(self, model: Model) -> Model:
        """A model of these sizes; with `vocabulary: corpus` it still has all tokens, the most it can have."""
        if self.family is None:
            return outlined(model, self._sizes(model), tied=bool(self.tied))
        raw = config_of(self._body(model))
        return replace(promised(model, raw, shapes_of(raw)), arch=arch_of(self.family))

    def apply(self, model: Model, ctx: Context) -> Model:
        """The student; calibration text is from now on in its tokens."""
        folder = ctx.store.made(self.kind, partial(self._write, model, ctx), ctx.findings)
        student = load(folder).made_from(model)
        before, after = model.origin.parameters, student.origin.parameters
        options: dict[str, object] = {f.name: getattr(self, f.name) for f in fields(self)}
        told = {"parameters_before": before, "parameters_after": after}
        stages = stages_of(folder)
        ctx.reports.append(StepReport(self.kind, options | told | asdict(_shown(student)), stages=stages))
        ctx.findings += [] if self.family else told_of_cut(model, stages, self.kind)
        if self.family and (odd := unlike(self._body(model), family_of(self.family, model))):
            ctx.findings.append(Finding("odd-shape", f"student: {odd}"))
        ctx.progress(1, 1, f"{after / 1e6:.1f}M of {before / 1e6:.1f}M parameters")
        if not same_words(model, student):
            words = (read_vocabulary((one.folder / TOKENIZER).read_bytes()) for one in (model, student))
            ctx.input_ids, ctx.mask = Speller(*words).respelled(ctx.input_ids, ctx.mask)
            count, of = int(student.config.vocab_size), int(model.config.vocab_size)
            said = f"{count:,} of {of:,} tokens are kept; text with others is spelled with these"
            ctx.findings.append(Finding("tokens-dropped", said))
        return student

    def _write(self, model: Model, ctx: Context, folder: Path) -> None:
        tokens = self._tokens(model, ctx)
        if self.family is not None:
            body = self._body(model)
            made = random_weights(body, ctx.seed)
            if self.start == TOKENS:
                width = made[arch_of(body.family).embedding].shape[1]
                known = tokens or range(int(model.config.vocab_size))
                made = looked_up(made, body, *token_vectors(model, known, width))
            specs = [TensorSpec(n, torch.float32, tuple(t.shape), lambda t=t: t) for n, t in made.items()]
            raw = config_of(body)
        else:
            sizes = self._sizes(model)
            sizes = sizes if tokens is None else replace(sizes, vocabulary=len(tokens))
            chosen, found = selected(self.importance, model, ctx, sizes, tokens), healing.Healing()
            if self.calibrated and healing.chosen(self.heal, model, self.kind):
                found = healed(model, ctx, sizes, chosen, self.kind)
            publish_bytes(folder / STAGES, json.dumps([asdict(one) for one in found.stages]).encode())
            given = replace(model, changed=found.tensors)
            shapes = outlined(model, sizes, tied=bool(self.tied)).checkpoint.entries
            specs = [
                TensorSpec(e.name, torch.float32, e.shape, partial(tensor, given, name, chosen))
                for name, e in shapes.items()
            ]
            raw = cut_config(model, sizes, tied=bool(self.tied))
            raw["architectures"] = architectures(model)
        if tokens is not None:
            raw = renumbered_config(raw, {old: new for new, old in enumerate(tokens)})
        write_safetensors(folder / SINGLE, specs, {"format": "pt"})
        publish_bytes(folder / CONFIG, as_json(raw))
        copy_trimmed(model.folder, folder, tokens)

    def _tokens(self, model: Model, ctx: Context) -> list[int] | None:
        """The numbers of the tokens that stay; None: all of them."""
        if self.vocabulary is None:
            return None
        assert ctx.corpus is not None
        length = min(_LENGTH, model.positions)
        task = "generate" if model.arch.task == "generate" else "embed"  # labels are of no interest here
        text = examples_of(ctx.corpus, tokenizer_of(model), length=length, task=task)
        counts = Counter(text.flat.tolist())
        vocabulary = read_vocabulary((model.folder / TOKENIZER).read_bytes())
        return kept_tokens(vocabulary, counts, None if self.vocabulary == "corpus" else self.vocabulary)

    def _check_vocabulary(self, model: Model, wanted: int) -> None:
        if not (model.folder / TOKENIZER).is_file():
            raise UnsupportedError(f"student: vocabulary: {model.folder} has no {TOKENIZER} to trim")
        vocabulary = read_vocabulary((model.folder / TOKENIZER).read_bytes())
        if wanted > len(vocabulary.numbers):
            raise UsageError(f"student: vocabulary: {wanted}; the model has {len(vocabulary.numbers)} tokens")
        kept_tokens(vocabulary, {}, wanted)

    def _sizes(self, model: Model) -> Sizes:
        """What a model cut by this step has of everything."""
        if not self.calibrated:
            own = sizes_of(model)
        else:
            cuts, own = cuts_of(model, [n for n in _CUT if getattr(self, n) is not None]), sizes_of(model)
            if self.remove is not None:
                return replace(sizes_without(model, self.remove), vocabulary=self._count(own))
            for name in _CUT:
                if (wanted := getattr(self, name)) is not None and wanted > getattr(own, name):
                    raise UsageError(
                        f"student: {name}: {wanted} is more than the model's {getattr(own, name)}"
                    )
            own = _squared(self, own, model) if cuts.square else self._grouped(own)
        if self.tied and model.arch.head is None:
            raise UnsupportedError(f"student: tied: a {model.config.model_type} model has no head")
        return replace(own, vocabulary=self._count(own))

    def _count(self, own: Sizes) -> int:
        """How many tokens stay at most."""
        return self.vocabulary if isinstance(self.vocabulary, int) else own.vocabulary

    def _grouped(self, own: Sizes) -> Sizes:
        """Sizes of a family whose heads have a width of their own and may share keys and values."""
        heads = self.heads or own.heads
        same = heads if own.kv_heads == own.heads else own.kv_heads
        keys = self.kv_heads or (same if heads % same == 0 else 0)
        try:
            if not keys:
                raise ValueError(
                    f"{heads} heads cannot share {same} keys and values evenly; give kv_heads too"
                )
            kept_heads(torch.ones(own.heads), own.kv_heads, heads, keys)
        except ValueError as error:
            raise UsageError(f"student: {error}") from error
        return Sizes(heads, keys, self.ffn or own.ffn, self.hidden or own.hidden, own.vocabulary)

    def _body(self, model: Model) -> Body:
        """The shape of a student that is built."""
        assert self.family is not None
        family = family_of(self.family, model)
        if self.start == TOKENS:
            require_lookup(self.family)
        start = partial(self._start, model, family)
        if self.latency_ms is not None:
            return quickest_within(self.latency_ms, start, family)
        if (budget := self._budget(model)) is not None:
            return fitted(start, family, budget)
        if self.layers is None or self.hidden is None:
            raise UsageError("student: give parameters, megabytes or latency_ms, or both layers and hidden")
        return start(self.layers, self.hidden)

    def _budget(self, model: Model) -> int | None:
        if self.megabytes is not None:
            return max(1, int((1e6 * self.megabytes - _HEADER) / model.dtype.itemsize))
        return None if self.parameters is None else count_of(self.parameters, "parameters")

    def _start(self, model: Model, family: Family, layers: int, hidden: int) -> Body:
        """A body of this depth and width, where the step does not say otherwise."""
        assert self.family is not None
        hidden = self.hidden or hidden
        body = family.body(model, self.family, self.layers or layers, hidden)
        heads = self.heads or body.heads
        inside = hidden // family.narrow
        if inside % heads or hidden % family.narrow:
            raise UsageError(f"student: {heads} heads do not divide attention that is {inside} wide")
        keys = self.kv_heads or (body.kv_heads if heads % body.kv_heads == 0 else heads)
        if family.share == 1 and keys != heads and self.kv_heads:
            raise UsageError(f"student: kv_heads: in a {self.family} every head has keys of its own")
        if heads % keys:
            raise UsageError(f"student: {heads} heads cannot share {keys} keys and values evenly")
        self._refuse_foreign()
        return replace(
            body,
            heads=heads,
            kv_heads=keys if family.share > 1 else heads,
            ffn=self.ffn or body.ffn,
            vocabulary=int(self.vocabulary or body.vocabulary),
            tied=self.tied is not False,
            embedding=self.embedding or (hidden // 2 if self.start == TOKENS and family.narrow > 1 else None),
            window=self.window,
            norm=self.norm or "no_norm",
        )

    def _refuse_foreign(self) -> None:
        """Refuse options that the stock class of the family has no place for."""
        places = {
            "window": ("qwen2", "mistral"),
            "embedding": ("electra", "mobilebert"),
            "norm": ("mobilebert",),
        }
        for name, able in places.items():
            if getattr(self, name) is not None and self.family not in able:
                raise UsageError(f"student: {name} is for {' and '.join(able)}, not for {self.family}")
        if self.norm not in (None, "no_norm", "layer_norm"):
            raise UsageError(f"student: norm is no_norm or layer_norm, got {self.norm!r}")
        if self.tied is False and self.family is not None and arch_of(self.family).head is None:
            raise UsageError(f"student: tied: a {self.family} has no head")


def _squared(step: Student, own: Sizes, model: Model) -> Sizes:
    """Sizes of a family whose attention is as wide as the model: width and heads go together."""
    d, kind = model.head_width, model.config.model_type
    if step.kv_heads not in (None, own.heads):
        raise UsageError(f"student: kv_heads: in a {kind} every head has keys of its own; leave it out")
    hidden = step.hidden or (step.heads or own.heads) * d
    heads = step.heads or hidden // d
    if heads * d != hidden:
        near = max(1, round(hidden / d))
        raise UsageError(
            f"student: attention of a {kind} is as wide as the model, and its heads are {d} wide: "
            f"hidden {hidden} and {heads} heads do not go together; use hidden: {near * d}, heads: {near}"
        )
    return Sizes(heads, heads, step.ffn or own.ffn, hidden, own.vocabulary)


@dataclass(frozen=True, slots=True)
class _Shown:
    """What the report says of the student."""

    kept_layers: int
    kept_hidden: int
    kept_heads: int
    kept_tokens: int


def _shown(model: Model) -> _Shown:
    config = model.config
    return _Shown(
        len(model.blocks), int(config.hidden_size), int(config.num_attention_heads), int(config.vocab_size)
    )
