"""Students that are built: a stock model of a family, with shapes that fit a budget and random weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from pocketsize.errors import UnsupportedError, UsageError, did_you_mean
from pocketsize.models.arch import Arch, arch_of
from pocketsize.models.model import Model
from pocketsize.models.quiet import quiet
from pocketsize.models.skeleton import stored, tied_names

# The widest student that is looked for, in steps of its family.
STEPS = 96


@dataclass(frozen=True, slots=True)
class Body:
    """The shape of a model that is built, and what its tokenizer and its texts ask of it."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    positions: int
    tokens: tuple[tuple[str, int | list[int] | None], ...] = ()
    tied: bool = True
    embedding: int | None = None
    window: int | None = None
    norm: str = "no_norm"


# So many times wider or narrower for each block than others of its family a body is told.
UNLIKE = 4.0


@dataclass(frozen=True, slots=True)
class Family:
    """How a family is built.

    `ratio` is how many channels wide it is for each block, `step` what its width is a multiple of, `head`
    the width of a head, `expand` inner channels for each channel, `share` how many queries share a key and a
    value. `config` makes what stock transformers reads. `adds` are the ends of the names of the matrices
    whose products blocks add to what passes through them, `lifts` is what widens a narrower embedding.
    """

    ratio: float
    step: int
    head: int
    expand: float
    config: Callable[[Body], dict[str, Any]]
    share: int = 1
    narrow: int = 1
    adds: tuple[str, ...] = ()
    lifts: str = ""

    def body(self, model: Model, family: str, layers: int, hidden: int) -> Body:
        """The usual shape of this depth and width, for the tokenizer and the texts of `model`."""
        heads = max(1, hidden // self.narrow // self.head)
        share = next((s for s in (self.share, 3, 2) if s <= self.share and heads % s == 0), 1)
        config = model.config
        numbers = {
            key: getattr(config, key, None) for key in ("pad_token_id", "bos_token_id", "eos_token_id")
        }
        ffn = round(self.expand * hidden / 32) * 32
        return Body(
            family=family,
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=heads // share,
            ffn=max(32, ffn),
            vocabulary=int(config.vocab_size),
            positions=model.positions,
            tokens=tuple(numbers.items()),
        )


def _bert(body: Body) -> dict[str, Any]:
    shape = {
        "hidden_size": body.hidden,
        "num_hidden_layers": body.layers,
        "num_attention_heads": body.heads,
        "intermediate_size": body.ffn,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return shape | ({"embedding_size": body.embedding} if body.embedding else {})


def _llama(body: Body) -> dict[str, Any]:
    return {
        "hidden_size": body.hidden,
        "num_hidden_layers": body.layers,
        "num_attention_heads": body.heads,
        "num_key_value_heads": body.kv_heads,
        "head_dim": body.hidden // body.heads,
        "intermediate_size": body.ffn,
        "tie_word_embeddings": body.tied,
    }


def _qwen2(body: Body) -> dict[str, Any]:
    window = body.window
    found = _llama(body) | {"use_sliding_window": window is not None, "sliding_window": window}
    return found | ({"max_window_layers": 0} if window is not None else {})


def _mistral(body: Body) -> dict[str, Any]:
    return _llama(body) | {"sliding_window": body.window}


def _distilbert(body: Body) -> dict[str, Any]:
    shape = {"dim": body.hidden, "n_layers": body.layers, "n_heads": body.heads, "hidden_dim": body.ffn}
    return shape | {"dropout": 0.0, "attention_dropout": 0.0}


def _squeezebert(body: Body) -> dict[str, Any]:
    return _bert(body) | {"embedding_size": body.hidden}


def _mobilebert(body: Body) -> dict[str, Any]:
    inner = body.hidden // FAMILIES["mobilebert"].narrow
    sizes = {"embedding_size": body.embedding or inner, "intra_bottleneck_size": inner}
    return _bert(body) | sizes | {"normalization_type": body.norm}


_BERT_ADDS = ("output.dense.weight",)
# Width for each block: TinyLlama 93, SmolLM2 19 and what small models gain by depth (arXiv:2402.14905);
# BERT 64, DistilBERT 128, MobileBERT 21.
FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(24, 64, 64, 8 / 3, _llama, share=4),
        "qwen2": Family(24, 64, 64, 8 / 3, _qwen2, share=4),
        "mistral": Family(24, 64, 64, 8 / 3, _mistral, share=4),
        "bert": Family(64, 32, 32, 4, _bert, adds=_BERT_ADDS),
        "electra": Family(64, 32, 32, 4, _bert, adds=_BERT_ADDS, lifts="embeddings_project.weight"),
        "distilbert": Family(
            128, 32, 32, 4, _distilbert, adds=("attention.out_lin.weight", "ffn.lin2.weight")
        ),
        "squeezebert": Family(
            64, 32, 32, 4, _squeezebert, adds=("post_attention.conv1d.weight", "output.conv1d.weight")
        ),
        "mobilebert": Family(
            *(21, 128, 32, 1, _mobilebert),
            narrow=4,
            adds=("output.bottleneck.dense.weight",),
            lifts="embeddings.embedding_transformation.weight",
        ),
    }
)


def family_of(name: str, model: Model) -> Family:
    """How a family is built; refuses one that does another task than the model."""
    if name not in FAMILIES:
        raise UsageError(f"student: unknown family {name!r}{did_you_mean(name, FAMILIES)}")
    task = arch_of(name).task
    if model.arch.task == "classify":
        raise UnsupportedError(
            f"student: family {name}: encoders and generators are built, and {model.origin.name} "
            "is a classifier; cut it (layers, student without family), or build from its encoder and finetune"
        )
    if task != model.arch.task:
        able = [known for known in FAMILIES if arch_of(known).task == model.arch.task]
        raise UnsupportedError(
            f"student: family {name}: is for {task}, {model.origin.name} is for {model.arch.task}; "
            f"use one of {', '.join(able)}"
        )
    return FAMILIES[name]


