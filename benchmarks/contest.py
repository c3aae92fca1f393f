"""Contestants, and one quantization run of one of them; shared by the side-by-side benchmarks."""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from meter import Cost, today, write_json
from venvs import python_of

HERE = Path(__file__).parent
ROOT = HERE.parent
GROUP = 64
OURS = "pocketsize"
ALGORITHM = (
    "quantization",
    "linalg.py",
    "models/archs",
    "models/attention.py",
    "models/dtype.py",
    "models/products.py",
    "models/shelf.py",
    "models/skeleton.py",
    "models/taps.py",
    "models/walk.py",
    "recipes/awq.py",
    "recipes/correct.py",
    "recipes/grids.py",
    "recipes/learn.py",
    "recipes/qat.py",
    "recipes/quantize.py",
    "recipes/sites.py",
    "recipes/stages.py",
    "training/rounded.py",
)


PHASES = ("quantize", "score", "time", "record")
_PHASES = "time: finished runs again, for their costs alone (on an idle machine; not part of all)"


@dataclass(frozen=True, slots=True)
class Side:
    """One contestant in the dtype, thread count and batch that cost it the fewest CPU seconds.

    `warm_up`: it compiles extensions when first used, which is done before anything is measured.
    `revision` is raised when its worker changes in a way that changes results or costs. `tool` names its
    environment where several sides share one.
    """

    name: str
    script: str
    requirements: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "bfloat16"
    threads: int = 1
    batch: int = 1
    calibrated: bool = True
    warm_up: bool = False
    revision: int = 1
    tool: str = ""

    @property
    def is_peer(self) -> bool:
        """Whether it runs in an environment of its own."""
        return bool(self.requirements)


@dataclass(frozen=True, slots=True)
class Run:
    """One quantization; it leaves `NAME.json`, `NAME.safetensors`, and scored, `NAME.score.json`.

    One of 0 bits prunes.
    """

    side: Side
    bits: int
    sequences: int
    length: int
    seed: int

    @property
    def name(self) -> str:
        """The stem of its files."""
        width = f"-{self.bits}bit" if self.bits else ""
        return f"{self.side.name}{width}-{self.sequences}x{self.length}-seed{self.seed}"


