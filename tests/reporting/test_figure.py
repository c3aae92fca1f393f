"""Numbers as people write them."""

from __future__ import annotations

import math

import pytest

from pocketsize.measurement.measurement import Measurement
from pocketsize.reporting import figure


def measured(name: str, value: float, unit: str) -> Measurement:
    return Measurement(name, value, unit, "lower", "a count", "compressed")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (134_515_008, "134,515,008"),
        (412.0, "412"),
        (30.778, "30.78"),
        (1.0123, "1.012"),
        (0.0412, "0.0412"),
        (0.9934, "0.993"),
        (3.14e-5, "3.1\u00a0×\u00a010⁻⁵"),
        (2e18, "2.0\u00a0×\u00a010¹⁸"),
        (-2.5, "−2.500"),
        (math.inf, "not a number"),
    ],
)
def test_number(value: float, text: str) -> None:
    assert figure.number(value) == text


def test_ends_of_an_interval_have_the_decimals_of_its_middle() -> None:
    assert figure.number(1.0, like=1.0294) == "1.000"
    assert figure.number(1e-5, like=0.02) == "0.0000"
    assert figure.percent(1.0, like=0.003) == "100.00\u00a0%"


@pytest.mark.parametrize(
    ("share", "text"), [(0.9609, "96.1"), (0, "0.0"), (0.0032, "0.32"), (0.000031, "0.0031"), (2.5, "250.0")]
)
def test_percent(share: float, text: str) -> None:
    assert figure.percent(share) == f"{text}\u00a0%"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0\u00a0bytes"),
        (999, "999\u00a0bytes"),
        (1000, "1.00\u00a0kB"),
        (77_214_816, "77.2\u00a0MB"),
        (999_600_000, "1.00\u00a0GB"),
        (5e15, "5,000\u00a0TB"),
        (-12, "−12\u00a0bytes"),
    ],
)
def test_size(count: float, text: str) -> None:
    assert figure.size(count) == text


def test_forms_follow_the_name_and_then_the_unit() -> None:
    assert figure.form_of(measured("top1", 0.9, "whatever")) == "percent"
    assert figure.form_of(measured("brand_new", 0.9, "share")) == "percent"
    assert figure.form_of(measured("brand_new", 9.0, "flurbs")) == "plain"
    assert figure.unit_of(measured("brand_new", 9.0, "flurbs")) == "flurbs"
    assert figure.unit_of(measured("perplexity", 9.0, "perplexity")) == ""


def test_unknown_measurements_keep_their_name_and_get_a_table() -> None:
    assert figure.words_of("energy_per_token") == figure.Words("energy per token", "", "other")
    assert figure.words_of("energy_per_token", timed=True).group == "speed"


def test_clean_replaces_what_no_page_can_hold_and_nothing_else() -> None:
    assert figure.clean("naïve 模型\n\ttab\u00a0·\u2009é") == "naïve 模型\n\ttab\u00a0·\u2009é"
    assert figure.clean("a\x00b\ud800c\u202ed\x1be") == "a\ufffdb\ufffdc\ufffdd\ufffde"
