"""Recipe step `prune`: weights that matter least become zero, and those that stay make up for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from pocketsize.errors import UnsupportedError, UsageError, did_you_mean
from pocketsize.exporting.companions import copy_companions
from pocketsize.exporting.plain import CONFIG, as_json, config_of_plain
from pocketsize.io.checkpoint import DTYPES, SINGLE, Entry, TensorSpec, write_safetensors
from pocketsize.io.publish import publish_bytes
from pocketsize.linalg import feedback_factor
from pocketsize.models.device import CPU
from pocketsize.models.load import load
from pocketsize.models.model import SPARSITY, Model
from pocketsize.models.walk import Site, walk
from pocketsize.pruning.alps import ROUNDS
from pocketsize.pruning.mask import Scope, about, highest, require_fitting
from pocketsize.pruning.pattern import UNSTRUCTURED, Pattern, pattern_of, said_of
from pocketsize.pruning.score import magnitude
from pocketsize.recipes.correct import DAMPED, LEFT_OUT, SINK, aim_of, check_shares, decided, settled
from pocketsize.recipes.fallbacks import raised_damping, require_few_fallbacks
from pocketsize.recipes.learn import judging_windows, too_little_to_learn
from pocketsize.recipes.overrides import decides, matched
from pocketsize.recipes.pruned import (
    MODEL,
    MaskOf,
    There,
    masks_within,
    more_zeros,
    pruned_matrices,
    require_no_revival,
    there_of,
    updated,
)
from pocketsize.recipes.record import Finding, LayerReport, StepReport
from pocketsize.recipes.rival import beside, compared, denser, sparse_bits, whole_of
from pocketsize.recipes.shares import ALLOCATIONS, mask_of, shares_of, usual_spread
from pocketsize.recipes.sites import left_out, naming
from pocketsize.recipes.step import Auto, Context, Unit
from pocketsize.recipes.survivors import learn_survivors

SCORES = ("alps", "sparsegpt", "surgeon", "taylor", "wanda", "magnitude")
UPDATES = ("auto", "none", "sweep", "refit")
SCOPES = ("auto", "row", "matrix", MODEL)


@dataclass(frozen=True, slots=True)
class Prune:
    """Recipe step `prune`: some weights of the linears of all blocks become zero, for good.

    `sparsity` is the share of them; `pattern` says where zeros may lie: anywhere (`unstructured`), or all but
    2 of 4 neighbours (`2:4`, any n:m), which says the share itself. `score` says which weights go: alps
    (mask and values together), sparsegpt, surgeon, taylor, wanda or magnitude; `update` what those that stay
    become: what the score's own paper does (`auto`), nothing (`none`), what a sweep of error feedback gives
    (`sweep`), the least squares (`refit`). Weights compete within their row or matrix (`scope`), by magnitude
    within the `model`, too; how many go from each matrix is the same everywhere, or by an `allocation`:
    `outliers`, `taylor` or `searched`, within `spread` (`auto`: 0.2, of outliers 0.1).
    `damp` is the damping, `rounds` those of alps, `alpha` the share of what was lost on the way to a linear
    that its weights make up for, where they are moved; `sink` what the first position of every window counts
    beside all of them; `auto` leaves both out of every score but alps, as papers do. For `learn` steps the
    weights left in each block are then learned from what the original block gives. `overrides` are other
    shares by pattern of names, null to leave a linear as it is.
    """

    sparsity: float = 0.5
    pattern: str = UNSTRUCTURED
    score: str = "alps"
    update: str = "auto"
    scope: str = "auto"
    allocation: str = "uniform"
    spread: float | Auto = "auto"
    damp: float = 0.01
    rounds: int = ROUNDS
    alpha: float | Auto = "auto"
    sink: float | Auto = "auto"
    learn: int = 0
    overrides: Mapping[str, Any] = field(default_factory=dict)

    kind: ClassVar[str] = "prune"

    def __post_init__(self) -> None:
        for key, known in (
            ("score", SCORES),
            ("update", UPDATES),
            ("scope", SCOPES),
            ("allocation", ALLOCATIONS),
        ):
            if (value := getattr(self, key)) not in known:
                raise UsageError(f"prune: unknown {key} {value!r}{did_you_mean(str(value), known)}")
        own = pattern_of(self.pattern, self.sparsity)
        if own.of and self.sparsity not in (0.5, own.sparsity):
            raise UsageError(
                f"prune: pattern {own.name} has a sparsity of {own.sparsity:g}; leave sparsity out"
            )
        if own.of and (self.allocation != "uniform" or any(self.overrides.values())):
            other = "allocation" if self.allocation != "uniform" else "overrides"
            raise UsageError(f"prune: {other}: pattern {own.name} has one share for all; use unstructured")
        if not 0 < self.damp < 1:
            raise UsageError(f"prune: damp must lie between 0 and 1, got {self.damp}")
        if self.spread != "auto" and not (isinstance(self.spread, int | float) and 0 < self.spread < 1):
            raise UsageError(f"prune: spread is auto, or lies between 0 and 1; got {self.spread!r}")
        _check_aim(self)
        _check_scope(self)
        if self.rounds < 1 or self.learn < 0:
            raise UsageError("prune: rounds is a whole number from 1, learn one from 0 upwards")
        for name, share in self.overrides.items():
            if share is not None and not (isinstance(share, int | float) and 0 < share < 1):
                raise UsageError(
                    f"prune: overrides: {name}: a share above 0 and below 1, or null, got {share!r}"
                )

    @property
    def calibrated(self) -> bool:
        """Whether it looks at the calibration tokens."""
        plain = self.score == "magnitude" and self.update in ("auto", "none")
        return not plain or self.learn > 0 or self.allocation != "uniform"

    @property
    def factorised(self) -> bool:
        """Whether it takes Gram matrices apart as GPTQ does."""
        return self.score in ("sparsegpt", "surgeon") or self.update == "sweep"

    @property
    def moves(self) -> bool:
        """Whether the weights that stay become others."""
        return self.update in ("sweep", "refit") or (
            self.update == "auto" and self.score in ("alps", "sparsegpt")
        )

    @property
    def drift(self) -> float:
        """The share of what was lost before that is made up for, once that is decided."""
        return decided(self.alpha)

    @property
    def reach(self) -> float:
        """How far from the mean the share of a linear may lie, once that is decided."""
        return decided(self.spread)

    @property
    def wanted(self) -> Pattern:
        """What all matrices become that no override names."""
        return pattern_of(self.pattern, self.sparsity)

    def made(self, model: Model) -> Pattern:
        """What the model then says of its zeros; with overrides for all linears, the largest share."""
        own = {decides(self.overrides, name) for name in model.linears}
        uneven = self.allocation != "uniform" or self.scope == MODEL or own != {None}
        shares = [self.overrides[pattern] or 0.0 for pattern in own if pattern is not None]
        share = self.wanted.sparsity if None in own else max(shares)
        return replace(self.wanted, sparsity=share, uneven=uneven)

    def resolve(self, model: Model, exports: tuple[str, ...]) -> Prune:
        """The step with its scope and alpha decided; refuses what the model cannot have."""
        if model.arch.refuses is not None:
            raise UnsupportedError(f"{model.folder}: nothing in it can be pruned: {model.arch.refuses}")
        names = matched(self.overrides, model)
        for pattern in self.overrides:
            if not names[pattern]:
                raise UsageError(
                    f"prune: overrides: {pattern}: decides none of the {len(model.linears)} linears, such as "
                    f"{model.linears[0].removesuffix('.weight')}"
                )
        spread = usual_spread(self, model) if self.spread == "auto" else self.spread
        require_no_revival(replace(self, spread=spread), model, names)
        if not any(self._touches(name) for name in model.linears):
            raise UsageError("prune: overrides leave every linear as it is; nothing would be pruned")
        for name in model.linears:
            if self._touches(name):
                require_fitting(self.wanted, model.matrix_shape(name)[1], name)
        # An embedding's few gradients are large in whole rows: over a matrix they would leave rows empty.
        by_row = self.score == "wanda" or (self.score == "taylor" and model.arch.task != "generate")
        scope = ("row" if by_row else "matrix") if self.scope == "auto" else self.scope
        moved = self.score == "alps" and self.moves
        alpha = settled(self.kind, self.alpha, model, LEFT_OUT if moved else 0.0)
        sink = (SINK if moved else 0.0) if self.sink == "auto" else self.sink
        own = {"scope": scope, "sparsity": self.wanted.sparsity, "spread": spread}
        return replace(self, **own, alpha=alpha, sink=sink)

    def outline(self, model: Model) -> Model:
        """The same model, whose zeros later steps keep."""
        return model.with_sparsity(said_of(self.made(model)))

    def apply(self, model: Model, ctx: Context) -> Model:
        """The pruned model, a checkpoint of its own."""
        own = replace(ctx, store=ctx.store.beside(self.kind))
        whole = ctx.whole = whole_of(model, ctx)
        reports = (_walked if self.calibrated else _without_data)(self, model, own, whole)

        def write(folder: Path) -> None:
            _write(self, model, own.store.changed(), folder)

        pruned = load(ctx.made(self.kind, write)).made_from(model)
        options: dict[str, object] = {f.name: getattr(self, f.name) for f in fields(self)}
        tokens = int(ctx.mask.sum()) if self.calibrated else 0
        ctx.reports.append(StepReport(self.kind, options, tuple(reports), tokens))
        ctx.findings += _told(reports, tokens, known=whole is not None)
        ctx.findings += more_zeros(self, model, reports)
        return pruned

    def _touches(self, name: str) -> bool:
        decided = decides(self.overrides, name)
        return decided is None or self.overrides[decided] is not None

    def pattern_for(self, name: str, shares: Mapping[str, float]) -> Pattern | None:
        """What a linear is to become; None where it is left."""
        decided = decides(self.overrides, name)
        if decided is None:
            return replace(self.wanted, sparsity=shares.get(name, self.wanted.sparsity))
        share = self.overrides[decided]
        return None if share is None else Pattern(share)


def _check_aim(step: Prune) -> None:
    """Refuse what weights cannot make up for, and a first position that nothing asks for."""
    check_shares(step.kind, step.alpha, step.sink)
    if step.moves:
        return
    if decided(step.sink) and step.score in ("magnitude", "taylor"):
        raise UsageError(f"prune: sink: {step.score} asks no input what it is worth; use sink: 0")
    if decided(step.alpha):
        raise UsageError(
            "prune: alpha: the weights that stay are not moved, so they make up for nothing; use "
            "update: refit or alpha: 0"
        )


def _check_scope(step: Prune) -> None:
    """Refuse one threshold for the whole model where something else says how many go from each matrix."""
    if step.scope != MODEL:
        return
    plain = {"score": "magnitude", "pattern": UNSTRUCTURED, "allocation": "uniform", "learn": 0}
    for key, one in plain.items():
        if getattr(step, key) != one:
            raise UsageError(f"prune: scope: {MODEL} goes with {key}: {one}, got {getattr(step, key)!r}")
    if step.update not in ("auto", "none"):
        raise UsageError(f"prune: scope: {MODEL} leaves what stays as it is, got update: {step.update}")
    if any(step.overrides.values()):
        raise UsageError(f"prune: scope: {MODEL} has one share for all; overrides can be null alone")


def _pruned_site(
    site: Site,
    step: Prune,
    model: Model,
    shares: Mapping[str, float],
    masks: Mapping[str, Tensor],
    whole: Model | None,
) -> Iterator[tuple[str, Tensor, LayerReport]]:
    """The linears of a site, pruned; those that are to have one pattern together."""
    found: dict[Pattern, list[int]] = {}
    for i, name in enumerate(site.names):
        if (pattern := step.pattern_for(name, shares)) is not None:
            found.setdefault(pattern, []).append(i)
    if not found:
        return
    aim = aim_of(site, alpha=step.drift, sink=decided(step.sink), damp=DAMPED, unread=left_out(site))
    H, goals = aim.objective, aim.matrices
    with naming(site):
        factor = feedback_factor(H, step.damp) if step.factorised else None
    told = {} if factor is None else {"damp": factor.damp, "escalations": factor.escalations}
    told |= {"tokens": site.gram.tokens, **aim.damped(factor.escalations if factor else 0)}
    for pattern, at in found.items():
        names, weights = [site.names[i] for i in at], [goals[i] for i in at]
        there = [there_of(site.weights[i], model) for i in at]
        if step.score == "taylor":
            own = (mask_of(masks, name, len(H)).to(H.device) for name in names)
            pruned = [updated(W, mask, H, step, factor) for W, mask in zip(weights, own, strict=True)]
        else:
            pruned = pruned_matrices(weights, there, H, pattern, step, factor)
        for i, name, W, left, X in zip(at, names, weights, there, pruned, strict=True):
            report = _report(W, X, aim.read, pattern, step, left)
            rival = beside(whole, name, W - site.weights[i], X, aim.read, bits=report.bits_per_weight)
            yield name, X, replace(report, name=name, **told, **rival)


def _walked(step: Prune, model: Model, ctx: Context, whole: Model | None) -> list[LayerReport]:
    """Every linear pruned on what it reads in the model as pruned so far, block by block."""
    judges = judging_windows(ctx.mask)
    learns = step.learn > 0 and bool(judges)
    if step.learn and not judges:
        ctx.findings.append(too_little_to_learn(step.kind, ctx.mask))
    shares, masks = shares_of(step, model, ctx)
    unit, reports = Unit(), [r for path in model.blocks for r in ctx.store.finished(path) or ()]
    require_few_fallbacks(step.kind, reports, len(model.linears))

    def replay(path: str) -> Mapping[str, Tensor] | None:
        if ctx.store.finished(path) is None:
            return None
        changed = ctx.store.changed()
        return {name: changed[name] for name in model.linears_of(path) if name in changed}

    how = {"finished": replay, "beside": learns, "drift": step.drift > 0, "judged": learns}
    for site in walk(model, ctx.input_ids, ctx.mask, **how):
        for name, X, report in _pruned_site(site, step, model, shares, masks, whole):
            site.replaced[name] = X
            unit.changed[name] = X.to(CPU)
            unit.reports.append(report)
        if site.last:
            if site.whole is not None:
                learn_survivors(site, unit, model, steps=step.learn)
            names = model.linears_of(site.block)
            unit.reports.sort(key=lambda report: names.index(report.name))
            ctx.store.keep(site.block, {}, tuple(unit.reports), unit.changed)
            reports += unit.reports
            require_few_fallbacks(step.kind, reports, len(model.linears))
            unit = Unit()
            ctx.progress(model.blocks.index(site.block) + 1, len(model.blocks), site.block)
    return reports


def _without_data(step: Prune, model: Model, ctx: Context, whole: Model | None) -> list[LayerReport]:
    """Every linear pruned by itself, or where one threshold for all cuts it."""
    reports: list[LayerReport] = []
    masks = masks_within(model, step) if step.scope == MODEL else None
    for done, path in enumerate(model.blocks):
        if (kept := ctx.store.finished(path)) is None:
            found = {name: (X, report) for name, X, report in _plainly(step, model, path, masks, whole)}
            kept = tuple(report for _, report in found.values())
            ctx.store.keep(path, {}, kept, {name: X for name, (X, _) in found.items()})
        reports += kept
        ctx.progress(done + 1, len(model.blocks), path)
    return reports


def _plainly(
    step: Prune, model: Model, path: str, masks: MaskOf | None, whole: Model | None
) -> Iterator[tuple[str, Tensor, LayerReport]]:
    """The linears of a block without their smallest weights."""
    for name in model.linears_of(path):
        if (pattern := step.pattern_for(name, {})) is not None:
            W = model.as_stored(name, model.weight(name))
            there = there_of(W, model)
            if masks is None:
                mask = highest(magnitude(W), pattern, cast(Scope, step.scope), there=there)
            else:
                mask = masks(name, W)
            X = W * mask
            report = _report(W, X, None, pattern, step, there)
            rival = beside(whole, name, None, X, None, bits=report.bits_per_weight)
            yield name, X, replace(report, name=name, **rival)


def _report(
    W: Tensor, X: Tensor, H: Tensor | None, pattern: Pattern, step: Prune, there: There
) -> LayerReport:
    """Relative error of a pruned matrix, against that of dropping its smallest weights."""
    scope = cast(Scope, step.scope)
    plain = X != 0 if step.scope == MODEL else about(W.abs(), pattern, scope, there=there)
    zeros = 1 - int(X.count_nonzero()) / X.numel()
    return compared(W, X, H, plain, (zeros, sparse_bits(zeros, W.shape[1])))


def _write(step: Prune, model: Model, pruned: Mapping[str, Tensor], folder: Path) -> None:
    def spec(name: str, entry: Entry) -> TensorSpec:
        if name not in pruned:
            return TensorSpec(entry.name, DTYPES[entry.dtype], entry.shape, lambda: model.kept(name))
        return TensorSpec(entry.name, torch.float32, entry.shape, lambda: model.as_stored(name, pruned[name]))

    specs = [spec(name, entry) for name, entry in model.checkpoint.entries.items()]
    write_safetensors(folder / SINGLE, specs, {"format": "pt"})
    config = config_of_plain(model.folder) | {SPARSITY: said_of(step.made(model))}
    publish_bytes(folder / CONFIG, as_json(config))
    copy_companions(model.folder, folder)


def _told(reports: list[LayerReport], tokens: int, *, known: bool) -> Iterator[Finding]:
    """A dense grid that would do better, and text that shows fewer directions than a matrix has inputs."""
    yield from raised_damping(reports)
    yield from denser(reports, "16-bit weights", known=known)
    if empty := [report for report in reports if report.zeros == 1]:
        said = f"{len(empty)} of {len(reports)} matrices have no weight left"
        yield Finding("matrices-emptied", f"{said}; use scope: matrix, or less sparsity", empty[0].name)
    widest = max(reports, key=lambda r: r.columns)
    if tokens and widest.columns > tokens:
        yield Finding(
            "few-tokens",
            f"{tokens} calibration tokens show at most {tokens} of {widest.columns} directions of its "
            "inputs; the rest is left to the damping: give more text",
            widest.name,
        )
