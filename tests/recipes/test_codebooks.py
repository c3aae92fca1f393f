"""Schemes with a codebook in recipes: who takes them, who refuses them and how, and that nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pocketsize.api import default_export
from pocketsize.errors import UnsupportedError, UsageError
from pocketsize.models import batches
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.quantization.scheme import NAMED
from pocketsize.recipes.awq import Awq
from pocketsize.recipes.disk import written_bytes
from pocketsize.recipes.grids import Quantizer, layer_scheme, unstorable
from pocketsize.recipes.journal import JOURNAL, open_journal
from pocketsize.recipes.quantize import Gptq, Hqq, Rtn
from pocketsize.recipes.recipe import Recipe
from pocketsize.recipes.step import Context
from tiny import write_tiny

WHERE = {"NF4": "bitsandbytes", "IQ4_NL": "gguf", "NVFP4": "folder", "MXFP4": "gguf"}


@pytest.fixture
def model(tmp_path: Path) -> Model:
    return load(write_tiny(tmp_path / "model", "llama"))


def context(tmp_path: Path, windows: int = 16) -> Context:
    ids = torch.randint(3, 320, (windows, 16), generator=torch.Generator().manual_seed(0))
    journal = open_journal(tmp_path / "work", {"recipe": "test"})
    return Context(ids, torch.ones_like(ids, dtype=torch.bool), journal, lambda *_: None)


@pytest.mark.parametrize("name", WHERE)
@pytest.mark.parametrize("kind", [Rtn, Gptq, Awq])
def test_every_quantizer_that_can_takes_a_codebook(
    name: str, kind: type[Quantizer], model: Model, tmp_path: Path
) -> None:
    step = kind(scheme=name.lower()).resolve(model, (WHERE[name],))
    assert step.scheme == name and layer_scheme(step, model.linears[0]) == NAMED[name]
    ctx = context(tmp_path)
    done = step.apply(model, ctx)
    again = open_journal(tmp_path / "work", {"recipe": "test"}).weights()
    for linear in model.linears:
        q, kept = done.quantized[linear], again[linear]
        assert q.scheme == kept.scheme == NAMED[name]
        assert torch.equal(q.codes, kept.codes) and torch.equal(q.scale, kept.scale)
        assert float((q.dequantize() - model.original(linear)).norm() / model.original(linear).norm()) < 0.5
    (report,) = ctx.reports
    first = next(layer for layer in report.layers if layer.name == model.linears[0])
    assert (first.bits, first.bits_per_weight) == (4, NAMED[name].bits_per_weight(64))
    assert first.error > 0 and (kind is Rtn or first.error < 1.5 * first.rtn_error)


def test_a_table_is_learned_block_by_block(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "BATCH_TOKENS", 4 * 16)  # four windows a batch: sixteen teach and judge
    ctx = context(tmp_path)
    step = Gptq(scheme="NF4", learn=4).resolve(model, ("bitsandbytes",))
    done = step.apply(model, ctx)
    shares = [layer.learned for layer in ctx.reports[0].layers if "layers" in layer.name]
    assert shares and all(share is not None and 0 < share <= 1 for share in shares)
    assert all(done.quantized[name].scheme.codebook == "nf4" for name in model.linears)


def test_hqq_refuses_what_has_no_zeros() -> None:
    for name in ("NF4", "Q4_0"):
        with pytest.raises(UsageError, match=f"it chooses zeros, {name} has none; use step rtn or gptq"):
            Hqq(scheme=name)


def test_a_name_says_all_of_a_codebook() -> None:
    with pytest.raises(UsageError, match="group: nf4 has 64; leave group out"):
        Rtn(scheme="nf4", group=32)
    with pytest.raises(UsageError, match="symmetric: MXFP4 has true"):
        Gptq(scheme="MXFP4", symmetric=False)


@pytest.mark.parametrize(
    ("name", "exports", "said"),
    [
        ("NF4", ("gguf",), "gguf cannot store the codebook NF4; export bitsandbytes"),
        ("NF4", ("folder",), "folder cannot store the codebook NF4"),
        ("IQ4_NL", ("folder",), "folder cannot store the codebook IQ4_NL; export gguf"),
        ("MXFP4", ("gptq",), "gptq cannot store the codebook MXFP4; export folder or gguf"),
        ("W4A16", ("bitsandbytes",), "bitsandbytes cannot store 4-bit weights; use scheme: NF4"),
        ("TQ2_0", ("gguf",), "groups of 256 do not divide"),
        ("TERNARY", ("gguf",), "hold 256 weights; a group of 64 cannot be stored"),
    ],
)
def test_what_an_export_cannot_hold_is_refused_before_work(
    name: str, exports: tuple[str, ...], said: str, model: Model
) -> None:
    with pytest.raises(UnsupportedError, match=said):
        Rtn(scheme=name).resolve(model, exports)


def test_mixtures_are_refused_where_they_cannot_be_loaded(model: Model) -> None:
    step = Rtn(scheme="NVFP4", overrides={"*.down_proj": {"scheme": "W8A16"}})
    with pytest.raises(UnsupportedError, match="NVFP4 stands alone in a folder"):
        step.resolve(model, ("folder",))
    mixed = Rtn(scheme="IQ4_NL", overrides={"*.down_proj": {"scheme": "MXFP4"}}).resolve(model, ("gguf",))
    assert layer_scheme(mixed, "model.layers.0.mlp.down_proj.weight") == NAMED["MXFP4"]


def test_embeddings_as_the_linears_are(model: Model) -> None:
    assert Rtn(scheme="IQ4_NL", embeddings="same").resolve(model, ("gguf",)).embeddings == "same"
    with pytest.raises(UnsupportedError, match="no embedding with NVFP4; use embeddings: null"):
        Rtn(scheme="NVFP4", embeddings="same").resolve(model, ("folder",))
    with pytest.raises(UnsupportedError, match="bitsandbytes has embedding and head unquantized"):
        Rtn(scheme="NF4", embeddings="same").resolve(model, ("bitsandbytes",))


@pytest.mark.parametrize("name", WHERE)
def test_the_journal_takes_the_bytes_that_a_plan_says(name: str, model: Model, tmp_path: Path) -> None:
    step = Rtn(scheme=name, embeddings=None).resolve(model, (WHERE[name],))
    recipe = Recipe(model="m", steps=(step,), export=(WHERE[name],))
    step.apply(model, context(tmp_path))
    held = sum(path.stat().st_size for path in (tmp_path / "work" / "objects").iterdir())
    assert held == written_bytes(model, recipe).work_bytes
    lines = (tmp_path / "work" / JOURNAL).read_bytes().splitlines()
    scheme = json.loads(lines[1].partition(b" ")[2])["schemes"][model.linears[0]]
    assert scheme["codebook"] == NAMED[name].codebook


def test_what_is_not_said_is_exported_where_it_can_be(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "m", "llama")
    for name, exports in (
        ("NF4", ("bitsandbytes",)),
        ("IQ4_NL", ("gguf",)),
        ("NVFP4", ("folder",)),
        ("MXFP4", ("gguf", "folder")),
    ):
        assert default_export(str(folder), (Rtn(scheme=name),)) == exports


def test_exports_without_tables_say_so() -> None:
    assert unstorable("iq4_nl", "gguf") is None and unstorable("NF4", "awq") == "the codebook NF4"
