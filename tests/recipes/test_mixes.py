"""Mixes of k-quants told matrix by matrix, what stands in for super-blocks, and the files that come of it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader, LlamaFileType

from pocketsize.errors import UnsupportedError, UsageError
from pocketsize.exporting.gguf.writer import write
from pocketsize.exporting.table import EXPORTERS, gguf_name_of
from pocketsize.exporting.verify import verify_gguf
from pocketsize.models.load import load
from pocketsize.models.model import Model
from pocketsize.quantization.scheme import NAMED
from pocketsize.recipes.grids import end_scheme, layer_scheme, scheme_of
from pocketsize.recipes.journal import open_journal
from pocketsize.recipes.mixes import STAND_INS, mix_of, stand_ins
from pocketsize.recipes.quantize import Gptq, Hqq, Rtn
from pocketsize.recipes.step import Context
from tiny import VOCAB, write_tiny, write_weights

GGUF = ("gguf",)


def llama(folder: Path, *, hidden: int = 256, ffn: int = 512, layers: int = 8, tied: bool = True) -> Model:
    """A llama whose rows may be whole super-blocks."""
    write_tiny(folder, "llama", tied=tied)
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
    }
    raw |= {"head_dim": hidden // 4}
    path.write_text(json.dumps(raw))
    g, tensors = torch.Generator().manual_seed(0), dict[str, torch.Tensor]()
    for name, shape in shapes(hidden, ffn, layers).items():
        W = torch.randn(shape, generator=g)
        tensors[name] = 1 + 0.1 * W if len(shape) == 1 else W / shape[1] ** 0.5
    if tied:
        del tensors["lm_head.weight"]
    write_weights(folder, tensors)
    return load(folder)


def shapes(hidden: int, ffn: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of its tensors."""
    ends = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (VOCAB, hidden))
    found: dict[str, tuple[int, ...]] = ends | {"model.norm.weight": (hidden,)}
    linears = {name: (hidden, hidden) for name in ("self_attn.q_proj", "self_attn.o_proj")}
    linears |= {name: (hidden // 2, hidden) for name in ("self_attn.k_proj", "self_attn.v_proj")}
    linears |= {"mlp.gate_proj": (ffn, hidden), "mlp.up_proj": (ffn, hidden), "mlp.down_proj": (hidden, ffn)}
    norms = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (hidden,))
    for i in range(layers):
        found |= {f"model.layers.{i}.{name}.weight": shape for name, shape in (linears | norms).items()}
    return found


def kinds(model: Model, step: Gptq) -> dict[str, str]:
    """The name of the scheme of each matrix."""
    names, of = {scheme: name for name, scheme in NAMED.items()}, scheme_of(step, model)
    return {name: names[found] for name in (*model.linears, *model.ends) if (found := of(name))}


# Of 8 layers the first, the last and every third from the fourth on get more bits.
MORE = {0, 3, 6, 7}


def test_the_medium_mix_of_four_bits_is_that_of_llamacpp(tmp_path: Path) -> None:
    model = llama(tmp_path)
    step = Gptq("q4_k_m").resolve(model, GGUF)
    assert (step.scheme, step.embeddings) == ("Q4_K", "Q6_K")
    for name, kind in kinds(model, step).items():
        more = any(f".layers.{layer}." in name for layer in MORE) and name.endswith(
            ("v_proj.weight", "down_proj.weight")
        )
        assert kind == ("Q6_K" if more or name in model.ends else "Q4_K"), name
    assert step == step.resolve(model, GGUF) and not list(stand_ins(step.overrides, model))
    assert gguf_name_of(model, scheme_of(step, model)).endswith("-Q4_K_M.gguf")


@pytest.mark.parametrize(
    ("mix", "layer", "value", "down", "out"),
    [
        ("Q2_K", 5, "Q3_K", "Q3_K", "Q3_K"),
        ("Q3_K_S", 0, "Q3_K", "Q3_K", "Q3_K"),
        ("Q3_K_M", 1, "Q5_K", "Q4_K", "Q4_K"),
        ("Q3_K_M", 2, "Q4_K", "Q4_K", "Q4_K"),
        ("Q3_K_L", 7, "Q5_K", "Q5_K", "Q5_K"),
        ("Q4_K_S", 0, "Q5_K", "Q5_K", "Q4_K"),
        ("Q4_K_S", 3, "Q5_K", "Q4_K", "Q4_K"),
        ("Q4_K_S", 4, "Q4_K", "Q4_K", "Q4_K"),
        ("Q5_K_S", 0, "Q5_K", "Q5_K", "Q5_K"),
        ("Q5_K_M", 3, "Q6_K", "Q6_K", "Q5_K"),
        ("Q5_K_M", 4, "Q5_K", "Q5_K", "Q5_K"),
        ("Q6_K", 4, "Q6_K", "Q6_K", "Q6_K"),
    ],
)
def test_other_mixes(mix: str, layer: int, value: str, down: str, out: str, tmp_path: Path) -> None:
    model = llama(tmp_path)
    found = kinds(model, Gptq(mix).resolve(model, GGUF))
    block = f"model.layers.{layer}."
    assert found[f"{block}self_attn.v_proj.weight"] == value
    assert found[f"{block}mlp.down_proj.weight"] == down
    assert found[f"{block}self_attn.o_proj.weight"] == out
    assert found[model.arch.embedding] == "Q6_K"


def test_values_that_many_heads_share_get_more_bits(tmp_path: Path) -> None:
    model = llama(tmp_path)
    model.config.num_attention_heads, model.config.num_key_value_heads = 8, 1
    names = ["model.layers.1.self_attn.v_proj.weight"]
    assert list(mix_of("Q2_K", model, names).values()) == ["Q4_K"]
    model.config.num_hidden_layers = 80
    assert list(mix_of("Q4_K_M", model, [names[0].replace(".1.", ".14.")]).values()) == ["Q5_K"]


def test_an_untied_embedding_is_stored_as_the_blocks_are_and_the_head_finer(tmp_path: Path) -> None:
    model = llama(tmp_path, tied=False)
    found = kinds(model, Gptq("Q4_K_M").resolve(model, GGUF))
    assert (found["model.embed_tokens.weight"], found["lm_head.weight"]) == ("Q4_K", "Q6_K")
    given = Gptq("Q4_K_M", embeddings="Q5_K", overrides={"lm_head": {"scheme": "Q8_0"}}).resolve(model, GGUF)
    assert end_scheme(given, "lm_head.weight") == NAMED["Q8_0"]
    assert end_scheme(given, "model.embed_tokens.weight") == NAMED["Q5_K"]


def test_overrides_come_before_the_mix(tmp_path: Path) -> None:
    model = llama(tmp_path)
    step = Gptq("Q4_K_M", overrides={"*.v_proj": {"scheme": "Q8_0"}, "*.q_proj": None}).resolve(model, GGUF)
    found = kinds(model, step)
    assert {k for n, k in found.items() if n.endswith("v_proj.weight")} == {"Q8_0"}
    assert not any(n.endswith("q_proj.weight") for n in found)
    assert step == step.resolve(model, GGUF)


def test_rows_that_256_does_not_divide_get_a_stand_in_which_is_told(tmp_path: Path) -> None:
    model = llama(tmp_path, hidden=96, ffn=512)
    step = Gptq("Q4_K_M").resolve(model, GGUF)
    found = Counter(kinds(model, step).values())
    assert found == {"Q4_K": 4, "Q6_K": 4, "Q5_0": 44, "Q8_0": 5}
    why = ": 256 does not divide their rows of 96"
    four, six = 8 * (96 * (96 + 48 + 96 + 2 * 512)) + 4 * 48 * 96, 4 * 48 * 96 + VOCAB * 96
    assert {f.message.removesuffix(why) for f in stand_ins(step.overrides, model)} == {
        f"44 matrices, {four} weights, stored as Q5_0 instead of Q4_K",
        f"5 matrices, {six} weights, stored as Q8_0 instead of Q6_K",
    }
    assert step == step.resolve(model, GGUF)
    of = scheme_of(step, model)
    for name in (*model.linears, *model.ends):
        scheme = of(name)
        assert scheme is not None and scheme.width(model.matrix_shape(name)[1])


@pytest.mark.parametrize("name", list(STAND_INS))
def test_a_stand_in_has_no_fewer_bits(name: str) -> None:
    assert NAMED[STAND_INS[name]].bits_per_weight(256) > NAMED[name].bits_per_weight(256)


def test_where_all_would_be_stand_ins_it_is_refused(tmp_path: Path) -> None:
    model = llama(tmp_path, hidden=96, ffn=160)
    with pytest.raises(UnsupportedError, match=r"none of the 56 linears.*use scheme: Q5_0"):
        Gptq("Q4_K_M").resolve(model, GGUF)
    wide = llama(tmp_path / "wide", hidden=96, layers=2)
    with pytest.raises(UnsupportedError, match="none of the 12 linears"):
        Gptq("Q4_K", overrides={"*.down_proj": None}).resolve(wide, GGUF)
    step = Gptq("W4A16", overrides={"*.down_proj": {"scheme": "Q6_K"}}).resolve(model, GGUF)
    assert step.overrides["*.down_proj"]["scheme"] == "Q8_0"
    assert next(iter(stand_ins(step.overrides, model))).message.startswith("8 matrices")


@pytest.mark.parametrize(
    ("step", "exports", "says"),
    [
        (Gptq("Q4_K_M"), ("folder",), "gptq: folder cannot store super-blocks"),
        (Gptq("Q4_K"), ("gguf", "folder"), "gptq: folder cannot store super-blocks"),
        (
            Rtn(embeddings="Q6_K", overrides={"lm_head": {"scheme": "Q6_K"}}),
            ("gguf", "folder"),
            "in gguf alone",
        ),
        (Hqq("Q4_K"), GGUF, "hqq: it chooses the zeros"),
    ],
)
def test_what_cannot_be_is_refused(step: Gptq, exports: tuple[str, ...], says: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=says):
        step.resolve(llama(tmp_path, layers=2, tied=False), exports)


def test_a_mix_of_a_family_that_llamacpp_names_otherwise_is_refused(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path, "bert"))
    with pytest.raises(UnsupportedError, match=r"Q4_K_M is a mix by llama\.cpp's names"):
        Rtn("Q4_K_M").resolve(model, ())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"scheme": "Q4_K_X"}, "unknown scheme"),
        ({"scheme": "Q4_K_M", "group": 64}, "group: Q4_K has 32"),
        ({"overrides": {"*.v_proj": {"scheme": "Q5_K_M"}}}, "Q5_K_M is a mix for a whole model; use Q5_K"),
        ({"embeddings": "Q7_K"}, "a scheme with a name such as Q6_K"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Gptq(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("tied", [True, False])
def test_a_mix_is_quantized_kept_written_and_read_back(tied: bool, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="runs files in llama.cpp")
    model = llama(tmp_path / "in", ffn=320, layers=2, tied=tied)
    ids = torch.randint(0, VOCAB, (8, 64), generator=torch.Generator().manual_seed(0))
    journal = open_journal(tmp_path / "work", {"a": "b"})
    context = Context(ids, torch.ones_like(ids, dtype=torch.bool), journal, lambda *_: None)
    step = Gptq("Q4_K_M").resolve(model, GGUF)
    done = step.apply(model, context)
    assert [finding.code for finding in context.findings if finding.code == "stand-in"]
    again = open_journal(tmp_path / "work", {"a": "b"}).weights()
    for name, weight in done.quantized.items():
        assert torch.equal(again[name].dequantize(), weight.dequantize())
        assert again[name].scheme == weight.scheme == scheme_of(step, model)(name)
    artifact = write(done, tmp_path / "out.gguf")
    assert artifact.bytes == EXPORTERS["gguf"].predict_bytes(model, scheme_of(step, model))
    assert "llama.cpp picks" in verify_gguf(done, tmp_path / "out.gguf")[-1]
    reader = GGUFReader(tmp_path / "out.gguf")
    assert {t.name: t.tensor_type.name for t in reader.tensors}["blk.1.ffn_down.weight"] == "Q8_0"
    assert reader.fields["general.file_type"].contents() == LlamaFileType.MOSTLY_Q4_K_M


def test_linears_that_no_override_names_keep_their_scheme(tmp_path: Path) -> None:
    model = llama(tmp_path, layers=2)
    step = Rtn("Q4_K").resolve(model, GGUF)
    assert step.overrides == {} and step.embeddings == 8
    assert {layer_scheme(step, name) for name in model.linears} == {NAMED["Q4_K"]}


@pytest.mark.parametrize("spelled", ["model.embed_tokens", "model.embed_tokens.weight"])
def test_an_override_of_the_embedding_comes_before_the_mix_however_it_is_spelled(
    spelled: str, tmp_path: Path
) -> None:
    model = llama(tmp_path / "m", tied=False)
    step = Gptq("Q4_K_M", overrides={spelled: {"scheme": "Q8_0"}}).resolve(model, ("gguf",))
    scheme = end_scheme(step, "model.embed_tokens.weight")
    assert scheme is not None and scheme.bits == 8
    narrow = load(write_tiny(tmp_path / "n", "llama", tied=False))  # 256 divides no row of it
    own = Rtn("W4A16", embeddings="Q6_K", overrides={"lm_head.weight": {"scheme": "Q8_0"}})
    head = end_scheme(own.resolve(narrow, ("gguf",)), "lm_head.weight")
    assert head is not None and head.bits == 8


def test_an_override_of_what_embeddings_null_leaves_is_refused(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama", tied=False))
    step = Rtn(embeddings=None, overrides={"lm_head": {"scheme": "W8A16"}})
    with pytest.raises(UsageError, match="embeddings: null leaves embedding and head"):
        step.resolve(model, ("gguf",))
