"""Recipe step `prune`: exact zeros that survive every later step, and what is refused before work starts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import pocketsize as ps
from pocketsize.errors import PocketsizeError, UnsupportedError, UsageError
from pocketsize.exporting import table
from pocketsize.models import batches
from pocketsize.models.backward import Seen
from pocketsize.models.load import load
from pocketsize.models.walk import walk
from pocketsize.recipes import oats, prune
from pocketsize.recipes.awq import Awq
from pocketsize.recipes.body import Layers
from pocketsize.recipes.correct import LEFT_OUT
from pocketsize.recipes.journal import Journal
from pocketsize.recipes.oats import Oats
from pocketsize.recipes.prune import Prune
from pocketsize.recipes.quantize import Gptq, Hqq, Rtn
from pocketsize.recipes.recipe import Data
from pocketsize.recipes.shares import _score
from pocketsize.recipes.smooth import SmoothQuant
from tiny import write_texts, write_tiny


@pytest.fixture(autouse=True)
def in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "stock" not in request.keywords:
        monkeypatch.setattr(table, "reload_check", lambda *_: ())


class Quiet:
    def phase(self, text: str) -> None: ...

    def progress(self, done: int, total: int, what: str) -> None: ...


def data(tmp_path: Path, sequences: int = 4) -> Data:
    calibrate, evaluate = write_texts(tmp_path)
    return Data((calibrate,), (evaluate,), sequences=sequences, length=32, tokens=256, written=0.0)


def ran(tmp_path: Path, family: str, *steps: Any, export: list[str] | None = None, sequences: int = 4) -> Any:
    if not (source := tmp_path / "m").exists():
        write_tiny(source, family)
    return ps.run(
        source,
        list(steps),
        out=tmp_path / "o",
        export=export or ["folder"],
        data=data(tmp_path, sequences),
        console=Quiet(),
        dtype="fp32",
    )


def zeros(folder: Path) -> dict[str, float]:
    model = load(folder)
    return {name: float((model.weight(name) == 0).double().mean()) for name in model.linears}


@pytest.mark.parametrize("family", ["llama", "gpt2", "mpnet", "qwen3_moe"])
@pytest.mark.parametrize("score", ["alps", "wanda", "magnitude"])
def test_half_of_every_linear_is_zero_and_stock_transformers_loads_it(
    family: str, score: str, tmp_path: Path
) -> None:
    done = ran(tmp_path, family, Prune(score=score))
    assert all(share == pytest.approx(0.5, abs=0.01) for share in zeros(tmp_path / "o").values())
    auto = AutoModel if family == "mpnet" else AutoModelForCausalLM
    _, told = auto.from_pretrained(tmp_path / "o", output_loading_info=True)
    assert not told["unexpected_keys"] and not told["mismatched_keys"] and not told["missing_keys"]
    report = done.record.steps[0]
    assert {layer.zeros for layer in report.layers} == {0.5}
    assert len(report.layers) == len(load(tmp_path / "o").linears)
    assert json.loads((tmp_path / "o" / "config.json").read_text())["sparsity"] == {
        "structure": "unstructured",
        "share": 0.5,
    }


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_one_threshold_for_all_linears(family: str, tmp_path: Path) -> None:
    """The smallest of all that are pruned, together; one that an override names is left out of it."""
    model = load(write_tiny(tmp_path / "m", family))
    left, small = model.linears[1], model.linears[-1]
    path = tmp_path / "m" / "model.safetensors"
    held = load_file(path)
    held[model.checkpoint.entries[small].name] *= 0.1
    save_file(held, path, metadata={"format": "pt"})
    step = Prune(score="magnitude", scope="model", overrides={left: None})
    done = ran(tmp_path, family, step)
    before, after = load(tmp_path / "m"), load(tmp_path / "o")
    assert torch.equal(before.weight(left), after.weight(left))
    names = [name for name in model.linears if name != left]
    sizes = torch.cat([before.matrix(name).abs().flatten() for name in names])
    kept = torch.cat([after.matrix(name).flatten() != 0 for name in names])
    assert int((~kept).sum()) == round(len(sizes) / 2)
    assert torch.equal(sizes[~kept].sort().values, sizes.sort().values[: int((~kept).sum())])
    shares = {layer.name: layer.zeros for layer in done.record.steps[0].layers}
    assert shares.keys() == set(names) and shares == pytest.approx(
        {n: zeros(tmp_path / "o")[n] for n in names}, abs=1e-6
    )
    assert shares[small] > 0.9 > 0.6 > shares[names[0]]
    said = json.loads((tmp_path / "o" / "config.json").read_text())["sparsity"]
    assert said == {"structure": "unstructured", "share": 0.5, "uneven": True}
    assert done.record.steps[0].tokens == 0


def test_a_matrix_that_one_threshold_empties_is_told(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    path = tmp_path / "m" / "model.safetensors"
    held = load_file(path)
    held[model.linears[0]] *= 1e-6
    save_file(held, path, metadata={"format": "pt"})
    done = ran(tmp_path, "llama", Prune(score="magnitude", scope="model"))
    (found,) = [f for f in done.record.findings if f.code == "matrices-emptied"]
    assert found.where == model.linears[0] and "1 of 14 matrices" in found.message


def test_gradients_choose_the_weights_of_an_encoder(tmp_path: Path) -> None:
    """Those of its embedding, row by row: what goes is not what is smallest."""
    done = ran(tmp_path, "bert", Prune(score="taylor"), sequences=16)
    assert done.record.steps[0].options["scope"] == "row"
    model, plain = load(tmp_path / "o"), load(tmp_path / "m")
    assert all(share == pytest.approx(0.5, abs=0.01) for share in zeros(tmp_path / "o").values())
    generator = load(write_tiny(tmp_path / "l", "llama"))
    assert Prune(score="taylor").resolve(generator, ("folder",)).scope == "matrix"
    for name in model.linears:
        W, kept = plain.weight(name), model.weight(name) != 0
        assert torch.equal(model.weight(name)[kept], W[kept])
        assert 0.02 < float((kept != (W.abs() > W.abs().median())).double().mean()) < 0.4, name


def test_an_expert_that_no_token_reached_goes_by_its_size() -> None:
    W = torch.randn(4, 8)
    assert torch.equal(_score(W, Seen()), W.square())


JUDGED = [(Prune(), 32, False), (Prune(learn=8), 32, True), (Prune(learn=8), 4, False), (Oats(), 32, False)]


@pytest.mark.parametrize(("step", "sequences", "judged"), JUDGED, ids=lambda one: getattr(one, "kind", one))
def test_drift_is_counted_of_all_text_unless_some_judges(
    step: Any, sequences: int, judged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "BATCH_TOKENS", 4 * 32)
    told: list[bool] = []

    def watched(*args: Any, judged: bool = False, **how: Any) -> Any:
        told.append(judged and how["drift"])
        return walk(*args, judged=judged, **how)

    monkeypatch.setattr(prune, "walk", watched)
    monkeypatch.setattr(oats, "walk", watched)
    ran(tmp_path, "llama", step, sequences=sequences)
    assert told == [judged]


@pytest.mark.parametrize("score", ["alps", "sparsegpt", "surgeon", "wanda", "taylor"])
@pytest.mark.parametrize("update", ["auto", "none", "sweep", "refit"])
def test_any_score_goes_with_any_update_and_pattern(score: str, update: str, tmp_path: Path) -> None:
    ran(tmp_path, "llama", Prune(pattern="2:4", score=score, update=update))
    model = load(tmp_path / "o")
    for name in model.linears:
        W = model.weight(name)
        assert bool(((W.view(len(W), -1, 4) == 0).sum(-1) == 2).all()), name


def test_what_stays_is_moved_to_make_up_for_what_goes(tmp_path: Path) -> None:
    """On the model's own text each matrix errs less than by dropping its smallest weights."""
    done = ran(tmp_path, "llama", Prune(), sequences=16)
    layers = done.record.steps[0].layers
    assert all(layer.error < layer.rtn_error for layer in layers)
    before, after = load(tmp_path / "m"), load(tmp_path / "o")
    name = before.linears[-1]
    stays = after.weight(name) != 0
    assert not torch.equal(before.weight(name)[stays], after.weight(name)[stays])


