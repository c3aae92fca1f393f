"""Do several teachers, and a student as its own teacher, beat one teacher and none at equal tokens?

    python benchmarks/teaching/run.py

Students of 4 of SmolLM2's 30 blocks read the same few thousand tokens, taught in several ways, with three
seeds; what counts is the loss of held-out text. Whatever is finished is kept in the work folder; the record
holds what is there.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from bars import gain_bars, write_record
from meter import cpu_seconds, write_json

from pocketsize.data.calibration import Windows, evaluation_windows
from pocketsize.data.text import Corpus, default_corpora
from pocketsize.measurement.tokens import compare
from pocketsize.models.load import load, tokenizer_of
from pocketsize.models.model import Model
from pocketsize.models.products import quick_products
from pocketsize.recipes.body import Layers
from pocketsize.recipes.distill import Distill, Finetune
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.step import Context

SAMPLE, BLOCKS, LENGTH, WINDOWS = "sample:smollm2-135m", 4, 128, 32
TOKENS, SPECIALIST_TOKENS, SEEDS = 16_384, 8_192, (0, 1, 2)
PACE: Mapping[str, Any] = {"tokens": TOKENS, "batch": 4, "length": LENGTH, "rate": 1e-3}
QUESTION = "Do several teachers, and a student as its own teacher, beat their controls at equal tokens?"
ARMS = {
    "no teacher": "the true tokens alone",
    "one teacher": "the original",
    "one teacher, the other": "the original after it was fine-tuned on the same kind of text",
    "two teachers": "both, equally",
    "its own teacher": "the student without a teacher, of the same seed, and the true tokens",
    "two teachers, by loss": "both, by their loss on each text",
}


def main() -> None:
    work = Path(__file__).with_name("work")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=work)
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    bench = Bench(chosen.work)
    *first, last = ARMS
    for arms in (first, [last]):
        for arm, seed in ((arm, seed) for seed in SEEDS for arm in arms):
            if not bench.figures(arm, seed).exists():
                start = cpu_seconds()
                loss = bench.loss(bench.student(arm, seed))
                spent = round(cpu_seconds() - start, 1)
                write_json(bench.figures(arm, seed), {"arm": arm, "seed": seed, "nll": loss, "cpu_s": spent})
                print(f"{arm}, seed {seed}: {loss:.4f} nats, {spent} CPU seconds", flush=True)
            record([json.loads(p.read_text()) for p in sorted(chosen.work.glob("*.json"))])


class Bench:
    """The models, the text, and what is finished of them in the work folder."""

    def __init__(self, work: Path) -> None:
        self.work, self.original = work, load(SAMPLE)
        self.train, held_out = default_corpora()
        self.short = Layers(keep=BLOCKS, heal=False).apply(self.original, self.context("short", 0))
        self.windows = evaluation_windows(
            held_out, tokenizer_of(self.original), tokens=WINDOWS * LENGTH, length=LENGTH, special=True
        )

    def figures(self, arm: str, seed: int) -> Path:
        """Where what was measured is kept."""
        return self.work / f"{arm.replace(',', '').replace(' ', '-')}-{seed}.json"

    def student(self, arm: str, seed: int) -> Model:
        """A student after it was taught in one of the ways."""
        steps: dict[str, Callable[[], Distill | Finetune]] = {
            "no teacher": lambda: Finetune(**PACE),
            "one teacher": lambda: self.cached(SAMPLE),
            "one teacher, the other": lambda: self.cached(str(self.specialist)),
            "two teachers": lambda: self.cached(SAMPLE, str(self.specialist)),
            "two teachers, by loss": lambda: self.cached(SAMPLE, str(self.specialist), weigh="loss"),
            "its own teacher": lambda: Distill(
                **PACE, teacher=str(self.student("no teacher", seed).folder), hard=1.0
            ),
        }
        return self.taught(steps[arm](), self.short, f"{arm.replace(',', '').replace(' ', '-')}-{seed}", seed)

    def cached(self, *teachers: str, weigh: str = "equal") -> Distill:
        """Teachers who speak once for all seeds."""
        who = "".join("01"[name != SAMPLE] for name in teachers)
        return Distill(
            **PACE,
            teacher=tuple(teachers),
            weigh=weigh,
            signals="top_k",
            kept=128,
            cache=str(self.work / f"said-{who}-{weigh}"),
        )

    @property
    def specialist(self) -> Path:
        """The original after a little more reading, of text like that which is read here."""
        pace = {**PACE, "tokens": SPECIALIST_TOKENS, "rate": 1e-4}
        return self.taught(Finetune(**pace), self.original, "specialist", 9).folder

    def taught(self, step: Distill | Finetune, model: Model, name: str, seed: int) -> Model:
        """The model after a step, its work kept under this name."""
        with quick_products():
            return step.resolve(model, ("folder",)).apply(model, self.context(name, seed))

    def context(self, name: str, seed: int) -> Context:
        """What a step is given; it looks at no calibration text."""
        ids, journal = torch.zeros(1, 1, dtype=torch.int64), open_journal(self.work / name, {})
        text = _some(self.train)
        return Context(ids, ids == 0, journal, _quiet, original=self.original, corpus=text, seed=seed)

    def loss(self, model: Model) -> float:
        """-log p of the true tokens of held-out text, mean, nats."""
        windows: Windows = self.windows
        return float(compare(model, model, windows, torch.float32).nll[0].mean())


def _quiet(done: int, total: int, what: str) -> None:
    """Progress is of no interest here."""


def _some(corpus: Corpus) -> Corpus:
    """The first documents, as many characters as the students read tokens of, about."""
    left, documents = 4 * TOKENS, []
    for document in corpus.documents:
        if left > 0:
            documents.append(replace(document, text=document.text[:left]))
            left -= len(document.text)
    return replace(corpus, documents=tuple(documents))


def record(found: list[dict[str, Any]]) -> None:
    """A row for each way, over the seeds that are done; a bar where all seeds of both sides are."""
    by_arm = {arm: {one["seed"]: one["nll"] for one in found if one["arm"] == arm} for arm in ARMS}
    cpu = {arm: [one["cpu_s"] for one in found if one["arm"] == arm] for arm in ARMS}
    rows = [
        {
            "taught by": arm,
            "nll": round(statistics.mean(own.values()), 4),
            "spread": round(max(own.values()) - min(own.values()), 4),
            "perplexity": round(math.exp(statistics.mean(own.values())), 2),
            "seeds": len(own),
            "cpu_s": round(statistics.median(cpu[arm]), 1),
        }
        for arm, own in by_arm.items()
        if own
    ]
    pairs = {
        "two teachers over the original alone": ("two teachers", "one teacher"),
        "two teachers by loss over the original alone": ("two teachers, by loss", "one teacher"),
        "two teachers over the other alone": ("two teachers", "one teacher, the other"),
        "its own teacher over no teacher": ("its own teacher", "no teacher"),
    }
    write_record(
        Path(__file__).with_name("record.json"),
        question=QUESTION,
        threads=1,
        protocol=[
            f"{SAMPLE} cut to {BLOCKS} of its blocks, untrained where they meet; {TOKENS} tokens of Python's "
            f"documentation in batches of {PACE['batch']} windows of {LENGTH}, once; rate {PACE['rate']:g}",
            "cached teachers: the likeliest 128 tokens with their tail; the other teacher read "
            f"{SPECIALIST_TOKENS} tokens of that text at rate 1e-4",
            f"loss of the true tokens of {WINDOWS} windows of documentation that taught nobody; seeds change "
            "the order of the text",
        ],
        versions={name: version(name) for name in ("torch", "transformers")},
        rows=rows,
        bars=gain_bars(pairs, by_arm, SEEDS),
    )


if __name__ == "__main__":
    main()
