"""What a model does, written down when it is exported, so that damage can be told from the model later.

Hashes of files say that bytes changed; this says whether it is still the same model: the
fingerprint of each tensor as the artefact gives it back, the ids its tokenizer gives, and what a
forward pass answers to fixed texts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from pocketsize.exporting.probes import PROBES, STRINGS
from pocketsize.models.load import tokenizer_of
from pocketsize.models.model import Model
from pocketsize.models.skeleton import fill, skeleton
from pocketsize.models.stream import Read, stream, without_blocks

TEXTS = PROBES[:8]
# Sums in another order, on another processor, move a logit by far less than this.
TOLERANCE = 2e-3
_SHOWN = 64


def behaviour_of(model: Model, read: Read | None = None) -> dict[str, Any]:
    """The config, fingerprints of tensors and tokenizer, and the answers to `TEXTS`, as a JSON object.

    `read` gives each parameter as an artefact stores it; without it the model's own weights are
    taken. Generators: the likeliest token and its logit at every position. Classifiers: the logits of
    the classes. Encoders: the first numbers of the mean over the last hidden states.
    """
    prints: dict[str, str] = {}
    tokenizer = tokenizer_of(model)
    ids = [list(tokenizer(text).input_ids)[:_SHOWN] for text in TEXTS]
    answers = _answers(model, _printing(read or model.weight, prints), ids)
    return {
        # Names with an underscore are transformers' own: one is where the model lay on this machine.
        "config": {k: v for k, v in model.config.to_dict().items() if not k.startswith("_")},
        "tensors": dict(sorted(prints.items())),
        "tokenizer": tokenizer_print(tokenizer),
        "answers": answers,
    }


def differences(recorded: Mapping[str, Any], model: Model, read: Read) -> list[str]:
    """Tensors and answers that are no longer as recorded, one sentence each; empty when all are."""
    found: dict[str, str] = {}
    answers = _answers(model, _printing(read, found), [recorded_ids(old) for old in recorded["answers"]])
    tensors: Mapping[str, str] = recorded["tensors"]
    problems = [f"tensor {n}: recorded, but not there" for n in sorted(tensors.keys() - found.keys())]
    problems += [f"tensor {n}: not in the record" for n in sorted(found.keys() - tensors.keys())]
    owners = {value: name for name, value in tensors.items()}
    for name in sorted(tensors.keys() & found.keys()):
        if found[name] != tensors[name]:
            other = owners.get(found[name])
            problems.append(f"tensor {name}: " + (f"holds {other}" if other else "its values have changed"))
    for i, (old, new) in enumerate(zip(recorded["answers"], answers, strict=True)):
        if gap := _gap(old, new):
            problems.append(f"answer to text {i + 1}: {gap}")
    return problems


def recorded_ids(answer: Mapping[str, str]) -> list[int]:
    """The token ids that a recorded answer is about."""
    return [int(word) for word in answer["ids"].split()]


def field_prints(fields: Mapping[str, object]) -> dict[str, str]:
    """A hash of each metadata field of a GGUF; numbers count as they are stored, in float32."""
    return {
        key: hashlib.sha256(repr(_plain(value)).encode()).hexdigest()[:32]
        for key, value in sorted(fields.items())
    }


def _plain(value: object) -> object:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(np.float32(value))
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value


def loaded(model: Model, read: Read) -> nn.Module:
    """The module with what `read` gives for each parameter."""
    module = skeleton(model)
    fill(module, "", read)
    return module


def tokenizer_print(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the ids of `STRINGS`, with and without special tokens."""
    total = hashlib.sha256()
    for text in STRINGS:
        for special in (False, True):
            ids = tokenizer(text, add_special_tokens=special).input_ids
            total.update((" ".join(map(str, ids)) + "\n").encode())
    return total.hexdigest()


def tensor_print(W: Tensor) -> str:
    """A hash of the shape and the float32 values of a tensor; -0 counts as 0."""
    values = (W.to(torch.float32) + 0.0).contiguous()
    return hashlib.sha256(str(tuple(W.shape)).encode() + values.numpy().tobytes()).hexdigest()[:32]


def _printing(read: Read, prints: dict[str, str]) -> Read:
    def reading(name: str) -> Tensor:
        W = read(name)
        prints[name] = tensor_print(W)
        return W

    return reading


def _answers(model: Model, read: Read, texts: list[list[int]]) -> list[dict[str, str]]:
    """What the model answers to each text, one block of it in memory at a time."""
    module = without_blocks(model, read)

    def forward(ids: list[int]) -> Tensor:
        return module(input_ids=torch.tensor([ids]))[0][0].to(torch.float32)

    outputs = stream(module, model, read, [partial(forward, ids) for ids in texts])
    return [_shown(model, ids, out) for ids, out in zip(texts, outputs, strict=True)]


def _shown(model: Model, ids: list[int], out: Float[Tensor, "*n width"]) -> dict[str, str]:
    """Ids and answer as texts of numbers, which keeps the record short."""
    if model.arch.task == "generate":
        best, token = out.max(dim=-1)
        return {"ids": _words(ids), "tokens": _words(token.tolist()), "logits": _numbers(best)}
    if model.arch.task == "classify":
        return {"ids": _words(ids), "classes": _numbers(out)}
    return {"ids": _words(ids), "embedding": _numbers(out.mean(dim=0)[:_SHOWN])}


def _gap(old: Mapping[str, str], new: Mapping[str, str]) -> str | None:
    """How two answers differ by more than rounding; None when they do not."""
    key = next(word for word in ("logits", "classes", "embedding") if word in old)
    a, b = (torch.tensor([float(x) for x in answer[key].split()]) for answer in (old, new))
    if a.shape != b.shape or not bool(torch.isfinite(b).all()):
        return f"the {key} are of another length, or not finite"
    worst = float(((a - b).abs() / a.abs().clamp(min=1)).max())
    return f"a value moved by {worst:.2g} of its size" if worst > TOLERANCE else None


def _words(values: list[int]) -> str:
    return " ".join(map(str, values))


def _numbers(values: Float[Tensor, "n"]) -> str:
    return " ".join(f"{float(x):.6g}" for x in values)
