"""The schemes a goal chooses from, largest first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pocketsize.exporting.table import EXPORTERS, Exporter
from pocketsize.models.model import Model
from pocketsize.quantization.scheme import Scheme
from pocketsize.recipes.quantize import Gptq


@dataclass(frozen=True, slots=True)
class Rung:
    """One choice: the width of the blocks and of embedding and head (None: left alone)."""

    bits: int
    symmetric: bool
    embeddings: int | Literal["same"] | None = None
    embeddings_symmetric: bool = True

    @property
    def name(self) -> str:
        """For people: `4-bit blocks, 8-bit embeddings`."""
        grid = "" if self.symmetric else " with zeros"
        ends = ""
        if self.embeddings == "same":
            ends = ", embeddings alike"
        elif self.embeddings is not None:
            ends = f", {self.embeddings}-bit embeddings" + (
                "" if self.embeddings_symmetric else " with zeros"
            )
        return f"{self.bits}-bit blocks{grid}{ends}"

    @property
    def fineness(self) -> tuple[int, int, bool]:
        """What orders rungs that nobody has measured: width of the blocks, of embedding and head, zeros.

        Not bytes: 4-bit blocks whose embedding is left alone take more than 8-bit ones with one alike.
        """
        ends = self.bits if self.embeddings == "same" else 16 if self.embeddings is None else self.embeddings
        return self.bits, ends, not self.symmetric

    def step(self) -> Gptq:
        """The recipe step of this rung."""
        return Gptq(
            scheme=f"W{self.bits}A16",
            symmetric=self.symmetric,
            embeddings=self.embeddings,
            embeddings_symmetric=self.embeddings_symmetric,
        )


GGUF = (
    Rung(8, True, 8),
    Rung(5, False, 8),
    Rung(5, True, 8),
    Rung(4, False, 8),
    Rung(4, True, 8),
    Rung(4, True, 5, False),
    Rung(4, True, 5),
    Rung(4, True, 4, False),
    Rung(4, True, 4),
)
FOLDER = (
    *(Rung(8, True), Rung(5, False), Rung(4, False), Rung(4, True), Rung(3, False), Rung(2, False)),
    *(Rung(8, True, "same"), *(Rung(bits, False, "same") for bits in (5, 4, 3, 2))),
)


def ladder(model: Model, exports: tuple[str, ...]) -> tuple[Rung, ...]:
    """The rungs that every one of the exports can hold."""
    rungs = GGUF if "gguf" in exports else FOLDER
    alike = not model.arch.dense_on_load
    return tuple(
        rung
        for rung in rungs
        if (rung.symmetric or model.arch.experts is None)
        and (rung.embeddings != "same" or alike)
        and all(_holds(EXPORTERS[name], rung) for name in exports)
    )


def _holds(export: Exporter, rung: Rung) -> bool:
    scheme = Scheme(rung.bits, None, rung.symmetric)
    return export.lacks(scheme) is None and (rung.embeddings != "same" or export.packs_ends)
