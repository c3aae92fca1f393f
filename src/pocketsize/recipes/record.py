"""The record of a run: what reports, tables and searches read, and nothing else."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path

from pocketsize.errors import DataError
from pocketsize.exporting.artifact import Artifact
from pocketsize.measurement.measurement import Measurement
from pocketsize.models.model import Origin

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Finding:
    """Something the user should know: `code` is stable, `message` is one sentence."""

    code: str
    message: str
    where: str = ""


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What quantizing one matrix did.

    `error` and `rtn_error` are tr(E H E^T) / tr(W H W^T) of this method and of round-to-nearest
    on the same grid, over at most 32 evenly spaced rows, with H the mean outer product of the
    layer's calibration inputs (the identity where no inputs were used). `dead` counts inputs that
    were always zero, `escalations` how often the damping had to be raised, `tokens` the calibration
    tokens that reached the layer. `learned` is the error of its block after its codes were learned over
    that before, on windows that did not teach, 1 where nothing was kept of it; errors are from before.
    `zeros` is the share of zeros of a matrix that was pruned; `rtn_error` is then that of dropping as many
    of its smallest weights (before it was quantized), and `bits_per_weight` what it takes where zeros are
    left out. `rival` is the error that the best dense grid of `rival_bits`, no more than those give or take
    1 %, makes in the matrix before it was pruned (0 where it came in so few), and `rivalled` that of this
    one, on the same rows; None where what it was before is not known, or no grid is so small.
    """

    name: str
    rows: int
    columns: int
    bits: int
    bits_per_weight: float
    error: float
    rtn_error: float
    damp: float = 0.0
    escalations: int = 0
    dead: int = 0
    tokens: int = 0
    learned: float | None = None
    zeros: float | None = None
    rival: float | None = None
    rival_bits: float | None = None
    rivalled: float | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """What a stage of a step gave: how far from the original the model then was, and whether that was kept.

    `divergence` is of calibration windows that did not teach the stage (in `qat`, of `start` and `tuned`: of
    windows of the training text that did not): mean KL in nats per token of a
    generator, mean 1 - cosine of an encoder's embeddings; of a generation of students the mean loss of the
    true tokens, nats.
    """

    name: str
    divergence: float
    kept: bool


@dataclass(frozen=True, slots=True)
class Zeros:
    """How many of a matrix' weights are zero."""

    name: str
    zeros: int
    weights: int


@dataclass(frozen=True, slots=True)
class TrainingReport:
    """How a training went: `losses` and `looks` are steps with their loss, of text that taught and of text
    held out; `skipped` are steps whose gradient was not finite. `tokens` counts each as often as it was read.
    `pruned` are steps with the share of the linears that was zero after them, where the training made zeros;
    `zeros` how many each linear has in the end, where it made or kept some. `judged` is the loss of some
    texts before and after: of held-out text where there are looks, else of text that taught.
    """

    teachers: tuple[str, ...]
    parameters: int
    steps: int
    tokens: int
    epochs: float
    skipped: int
    losses: tuple[tuple[float, ...], ...]
    looks: tuple[tuple[float, ...], ...] = ()
    pruned: tuple[tuple[float, ...], ...] = ()
    zeros: tuple[Zeros, ...] = ()
    judged: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class StepReport:
    """One recipe step as it ran; `stages` where it has several, `training` where it trains."""

    kind: str
    options: dict[str, object]
    layers: tuple[LayerReport, ...] = ()
    tokens: int = 0
    stages: tuple[Stage, ...] = ()
    training: TrainingReport | None = None


@dataclass(frozen=True, slots=True)
class TextRecord:
    """A text that was used: where from, how much, and the hash that pins it.

    `share` is the part of the windows that was asked of it. Encoders are evaluated on sentences instead:
    `windows` then counts those, and `length` is 0. `shortest` is the length down to which windows were cut
    into shorter ones, if they were. How much of a text a training reads is in its report.
    """

    role: str
    name: str
    sha256: str
    documents: int
    windows: int
    length: int
    tokens: int
    share: float = 1.0
    shortest: int | None = None

    @property
    def pieces(self) -> str:
        """How much, in words: `64 windows of 512 tokens`, `256 sentences` or `12 documents`."""
        if self.role == "train":
            return f"{self.documents:,} documents"
        cut = "" if self.shortest is None else f", cut into shorter ones down to {self.shortest:,}"
        return f"{self.windows:,} " + (
            f"windows of {self.length:,} tokens{cut}" if self.length else "sentences"
        )


