"""Do rotations help GPTQ of weights alone, with grids searched and errors fed on?

    python benchmarks/rotations/run.py

SmolLM2's linears at several widths and groups, as they are and seen through rotations of heads' values (R2)
and of the residual stream too (R1); calibrated on the same windows, KL on texts that calibrated nothing.
Whatever is finished is kept in the work folder; the record holds what is there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from bars import write_record
from contest import fetched
from held_out import LENGTH, SEQUENCES, WINDOWS, divergence, states, texts
from meter import write_json
from torch import Tensor

from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.models.products import quick_products
from pocketsize.models.rotated import rotated
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.quantize import Gptq
from pocketsize.recipes.step import Context

SAMPLE = "sample:smollm2-135m"
TURNS = {"none": (False, False), "values": (True, False), "values and residual": (True, True)}
GRIDS = ((3, 64), (2, 64), (3, None), (4, 64), (4, None))
QUESTION = "Do fused rotations help GPTQ of the weights alone?"


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
    torch.set_num_threads(1)
    folder = chosen.model or fetched(SAMPLE)
    original = load(folder)
    calibrate, evaluate = texts(folder, chosen.downloads)
    before = states(original, evaluate)
    for bits, group in GRIDS:
        for turn in ("none", "values and residual", "values"):
            path = chosen.work / f"{bits}-{group or 'row'}-{turn.replace(' ', '-')}.json"
            if not path.exists():
                values, residual = TURNS[turn]
                turned = rotated(original, values=values, residual=residual) if values else original
                with tempfile.TemporaryDirectory() as room:
                    after = states(quantized(turned, (bits, group), calibrate, Path(room)), evaluate)
                kl = {name: divergence(before, after, name) for name in evaluate}
                write_json(path, {"bits": bits, "group": group or "row", "rotated": turn, "kl": kl})
                print(path.stem, kl, flush=True)
            record([json.loads(p.read_text()) for p in sorted(chosen.work.glob("*.json"))])


def quantized(model: Model, grid: tuple[int, int | None], ids: Tensor, room: Path) -> Model:
    """The model with its linears quantized by GPTQ, integer zeros, embedding and head left."""
    step = Gptq(f"W{grid[0]}A16", group=grid[1], symmetric=False, float_zeros=False, embeddings=None)
    real = torch.ones_like(ids, dtype=torch.bool)
    journal = open_journal(room / "work", {})
    with quick_products():
        return step.resolve(model, ("folder",)).apply(model, Context(ids, real, journal, lambda *_: None))


def record(found: list[dict[str, object]]) -> None:
    """A row for each grid and rotation; nothing is promised of them, so there is no bar."""
    rows = [
        {
            "bits": one["bits"],
            "group": str(one["group"]),
            "rotated": one["rotated"],
            "kl": round(max(one["kl"].values()), 4),  # type: ignore[attr-defined]
        }
        for one in found
    ]
    write_record(
        Path(__file__).with_name("record.json"),
        question=QUESTION,
        threads=1,
        protocol=[
            f"{SAMPLE}; GPTQ with all that is on by default, integer zeros, embedding and head left alone",
            f"{SEQUENCES} windows of {LENGTH} tokens calibrate; KL to the original on {WINDOWS} windows of "
            "each of two texts that calibrated nothing, the worse of the two",
            "rotations: randomised Hadamard, 64 for values, 576 for the residual stream, one seed",
        ],
        versions={name: version(name) for name in ("torch", "transformers", "numba")},
        rows=rows,
        bars=[],
    )


if __name__ == "__main__":
    main()
