from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pocketsize.errors import DataError, UnsupportedError, UsageError
from pocketsize.models.gated import gated
from pocketsize.models.gates import NAME, gates_json, read_gates, sites, work_of
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.models.skeleton import materialise
from pocketsize.pruning.gate import CONFIDENCES, Gates, Tally
from tiny import GENERATORS, VOCAB, write_tiny

DENSE = [family for family in GENERATORS if "moe" not in family and family != "mixtral"]
HALVED = ["llama", "mistral", "qwen2", "qwen3"]


def tokens(rows: int = 2, length: int = 9) -> Tensor:
    return torch.randint(5, VOCAB, (rows, length), generator=torch.Generator().manual_seed(3))


def some_gates(model: Model, kind: str, seed: int = 0, confidence: str = "probe") -> Gates:
    """Gates that leave out about half of everything, with no meaning."""
    draw = torch.Generator().manual_seed(seed)
    values, maps = {}, {}
    for i, (path, size) in enumerate(sites(model, kind).items()):
        values[path] = 0.3 * torch.rand(size, generator=draw)
        if kind == "inputs" and i % 3 == 0:
            maps[f"{path}:line"] = 0.1 * torch.randn(size + 1, generator=draw)
        if kind == "layers":
            values[path] = torch.randn(size, generator=draw)
        if kind == "exit":
            width = int(model.config.hidden_size)
            values[path] = torch.tensor([{"probability": 0.014, "entropy": 0.04}.get(confidence, 0.1)])
            maps |= {
                f"{path}:{end}": 0.1 * torch.randn(*s, generator=draw) for end, s in _ends(width).items()
            }
    return Gates(kind, values, confidence if kind == "exit" else None, maps)


def _ends(width: int) -> dict[str, tuple[int, ...]]:
    return {"in": (width, 3), "out": (3, width), "bias": (width,), "probe": (width + 1,)}


