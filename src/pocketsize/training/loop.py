"""One training loop for everything that is trained: cut off at any step, it goes on to the same end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pocketsize.distillation.schedule import rate
from pocketsize.distributed.shards import clip_gradients, is_spread, laid_as, whole
from pocketsize.distributed.world import Solo, World
from pocketsize.errors import NumericalError, Stopped, UsageError
from pocketsize.models.attention import LearningPanels
from pocketsize.training.examples import Batch
from pocketsize.training.objective import Objective

# After so many steps in a row whose gradient was not finite, a training ends as an error.
HOPELESS = 8
# A checkpoint is written at most so often, and takes at most this share of the time.
EVERY_S, SHARE = 60.0, 0.05
# Shares of zeros that differ by less than this are one in a curve.
NOTED = 0.005
BETAS, EPS = (0.9, 0.999), 1e-8


@dataclass(frozen=True, slots=True)
class Pace:
    """How a training goes: `steps` of `accumulate` batches each, or as many as `minutes` give.

    `peak` is the highest learning rate, reached after the share `warmup` of the training and let down to
    the share `floor` of it; `decay` is AdamW's weight decay, on matrices alone; `clip` the largest norm of a
    gradient; `average`, if given, the decay of the moving average of weights that becomes the student.
    `patience` ends a training that was not better on the held-out batches for so many looks, one after
    every `look` steps, and gives its best weights; 0 looks never. `terms` says what the loss is made of.
    """

    steps: int | None = None
    minutes: float | None = None
    accumulate: int = 1
    peak: float = 1e-4
    warmup: float = 0.05
    floor: float = 0.1
    decay: float = 0.01
    clip: float = 1.0
    average: float | None = None
    patience: int = 0
    look: int = 50
    seed: int = 0
    terms: str = "the model and its text"

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("a training has a number of steps or of minutes")
        for name in ("steps", "minutes", "accumulate", "peak", "clip", "look"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} must be above 0, got {value}")
        if self.average is not None and not 0 < self.average < 1:
            raise UsageError(f"average must lie between 0 and 1, got {self.average}")

    def done(self, step: int, elapsed_s: float) -> float:
        """The share of the training that is over, 1 at its end."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        assert self.minutes is not None
        return min(1.0, elapsed_s / (60 * self.minutes))


@dataclass(slots=True)
class Course:
    """How a training has gone so far: what its checkpoint says beside tensors.

    `losses` are the mean losses of up to 200 equal stretches, `skipped` the steps whose gradient was not
    finite, `brake` what the learning rate is multiplied by since. `pruned` are the steps after which more
    weights were zero, with their share. `judged` is the loss of some fixed batches before and after.
    """

    step: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    skipped: int = 0
    brake: float = 1.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    looks: list[tuple[int, float]] = field(default_factory=list)
    pruned: list[tuple[int, float]] = field(default_factory=list)
    best: float = math.inf
    stale: int = 0
    judged: tuple[float, float] | None = None


