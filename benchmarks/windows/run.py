"""Of what length should the windows be that calibrate a sentence encoder?

    python benchmarks/windows/run.py                        both encoders, an hour of one core
    python benchmarks/windows/run.py --samples minilm-l6    one of them, ten minutes

The same step on as many tokens in windows of one length each, and of all lengths down to 8 tokens, judged on
texts of 6 words to 300. What is finished is kept in the work folder; the record holds what is there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from bars import Bar, write_record
from contest import fetched
from corpus import Domain, domains
from embeddings import embed
from meter import cpu_seconds, write_json
from results import spread
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from pocketsize.data.calibration import Windows, joined_windows, shortened, windows
from pocketsize.data.text import Corpus, Document
from pocketsize.measurement.embedding import sentences
from pocketsize.models.load import load
from pocketsize.models.products import quick_products
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.recipe import SHORTEST, parse_step
from pocketsize.recipes.step import Context

QUESTION = "Of what length should the windows be that calibrate a sentence encoder?"
SAMPLES = ("minilm-l6", "mpnet-base")
SEQUENCES, LENGTH, POSITIONS = 64, 512, 512
GRID = {"group": 64, "symmetric": False, "embeddings": None}
STEPS: dict[str, dict[str, Any]] = {
    "4 bits": {"gptq": {"scheme": "W4A16", **GRID}},
    "3 bits": {"gptq": {"scheme": "W3A16", **GRID}},
    "half pruned": {"prune": {"sparsity": 0.5, "learn": 0}},
}
# Longest and shortest, by name. Others than these two run for the first step and seed alone.
WHOLE, MIXED = "512", "512 to 8"
CUTS = {
    WHOLE: (512, 512),
    MIXED: (512, SHORTEST),
    "256": (256, 256),
    "128": (128, 128),
    "64": (64, 64),
    "32": (32, 32),
}
# Words of the texts that judge, and how many texts of each kind of English at most; 0 for its sentences.
KINDS = {"6 words": (6, 256), "sentences": (0, 256), "60 words": (60, 96), "150 words": (150, 64)}
KINDS["300 words"] = (300, 32)
# Words between the beginnings of short texts, so that they come from all over a document.
APART = 97


def main() -> None:
    work = Path(__file__).with_name("work")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", nargs="+", choices=SAMPLES, default=list(SAMPLES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=work)
    parser.add_argument("--downloads", type=Path, default=work / "downloads", help="packages with texts")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    english = domains(chosen.downloads)
    for sample in chosen.samples:
        judge: Judge | None = None
        for seed, (step, cut) in itertools.product(chosen.seeds, itertools.product(STEPS, CUTS)):
            if cut not in (WHOLE, MIXED) and (seed, step) != (chosen.seeds[0], "4 bits"):
                continue
            path = chosen.work / f"{sample}-{step}-{cut}-{seed}.json".replace(" ", "-")
            if not path.exists():
                judge = judge or Judge(sample, english)
                done = {"model": sample, "step": step, "windows": cut, "seed": seed}
                write_json(path, done | judge.tried(STEPS[step], calibration(judge, english, cut, seed)))
                print(path.stem, json.loads(path.read_text())["lost"], flush=True)
                record([json.loads(p.read_text()) for p in sorted(chosen.work.glob("*.json"))])
    record([json.loads(p.read_text()) for p in sorted(chosen.work.glob("*.json"))])


class Judge:
    """An encoder, texts, and what it makes of them."""

    def __init__(self, sample: str, english: Sequence[Domain]) -> None:
        self.folder = fetched(f"sample:{sample}")
        self.module = AutoModel.from_pretrained(self.folder, dtype=torch.float32, add_pooling_layer=False)
        self.module.eval()
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.folder)
        self.texts = {
            (kind, domain.name): texts_of(domain, *how) for kind, how in KINDS.items() for domain in english
        }
        self.original = self.embedded()

    @torch.inference_mode()
    def embedded(self) -> dict[tuple[str, str], np.ndarray]:
        """Embeddings of all texts by the module as it is."""
        with quick_products():
            return {
                key: embed(self.module, self.tokenizer, texts, length=POSITIONS)
                for key, texts in self.texts.items()
            }

    def tried(self, step: Mapping[str, Any], text: Windows) -> dict[str, object]:
        """1 - cosine by kind of text after a step that such windows calibrate, and its CPU seconds."""
        model = load(self.folder)
        with tempfile.TemporaryDirectory() as room, quick_products():
            start = cpu_seconds()
            journal = open_journal(Path(room) / "work", {})
            context = Context(text.input_ids, text.mask, journal, lambda *_: None, original=model)
            made = parse_step(dict(step)).resolve(model, ("folder",)).apply(model, context)
            spent = cpu_seconds() - start
            new = {name: made.weight(name) for name in model.linears}
        kept = {name: self.module.get_parameter(name).detach().clone() for name in new}
        for name, W in new.items():
            self.module.get_parameter(name).data.copy_(W)
        found = self.embedded()
        for name, W in kept.items():
            self.module.get_parameter(name).data.copy_(W)
        lost = {key: float(((x - found[key]) ** 2).sum(1).mean() / 2) for key, x in self.original.items()}
        worse = {kind: max(lost[key] for key in lost if key[0] == kind) for kind in KINDS}
        return {"lost": worse, "cpu_s": round(spent, 1), "tokens": text.tokens, "count": len(text.mask)}


def texts_of(domain: Domain, words: int, count: int) -> list[str]:
    """Texts of so many words out of the documents that calibrate nothing, or sentences of them."""
    if not words:
        return sentences(corpus_of(domain.name, domain.evaluate), 0, count)
    every = " ".join(domain.evaluate).split()
    starts = range(0, len(every) - words, max(words, APART))
    return [" ".join(every[a : a + words]) for a in starts[:count]]


def corpus_of(name: str, texts: Sequence[str]) -> Corpus:
    """Texts as the documents of a corpus."""
    return Corpus(name, tuple(Document(f"{name} {i}", text) for i, text in enumerate(texts)))


def calibration(judge: Judge, english: Sequence[Domain], cut: str, seed: int) -> Windows:
    """As many tokens in windows of these lengths, half of each kind of English."""
    length, shortest = CUTS[cut]
    how = {"count": SEQUENCES * LENGTH // length // 2, "length": length}
    parts = []
    for domain in english:
        corpus = corpus_of(domain.name, domain.calibrate)
        parts.append(windows(corpus, judge.tokenizer, seed=seed, special=True, **how))
    return shortened(joined_windows(parts, [0.5, 0.5]), judge.tokenizer, shortest)


def record(found: Sequence[Mapping[str, Any]]) -> None:
    """A row for each encoder, step and length, medians over seeds; bars hold the mixture against 512."""
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for one in found:
        groups.setdefault((one["model"], one["step"], one["windows"]), []).append(one)
    rows: list[dict[str, object]] = []
    bars: list[Bar] = []
    for key in sorted(groups, key=lambda k: (SAMPLES.index(k[0]), [*STEPS].index(k[1]), [*CUTS].index(k[2]))):
        runs = groups[key]
        row: dict[str, object] = {"weights": key[0], "step": key[1], "windows": key[2], "seeds": len(runs)}
        for kind in KINDS:
            row[kind] = spread(run["lost"][kind] for run in runs)
        row["cpu_s"] = round(statistics.median(run["cpu_s"] for run in runs), 1)
        rows.append(row)
        others = {run["seed"]: run for run in groups.get((*key[:2], WHOLE), [])}
        if key[2] == MIXED and others:
            bars += bars_of(key, [(run, others[run["seed"]]) for run in runs if run["seed"] in others])
    write_record(
        Path(__file__).with_name("record.json"),
        question=QUESTION,
        threads=1,
        protocol=[
            f"{SEQUENCES * LENGTH} tokens calibrate, frames included, half fiction and half speeches, in "
            f"windows of one length, or of 512, 256 and so on to {SHORTEST}, as many tokens of each, of 512 "
            "twice as many",
            "4 and 3 bits: GPTQ, group 64, asymmetric; half pruned: the step `prune` without learning",
            "1 - cosine of mean-pooled embeddings to the original's, float32, on texts of documents that "
            "calibrated nothing: the worse of fiction and speeches",
            "cpu_s: of the step",
        ],
        versions={name: version(name) for name in ("torch", "transformers", "pocketsize")},
        rows=rows,
        bars=bars,
    )


def bars_of(
    key: tuple[str, str, str], pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> list[Bar]:
    """What windows of many lengths lose over what those of 512 do: sentences, and the worst kind of text."""
    ratios = {
        kind: max(mixed["lost"][kind] / whole["lost"][kind] for mixed, whole in pairs) for kind in KINDS
    }
    seeds = f"{len(pairs)} seed{'s' if len(pairs) > 1 else ''}"
    said = f"{key[0]}, {key[1]}, worst of {seeds}: {MIXED} over {WHOLE}"
    worst = max(ratios, key=lambda kind: ratios[kind])
    return [
        Bar(f"{said}, sentences", ratios["sentences"], "ratio", "lower", 0.8),
        Bar(f"{said}, worst length of text, {worst}", ratios[worst], "ratio", "lower", 1.0),
    ]


if __name__ == "__main__":
    main()
