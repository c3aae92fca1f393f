"""An encoder with a new head for classes: what it will be like, and what a training of it begins with."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PretrainedConfig

from pocketsize.data.labels import by_labels, classes_of
from pocketsize.data.sources import Source
from pocketsize.data.text import joined, read_corpus
from pocketsize.errors import UsageError
from pocketsize.io.checkpoint import Checkpoint, Entry, Packed
from pocketsize.models.arch import classifying
from pocketsize.models.model import Model
from pocketsize.models.skeleton import fill, skeleton, stored
from pocketsize.models.surgery import stand_in


def classes_in(train: Sequence[str | Source], base: Path) -> tuple[str, ...]:
    """The classes of the labelled text that trains; its files are relative to `base`."""
    if not train:
        raise UsageError(
            "finetune: makes an encoder a classifier of the labels it finds; name labelled text as `train`"
        )
    sources = [source if isinstance(source, Source) else Source((source,)) for source in train]
    return classes_of(by_labels(joined([read_corpus(source, base) for source in sources]))[0])


def with_classes(model: Model, classes: Sequence[str]) -> Model:
    """The encoder with a head for these classes: config and shapes. What is new lies in no file.

    Numbers stand in for its own, which are not there yet.
    """
    arch, own = classifying(model.arch), model.checkpoint.entries
    bare = replace(model, config=_config(model, classes), arch=arch)
    module = skeleton(bare)
    bare.config.architectures = [type(module).__name__]
    entries: dict[str, Entry] = {}
    packed: dict[str, Packed] = {}
    for name, tensor in stored(module):
        base = name.removeprefix(f"{arch.prefix}.")
        if base not in own:
            shape = tuple(tensor.shape)
            entries[name], packed[name] = _new(name, shape), Packed(partial(stand_in, shape), ())
            continue
        entries[name] = replace(own[base], name=name)
        if own[base].name in model.checkpoint.packed:
            packed[name] = model.checkpoint.packed[own[base].name]
    parameters = sum(math.prod(entry.shape) for entry in entries.values())
    checkpoint = Checkpoint(model.checkpoint.folder, MappingProxyType(entries), MappingProxyType(packed))
    origin = replace(model.origin, parameters=parameters, bf16_bytes=2 * parameters)
    return replace(bare, checkpoint=checkpoint, origin=origin)


def begun(model: Model, outline: Model, seed: int, device: torch.device) -> nn.Module:
    """The module of the encoder with a new head, as `outline` has it, float32; `seed` decides the head."""
    module = skeleton(outline, device)
    fill(module, "", lambda name: _beginning(model, outline, name), device)
    _initialise(module, [name for name, entry in outline.checkpoint.entries.items() if not entry.file], seed)
    return module


def _config(model: Model, classes: Sequence[str]) -> PretrainedConfig:
    raw: dict[str, Any] = copy.deepcopy(model.config.to_dict())
    raw["id2label"] = dict(enumerate(classes))
    raw["label2id"] = {name: i for i, name in enumerate(classes)}
    for key in ("num_labels", "problem_type"):
        raw.pop(key, None)
    return CONFIG_MAPPING[model.config.model_type].from_dict(raw)


def _new(name: str, shape: tuple[int, ...]) -> Entry:
    """A tensor that lies in no file."""
    return Entry(name, "", "F32", shape, 0, 4 * math.prod(shape))


def _beginning(model: Model, outline: Model, name: str) -> Tensor:
    """The encoder's own tensor; room for one that it has not."""
    entry = outline.checkpoint.entries[name]
    return (
        model.weight(name.removeprefix(f"{outline.arch.prefix}.")) if entry.file else torch.zeros(entry.shape)
    )


@torch.no_grad()
def _initialise(module: nn.Module, names: Sequence[str], seed: int) -> None:
    """Give the modules that have these tensors the numbers that the family begins with."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
            cast(Any, module)._init_weights(module.get_submodule(path))
