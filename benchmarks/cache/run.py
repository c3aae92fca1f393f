"""Does llama.cpp lose by its quantized caches what our simulation of them says?

    python benchmarks/cache/run.py

SmolLM2 as a float32 GGUF, and with its linears as Q8_0, in llama.cpp itself: log-probabilities of the next
token at the end of each window with keys and values in float16, and with quantized ones. KL between the two
beside KL of our simulation of the same caches.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from bars import Bar, write_record
from contest import fetched

from pocketsize.data.calibration import evaluation_windows
from pocketsize.data.text import default_corpora
from pocketsize.exporting.gguf.writer import write
from pocketsize.io.llamacpp import LlamaCpp
from pocketsize.models.cached import cache_for, reading
from pocketsize.models.load import load, tokenizer_of
from pocketsize.models.model import Model
from pocketsize.models.skeleton import materialise
from pocketsize.quantization.kv import Blockwise
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import Scheme

SAMPLE, WINDOWS, LENGTH, LAST, WITHIN = "sample:smollm2-135m", 6, 256, 40, 0.25
# Tokens told one by one; what is left of a distribution counts as one more.
TOP, ASKED = 1024, 4096
FULL = Blockwise("f16", "f16")
CACHES = {"float32": ("q8_0", "q8_0/q4_0", "q4_0"), "Q8_0": ("q4_0",)}
QUESTION = "Does llama.cpp lose by its quantized caches what our simulation of them says?"

Distribution = dict[int, float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help=f"the float32 folder (default: {SAMPLE})")
    parser.add_argument("--work", type=Path, default=Path(__file__).with_name("work"))
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    original = load(chosen.model or fetched(SAMPLE))
    small = {name: rtn(original.original(name), Scheme(8, 32, symmetric=True)) for name in original.linears}
    models = {"float32": original, "Q8_0": original.with_quantized(small)}
    corpus = default_corpora()[1]
    windows = evaluation_windows(
        corpus, tokenizer_of(original), tokens=WINDOWS * LENGTH, length=LENGTH, special=True
    ).input_ids
    rows: list[dict[str, object]] = []
    for kind, caches in CACHES.items():
        path = chosen.work / f"{kind}.gguf"
        path.unlink(missing_ok=True)
        write(models[kind], path)
        rows += [row(kind, *pair) for pair in compared(models[kind], path, caches, windows.tolist())]
        path.unlink()
    record(rows, corpus.name)


def compared(
    model: Model, path: Path, caches: Sequence[str], windows: list[list[int]]
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Each cache with its KL at every position: llama.cpp's and the simulation's."""
    kinds = {name: Blockwise(*(name.split("/") * 2)[:2]) for name in caches}
    own, module = asked(path, FULL, windows), materialise(model)
    plain = simulated(module, model, FULL, windows, own)
    found = []
    for name, cache in kinds.items():
        theirs = asked(path, cache, windows)
        ours = simulated(module, model, cache, windows, own)
        their_kl = np.array([kl(p, q) for p, q in zip(own, theirs, strict=True)])
        our_kl = np.array([kl(p, q) for p, q in zip(plain, ours, strict=True)])
        found.append((name, their_kl, our_kl))
        print(f"{path.stem} {name}: llama.cpp {their_kl.mean():.3g}, simulated {our_kl.mean():.3g}")
    return found


def asked(path: Path, cache: Blockwise, windows: list[list[int]]) -> list[Distribution]:
    """What llama.cpp puts on the likeliest tokens behind each of the last positions."""
    with LlamaCpp(path, threads=1, context=LENGTH, cache=(cache.keys, cache.values)) as runtime:
        ends = [window[:end] for window in windows for end in range(LENGTH - LAST, LENGTH)]
        # The server's probabilities add up to slightly more than 1; tails are what is missing to 1.
        return [{token: math.exp(p) for token, p in runtime.top(ids, ASKED)} for ids in ends]


@torch.no_grad()
def simulated(
    module: torch.nn.Module,
    model: Model,
    cache: Blockwise,
    windows: list[list[int]],
    like: Sequence[Distribution],
) -> list[Distribution]:
    """What our forward with a simulated cache puts on the tokens that llama.cpp told of."""
    found = []
    for number, window in enumerate(windows):
        with reading(module, cache_for(model, cache)):
            logits = module(torch.tensor([window])).logits[0, LENGTH - LAST - 1 : -1]
        for probabilities, told in zip(
            logits.double().softmax(-1), like[number * LAST : (number + 1) * LAST], strict=True
        ):
            found.append({token: float(probabilities[token]) for token in told})
    return found


def kl(p: Distribution, q: Distribution) -> float:
    """KL(p || q) over p's likeliest tokens that q tells of too, and one class for all others."""
    tokens = [token for token in list(p)[:TOP] if token in q]
    pairs = [(p[token], q[token]) for token in tokens]
    rest = [max(1 - sum(pair[i] for pair in pairs), 1e-9) for i in (0, 1)]
    return sum(a * math.log(a / b) for a, b in [*pairs, (rest[0], rest[1])])


def row(kind: str, name: str, theirs: np.ndarray, ours: np.ndarray) -> dict[str, object]:
    """One cache; the interval of the ratio is a bootstrap over windows."""
    a, b = (x.reshape(WINDOWS, LAST).mean(1) for x in (ours, theirs))
    draws = np.random.default_rng(0).integers(0, WINDOWS, (1000, WINDOWS))
    low, high = np.quantile(a[draws].mean(1) / b[draws].mean(1), (0.025, 0.975))
    return {
        "weights": kind,
        "cache": name,
        "positions": len(ours),
        "kl_llamacpp": round(float(theirs.mean()), 6),
        "kl_simulated": round(float(ours.mean()), 6),
        "ratio": round(float(ours.mean() / theirs.mean()), 4),
        "ratio_low": round(float(low), 4),
        "ratio_high": round(float(high), 4),
    }


def record(rows: list[dict[str, object]], text: str) -> None:
    """One row per cache, and the worst of them as the bar."""
    worst = max(abs(float(str(one["ratio"])) - 1) for one in rows)
    write_record(
        Path(__file__).with_name("record.json"),
        question=QUESTION,
        threads=1,
        protocol=[
            f"{SAMPLE}, text: {text}; {WINDOWS} windows of {LENGTH} tokens, the last {LAST} of each",
            "KL(float16 cache || this cache), nats per token, over the likeliest 1024 tokens and one class "
            "for all others; both sides relative to themselves",
            "llama.cpp decodes token by token on the CPU; the simulation runs a whole window in float32",
            "interval of the ratio: 95 % bootstrap over windows",
        ],
        versions={name: version(name) for name in ("torch", "transformers", "gguf", "xllamacpp")},
        rows=rows,
        bars=[
            Bar(
                "Caches of keys and values: simulated KL against llama.cpp's own, worst of "
                f"{len(rows)}, off by",
                100 * worst,
                "%",
                "lower",
                100 * WITHIN,
            )
        ],
    )


if __name__ == "__main__":
    main()
