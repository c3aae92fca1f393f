"""How far encoders with other weights laid over them are from the original, on held-out sentences.

One evaluator for every side, all in float32: 1 - cosine of the embeddings of each sentence, and
the rank correlation of the similarities of all pairs of sentences, original against candidate.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from embeddings import embed
from meter import cpu_seconds, write_json
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from pocketsize.data.text import Corpus, Document
from pocketsize.measurement.embedding import sentences
from pocketsize.measurement.stats import spearman
from pocketsize.models.products import quick_products

SENTENCES, SEED = 512, 0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, help="a JSON object: held-out documents by domain")
    parser.add_argument("stems", type=Path, nargs="+", help="STEM.safetensors -> STEM.score.json")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModel.from_pretrained(options.model, dtype=torch.float32, add_pooling_layer=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    asked = {name: chosen(name, texts) for name, texts in json.loads(options.texts.read_text()).items()}
    with torch.inference_mode(), quick_products():
        original = {name: embed(model, tokenizer, texts) for name, texts in asked.items()}
        for stem in options.stems:
            cpu = cpu_seconds()
            lay_over(model, stem.with_suffix(".safetensors"))
            found = {name: compare(original[name], embed(model, tokenizer, asked[name])) for name in asked}
            spent = round(cpu_seconds() - cpu, 1)
            write_json(stem.with_suffix(".score.json"), {"score_cpu_s": spent, "domains": found})


def chosen(name: str, texts: Sequence[str]) -> list[str]:
    """The sentences of one domain."""
    documents = tuple(Document(f"{name} {i}", text) for i, text in enumerate(texts))
    return sentences(Corpus(name, documents), SEED, SENTENCES)


def lay_over(model: torch.nn.Module, path: Path) -> None:
    """Put the matrices of a file in place of the model's."""
    own, weights = dict(model.named_parameters()), load_file(path)
    blocks = {name for name, W in own.items() if W.ndim == 2 and ".layer." in name}
    if set(weights) != blocks:
        raise SystemExit(f"{path}: {sorted(set(weights) ^ blocks)[:3]} are in the file or the model alone")
    for name, W in weights.items():
        own[name].copy_(W)


def compare(x: np.ndarray, y: np.ndarray) -> dict[str, float | list[float]]:
    """Rows have length 1, so half the squared distance is 1 - cosine, without its cancellation.

    That of each sentence is kept too, for intervals of ratios.
    """
    pairs, apart = np.triu_indices(len(x), 1), ((x - y) ** 2).sum(axis=1) / 2
    return {
        "sentences": len(x),
        "one_minus_cosine": float(apart.mean()),
        "spearman": float(spearman((x @ x.T)[pairs], (y @ y.T)[pairs])),
        "one_minus_cosine_sentences": [float(f"{one:.3g}") for one in apart],
    }


if __name__ == "__main__":
    main()
