"""A model in memory that leaves out what its gates say, token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pocketsize.models.exits import Exits
from pocketsize.models.gates import (
    Work,
    attention_of,
    gated_groups,
    head_path,
    mlp_of,
    require_fitting,
    work_of,
)
from pocketsize.models.keys import keep_keys
from pocketsize.models.model import Model
from pocketsize.pruning.gate import Gates, Tally, line, token_factor
from pocketsize.pruning.gate_loops import gated_channels, gated_rows

Forward = Callable[..., Any]


@dataclass(slots=True)
class Bench:
    """A module that gates are put on: how what is changed is put back, and what is counted."""

    module: nn.Module
    work: Work
    undo: ExitStack
    head: nn.Module
    tally: Tally = field(default_factory=Tally)
    past: int = 0
    shape: tuple[int, int] = (0, 0)

    def forward(self, part: nn.Module, new: Forward) -> None:
        """Have a part run `new`, until the gates are taken off."""
        before = part.__dict__.get("forward")
        part.forward = new
        self.undo.callback(partial(_put_back, part, before))

    def lay(self, parameter: nn.Parameter, data: Tensor) -> None:
        """Have a parameter lie in memory as `data`, which equals it, until the gates are taken off."""
        parameter.data = data
        self.undo.callback(partial(_straighten, parameter))

    def whole(self, stays: Tensor) -> Tensor:
        """`stays` with all of it for the first token of a text, which all later ones attend to."""
        if self.past or stays.shape[:-1].numel() != self.shape[0] * self.shape[1]:
            return stays
        stays.view(*self.shape, -1)[:, 0] = True
        return stays

    def seen(self, tokens: int) -> float:
        """How many tokens those that come attend to, all together."""
        return tokens * self.past + tokens * (tokens + 1) / 2


@contextmanager
def gated(module: nn.Module, model: Model, gates: Gates) -> Iterator[Tally]:
    """While it is entered, `module`, which is `model` in memory, runs with these gates; the tally counts.

    One token at a time, in float32 on the processor, what is left out is neither computed nor read from
    memory. Several tokens at once (a prompt) are given the same result by masks, which saves no time; the
    tally counts them as if they had come one by one. Keys and values are kept for every token, also where
    blocks were left out, so that later tokens may attend to it. Afterwards the module is as it was.
    """
    require_fitting(model, gates)
    with ExitStack() as undo, torch.no_grad():
        bench = Bench(module, work_of(model), undo, module.get_submodule(head_path(model)))
        _count(bench, model)
        match gates.kind:
            case "inputs":
                groups = gated_groups(model)
                tokens = _Tokens()
                for path in (path for path in groups if path in gates.values):
                    _gate_inputs(bench, groups[path], gates, tokens)
            case "channels":
                for path, t in gates.values.items():
                    _gate_channels(bench, model, path, t)
            case "layers":
                _gate_layers(bench, model, gates.values)
            case _:
                Exits(bench.tally, bench.work, model, gates).put_on(module, bench.forward)
        yield bench.tally


def _put_back(part: nn.Module, before: Forward | None) -> None:
    if before is None:
        del part.forward
    else:
        part.forward = before


def _straighten(parameter: nn.Parameter) -> None:
    parameter.data = parameter.data.contiguous()


def _count(bench: Bench, model: Model) -> None:
    """Count tokens, and the work of a model without gates."""
    everything = sum(bench.work.linears.values())

    def begin(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        given = args[0] if args else options.get("input_ids")
        given = given if given is not None else options["inputs_embeds"]
        bench.shape = rows, tokens = given.shape[0], given.shape[1]
        cache = options.get("past_key_values")
        bench.past = 0 if cache is None else int(cache.get_seq_length())
        bench.tally.tokens += rows * tokens
        attended = bench.work.attention * len(model.blocks) * rows * bench.seen(tokens)
        bench.tally.blocks += rows * tokens * everything + attended

    def head(linear: nn.Module, args: tuple[Tensor, ...]) -> None:
        bench.tally.head += args[0].numel() // args[0].shape[-1] * bench.work.head

    for handle in (
        bench.module.register_forward_pre_hook(begin, with_kwargs=True),
        bench.head.register_forward_pre_hook(head),
    ):
        bench.undo.callback(handle.remove)


def _is_one(x: Tensor) -> bool:
    """Whether this is one token, where the compiled loops run."""
    plain = x.dtype == torch.float32 and x.device.type == "cpu" and not x.requires_grad
    return plain and x.numel() == x.shape[-1]


@dataclass(slots=True)
class _Tokens:
    """How much the tokens that run now have to lose, as the last line told: of one token, or of several."""

    one: float = 1.0
    factor: Tensor | None = None

    def ask(self, x: Tensor, values: Tensor) -> None:
        """Have a line tell it anew."""
        self.factor = token_factor(values, x)
        if self.factor.numel() == 1:
            self.one = float(self.factor)

    def at(self, x: Tensor) -> Tensor | float:
        """The factors of the tokens of x."""
        factor = self.factor
        if factor is None:
            return 1.0
        if factor.numel() != x.shape[:-1].numel():
            factor = factor[:, -x.shape[1] :]  # the head reads the last tokens alone
        return factor.reshape(*x.shape[:-1], 1)


@dataclass(slots=True)
class _Product:
    """Linears that read one tensor, as one matrix that lies inputs first, with a gate at every input."""

    bench: Bench
    W: Float[Tensor, "in out"]
    bias: Float[Tensor, "out"]
    t: Float[Tensor, "in"]
    values: Tensor | None
    tokens: _Tokens
    head: bool

    def __call__(self, x: Tensor) -> Tensor:
        """What all of them give, and the tally of what was left out."""
        if self.values is not None:
            self.tokens.ask(x, self.values)
        if _is_one(x) and (self.bench.past or self.head):
            y, one = self.bias.clone(), self.tokens.one
            kept = gated_rows(x.view(-1).numpy(), self.t.numpy(), one, self.W.numpy(), y.numpy())
            y = y.view(*x.shape[:-1], -1)
        else:
            stays = x.abs() * self.tokens.at(x) > self.t
            stays = stays if self.head else self.bench.whole(stays)
            kept = int(stays.sum())
            y = torch.where(stays, x, 0).to(self.W.dtype) @ self.W + self.bias
        saved = 2 * self.W.shape[1] * (x.numel() - kept)
        saved -= 0 if self.values is None else 2 * x.numel()
        if self.head:
            self.bench.tally.saved_head += saved
        else:
            self.bench.tally.saved_blocks += saved
        return y


def _gate_inputs(bench: Bench, names: tuple[str, ...], gates: Gates, tokens: _Tokens) -> None:
    """Leave out inputs of linears that read one tensor. Their matrices lie in memory as one, inputs first."""
    linears = [bench.module.get_submodule(name) for name in names]
    weights = [cast(nn.Parameter, linear.weight) for linear in linears]
    parts = [w if isinstance(m, Conv1D) else w.T for m, w in zip(linears, weights, strict=True)]
    W = torch.cat([part.detach() for part in parts], dim=1).contiguous()
    ends = [0, *torch.tensor([part.shape[1] for part in parts]).cumsum(0).tolist()]
    for linear, weight, a, b in zip(linears, weights, ends, ends[1:], strict=False):
        bench.lay(weight, W[:, a:b] if isinstance(linear, Conv1D) else W[:, a:b].T)
    zeros = [W.new_zeros(part.shape[1]) for part in parts]
    biases = [cast(Tensor | None, m.bias) for m in linears]
    bias = torch.cat([z if b is None else b for b, z in zip(biases, zeros, strict=True)])
    values = gates.maps.get(f"{names[0]}:line")
    t, head = gates.values[names[0]].to(W.device), linears[0] is bench.head
    product = _Product(bench, W, bias, t, None if values is None else values.to(W.device), tokens, head)
    last: list[tuple[Tensor, Tensor]] = []

    def forward(x: Tensor, *, a: int, b: int) -> Tensor:
        """The share of one linear; what the first one computed is there for all that read the same tensor."""
        if not last or last[0][0] is not x:
            last[:] = [(x, product(x))]
        y = last[0][1]
        if b == W.shape[1]:
            last.clear()
        return y[..., a:b]

    for linear, a, b in zip(linears, ends, ends[1:], strict=False):
        bench.forward(linear, partial(forward, a=a, b=b))


def _gate_channels(bench: Bench, model: Model, path: str, t: Tensor) -> None:
    """Leave out channels of an MLP: those that its gate nearly closes, else those that are nearly 0."""
    if mlp_of(model) is None:
        _gate_inputs(bench, (path,), Gates("inputs", {path: t}), _Tokens())
        return
    mlp = cast(Any, bench.module.get_submodule(path))
    gate, up, down, act = mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn
    U, D = up.weight.detach(), down.weight.detach().T.contiguous()
    bench.lay(down.weight, D.T)
    inner = U.new_zeros(len(U)) if up.bias is None else up.bias.detach()
    outer = U.new_zeros(D.shape[1]) if down.bias is None else down.bias.detach()
    t, price, tally = t.to(U.device), 2 * (U.shape[1] + D.shape[1]), bench.tally

    def forward(x: Tensor) -> Tensor:
        a = act(gate(x))
        if _is_one(x) and bench.past:
            y = outer.clone()
            kept = gated_channels(
                a.view(-1).numpy(),
                t.numpy(),
                x.view(-1).numpy(),
                U.numpy(),
                inner.numpy(),
                D.numpy(),
                y.numpy(),
            )
            y = y.view(*x.shape[:-1], -1)
        else:
            stays = bench.whole(a.abs() > t)
            kept = int(stays.sum())
            y = down(torch.where(stays, a, 0).to(x.dtype) * up(x))
        tally.saved_blocks += price * (a.numel() - kept)
        return y

    bench.forward(mlp, forward)


def _gate_layers(bench: Bench, model: Model, lines: Mapping[str, Tensor]) -> None:
    """Leave out attention or MLP of a block where a line says that it changes little."""
    attention = attention_of(model)
    for path, values in lines.items():
        part, block = bench.module.get_submodule(path), path.rpartition(".")[0]
        device = next(part.parameters()).device
        if attention is not None and path == f"{block}.{attention}":
            _gate_attention(bench, part, values.to(device), path)
        else:
            _gate_mlp(bench, part, values.to(device), path)


def _gate_mlp(bench: Bench, mlp: nn.Module, values: Tensor, path: str) -> None:
    run, ops, tally = mlp.forward, bench.work.of(path), bench.tally

    def forward(x: Tensor) -> Tensor:
        stays = bench.whole((line(values, x) >= 0)[..., None])[..., 0]
        tokens, kept = stays.numel(), int(stays.sum())
        tally.saved_blocks += ops * (tokens - kept) - 2 * x.shape[-1] * tokens
        if kept == 0:
            return torch.zeros_like(x)
        y = run(x)
        return y if kept == tokens else torch.where(stays[..., None], y, 0)

    bench.forward(mlp, forward)


def _gate_attention(bench: Bench, attention: nn.Module, values: Tensor, path: str) -> None:
    run, tally, work = attention.forward, bench.tally, bench.work
    ops = work.of(f"{path}.q_proj") + work.of(f"{path}.o_proj")

    def forward(hidden_states: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
        stays = bench.whole((line(values, hidden_states) >= 0)[..., None])[..., 0]
        tokens, kept = stays.numel(), int(stays.sum())
        seen = torch.arange(1, stays.shape[1] + 1, device=stays.device) + bench.past
        tally.saved_blocks += ops * (tokens - kept) - 2 * hidden_states.shape[-1] * tokens
        tally.saved_blocks += work.attention * float((~stays * seen).sum())
        if kept == 0:
            keep_keys(attention, hidden_states, options)
            return torch.zeros_like(hidden_states), None
        out, weights = run(hidden_states, *args, **options)
        return out if kept == tokens else torch.where(stays[..., None], out, 0), weights

    bench.forward(attention, forward)
