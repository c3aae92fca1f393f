"""Recipe step `layers`: a student that is its teacher with some of the blocks left out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from pocketsize.distillation.feature import even_blocks
from pocketsize.errors import UnsupportedError, UsageError, did_you_mean
from pocketsize.exporting.companions import copy_companions
from pocketsize.exporting.plain import CONFIG, as_json
from pocketsize.io.checkpoint import SINGLE, TensorSpec, write_safetensors
from pocketsize.io.publish import publish_bytes
from pocketsize.io.strictjson import read_json_object
from pocketsize.models.depth import shortened_config, with_blocks
from pocketsize.models.influence import block_influence
from pocketsize.models.left_out import least_missed
from pocketsize.models.load import load
from pocketsize.models.lockstep import Pair
from pocketsize.models.model import Model
from pocketsize.models.taylor import block_costs
from pocketsize.recipes import heal as healing
from pocketsize.recipes.record import Stage, StepReport
from pocketsize.recipes.step import Auto, Context, first_windows

PICKS = ("even", "influence", "taylor", "kl")
# Which blocks were kept, beside the config of the shorter model.
_CHOICE = "blocks.json"
# Windows that tell how much each block changes, those of them that gradients are taken on, and tokens that
# every model reads which lacks a part.
WINDOWS, GRADED = 16, 8
MEASURED = 1024


@dataclass(frozen=True, slots=True)
class Layers:
    """Recipe step `layers`: keep some of the blocks, leave the others out.

    `keep` is how many blocks stay, or the numbers of those that stay, from 0; or `remove` is the share of
    the blocks that goes. `pick` says which stay, where none are named: `even` spreads them, the first and
    the last always among them; `influence` leaves out those that change least what passes through them,
    the first and the last excepted; `taylor` those whose weights cost least to first order; `kl` one after
    the other that which is missed least, measured. `heal`: what is left is solved anew to make up for what
    is gone, and that is kept if it helps; `auto` wherever it is known how.
    """

    keep: int | tuple[int, ...] | None = None
    pick: str = "even"
    remove: float | None = None
    heal: bool | Auto = "auto"

    kind: ClassVar[str] = "layers"
    calibrated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(self.keep) if isinstance(self.keep, list) else self.keep)
        if self.pick not in PICKS:
            raise UsageError(f"layers: unknown pick {self.pick!r}{did_you_mean(self.pick, PICKS)}")
        if self.heal not in (True, False, "auto"):
            raise UsageError(f"layers: heal is auto, true or false, got {self.heal!r}")
        if (self.keep is None) == (self.remove is None):
            given = "only one of both" if self.remove is not None else "one of both"
            raise UsageError(
                f"layers: keep is how many blocks stay, remove the share that goes; give {given}"
            )
        if self.remove is not None and not 0 < self.remove < 1:
            raise UsageError(f"layers: remove is a share between 0 and 1, got {self.remove}")
        if isinstance(self.keep, tuple):
            whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in self.keep)
            if not self.keep or not whole or list(self.keep) != sorted({*self.keep}):
                raise UsageError(
                    f"layers: keep lists numbers of blocks, rising, each once; got {list(self.keep)}"
                )
        elif self.keep is not None and self.keep < 1:
            raise UsageError(
                f"layers: keep is how many blocks stay, at least 1, or a list of them; got {self.keep}"
            )

    def resolve(self, model: Model, exports: tuple[str, ...]) -> Layers:
        """The step with a number of blocks; refuses to keep what the model has not, and to keep nothing."""
        count = len(model.blocks)
        keep = self.keep if self.remove is None else _kept(self.remove, count)
        assert keep is not None
        most = keep[-1] + 1 if isinstance(keep, tuple) else keep
        if most > count:
            told = f"block {most - 1}" if isinstance(keep, tuple) else f"{most} blocks"
            raise UsageError(f"layers: keep asks for {told}; the model has {count} (from 0)")
        if (len(keep) if isinstance(keep, tuple) else keep) == count:
            raise UsageError(f"layers: keep {keep} leaves nothing out: the model has {count} blocks")
        if self.pick == "taylor" and (why := healing.beyond(model, self.kind)):
            raise UnsupportedError(f"layers: pick: taylor: {why}, so gradients do not tell; use pick: kl")
        return replace(self, keep=keep, remove=None, heal=healing.chosen(self.heal, model, self.kind))

    def outline(self, model: Model) -> Model:
        """A model with as many blocks."""
        return with_blocks(model, self._even(len(model.blocks)))

    def apply(self, model: Model, ctx: Context) -> Model:
        """The shorter model; unless it was healed its tensors stay in the checkpoint of the longer one."""
        folder = ctx.made("layers", partial(self._write, model, ctx))
        choice: Mapping[str, Any] = json.loads((folder / _CHOICE).read_bytes())
        stages = tuple(Stage(**one) for one in choice["stages"])
        told = {name: choice[name] for name in ("kept", "influence")}
        options: dict[str, object] = {"keep": self.keep, "pick": self.pick, "heal": self.heal, **told}
        ctx.reports.append(StepReport(self.kind, options, stages=stages))
        ctx.findings += healing.findings_of(stages, self.kind) + healing.unhealed(model, self.kind)
        ctx.progress(1, 1, f"{len(choice['kept'])} of {len(model.blocks)} blocks")
        short = with_blocks(model, choice["kept"], folder)
        if not (folder / SINGLE).is_file():
            return short
        return replace(short, checkpoint=load(folder).checkpoint, changed={})

    def _write(self, model: Model, ctx: Context, folder: Path) -> None:
        kept, influence = self._chosen(model, ctx)
        short, found = with_blocks(model, kept), healing.Healing()
        if healing.chosen(self.heal, model, self.kind):
            found = healing.heal(Pair(model, short, tuple(kept)), ctx, self.kind)
        publish_bytes(folder / CONFIG, as_json(_config(model, kept)))
        copy_companions(model.folder, folder)
        if found.tensors:
            healed = replace(short, changed=found.tensors)
            specs = [
                TensorSpec(entry.name, torch.float32, entry.shape, partial(healed.weight, name))
                for name, entry in short.checkpoint.entries.items()
            ]
            write_safetensors(folder / SINGLE, specs, {"format": "pt"})
        told = {"kept": kept, "influence": influence, "stages": [asdict(one) for one in found.stages]}
        publish_bytes(folder / _CHOICE, json.dumps(told).encode())

    def _even(self, count: int) -> tuple[int, ...]:
        keep = self.keep if self.remove is None else _kept(self.remove, count)
        assert keep is not None
        return keep if isinstance(keep, tuple) else even_blocks(keep, count)

    def _chosen(self, model: Model, ctx: Context) -> tuple[list[int], list[float]]:
        """The numbers of the blocks that stay, and the influence of all of them where that was asked."""
        even = self._even(len(model.blocks))
        if isinstance(self.keep, tuple) or self.pick == "even":
            return list(even), []
        count = len(even)
        ids, mask = first_windows(ctx, WINDOWS)
        if self.pick == "kl":
            return least_missed(model, *measured_windows(ctx), count)
        if self.pick == "taylor":
            costs = block_costs(model, *first_windows(ctx, GRADED), seed=ctx.seed)
            return sorted(_highest(costs, count)), costs
        influence = block_influence(model, ids, mask)
        ends = [0, len(influence) - 1][:count]
        ranked = [i for i in _highest(influence, len(influence)) if i not in (0, len(influence) - 1)]
        return sorted([*ends, *ranked[: count - len(ends)]]), influence


def measured_windows(ctx: Context) -> tuple[Int64[Tensor, "n length"], Bool[Tensor, "n length"]]:
    """The text on which KL without a part is measured: so many tokens, at most as many windows."""
    return first_windows(ctx, min(WINDOWS, max(1, MEASURED // ctx.input_ids.shape[1])))


def _highest(values: Sequence[float], count: int) -> list[int]:
    """The places of the highest values; of equal ones the first."""
    return sorted(range(len(values)), key=lambda i: -values[i])[:count]


def _kept(remove: float, count: int) -> int:
    """How many blocks stay once a share is gone; none and all are refused."""
    gone = round(remove * count)
    if not 0 < gone < count:
        what = "all" if gone else "none"
        least, most = (f"{share:.3g}" for share in (1 / count, 1 - 1 / count))
        way = f"use {least}" if least == most else f"use {least} to {most}"
        raise UsageError(f"layers: remove: {remove:g} of {count} blocks is {what} of them; {way}")
    return count - gone


def _config(model: Model, kept: list[int]) -> dict[str, Any]:
    """The config of the shorter model; which class loads it stays what it was."""
    original = read_json_object(model.folder / CONFIG)
    return shortened_config(model.config, kept) | {"architectures": original.get("architectures")}
