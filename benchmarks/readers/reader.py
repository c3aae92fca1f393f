"""Loads a folder in a program that is not ours, and compares what it computes with what we wrote.

    python reader.py LOADER FOLDER DTYPE EXPECTED ANSWER

Runs in an environment of its own, without Pocketsize. EXPECTED holds the token ids, our logits for them and
our matrices; ANSWER receives how the loader's differ.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

PACKAGES = {
    "transformers": ("transformers", "compressed-tensors"),
    "transformers+gptqmodel": ("transformers", "gptqmodel", "optimum"),
    "gptqmodel": ("gptqmodel", "transformers"),
}


def main() -> None:
    loader, folder, dtype, expected, answer = sys.argv[1:]
    with safe_open(expected, framework="pt") as held, torch.inference_mode():
        model = _load(loader, folder, getattr(torch, dtype)).eval()
        ids, ours = held.get_tensor("ids"), held.get_tensor("logits")
        logits = torch.cat([model(input_ids=row[None]).logits.float() for row in ids])
        names = [name for name in sorted(held.keys()) if name.endswith(".weight")]
        equal = sum(torch.equal(W, held.get_tensor(name).to(W.dtype)) for name, W in _matrices(model, names))
    said = {
        "matrices": f"{equal} of {len(names)}",
        "equal": equal == len(names),
        "logits_apart": float((logits - ours).abs().max() / (ours.max() - ours.min())),
        "top1": float((logits.argmax(-1) == ours.argmax(-1)).float().mean()),
        "kernel": type(model.get_submodule(names[0].removesuffix(".weight"))).__name__,
        "versions": {name: version(name) for name in (*PACKAGES[loader], "torch")},
    }
    Path(answer).write_text(json.dumps(said))


def _load(loader: str, folder: str, dtype: torch.dtype) -> nn.Module:
    if loader == "gptqmodel":
        from gptqmodel import BACKEND, GPTQModel

        said = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]
        # The kernel that multiplies with the matrix itself; the quickest rounds scales and zeros once more.
        backend = BACKEND[f"{said['quant_method']}_torch".upper()]
        return GPTQModel.load(folder, device="cpu", dtype=dtype, backend=backend).model
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu", local_files_only=True)


def _matrices(model: nn.Module, names: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Each linear's matrix, as the layer itself multiplies with it: what it makes of the unit vectors."""
    dtype = model.get_input_embeddings().weight.dtype
    for name in names:
        layer = model.get_submodule(name.removesuffix(".weight"))
        yield name, layer(torch.eye(layer.in_features, dtype=dtype)).T


if __name__ == "__main__":
    main()
