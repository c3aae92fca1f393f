"""A GGUF becomes a plain folder: values, order, config and tokenizer, as transformers reads them too."""

from __future__ import annotations

import json
import os
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import LlamaFileType
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from pocketsize.cli.main import main
from pocketsize.data.chat import chat_renderer
from pocketsize.errors import DataError, RefusedError, ResourceError, UnsupportedError, UsageError
from pocketsize.io.gguf import folder as module
from pocketsize.io.gguf import values
from pocketsize.io.gguf.folder import plain_folder
from pocketsize.io.gguf.rope import llama3_divisors
from pocketsize.io.hub.copies import Copy, Kept, write_copy
from pocketsize.models.load import load, tokenizer_of
from pocketsize.models.model import Model
from pocketsize.models.skeleton import materialise
from tiny import TEXT
from tiny_gguf import ARCHITECTURES, write_gguf, write_source

IDS = torch.arange(3, 60)[None] * 5 % 320


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETSIZE_CACHE", str(tmp_path / "cache"))


def logits(model: Model) -> torch.Tensor:
    with torch.no_grad():
        return materialise(model)(IDS).logits


def transformers_logits(path: Path, **missing: object) -> torch.Tensor:
    """What transformers makes of the file; `missing` are keys of the config that it does not read."""
    config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name)
    for key, value in missing.items():
        setattr(config, key, value)
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=module)["tensors"]
    left = module.load_state_dict(read, strict=False).missing_keys
    assert set(left) <= set(getattr(module, "all_tied_weights_keys", {}))
    module.tie_weights()
    with torch.no_grad():
        return module(IDS).logits


# Keys that transformers 5.23 leaves at the value of one release, though the file or llama.cpp tells.
UNREAD: dict[str, dict[str, object]] = {
    "gpt2": {"n_positions": 256, "n_inner": 128},
    "gemma2": {"query_pre_attn_scalar": 32},
    "gemma3_text": {"query_pre_attn_scalar": 32},
    "qwen2": {"layer_types": ["full_attention"] * 2},
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {"norm_topk_prob": True, "moe_intermediate_size": 32},
}


# A file of a Gemma has no head of its own.
UNTIED = [family for family in ARCHITECTURES if not family.startswith("gemma")]
CASES = [*((family, True) for family in ARCHITECTURES), *((family, False) for family in UNTIED)]


@pytest.mark.parametrize(("family", "tied"), CASES)
def test_every_family_is_the_model_it_was(family: str, tied: bool, tmp_path: Path) -> None:
    source = load(write_source(tmp_path / "source", family, tied=tied))
    meant = write_gguf(tmp_path / "a.gguf", source.folder)
    model = load(tmp_path / "a.gguf")
    assert model.config.model_type == family and model.tied is tied
    assert set(model.checkpoint.entries) == set(source.checkpoint.entries)
    shifted = family.startswith("gemma")
    for name in source.checkpoint.entries:
        # One was added to the weights of Gemma's norms, in float32.
        assert torch.allclose(model.original(name), source.original(name), atol=1.2e-7 * shifted, rtol=0), (
            name
        )
        assert shifted or torch.equal(model.original(name), meant[name])
    assert torch.allclose(logits(model), logits(source), atol=1e-5 if shifted else 0)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_logits_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", family, tied=family != "phi3")
    write_gguf(tmp_path / "a.gguf", source, kind=Kind.Q8_0)
    theirs = transformers_logits(tmp_path / "a.gguf", **UNREAD.get(family, {}))
    assert torch.allclose(logits(load(tmp_path / "a.gguf")), theirs, atol=2e-5)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_every_value_is_what_the_file_means(kind: str, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "llama", tied=False)
    file_type = LlamaFileType[f"MOSTLY_{kind}"]
    changed = {"general.file_type": int(file_type)}
    meant = write_gguf(tmp_path / "a.gguf", source, kind=Kind[kind], changed=changed)
    model = load(tmp_path / "a.gguf")
    assert all(torch.equal(model.weight(name), tensor) for name, tensor in meant.items())
    assert model.checkpoint.entries["lm_head.weight"].dtype == (kind if "F" in kind else "F32")
    origin = model.origin
    assert (origin.name, origin.licence, origin.dequantized_from) == ("Tiny", "mit", f"GGUF {kind}")
    assert origin.source_bytes == (tmp_path / "a.gguf").stat().st_size


