"""Recipe step `oats`: every linear as the sum of a sparse matrix and one of low rank."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from pocketsize.errors import UnsupportedError, UsageError
from pocketsize.exporting.companions import copy_companions
from pocketsize.exporting.plain import CONFIG, as_json, config_of_plain
from pocketsize.io.checkpoint import DTYPES, SINGLE, TensorSpec, write_safetensors
from pocketsize.io.publish import publish_bytes
from pocketsize.models.device import CPU
from pocketsize.models.load import load
from pocketsize.models.model import SPARSITY, Model
from pocketsize.models.packing import sparse_said
from pocketsize.models.walk import walk
from pocketsize.pruning.bitmask import bits_of_rows, row_offsets
from pocketsize.pruning.mask import about, require_fitting
from pocketsize.pruning.oats import ROUNDS, most_sparse, oats, split
from pocketsize.pruning.pattern import UNSTRUCTURED, Pattern, pattern_of, said_of
from pocketsize.recipes.correct import DAMPED, SINK, aim_of, check_shares, decided, settled
from pocketsize.recipes.fallbacks import raised_damping
from pocketsize.recipes.record import LayerReport, StepReport
from pocketsize.recipes.rival import beside, compared, denser, sparse_bits, whole_of
from pocketsize.recipes.step import Auto, Context

LEFT, RIGHT = "left", "right"


@dataclass(frozen=True, slots=True)
class Oats:
    """Recipe step `oats`: W becomes S + A B, S sparse and A B of low rank.

    Both parts together hold all but the share `sparsity` of the numbers, of which the share `rank` is in A
    and B; with an n:m `pattern` S has that and A B comes on top. `rounds` are the turns that S and A B take,
    `damp` is the damping with which what S has is refit in the end. `alpha` and `sink` are those of `prune`:
    what was lost before that is made up for, and what the first position counts. The export `sparse` stores
    the parts, others their sum.
    """

    sparsity: float = 0.5
    pattern: str = UNSTRUCTURED
    rank: float = 0.25
    rounds: int = ROUNDS
    damp: float = 0.01
    alpha: float | Auto = "auto"
    sink: float = SINK

    kind: ClassVar[str] = "oats"
    calibrated: ClassVar[bool] = True
    # What a step that prunes has beside, for what is told before a run.
    score: ClassVar[str] = "oats"
    allocation: ClassVar[str] = "uniform"
    learn: ClassVar[int] = 0

    def __post_init__(self) -> None:
        pattern_of(self.pattern, self.sparsity)
        if not 0 < self.rank < 1:
            raise UsageError(f"oats: rank is a share above 0 and below 1, got {self.rank}")
        if self.rounds < 1:
            raise UsageError(f"oats: rounds must be at least 1, got {self.rounds}")
        if not 0 < self.damp < 1:
            raise UsageError(f"oats: damp must lie between 0 and 1, got {self.damp}")
        check_shares(self.kind, self.alpha, self.sink)

    @property
    def drift(self) -> float:
        """The share of what was lost before that is made up for, once that is decided."""
        return decided(self.alpha)

    def resolve(self, model: Model, exports: tuple[str, ...]) -> Oats:
        """The step with its alpha decided; refuses what the model cannot have."""
        if model.arch.refuses is not None:
            raise UnsupportedError(f"{model.folder}: nothing in it can be pruned: {model.arch.refuses}")
        if model.pattern is not None:
            raise UnsupportedError(
                f"oats: of the model's weights {model.pattern.sparsity:g} are zero and stay so, and a sum "
                "with what has a low rank has none; use step prune, or the model from before it was pruned"
            )
        pattern = pattern_of(self.pattern, self.sparsity)
        for name in model.linears:
            require_fitting(pattern, model.matrix_shape(name)[1], name)
        if not pattern.of:
            _require_room(pattern.sparsity, model)
        alpha = settled(self.kind, self.alpha, model)
        return replace(self, sparsity=pattern.sparsity, alpha=alpha)

    def outline(self, model: Model) -> Model:
        """The same model, whose linears are sums."""
        return model.with_sparsity(self._said())

    def parts(self, rows: int, columns: int) -> tuple[int, Pattern]:
        """The rank of A B, and what S must look like, for a matrix of this shape."""
        wanted = pattern_of(self.pattern, self.sparsity)
        rank, sparsity = split(rows, columns, wanted.sparsity, self.rank)
        return rank, wanted if wanted.of else Pattern(sparsity)

    def apply(self, model: Model, ctx: Context) -> Model:
        """The model with its linears as sums, a checkpoint of its own."""
        own = replace(ctx, store=ctx.store.beside(self.kind))
        whole = whole_of(model, ctx)
        reports = self._walked(model, own, whole)
        made = load(ctx.made(self.kind, partial(self._write, model, own.store.changed()))).made_from(model)
        options: dict[str, object] = {f.name: getattr(self, f.name) for f in fields(self)}
        ctx.reports.append(StepReport(self.kind, options, tuple(reports), int(ctx.mask.sum())))
        what, known = "sparse and low-rank parts", whole is not None
        ctx.findings += [*raised_damping(reports), *denser(reports, what, known=known)]
        return made

    def _walked(self, model: Model, ctx: Context, whole: Model | None) -> list[LayerReport]:
        kept, reports = ctx.store.changed(), [r for p in model.blocks for r in ctx.store.finished(p) or ()]

        def replay(path: str) -> Mapping[str, Tensor] | None:
            if ctx.store.finished(path) is None:
                return None
            return {n: kept[n] + kept[f"{n}.{LEFT}"] @ kept[f"{n}.{RIGHT}"] for n in model.linears_of(path)}

        unit: dict[str, Tensor] = {}
        told: list[LayerReport] = []
        for site in walk(model, ctx.input_ids, ctx.mask, finished=replay, drift=self.drift > 0):
            unread = "use step prune, whose overrides can leave it as it is"
            aim = aim_of(site, alpha=self.drift, sink=self.sink, damp=DAMPED, unread=unread)
            H, told_of = aim.objective, {"tokens": site.gram.tokens, **aim.damped(0)}
            for i, (name, W) in enumerate(zip(site.names, aim.matrices, strict=True)):
                rank, pattern = self.parts(*W.shape)
                S, left, right = oats(W, H, pattern, rank, scope="matrix", damp=self.damp, rounds=self.rounds)
                site.replaced[name] = X = S + left @ right
                unit |= {name: S.to(CPU), f"{name}.{LEFT}": left.to(CPU), f"{name}.{RIGHT}": right.to(CPU)}
                report, moved = _report(W, aim.read, S, left, right), W - site.weights[i]
                rival = beside(whole, name, moved, X, aim.read, bits=report.bits_per_weight)
                told.append(replace(report, name=name, **told_of, **rival))
            if site.last:
                ctx.store.keep(site.block, {}, tuple(told), unit)
                reports += told
                unit, told = {}, []
                ctx.progress(model.blocks.index(site.block) + 1, len(model.blocks), site.block)
        return reports

    def _write(self, model: Model, parts: Mapping[str, Tensor], folder: Path) -> None:
        """A folder of what is not zero and the factors, float32."""
        specs: list[TensorSpec] = []
        for name, entry in model.checkpoint.entries.items():
            if name not in parts:
                keep = partial(model.kept, name)
                specs.append(TensorSpec(entry.name, DTYPES[entry.dtype], entry.shape, keep))
                continue
            owner = entry.name.removesuffix(".weight")
            S = model.as_stored(name, parts[name])
            mask = S != 0
            found = {
                "shape": torch.tensor(S.shape),
                "bitmask": bits_of_rows(mask),
                "compressed": S[mask],
                "row_offsets": row_offsets(mask),
                LEFT: parts[f"{name}.{LEFT}"],
                RIGHT: parts[f"{name}.{RIGHT}"],
            }
            specs += [
                TensorSpec(f"{owner}.{p}", T.dtype, tuple(T.shape), lambda T=T: T) for p, T in found.items()
            ]
        write_safetensors(folder / SINGLE, specs, {"format": "pt"})
        said = self._said()
        config = config_of_plain(model.folder) | {SPARSITY: said, **sparse_said(said)}
        publish_bytes(folder / CONFIG, as_json(config))
        copy_companions(model.folder, folder)

    def _said(self) -> dict[str, object]:
        return said_of(pattern_of(self.pattern, self.sparsity)) | {"rank": self.rank}


def _require_room(sparsity: float, model: Model) -> None:
    """Refuse to keep fewer numbers than a matrix needs for factors of rank 1."""
    shapes = {name: model.matrix_shape(name) for name in model.linears}
    name = min(shapes, key=lambda name: most_sparse(*shapes[name]))
    rows, columns = shapes[name]
    if sparsity > (most := most_sparse(rows, columns)):
        raise UnsupportedError(
            f"oats: sparsity {sparsity:g} leaves {round((1 - sparsity) * rows * columns)} numbers of {name}, "
            f"and factors of rank 1 have {rows + columns}; use at most {math.floor(1e4 * most) / 1e4:g}, "
            "or step prune"
        )


def _report(W: Tensor, H: Tensor, S: Tensor, left: Tensor, right: Tensor) -> LayerReport:
    """The error of the sum, against that of dropping as many of the smallest weights as numbers are gone."""
    zeros = 1 - int(S.count_nonzero()) / S.numel()
    factors = (left.numel() + right.numel()) / W.numel()
    plain = about(W.abs(), Pattern(max(zeros - factors, 1 / W.numel())))
    bits = sparse_bits(zeros, W.shape[1]) + 16 * factors
    return compared(W, S + left @ right, H, plain, (zeros, bits))
