"""What rounding inputs to 8 bits costs beside rounding weights, and what smoothing gives back.

    python benchmarks/w8a8/run.py

Each step runs as a recipe runs it, on little text, and is measured with inputs rounded token by token as
the folder will be run; sizes are those of the folders it makes.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from bars import Bar, write_record
from meter import write_json

from pocketsize.exporting.table import EXPORTERS
from pocketsize.measurement.embedding import embedding_quality
from pocketsize.measurement.quality import quality
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.models.products import quick_products
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.recipe import Data, parse_step
from pocketsize.recipes.step import Context
from pocketsize.recipes.texts import Texts, read_texts

SAMPLES = ("sample:smollm2-135m", "sample:minilm-l6", "sample:mpnet-base")
SEQUENCES, LENGTH, TOKENS = 16, 256, 2048
QUESTION = (
    "What does rounding the inputs of linears to 8 bits cost, and how much of it does smoothing give back?"
)
STEPS: dict[str, dict[str, Any]] = {
    "W8A16, to nearest": {"rtn": {"scheme": "W8A16", "group": None}},
    "W8A8, to nearest": {"rtn": {"scheme": "W8A8"}},
    "W8A8, gptq": {"gptq": {"scheme": "W8A8"}},
    "W8A8, smoothquant": {"smoothquant": {"scheme": "W8A8"}},
    "FP8, to nearest": {"rtn": {"scheme": "FP8"}},
    "FP8, gptq": {"gptq": {"scheme": "FP8"}},
    "FP8, smoothquant": {"smoothquant": {"scheme": "FP8"}},
}
MOST = {"sample:smollm2-135m": 0.5}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(SAMPLES))
    parser.add_argument("--work", type=Path, default=Path(__file__).with_name("work"), help="rows so far")
    parser.add_argument("--record", type=Path, default=Path(__file__).with_name("record.json"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    chosen.work.mkdir(parents=True, exist_ok=True)
    rows = [row for name in chosen.models for row in measured(name, chosen.work)]
    write_record(
        chosen.record,
        question=QUESTION,
        threads=1,
        protocol=(
            f"calibrated on {SEQUENCES} windows of {LENGTH} tokens of Python's documentation, seed 0;"
            " embedding and head left alone; scales by row; SmolLM2: relative to the dequantized release",
            f"SmolLM2: KL over {TOKENS} held-out tokens, all in float32; encoders: 256 held-out sentences",
            "MB: the weights of the folder, which stock transformers loads; CPU s: the step alone",
        ),
        versions={name: version(name) for name in ("torch", "transformers", "numba", "compressed-tensors")},
        rows=rows,
        bars=bars(rows),
    )


def measured(name: str, work: Path) -> list[dict[str, Any]]:
    """One model quantized by each step; rows that are kept in the work folder are not measured again."""
    model, short = load(name), name.removeprefix("sample:")
    data = Data(sequences=SEQUENCES, length=LENGTH, tokens=TOKENS, written=0.0).resolved(model)
    texts = read_texts(data, Path(), model)
    rows: list[dict[str, Any]] = []
    for method, raw in STEPS.items():
        kept = work / f"{short} {method}.json"
        if kept.exists():
            rows.append(json.loads(kept.read_text()))
            continue
        found, cpu_s = quantized(model, raw, texts)
        size = EXPORTERS["folder"].predict_bytes(model, found.schemes.get) / 1e6
        row = {"model": short, "method": method, **figures(model, found, texts), "mb": round(size, 2)}
        rows.append(row | {"cpu_s": round(cpu_s, 1)})
        write_json(kept, rows[-1])
    return rows


def quantized(model: Model, raw: dict[str, Any], texts: Texts) -> tuple[Model, float]:
    """The model with one step done, held in memory, and the CPU seconds of it."""
    step = parse_step(raw).resolve(model, ("folder",))
    with tempfile.TemporaryDirectory() as room:
        start = time.process_time()
        journal = open_journal(Path(room) / "work", {})
        windows = texts.calibrate
        with quick_products():
            done = step.apply(model, Context(windows.input_ids, windows.mask, journal, lambda *_: None))
        took = time.process_time() - start
        return done.with_quantized(dict(done.quantized), done.changed), took


def figures(model: Model, small: Model, texts: Texts) -> dict[str, float]:
    """What was kept: KL and the most likely token of generators, distance and rank of encoders."""
    if model.arch.task == "generate":
        rows = quality(model, small, texts.evaluate, seed=0, dtype=torch.float32).measurements
        wanted = {"kl_mean": "kl", "top1": "top1", "perplexity_ratio": "perplexity_ratio"}
    else:
        rows = embedding_quality(model, small, texts.corpus, seed=0).measurements
        wanted = {"one_minus_cosine": "one_minus_cosine", "spearman": "spearman"}
    found = {row.name: row.value for row in rows if row.subject == "compressed"}
    return {short: round(found[name], 6) for name, short in wanted.items()}


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """Smoothing against rounding to nearest, where a model has outliers that can move."""
    lost = {(row["model"], row["method"]): row.get("kl", row.get("one_minus_cosine")) for row in rows}
    found = []
    for name, most in MOST.items():
        short = name.removeprefix("sample:")
        if (short, "W8A8, smoothquant") in lost:
            name = "KL of W8A8, smoothquant, against rounding to nearest"
            share = lost[short, "W8A8, smoothquant"] / lost[short, "W8A8, to nearest"]
            found.append(Bar(name, share, "ratio", "lower", most))
            share = lost[short, "FP8, gptq"] / lost[short, "FP8, to nearest"]
            found.append(Bar("KL of FP8, gptq, against rounding to nearest", share, "ratio", "lower", 0.8))
    return found


if __name__ == "__main__":
    main()
