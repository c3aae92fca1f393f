"""Windows of tokens: shuffled ones to calibrate with, fixed ones to evaluate with."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pocketsize.data.text import Corpus, require_evaluable
from pocketsize.errors import DataError, UsageError

# Long texts are tokenised in pieces, so that a large file costs no more than what is taken from it.
PIECE = 2**18
# Calibration tokenises this many times the tokens it takes, to draw its windows from.
DRAW = 4
# Where windows have several lengths, those of one length follow one another for so many tokens.
RUN = 1024


@dataclass(frozen=True, slots=True)
class Windows:
    """Token windows of one length, and the text they were cut from (`sha256` pins it).

    `mask` is False on padding, which is never counted. `text_bytes` tells for each window how many
    UTF-8 bytes the tokens stand for that a causal model predicts in it; `prefix` how many tokens
    the tokenizer's own frame puts in front (BOS, CLS). Where windows have
    several lengths, `drawn` is how many full ones they were cut from, and `shortest` is the least length.
    """

    input_ids: Int64[Tensor, "n length"]
    mask: Bool[Tensor, "n length"]
    text_bytes: Int64[Tensor, "n"]
    name: str
    sha256: str
    documents: int
    generated: bool = False
    prefix: int = 0
    drawn: int = 0
    shortest: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.mask.sum())


def windows(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    length: int,
    seed: int,
    special: bool,
    shortest: int | None = None,
) -> Windows:
    """At most `count` windows of `length` tokens for calibration: no two overlap, drawn by `seed`.

    With `special`, each window is framed as the tokenizer frames a text (BOS, or CLS .. SEP), within
    `length`. A short text gives fewer windows, which the caller should say; not one is an error. Down to
    `shortest`, windows of half the length, a quarter and so on stand for as many tokens of full ones, each
    length for as many as every other, of which twice as many stay; windows of one length are neighbours as
    far as `RUN` tokens.
    """
    lengths = lengths_of(length, length if shortest is None else shortest)
    _positive(sequences=count, length=length)
    prefix, suffix = frame_of(tokenizer) if special else ([], [])
    inner = _inner(length, prefix, suffix)
    _inner(lengths[-1], prefix, suffix)
    generator = random.Random(seed)
    pieces = list(_pieces(corpus))
    generator.shuffle(pieces)
    found = list(_cut(_tokens(pieces, tokenizer), inner, DRAW * count))
    generator.shuffle(found)
    if len(lengths) == 1:
        return _windows(corpus, tokenizer, found[:count], length, (prefix, suffix))
    cut = _cut_shorter(found[:count], length, lengths, length - inner)
    made = _windows(corpus, tokenizer, cut, length, (prefix, suffix))
    return replace(made, drawn=min(count, len(found)), shortest=int(made.mask.sum(1).amin()))


def lengths_of(length: int, shortest: int) -> list[int]:
    """A length, half of it, a quarter and so on, down to the shortest; itself at least."""
    found = [length]
    while found[-1] // 2 >= max(1, shortest):
        found.append(found[-1] // 2)
    return found


def _cut_shorter(
    full: Sequence[list[int]], length: int, lengths: Sequence[int], frame: int
) -> list[list[int]]:
    """Full windows, most of them cut into shorter ones, around which go `frame` tokens each.

    Lengths far apart take turns, so that a few windows know them already; the longest, whose later positions
    no other has, twice.
    """
    turns, found = [*lengths[::2], length, *lengths[1::2]], list[list[int]]()
    run = max(1, min(RUN // length, len(full) // len(turns)))
    for i, window in enumerate(full):
        one = turns[i // run % len(turns)]
        inner = one - frame
        found += [window[a * inner : (a + 1) * inner] for a in range(length // one)]
    return found


def evaluation_windows(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    *,
    tokens: int,
    length: int,
    special: bool,
) -> Windows:
    """The first `tokens` tokens of the text in windows of `length` that do not overlap, in its order.

    `tokens` is rounded up to whole windows; a short text gives fewer, not one is an error. Text that
    a model wrote is refused.
    """
    _positive(tokens=tokens, length=length)
    require_evaluable(corpus)
    prefix, suffix = frame_of(tokenizer) if special else ([], [])
    inner, count = _inner(length, prefix, suffix), -(-tokens // length)
    found = list(_cut(_tokens(_pieces(corpus), tokenizer), inner, count))
    return _windows(corpus, tokenizer, found, length, (prefix, suffix))


def joined_windows(parts: Sequence[Windows], shares: Sequence[float]) -> Windows:
    """The windows of several sources as one, source by source; the hash pins texts and shares."""
    if len(parts) == 1:
        return parts[0]
    digest = hashlib.sha256()
    for part, share in zip(parts, shares, strict=True):
        digest.update(f"{part.sha256} {share!r}\n".encode())
    return Windows(
        input_ids=torch.cat([part.input_ids for part in parts]),
        mask=torch.cat([part.mask for part in parts]),
        text_bytes=torch.cat([part.text_bytes for part in parts]),
        name=", ".join(f"{part.name} ({share:.4g})" for part, share in zip(parts, shares, strict=True)),
        sha256=digest.hexdigest(),
        documents=sum(part.documents for part in parts),
        generated=any(part.generated for part in parts),
        prefix=parts[0].prefix,
        drawn=sum(part.drawn for part in parts),
        shortest=min(part.shortest for part in parts),
    )


def _positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise UsageError(f"{name} must be at least 1, got {number}")


def frame_of(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text. An end-of-text mark is left off unless it is
    the separator too: a window is cut from the middle of a text."""
    bare = _ids(tokenizer, "a", special=False)
    framed = _ids(tokenizer, "a", special=True)
    for i in range(len(framed) - len(bare) + 1):
        if framed[i : i + len(bare)] == bare:
            after = framed[i + len(bare) :]
            end = tokenizer.eos_token_id if tokenizer.eos_token_id != tokenizer.sep_token_id else None
            return framed[:i], [token for token in after if token != end]
    raise DataError(f"the tokenizer frames a text in a way that cannot be told: {bare} became {framed}")


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, truncation=False, verbose=False)["input_ids"])  # type: ignore[arg-type]


