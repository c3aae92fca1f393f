"""Figures are of what is written: what is not quantized has the digits that it is stored in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import pocketsize as ps
from pocketsize.data.calibration import evaluation_windows
from pocketsize.data.text import read_corpus
from pocketsize.exporting.read_back import read_folder
from pocketsize.measurement.embedding import embedding_quality
from pocketsize.measurement.quality import quality
from pocketsize.models.load import load, tokenizer_of
from pocketsize.models.model import Model
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import named
from pocketsize.recipes.oats import Oats
from pocketsize.recipes.record import read_record
from pocketsize.recipes.stored import as_written
from tiny import write_texts, write_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    found = load(write_tiny(tmp_path_factory.mktemp("tiny") / "m", "llama"))
    name = found.linears[0]
    scheme = named("Q8_0")
    assert scheme is not None
    return found.with_quantized({name: rtn(found.matrix(name), scheme)})


@pytest.mark.parametrize(
    ("dtype", "exports", "matrices", "vectors"),
    [
        (torch.bfloat16, ("folder",), torch.bfloat16, torch.bfloat16),
        (torch.float16, ("gptq", "folder"), torch.float16, torch.float16),
        (torch.bfloat16, ("gguf", "folder"), torch.float16, torch.float32),
        (torch.float32, ("folder",), torch.float32, torch.float32),
    ],
)
def test_numbers_are_those_that_are_stored(
    model: Model,
    dtype: torch.dtype,
    exports: tuple[str, ...],
    matrices: torch.dtype,
    vectors: torch.dtype,
) -> None:
    written = as_written(replace(model, dtype=dtype), exports)
    for name in model.checkpoint.entries:
        W = model.weight(name)
        kind = torch.float32 if name in model.quantized else matrices if W.ndim > 1 else vectors
        assert torch.equal(written.weight(name), W.to(kind).float()), name


def test_what_a_record_says_is_what_its_folder_does(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "m", "bert")
    calibrate, evaluate = write_texts(tmp_path)
    data = ps.Data(calibrate=(calibrate,), evaluate=(evaluate,), sequences=4, length=32, tokens=512)
    out = ps.run(source, [ps.Rtn("W8A16")], out=tmp_path / "out", export=["folder"], data=data).folder
    recorded = {m.name: m.value for m in read_record(out / "record.json").measurements}
    original, corpus = load(source), read_corpus([evaluate], Path())
    small = replace(read_folder(out), origin=original.origin)
    found = embedding_quality(original, small, corpus, seed=0).measurements
    assert recorded["one_minus_cosine"] > 0
    for one in found:
        assert one.value == pytest.approx(recorded[one.name], rel=1e-4), one.name


def test_a_sparse_folder_gives_back_the_sum_of_its_rounded_parts(tmp_path: Path) -> None:
    source = write_tiny(tmp_path / "m", "llama")
    calibrate, evaluate = write_texts(tmp_path)
    data = ps.Data(calibrate=(calibrate,), evaluate=(evaluate,), sequences=4, length=32, tokens=512)
    steps = [Oats(sparsity=0.5, rank=0.2)]
    out = ps.run(source, steps, out=tmp_path / "out", export=["sparse"], data=data).folder
    recorded = {m.name: m.value for m in read_record(out / "record.json").measurements}
    original = load(source)
    small = replace(read_folder(out), origin=original.origin)
    corpus, tokenizer = read_corpus([evaluate], Path()), tokenizer_of(original)
    windows = evaluation_windows(corpus, tokenizer, tokens=512, length=32, special=True)
    found = {m.name: m.value for m in quality(original, small, windows, seed=0).measurements}
    assert found["kl_mean"] == pytest.approx(recorded["kl_mean"], rel=1e-3)