@dataclass(frozen=True, slots=True)
class SizePart:
    """One row of the size breakdown of an artefact."""

    artifact: str
    part: str
    bytes: int
    parameters: int = 0


@dataclass(frozen=True, slots=True)
class SizedLoss:
    """A way to store the model: its bytes, and the KL that was predicted for it, nats per token."""

    name: str
    bytes: int
    kl: float


@dataclass(frozen=True, slots=True)
class Mixture:
    """Widths that were chosen matrix by matrix, from what each was predicted to cost.

    `curve` is the least KL within each size, `alike` are the ways in which all linears are stored alike.
    Predictions are of rounding to nearest on searched grids, to second order.
    """

    chosen: SizedLoss
    curve: tuple[SizedLoss, ...]
    alike: tuple[SizedLoss, ...]


@dataclass(frozen=True, slots=True)
class Timing:
    """Everything that differs between two runs of the same recipe on the same machine.

    `findings` are those that depend on the moment, such as an original that memory had no room to time.
    """

    started: str = ""
    phases_s: dict[str, float] = field(default_factory=dict)
    cpu_s: float = 0.0
    peak_rss_bytes: int = 0
    resumed: int = 0
    measurements: tuple[Measurement, ...] = ()
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run, whole. Two runs of a recipe on one machine differ in `timing` alone.

    `fingerprint` names all that could change a byte: a run with the same one makes the same output.
    `mixtures` holds the one choice of widths that was made by `shrink`, if one was.
    """

    schema: int
    version: str
    recipe: dict[str, object]
    recipe_sha256: str
    origin: Origin
    task: str
    seed: int
    machine: dict[str, str | int | float | bool]
    versions: dict[str, str]
    texts: tuple[TextRecord, ...]
    protocol: tuple[str, ...]
    steps: tuple[StepReport, ...]
    findings: tuple[Finding, ...]
    measurements: tuple[Measurement, ...]
    sizes: tuple[SizePart, ...]
    artifacts: tuple[Artifact, ...]
    behaviour: dict[str, object]
    timing: Timing
    fingerprint: dict[str, str] = field(default_factory=dict)
    mixtures: tuple[Mixture, ...] = ()

    @property
    def all_findings(self) -> tuple[Finding, ...]:
        """What the user should know, of the result and of this run."""
        return (*self.findings, *self.timing.findings)

    def to_json(self) -> str:
        """The record as JSON text, keys in declaration order."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def read_record(path: Path) -> RunRecord:
    """The record in a file; one of another schema version or shape is refused."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable record: {error}") from error
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA:
        found = raw.get("schema") if isinstance(raw, dict) else type(raw).__name__
        raise DataError(f"{path}: schema {found!r}; this version reads schema {SCHEMA}")
    try:
        return built(RunRecord, raw)
    except (TypeError, KeyError, ValueError) as error:
        raise DataError(f"{path}: not a record of schema {SCHEMA}: {error}") from error


def built(kind: typing.Any, raw: typing.Any) -> typing.Any:
    """`raw` JSON as an instance of the annotated type `kind`."""
    origin = typing.get_origin(kind)
    if is_dataclass(kind) and isinstance(kind, type):
        known = {f.name for f in fields(kind)}
        if extra := set(raw) - known:
            raise ValueError(f"{kind.__name__}: unknown key {sorted(extra)[0]!r}")
        hints = typing.get_type_hints(kind)
        return kind(**{name: built(hints[name], value) for name, value in raw.items()})
    if origin is types.UnionType:
        return None if raw is None else built(typing.get_args(kind)[0], raw)
    if origin is tuple:
        return tuple(built(typing.get_args(kind)[0], item) for item in raw)
    if origin is dict or origin is Mapping:
        return {key: built(typing.get_args(kind)[1], item) for key, item in raw.items()}
    return raw