class Keeper(Protocol):
    """Where checkpoints of a training are kept, and where it may be stopped."""

    def last(self) -> tuple[Mapping[str, Tensor], Mapping[str, Any]] | None:
        """The newest whole checkpoint: its tensors and its facts; None where there is none."""
        ...

    def save(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Make a checkpoint durable, instead of the one before it."""
        ...

    @property
    def stopping(self) -> bool:
        """Whether a stop was asked for."""
        ...

    def safe_point(self, where: str) -> None:
        """A moment at which everything is durable; a stop that was asked for happens here."""
        ...


class Memory(Protocol):
    """What batches depend on beside their number, which a checkpoint has to hold."""

    def tensors(self) -> Mapping[str, Tensor]:
        """All of it."""
        ...

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `tensors` gave."""
        ...


Moments = Mapping[Tensor, Mapping[str, Tensor]]


class Shaping(Memory, Protocol):
    """What holds weights at zero while others learn, and may decide which."""

    @property
    def rates(self) -> Mapping[str, float]:
        """Highest learning rates of parameters that have one of their own, by name; none of them decays."""
        ...

    def pace(self, done: float) -> float:
        """Where on the schedule of the learning rate a training stands of which so much is over."""
        ...

    def gradients(self, step: int, done: float) -> None:
        """The gradients of a step are whole; what is to stay as it is, gets none."""
        ...

    def updated(self, step: int, done: float, moments: Moments) -> float | None:
        """The weights have moved; the share that is zero, where that was changed."""
        ...

    def finish(self) -> float | None:
        """The training is over, and the module has the weights it is to give; the share that is zero."""
        ...


def train(
    module: nn.Module,
    objective: Objective,
    batches: Callable[[int], Batch],
    pace: Pace,
    keeper: Keeper,
    *,
    told: Callable[[Course, float], None] = lambda course, done: None,
    held_out: Callable[[], float] | None = None,
    memory: Memory | None = None,
    shaping: Shaping | None = None,
    world: World | None = None,
) -> Course:
    """Train `module` in place; how it went.

    Everything a step does follows from its number and the state before it (dropout too: chance is seeded by
    seed and step), so a training that was cut off ends with the same weights. Only a training by `minutes`
    depends on how fast the machine is. A step whose loss or gradient is not finite is left out and halves
    the learning rate of all that follow.

    The processes of a `world` share the batches of each step and add up their gradients; what the first one
    decides (when time is up, when to stop) holds for all, and it alone keeps checkpoints.
    """
    run = _Run(module, objective, pace, keeper, (memory, shaping, world or Solo()))
    course = run.course
    start = time.perf_counter() - course.elapsed_s
    saved, cost = time.perf_counter(), 0.0
    while pace.done(course.step, course.elapsed_s) < 1 and not (
        pace.patience and course.stale >= pace.patience
    ):
        run.step(batches)
        course.elapsed_s = run.world.told(time.perf_counter() - start)
        if pace.patience and held_out is not None and course.step % pace.look == 0:
            run.look(held_out())
        told(course, pace.done(course.step, course.elapsed_s))
        now = time.perf_counter()
        stops, due = run.world.told((keeper.stopping, now - saved > max(EVERY_S, cost / SHARE)))
        if stops or due:
            run.save()
            saved, cost = time.perf_counter(), time.perf_counter() - now
            keeper.safe_point(f"after step {course.step} of the training")
            if stops and run.world.rank:
                raise Stopped("stopped with the first process")
    run.finish()
    return course


class _Run:
    """The state of a training: weights, moments, averages, and its course."""

    def __init__(
        self,
        module: nn.Module,
        objective: Objective,
        pace: Pace,
        keeper: Keeper,
        given: tuple[Memory | None, Shaping | None, World],
    ) -> None:
        self.memory, self.shaping, world = given
        if pace.accumulate % world.size:
            raise UsageError(
                f"accumulate: {world.size} processes share the batches of a step, so it must be a multiple "
                f"of {world.size}, got {pace.accumulate}"
            )
        self.objective, self.pace, self.keeper, self.world = objective, pace, keeper, world
        self.named = dict(_named(module, objective.extra))
        groups = _groups(self.named, pace, self.shaping.rates if self.shaping else {})
        self.optimizer = torch.optim.AdamW(groups, lr=pace.peak, betas=BETAS, eps=EPS, fused=True)
        own = {name: p for name, p in self.named.items() if not name.startswith(EXTRA)}
        self.average = {n: p.detach().clone() for n, p in own.items()} if pace.average else {}
        self.best = {n: p.detach().clone() for n, p in own.items()} if pace.patience else {}
        self.course, self.failed = Course(), 0
        if (found := world.told(keeper.last() if world.rank == 0 else None)) is not None:
            self._restore(*found)

    def step(self, batches: Callable[[int], Batch]) -> None:
        """One update, from `accumulate` batches."""
        course, pace = self.course, self.pace
        numbers = range(course.step * pace.accumulate, (course.step + 1) * pace.accumulate)
        parts = [replace(batches(number), turn=number) for number in numbers]
        counts = [self.objective.count(part) for part in parts]
        value = 0.0
        device = next(iter(self.named.values())).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), LearningPanels():
            for i in range(self.world.rank, pace.accumulate, self.world.size):
                torch.manual_seed(pace.seed * 1_000_003 + course.step * pace.accumulate + i)
                loss = self.objective.loss(parts[i].to(device)) * (counts[i] / max(1, sum(counts)))
                loss.backward()
                value += float(loss.detach())
        value = self._added(value)
        course.step += 1
        done = pace.done(course.step, course.elapsed_s)
        if self.shaping is not None:
            self.shaping.gradients(course.step, done)
        norm = clip_gradients(self.named.values(), pace.clip, self.world)
        course.tokens += sum(part.tokens for part in parts)
        if math.isfinite(value) and bool(norm.isfinite()):
            self._update(done)
            self.failed = 0
            _note(course.losses, course.step, value)
        else:
            course.skipped, course.brake, self.failed = course.skipped + 1, course.brake / 2, self.failed + 1
            if self.failed >= HOPELESS:
                raise NumericalError(_hopeless(course, pace, f"loss {value}, gradient {float(norm)}"))
        self.optimizer.zero_grad(set_to_none=True)

    def _added(self, value: float) -> float:
        """The loss of all processes; their gradients become sums as well, where any of them has one."""
        if self.world.size == 1:
            return value
        given = list(self.named.values())
        said = torch.tensor([value, *(float(p.grad is not None) for p in given)], dtype=torch.float64)
        self.world.add([said])
        reached = [p for p, count in zip(given, said[1:].tolist(), strict=True) if count]
        for p in reached:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        self.world.add([p.grad for p in reached if p.grad is not None and not is_spread(p)])
        return float(said[0])

    def _update(self, done: float) -> None:
        course, pace, shaping = self.course, self.pace, self.shaping
        share = rate(shaping.pace(done) if shaping else done, warmup=pace.warmup, floor=pace.floor)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * share * course.brake
        self.optimizer.step()
        if shaping is not None:
            self._zeros(shaping.updated(course.step, done, self.optimizer.state))
        if pace.average:
            for name, mean in self.average.items():
                mean.lerp_(self.named[name].detach(), 1 - pace.average)

    def _zeros(self, share: float | None) -> None:
        """Take note of a share of zeros, where it is one that a curve would show."""
        known = self.course.pruned
        if share is not None and (not known or abs(share - known[-1][1]) >= NOTED):
            known.append((self.course.step, share))

    def look(self, loss: float) -> None:
        """Take note of the loss on held-out batches, and of the weights if they are the best so far."""
        course = self.course
        course.looks.append((course.step, loss))
        course.stale += 1
        if loss < course.best:
            course.best, course.stale = loss, 0
            for name, kept in self.best.items():
                kept.copy_(self.average.get(name, self.named[name].detach()))

    def save(self) -> None:
        """A checkpoint, which the first process keeps; parts come from all."""
        tensors: dict[str, Tensor] = {}
        for name, value in self._tensors():
            together = whole(value, self.world)
            if self.world.rank == 0:
                tensors[name] = together
        if self.world.rank == 0:
            self.keeper.save(tensors, asdict(self.course))

    @torch.no_grad()
    def finish(self) -> None:
        """Leave in the module what the training is to give: its best, its average, or its last weights."""
        final = self.best if self.best and self.course.looks else self.average
        for name, kept in final.items():
            self.named[name].copy_(kept)
        if self.shaping is not None and (share := self.shaping.finish()) is not None:
            self.course.pruned.append((self.course.step, share))

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, p in self.named.items():
            yield f"weight.{name}", p.detach()
            for key, value in self.optimizer.state.get(p, {}).items():
                yield f"{key}.{name}", value
        for kind, tensors in (("average", self.average), ("best", self.best)):
            for name, value in tensors.items():
                yield f"{kind}.{name}", value
        for kind, part in (("memory", self.memory), ("shape", self.shaping)):
            for name, value in part.tensors().items() if part is not None else ():
                yield f"{kind}.{name}", value

    @torch.no_grad()
    def _restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        remembered: dict[str, dict[str, Tensor]] = {"memory": {}, "shape": {}}
        for key, value in tensors.items():
            kind, _, name = key.partition(".")
            if kind in remembered:
                remembered[kind][name] = value
            elif kind == "weight":
                self.named[name].copy_(laid_as(value, self.named[name]))
            elif kind in ("average", "best"):
                getattr(self, kind)[name].copy_(laid_as(value, self.named[name]))
            else:
                p = self.named[name]
                self.optimizer.state[p][kind] = laid_as(value.clone(), p).to(p.device)
        for kind, part in (("memory", self.memory), ("shape", self.shaping)):
            if part is not None:
                part.restore(remembered[kind])
        raw = dict(facts)
        for key in ("losses", "looks", "pruned"):
            raw[key] = [(int(step), float(value)) for step, value in raw[key]]
        self.course = Course(**raw)


