"""Compact students: what grouped convolutions gain on a CPU, and what each body learns of the same bytes.

    python benchmarks/students/run.py

Rows are kept in `work` as they are finished; a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from bars import Bar, write_record
from meter import write_json
from torch import nn

from pocketsize.measurement.embedding import embedding_quality
from pocketsize.models.arch import arch_of
from pocketsize.models.grouped import regroup
from pocketsize.models.load import load
from pocketsize.models.products import quick_products
from pocketsize.models.skeleton import materialise
from pocketsize.models.student import config_of, family_of, module_of
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.recipe import Data, parse_step
from pocketsize.recipes.step import Context
from pocketsize.recipes.texts import read_texts

QUESTION = "What do compact bodies cost and learn, beside a plain transformer of the same bytes or width?"
SMALL, LARGE = "sample:minilm-l6", "sample:mpnet-base"
# Every student of one teacher reads as much; random weights bear a higher rate than those of a teacher.
LESSON = {"batch": 32, "length": 64}
RANDOM, CUT = 1e-3, 2e-4
TABLE = " from a table"
BODIES: dict[str, dict[str, Any]] = {
    "bert": {"family": "bert"},
    "squeezebert": {"family": "squeezebert"},
    "mobilebert": {"family": "mobilebert", "hidden": 384, "embedding": 192},
    "mobilebert with LayerNorm": {
        "family": "mobilebert",
        "hidden": 384,
        "embedding": 192,
        "norm": "layer_norm",
    },
}
STARTS = {"": "random", TABLE: "tokens"}
WIDTHS = ((384, 6), (768, 4))
REPEATS = 25
GROUPS = ("q_groups", "k_groups", "v_groups", "intermediate_groups", "output_groups")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=480_000, help="tokens that a student of MiniLM reads")
    parser.add_argument("--large-tokens", type=int, default=40_000, help="the same of mpnet-base")
    parser.add_argument("--parameters", default="10M", help="of each student of MiniLM")
    parser.add_argument("--work", type=Path, default=Path(__file__).with_name("work"), help="rows so far")
    parser.add_argument("--record", type=Path, default=Path(__file__).with_name("record.json"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    chosen.work.mkdir(parents=True, exist_ok=True)
    rows = [row for hidden, layers in WIDTHS for row in timed(chosen.work, hidden, layers)]
    budget = {"parameters": chosen.parameters}
    for name, family in BODIES.items():
        for began, start in STARTS.items():
            steps = [{"student": {**family, **budget, "start": start}}, distill(chosen.tokens, RANDOM)]
            rows.append(taught(chosen.work, f"{name}{began}, {chosen.parameters}", SMALL, steps))
    cut = [{"layers": {"keep": 6, "heal": False}}, {"student": {"hidden": 384, "ffn": 1536, "heal": False}}]
    bare = [{"student": {"family": "bert", "layers": 6, "hidden": 384, "heads": 6, "ffn": 1536}}]
    for name, body, rate in (("cut to 6 x 384", cut, CUT), ("random 6 x 384", bare, RANDOM)):
        rows.append(taught(chosen.work, name, LARGE, [*body, distill(chosen.large_tokens, rate)]))
    write_record(
        chosen.record,
        question=QUESTION,
        threads=1,
        protocol=(
            "torch on one thread, float32; latency: one text of 128 tokens, the models in turn, "
            f"median of {REPEATS} rounds; ms of a step: forward and backward of 8 texts of 64 tokens",
            f"students of {SMALL}: {chosen.parameters} parameters, random weights or a table of what the "
            f"teacher makes of each token (start: tokens), {chosen.tokens:,} tokens; "
            f"of {LARGE}: {chosen.large_tokens:,} tokens; highest rate {RANDOM:g}, of the cut one {CUT:g}",
            "MobileBERT has half as wide an embedding as it is wide itself; text_ms: one text of 128 tokens, "
            f"median of {REPEATS}",
            "text: the documentation of the installed Python, split by topic; losses: the step's own",
            "Spearman: similarities of all pairs of 256 held-out sentences against the teacher's",
        ),
        versions={name: version(name) for name in ("torch", "transformers")},
        rows=rows,
        bars=bars(rows),
    )


def distill(tokens: int, rate: float) -> dict[str, Any]:
    """The step that teaches all of them."""
    return {"distill": {"tokens": tokens, "rate": rate, **LESSON}}


def timed(work: Path, hidden: int, layers: int) -> list[dict[str, Any]]:
    """Times of a grouped-convolution student, of the stock module, and of its dense twins."""
    path = work / f"timed-{hidden}.json"
    if path.exists():
        return json.loads(path.read_text())
    modules = bodies(hidden, layers)
    one, some = torch.randint(1000, (1, 128)), torch.randint(1000, (8, 64))
    with torch.no_grad():
        forward = in_turn({name: lambda m=m: m(input_ids=one) for name, m in modules.items()}, REPEATS)
        close = (modules["grouped"](one)[0] - modules["grouped, stock module"](one)[0]).abs().max()

    def learn(module: nn.Module) -> None:
        module.zero_grad()
        module(input_ids=some)[0].square().mean().backward()

    steps = in_turn({name: lambda m=m: learn(m) for name, m in modules.items()}, REPEATS // 2)
    rows = [
        {
            "student": f"{name}, {layers} x {hidden}",
            "blocks_mb": sum(p.numel() for n, p in m.named_parameters() if n.startswith("encoder.")) * 2e-6,
            "latency_ms": round(forward[name], 3),
            "step_ms": round(steps[name], 2),
        }
        | ({"apart_from_stock": float(close)} if name == "grouped" else {})
        for name, m in modules.items()
    ]
    write_json(path, rows)
    return rows


def bodies(hidden: int, layers: int) -> dict[str, nn.Module]:
    """SqueezeBERT as Pocketsize runs it and as it is, the same with dense convolutions, and BERT."""
    model = load(SMALL)
    squeeze, plain = (
        config_of(family_of(name, model).body(model, name, layers, hidden))
        for name in ("squeezebert", "bert")
    )
    dense = squeeze | dict.fromkeys(GROUPS, 1)
    made = {
        name: module_of(raw, arch_of(raw["model_type"]), "cpu").eval()
        for name, raw in {
            "grouped": squeeze,
            "grouped, stock module": squeeze,
            "dense twin": dense,
            "bert": plain,
        }.items()
    }
    made["grouped, stock module"].load_state_dict(made["grouped"].state_dict())
    regroup(made["grouped"])
    return made


def in_turn(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median milliseconds of each call, all of them in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 2):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            if number >= 2:
                seconds[name].append(time.thread_time() - start)
    return {name: 1e3 * float(np.median(each)) for name, each in seconds.items()}


def taught(work: Path, name: str, teacher: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """A student, taught; its bytes, and how much of the teacher's ranking it has."""
    pin = hashlib.sha256(json.dumps(steps, sort_keys=True).encode()).hexdigest()[:8]
    plain = "".join(c if c.isalnum() else "-" for c in name)
    path = work / f"{teacher.partition(':')[2]}-{plain}-{pin}.json"
    if path.exists():
        return json.loads(path.read_text())
    original = load(teacher)
    texts = read_texts(Data(sequences=16, length=128, written=0.0), Path(), original, trains=True)
    model = original
    with tempfile.TemporaryDirectory(dir=work) as place:
        journal = open_journal(Path(place), {})
        context = Context(
            texts.calibrate.input_ids,
            texts.calibrate.mask,
            journal,
            lambda done, total, what: print(name, done, total, what, flush=True) if done % 25 == 0 else None,
            original=original,
            corpus=texts.train,
        )
        start, before = time.process_time(), 0.0
        for raw in steps:
            step = parse_step(raw).resolve(model, ("folder",))
            if step.kind == "distill":
                before = spearman(original, model, texts.corpus)
                start = time.process_time()
            with quick_products():
                model = step.apply(model, context)
        cpu_s = time.process_time() - start
        after = spearman(original, model, texts.corpus)
        report = context.reports[-1].training
        student, one = materialise(model), torch.randint(1000, (1, 128))
        with torch.no_grad():
            ms = in_turn({"student": lambda: student(input_ids=one)}, REPEATS)["student"]
    assert report is not None
    row = {
        "student": name,
        "teacher": teacher.partition(":")[2],
        "family": model.config.model_type,
        "blocks": len(model.blocks),
        "hidden": int(model.config.hidden_size),
        "parameters": model.origin.parameters,
        "mb": round(2e-6 * model.origin.parameters, 2),
        "text_ms": round(ms, 2),
        "tokens": report.tokens,
        "cpu_s": round(cpu_s, 1),
        "loss_first": round(report.losses[0][1], 4),
        "loss_last": round(report.losses[-1][1], 4),
        "spearman_before": round(before, 4),
        "spearman": round(after, 4),
    }
    write_json(path, row)
    return row


