"""The verbs of Pocketsize, for Python: the same words as on the command line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from pocketsize.data.sources import Source
from pocketsize.errors import UsageError, did_you_mean
from pocketsize.exporting.table import EXPORTERS
from pocketsize.exporting.verify import Check, verify_folder
from pocketsize.io.console import Console
from pocketsize.io.publish import publish_bytes
from pocketsize.io.source import resolve
from pocketsize.measurement.measurement import Measurement
from pocketsize.models.arch import Arch, arch_for
from pocketsize.models.config import read_config
from pocketsize.models.gated import gated as gated_module
from pocketsize.models.gates import read_gates
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.models.skeleton import materialise
from pocketsize.pruning.gate import Gates, Tally
from pocketsize.recipes import run as running
from pocketsize.recipes.awq import Awq
from pocketsize.recipes.body import Layers
from pocketsize.recipes.distill import Distill, Finetune
from pocketsize.recipes.gate import Gate
from pocketsize.recipes.given import check_steps, folder_of, source_of, terminal_of
from pocketsize.recipes.gradual import Gradual
from pocketsize.recipes.grids import Quantizer, unstorable
from pocketsize.recipes.oats import Oats
from pocketsize.recipes.plan import Plan
from pocketsize.recipes.plan import plan as plan_recipe
from pocketsize.recipes.prune import Prune
from pocketsize.recipes.qat import Qat, of_effort
from pocketsize.recipes.quantize import Gptq, Hqq, Rtn
from pocketsize.recipes.recipe import Data, Recipe, parse_step, read_recipe
from pocketsize.recipes.record import RunRecord, read_record
from pocketsize.recipes.rotate import Rotate
from pocketsize.recipes.smooth import SmoothQuant
from pocketsize.recipes.step import Step
from pocketsize.recipes.student import Student
from pocketsize.recipes.table import STEPS
from pocketsize.reporting.card import model_card
from pocketsize.reporting.page import report_html
from pocketsize.search.asked import parse_bytes, parse_ratio, parse_share
from pocketsize.search.goal import Goal, plan_with_curve
from pocketsize.search.goal import plan as plan_goal
from pocketsize.search.goal import shrink as search_goal

__all__ = [
    "Awq",
    "Data",
    "Distill",
    "Finetune",
    "Gate",
    "Gptq",
    "Gradual",
    "Hqq",
    "Layers",
    "Model",
    "Plan",
    "Qat",
    "Recipe",
    "Result",
    "Rotate",
    "Rtn",
    "SmoothQuant",
    "Source",
    "Student",
    "distill",
    "finetune",
    "gated",
    "load",
    "plan",
    "quantize",
    "result",
    "run",
    "shrink",
    "verify",
]

PAGES = MappingProxyType({"report.html": report_html, "README.md": model_card})


@dataclass(frozen=True, slots=True)
class Result:
    """A finished folder and its record."""

    folder: Path
    record: RunRecord

    @property
    def measurements(self) -> Mapping[str, Measurement]:
        """Measurements by name; `name of subject` where a name was measured on several subjects.

        The bare name stands for the compressed model where there is one.
        """
        table: dict[str, Measurement] = {}
        for m in (*self.record.measurements, *self.record.timing.measurements):
            table[f"{m.name} of {m.subject}"] = m
            if m.name not in table or m.subject == "compressed":
                table[m.name] = m
        return MappingProxyType(table)

    def report(self, path: str | Path) -> Path:
        """Write the report page to `path`."""
        publish_bytes(Path(path), report_html(self.record).encode())
        return Path(path)


def run(
    model: str | Path | Model | Recipe,
    steps: Sequence[Step] = (),
    *,
    out: str | Path,
    export: Sequence[str] | None = None,
    data: Data | None = None,
    console: Console | None = None,
    dtype: str = "bf16",
    overwrite: bool = False,
) -> Result:
    """Run a recipe (a Recipe, a YAML file, or a model with steps) into the folder `out`.

    `dtype`, `export` and `data` are for a model with steps; a recipe has its own. With `overwrite`
    a finished `out` is replaced once the new one is verified. A run that was cut off goes on; one that is
    finished already gives its result. Ctrl-C once finishes the layer in work and raises
    `pocketsize.errors.Stopped`, a KeyboardInterrupt, after which the same call goes on.
    """
    recipe = _recipe(model, steps, export, data, dtype)
    folder = folder_of(out, "out")
    record = running.run(recipe, folder, console=terminal_of(console), pages=PAGES, overwrite=overwrite)
    return Result(folder, record)


def quantize(
    model: str | Path | Model,
    *,
    out: str | Path,
    method: str = "gptq",
    export: Sequence[str] | None = None,
    data: Data | None = None,
    console: Console | None = None,
    dtype: str = "bf16",
    overwrite: bool = False,
    **options: Any,
) -> Result:
    """Quantize with one step: `method` is its name (`gptq`, `awq`, `smoothquant`, `hqq` or `rtn`).

    `options` are its recipe keys; the rest is as in `run`.
    """
    if method not in (known := [kind for kind, step in STEPS.items() if issubclass(step, Quantizer)]):
        raise UsageError(f"method is {', '.join(known)}, got {method!r}{did_you_mean(str(method), known)}")
    recipe = _recipe(source_of(model), (parse_step({method: options}),), export, data, dtype)
    return run(recipe, out=out, console=console, overwrite=overwrite)


def distill(
    model: str | Path | Model,
    *,
    out: str | Path,
    layers: int | Sequence[int] | None = None,
    export: Sequence[str] | None = None,
    data: Data | None = None,
    console: Console | None = None,
    dtype: str = "bf16",
    overwrite: bool = False,
    **options: Any,
) -> Result:
    """Cut a student of so many `layers` out of a model, and teach it to say what the model says.

    Without `layers` the student has all of them. `options` are the recipe keys of `distill` (`tokens`,
    `loss`, `teacher`, ...); the rest is as in `run`.
    """
    steps = (parse_step({"distill": options}),)
    if layers is not None:
        if not isinstance(layers, int | list | tuple):
            raise UsageError(f"layers: how many blocks stay, or their numbers, got {layers!r}")
        keep = layers if isinstance(layers, int) else list(layers)
        steps = (parse_step({"layers": {"keep": keep}}), *steps)
    recipe = _recipe(model, steps, export, data, dtype)
    return run(recipe, out=out, console=console, overwrite=overwrite)


def prune(
    model: str | Path | Model,
    *,
    out: str | Path,
    export: Sequence[str] | None = None,
    data: Data | None = None,
    console: Console | None = None,
    dtype: str = "bf16",
    overwrite: bool = False,
    **options: Any,
) -> Result:
    """Set weights of the linears to zero; those that stay make up for them.

    `options` are the recipe keys of `prune` (`sparsity`, `pattern`, `score`, ...); the rest is as in `run`.
    Heads, channels and blocks are taken away by the steps `Student` and `Layers`.
    """
    recipe = _recipe(model, (parse_step({"prune": options}),), export, data, dtype)
    return run(recipe, out=out, console=console, overwrite=overwrite)


def finetune(
    model: str | Path | Model,
    *,
    out: str | Path,
    export: Sequence[str] | None = None,
    data: Data | None = None,
    console: Console | None = None,
    dtype: str = "bf16",
    overwrite: bool = False,
    **options: Any,
) -> Result:
    """Train a model on text, or make a classifier of an encoder and of the labels in `data.train`.

    `options` are the recipe keys of `finetune` (`epochs`, `tokens`, `rate`, ...); the rest is as in `run`.
    """
    steps = (parse_step({"finetune": options}),)
    recipe = _recipe(model, steps, export, data, dtype)
    return run(recipe, out=out, console=console, overwrite=overwrite)


@contextmanager
def gated(model: str | Path | Model, gates: Gates | None = None) -> Iterator[tuple[Any, Tally]]:
    """The model in memory (transformers' module, float32) as it runs with its gates, and what those save.

    `gates` are those in the model's folder if none are given. Generation, one token at a time, leaves
    out the work; a prompt is read with the same result. Once the block ends the module has no gates.
    """
    found = model if isinstance(model, Model) else load(model)
    module = materialise(found)
    with gated_module(module, found, gates or read_gates(found)) as tally:
        yield module, tally


def shrink(
    model: str | Path | Model,
    *,
    out: str | Path,
    keep: float | str | None = None,
    fit: int | str | None = None,
    ratio: float | str | None = None,
    target: Sequence[str] | None = None,
    data: Data | None = None,
    console: Console | None = None,
    dtype: str = "bf16",
    effort: str = "fast",
    tune: str | None = None,
    mixed: bool = True,
    overwrite: bool = False,
) -> Result:
    """Meet a goal: at most `fit` bytes, `ratio` times smaller, at least the share `keep` of quality.

    With no goal at all, 95 % is kept. Sizes are those of the first `target`. `effort` is `fast`,
    `balanced` or `best`: how long codes are learned block by block. `tune` is the number of tokens on which
    scales are tuned last, by the KL of the whole model (`256k`); with `best` generators have 128k. `mixed`
    chooses the widths of a generator matrix by matrix, from what each was measured to cost; without it all
    linears are alike.
    """
    source = source_of(model)
    if keep is None and fit is None and ratio is None:
        keep = 0.95
    goal = _goal(keep, fit, ratio)
    steps = (of_effort(effort, tune, lambda: arch_of(source)),)
    recipe, folder = _recipe(source, steps, target, data, dtype), folder_of(out, "out")
    record = search_goal(
        recipe, goal, folder, console=terminal_of(console), pages=PAGES, overwrite=overwrite, mixed=mixed
    )
    return Result(folder, record)


def plan(
    model: str | Path | Model | Recipe,
    steps: Sequence[Step] = (),
    *,
    out: str | Path = ".",
    keep: float | str | None = None,
    fit: int | str | None = None,
    ratio: float | str | None = None,
    export: Sequence[str] | None = None,
    data: Data | None = None,
    dtype: str = "bf16",
    effort: str = "fast",
    tune: str | None = None,
    curve: bool = False,
    console: Console | None = None,
) -> Plan:
    """What a run into `out` would take and give: memory, disk, time, sizes, what cannot be done.

    The run is that of a recipe, of a model with steps (without any: of what `effort` and `tune` stand for),
    or the one that `shrink` would choose for the goal with them. One block is rehearsed; nothing is left
    behind. With `curve` it is measured what each width of each matrix of a generator costs, as `shrink` does.
    """
    chosen = bool(steps) or _is_recipe(model)
    if chosen and (effort != "fast" or tune is not None):
        raise UsageError("effort and tune choose the step themselves; give a model without steps")
    if not chosen:
        source = source_of(cast(str | Path | Model, model))
        steps = (of_effort(effort, tune, lambda: arch_of(source)),)
    recipe = _recipe(model, steps, export, data, dtype)
    terminal, folder = terminal_of(console), folder_of(out, "out")
    if keep is None and fit is None and ratio is None:
        how = plan_with_curve if curve else plan_recipe
        return how(recipe, folder, console=terminal)
    if chosen:
        raise UsageError("a goal chooses the step itself; give a model without steps")
    return plan_goal(recipe, _goal(keep, fit, ratio), folder, console=terminal, curve=curve)


def verify(folder: str | Path) -> list[Check]:
    """Check a finished folder: its files, weights, tokenizer and behaviour."""
    return verify_folder(folder_of(folder, "folder"))


def result(folder: str | Path) -> Result:
    """A folder finished earlier."""
    return Result(Path(folder), read_record(Path(folder) / "record.json"))


def default_export(source: str, steps: Sequence[Step] = ()) -> tuple[str, ...]:
    """GGUF and the folder for families that llama.cpp runs, the folder alone for others.

    A model with weights that are zero is a folder, and one of what is not zero. A format that cannot hold the
    scheme of a step is left out; if neither can, it is the first that can.
    """
    config = read_config(resolve(source))
    if any(isinstance(step, Prune | Oats) for step in steps):
        return ("folder", "sparse")
    words = [step.scheme for step in steps if isinstance(step, Quantizer)]
    formats = ("gguf", "folder") if arch_for(config).gguf else ("folder",)
    able = tuple(name for name in formats if all(unstorable(word, name) is None for word in words))
    others = (name for name in EXPORTERS if words and all(unstorable(word, name) is None for word in words))
    return able or tuple(islice(others, 1)) or formats


def _recipe(
    model: str | Path | Model | Recipe,
    steps: Sequence[Step],
    export: Sequence[str] | None,
    data: Data | None,
    dtype: str,
) -> Recipe:
    """The recipe itself, the one in a YAML file, or one made of a model and steps."""
    if _is_recipe(model):
        given = {"steps": steps, "export": export, "data": data, "dtype": dtype != "bf16"}
        if twice := [name for name, value in given.items() if value]:
            raise UsageError(f"a recipe has {twice[0]} of its own; give a model for these")
        return model if isinstance(model, Recipe) else read_recipe(Path(str(model)))
    source, chosen = source_of(cast(str | Path | Model, model)), check_steps(steps)
    if data is not None and not isinstance(data, Data):
        raise UsageError(f"data: a Data, such as Data(calibrate=['a.txt']), got {data!r}")
    return Recipe(source, chosen, _exports(export, source, chosen), data or Data(), dtype=dtype)


def _exports(given: Sequence[str] | None, source: str, steps: Sequence[Step]) -> tuple[str, ...]:
    """The formats that were named, one of them or several, or those that suit the model."""
    if isinstance(given, str):
        return (given,)
    return tuple(given or default_export(source, steps))


def arch_of(source: str) -> Arch:
    """What is known of the family of a model that is on this machine."""
    return arch_for(read_config(resolve(source)))


def _is_recipe(model: str | Path | Model | Recipe) -> bool:
    if isinstance(model, str | Path):
        return Path(model).suffix in (".yaml", ".yml")
    return isinstance(model, Recipe)


def _goal(keep: float | str | None, fit: int | str | None, ratio: float | str | None) -> Goal:
    for name, value in (("keep", keep), ("fit", fit), ("ratio", ratio)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float | str)):
            raise UsageError(f"{name}: a number or text such as 95%, 80MB or 4x, got {value!r}")
    return Goal(
        keep=parse_share(keep) if isinstance(keep, str) else keep,
        fit_bytes=parse_bytes(fit) if isinstance(fit, str) else fit,
        ratio=parse_ratio(ratio) if isinstance(ratio, str) else ratio,
    )
