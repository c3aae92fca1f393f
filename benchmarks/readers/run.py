"""Folders that we write, loaded by programs that we did not: do they compute what we do?

    python benchmarks/readers/run.py [--only NAME] [--venv DIR]

SmolLM2 rounded to nearest, written in every format of folders, loaded in an environment without
Pocketsize: every matrix as the loaded layer multiplies with it, and the logits of held-out text. What is
finished is kept in `work` and not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from bars import Bar, write_record
from contest import fetched, sources_sha256
from safetensors.torch import save_file
from torch import Tensor
from venvs import python_of

from pocketsize.data.calibration import evaluation_windows
from pocketsize.data.text import default_corpora
from pocketsize.exporting.behaviour import loaded
from pocketsize.exporting.table import EXPORTERS
from pocketsize.models.load import load, tokenizer_of
from pocketsize.models.model import Model
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import Scheme

SAMPLE, GROUP, WINDOWS, LENGTH = "sample:smollm2-135m", 64, 2, 256
QUESTION = "Do programs that we did not write load our folders, and compute what we do?"
REQUIREMENTS = (
    *("transformers==5.23.0", "compressed-tensors==0.20.0"),
    *("gptqmodel==7.6.0", "optimum==2.3.0"),
)
HERE = Path(__file__).parent
# Logits differ by the order of sums alone, of float32 or of float16; a kernel may round scales once more.
MOST_APART = {"float32": 1e-4, "float16": 1e-2}
MOST_APART_ROUNDED = 2e-2
LEAST_TOP1 = {"float32": 100.0, "float16": 98.0}
SYMMETRIC = {bits: Scheme(bits, GROUP, symmetric=True) for bits in (3, 4, 8)}
ZEROS = {bits: Scheme(bits, GROUP, scale_digits=7) for bits in (2, 3, 4)}


@dataclass(frozen=True, slots=True)
class Case:
    """A format with the scheme of its linears, perhaps another of some of them, and who loads it."""

    form: str
    scheme: Scheme
    loader: str
    down: Scheme | None = None

    @property
    def stored(self) -> str:
        """What is stored: `gptq, 4 bits`."""
        zeros = "" if self.scheme.symmetric else " with zeros"
        other = f", {self.down.bits} in down_proj" if self.down else ""
        return f"{self.form}, {self.scheme.bits} bits{zeros}{other}"

    @property
    def name(self) -> str:
        """What it is called in the record."""
        return f"{self.stored}, by {self.loader}"

    @property
    def is_exact(self) -> bool:
        """Whether the loader multiplies with the matrix itself, as the kernel it picks alone does not."""
        return self.loader != "transformers+gptqmodel"

    @property
    def is_steady(self) -> bool:
        """Whether logits tell anything: rounded to 2 bits, this model is moved far by float16 alone."""
        return self.scheme.bits > 2

    @property
    def dtype(self) -> str:
        """What the loader computes in; GPTQModel's kernels for CPUs have no float32."""
        return "float32" if self.loader == "transformers" else "float16"


CASES = (
    Case("folder", SYMMETRIC[4], "transformers"),
    Case("folder", ZEROS[4], "transformers"),
    Case("folder", SYMMETRIC[8], "transformers"),
    Case("folder", SYMMETRIC[4], "transformers", SYMMETRIC[8]),
    *(Case("gptq", scheme, "gptqmodel") for scheme in SYMMETRIC.values()),
    Case("gptq", SYMMETRIC[4], "transformers+gptqmodel"),
    *(Case("gptq_v2", scheme, "gptqmodel") for scheme in ZEROS.values()),
    Case("awq", ZEROS[4], "transformers+gptqmodel"),
    Case("awq", ZEROS[4], "gptqmodel"),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=HERE / "work")
    parser.add_argument("--venv", type=Path, help="the loaders' environment (default: in the work folder)")
    parser.add_argument("--only", help="cases whose name contains this; no record is written")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    python = python_of(chosen.venv or chosen.work / "venv", REQUIREMENTS)
    model = load(str(fetched(SAMPLE)))
    found: dict[Case, dict[str, Any]] = {}
    for case in (case for case in CASES if (chosen.only or "") in case.name):
        found[case] = compared(model, case, python, chosen.work)
        print(f"{case.name}: {found[case]}", flush=True)
    if chosen.only is None:
        record(found)