def spearman(original: Any, model: Any, corpus: Any) -> float:
    """Rank agreement with the teacher on held-out sentences."""
    found = embedding_quality(original, model, corpus, seed=0).measurements
    return next(m.value for m in found if m.name == "spearman")


def bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """What of issue 5's third bar can be put on a CPU, and the cut student against the random one."""
    ms = {row["student"]: row["latency_ms"] for row in rows if "latency_ms" in row}
    rank = {row["student"].partition(",")[0]: row["spearman"] for row in rows if "spearman" in row}
    found = [
        Bar(
            f"grouped convolutions over their dense twin, {layers} x {hidden}, latency",
            round(ms[f"grouped, {layers} x {hidden}"] / ms[f"dense twin, {layers} x {hidden}"], 3),
            "ratio",
            "lower",
            1.0,
        )
        for hidden, layers in WIDTHS
    ]
    return [
        *found,
        Bar(
            "MobileBERT less plain at equal bytes, both from a table, Spearman points",
            round(100 * (rank[f"mobilebert{TABLE}"] - rank[f"bert{TABLE}"]), 2),
            "points",
            "higher",
            -2.0,
        ),
        Bar(
            "cut student over random one, Spearman",
            round(rank["cut to 6 x 384"] - rank["random 6 x 384"], 4),
            "difference",
            "higher",
            0.0,
        ),
    ]


if __name__ == "__main__":
    main()
