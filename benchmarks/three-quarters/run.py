"""SmolLM2 in one GGUF file with 74 % fewer bytes than its 16-bit weights take.

    python benchmarks/three-quarters/run.py

Shrinks the sample to 69.9 MB with learned codes and tuned scales, as a user would, and measures the file with
a reader and texts that had no part in making it.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from bars import Bar, write_record
from contest import fetched, sources_sha256
from gguf_file import LENGTH, WINDOWS, held_out, known, lay_over, paid, perplexities
from transformers import AutoModelForCausalLM

SAMPLE, FIT_MB, MOST_RATIO = "sample:smollm2-135m", 69.9, 1.10
HOW = ("--effort", "balanced", "--tune", "128k")
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
    call = ["shrink", SAMPLE, "--fit", f"{FIT_MB}MB", *HOW, "--target", "gguf", "-o", str(out)]
    cost = known(out.with_suffix(".shrink.json"), lambda: paid(call))
    (path,) = out.glob("*.gguf")
    windows = held_out(folder, chosen.downloads)
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        parameters = sum(p.numel() for p in model.parameters())
        before = known(chosen.work / "original.json", lambda: perplexities(model, windows))
        kinds = lay_over(model, path)
        after = perplexities(model, windows)
    record(path, kinds, (before, after), cost, parameters)


def record(
    path: Path,
    kinds: dict[str, int],
    perplexity: tuple[dict[str, float], dict[str, float]],
    cost: dict[str, float],
    parameters: int,
) -> None:
    """A row for each kind of text: those that had no part in it, and the one that the run measures itself."""
    size, (before, after) = path.stat().st_size, perplexity
    run = json.loads(path.with_name("record.json").read_text())
    rows = [row(name, WINDOWS * LENGTH, before[name], after[name]) for name in before]
    own = {m["subject"]: m["value"] for m in run["measurements"] if m["name"] == "perplexity"}
    tokens = next(int(m["samples"]) for m in run["measurements"] if m["name"] == "perplexity")
    rows.append(row("Python's documentation", tokens, own["original"], own["compressed"]))
    types = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    (step,) = run["steps"]
    stages = ", ".join(f"{one['name']} {one['divergence']:.4f}" for one in step["stages"])
    write_record(
        Path(__file__).with_name("record.json"),
        question=QUESTION,
        threads=torch.get_num_threads(),
        protocol=[
            f"pocketsize shrink {SAMPLE} --fit {FIT_MB}MB {' '.join(HOW)}, all else default; relative to the "
            "dequantized release",
            f"file: {size} bytes, {1 - size / (2 * parameters):.1%} fewer than 16-bit weights; tensors "
            f"{types}; unpacked by the gguf package, run in torch",
            "perplexity: next token in windows of 512, texts that calibrated nothing; of Python's "
            "documentation, which calibrates, chapters that did not, as the run measures itself",
            f"stages, KL on windows of the training text that taught nothing: {stages}",
            f"{cost['cpu_s']:.0f} CPU seconds, {cost['rss_peak'] / 1e6:.0f} MB at most",
        ],
        versions={name: version(name) for name in ("torch", "transformers", "gguf", "numpy")},
        rows=rows,
        bars=[
            Bar("SmolLM2 as GGUF: size of the file", size / 1e6, "MB", "lower", FIT_MB),
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
