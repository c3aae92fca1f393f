"""A tiny quantized model, and finished folders of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from exporting.rounded import SCHEMES, quantized
from pocketsize.exporting import compressed_tensors
from pocketsize.exporting.gguf import writer
from pocketsize.exporting.manifest import write_manifest
from pocketsize.exporting.table import behaviours
from pocketsize.models.load import load
from pocketsize.models.model import Model
from tiny import write_tiny


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Model]:
    """Tiny llama models, tied and untied."""
    made: dict[bool, Model] = {}

    def make(tied: bool) -> Model:
        if tied not in made:
            made[tied] = load(write_tiny(tmp_path_factory.mktemp("llama") / "tiny", "llama", tied=tied))
        return made[tied]

    return make


@pytest.fixture
def finished(tmp_path: Path, tiny_llama: Callable[[bool], Model]) -> Path:
    """A finished folder: weights, a GGUF with 8-bit embeddings, the record's behaviour, the manifest."""
    model = quantized(tiny_llama(True), SCHEMES["Q4_1"], SCHEMES["Q8_0"])
    out = tmp_path / "out"
    out.mkdir()
    artifacts = [compressed_tensors.write(model, out), writer.write(model, out / "tiny-Q4_1.gguf")]
    (out / "record.json").write_text(json.dumps({"behaviour": behaviours(model, artifacts)}))
    write_manifest(out)
    return out
