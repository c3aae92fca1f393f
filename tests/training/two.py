"""One of the processes of a training that two share: `two.py OUT [sharded]`, started by torchrun's variables.

Sharded, the training is stopped after its third step and begun again from what was kept.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from pocketsize.distributed.shards import is_spread, spread
from pocketsize.distributed.world import Solo, World, together
from pocketsize.errors import Stopped
from pocketsize.training.examples import Order
from pocketsize.training.loop import Course, Pace, train
from training.test_loop import EXAMPLES, Memory, Regression, model, weights

# Gradients are cut down in most of the steps.
PACE = Pace(steps=6, accumulate=4, peak=1e-2, seed=3, average=0.5, clip=0.05)


def main() -> None:
    with together() as world:
        found = sharded(world) if sys.argv[2:] == ["sharded"] else taught(world, Memory(), Solo())
        if world.rank == 0:
            torch.save(found, sys.argv[1])


def sharded(world: World) -> dict[str, Any]:
    keeper = Memory(stop_at=3)
    with suppress(Stopped):
        taught(world, keeper, world)
    assert world.rank or (keeper.saves == 1 and not any(map(is_spread, keeper.kept[0].values())))
    keeper.stop_at = 10**9
    return taught(world, keeper, world)


def taught(world: World, keeper: Memory, over: World) -> dict[str, Any]:
    module = model()
    with spread(module, ["0"], over):
        course = learned(module, keeper, world)
    return {"weights": weights(module), "losses": course.losses, "step": course.step}


def learned(module: torch.nn.Module, keeper: Memory, world: World) -> Course:
    batches = Order(EXAMPLES, 3, seed=1).batch
    return train(module, Regression(module), batches, PACE, keeper, world=world)


if __name__ == "__main__":
    main()