# What a checkpoint calls parameters that are no part of the student.
EXTRA = "extra."


def _named(module: nn.Module, extra: nn.Module | None) -> Iterator[tuple[str, nn.Parameter]]:
    for name, p in module.named_parameters():
        if p.requires_grad:
            yield name, p
    for name, p in extra.named_parameters() if extra is not None else ():
        yield f"{EXTRA}{name}", p


def _groups(named: Mapping[str, nn.Parameter], pace: Pace, own: Mapping[str, float]) -> list[dict[str, Any]]:
    """The parameters as AdamW is told of them: matrices decay, vectors do not, some have their own rate."""
    others = [p for name, p in named.items() if name not in own]
    groups: list[dict[str, Any]] = []
    for apart in (False, True):  # one kernel takes both kinds of tensors, not together
        some = [p for p in others if is_spread(p) is apart]
        groups += [
            {"params": [p for p in some if p.ndim >= 2], "weight_decay": pace.decay, "peak": pace.peak},
            {"params": [p for p in some if p.ndim < 2], "weight_decay": 0.0, "peak": pace.peak},
        ]
    for peak in sorted({*own.values()}):
        params = [p for name, p in named.items() if own.get(name) == peak]
        groups.append({"params": params, "weight_decay": 0.0, "peak": peak})
    return [group for group in groups if group["params"]]


def _hopeless(course: Course, pace: Pace, said: str) -> str:
    """Why a training ends; where no step was ever finite no weight has moved, and the rate is innocent."""
    said = f"training step {course.step}: {said}; {HOPELESS} steps in a row were not finite"
    if course.skipped < course.step:
        return f"{said}; use a learning rate below {pace.peak:g}"
    return f"{said}, the very first among them, so the rate is not the cause: look at {pace.terms}"


def _note(losses: list[tuple[int, float]], step: int, loss: float) -> None:
    """Add the loss of a step; once there are 200, neighbours are put together."""
    losses.append((step, loss))
    if len(losses) >= 400:
        pairs = zip(losses[::2], losses[1::2], strict=True)
        losses[:] = [(b, (x + y) / 2) for (_, x), (b, y) in pairs]
