"""The page: whole, self-contained, safe and readable by everyone."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files

import pytest

from pocketsize.measurement.measurement import Measurement
from pocketsize.recipes.record import Finding, RunRecord, SizePart, Stage, StepReport, read_record
from pocketsize.reporting.page import report_html
from reporting.records import bare, encoder, layers, smollm2

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>{{ 7 * 7 }}\x00\ud800\u202e" + "long" * 300
VOID = {"meta", "link", "br", "path", "rect", "circle"}


class Page(HTMLParser):
    """Elements of a page in order, each with its attributes and the text directly inside it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, *tags: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


def hostile() -> RunRecord:
    record = smollm2()
    novel = Measurement(EVIL, 0.5, EVIL, "higher", EVIL, EVIL, "estimated")
    return replace(
        record,
        recipe={EVIL: [EVIL]},
        recipe_sha256=EVIL,
        origin=replace(record.origin, name=EVIL, licence=EVIL, dequantized_from=EVIL),
        task=EVIL,
        machine={EVIL: EVIL},
        versions={EVIL: EVIL},
        texts=(replace(record.texts[0], role=EVIL, name=EVIL, sha256=EVIL),),
        protocol=(EVIL,),
        steps=(
            StepReport(
                EVIL,
                {EVIL: EVIL},
                (replace(layers(1)[0], name=EVIL), replace(layers(1)[0], name=f"h.0.{EVIL}")),
            ),
        ),
        findings=(Finding(EVIL, EVIL, EVIL),),
        measurements=(*record.measurements, novel),
        sizes=tuple(SizePart(EVIL, f"{EVIL}{i}", 10**i) for i in range(12)),
        artifacts=(replace(record.artifacts[1], path=EVIL, format=EVIL, checks=(EVIL,), files={EVIL: EVIL}),),
        timing=replace(record.timing, started=EVIL, phases_s={EVIL: 1.0}, measurements=(novel,)),
    )


def deep() -> RunRecord:
    return replace(smollm2(), steps=(StepReport("gptq", {}, layers(286)),))


CASES = {"smollm2": smollm2, "encoder": encoder, "bare": bare, "hostile": hostile, "deep": deep}


@pytest.fixture(params=CASES, scope="module")
def html(request: pytest.FixtureRequest) -> str:
    return report_html(CASES[request.param]())


def test_nothing_is_requested_and_nothing_runs(html: str) -> None:
    page = Page(html)
    assert not page.named("script", "img", "iframe", "object", "embed", "form", "base", "image", "use")
    assert [a["href"] for a in page.named("link")] == ["data:,"]
    for tag, attributes in page.elements:
        assert not {"src", "srcset", "action", "xlink:href"} & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")], tag
        assert attributes.get("href", "#").startswith("#") or tag == "link"
    assert "://" not in html and "@import" not in html and "url(" not in html
    assert any("default-src 'none'" in a.get("content", "") for a in page.named("meta"))


def test_the_page_can_be_encoded_and_holds_no_control_characters(html: str) -> None:
    text = html.encode("utf-8").decode("utf-8")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", text)


def test_headings_are_in_order(html: str) -> None:
    levels = [int(tag[1]) for tag, _ in Page(html).elements if re.fullmatch(r"h\d", tag)]
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))


def test_tables_have_captions_and_every_header_a_scope(html: str) -> None:
    page = Page(html)
    assert len(page.named("caption")) == len(page.named("table"))
    assert all(th.get("scope") in ("col", "row") for th in page.named("th"))
    assert all(svg.get("aria-label") or svg.get("aria-hidden") for svg in page.named("svg"))


def test_links_within_the_page_lead_somewhere_and_ids_are_unique(html: str) -> None:
    page = Page(html)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in page.named("a")} <= set(ids)


def test_language_viewport_and_both_colour_schemes(html: str) -> None:
    page = Page(html)
    assert page.named("html")[0]["lang"] == "en"
    names = {meta.get("name") for meta in page.named("meta")}
    assert {"viewport", "color-scheme"} <= names
    assert "prefers-color-scheme: dark" in html and "prefers-reduced-motion" in html


