"""How much memory each stage of a run takes at its peak, told from shapes before it starts.

Tensors are counted one by one: what a stage holds at once, by the code of that stage. What it leaves in the
heap is given back as it ends, so a stage's peak is what the process holds for good and these tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import torch

from pocketsize.io.checkpoint import DTYPES
from pocketsize.measurement.embedding import BATCH, SENTENCES
from pocketsize.measurement.gated import LOGITS as GATED_LOGITS
from pocketsize.measurement.suite import has_room
from pocketsize.measurement.tokens import LOGITS, STATES
from pocketsize.models.batches import BATCH_TOKENS
from pocketsize.models.dtype import forward_dtype
from pocketsize.models.model import Model
from pocketsize.models.taps import asked_of
from pocketsize.recipes.body import Layers
from pocketsize.recipes.distill import Distill
from pocketsize.recipes.gate import WINDOWS as GATED
from pocketsize.recipes.gate import Gate
from pocketsize.recipes.gradual import for_zeros
from pocketsize.recipes.grids import Quantizer
from pocketsize.recipes.heal import WINDOWS as HEALED
from pocketsize.recipes.oats import Oats
from pocketsize.recipes.prune import Prune
from pocketsize.recipes.qat import Qat, learned_numbers
from pocketsize.recipes.quantize import drifts, steps_learned
from pocketsize.recipes.recipe import Recipe
from pocketsize.recipes.rotate import Rotate
from pocketsize.recipes.shares import TOKENS as SCORED
from pocketsize.recipes.stored import rounds
from pocketsize.recipes.student import TOKENS, Student
from pocketsize.recipes.training import Training
from pocketsize.training.head import LOGITS as CHUNK

# What a stage brings besides tensors: pages of libraries it is the first to run, scratch of kernels.
CODE, SCRATCH = 25_000_000, 60_000_000
# Python with torch, transformers and compressed-tensors, as the process that loads a folder has it.
CHILD = 430_000_000
# Tokens of a long sentence that an encoder is measured on, and of a text that is read back.
SENTENCE_TOKENS, PROBE = 128, 16


@dataclass(frozen=True, slots=True)
class Stage:
    """The peak of one stage: of the run's own process, of the one it starts, and of both at once."""

    name: str
    ram_bytes: int
    child_bytes: int
    together_bytes: int


