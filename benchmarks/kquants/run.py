"""GGUF k-quants: ours and llama.cpp's own with an importance matrix, of the same matrices at the same bytes.

    python benchmarks/kquants/run.py

llama.cpp's quantizer is the one in the library of the package `xllamacpp`, called through its C interface;
what both make is read by the `gguf` package from the blocks that a file would hold.
"""

from __future__ import annotations

import argparse
import ctypes
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import xllamacpp.xllamacpp
from bars import ratio_bars, write_record
from contest import fetched
from corpus import domains, first_windows, pick_windows, token_streams
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from torch import Tensor

from pocketsize.exporting.gguf.superblocks import pack
from pocketsize.models.load import load, tokenizer_of
from pocketsize.models.model import Model
from pocketsize.models.products import quick_products
from pocketsize.models.walk import Site, walk
from pocketsize.quantization.gptq import gptq
from pocketsize.quantization.scheme import NAMED

QUESTION = "How much less do k-quants lose when codes, scales and minima are chosen by error feedback?"
KINDS = ("Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K")
WINDOWS, JUDGES, LENGTH, TARGET = 16, 8, 512, 0.8
MODELS = {"sample:mpnet-base": "all linears", "sample:smollm2-135m": "down_proj"}


@dataclass(slots=True)
class Tally:
    """Shares of the output energy that a side lost, by matrix: on the text that calibrated, and on other."""

    calibrated: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    seconds: float = 0.0
    bytes: int = 0


def main() -> None:
    work = Path(__file__).with_name("work")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--downloads", type=Path, default=work / "downloads", help="packages with texts")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--blocks", type=int, help="only so many blocks of each model (to try the script)")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for name in MODELS:
        with quick_products():
            tallied = tallies(name, chosen.kinds, chosen.downloads, chosen.blocks)
        for kind, sides in tallied.items():
            rows.append(row(name, kind, **sides))
            print(rows[-1], flush=True)
    if chosen.blocks is None and chosen.kinds == list(KINDS):
        record(rows)


def tallies(
    name: str, kinds: Sequence[str], downloads: Path, blocks: int | None
) -> dict[str, dict[str, Tally]]:
    """What both sides lose on every matrix of a model whose rows are whole super-blocks."""
    found = {kind: {"ours": Tally(), "theirs": Tally()} for kind in kinds}
    for number, (weights, H, judge) in enumerate(matrices(load(str(fetched(name))), downloads)):
        if blocks is not None and number >= 4 * blocks:
            break
        for kind, sides in found.items():
            for side, make in (("ours", ours), ("theirs", llamacpp)):
                count(sides[side], weights, kind, make, (H, judge))
    return found


def matrices(model: Model, downloads: Path) -> Iterator[tuple[tuple[Tensor, ...], Tensor, Tensor]]:
    """Weights that read one tensor, E[x x^T] of it on text that calibrates, and on other text."""
    both = [windows(model, downloads, held_out=held_out) for held_out in (False, True)]
    walks = (walk(model, ids, torch.ones_like(ids, dtype=torch.bool)) for ids in both)
    for site, other in zip(*walks, strict=True):
        if len(site.gram.total) % 256 == 0 and divides(site):
            yield site.weights, site.gram.mean(), other.gram.mean()


def divides(site: Site) -> bool:
    """Whether all rows of a site are whole super-blocks."""
    return all(W.shape[1] % 256 == 0 for W in site.weights)