def test_the_figures_are_there() -> None:
    text = Page(report_html(smollm2())).text
    for figure in (
        "3.5× smaller than bf16",
        "96.1\u00a0%",
        "30.78",
        "27.93 to 33.86",
        "269\u00a0MB",
        "77.2\u00a0MB",
    ):
        assert figure in text
    assert "relative to the dequantized release (GGUF Q4_1)" in text
    assert "All measured, n\u00a0=\u00a032,704." in text
    assert "Stock transformers unpacks the folder" in text
    assert "little-text" in text and "avx512 bf16" in text.lower()
    for artifact in smollm2().artifacts:
        assert all(sha256 in text for sha256 in artifact.files.values())
        assert all(check in text for check in artifact.checks)


def test_estimates_are_marked() -> None:
    record = replace(
        encoder(), measurements=(Measurement("watts", 3.0, "W", "lower", "model", "compressed", "estimated"),)
    )
    html = report_html(record)
    assert '<span class="range estimated">estimated</span>' in html and "All estimated." in html


def test_hostile_text_is_text() -> None:
    page = Page(report_html(hostile()))
    assert page.text.count("<script>alert(1)</script>") > 20
    assert "{{ 7 * 7 }}" in page.text


def test_two_thousand_layers_make_a_page_of_bearable_size() -> None:
    html = report_html(deep())
    assert len(html) < 600_000
    assert "The table lists the 400 layers with the largest error; all 2,002 are in record.json." in html


def test_a_record_from_disk_gives_the_same_page(tmp_path) -> None:
    record = smollm2()
    (tmp_path / "record.json").write_text(record.to_json(), encoding="utf-8")
    assert report_html(read_record(tmp_path / "record.json")) == report_html(record)


def luminance(colour: str) -> float:
    def linear(c: float) -> float:
        return c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4

    r, g, b = (linear(int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast(scheme: int) -> None:
    css = files("pocketsize.reporting").joinpath("style.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", blocks[scheme]))
    for ground in ("paper", "raised"):
        for text in ("ink", "soft", "denim", "thread", "good", "bad"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    for i in range(8):
        assert contrast(colours[f"c{i}"], colours["paper"]) >= 3, i


def test_stages_are_told_with_what_each_gave() -> None:
    record = smollm2()
    stages = (
        Stage("gptq", 0.0934, kept=True),
        Stage("learned", 0.0857, kept=True),
        Stage(EVIL, 0.1, kept=False),
    )
    page = Page(report_html(replace(record, steps=(replace(record.steps[0], stages=stages),))))
    assert "did not teach, by stage: gptq 0.0934 (kept), learned 0.0857 (kept), " in page.text
    assert "(dropped)." in page.text and not page.named("img")
    assert "before the whole model tuned" not in page.text


@pytest.mark.parametrize("kept", [True, False])
def test_a_page_says_that_errors_are_from_before_scales_were_tuned(kept: bool) -> None:
    record = smollm2()
    stages = (Stage("start", 0.09, kept=True), Stage("tuned", 0.08, kept=kept))
    page = Page(report_html(replace(record, steps=(replace(record.steps[0], stages=stages),))))
    assert ("Errors of layers are those before the whole model tuned its scales." in page.text) == kept


@pytest.mark.parametrize("bare_at", [0, 1, 2])
def test_matrices_without_a_share_of_zeros_stand_among_those_that_have_one(bare_at: int) -> None:
    """An embedding is not pruned."""
    rows = [replace(layer, zeros=None if i == bare_at else 0.5) for i, layer in enumerate(layers(1)[:3])]
    page = report_html(replace(smollm2(), steps=(StepReport("gptq", {}, tuple(rows)),)))
    assert page.count(">Zeros</th>") == 1 and page.count("50.0") >= 2
    Page(page)
    none = [replace(layer, zeros=None) for layer in rows]
    assert ">Zeros</th>" not in report_html(replace(smollm2(), steps=(StepReport("gptq", {}, tuple(none)),)))
