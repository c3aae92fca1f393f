"""A third of a model's blocks removed: how much of what that loses is won back, and by what.

    python benchmarks/recovery/run.py                   2M tokens a row: days on two cores
    python benchmarks/recovery/run.py --tokens 64k      an afternoon

SmolLM2 without 10 of its 30 blocks: cut only, taught by KL to the whole model, fine-tuned on the same tokens,
and taught by GKD's loss as TRL has it. Stop it at any moment and start it again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from bars import Bar, write_record
from contest import fetched
from corpus import domains
from meter import write_json
from venvs import python_of

import pocketsize as ps
from pocketsize.data.calibration import evaluation_windows
from pocketsize.data.text import Corpus, Document, read_corpus
from pocketsize.exporting.companions import copy_companions
from pocketsize.measurement.quality import quality
from pocketsize.models.dtype import forward_dtype
from pocketsize.models.load import load, tokenizer_of
from pocketsize.recipes.training import count_of
from pocketsize.training.examples import Order
from pocketsize.training.texts import packed

KEEP, LENGTH, BATCH, RATE, EVALUATED = 20, 512, 8, 3e-4, 16384
REQUIREMENTS = ("transformers", "accelerate", "trl", "datasets")
TAUGHT = {"batch": BATCH, "length": LENGTH, "rate": RATE}
# GKD by its default: half way between forward and reverse.
BETAS = {"GKD of TRL": 0.5}
# How many million tokens the question asks for.
ASKED = 2.0
QUESTION = (
    "Of the perplexity that a third of the blocks was worth, how much does teaching win back, and is it more "
    "than fine-tuning on the same tokens, and than a peer's loop?"
)


class Terse:
    """A console that prints phases."""

    def phase(self, text: str) -> None:
        """A new phase begins."""
        print(f"  {text}", flush=True)

    def progress(self, done: int, total: int, what: str) -> None:
        """Part of a phase is done."""
        if done % 4 == 0:
            print(f"    {done}/{total} {what}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path(__file__).with_name("work"))
    parser.add_argument("--downloads", type=Path, help="where texts are kept")
    parser.add_argument("--tokens", default="2M")
    parser.add_argument("--rows", nargs="+", help="only these rows")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    tokens = count_of(chosen.tokens)
    teacher = fetched("sample:smollm2-135m")
    train, held_out = texts(chosen.work, chosen.downloads or chosen.work / "downloads")
    steps = {
        "cut": (),
        "distilled": (ps.Distill(tokens=tokens, **TAUGHT),),
        "distilled in float32": (ps.Distill(tokens=tokens, precision="fp32", **TAUGHT),),
        "fine-tuned": (ps.Finetune(tokens=tokens, **TAUGHT),),
    }
    names = chosen.rows or [*steps, *BETAS]
    for name in names:
        print(name, flush=True)
        folder = chosen.work / f"{name.replace(' ', '-')}-{tokens}"
        if name in steps:
            made(folder, teacher, steps[name], train)
        else:
            peer(folder, chosen.work / f"cut-{tokens}", teacher, train, tokens, BETAS[name])
        score(folder, teacher, held_out)
    found = {
        name: json.loads(path.read_text())
        for name in (*steps, *BETAS)
        if (path := chosen.work / f"{name.replace(' ', '-')}-{tokens}.json").exists()
    }
    record(found, tokens, held_out)


def texts(work: Path, downloads: Path) -> tuple[Path, dict[str, Path]]:
    """Files: what everything learns from, and what each kind of text is judged on."""
    both = domains(downloads)
    train, held_out = work / "train.jsonl", {d.name: work / f"{d.name}.jsonl" for d in both}
    # Turn about, so that the first tokens are of both kinds.
    pieces = [piece for pair in zip(*(_pieces(d.calibrate) for d in both), strict=False) for piece in pair]
    _write(train, pieces)
    for domain in both:
        _write(held_out[domain.name], list(domain.evaluate))
    return train, held_out


def _pieces(documents: object) -> list[str]:
    text = "\n\n".join(documents)  # type: ignore[arg-type]
    return [text[a : a + 20_000] for a in range(0, len(text), 20_000)]


def _write(path: Path, documents: list[str]) -> None:
    if not path.exists():
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def made(folder: Path, teacher: Path, steps: tuple[object, ...], train: Path) -> None:
    """The student of our own steps, as a float32 folder."""
    if folder.exists():
        return
    data = ps.Data(train=(str(train),), sequences=4, tokens=1024, length=LENGTH, written=0.0)
    ps.run(
        teacher,
        [ps.Layers(keep=KEEP, heal=False), *steps],
        out=folder,
        export=["folder"],
        data=data,
        dtype="fp32",
        console=Terse(),
    )


def peer(folder: Path, cut: Path, teacher: Path, train: Path, tokens: int, beta: float) -> None:
    """The same student taught by the peer, on the very batches that ours learned from."""
    if folder.exists():
        return
    examples = packed(read_corpus((str(train),), Path()), tokenizer_of(load(teacher)), length=LENGTH)
    order, count = Order(examples, BATCH, 0), round(tokens / examples.tokens * -(-len(examples) // BATCH))
    rows = [order.batch(i).ids.numpy() for i in range(max(1, count))]
    given = folder.with_suffix(".npy")
    np.save(given, np.concatenate([part for part in rows if part.shape == (BATCH, LENGTH)]).astype(np.int32))
    python = python_of(folder.parent / "venv-trl", REQUIREMENTS)
    command = [str(python), str(Path(__file__).with_name("side_gkd.py")), str(cut), str(teacher), str(given)]
    command += [str(folder), "--batch", str(BATCH), "--rate", str(RATE), "--beta", str(beta)]
    command += ["--bf16"] if forward_dtype() == torch.bfloat16 else []
    subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}, check=True)
    copy_companions(teacher, folder)


def score(folder: Path, teacher: Path, held_out: dict[str, Path]) -> None:
    """Perplexity and KL of a student on each kind of text, kept beside it."""
    out = folder.with_suffix(".json")
    if out.exists():
        return
    original, student = load(teacher), load(folder)
    found: dict[str, dict[str, float]] = {}
    for name, path in held_out.items():
        documents = [json.loads(line)["text"] for line in path.read_text().splitlines()]
        corpus = Corpus(name, tuple(Document(str(i), text) for i, text in enumerate(documents)))
        windows = evaluation_windows(
            corpus, tokenizer_of(original), tokens=EVALUATED, length=LENGTH, special=True
        )
        measured = quality(original, replace(student, origin=original.origin), windows, seed=0).measurements
        found[name] = {f"{m.name} of {m.subject}": m.value for m in measured}
    write_json(out, found)


def record(found: dict[str, dict[str, dict[str, float]]], tokens: int, held_out: dict[str, Path]) -> None:
    """Write the record of all rows that are there."""
    if "cut" not in found:
        return
    rows = [{"row": name, **figures(found[name], found["cut"])} for name in found]
    back = {str(row["row"]): float(str(row["won_back"])) for row in rows}
    bars = [Bar("tokens that teach", tokens / 1e6, "million", "higher", ASKED)]
    if "distilled" in back and "fine-tuned" in back:
        more = back["distilled"] - back["fine-tuned"]
        bars.append(Bar("won back by teaching, less by fine-tuning", more, "share", "higher", 0.0))
    for name in BETAS:
        if name in back and "distilled" in back:
            bars.append(
                Bar(
                    f"won back by teaching, less by {name}",
                    back["distilled"] - back[name],
                    "share",
                    "higher",
                    0.0,
                )
            )
    from importlib.metadata import version

    write_record(
        Path(__file__).with_name("record.json"),
        question=QUESTION,
        threads=torch.get_num_threads(),
        protocol=[
            f"SmolLM2-135M-Instruct with {KEEP} of 30 blocks, evenly spaced; {tokens:,} tokens of fiction "
            f"and speeches in windows of {LENGTH}, batches of {BATCH}, rate {RATE:g}, the same for all rows",
            f"judged on {EVALUATED:,} tokens of other books and speeches each; of both kinds the worse",
            "all as it comes: blocks multiply in bfloat16 where hardware does so, else, and in the row that "
            "says so, in float32; GKD of TRL likewise (`bf16` of Trainer), on given text alone (lmbda 0), at "
            "temperature 1",
            "won_back: (log perplexity of the cut less that of the row) / (log perplexity of the cut less "
            "that of the original)",
        ],
        versions={name: version(name) for name in ("torch", "transformers")},
        rows=rows,
        bars=bars,
    )


def figures(own: dict[str, dict[str, float]], cut: dict[str, dict[str, float]]) -> dict[str, float]:
    """Of both kinds of text the worse."""
    key, original = "perplexity of compressed", "perplexity of original"
    back = [
        math.log(cut[name][key] / own[name][key]) / math.log(cut[name][key] / own[name][original])
        for name in own
    ]
    ratios = [own[name][key] / own[name][original] for name in own]
    return {
        "won_back": round(min(back), 4),
        "perplexity_ratio": round(max(ratios), 3),
        "kl": round(max(own[name]["kl_mean of compressed"] for name in own), 4),
        "top1": round(min(own[name]["top1 of compressed"] for name in own), 4),
    }


if __name__ == "__main__":
    main()
