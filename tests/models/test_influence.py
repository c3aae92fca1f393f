from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pocketsize.models import batches
from pocketsize.models.influence import block_influence
from pocketsize.models.load import load
from pocketsize.models.skeleton import materialise
from tiny import FAMILIES, VOCAB, write_tiny


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_angle_between_hidden_states(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "BATCH_TOKENS", 16)  # so that several batches take turns
    model = load(write_tiny(tmp_path / "m", family))
    ids = torch.randint(5, VOCAB, (3, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[2, 7:] = False
    found = block_influence(model, ids, mask)

    module, states = materialise(model), list[tuple[torch.Tensor, torch.Tensor]]()
    for path in model.blocks:
        module.get_submodule(path).register_forward_hook(
            lambda _, args, options, out: states.append(
                (args[0] if args else options["hidden_states"], out[0] if isinstance(out, tuple) else out)
            ),
            with_kwargs=True,
        )
    with torch.no_grad():
        for row, real in zip(ids, mask, strict=True):  # alone: some families read what stands behind a token
            module(input_ids=row[real][None])
    told = [F.cosine_similarity(x, y, dim=-1)[0] for x, y in states]
    count = len(model.blocks)
    wanted = [1 - float(torch.cat(told[block::count]).mean()) for block in range(count)]
    assert found == pytest.approx(wanted, abs=1e-5)
