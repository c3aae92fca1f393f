"""Bad models: one line that names file and tensor, the right exit code, and no change on disk."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pocketsize.cli.main import main
from pocketsize.models import probe
from tiny import write_tiny

WEIGHTS = "model.safetensors"
MARKER = "code-was-run"
NAME = "model.layers.1.mlp.up_proj.weight"
Spoil = Callable[[Path], object]


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    """Spoils the tensors of the only weights file."""

    def spoil(folder: Path) -> None:
        held = load_file(folder / WEIGHTS)
        change(held)
        save_file(held, folder / WEIGHTS, metadata={"format": "pt"})

    return spoil


def set_value(value: float, count: int = 1) -> Spoil:
    """Puts a value into a weight, first at row 3, column 5."""

    def change(held: dict[str, torch.Tensor]) -> None:
        held[NAME][3, 5 : 5 + count] = value

    return tensors(change)


def config(file: str = "config.json", **keys: Any) -> Spoil:
    """Sets keys of a JSON file."""

    def spoil(folder: Path) -> None:
        raw = json.loads((folder / file).read_text()) | keys
        (folder / file).write_text(json.dumps(raw))

    return spoil


def text(file: str, content: str | bytes) -> Spoil:
    """Replaces a file."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / file).write_bytes(data)


def index(where: dict[str, str]) -> Spoil:
    """An index in place of the single file."""

    def spoil(folder: Path) -> None:
        (folder / WEIGHTS).rename(folder / "one.safetensors")
        names = dict.fromkeys(load_file(folder / "one.safetensors"), "one.safetensors") | where
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))

    return spoil


def truncate(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[:-1000])


def only_a_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))