@pytest.mark.parametrize("step", [Prune, Oats], ids=lambda step: step.kind)
def test_weights_make_up_for_what_was_lost_before(step: Any, tmp_path: Path) -> None:
    """The first linears lack nothing yet; those behind them do."""
    same, made_up = ({}, {})
    for where, alpha in ((same, 0.0), (made_up, 0.5)):
        done = ran(tmp_path, "llama", step(alpha=alpha), sequences=16)
        assert done.record.steps[0].options["alpha"] == alpha
        model = load(tmp_path / "o")
        where |= {name: model.weight(name) for name in model.linears}
        shutil.rmtree(tmp_path / "o")
    alike = [name for name in same if torch.equal(same[name], made_up[name])]
    assert alike == [name for name in same if "layers.0" in name and re.search(r"[qkv]_proj", name)]


@pytest.mark.parametrize("step", [Prune, Oats], ids=lambda step: step.kind)
def test_the_first_position_counts_where_it_feeds_attention(step: Any, tmp_path: Path) -> None:
    found = []
    for sink in (0.0, 4.0):
        ran(tmp_path, "llama", step(sink=sink, alpha=0.0), sequences=16)
        model = load(tmp_path / "o")
        found.append({name: model.weight(name) for name in model.linears})
        shutil.rmtree(tmp_path / "o")
    first = [name for name in found[0] if "layers.0" in name and re.search(r"[qkv]_proj", name)]
    assert len(first) == 3
    assert not any(torch.equal(found[0][name], found[1][name]) for name in first)


