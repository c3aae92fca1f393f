"""A laboratory for faults: tiny runs in forked processes, killed or failed at any file operation.

Runs are forked from a process that has everything imported. What only reads (loading in other
processes, llama.cpp, timings) is left out; with `Lab.quick` what was computed once (quality,
behaviour, written text, pages) is not computed again. Everything that writes is real but the
flushing of disks, which a kill does not need: those calls count, and can fail, like all others.
"""

from __future__ import annotations

import builtins
import errno
import gc
import hashlib
import io
import json
import os
import shutil
import signal
import sys
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


@dataclass(frozen=True, slots=True)
class Cut:
    """What a run that was cut off left: layers kept whole, the state of its output, layers it had begun."""

    kept: int
    state: str
    begun: list[str]

    @classmethod
    def undone(cls) -> Cut:
        """Before any run."""
        return cls(0, "old", [])


@dataclass(slots=True)
class Resumed:
    """What came of giving the same command again: layers done twice, the same bytes, and what is wrong."""

    redone: int
    same: bool
    problems: list[str]


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
        # Whoever started this in the background made it deaf to Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
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
        # Forked processes share what nobody collects.
        gc.collect()
        gc.freeze()
        self.new, self.record = bytes_of(self.base / "new"), record_of(self.base / "new")

    def place(self, *, overwrite: bool) -> Path:
        """A folder for one case; with `overwrite` it holds a finished output of another recipe."""
        self.count += 1
        place = self.base / "cases" / str(self.count)
        place.mkdir(parents=True)
        if overwrite:
            shutil.copytree(self.base / "old", place / "out")
        return place

    def start(
        self,
        place: Path,
        prepare: Callable[[], Callable[[], dict[str, Any]] | None],
        args: list[str] | None = None,
    ) -> int:
        """Fork a run into `place`; `prepare` is called in it first, what it gives is called last."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        said, begun = (os.open(self.base / f"{place.name}.{end}", flags, 0o644) for end in ("said", "begun"))
        sys.stdout.flush()
        if pid := os.fork():
            os.close(said)
            os.close(begun)
            return pid
        from pocketsize.cli.main import main

        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(said, 2)
        code = 99
        try:
            _log_layers(begun, os.write)
            finish = prepare()
            overwrite = ["--overwrite"] if (place / "out").exists() else []
            code = main(args or ["run", str(self.base / "new.yaml"), "-o", str(place / "out"), *overwrite])
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
        found = bytes_of(out)
        if found == self.new:
            from pocketsize.exporting.manifest import check_manifest

            problems = check_manifest(out)
            return f"torn: {problems[0]}" if problems else "new"
        whole = overwrite and tree(out) == tree(self.base / "old")
        return "old" if whole else f"torn: {sorted(found)}"

    def go_on(self, place: Path, begun: list[str], *, overwrite: bool) -> Resumed:
        """The same command again in `place`, where a run that had begun these layers was cut off."""
        cut = Cut(units_in(place), self.state(place, overwrite=overwrite), begun)
        return self.judge(place, cut, self.run(place))

    def judge(self, place: Path, cut: Cut, again: Ended) -> Resumed:
        """How a run ended that was given again after one was cut off."""
        if again.code:
            return Resumed(0, False, [f"given again, it ends with {again.code}: {again.error}"])
        problems = []
        same = self.state(place, overwrite=False) == "new" and record_of(place / "out") == self.record
        if not same:
            problems.append(f"other bytes than undisturbed: {bytes_of(place / 'out')}")
        redone = sum((cut.begun + again.begun).count(layer) - 1 for layer in {*cut.begun, *again.begun})
        if redone > 1:
            problems.append(f"begun before: {cut.begun}, and again: {again.begun}")
        timing = json.loads((place / "out" / "record.json").read_text())["timing"]
        if cut.state == "old" and timing["resumed"] != cut.kept:
            problems.append(f"{cut.kept} layers were kept, {timing['resumed']} were taken up")
        if cut.state == "new" and again.begun:
            problems.append(f"was finished, yet layers are done again: {again.begun}")
        if left := sorted({p.name for p in place.iterdir()} - {"out"}):
            problems.append(f"left behind: {left}")
        return Resumed(redone, same, problems)


def bytes_of(out: Path) -> dict[str, str]:
    """Every file of an output; those that hold timings only by name."""
    return {name: "" if name in TIMED else sha for name, sha in tree(out).items()}


def record_of(out: Path) -> dict[str, Any]:
    record = json.loads((out / "record.json").read_text())
    del record["timing"]
    return record


def units_in(place: Path, *, name: str = ".out.work/journal") -> int:
    """How many layers a journal holds whole."""
    journal = place / name
    return max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0


def _log_layers(descriptor: int, write: Real) -> None:
    from pocketsize.recipes import quantize

    real = quantize.quantize_site

    begun: list[str] = []

    def logged(site: Any, *args: Any, **options: Any) -> Any:
        if begun[-1:] != [site.block]:
            begun.append(site.block)
            write(descriptor, f"{site.block}\n".encode())
        return real(site, *args, **options)

    quantize.quantize_site = logged


def _leave_out_what_reads() -> None:
    from pocketsize.exporting import table, verify
    from pocketsize.models import load
    from pocketsize.recipes import run

    load.probe_tokenizer = lambda path: None
    table.reload_check = lambda model, folder: ("left out",)
    verify.installed = lambda: None
    run.latency = lambda *args, **kwargs: []
    # A kill loses nothing that was written, flushed or not; each call still counts, and can fail.
    os.fsync = lambda descriptor: None


def _remember() -> None:
    """What is computed of the model is computed once: each function gives its first answer again."""
    from pocketsize import api
    from pocketsize.exporting import table
    from pocketsize.recipes import fingerprint, run, writing

    reading = ("prepare", "quality_of", "behaviours", "versions")
    written = ("materialise", "tokenizer_of", "write_windows", "versions")
    named = [*((run, name) for name in reading), *((writing, name) for name in written)]
    named += [(fingerprint, "versions"), (table, "verify_gguf")]
    for owner, name in named:
        setattr(owner, name, _once(getattr(owner, name)))
    api.PAGES = {name: _once(page) for name, page in api.PAGES.items()}


def _once(real: Real) -> Real:
    answers: list[Any] = []

    def remembered(*args: Any, **kwargs: Any) -> Any:
        if not answers:
            answers.append(real(*args, **kwargs))
        return answers[0]

    return remembered
