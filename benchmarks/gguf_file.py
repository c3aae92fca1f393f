"""A command of Pocketsize and what it takes, and a GGUF file measured by a reader that is not ours."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from contest import ROOT
from corpus import domains, first_windows, token_streams
from meter import write_json
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

WINDOWS, LENGTH, BATCH, CHUNK = 64, 512, 4, 128


def paid(call: Sequence[str]) -> dict[str, float]:
    """What one command of Pocketsize takes."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    code = "from pocketsize.cli.main import entry; entry()"
    pid = subprocess.Popen([sys.executable, "-c", code, *call], env=env).pid
    _, status, used = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"pocketsize {' '.join(call)}: ended with {os.waitstatus_to_exitcode(status)}")
    return {"cpu_s": round(used.ru_utime + used.ru_stime, 1), "rss_peak": used.ru_maxrss * 1024}


def held_out(folder: Path, downloads: Path) -> dict[str, Tensor]:
    """Windows of tokens from texts that calibrated nothing."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode(text: str) -> Sequence[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    parts = {domain.name: token_streams(domain.evaluate, encode) for domain in domains(downloads)}
    return {name: torch.from_numpy(first_windows(part, WINDOWS, LENGTH)) for name, part in parts.items()}


def known(path: Path, make: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What was computed before, else computed and kept."""
    if not path.exists():
        write_json(path, make())
    return json.loads(path.read_text())


def made_by(recipe: Mapping[str, object], out: Path) -> dict[str, float]:
    """What it takes to run a recipe into a folder, as a user would; a finished one is not made again."""
    cost = out.with_suffix(".json")
    if not out.exists():
        cost.unlink(missing_ok=True)
    path = out.with_suffix(".recipe.yaml")
    path.write_text(json.dumps(recipe))
    return known(cost, lambda: paid(["run", str(path), "-o", str(out)]))


def perplexities(model: PreTrainedModel, windows: dict[str, Tensor]) -> dict[str, float]:
    """Of the next token within each window; blocks in bfloat16 autocast, head and softmax float32."""
    found = {}
    for name, ids in windows.items():
        losses = []
        for x in ids.split(BATCH):
            with torch.autocast("cpu", torch.bfloat16):
                h = model.model(x).last_hidden_state
            states = h[:, :-1].flatten(0, 1).float().split(CHUNK)
            for part, y in zip(states, x[:, 1:].flatten().split(CHUNK), strict=True):
                losses.append(F.cross_entropy(model.lm_head(part), y, reduction="sum").item())
        found[name] = math.exp(sum(losses) / (ids.numel() - len(ids)))
    return found


def lay_over(model: PreTrainedModel, path: Path) -> dict[str, int]:
    """Every tensor of the file, unpacked by the `gguf` package, in place of the model's; counts by type."""
    config, own = model.config, dict(model.named_parameters())
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    kinds: dict[str, int] = {}
    for name, parameter in own.items():
        tensor = tensors.pop(names.get_name(name, try_suffixes=(".weight",)))
        W = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        for kind, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if kind in name:
                # llama.cpp interleaves the halves of each head's rows; undo it.
                W = W.reshape(heads, -1, 2, W.shape[1]).swapaxes(1, 2).reshape(W.shape)
        parameter.copy_(torch.from_numpy(W))
        kinds[tensor.tensor_type.name] = kinds.get(tensor.tensor_type.name, 0) + 1
    if tensors:
        raise SystemExit(f"{path}: {sorted(tensors)[0]} has no place in the model")
    return kinds
