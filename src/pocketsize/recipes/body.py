"""Recipe step `layers`: a student that is its teacher with some of the blocks left out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pocketsize.distillation.feature import even_blocks
from pocketsize.errors import UsageError, did_you_mean
from pocketsize.exporting.companions import copy_companions
from pocketsize.exporting.plain import CONFIG, as_json
from pocketsize.io.publish import publish_bytes
from pocketsize.io.strictjson import read_json_object
from pocketsize.models.depth import shortened_config, with_blocks
from pocketsize.models.influence import block_influence
from pocketsize.models.model import Model
from pocketsize.recipes.record import StepReport
from pocketsize.recipes.step import Context

PICKS = ("even", "influence")
# Which blocks were kept, beside the config of the shorter model.
_CHOICE = "blocks.json"
# Windows that tell how much each block changes.
WINDOWS = 16


@dataclass(frozen=True, slots=True)
class Layers:
    """Recipe step `layers`: keep some of the blocks, leave the others out.

    `keep` is how many blocks stay, or the numbers of those that stay, from 0. `pick` says which, where a
    number is given: `even` spreads them, the first and the last always among them; `influence` leaves out
    those that change least what passes through them, the first and the last excepted.
    """

    keep: int | tuple[int, ...] = 0
    pick: str = "even"

    kind: ClassVar[str] = "layers"
    calibrated: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", tuple(self.keep) if isinstance(self.keep, list) else self.keep)
        if self.pick not in PICKS:
            raise UsageError(f"layers: unknown pick {self.pick!r}{did_you_mean(self.pick, PICKS)}")
        if isinstance(self.keep, tuple):
            whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in self.keep)
            if not self.keep or not whole or list(self.keep) != sorted({*self.keep}):
                raise UsageError(
                    f"layers: keep lists numbers of blocks, rising, each once; got {list(self.keep)}"
                )
        elif self.keep < 1:
            raise UsageError(
                f"layers: keep is how many blocks stay, at least 1, or a list of them; got {self.keep}"
            )

    def resolve(self, model: Model, exports: tuple[str, ...]) -> Layers:
        """The step itself; refuses to keep what the model has not."""
        count = len(model.blocks)
        most = self.keep[-1] + 1 if isinstance(self.keep, tuple) else self.keep
        if most > count:
            told = f"block {most - 1}" if isinstance(self.keep, tuple) else f"{most} blocks"
            raise UsageError(f"layers: keep asks for {told}; the model has {count} (from 0)")
        if (len(self.keep) if isinstance(self.keep, tuple) else self.keep) == count:
            raise UsageError(f"layers: keep {self.keep} leaves nothing out: the model has {count} blocks")
        return self

    def outline(self, model: Model) -> Model:
        """A model with as many blocks."""
        return with_blocks(model, self._even(len(model.blocks)))

    def apply(self, model: Model, ctx: Context) -> Model:
        """The shorter model; its tensors stay in the checkpoint of the longer one."""

        def write(folder: Path) -> None:
            kept, influence = self._chosen(model, ctx)
            publish_bytes(folder / _CHOICE, json.dumps({"kept": kept, "influence": influence}).encode())
            publish_bytes(folder / CONFIG, as_json(_config(model, kept)))
            copy_companions(model.folder, folder)

        folder = ctx.made("layers", write)
        choice: Mapping[str, Any] = json.loads((folder / _CHOICE).read_bytes())
        options: dict[str, object] = {"keep": self.keep, "pick": self.pick, **choice}
        ctx.reports.append(StepReport(self.kind, options))
        ctx.progress(1, 1, f"{len(choice['kept'])} of {len(model.blocks)} blocks")
        return with_blocks(model, choice["kept"], folder)

    def _even(self, count: int) -> tuple[int, ...]:
        return self.keep if isinstance(self.keep, tuple) else even_blocks(self.keep, count)

    def _chosen(self, model: Model, ctx: Context) -> tuple[list[int], list[float]]:
        """The numbers of the blocks that stay, and the influence of all of them where that was asked."""
        if isinstance(self.keep, tuple) or self.pick == "even":
            return list(self._even(len(model.blocks))), []
        influence = block_influence(model, ctx.input_ids[:WINDOWS], ctx.mask[:WINDOWS])
        last = len(influence) - 1
        first = [0, last][: self.keep]
        inner = sorted(range(1, last), key=lambda i: -influence[i])[: self.keep - len(first)]
        return sorted([*first, *inner]), influence


def _config(model: Model, kept: list[int]) -> dict[str, Any]:
    """The config of the shorter model; which class loads it stays what it was."""
    original = read_json_object(model.folder / CONFIG)
    return shortened_config(model.config, kept) | {"architectures": original.get("architectures")}
