"""Two processes train as one would."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from pocketsize.distributed import world
from pocketsize.distributed.world import Processes, Solo, together
from pocketsize.errors import UsageError
from pocketsize.training.examples import Order
from pocketsize.training.loop import Pace, train
from tiny import write_texts, write_tiny
from training.test_loop import EXAMPLES, Memory, Regression, model, weights
from training.two import PACE

TESTS = Path(__file__).parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port")


def run(port: int, *words: str, env: dict[str, str]) -> None:
    call = [sys.executable, *TORCHRUN, str(port), *words]
    done = subprocess.run(call, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("how", [[], ["sharded"]])
def test_two_processes_have_the_losses_and_weights_of_one(
    how: list[str], tmp_path: Path, source_env: dict[str, str]
) -> None:
    env = source_env | {"PYTHONPATH": f"{source_env['PYTHONPATH']}:{TESTS}"}
    run(29531 + 2 * len(how), str(TESTS / "training" / "two.py"), str(tmp_path / "out.pt"), *how, env=env)
    both = torch.load(tmp_path / "out.pt", weights_only=True)
    module = model()
    course = train(module, Regression(module), Order(EXAMPLES, 3, seed=1).batch, PACE, Memory())
    assert torch.allclose(both["weights"], weights(module), atol=1e-6)
    assert both["step"] == course.step
    ours, theirs = ([loss for _, loss in losses] for losses in (both["losses"], course.losses))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_a_recipe_runs_under_torchrun(tmp_path: Path, source_env: dict[str, str]) -> None:
    source = write_tiny(tmp_path / "m", "llama")
    calibrate, evaluate = write_texts(tmp_path)
    lesson = {"tokens": 2000, "batch": 4, "length": 32, "rate": 1e-3, "accumulate": 2, "precision": "fp32"}
    recipe = {
        "model": str(source),
        "data": {"calibrate": calibrate, "evaluate": evaluate, "sequences": 4, "length": 32, "tokens": 256},
        "steps": [
            {"layers": {"keep": 1, "pick": "influence"}},
            {"distill": lesson | {"sharded": True, "hidden": 1.0, "progressive": 0.5}},
            {"finetune": lesson | {"sharded": True, "lora": 4, "recompute": True, "patience": 9}},
            {"gradual": lesson | {"pattern": "2:4", "method": "rigl", "begin": 0.0, "every": 2}},
            {"rtn": {}},
        ],
        "export": ["folder"],
    }
    recipe["data"]["written"] = 0.0  # type: ignore[index]
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    words = ("-m", "pocketsize.cli.main", "run", str(tmp_path / "r.yaml"), "-o")
    run(29532, *words, str(tmp_path / "two"), env=source_env)
    subprocess.run(
        [sys.executable, *words, str(tmp_path / "one")], env=source_env, check=True, capture_output=True
    )
    one, two = (json.loads((tmp_path / n / "record.json").read_text())["steps"] for n in ("one", "two"))
    # Of gradients that are all but equal another one may be the largest: masks differ in few weights.
    for number, near in ((1, 1e-4), (2, 1e-4), (3, 0.02)):
        ours, theirs = (steps[number]["training"]["losses"] for steps in (one, two))
        assert len(ours) == len(theirs) > 5
        for (step, loss), (other, same) in zip(ours, theirs, strict=True):
            assert step == other and loss == pytest.approx(same, rel=near)
    assert one[3]["training"]["zeros"] == two[3]["training"]["zeros"]
    assert not (tmp_path / ".two.work").exists()


def test_a_tensor_is_waited_for_until_nobody_else_holds_it() -> None:
    tensor, holder, let_go = torch.ones(3), torch.nn.Parameter(torch.zeros(3)), []

    def release() -> None:
        time.sleep(0.05)
        let_go.append(time.monotonic())
        holder.grad = None

    def collective(T: torch.Tensor) -> None:
        holder.grad = T
        threading.Thread(target=release).start()

    world._carried(collective, tensor)
    assert let_go and holder.grad is None


def test_a_tensor_that_is_never_let_go_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = world.HELD_S
    monkeypatch.setattr(world, "HELD_S", 0.02)
    tensor, holder = torch.ones(3), torch.nn.Parameter(torch.zeros(3))
    begun = time.monotonic()
    world._carried(lambda T: setattr(holder, "grad", T), tensor)
    assert 0.02 <= time.monotonic() - begun < whole


def test_batches_that_cannot_be_shared_are_refused() -> None:
    module = model()
    with pytest.raises(UsageError, match="must be a multiple of 2, got 3"):
        train(
            module,
            Regression(module),
            Order(EXAMPLES, 3, seed=1).batch,
            Pace(steps=1, accumulate=3),
            Memory(),
            world=Processes(0, 2),
        )


def test_one_process_is_a_world_of_its_own() -> None:
    with together() as world:
        assert world == Solo() and world.told("x") == "x"
