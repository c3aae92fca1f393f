"""Does a student with half of its teacher's blocks stay as good, and is it better for having had a teacher?

    python benchmarks/distillation/run.py                             # the quick row: MiniLM-L6
    python benchmarks/distillation/run.py --rows full --threads 16    # MPNet: hours on a CPU
    python benchmarks/distillation/run.py --tasks glosses spam        # these alone

For each labelled set: an encoder is fine-tuned, students of half its blocks and of a sixth are cut out of it
and taught by it on the same texts; a control is the same student, trained as long on the labels alone. The
smaller student is taught once more, by texts without labels too, and has a control of as many steps. Whatever
is finished is kept in the work folder; the record holds the tasks that are whole.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from bars import write_record
from contest import fetched
from meter import write_json
from summary import LONGEST, NAMES, bars, rows_of
from tasks import MORE, OTHERS, SIZES, TASKS, Task, task

from pocketsize.data.labels import classes_of
from pocketsize.data.text import Corpus, joined, read_corpus
from pocketsize.exporting.table import EXPORTERS
from pocketsize.measurement.classes import chosen_texts, classes_named, logits_of
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.models.products import quick_products
from pocketsize.models.skeleton import materialise
from pocketsize.recipes.body import Layers
from pocketsize.recipes.distill import Distill, Finetune
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.step import Context, Step
from pocketsize.recipes.student import Student

QUESTION = "What does a student keep of a fine-tuned encoder, and what does its teacher add?"
LENGTH, BATCH, TEACHER_EPOCHS, STUDENT_EPOCHS, RATE = 64, 8, 3.0, 4.0, 1e-4
TOKENS, TURNS = 128, 15


@dataclass(frozen=True, slots=True)
class Row:
    """A teacher, how many blocks its students keep, and how many times the texts of the quick row train.

    `vocabulary` is how many tokens students keep.
    """

    name: str
    sample: str
    half: int
    small: int
    times: int = 1
    rate: float = 1e-4
    vocabulary: int | None = None


ROWS = {
    "quick": Row("quick", "sample:minilm-l6", 3, 1),
    "full": Row("full", "sample:mpnet-base", 6, 2, times=3, rate=5e-5, vocabulary=29_000),
}


PROTOCOL = [
    "Quick row: sample:minilm-l6, students of 3 blocks and of 1 out of 6; full row: sample:mpnet-base, "
    "6 and 2 out of 12. A student begins as some of the blocks of the fine-tuned teacher. In the full row it "
    "loses the tokens that the training texts use least (29,000 of 30,527 stay) once it has learned.",
    "Every class has as many texts as every other, as far as there are so many; texts are cut at 200 "
    f"characters and {LENGTH} tokens. No text that evaluates has trained; of each class there are, as far "
    f"as there are so many: {', '.join(f'{name} {SIZES[name][1] + MORE[name]}' for name in TASKS)}.",
    f"Batches of {BATCH}; teacher: {TEACHER_EPOCHS:g} epochs on the labels. Students: {STUDENT_EPOCHS:g} "
    f"epochs over the same texts, highest rate {RATE:g}; nothing was chosen on the texts that evaluate. "
    "Taught: KL to the teacher at temperature 2, half as much of the labels, cosine of the blocks. "
    f"Control: the labels alone. Unlabelled texts: at most {OTHERS:,} others of the same source, of which "
    "the teacher alone speaks; as many epochs over all, nothing dropped at random. They have a control of "
    "their own: the labels alone for as many steps.",
    "Blocks multiply in bfloat16 where the processor does so in hardware (`precision: auto`), which came "
    "after the quick row of this record: that is of float32, but for its student of unlabelled texts.",
    "Score: (accuracy - c) / (1 - c), c the share of the commonest class; averaged over tasks. Kept: "
    "score of the student over that of its teacher. Intervals: 95 % bootstrap over texts, drawn "
    "together for both, 1000 draws.",
    "Speed: one input of 128 tokens, torch float32, teacher and student turn about, ratio of medians. "
    "Compute: share of the multiplications in blocks. Bytes: the exported folder's weights in bf16.",
]


def main() -> None:
    work = Path(__file__).with_name("work")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["quick"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--work", type=Path, default=work)
    parser.add_argument("--downloads", type=Path, default=work / "downloads", help="packages with texts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only-record", action="store_true", help="run nothing, write what there is")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    for row in (ROWS[name] for name in chosen.rows):
        for name in chosen.tasks if not chosen.only_record else ():
            run(row, task(name, chosen.downloads, row.times, wide=True), chosen.work)
            record(chosen.work, chosen.threads)
    record(chosen.work, chosen.threads)


def run(row: Row, labelled: Task, work: Path) -> None:
    """The teacher, the students and the controls of one task, as far as they are not there yet."""
    train, judge = (read_corpus([str(path)], Path()) for path in (labelled.train, labelled.evaluate))
    wider = joined([train, read_corpus([str(labelled.others)], Path())])
    place = work / row.name / labelled.name
    classes = classes_of(train)
    teacher = _made(
        load(fetched(row.sample)),
        [Finetune(epochs=TEACHER_EPOCHS, batch=BATCH, length=LENGTH, rate=row.rate, classes=classes)],
        train,
        place / "teacher",
    )
    _scored(teacher, teacher, judge, place / "teacher.json")
    common = {"epochs": STUDENT_EPOCHS, "batch": BATCH, "length": LENGTH, "rate": RATE}
    taught = Distill(temperature=2.0, hard=0.5, cosine=1.0, **common)
    control = Finetune(**common)
    longer = replace(control, epochs=STUDENT_EPOCHS * len(wider.documents) / len(train.documents))
    ways = {"taught": (taught, train), "control": (control, train)}
    more = {"wider": (replace(taught, dropout=0.0), wider), "longer": (longer, train)}
    for size, kept in (("half", row.half), ("small", row.small)):
        for way, (step, texts) in (ways | (more if size == "small" else {})).items():
            path = place / f"{size}-{way}.json"
            if not path.exists():
                student = _made(
                    teacher, [Layers(keep=kept, heal=False), step], texts, place / f"{size}-{way}"
                )
                if row.vocabulary is not None:
                    trim = Student(vocabulary=row.vocabulary)
                    student = _made(student, [trim], texts, place / f"{size}-{way}-trimmed")
                _scored(student, teacher, judge, path)


def _made(model: Model, steps: Sequence[Step], train: Corpus, place: Path) -> Model:
    """What the steps make of the model; what a process that was cut off has done is not done again."""
    none = torch.zeros(1, LENGTH, dtype=torch.int64)
    ctx = Context(
        none, none.bool(), open_journal(place, {}), _told(place.name), original=model, corpus=train, seed=0
    )
    with quick_products():
        for step in steps:
            model = step.resolve(model, ("folder",)).apply(model, ctx)
    return model


def _told(name: str) -> Callable[[int, int, str], None]:
    last = [0.0]

    def told(done: int, total: int, what: str) -> None:
        if time.monotonic() - last[0] > 20 or done == total:
            last[0] = time.monotonic()
            print(f"{name}: {done}/{total} {what}", flush=True)

    return told


def _scored(model: Model, teacher: Model, judge: Corpus, path: Path) -> None:
    """Which texts the model gets right, and what it weighs and takes beside its teacher."""
    if path.exists():
        return
    texts = chosen_texts(judge, classes_named(model), seed=0)
    assert texts.labels is not None
    said = logits_of(model, texts, LENGTH).argmax(1)
    slower, own = ([0.0], [0.0]) if model is teacher else _timed(teacher, model)
    facts = {
        "right": (said == texts.labels).astype(int).tolist(),
        "labels": texts.labels.tolist(),
        "said": said.tolist(),
        "parameters": model.origin.parameters,
        "block_parameters": sum(
            int(np.prod(e.shape))
            for n, e in model.checkpoint.entries.items()
            if n.startswith(model.arch.blocks)
        ),
        "bytes": EXPORTERS["folder"].predict_bytes(model, lambda _: None),
        "ms": own,
        "teacher_ms": slower,
    }
    write_json(path, facts)
    print(path.parent.name, path.stem, round(float(np.mean(facts["right"])), 4), flush=True)


@torch.inference_mode()
def _timed(first: Model, second: Model) -> tuple[list[float], list[float]]:
    """Milliseconds of one input of 128 tokens, float32, the two models turn about."""
    modules = [materialise(model) for model in (first, second)]
    ids = torch.randint(1000, 5000, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    took: tuple[list[float], list[float]] = ([], [])
    for turn in range(TURNS + 2):
        for module, times in zip(modules, took, strict=True):
            start = time.perf_counter()
            module(input_ids=ids)
            if turn >= 2:
                times.append(1e3 * (time.perf_counter() - start))
    return took


def record(work: Path, threads: int) -> None:
    """Write the record of all tasks that are whole."""
    found = {
        row: {
            name: {path.stem: json.loads(path.read_text()) for path in (work / row / name).glob("*.json")}
            for name in TASKS
        }
        for row in ROWS
    }
    found = {
        row: {name: runs for name, runs in tasks.items() if {*NAMES} - {LONGEST} <= {*runs}}
        for row, tasks in found.items()
    }
    rows = [one for row, tasks in found.items() if tasks for one in rows_of(row, tasks)]
    if not rows:
        return
    write_record(
        Path(__file__).with_name("record.json"),
        question=QUESTION,
        threads=threads,
        protocol=PROTOCOL,
        versions={name: version(name) for name in ("torch", "transformers", "pocketsize")},
        rows=rows,
        bars=[bar for row, tasks in found.items() if tasks for bar in bars(row, tasks)],
    )


if __name__ == "__main__":
    main()
