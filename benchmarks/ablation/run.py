"""Every method, and GPTQ stage by stage, on SmolLM2 at the same width and group.

    python benchmarks/ablation/run.py                 all of it, about an hour on one core
    python benchmarks/ablation/run.py --bits 3        another width (not part of the record)

Stop it at any moment and start it again: figures of finished runs are kept in `runs/` and reused.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bars import Bar, write_record
from contest import Run, Side, opened, options
from language import LENGTH, score, tokens
from results import Result, finished, versions

QUESTION = (
    "What does each quantization method, and each stage of GPTQ, give at one size, and what does it cost?"
)
SEQUENCES, BITS = 16, 4
# Tables of 16 values, each with a format that holds it, in groups of their own.
CODEBOOKS = {"IQ4_NL": "gguf", "NF4": "bitsandbytes", "NVFP4": "folder", "MXFP4": "folder"}
_PLAIN = {"order": False, "search": False, "sink": 0.0}
# Scales alone, by the whole model, on what calibrates: twice.
_TUNED = {"alpha": 0.25, "learn": 20, "codes": False, "tokens": "64k", "batch": 2, "recompute": True}
VARIANTS: Mapping[str, tuple[Mapping[str, object], str]] = {
    "rtn": ({"rtn": {}}, "folder"),
    "rtn, float zeros": ({"rtn": {}}, "gguf"),
    "hqq": ({"hqq": {}}, "folder"),
    "hqq, float zeros": ({"hqq": {}}, "gguf"),
    "awq": ({"awq": {}}, "folder"),
    "awq, float zeros": ({"awq": {}}, "gguf"),
    "gptq, plain": ({"gptq": _PLAIN}, "folder"),
    "gptq, + order": ({"gptq": _PLAIN | {"order": True}}, "folder"),
    "gptq, + search": ({"gptq": {"sink": 0.0}}, "folder"),
    "gptq": ({"gptq": {}}, "folder"),
    "gptq, float zeros": ({"gptq": {}}, "gguf"),
    "gptq, corrected": ({"gptq": {"alpha": 0.25}}, "folder"),
    "gptq, corrected, learned": ({"gptq": {"alpha": 0.25, "learn": 20}}, "folder"),
    "gptq, corrected, learned, tuned": ({"qat": _TUNED}, "folder"),
    "gptq, learned": ({"gptq": {"learn": 20}}, "folder"),
    "gptq, learned, float zeros": ({"gptq": {"learn": 20}}, "gguf"),
    **{
        f"{kind}, {name}": ({kind: {"scheme": name}}, export)
        for name, export in CODEBOOKS.items()
        for kind in ("rtn", "gptq")
    },
}


def main() -> None:
    chosen = options(__doc__, Path(__file__).with_name("work"), SIDES).parse_args()
    bench = opened(chosen, "sample:smollm2-135m", "generate")
    bits = chosen.bits if len(chosen.bits) == 1 else [BITS]
    runs = [
        Run(side, width, SEQUENCES if side.calibrated else 0, LENGTH, 0)
        for width in bits
        for side in SIDES
        if side.name in chosen.sides
    ]
    tokens(bench, [0], chosen.downloads)
    bench.carry_out(runs, chosen.phase, score)
    if chosen.phase in ("all", "record") and bits == [BITS]:
        record([one for run in runs if (one := finished(bench, run)) is not None])


def _side(name: str) -> Side:
    step, export = VARIANTS[name]
    (kind,) = step
    return Side(
        name.replace(", ", "-").replace(" ", ""),
        "side_variant.py",
        environment={"VARIANT": json.dumps({"step": step, "export": [export]})},
        calibrated=kind in ("awq", "gptq", "qat"),
    )


SIDES = tuple(_side(name) for name in VARIANTS)


def record(results: list[Result]) -> None:
    """One row a variant; float zeros must not lose to whole ones, nor any method to RTN on its own grid."""
    names = {_side(name).name: name for name in VARIANTS}
    rows = {names[one.run.side.name]: row(names[one.run.side.name], one) for one in results}
    if len(rows) < len(VARIANTS):
        raise SystemExit(f"{len(rows)} of {len(VARIANTS)} variants are finished; the record needs all")
    tokens = ", ".join(f"{name} {int(d['tokens'])}" for name, d in results[0].domains.items())
    write_record(
        Path(__file__).with_name("record.json"),
        question=QUESTION,
        threads=1,
        protocol=[
            f"SmolLM2-135M-Instruct, relative to the dequantized release; {BITS} bits, group 64, asymmetric; "
            f"calibrated on {SEQUENCES} windows of {LENGTH} tokens, seed 0; embedding and head left alone",
            f"evaluation: {tokens} tokens; KL and perplexity of the worse of the two",
            "gptq, plain: no order, grids that span the range, no weight on first positions; + order: active "
            "groups first; + search: scale and zero by weighted error; gptq: first positions weighted too; "
            "corrected: a quarter of what was lost on the way to each linear made up for; learned: 20 steps "
            "a block; tuned: scales by KL of the whole model, 64,000 tokens of the same text; IQ4_NL, NF4, "
            "NVFP4, MXFP4: codebooks, groups of 32, 64, 16, 32",
            "CPU seconds of the step, compilation included, loading left out",
        ],
        versions=versions(results),
        rows=list(rows.values()),
        bars=[
            Bar(f"KL of {name} against RTN on the same grid", ratio(rows, name), "ratio", "lower", 1.0)
            for name in VARIANTS
            if not name.startswith("rtn")
        ],
    )


def ratio(rows: Mapping[str, Mapping[str, object]], name: str) -> float:
    """The KL of a variant over that of rounding to nearest with zeros of the same kind, or the same table."""
    grid = name.rpartition(", ")[2]
    base = f"rtn, {grid}" if grid in ("float zeros", *CODEBOOKS) else "rtn"
    return float(str(rows[name]["kl"])) / float(str(rows[base]["kl"]))


def row(name: str, one: Result) -> dict[str, object]:
    """What one variant gave."""
    worse = max(one.domains.values(), key=lambda d: d["kl_mean"])
    return {
        "method": name,
        "bits_per_weight": one.figures["bits_per_weight"],
        "kl": round(worse["kl_mean"], 5),
        "top1": round(worse["top1"], 4),
        "perplexity_ratio": round(worse["perplexity"] / worse["perplexity_original"], 4),
        "cpu_s": one.figures["cpu_s"],
        "rss_peak_mb": round(one.figures["rss_peak"] / 1e6, 1),
    }


if __name__ == "__main__":
    main()