@dataclass(frozen=True, slots=True)
class Bench:
    """Where everything lies: the model, the token arrays, the environments, the results.

    `kept` holds the figures of every run that is quantized and scored, without its matrices: they are
    part of the repository, so that a comparison of many hours can be interrupted and go on elsewhere.
    `parts` of our sources decide what our runs give.
    """

    model: Path
    model_sha256: str
    work: Path
    venvs: Path
    kept: Path
    task: str
    parts: tuple[str, ...] = ALGORITHM

    @property
    def results(self) -> Path:
        """The folder of runs that are not scored yet."""
        return self.work / "results"

    def calibration(self, seed: int) -> Path:
        """The calibration windows of a seed."""
        return self.work / f"calibrate-seed{seed}.npy"

    def inputs(self, run: Run) -> dict[str, object]:
        """Everything that decides what a run gives; a stored result with other inputs is not reused."""
        aside = ("environment", "script", "warm_up", "tool")
        side = {key: value for key, value in asdict(run.side).items() if key not in aside}
        side["requirements"] = list(run.side.requirements)
        return {
            "side": side,
            "bits": run.bits,
            "group": GROUP,
            "sequences": run.sequences,
            "length": run.length,
            "seed": run.seed,
            "model": self.model_sha256,
            "calibration": sha256_of(self.calibration(run.seed)) if run.side.calibrated else "",
            "source": "" if run.side.is_peer else sources_sha256(self.parts),
            "processor": processor(),
        }

    def finished(self, run: Run) -> dict[str, Any] | None:
        """The figures of a run with these inputs that is quantized and scored."""
        return self._stored(self.kept, run)

    def quantized(self, run: Run) -> dict[str, Any] | None:
        """The figures of a run with these inputs that waits to be scored."""
        return self._stored(self.results, run)

    def _stored(self, folder: Path, run: Run) -> dict[str, Any] | None:
        path = folder / f"{run.name}.json"
        if not path.exists():
            return None
        stored = json.loads(path.read_text())
        return stored if stored["inputs"] == self.inputs(run) else None

    def waiting(self, runs: Sequence[Run]) -> list[Run]:
        """Those that are quantized but not scored."""
        return [run for run in runs if self.quantized(run) and not self.finished(run)]

    def keep(self, run: Run) -> None:
        """Keep the figures and the score of a run; its matrices are deleted."""
        stem, figures = self.results / run.name, self.quantized(run)
        assert figures is not None
        score = json.loads(Path(f"{stem}.score.json").read_text())
        self.kept.mkdir(parents=True, exist_ok=True)
        write_json(self.kept / f"{run.name}.json", figures | score)
        for end in ("json", "score.json", "safetensors"):
            Path(f"{stem}.{end}").unlink()

    def carry_out(
        self, runs: Sequence[Run], phase: str, score: Callable[[Bench, Sequence[Run]], None]
    ) -> None:
        """The phases of these runs that were asked for, but for the record."""
        if phase in ("all", "quantize"):
            self.quantize_all(runs)
        if phase in ("all", "score"):
            score(self, runs)
        if phase == "time":
            self.time_all(runs)

    def quantize_all(self, runs: Sequence[Run]) -> None:
        """Every run that has no stored result, one at a time."""
        for i, run in enumerate(runs):
            if self.finished(run) is None and self.quantized(run) is None:
                print(f"{i + 1}/{len(runs)} {run.name}", flush=True)
                self.quantize(run)

    def quantize(self, run: Run) -> None:
        """Run the worker in a process of its own and keep what it hands over."""
        warmed = self.venvs / run.side.name / "warmed-up"
        if run.side.warm_up and not warmed.exists():
            self.work_on(replace(run, sequences=1))
            warmed.touch()
        raw, out = self.work_on(run), self.results / run.name
        figures = json.loads(raw.with_suffix(".json").read_text())
        out.with_suffix(".score.json").unlink(missing_ok=True)
        raw.with_suffix(".safetensors").replace(out.with_suffix(".safetensors"))
        write_json(out.with_suffix(".json"), {"date": today(), "inputs": self.inputs(run), **figures})

    def time_all(self, runs: Sequence[Run]) -> None:
        """Runs that are finished once more, for their costs alone: what they gave was scored already."""
        for i, run in enumerate(runs):
            if (stored := self.finished(run)) is None:
                continue
            print(f"{i + 1}/{len(runs)} {run.name}", flush=True)
            raw = self.work_on(run)
            figures = json.loads(raw.with_suffix(".json").read_text())
            raw.with_suffix(".safetensors").unlink()
            costs = {name: figures[name] for name in Cost().as_dict()}
            write_json(self.kept / f"{run.name}.json", stored | costs | {"date": today()})

    def work_on(self, run: Run) -> Path:
        """The stem of the files that the worker leaves."""
        raw = self.results / "running" / run.name
        raw.parent.mkdir(parents=True, exist_ok=True)
        raw.with_suffix(".json").unlink(missing_ok=True)
        numbers = {"bits": run.bits, "group": GROUP, "sequences": run.sequences}
        numbers |= {"threads": run.side.threads, "batch": run.side.batch}
        command = [str(self.python(run.side)), str(HERE / run.side.script), str(self.model)]
        command += [str(self.calibration(run.seed)), str(raw), "--dtype", run.side.dtype, "--task", self.task]
        command += [word for name, value in numbers.items() for word in (f"--{name}", str(value))]
        log = raw.with_suffix(".log")
        with tempfile.TemporaryDirectory() as cache, log.open("w") as said:
            env = environment(run.side, Path(cache))
            done = subprocess.run(command, env=env, cwd=cache, stdout=said, stderr=said, check=False)
        if done.returncode or not raw.with_suffix(".json").exists():
            raise SystemExit(f"{run.name}: the worker failed; see {log}")
        return raw

    def python(self, side: Side) -> Path:
        """The interpreter that runs a side's worker."""
        return (
            python_of(self.venvs / (side.tool or side.name), side.requirements)
            if side.is_peer
            else Path(sys.executable)
        )


