"""What a recipe step is, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Literal, Protocol, runtime_checkable

from jaxtyping import Bool, Int64
from torch import Tensor

from pocketsize.data.text import Corpus
from pocketsize.distributed.world import Solo, World
from pocketsize.io.publish import scratch
from pocketsize.models.batches import worth
from pocketsize.models.model import Model
from pocketsize.quantization.grid import QWeight
from pocketsize.recipes.record import Finding, LayerReport, StepReport
from pocketsize.training.loop import Keeper

# What a key says that leaves its value to the step.
Auto = Literal["auto"]


@dataclass(slots=True)
class Unit:
    """What a block has so far: quantized weights, what is told of them, and tensors with new values."""

    weights: dict[str, QWeight] = field(default_factory=dict)
    reports: list[LayerReport] = field(default_factory=list)
    changed: dict[str, Tensor] = field(default_factory=dict)


class Place(Protocol):
    """A folder for work that checks by itself what of it is done."""

    @property
    def folder(self) -> Path:
        """Where it lies; gone once the run is finished."""
        ...

    def safe_point(self, where: str) -> None:
        """A moment at which everything is durable; a stop that was asked for happens here."""
        ...


class Store(Protocol):
    """Where a step keeps what it has finished, so that it survives the process."""

    def keep(
        self,
        key: str,
        weights: Mapping[str, QWeight],
        reports: tuple[LayerReport, ...],
        changed: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Make the finished unit `key` durable: its quantized weights, and vectors that it changed."""
        ...

    def finished(self, key: str) -> tuple[LayerReport, ...] | None:
        """The reports of a unit that is durable already, else None."""
        ...

    def weights(self) -> Mapping[str, QWeight]:
        """All weights kept so far, read when asked for."""
        ...

    def changed(self) -> Mapping[str, Tensor]:
        """All changed tensors kept so far, read when asked for."""
        ...

    def beside(self, name: str) -> Store:
        """A store of its own, as durable, for a stage whose outcome may be dropped."""
        ...

    def made(self, key: str, write: Callable[[Path], None], findings: list[Finding]) -> Path:
        """The folder with this name, which `write` filled, now or before the process was cut off.

        What it then added to `findings` is added either way.
        """
        ...

    def course(self, key: str) -> Keeper:
        """Where the checkpoints of a training are kept."""
        ...

    def place(self, key: str) -> Place:
        """A folder for work that checks by itself what of it is done."""
        ...


@dataclass(slots=True)
class Context:
    """What the steps of one run share: calibration tokens, the store, and where findings go.

    `progress(done, total, what)` is told of each finished unit. `original` is the model that the run
    began with (turned, where `rotate` is its first step), `classifier` one that a step made of it, `whole`
    the one before its first weights were pruned, `corpus` the text that trainings read, `seed` what they
    draw by. `world` are the processes that train together.
    `beside` are files that go into the output beside the weights, by name. `own` are windows that the model
    wrote, unless a text that trains was named: some of them calibrate, and they are half or so of what
    teaches `qat`.
    """

    input_ids: Int64[Tensor, "n length"]
    mask: Bool[Tensor, "n length"]
    store: Store
    progress: Callable[[int, int, str], None]
    findings: list[Finding] = field(default_factory=list)
    reports: list[StepReport] = field(default_factory=list)
    original: Model | None = None
    classifier: Model | None = None
    whole: Model | None = None
    corpus: Corpus | None = None
    seed: int = 0
    world: World = field(default_factory=Solo)
    beside: dict[str, Path] = field(default_factory=dict)
    own: Int64[Tensor, "n length"] | None = None

    def made(self, key: str, write: Callable[[Path], None], *, together: bool = False) -> Path:
        """The folder with this name, which `write` fills in the first process; in all of them if `together`.

        What the others write is thrown away: they are there for their share of the work.
        """
        if self.world.rank == 0:
            self.world.told(self.store.finished(key) is None)
            return Path(self.world.told(str(self.store.made(key, write, self.findings))))
        if self.world.told(False) and together:
            with scratch("together") as folder:
                write(folder)
        return Path(self.world.told(""))


@dataclass(frozen=True, slots=True)
class Ahead:
    """What is known of a run before its first step.

    `teacher` is who teaches where a step names nobody, `corpus` the text that trainings read. `unknown`: a
    step before makes tokens or weights that only its work tells. `own`: the model writes text as well.
    """

    teacher: Model
    corpus: Corpus
    seed: int
    unknown: bool = False
    own: bool = False


def first_windows(ctx: Context, count: int) -> tuple[Int64[Tensor, "n length"], Bool[Tensor, "n length"]]:
    """The first calibration windows and their mask: so many full ones, or shorter ones of as many tokens."""
    rows = worth(ctx.mask, count)
    return ctx.input_ids[:rows], ctx.mask[:rows]


@runtime_checkable
class Step(Protocol):
    """A recipe step: a frozen dataclass whose fields are its recipe keys.

    `calibrated` says whether it looks at the calibration tokens.
    """

    kind: ClassVar[str]
    calibrated: ClassVar[bool]

    def resolve(self, model: Model, exports: tuple[str, ...]) -> Step:
        """The step with every automatic choice made; refuses what cannot be done or exported."""
        ...

    def outline(self, model: Model) -> Model:
        """What the model will be like afterwards: its config and its shapes. Nothing is computed for it."""
        ...

    def apply(self, model: Model, ctx: Context) -> Model:
        """The model with the step done."""
        ...
