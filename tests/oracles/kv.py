"""A cache of keys and values that is decoded one token at a time, kept as lists."""

from __future__ import annotations

import math

import gguf
import numpy as np

QUANTS = {name: gguf.GGMLQuantizationType[name.upper()] for name in ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1")}
NONLINEAR = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]


def block_slow(x, kind):
    """One row of entries as the `gguf` package stores it, or IQ4_NL entry by entry."""
    if kind in QUANTS:
        packed = gguf.quants.quantize(np.asarray(x, np.float32)[None], QUANTS[kind])
        return gguf.quants.dequantize(packed, QUANTS[kind])[0]
    out = []
    for a in range(0, len(x), 32):
        block = [float(v) for v in x[a : a + 32]]
        peak = max(block, key=abs)
        nearest = [min(NONLINEAR, key=lambda v, w=w: abs(v - w * -127 / peak)) for w in block]
        top = sum(w**3 * v for w, v in zip(block, nearest, strict=True))
        scale = np.float16(top / sum(w**2 * v**2 for w, v in zip(block, nearest, strict=True)))
        out += [float(scale) * v for v in nearest]
    return np.array(out)


def affine_slow(x, bits):
    """One group on an asymmetric grid with float16 scale and minimum."""
    least = float(np.float16(min(x)))
    scale = float(np.float16((max(x) - min(x)) / (2**bits - 1)))
    return [least + scale * min(max(round((v - least) / scale), 0), 2**bits - 1) for v in x]


def attended(q, keys, values, scale):
    scores = [math.exp(scale * float(np.dot(q, k))) for k in keys]
    return sum(s * np.asarray(v) for s, v in zip(scores, values, strict=True)) / sum(scores)


def decode_kivi(Q, K, V, *, bits, group, residual, sink, scale):
    """One head, token by token, as KIVI does: attend to what is stored and to oneself, then round."""
    keys, values, out = [], [], []
    waiting, latest = [], []  # full-precision keys of the residual window; places of such values
    for t, (q, k, v) in enumerate(zip(Q, K, V, strict=True)):
        keys.append(k)
        values.append(v)
        out.append(attended(q, keys, values, scale))
        if t < sink:
            continue
        waiting.append(t)
        latest.append(t)
        if len(waiting) == residual:
            for a in range(0, residual, group):
                places = waiting[a : a + group]
                channels = [affine_slow([K[p][c] for p in places], bits[0]) for c in range(len(k))]
                for i, place in enumerate(places):
                    keys[place] = np.array([channel[i] for channel in channels])
            waiting = []
        if len(latest) > residual:
            place = latest.pop(0)
            row = [affine_slow(V[place][a : a + group], bits[1]) for a in range(0, len(v), group)]
            values[place] = np.concatenate(row)
    return np.array(out)


def decode_blockwise(Q, K, V, *, kinds, rotation, scale):
    """One head, token by token, as llama.cpp does: rotate, store rounded, attend to all that is stored."""
    keys, values, out = [], [], []
    turn = rotation if rotation is not None else np.eye(len(K[0]))
    for q, k, v in zip(Q, K, V, strict=True):
        keys.append(block_slow(turn @ k, kinds[0]))
        values.append(block_slow(turn @ v, kinds[1]))
        out.append(turn.T @ attended(block_slow(turn @ q, "q8_0"), keys, values, scale))
    return np.array(out)
