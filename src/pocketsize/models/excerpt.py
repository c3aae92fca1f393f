"""A model cut down to one of its blocks: everything around the blocks stays, so that it runs."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig

from pocketsize.io.checkpoint import Checkpoint, Entry, Packed
from pocketsize.models.model import Model


def excerpt(model: Model, index: int, folder: Path | None = None) -> Model:
    """The model with its block `index` alone, which becomes the first.

    Tensors stay where they are; `folder`, if it is given, is where config and companions of the excerpt
    lie.
    """
    raw = shortened_config(model.config, index)
    config: PretrainedConfig = CONFIG_MAPPING[model.config.model_type].from_dict(raw)
    old, new = f"{model.arch.blocks}.{index}.", f"{model.arch.blocks}.0."
    stored = model.arch.blocks.rpartition(".")[2]
    entries: dict[str, Entry] = {}
    packed: dict[str, Packed] = {}
    for name, entry in model.checkpoint.entries.items():
        if name.startswith(old):
            own = re.sub(rf"(^|\.){stored}\.{index}\.", rf"\g<1>{stored}.0.", entry.name, count=1)
            entries[new + name.removeprefix(old)] = replace(entry, name=own)
        elif not name.startswith(f"{model.arch.blocks}."):
            own, entries[name] = entry.name, entry
        else:
            continue
        if entry.name in model.checkpoint.packed:
            packed[own] = model.checkpoint.packed[entry.name]
    parameters = sum(math.prod(entry.shape) for entry in entries.values())
    return replace(
        model,
        folder=folder or model.folder,
        config=config,
        checkpoint=Checkpoint(model.checkpoint.folder, MappingProxyType(entries), MappingProxyType(packed)),
        origin=replace(model.origin, parameters=parameters, bf16_bytes=2 * parameters),
    )


def shortened_config(config: PretrainedConfig, index: int) -> dict[str, Any]:
    """The config of a model that has block `index` alone."""
    raw: dict[str, Any] = copy.deepcopy(config.to_dict())
    names: Mapping[str, str] = type(config).attribute_map
    raw[names.get("num_hidden_layers", "num_hidden_layers")] = 1
    if raw.get("layer_types"):
        raw["layer_types"] = [raw["layer_types"][index]]
    if raw.get("mlp_only_layers"):
        raw["mlp_only_layers"] = [0] if index in raw["mlp_only_layers"] else []
    return raw
