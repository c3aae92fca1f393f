"""Recipe step `rotate`: the same model with other matrices, whose weights stand out less."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import ClassVar

from pocketsize.errors import UnsupportedError, UsageError
from pocketsize.exporting.companions import copy_companions
from pocketsize.exporting.plain import CONFIG, as_json, config_of_plain
from pocketsize.io.checkpoint import DTYPES, SINGLE, TensorSpec, write_safetensors
from pocketsize.io.publish import publish_bytes
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.models.rotated import rotated
from pocketsize.recipes.distill import Distill
from pocketsize.recipes.grids import Quantizer
from pocketsize.recipes.record import Finding, StepReport
from pocketsize.recipes.step import Context, Step


@dataclass(frozen=True, slots=True)
class Rotate:
    """Recipe step `rotate`: vectors between matrices are turned, and matrices with them.

    `values` turns what attention reads of each head (R2), `residual` what passes from block to block (R1):
    the gains of norms move into the matrices behind them, and a head that was the embedding becomes a matrix
    of its own. `seed` draws the signs of the rotations. The model computes what it did.
    """

    values: bool = True
    residual: bool = False
    seed: int = 0

    kind: ClassVar[str] = "rotate"
    calibrated: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.values and not self.residual:
            raise UsageError("rotate: values and residual are both false; turn one of them, or leave it out")
        if self.seed < 0:
            raise UsageError(f"rotate: seed must be a whole number from 0 upwards, got {self.seed}")

    def resolve(self, model: Model, exports: tuple[str, ...]) -> Rotate:
        """The step as it is; refuses a family that does not let a rotation through, and pruned models."""
        if model.pattern is not None or model.low_rank:
            raise UnsupportedError(
                f"{model.folder}: rotate: turned matrices have no zeros where those of a pruned model lie; "
                "rotate first, then prune"
            )
        self.outline(model)
        return self

    def outline(self, model: Model) -> Model:
        """The turned model; its tensors are turned when they are read."""
        return rotated(model, values=self.values, residual=self.residual, seed=self.seed)

    def apply(self, model: Model, ctx: Context) -> Model:
        """The turned model, a checkpoint of its own."""
        turned = load(ctx.made(self.kind, partial(self._write, model))).made_from(model)
        if ctx.original is model:  # what learns from it finds its vectors turned alike
            ctx.original = turned
        options: dict[str, object] = {f.name: getattr(self, f.name) for f in fields(self)}
        ctx.reports.append(StepReport(self.kind, options))
        if turned.tied != model.tied:
            own = math.prod(turned.checkpoint.entries[str(turned.arch.head)].shape)
            said = f"the head was the embedding; now it is a matrix of its own, {own / 1e6:.1f}M weights more"
            ctx.findings.append(Finding("head-apart", said, str(turned.arch.head)))
        ctx.progress(1, 1, " and ".join(name for name in ("values", "residual") if getattr(self, name)))
        return turned

    def _write(self, model: Model, folder: Path) -> None:
        turned = self.outline(model)
        specs = [
            TensorSpec(entry.name, DTYPES[entry.dtype], entry.shape, partial(turned.kept, name))
            for name, entry in turned.checkpoint.entries.items()
        ]
        write_safetensors(folder / SINGLE, specs, {"format": "pt"})
        untied = {} if turned.tied == model.tied else {"tie_word_embeddings": False}
        publish_bytes(folder / CONFIG, as_json(config_of_plain(model.folder) | untied))
        copy_companions(model.folder, folder)


def check_turns(steps: Sequence[Step]) -> None:
    """Refuse steps that would hold a turned model against one that is not."""
    at = next((i for i, step in enumerate(steps) if isinstance(step, Rotate)), len(steps))
    later = [step for step in steps[at + 1 :] if not isinstance(step, Quantizer)]
    if at and later:
        raise UsageError(
            f"steps: {later[0].kind} after rotate looks back at the model that the run began with, which is "
            "not turned; put rotate first, or right before what quantizes"
        )
    for step in later:
        inside = isinstance(step, Distill) and (step.hidden or step.cosine or step.progressive)
        if isinstance(step, Distill) and step.names and inside:
            raise UsageError(
                f"steps: {step.kind}: hidden states of {step.names[0]} are not turned as its student's are; "
                "leave teacher out for the original, or hidden, cosine and progressive at 0"
            )
