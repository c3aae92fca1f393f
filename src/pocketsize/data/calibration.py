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
from pocketsize.models.batches import HELD_OUT

# Long texts are tokenised in pieces, so that a large file costs no more than what is taken from it.
PIECE = 2**18
# Calibration tokenises this many times the tokens it takes, to draw its windows from.
DRAW = 4
# Where windows have several lengths, those of one length follow one another for so many tokens at most.
RUN = 1024


@dataclass(frozen=True, slots=True)
class Windows:
    """Token windows, padded to one length, and the text they were cut from (`sha256` pins it).

    `mask` is False on padding, which is never counted. `text_bytes` tells for each window how many
    UTF-8 bytes the tokens stand for that a causal model predicts in it; `prefix` how many tokens
    the tokenizer's own frame puts in front (BOS, CLS).
    """

    input_ids: Int64[Tensor, "n length"]
    mask: Bool[Tensor, "n length"]
    text_bytes: Int64[Tensor, "n"]
    name: str
    sha256: str
    documents: int
    generated: bool = False
    prefix: int = 0

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
) -> Windows:
    """At most `count` windows of `length` tokens for calibration: no two overlap, drawn by `seed`.

    With `special`, each window is framed as the tokenizer frames a text (BOS, or CLS .. SEP), within
    `length`. A short text gives fewer windows, which the caller should say; not one is an error.
    """
    _positive(sequences=count, length=length)
    prefix, suffix = frame_of(tokenizer) if special else ([], [])
    inner = _inner(length, prefix, suffix)
    generator = random.Random(seed)
    pieces = list(_pieces(corpus))
    generator.shuffle(pieces)
    found = list(_cut(_tokens(pieces, tokenizer), inner, DRAW * count))
    generator.shuffle(found)
    return _windows(corpus, tokenizer, found[:count], length, (prefix, suffix))


def shortened(full: Windows, tokenizer: PreTrainedTokenizerBase, shortest: int) -> Windows:
    """Framed windows of one length, most of them cut into shorter ones: halves, quarters, down to `shortest`.

    As many tokens of each length, as near as their number allows; of the longest twice as many, as its later
    positions are in no other. Some of one length follow one another, at most `RUN` tokens, then as many of
    another, so that whatever looks at every fourth such run sees all lengths.
    """
    length, (prefix, suffix) = full.input_ids.shape[1], frame_of(tokenizer)
    frame = len(prefix) + len(suffix)
    if shortest < frame + 2:
        raise UsageError(f"shortest: {shortest} leaves no room for text; give at least {frame + 2}")
    turns = _turns(length, shortest)
    if len({*turns}) == 1:
        return full
    # One run in so many judges: there should be as many of each length.
    run = max(1, min(RUN // length, len(full.input_ids) // (HELD_OUT * len(turns))))
    cut = list[list[int]]()
    for i, ids in enumerate(full.input_ids[:, len(prefix) : length - len(suffix)].tolist()):
        wide = turns[_turn(i // run, len(turns))]
        inner = wide - frame
        cut += [ids[a * inner : (a + 1) * inner] for a in range(length // wide)]
    ids, mask, sizes = _laid(tokenizer, cut, length, (prefix, suffix))
    return replace(full, input_ids=ids, mask=mask, text_bytes=sizes)


def _turns(length: int, shortest: int) -> list[int]:
    """The lengths in turn, those far apart after one another, the longest twice."""
    found = [length]
    while found[-1] // 2 >= shortest:
        found.append(found[-1] // 2)
    return [*found[::2], length, *found[1::2]]


def _turn(run: int, count: int) -> int:
    """Whose turn a run is.

    An even number of turns begins one later each round, so that every fourth run has each of them in time.
    """
    return (run + (run // count if count % 2 == 0 else 0)) % count


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
    if not inner:
        raise DataError(
            f"{corpus.name}: too short for one window of {length} tokens; give more text, or a recipe "
            "a shorter length"
        )
    ids, mask, sizes = _laid(tokenizer, inner, length, frame)
    return Windows(
        input_ids=ids,
        mask=mask,
        text_bytes=sizes,
        name=corpus.name,
        sha256=corpus.sha256,
        documents=len(corpus.documents),
        generated=corpus.generated,
        prefix=len(frame[0]),
    )


def _laid(
    tokenizer: PreTrainedTokenizerBase,
    inner: list[list[int]],
    length: int,
    frame: tuple[list[int], list[int]],
) -> tuple[Int64[Tensor, "n length"], Bool[Tensor, "n length"], Int64[Tensor, "n"]]:
    """Windows in their frames, padded, what of them is real, and the bytes that their tokens stand for."""
    prefix, suffix = frame
    filler = 0 if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)  # type: ignore[arg-type]
    ids = torch.full((len(inner), length), filler, dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, window in enumerate(inner):
        framed = torch.tensor([*prefix, *window, *suffix])
        ids[i, : len(framed)], mask[i, : len(framed)] = framed, True
    predicted = [window if prefix else window[1:] for window in inner]
    sizes = [len(_text(tokenizer, window).encode("utf-8", "replace")) for window in predicted]
    return ids, mask, torch.tensor(sizes, dtype=torch.int64)


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
