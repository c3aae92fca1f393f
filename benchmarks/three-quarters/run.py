"""SmolLM2 as a folder with 74 % fewer bytes than its 16-bit weights take.

    python benchmarks/three-quarters/run.py
    python benchmarks/three-quarters/run.py --ways alike      # one of the two ways

Quantizes all of the sample, embedding and head included, with learned codes and tuned scales, as a user
would, on the default text and on text like that which the model is to read, and measures it on texts that
had no part in making it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from bars import Bar, write_record
from contest import fetched, plain_options, sources_sha256
from corpus import domains
from gguf_file import LENGTH, WINDOWS, held_out, known, paid, perplexities
from transformers import AutoModelForCausalLM, PreTrainedModel

from pocketsize.models.load import load
from pocketsize.models.skeleton import materialise

SAMPLE, MOST_MB, MOST_RATIO = "sample:smollm2-135m", 69.9, 1.10
GRID = ("--scheme", "W4A16", "--group", "192", "--embeddings", "same", "--target", "folder")
HOW = ("--effort", "balanced")
# The options of each way beside those of all.
WAYS = {"default": ("--tune", "64k"), "alike": ("--tune", "256k", "--asymmetric", "--sequences", "256")}
ON = {"default": "the default text", "alike": "other fiction and speeches"}
# Of the speeches that may calibrate one in so many does: about as much text as of fiction.
EVERY = 5
QUESTION = (
    "With three quarters of its bytes gone, embedding and head included: what perplexity has SmolLM2-135M?"
)


def main() -> None:
    parser = plain_options(__doc__, Path(__file__).with_name("work"))
    parser.add_argument("--ways", nargs="+", choices=tuple(WAYS), default=list(WAYS))
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    folder = fetched(SAMPLE)
    windows = held_out(folder, chosen.downloads)
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        before = known(chosen.work / "original.json", lambda: perplexities(model, windows))
        parameters = sum(p.numel() for p in model.parameters())
        made = [made_in(way, chosen.work, chosen.downloads) for way in chosen.ways]
        found = [measured(way, out, before, windows) for way, (out, _) in zip(chosen.ways, made, strict=True)]
    said = [told(way, out, cost, parameters) for way, (out, cost) in zip(chosen.ways, made, strict=True)]
    record(Path(__file__).with_name("record.json"), [row for rows in found for row in rows], said)


def made_in(way: str, work: Path, downloads: Path) -> tuple[Path, dict[str, float]]:
    """The folder that a way makes, and what that took."""
    out = work / f"{way}-{sources_sha256(('.',))[:12]}"
    options = [*GRID, *HOW, *WAYS[way], *texts(way, work, downloads), "-o", str(out)]
    return out, known(out.with_suffix(".json"), lambda: paid(["quantize", SAMPLE, *options]))


def texts(way: str, work: Path, downloads: Path) -> list[str]:
    """The options that name the text, which is written where they say."""
    if way == "default":
        return []
    words: list[str] = []
    for domain in domains(downloads):
        path = work / f"{domain.name}.txt"
        path.write_text("\n\n".join(domain.calibrate[:: EVERY if domain.name == "speeches" else 1]))
        words += ["--calibrate", str(path)]
    return words


def measured(
    way: str, out: Path, before: dict[str, float], windows: dict[str, torch.Tensor]
) -> list[dict[str, Any]]:
    """A row for each kind of text: two that no way has read, and the one that a run measures itself on."""
    small = cast(PreTrainedModel, materialise(load(str(out)), torch.float32)).eval()
    after = perplexities(small, windows)
    run, facts = json.loads((out / "record.json").read_text()), {"way": way, "megabytes": megabytes(out)}
    rows = [facts | row(name, WINDOWS * LENGTH, before[name], after[name]) for name in before]
    own = {m["subject"]: m["value"] for m in run["measurements"] if m["name"] == "perplexity"}
    tokens = next(int(m["samples"]) for m in run["measurements"] if m["name"] == "perplexity")
    return [*rows, facts | row("Python's documentation", tokens, own["original"], own["compressed"])]


def told(way: str, out: Path, cost: dict[str, float], parameters: int) -> str:
    """What a way is, and what each of its stages gave."""
    (step,) = json.loads((out / "record.json").read_text())["steps"]
    stages = ", ".join(f"{one['name']} {one['divergence']:.4f}" for one in step["stages"])
    size = weights_bytes(out)
    command = f"pocketsize quantize {SAMPLE} {' '.join(GRID + HOW + WAYS[way])}"
    gone, peak = 1 - size / (2 * parameters), cost["rss_peak"] / 1e6
    return (
        f"{way}, on {ON[way]}: {command}; {size} bytes, {gone:.1%} fewer than in 16 bits; "
        f"{cost['cpu_s']:.0f} CPU seconds, {peak:.0f} MB at most; stages, KL on windows of the training text "
        f"that taught nothing: {stages}"
    )


def weights_bytes(out: Path) -> int:
    """The bytes of weights, embedding and head included."""
    return sum(path.stat().st_size for path in out.glob("*.safetensors"))


def megabytes(out: Path) -> float:
    """The same in MB."""
    return round(weights_bytes(out) / 1e6, 4)


def record(path: Path, rows: Sequence[dict[str, Any]], said: Sequence[str]) -> None:
    """Write the record; a way that was not run stays as it was recorded, its rows name the commit of then."""
    before = json.loads(path.read_text()) if path.exists() else {"rows": [], "protocol": [], "commit": ""}
    ways = {one["way"] for one in rows}
    older = [{"commit": before["commit"][:7]} | one for one in before["rows"] if one["way"] not in ways]
    kept = [line for line in before["protocol"] if line.split(",")[0] in set(WAYS) - ways]
    every = [*older, *rows]
    write_record(
        path,
        question=QUESTION,
        threads=torch.get_num_threads(),
        protocol=[
            "perplexity: next token in windows of 512, relative to the dequantized release; of Moby Dick and "
            "of every fifth State of the Union message, which no way reads, and of chapters of Python's "
            "documentation that calibrate nothing",
            *kept,
            *said,
        ],
        versions={name: version(name) for name in ("torch", "transformers", "numpy")},
        rows=every,
        bars=[*_sizes(every), *_ratios(every)],
    )


def _sizes(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    sizes = {one["way"]: one["megabytes"] for one in rows}
    said = "size of the weights, embedding and head included"
    return [Bar(f"{said}, {way}", size, "MB", "lower", MOST_MB) for way, size in sizes.items()]


def _ratios(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    return [
        Bar(
            f"perplexity against the original, {one['text']}, calibrated on {ON[one['way']]}",
            one["ratio"],
            "ratio",
            "lower",
            MOST_RATIO,
        )
        for one in rows
    ]


def row(text: str, tokens: int, before: float, after: float) -> dict[str, Any]:
    """The figures of one text."""
    figures = {"perplexity_original": round(before, 4), "perplexity": round(after, 4)}
    return {"text": text, "tokens": tokens, **figures, "ratio": round(after / before, 4)}


if __name__ == "__main__":
    main()