@dataclass(frozen=True, slots=True)
class Size:
    """How much text a run reads: windows, those the model writes, their length; tokens judged."""

    windows: int
    written: int
    length: int
    evaluated: int

    @property
    def tokens(self) -> int:
        """Tokens that calibrate."""
        return self.windows * self.length

    def with_windows(self, windows: int) -> Size:
        """So many windows, of which the model writes the same share."""
        return replace(
            self, windows=windows, written=min(self.written, windows * self.written // self.windows)
        )


@dataclass(slots=True)
class _Process:
    """The process as stages come and go: what it holds for good, and the peak of each stage."""

    base: float
    stages: list[Stage] = field(default_factory=list)

    def stage(self, name: str, moments: Iterable[Sequence[float]], *, child: float = 0) -> None:
        """A stage that holds these tensors at once, at each of its moments."""
        self.base += CODE
        peak = self.base + max((sum(tensors) for tensors in moments), default=0.0)
        # The child has ended before the process loads the model itself.
        together = max(peak, self.base + child)
        self.stages.append(Stage(name, round(peak), round(child), round(together)))


def stages(model: Model, recipe: Recipe, size: Size, *, base_bytes: int, waiting: float) -> list[Stage]:
    """The peaks of all stages of a resolved recipe, in running order.

    `base_bytes` is what the process holds once model and texts are read, `waiting` the bytes that each
    token of a waiting batch holds (`waiting_bytes`).
    """
    process = _Process(base_bytes)
    calibrated = any(step.calibrated for step in recipe.steps)
    if calibrated and size.written:
        process.stage("write", _writing(model, size))
    original, teacher = model, model
    for step in recipe.steps:
        if isinstance(step, Qat):
            process.stage(
                step.kind, chain(_walked(model, step.first, size, waiting), _training(model, model, step))
            )
        elif isinstance(step, Training):
            process.stage(step.kind, _training(teacher, model, step))
        elif isinstance(step, Quantizer) and step.calibrated:
            process.stage(step.kind, _walked(model, step, size, waiting))
        elif isinstance(step, Quantizer):
            process.stage(step.kind, _rtn(model, step))
        elif isinstance(step, Prune | Oats):
            process.stage(step.kind, _pruned(model, step, size, waiting))
        elif isinstance(step, Student):
            process.stage(step.kind, chain(_cut(model, step), _healed(model, step, size, waiting)))
        elif isinstance(step, Layers):
            process.stage(step.kind, chain(_looked_at(model), _healed(model, step, size, waiting)))
        elif isinstance(step, Gate):
            process.stage(step.kind, _backward(model, size.tokens, GATED * size.length))
        elif isinstance(step, Rotate):
            process.stage(step.kind, _turned(model, step))
        first, model = model is teacher, step.outline(model)
        teacher = model if first and isinstance(step, Rotate) else teacher
    gates = _with_gates(model) if any(isinstance(step, Gate) for step in recipe.steps) else ()
    process.stage("measure", chain(_measuring(original, recipe, size, waiting), gates))
    child = CHILD + sum(_all(model, 4)) + _largest(model) if "folder" in recipe.export else 0
    process.stage("export", _exporting(model, recipe), child=child)
    timed = _all(model, 4) if has_room(model) else []  # what has no room is not timed
    process.stage("latency", [[*timed, _stored(model, recipe), SCRATCH]])
    return process.stages


def needed_bytes(found: Iterable[Stage]) -> int:
    """The most that is held at once, a child's memory included."""
    return max(stage.together_bytes for stage in found)


def fewer_windows(needed: Callable[[int], int], windows: int, room_bytes: int) -> int:
    """The most windows with which what is `needed` for them fits; 0 if not even one does."""
    if needed(1) > room_bytes:
        return 0
    least, most = 1, windows
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if needed(middle) <= room_bytes else (least, middle)
    return least


def _writing(model: Model, size: Size) -> Iterator[list[float]]:
    """The whole model in the forward type, keys and values of every window, and logits."""
    width, held = forward_dtype().itemsize, min(size.written, 64)
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    keys = held * size.length * heads * model.head_width * width
    cache: list[float] = [keys] * (2 * len(model.blocks))
    logits = held * config.vocab_size * (width + 8)
    yield [*_all(model, width), *cache, logits, SCRATCH]
    yield _reading(model, width)


def _turned(model: Model, step: Rotate) -> Iterator[list[float]]:
    """A tensor before and after; a rotation, and what it is made of in float64."""
    order = int(model.config.hidden_size) if step.residual else model.head_width
    yield [*[_largest(model)] * 3, *[8.0 * order**2] * 4, SCRATCH]


def _walked(model: Model, step: Quantizer, size: Size, waiting: float) -> Iterator[list[float]]:
    """The walk: the embedding as the first batches are made, every site, and the head."""
    width = forward_dtype().itemsize
    states = size.tokens * model.config.hidden_size * width
    yield [states, *_reading(model, width)]
    block = sum(_numbers(model, name) for name in model.linears_of(model.blocks[0])) * width
    running = 2 * min(BATCH_TOKENS, size.tokens) * waiting + SCRATCH
    waits: list[float] = [states, max(0.0, size.tokens * waiting - states), running, block, block]
    waits += [states] * bool(steps_learned(step) or drifts(step))  # of the original, which runs beside
    if steps_learned(step):
        yield [states, states, block, block, *_learned(model), 2 * running]
    waits += _read(model, size) if drifts(step) else []
    for group in model.groups:
        names = [f"{model.blocks[0]}.{name}.weight" for name in group.names]
        shapes = [model.matrix_shape(name) for name in names]
        rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
        square, matrix = 4.0 * columns**2, 4.0 * rows * columns
        # What judges scales, and the rest without it; what linears lack, what is read beside it, and means.
        held = 2 * step.moves + (8 if group.attends else 4) * drifts(step)
        tried = [4.0 * step.sampled * columns] * 6  # tokens, as scales are tried on them
        yield [
            *waits,
            *tried,
            *[square] * (held + (8 if group.attends else 6)),
            *[matrix] * (2 + (len(names) > 1)),
        ]
        matrices = 5 + (len(names) > 1) + drifts(step)
        yield [*waits, *[square] * (held + (5 if group.attends else 3)), *[matrix] * matrices]
    if step.embeddings is not None:
        ends = 4.0 * _numbers(model, model.arch.embedding)
        head = 0 if model.arch.head is None else 1  # its weights are read twice
        yield [*[ends] * (4 + head), ends, SCRATCH]


def _read(model: Model, size: Size) -> list[float]:
    """What is kept of all tokens of an original's block, for each site in turn."""
    return [size.tokens * width * forward_dtype().itemsize for width, _ in asked_of(model, model.blocks[0])]


def _pruned(model: Model, step: Prune | Oats, size: Size, waiting: float) -> Iterator[list[float]]:
    """The walk, and at each site what ALPS holds; scores of all weights where gradients give them."""
    width = forward_dtype().itemsize
    states = size.tokens * model.config.hidden_size * width
    block = sum(_numbers(model, name) for name in model.linears_of(model.blocks[0]))
    asked = (step.score, step.allocation)
    for own in [4.0 * block * len(model.blocks)] * ("taylor" in asked), [4.0 * block] * ("searched" in asked):
        yield from ([*own, *held] for held in _backward(model, size.tokens, SCORED) if own)
    if not step.calibrated:
        yield [4.0 * _largest(model)] * 4
        return
    running = 2 * min(BATCH_TOKENS, size.tokens) * waiting + SCRATCH
    waits: list[float] = [states, max(0.0, size.tokens * waiting - states), running, block * width]
    waits += [*[states] * bool(step.learn or step.drift), *[4.0 * block] * (5 if step.learn else 1)]
    waits += _read(model, size) * (step.drift > 0)
    for group in model.groups:
        names = [f"{model.blocks[0]}.{name}.weight" for name in group.names]
        shapes = [model.matrix_shape(name) for name in names]
        rows, most, columns = sum(s[0] for s in shapes), max(s[0] for s in shapes), shapes[0][1]
        squares = [4.0 * columns**2] * (7 + (8 if group.attends else 4) * (step.drift > 0))
        yield [*waits, *squares, *[4.0 * most * columns] * 9, *[4.0 * rows * columns] * 3]


def _learned(model: Model) -> list[float]:
    """Each linear of a block while it is learned: places, means and squares, and what a step makes of it."""
    sizes = [4.0 * _numbers(model, name) for name in model.linears_of(model.blocks[0])]
    return [*[size for size in sizes for _ in range(4)], *[max(sizes)] * 3]


def _training(teacher: Model, student: Model, step: Training) -> Iterator[list[float]]:
    """A teacher, the student, and of what learns gradients, two moments and averages, in float32;
    activations of a batch, roughly; and one chunk of logits of both with what is made of them."""
    copies = 3 + (step.average is not None) + (step.patience > 0)  # beside the weights
    teachers = _all(teacher, 4) if isinstance(step, Distill | Qat) else []
    linears = len(student.linears)  # none in families that are trained and nothing else
    zeros = [for_zeros(step, student)[0] / linears] * linears if linears else []
    tokens, width = step.batch * step.length, int(student.config.hidden_size)
    # Per token and block: inputs of the linears, what attention and activation functions keep.
    inner = getattr(student.config, "intermediate_size", None) or 4 * width
    kept = 4 * tokens * (8 * width + 4 * inner) * (1 if step.recompute else len(student.blocks))
    count = learned_numbers(step, student)
    learned = _all(student, 4) if count == student.origin.parameters else [4.0 * count / 2] * 2
    kept += 4 * _numbers(student, student.ends[-1]) * (getattr(step, "exits", None) is not None)
    yield [*teachers, *_all(student, 4), *(learned * copies), *zeros, kept, *[4.0 * CHUNK] * 6, SCRATCH]


def _cut(model: Model, step: Student) -> Iterator[list[float]]:
    """What lies around the blocks and one block, as the text passes; then a tensor at a time, or all."""
    if step.family is not None:
        made = [12.0 * model.config.vocab_size * model.config.hidden_size] * 3  # of each token
        if step.start == TOKENS:
            yield from ([*held, *made] for held in _looked_at(model))
        yield [*_all(step.outline(model), 4), SCRATCH]
        return
    if step.calibrated:
        yield from _looked_at(model)
    yield [*[_largest(model)] * 3, SCRATCH]


def _looked_at(model: Model) -> Iterator[list[float]]:
    """What lies around the blocks and one block, as the text passes."""
    block = 4.0 * sum(_numbers(model, name) for name in model.linears_of(model.blocks[0]))
    inner = getattr(model.config, "intermediate_size", None) or 4 * int(model.config.hidden_size)
    yield [*_around(model, 4), block, 4.0 * BATCH_TOKENS * 6 * inner, SCRATCH]


def _healed(model: Model, step: Layers | Student, size: Size, waiting: float) -> Iterator[list[float]]:
    """Two models side by side, a block of each; of a site both sums, and what solves them."""
    if step.heal is not True:
        return
    width, tokens = forward_dtype().itemsize, min(size.windows, HEALED) * size.length
    states = tokens * model.config.hidden_size * width
    block = sum(_numbers(model, name) for name in model.linears_of(model.blocks[0])) * width
    running = 2 * min(BATCH_TOKENS, tokens) * waiting + SCRATCH
    held = [states, states, states, *[max(0.0, tokens * waiting - states)] * 2, running, block, block]
    for group in model.groups:
        shapes = [model.matrix_shape(f"{model.blocks[0]}.{name}.weight") for name in group.names]
        rows, columns = sum(shape[0] for shape in shapes), shapes[0][1]
        yield [*held, *[4.0 * columns**2] * 5, *[4.0 * rows * columns] * 7]


def _backward(model: Model, tokens: int, most: int) -> Iterator[list[float]]:
    """States in front of every block; of one what its linears read, and gradients; what tells the loss."""
    tokens, width = min(tokens, most), forward_dtype().itemsize
    states = float(tokens * int(model.config.hidden_size) * width)
    linears = model.linears_of(model.blocks[0])
    block = float(sum(_numbers(model, name) for name in linears) * width)
    seen = [float(tokens * side * width) for name in linears for side in model.matrix_shape(name)]
    stays = _around(model, width) if model.arch.task == "classify" else []
    yield [*[states] * (len(model.blocks) + 3), block, *seen, *[2 * max(seen)] * 3, *stays, SCRATCH]
    head = [4.0 * _numbers(model, model.ends[-1])] * 2 if model.arch.task == "generate" else stays
    yield [*_reading(model, width), *[states] * 3, *head, SCRATCH]


def _with_gates(model: Model) -> Iterator[list[float]]:
    """The whole model in float32, a matrix on its way to lie otherwise, and logits of a few windows."""
    yield [*_all(model, 4), _largest(model), 4.0 * GATED_LOGITS, 12.0 * LOGITS, SCRATCH]


def _rtn(model: Model, step: Quantizer) -> Iterator[list[float]]:
    """A matrix, and what its rounding computes from it."""
    names = [*model.linears_of(model.blocks[0]), *([model.arch.embedding] if step.embeddings else [])]
    widest = max(4.0 * _numbers(model, name) for name in names)
    block = sum(_numbers(model, name) for name in model.linears_of(model.blocks[0]))
    yield [*[widest] * 6, 1.5 * block, SCRATCH]


def _measuring(model: Model, recipe: Recipe, size: Size, waiting: float) -> Iterator[list[float]]:
    """What lies around the blocks, of both models in turn; a block; and the hidden states of a round.

    States wait in front of a block, and stand behind it; those of the first model stay for the second.
    """
    ends, around = set(model.ends), _around(model, 4)
    block = 4.0 * sum(_numbers(model, name) for name in model.linears_of(model.blocks[0]))
    hidden = 4 * int(model.config.hidden_size)
    if model.arch.task != "generate":
        states = 2 * SENTENCES * SENTENCE_TOKENS * hidden
        running = 3 * BATCH * SENTENCE_TOKENS * max(waiting, 1)
        yield [*around, block, *_reading(model, 4)[:1], states, running, SCRATCH]
        return
    changed = any(isinstance(step, Quantizer) and step.embeddings is not None for step in recipe.steps)
    if changed or any(rounds(model, recipe.export, name) for name in ends):
        around += [4.0 * _numbers(model, name) for name in model.checkpoint.entries if name in ends]
    states = min(size.evaluated * hidden, STATES // 2)
    room = 3 * 4 * max(LOGITS, int(model.config.vocab_size))
    running = BATCH_TOKENS * (4 * waiting + 2 * hidden)
    yield [*around, block, room, *[states] * 4, running, 2 * SCRATCH]


def _exporting(model: Model, recipe: Recipe) -> Iterator[list[float]]:
    """What is read back and run: the model in float32; hashes copy a tensor thrice while it is read."""
    largest = _largest(model)
    yield [largest] * (5 if "gguf" in recipe.export else 4)
    logits = 4.0 * int(model.config.vocab_size) * PROBE * 8 if model.arch.task == "generate" else 0.0
    yield [*_all(model, 4), 3 * logits, SCRATCH]
    if "gguf" in recipe.export:
        # The file is mapped twice, by the gguf package and by llama.cpp, which also repacks it.
        prompts = 4.0 * int(model.config.vocab_size) * 32 * 8
        yield [*_all(model, 4), *[_stored(model, recipe)] * 3, 2 * prompts, 2 * SCRATCH]


def _stored(model: Model, recipe: Recipe) -> float:
    """About the bytes of a GGUF file: five bits a weight of the blocks and a byte at the ends, or 16 bits."""
    if not any(isinstance(step, Quantizer) for step in recipe.steps):
        return sum(_all(model, 4 if recipe.dtype == "fp32" else 2))
    linears = set(model.linears)
    return sum(_numbers(model, n) * (0.6 if n in linears else 1.1) for n in model.checkpoint.entries)


def _reading(model: Model, width: int) -> list[float]:
    """The largest tensor on its way from the file: as it is stored, as float32, in its new type."""
    name = max(model.checkpoint.entries, key=lambda name: _numbers(model, name))
    count, stored = _numbers(model, name), DTYPES[model.checkpoint.entries[name].dtype]
    whole = [] if stored == torch.float32 else [4.0 * count]
    return [float(count * stored.itemsize), *whole, *([] if width == 4 else [float(count * width)])]


def _around(model: Model, width: int) -> list[float]:
    """What a model has beside the linears of its blocks."""
    inside = set(model.linears)
    return [float(_numbers(model, name) * width) for name in model.checkpoint.entries if name not in inside]


def _all(model: Model, width: int) -> list[float]:
    return [float(_numbers(model, name) * width) for name in model.checkpoint.entries]


def _largest(model: Model) -> float:
    return 4.0 * max(_numbers(model, name) for name in model.checkpoint.entries)


def _numbers(model: Model, name: str) -> int:
    return math.prod(model.checkpoint.entries[name].shape)