def test_without_a_file_type_the_type_of_most_weights_is_named(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", write_source(tmp_path / "source", "llama"), kind=Kind.Q5_1)
    assert load(tmp_path / "a.gguf").origin.dequantized_from == "GGUF Q5_1"


def test_tokenizer_is_the_same(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "llama")
    write_gguf(tmp_path / "a.gguf", source)
    ours, theirs = tokenizer_of(load(tmp_path / "a.gguf")), tokenizer_of(load(source))
    for text in [*TEXT, "  5", "In  2024   12 x", "<|im_start|>user\nHi<|im_end|>", "a  b \n\n 3", ""]:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"]
        assert ours.decode(ours(text)["input_ids"]) == text
    chat = [{"role": "user", "content": "12 3"}]
    assert ours.apply_chat_template(chat, tokenize=False) == theirs.apply_chat_template(chat, tokenize=False)
    assert ours.eos_token == "<|im_end|>" and ours.pad_token_id == 2 and ours.unk_token_id == 0


def test_the_end_of_a_turn_ends_an_answer(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "llama")
    write_gguf(tmp_path / "a.gguf", source, changed={"tokenizer.ggml.eot_token_id": 0})
    folder = load(tmp_path / "a.gguf").folder
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [2, 0]


def test_what_newer_files_say_of_windows(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "gemma3_text")
    changed = {"gemma3.attention.sliding_window_pattern": [False, True], "gemma3.rope.freq_base_swa": 20000.0}
    write_gguf(tmp_path / "a.gguf", source, changed=changed)
    config = load(tmp_path / "a.gguf").config
    assert config.layer_types == ["full_attention", "sliding_attention"]
    assert config.rope_parameters["sliding_attention"]["rope_theta"] == 20000.0
    write_gguf(tmp_path / "a.gguf", source, changed={"gemma3.attention.sliding_window_pattern": 2})
    assert load(tmp_path / "a.gguf").config.layer_types == ["sliding_attention", "full_attention"]
    write_gguf(tmp_path / "a.gguf", source, changed={"gemma3.attention.sliding_window_pattern": [True]})
    with pytest.raises(DataError, match=r"sliding_window_pattern is \[True\]"):
        load(tmp_path / "a.gguf")


def test_stretched_rotary_embeddings(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "llama")
    linear = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    write_gguf(tmp_path / "linear.gguf", source, changed=linear)
    rope = load(tmp_path / "linear.gguf").config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["rope_theta"]) == ("linear", 4.0, 10000.0)
    write_gguf(tmp_path / "yarn.gguf", source, changed={"llama.rope.scaling.type": "yarn"})
    with pytest.raises(UnsupportedError, match=r"yarn.gguf: rotary embedding stretched by 'yarn'"):
        load(tmp_path / "yarn.gguf")


@pytest.mark.parametrize(("factor", "low", "known"), [(8.0, 1.0, True), (32.0, 1.0, True), (8.0, 2.0, False)])
def test_the_table_of_llama_3_is_recognised(factor: float, low: float, known: bool, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "llama")
    table = llama3_divisors(10000.0, 16, factor=factor, low=low, high=4.0, old=8192)
    write_gguf(tmp_path / "a.gguf", source, more={"rope_freqs.weight": table.numpy()})
    if known:
        rope = load(tmp_path / "a.gguf").config.rope_parameters
        assert (rope["rope_type"], rope["factor"]) == ("llama3", factor)
        assert rope["original_max_position_embeddings"] == 8192
        return
    with pytest.raises(UnsupportedError, match=r"rope_freqs.weight is not the table of a Llama 3"):
        load(tmp_path / "a.gguf")