def compared(model: Model, case: Case, python: Path, work: Path) -> dict[str, Any]:
    """What the loader's layers and logits are beside ours, kept for the same sources."""
    kept = work / f"{case.name.replace(', ', '-').replace(' ', '-')}-{sources_sha256(('.',))[:12]}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    small = rounded(model, case)
    out, ours = work / "folder", work / "expected.safetensors"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    EXPORTERS[case.form].write(small, out)
    save_file(expected(small, case), ours)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2"}
    command = [python, HERE / "reader.py", case.loader, out, case.dtype, ours, kept.with_suffix(".partial")]
    subprocess.run(command, env=environment, check=True, cwd=work)
    kept.with_suffix(".partial").replace(kept)
    return json.loads(kept.read_text())


def rounded(model: Model, case: Case) -> Model:
    """The model with all linears rounded to nearest."""

    def scheme_of(name: str) -> Scheme:
        return case.down if case.down and "down_proj" in name else case.scheme

    return model.with_quantized({name: rtn(model.matrix(name), scheme_of(name)) for name in model.linears})


def expected(small: Model, case: Case) -> dict[str, Tensor]:
    """Token ids, our logits for them in the loader's type, and our matrices."""
    stored, dtype = EXPORTERS[case.form].stored, getattr(torch, case.dtype)
    _, corpus = default_corpora()
    tokenizer = tokenizer_of(small)
    ids = evaluation_windows(
        corpus, tokenizer, tokens=WINDOWS * LENGTH, length=LENGTH, special=True
    ).input_ids
    with torch.inference_mode():
        module = loaded(small, lambda name: stored(small, name)).to(dtype)
        logits = torch.cat([module(input_ids=row[None]).logits.float() for row in ids])
    return {"ids": ids, "logits": logits, **dict(matrices(small))}


def matrices(small: Model) -> Iterator[tuple[str, Tensor]]:
    """Our matrices, float32."""
    yield from ((name, small.weight(name)) for name in small.linears)


def record(found: dict[Case, dict[str, Any]]) -> None:
    """One row per case, and the bars: the worst of each format and loader."""
    rows = []
    for case, said in found.items():
        rows.append(
            {
                "stored": case.stored,
                "loaded by": ", ".join(f"{k} {v}" for k, v in said["versions"].items() if k != "torch"),
                "layer": said["kernel"],
                "computes in": case.dtype,
                "matrices equal": said["matrices"],
                "logits apart": float(f"{said['logits_apart']:.2g}"),
                "top1": round(said["top1"], 4),
            }
        )
    versions = {k: v for said in found.values() for k, v in said["versions"].items()}
    write_record(
        HERE / "record.json",
        question=QUESTION,
        threads=torch.get_num_threads(),
        protocol=[
            f"{SAMPLE}, linears rounded to nearest, group {GROUP}; embedding and head bfloat16",
            "matrices: what a loaded layer makes of unit vectors, against ours in the type it computes in",
            f"logits: {WINDOWS} windows of {LENGTH} tokens of the default evaluation text, against our "
            "forward in the same type; apart: the largest difference over the range of ours",
        ],
        versions=versions,
        rows=rows,
        bars=list(bars(found)),
    )


def bars(found: dict[Case, dict[str, Any]]) -> Iterator[Bar]:
    """Matrices and first choices of all, logits of each format and loader."""
    exact = [said["equal"] for case, said in found.items() if case.is_exact]
    yield Bar("folders whose matrices all equal ours", sum(exact), f"of {len(exact)}", "higher", len(exact))
    for form, loader in dict.fromkeys((case.form, case.loader) for case in found):
        own = [case for case in found if (case.form, case.loader) == (form, loader) and case.is_steady]
        apart = max(found[case]["logits_apart"] for case in own)
        top1 = min(found[case]["top1"] for case in own)
        dtype, name = own[0].dtype, f"{form} loaded by {loader.replace('+', ' with ')}"
        most = MOST_APART[dtype] if own[0].is_exact else MOST_APART_ROUNDED
        yield Bar(f"{name}: logits apart, of their range", apart, "share", "lower", most)
        yield Bar(f"{name}: same first choice", 100 * top1, "%", "higher", LEAST_TOP1[dtype])


if __name__ == "__main__":
    main()
