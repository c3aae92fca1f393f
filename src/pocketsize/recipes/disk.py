"""How many bytes a run writes: the finished folder, and the unfinished work beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from pocketsize.exporting.table import EXPORTERS, gguf_name_of, place
from pocketsize.io.checkpoint import TensorSpec, file_bytes
from pocketsize.models.model import Model
from pocketsize.quantization.scheme import Scheme
from pocketsize.recipes.body import Layers
from pocketsize.recipes.gradual import for_zeros
from pocketsize.recipes.grids import Quantizer, scheme_of
from pocketsize.recipes.oats import Oats
from pocketsize.recipes.prune import Prune
from pocketsize.recipes.qat import Qat, learned_numbers
from pocketsize.recipes.quantize import stages_of
from pocketsize.recipes.recipe import Recipe
from pocketsize.recipes.rotate import Rotate
from pocketsize.recipes.student import Student
from pocketsize.recipes.training import Training

# Record, report and card tell of every layer and tensor in words: so many bytes, and so many for each.
_RECORD, _REPORT, _CARD, _MANIFEST = 14_000, 42_000, 4_000, 300
_LAYER, _PRINT, _ROW = 290, 75, 620
_NUMPY_HEADER = 128
_GRID = ("scale", "zero")


@dataclass(frozen=True, slots=True)
class Export:
    """One export of a plan: where it will lie, and the bytes of its weights."""

    format: str
    path: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Written:
    """What a run writes: `output_bytes` stay; `peak_bytes` are there before the work is cleared away."""

    exports: tuple[Export, ...]
    output_bytes: int
    work_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The most that lies on the disk at once."""
        return self.output_bytes + self.work_bytes


def written_bytes(model: Model, recipe: Recipe, *, written_tokens: int = 0) -> Written:
    """The bytes of a resolved recipe; weights, configs and companions are exact."""
    last, made = recipe.steps[-1], _made(model, recipe)
    model = recipe.outline(model)
    step = last if isinstance(last, Quantizer) else None
    of = scheme_of(step, model) if step is not None else lambda _: None
    exports = tuple(_export(model, name, recipe.export, of) for name in recipe.export)
    others = [EXPORTERS[name].predict_others(model, of) for name in recipe.export]
    told = _told(model, recipe, len(exports)) + len(recipe.to_yaml().encode())
    output = sum(e.bytes for e in exports) + sum(sum(files.values()) for files in others) + told
    work = made
    if step is not None:
        work += sum(_objects(model, step, of)) * (
            1 + stages_of(step.first) if isinstance(step, Qat) else stages_of(step)
        )
    if written_tokens and any(step.calibrated for step in recipe.steps):
        work += _NUMPY_HEADER + 8 * written_tokens
    return Written(exports, output, work)


def _made(model: Model, recipe: Recipe) -> int:
    """The bytes of the students that steps leave, and of two checkpoints of the one that has the most."""
    students, most = 0, 0
    for step in recipe.steps:
        if isinstance(step, Training):
            size = 4 * model.origin.parameters
            copies = 3 + (step.average is not None) + (step.patience > 0)
            learned = 4 * learned_numbers(step, model)
            kept = copies * learned + round(for_zeros(step, model)[1])
            students, most = students + size, max(most, 2 * kept)
        model = step.outline(model)
        healed = isinstance(step, Layers | Student) and step.heal is True
        # What was healed or pruned lies there block by block until the model is made.
        if isinstance(step, Student | Rotate | Prune | Oats) or healed:
            students += 4 * model.origin.parameters
        if isinstance(step, Prune | Oats) or healed:
            students += 4 * model.linear_parameters
    return students + most


def _export(model: Model, name: str, exports: Sequence[str], of: Callable[[str], Scheme | None]) -> Export:
    path = gguf_name_of(model, of) if name == "gguf" else place(name, exports)
    return Export(name, path, EXPORTERS[name].predict_bytes(model, of))


def _told(model: Model, recipe: Recipe, artifacts: int) -> int:
    """About the bytes of record, report, card and manifest."""
    layers, tensors = len(model.linears), len(model.checkpoint.entries)
    config = len(json.dumps(model.config.to_dict()))
    record = _RECORD + _LAYER * layers + artifacts * (_PRINT * tensors + config)
    return record + _REPORT + _ROW * layers + _CARD + _MANIFEST


def _objects(model: Model, step: Quantizer, of: Callable[[str], Scheme | None]) -> Iterator[int]:
    """The bytes of each object of the journal: a block's codes, scales and zeros, as they are kept."""
    units = [model.linears_of(path) for path in model.blocks]
    if step.embeddings is not None:
        units.append(model.ends)
    for names in units:
        schemes = {name: found for name in names if (found := of(name)) is not None}
        metadata = {"schemes": json.dumps({n: s.facts() for n, s in schemes.items()}, sort_keys=True)}
        changed = _changed(model, names) if step.moves else []
        yield file_bytes([*_specs(model, schemes), *changed], metadata)


def _changed(model: Model, names: list[str]) -> Iterator[TensorSpec]:
    """Norms and biases of a block that may take scales."""
    block = next((path for path in model.blocks if names[0].startswith(f"{path}.")), None)
    feeds = {group.fed_by for group in model.groups if group.fed_by} if block else set()
    for name in sorted(f"{block}.{feed}{end}" for feed in feeds for end in (".weight", ".bias")):
        if name in model.checkpoint.entries and name not in names:
            shape = model.checkpoint.entries[name].shape
            yield TensorSpec(name, torch.float32, shape, lambda s=shape: torch.empty(s))


def _specs(model: Model, schemes: Mapping[str, Scheme]) -> Iterator[TensorSpec]:
    for name, scheme in schemes.items():
        rows, columns = model.matrix_shape(name)
        groups = (rows, columns // scheme.width(columns))
        parts = (("codes", torch.uint8, (rows, columns)), *((p, torch.float32, groups) for p in _GRID))
        for part, dtype, shape in parts:
            yield TensorSpec(f"{name}.{part}", dtype, shape, lambda s=shape, d=dtype: torch.empty(s, dtype=d))