def an_adapter(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')


class Evil:
    """Unpickled, it leaves a file beside the model."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch '{self.marker}'",)


def evil_archive(folder: Path) -> None:
    """Weights as torch stores them, with code inside, and a CRC that is wrong."""
    (folder / WEIGHTS).unlink()
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Evil(folder.parent / MARKER)))
    path.write_bytes(path.read_bytes().replace(b"touch", b"TOUCH", 1))


def own_code(folder: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(folder.parent / MARKER)!r}, 'w')\nclass Model: pass\n")
    config(auto_map={"AutoModel": "evil.Model", "AutoConfig": "evil.Model"})(folder)


def two_words(raw: dict[str, Any]) -> None:
    """The merge is longer than the prefix leaves: the library of tokenizers panics."""
    raw["model"] |= {"vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]}
    raw["added_tokens"] = []


def sentencepiece(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\x0a\xff\xff\xff\x7f" + b"a" * 100_000)


def zero_shard(folder: Path) -> None:
    index({})(folder)
    (folder / "one.safetensors").write_bytes(bytes((folder / "one.safetensors").stat().st_size))


def rename(old: str, new: str) -> Spoil:
    return tensors(lambda held: held.update({new: held.pop(old)}))


def tokenizer(change: Callable[[dict[str, Any]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        raw = json.loads((folder / "tokenizer.json").read_text())
        change(raw)
        (folder / "tokenizer.json").write_text(json.dumps(raw))

    return spoil


# What is done to the folder, the exit code, and words the one line must hold.
FAULTS: dict[str, tuple[Spoil, int, tuple[str, ...]]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), 3, ("config.json: missing",)),
    "empty config": (text("config.json", ""), 3, ("config.json: empty",)),
    "config not json": (text("config.json", "{model_type: llama}"), 3, ("config.json: not sound JSON",)),
    "config key twice": (text("config.json", '{"a":1,"a":2}'), 3, ("config.json", "'a' is there twice")),
    "config with nan": (text("config.json", '{"a":NaN}'), 3, ("config.json", "NaN is not a JSON number")),
    "config a pickle": (text("config.json", pickle.dumps({})), 9, ("config.json", "can run code")),
    "config with a mark": (
        lambda folder: (folder / "config.json").write_bytes(
            b"\xef\xbb\xbf" + (folder / "config.json").read_bytes()
        ),
        3,
        ("config.json: not sound JSON", "BOM"),
    ),
    "config nested": (
        text("config.json", '{"a":' + "[" * 200_000),
        3,
        ("config.json: JSON nested too deep",),
    ),
    "config with a long number": (
        text("config.json", '{"a":' + "1" * 5000 + "}"),
        3,
        ("config.json: not sound JSON",),
    ),
    "config beyond the limit": (
        lambda folder: os.truncate(folder / "config.json", 17 << 20),
        3,
        ("config.json: 17825792 bytes; at most 16777216",),
    ),
    "config a list": (text("config.json", "[1]"), 3, ("config.json", "found list")),
    "no family": (config(model_type=None), 3, ("config.json: model_type is None",)),
    "unknown family": (
        config(model_type="lama"),
        4,
        ("config.json", "'lama' is not known; did you mean 'llama'?", "models/archs/lama.py"),
    ),
    "auto_map": (own_code, 9, ("config.json: auto_map",)),
    "adapter": (an_adapter, 4, ("an adapter; merge it into its base model 'org/base'",)),
    "kernel from a hub": (
        config(_attn_implementation="org/kernel"),
        9,
        ("_attn_implementation 'org/kernel'",),
    ),
    "nested kernel": (config(text_config={"attn_implementation": "o/k:f"}), 9, ("attn_implementation",)),
    "hidden as text": (config(hidden_size="64"), 3, ("config.json: hidden_size is '64'",)),
    "hidden zero": (config(hidden_size=0), 3, ("config.json: hidden_size is 0",)),
    "hidden a fraction": (config(hidden_size=64.0), 3, ("config.json: hidden_size is 64.0",)),
    "hidden null": (config(hidden_size=None), 3, ("config.json: hidden_size is None",)),
    "hidden negative": (config(hidden_size=-64), 3, ("config.json: hidden_size is -64",)),
    "hidden huge": (config(hidden_size=2**40), 3, ("config.json: hidden_size",)),
    "heads do not divide": (config(num_attention_heads=5, head_dim=None), 3, ("num_attention_heads 5",)),
    "kv heads do not divide": (config(num_key_value_heads=3), 3, ("num_key_value_heads 3",)),
    "epsilon zero": (config(rms_norm_eps=0), 3, ("config.json: rms_norm_eps is 0",)),
    "epsilon infinite": (
        lambda folder: (folder / "config.json").write_text(
            re.sub(r'"rms_norm_eps": [^,]+', '"rms_norm_eps": 1e999', (folder / "config.json").read_text())
        ),
        3,
        ("config.json: rms_norm_eps is inf",),
    ),
    "rope theta zero": (
        config(rope_parameters={"rope_type": "default", "rope_theta": 0}),
        3,
        ("config.json: rope_theta is 0",),
    ),
    "rope theta not a number": (config(rope_theta="1e4"), 3, ("config.json: rope_theta is '1e4'",)),
    "zeros of no kind": (config(sparsity="half"), 3, ("config.json: sparsity is 'half'", "remove the key")),
    "zeros that say nothing": (config(sparsity={}), 3, ("config.json: sparsity.structure is None", "remove")),
    "zeros of no pattern": (
        config(sparsity={"structure": "7:x", "share": 0.5}),
        3,
        ("config.json: sparsity.structure is '7:x'", "such as 2:4", "remove the key"),
    ),
    "zeros beyond all": (
        config(sparsity={"structure": "unstructured", "share": 1.5}),
        3,
        ("config.json: sparsity.share is 1.5", "remove the key"),
    ),
    "zeros as text": (
        config(sparsity={"structure": "unstructured", "share": "0.5"}),
        3,
        ("config.json: sparsity.share is '0.5'",),
    ),
    "zeros of another pattern": (
        config(sparsity={"structure": "2:4", "share": 0.9}),
        3,
        ("config.json: sparsity.share is 0.9; 2:4 makes 0.5 zero",),
    ),
    "zeros uneven as text": (
        config(sparsity={"structure": "2:4", "share": 0.5, "uneven": "no"}),
        3,
        ("config.json: sparsity.uneven is 'no'",),
    ),
    "zeros of no rank": (
        config(sparsity={"structure": "2:4", "share": 0.5, "rank": 64}),
        3,
        ("config.json: sparsity.rank is 64",),
    ),
    "zeros that are not there": (
        config(sparsity={"structure": "unstructured", "share": 0.5}),
        3,
        (WEIGHTS, "layers.0.", "of its weights are zero", "config.json says sparsity: unstructured, 0.5"),
    ),
    "groups without their zeros": (
        config(sparsity={"structure": "2:4", "share": 0.5}),
        3,
        (WEIGHTS, "layers.0.", "groups of 4 keep more than 2", "config.json says sparsity: 2:4, 0.5"),
    ),
    "end token outside": (config(eos_token_id=[2, 400]), 3, ("config.json: eos_token_id is 400",)),
    "first token outside": (config(bos_token_id=-2), 3, ("config.json: bos_token_id is -2",)),
    "end token of generation outside": (
        config("generation_config.json", eos_token_id=400),
        3,
        ("generation_config.json: eos_token_id is 400, outside the vocabulary of 320",),
    ),
    "vocabulary too large": (config(vocab_size=1000), 3, (WEIGHTS, "model.embed_tokens.weight", "[320, 64]")),
    "one layer too few": (
        config(num_hidden_layers=1),
        3,
        (WEIGHTS, "unexpected tensor model.layers.1.", "num_hidden_layers 1"),
    ),
    "one layer too many": (config(num_hidden_layers=3), 3, (WEIGHTS, "model.layers.2.", "missing")),
    "head missing": (
        config(tie_word_embeddings=False),
        3,
        ("lm_head.weight is missing", "tie_word_embeddings"),
    ),
    "head differs": (
        tensors(lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"] + 1})),
        3,
        (WEIGHTS, "lm_head.weight differs", "by up to 1"),
    ),
    "truncated": (truncate, 3, (WEIGHTS, "truncated in tensor", "1000 bytes are missing")),
    "missing tensor": (tensors(lambda held: held.pop(NAME)), 3, (WEIGHTS, NAME, "missing")),
    "renamed tensor": (rename(NAME, NAME.replace("up_", "upp_")), 3, (NAME, "did you mean", "upp_proj")),
    "unexpected tensor": (
        tensors(lambda held: held.update({"model.extra.weight": torch.ones(2)})),
        3,
        (WEIGHTS, "unexpected tensor model.extra.weight"),
    ),
    "wrong shape": (
        tensors(lambda held: held.update({NAME: torch.ones(64, 128)})),
        3,
        (WEIGHTS, NAME, "[64, 128]", "[128, 64]"),
    ),
    "no rows": (tensors(lambda held: held.update({NAME: torch.ones(0, 64)})), 3, (WEIGHTS, NAME, "[0, 64]")),
    "whole numbers": (
        tensors(lambda held: held.update({NAME: held[NAME].long()})),
        3,
        (WEIGHTS, NAME, "stored as I64"),
    ),
    "truth values": (
        tensors(lambda held: held.update({NAME: held[NAME] > 0})),
        3,
        (WEIGHTS, NAME, "stored as BOOL"),
    ),
    "double precision": (
        tensors(lambda held: held.update({NAME: held[NAME].double()})),
        3,
        (WEIGHTS, NAME, "stored as F64; needed: F32"),
    ),
    "NaN": (set_value(float("nan"), 2), 6, (WEIGHTS, NAME, "2 of 8192 numbers are NaN", "[3, 5]")),
    "Inf": (set_value(float("inf")), 6, (WEIGHTS, NAME, "1 of 8192 numbers are infinite", "[3, 5]")),
    "-Inf": (set_value(float("-inf")), 6, (WEIGHTS, NAME, "infinite")),
    "shard leaves the folder": (
        index({NAME: "../one.safetensors"}),
        9,
        ("model.safetensors.index.json", NAME, "../one.safetensors leaves the folder"),
    ),
    "shard is absolute": (index({NAME: "/tmp/x.safetensors"}), 9, (NAME, "/tmp/x.safetensors leaves")),
    "shard missing": (index({NAME: "two.safetensors"}), 3, ("two.safetensors: missing", NAME)),
    "shard of zeros": (zero_shard, 3, ("one.safetensors: begins with zeros",)),
    "only a pickle": (only_a_pickle, 9, ("pytorch_model.bin: a pickle",)),
    "only an archive with code": (evil_archive, 9, ("pytorch_model.bin: a pickle",)),
    "tokenizer a pickle": (text("tokenizer.json", pickle.dumps({})), 9, ("tokenizer.json", "can run code")),
    "pickle in disguise": (text(WEIGHTS, pickle.dumps({"a": 1})), 9, (WEIGHTS, "can run code")),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), 3, ("neither model.safetensors nor",)),
    "no tokenizer": (
        lambda folder: [(folder / f"tokenizer{end}.json").unlink() for end in ("", "_config")],
        3,
        ("no tokenizer_config.json or tokenizer.json",),
    ),
    "tokenizer with code": (
        config("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}),
        9,
        ("tokenizer_config.json: auto_map",),
    ),
    "tokenizer too large": (
        tokenizer(lambda raw: raw["model"]["vocab"].update(zebra=320)),
        3,
        ("tokenizer.json: token ids up to 320", "320 rows"),
    ),
    "two tokens, one id": (
        tokenizer(lambda raw: raw["model"]["vocab"].update(zebra=300)),
        3,
        ("tokenizer.json: two tokens have one id",),
    ),
    "token id of 2^31": (
        tokenizer(lambda raw: raw["model"]["vocab"].update(zebra=2**31)),
        3,
        ("tokenizer.json: token ids up to 2147483648", "320 rows"),
    ),
    "token id negative": (
        tokenizer(lambda raw: raw["model"]["vocab"].update(zebra=-1)),
        3,
        ("tokenizer.json: the tokenizer does not load", "-1"),
    ),
    "end token nowhere": (
        config("tokenizer_config.json", eos_token="<nowhere>"),
        3,
        ("tokenizer.json: token ids up to 320", "320 rows"),
    ),
    "expression of tokens": (
        tokenizer(
            lambda raw: raw.update(
                pre_tokenizer={
                    "type": "Split",
                    "pattern": {"Regex": "("},
                    "behavior": "Isolated",
                    "invert": False,
                }
            )
        ),
        3,
        ("tokenizer.json: the tokenizer does not load", "parenthesis"),
    ),
    "tokenizer panics": (tokenizer(two_words), 3, ("tokenizer.json: the tokenizer does not load",)),
    "tokenizer panics on its prefix": (
        tokenizer(lambda raw: (two_words(raw), raw["model"].update(continuing_subword_prefix="##long"))),
        3,
        ("tokenizer.json: the tokenizer does not load",),
    ),
    "tokenizer of another library": (
        sentencepiece,
        3,
        ("tokenizer_config.json: the tokenizer does not load",),
    ),
    "template named by a path": (
        config("tokenizer_config.json", chat_template=[{"name": "../../x", "template": "a"}]),
        9,
        ("tokenizer_config.json: chat_template '../../x' is not a plain name",),
    ),
    "merge of an unknown token": (
        tokenizer(lambda raw: raw["model"]["merges"].append(["zeb", "ra"])),
        3,
        ("tokenizer.json: the tokenizer does not load",),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_model(fault: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spoil, code, words = FAULTS[fault]
    folder = write_tiny(tmp_path / "model", "llama")
    spoil(folder)
    before = _state(tmp_path)
    capfd.readouterr()
    assert main(["inspect", str(folder)]) == code
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error[") and err.count("\n") == 1, err
    assert str(folder) in err and all(word in err for word in words), err
    assert _state(tmp_path) == before  # and with it: no marker of code that was run


def test_a_gguf_file_that_is_a_pickle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.gguf").write_bytes(pickle.dumps(Evil(tmp_path / MARKER)))
    assert main(["inspect", str(tmp_path / "model.gguf")]) == 9
    assert "model.gguf: a pickle" in capsys.readouterr().err and not (tmp_path / MARKER).exists()


def test_a_tokenizer_that_ends_the_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    crash = "print('started', flush=True)\nimport os\nos.kill(os.getpid(), 11)\n"
    monkeypatch.setattr(probe, "_SCRIPT", crash)
    folder = write_tiny(tmp_path / "model", "bert")
    assert main(["inspect", str(folder)]) == 3
    assert "tokenizer.json: the tokenizer does not load: opening it ends the" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["two words", "größe 🙂", "-rf", "a'b\"c$d`e", "n" * 255])
def test_odd_folder_names_work(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tiny(tmp_path / name, "bert")
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "--json", "--", name]) == 0
    assert json.loads(capsys.readouterr().out)["origin"]["name"] == name


@pytest.mark.parametrize(("name", "shown"), [("a\x1b[31mb", r"a\x1b[31mb"), ("a\u202eb", r"a\u202eb")])
def test_names_that_would_command_a_terminal_are_escaped(
    name: str, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).mkdir()
    assert main(["inspect", str(tmp_path / name)]) == 3
    error = capsys.readouterr().err
    assert shown in error and name not in error and error.count("\n") == 1


def test_a_folder_of_mixed_dtypes_is_reported_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiny(tmp_path / "model", "llama")
    halves = {NAME: torch.float16, "model.norm.weight": torch.bfloat16}
    tensors(lambda held: held.update({n: held[n].to(d) for n, d in halves.items()}))(folder)
    assert main(["inspect", str(folder), "--json"]) == 0
    kinds = {row["name"]: row["dtype"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert (kinds.pop(NAME), kinds.pop("model.norm.weight")) == ("F16", "BF16")
    assert set(kinds.values()) == {"F32"}


def test_json_gives_the_same_facts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_tiny(tmp_path / "model", "llama")
    set_value(float("nan"))(folder)
    assert main(["inspect", str(folder), "--json"]) == 6
    facts = json.loads(capsys.readouterr().out)
    assert facts["error"] == "numerical" and facts["exit_code"] == 6 and NAME in facts["message"]


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_missing_tensor_of_an_encoder(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_tiny(tmp_path / "model", family)
    tensors(lambda held: held.pop("pooler.dense.bias"))(folder)
    assert main(["inspect", str(folder)]) == 3
    assert "pooler.dense.bias missing" in capsys.readouterr().err


def _state(folder: Path) -> dict[str, str]:
    """Every file below with its hash."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
