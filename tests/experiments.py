"""What is done to runs in the laboratory of `faults.py`, and what has to come of it.

    python tests/experiments.py FOLDER EXPERIMENT...

prints what went wrong, and how many cases there were, as JSON.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from faults import GROWING, Cut, Ended, Lab, Real, Watch, failing, full_disk, tree, units_in


def kills(lab: Lab, *, overwrite: bool, every: bool = False, resume: bool = True) -> dict[str, Any]:
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
        if name == "pwrite":
            return done
        return done + real(args[0], bytes(args[1])[done:])

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
    for number, case in sorted(first.items()) if resume else ():
        said = lab.go_on(states / str(number) / "case", case["begun"], overwrite=overwrite).problems
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
        work = place / ".out.work"
        if states[-1] == "old" and work.exists() and not (work / "journal").exists():
            said.append("a work folder is left behind in which no work was begun")
        key = json.dumps(tree(place))
        if key not in known:
            known.add(key)
            said += lab.go_on(place, ended.begun, overwrite=overwrite).problems
        problems += [f"failed at {k} ({names[k]}): {text}" for text in said]
        shutil.rmtree(place)
    return _summary(problems, len(counted), len(known), states)


def shots(lab: Lab, count: int, *, seed: int = 0) -> dict[str, Any]:
    """Runs killed at random moments of their CPU time, a quarter of them again while they go on.

    Every shot is judged: where it left the output and the layers, and how the run that it hit ended.
    """
    chance = random.Random(seed)
    length = max(_seconds(lab, lab.place(overwrite=False)) for _ in range(2))
    rows: list[dict[str, Any]] = []
    runs = 0
    while len(rows) < count:
        overwrite = chance.random() < 0.5
        moments = [chance.uniform(0, length) for _ in range(1 + (chance.random() < 0.25))]
        place = lab.place(overwrite=overwrite)
        hit = _shot_run(lab, place, moments, overwrite=overwrite)
        runs += bool(hit)
        rows += hit
        shutil.rmtree(place)
    problems = [f"shot {i}: {said}" for i, row in enumerate(rows) for said in row["wrong"]]
    summary = _summary(problems, len(rows), runs, [row["state"] for row in rows])
    return summary | {"rows": rows, "run_s": round(length, 3)}


def _shot_run(lab: Lab, place: Path, moments: list[float], *, overwrite: bool) -> list[dict[str, Any]]:
    """One run shot at each moment, then given again until it ends; one row per shot that hit."""
    hit: list[dict[str, Any]] = []
    before = Cut.undone()
    for moment in moments:
        ended = _shot(lab, place, moment)
        if ended.code != -signal.SIGKILL:
            break  # it had finished by then
        after = Cut(units_in(place), lab.state(place, overwrite=overwrite), ended.begun)
        said = [] if after.state in ("old", "new") else [after.state]
        # Once the output stands in its place, the layers are swept away with the work folder.
        if after.state == "old" and after.kept < before.kept:
            said.append(f"lost: {after.kept} of {before.kept} layers are left")
        row = {"at_s": round(moment, 3), "overwrites": overwrite, "second": bool(hit)}
        hit.append(row | {"state": after.state, "kept": after.kept, "wrong": said})
        before = after
    else:
        ended = lab.run(place)
    if hit:
        resumed = lab.judge(place, before, ended)
        hit[-1]["wrong"] += resumed.problems
        for row in hit:
            row |= {"redone": resumed.redone, "same": resumed.same}
    return hit


def stops(lab: Lab) -> dict[str, Any]:
    """Runs that get real signals while they work: between layers, in a layer, where nothing is kept."""
    problems: list[str] = []
    for where, signals, code, kept in (
        ("layer", ["SIGINT"], 75, 1),
        ("layer", ["SIGTERM"], 75, 1),
        ("layer", ["SIGINT", "SIGINT"], 130, 0),
        ("layer", ["SIGTERM", "SIGTERM"], -signal.SIGTERM, 0),
        ("load", ["SIGINT"], 75, 0),
        ("write", ["SIGTERM"], 75, 0),
        ("measure", ["SIGINT"], 75, 3),
        ("export", ["SIGTERM"], 75, 3),
        ("publish", ["SIGINT"], 0, 0),
    ):
        overwrite = where != "publish"  # what replaces a folder is verified first, and may be left then
        place = lab.place(overwrite=overwrite)

        def prepare(where: str = where, signals: list[str] = signals) -> Callable[[], dict[str, Any]]:
            _signal_at(where, [getattr(signal, name) for name in signals])
            return lambda: {"handlers": [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)]}

        before = [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM)]
        ended = lab.end(place, lab.start(place, prepare))
        said = [] if ended.code == code else [f"ends with {ended.code}: {ended.error}"]
        if code == 75 and (ended.error.count("\n") != 1 or "same command goes on" not in ended.error):
            said.append(f"says {ended.error!r}")
        if ended.notes.get("handlers", before) != before:
            said.append(f"handlers are left: {ended.notes['handlers']}")
        if units_in(place) != kept:
            said.append(f"{units_in(place)} layers are kept instead of {kept}")
        if (state := lab.state(place, overwrite=overwrite)) != ("old" if code else "new"):
            said.append(state)
        said += lab.go_on(place, ended.begun, overwrite=overwrite).problems
        problems += [f"{'+'.join(signals)} in {where}: {text}" for text in said]
    return _summary(problems, 9, 9, [])


def words(lab: Lab) -> dict[str, Any]:
    """`quantize` and `shrink` stopped in a layer: they go on where they were."""
    model, data = str(lab.base / "model"), ["--sequences", "4", "--length", "32", "--tokens", "64"]
    data += ["--calibrate", str(lab.base / "a.txt"), "--evaluate", str(lab.base / "b.txt")]
    problems: list[str] = []
    for call in (["quantize", model], ["shrink", model, "--keep", "1%"], ["shrink", model, "--fit", "90kB"]):
        place = lab.place(overwrite=False)
        args = [*call, *data, "-o", str(place / "out")]

        def prepare() -> None:
            _signal_at("layer", [signal.SIGINT])

        ended = lab.end(place, lab.start(place, prepare, args))
        kept = sum(units_in(path.parent, name=path.name) for path in place.rglob("journal"))
        if (ended.code, kept) != (75, 1):
            problems.append(f"{call}: ends with {ended.code}, {kept} layers kept: {ended.error}")
        again = lab.end(place, lab.start(place, lambda: None, args))
        twice = {*ended.begun} & {*again.begun}
        if again.code or twice or [p.name for p in place.iterdir()] != ["out"]:
            problems.append(f"{call}: goes on with {again.code}, {twice} done twice: {again.error}")
        once_more = lab.end(place, lab.start(place, lambda: None, args))
        if once_more.code or once_more.begun:
            problems.append(
                f"{call}: when all is done, {once_more.code}, {once_more.begun}: {once_more.error}"
            )
    return _summary(problems, 3, 3, [])


def changes(lab: Lab) -> dict[str, Any]:
    """A run stopped after its first layer, and given again with one input changed: always refused."""
    place = lab.place(overwrite=False)
    shutil.copytree(lab.base / "model", place / "model")
    for name in ("a.txt", "b.txt"):
        shutil.copy(lab.base / name, place)
    text = (lab.base / "new.yaml").read_text().replace(str(lab.base), str(place))
    recipe, args = place / "new.yaml", ["run", str(place / "new.yaml"), "-o", str(place / "out")]
    recipe.write_text(text)
    ended = lab.end(place, lab.start(place, lambda: _signal_at("layer", [signal.SIGINT]), args))
    journal = (place / ".out.work" / "journal").read_bytes()
    problems = [] if (ended.code, units_in(place)) == (75, 1) else [f"not stopped: {ended}"]

    def refused(what: str, key: str, prepare: Callable[[], None] = lambda: None) -> None:
        ended = lab.end(place, lab.start(place, prepare, args))
        told = f": {key} was '" in ended.error and "' and is now '" in ended.error
        if ended.code != 7 or not told or ended.error.count("\n") != 1:
            problems.append(f"{what}: ends with {ended.code}: {ended.error}")
        if (place / ".out.work" / "journal").read_bytes() != journal:
            problems.append(f"{what}: the journal has changed")

    for name, key in FILES.items():
        path = place / name
        before = path.read_bytes()
        path.write_bytes(_changed(name, before))
        refused(name, key)
        path.write_bytes(before)
    for old, new, key in OPTIONS:
        assert old in text
        recipe.write_text(text.replace(old, new))
        refused(new, f"recipe.{key}")
    recipe.write_text(text)
    for key, prepare in CIRCUMSTANCES.items():
        refused(key, key, prepare)
    (place / "a.txt").rename(place / "moved.txt")
    recipe.write_text(text.replace("/a.txt", "/moved.txt"))
    again = lab.end(place, lab.start(place, lambda: None, args))
    if again.code or {*again.begun} & {*ended.begun}:
        problems.append(f"as before, from another path: {again.code}, {again.begun}, {again.error}")
    return _summary(problems, len(FILES) + len(OPTIONS) + len(CIRCUMSTANCES), 1, [])


def _changed(name: str, data: bytes) -> bytes:
    """The file with the least change that leaves it sound."""
    if name.endswith(".safetensors"):
        return bytes([*data[:-4], data[-4] ^ 1, *data[-3:]])
    if name.endswith("/config.json"):
        return data.replace(b'"rms_norm_eps": 1e-06', b'"rms_norm_eps": 2e-06')
    return data.replace(b"number 7", b"number 8") if name.endswith(".txt") else data + b"\n"


FILES = {
    "model/model.safetensors": "model weights",
    "model/config.json": "model config.rms_norm_eps",
    "model/tokenizer.json": "model file tokenizer.json",
    "model/tokenizer_config.json": "model file tokenizer_config.json",
    "model/generation_config.json": "model file generation_config.json",
    "a.txt": "calibrate text 1",
    "b.txt": "evaluate text 2",
}
STEP = "{scheme: W4A16}"
OPTIONS = (
    ("W4A16", "W8A16", "steps.0.gptq.scheme"),
    (STEP, "{scheme: W4A16, group: 64}", "steps.0.gptq.group"),
    (STEP, "{scheme: W4A16, symmetric: false}", "steps.0.gptq.symmetric"),
    (STEP, "{scheme: W4A16, embeddings: 5}", "steps.0.gptq.embeddings"),
    (STEP, "{scheme: W4A16, scale_digits: 5}", "steps.0.gptq.scale_digits"),
    (STEP, "{scheme: W4A16, damp: 0.02}", "steps.0.gptq.damp"),
    (STEP, "{scheme: W4A16, order: false}", "steps.0.gptq.order"),
    (STEP, "{scheme: W4A16, search: false}", "steps.0.gptq.search"),
    (STEP, "{scheme: W4A16, sink: 0.25}", "steps.0.gptq.sink"),
    ("gptq: {scheme: W4A16}", "rtn: {scheme: W4A16}", "steps.0.rtn.scheme"),
    ("sequences: 4", "sequences: 6", "data.sequences"),
    ("length: 32", "length: 16", "data.length"),
    ("tokens: 64", "tokens: 96", "data.tokens"),
    ("written: 0.5", "written: 0.25", "data.written"),
    ("written: 0.5", "written: 0.5, seed: 1", "data.seed"),
    ("[gguf, folder]", "[gguf]", "export.1"),
    ("[gguf, folder]", "[gguf, folder]\ndtype: fp16", "dtype"),
)


def _two_threads() -> None:
    import torch

    torch.set_num_threads(2)


def _another_torch() -> None:
    from pocketsize.recipes import fingerprint

    real = fingerprint.versions
    fingerprint.versions = lambda: real() | {"torch": "2.99"}


def _another_version() -> None:
    import pocketsize

    pocketsize.__version__ = "0.99"


def _another_processor() -> None:
    from pocketsize.recipes import fingerprint

    real = fingerprint.machine
    fingerprint.machine = lambda: real() | {"instruction_sets": "avx2"}


CIRCUMSTANCES = {
    "threads": _two_threads,
    "version of torch": _another_torch,
    "version of pocketsize": _another_version,
    "processor": _another_processor,
}


def memory(lab: Lab) -> dict[str, Any]:
    """Runs that cannot have the memory they ask for: in the second layer, and for all hidden states."""
    place, problems = lab.place(overwrite=True), []
    ended = lab.end(place, lab.start(place, _ask_for_too_much))
    said = r"error\[resources\]: out of memory in phase gptq: 70368744.2 MB more were asked for, "
    said += r"[\d.]+ MB were left; "
    said += "about [123] of the 4 sequences of 32 tokens would fit"
    if not re.match(said, ended.error):
        problems.append(f"says {ended.error!r}")
    if ended.code != 5 or ended.error.count("\n") != 1 or units_in(place) != 1:
        problems.append(f"ends with {ended.code}, {units_in(place)} layers kept")
    problems += lab.go_on(place, ended.begun, overwrite=True).problems

    place = lab.place(overwrite=False)
    recipe, args = place / "large.yaml", ["run", str(place / "large.yaml"), "-o", str(place / "out")]
    (place / "large.txt").write_text(
        "".join(f"{i} is a number and {i * i} is another\n" for i in range(20_000))
    )
    text = (lab.base / "new.yaml").read_text().replace(f"{lab.base}/a.txt", str(place / "large.txt"))
    text = text.replace("length: 32", "length: 256").replace("written: 0.5", "written: 0")
    recipe.write_text(text.replace("sequences: 4", "sequences: 1536"))
    ended = lab.end(place, lab.start(place, _limit_memory, args))
    fits = re.search(r"about (\d+) of the 1536 sequences of 256 tokens would fit", ended.error)
    if ended.code != 5 or fits is None:
        return _summary([*problems, f"under a limit: ends with {ended.code}: {ended.error}"], 2, 1, [])
    recipe.write_text(text.replace("sequences: 4", f"sequences: {fits[1]}"))
    ended = lab.end(place, lab.start(place, _limit_memory, args))
    if ended.code or int(fits[1]) < 8:
        problems.append(f"{fits[1]} sequences under the same limit: {ended.code}: {ended.error}")
    return _summary(problems, 2, 2, [])


def _ask_for_too_much() -> None:
    """At the second layer, torch is asked for 70 terabytes."""
    import torch

    from pocketsize.recipes import quantize

    real, calls = quantize.gptq, []

    def asking(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) > 4:
            torch.empty(1 << 46, dtype=torch.uint8)
        return real(*args, **kwargs)

    quantize.gptq = asking


def _limit_memory() -> None:
    """From the first step on this process may take 40 MB more than it has."""
    from pocketsize.recipes import quantize

    real = quantize.walk

    def limited(*args: Any, **kwargs: Any) -> Any:
        most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 40_000_000
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
        yield from real(*args, **kwargs)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    quantize.walk = limited


def _signal_at(where: str, numbers: list[int]) -> None:
    """Send this process a signal each of the first times that it comes to a place."""
    from pocketsize.recipes import quantize, run, writing

    owner, name = {
        "layer": (quantize, "gptq"),
        "load": (run, "read_texts"),
        "write": (writing, "write_windows"),
        "measure": (run, "quality_of"),
        "export": (run, "behaviours"),
        "publish": (run, "write_manifest"),
    }[where]
    real = getattr(owner, name)

    def signalled(*args: Any, **kwargs: Any) -> Any:
        if numbers:
            os.kill(os.getpid(), numbers.pop(0))
        return real(*args, **kwargs)

    setattr(owner, name, signalled)


def sabotaged(lab: Lab) -> dict[str, Any]:
    """A run that writes straight into its output: the laboratory has to say so."""
    from pocketsize.io.publish import make_folder
    from pocketsize.recipes import run

    @contextmanager
    def straight(out: Path, *, replace: bool) -> Iterator[Path]:
        make_folder(out)
        yield out

    run.staging = straight
    return kills(lab, overwrite=False, resume=False)


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


# On a model of which nothing is computed twice, and on one whose runs are computed whole.
QUICK: dict[str, Callable[[Lab], dict[str, Any]]] = {
    "killed": lambda lab: kills(lab, overwrite=False),
    "killed-overwriting": lambda lab: kills(lab, overwrite=True),
    "full-disk": lambda lab: failures(lab, overwrite=False, code=errno.ENOSPC),
    "failed-fsync": lambda lab: failures(lab, overwrite=True, code=errno.EIO),
    "sabotaged": sabotaged,  # the last: what it breaks stays broken
}
WHOLE: dict[str, Callable[[Lab], dict[str, Any]]] = {
    "shots": lambda lab: shots(lab, 40),
    "stops": stops,
    "words": words,
    "changes": changes,
    "memory": memory,
}


def main() -> None:
    """Run experiments of one kind in a new folder, and print what they found."""
    folder, *names = sys.argv[1:]
    kind = QUICK if names[0] in QUICK else WHOLE
    lab = Lab(Path(folder), quick=kind is QUICK)
    printed, sys.stdout = sys.stdout, sys.stderr
    os.environ["HF_HUB_OFFLINE"] = "1"
    lab.prepare()
    found: dict[str, Any] = {}
    for name in names:
        before = os.times()
        found[name] = kind[name](lab)
        used = [b - a for a, b in zip(before, os.times(), strict=True)]
        found[name]["cpu_s"] = round(sum(used[:4]), 1)
    printed.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
