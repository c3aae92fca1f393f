"""The walk back through the blocks: what torch's own backward pass gives, with one block in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from pocketsize.exporting.behaviour import loaded
from pocketsize.models import backward, batches, calls
from pocketsize.models.backward import Ends, backward_walk
from pocketsize.models.load import load
from pocketsize.models.model import Model
from tiny import GENERATORS, VOCAB, write_tiny


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32, several batches, and instead of tokens drawn by chance the likeliest ones."""
    for module in (backward, calls):
        monkeypatch.setattr(module, "forward_dtype", lambda: torch.float32)
    monkeypatch.setattr(batches, "BATCH_TOKENS", 48)
    monkeypatch.setattr(torch, "multinomial", lambda p, n, generator: p.argmax(-1, keepdim=True))


def tokens(*, padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, VOCAB - 1, (5, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        mask[1::2, 17:] = False
    return ids, mask


def whole(model: Model, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Inputs and gradients at every linear's output, of real tokens, by torch through the whole module."""
    module = loaded(model, model.original)
    found: dict[str, list[torch.Tensor]] = {}
    for name in model.linears:
        linear: nn.Module = module.get_submodule(name.removesuffix(".weight"))

        def note(_: nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor, name: str = name) -> None:
            seen = args[0].detach().view(*mask.shape, -1)[mask]
            out.register_hook(lambda g: found.__setitem__(name, [seen, g.view(*mask.shape, -1)[mask]]))

        linear.register_forward_hook(note)
    embedded = module.get_input_embeddings()(ids).detach().requires_grad_()
    logits = module(inputs_embeds=embedded, attention_mask=mask.long()).logits[mask]
    drawn = logits.argmax(-1, keepdim=True)
    (-logits.log_softmax(-1).gather(-1, drawn).sum()).backward()
    assert embedded.grad is not None
    found["embedded"] = [embedded.grad[mask]]
    return found


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", [f for f in GENERATORS if f not in ("mixtral", "qwen3_moe")])
def test_equals_a_backward_pass_of_the_whole(family: str, padded: bool, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "model", family))
    if padded and model.arch.offset:
        pytest.skip("positions of padded windows are counted by the mask")
    ids, mask = tokens(padded=padded)
    expected, paths = whole(model, ids, mask), []
    for path, seen in backward_walk(model, ids, mask, seed=0):
        paths.append(path)
        if isinstance(seen, Ends):
            scale = float(expected["embedded"][0].abs().max())
            if family not in ("gpt2", "opt"):  # which add positions behind the embedding
                assert torch.allclose(seen.gradient, expected["embedded"][0], atol=1e-4 * scale)
            assert torch.equal(seen.tokens, ids[mask])
            assert sum(map(len, seen.hidden)) == int(mask.sum())
            continue
        for name, one in seen.items():
            for mine, theirs in zip(one.joined(), expected[name], strict=True):
                assert mine.shape == theirs.shape
                assert torch.allclose(mine, theirs, atol=1e-4 * float(theirs.abs().max()), rtol=1e-3), name
    assert paths == [*reversed(model.blocks), "ends"]