def plain_options(doc: str | None, work: Path) -> argparse.ArgumentParser:
    """Where a benchmark keeps what is unfinished, and the packages that its texts come from."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=work, help="where unfinished runs lie")
    parser.add_argument("--downloads", type=Path, default=work / "downloads", help="packages with texts")
    return parser


def options(doc: str | None, work: Path, sides: Sequence[Side]) -> argparse.ArgumentParser:
    """The options that the side-by-side benchmarks share."""
    parser = plain_options(doc, work)
    parser.add_argument("--model", type=Path, help="a float32 folder (default: the sample)")
    kept = work.with_name("runs")
    parser.add_argument("--kept", type=Path, default=kept, help="where the figures of finished runs are kept")
    parser.add_argument("--venvs", type=Path, default=work / "venvs", help="environments, one per peer")
    parser.add_argument("--phase", choices=("all", *PHASES), default="all", help=_PHASES)
    parser.add_argument("--sides", nargs="+", default=[side.name for side in sides])
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cpu", type=int, help="pin everything to this core")
    return parser


def in_turn(
    options: argparse.Namespace,
    sides: Sequence[Side],
    widths: Mapping[str, tuple[int, ...]],
    sequences: Callable[[Side], int],
    length: int,
) -> list[Run]:
    """All runs that were asked for, the contestants turn about; what needs no calibration runs once.

    `widths` are those of sides that do not have every one.
    """
    pairs = [
        (side, bits)
        for bits in options.bits
        for side in sides
        if side.name in options.sides and bits in widths.get(side.name, options.bits)
    ]
    once = [Run(side, bits, 0, length, 0) for side, bits in pairs if not side.calibrated]
    return once + [
        Run(side, bits, sequences(side), length, seed)
        for seed in options.seeds
        for side, bits in pairs
        if side.calibrated
    ]


def opened(options: argparse.Namespace, sample: str, task: str, own: str = "") -> Bench:
    """The bench that the options describe; the process and its children are pinned if asked.

    `own` are its folders inside those of the options, where there are several benches.
    """
    if options.cpu is not None:
        os.sched_setaffinity(0, {options.cpu})
    work, kept = (folder.resolve() / own for folder in (options.work, options.kept))
    work.mkdir(parents=True, exist_ok=True)
    model = options.model.resolve() if options.model else fetched(sample)
    sha256 = sha256_of(model / "model.safetensors")
    return Bench(model, sha256, work, options.venvs.resolve(), kept, task)


def fetched(sample: str) -> Path:
    """The folder of a sample that `pocketsize fetch` has brought."""
    sys.path.insert(0, str(ROOT / "src"))
    from pocketsize.io.source import resolve

    return resolve(sample)


def environment(side: Side, cache: Path) -> dict[str, str]:
    """A worker's environment: threads fixed, no network, compiled code of ours never reused."""
    path = [HERE] if side.is_peer else [HERE, ROOT / "src"]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "OMP_NUM_THREADS": str(side.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "NUMBA_CACHE_DIR": str(cache),
        **side.environment,
    }


def sha256_of(path: Path) -> str:
    """The hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache
def processor() -> str:
    """What seconds can be compared on: the processor and what it can do."""
    from pocketsize.measurement.machine import machine

    found = machine()
    return f"{found['cpu']}, {found['cores']} cores, {found['instruction_sets']}"


@functools.cache
def sources_sha256(parts: Sequence[str] = ALGORITHM) -> str:
    """The hash of the code that decides what our quantization gives and costs; comments do not count."""
    top = ROOT / "src" / "pocketsize"
    files = sorted(p for name in parts for p in (top / name, *(top / name).rglob("*.py")) if p.is_file())
    code = "\n".join(ast.dump(ast.parse(p.read_text(encoding="utf-8"))) for p in files)
    return hashlib.sha256(code.encode()).hexdigest()
