"""Tokens that leave a model early: what then stands for the blocks that are left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pocketsize.models.body import body_of
from pocketsize.models.gates import Work, attention_of, head_path
from pocketsize.models.keys import keep_keys
from pocketsize.models.model import Model
from pocketsize.pruning.gate import Gates, Tally, confidence_of, line, mapped

Forward = Callable[..., Any]
LAST_NORM = "norm"


@dataclass(slots=True)
class _Gone:
    """The tokens of one forward pass that have left, what they left with, and what the last block gives."""

    tokens: Bool[Tensor, "b s"]
    frozen: Float[Tensor, "b s n"]
    final: Float[Tensor, "b s n"]
    logits: Tensor | None = None


@dataclass(slots=True)
class Exits:
    """Exits behind some blocks of a module. A token that leaves keeps its state; the blocks behind read it
    for their keys and values alone (CALM, arXiv:2207.07061, section 3.2).
    """

    tally: Tally
    work: Work
    model: Model
    gates: Gates
    gone: _Gone | None = None
    numbers: dict[str, int] = field(default_factory=dict)

    def put_on(self, module: nn.Module, put: Callable[[nn.Module, Forward], None]) -> None:
        """Have the blocks and the head of a module run with exits."""
        blocks, attention = self.model.blocks, cast(str, attention_of(self.model))
        self.numbers = {path: i for i, path in enumerate(blocks)}
        norm, head = _end(module, self.model)
        for path in blocks:
            block = module.get_submodule(path)
            put(block, partial(self._block, path, block, block.forward, (attention, norm, head.forward)))
        put(head, partial(self._head, head.forward))

    def _block(
        self,
        path: str,
        block: nn.Module,
        run: Forward,
        parts: tuple[str, nn.Module, Forward],
        *args: Any,
        **options: Any,
    ) -> Any:
        h = args[0] if args else options["hidden_states"]
        number, last = self.numbers[path], path == self.model.blocks[-1]
        if number == 0:
            self.gone = None
        gone = self.gone
        if gone is not None and bool(gone.tokens.all()):
            own = cast(Any, block)
            keep_keys(block.get_submodule(parts[0]), own.input_layernorm(h), options)
            return gone.final if last else h
        out = run(*args, **options)
        if isinstance(out, tuple):
            out = out[0]
        if gone is not None:
            out = torch.where(gone.tokens[..., None], gone.final if last else gone.frozen, out)
        if path in self.gates.values:
            self._leave(path, h, out, parts[1], parts[2], options)
        return out

    def _leave(
        self, path: str, before: Tensor, h: Tensor, norm: nn.Module, head: Forward, options: dict[str, Any]
    ) -> None:
        """Let those leave that are sure enough behind this block."""
        gone = self.gone
        if gone is None:
            gone = self.gone = _Gone(torch.zeros_like(h[..., 0], dtype=torch.bool), h, h)
        final = exit_state(self.gates, path, h)
        sure, logits = confidence(self.gates, path, before, h, lambda: head(norm(final)))
        asked = ~gone.tokens
        cache, tokens = options.get("past_key_values"), h.shape[1]
        # The cache has these tokens already, but for the blocks behind.
        past = 0 if cache is None else int(cache.get_seq_length(self.numbers[path])) - tokens
        seen = torch.arange(1, tokens + 1, device=h.device) + past
        asked = asked & (seen > 1)  # all later tokens attend to the first: it stays
        leaves = asked & (sure >= float(self.gates.values[path]))
        gone.frozen = torch.where(leaves[..., None], h, gone.frozen)
        gone.final = torch.where(leaves[..., None], final, gone.final)
        gone.tokens = gone.tokens | leaves
        if h.shape[:-1].numel() == 1 and bool(leaves.all()):
            gone.logits = logits
        self._count(path, asked, leaves, seen, reads=logits is not None)

    def _count(self, path: str, asked: Tensor, leaves: Tensor, seen: Tensor, *, reads: bool) -> None:
        """Add what those that leave save, less what asking costs; logits that were read are used again."""
        blocks = self.model.blocks
        cost = exit_cost(self.gates, path, int(self.model.config.hidden_size))
        self.tally.saved_blocks -= cost * int(asked.sum())
        if reads:
            self.tally.saved_head -= self.work.head * int((asked & ~leaves).sum())
        saved = behind(self.work, blocks, self.numbers[path])
        self.tally.saved_blocks += saved * int(leaves.sum())
        left = len(blocks) - 1 - self.numbers[path]
        self.tally.saved_blocks += self.work.attention * left * float((leaves * seen).sum())

    def _head(self, run: Forward, x: Tensor) -> Tensor:
        """The logits; those that let a token leave are not computed again."""
        gone, self.gone = self.gone, None
        return run(x) if gone is None or gone.logits is None else gone.logits


def behind(work: Work, blocks: list[str], number: int) -> int:
    """Operations of the linears behind a block, keys and values excepted: those are always made."""
    every = sum(work.of(path) for path in blocks[number + 1 :])
    ends = (".k_proj", ".v_proj")
    kept = (
        ops for path in blocks[number + 1 :] for name, ops in work.linears.items() if _in(name, path, ends)
    )
    return every - sum(kept)


def _in(name: str, path: str, ends: tuple[str, ...]) -> bool:
    return name.startswith(f"{path}.") and name.endswith(ends)


def exit_cost(gates: Gates, path: str, width: int) -> int:
    """Operations of asking a token whether it leaves, the head not counted."""
    A = gates.maps.get(f"{path}:in")
    return (0 if A is None else 4 * A.numel()) + 2 * width


def exit_state(gates: Gates, path: str, h: Tensor) -> Tensor:
    """What the last block would give, as far as the state behind an earlier one tells."""
    if f"{path}:in" not in gates.maps:
        return h
    A, B, b = (gates.maps[f"{path}:{end}"].to(h) for end in ("in", "out", "bias"))
    return mapped(h, A, B, b)


def confidence(
    gates: Gates, path: str, before: Tensor, h: Tensor, read: Callable[[], Tensor]
) -> tuple[Tensor, Tensor | None]:
    """How sure a token is behind a block, and its logits where those had to be read."""
    if gates.confidence == "saturation":
        return F.cosine_similarity(before.float(), h.float(), dim=-1), None
    if gates.confidence == "probe":
        return line(gates.maps[f"{path}:probe"].to(h), unit(h)), None
    logits = read()
    return confidence_of(cast(str, gates.confidence), logits), logits


def unit(h: Tensor) -> Tensor:
    """A state without its size."""
    return h * h.float().square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt().to(h.dtype)


def _end(module: nn.Module, model: Model) -> tuple[nn.Module, nn.Module]:
    """The last norm and the head."""
    return body_of(module).get_submodule(LAST_NORM), module.get_submodule(head_path(model))
