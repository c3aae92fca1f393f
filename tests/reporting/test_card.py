"""The model card: front matter that parses, Markdown that stays what it says."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import yaml

from pocketsize.measurement.measurement import Measurement
from pocketsize.recipes.record import Finding, StepReport
from pocketsize.reporting.card import code, model_card, plain
from reporting.records import GGUF, bare, encoder, smollm2

EVIL = "a|b\n---\n# <img src=x> `x` ``` [l](u) *b*\x00\ud800"


def split(card: str) -> tuple[dict[str, object], str]:
    _, matter, body = card.split("---\n", 2)
    return yaml.safe_load(matter), body


def test_front_matter() -> None:
    matter, _ = split(model_card(smollm2()))
    assert matter == {
        "license": "apache-2.0",
        "base_model": "SmolLM2-135M-Instruct",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pocketsize", "compressed-tensors", "gptq", "gguf"],
    }
    assert split(model_card(encoder()))[0]["pipeline_tag"] == "feature-extraction"


def test_it_says_how_to_run_each_artefact() -> None:
    _, body = split(model_card(smollm2()))
    assert f"llama-cli -m {GGUF}" in body and "AutoModelForCausalLM" in body
    _, body = split(model_card(encoder()))
    assert "llama-cli" not in body and "mean pooling" in body


def test_python_in_the_card_compiles() -> None:
    for record in (smollm2(), encoder()):
        for block in re.findall(r"```python\n(.*?)```", model_card(record), re.DOTALL):
            compile(block, "card", "exec")


def test_figures_protocol_and_limits_are_there() -> None:
    body = model_card(smollm2())
    for words in (
        "96.1\u00a0%",
        "30.78",
        "29.04 to 35.31",
        "All measured",
        "Non-overlapping",
        "seed 0",
        "GGUF Q4\\_1",
        "Stock transformers unpacks the folder",
    ):
        assert words in body
    assert "121 windows" in body


def test_a_bare_record_makes_a_card() -> None:
    assert "## Limits and findings" in model_card(bare())


@pytest.mark.parametrize("field", ["name", "licence", "dequantized_from"])
def test_hostile_text_changes_nothing_around_it(field: str) -> None:
    record = smollm2()
    novel = Measurement(EVIL, 1.0, EVIL, "lower", EVIL, EVIL)
    record = replace(
        record,
        origin=replace(record.origin, **{field: EVIL}),
        findings=(Finding("f", EVIL, EVIL),),
        measurements=(*record.measurements, novel),
        artifacts=(*record.artifacts, replace(record.artifacts[1], path=EVIL)),
    )
    card = model_card(record)
    card.encode()
    matter, body = split(card)
    assert isinstance(matter, dict) and "<img" not in re.sub(
        r"`[^`\n]*`", "", re.sub(r"\\`|```.*?```", "", body, flags=re.DOTALL)
    )
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in body.splitlines() if line.startswith("| ")]
    assert set(widths) == {5}
    headings = [line for line in body.splitlines() if line.startswith("#")]
    assert len(headings) == 5


def test_plain_and_code() -> None:
    assert plain("a|b_c <d>\n e") == "a\\|b\\_c &lt;d&gt; e"
    assert code("x") == "`x`" and code("a`b|c") == "`a'b¦c`"


def test_an_unquantized_folder_asks_for_transformers_alone() -> None:
    record = smollm2()
    folders = tuple(a for a in record.artifacts if a.format == "folder")
    card = model_card(replace(record, steps=(StepReport("layers", {}),), artifacts=folders))
    assert "compressed-tensors" not in card and "pip install transformers`" in card


def test_a_folder_that_only_we_read_says_so() -> None:
    record = smollm2()
    sparse = replace(record.artifacts[0], format="sparse", path="my sparse")
    matter, body = split(model_card(replace(record, artifacts=(sparse,))))
    assert matter["library_name"] == "pocketsize"
    assert "pocketsize measure 'my sparse'" in body and "goes on with random ones" in body
