"""A quarter of the blocks' parameters removed, by width and by depth: what it costs, and what it saves.

    pocketsize fetch sample:smollm2-135m
    python benchmarks/pruning-structured/run.py                    about half an hour of one core
    python benchmarks/pruning-structured/run.py --tokens 16k       less

Each way in three stages: cut, healed, and taught a little, all weights or low-rank corrections of them. Then
stock transformers loads what came of it in a process of its own, and both runtimes read and write with it and
with the original in turn. Stop it at any moment and start it again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from bars import Bar, write_record
from corpus import domains
from meter import write_json
from transformers import AutoModelForCausalLM

from pocketsize.data.calibration import evaluation_windows, windows
from pocketsize.data.text import Corpus, Document
from pocketsize.exporting.gguf import writer
from pocketsize.io.llamacpp import LlamaCpp
from pocketsize.measurement.quality import quality
from pocketsize.models.load import load, tokenizer_of
from pocketsize.models.model import Model
from pocketsize.models.products import quick_products
from pocketsize.models.skeleton import materialise
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.recipe import parse_step
from pocketsize.recipes.step import Context, Step
from pocketsize.recipes.training import count_of, write_student

QUESTION = (
    "What do a quarter fewer parameters in the blocks cost, by width and by depth, after the cut, after "
    "healing and after a little teaching; and does latency fall in proportion?"
)
SAMPLE, LENGTH, CALIBRATED = "sample:smollm2-135m", 512, 16
WAYS: dict[str, dict[str, Any]] = {
    "width": {"student": {"remove": 0.25, "importance": "taylor"}},
    "depth": {"layers": {"remove": 0.25, "pick": "kl"}},
}
# Of what parameters run say a token saves, the least part that the clock must show.
LEAST = {"width": 0.7, "depth": 0.8}
# What teaches: all weights, or low-rank corrections of them at ten times the rate.
LESSONS: dict[str, dict[str, Any]] = {"taught": {"rate": 1e-4}, "taught by LoRA": {"rate": 1e-3, "lora": 16}}
BATCH = 2
# Tokens that are read and that each runtime writes; llama.cpp's are told from a difference, so from more.
PROMPT, DECODED, MANY, ROUNDS = 256, 16, 96, 9
FRESH = """
import sys
from transformers import AutoModelForCausalLM
model, told = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(told[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
assert "pocketsize" not in sys.modules
print(sum(p.numel() for p in model.parameters()))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path(__file__).with_name("work"))
    parser.add_argument("--downloads", type=Path, help="where texts are kept")
    parser.add_argument("--tokens", default="32k", help="that teach; 0 leaves the teaching out")
    parser.add_argument("--ways", nargs="+", default=[*WAYS], help="only these ways")
    parser.add_argument("--evaluated", type=int, default=4096, help="tokens of each kind of text")
    parser.add_argument("--record", type=Path, default=Path(__file__).with_name("record.json"))
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    original, tokens = load(SAMPLE), 0 if chosen.tokens == "0" else count_of(chosen.tokens)
    texts = Texts(original, chosen.downloads or chosen.work / "downloads", chosen.evaluated)
    rows = [
        row for way in chosen.ways for row in stages(original, way, WAYS[way], texts, chosen.work, tokens)
    ]
    speeds = timed(original, chosen.work, chosen.ways)
    for way in chosen.ways:
        fresh = subprocess.run(
            [sys.executable, "-c", FRESH, str(chosen.work / way / "out")],
            capture_output=True,
            text=True,
            check=True,
        )
        speeds[way]["parameters"] = int(fresh.stdout.split()[-1])
        print(way, "loads without Pocketsize", flush=True)
    write_record(
        chosen.record,
        question=QUESTION,
        threads=1,
        protocol=[
            f"SmolLM2-135M-Instruct; importance and healing on {CALIBRATED} windows of {LENGTH} tokens, half "
            "fiction, half speeches; width: inner channels by Taylor costs; depth: blocks by measured KL",
            f"taught: {tokens:,} tokens of the same kinds, forward KL to the original, batches of "
            f"{BATCH} x {LENGTH}; "
            + ", ".join(f"{name}: rate {keys['rate']:g}" for name, keys in LESSONS.items())
            + f", rank {LESSONS['taught by LoRA']['lora']}",
            f"judged on {chosen.evaluated:,} tokens of other books and of other speeches; of both the worse",
            "of ideal: share of the time that is gone over share of the parameters that is, of the blocks "
            "where text is read, with the head where it is written; timed as healed, which has the shape",
            f"times: one thread, the models in turn, median of {ROUNDS} rounds of {PROMPT} tokens read and "
            f"{DECODED} written (llama.cpp: {MANY}), CPU time; torch: float32, llama.cpp: F16",
        ],
        versions={name: version(name) for name in ("torch", "transformers", "xllamacpp")},
        rows=[*rows, *({"row": f"{way}, speed", **speeds[way]} for way in chosen.ways)],
        bars=bars(rows, speeds),
    )


class Texts:
    """What calibrates and teaches, and what judges."""

    def __init__(self, model: Model, downloads: Path, evaluated: int) -> None:
        both, tokenizer = domains(downloads), tokenizer_of(model)
        pieces = zip(*(_pieces(d.calibrate) for d in both), strict=False)
        self.train = _corpus("train", [piece for pair in pieces for piece in pair])
        self.calibrate = windows(self.train, tokenizer, count=CALIBRATED, length=LENGTH, seed=0, special=True)
        self.held_out = {
            d.name: evaluation_windows(
                _corpus(d.name, list(d.evaluate)), tokenizer, tokens=evaluated, length=LENGTH, special=True
            )
            for d in both
        }


def _pieces(documents: object) -> list[str]:
    text = "\n\n".join(documents)  # type: ignore[arg-type]
    return [text[a : a + 20_000] for a in range(0, len(text), 20_000)]


def _corpus(name: str, texts: list[str]) -> Corpus:
    return Corpus(name, tuple(Document(str(i), text) for i, text in enumerate(texts)))


def stages(
    original: Model, way: str, step: dict[str, Any], texts: Texts, work: Path, tokens: int
) -> list[dict[str, Any]]:
    """The rows of one way: cut, healed, taught in each manner."""
    (kind, options) = next(iter(step.items()))
    done = applied(original, step, texts, work / way / "healed")
    # The same blocks without looking for them again; slices are found again.
    kept = json.loads((work / way / "healed.json").read_text())["kept"]
    bare = {"keep": kept} if kind == "layers" else options
    cut = applied(original, {kind: bare | {"heal": False}}, texts, work / way / "cut")
    named = {"cut": cut, "healed": done}
    if tokens:
        for name, keys in LESSONS.items():
            lesson = {"distill": {"tokens": tokens, "batch": BATCH, "length": LENGTH, **keys}}
            named[name] = applied(done, lesson, texts, work / way / name, original)
    out = work / way / "out"
    if not out.exists():
        out.mkdir()
        write_student(done, materialise(done), out)
    return [
        score(original, model, texts, work / way / f"{name}-score.json", (way, name))
        for name, model in named.items()
    ]


def applied(
    model: Model, raw: dict[str, Any], texts: Texts, folder: Path, original: Model | None = None
) -> Model:
    """The model after a step, whose work is kept in a folder; what it chose is told beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    step: Step = parse_step(raw).resolve(model, ("folder",))

    def told(done: int, total: int, what: str) -> None:
        if done % 5 == 0 or done == total:
            print(folder.parent.name, folder.name, done, total, what, flush=True)

    context = Context(
        texts.calibrate.input_ids,
        texts.calibrate.mask,
        open_journal(folder, {"step": json.dumps(raw, sort_keys=True)}),
        told,
        original=original or model,
        corpus=texts.train,
    )
    start = time.process_time()
    with quick_products():
        made = step.apply(model, context)
    report = context.reports[-1]
    facts = folder.with_suffix(".json")
    if not facts.exists():
        stages = {one.name: one.divergence for one in report.stages}
        kept = report.options.get("kept")
        write_json(facts, {"cpu_s": round(time.process_time() - start, 1), "stages": stages, "kept": kept})
    return replace(made, origin=replace(made.origin, name=model.origin.name))


def score(original: Model, model: Model, texts: Texts, path: Path, row: tuple[str, str]) -> dict[str, Any]:
    """KL and perplexity on both kinds of text, of both the worse."""
    if path.exists():
        return json.loads(path.read_text())
    found = []
    for held_out in texts.held_out.values():
        measured = quality(original, model, held_out, seed=0).measurements
        found.append({f"{m.name} of {m.subject}": m.value for m in measured})
    cost = json.loads((path.parent / f"{row[1]}.json").read_text())["cpu_s"]
    own, before = "perplexity of compressed", "perplexity of original"
    told = {
        "row": ", ".join(row),
        "kl": round(max(one["kl_mean of compressed"] for one in found), 4),
        "top1": round(min(one["top1 of compressed"] for one in found), 4),
        "perplexity_ratio": round(max(one[own] / one[before] for one in found), 3),
        "parameters": model.origin.parameters,
        "cpu_s": cost,
    }
    write_json(path, told)
    return told


def timed(original: Model, work: Path, ways: list[str]) -> dict[str, dict[str, Any]]:
    """How fast each is in both runtimes, beside what its parameters promise."""
    path = work / f"speed-{'-'.join(ways)}.json"
    if path.exists():
        return json.loads(path.read_text())
    folders = {"original": original.folder, **{way: work / way / "out" for way in ways}}
    torch_ms = _torch(folders)
    llama_ms = _llamacpp(folders, work)
    found: dict[str, dict[str, Any]] = {}
    for way in ways:
        gone = {what: 1 - n / _met(original)[what] for what, n in _met(load(folders[way])).items()}
        found[way] = {f"parameters_saved_{what}": round(share, 4) for what, share in gone.items()}
        for kind, ms in (torch_ms | llama_ms).items():
            saved = 1 - ms[way] / ms["original"]
            found[way] |= {f"{kind}_ms": round(ms[way], 2), f"{kind}_original_ms": round(ms["original"], 2)}
            found[way][f"{kind}_of_ideal"] = round(saved / gone[kind.partition("_")[2]], 3)
    write_json(path, found)
    return found


def _met(model: Model) -> dict[str, int]:
    """The parameters that a token meets: those of the blocks as a prompt, and as it is written the head's."""
    assert model.tied  # the head is the embedding
    rows, columns = model.checkpoint.entries[model.arch.embedding].shape
    return {"prompt": model.origin.parameters - rows * columns, "token": model.origin.parameters}


def _torch(folders: dict[str, Path]) -> dict[str, dict[str, float]]:
    modules = {
        n: AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32).eval() for n, f in folders.items()
    }
    ids = torch.randint(1000, (1, PROMPT), generator=torch.Generator().manual_seed(0))

    def read(module: Any) -> Any:
        return module(input_ids=ids, use_cache=True, logits_to_keep=1)

    def write(module: Any) -> None:
        out = states[id(module)]
        for _ in range(DECODED):
            out = module(input_ids=ids[:, :1], past_key_values=out.past_key_values, use_cache=True)

    with torch.no_grad():
        reading = in_turn({n: lambda m=m: read(m) for n, m in modules.items()})
        states = {id(m): read(m) for m in modules.values()}
        writing = in_turn({n: lambda m=m: write(m) for n, m in modules.items()})
    return {
        "torch_prompt": reading,
        "torch_token": {name: ms / DECODED for name, ms in writing.items()},
    }


