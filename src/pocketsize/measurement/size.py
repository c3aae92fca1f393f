"""Bytes on disk, against the file that was downloaded and against two bytes per parameter."""

from __future__ import annotations

from collections.abc import Mapping

from pocketsize.measurement.measurement import Measurement
from pocketsize.models.model import Origin


def sizes(
    origin: Origin, artifact_bytes: Mapping[str, int], parameters: int | None = None
) -> list[Measurement]:
    """Sizes of the original and of each artefact, by its path; all are counts, so without intervals.

    Bits per weight counts every stored byte (scales, embeddings, head, metadata) over all parameters, of
    artefacts over `parameters` where they are of a model that has other ones than the original.
    """
    own = origin.parameters if parameters is None else parameters
    rows = [
        _bytes("bytes", origin.source_bytes, "weights as downloaded", "original"),
        _bytes("bf16_bytes", origin.bf16_bytes, "two bytes for each parameter", "original", kind="estimated"),
        _bits(origin.parameters, origin.source_bytes, "original"),
    ]
    for path, count in artifact_bytes.items():
        rows += [
            _bytes("bytes", count, "weights file or files on disk", path),
            _ratio(
                "ratio_to_download", origin.source_bytes / count, "downloaded bytes over these bytes", path
            ),
            _ratio("ratio_to_bf16", origin.bf16_bytes / count, "bf16 bytes over these bytes", path),
            _bits(own, count, path),
        ]
    return rows


def _bytes(name: str, count: int, method: str, subject: str, kind: str = "measured") -> Measurement:
    return Measurement(
        name,
        float(count),
        "bytes",
        "lower",
        method,
        subject,
        "estimated" if kind == "estimated" else "measured",
    )


def _ratio(name: str, value: float, method: str, subject: str) -> Measurement:
    return Measurement(name, value, "times", "higher", method, subject)


def _bits(parameters: int, count: int, subject: str) -> Measurement:
    method = "8 x bytes on disk over the model's own parameters"
    return Measurement("bits_per_weight", 8 * count / parameters, "bits", "lower", method, subject)
