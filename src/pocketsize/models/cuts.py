"""Which slices of a family's tensors go together where a model becomes narrower, as data."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache

# Parts of the heads that stock classifiers have: as wide as the model, and with an output for each class.
_AS_WIDE, _CLASSES = ("pre_classifier", "classifier.dense"), ("classifier", "classifier.out_proj", "score")


@dataclass(frozen=True, slots=True)
class Cuts:
    """Which slices of a family go together where its blocks become narrower.

    Matrices are named as in `Arch.groups`, each with its side: `NAME:out` are its outputs, `NAME:in` what it
    reads. `heads` have a slice for each query head, `keys` one for each key and value that queries share
    (empty: every head has its own, which is then among `heads`), `bundles` one for query, key and value of
    each head together, `ffn` one for each inner channel. A side that is named again has as many parts, one
    after the other: heads, then keys, then channels. A set of inner channels ends with the linear that reads
    them; `*` is the number of one of several sets. Every other side of what a block holds is as wide as the
    model; `fixed` names sides that are not. Without `heads`, only inner channels can go.

    Outside the blocks tables have columns as wide as the model; `around` names matrices of which both sides
    are, `per_head` tables with a column for each head of every block, `classes` linears with an output for
    each class. `embedding` is what the config calls the width of an embedding that may be narrower than the
    model: then `narrow` names what is as wide as it, `lifts` what leads to the width of the model, `lowers`
    what leads back.

    `square`: attention is as wide as the model. `inner` is what the config calls the number of inner
    channels. `adds`: what reads heads and channels is added as it is to what passes a block. `norm_first` is
    the key of the config that says whether norms stand before what a block reads, not behind what it adds;
    None: before in causal models, behind in encoders.
    """

    heads: tuple[str, ...]
    ffn: tuple[str, ...]
    keys: tuple[str, ...] = ()
    bundles: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    around: tuple[str, ...] = ()
    per_head: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    embedding: str | None = None
    narrow: tuple[str, ...] = ()
    lifts: tuple[str, ...] = ()
    lowers: tuple[str, ...] = ()
    square: bool = False
    inner: str = "intermediate_size"
    adds: bool = True
    norm_first: str | None = None

    def __post_init__(self) -> None:
        if sum(side.endswith(":in") for side in self.heads) != bool(self.heads):
            raise ValueError("heads need exactly one linear that reads them")
        if not self.ffn or not self.ffn[-1].endswith(":in"):
            raise ValueError("each set of inner channels ends with the linear that reads them")

    def kinds(self, side: str) -> tuple[str, ...]:
        """What the parts of this side of a block's linear have slices for: heads, keys, bundles, ffn, width.

        Empty: it stays as it is.
        """
        return _kinds(self, side)

    def reader_of(self, name: str) -> str:
        """The linear that reads the inner channels which this one gives or reads."""
        return _reader_of(self, name)

    def around_blocks(self, part: str, rank: int, *, narrow: bool) -> tuple[tuple[str, ...], ...]:
        """What each side of a tensor outside the blocks has slices for; `narrow`: the embedding is."""
        wide = ("width",)
        if not self.heads or (narrow and part in self.narrow):
            return ((),) * rank
        if part in self.lifts:
            return (wide, ())[:rank]
        if part in self.classes or part in self.lowers:
            return ((), wide)[:rank]
        if rank == 1 or part in self.around:
            return (wide,) * rank
        return ((), ("head",) if part in self.per_head else wide)

    def behind(self, inside: str) -> Cuts:
        """The same in a classifier, whose encoder has names that begin so.

        Of its head everything but the classes is as wide as the model.
        """

        def put(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(f"{inside}{name}" for name in names)

        return replace(
            self,
            around=(*put(self.around), *_AS_WIDE),
            per_head=put(self.per_head),
            classes=_CLASSES,
            narrow=(*put(self.narrow), *(("score",) if self.lowers else ())),
            lifts=put(self.lifts),
            lowers=put(self.lowers),
        )


@cache
def _kinds(cuts: Cuts, side: str) -> tuple[str, ...]:
    if side in cuts.fixed:
        return ()
    found = [
        kind
        for kind in ("heads", "keys", "bundles", "ffn")
        for one in getattr(cuts, kind)
        if _number(one, side) is not None
    ]
    return tuple(found) or (("width",) if cuts.heads else ())


@cache
def _reader_of(cuts: Cuts, name: str) -> str:
    number = None
    for side in cuts.ffn:
        known, _, end = side.rpartition(":")
        number = _number(known, name) if number is None else number
        if number is not None and end == "in":
            return known.replace("*", number)
    raise ValueError(f"{name} has no inner channels")


def _number(pattern: str, side: str) -> str | None:
    """The number that `*` stands for where a side is so named, "" where the pattern has none."""
    match = re.fullmatch(re.escape(pattern).replace(r"\*", r"(\d+)"), side)
    return None if match is None else "".join(match.groups())