def test_what_is_made_up_for_brings_the_model_nearer(tmp_path: Path) -> None:
    ids = torch.arange(5, 101).view(4, 24)
    lost = {}
    for alpha in (0.0, 0.5):
        ran(tmp_path, "llama", Prune(sparsity=0.7, alpha=alpha), sequences=16)
        before, after = (AutoModelForCausalLM.from_pretrained(tmp_path / f) for f in ("m", "o"))
        with torch.no_grad():
            states = [m.model(input_ids=ids).last_hidden_state for m in (before, after)]
        lost[alpha] = float((states[0] - states[1]).square().mean())
        shutil.rmtree(tmp_path / "o")
    assert lost[0.5] < lost[0.0]


def test_what_is_made_up_for_is_settled_before_work(tmp_path: Path) -> None:
    model, experts = load(write_tiny(tmp_path / "m", "llama")), load(write_tiny(tmp_path / "x", "qwen3_moe"))
    assert Prune().resolve(model, ("folder",)).alpha == Oats().resolve(model, ("folder",)).alpha == LEFT_OUT
    assert Prune(score="wanda").resolve(model, ("folder",)).alpha == 0
    assert Prune(score="sparsegpt").resolve(model, ("folder",)).alpha == 0
    assert Prune(score="wanda", update="refit", alpha=0.2).resolve(model, ("folder",)).alpha == 0.2
    assert Prune(score="wanda").resolve(model, ("folder",)).sink == 0
    assert Prune().resolve(experts, ("folder",)).alpha == Oats().resolve(experts, ("folder",)).alpha == 0
    with pytest.raises(UnsupportedError, match=r"prune: alpha: experts of a .*use alpha: 0"):
        Prune(alpha=0.2).resolve(experts, ("folder",))


KEEPING = [Rtn(), Gptq(), Gptq(symmetric=False), Gptq(learn=4), Awq(), Hqq(), SmoothQuant()]


@pytest.mark.parametrize("step", KEEPING, ids=str)
def test_a_quantizer_keeps_the_zeros(step: Any, tmp_path: Path) -> None:
    ran(tmp_path, "llama", Prune(), step, sequences=16)
    ran_on = ps.load(tmp_path / "o")
    for name in ran_on.linears:
        assert float((ran_on.weight(name) == 0).double().mean()) >= 0.5


