"""A classifier with a tenth of its encoder's weights left, by every way of pruning while training.

    python benchmarks/pruning-movement/run.py                             # the quick row: MiniLM-L6
    python benchmarks/pruning-movement/run.py --rows full --threads 16    # MPNet, ten times as long

For each labelled set an encoder is fine-tuned; then it is pruned while it teaches itself on the same texts,
once by each method, at the same number of weights, steps and rates; by movement also on more texts, which
nobody labelled. `--left` picks how many weights are left, in percent. What is finished is kept in the work
folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from bars import Bar, write_record
from contest import fetched
from kept import kept_of, score
from meter import write_json
from tasks import TASKS, Task, task

from pocketsize.data.labels import classes_of
from pocketsize.data.text import Corpus, read_corpus
from pocketsize.measurement.classes import chosen_texts, classes_named, logits_of
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.models.products import quick_products
from pocketsize.recipes.distill import Finetune
from pocketsize.recipes.gradual import Gradual
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.step import Context, Step

QUESTION = "What does a classifier keep with a tenth of its encoder's weights, by which way of pruning it?"
LENGTH, BATCH, TEACHER_EPOCHS = 64, 8, 3.0
# Percent of the weights of the blocks' linears that are left.
LEFT = (10, 3)
METHODS: dict[str, dict[str, Any]] = {
    "movement": {"method": "movement", "scores": "magnitude"},
    "magnitude": {"method": "magnitude"},
    "soft_movement": {"method": "soft_movement"},
    "cycles": {"method": "magnitude", "cycles": 4},
    "rigl": {"method": "rigl"},
}
# The two that a bar holds against each other, and the first with texts that nobody labelled beside.
PAIR, WIDER = ("movement", "magnitude"), "movement_wider"
METHODS[WIDER] = METHODS[PAIR[0]]


@dataclass(frozen=True, slots=True)
class Row:
    """A teacher with its rate, how often its students read the texts, and how many there are.

    `wider` is how often they read them with those beside that have no label.
    """

    sample: str
    teacher_rate: float
    epochs: float
    rate: float
    wider: float
    times: int = 1

    def read(self, method: str) -> float:
        """How often a method's student reads its texts."""
        return self.wider if method == WIDER else self.epochs


ROWS = {
    "quick": Row("sample:minilm-l6", 1e-4, epochs=2.5, rate=5e-4, wider=4.0),
    "full": Row("sample:mpnet-base", 5e-5, epochs=10.0, rate=1e-4, wider=3.0, times=3),
}
PROTOCOL = [
    "Teachers are those of `benchmarks/distillation`: fine-tuned on the labels, "
    f"{TEACHER_EPOCHS:g} epochs, batches of {BATCH}, texts cut at {LENGTH} tokens. No text that evaluates "
    "has trained.",
    "Students begin as their teacher and read the same texts (epochs and rate: the table). Loss: KL to the "
    "teacher at temperature 2, half as much of the labels. Weights of each linear of the blocks become zero "
    "along a cubic from 10 % to 75 % of the steps.",
    "Movement: scores begin at magnitudes, rate 0.01. Wider: with at most 4,000 other texts of the same "
    "source, of which the teacher alone speaks, for more steps. Soft movement: scores begin at zero. Cycles: "
    "magnitude in four rounds of training and cutting. RigL cuts at once.",
    "Score: (accuracy - c) / (1 - c), c the share of the commonest class. Kept: score over that of the "
    "teacher, with a 95 % bootstrap interval over texts, drawn together for both, 1000 draws.",
]


