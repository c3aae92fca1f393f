"""A laboratory for faults: tiny runs in forked processes, killed or failed at any file operation.

    python tests/faults.py FOLDER EXPERIMENT

prints what went wrong as JSON. Runs are forked from a process that has everything imported. What only
reads (loading in other processes, llama.cpp, timings) is left out; with `Lab.quick` what was computed
once (quality, behaviour, written text) is not computed again. Everything that writes is real.
"""

from __future__ import annotations

import builtins
import errno
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CALLS = (
    *(
        "write",
        "pwrite",
        "ftruncate",
        "truncate",
        "fsync",
        "fdatasync",
        "rename",
        "replace",
        "link",
        "symlink",
    ),
    *("unlink", "remove", "mkdir", "rmdir", "chmod"),
)
# Calls that may need room on the disk.
GROWING = {"open", "write", "pwrite", "fsync", "rename", "replace", "mkdir", "swap"}
TIMED = {"record.json", "report.html", "README.md", "MANIFEST.json"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

Real = Callable[..., Any]
# Called in place of the n-th operation: its number, name, the real function and its arguments.
Fault = Callable[[int, str, Real, tuple[Any, ...], dict[str, Any]], Any]


def plainly(number: int, name: str, real: Real, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """No fault."""
    return real(*args, **kwargs)


class Watch:
    """Every operation of this process that changes files, from now on; `fault` is put in its place."""

    def __init__(self, fault: Fault = plainly) -> None:
        from pocketsize.io import publish

        self.fault, self.names, self.strays, self.inside = fault, [], [], False
        for name in CALLS:
            self._put(os, name, name)
        self._put(publish, "_exchange", "swap")
        self._put(os, "open", "open", lambda args, kwargs: bool(args[1] & WRITING))
        for owner in (builtins, io):
            self._put(owner, "open", "stray", _writes)

    def _put(self, owner: Any, attribute: str, name: str, counts: Callable[..., bool] | None = None) -> None:
        real = getattr(owner, attribute)

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self.inside or (counts is not None and not counts(args, kwargs)):
                return real(*args, **kwargs)
            number = len(self.names)
            self.names.append(name)
            if name == "stray":
                self.strays.append(str(args[0]))
            self.inside = True  # what the fault itself does to files does not count
            try:
                return self.fault(number, name, real, args, kwargs)
            finally:
                self.inside = False

        setattr(owner, attribute, watched)


def _writes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    mode = kwargs.get("mode", args[1] if len(args) > 1 else "r")
    return bool(set(mode) & set("wax+")) and str(args[0]) != os.devnull


def full_disk(at: int) -> Fault:
    """From operation `at` on there is no room: a write gets half of its bytes out first."""

    def fault(number: int, name: str, real: Real, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if number < at or name not in GROWING:
            return real(*args, **kwargs)
        if number == at and name == "write" and len(args[1]) > 1:
            return real(args[0], bytes(args[1])[: len(args[1]) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), None)

    return fault


def failing(at: int, code: int) -> Fault:
    """Operation `at` fails, once."""

    def fault(number: int, name: str, real: Real, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if number == at:
            raise OSError(code, os.strerror(code), None)
        return real(*args, **kwargs)

    return fault


def tree(folder: Path, *, partial: bool = True) -> dict[str, str]:
    """Every path below a folder with the hash of its bytes.

    Without `partial`, of what is being written it only counts that it is there: whoever comes next
    empties it before anything else.
    """
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        cut = next((i for i, part in enumerate(parts) if part.endswith(".partial")), None)
        if not partial and cut is not None:
            found["/".join(parts[: cut + 1])] = "partial"
        elif path.name == "lock":
            found["/".join(parts)] = "lock"
        else:
            found["/".join(parts)] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
    return found


@dataclass(slots=True)
class Ended:
    """How a run ended: exit code (negative: the signal), stderr, and the layers that it began."""

    code: int
    error: str
    begun: list[str]
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Lab:
    """A tiny model, a recipe, and what an undisturbed run of it leaves."""

    base: Path
    quick: bool = True
    units: int = 3
    count: int = 0
    new: dict[str, str] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    old: Path | None = None

    def prepare(self) -> None:
        """Write the model and the texts, and run once, in this process: everything is warm afterwards."""
        import torch

        from pocketsize.cli.main import main
        from tiny import write_tiny

        torch.set_num_threads(1)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        _leave_out_what_reads()
        self.base.mkdir(parents=True)
        write_tiny(self.base / "model", "llama")
        for name in "ab":
            text = "".join(f"{name} text number {i} is about {i * i}\n" for i in range(400))
            (self.base / f"{name}.txt").write_text(text)
        for name, scheme in (("old", "W8A16"), ("new", "W4A16")):
            recipe = (
                f"model: {self.base / 'model'}\n"
                f"data: {{calibrate: {self.base / 'a.txt'}, evaluate: {self.base / 'b.txt'}, sequences: 4, "
                "length: 32, tokens: 64, written: 0.5}\n"
                f"steps: [{{gptq: {{scheme: {scheme}}}}}]\nexport: [gguf, folder]\n"
            )
            (self.base / f"{name}.yaml").write_text(recipe)
            if name == "new" and self.quick:
                _remember()
            code = main(["run", str(self.base / f"{name}.yaml"), "-o", str(self.base / name), "--json"])
            assert code == 0, f"the undisturbed run ended with {code}"
        self.new, self.record = _bytes_of(self.base / "new"), _record_of(self.base / "new")

    def place(self, *, overwrite: bool) -> Path:
        """A folder for one case; with `overwrite` it holds a finished output of another recipe."""
        self.count += 1
        place = self.base / "cases" / str(self.count)
        place.mkdir(parents=True)
        if overwrite:
            shutil.copytree(self.base / "old", place / "out")
        return place

    def start(self, place: Path, prepare: Callable[[], Callable[[], dict[str, Any]] | None]) -> int:
        """Fork a run into `place`; `prepare` is called in it first, what it gives is called last."""
        sys.stdout.flush()
        if pid := os.fork():
            return pid
        from pocketsize.cli.main import main

        aside = self.base / f"{place.name}.said"
        said = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        begun = os.open(self.base / f"{place.name}.begun", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(said, 2)
        code = 99
        try:
            _log_layers(begun, os.write)
            finish = prepare()
            overwrite = ["--overwrite"] if (place / "out").exists() else []
            code = main(["run", str(self.base / "new.yaml"), "-o", str(place / "out"), *overwrite])
            if finish is not None:
                (self.base / f"{place.name}.notes").write_text(json.dumps(finish()))
        finally:
            sys.stderr.flush()
            os._exit(code)

    def end(self, place: Path, pid: int) -> Ended:
        """Wait for a run."""
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        notes = self.base / f"{place.name}.notes"
        found = json.loads(notes.read_text()) if notes.exists() else {}
        notes.unlink(missing_ok=True)
        begun = (self.base / f"{place.name}.begun").read_text().split()
        return Ended(code, (self.base / f"{place.name}.said").read_text(), begun, found)

    def run(self, place: Path, fault: Fault = plainly) -> Ended:
        """A run into `place`, with a fault."""

        def prepare() -> Callable[[], dict[str, Any]]:
            watch = Watch(fault)
            return lambda: {"names": watch.names, "strays": watch.strays}

        return self.end(place, self.start(place, prepare))

    def state(self, place: Path, *, overwrite: bool) -> str:
        """`old`, `new`, or what is wrong with the output."""
        out = place / "out"
        if not overwrite and not out.exists():
            return "old"
        found = _bytes_of(out)
        if found == self.new:
            from pocketsize.exporting.manifest import check_manifest

            problems = check_manifest(out)
            return f"torn: {problems[0]}" if problems else "new"
        whole = overwrite and tree(out) == tree(self.base / "old")
        return "old" if whole else f"torn: {sorted(found)}"

    def go_on(self, place: Path, begun: list[str], *, overwrite: bool) -> list[str]:
        """What is wrong when the same command is given again in `place`, as sentences."""
        kept = _units_in(place / ".out.work" / "journal")
        was = self.state(place, overwrite=overwrite)
        again = self.run(place)
        if again.code:
            return [f"given again, it ends with {again.code}: {again.error}"]
        problems = []
        if self.state(place, overwrite=False) != "new" or _record_of(place / "out") != self.record:
            problems.append(f"other bytes than undisturbed: {_bytes_of(place / 'out')}")
        if twice := {*begun} & {*again.begun} if len({*begun} & {*again.begun}) > 1 else set():
            problems.append(f"done twice: {sorted(twice)}")
        if was == "old" and len(again.begun) > len(set(again.begun)):
            problems.append(f"a layer is done twice at once: {again.begun}")
        timing = json.loads((place / "out" / "record.json").read_text())["timing"]
        if was == "old" and timing["resumed"] != kept:
            problems.append(f"{kept} layers were kept, {timing['resumed']} were taken up")
        if was == "new" and again.begun:
            problems.append(f"was finished, yet layers are done again: {again.begun}")
        if left := sorted({p.name for p in place.iterdir()} - {"out"}):
            problems.append(f"left behind: {left}")
        return problems


def kills(lab: Lab, *, overwrite: bool, every: bool = False) -> dict[str, Any]:
    """A run killed before each operation, and half-way through each write.

    What SIGKILL leaves is what the file system holds at that moment: it is copied, and the run goes
    on. From each state that differs (with `every`, from each) a run is started that has to finish.
    """
    place, states = lab.place(overwrite=overwrite), lab.base / f"states-{lab.count}"
    seen: dict[str, int] = {}
    found: list[dict[str, Any]] = []

    def snapshot(number: int, name: str) -> None:
        key = json.dumps([tree(place, partial=every), name if every else ""])
        new = key not in seen
        seen.setdefault(key, len(seen))
        if new:
            shutil.copytree(place, states / str(seen[key]) / "case", symlinks=True)
        begun = (lab.base / f"{place.name}.begun").read_text().split()
        state = lab.state(place, overwrite=overwrite)
        found.append({"at": number, "name": name, "state": state, "copy": seen[key], "begun": begun})

    def fault(number: int, name: str, real: Real, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        snapshot(number, name)
        half = len(args[1]) // 2 if name in ("write", "pwrite") else 0
        if not half:
            return real(*args, **kwargs)
        done = real(args[0], bytes(args[1])[:half], *args[2:])
        snapshot(number, f"half {name}")
        return done

    def prepare() -> Callable[[], dict[str, Any]]:
        watch = Watch(fault)
        return lambda: {"found": found, "names": watch.names, "strays": watch.strays}

    ended = lab.end(place, lab.start(place, prepare))
    assert ended.code == 0, ended.error
    found, problems = ended.notes["found"], [f"written past publish: {s}" for s in ended.notes["strays"]]
    for case in found:
        if case["state"] not in ("old", "new"):
            problems.append(f"killed at {case['at']} ({case['name']}): {case['state']}")
    first = {case["copy"]: case for case in reversed(found)}
    for number, case in sorted(first.items()):
        said = lab.go_on(states / str(number) / "case", case["begun"], overwrite=overwrite)
        problems += [f"killed at {case['at']} ({case['name']}): {text}" for text in said]
    return _summary(problems, len(found), len(first), [case["state"] for case in found])


def failures(lab: Lab, *, overwrite: bool, code: int) -> dict[str, Any]:
    """A run in which each operation fails: a disk that is full from there on, or one error."""
    names = lab.run(lab.place(overwrite=overwrite)).notes["names"]
    full = code == errno.ENOSPC
    counted = [k for k, name in enumerate(names) if (name in GROWING if full else name == "fsync")]
    problems: list[str] = []
    known: set[str] = set()
    states: list[str] = []
    for k in counted:
        place = lab.place(overwrite=overwrite)
        ended = lab.run(place, full_disk(k) if full else failing(k, code))
        states.append(lab.state(place, overwrite=overwrite))
        said = [] if states[-1] in ("old", "new") else [states[-1]]
        wanted = f"error[resources]: {lab.base}"
        if ended.code != 5 or ended.error.count("\n") != 1 or not ended.error.startswith(wanted):
            said.append(f"ends with {ended.code}: {ended.error}")
        if left := [p.name for p in place.iterdir() if p.name.endswith((".partial", ".replaced"))]:
            said += [f"left behind: {left}"] if states[-1] == "old" else []
        key = json.dumps(tree(place))
        if key not in known:
            known.add(key)
            said += lab.go_on(place, ended.begun, overwrite=overwrite)
        problems += [f"failed at {k} ({names[k]}): {text}" for text in said]
        shutil.rmtree(place)
    return _summary(problems, len(counted), len(known), states)


def shots(lab: Lab, count: int, *, seed: int = 0) -> dict[str, Any]:
    """Runs killed at random moments of their CPU time, a quarter of them again while they go on."""
    chance = random.Random(seed)
    lengths = [_seconds(lab, lab.place(overwrite=False)) for _ in range(2)]
    problems: list[str] = []
    states: list[str] = []
    resumes = kept = missed = 0
    rows: list[dict[str, Any]] = []
    while len(states) < count:
        overwrite = chance.random() < 0.5
        place = lab.place(overwrite=overwrite)
        moments = [chance.uniform(0, max(lengths))]
        if chance.random() < 0.25:
            moments.append(chance.uniform(0, max(lengths)))
        begun: list[str] = []
        for number, moment in enumerate(moments):
            ended = _shot(lab, place, moment)
            if ended.code != -signal.SIGKILL:
                missed += number == 0
                break
            resumes += number
            begun = ended.begun
            states.append(lab.state(place, overwrite=overwrite))
            kept = _units_in(place / ".out.work" / "journal")
            said = [] if states[-1] in ("old", "new") else [states[-1]]
            problems += [f"shot {len(states)} at {moment:.3f} s: {text}" for text in said]
        else:
            said = lab.go_on(place, begun, overwrite=overwrite)
            problems += [f"shot {len(states)} at {moments[-1]:.3f} s: {text}" for text in said]
            rows.append({"at_s": round(moments[-1], 3), "state": states[-1], "kept": kept, "wrong": said})
        shutil.rmtree(place)
    return _summary(problems, len(states), len(rows), states) | {
        "rows": rows,
        "killed_resumes": resumes,
        "missed": missed,
        "run_s": round(max(lengths), 3),
    }


def _shot(lab: Lab, place: Path, moment: float) -> Ended:
    """A run that is killed once it has used `moment` seconds of CPU."""
    pid = lab.start(place, lambda: None)
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if _cpu_s(pid) >= moment:
            os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.001)
    return lab.end(place, pid)


def _seconds(lab: Lab, place: Path) -> float:
    """CPU seconds of an undisturbed run."""
    pid, used = lab.start(place, lambda: None), 0.0
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        used = max(used, _cpu_s(pid))
        time.sleep(0.001)
    assert lab.end(place, pid).code == 0
    return used


def _cpu_s(pid: int) -> float:
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    except (OSError, IndexError):
        return 0.0


def _summary(problems: list[str], cases: int, resumed: int, states: list[str]) -> dict[str, Any]:
    counts = {name: states.count(name) for name in ("old", "new")}
    return {"problems": problems, "cases": cases, "resumed": resumed, "states": counts}


def _bytes_of(out: Path) -> dict[str, str]:
    """Every file of an output; those that hold timings only by name."""
    return {name: "" if name in TIMED else sha for name, sha in tree(out).items()}


def _record_of(out: Path) -> dict[str, Any]:
    record = json.loads((out / "record.json").read_text())
    del record["timing"]
    return record


def _units_in(journal: Path) -> int:
    """How many layers a journal holds whole."""
    return max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0


def _log_layers(descriptor: int, write: Real) -> None:
    from pocketsize.recipes import quantize

    real = quantize.quantize_site

    def logged(site: Any, *args: Any) -> Any:
        if site.last:
            write(descriptor, f"{site.block}\n".encode())
        return real(site, *args)

    quantize.quantize_site = logged


def _leave_out_what_reads() -> None:
    from pocketsize.exporting import table, verify
    from pocketsize.models import load
    from pocketsize.recipes import run

    load.probe_tokenizer = lambda path: None
    table.reload_check = lambda model, folder: ("left out",)
    verify.installed = lambda: None
    run.latency = lambda *args, **kwargs: []


def _remember() -> None:
    """What is computed of the model is computed once: each function gives its first answer again."""
    from pocketsize.exporting import table
    from pocketsize.recipes import run

    for owner, name in (
        (run, "quality_of"),
        (run, "behaviours"),
        (run, "write_windows"),
        (table, "verify_gguf"),
    ):
        setattr(owner, name, _once(getattr(owner, name)))


def _once(real: Real) -> Real:
    answers: list[Any] = []

    def remembered(*args: Any, **kwargs: Any) -> Any:
        if not answers:
            answers.append(real(*args, **kwargs))
        return answers[0]

    return remembered


EXPERIMENTS: dict[str, Callable[[Lab], dict[str, Any]]] = {
    "killed": lambda lab: kills(lab, overwrite=False),
    "killed-overwriting": lambda lab: kills(lab, overwrite=True),
    "full-disk": lambda lab: failures(lab, overwrite=False, code=errno.ENOSPC),
    "full-disk-overwriting": lambda lab: failures(lab, overwrite=True, code=errno.ENOSPC),
    "failed-fsync": lambda lab: failures(lab, overwrite=True, code=errno.EIO),
    "shots": lambda lab: shots(lab, 40),
}


def main() -> None:
    """Run one experiment in a new folder, and print what it found."""
    folder, name = sys.argv[1:]
    lab = Lab(Path(folder), quick=name != "shots")
    printed, sys.stdout = sys.stdout, sys.stderr
    os.environ["HF_HUB_OFFLINE"] = "1"
    start = time.process_time()
    lab.prepare()
    found = EXPERIMENTS[name](lab)
    used = os.times()
    found["cpu_s"] = round(time.process_time() - start + used.children_user + used.children_system, 1)
    printed.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
