"""Recipe steps `rtn` and `gptq`: every linear of every block, and the embedding."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from pocketsize.errors import NumericalError, UnsupportedError, UsageError
from pocketsize.exporting.table import EXPORTERS
from pocketsize.linalg import Gram
from pocketsize.models.device import CPU
from pocketsize.models.model import Model
from pocketsize.models.walk import Site, walk
from pocketsize.quantization.gptq import GptqResult, gptq
from pocketsize.quantization.grid import QWeight
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import BITS, GROUPS, Scheme, bits_of, default_group
from pocketsize.recipes.record import Finding, LayerReport, StepReport
from pocketsize.recipes.step import Context

Auto = Literal["auto"]
S = TypeVar("S", "Rtn", "Gptq")
REPORT_ROWS = 32


@dataclass(frozen=True, slots=True)
class Rtn:
    """Recipe step `rtn`: round every weight to the nearest point of its group's range.

    `scheme` is W8A16, W5A16, W4A16, W3A16 or W2A16; `group` the inputs per scale, `auto` for the
    largest that fits every layer and export, null for one scale per row. `float_zeros` lets the zero of
    an asymmetric grid be any number, `auto` where every export stores it so. `embeddings` is the
    width of the embedding and head, null to leave them, `auto` for 8 bits where GGUF is written.
    `scale_digits` is the precision of a stored scale in binary digits, `auto` for what every export
    stores exactly.
    """

    scheme: str = "W4A16"
    group: int | Auto | None = "auto"
    symmetric: bool | Auto = "auto"
    float_zeros: bool | Auto = "auto"
    embeddings: int | Auto | None = "auto"
    embeddings_symmetric: bool = True
    scale_digits: int | Auto = "auto"

    kind: ClassVar[str] = "rtn"
    calibrated: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check(self)

    def resolve(self, model: Model, exports: tuple[str, ...]) -> Rtn:
        """The step with group, symmetry and embedding width decided."""
        return _resolve(self, model, exports)

    def apply(self, model: Model, ctx: Context) -> Model:
        """The model with all linears (and the embedding) rounded; needs no data."""
        scheme, total = block_scheme(self), len(model.blocks) + (self.embeddings is not None)
        reports: list[LayerReport] = []
        for done, path in enumerate(model.blocks):
            if (kept := ctx.store.finished(path)) is None:
                names = model.linears_of(path)
                weights = {name: rtn(model.matrix(name), scheme) for name in names}
                kept = tuple(_report(model.matrix(name), q, None) for name, q in weights.items())
                kept = tuple(replace(r, name=n) for r, n in zip(kept, names, strict=True))
                ctx.store.keep(path, weights, kept)
            reports += kept
            ctx.progress(done + 1, total, path)
        if self.embeddings is not None:
            reports += _embeddings(self, model, ctx, None)
            ctx.progress(total, total, "embeddings")
        return _finish(self, model, ctx, reports, tokens=0)


@dataclass(frozen=True, slots=True)
class Gptq:
    """Recipe step `gptq`: round columns in turn, each error absorbed by the columns to come.

    The keys of `rtn`, and: `damp`, the damping as a fraction of the mean of the Gram diagonal;
    `order`, whether active groups and inputs go first; `search`, whether scale and zero are
    searched for the least weighted error instead of spanning the range; `sink`, what the first
    position of every window counts in the Gram matrix of queries, keys and values, all positions
    together being 1.
    """

    scheme: str = "W4A16"
    group: int | Auto | None = "auto"
    symmetric: bool | Auto = "auto"
    float_zeros: bool | Auto = "auto"
    embeddings: int | Auto | None = "auto"
    embeddings_symmetric: bool = True
    scale_digits: int | Auto = "auto"
    damp: float = 0.01
    order: bool = True
    search: bool = True
    sink: float = 0.5

    kind: ClassVar[str] = "gptq"
    calibrated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self)
        if not 0 < self.damp < 1:
            raise UsageError(f"gptq: damp must lie between 0 and 1, got {self.damp}")
        if not 0 <= self.sink < math.inf:
            raise UsageError(f"gptq: sink must be a number from 0 upwards, got {self.sink}")

    def resolve(self, model: Model, exports: tuple[str, ...]) -> Gptq:
        """The step with group, symmetry and embedding width decided."""
        return _resolve(self, model, exports)

    def apply(self, model: Model, ctx: Context) -> Model:
        """The model with all linears (and the embedding) quantized on the calibration text."""
        total = len(model.blocks) + (self.embeddings is not None)
        reports = [r for path in model.blocks for r in ctx.store.finished(path) or ()]

        def replay(path: str) -> Mapping[str, Tensor] | None:
            if ctx.store.finished(path) is None:
                return None
            kept = ctx.store.weights()
            return {name: kept[name].dequantize() for name in model.linears_of(path)}

        head = self.embeddings is not None and model.arch.head is not None
        gram: Gram | None = None
        weights: dict[str, QWeight] = {}
        layers: list[LayerReport] = []
        for site in walk(model, ctx.input_ids, ctx.mask, finished=replay, head=head):
            if site.block == "head":
                gram = site.gram
                continue
            for name, weight, report in quantize_site(site, block_scheme(self), self):
                weights[name] = weight
                layers.append(report)
            if site.last:
                ctx.store.keep(site.block, weights, tuple(layers))
                reports += layers
                weights, layers = {}, []
                ctx.progress(model.blocks.index(site.block) + 1, total, site.block)
        if self.embeddings is not None:
            reports += _embeddings(self, model, ctx, gram)
            ctx.progress(total, total, "embeddings")
        return _finish(self, model, ctx, reports, tokens=int(ctx.mask.sum()))


def block_scheme(step: Rtn | Gptq) -> Scheme:
    """How a resolved step stores the linears of the blocks."""
    found = step.group, step.symmetric, step.scale_digits, step.float_zeros
    group, symmetric, digits, float_zeros = found
    if group == "auto" or symmetric == "auto" or digits == "auto" or float_zeros == "auto":
        raise UsageError(f"{step.kind}: its `auto` options are still to be resolved")
    return Scheme(bits_of(step.scheme), group, symmetric, digits, float_zeros)


def embedding_scheme(step: Rtn | Gptq) -> Scheme | None:
    """How a resolved step stores embedding and head; None where it leaves them.

    The one format that stores them quantized, GGUF, has float zeros.
    """
    if step.embeddings is None or step.embeddings == "auto":
        return None
    free = not step.embeddings_symmetric
    return Scheme(step.embeddings, 32, step.embeddings_symmetric, float_zeros=free)


def scheme_of(step: Rtn | Gptq, model: Model) -> Callable[[str], Scheme | None]:
    """How a resolved step stores each parameter by its name; None where it leaves it."""
    blocks, ends, linears = block_scheme(step), embedding_scheme(step), set(model.linears)

    def of(name: str) -> Scheme | None:
        if name in linears:
            return blocks
        return ends if name in (model.arch.embedding, model.arch.head) else None

    return of


def quantize_site(site: Site, scheme: Scheme, step: Gptq) -> Iterator[tuple[str, QWeight, LayerReport]]:
    """The linears of a site, quantized as one stacked matrix and handed back one by one.

    The site is told, so that the walk goes on with what they became. Nearly every query attends to
    the first position (attention sinks, arXiv:2309.17453), so an error in its value reaches every
    token: it counts for more than its share of the tokens. An expert that no token reached is
    searched unweighted, and its report says so by its tokens.
    """
    known, columns = site.gram.tokens, site.weights[0].shape[1]
    H = site.gram.mean() if known else torch.eye(columns, device=site.gram.total.device)
    if not bool(H.diagonal().any()):
        raise NumericalError(
            f"{site.names[0]}: all its {len(H)} inputs were zero for every calibration token, so nothing "
            "can be learned about it; look at the layer before it with `pocketsize inspect`, or use step rtn"
        )
    objective = H if site.first is None else H + step.sink * site.first.mean()
    stacked = site.weights[0] if len(site.weights) == 1 else torch.cat(site.weights)
    done = gptq(stacked, objective, scheme, damp=step.damp, search=step.search, order=step.order)
    rows = [w.shape[0] for w in site.weights]
    parts = zip(
        *(t.split(rows) for t in (done.weight.codes, done.weight.scale, done.weight.zero)), strict=True
    )
    for name, W, (codes, scale, zero) in zip(site.names, site.weights, parts, strict=True):
        weight = QWeight(codes, scale, zero, scheme)
        site.replaced[name] = weight.dequantize()
        yield name, weight.to(CPU), replace(_report(W, weight, H, done), name=name, tokens=known)


def _report(W: Tensor, q: QWeight, H: Tensor | None, done: GptqResult | None = None) -> LayerReport:
    """Relative error on at most 32 evenly spaced rows, against plain rounding on the same grid."""
    rows, columns = W.shape
    pick = torch.linspace(0, rows - 1, min(rows, REPORT_ROWS)).round().long().to(W.device)
    sample, mine = W[pick], QWeight(q.codes[pick], q.scale[pick], q.zero[pick], q.scheme).dequantize()

    plain = rtn(sample, q.scheme).dequantize()
    stacked = torch.cat((sample, sample - mine, sample - plain))
    energies = ((stacked if H is None else stacked @ H) * stacked).view(3, -1).sum(1, dtype=torch.float64)
    whole = max(float(energies[0]), 1e-30)
    return LayerReport(
        name="",
        rows=rows,
        columns=columns,
        bits=q.scheme.bits,
        bits_per_weight=round(q.scheme.bits_per_weight(columns), 4),
        error=float(energies[1]) / whole,
        rtn_error=float(energies[2]) / whole,
        damp=done.damp if done else 0.0,
        escalations=done.escalations if done else 0,
        dead=done.dead if done else 0,
    )


def _embeddings(step: Rtn | Gptq, model: Model, ctx: Context, gram: Gram | None) -> tuple[LayerReport, ...]:
    """Quantize the embedding, and the head unless it is the embedding.

    What a head reads is known, so GPTQ applies to it; a tied matrix is treated as a head, since
    an error there meets every token of the vocabulary. An embedding alone is searched unweighted.
    """
    scheme = embedding_scheme(step)
    assert scheme is not None
    if (kept := ctx.store.finished("embeddings")) is not None:
        return kept
    names = [model.arch.embedding]
    if model.arch.head is not None and not model.tied:
        names.append(model.arch.head)
    weights: dict[str, QWeight] = {}
    reports: list[LayerReport] = []
    for name in names:
        W = model.original(name)
        is_head = gram is not None and (model.tied or name == model.arch.head)
        if is_head and isinstance(step, Gptq):
            assert gram is not None
            site = Site("head", (name,), (W.to(gram.total.device),), gram, last=True)
            for _, weight, report in quantize_site(site, scheme, step):
                weights[name] = weight
                reports.append(report)
        else:
            weights[name] = rtn(W, scheme, weight=torch.ones(W.shape[1]) if isinstance(step, Gptq) else None)
            reports.append(replace(_report(W, weights[name], None), name=name))
    ctx.store.keep("embeddings", weights, tuple(reports))
    return tuple(reports)


def _finish(
    step: Rtn | Gptq, model: Model, ctx: Context, reports: list[LayerReport], *, tokens: int
) -> Model:
    """Hand over the reports and whatever the user should know about them."""
    options = {name: getattr(step, name) for name in step.__dataclass_fields__}
    ctx.reports.append(StepReport(step.kind, options, tuple(reports), tokens))
    ctx.findings += _told_together(reports)
    if step.kind == "gptq" and model.arch.experts is not None:
        ctx.findings += _starved([r for r in reports if f".{model.arch.experts}." in r.name])
    if tokens and (widest := max(reports, key=lambda r: r.columns)).columns > tokens:
        ctx.findings.append(
            Finding(
                "few-tokens",
                f"{tokens} calibration tokens show at most {tokens} of {widest.columns} directions of its "
                "inputs; the rest is left to the damping: give more text",
                widest.name,
            )
        )
    return model.with_quantized(ctx.store.weights())


def _told_together(reports: list[LayerReport]) -> Iterator[Finding]:
    """Whose damping was raised, and whose inputs were dead: one finding each, which names the worst."""
    raised = [r for r in reports if r.escalations]
    if raised:
        worst = max(raised, key=lambda r: r.damp)
        said = f"damping raised for {len(raised)} of {len(reports)} matrices, at most to {worst.damp:g}"
        yield Finding("damping-raised", said, worst.name)
    dead = [r for r in reports if r.dead]
    if dead:
        worst = max(dead, key=lambda r: r.dead / r.columns)
        said = f"{len(dead)} of {len(reports)} matrices have inputs that were always zero, at most"
        yield Finding("dead-inputs", f"{said} {worst.dead} of {worst.columns}", worst.name)


def _starved(experts: list[LayerReport]) -> Iterator[Finding]:
    """Which matrices of experts were calibrated on no token, or on fewer than they have inputs."""
    none = [r.name for r in experts if not r.tokens]
    few = [r.name for r in experts if 0 < r.tokens < r.columns]
    if none:
        said = "saw no calibration token and were rounded without; give more calibration text"
        yield Finding("experts-without-tokens", f"{len(none)} of {len(experts)} matrices {said}", none[0])
    if few:
        said = "saw fewer calibration tokens than they have inputs"
        yield Finding("experts-with-few-tokens", f"{len(few)} of {len(experts)} matrices {said}", few[0])


def _check(step: Rtn | Gptq) -> None:
    bits_of(step.scheme)
    if step.embeddings not in (*BITS, "auto", None):
        raise UsageError(
            f"{step.kind}: embeddings must be one of {BITS}, auto or null, got {step.embeddings!r}"
        )
    if step.group not in ("auto", None) and (not isinstance(step.group, int) or step.group < 1):
        raise UsageError(f"{step.kind}: group must be a positive number, auto or null, got {step.group!r}")
    for key in ("symmetric", "float_zeros"):
        if getattr(step, key) not in ("auto", True, False):
            raise UsageError(f"{step.kind}: {key} must be true, false or auto, got {getattr(step, key)!r}")
    if step.symmetric is True and step.float_zeros is True:
        raise UsageError(f"{step.kind}: a symmetric grid has no zeros; use float_zeros: false")


def _resolve(step: S, model: Model, exports: tuple[str, ...]) -> S:
    if model.arch.refuses is not None:
        raise UnsupportedError(f"{model.folder}: nothing in it can be quantized: {model.arch.refuses}")
    bits, gguf = bits_of(step.scheme), "gguf" in exports
    widths = {model.matrix_shape(name)[1] for name in model.linears}
    legal = set(GROUPS).intersection(*(EXPORTERS[e].groups for e in exports))
    group = default_group(widths, legal) if step.group == "auto" else step.group
    for width in widths:
        if group is not None and width % group:
            raise UnsupportedError(
                f"{step.kind}: group {group} does not divide rows of {width} weights; "
                f"use group: {default_group(widths, legal)}"
            )
    for name in exports:
        if bits not in EXPORTERS[name].bits:
            known = ", ".join(map(str, EXPORTERS[name].bits))
            raise UnsupportedError(f"{step.kind}: {name} cannot store {bits}-bit weights; it has {known}")
        if not EXPORTERS[name].takes_group(group):
            raise UnsupportedError(f"{step.kind}: {name} cannot store group {group}; use group: auto")
    packed_only = model.arch.experts is not None and "folder" in exports
    plain = step.float_zeros is not True and (gguf or packed_only or bits == 8)
    symmetric = plain if step.symmetric == "auto" else step.symmetric
    if packed_only and not symmetric:
        raise UnsupportedError(
            f"{step.kind}: transformers loads packed experts without zeros alone; use symmetric: true"
        )
    embeddings = (8 if gguf else None) if step.embeddings == "auto" else step.embeddings
    if gguf and bits == 8 and not symmetric:
        raise UnsupportedError(f"{step.kind}: gguf has no 8-bit type with zeros; use symmetric: true")
    float_zeros = _float_zeros(step, symmetric, exports)
    # Scale times code difference has to fit the 11 digits of float16: GGUF stores that product as a
    # minimum, and stock loaders of a folder multiply in the dtype of the scale.
    exact = min(8, 11 - bits) if not symmetric and not float_zeros and bits <= 5 else 8
    digits = exact if step.scale_digits == "auto" else step.scale_digits
    if gguf and digits > exact:
        raise UnsupportedError(
            f"{step.kind}: gguf stores {bits}-bit minima exactly up to scale_digits: {exact}"
        )
    return replace(
        step,
        group=group,
        symmetric=symmetric,
        float_zeros=float_zeros,
        embeddings=embeddings,
        scale_digits=digits,
    )


def _float_zeros(step: Rtn | Gptq, symmetric: bool, exports: tuple[str, ...]) -> bool:
    """Whether zeros may be any number: where nothing is said, where every export stores them so."""
    without = [name for name in exports if not EXPORTERS[name].float_zeros]
    if step.float_zeros == "auto":
        return bool(exports) and not symmetric and not without
    if step.float_zeros and without:
        raise UnsupportedError(
            f"{step.kind}: {without[0]} cannot store float zeros; "
            "use float_zeros: false, or export gguf alone"
        )
    return step.float_zeros
