"""A model that teaches its own earlier blocks: what it says behind them, and what stopping there saves.

    python benchmarks/early-exits/run.py --tokens 64k       an hour on a core

SmolLM2 as released and after `distill` with `exits`, its own teacher. What is finished is kept in `work`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from bars import Bar, write_record
from contest import fetched, plain_options
from corpus import domains
from gguf_file import made_by
from meter import write_json

from pocketsize.data.calibration import Windows, evaluation_windows
from pocketsize.data.text import Corpus, Document
from pocketsize.measurement.gated import gated_quality
from pocketsize.measurement.quality import Quality, quality
from pocketsize.models.depth import with_blocks
from pocketsize.models.load import load, tokenizer_of
from pocketsize.models.model import Model
from pocketsize.models.products import quick_products
from pocketsize.models.skipping import Leave, early_exits
from pocketsize.recipes.training import count_of

SAMPLE = "sample:smollm2-135m"
EXITS, AGREE, RANKS = (14, 18, 22, 26), 0.95, (64, 0)
LESSON = {"rate": 2e-4, "batch": 2, "length": 256}
LENGTH, EVALUATED, CALIBRATE = 512, 4096, 16
RELEASED, TAUGHT = "as released", "taught to stop early"
QUESTION = (
    "What does a model say behind its earlier blocks before and after it has taught them itself, what does "
    "that cost at its end, and what do tokens that stop there save?"
)


def main() -> None:
    parser = plain_options(__doc__, Path(__file__).with_name("work"))
    parser.add_argument("--tokens", default="64k", help="that teach")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    tokens = count_of(chosen.tokens)
    released = load(fetched(SAMPLE))
    teach, held_out = texts(chosen.work, chosen.downloads, released)
    folder, cost = taught(chosen.work, teach, tokens)
    with quick_products():
        rows = [
            row
            for name, model in ((RELEASED, released), (TAUGHT, load(folder)))
            for row in measured(
                chosen.work / f"{name.replace(' ', '-')}-{tokens}.json", name, model, released, held_out
            )
        ]
    record(Path(__file__).with_name("record.json"), rows, tokens, cost)


def texts(work: Path, downloads: Path, model: Model) -> tuple[list[Path], dict[str, Windows]]:
    """Files that teach, and by kind windows that judge; those of `calibrate` tell how sure is enough."""
    files, held_out, some = [], {}, []
    for domain in domains(downloads):
        path = work / f"{domain.name}.txt"
        path.write_text("\n\n".join(domain.calibrate[:: 5 if domain.name == "speeches" else 1]))
        files.append(path)
        held_out[domain.name] = windows(domain.name, domain.evaluate, model, EVALUATED)
        some.append(domain.calibrate[-1])
    return files, held_out | {"calibrate": windows("calibrate", some, model, CALIBRATE * LENGTH)}


def windows(name: str, documents: Any, model: Model, tokens: int) -> Windows:
    """The first tokens of some documents."""
    corpus = Corpus(name, tuple(Document(str(i), text) for i, text in enumerate(documents)))
    return evaluation_windows(corpus, tokenizer_of(model), tokens=tokens, length=LENGTH, special=True)


def taught(work: Path, files: list[Path], tokens: int) -> tuple[Path, dict[str, float]]:
    """The folder of a model that has taught itself, and what that took."""
    out = work / f"taught-{tokens}"
    lesson = LESSON | {"tokens": tokens, "exits": list(EXITS)}
    recipe = {
        "model": SAMPLE,
        "data": {"calibrate": [str(path) for path in files], "sequences": 4, "tokens": 1024},
        "steps": [{"distill": lesson}],
        "export": ["folder"],
        "dtype": "fp32",
    }
    return out, made_by(recipe, out)


def measured(
    path: Path, name: str, model: Model, released: Model, held_out: Mapping[str, Windows]
) -> list[dict[str, Any]]:
    """Rows of a model: whole, cut behind each exit, and with tokens that leave."""
    if path.exists():
        return json.loads(path.read_text())
    judges = {kind: part for kind, part in held_out.items() if kind != "calibrate"}
    rows: list[dict[str, Any]] = []
    original: dict[str, Quality] = {}  # each look at a shorter model tells the released one's figures too
    for count in (len(model.blocks), *(number + 1 for number in reversed(EXITS))):
        short = with_blocks(model, range(count)) if count < len(model.blocks) else model
        original = {kind: quality(released, short, part, seed=0) for kind, part in judges.items()}
        rows.append({"model": name, "blocks": str(count)} | worse(original, original))
        print(rows[-1], flush=True)
    calibrate = held_out["calibrate"]
    for rank in RANKS:
        leave = Leave(EXITS, agree=AGREE, rank=rank)
        gates = early_exits(model, calibrate.input_ids, calibrate.mask, leave)
        found = {kind: gated_quality(model, gates, part, seed=0) for kind, part in judges.items()}
        saved = min(figures(one)["operations_saved"] for one in found.values())
        row = {"model": name, "blocks": f"{AGREE:.0%} of tokens agree, rank {rank}", "saved": round(saved, 4)}
        rows.append(row | worse(found, original))
        print(rows[-1], flush=True)
    write_json(path, rows)
    return rows


def worse(found: Mapping[str, Quality], original: Mapping[str, Quality]) -> dict[str, float]:
    """The perplexity over the released model's, of both kinds of text the worse."""
    pairs = {
        kind: (figures(one)["perplexity"], figures(original[kind])["original"]) for kind, one in found.items()
    }
    return {"perplexity_ratio": round(max(own / other for own, other in pairs.values()), 4)}


