"""Recipe steps `rtn`, `hqq` and `gptq`: every linear of every block, and the embedding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, cast

import torch
from torch import Tensor

from pocketsize.errors import UnsupportedError, UsageError
from pocketsize.linalg import Gram
from pocketsize.models.device import CPU
from pocketsize.models.model import Model
from pocketsize.models.walk import Site, walk
from pocketsize.quantization.gptq import gptq
from pocketsize.quantization.grid import QWeight
from pocketsize.quantization.hqq import ITERATIONS, P, hqq
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import Scheme, named
from pocketsize.recipes.correct import SINK, aim_of, check_sink, check_terms, refuse_experts
from pocketsize.recipes.fallbacks import require_few_fallbacks
from pocketsize.recipes.grids import (
    Quantizer,
    chosen,
    end_scheme,
    layer_scheme,
    layer_schemes,
    words_of,
)
from pocketsize.recipes.layers import finish, layer_report
from pocketsize.recipes.learn import judging_windows, learn_block, too_little_to_learn
from pocketsize.recipes.record import LayerReport
from pocketsize.recipes.rival import beside, sparse_report, whole_of
from pocketsize.recipes.rounds import rounding_word
from pocketsize.recipes.sites import naming, stacked, unstacked
from pocketsize.recipes.stages import Way, staged
from pocketsize.recipes.step import Auto, Context, Step, Unit


@dataclass(frozen=True, slots=True)
class Rtn(Quantizer):
    """Recipe step `rtn`: round every weight to the nearest point of its group's range.

    `scheme` is W8A16, W5A16, W4A16, W3A16 or W2A16; `group` the inputs per scale, `auto` for the
    largest that fits every layer and export, null for one scale per row. `float_zeros` lets the zero of
    an asymmetric grid be any number, `auto` where every export stores it so. `embeddings` is the
    width of the embedding and head, `same` to store them as the linears are (the one way in which a
    folder holds them), null to leave them, `auto` for 8 bits where GGUF is written.
    `scale_digits` is the precision of a stored scale in binary digits, `auto` for what every export
    stores exactly. `overrides` says by pattern what some linears have instead (`scheme`, `group`,
    `symmetric`, `float_zeros`, `scale_digits`), or null to leave them.
    """

    kind: ClassVar[str] = "rtn"
    calibrated: ClassVar[bool] = False
    rounds: ClassVar[bool] = True

    def apply(self, model: Model, ctx: Context) -> Model:
        """The model with all linears (and the embedding) rounded; needs no data."""
        return _without_data(self, model, ctx, rtn)


@dataclass(frozen=True, slots=True)
class Hqq(Quantizer):
    """Recipe step `hqq`: no data; the zero of every group minimises the p-norm of its errors.

    The keys of `rtn`, and: `p`, the exponent of the norm, below 1 for one that outliers hardly move;
    `iterations`, how often errors and zeros take turns. It has nothing to do on a symmetric grid.
    """

    symmetric: bool | Auto = False
    p: float = P
    iterations: int = ITERATIONS

    kind: ClassVar[str] = "hqq"
    calibrated: ClassVar[bool] = False

    def __post_init__(self) -> None:
        own = named(self.scheme)
        if own is not None and own.symmetric:
            raise UsageError(f"hqq: it chooses zeros, {self.scheme} has none; use step rtn or gptq")
        Quantizer.__post_init__(self)
        if self.symmetric is True:
            raise UsageError("hqq: it chooses zeros, a symmetric grid has none; use step rtn or gptq")
        if not 0 < self.p <= 1:
            raise UsageError(f"hqq: p must lie above 0 and be at most 1, got {self.p}")
        if self.iterations < 1:
            raise UsageError(f"hqq: iterations must be at least 1, got {self.iterations}")

    def resolve(self, model: Model, exports: tuple[str, ...]) -> Hqq:
        """The step with group, zeros and embedding width decided."""
        if model.arch.experts is not None and "folder" in exports:
            raise UnsupportedError(
                "hqq: it chooses zeros, and transformers loads packed experts without; use step rtn or gptq"
            )
        asymmetric = replace(self, symmetric=False)
        made = replace(asymmetric, **chosen(asymmetric, model, exports))
        if any(scheme.super_blocks for scheme in layer_schemes(made)):
            raise UnsupportedError(
                "hqq: it chooses the zeros of each group by themselves, those of a super-block share a unit; "
                "use step rtn or gptq"
            )
        return made

    def apply(self, model: Model, ctx: Context) -> Model:
        """The model with all linears (and the embedding) quantized; needs no data."""
        return _without_data(self, model, ctx, partial(hqq, p=self.p, iterations=self.iterations))


# The damping of Gram matrices, as a share of the mean of their diagonals.
DAMP = 0.01


def check_damp(kind: str, damp: float) -> None:
    """Refuse what damps nothing, or everything."""
    if not 0 < damp < 1:
        raise UsageError(f"{kind}: damp must lie between 0 and 1, got {damp}")


@dataclass(frozen=True, slots=True)
class Gptq(Quantizer):
    """Recipe step `gptq`: round columns in turn, each error absorbed by the columns to come.

    The keys of `rtn`, and: `damp`, the damping as a fraction of the mean of the Gram diagonal;
    `order`, whether active groups and inputs go first; `search`, whether scale and zero are
    searched for the least weighted error instead of spanning the range; `sink`, what the first
    position of every window counts in the Gram matrix of queries, keys and values, all positions
    together being 1; `learn`, for how many steps codes and scales of each block are learned afterwards
    from what the original block gives, 0 for not at all; `alpha`, the share of what was lost on the way to a
    linear that it makes up for (GPTAQ); `beta`, how far columns are drawn back from their corrections (FOEM).
    """

    damp: float = DAMP
    order: bool = True
    search: bool = True
    sink: float = SINK
    learn: int = 0
    alpha: float = 0.0
    beta: float = 0.0

    kind: ClassVar[str] = "gptq"
    calibrated: ClassVar[bool] = True
    rounds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        Quantizer.__post_init__(self)
        check_damp(self.kind, self.damp)
        check_sink(self.kind, self.sink)
        if self.learn < 0:
            raise UsageError(f"gptq: learn must be a whole number from 0 upwards, got {self.learn}")
        check_terms(self.kind, self.alpha, self.beta, words_of(self))
        if self.learn and (word := rounding_word(words_of(self))) is not None:
            raise UsageError(f"gptq: learn: no gradient passes the rounding of inputs ({word}); use learn: 0")

    def resolve(self, model: Model, exports: tuple[str, ...]) -> Gptq:
        """The step with group, zeros, digits and embedding width decided."""
        refuse_experts(self.kind, self.alpha, model)
        return cast(Gptq, Quantizer.resolve(self, model, exports))

    def apply(self, model: Model, ctx: Context) -> Model:
        """The model with all linears (and the embedding) quantized on the calibration text.

        What `alpha` and `beta` correct and what is learned are stages of their own (`staged`); learning
        begins at the better of both stages before it.
        """
        judges = judging_windows(ctx.mask)
        ways = self.stages()
        if len(ways) > 1 and judges:
            return staged(model, ctx, ways, judges)
        if len(ways) > 1:
            what = " or ".join([*ways][1:])
            ctx.findings.append(too_little_to_learn(self.kind, ctx.mask, what=what))
        return self._solved(model, ctx)

    def stages(self) -> dict[str, Way]:
        """The sweep, then what corrects it and what is learned, if that is asked for, by name."""
        ways: dict[str, Way] = {"gptq": lambda model, ctx, _: self._solved(model, ctx)}
        if corrects(self):
            ways["corrected"] = lambda model, ctx, _: self._solved(model, ctx, corrected=True)
        if self.learn:
            ways["learned"] = lambda model, ctx, best: self._solved(
                model, ctx, learn=self.learn, corrected=best is not None and best.name == "corrected"
            )
        return ways

    def _solved(self, model: Model, ctx: Context, *, learn: int = 0, corrected: bool = False) -> Model:
        step = self if corrected else uncorrected(self)
        pruned = model.pattern is not None
        whole = whole_of(model, ctx) if pruned else None

        def quantize(site: Site, unit: Unit) -> Iterator[tuple[str, QWeight, LayerReport]]:
            for scheme, part in parts(site, self):
                yield from quantize_site(part, scheme, step, pruned=pruned, whole=whole)
            if site.last and site.whole is not None:
                learn_block(site, unit, model, steps=learn)

        return walked(self, model, ctx, quantize, beside=learn > 0, drift=drifts(step))


# How long blocks are learned, by how much time there is; of encoders, whose batches are smaller (learned.md).
EFFORTS = {"fast": 0, "balanced": 20, "best": 100}
ENCODERS = {"fast": 0, "balanced": 80, "best": 200}
# The damping of a head that is the embedding too: without its KL rises by a tenth (docs/methods/gptq.md).
TIED = 0.1


def steps_learned(step: Step) -> int:
    """For how many steps a recipe step learns each block."""
    return step.learn if isinstance(step, Gptq) else 0


def drifts(step: Step) -> bool:
    """Whether a recipe step makes up for what was lost on the way to a linear."""
    return isinstance(step, Gptq) and step.alpha > 0


def corrects(step: Step) -> bool:
    """Whether a recipe step corrects what a sweep aims at, or the corrections that it makes."""
    return isinstance(step, Gptq) and (step.alpha > 0 or step.beta > 0)


def uncorrected(step: Gptq) -> Gptq:
    """The step with neither."""
    return replace(step, alpha=0.0, beta=0.0) if corrects(step) else step


def stages_of(step: Step) -> int:
    """How many models a recipe step makes, of which it keeps the nearest to the original."""
    return 1 + corrects(step) + (steps_learned(step) > 0)


def walked(
    step: Quantizer,
    model: Model,
    ctx: Context,
    quantize: Callable[[Site, Unit], Iterator[tuple[str, QWeight, LayerReport]]],
    *,
    hold_out: bool = False,
    beside: bool = False,
    drift: bool = False,
) -> Model:
    """The model with every site quantized on what its linears read, block by block, and the embedding."""
    total = len(model.blocks) + (step.embeddings is not None)
    reports = [r for path in model.blocks for r in ctx.store.finished(path) or ()]
    require_few_fallbacks(step.kind, reports, len(model.linears))

    def replay(path: str) -> Mapping[str, Tensor] | None:
        if ctx.store.finished(path) is None:
            return None
        kept = ctx.store.weights()
        weights = {name: kept[name].dequantize() for name in model.linears_of(path) if name in kept}
        changed = ctx.store.changed()
        return weights | {n: changed[n] for n in changed if n.startswith(f"{path}.")}

    head = step.embeddings is not None and model.arch.head is not None
    gram: Gram | None = None
    unit, how = Unit(), {"head": head, "hold_out": hold_out, "beside": beside, "sampled": step.sampled}
    how |= {"drift": drift, "judged": True}
    found = {name: layer_scheme(step, name) for name in model.linears}
    how |= {"rounds": {name: scheme for name, scheme in found.items() if scheme and scheme.activations}}
    for site in walk(model, ctx.input_ids, ctx.mask, finished=replay, **how):
        if site.block == "head":
            gram = site.gram
            continue
        for name, weight, report in quantize(site, unit):
            unit.weights[name] = weight
            unit.reports.append(report)
        if site.last:
            names = [name for name in model.linears_of(site.block) if name in unit.weights]
            unit.reports.sort(key=lambda report: names.index(report.name))
            weights = {name: unit.weights[name] for name in names}
            ctx.store.keep(site.block, weights, tuple(unit.reports), unit.changed)
            reports += unit.reports
            require_few_fallbacks(step.kind, reports, len(model.linears))
            unit = Unit()
            ctx.progress(model.blocks.index(site.block) + 1, total, site.block)
    if step.embeddings is not None:
        reports += _embeddings(step, model, ctx, gram)
        ctx.progress(total, total, "embeddings")
    return finish(step, model, ctx, reports, tokens=int(ctx.mask.sum()))


def _without_data(
    step: Quantizer, model: Model, ctx: Context, quantize: Callable[[Tensor, Scheme], QWeight]
) -> Model:
    """The model with each linear quantized by itself, block by block, and the embedding."""
    total = len(model.blocks) + (step.embeddings is not None)
    reports: list[LayerReport] = []
    for done, path in enumerate(model.blocks):
        if (kept := ctx.store.finished(path)) is None:
            found = {name: layer_scheme(step, name) for name in model.linears_of(path)}
            schemes = {name: scheme for name, scheme in found.items() if scheme is not None}
            weights = {name: quantize(model.matrix(name), scheme) for name, scheme in schemes.items()}
            kept = tuple(layer_report(n, model.matrix(n), q, None) for n, q in weights.items())
            ctx.store.keep(path, weights, kept)
        reports += kept
        ctx.progress(done + 1, total, path)
    if step.embeddings is not None:
        reports += _embeddings(step, model, ctx, None)
        ctx.progress(total, total, "embeddings")
    return finish(step, model, ctx, reports, tokens=0)


def parts(site: Site, step: Quantizer) -> Iterator[tuple[Scheme, Site]]:
    """The linears of a site that have the same scheme, as sites of their own; those that are left are not."""
    found: dict[Scheme, list[int]] = {}
    for i, name in enumerate(site.names):
        if (scheme := layer_scheme(step, name)) is not None:
            found.setdefault(scheme, []).append(i)
    for scheme, at in found.items():
        own = tuple(site.names[i] for i in at), tuple(site.weights[i] for i in at)
        yield scheme, replace(site, names=own[0], weights=own[1])


def quantize_site(
    site: Site, scheme: Scheme, step: Gptq, *, pruned: bool = False, whole: Model | None = None
) -> Iterator[tuple[str, QWeight, LayerReport]]:
    """The linears of a site, quantized as one stacked matrix and handed back one by one.

    The site is told, so that the walk goes on with what they became. An expert that no token reached is
    searched unweighted, and its report says so by its tokens. In a `pruned` model what is zero stays zero;
    `whole` has its linears as they were before.
    Where the site knows what it lacks beside the original, a share of that is made up for; errors are then
    told of what was aimed at.
    """
    how = {"damp": step.damp, "search": step.search, "order": step.order, "beta": step.beta}
    aim = aim_of(site, alpha=step.alpha, sink=step.sink, damp=step.damp)
    mask = stacked(site) != 0 if pruned else None
    with naming(site):
        done = gptq(aim.whole, aim.objective, scheme, mask=mask, **how)
    told = {"tokens": site.gram.tokens, **aim.damped(done.escalations)}
    weights = zip(site.names, site.weights, aim.matrices, unstacked(done.weight, site), strict=True)
    for name, W, T, weight in weights:
        site.replaced[name] = weight.dequantize()
        report = replace(layer_report(name, T, weight, aim.read, done), **told)
        if pruned:
            X, report = site.replaced[name], sparse_report(report, site.replaced[name], scheme)
            bits = report.bits_per_weight
            report = replace(report, **beside(whole, name, T - W, X, aim.read, bits=bits, like=scheme))
        yield name, weight.to(CPU), report


def _embeddings(step: Quantizer, model: Model, ctx: Context, gram: Gram | None) -> tuple[LayerReport, ...]:
    """Quantize the embedding, and the head unless it is the embedding.

    What a head reads is known, so GPTQ applies to it; a tied matrix is treated as a head, since
    an error there meets every token of the vocabulary. It is damped more, for it is an embedding as well,
    of which every error counts alike. An embedding alone is searched unweighted, but for `rtn`.
    """
    if (kept := ctx.store.finished("embeddings")) is not None:
        return kept
    weights: dict[str, QWeight] = {}
    reports: list[LayerReport] = []
    for name in model.ends:
        W, scheme = model.original(name), end_scheme(step, name)
        if scheme is None:  # an override leaves it
            continue
        is_head = gram is not None and (model.tied or name == model.arch.head)
        if is_head and isinstance(step, Gptq):
            assert gram is not None
            site = Site("head", (name,), (W.to(gram.total.device),), gram, last=True)
            own = uncorrected(step)
            own = replace(own, damp=max(own.damp, TIED)) if model.tied else own
            for _, weight, report in quantize_site(site, scheme, own):
                weights[name] = weight
                reports.append(report)
        else:
            H = gram.mean().to(W.device) if is_head and gram is not None else None
            even = None if step.kind == "rtn" else torch.ones(W.shape[1])
            weights[name] = rtn(W, scheme, weight=even if H is None else H.diagonal())
            reports.append(layer_report(name, W, weights[name], H))
    if weights:
        ctx.store.keep("embeddings", weights, tuple(reports))
    return tuple(reports)
