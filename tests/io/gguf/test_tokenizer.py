"""Tokenizers out of GGUF files: as they were before they went in, and refused where they are not sound."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

from pocketsize.cli.main import main
from pocketsize.exporting.gguf.writer import write
from pocketsize.exporting.probes import STRINGS
from pocketsize.io.gguf.pretokenizers import PRE_TOKENIZERS
from pocketsize.models.load import load, tokenizer_of
from tiny import TEXT, write_tiny
from tiny_gguf import write_gguf, write_source

TRIED = [
    *TEXT,
    *STRINGS,
    "  5",
    "12345 x",
    "a  b \n\n 3",
    "    in\n\tout",
    "",
    "It's we'LL",
    "x<|im_end|>y",
    "ÉÉ éé",
]
BLANK = "▁"


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETSIZE_CACHE", str(tmp_path / "cache"))


def byte_level(pre: str) -> Tokenizer:
    """A tokenizer that cuts as `pre` does, trained."""
    made = PRE_TOKENIZERS[pre]
    tokenizer = Tokenizer(models.BPE(ignore_merges=made.whole))
    steps: list[Any] = []
    for step in made.steps:
        match step:
            case ("Split", pattern, _, _):
                steps.append(pre_tokenizers.Split(Regex(str(pattern)), behavior="isolated"))
            case ("Digits", _):
                steps.append(pre_tokenizers.Digits(individual_digits=True))
            case (_, _, regex):
                steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=bool(regex)))
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    if made.normalizer == "NFC":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXT, *STRINGS], trainer)
    return tokenizer


@pytest.mark.parametrize(
    "pre", sorted({id(p): name for name, p in reversed(PRE_TOKENIZERS.items())}.values())
)
def test_each_way_of_cutting_comes_back(pre: str, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", "llama")
    own = byte_level(pre)
    own.save(str(source / "tokenizer.json"))
    write_gguf(tmp_path / "a.gguf", source, pre=pre)
    read = tokenizer_of(load(tmp_path / "a.gguf"))
    first = [1] if PRE_TOKENIZERS[pre].first else []
    for text in TRIED:
        assert read(text).input_ids == first + own.encode(text).ids, text
        composed = unicodedata.normalize("NFC", text) if PRE_TOKENIZERS[pre].normalizer else text
        assert read.decode(read(text).input_ids[len(first) :]) == composed


def sentencepiece(folder: Path) -> None:
    """Give a tiny model a tokenizer of Llama 2's kind."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend(BLANK), normalizers.Replace(" ", BLANK)])
    trained.train_from_iterator(STRINGS[:20], trainers.BpeTrainer(vocab_size=60, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    vocabulary = {token: i for i, token in enumerate([*tokens, *learned["vocab"]])}
    merges = [tuple(merge) for merge in learned["merges"]]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = trained.normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def test_sentencepiece_comes_back(tmp_path: Path) -> None:
    folder = write_tiny(tmp_path / "source", "llama")
    sentencepiece(folder)
    model = load(folder)
    write(model, tmp_path / "a.gguf")
    own, read = tokenizer_of(model), tokenizer_of(load(tmp_path / "a.gguf"))
    theirs = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file="a.gguf")
    for text in TRIED:
        assert read(text).input_ids == own(text).input_ids, text
        assert read.decode(read(text).input_ids) == own.decode(own(text).input_ids)
        if not text.startswith(" "):  # transformers joins blanks at the start to the one it puts there
            assert read(text).input_ids == theirs(text, add_special_tokens=False).input_ids, text


def test_gemma_has_tokens_of_blanks_and_no_blank_in_front(tmp_path: Path) -> None:
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "\n\n", "  ", "   ", *(f"<0x{i:02X}>" for i in range(256))]
    words += [BLANK, "a", "b", "ab", f"{BLANK}a", f"{BLANK}ab", "<0", f"{BLANK}{BLANK}a"]
    words += [f"w{i}" for i in range(320 - len(words))]
    kinds = [3, 3, 3, 3, 4, 4, 4, *([6] * 256)] + [1] * (320 - 263)
    scores = [-1000.0] * 263 + [-float(i) for i in range(320 - 263)]
    changed = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.ggml.add_space_prefix": False,
    }
    source = write_source(tmp_path / "source", "gemma3_text")
    write_gguf(tmp_path / "a.gguf", source, changed=changed, without=("tokenizer.ggml.merges",))
    read = tokenizer_of(load(tmp_path / "a.gguf"))

    def cut(text: str) -> list[str]:
        return read.convert_ids_to_tokens(read(text).input_ids)

    assert cut("ab ab") == ["<bos>", "ab", f"{BLANK}ab"]
    assert cut("   ab") == ["<bos>", BLANK * 3, "ab"]  # a run of blanks is never cut
    assert cut("a\n\nb") == ["<bos>", "a", "\n\n", "b"]
    assert cut("aé<eos>") == ["<bos>", "a", "<0xC3>", "<0xA9>", "<eos>"]
    assert read.decode(read("  a b").input_ids, skip_special_tokens=True) == "  a b"
    theirs = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file="a.gguf")
    for text in ("ab ab", "   ab", "a\n\nb", "  a   b ab", "<pad>a", "x é"):
        assert read(text).input_ids == theirs(text).input_ids, text


