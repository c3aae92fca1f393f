"""How long each stage of a run takes, told from a rehearsal of one block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pocketsize.data.written import BATCH as WRITERS
from pocketsize.measurement.runtime import RUNS
from pocketsize.measurement.suite import PROMPT
from pocketsize.models.batches import BATCH_TOKENS, HELD_OUT
from pocketsize.models.model import Model
from pocketsize.recipes.disk import Written
from pocketsize.recipes.memory import Size
from pocketsize.recipes.oats import Oats
from pocketsize.recipes.prune import Prune
from pocketsize.recipes.quantize import corrects, drifts, stages_of, steps_learned
from pocketsize.recipes.recipe import Recipe
from pocketsize.recipes.rehearse import WRITTEN, Rehearsal, Spent
from pocketsize.recipes.stages import JUDGES

# Reading a GGUF back asks llama.cpp for 32 tokens after each of 32 prompts; its speed, for 32 tokens.
QUESTIONS, DECODED = 32 * 32, 32
# Where a block is learned a batch passes it three times, one in four twice more to judge.
LEARNED = 3.5
# Where the original runs beside a batch passes a block twice, and cross moments are not symmetric.
DRIFTED = 2.5


@dataclass(frozen=True, slots=True)
class Took:
    """The time of a stage: CPU seconds of all threads and processes, and seconds by the clock."""

    name: str
    cpu_s: float
    time_s: float


@dataclass(frozen=True, slots=True)
class Whole:
    """What the time of a run depends on, beyond what was rehearsed."""

    model: Model
    recipe: Recipe
    size: Size
    disk: Written
    original: Model

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return len(self.model.blocks)

    @property
    def originals(self) -> float:
        """How many blocks of the model as it will be are as much work as those that the original has."""
        one = self.model.linear_parameters
        return self.blocks * self.original.linear_parameters / one if one else float(self.blocks)


def durations(whole: Whole, one: Rehearsal) -> list[Took]:
    """The stages that follow the loading, in running order."""
    ways = {"write": _writing, "gptq": _gptq, "awq": _gptq, "rtn": _unseen, "hqq": _unseen}
    ways |= {"smoothquant": _gptq, "measure": _measuring, "export": _exporting}
    ways |= {"prune": _pruning, "oats": _pruning}
    found: list[Took] = []
    for name, spent in one.stages.items():
        cpu = ways.get(name, _latency)(whole, one, spent)
        # Waiting and threads: by the clock a stage takes as much more or less as it did in the rehearsal.
        found.append(Took(name, cpu, cpu * spent.wall_s / max(spent.cpu_s, 1e-9)))
    return found


def _writing(whole: Whole, one: Rehearsal, spent: Spent) -> float:
    """A token takes the block longer the more stand before it: a straight line through both halves."""
    count, length = whole.size.written, whole.size.length
    half = len(one.calls) // 2
    early, late = (sum(part) / len(part) for part in (one.calls[1:half], one.calls[half:]))
    slope = max(0.0, (late - early) / (len(one.calls) / 2))
    mean = early + slope * (length / 2 - half / 2)
    rest = (spent.cpu_s - spent.block_s) / WRITTEN
    return length * (whole.blocks * mean + rest) * max(1.0, count / WRITERS)


def _gptq(whole: Whole, one: Rehearsal, spent: Spent) -> float:
    """All blocks once for each stage; where there are several each is then measured on a few windows.

    With too little text for windows that judge there is one stage, and one unit for each block.
    """
    step = next((step for step in whole.recipe.steps if stages_of(step) > 1), None)
    if step is None or len(spent.units) < stages_of(step):
        return _walked(whole, one, spent.units, one.batch_s)
    passes = [1.0, *[DRIFTED if drifts(step) else 1.0] * corrects(step)]
    passes += [LEARNED] * (steps_learned(step) > 0)
    size, measured = len(spent.units) // len(passes), one.stages["measure"]
    judges = min(JUDGES * whole.size.length, whole.size.tokens / HELD_OUT) / one.evaluated_tokens
    total = len(passes) * judges * (measured.cpu_s + (whole.blocks - 1) * measured.block_s)
    start = 0.0
    for number, times in enumerate(passes):
        units = spent.units[number * size : (number + 1) * size]
        total += _walked(whole, one, [unit - start for unit in units], times * one.batch_s)
        start = units[-1] + measured.cpu_s  # in a rehearsal about as many windows judge as are measured
    return total


def _walked(whole: Whole, one: Rehearsal, units: Sequence[float], passes: float) -> float:
    """Batches through every block, the quantization of every block, and embedding and head once."""
    batches = max(1.0, whole.size.tokens / BATCH_TOKENS)
    first, last = units[0], units[-1]
    around = max(0.0, one.walk_s - one.batches * one.batch_s)
    quantized = max(0.0, first - around - one.batches * passes)
    return around + whole.blocks * (batches * passes + quantized) + last - first


def _pruning(whole: Whole, one: Rehearsal, spent: Spent) -> float:
    """All blocks once; with what they are learned by, if they are."""
    step = next(step for step in whole.recipe.steps if isinstance(step, Prune | Oats))
    if not step.calibrated:
        return _unseen(whole, one, spent)
    passes = LEARNED if step.learn else DRIFTED if step.drift else 1.0
    return _walked(whole, one, spent.units, passes * one.batch_s)


def _unseen(whole: Whole, one: Rehearsal, spent: Spent) -> float:
    """Steps that read no text: every block, and embedding and head once."""
    first, last = spent.units[0], spent.units[-1]
    return whole.blocks * first + last - first


def _measuring(whole: Whole, one: Rehearsal, spent: Spent) -> float:
    """Generators read so many tokens, encoders the same sentences each time; the original reads them too."""
    more = whole.size.evaluated / one.evaluated_tokens if whole.model.arch.task == "generate" else 1.0
    each = (whole.blocks + whole.originals) / 2  # one block stood for both models
    return more * (spent.cpu_s + (each - 1) * spent.block_s)


def _exporting(whole: Whole, one: Rehearsal, spent: Spent) -> float:
    """Questions to llama.cpp, the block's forward passes, and what each parameter takes to go through."""
    asked = after = 0.0
    if one.file is not None:
        asked = QUESTIONS * one.file.question_s
        after = asked + QUESTIONS * one.file.token_s * (_larger(whole, one) - 1)
    own = max(0.0, spent.cpu_s - spent.child_s - spent.block_s - asked)
    more = whole.model.origin.parameters / one.parameters
    return spent.child_s + whole.blocks * spent.block_s + after + more * own


def _latency(whole: Whole, one: Rehearsal, spent: Spent) -> float:
    torch = spent.cpu_s + (whole.originals - 1) * spent.block_s  # of the original
    if one.file is None:
        return torch
    prompt = PROMPT * one.file.prompt_s * (whole.blocks - 1)
    return torch + (RUNS + 1) * (prompt + DECODED * one.file.token_s * (_larger(whole, one) - 1))


def _larger(whole: Whole, one: Rehearsal) -> float:
    """How many times larger the GGUF is than that of one block."""
    assert one.file is not None
    return next(e.bytes for e in whole.disk.exports if e.format == "gguf") / one.file.bytes
