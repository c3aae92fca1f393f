"""A recipe: the model, the texts, the steps and the exports of one run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import yaml

from pocketsize.data.sources import Source, share_gap
from pocketsize.errors import DataError, UnsupportedError, UsageError, did_you_mean
from pocketsize.exporting.table import EXPORTERS
from pocketsize.models.dtype import NAMES
from pocketsize.models.model import Model
from pocketsize.recipes.classifier import classes_in
from pocketsize.recipes.distill import Finetune
from pocketsize.recipes.given import filled
from pocketsize.recipes.grids import Quantizer
from pocketsize.recipes.oats import Oats
from pocketsize.recipes.qat import Qat
from pocketsize.recipes.rotate import check_turns
from pocketsize.recipes.step import Auto, Step
from pocketsize.recipes.table import STEPS

KEYS = ("model", "data", "steps", "export", "dtype")
TEXTS = ("calibrate", "evaluate", "train")
# A larger model takes too long to write its own calibration text unless it is told to.
WRITER_PARAMETERS = 400_000_000
# The shortest windows that calibrate encoders (benchmarks/windows).
SHORTEST = 8


@dataclass(frozen=True, slots=True)
class Data:
    """Texts of a run. Empty lists mean the text that comes with Python, split by topic.

    `calibrate` and `evaluate` are files or globs relative to the recipe's folder, or sources with
    shares that add up to 1. `train` is what trainings read, the calibration text where it is empty; shares
    mean nothing there. `sequences` windows of `length` tokens calibrate; `tokens` tokens are
    evaluated, in windows of `length` (encoders: at most 256 sentences instead, classifiers: at most 1000
    labelled texts, a tenth of `train` where no `evaluate` is named). `written` is the
    share of the calibration windows that the model writes itself; `auto` means half of them where
    no files are named and a model is small enough to be run for it, else none. An encoder, which reads short
    texts as well as long ones, calibrates on windows of `length` tokens, of half, a quarter and so on down to
    `shortest`, as many tokens of each length, of the longest twice as many; `auto` means 8, and no shorter
    ones for other models.
    """

    calibrate: tuple[str, ...] | tuple[Source, ...] = ()
    evaluate: tuple[str, ...] | tuple[Source, ...] = ()
    sequences: int = 64
    length: int = 512
    tokens: int = 16384
    seed: int = 0
    written: float | Auto = "auto"
    train: tuple[str, ...] | tuple[Source, ...] = ()
    shortest: int | Auto = "auto"

    def __post_init__(self) -> None:
        for name in ("sequences", "length", "tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UsageError(f"data: {name} must be a positive number, got {value!r}")
        for key in TEXTS:
            object.__setattr__(self, key, _named_texts(key, getattr(self, key)))
        if not isinstance(self.seed, int) or self.seed < 0:
            raise UsageError(f"data: seed must be a whole number from 0 upwards, got {self.seed!r}")
        if self.shortest != "auto" and (not isinstance(self.shortest, int) or self.shortest < 1):
            raise UsageError(f"data: shortest must be auto or a positive number, got {self.shortest!r}")
        share = self.written
        if share != "auto" and not (isinstance(share, int | float) and 0 <= share < 1):
            raise UsageError(f"data: written must be auto or a share from 0 to below 1, got {share!r}")

    @property
    def written_windows(self) -> int:
        """How many of the windows the model writes."""
        return 0 if self.written == "auto" else min(round(self.sequences * self.written), self.sequences - 1)

    def resolved(self, model: Model) -> Data:
        """The same with `written` and `shortest` decided; refuses what a model has no use for."""
        writes = model.arch.task == "generate"
        if self.written not in ("auto", 0) and not writes:
            raise UnsupportedError("data: written: an encoder writes no text; leave it out")
        if self.shortest != "auto" and model.arch.causal:
            said = "data: shortest: a causal model is calibrated on windows of one length; leave it out"
            raise UnsupportedError(said)
        wanted = writes and not self.calibrate and model.origin.parameters <= WRITER_PARAMETERS
        written = (0.5 if wanted else 0.0) if self.written == "auto" else self.written
        shortest = SHORTEST if self.shortest == "auto" and not model.arch.causal else self.shortest
        return replace(self, written=written, shortest=shortest)


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is to be done. Two recipes with one `sha256` do the same.

    `dtype` (bf16, fp16 or fp32) is what exports that are folders store unquantized tensors in.
    """

    model: str
    steps: tuple[Step, ...]
    export: tuple[str, ...] = ("folder",)
    data: Data = field(default_factory=Data)
    base: Path = Path()
    dtype: str = "bf16"

    def __post_init__(self) -> None:
        if not self.steps:
            raise UsageError("steps: a recipe needs at least one step")
        _check_order(self.steps)
        for name in self.export:
            if not isinstance(name, str) or name not in EXPORTERS:
                raise UsageError(f"export: unknown format {name!r}{did_you_mean(str(name), EXPORTERS)}")
        if not self.export or len({*self.export}) < len(self.export):
            raise UsageError(f"export: name at least one of {', '.join(EXPORTERS)}, each once")
        if not isinstance(self.dtype, str) or self.dtype not in NAMES:
            raise UsageError(f"dtype: unknown type {self.dtype!r}{did_you_mean(str(self.dtype), NAMES)}")

    def resolved(self, model: Model) -> Recipe:
        """The recipe with every automatic choice made; refuses what this model cannot have."""
        steps: list[Step] = []
        outline = model
        for step in self.steps:
            steps.append(self._informed(step, outline).resolve(outline, self.export))
            outline = steps[-1].outline(outline)
        for name in self.export:
            if reason := EXPORTERS[name].refuses(outline):
                raise UnsupportedError(f"export {name}: {reason}")
        return replace(self, steps=tuple(steps), data=self.data.resolved(model))

    def _informed(self, step: Step, outline: Model) -> Step:
        """The step with the classes that the training text has, where it makes a classifier of them."""
        if not isinstance(step, Finetune) or step.classes != "auto" or outline.arch.task != "embed":
            return step
        return replace(step, classes=classes_in(self.data.train, self.base))

    def outline(self, model: Model) -> Model:
        """What the model will be like when all steps of a resolved recipe are done: config and shapes."""
        for step in self.steps:
            model = step.outline(model)
        return model

    @property
    def windows_written(self) -> int:
        """How many windows the model writes: the first of them calibrate, all of them may teach it."""
        calibrate, length = self.data.written_windows, self.data.length
        if self.data.train:
            return calibrate
        share = calibrate / self.data.sequences
        taught = [step.windows_written(share, length) for step in self.steps if isinstance(step, Qat)]
        return max([calibrate, *taught])

    @property
    def source(self) -> str:
        """The model's folder or file, which may lie beside the recipe, or the name of a sample."""
        beside = self.base / self.model
        return str(beside) if not self.model.startswith("sample:") and beside.exists() else self.model

    def seen_from(self, folder: Path) -> Recipe:
        """The same with paths that are relative to its own folder made relative to another one."""
        there = folder.resolve()

        def moved(path: str) -> str:
            """A file or a pattern beside the recipe."""
            return path if Path(path).is_absolute() else os.path.relpath(self.base.resolve() / path, there)

        def source(entry: str | Source) -> str | Source:
            if isinstance(entry, str):
                return moved(entry)
            return replace(entry, files=tuple(moved(file) for file in entry.files))

        texts = {key: tuple(source(entry) for entry in getattr(self.data, key)) for key in TEXTS}
        model, here = self.model, Path(self.source)
        if not Path(model).is_absolute() and here.exists():
            model = os.path.relpath(here.resolve(), there)
        return replace(self, model=model, data=replace(self.data, **texts), base=folder)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as a recipe file holds it."""
        data = asdict(self.data)
        for key in TEXTS:
            data[key] = [_plain(source) for source in getattr(self.data, key)]
        steps = [{step.kind: asdict(step)} for step in self.steps]  # type: ignore[call-overload]
        facts = {"model": self.model, "data": data, "steps": steps, "export": list(self.export)}
        return facts | {"dtype": self.dtype}

    def to_yaml(self) -> str:
        """The recipe file that runs it again."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @property
    def sha256(self) -> str:
        """Hash of everything that the recipe says."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


def _check_order(steps: tuple[Step, ...]) -> None:
    """One step may quantize, the last: what comes after it would undo it."""
    quantizers = [step.kind for step in steps if isinstance(step, Quantizer)]
    if len(quantizers) > 1:
        kinds = " and ".join(quantizers)
        raise UsageError(f"steps: {kinds} would each quantize the same matrices; keep one of them")
    if quantizers and not isinstance(steps[-1], Quantizer):
        raise UsageError(
            f"steps: {steps[-1].kind} after {quantizers[0]} would undo it; put {quantizers[0]} last"
        )
    kinds = [step.kind for step in steps]
    if "gate" in kinds and any(k not in (*quantizers, "gate") for k in kinds[kinds.index("gate") :]):
        raise UsageError(
            "steps: gates are made for the weights as they are; only what quantizes comes after gate"
        )
    check_turns(steps)
    sums = next((i for i, step in enumerate(steps) if isinstance(step, Oats)), len(steps) - 1)
    if sums < len(steps) - 1:
        raise UsageError(
            f"steps: {steps[sums + 1].kind} after oats would make one dense matrix of its parts; "
            "put oats last"
        )
    if len({*kinds}) < len(steps):
        twice = next(kind for kind in kinds if kinds.count(kind) > 1)
        raise UsageError(f"steps: {twice} is there twice; run the second one on the output of the first")


class _Once(yaml.SafeLoader):
    """YAML in which no key stands twice: of two lines that say different things none is dropped silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """The mapping; a key that is there twice is an error that names its line."""
        found: set[object] = set()
        for key, _ in node.value:
            word = self.construct_object(key, deep=True)
            if word in found:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {word!r} is there twice", key.start_mark
                )
            found.add(word)
        return super().construct_mapping(node, deep)


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file. Unknown names and keys are errors that name the nearest known one."""
    if path.is_dir():
        raise DataError(
            f"{path}: cannot be read as a recipe: it is a folder (a model: `pocketsize quantize`)"
        )
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Once)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a recipe: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    try:
        return parse_recipe(raw, base=path.parent)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error


def parse_recipe(raw: object, *, base: Path) -> Recipe:
    """A recipe from plain data; file patterns are relative to `base`."""
    if not isinstance(raw, Mapping):
        raise UsageError(f"a recipe is a mapping with the keys {', '.join(KEYS)}, got {type(raw).__name__}")
    for key in raw:
        if key not in KEYS:
            raise UsageError(f"unknown key {key!r}{did_you_mean(str(key), KEYS)}")
    if not isinstance(raw.get("model"), str):
        raise UsageError(
            "model: name a folder, a hub id (OWNER/NAME) or a sample such as sample:smollm2-135m"
        )
    steps = raw.get("steps")
    if not isinstance(steps, list):
        raise UsageError("steps: a list of steps, such as `- gptq: {scheme: W4A16}`")
    data = _options("data", raw.get("data"))
    for key in TEXTS:
        if key in data:
            data[key] = _texts(key, data[key])
    export = raw.get("export", ["folder"])
    if not isinstance(export, str | list | tuple):
        raise UsageError(f"export: a list of {', '.join(EXPORTERS)}, got {export!r}")
    return Recipe(
        model=raw["model"],
        steps=tuple(parse_step(step) for step in steps),
        export=tuple([export] if isinstance(export, str) else export),
        data=filled(Data, "data", data),
        base=base,
        dtype=raw.get("dtype", "bf16"),
    )


def parse_step(raw: object) -> Step:
    """One entry of `steps` as a step."""
    if isinstance(raw, str):
        raw = {raw: None}
    if not isinstance(raw, Mapping) or len(raw) != 1:
        raise UsageError(
            f"a step is one name with its options, such as `gptq: {{scheme: W4A16}}`, got {raw!r}"
        )
    ((kind, options),) = raw.items()
    if kind not in STEPS:
        raise UsageError(f"unknown step {kind!r}{did_you_mean(str(kind), STEPS)}")
    return filled(STEPS[kind], kind, _options(kind, options))


def _options(where: str, raw: object) -> dict[str, Any]:
    """Options by name; nothing stands for none."""
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise UsageError(f"{where}: options by name, such as `{{scheme: W4A16}}`, got {raw!r}")
    return {str(key): value for key, value in raw.items()}


def _texts(key: str, raw: object) -> tuple[object, ...]:
    """The files of `calibrate` or `evaluate`, or its sources."""
    entries = [raw] if isinstance(raw, str | Mapping) else raw
    if not isinstance(entries, list | tuple):
        raise UsageError(
            f"data: {key}: files, or sources such as {{files: de/*.txt, share: 0.3}}, got {raw!r}"
        )
    return tuple(_source(key, entry) if isinstance(entry, Mapping) else entry for entry in entries)


def _source(key: str, raw: Mapping[str, Any]) -> Source:
    options = dict(raw)
    files = options.get("files", ())
    options["files"] = (files,) if isinstance(files, str) else tuple(files or ())
    return filled(Source, f"data: {key}", options)


def _named_texts(key: str, given: object) -> tuple[str, ...] | tuple[Source, ...]:
    """The files or sources of a kind of text, one of them or a list."""
    entries = (given,) if isinstance(given, str | Path | Source) else given
    if not isinstance(entries, list | tuple):
        raise UsageError(f"data: {key}: files are named by text, got {given!r}")
    named = [str(entry) if isinstance(entry, Path) else entry for entry in entries]
    _check_texts(key, named)
    return cast(tuple[str, ...] | tuple[Source, ...], tuple(named))


def _check_texts(key: str, entries: Sequence[object]) -> None:
    sources = [entry for entry in entries if isinstance(entry, Source)]
    if not all(isinstance(entry, str | Source) for entry in entries):
        raise UsageError(f"data: {key}: files are named by text, got {list(entries)!r}")
    if sources and len(sources) < len(entries):
        raise UsageError(
            f"data: {key}: a list of files, or one of sources with shares, not a mixture of both"
        )
    if sources and key != "train" and (gap := share_gap(sources)):
        raise UsageError(f"data: {key}: {gap}")


def _plain(entry: str | Source) -> object:
    """A file or a source as a recipe file holds it; what is left to itself is left out."""
    if isinstance(entry, str):
        return entry
    chosen = {k: v for k, v in asdict(entry).items() if v is not None}
    return chosen | {"files": list(entry.files)}