TOKENS = [f"t{i}" for i in range(320)]
SPM = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [1] * 320,
}
FAULTS: dict[str, tuple[dict[str, Any], tuple[str, ...], int, str]] = {
    "none": ({}, ("tokenizer.ggml.model",), 3, "no tokenizer.ggml.model"),
    "no tokens": ({}, ("tokenizer.ggml.tokens",), 3, "no tokenizer.ggml.tokens"),
    "another kind": ({"tokenizer.ggml.model": "rwkv"}, (), 4, "tokenizer 'rwkv'; gpt2 and llama are read"),
    "another cut": ({"tokenizer.ggml.pre": "jais"}, (), 4, "tokenizer gpt2/jais"),
    "an unnamed cut": ({}, ("tokenizer.ggml.pre",), 4, "tokenizer gpt2/unnamed"),
    "too few": ({"tokenizer.ggml.tokens": TOKENS[:300]}, (), 3, "300 tokens, the embedding has 320 rows"),
    "twice": ({"tokenizer.ggml.tokens": [*TOKENS[:319], "t5"]}, (), 3, "tokens 5 and 319 are both 't5'"),
    "kinds": ({"tokenizer.ggml.token_type": [1] * 319}, (), 3, "token_type is no list of 320 kinds"),
    "merge without a blank": ({"tokenizer.ggml.merges": ["ab"]}, (), 3, "merge 0 is 'ab'"),
    "merge of an unknown token": ({"tokenizer.ggml.merges": ["a zebra"]}, (), 3, "merge 0: 'zebra' is not a"),
    "first token outside": ({"tokenizer.ggml.bos_token_id": 320}, (), 3, "bos_token_id is 320"),
    "unknown token outside": ({"tokenizer.ggml.unknown_token_id": 320}, (), 3, "unknown_token_id is 320"),
    "a first token without a name": (
        {"tokenizer.ggml.add_bos_token": True},
        ("tokenizer.ggml.bos_token_id",),
        3,
        "add_bos_token is set, and no token is named bos",
    ),
    "no scores": (SPM, (), 3, "no tokenizer.ggml.scores"),
    "scores missing": (SPM | {"tokenizer.ggml.scores": [0.0] * 5}, (), 3, "5 scores for 320 tokens"),
    "byte below 0": (
        SPM
        | {"tokenizer.ggml.tokens": ["<0x-1>", *TOKENS[1:]], "tokenizer.ggml.token_type": [6] + [1] * 319},
        (),
        3,
        "token 0 is byte '<0x-1>'",
    ),
    "byte no number": (
        SPM
        | {"tokenizer.ggml.tokens": [*TOKENS[1:], "<0xZZ>"], "tokenizer.ggml.token_type": [1] * 319 + [6]},
        (),
        3,
        "token 319 is byte '<0xZZ>'",
    ),
    "template no text": ({"tokenizer.chat_template": 5}, (), 3, "tokenizer.chat_template is '5'"),
    "another architecture": ({"general.architecture": "mamba"}, (), 4, "architecture 'mamba' is not read"),
    "heads missing": ({}, ("llama.attention.head_count",), 3, "no llama.attention.head_count"),
    "width 0": ({"llama.embedding_length": 0}, (), 3, "llama.embedding_length is 0"),
    "epsilon 0": ({"llama.attention.layer_norm_rms_epsilon": 0.0}, (), 3, "epsilon is 0.0"),
    "scaled logits": ({"llama.logit_scale": 0.25}, (), 4, "llama.logit_scale is 0.25; such models are not"),
    "windows": (
        {"llama.attention.sliding_window": 64},
        (),
        4,
        "sliding_window is 64; a llama is read without",
    ),
    "experts": ({"llama.expert_count": 8}, (), 4, "a Mixtral of 8 experts"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("llama") / "source", "llama")


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_metadata(fault: str, source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    changed, without, code, words = FAULTS[fault]
    write_gguf(tmp_path / "bad.gguf", source, changed=changed, without=without)
    assert main(["inspect", str(tmp_path / "bad.gguf")]) == code
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and f"{tmp_path / 'bad.gguf'}: " in err and words in err, err
    assert not (tmp_path / "cache").exists()
