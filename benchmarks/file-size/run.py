"""SmolLM2 in one GGUF file of at most 80 MB: what that costs, in perplexity and in CPU seconds.

    python benchmarks/file-size/run.py

Does what `make demo` does after its downloads (shrink, verify, one answer), as a user would, with all
defaults, and measures the file that comes out with a reader and texts that had no part in making it. Then
the model as float32 GGUF: does llama.cpp pick the tokens that our forward picks?
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from bars import Bar, write_record
from contest import fetched, sources_sha256
from gguf_file import LENGTH, WINDOWS, held_out, known, lay_over, paid, perplexities
from transformers import AutoModelForCausalLM

SAMPLE, FIT_MB, MOST_RATIO, LEAST_AGREEMENT = "sample:smollm2-135m", 80, 1.12, 97
MOST_CPU_S, MOST_MB = 600, 3000
QUESTION = "How much perplexity does SmolLM2-135M lose when its whole GGUF file must fit in 80 MB?"


def main() -> None:
    work = Path(__file__).with_name("work")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help=f"the float32 folder (default: {SAMPLE})")
    parser.add_argument("--work", type=Path, default=work)
    parser.add_argument("--downloads", type=Path, default=work / "downloads", help="packages with texts")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    folder = chosen.model or fetched(SAMPLE)
    out = chosen.work / f"small-{sources_sha256(('.',))[:12]}"
    costs = demo(str(chosen.model or SAMPLE), out)
    (path,) = out.glob("*.gguf")
    floats = known(chosen.work / f"{out.name}.floats.json", lambda: float_agreement(folder, chosen.work))
    windows = held_out(folder, chosen.downloads)
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        before = known(chosen.work / "original.json", lambda: perplexities(model, windows))
        kinds = lay_over(model, path)
        after = perplexities(model, windows)
    record(path, kinds, (before, after), costs, floats)


def demo(model: str, out: Path) -> dict[str, float]:
    """CPU seconds of the commands of `make demo`, children included, and the largest of their processes."""
    question = ["--prompt", "Why is the sky blue? Answer in one sentence.", "--tokens", "60"]
    calls = {
        "shrink": ["shrink", model, "--fit", f"{FIT_MB}MB", "-o", str(out)],
        "verify": ["verify", str(out)],
        "chat": ["chat", str(out), *question],
    }
    costs = {
        name: known(out.with_suffix(f".{name}.json"), lambda c=call: paid(c)) for name, call in calls.items()
    }
    return {
        "cpu_s": sum(cost["cpu_s"] for cost in costs.values()),
        "rss_peak": max(cost["rss_peak"] for cost in costs.values()),
    }


def float_agreement(folder: Path, work: Path) -> dict[str, float]:
    """Of the model as it is, as a float32 file: the share of its own clear tokens that llama.cpp picks."""
    from pocketsize.exporting.gguf.writer import write
    from pocketsize.exporting.verify import verify_gguf
    from pocketsize.models.load import load

    model, path = replace(load(str(folder)), dtype=torch.float32), work / "float32.gguf"
    path.unlink(missing_ok=True)
    write(model, path)
    said = " ".join(verify_gguf(model, path))
    path.unlink()
    found = re.search(r"of (\d+) positions, ([\d.]+)% where the margin", said)
    if found is None:
        raise SystemExit("the float32 file was not run in llama.cpp; install the extra llamacpp")
    return {"positions": int(found[1]), "clear_percent": float(found[2])}


def agreement(path: Path) -> float:
    """The percentage of positions at which llama.cpp picked our token when the file was read back."""
    artifacts = json.loads(path.with_name("record.json").read_text())["artifacts"]
    checks = next(a["checks"] for a in artifacts if a["path"] == path.name)
    said = [re.search(r"picks our forward's token at ([\d.]+)% of \d+ positions", check) for check in checks]
    found = next((one for one in said if one), None)
    if found is None:
        raise SystemExit(f"{path}: was not run in llama.cpp; install the extra llamacpp")
    return float(found[1])


def record(
    path: Path,
    kinds: dict[str, int],
    perplexity: tuple[dict[str, float], dict[str, float]],
    costs: dict[str, float],
    floats: dict[str, float],
) -> None:
    """One row per kind of text, and the bars."""
    size, (before, after) = path.stat().st_size, perplexity
    rows = [
        {
            "text": name,
            "tokens": WINDOWS * LENGTH,
            "perplexity_original": round(before[name], 4),
            "perplexity": round(after[name], 4),
            "ratio": round(after[name] / before[name], 4),
        }
        for name in before
    ]
    worst = max(after[name] / before[name] for name in before)
    types = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    write_record(
        Path(__file__).with_name("record.json"),
        question=QUESTION,
        threads=torch.get_num_threads(),
        protocol=[
            f"pocketsize shrink {SAMPLE} --fit {FIT_MB}MB, all defaults; relative to the dequantized release",
            f"file: {size} bytes, tensors {types}; unpacked by the gguf package, run in torch",
            "perplexity: next token in windows of 512, texts that calibrated nothing; the worse of two",
            "agreement: along our own greedy continuations, 32 prompts x 32 tokens; llama.cpp with float32 "
            "keys and values; the float32 file: among those positions where our margin exceeds 0.1",
            "CPU and memory: shrink, verify and one answer, children included; the largest process",
        ],
        versions={name: version(name) for name in ("torch", "transformers", "gguf", "numpy")},
        rows=rows,
        bars=[
            Bar("SmolLM2 as GGUF: size of the file", size / 1e6, "MB", "lower", FIT_MB),
            Bar("SmolLM2 as GGUF: perplexity against the original", worst, "ratio", "lower", MOST_RATIO),
            Bar(
                "SmolLM2 as GGUF: positions at which llama.cpp picks our forward's token",
                agreement(path),
                "%",
                "higher",
                LEAST_AGREEMENT,
            ),
            Bar(
                f"SmolLM2 as float32 GGUF, {floats['positions']} positions: llama.cpp picks our clear tokens",
                floats["clear_percent"],
                "%",
                "higher",
                100,
            ),
            Bar("make demo after its downloads: CPU time", costs["cpu_s"], "s", "lower", MOST_CPU_S),
            Bar(
                "make demo after its downloads: peak memory", costs["rss_peak"] / 1e6, "MB", "lower", MOST_MB
            ),
        ],
    )


if __name__ == "__main__":
    main()
