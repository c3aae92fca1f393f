"""A model with some of its blocks: everything around the blocks stays, so that it runs."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from pocketsize.errors import PocketsizeError
from pocketsize.io.checkpoint import Checkpoint, Entry, Packed
from pocketsize.models.model import Model


def with_blocks(model: Model, kept: Sequence[int], folder: Path | None = None) -> Model:
    """The model with these of its blocks alone, in this order; the first becomes block 0.

    Tensors stay where they are; `folder`, if it is given, is where config and companions of the shorter
    model lie.
    """
    raw = shortened_config(model.config, kept)
    config: PretrainedConfig = CONFIG_MAPPING[model.config.model_type].from_dict(raw)
    blocks = model.arch.blocks
    numbers = {old: new for new, old in enumerate(kept)}
    own = re.compile(rf"^{re.escape(blocks)}\.(\d+)\.(.*)$", re.DOTALL)
    entries: dict[str, Entry] = {}
    packed: dict[str, Packed] = {}
    for name, entry in model.checkpoint.entries.items():
        inside, stored = own.match(name), entry.name
        if inside is not None:
            if (old := int(inside[1])) not in numbers:
                continue
            name = f"{blocks}.{numbers[old]}.{inside[2]}"
            stored = _renumbered(entry.name, blocks, old, numbers[old])
        entries[name] = replace(entry, name=stored)
        if entry.name in model.checkpoint.packed:
            packed[stored] = model.checkpoint.packed[entry.name]
    parameters = sum(math.prod(entry.shape) for entry in entries.values())
    return replace(
        model,
        folder=folder or model.folder,
        config=config,
        checkpoint=Checkpoint(model.checkpoint.folder, MappingProxyType(entries), MappingProxyType(packed)),
        origin=replace(model.origin, parameters=parameters, bf16_bytes=2 * parameters),
    )


def shortened_config(config: PretrainedConfig, kept: Sequence[int]) -> dict[str, Any]:
    """The config of a model that has these blocks alone."""
    raw: dict[str, Any] = copy.deepcopy(config.to_dict())
    names: Mapping[str, str] = type(config).attribute_map
    raw[names.get("num_hidden_layers", "num_hidden_layers")] = len(kept)
    if raw.get("layer_types"):
        raw["layer_types"] = [raw["layer_types"][i] for i in kept]
    if raw.get("mlp_only_layers"):
        raw["mlp_only_layers"] = [new for new, old in enumerate(kept) if old in raw["mlp_only_layers"]]
    if raw.get("max_window_layers"):  # Qwen 2: blocks from here on have a window
        raw["max_window_layers"] = sum(i < raw["max_window_layers"] for i in kept)
    return raw


def excerpt(model: Model, index: int, folder: Path | None = None) -> Model:
    """The model with its block `index` alone."""
    return with_blocks(model, [index], folder)


@contextmanager
def names_of_whole(model: Model, kept: Sequence[int]) -> Iterator[None]:
    """What goes wrong within, with these blocks alone, is told by their names in the whole model."""
    block = re.compile(rf"\b{re.escape(model.arch.blocks)}\.(\d+)\b")
    names = dict(enumerate(model.blocks[index] for index in kept))
    try:
        yield
    except PocketsizeError as error:
        again = type(error)(block.sub(lambda found: names.get(int(found[1]), found[0]), str(error)))
        again.facts = error.facts
        raise again from error


def _renumbered(stored: str, blocks: str, old: int, new: int) -> str:
    """The name that a file gives a tensor of block `old`, with the number of its new block."""
    last = re.escape(blocks.rpartition(".")[2])
    return re.sub(rf"(^|\.)({last})\.{old}\.", rf"\g<1>\g<2>.{new}.", stored, count=1)