def _inner(length: int, prefix: list[int], suffix: list[int]) -> int:
    inner = length - len(prefix) - len(suffix)
    if inner < 2:
        raise UsageError(f"length {length} leaves no room for text; give at least {length - inner + 2}")
    return inner


def _pieces(corpus: Corpus) -> Iterator[str]:
    """The documents, each with a blank line after it, cut at line ends where they are long."""
    for document in corpus.documents:
        text = document.text.rstrip("\n") + "\n\n"
        start = 0
        while start < len(text):
            end = start + PIECE
            if end < len(text):
                line = text.rfind("\n", start, end)
                end = line + 1 if line > start else end
            yield text[start:end]
            start = end


def _tokens(pieces: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
    for piece in pieces:
        yield from _ids(tokenizer, piece, special=False)


def _cut(tokens: Iterator[int], inner: int, most: int) -> Iterator[list[int]]:
    """At most `most` full windows of `inner` tokens; an incomplete last one is dropped."""
    window: list[int] = []
    for token in tokens:
        window.append(token)
        if len(window) == inner:
            yield window
            window, most = [], most - 1
            if most == 0:
                return


def _windows(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    inner: list[list[int]],
    length: int,
    frame: tuple[list[int], list[int]],
) -> Windows:
    prefix, suffix = frame
    if not inner:
        raise DataError(
            f"{corpus.name}: too short for one window of {length} tokens; give more text, or a recipe "
            "a shorter length"
        )
    framed = [torch.tensor(prefix + window + suffix) for window in inner]
    filler = 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)  # type: ignore[arg-type]
    ids = torch.full((len(framed), length), filler, dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, window in enumerate(framed):
        ids[i, : len(window)], mask[i, : len(window)] = window, True
    predicted = [window if prefix else window[1:] for window in inner]
    sizes = [len(_text(tokenizer, window).encode("utf-8", "replace")) for window in predicted]
    return Windows(
        input_ids=ids,
        mask=mask,
        text_bytes=torch.tensor(sizes, dtype=torch.int64),
        name=corpus.name,
        sha256=corpus.sha256,
        documents=len(corpus.documents),
        generated=corpus.generated,
        prefix=len(prefix),
    )


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
