"""The options of `quantize` as a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest

from pocketsize.api import writes_text
from pocketsize.cli import options
from tiny import write_tiny

USUAL: dict[str, Any] = {
    **{"method": "gptq", "scheme": "W2A16", "group": "auto", "symmetric": None, "float_zeros": None},
    **{"embeddings": "auto", "damp": None, "override": (), "effort": "fast", "tune": None},
}


def step(*, writes: bool = True, **given: Any) -> dict[str, Any]:
    return options.raw_step(**USUAL | given, writes=lambda: writes)


@pytest.mark.parametrize(
    ("given", "kind", "more"),
    [
        ({}, "gptq", {}),
        ({"effort": "balanced"}, "gptq", {"learn": 20}),
        ({"effort": "best"}, "qat", {"learn": 100, "codes": False, "tokens": "128k", "batch": 2}),
        ({"effort": "best", "tune": "1M"}, "qat", {"learn": 100, "codes": False, "tokens": "1M", "batch": 2}),
        ({"effort": "best", "writes": False}, "gptq", {"learn": 100}),
        ({"tune": "64k"}, "qat", {"codes": False, "tokens": "64k", "batch": 2}),
    ],
    ids=str,
)
def test_effort_and_tuning_are_keys_of_a_step(given: dict[str, Any], kind: str, more: dict[str, Any]) -> None:
    ((found, keys),) = step(**given).items()
    (plain,) = step().values()
    assert found == kind and keys == plain | more


@pytest.mark.parametrize(
    ("given", "said"),
    [({"method": "rtn", "tune": "1k"}, "--method gptq"), ({"damp": 0.1, "tune": "1k"}, "--damp")],
    ids=str,
)
def test_what_is_not_tuned_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(click.UsageError, match=said):
        step(**given)


def test_who_writes_text(tmp_path: Path) -> None:
    assert writes_text(str(write_tiny(tmp_path / "a", "llama")))
    assert not writes_text(str(write_tiny(tmp_path / "b", "bert")))
