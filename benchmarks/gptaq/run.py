"""Do GPTAQ's and FOEM's terms bring GPTQ nearer to the original?

    python benchmarks/gptaq/run.py

SmolLM2's linears at three widths, calibrated on the same windows, KL on texts that calibrated nothing. A step
makes both stages, plain and corrected, and judges them itself; plain GPTQ is made once for each width.
Whatever is finished is kept in the work folder; the record holds what is there.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from bars import Bar, write_record
from contest import fetched
from held_out import LENGTH, SEQUENCES, WINDOWS, divergence, states, texts
from meter import cpu_seconds, write_json
from torch import Tensor

from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.models.products import quick_products
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.quantize import Gptq
from pocketsize.recipes.step import Context

SAMPLE, BITS, GROUP = "sample:smollm2-135m", (4, 3, 2), 64
TERMS: dict[str, dict[str, float]] = {
    "alpha 0.25": {"alpha": 0.25},
    "alpha 1": {"alpha": 1.0},
    "beta 0.2": {"beta": 0.2},
    "alpha 0.25, beta 0.2": {"alpha": 0.25, "beta": 0.2},
}
QUESTION = "Do GPTAQ's and FOEM's terms bring GPTQ nearer to the original?"


def main() -> None:
    work = Path(__file__).with_name("work")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bits", type=int, nargs="+", default=list(BITS))
    parser.add_argument("--work", type=Path, default=work)
    parser.add_argument("--downloads", type=Path, default=work / "downloads", help="packages with texts")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    folder = fetched(SAMPLE)
    original = load(folder)
    calibrate, evaluate = texts(folder, chosen.downloads)
    before = states(original, evaluate)
    for bits in chosen.bits:
        plain = chosen.work / f"{bits}-plain"
        for name, terms in TERMS.items():
            path = chosen.work / f"{bits}-{name.replace(', ', '-').replace(' ', '-')}.json"
            if path.exists():
                continue
            with tempfile.TemporaryDirectory() as room:
                for stage in measured(original, (bits, terms), calibrate, plain, Path(room)):
                    own = path if stage.pop("corrected") else plain.with_suffix(".json")
                    if own.exists():
                        continue
                    after = states(stage.pop("model"), evaluate)
                    kl = {domain: divergence(before, after, domain) for domain in evaluate}
                    told = {"bits": bits, "terms": name if own is path else "none"}
                    write_json(own, told | stage | {"kl": kl})
                    print(own.stem, stage, kl, flush=True)
    found = [json.loads(path.read_text()) for path in chosen.work.glob("*.json")]
    order = ["none", *TERMS]
    record(sorted(found, key=lambda one: (-one["bits"], order.index(one["terms"]))))


def measured(
    model: Model, asked: tuple[int, dict[str, float]], ids: Tensor, plain: Path, room: Path
) -> list[dict[str, Any]]:
    """Both stages of one step: their models, what they were judged by, and CPU seconds.

    What the first made is kept at `plain`, for the next variant of the same width.
    """
    bits, terms = asked
    step = Gptq(
        f"W{bits}A16", group=GROUP, symmetric=False, float_zeros=False, embeddings=None, **terms
    ).resolve(model, ("folder",))
    real, own = torch.ones_like(ids, dtype=torch.bool), room / "work"
    if plain.exists():
        shutil.copytree(plain, own / "gptq")
    marks: dict[str, list[float]] = {}

    def progress(_: int, __: int, what: str) -> None:
        marks.setdefault(what.split(":")[0], []).append(cpu_seconds())

    journal = open_journal(own, {})
    ctx = Context(ids, real, journal, progress)
    with quick_products():
        step.apply(model, ctx)
    if not plain.exists():
        shutil.copytree(own / "gptq", plain)
    found: list[dict[str, Any]] = []
    for stage in ctx.reports[0].stages:
        facts: dict[str, Any] = {"judged": round(stage.divergence, 5), "kept": stage.kept}
        if len(times := marks.get(stage.name, [])) > 1:  # a stage that was copied has none
            facts["cpu_s"] = round((times[-1] - times[0]) * len(times) / (len(times) - 1), 1)
        facts["model"] = model.with_quantized(dict(journal.beside(stage.name).weights()))
        found.append(facts | {"corrected": stage.name == "corrected"})
    return found


def record(found: Sequence[dict[str, Any]]) -> None:
    """A row for each width and variant; the authors' alpha must not lose to plain GPTQ."""
    plain = {one["bits"]: max(one["kl"].values()) for one in found if one["terms"] == "none"}
    rows = []
    for one in found:
        kl = max(one["kl"].values())
        row = {"bits": one["bits"], "terms": one["terms"], "kl": round(kl, 4)}
        row |= {"of_plain": round(kl / plain[one["bits"]], 3), "judged": one["judged"]}
        rows.append(row | {"kept": "yes" if one["kept"] else "no", "cpu_s": one["cpu_s"]})
    write_record(
        Path(__file__).with_name("record.json"),
        question=QUESTION,
        threads=1,
        protocol=[
            f"{SAMPLE}; groups of {GROUP}, integer zeros, embedding and head left alone, seed 0",
            f"{SEQUENCES} windows of {LENGTH} tokens calibrate; KL to the original on {WINDOWS} windows of "
            "each of two texts that calibrated nothing, the worse; of plain: over plain GPTQ's",
            "judged: KL on the calibration windows that judge, every fourth batch; kept: what came of that; "
            "CPU seconds of the stage, judging left out",
        ],
        versions={name: version(name) for name in ("torch", "transformers", "numba")},
        rows=rows,
        bars=[
            Bar(
                f"{row['bits']} bits: KL with alpha 0.25 over plain GPTQ's",
                row["of_plain"],
                "ratio",
                "lower",
                1.0,
            )
            for row in rows
            if row["terms"] == "alpha 0.25"
        ],
    )


if __name__ == "__main__":
    main()
