"""The options of `quantize` as steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest

from pocketsize.api import arch_of
from pocketsize.cli import options
from tiny import write_tiny

USUAL: dict[str, Any] = {
    **{"method": "gptq", "scheme": "W2A16", "group": "auto", "symmetric": None, "float_zeros": None},
    **{"embeddings": "auto", "damp": None, "override": (), "effort": "fast", "tune": None},
}
SCALES = {"codes": False, "batch": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    room = tmp_path_factory.mktemp("models")
    return {family: write_tiny(room / family, family) for family in ("llama", "bert", "mixtral")}


def step(folder: Path, **given: Any) -> dict[str, Any]:
    return options.raw_step(**USUAL | given, arch=lambda: arch_of(str(folder)))


@pytest.mark.parametrize(
    ("family", "given", "kind", "more"),
    [
        ("llama", {}, "gptq", {}),
        ("llama", {"effort": "balanced"}, "gptq", {"alpha": 0.25, "learn": 20}),
        ("llama", {"effort": "best"}, "qat", {"alpha": 0.25, "learn": 100, "tokens": "128k", **SCALES}),
        ("llama", {"tune": "64k"}, "qat", {"tokens": "64k", **SCALES}),
        ("bert", {"effort": "best"}, "gptq", {"alpha": 0.25, "learn": 100}),
        ("mixtral", {"effort": "balanced"}, "gptq", {"learn": 20}),
    ],
    ids=str,
)
def test_effort_and_tuning_are_keys_of_a_step(
    folders: dict[str, Path], family: str, given: dict[str, Any], kind: str, more: dict[str, Any]
) -> None:
    ((found, keys),) = step(folders[family], **given).items()
    (plain,) = step(folders[family]).values()
    assert found == kind and keys == plain | more


@pytest.mark.parametrize(
    ("given", "said"),
    [({"method": "rtn", "tune": "1k"}, "--method gptq"), ({"damp": 0.1, "tune": "1k"}, "--damp")],
    ids=str,
)
def test_what_is_not_tuned_is_refused(folders: dict[str, Path], given: dict[str, Any], said: str) -> None:
    with pytest.raises(click.UsageError, match=said):
        step(folders["llama"], **given)
