"""Tiny models of each family: two layers, random weights, a real tokenizer, a few hundred kilobytes."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)
from transformers.core_model_loading import revert_weight_conversion

from pocketsize.io.checkpoint import TensorSpec, write_safetensors
from tiny_configs import ENCODERS, FAMILIES, FFN, GENERATORS, HIDDEN, LAYERS, VOCAB, tiny_config

__all__ = [
    "ENCODERS",
    "FAMILIES",
    "FFN",
    "GENERATORS",
    "HIDDEN",
    "TEXT",
    "VOCAB",
    "write_texts",
    "write_tiny",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = (
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "A model is small when it fits in a pocket; it is good when it still answers.",
    "Numbers such as 3, 14 and 159 are split into digits. So are dates: 2026-11-23.",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))",
    "Every weight is rounded to a grid, and the error moves on to the next column.",
    "Ärger über Größe: naïve café, Ελλάδα, 東京, emoji 🙂.",
)


def write_tiny(
    folder: Path,
    family: str,
    *,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    tied: bool = True,
    seed: int = 0,
    wide: bool = False,
    classes: tuple[str, ...] = (),
    blocks: int | None = None,
) -> Path:
    """The folder, now holding a tiny model of a family. `tied` matters to generators.

    With `classes`, it is a classifier of texts into these.

    `wide`: rows of 256 and 512 weights, for families whose heads have a width of their own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny_config(family, tied=tied)
    if blocks is not None:
        config.num_hidden_layers = blocks
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[i % LAYERS] for i in range(blocks)]
    if wide:
        config.hidden_size, config.head_dim, config.intermediate_size = 256, 64, 512
    if classes:
        config.id2label = dict(enumerate(classes))
        config.label2id = {name: i for i, name in enumerate(classes)}
    config.save_pretrained(folder)
    _mark_architecture(folder, config, dtype, bool(classes))
    tensors = weights(config, dtype, seed, classifies=bool(classes))
    if family == "mobilebert":
        # It reads its neighbours' embeddings, so a token before padding is another one than the last.
        tensors[f"{'mobilebert.' if classes else ''}embeddings.word_embeddings.weight"][0] = 0
    if family == "llama" and tied and not classes:
        del tensors["lm_head.weight"]
    write_weights(folder, tensors, shards)
    if family in GENERATORS:
        _write_bpe(folder)
        ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
        (folder / "generation_config.json").write_text(json.dumps({"_from_model_config": True} | ids))
    else:
        _write_wordpiece(folder, family)
    return folder


def write_texts(folder: Path) -> tuple[str, str]:
    """Two files of words, to calibrate and to evaluate, for where it does not matter what they say."""
    names = []
    for i, role in enumerate(("calibrate", "evaluate")):
        draw = random.Random(i)
        words = [f"{draw.choice('bcdfgklmnprst')}{draw.choice('aeiou')}" for _ in range(6000)]
        sentences = [" ".join(words[a : a + 10]).capitalize() + "." for a in range(0, len(words), 10)]
        (folder / f"{role}.txt").write_text(" ".join(sentences))
        names.append(str(folder / f"{role}.txt"))
    return names[0], names[1]