def decoded(module: nn.Module, ids: Tensor) -> Tensor:
    """The logits of a text that is read token by token."""
    cache, found = None, []
    for t in range(ids.shape[1]):
        out = module(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize(
    ("family", "kind"),
    [(f, k) for k in ("inputs", "channels") for f in DENSE]
    + [(f, k) for k in ("layers", "exit") for f in HALVED],
)
def test_decoding_equals_reading_at_once_and_the_model_is_as_before(
    family: str, kind: str, tmp_path: Path
) -> None:
    model = load(write_tiny(tmp_path / "m", family))
    module, ids, gates = materialise(model), tokens(1), some_gates(model, kind)
    before = {n: (t.clone(), t.stride()) for n, t in module.state_dict().items()}
    plain = module(input_ids=ids, use_cache=False).logits
    with gated(module, model, gates) as at_once:
        wanted = module(input_ids=ids, use_cache=False).logits
    with gated(module, model, gates) as one_by_one:
        found = decoded(module, ids)
    assert torch.allclose(found, wanted, atol=1e-4)
    assert not torch.allclose(wanted, plain, atol=1e-3)
    assert one_by_one.saved_blocks == pytest.approx(at_once.saved_blocks, rel=1e-6)
    assert one_by_one.blocks == pytest.approx(at_once.blocks) and 0.02 < at_once.share_of_blocks < 0.98
    assert torch.equal(module(input_ids=ids, use_cache=False).logits, plain)
    assert all("forward" not in part.__dict__ for part in module.modules())
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name][0]) and tensor.stride() == before[name][1], name


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_gates_that_are_open_change_nothing(family: str, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", family))
    module, ids = materialise(model), tokens()
    for kind in ("inputs", "channels"):
        gates = Gates(kind, {path: torch.full((size,), -1.0) for path, size in sites(model, kind).items()})
        plain = module(input_ids=ids, use_cache=False).logits
        with gated(module, model, gates) as tally:
            assert torch.allclose(module(input_ids=ids, use_cache=False).logits, plain, atol=1e-5)
        assert tally.share == 0.0 and tally.tokens == ids.numel()


def test_masks_are_what_is_left_out(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    module, ids = materialise(model), tokens()
    gates = Gates("inputs", some_gates(model, "inputs").values)
    with gated(module, model, gates) as tally:
        found = module(input_ids=ids, use_cache=False).logits
    masked, saved = materialise(model), 0.0
    for path, t in gates.values.items():
        together = ["q_proj", "k_proj", "v_proj"] if path.endswith("q_proj") else [path.rpartition(".")[2]]
        together = ["gate_proj", "up_proj"] if path.endswith("gate_proj") else together
        for name in together:

            def mask(linear: nn.Module, args: tuple[Tensor, ...], t: Tensor = t) -> tuple[Tensor]:
                nonlocal saved
                keep = args[0].abs() > t
                if linear is not masked.lm_head:
                    keep[:, 0] = True
                    saved += 2 * int((~keep).sum()) * len(linear.weight)
                return (args[0] * keep,)

            place = masked.get_submodule(".".join([*path.split(".")[:-1], name]))
            place.register_forward_pre_hook(mask)
    with torch.no_grad():
        assert torch.allclose(found, masked(input_ids=ids, use_cache=False).logits, atol=1e-4)
    assert tally.saved_blocks == saved


@pytest.mark.parametrize("family", HALVED)
def test_keys_and_values_are_kept_of_what_is_left_out(family: str, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", family))
    module, ids = materialise(model), tokens(1)
    path = f"{model.blocks[1]}.self_attn"
    shut = torch.zeros(sites(model, "layers")[path])
    shut[-1] = -1.0
    whole = module(input_ids=ids, use_cache=True).past_key_values
    with gated(module, model, Gates("layers", {path: shut})):
        cache = None
        for t in range(ids.shape[1]):
            cache = module(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True).past_key_values
    for ours, theirs in zip(cache.layers[:2], whole.layers[:2], strict=True):
        assert torch.allclose(ours.keys, theirs.keys, atol=1e-5)
        assert torch.allclose(ours.values, theirs.values, atol=1e-5)


@pytest.mark.parametrize("confidence", CONFIDENCES)
def test_tokens_that_leave_have_the_state_of_their_exit(confidence: str, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    module, ids = materialise(model), tokens(1)
    gates = some_gates(model, "exit", confidence=confidence)
    with gated(module, model, gates) as at_once:
        wanted = module(input_ids=ids, use_cache=False).logits
    with gated(module, model, gates) as one_by_one:
        found = decoded(module, ids)
    assert torch.allclose(found, wanted, atol=1e-4)
    assert one_by_one.saved_blocks == pytest.approx(at_once.saved_blocks)
    assert one_by_one.saved_head == pytest.approx(at_once.saved_head)
    never = Gates("exit", dict.fromkeys(gates.values, torch.tensor([9e9])), confidence, gates.maps)
    with gated(module, model, never) as tally:
        plain = module(input_ids=ids, use_cache=False).logits
    assert torch.allclose(plain, module(input_ids=ids, use_cache=False).logits, atol=1e-5)
    assert tally.share <= 0.0


def test_it_generates_as_it_reads(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    module, ids = materialise(model), tokens(1)
    for kind in ("inputs", "channels", "layers", "exit"):
        gates = some_gates(model, kind)
        with gated(module, model, gates):
            out = module.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True)  # type: ignore[operator]
            again = module(input_ids=out[:, :-1], use_cache=False).logits.argmax(-1)
        assert torch.equal(out[:, ids.shape[1] :], again[:, ids.shape[1] - 1 :]), kind


def test_work_is_two_operations_for_each_weight(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    work, module = work_of(model), materialise(model)
    linears = [
        m.weight.numel() for n, m in module.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n
    ]
    assert sum(work.linears.values()) == 2 * sum(linears)
    assert work.head == 2 * module.get_submodule("lm_head").weight.numel()  # type: ignore[operator, union-attr]
    ids = tokens(2, 7)
    with gated(module, model, some_gates(model, "inputs")) as tally:
        module(input_ids=ids, use_cache=False)
    attended = 2 * len(model.blocks) * work.attention * sum(range(1, 8))
    assert tally.blocks == 14 * sum(work.linears.values()) + attended and tally.head == 14 * work.head


def test_what_cannot_have_gates_is_refused(tmp_path: Path) -> None:
    encoder, experts = (load(write_tiny(tmp_path / f, f)) for f in ("bert", "qwen3_moe"))
    with pytest.raises(UnsupportedError, match="for models that generate"):
        sites(encoder, "inputs")
    with pytest.raises(UnsupportedError, match="experts of a qwen3_moe"):
        sites(experts, "inputs")
    for family in ("gpt2", "opt", "gemma2", "phi3", "gpt_neox"):
        with pytest.raises(UnsupportedError, match="no halves to leave out"):
            sites(load(write_tiny(tmp_path / family, family)), "layers")


def test_the_file_gives_the_gates_back(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    for kind in ("inputs", "exit"):
        gates = some_gates(model, kind)
        (model.folder / NAME).write_bytes(gates_json(model, gates, {"save": 0.25}))
        again = read_gates(model)
        assert (again.kind, again.confidence) == (gates.kind, gates.confidence)
        for part in ("values", "maps"):
            ours, theirs = getattr(again, part), getattr(gates, part)
            assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_a_damaged_file_and_gates_of_another_model_are_refused(tmp_path: Path) -> None:
    model, other = load(write_tiny(tmp_path / "m", "llama")), load(write_tiny(tmp_path / "o", "qwen2"))
    gates, path = some_gates(model, "inputs"), model.folder / NAME
    with pytest.raises(UsageError, match="make gates with the recipe step"):
        read_gates(model)
    good = gates_json(model, gates, {}).decode()
    name = next(iter(gates.values))
    for bad, said in (
        (good.replace('"kind": "inputs"', '"kind": "input"'), "unknown kind 'input'"),
        (good.replace('"data": "', '"data": "!', 1), "its numbers are damaged"),
        (good.replace('"format": 1', '"format": 9'), "format 9"),
        (
            good.replace(f'"{name}"', '"model.layers.7.mlp"'),
            "model.layers.7.mlp: the model has no such place",
        ),
        (good.replace('"values"', '"sites"'), "values"),
        (good[:-9], "not sound JSON"),
    ):
        path.write_text(bad)
        with pytest.raises(DataError, match=said) as error:
            read_gates(model)
        assert str(path) in str(error.value)
    (other.folder / NAME).write_text(good)
    with pytest.raises(DataError, match="model_type 'llama', this one has 'qwen2'"):
        read_gates(other)
    short = Gates("inputs", {name: torch.zeros(3)})
    with pytest.raises(UsageError, match="values, the model needs"), gated(materialise(model), model, short):
        pass


def test_padding_rows_and_bfloat16_run_by_masks(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    module = materialise(model, torch.bfloat16)
    with gated(module, model, some_gates(model, "inputs")) as tally:
        out = decoded(module, tokens(3, 4))
    assert bool(out.isfinite().all()) and isinstance(tally, Tally) and tally.share > 0