def figures(found: Quality) -> dict[str, float]:
    """By name; the perplexity of the original under a name of its own."""
    own = {m.name: m.value for m in found.measurements if m.subject != "original"}
    of_original = [m.value for m in found.measurements if (m.name, m.subject) == ("perplexity", "original")]
    return own | dict(zip(["original"], of_original, strict=False))


def record(path: Path, rows: list[dict[str, Any]], tokens: int, cost: dict[str, float]) -> None:
    """Write the record."""
    by = {(row["model"], row["blocks"]): row for row in rows}
    last = str(EXITS[-1] + 1)
    at = f"{AGREE:.0%} of tokens agree, rank {RANKS[0]}"
    bars = [
        Bar(
            "perplexity of the whole, taught over released",
            by[TAUGHT, "30"]["perplexity_ratio"],
            "ratio",
            "lower",
            1.05,
        ),
        Bar(
            f"perplexity behind {last} of 30 blocks, taught over released",
            by[TAUGHT, last]["perplexity_ratio"] / by[RELEASED, last]["perplexity_ratio"],
            "ratio",
            "lower",
            0.5,
        ),
        Bar(
            "operations saved by tokens that leave, taught over released",
            by[TAUGHT, at]["saved"] / by[RELEASED, at]["saved"],
            "ratio",
            "higher",
            1.5,
        ),
    ]
    write_record(
        path,
        question=QUESTION,
        threads=torch.get_num_threads(),
        protocol=[
            f"SmolLM2-135M-Instruct, 30 blocks; distill with exits {list(EXITS)}, its own teacher, "
            f"{tokens:,} tokens of fiction and speeches, {LESSON}: {cost['cpu_s']:.0f} CPU seconds, "
            f"{cost['rss_peak'] / 1e6:.0f} MB",
            f"judged on {EVALUATED:,} tokens of other books and speeches each; ratios are over the released "
            "model's perplexity, of both kinds the worse",
            "blocks: so many from the front, then norm and head; or gates of kind exit, calibrated on 16 "
            "windows so that 95 % of tokens stay the same (rank: of the map that foretells the last block's)",
            "saved: of all operations",
        ],
        versions={name: version(name) for name in ("torch", "transformers")},
        rows=rows,
        bars=bars,
    )


if __name__ == "__main__":
    main()
