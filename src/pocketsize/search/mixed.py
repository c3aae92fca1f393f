"""Which width each matrix of a model gets: what each would cost, measured once, and the best for a size."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketsize.errors import UnsupportedError
from pocketsize.exporting.table import EXPORTERS
from pocketsize.measurement.machine import versions
from pocketsize.models.backward import Ends, Seen, backward_walk
from pocketsize.models.device import working_device
from pocketsize.models.model import Model
from pocketsize.quantization.allocate import Allocation, Choice, allocate
from pocketsize.quantization.rtn import rtn
from pocketsize.quantization.scheme import Scheme
from pocketsize.quantization.sensitivity import embedding_cost, head_cost, linear_cost
from pocketsize.recipes.grids import Quantizer, block_scheme, embedding_scheme
from pocketsize.recipes.kept import kept_bytes
from pocketsize.recipes.quantize import Gptq
from pocketsize.recipes.texts import Texts

# Tokens of the calibration text whose gradients are looked at.
TOKENS = 2048
_WIDTHS = (2, 3, 4, 5, 8)

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Table:
    """The KL that each way of storing each matrix costs, nats per token: `losses[name][scheme]`.

    `blocks` are the schemes that linears may have beside each other, `ends` those of embedding and head.
    """

    losses: Mapping[str, Mapping[Scheme, float]]
    blocks: tuple[Scheme, ...]
    ends: tuple[Scheme | None, ...]

    def of_step(self, model: Model, step: Quantizer) -> float:
        """The KL of a resolved step that stores all linears alike, one of those that were measured."""
        block, ends = block_scheme(step), embedding_scheme(step)
        found = [self.losses[name][block] for name in model.linears]
        return sum(found) + sum(self.losses[name][ends] for name in model.ends if ends is not None)


def measured(
    model: Model,
    texts: Texts,
    steps: Sequence[Quantizer],
    exports: tuple[str, ...],
    kept: Path,
    progress: Progress,
) -> Table:
    """The table for the schemes of these resolved steps and all others that the exports can mix.

    It is kept in the folder `kept` and read from there if nothing has changed.
    """
    blocks = tuple(_mixable(model, exports))
    widths = tuple(dict.fromkeys(embedding_scheme(step) for step in steps))
    # Beside linears of several schemes a folder holds embedding and head as they are.
    ends = widths if "folder" not in exports or "gguf" in exports else (None,)
    schemes = tuple(dict.fromkeys([*blocks, *(block_scheme(step) for step in steps)]))
    ids, mask = _few(texts)
    here = (torch.get_num_threads(), str(working_device()), sorted(versions().items()))
    what = (model.origin.sha256, ids.numpy().tobytes(), schemes, widths, *here)
    alone = [end for end in widths if end is not None]

    def measure() -> bytes:
        return _encoded(dict(_measured(model, ids, mask, schemes, alone, progress)))

    losses = _decoded(kept_bytes(kept, "sensitivity", what, "json", measure))
    return Table(losses, blocks, ends)


def best_mixture(
    model: Model, table: Table, exports: tuple[str, ...], budget_bytes: int
) -> tuple[Gptq, Allocation]:
    """The step whose first export has at most so many bytes at the least KL, and the allocation behind it."""
    export = EXPORTERS[exports[0]]
    sized = {s: export.tensor_bytes(model, dict.fromkeys(model.linears, s).get) for s in table.blocks}
    items = [[Choice(sized[s][name], table.losses[name][s]) for s in table.blocks] for name in model.linears]
    around = {s: export.tensor_bytes(model, dict.fromkeys(model.ends, s).get) for s in table.ends}
    items.append([_ends(model, table, around[s], s) for s in table.ends])
    first = {name: table.blocks[0] for name in model.linears} | dict.fromkeys(model.ends, table.ends[0])
    rest = export.predict_bytes(model, first.get) - sum(choices[0].bytes for choices in items)
    while True:
        found = allocate(items, budget_bytes - rest)
        chosen = {name: table.blocks[k] for name, k in zip(model.linears, found.chosen, strict=False)}
        ends = table.ends[found.chosen[-1]]
        whole = export.predict_bytes(model, (chosen | dict.fromkeys(model.ends, ends)).get)
        if whole <= budget_bytes:
            break
        rest += whole - rest - found.bytes  # a header tells where tensors lie, in more or fewer digits
    curve = tuple((size + rest, loss) for size, loss in found.curve)
    return _step(chosen, ends), replace(found, bytes=whole, curve=curve)


def _ends(model: Model, table: Table, sizes: Mapping[str, int], scheme: Scheme | None) -> Choice:
    losses = [0.0 if scheme is None else table.losses[name][scheme] for name in model.ends]
    return Choice(sum(sizes[name] for name in model.ends), sum(losses))


def _step(chosen: Mapping[str, Scheme], ends: Scheme | None) -> Gptq:
    """The step with the commonest scheme, the others as overrides by name."""
    schemes = list(chosen.values())
    base = max(dict.fromkeys(schemes), key=schemes.count)
    overrides = {n.removesuffix(".weight"): _grid(s) for n, s in chosen.items() if s != base}
    return Gptq(
        **_grid(base),
        embeddings=None if ends is None else ends.bits,
        embeddings_symmetric=True if ends is None else ends.symmetric,
        overrides=overrides,
    )


def _grid(scheme: Scheme) -> dict[str, Any]:
    """A scheme as the keys of a step or an override."""
    keys = {key: value for key, value in scheme.facts().items() if key != "bits"}
    return {"scheme": scheme.name, **keys}


def _mixable(model: Model, exports: tuple[str, ...]) -> Iterator[Scheme]:
    """The schemes that linears of one model may have beside each other in these exports."""
    for bits in _WIDTHS:
        for symmetric in (True, False):
            step = Gptq(f"W{bits}A16", symmetric=symmetric)
            # A folder holds several schemes only if none has zeros.
            if not symmetric and "folder" in exports:
                continue
            try:
                yield block_scheme(step.resolve(model, exports))
            except UnsupportedError:
                continue


def _few(texts: Texts) -> tuple[Tensor, Tensor]:
    ids, mask = texts.calibrate.input_ids, texts.calibrate.mask
    count = max(1, TOKENS // ids.shape[1])
    return ids[:count], mask[:count]


def _measured(
    model: Model,
    ids: Tensor,
    mask: Tensor,
    schemes: Sequence[Scheme],
    ends: Sequence[Scheme],
    progress: Progress,
) -> Iterator[tuple[str, dict[Scheme, float]]]:
    """The losses of every matrix, block by block from the last."""
    total = len(model.blocks) + 1
    for done, (path, seen) in enumerate(backward_walk(model, ids, mask, seed=0)):
        if isinstance(seen, Ends):
            for name in model.ends:
                yield name, {scheme: _end_cost(model, name, seen, scheme) for scheme in ends}
        else:
            for name, one in seen.items():
                yield name, _linear_costs(model, name, one, schemes)
        progress(done + 1, total, path)


def _linear_costs(model: Model, name: str, seen: Seen, schemes: Sequence[Scheme]) -> dict[Scheme, float]:
    X, G = seen.joined()
    W, weight = model.matrix(name).to(X.device), X.float().square().mean(0)
    changes = {scheme: rtn(W, scheme, weight=weight).dequantize() - W for scheme in schemes}
    return {scheme: linear_cost(X, G, change) for scheme, change in changes.items()}


def _end_cost(model: Model, name: str, seen: Ends, scheme: Scheme) -> float:
    """What storing the embedding or the head so costs: where it is looked up, where it predicts, or both."""
    W = model.original(name).to(seen.gradient.device)
    rows = torch.cat(list(seen.hidden)).float().square().mean(0)
    change = rtn(W, scheme, weight=rows).dequantize() - W
    cost = 0.0
    if name == model.arch.embedding:
        cost += embedding_cost(seen.tokens, seen.gradient, change)
    if name == model.arch.head or model.tied:
        cost += head_cost(seen.hidden, W, change)
    return cost


def _encoded(losses: Mapping[str, Mapping[Scheme, float]]) -> bytes:
    plain = {
        name: [[scheme.facts(), loss] for scheme, loss in found.items()] for name, found in losses.items()
    }
    return json.dumps(plain).encode()


def _decoded(data: bytes) -> dict[str, dict[Scheme, float]]:
    plain = json.loads(data)
    return {name: {Scheme(**scheme): loss for scheme, loss in found} for name, found in plain.items()}
