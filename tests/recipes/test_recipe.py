from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from pocketsize.cli.main import main
from pocketsize.data.sources import Source
from pocketsize.errors import DataError, UnsupportedError, UsageError
from pocketsize.models.load import load
from pocketsize.quantization.scheme import Scheme
from pocketsize.recipes.grids import block_scheme, embedding_scheme, layer_scheme, layer_schemes, scheme_of
from pocketsize.recipes.quantize import Gptq, Rtn
from pocketsize.recipes.recipe import parse_recipe, parse_step, read_recipe
from tiny import write_tiny

MINIMAL = {"model": "m", "steps": [{"gptq": {"scheme": "W4A16"}}]}


def test_a_recipe_survives_its_own_file(tmp_path: Path) -> None:
    raw = MINIMAL | {
        "data": {"calibrate": "a/*.txt", "sequences": 4, "seed": 7},
        "export": ["gguf", "folder"],
    }
    recipe = parse_recipe(raw, base=tmp_path)
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    again = read_recipe(tmp_path / "r.yaml")
    assert again == recipe and again.sha256 == recipe.sha256
    assert again.data.calibrate == ("a/*.txt",)


def test_sources_survive_their_own_file(tmp_path: Path) -> None:
    sources = [
        {"files": "de/*.txt", "share": 0.25},
        {"files": ["en/a.jsonl", "en/b.parquet"], "share": 0.75, "column": "content", "rows": 10},
    ]
    recipe = parse_recipe(
        MINIMAL | {"data": {"calibrate": sources, "evaluate": {"files": "x"}}}, base=tmp_path
    )
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    again = read_recipe(tmp_path / "r.yaml")
    assert again == recipe and again.sha256 == recipe.sha256
    assert again.data.calibrate[0] == Source(("de/*.txt",), 0.25) and again.data.evaluate == (Source(("x",)),)
    assert json.loads(json.dumps(recipe.to_dict())) == recipe.to_dict()
    other = parse_recipe(MINIMAL | {"data": {"calibrate": ["de/*.txt"]}}, base=tmp_path)
    assert other.sha256 != recipe.sha256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stpes": []}, "unknown key 'stpes'; did you mean 'steps'?"),
        ({"steps": [{"gptk": None}]}, "unknown step 'gptk'; did you mean 'gptq'?"),
        ({"steps": [{"gptq": {"gruop": 64}}]}, "gptq: unknown option 'gruop'; did you mean 'group'?"),
        ({"steps": []}, "at least one step"),
        ({"steps": "gptq"}, "a list of steps"),
        ({"steps": [{"gptq": {"scheme": "W6A16"}}]}, "unknown scheme 'W6A16'"),
        ({"steps": [{"gptq": {"scheme": "W1A16"}}]}, "'W1A16': W2A16 has the fewest bits, TERNARY three"),
        ({"steps": [{"gptq": {"damp": 0}}]}, "damp must lie between 0 and 1"),
        ({"steps": [{"rtn": {"group": -1}}]}, "group must be a positive number"),
        (
            {"steps": [{"rtn": {"embeddings": 7}}]},
            "rtn: embeddings must be one of (2, 3, 4, 5, 8), a scheme with a name such as Q6_K, same, auto",
        ),
        ({"steps": [{"hqq": {"symmetric": True}}]}, "a symmetric grid has none; use step rtn"),
        ({"steps": [{"gptq": {"overrides": "x"}}]}, "overrides is options by name"),
        ({"steps": [{"hqq": {"p": 0}}]}, "p must lie above 0"),
        ({"steps": [{"hqq": {"iterations": 0}}]}, "iterations must be at least 1"),
        ({"steps": [{"gptq": {"symmetric": True, "float_zeros": True}}]}, "use float_zeros: false"),
        ({"data": {"written": 1}}, "written must be auto or a share from 0 to below 1"),
        ({"data": {"written": "much"}}, "written is a number, or auto"),
        ({"data": {"shortest": 0}}, "shortest must be auto or a positive number, got 0"),
        ({"data": {"shortest": 1.5}}, "shortest"),
        ({"steps": [{"gptq": {"sink": -1}}]}, "sink must be a number from 0 upwards"),
        ({"data": {"sequnces": 3}}, "data: unknown option 'sequnces'; did you mean 'sequences'?"),
        ({"data": {"length": 0}}, "length must be a positive number"),
        ({"data": {"calibrate": 3}}, "data: calibrate: files, or sources such as"),
        ({"data": {"calibrate": [3]}}, "data: calibrate: files are named by text, got [3]"),
        ({"data": {"calibrate": [{"share": 1}]}}, "data: calibrate: files: name files"),
        (
            {"data": {"evaluate": {"files": "a", "shrae": 1}}},
            "evaluate: unknown option 'shrae'; did you mean",
        ),
        (
            {"data": {"calibrate": [{"files": "a"}, {"files": "b"}]}},
            "calibrate: the shares add up to 2; they",
        ),
        (
            {"data": {"calibrate": [{"files": "a", "share": 0.3}, {"files": "b", "share": 0.3}]}},
            "data: calibrate: the shares add up to 0.6; they must add up to 1",
        ),
        ({"data": {"calibrate": ["a", {"files": "b"}]}}, "not a mixture of both"),
        ({"data": {"evaluate": [{"files": "a", "share": -1}]}}, "evaluate: share must lie between 0 and 1"),
        ({"dtype": "f16"}, "dtype: unknown type 'f16'; did you mean 'fp16'?"),
        ({"export": ["ggfu"]}, "unknown format 'ggfu'; did you mean 'gguf'?"),
        ({"export": []}, "name at least one"),
        ({"model": None}, "name a folder, a hub id (OWNER/NAME) or a sample"),
    ],
)
def test_whatever_is_wrong_is_named(change: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        parse_recipe(MINIMAL | change, base=tmp_path)
    assert message in str(caught.value)


def test_a_file_that_is_no_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.yaml"):
        read_recipe(tmp_path / "absent.yaml")
    (tmp_path / "bad.yaml").write_text("steps: [")
    with pytest.raises(UsageError, match=r"bad\.yaml: not YAML"):
        read_recipe(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(UsageError, match=r"list\.yaml: a recipe is a mapping"):
        read_recipe(tmp_path / "list.yaml")


def test_automatic_choices_follow_the_exports(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    folder, gguf = (Gptq().resolve(model, e) for e in (("folder",), ("gguf", "folder")))
    assert (folder.group, folder.symmetric, folder.embeddings, folder.scale_digits) == (64, False, None, 7)
    assert (gguf.group, gguf.symmetric, gguf.embeddings, gguf.scale_digits) == (32, True, 8, 8)
    with_zeros = Gptq(symmetric=False).resolve(model, ("gguf",))
    assert block_scheme(with_zeros) == Scheme(4, 32, float_zeros=True)
    assert Gptq(float_zeros=True).resolve(model, ("gguf",)) == with_zeros
    both = Gptq(symmetric=False).resolve(model, ("gguf", "folder"))
    assert block_scheme(both) == Scheme(4, 32, scale_digits=7)
    assert block_scheme(folder) == Scheme(4, 64, scale_digits=7)
    ends = embedding_scheme(Rtn(embeddings=4, embeddings_symmetric=False).resolve(model, ("gguf",)))
    assert ends == Scheme(4, 32, float_zeros=True)
    for exports in (("folder",), ("gguf",)):
        alike = Rtn(embeddings="same").resolve(model, exports)
        assert embedding_scheme(alike) == block_scheme(alike)


def test_a_name_says_everything_about_a_grid(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    step = Gptq(scheme="q4_1", overrides={"*.v_proj": {"scheme": "Q8_0"}}).resolve(model, ("gguf",))
    assert (step.scheme, step.group, step.float_zeros) == ("Q4_1", 32, True)
    assert block_scheme(step) == Scheme(4, 32, float_zeros=True)
    assert layer_scheme(step, "model.layers.0.self_attn.v_proj.weight") == Scheme(8, 32, symmetric=True)
    other = Gptq(group=64, overrides={"*.v_proj": {"scheme": "Q8_0"}}).resolve(model, ("folder",))
    assert (other.group, other.overrides["*.v_proj"]["group"]) == (64, 32)
    with pytest.raises(UsageError, match="group: Q4_1 has 32; leave group out"):
        Gptq(scheme="Q4_1", group=64)


@pytest.mark.parametrize(
    ("step", "exports", "message"),
    [
        (
            Gptq(group=96),
            ("folder",),
            "group 96 does not divide rows of 64 weights (model.layers.0.self_attn.q_proj); use group: 64",
        ),
        (Gptq(scheme="W3A16"), ("gguf",), "gguf cannot store 3-bit weights"),
        (Gptq(group=16), ("gguf",), "gguf cannot store group 16; use group: auto"),
        (Gptq(symmetric=False, float_zeros=False, scale_digits=8), ("gguf",), "scale_digits: 7"),
        (
            Gptq(embeddings="same", symmetric=True, overrides={"*.v_proj": {"scheme": "W8A16"}}),
            ("folder",),
            "unpacks no embedding with more than one scheme",
        ),
        (Gptq(symmetric=False, float_zeros=True), ("gguf", "folder"), "folder cannot store float zeros"),
        (Gptq(scheme="Q4_1"), ("folder",), "gptq: folder cannot store float zeros"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_work(
    step: Gptq, exports: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    with pytest.raises(UnsupportedError) as caught:
        step.resolve(model, exports)
    assert message in str(caught.value)


OVERRIDES = {
    "*.mlp.*": {"scheme": "W5A16"},
    "re:.*layers[.]1[.].*down_proj": {"scheme": "W8A16", "group": None},
    "*.layers.0.*v_proj": None,
}


def test_the_last_pattern_that_matches_decides(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    step = Gptq(symmetric=True, overrides=OVERRIDES).resolve(model, ("folder",))
    of = scheme_of(step, model)
    assert of("model.layers.0.mlp.up_proj.weight") == Scheme(5, 64, True)
    assert of("model.layers.0.mlp.down_proj.weight") == Scheme(5, 64, True)
    assert of("model.layers.1.mlp.down_proj.weight") == Scheme(8, None, True)
    assert of("model.layers.0.self_attn.v_proj.weight") is None
    assert of("model.layers.1.self_attn.v_proj.weight") == Scheme(4, 64, True)
    assert layer_schemes(step) == [Scheme(4, 64, True), Scheme(5, 64, True), Scheme(8, None, True)]
    # Left to itself a folder with several schemes goes without zeros, which is all it can hold.
    auto = Gptq(overrides=OVERRIDES).resolve(model, ("folder",))
    assert block_scheme(auto).symmetric
    assert parse_step({"gptq": {"overrides": step.overrides, "symmetric": True}}).resolve(
        model, ("folder",)
    ) == Gptq(symmetric=True, overrides=OVERRIDES).resolve(model, ("folder",))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"*.k_prj": {"scheme": "W5A16"}},
            r"none of 14 linears, such as model\.layers\.0\.self_attn",
        ),
        ({"*.k_proj": None, "*_proj": {}}, r"\*.k_proj: later patterns match all that it does"),
        ({"*": None}, "overrides leave every linear as it is"),
        ({"*.k_proj": {"bits": 5}}, "k_proj: unknown option 'bits'"),
        ({"*.k_proj": {"scheme": "W6A16"}}, r"gptq: overrides: \*.k_proj: unknown scheme 'W6A16'"),
        ({"*.k_proj": {"group": 48}}, "k_proj: group 48 does not divide rows of 64"),
        ({"*.k_proj": {"group": 0}}, "k_proj: group must be a positive number"),
        ({"*.k_proj": 5}, r"k_proj: options such as \{scheme: W8A16\}, or null, got 5"),
        ({"re:*.k_proj": None}, "not a regular expression"),
        ({"*.k_proj": {"symmetric": False}}, "transformers loads one scheme alone when codes have zeros"),
        ({"*.k_proj": {"scheme": "W8A16", "symmetric": True}}, None),
    ],
)
def test_overrides_that_make_no_sense_are_refused_before_work(
    overrides: dict[str, object], message: str | None, tmp_path: Path
) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))
    raw = {"gptq": {"overrides": overrides, "symmetric": True}}
    if message is None:
        parse_step(raw).resolve(model, ("folder",))
        return
    with pytest.raises((UsageError, UnsupportedError), match=message):
        parse_step(raw).resolve(model, ("folder",))


def test_a_family_without_gguf_is_refused(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "mpnet"))
    recipe = parse_recipe(MINIMAL | {"export": ["gguf"]}, base=tmp_path)
    with pytest.raises(UnsupportedError, match="gguf"):
        recipe.resolved(model)


def test_steps_may_be_bare_words() -> None:
    assert parse_step("gptq") == Gptq() and parse_step({"rtn": None}) == Rtn()


def test_a_small_model_writes_half_of_the_default_text_and_none_of_a_named_one(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama"))

    def windows(**data: object) -> int:
        return parse_recipe(MINIMAL | {"data": data}, base=tmp_path).resolved(model).data.written_windows

    assert windows(sequences=9) == 4
    assert windows(calibrate="a.txt") == 0 and windows(written=0) == 0
    assert windows(calibrate="a.txt", sequences=8, written=0.25) == 2
    assert windows(sequences=2, written=0.99) == 1  # never all: the length of a window comes from text


def test_a_model_that_is_tuned_writes_of_that_text_as_well(tmp_path: Path) -> None:
    """The windows that calibrate are among them; text that was named for training stands alone."""
    model = load(write_tiny(tmp_path / "m", "llama"))

    def windows(tokens: str | None, **data: object) -> int:
        keys = {"scheme": "W4A16", "codes": False} | ({"tokens": tokens} if tokens else {"epochs": 1})
        raw = MINIMAL | {"steps": [{"qat": keys}], "data": {"sequences": 16, "length": 32, **data}}
        return parse_recipe(raw, base=tmp_path).resolved(model).windows_written

    assert windows("1024") == 24  # half of 32 windows and of the 16 that judge
    assert windows("32") == 9 and windows(None) == 8 and windows("2M") == 128
    assert windows("1024", written=0) == 0 and windows("1024", calibrate="a.txt") == 0
    assert windows("1024", train="a.txt") == 8
    assert parse_recipe(MINIMAL, base=tmp_path).resolved(model).windows_written == 32


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_an_encoder_is_calibrated_on_short_windows_too(family: str, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", family))

    def shortest(**data: object) -> object:
        return parse_recipe(MINIMAL | {"data": data}, base=tmp_path).resolved(model).data.shortest

    assert shortest() == 8 and shortest(shortest=64) == 64


@pytest.mark.parametrize("classes", [(), ("a", "b")])
def test_causal_models_are_calibrated_on_windows_of_one_length(
    classes: tuple[str, ...], tmp_path: Path
) -> None:
    model = load(write_tiny(tmp_path / "m", "llama", classes=classes))
    assert parse_recipe(MINIMAL, base=tmp_path).resolved(model).data.shortest == "auto"
    with pytest.raises(UnsupportedError, match="shortest: a causal model is calibrated"):
        parse_recipe(MINIMAL | {"data": {"shortest": 8}}, base=tmp_path).resolved(model)


def test_an_encoder_writes_nothing(tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "bert"))
    assert parse_recipe(MINIMAL, base=tmp_path).resolved(model).data.written_windows == 0
    with pytest.raises(UnsupportedError, match="an encoder writes no text"):
        parse_recipe(MINIMAL | {"data": {"written": 0.5}}, base=tmp_path).resolved(model)


WRONG_TYPES = [
    ("steps: [{gptq: {scheme: 4}}]", "gptq: scheme is text, got 4"),
    ("steps: [{gptq: {damp: abc}}]", "gptq: damp is a number, got 'abc'"),
    ("steps: [{prune: {sparsity: 60%}}]", "prune: sparsity is a number, got '60%'; write 0.6"),
    ("steps: [{prune: {sparsity: 1.5}}]", "prune: sparsity is the share of weights"),
    ("steps: [{distill: {tokens: -5}}]", "distill: tokens is a number such as 500k or 2M, got -5"),
    ("steps: [{distill: {tokens: 5k, epochs: 1}}]", "distill: a training has one budget"),
    ("steps: [{student: {family: bert, parameters: few}}]", "student: parameters is a number such as"),
    ("steps: [{gptq: {order: 'no'}}]", "gptq: order is true or false, got 'no'"),
    ("steps: [{gptq: {group: true}}]", "gptq: group is a whole number, or auto, or null, got True"),
    ("steps: [{gptq: [1]}]", "gptq: options by name"),
    ("steps: [rtn]\ndata: [1]", "data: options by name"),
    ("steps: [rtn]\ndata: {sequences: 1.5}", "data: sequences is a whole number, got 1.5"),
    ("steps: [rtn]\nexport: 5", "export: a list of"),
    ("steps: [rtn]\nexport: [[gguf]]", "export: unknown format ['gguf']"),
    ("steps: [rtn]\nexport: [folder, folder]", "each once"),
    ("steps: [rtn]\ndtype: [1]", "dtype: unknown type [1]"),
    ("steps: [rtn, {gptq: {scheme: W2A16}}]", "rtn and gptq would each quantize the same matrices"),
]


@pytest.mark.parametrize(("text", "said"), WRONG_TYPES)
def test_a_value_of_the_wrong_kind_is_named(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {tmp_path}\n{text}\n")
    assert main(["run", str(path), "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and said in error and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


def test_the_recipe_of_an_output_runs_again_from_there(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "recipes" / "texts").mkdir()
    (tmp_path / "recipes" / "model").mkdir()
    (tmp_path / "recipes" / "texts" / "a.txt").write_text("a")
    raw = {
        "model": "model",
        "steps": ["rtn"],
        "data": {"calibrate": "texts/*.txt", "evaluate": ["/else/b.txt"]},
    }
    recipe = parse_recipe(raw, base=tmp_path / "recipes")
    moved = parse_recipe(yaml.safe_load(recipe.seen_from(tmp_path / "out").to_yaml()), base=tmp_path / "out")
    assert Path(moved.source).resolve() == Path(recipe.source).resolve()
    assert moved.data.calibrate == ("../recipes/texts/*.txt",) and moved.data.evaluate == ("/else/b.txt",)
    named = parse_recipe({"model": "sample:minilm-l6", "steps": ["rtn"]}, base=tmp_path)
    assert named.seen_from(tmp_path / "out").model == "sample:minilm-l6"


@pytest.mark.parametrize("name", ["model.embed_tokens", "model.embed_tokens.weight"])
def test_embedding_and_head_are_named_with_or_without_weight(name: str, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "llama", tied=False))
    step = parse_step({"rtn": {"overrides": {name: {"scheme": "W4A16"}, "lm_head": None}}})
    of = scheme_of(step.resolve(model, ("gguf",)), model)
    embedding, head = of("model.embed_tokens.weight"), of("lm_head.weight")
    assert embedding is not None and embedding.bits == 4 and head is None
    with pytest.raises(UsageError, match=r"nor is it model\.embed_tokens and lm_head"):
        parse_step({"rtn": {"overrides": {"model.embed": None}}}).resolve(model, ("gguf",))


@pytest.mark.parametrize("pattern", ["*.experts.*", "*.experts.0.w1"])
def test_experts_are_not_left_beside_what_is_quantized(pattern: str, tmp_path: Path) -> None:
    model = load(write_tiny(tmp_path / "m", "mixtral"))
    for kind in ("gptq", "rtn"):
        with pytest.raises(UnsupportedError, match="of which experts are left as they are"):
            parse_step({kind: {"overrides": {pattern: None}}}).resolve(model, ("folder",))
    parse_step({"gptq": {"overrides": {"*.q_proj": None}}}).resolve(model, ("folder",))
    for options in ({}, {"symmetric": False}):
        with pytest.raises(UnsupportedError, match=r"hqq: it chooses zeros, .*use step rtn or gptq"):
            parse_step({"hqq": options}).resolve(model, ("folder",))
