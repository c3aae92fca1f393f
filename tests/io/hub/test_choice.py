"""Which files of a repository are fetched, and which never."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pocketsize.errors import DataError, PocketsizeError, RefusedError, UnsupportedError, UsageError
from pocketsize.exporting.companions import MODULES, NAMES
from pocketsize.io.hub.choice import choose, shards
from pocketsize.io.hub.ids import HubId

ASKED = HubId("org/name")
NEVER = (
    "modeling_x.py",
    "tokenization_x.py",
    "LICENSE.py",
    "tokenizer.json.py",
    "pytorch_model.bin",
    "training_args.bin",
    "flax_model.msgpack",
    "tf_model.h5",
    "consolidated.safetensors",
    "adapter_model.safetensors",
    "onnx/model.onnx",
    "original/params.json",
    "runs/events.out",
    ".gitattributes",
    "../config.json",
    "/config.json",
    "a/../config.json",
    "1_Pooling/../config.json",
    "additional_chat_templates/../../x.jinja",
    "model.fp16.safetensors",
    "a.gguf",
    "1_Pooling/pytorch_model.bin",
    "run.sh",
    "config.json\n",
)


def test_all_that_a_folder_needs_and_nothing_else() -> None:
    wanted = [
        "config.json",
        "model.safetensors",
        *NAMES,
        MODULES,
        "1_Pooling/config.json",
        "additional_chat_templates/tool_use.jinja",
        "README.md",
        "LICENSE-APACHE",
        "USE_POLICY.md",
    ]
    assert sorted(choose(ASKED, [*wanted, *NEVER])) == sorted(wanted)


def test_the_single_file_comes_before_an_index() -> None:
    names = ["config.json", "model.safetensors", "model.safetensors.index.json"]
    assert choose(ASKED, names) == ["config.json", "model.safetensors"]


def test_gguf_files_come_only_by_name_and_all_parts_of_one() -> None:
    parts = [f"Q8/m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    names = [
        "config.json",
        "model.safetensors",
        "m-Q4.gguf",
        "LICENSE",
        "x.py",
        *parts,
        "Q8/n-00001-of-00003.gguf",
    ]
    assert choose(HubId("org/name", None, "m-Q4.gguf"), names) == ["LICENSE", "m-Q4.gguf"]
    assert choose(HubId("org/name", None, parts[0]), names) == ["LICENSE", *parts]
    with pytest.raises(UsageError, match=r"no file 'm-Q5.gguf'; did you mean 'm-Q4.gguf'"):
        choose(HubId("org/name", None, "m-Q5.gguf"), names)


@pytest.mark.parametrize(
    ("names", "kind", "words"),
    [
        (["config.json", "pytorch_model.bin"], RefusedError, "pickles only (pytorch_model.bin)"),
        (["adapter_config.json", "adapter_model.safetensors"], UnsupportedError, "an adapter"),
        (["config.json", "b.gguf", "a.gguf"], UsageError, "(2 there are): --file a.gguf"),
        (["params.json", "consolidated.safetensors"], UnsupportedError, "holds consolidated.safetensors"),
        (["model.safetensors"], UnsupportedError, "no config.json"),
        (["README.md"], DataError, "no model in it"),
    ],
)
def test_repositories_without_a_model(names: list[str], kind: type[PocketsizeError], words: str) -> None:
    with pytest.raises(kind) as caught:
        choose(ASKED, names)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("named", "kind"),
    [
        ("../a.safetensors", RefusedError),
        ("/a.safetensors", RefusedError),
        ("a.bin", RefusedError),
        ("sub/a.safetensors", RefusedError),
        (7, RefusedError),
        ("b.safetensors", DataError),
    ],
)
def test_shards_must_lie_beside_the_index(named: object, kind: type[PocketsizeError], tmp_path: Path) -> None:
    index = tmp_path / "index.json"
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": named}}))
    with pytest.raises(kind):
        shards(ASKED, index, ["a.safetensors", "../a.safetensors", "a.bin", "sub/a.safetensors"])


def test_an_index_without_a_map(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(DataError, match="no weight_map"):
        shards(ASKED, tmp_path / "index.json", [])