def weights(
    config: PretrainedConfig, dtype: torch.dtype, seed: int, *, classifies: bool = False
) -> dict[str, torch.Tensor]:
    """Random tensors for every name, scaled so that activations neither die nor explode.

    Inputs of matrices are correlated across columns through the low-rank part of what feeds
    them, which is what makes calibrated rounding differ from plain rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, shape in sorted(_shapes(config, classifies=classifies).items()):
        if "norm" in name.lower() or ".ln_" in name:
            noise = 0.1 * torch.randn(shape, generator=generator)
            made[name] = noise if name.endswith("bias") else 1 + noise
        elif len(shape) == 1:
            made[name] = 0.02 * torch.randn(shape, generator=generator)
        elif "embed" in name:
            made[name] = 0.5 * torch.randn(shape, generator=generator)
        else:
            rows, columns = shape[0], math.prod(shape[1:])
            low = torch.randn(rows, 8, generator=generator) @ torch.randn(8, columns, generator=generator)
            full = torch.randn(rows, columns, generator=generator)
            made[name] = ((0.7 * full + 0.7 * low / math.sqrt(8)) / math.sqrt(columns)).view(shape)
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def write_weights(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """The tensors as model.safetensors, or as shards with their index."""
    if shards == 1:
        _write_file(folder / "model.safetensors", tensors)
        return
    names = list(tensors)
    where = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i::shards]
        _write_file(folder / file, {name: tensors[name] for name in part})
        where |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.itemsize for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def rename_token(folder: Path, number: int) -> None:
    """Let the token of this number be another word; merges that make it or need it are gone."""
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text())
    words = raw["model"]["vocab"]
    token = next(token for token, own in words.items() if own == number)
    words["\u0120pocket-sized"] = words.pop(token)
    raw["model"]["merges"] = [pair for pair in raw["model"]["merges"] if token not in ("".join(pair), *pair)]
    path.write_text(json.dumps(raw))


def _write_file(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    specs = [TensorSpec(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()]
    write_safetensors(path, specs, {"format": "pt"})


def _mark_architecture(folder: Path, config: PretrainedConfig, dtype: torch.dtype, classifies: bool) -> None:
    """What save_pretrained of a whole model would have added to the config."""
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | {"architectures": [type(_module(config, classifies)).__name__]}
    raw["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(raw, indent=2))


def _module(config: PretrainedConfig, classifies: bool = False) -> torch.nn.Module:
    """The stock module of a config, without numbers."""
    auto = AutoModelForCausalLM if config.model_type in GENERATORS else AutoModel
    auto = AutoModelForSequenceClassification if classifies else auto
    with torch.device("meta"):
        return auto.from_config(config)


def _shapes(config: PretrainedConfig, *, classifies: bool = False) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a family as stock transformers saves them.

    Three families are written out by hand, head included: what is found must be what was meant.
    """
    h, f, v = HIDDEN, FFN, VOCAB
    if classifies or config.model_type not in ("llama", "bert", "mpnet"):
        module = _module(config, classifies)
        state = {n: t for n, t in module.state_dict().items() if n not in module.all_tied_weights_keys}
        return {name: tuple(t.shape) for name, t in revert_weight_conversion(module, state).items()}
    if config.model_type == "llama":
        shapes = {"model.embed_tokens.weight": (v, h), "lm_head.weight": (v, h), "model.norm.weight": (h,)}
        for i in range(config.num_hidden_layers):
            block = {
                "self_attn.q_proj": (h, h),
                "self_attn.k_proj": (h // 2, h),
                "self_attn.v_proj": (h // 2, h),
                "self_attn.o_proj": (h, h),
                "mlp.gate_proj": (f, h),
                "mlp.up_proj": (f, h),
                "mlp.down_proj": (h, f),
                "input_layernorm": (h,),
                "post_attention_layernorm": (h,),
            }
            shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
        return shapes
    shapes = {
        "embeddings.word_embeddings.weight": (v, h),
        "embeddings.position_embeddings.weight": (256, h),
        "embeddings.LayerNorm.weight": (h,),
        "embeddings.LayerNorm.bias": (h,),
        "pooler.dense.weight": (h, h),
        "pooler.dense.bias": (h,),
    }
    if config.model_type == "bert":
        shapes["embeddings.token_type_embeddings.weight"] = (2, h)
        inner = (
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
        )
        norms = ("attention.output.LayerNorm", "output.LayerNorm")
    else:
        shapes["encoder.relative_attention_bias.weight"] = (32, 4)
        inner = ("attention.attn.q", "attention.attn.k", "attention.attn.v", "attention.attn.o")
        norms = ("attention.LayerNorm", "output.LayerNorm")
    for i in range(config.num_hidden_layers):
        matrices = dict.fromkeys(inner, (h, h)) | {"intermediate.dense": (f, h), "output.dense": (h, f)}
        for name, shape in matrices.items():
            shapes[f"encoder.layer.{i}.{name}.weight"] = shape
            shapes[f"encoder.layer.{i}.{name}.bias"] = shape[:1]
        for name in norms:
            shapes[f"encoder.layer.{i}.{name}.weight"] = (h,)
            shapes[f"encoder.layer.{i}.{name}.bias"] = (h,)
    return shapes


def _write_bpe(folder: Path) -> None:
    """A byte-level BPE tokenizer of the kind SmolLM2 has: digits apart, GPT-2's byte alphabet."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def _write_wordpiece(folder: Path, family: str) -> None:
    """A WordPiece tokenizer; special tokens of MPNet and RoBERTa stand at other ids and have other names."""
    if family not in ("mpnet", "roberta"):
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        pad, unk, cls, sep, mask = special
    else:
        special = ["<s>", "<pad>", "</s>", "[UNK]", "<mask>"]
        cls, pad, sep, unk, mask = special
    tokenizer = Tokenizer(models.WordPiece(unk_token=unk))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=VOCAB, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    ids = {token: tokenizer.token_to_id(token) for token in special}
    pair = f"{cls} $A {sep} $B {sep}"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", pair=pair, special_tokens=[(cls, ids[cls]), (sep, ids[sep])]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"cls_token": cls, "sep_token": sep, "pad_token": pad, "unk_token": unk, "mask_token": mask}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 256} | names
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
