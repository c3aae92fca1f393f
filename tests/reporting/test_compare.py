"""Before and after: what is set beside what."""

from __future__ import annotations

from dataclasses import replace

from pocketsize.measurement import latency
from pocketsize.measurement.measurement import Measurement
from pocketsize.reporting import compare
from reporting.records import GGUF, bare, encoder, quality, smollm2


def test_perplexity_stands_beside_the_original() -> None:
    rows = {row.name: row for row in compare.rows_of(smollm2(), "quality")}
    row = rows["perplexity"]
    assert row.original is not None and row.compressed is not None
    assert (row.original.text, row.compressed.text) == ("30.78", "32.03")
    assert (row.change, row.verdict) == ("+4.1\u00a0%", "worse")
    assert rows["kl_mean"].original is None and rows["kl_mean"].alone
    assert next(iter(rows)) == "perplexity_ratio"


def test_two_runtimes_are_no_before_and_after() -> None:
    rows = compare.rows_of(smollm2(), "speed")
    assert len(rows) == 6 and all(row.alone for row in rows)
    assert [row.where for row in rows] == ["", "", "", GGUF, GGUF, GGUF]


def test_what_a_folder_does_in_transformers_is_said_where_one_was_quantized() -> None:
    assert "neither faster nor in less memory" in compare.in_transformers(encoder())
    assert compare.in_transformers(bare()) == ""
    split = tuple(replace(step, kind="oats") for step in encoder().steps)
    assert compare.in_transformers(replace(encoder(), steps=split)) == ""
    gguf_only = tuple(a for a in smollm2().artifacts if a.format == "gguf")
    assert compare.in_transformers(replace(smollm2(), artifacts=gguf_only)) == ""
    assert compare.in_transformers(replace(encoder(), steps=())) == ""


def test_one_runtime_is() -> None:
    pair = tuple(
        latency.row("decode_rate", v, "llama.cpp", s, 10) for v, s in ((30.0, "original"), (90.0, GGUF))
    )
    record = replace(smollm2(), timing=replace(smollm2().timing, measurements=pair))
    (row,) = compare.rows_of(record, "speed")
    assert (row.change, row.verdict) == ("3.0×", "better")


def test_every_measurement_is_in_exactly_one_table() -> None:
    record = smollm2()
    novel = Measurement("watts", 3.0, "W", "lower", "meter", "original")
    record = replace(
        record,
        measurements=(*record.measurements, novel),
        timing=replace(record.timing, measurements=(*record.timing.measurements, novel)),
    )
    groups = {g: compare.rows_of(record, g) for g in ("quality", "size", "speed", "other")}
    rows = [row for shown in groups.values() for row in shown]
    everything = [*record.measurements, *record.timing.measurements]
    assert sum(row.compressed is not None for row in rows) == sum(m.subject != "original" for m in everything)
    originals = {row.name for row in rows if row.original is not None}
    assert originals == {m.name for m in everything if m.subject == "original"}
    assert [row.name for row in groups["other"]] == ["watts"]


def test_an_original_of_zero_has_no_relative_change() -> None:
    pair = (quality("perplexity", "x", 0.0, 0, 0, "original"), quality("perplexity", "x", 2.0, 1, 3))
    (row,) = compare.rows_of(replace(smollm2(), measurements=pair), "quality")
    assert row.change == ""


def test_what_rows_share_is_said_once() -> None:
    rows = compare.rows_of(smollm2(), "quality")
    common = compare.in_common(rows)
    assert common == ("All measured, n\u00a0=\u00a032,704.", True)
    assert compare.how(rows[1], common=common) == "exp of the mean negative log-likelihood per token"
    mixed = (rows[0], replace(rows[1], kind="estimated", samples=7))
    said = compare.how(mixed[1], common=compare.in_common(mixed))
    assert said.startswith("estimated; ") and said.endswith("n\u00a0=\u00a07")


def test_sizes_are_shares_of_bf16_and_of_the_download() -> None:
    rows = {row.name: row for row in compare.size_rows(smollm2())}
    assert list(rows) == ["bf16 equivalent", "As downloaded", "Folder", GGUF]
    assert rows[GGUF].of_bf16 == 77_214_816 / 269_030_016
    assert round(rows[GGUF].bits_per_weight or 0, 2) == 4.59
    assert round(rows["As downloaded"].bits_per_weight or 0, 2) == 5.85


def test_summaries() -> None:
    assert compare.summary(smollm2()) == "3.5× smaller than bf16, 96.1\u00a0% of the perplexity kept"
    assert compare.summary(encoder()).endswith("99.3\u00a0% of the similarity ranking kept")
    assert compare.summary(bare()) == "all-mpnet-base-v2, compressed"
    large = replace(encoder().artifacts[0], bytes=500_000_000)
    assert compare.summary(replace(bare(), artifacts=(large,))) == "500\u00a0MB, larger than bf16"


def test_the_headline_prefers_the_quality_of_the_file_that_it_names() -> None:
    record = smollm2()
    own = quality("perplexity_ratio", "share", 0.95, 0.94, 0.96, GGUF)
    assert "95.0" in compare.summary(replace(record, measurements=(*record.measurements, own)))
