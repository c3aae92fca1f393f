"""What a run is of: everything that can change a byte of its result, by name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import pocketsize
from pocketsize.exporting.companions import companion_prints
from pocketsize.measurement.machine import machine, versions
from pocketsize.models.device import CPU, working_device
from pocketsize.models.model import Model
from pocketsize.recipes.recipe import TEXTS, Recipe
from pocketsize.recipes.texts import Texts


def fingerprint(model: Model, recipe: Recipe, texts: Texts) -> dict[str, str]:
    """The options, inputs, versions and the machine of a run, as texts that a user can compare.

    Paths do not count: a model or a text that moved is still the same.
    """
    here, device = machine(), working_device()
    options = {key: value for key, value in recipe.to_dict().items() if key != "model"}
    options["data"] = {key: value for key, value in options["data"].items() if key not in TEXTS}
    config = {key: value for key, value in model.config.to_dict().items() if not key.startswith("_")}
    return {
        **dict(_flat("recipe", options)),
        "threads": str(here["threads"]),
        "processor": f"{here['cpu']} ({here['instruction_sets']})",
        "device": str(device) if device == CPU else str(here["gpu"]),
        "version of pocketsize": pocketsize.__version__,
        **{f"version of {name}": version for name, version in versions().items()},
        "model name": model.origin.name,
        "model weights": model.origin.sha256,
        **dict(_flat("model config", config)),
        **{f"model file {name}": sha for name, sha in companion_prints(model.folder).items()},
        **{f"{t.role} text {i + 1}": t.sha256 for i, t in enumerate(texts.records)},
        "calibration tokens": hashlib.sha256(texts.calibrate.input_ids.numpy().tobytes()).hexdigest(),
    }


def _flat(name: str, value: object) -> Iterator[tuple[str, str]]:
    """Nested options, one by one: `recipe.steps.0.gptq.damp`."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}", inner)
    elif isinstance(value, list | tuple) and value:
        for i, inner in enumerate(value):
            yield from _flat(f"{name}.{i}", inner)
    else:
        yield name, str(value)
