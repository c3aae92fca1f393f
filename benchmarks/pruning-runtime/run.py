"""Gates at run time: the operations that each kind saves, what that costs in perplexity, and how fast it is.

    python benchmarks/pruning-runtime/run.py

SmolLM2, gates of every kind at several aims. One walk gauges the gates of inputs and channels for all aims;
every row is kept as it is finished. Stop it at any moment and start it again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from bars import Bar, write_record
from contest import fetched
from corpus import domains, first_windows, pick_windows, token_streams
from meter import write_json
from torch import Tensor, nn

from pocketsize.measurement.gated import SUBJECT, WHOLE, gated_speed
from pocketsize.measurement.tokens import token_scores
from pocketsize.models.body import body_of
from pocketsize.models.gated import gated
from pocketsize.models.gates import head_path
from pocketsize.models.gating import Choice, Place, gauged, settled
from pocketsize.models.load import load, tokenizer_of
from pocketsize.models.model import Model
from pocketsize.models.skeleton import materialise
from pocketsize.models.skipping import Leave, early_exits, skipped_halves
from pocketsize.pruning.gate import Gates

LENGTH, CALIBRATE, EVALUATE, SEED = 512, 16, 6, 0
# Enough of each text for so many windows.
CHARACTERS = {"calibrate": 200_000, "evaluate": 60_000}
EXITS = (18, 21, 24, 27)
GOAL_SAVED, GOAL_PERPLEXITY = 0.25, 1.02
CHOICES = {
    "inputs": Choice("inputs"),
    "inputs, tokens alike": Choice("inputs", tokens=False),
    "inputs by magnitude (TEAL)": Choice("inputs", "magnitude", head=False),
    "channels": Choice("channels"),
    "channels by magnitude (CATS)": Choice("channels", "magnitude"),
}
QUESTION = (
    "How many operations do gates save as SmolLM2 runs, what does that cost in perplexity, and is it faster?"
)


@dataclass(frozen=True, slots=True)
class Row:
    """Gates of one kind with one aim: a share of operations to be saved, or of tokens to agree."""

    kind: str
    aim: float

    @property
    def name(self) -> str:
        """The row's name, which is its file's."""
        return f"{self.kind} {self.aim:g}"


# The most telling ones first.
ROWS = (
    Row("inputs", 0.25),
    Row("inputs", 0.15),
    Row("inputs, tokens alike", 0.25),
    Row("inputs by magnitude (TEAL)", 0.2),
    Row("channels", 0.1),
    Row("layers", 0.03),
    Row("exit", 0.95),
    Row("channels by magnitude (CATS)", 0.1),
    Row("inputs", 0.2),
    Row("inputs, head whole", 0.2),
    Row("inputs", 0.3),
    Row("channels", 0.15),
    Row("layers", 0.06),
    Row("exit", 0.98),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path(__file__).with_name("work"))
    parser.add_argument("--downloads", type=Path, help="where texts are kept")
    parser.add_argument("--rows", type=int, default=len(ROWS), help="only so many, the most telling first")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    torch.set_num_threads(threads)
    model = load(fetched("sample:smollm2-135m"))
    calibrate, evaluate = windows(chosen.work, chosen.downloads or chosen.work / "downloads", model)
    module = materialise(model)
    whole: dict[str, list[Tensor]] = {}
    for row in ROWS[: chosen.rows]:
        path = chosen.work / f"{row.name}.json"
        if path.exists():
            continue
        print(row.name, flush=True)
        whole = whole or {name: [hidden(module, text) for text in ids] for name, ids in evaluate.items()}
        gates = made(row, model, calibrate, chosen.work)
        found = scored(module, model, gates, evaluate, whole)
        print(f"  {found}", flush=True)
        write_json(path, found)
    for row in ROWS[: chosen.rows]:
        path = chosen.work / f"{row.name}.speed.json"
        if not path.exists() and path.with_name(f"{row.name}.json").exists():
            print(f"{row.name}: speed", flush=True)
            write_json(path, speeds(module, model, made(row, model, calibrate, chosen.work), evaluate))
    record(chosen.work, threads)


def speeds(module: nn.Module, model: Model, gates: Gates, evaluate: dict[str, Tensor]) -> dict[str, float]:
    """Tokens of a second, by the processor's clock and by the wall's, with gates and without."""
    found: dict[str, float] = {}
    for name, clock in (("cpu", time.process_time), ("wall", time.perf_counter)):
        threads = torch.get_num_threads()
        told = gated_speed(module, model, gates, evaluate["fiction"], threads=threads, clock=clock)
        rate = {m.subject: m.value for m in told}
        found |= {f"{name}_gated": rate[SUBJECT], f"{name}_whole": rate[WHOLE]}
    return found


def windows(work: Path, downloads: Path, model: Model) -> tuple[Tensor, dict[str, Tensor]]:
    """Windows of both kinds of text that calibrate, and those of each kind that evaluate; made once."""
    path = work / "windows.npz"
    if not path.exists():
        tokenizer, both = tokenizer_of(model), domains(downloads)

        def streams(texts: tuple[str, ...], part: str) -> list[np.ndarray]:
            some = [text[: CHARACTERS[part]] for text in texts]
            return token_streams(some, lambda text: tokenizer(text, add_special_tokens=False).input_ids)

        joined = [np.concatenate(streams(d.calibrate, "calibrate")) for d in both]
        held_out = {d.name: first_windows(streams(d.evaluate, "evaluate"), EVALUATE, LENGTH) for d in both}
        np.savez(path, calibrate=pick_windows(joined, CALIBRATE, LENGTH, SEED), **held_out)
    with np.load(path) as kept:
        found = {name: torch.from_numpy(kept[name].astype(np.int64)) for name in kept.files}
    return found.pop("calibrate"), found


def made(row: Row, model: Model, ids: Tensor, work: Path) -> Gates:
    """The gates of a row."""
    mask = torch.ones_like(ids, dtype=torch.bool)
    if row.kind == "layers":
        return skipped_halves(model, ids, mask, save=row.aim)
    if row.kind == "exit":
        return early_exits(model, ids, mask, Leave(EXITS, agree=row.aim))
    places = gauges(model, ids, mask, work)
    own = dict(places[row.kind.removesuffix(", head whole")])
    if row.kind.endswith("head whole"):
        del own[head_path(model)]
    choice = CHOICES[row.kind.removesuffix(", head whole")]
    spread = "uniform" if choice.score == "magnitude" else "global"
    return settled(model, choice.kind, own, save=row.aim, length=LENGTH, spread=spread)


def gauges(model: Model, ids: Tensor, mask: Tensor, work: Path) -> dict[str, dict[str, Place]]:
    """What the calibration text tells of gates that need gradients; made once."""
    path = work / "gauges.pt"
    if not path.exists():
        found = gauged(model, list(CHOICES.values()), ids, mask, seed=SEED)
        plain = [{p: astuple(v) for p, v in one.items()} for one in found]
        torch.save(plain, path)
    kept: list[dict[str, Any]] = torch.load(path, weights_only=True)
    return {name: {p: Place(*v) for p, v in one.items()} for name, one in zip(CHOICES, kept, strict=True)}


@torch.no_grad()
def hidden(module: nn.Module, ids: Tensor) -> Tensor:
    """What the head reads of a text, without gates."""
    return body_of(module)(input_ids=ids[None], use_cache=False).last_hidden_state[0, :-1]


@torch.no_grad()
def scored(
    module: nn.Module, model: Model, gates: Gates, evaluate: dict[str, Tensor], whole: dict[str, list[Tensor]]
) -> dict[str, float]:
    """KL and perplexity on each kind of text, and what is saved over both."""
    head: Callable[..., Tensor] = module.get_submodule(head_path(model))
    found: dict[str, float] = {}
    shares: list[tuple[float, float]] = []
    for name, ids in evaluate.items():
        with gated(module, model, gates) as tally:
            small = [module(input_ids=text[None], use_cache=False).logits[0, :-1].clone() for text in ids]
        shares.append((tally.share, tally.share_of_blocks))
        parts = []
        for text, q, state in zip(ids, small, whole[name], strict=True):
            p = head(state)
            parts.append(token_scores(p, q, text[1:], torch.empty_like(p)))
        kl, nll, agrees = (np.concatenate(each, axis=-1) for each in zip(*parts, strict=True))
        found |= {
            f"kl_{name}": float(kl.mean()),
            f"top1_{name}": float(agrees.mean()),
            f"perplexity_{name}": math.exp(nll[0].mean()),
            f"perplexity_ratio_{name}": math.exp((nll[1] - nll[0]).mean()),
            # Over tokens; their dependence is left aside.
            f"standard_error_{name}": float((nll[1] - nll[0]).std() / math.sqrt(nll.shape[1])),
        }
    every, blocks = (sum(pair) / len(pair) for pair in zip(*shares, strict=True))
    return {"saved": every, "saved_of_blocks": blocks} | found


def record(work: Path, threads: int) -> None:
    """Write the record of all rows that are there."""
    found: dict[Row, dict[str, float]] = {}
    for row in ROWS:
        parts = [p for end in ("", ".speed") if (p := work / f"{row.name}{end}.json").exists()]
        if parts and parts[0].name == f"{row.name}.json":
            found[row] = {key: value for p in parts for key, value in json.loads(p.read_text()).items()}
    rows = [figures(row, found[row]) for row in ROWS if row in found]
    inputs = [one for one in rows if one["method"] == "inputs"]
    if not inputs:
        return
    saved = saved_at(inputs, GOAL_PERPLEXITY)
    timed = [one for one in inputs if "cpu_speedup" in one]
    at = min(timed, key=lambda one: abs(float(one["saved"]) - GOAL_SAVED), default=None)
    name = f"operations that inputs save at {GOAL_PERPLEXITY:g}x perplexity"
    bars = [Bar(name, saved, "share", "higher", GOAL_SAVED)]
    if at is not None:
        bars.append(Bar(f"speed at {at['saved']:.0%} saved", at["cpu_speedup"], "x", "higher", 1.0))
    from importlib.metadata import version

    write_record(
        Path(__file__).with_name("record.json"),
        question=QUESTION,
        threads=threads,
        protocol=[
            f"SmolLM2-135M-Instruct (dequantized release), float32; {CALIBRATE} windows of {LENGTH} tokens "
            f"of fiction and speeches calibrate, {EVALUATE} of other books and speeches each evaluate",
            "every token but the first of a window runs with gates; operations (linears and attention of "
            "blocks, head) are counted as if texts were decoded; saved_of_blocks leaves the head aside",
            "perplexity_ratio: perplexity with gates over that without, of both kinds of text the worse; KL "
            "likewise; aim: of exits the share of tokens that agree, else that of operations to be saved",
            "speedup: tokens of a second, real text token by token, with gates and without turn about "
            "in one process, medians over tokens; cpu: by the processor's clock, wall: while other work "
            "shared the machine",
            "saved at a perplexity: between measured rows, straight lines of the logarithm of perplexity",
        ],
        versions={name: version(name) for name in ("torch", "transformers", "numba")},
        rows=rows,
        bars=bars,
    )


def figures(row: Row, found: dict[str, float]) -> dict[str, Any]:
    """One line of the table."""
    names = ("fiction", "speeches")
    return {
        "method": row.kind,
        "aim": row.aim,
        "saved": round(found["saved"], 4),
        "saved_of_blocks": round(found["saved_of_blocks"], 4),
        "perplexity_ratio": round(max(found[f"perplexity_ratio_{n}"] for n in names), 4),
        "standard_error": round(max(found[f"standard_error_{n}"] for n in names), 4),
        "kl": round(max(found[f"kl_{n}"] for n in names), 4),
        "top1": round(min(found[f"top1_{n}"] for n in names), 4),
        **{
            f"{name}_speedup": round(found[f"{name}_gated"] / found[f"{name}_whole"], 3)
            for name in ("cpu", "wall")
            if f"{name}_gated" in found
        },
    }


def saved_at(rows: list[dict[str, Any]], ratio: float) -> float:
    """The share saved where perplexity has risen so far, between the rows around it."""
    points = [(0.0, 0.0), *sorted((one["saved"], math.log(one["perplexity_ratio"])) for one in rows)]
    wished = math.log(ratio)
    for (a, low), (b, high) in itertools.pairwise(points):
        if low <= wished < high:
            return a + (b - a) * (wished - low) / (high - low)
    return points[-1][0]


if __name__ == "__main__":
    main()
