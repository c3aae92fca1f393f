"""One of the processes of a training that two share: `two.py OUT`, started by torchrun's variables."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from pocketsize.distributed.world import together
from pocketsize.training.examples import Order
from pocketsize.training.loop import Pace, train
from training.test_loop import EXAMPLES, Memory, Regression, model, weights

PACE = Pace(steps=6, accumulate=4, peak=1e-2, seed=3)


def main() -> None:
    with together() as world:
        module = model()
        course = train(
            module, Regression(module), Order(EXAMPLES, 3, seed=1).batch, PACE, Memory(), world=world
        )
        if world.rank == 0:
            torch.save({"weights": weights(module), "losses": course.losses}, sys.argv[1])


if __name__ == "__main__":
    main()
