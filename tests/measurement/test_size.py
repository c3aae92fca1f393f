"""Sizes against the download and against bf16."""

from pocketsize.measurement.size import sizes
from pocketsize.models.model import Origin

ORIGIN = Origin("tiny", "0" * 64, parameters=1000, source_bytes=4000, bf16_bytes=2000)


def test_ratios_and_bits():
    rows = {(m.name, m.subject): m for m in sizes(ORIGIN, {"model.gguf": 500})}
    assert rows["bytes", "original"].value == 4000
    assert rows["bf16_bytes", "original"].kind == "estimated"
    assert rows["bytes", "model.gguf"].value == 500
    assert rows["ratio_to_download", "model.gguf"].value == 8
    assert rows["ratio_to_bf16", "model.gguf"].value == 4
    assert rows["bits_per_weight", "model.gguf"].value == 4
    assert rows["bits_per_weight", "original"].value == 32
    assert all(m.low is None for m in rows.values())


def test_no_artefact_no_ratio():
    assert {m.subject for m in sizes(ORIGIN, {})} == {"original"}


def test_bits_are_told_of_the_weights_that_there_are():
    rows = {(m.name, m.subject): m for m in sizes(ORIGIN, {".": 500}, parameters=250)}
    assert rows["bits_per_weight", "."].value == 16 and rows["bits_per_weight", "original"].value == 32
    assert rows["ratio_to_bf16", "."].value == 4
