"""What `pocketsize plan` says of a run, against what the run takes.

    python benchmarks/plan/run.py [--only NAME]

Ten runs: six recipes on the models that they fit. Each is planned in a process of its own, then run in
another that is watched from outside. What is finished is kept in `work` and not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import yaml
from bars import Bar, write_record
from contest import ROOT
from meter import write_json
from watch import folder_bytes, watched

MODELS = {"smollm2": "sample:smollm2-135m", "minilm": "sample:minilm-l6", "mpnet": "sample:mpnet-base"}
QUESTION = "How far is what `pocketsize plan` says about memory, disk and time from what the run takes?"
MOST_RAM, MOST_DISK, MOST_TIME, MOST_PLAN_S = 25.0, 2.0, 2.0, 60.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """A step, its exports and texts, and the models it is run on."""

    name: str
    step: dict[str, Any]
    export: tuple[str, ...]
    data: dict[str, Any]
    models: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """One recipe on one model."""

    recipe: Recipe
    model: str

    @property
    def name(self) -> str:
        """What its files are called."""
        return f"{self.recipe.name}-{self.model}"


LITTLE = {"tokens": 4096}
RECIPES = (
    Recipe(
        "rtn-w8-folder", {"rtn": {"scheme": "W8A16"}}, ("folder",), LITTLE, ("minilm", "mpnet", "smollm2")
    ),
    Recipe("rtn-w4-gguf", {"rtn": {"scheme": "W4A16"}}, ("gguf",), LITTLE, ("smollm2",)),
    Recipe(
        "gptq-w4-folder-16x512",
        {"gptq": {"scheme": "W4A16"}},
        ("folder",),
        LITTLE | {"sequences": 16, "written": 0.0},
        ("minilm", "smollm2"),
    ),
    Recipe(
        "gptq-w3-folder-16x512",
        {"gptq": {"scheme": "W3A16"}},
        ("folder",),
        LITTLE | {"sequences": 16, "written": 0.0},
        ("smollm2",),
    ),
    Recipe("gptq-w4-folder", {"gptq": {"scheme": "W4A16"}}, ("folder",), {}, ("minilm", "mpnet")),
    Recipe("gptq-w4-gguf-folder", {"gptq": {"scheme": "W4A16"}}, ("gguf", "folder"), LITTLE, ("smollm2",)),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path(__file__).with_name("work"))
    parser.add_argument("--only", default="", help="cases whose name holds this; nothing is recorded")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    cases = [Case(recipe, model) for recipe in RECIPES for model in recipe.models]
    for case in cases:
        if chosen.only in case.name:
            known(chosen.work / f"{case.name}.plan.json", lambda c=case: planned(c, chosen.work))
            known(chosen.work / f"{case.name}.run.json", lambda c=case: measured(c, chosen.work))
            print(case.name, flush=True)
    if not chosen.only:
        record([row(case, chosen.work) for case in cases])


def known(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was found before, else found and kept."""
    if not path.exists():
        write_json(path, make())
    return json.loads(path.read_text())


def written(case: Case, work: Path) -> Path:
    """The recipe file of a case."""
    path = work / f"{case.name}.yaml"
    facts = {"model": MODELS[case.model], "steps": [case.recipe.step], "export": list(case.recipe.export)}
    path.write_text(yaml.safe_dump(facts | {"data": case.recipe.data}))
    return path


def environment() -> dict[str, str]:
    """Threads and sources of a child process."""
    return {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}


def planned(case: Case, work: Path) -> dict[str, Any]:
    """The plan, and the CPU seconds that planning took, imports included."""
    before = children_s()
    command = [sys.executable, "-m", "pocketsize.cli.main", "plan", str(written(case, work)), "--json"]
    done = subprocess.run(
        [*command, "-o", str(work / case.name)], env=environment(), check=True, capture_output=True
    )
    return {"plan": json.loads(done.stdout), "planning_cpu_s": round(children_s() - before, 2)}


