"""SmolLM2 as a folder with 74 % fewer bytes than its 16-bit weights take.

    python benchmarks/three-quarters/run.py

Quantizes all of the sample, embedding and head included, with learned codes and tuned scales, as a user
would, and measures it on texts that had no part in making it.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from bars import Bar, write_record
from contest import fetched, sources_sha256
from gguf_file import LENGTH, WINDOWS, held_out, known, paid, perplexities
from transformers import AutoModelForCausalLM, PreTrainedModel

from pocketsize.models.load import load
from pocketsize.models.skeleton import materialise

SAMPLE, MOST_MB, MOST_RATIO = "sample:smollm2-135m", 69.9, 1.10
GRID = ("--scheme", "W4A16", "--group", "192", "--embeddings", "same", "--target", "folder")
HOW = ("--effort", "balanced", "--tune", "64k")
QUESTION = (
    "With three quarters of its bytes gone, embedding and head included: what perplexity has SmolLM2-135M?"
)


def main() -> None:
    work = Path(__file__).with_name("work")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=work)
    parser.add_argument("--downloads", type=Path, default=work / "downloads", help="packages with texts")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    folder, out = fetched(SAMPLE), chosen.work / f"small-{sources_sha256(('.',))[:12]}"
    cost = known(out.with_suffix(".json"), lambda: paid(["quantize", SAMPLE, *GRID, *HOW, "-o", str(out)]))
    windows = held_out(folder, chosen.downloads)
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        before = known(chosen.work / "original.json", lambda: perplexities(model, windows))
        small = cast(PreTrainedModel, materialise(load(str(out)), torch.float32)).eval()
        after = perplexities(small, windows)
    record(out, (before, after), cost, sum(p.numel() for p in model.parameters()))


def record(
    out: Path, perplexity: tuple[dict[str, float], dict[str, float]], cost: dict[str, float], parameters: int
) -> None:
    """A row for each kind of text: those that had no part in it, and the one that the run measures itself."""
    size, (before, after) = sum(path.stat().st_size for path in out.glob("*.safetensors")), perplexity
    run = json.loads((out / "record.json").read_text())
    rows = [row(name, WINDOWS * LENGTH, before[name], after[name]) for name in before]
    own = {m["subject"]: m["value"] for m in run["measurements"] if m["name"] == "perplexity"}
    tokens = next(int(m["samples"]) for m in run["measurements"] if m["name"] == "perplexity")
    rows.append(row("Python's documentation", tokens, own["original"], own["compressed"]))
    (step,) = run["steps"]
    stages = ", ".join(f"{one['name']} {one['divergence']:.4f}" for one in step["stages"])
    write_record(
        Path(__file__).with_name("record.json"),
        question=QUESTION,
        threads=torch.get_num_threads(),
        protocol=[
            f"pocketsize quantize {SAMPLE} {' '.join(GRID + HOW)}; relative to the dequantized release",
            f"weights, embedding and head included: {size} bytes, {1 - size / (2 * parameters):.1%} fewer "
            "than in 16 bits",
            "perplexity: next token in windows of 512, texts that calibrated nothing; of Python's "
            "documentation, which calibrates, chapters that did not, as the run measures itself",
            f"stages, KL on windows of the training text that taught nothing: {stages}",
            f"{cost['cpu_s']:.0f} CPU seconds, {cost['rss_peak'] / 1e6:.0f} MB at most",
        ],
        versions={name: version(name) for name in ("torch", "transformers", "numpy")},
        rows=rows,
        bars=[
            Bar("size of the weights, embedding and head included", size / 1e6, "MB", "lower", MOST_MB),
            *(
                Bar(
                    f"perplexity against the original, {one['text']}",
                    one["ratio"],
                    "ratio",
                    "lower",
                    MOST_RATIO,
                )
                for one in rows
            ),
        ],
    )


def row(text: str, tokens: int, before: float, after: float) -> dict[str, Any]:
    """The figures of one text."""
    figures = {"perplexity_original": round(before, 4), "perplexity": round(after, 4)}
    return {"text": text, "tokens": tokens, **figures, "ratio": round(after / before, 4)}


if __name__ == "__main__":
    main()