def config_of(body: Body) -> dict[str, Any]:
    """The config of a body as a folder holds it: every value that its class has."""
    wanted = FAMILIES[body.family].config(body) | dict(body.tokens)
    sizes = {"vocab_size": body.vocabulary, "max_position_embeddings": body.positions}
    made = cast(Any, CONFIG_MAPPING[body.family])(**(wanted | sizes))
    auto: Any = AutoModelForCausalLM if arch_of(body.family).task == "generate" else AutoModel
    raw: dict[str, Any] = made.to_dict()
    raw["architectures"] = [auto._model_mapping[type(made)].__name__]
    return raw


def module_of(raw: Mapping[str, Any], arch: Arch, device: str = "meta") -> nn.Module:
    """The stock module of a config, with the parts that a folder need not have taken out."""
    auto = AutoModelForCausalLM if arch.task == "generate" else AutoModel
    config = CONFIG_MAPPING[raw["model_type"]].from_dict(dict(raw))
    drawn = nullcontext() if device != "meta" else no_init_weights()
    with quiet(), torch.device(device), drawn:
        module = auto.from_config(config, attn_implementation=None, dtype=torch.float32)
    for part in arch.optional:
        if hasattr(module, name := part.removesuffix(".")):
            setattr(module, name, None)
    return module


def shapes_of(raw: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor that a folder of such a model holds."""
    arch = arch_of(str(raw["model_type"]))
    module = module_of(raw, arch)
    tied = tied_names(module)
    return {
        name: tuple(tensor.shape)
        for name, tensor in stored(module)
        if name not in tied and not arch.is_table(name)
    }


def parameters_of(body: Body) -> int:
    """How many numbers a model of this shape has."""
    return sum(math.prod(shape) for shape in shapes_of(config_of(body)).values())


def fitted(start: Callable[[int, int], Body], family: Family, budget: int) -> Body:
    """The body within a budget of parameters whose width for each block is nearest to what its family has.

    `start(layers, hidden)` gives a body; it may hold either fixed. For every width the most blocks that
    fit are taken; the width is chosen by the ratio, and what is left then widens the inner matrices, by at
    most a quarter.
    """
    found: list[Body] = []
    deep = start(1, family.step).layers == start(2, family.step).layers
    for hidden in range(family.step, family.step * STEPS + 1, family.step):
        one = start(1, hidden)
        base = parameters_of(one)
        if base > budget:
            break
        each = parameters_of(replace(one, layers=one.layers + 1)) - base  # blocks are alike
        body = start(one.layers + (budget - base) // each, hidden)
        if base + (body.layers - one.layers) * each > budget:
            break  # the depth is fixed, and this width is too much for it
        found.append(body)
        if body.hidden != hidden or (not deep and body.hidden / body.layers > family.ratio):
            break  # the width is fixed, or every wider one is further from the ratio
    if not found:
        raise UsageError(_too_few(start(1, family.step), family, budget))
    if deep:
        return _widened(found[-1], budget)  # the depth is fixed: the widest
    best = min(found, key=lambda body: abs(math.log(body.hidden / body.layers / family.ratio)))
    return _widened(best, budget)


def unlike(body: Body, family: Family) -> str | None:
    """What is odd about the shape of a body, beside what is usual in its family; None if nothing is."""
    each, near = body.hidden / body.layers, family.ratio
    if near / UNLIKE < each < UNLIKE * near:
        return None
    return (
        f"{body.layers} blocks of {body.hidden} channels, {each:.2g} for each block where {body.family} has "
        f"about {near:g}; of {parameters_of(body):,} parameters {body.vocabulary:,} tokens take "
        f"{_of_tokens(body, family):,}: keep fewer tokens (vocabulary), or name layers and hidden"
    )


def _too_few(body: Body, family: Family, budget: int) -> str:
    least = parameters_of(body)
    return (
        f"student: {budget:,} parameters are too few for a {body.family}: the smallest asked for has "
        f"{least:,}, of which {body.vocabulary:,} tokens take {_of_tokens(body, family):,}; allow {least:,}, "
        "or keep fewer tokens (vocabulary)"
    )


def _of_tokens(body: Body, family: Family) -> int:
    """The parameters of the embedding of tokens."""
    return body.vocabulary * (body.embedding or body.hidden // family.narrow)


def _widened(body: Body, budget: int) -> Body:
    """The body with inner matrices as wide as fit, up to a quarter more."""
    base, step = parameters_of(body), 32
    each = parameters_of(replace(body, ffn=body.ffn + step)) - base
    steps = min((budget - base) // each, body.ffn // 4 // step)
    return replace(body, ffn=body.ffn + step * max(0, steps))


def ladder(family: Family) -> Iterator[tuple[int, int]]:
    """Depth and width of the usual shapes of a family, smallest first."""
    for hidden in range(family.step, family.step * STEPS + 1, family.step):
        yield max(1, round(hidden / family.ratio)), hidden


def random_weights(body: Body, seed: int) -> dict[str, torch.Tensor]:
    """What a stock model of this shape begins with, drawn by `seed`."""
    raw = config_of(body)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = module_of(raw, arch_of(body.family), "cpu")
    return {name: tensor.detach() for name, tensor in stored(module) if name in shapes_of(raw)}