def main() -> None:
    work = Path(__file__).with_name("work")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["quick"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--left", nargs="+", type=int, choices=LEFT, default=[LEFT[0]])
    parser.add_argument("--work", type=Path, default=work)
    parser.add_argument("--downloads", type=Path, default=work / "downloads", help="packages with texts")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    for name in chosen.rows:
        for labelled in (task(t, chosen.downloads, ROWS[name].times, wide=True) for t in chosen.tasks):
            runs = list(itertools.product(chosen.left, chosen.methods))
            with quick_products():
                run(ROWS[name], labelled, runs, chosen.work / name / labelled.name)
            record(chosen.work, chosen.threads)
    record(chosen.work, chosen.threads)


def run(row: Row, labelled: Task, runs: Sequence[tuple[int, str]], place: Path) -> None:
    """The teacher, and students with so many percent left by such a method, if they are not there yet."""
    train, judge = (read_corpus([str(path)], Path()) for path in (labelled.train, labelled.evaluate))
    both = read_corpus([str(labelled.train), str(labelled.others)], Path())
    lesson: dict[str, Any] = {"batch": BATCH, "length": LENGTH}
    tune = Finetune(epochs=TEACHER_EPOCHS, rate=row.teacher_rate, classes=classes_of(train), **lesson)
    teacher, _ = _made(load(fetched(row.sample)), tune, train, place / "teacher")
    _scored(teacher, {}, judge, place / "teacher.json")
    common = {"rate": row.rate, "temperature": 2.0, "hard": 0.5, **lesson}
    for percent, name in runs:
        if not (path := place / f"{_run(name, percent)}.json").exists():
            text = both if name == WIDER else train
            step = Gradual(sparsity=1 - percent / 100, epochs=row.read(name), **common, **METHODS[name])
            student, facts = _made(teacher, step, text, place / path.stem)
            _scored(student, facts, judge, path)


def _run(method: str, percent: int) -> str:
    """The name of a run."""
    return method if percent == LEFT[0] else f"{method}-{percent}"


def _made(model: Model, step: Step, train: Corpus, place: Path) -> tuple[Model, dict[str, Any]]:
    """What a step makes of the model, and its zeros; a process that was cut off goes on."""
    none = torch.zeros(1, LENGTH, dtype=torch.int64)
    ctx = Context(
        none, none.bool(), open_journal(place, {}), _told(place.name), original=model, corpus=train, seed=0
    )
    made = step.resolve(model, ("folder",)).apply(model, ctx)
    course = ctx.reports[-1].training
    zeros = {"zeros": sum(one.zeros for one in course.zeros), "weights": sum(z.weights for z in course.zeros)}
    return made, zeros | {"steps": course.steps}


def _told(name: str) -> Callable[[int, int, str], None]:
    last = [0.0]

    def told(done: int, total: int, what: str) -> None:
        if time.monotonic() - last[0] > 20 or done == total:
            last[0] = time.monotonic()
            print(f"{name}: {done}/{total} {what}", flush=True)

    return told


def _scored(model: Model, facts: dict[str, Any], judge: Corpus, path: Path) -> None:
    """What the model says of the texts that evaluate."""
    if path.exists():
        return
    texts = chosen_texts(judge, classes_named(model), seed=0)
    said = logits_of(model, texts, LENGTH).argmax(1)
    write_json(path, facts | {"labels": texts.labels.tolist(), "said": said.tolist()})
    print(path.parent.name, path.stem, round(float(np.mean(said == texts.labels)), 4), flush=True)


def record(work: Path, threads: int) -> None:
    """Write the record of all tasks that are whole."""
    rows: list[dict[str, object]] = []
    bars: list[Bar] = []
    for (name, row), percent in itertools.product(ROWS.items(), LEFT):
        wanted = {"teacher", *(_run(method, percent) for method in PAIR)}
        found = {
            t: {path.stem: json.loads(path.read_text()) for path in (work / name / t).glob("*.json")}
            for t in TASKS
        }
        tasks = {t: runs for t, runs in found.items() if wanted <= {*runs}}
        if tasks:
            rows += rows_of(row, percent, tasks)
            bars += bars_of(row, percent, tasks)
    if not rows:
        return
    write_record(
        Path(__file__).with_name("record.json"),
        question=QUESTION,
        threads=threads,
        protocol=PROTOCOL,
        versions={name: version(name) for name in ("torch", "transformers", "pocketsize")},
        rows=rows,
        bars=bars,
    )


def rows_of(row: Row, percent: int, tasks: Mapping[str, Mapping[str, Any]]) -> list[dict[str, object]]:
    """A row for each method: its score in each task beside its teacher's, what it keeps, and its training."""
    found: list[dict[str, object]] = []
    for name in METHODS:
        if missing := [task for task, runs in tasks.items() if _run(name, percent) not in runs]:
            print(f"left out: {name}, {percent} % left: not there for {', '.join(missing)}", file=sys.stderr)
            continue
        runs = [task_runs[_run(name, percent)] for task_runs in tasks.values()]
        one: dict[str, object] = {"weights": row.sample.removeprefix("sample:"), "method": name}
        one["weights_left"] = round(_left(runs), 4)
        for (labelled, task_runs), own in zip(tasks.items(), runs, strict=True):
            one[f"{labelled}_teacher"] = round(score(task_runs["teacher"]), 4)
            one[f"{labelled}_student"] = round(score(own), 4)
        kept, low, high = kept_of(tasks, _run(name, percent))
        one["kept"] = {"median": round(kept, 4), "min": round(low, 4), "max": round(high, 4)}
        steps = [run["steps"] for run in runs]
        told = steps[0] if len({*steps}) == 1 else f"{min(steps)} to {max(steps)}"
        one |= {"epochs": row.read(name), "rate": row.rate, "steps": told}
        found.append(one)
    return found


def bars_of(row: Row, percent: int, tasks: Mapping[str, Mapping[str, Any]]) -> list[Bar]:
    """The claims of a row: they are made of a tenth of the weights; below, only who keeps more."""
    said = f"{row.sample.removeprefix('sample:')}, {' and '.join(tasks)}, {percent} % left"
    kept = {name: kept_of(tasks, _run(name, percent))[0] for name in PAIR}
    against = Bar(
        f"{said}: movement over magnitude", kept["movement"] / kept["magnitude"], "x", "higher", 1.0
    )
    if percent != LEFT[0]:
        return [against]
    left = _left([runs["movement"] for runs in tasks.values()])
    bars = [
        Bar(f"{said}: encoder weights left", left, "", "lower", percent / 100),
        Bar(f"{said}: score kept by movement", kept["movement"], "", "higher", 0.95),
        against,
    ]
    if all(WIDER in runs for runs in tasks.values()):
        share = kept_of(tasks, WIDER)[0]
        bars.append(Bar(f"{said}: score kept by movement, unlabelled texts too", share, "", "higher", 0.95))
    return bars


def _left(runs: Sequence[Mapping[str, Any]]) -> float:
    """The share of the weights of the blocks' linears that is not zero."""
    return max(1 - run["zeros"] / run["weights"] if run.get("weights") else 1.0 for run in runs)


if __name__ == "__main__":
    main()
