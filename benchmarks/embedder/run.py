"""A large embedder taught to students of 6 blocks of 384 channels, on plain sentences and nothing else.

    python benchmarks/embedder/run.py                    two and a half hours on a core
    python benchmarks/embedder/run.py --tokens 200k

The students differ in what they begin with. Beside them stands MiniLM-L6, of the same shape, which its makers
trained on a billion pairs of sentences. What is finished is kept in `work`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from bars import Bar, write_record
from contest import fetched, plain_options
from embeddings import embed
from gguf_file import made_by
from texts import texts
from torch import nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

from pocketsize.measurement.stats import spearman
from pocketsize.recipes.training import count_of

TEACHER, PEER = "sample:mpnet-base", "sample:minilm-l6"
BATCH, LENGTH, NEAREST = 32, 128, 10
BUILT = {"family": "bert", "layers": 6, "hidden": 384, "heads": 6, "ffn": 1536}
FIRST, WIDER, PEERS_NAME = "table of tokens", "table of tokens, opinions teach too", "MiniLM-L6"
# What each student begins with, and the highest rate it bears.
STUDENTS: dict[str, tuple[list[dict[str, Any]], float]] = {
    FIRST: ([{"student": {**BUILT, "start": "tokens"}}], 1e-3),
    "cut from the teacher": ([{"layers": {"keep": 6}}, {"student": {"hidden": 384, "ffn": 1536}}], 3e-4),
    "random": ([{"student": BUILT}], 1e-3),
}
STUDENTS[WIDER] = STUDENTS[FIRST]
QUESTION = (
    "How much of a large embedder's sense of what is near what does a student of 6 x 384 have after an hour "
    "on one core, beside MiniLM-L6, and what does it owe to what it began with?"
)


def main() -> None:
    parser = plain_options(__doc__, Path(__file__).with_name("work"))
    parser.add_argument("--tokens", default="2M", help="that each student reads")
    parser.add_argument("--students", nargs="+", choices=tuple(STUDENTS), default=list(STUDENTS))
    parser.add_argument("--few", default="200k", help="tokens of the students after the first")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    *teach, judge = texts(chosen.downloads)
    files = {FIRST: chosen.work / "teach.txt", WIDER: chosen.work / "teach-wider.txt"}
    for file, lines in zip(files.values(), teach, strict=True):
        file.write_text("\n\n".join(lines) + "\n")
    asked = [(name, count_of(chosen.few)) for name in chosen.students if name != WIDER]
    asked += [(name, count_of(chosen.tokens)) for name in chosen.students if name in files]
    made = {key: taught(chosen.work, files.get(key[0], files[FIRST]), *key) for key in asked}
    original = {kind: embedded(fetched(TEACHER), sentences) for kind, sentences in judge.items()}
    rows = [{"student": PEERS_NAME, "tokens": None} | fidelity(fetched(PEER), judge, original)]
    for (name, tokens), (folder, cost) in made.items():
        rows.append({"student": name, "tokens": tokens, **cost} | fidelity(folder, judge, original))
    record(Path(__file__).with_name("record.json"), rows, [len(lines) for lines in teach])


def taught(work: Path, train: Path, name: str, tokens: int) -> tuple[Path, dict[str, float]]:
    """The folder of a student, as a user would make it, and what that took."""
    out = work / f"{name.replace(',', '').replace(' ', '-')}-{tokens}"
    begin, rate = STUDENTS[name]
    lesson = {"tokens": tokens, "rate": rate, "batch": BATCH, "length": LENGTH}
    recipe = {
        "model": TEACHER,
        "data": {"calibrate": [str(train)], "sequences": 32, "length": LENGTH},
        "steps": [*begin, {"distill": lesson}],
        "export": ["folder"],
        "dtype": "fp32",
    }
    spent = made_by(recipe, out)
    return out, {"cpu_s": spent["cpu_s"], "rss_peak_mb": round(spent["rss_peak"] / 1e6)}


def fidelity(folder: Path, judge: dict[str, list[str]], original: dict[str, np.ndarray]) -> dict[str, Any]:
    """How a student ranks what its teacher ranks, by kind of text and on the mean."""
    kinds = {kind: compared(original[kind], embedded(folder, judge[kind])) for kind in judge}
    mean = {key: float(np.mean([one[key] for one in kinds.values()])) for key in ("spearman", "nearest")}
    return {key: round(value, 4) for key, value in mean.items()} | {"kinds": kinds}


@torch.inference_mode()
def embedded(folder: Path, sentences: Sequence[str]) -> np.ndarray:
    """Unit embeddings by stock transformers, float32, one row per sentence."""
    module: nn.Module = AutoModel.from_pretrained(folder, dtype=torch.float32, add_pooling_layer=False).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return embed(module, tokenizer, sentences, length=LENGTH)


def compared(teacher: np.ndarray, student: np.ndarray) -> dict[str, float]:
    """Rank correlation of similarities of all pairs, and of the teacher's nearest ten how many are ours."""
    pairs = np.triu_indices(len(teacher), 1)
    similar = [rows @ rows.T for rows in (teacher, student)]
    rank = float(spearman(similar[0][pairs], similar[1][pairs]))
    for one in similar:
        np.fill_diagonal(one, -np.inf)
    first, second = (np.argsort(-one, axis=1)[:, :NEAREST] for one in similar)
    shared = [len({*a} & {*b}) / NEAREST for a, b in zip(first.tolist(), second.tolist(), strict=True)]
    return {"spearman": round(rank, 4), "nearest": round(float(np.mean(shared)), 4)}