def test_the_folder_is_made_once_and_follows_the_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_source(tmp_path / "source", "llama")
    write_gguf(tmp_path / "a.gguf", source)
    first = plain_folder(tmp_path / "a.gguf", tmp_path / "cache" / "gguf")
    monkeypatch.setattr(module, "dequantize_folder", lambda *_: pytest.fail("made again"))
    (tmp_path / "a.gguf").rename(tmp_path / "b.gguf")
    assert load(tmp_path / "b.gguf").folder == first
    monkeypatch.undo()
    monkeypatch.setenv("POCKETSIZE_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "b.gguf", source, kind=Kind.Q8_0)
    assert load(tmp_path / "b.gguf").folder != first
    assert len(os.listdir(tmp_path / "cache" / "gguf")) == 2


def test_a_file_from_the_hub_says_its_repository_and_commit(tmp_path: Path) -> None:
    """Not what the file says of itself: anybody may have written that."""
    here, commit = tmp_path / "fetched", "0123456789abcdef" * 2 + "01234567"
    here.mkdir()
    write_gguf(tmp_path / "a.gguf", write_source(tmp_path / "source", "llama"))
    mine = load(tmp_path / "a.gguf")
    (here / "a.gguf").write_bytes((tmp_path / "a.gguf").read_bytes())
    (here / "origin.json").write_text('{"name": "org/name", "licence": "mit", "revision": ""}')
    write_copy(here, Copy("org/name", commit, "Q4/a.gguf", (Kept("a.gguf", 1, ""),)))
    fetched = load(here / "a.gguf")
    said = fetched.origin
    assert (said.name, said.revision, said.licence) == ("org/name/Q4/a.gguf", commit, "mit")
    assert mine.origin.revision.startswith("sha256:") and fetched.folder != mine.folder
    assert said.source_bytes == (here / "a.gguf").stat().st_size


def test_no_room_is_said_before_a_byte_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "a.gguf", write_source(tmp_path / "source", "llama"))
    usage = namedtuple("usage", "total used free")(0, 0, 1000)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ResourceError, match=r"a.gguf: dequantized it has \d+ bytes, .* 1000 free"):
        load(tmp_path / "a.gguf")
    assert not (tmp_path / "cache").exists()


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "a.gguf", write_source(tmp_path / "source", "llama"), kind=Kind.Q8_0)

    def fail(*_: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(values, "dequantize", fail)
    with pytest.raises(UnsupportedError, match=r"a.gguf: tensor \S+: type Q8_0 cannot be dequantized"):
        load(tmp_path / "a.gguf")
    assert not (tmp_path / "cache").exists()


def test_a_damaged_model_is_named_by_its_own_file(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "llama")
    write_gguf(tmp_path / "a.gguf", source, without=("blk.1.ffn_up.weight",))
    with pytest.raises(DataError) as caught:
        load(tmp_path / "a.gguf")
    assert str(caught.value).startswith(
        f"{tmp_path / 'a.gguf'}: tensor model.layers.1.mlp.up_proj.weight missing"
    )
    assert str(tmp_path / "cache") not in str(caught.value)


def test_a_folder_of_one_file_is_that_file(tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "llama")
    home = tmp_path / "home"
    home.mkdir()
    write_gguf(home / "a.gguf", source)
    (home / "config.json").write_text("{}")
    folder = load(home / "a.gguf").folder
    assert load(home).folder == folder
    (tmp_path / "link.gguf").symlink_to(home / "a.gguf")
    assert load(tmp_path / "link.gguf").folder == folder
    write_gguf(home / "b.gguf", source, kind=Kind.Q8_0)
    with pytest.raises(UsageError, match=r"home: holds 2 GGUF files; give one of them: a.gguf, b.gguf"):
        load(home)


def test_a_template_that_reaches_out_is_refused_when_it_is_used(tmp_path: Path) -> None:
    evil = {"tokenizer.chat_template": "{{ ''.__class__.__mro__ }}"}
    write_gguf(tmp_path / "a.gguf", write_source(tmp_path / "source", "llama"), changed=evil)
    model = load(tmp_path / "a.gguf")
    with pytest.raises(RefusedError, match="__class__"):
        chat_renderer(tokenizer_of(model), model.folder)([("row", [{"role": "user", "content": "a"}])])


def test_the_commands_take_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("xllamacpp")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(" ".join(TEXT) * 60)
    write_gguf(tmp_path / "a.gguf", write_source(tmp_path / "source", "llama"), kind=Kind.Q4_0)
    texts = ["--calibrate", "text.txt", "--evaluate", "text.txt", "--sequences", "2", "--length", "32"]
    scheme = ["--method", "rtn", "--scheme", "W8A16", "--tokens", "256"]
    assert main(["quantize", "a.gguf", *scheme, *texts, "-o", "small"]) == 0
    record = json.loads((tmp_path / "small" / "record.json").read_text())
    assert record["origin"]["dequantized_from"] == "GGUF Q4_0"
    assert [f["code"] for f in record["findings"]].count("already-quantized") == 1
    assert {a["format"] for a in record["artifacts"]} == {"gguf", "folder"}
    own = tmp_path / "small" / "Tiny-Q8_0.gguf"
    again = ["quantize", str(own), *scheme, *texts, "-o", "small", "--overwrite"]
    assert main(again) == 2 and "holds the model itself" in capsys.readouterr().err and own.exists()
    words = ["--data", "text.txt", "--tokens", "256", "--json"]
    assert main(["measure", "a.gguf", "--against", "source", *words]) == 0
    rows = {
        (r["name"], r["subject"]): r["value"] for r in json.loads(capsys.readouterr().out)["measurements"]
    }
    assert rows["kl_mean", "compressed"] > 0 and rows["decode_rate", "a.gguf"] > 0
    assert rows["bytes", "a.gguf"] == (tmp_path / "a.gguf").stat().st_size
