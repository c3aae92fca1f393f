"""Recipe step `gate`: what each token may leave out as the model runs; weights stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

from pocketsize.data.calibration import Windows
from pocketsize.errors import UnsupportedError, UsageError, did_you_mean
from pocketsize.exporting.table import EXPORTERS
from pocketsize.io.publish import publish_bytes
from pocketsize.measurement.gated import gated_quality
from pocketsize.measurement.measurement import Measurement
from pocketsize.measurement.quality import Quality
from pocketsize.models.gates import NAME, gates_json, has_gates, read_gates, sites
from pocketsize.models.gating import Choice, gauged, settled
from pocketsize.models.model import Model
from pocketsize.models.skipping import Leave, early_exits, skipped_halves
from pocketsize.pruning.gate import CONFIDENCES, KINDS, Gates
from pocketsize.recipes.early import check_exits, settled_exits
from pocketsize.recipes.record import Finding, StepReport
from pocketsize.recipes.step import Auto, Context, Step, first_windows

SCORES, SPREADS = ("sensitivity", "magnitude"), ("global", "uniform")
# Windows that calibrate.
WINDOWS = 16
SAVE, AGREE = 0.25, 0.95
# Options that mean something for some kinds alone, with their defaults.
_OF: dict[str, tuple[tuple[str, ...], object]] = {
    "score": (("inputs", "channels"), "sensitivity"),
    "spread": (("inputs", "channels", "layers"), "global"),
    "head": (("inputs",), True),
    "tokens": (("inputs",), True),
    "agree": (("exit",), None),
    "confidence": (("exit",), "probe"),
    "exits": (("exit",), "auto"),
    "rank": (("exit",), 64),
}


@dataclass(frozen=True, slots=True)
class Gate:
    """Recipe step `gate`: gates by which each token leaves work out while the model runs.

    `skip` is what is left out: `inputs` of linears, `channels` of the feed-forward parts, `layers`
    (attention or feed-forward part of a block), or by `exit` all blocks behind one. `save` is the
    share of all operations that is to be saved on calibration text; `agree`, of exits, the share of tokens
    for which the model must go on saying the same. `score` says what chooses: what leaving out costs
    (`sensitivity`) or `magnitude` alone; `spread` whether places that can spare more save more (`global`) or
    all alike (`uniform`); `head` whether the head's inputs have gates too, `tokens` whether
    tokens that have less to lose leave out more. Exits lie behind the blocks
    `exits` (from 0), ask for `confidence`, and foretell the last block's output by a map of `rank` (0: none).
    """

    skip: str = "inputs"
    save: float | None = None
    agree: float | None = None
    score: str = "sensitivity"
    spread: str = "global"
    head: bool = True
    tokens: bool = True
    confidence: str = "probe"
    exits: tuple[int, ...] | Auto = "auto"
    rank: int = 64

    kind: ClassVar[str] = "gate"
    calibrated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.exits, list):
            object.__setattr__(self, "exits", tuple(self.exits))
        choices = {"skip": KINDS, "score": SCORES, "spread": SPREADS, "confidence": CONFIDENCES}
        for name, known in choices.items():
            if (said := getattr(self, name)) not in known:
                raise UsageError(f"gate: unknown {name} {said!r}{did_you_mean(said, known)}")
        for name, (kinds, default) in _OF.items():
            if self.skip not in kinds and getattr(self, name) != default:
                raise UsageError(f"gate: {name} is for skip: {' or '.join(kinds)}, not for {self.skip}")
        if self.save is not None and not 0 < self.save < 1:
            raise UsageError(
                f"gate: save is the share of operations to be saved, above 0 and below 1; got {self.save:g}"
            )
        if self.agree is not None and not 0 < self.agree <= 1:
            raise UsageError(f"gate: agree is a share of tokens, above 0 and at most 1; got {self.agree:g}")
        if self.save is not None and self.agree is not None:
            raise UsageError("gate: save and agree each decide how sure a token must be; give one of them")
        if self.score == "magnitude" and self.spread == "global":
            raise UsageError(
                "gate: magnitudes of different places cannot be compared; use score: magnitude with "
                "spread: uniform"
            )
        if self.rank < 0:
            raise UsageError(f"gate: rank must be 0 (none) or more, got {self.rank}")
        check_exits(self.exits, self.kind)

    def resolve(self, model: Model, exports: tuple[str, ...]) -> Gate:
        """The step with its aim and its exits decided; refuses what cannot have gates, or keep them."""
        sites(model, self.skip)
        if not any(EXPORTERS[name].is_folder for name in exports):
            raise UnsupportedError(
                f"gate: {exports[0]} has no place for gates, and its runtimes have none; export a folder too"
            )
        step = self
        if self.save is None and self.agree is None:
            step = replace(step, agree=AGREE) if self.skip == "exit" else replace(step, save=SAVE)
        if self.skip != "exit":
            return step
        return replace(step, exits=settled_exits(self.exits, model, self.kind))

    def outline(self, model: Model) -> Model:
        """The same model: gates change no weight."""
        return model

    def apply(self, model: Model, ctx: Context) -> Model:
        """The same model; its gates lie beside, and go into the output."""

        def write(folder: Path) -> None:
            told = {name: value for name, value in asdict(self).items() if value is not None}
            publish_bytes(folder / NAME, gates_json(model, self._gates(model, ctx), told))

        ctx.beside[NAME] = ctx.made("gate", write) / NAME
        tokens = int(first_windows(ctx, WINDOWS)[1].sum())
        ctx.reports.append(StepReport(self.kind, asdict(self), tokens=tokens))
        ctx.progress(1, 1, f"gates of kind {self.skip}")
        ctx.findings.append(
            Finding(
                "gates-apart",
                f"the gates in {NAME} work in `pocketsize measure` and in Python (`gated`); transformers, "
                "llama.cpp and other runtimes run the whole model",
            )
        )
        return model

    def _gates(self, model: Model, ctx: Context) -> Gates:
        ids, mask = first_windows(ctx, WINDOWS)
        if self.skip == "exit":
            assert self.exits != "auto"
            leave = Leave(self.exits, self.confidence, self.save, self.agree, self.rank)
            return early_exits(model, ids, mask, leave)
        save = self.save or SAVE
        if self.skip == "layers":
            return skipped_halves(model, ids, mask, save=save, spread=self.spread)
        (places,) = gauged(
            model, [Choice(self.skip, self.score, self.head, self.tokens)], ids, mask, seed=ctx.seed
        )
        return settled(model, self.skip, places, save=save, length=ids.shape[1], spread=self.spread)


def gates_before(model: Model, steps: Sequence[Step]) -> Iterator[Finding]:
    """A finding for gates of the model that the output will not have: they were made for its weights."""
    if has_gates(model.folder) and not any(isinstance(step, Gate) for step in steps):
        said = f"the model's {NAME} is left behind, as it was made for the weights as they were"
        yield Finding("gates-dropped", f"{said}; the step gate makes new ones")


def gates_lose(measured: Sequence[Measurement]) -> Iterator[Finding]:
    """A finding for gates that ask for more operations than they leave out."""
    for one in measured:
        if one.name == "operations_saved" and one.value <= 0:
            more = f"take {-one.value:.1%} more operations than" if one.value else "save nothing of"
            said = f"on held-out text the gates {more} the whole model; leave them out, or ask for others"
            yield Finding("gates-lose", said, "")


def with_gates(quality: Quality, model: Model, beside: Mapping[str, Path], windows: Windows) -> Quality:
    """What was measured, and what the model keeps with the gates that lie beside it, if any do."""
    if NAME not in beside:
        return quality
    own = gated_quality(model, read_gates(model, beside[NAME]), windows, seed=0)
    said = dict.fromkeys((*quality.protocol, *own.protocol))
    return Quality((*quality.measurements, *own.measurements), tuple(said))
