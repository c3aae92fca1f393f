"""Tokens per second and memory of the training loop beside transformers' Trainer with TRL's loss.

    python benchmarks/training-speed/run.py

SmolLM2 cut to 20 of its 30 blocks learns from the whole one: forward KL on the same tokens, batch by batch,
on one thread, the teacher live in both, in float32 and with products of the blocks in bfloat16. Sides take
turns; each is a process of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from bars import Bar, write_record
from contest import ROOT, fetched
from venvs import python_of

from pocketsize.data.text import default_corpora
from pocketsize.distillation.feature import even_blocks
from pocketsize.models.load import load, tokenizer_of

LENGTH, BLOCKS = 512, 20
PRECISIONS = ("fp32", "bf16")
REQUIREMENTS = ("transformers", "accelerate", "trl", "datasets")
QUESTION = (
    "How many tokens a second does the training loop learn from, and in how much memory, beside "
    "transformers' Trainer computing the same loss on the same batches?"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path(__file__).with_name("work"))
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8], help="windows in a batch")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    teacher = fetched("sample:smollm2-135m")
    student, tokens = prepared(teacher, chosen.work, chosen.steps * max(chosen.batches))
    peer = python_of(chosen.work / "venv-trainer", REQUIREMENTS)
    rows = []
    for precision, batch in itertools.product(chosen.precisions, chosen.batches):
        found: dict[str, list[dict[str, object]]] = {"trainer": [], "pocketsize": []}
        given = chosen.work / f"tokens-{batch}.npy"
        np.save(given, tokens[: chosen.steps * batch])
        for turn in range(chosen.rounds):
            for name, python, script in (
                ("trainer", peer, "side_trainer.py"),
                ("pocketsize", Path(sys.executable), "side_ours.py"),
            ):
                print(f"{precision}, batch {batch}, turn {turn + 1}: {name}", flush=True)
                out = chosen.work / f"{name}-{precision}-{batch}-{turn}.json"
                command = [str(python), str(Path(__file__).with_name(script)), str(student), str(teacher)]
                command += [str(given), str(out), "--batch", str(batch), "--precision", precision]
                path = str(ROOT / "src") if name == "pocketsize" else ""
                env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
                subprocess.run(command, env=env, check=True)
                found[name].append(json.loads(out.read_text()))
        rows += [row(name, precision, batch, runs) for name, runs in found.items()]
    record(rows, chosen, peer)


def prepared(teacher: Path, work: Path, windows: int) -> tuple[Path, np.ndarray]:
    """The student's folder, and windows of tokens."""
    from transformers import AutoModelForCausalLM

    out = work / "student"
    if not (out / "model.safetensors").exists():
        model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
        kept = even_blocks(BLOCKS, model.config.num_hidden_layers)
        model.model.layers = torch.nn.ModuleList([model.model.layers[i] for i in kept])
        model.config.num_hidden_layers = BLOCKS
        model.config.layer_types = None
        model.save_pretrained(out)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (out / name).write_bytes((teacher / name).read_bytes())
    tokenizer = tokenizer_of(load(teacher))
    ids = [t for d in default_corpora()[0].documents for t in tokenizer(d.text)["input_ids"]]
    return out, np.array(ids[: windows * LENGTH], dtype=np.int32).reshape(-1, LENGTH)


def row(name: str, precision: str, batch: int, runs: list[dict[str, object]]) -> dict[str, object]:
    """Medians over all steps but the first of each run, which warms up."""
    steps = [s for one in runs for s in one["cpu_s"][1:]]  # type: ignore[index]
    rates = [batch * LENGTH / s for s in steps]
    losses = runs[0]["losses"]
    return {
        "side": name,
        "precision": precision,
        "batch": batch,
        "tokens_per_cpu_s": round(statistics.median(rates), 2),
        "slowest": round(min(rates), 2),
        "fastest": round(max(rates), 2),
        "rss_peak": max(int(str(one["rss_peak"])) for one in runs),
        "first_loss": losses[0],  # type: ignore[index]
        "last_loss": losses[-1],  # type: ignore[index]
    }


def record(rows: list[dict[str, object]], chosen: argparse.Namespace, peer: Path) -> None:
    """Write the record."""
    bars = []
    for precision, batch in itertools.product(chosen.precisions, chosen.batches):
        alike = [r for r in rows if (r["precision"], r["batch"]) == (precision, batch)]
        own, other = (next(r for r in alike if r["side"] == name) for name in ("pocketsize", "trainer"))
        speed = float(str(own["tokens_per_cpu_s"])) / float(str(other["tokens_per_cpu_s"]))
        memory = int(str(own["rss_peak"])) / int(str(other["rss_peak"]))
        said = f"{precision}, batch of {batch} windows"
        bars.append(Bar(f"{said}: tokens per CPU second over Trainer's", speed, "ratio", "higher", 1.3))
        bars.append(Bar(f"{said}: peak memory over Trainer's", memory, "ratio", "lower", 0.7))
    names = ("transformers", "trl", "torch")
    asked = f"from importlib.metadata import version as v; print(*[f'{{n}}={{v(n)}}' for n in {names}])"
    said = subprocess.run([str(peer), "-c", asked], capture_output=True, text=True, check=True).stdout.split()
    write_record(
        Path(__file__).with_name("record.json"),
        question=QUESTION,
        threads=1,
        protocol=[
            f"student: SmolLM2-135M with {BLOCKS} of 30 blocks (99.1M parameters); teacher: the whole "
            f"model, live in both; windows of {LENGTH} tokens without padding",
            "forward KL at every position but the last of a window; AdamW, clipped at 1; fp32: all of it; "
            "bf16: autocast (`bf16` of Trainer, `precision` of Pocketsize, whose logits are float32)",
            "peer: transformers' Trainer whose compute_loss is TRL's generalized_jsd_loss with beta 0",
            f"{chosen.steps} steps a run, {chosen.rounds} runs turn about; CPU seconds of the process per "
            "step, median, the first step of each run left out; peak memory: VmHWM of the process",
            "first_loss: the same student on the same batch, so both sides compute one loss",
        ],
        versions={part.partition("=")[0]: part.partition("=")[2] for part in said},
        rows=rows,
        bars=bars,
    )


if __name__ == "__main__":
    main()