def test_blocks_may_go_before_weights_do(tmp_path: Path) -> None:
    ran(tmp_path, "llama", Layers(keep=1), Prune(sparsity=0.6), Rtn())
    assert set(zeros(tmp_path / "o")) == set(load(tmp_path / "o").linears)
    assert min(zeros(tmp_path / "o").values()) >= 0.59


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_what_is_stored_sparse_comes_back_and_is_smaller(family: str, pattern: str, tmp_path: Path) -> None:
    done = ran(tmp_path, family, Prune(pattern=pattern), export=["folder", "sparse"])
    dense, sparse = load(tmp_path / "o"), load(tmp_path / "o" / "sparse")
    assert dense.checkpoint.entries.keys() == sparse.checkpoint.entries.keys()
    for name in dense.checkpoint.entries:
        assert torch.equal(dense.weight(name), sparse.weight(name)), name
    assert sparse.origin.dequantized_from is None and sparse.pattern == dense.pattern
    sizes = {a.format: a.bytes for a in done.record.artifacts}
    assert sizes["sparse"] < sizes["folder"]
    assert all(check.ok for check in ps.verify(tmp_path / "o"))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_codes_of_what_is_not_zero_come_back(family: str, symmetric: bool, tmp_path: Path) -> None:
    step = Gptq(symmetric=symmetric, embeddings=None)
    done = ran(tmp_path, family, Prune(), step, export=["sparse"], sequences=16)
    back = load(tmp_path / "o")
    for layer in done.record.steps[1].layers:
        W = back.weight(layer.name)
        assert float((W == 0).double().mean()) >= 0.5
    assert "sparse-bitmask 4 bits" in str(back.origin.dequantized_from)
    names = {p.part: p.bytes for p in done.record.sizes}
    weights = sum(layer.rows * layer.columns for layer in done.record.steps[1].layers)
    group = done.record.steps[1].options["group"]
    exact = 1 + 0.5 * 4 + (16 if symmetric else 20) / group
    assert 8 * names["linears"] / weights <= exact + 0.5  # names and shapes of tiny matrices count


def test_a_share_of_its_own_for_some_linears(tmp_path: Path) -> None:
    ran(tmp_path, "llama", Prune(overrides={"*.down_proj": 0.25, "*.q_proj": None}))
    found = zeros(tmp_path / "o")
    for name, share in found.items():
        expected = 0.25 if "down_proj" in name else 0.0 if "q_proj" in name else 0.5
        assert share == pytest.approx(expected, abs=0.01), name


@pytest.mark.parametrize(
    ("family", "allocation"),
    [(f, a) for f in ("llama", "bert") for a in ("outliers", "taylor", "searched")],
)
def test_an_allocation_spreads_the_same_share(family: str, allocation: str, tmp_path: Path) -> None:
    ran(tmp_path, family, Prune(allocation=allocation, spread=0.1), sequences=16)
    model, found = load(tmp_path / "o"), zeros(tmp_path / "o")
    counts = {name: model.checkpoint.entries[name].shape for name in found}
    weights = {name: shape[0] * shape[1] for name, shape in counts.items()}
    mean = sum(found[n] * weights[n] for n in found) / sum(weights.values())
    assert mean == pytest.approx(0.5, abs=0.01)
    assert len({round(share, 3) for share in found.values()}) > 1
    assert all(0.39 <= share <= 0.61 for share in found.values())


def test_learning_is_kept_only_where_the_block_comes_nearer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "BATCH_TOKENS", 4 * 32)
    done = ran(tmp_path, "llama", Prune(learn=8), sequences=32)
    layers = done.record.steps[0].layers
    assert all(layer.learned is not None and layer.learned <= 1 for layer in layers)
    assert any(layer.learned < 1 for layer in layers)
    assert all(share == pytest.approx(0.5, abs=0.01) for share in zeros(tmp_path / "o").values())


def test_a_pruned_folder_is_taken_up_again(tmp_path: Path) -> None:
    ran(tmp_path, "llama", Prune())
    pruned = tmp_path / "pruned"
    (tmp_path / "o").rename(pruned)
    ps.run(pruned, [Rtn()], out=tmp_path / "o", export=["folder"], data=data(tmp_path), console=Quiet())
    assert min(zeros(tmp_path / "o").values()) >= 0.5


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"sparsity": 0.0}, "sparsity is the share"),
    ({"sparsity": 1.0}, "sparsity is the share"),
    ({"sparsity": 1.5}, "sparsity is the share"),
    ({"pattern": "4:4"}, "pattern 4:4"),
    ({"pattern": "two of four"}, "pattern is unstructured"),
    ({"pattern": "2:4", "sparsity": 0.7}, "leave sparsity out"),
    ({"pattern": "2:4", "allocation": "outliers"}, "one share for all"),
    ({"pattern": "2:4", "overrides": {"*.q_proj": 0.3}}, "one share for all"),
    ({"score": "wander"}, "did you mean"),
    ({"update": "x"}, "unknown update"),
    ({"scope": "block"}, "unknown scope"),
    ({"scope": "model"}, "scope: model goes with score: magnitude, got 'alps'"),
    ({"scope": "model", "score": "wanda"}, "scope: model goes with score: magnitude, got 'wanda'"),
    (
        {"scope": "model", "score": "magnitude", "pattern": "2:4"},
        "goes with pattern: unstructured, got '2:4'",
    ),
    ({"scope": "model", "score": "magnitude", "allocation": "taylor"}, "goes with allocation: uniform"),
    ({"scope": "model", "score": "magnitude", "learn": 4}, "goes with learn: 0, got 4"),
    ({"scope": "model", "score": "magnitude", "update": "refit"}, "leaves what stays as it is"),
    ({"scope": "model", "score": "magnitude", "overrides": {"*": 0.2}}, "overrides can be null alone"),
    ({"damp": 0.0}, "damp"),
    ({"spread": 1.0}, "spread"),
    ({"rounds": 0}, "rounds"),
    ({"overrides": {"*.q_proj": 1.0}}, "above 0 and below 1"),
    ({"alpha": 1.5}, "alpha must lie between 0 and 1"),
    ({"alpha": 0.2, "score": "wanda"}, "not moved, so they make up for nothing"),
    ({"sink": -1.0}, "sink must be a number from 0"),
    ({"sink": 0.5, "score": "magnitude"}, "asks no input what it is worth"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED, ids=str)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Prune(**options)