def windows(model: Model, downloads: Path, *, held_out: bool) -> Tensor:
    """Windows of both kinds of text, special tokens as the tokenizer adds them."""
    tokenizer = tokenizer_of(model)
    first, *_, last = tokenizer("a").input_ids if len(tokenizer("a").input_ids) > 1 else (None, None)

    def encode(text: str) -> Sequence[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    texts = [domain.evaluate if held_out else domain.calibrate for domain in domains(downloads)]
    streams = [np.concatenate(token_streams(text, encode)) for text in texts]
    if first is None:
        ids = cut(streams, LENGTH, held_out=held_out)
    else:
        inner = cut(streams, LENGTH - 2, held_out=held_out)
        ids = np.pad(inner, ((0, 0), (1, 1)), constant_values=((0, 0), (first, last)))
    return torch.from_numpy(ids)


def cut(streams: Sequence[np.ndarray], length: int, *, held_out: bool) -> np.ndarray:
    """The windows themselves: those that judge spread evenly over the text."""
    if held_out:
        return np.concatenate([first_windows([stream], JUDGES // 2, length) for stream in streams])
    return pick_windows(streams, WINDOWS, length, 0)


def count(
    tally: Tally,
    weights: Sequence[Tensor],
    kind: str,
    make: Callable[[Tensor, Tensor, str], np.ndarray],
    grams: tuple[Tensor, Tensor],
) -> None:
    """Quantize weights that read one tensor, and add what each has lost."""
    W = torch.cat(list(weights))
    start = time.process_time()
    blocks = make(W, grams[0], kind)
    tally.seconds += time.process_time() - start
    tally.bytes += blocks.nbytes
    Q = torch.from_numpy(dequantize(blocks, GGMLQuantizationType[kind]))
    rows = [len(w) for w in weights]
    for own, quantized in zip(W.split(rows), Q.split(rows), strict=True):
        for lost, H in ((tally.calibrated, grams[0]), (tally.held_out, grams[1])):
            lost.append(energy(own - quantized, H) / energy(own, H))


def energy(E: Tensor, H: Tensor) -> float:
    """tr E H E^T."""
    return float(((E @ H) * E).sum(dtype=torch.float64))


def ours(W: Tensor, H: Tensor, kind: str) -> np.ndarray:
    """The blocks that Pocketsize writes."""
    return pack(gptq(W, H, NAMED[kind]).weight, "W")


def llamacpp(W: Tensor, H: Tensor, kind: str) -> np.ndarray:
    """The blocks that llama.cpp writes, given E[x^2] of each input as its importance matrix."""
    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
    ]
    number = GGMLQuantizationType[kind]
    weights, importance = (np.ascontiguousarray(T.numpy(), np.float32) for T in (W, H.diagonal()))
    elements, size = GGML_QUANT_SIZES[number]
    out = np.empty((len(W), W.shape[1] // elements * size), np.uint8)
    pointers = weights.ctypes.data, out.ctypes.data
    library.ggml_quantize_init(int(number))
    done = library.ggml_quantize_chunk(int(number), *pointers, 0, *W.shape, importance.ctypes.data)
    if done != out.nbytes:
        raise SystemExit(f"llama.cpp wrote {done} bytes of {kind}, expected {out.nbytes}")
    return out


def row(model: str, kind: str, ours: Tally, theirs: Tally) -> dict[str, object]:
    """One row of the table; ratios are geometric means over matrices."""
    if ours.bytes != theirs.bytes:
        raise SystemExit(f"{model} {kind}: {ours.bytes} bytes against {theirs.bytes}")
    return {
        "weights": model.removeprefix("sample:"),
        "matrices": len(ours.held_out),
        "type": kind,
        "bits_per_weight": NAMED[kind].bits_per_weight(256),
        "ours": float(f"{mean(ours.held_out):.4g}"),
        "llama.cpp": float(f"{mean(theirs.held_out):.4g}"),
        "ratio": round(mean(ours.held_out) / mean(theirs.held_out), 4),
        "ratio_calibration": round(mean(ours.calibrated) / mean(theirs.calibrated), 4),
        "worst_matrix": round(max(a / b for a, b in zip(ours.held_out, theirs.held_out, strict=True)), 3),
        "cpu_s": round(ours.seconds, 1),
        "cpu_s_llama.cpp": round(theirs.seconds, 1),
    }


def mean(values: Sequence[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def record(rows: list[dict[str, object]]) -> None:
    """All rows, and a bar for each."""
    named = {
        f"{row['type']} of {row['weights']} ({row['matrices']} matrices): error "
        "at the outputs, against llama.cpp's own with an importance matrix": row
        for row in rows
    }
    packages = ("torch", "numpy", "numba", "gguf", "xllamacpp")
    write_record(
        Path(__file__).with_name("record.json"),
        question=QUESTION,
        threads=1,
        protocol=[
            "the same matrices, the same bytes; blocks of both sides unpacked by the gguf package",
            f"calibration: {WINDOWS} windows of {LENGTH} tokens, half fiction, half speeches; the original "
            "model's activations; llama.cpp is given the mean square of each input, ours the Gram matrix",
            f"ours, llama.cpp: tr (W-Q) H (W-Q)^T over tr W H W^T, H of {JUDGES} windows of documents that "
            "calibrated nothing; geometric mean over matrices, their ratio is the bar",
            "ratio calibration: the same with H of the calibration text; worst matrix: the largest ratio",
            *(f"{name}: {what}" for name, what in MODELS.items()),
        ],
        versions={name: version(name) for name in packages},
        rows=rows,
        bars=ratio_bars(named, TARGET),
    )


if __name__ == "__main__":
    main()
