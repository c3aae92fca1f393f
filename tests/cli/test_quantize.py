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
SCALES = {"codes": False, "batch": 2, "recompute": True}


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
        ("llama", {"tune": "64k", "damp": 0.1}, "qat", {"damp": 0.1, "tokens": "64k", **SCALES}),
        ("bert", {"effort": "best"}, "gptq", {"alpha": 0.25, "learn": 200}),
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


def test_what_is_not_tuned_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(click.UsageError, match="--method gptq"):
        step(folders["llama"], method="rtn", tune="1k")


def test_k_quants_are_learned_but_not_tuned(folders: dict[str, Path]) -> None:
    ((kind, keys),) = step(folders["llama"], scheme="Q4_K_M", effort="best").items()
    assert kind == "gptq" and keys["learn"] == 100 and keys["scheme"] == "Q4_K_M"


def test_overrides_name_a_scheme_and_perhaps_a_group(folders: dict[str, Path]) -> None:
    given = ("*.down_proj=W3A16:32", "re:.*=(x)_proj=W5A16", "*.o_proj=W4A16:row", "*.q_proj=none")
    ((_, keys),) = step(folders["llama"], override=given).items()
    assert keys["overrides"] == {
        "*.down_proj": {"scheme": "W3A16", "group": 32},
        "re:.*=(x)_proj": {"scheme": "W5A16"},
        "*.o_proj": {"scheme": "W4A16", "group": None},
        "*.q_proj": None,
    }
