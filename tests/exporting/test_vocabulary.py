"""Tokenizers in GGUF: named only when the rules are known, and cut as the original cuts."""

from __future__ import annotations

import json
import shutil

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from pocketsize.errors import DataError, UnsupportedError
from pocketsize.exporting.gguf.writer import metadata, write
from pocketsize.exporting.probes import STRINGS
from pocketsize.exporting.verify import verify_gguf
from pocketsize.io.gguf.pretokenizers import PRE_TOKENIZERS
from pocketsize.models.load import load

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture
def folder(tmp_path, tiny_llama):
    """A copy of a tiny llama, free to be changed."""
    return shutil.copytree(tiny_llama(True).folder, tmp_path / "in")


def change(folder, **changes):
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def train(folder, pre_tokenizer, **options):
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=ALPHABET, show_progress=False
    )
    tokenizer.train_from_iterator(STRINGS, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def pattern(name):
    return PRE_TOKENIZERS[name].steps[0][1]


def split_then_bytes(pattern):
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@pytest.mark.parametrize(
    ("pre_tokenizer", "options", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), {}, "gpt-2"),
        (split_then_bytes(pattern("llama-bpe")), {"ignore_merges": True}, "llama-bpe"),
        (split_then_bytes(pattern("qwen2")), {}, "qwen2"),
        (split_then_bytes(pattern("tekken")), {"ignore_merges": True}, "tekken"),
        (split_then_bytes(pattern("gpt-4o")), {}, "gpt-4o"),
        (split_then_bytes(pattern("dbrx")), {}, "dbrx"),
    ],
)
def test_byte_level_rules_are_named_and_cut_alike(folder, pre_tokenizer, options, name):
    pytest.importorskip("xllamacpp")
    train(folder, pre_tokenizer, **options)
    model = load(folder)
    assert metadata(model, "F32")["tokenizer.ggml.pre"] == name
    write(model, folder / "m.gguf")
    verify_gguf(model, folder / "m.gguf")


def test_sentencepiece_rules(folder):
    pytest.importorskip("xllamacpp")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.train_from_iterator(STRINGS[:20], trainers.BpeTrainer(vocab_size=60, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    vocabulary = {token: i for i, token in enumerate([*tokens, *learned["vocab"]])}
    merges = [tuple(merge) for merge in learned["merges"]]
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = trained.normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in tokens[:3]])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    made = load(folder)
    fields = metadata(made, "F32")
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"] is True
    write(made, folder / "m.gguf")
    verify_gguf(made, folder / "m.gguf")


def test_token_kinds_and_free_ids(folder):
    fields = metadata(load(folder), "F32")
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list) and isinstance(kinds, list)
    assert tokens[:3] == SPECIAL and kinds[:3] == [3, 3, 3] and len(tokens) == len(kinds) == 320
    assert {kind for token, kind in zip(tokens, kinds, strict=True) if token.startswith("[PAD")} <= {5}


def test_the_turn_end_is_the_stop_token_of_the_template(folder):
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [0, 2]}))
    assert metadata(load(folder), "F32")["tokenizer.ggml.eot_token_id"] == 2
    raw = json.loads((folder / "tokenizer_config.json").read_text())
    raw["chat_template"] = "{{ messages[0]['content'] }}<|endoftext|>"
    (folder / "tokenizer_config.json").write_text(json.dumps(raw))
    assert metadata(load(folder), "F32")["tokenizer.ggml.eot_token_id"] == 0


def test_unknown_rules_are_refused_not_guessed(folder):
    change(folder, pre_tokenizer={"type": "Whitespace"})
    with pytest.raises(UnsupportedError, match=r"no llama\.cpp pre-tokenizer with these rules"):
        metadata(load(folder), "F32")


def test_a_normalizer_is_refused(folder):
    change(folder, normalizer={"type": "NFC"})
    with pytest.raises(UnsupportedError, match="a normalizer is set"):
        metadata(load(folder), "F32")


def test_another_kind_of_tokenizer_is_refused(folder):
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]], "byte_fallback": False}
    change(folder, model=unigram)
    with pytest.raises((UnsupportedError, DataError), match=r"Unigram|tokenizer"):
        metadata(load(folder), "F32")


def test_more_tokens_than_rows(folder):
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["vocab"]["zzzz"] = 320
    (folder / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match="'zzzz' has id 320, the embedding has 320 rows"):
        metadata(load(folder), "F32")