def in_turn(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The median milliseconds of each call, all of them in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(ROUNDS + 1):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            if number:
                seconds[name].append(time.thread_time() - start)
    return {name: 1e3 * float(np.median(each)) for name, each in seconds.items()}


def _llamacpp(folders: dict[str, Path], work: Path) -> dict[str, dict[str, float]]:
    files = {name: work / f"{name}.gguf" for name in folders}
    for name, folder in folders.items():
        if not files[name].exists():
            writer.write(load(folder), files[name])
    ids = np.random.default_rng(0).integers(1000, size=PROMPT).tolist()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in folders}
    engines = {name: LlamaCpp(file, threads=1) for name, file in files.items()}
    for number in range(ROUNDS + 1):
        for name, engine in engines.items():
            # Other tokens each time: what was read before is not read again.
            spent = [
                _spent(engine, [2 * number + i + 3, *ids[1:]], count) for i, count in enumerate((1, MANY + 1))
            ]
            if number:
                seconds[name].append((spent[0], (spent[1] - spent[0]) / MANY))
    for engine in engines.values():
        engine.close()
    medians = {name: 1e3 * np.median(np.array(each), axis=0) for name, each in seconds.items()}
    return {
        "llamacpp_prompt": {name: float(ms[0]) for name, ms in medians.items()},
        "llamacpp_token": {name: float(ms[1]) for name, ms in medians.items()},
    }


def _spent(engine: LlamaCpp, ids: list[int], count: int) -> float:
    """CPU seconds of reading a prompt and writing so many tokens."""
    start = time.process_time()
    engine.timings(ids, count)
    return time.process_time() - start


def bars(rows: list[dict[str, Any]], speeds: dict[str, dict[str, Any]]) -> list[Bar]:
    """Latency against the ideal, and that each stage helps."""
    kl = {row["row"]: row["kl"] for row in rows}
    found = []
    for way in speeds:
        for kind in ("torch_prompt", "torch_token", "llamacpp_prompt", "llamacpp_token"):
            value = speeds[way][f"{kind}_of_ideal"]
            name = kind.replace("_", ", ").replace("llamacpp", "llama.cpp")
            found.append(
                Bar(f"{way}: time saved over the ideal, {name}", value, "share", "higher", LEAST[way])
            )
        for after, before in (("healed", "cut"), *((name, "healed") for name in LESSONS)):
            if (name := f"{way}, {after}") in kl:
                ratio = kl[name] / kl[f"{way}, {before}"]
                found.append(Bar(f"{way}: KL {after} over {before}", round(ratio, 4), "ratio", "lower", 1.0))
    return found


if __name__ == "__main__":
    main()