def record(path: Path, rows: Sequence[dict[str, Any]], counts: Sequence[int]) -> None:
    """Write the record."""
    write_record(
        path,
        question=QUESTION,
        threads=torch.get_num_threads(),
        protocol=[
            f"teacher: {TEACHER}, mean of its last states; students: 6 blocks of 384 channels, distill as it "
            f"comes (1 - cosine over a bridge that only turns, and similarities of pairs), "
            f"batches of {BATCH}, precision auto; rates "
            + ", ".join(f"{name} {rate:g}" for name, (_, rate) in STUDENTS.items()),
            f"text: {counts[0]:,} different sentences of fiction, speeches and definitions; in the row that "
            f"says so {counts[1]:,}, with opinions on hotels, medicine, products and lecturers; no labels or "
            "pairs; judged on 512 others of each kind, and of opinions",
            "spearman: similarities of all pairs of sentences, student against teacher; nearest: of the ten "
            "sentences nearest to each by the teacher, the share of the student's ten; means over kinds",
            "CPU seconds: of the whole command, teacher, measuring and writing included",
            f"{PEERS_NAME}: all-MiniLM-L6-v2, which was never taught by this teacher, but by a billion pairs",
        ],
        versions={name: version(name) for name in ("torch", "transformers", "numpy")},
        rows=rows,
        bars=bars(rows),
    )


def bars(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    """The students that began as a table, over MiniLM-L6 and over the others after as many tokens."""
    peer = next(row for row in rows if row["student"] == PEERS_NAME)
    own = [row for row in rows if row["student"] == FIRST]
    if not own:
        raise SystemExit(f"the bars are those of the {FIRST}: name it among --students")
    best, least = (pick(own, key=lambda row: row["tokens"]) for pick in (max, min))
    found = _over(peer, best, "")
    for row in rows:
        if row["student"] == WIDER:
            found += _over(peer, row, "opinions teach too, ")
    others = [
        row["spearman"]
        for row in rows
        if row["tokens"] == least["tokens"] and row["student"] not in (FIRST, WIDER)
    ]
    if others:
        gain = least["spearman"] - max(others)
        name = f"table of tokens less the best other start, {least['tokens'] / 1e3:g}k tokens"
        found.append(Bar(name, gain, "Spearman", "higher", 0.0))
    return found


def _over(peer: dict[str, Any], row: dict[str, Any], what: str) -> list[Bar]:
    """What one student has of what MiniLM-L6 has: on the mean of kinds, and on its worst."""
    where, found = f"{what}{row['tokens'] / 1e6:g}M tokens, over {PEERS_NAME}", list[Bar]()
    for key, said in (("spearman", "Spearman"), ("nearest", "nearest ten")):
        kinds = {kind: row["kinds"][kind][key] / peer["kinds"][kind][key] for kind in peer["kinds"]}
        worst = min(kinds, key=lambda kind: kinds[kind])
        found.append(Bar(f"{said}, {where}: mean of kinds", row[key] / peer[key], "ratio", "higher", 0.9))
        found.append(Bar(f"{said}, {where}: worst kind, {worst}", kinds[worst], "ratio", "higher", 0.9))
    return found


if __name__ == "__main__":
    main()