def test_what_a_model_cannot_have_is_refused_before_work(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    with pytest.raises(UnsupportedError, match="which pattern 3:7 does not divide"):
        Prune(pattern="3:7").resolve(model, ("folder",))
    with pytest.raises(UsageError, match="decides none"):
        Prune(overrides={"*.nothing": 0.2}).resolve(model, ("folder",))
    with pytest.raises(UsageError, match="nothing would be pruned"):
        Prune(overrides={"*": None}).resolve(model, ("folder",))


def test_a_format_of_zeros_is_refused_for_a_model_that_has_none(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="nothing in the model is pruned"):
        ran(tmp_path, "llama", Rtn(), export=["sparse"])


@pytest.mark.parametrize("options", [{"scheme": "Q4_K"}, {"scheme": "NF4"}, {"float_zeros": True}], ids=str)
def test_a_grid_that_has_no_zero_is_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(PocketsizeError, match=r"zero|pruned|store"):
        ran(tmp_path, "llama", Prune(), Gptq(symmetric="auto", **options))


def test_a_dense_rival_of_the_same_size_is_told(tmp_path: Path) -> None:
    """Half of 16-bit weights takes 9 bits and more, of which a dense grid of 8 makes far better use."""
    done = ran(tmp_path, "llama", Prune(), sequences=16)
    (said,) = [f for f in done.record.findings if f.code == "dense-is-better"]
    assert "a dense grid of 8.50 bits" in said.message
    for layer in done.record.steps[0].layers:
        assert layer.rival < layer.rivalled == pytest.approx(layer.error, rel=0.6)
        assert layer.bits_per_weight == pytest.approx(9 + 64 / layer.columns, abs=0.01)


def test_the_rival_of_pruned_codes_is_that_of_the_matrix_before(tmp_path: Path) -> None:
    done = ran(tmp_path, "llama", Prune(), Gptq(group=64, symmetric=False), sequences=16)
    layers = done.record.steps[1].layers
    assert all(layer.rival_bits <= 1.01 * layer.bits_per_weight for layer in layers if layer.rival_bits)
    assert {layer.bits_per_weight for layer in layers} <= {3.3125, 3.3} | {
        layer.bits_per_weight for layer in layers if layer.zeros > 0.5
    }
    assert {layer.rival_bits for layer in layers} == {3.2969}
    assert [f.code for f in done.record.findings if f.code.endswith("-is-better")] == 2 * ["dense-is-better"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_sparse_plus_low_rank_comes_back_from_its_parts(family: str, pattern: str, tmp_path: Path) -> None:
    done = ran(tmp_path, family, Oats(pattern=pattern, rounds=4), export=["folder", "sparse"], sequences=16)
    dense, parts = load(tmp_path / "o"), load(tmp_path / "o" / "sparse")
    for name in dense.linears:
        assert torch.allclose(dense.weight(name), parts.weight(name), atol=1e-5), name
        assert float((dense.weight(name) == 0).double().mean()) < 0.1
    assert dense.pattern is None and dense.low_rank
    sizes = {a.format: a.bytes for a in done.record.artifacts}
    assert sizes["sparse"] < sizes["folder"]
    assert all(layer.error < layer.rtn_error for layer in done.record.steps[0].layers)


def test_nothing_comes_after_oats(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="put oats last"):
        ran(tmp_path, "llama", Oats(), Rtn())


def test_parts_that_would_hold_more_than_was_asked_for_are_refused_before_work(tmp_path: Path) -> None:
    """Factors of rank 1 are the least there is, and n:m has them on top."""
    model = load(write_tiny(tmp_path / "m", "llama"))
    with pytest.raises(
        UnsupportedError, match=r"0\.999 leaves \d numbers of \S*[kv]_proj\.weight.*at most (0\.9\d+)"
    ) as e:
        Oats(sparsity=0.999).resolve(model, ("folder",))
    most = float(str(e.value).split("at most ")[1].split(",")[0])
    step = Oats(sparsity=most).resolve(model, ("folder",))
    for name in model.linears:
        rows, columns = model.matrix_shape(name)
        rank, pattern = step.parts(rows, columns)
        kept = rank * (rows + columns) + (1 - pattern.sparsity) * rows * columns
        assert kept <= (1 - most) * rows * columns + 1e-6
    assert Oats(pattern="1:64").resolve(model, ("folder",)).sparsity > most


@pytest.mark.parametrize(
    "options",
    [{"rank": 0.0}, {"rank": 1.0}, {"rounds": 0}, {"sparsity": 2.0}, {"alpha": -0.1}, {"sink": -1.0}],
    ids=str,
)
def test_parts_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Oats(**options)


def test_a_run_that_is_cut_off_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """Cut off behind the first block, and gone on with."""
    write_tiny(tmp_path / "m", "llama")
    files = {}
    for where, cut in (("whole", False), ("cut", True)):
        kept = Journal.keep

        def keep(self: Journal, key: str, *rest: Any, kept: Any = kept, cut: bool = cut) -> None:
            kept(self, key, *rest)
            if cut and key.endswith(".0"):
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(Journal, "keep", keep)
            patched.setattr(table, "reload_check", lambda *_: ())
            how = {"export": ["folder"], "data": data(tmp_path, 8), "console": Quiet()}
            if cut:
                with pytest.raises(KeyboardInterrupt):
                    ps.run(tmp_path / "m", [Prune()], out=tmp_path / where, **how)
                patched.undo()
            done = ps.run(tmp_path / "m", [Prune()], out=tmp_path / where, **how)
            assert (done.record.timing.resumed > 0) is cut
        files[where] = (tmp_path / where / "model.safetensors").read_bytes()
    assert files["whole"] == files["cut"]


@pytest.mark.parametrize("steps", [[Prune()], [Prune(), Gptq()], [Oats(rounds=2)]], ids=str)
def test_a_plan_tells_what_a_run_takes_and_whether_fewer_bits_would_be_better(
    steps: list[Any], tmp_path: Path
) -> None:
    source = write_tiny(tmp_path / "m", "llama")
    how = {"export": ["folder", "sparse"], "data": data(tmp_path, 16), "console": Quiet()}
    told = ps.plan(source, steps, out=tmp_path / "o", **how)
    assert told.exit_code == 0
    assert {s.name for s in told.stages} >= {step.kind for step in steps}
    assert all(s.cpu_s is not None for s in told.stages)
    done = ps.run(source, steps, out=tmp_path / "o", **how)
    ours, theirs = (
        [
            (f.code, re.findall(r"[\d.]+ bits", f.message))
            for f in found
            if f.code.startswith(("dense", "spars"))
        ]
        for found in (told.findings, done.record.findings)
    )
    assert ours == theirs and len(ours) == len(steps)
    sizes = {a.format: a.bytes for a in done.record.artifacts}
    for export in told.exports:
        assert sizes[export.format] <= 1.01 * export.bytes
    assert told.output_disk_bytes is not None


def test_a_pruned_model_is_quantized_with_its_embedding(tmp_path: Path) -> None:
    """The report has matrices with a share of zeros, and one without."""
    source = write_tiny(tmp_path / "m", "llama")
    calibrate, evaluate = write_texts(tmp_path)
    data = Data((calibrate,), (evaluate,), sequences=8, length=64, tokens=256)
    steps = [Prune(score="wanda"), Gptq(scheme="W4A16")]
    done = ps.run(source, steps, out=tmp_path / "o", export=["gguf"], data=data, console=Quiet())
    zeros = {layer.name: layer.zeros for step in done.record.steps for layer in step.layers}
    assert None in zeros.values() and 0.5 in zeros.values()
    assert ">Zeros</th>" in (done.folder / "report.html").read_text()
