"""Hand-made run records: SmolLM2-135M in 4 bits with realistic figures, and variations of it."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

from pocketsize.exporting.artifact import Artifact
from pocketsize.measurement import latency, size
from pocketsize.measurement.measurement import Measurement
from pocketsize.models.model import Origin
from pocketsize.recipes.record import (
    SCHEMA,
    Finding,
    LayerReport,
    Mixture,
    RunRecord,
    SizedLoss,
    SizePart,
    StepReport,
    TextRecord,
    Timing,
)

GGUF = "SmolLM2-135M-Instruct-Q4_1.gguf"
GGUF_BYTES, FOLDER_BYTES = 77_214_816, 117_402_112
METHODS = {
    "kl_mean": "KL(original || compressed), mean over tokens",
    "kl_p99": "KL(original || compressed), 99th percentile over tokens",
    "top1": "tokens where both models put the same token first",
    "perplexity": "exp of the mean negative log-likelihood per token",
    "perplexity_ratio": "perplexity of the original over that of the compressed model",
    "bits_per_byte": "negative log2-likelihood over UTF-8 bytes",
}
ORIGIN = Origin(
    name="SmolLM2-135M-Instruct",
    sha256=hashlib.sha256(b"o").hexdigest(),
    parameters=134_515_008,
    source_bytes=98_400_000,
    bf16_bytes=269_030_016,
    licence="apache-2.0",
    revision="0.1.2",
    dequantized_from="GGUF Q4_1",
)
SHAPES = {
    "self_attn.q_proj": (576, 576, 0.0021),
    "self_attn.k_proj": (192, 576, 0.0017),
    "self_attn.v_proj": (192, 576, 0.0060),
    "self_attn.o_proj": (576, 576, 0.0085),
    "mlp.gate_proj": (1536, 576, 0.0052),
    "mlp.up_proj": (1536, 576, 0.0061),
    "mlp.down_proj": (576, 1536, 0.0098),
}


def digest(text: str) -> str:
    """A SHA-256 that looks like one because it is one."""
    return hashlib.sha256(text.encode()).hexdigest()


def layers(blocks: int = 30, prefix: str = "model.layers") -> tuple[LayerReport, ...]:
    """Every linear of every block; errors vary smoothly with depth and by a hash of the name."""
    made = []
    for i in range(blocks):
        for kind, (rows, columns, base) in SHAPES.items():
            name = f"{prefix}.{i}.{kind}.weight"
            noise = int(digest(name)[:8], 16) / 2**32
            depth = i / max(1, blocks - 1)
            error = base * (0.45 + 1.3 * depth) * (0.8 + 0.5 * noise) * (3.0 if i == 0 else 1.0)
            gain = 0.45 + 0.25 * math.sin(3 * depth + base * 900) ** 2
            made.append(
                LayerReport(name, rows, columns, 4, 4.625, error, error / gain, 0.01, int(noise > 0.995), 0)
            )
    return tuple(made)


def measurements() -> tuple[Measurement, ...]:
    """The quality figures of a language model."""

    return (
        quality("kl_mean", "nats/token", 0.0412, 0.0398, 0.0427),
        quality("kl_p99", "nats/token", 0.381, 0.362, 0.404),
        quality("top1", "share", 0.8973, 0.8921, 0.9022),
        quality("perplexity", "perplexity", 30.778, 27.93, 33.86, "original"),
        quality("perplexity", "perplexity", 32.031, 29.04, 35.31),
        quality("perplexity_ratio", "share", 0.9609, 0.9571, 0.9644),
        quality("bits_per_byte", "bits/byte", 1.0123, 0.983, 1.042, "original"),
        quality("bits_per_byte", "bits/byte", 1.0294, 1.0, 1.059),
        *size.sizes(ORIGIN, {".": FOLDER_BYTES, GGUF: GGUF_BYTES}),
    )


def quality(
    name: str, unit: str, value: float, low: float, high: float, subject: str = "compressed"
) -> Measurement:
    """One quality figure with its interval."""
    better = "higher" if unit == "share" else "lower"
    return Measurement(name, value, unit, better, METHODS[name], subject, samples=32_704, low=low, high=high)


def latencies() -> tuple[Measurement, ...]:
    """The original in torch and the GGUF file in llama.cpp, with threads in the method."""
    torch, cpp = "torch float32, 2 threads, batch 1, ", "llama.cpp (xllamacpp), 2 threads, batch 1, "
    return (
        latency.row("prompt_rate", 412.0, torch + "256 tokens at once, median of 5", "original", 5),
        latency.row("decode_rate", 21.3, torch + "after 256 tokens, median of 64", "original", 64),
        latency.row("decode_p99", 61.2, torch + "99th percentile, median of 64", "original", 64),
        latency.row("prompt_rate", 604.0, cpp + "256 tokens at once, median of, 10 runs", GGUF, 10),
        latency.row("decode_rate", 96.7, cpp + "32 after 256 tokens, median of, 10 runs", GGUF, 10),
        latency.row("decode_p99", 13.9, cpp + "99th percentile of, 10 runs", GGUF, 10),
    )


def artifacts() -> tuple[Artifact, ...]:
    """A folder for transformers and a GGUF file."""
    names = (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    )
    return (
        Artifact(
            ".",
            "folder",
            FOLDER_BYTES,
            {name: digest(name) for name in names},
            ("Logits equal those of the dequantized model in a fresh process (largest difference 2.1e-5).",),
        ),
        Artifact(
            GGUF,
            "gguf",
            GGUF_BYTES,
            {GGUF: digest(GGUF)},
            (
                "All 272 tensors, dequantized by the gguf package, equal the reference.",
                "llama.cpp picks the same token at 98.9 % of 1,024 teacher-forced positions.",
                "Tokenizer in the metadata equals tokenizer.json on 40 probe strings.",
            ),
        ),
    )


def sizes() -> tuple[SizePart, ...]:
    """Where the bytes of both artefacts go."""
    return (
        SizePart(".", "embeddings", 56_623_104, 28_311_552),
        SizePart(".", "linears", 60_626_240, 106_168_320),
        SizePart(".", "rest", 70_272, 35_136),
        SizePart(".", "metadata", 82_496),
        SizePart(GGUF, "embeddings", 17_694_720 - 3_000_000, 28_311_552),
        SizePart(GGUF, "linears", 60_626_240, 106_168_320),
        SizePart(GGUF, "rest", 140_544, 35_136),
        SizePart(GGUF, "metadata", GGUF_BYTES - 14_694_720 - 60_626_240 - 140_544),
    )


def mixture() -> Mixture:
    """Widths that were chosen for 90 MB."""
    curve = tuple(SizedLoss("", 77_000_000 + 1_000_000 * i, 0.13 * 0.7**i) for i in range(12))
    alike = (
        SizedLoss("4-bit blocks, 8-bit embeddings", 88_000_000, 0.09),
        SizedLoss("4-bit", 77_000_000, 0.13),
    )
    return Mixture(SizedLoss("4-bit blocks, 43 linears of other widths", 87_990_000, 0.004), curve, alike)


def smollm2() -> RunRecord:
    """A finished 4-bit run of SmolLM2-135M with both exports."""
    embedding = LayerReport("model.embed_tokens.weight", 49152, 576, 8, 8.5, 0.000031, 0.000031)
    text = TextRecord("calibrate", "pydoc_data topics, 54 of 81", digest("a"), 54, 128, 512, 65_536)
    options: dict[str, object] = {"scheme": "W4A16", "group": 32, "symmetric": False, "embeddings": 8}
    return RunRecord(
        schema=SCHEMA,
        version="0.1.0",
        recipe={
            "model": "sample:smollm2-135m",
            "data": {
                "calibrate": [],
                "evaluate": [],
                "sequences": 128,
                "length": 512,
                "tokens": 32768,
                "seed": 0,
            },
            "steps": [{"gptq": options}],
            "export": ["folder", "gguf"],
        },
        recipe_sha256=digest("recipe"),
        origin=ORIGIN,
        task="generate",
        seed=0,
        machine={
            "cpu": "AMD EPYC 7B13",
            "cores": 2,
            "memory_bytes": 25_769_803_776,
            "avx512_bf16": False,
            "threads": 2,
            "gpu": "",
        },
        versions={"pocketsize": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "gguf": "0.19.0"},
        texts=(
            text,
            replace(
                text,
                role="evaluate",
                name="pydoc_data topics, 27 of 81",
                sha256=digest("b"),
                windows=64,
                tokens=32_768,
            ),
        ),
        protocol=(
            "Non-overlapping windows of 512 tokens; no beginning-of-sequence token is added.",
            "KL is taken from the original to the compressed model, in nats for each token.",
            "Perplexity is the exponential of the mean negative log-likelihood over all predicted tokens.",
        ),
        steps=(StepReport("gptq", options, (*layers(), embedding), 65_536),),
        findings=(
            Finding("little-text", "the calibration text gives 121 windows of 512 tokens, 128 were asked"),
            Finding(
                "damping-raised",
                "the Gram matrix was singular at damping 0.01; 0.02 was used",
                "model.layers.0.mlp.down_proj",
            ),
        ),
        measurements=measurements(),
        sizes=sizes(),
        artifacts=artifacts(),
        behaviour={},
        mixtures=(mixture(),),
        timing=Timing(
            "2026-11-23T21:58:04+00:00",
            {"load": 2.1, "gptq": 171.4, "measure": 64.0},
            402.7,
            2_310_000_000,
            0,
            latencies(),
        ),
    )


def encoder() -> RunRecord:
    """A sentence encoder: one folder, similarity figures, no timings, no findings."""
    method = "512 sentences, mean pooling"
    return replace(
        smollm2(),
        origin=Origin("all-mpnet-base-v2", digest("m"), 109_486_464, 437_967_872, 218_972_928, "apache-2.0"),
        task="embed",
        steps=(StepReport("gptq", {}, layers(12, "encoder.layer"), 65_536),),
        findings=(),
        measurements=(
            Measurement(
                "one_minus_cosine", 0.0031, "", "lower", method, "compressed", low=0.0029, high=0.0033
            ),
            Measurement("spearman", 0.9934, "", "higher", method, "compressed"),
        ),
        sizes=(),
        artifacts=artifacts()[:1],
        timing=Timing(),
    )


def bare() -> RunRecord:
    """A record with nothing in it but what has to be there."""
    return replace(
        encoder(),
        texts=(),
        protocol=(),
        steps=(),
        measurements=(),
        artifacts=(),
        machine={},
        versions={},
        recipe={},
    )