def children_s() -> float:
    """CPU seconds of all finished children."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measured(case: Case, work: Path) -> dict[str, Any]:
    """The run: what its stages took, the largest of its processes, its files."""
    out, unfinished = work / case.name, [work / f".{case.name}.{end}" for end in ("work", "partial")]
    for folder in (out, *unfinished):
        shutil.rmtree(folder, ignore_errors=True)
    result = work / f"{case.name}.stages.json"
    worker = str(Path(__file__).with_name("worker.py"))
    command = [sys.executable, worker, str(written(case, work)), str(out), str(result)]
    seen = watched(command, [out, *unfinished], environment())
    if seen.returncode:
        raise SystemExit(f"{case.name}: the run ends with {seen.returncode}")
    facts = json.loads(result.read_text())
    facts |= {
        "child_bytes": seen.child_bytes,
        "family_bytes": seen.family_bytes,
        "peak_disk_bytes": seen.disk_bytes,
        "output_disk_bytes": folder_bytes(out),
    }
    shutil.rmtree(out)
    return facts


def row(case: Case, work: Path) -> dict[str, Any]:
    """Predicted and measured figures of a case, and how far they are apart."""
    told = json.loads((work / f"{case.name}.plan.json").read_text())
    plan, run = told["plan"], json.loads((work / f"{case.name}.run.json").read_text())
    peak = max(run["child_bytes"], *(stage["rss_peak"] for stage in run["stages"]))
    pairs = {
        "peak_ram_mb": (plan["peak_ram_bytes"] / 1e6, peak / 1e6),
        "together_ram_mb": (plan["needed_ram_bytes"] / 1e6, run["family_bytes"] / 1e6),
        "output_disk_mb": (plan["output_disk_bytes"] / 1e6, run["output_disk_bytes"] / 1e6),
        "peak_disk_mb": (plan["peak_disk_bytes"] / 1e6, run["peak_disk_bytes"] / 1e6),
        "cpu_s": (plan["cpu_s"], sum(stage["cpu_s"] for stage in run["stages"])),
    }
    return {
        "recipe": case.recipe.name,
        "model": MODELS[case.model],
        **{name: compared(*pair) for name, pair in pairs.items()},
        "run_wall_s": run["wall_s"],
        "planning_cpu_s": told["planning_cpu_s"],
        "stages": list(stages(plan, run)),
    }


def compared(planned: float, measured: float) -> dict[str, float]:
    """Both figures, and the planned one as a share of the measured one."""
    return {
        "planned": round(planned, 2),
        "measured": round(measured, 2),
        "ratio": round(planned / measured, 4),
    }


def stages(plan: dict[str, Any], run: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Stage by stage: memory of the run's own process, and CPU seconds."""
    taken = {stage["name"]: stage for stage in run["stages"]}
    for stage in plan["stages"]:
        own = taken[stage["name"]]
        yield {
            "stage": stage["name"],
            "ram_mb": compared(stage["ram_bytes"] / 1e6, own["rss_peak"] / 1e6),
            "cpu_s": [round(stage["cpu_s"], 1), own["cpu_s"]],
        }


def record(rows: list[dict[str, Any]]) -> None:
    """The worst of all rows against the four bars."""

    def apart(name: str) -> float:
        return max(100 * abs(row[name]["ratio"] - 1) for row in rows)

    factor = max(max(row["cpu_s"]["ratio"], 1 / row["cpu_s"]["ratio"]) for row in rows)
    planning = max(row["planning_cpu_s"] for row in rows if row["model"] == MODELS["smollm2"])
    write_record(
        Path(__file__).with_name("record.json"),
        question=QUESTION,
        threads=torch.get_num_threads(),
        protocol=[
            "memory: the high-water mark (VmHWM) of the run's process or of its largest child, per stage",
            "disk: all files of the output; and the most that output and unfinished work take together",
            "time: CPU seconds of all stages, children included, since the core is shared with other work",
            "planning: CPU seconds of the whole command, imports and loading included",
        ],
        versions={name: version(name) for name in ("torch", "transformers", "numpy", "numba")},
        rows=rows,
        bars=[
            Bar(
                f"plan, worst of {len(rows)} runs: peak memory off by",
                apart("peak_ram_mb"),
                "%",
                "lower",
                MOST_RAM,
            ),
            Bar(
                f"plan, worst of {len(rows)} runs: size of the output off by",
                apart("output_disk_mb"),
                "%",
                "lower",
                MOST_DISK,
            ),
            Bar(
                f"plan, worst of {len(rows)} runs: disk while it runs off by",
                apart("peak_disk_mb"),
                "%",
                "lower",
                MOST_DISK,
            ),
            Bar(
                f"plan, worst of {len(rows)} runs: CPU time off by a factor of",
                factor,
                "",
                "lower",
                MOST_TIME,
            ),
            Bar("plan of SmolLM2, rehearsal included: CPU time", planning, "s", "lower", MOST_PLAN_S),
        ],
    )


if __name__ == "__main__":
    main()
