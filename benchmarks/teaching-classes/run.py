"""Do several teachers, and a student as its own teacher, beat their controls where classes are learned?

    python benchmarks/teaching-classes/run.py

Two encoders learn WordNet's 45 classes from different definitions; students of half their blocks read
others, taught in several ways, with three seeds; what counts is what they say of definitions that nobody
read. Whatever is finished is kept in the work folder; the record holds what is there.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from bars import gain_bars, write_record
from contest import fetched, plain_options
from meter import cpu_seconds, write_json
from tasks import rows_of, split

from pocketsize.data.labels import classes_of
from pocketsize.data.text import Corpus, read_corpus
from pocketsize.measurement.classes import chosen_texts, classes_named, logits_of
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.models.products import quick_products
from pocketsize.recipes.body import Layers
from pocketsize.recipes.distill import Distill, Finetune
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.step import Context, Step

TASK, SAMPLE, BLOCKS, SEEDS = "glosses", "sample:minilm-l6", 3, (0, 1, 2)
# Texts of each class that evaluate, and that each teacher and all students read at most.
JUDGE, READ = 9, 30
PACE: Mapping[str, Any] = {"epochs": 3.0, "batch": 8, "length": 64, "rate": 1e-4}
SOFT: Mapping[str, Any] = {"temperature": 1.0, "hard": 1.0}
QUESTION = (
    "Do several teachers, and a student as its own teacher, beat their controls where classes are learned?"
)
ARMS = ("labels alone", "the first teacher", "the second teacher", "both", "both, by loss", "itself")
CONTESTS = {
    "both teachers over the first alone": ("both", "the first teacher"),
    "both teachers over the second alone": ("both", "the second teacher"),
    "both teachers by loss over the first alone": ("both, by loss", "the first teacher"),
    "both teachers by loss over the second alone": ("both, by loss", "the second teacher"),
    "itself as teacher over labels alone": ("itself", "labels alone"),
}


def main() -> None:
    parser = plain_options(__doc__, Path(__file__).with_name("work"))
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    bench = Bench(chosen.work, chosen.downloads)
    for seed in SEEDS:
        for arm in ARMS:
            bench.run(arm, seed)
            record([json.loads(path.read_text()) for path in sorted(chosen.work.glob("*.json"))])


class Bench:
    """The texts, the teachers, and what is finished of the students in the work folder."""

    def __init__(self, work: Path, downloads: Path) -> None:
        self.work = work
        self.first, self.second, self.read, self.judge = texts(work, downloads)
        tune = Finetune(**PACE, classes=classes_of(self.first))
        base = load(fetched(SAMPLE))
        self.teachers = [
            self.made(base, [tune], corpus, f"teacher-{i}", 9 + i)
            for i, corpus in enumerate((self.first, self.second))
        ]
        for i, teacher in enumerate(self.teachers):
            self.scored(teacher, f"teacher-{i}", {"arm": f"teacher {i + 1}", "seed": 9 + i})

    def run(self, arm: str, seed: int) -> Model:
        """A student after it was taught in one of the ways."""
        name, start = f"{arm.replace(',', '').replace(' ', '-')}-{seed}", cpu_seconds()
        student = self.made(
            self.teachers[0], [Layers(keep=BLOCKS, heal=False), self.step(arm, seed)], self.read, name, seed
        )
        self.scored(student, name, {"arm": arm, "seed": seed, "cpu_s": round(cpu_seconds() - start, 1)})
        return student

    def step(self, arm: str, seed: int) -> Step:
        """What teaches; every student reads the same texts with the same labels as often."""
        first, second = (str(teacher.folder) for teacher in self.teachers)
        ways: dict[str, Callable[[], Step]] = {
            "labels alone": lambda: Finetune(**PACE),
            "the first teacher": lambda: Distill(**PACE, **SOFT, teacher=first),
            "the second teacher": lambda: Distill(**PACE, **SOFT, teacher=second),
            "both": lambda: Distill(**PACE, **SOFT, teacher=(first, second)),
            "both, by loss": lambda: Distill(**PACE, **SOFT, teacher=(first, second), weigh="loss"),
            "itself": lambda: Distill(**PACE, **SOFT, teacher=str(self.run("labels alone", seed).folder)),
        }
        return ways[arm]()

    def made(self, model: Model, steps: list[Step], corpus: Corpus, name: str, seed: int) -> Model:
        """What the steps make of the model; what a process that was cut off has done is not done again."""
        ids, journal = torch.zeros(1, 1, dtype=torch.int64), open_journal(self.work / name, {})
        ctx = Context(ids, ids == 0, journal, _quiet, original=model, corpus=corpus, seed=seed)
        with quick_products():
            for step in steps:
                model = step.resolve(model, ("folder",)).apply(model, ctx)
        return model

    def scored(self, model: Model, name: str, facts: dict[str, Any]) -> None:
        """What the model says of the texts that evaluate: the loss of the true class, and who is right."""
        if (path := self.work / f"{name}.json").exists():
            return
        chosen = chosen_texts(self.judge, classes_named(model), seed=0)
        logits = torch.from_numpy(logits_of(model, chosen, PACE["length"]))
        truth = torch.from_numpy(np.asarray(chosen.labels)).long()
        nll = float(torch.nn.functional.cross_entropy(logits, truth))
        right = float((logits.argmax(1) == truth).double().mean())
        write_json(path, facts | {"nll": nll, "accuracy": right, "texts": len(truth)})
        print(f"{name}: {nll:.4f} nats, {right:.4f} right", flush=True)


def texts(work: Path, downloads: Path) -> list[Corpus]:
    """What the first teacher reads, the second, the students, and what evaluates; no text is in two."""
    read, judge = split(list(rows_of(TASK, downloads)), (3 * READ, JUDGE), 1)
    dealt: list[list[tuple[str, str]]] = [[], [], []]
    seen: dict[str, int] = {}
    for text, label in read:
        dealt[seen.get(label, 0) % 3].append((text, label))
        seen[label] = seen.get(label, 0) + 1
    found = []
    for name, rows in zip(("first", "second", "read", "judge"), (*dealt, judge), strict=True):
        path = work / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": t, "label": c}) + "\n" for t, c in rows))
        found.append(read_corpus([str(path)], Path()))
    return found


def _quiet(done: int, total: int, what: str) -> None:
    """Progress is of no interest here."""


def record(found: list[dict[str, Any]]) -> None:
    """A row for each way, over the seeds that are done; a bar where all seeds of both sides are."""
    by_arm: dict[str, dict[int, dict[str, Any]]] = {}
    for one in found:
        by_arm.setdefault(one["arm"], {})[one["seed"]] = one
    names = [name for name in ("teacher 1", "teacher 2", *ARMS) if name in by_arm]
    rows = [row(name, list(by_arm[name].values())) for name in names]
    losses = {arm: {seed: one["nll"] for seed, one in runs.items()} for arm, runs in by_arm.items()}
    bars = gain_bars(CONTESTS, losses, SEEDS)
    if not bars:
        return
    write_record(
        Path(__file__).with_name("record.json"),
        question=QUESTION,
        threads=1,
        protocol=[
            f"{SAMPLE} fine-tuned twice, on different definitions of WordNet's 45 classes ({READ} of "
            f"each at most); students: {BLOCKS} of 6 blocks of the first teacher, on other definitions",
            f"all: {PACE['epochs']:g} epochs, batches of {PACE['batch']}, rate {PACE['rate']:g}; all learn "
            "from the labels, those with teachers also by KL to them, at temperature 1; by loss: "
            "weighed by the loss on each text",
            f"loss of the true class, mean over {found[0]['texts']} definitions that nobody read; seeds "
            "change the order of the text; itself: taught by the student of labels alone of the same seed",
        ],
        versions={name: version(name) for name in ("torch", "transformers")},
        rows=rows,
        bars=bars,
    )


def row(name: str, runs: list[dict[str, Any]]) -> dict[str, object]:
    """Means over seeds, and how far these are apart."""
    losses = [one["nll"] for one in runs]
    return {
        "taught by": name,
        "nll": round(statistics.mean(losses), 4),
        "spread": round(max(losses) - min(losses), 4),
        "accuracy": round(statistics.mean(one["accuracy"] for one in runs), 4),
        "seeds": len(runs),
        "cpu_s": round(statistics.median(one.get("cpu_s", 0.0) for one in runs), 1),
    }


if __name__ == "__main__":
    main()
