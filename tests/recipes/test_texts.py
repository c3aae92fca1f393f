"""The texts of a run: windows by shares, what is said of them, and what the record keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from pocketsize.cli.main import main
from pocketsize.data.sources import Source
from pocketsize.errors import PocketsizeError, UnsupportedError, UsageError
from pocketsize.models.load import load, tokenizer_of
from pocketsize.models.model import Model
from pocketsize.recipes.recipe import Data
from pocketsize.recipes.record import read_record
from pocketsize.recipes.texts import read_texts
from tiny import write_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return load(write_tiny(tmp_path_factory.mktemp("texts") / "model", "llama"))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Two languages of one letter each, chats, and a text for the evaluation."""
    for name, letter in (("de", "d"), ("en", "e")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("".join(f"{letter} {i}\n" for i in range(2000)))
    chat = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 300)
    (tmp_path / "x.txt").write_text("".join(f"evaluate {i}: some words here\n" for i in range(2000)))
    return tmp_path


def data(*sources: Source | str, sequences: int = 20, **rest: object) -> Data:
    return Data(calibrate=sources, evaluate=("x.txt",), sequences=sequences, length=32, tokens=64, **rest)  # type: ignore[arg-type]


DE, EN = Source(("de/*.txt",), 0.3), Source(("en/*.txt",), 0.7)


def of_letter(model: Model, ids: torch.Tensor, letter: str) -> int:
    texts = [tokenizer_of(model).decode(row) for row in ids]
    return sum(text.count(letter) > 2 for text in texts)


def test_windows_are_drawn_by_share(model: Model, base: Path) -> None:
    texts = read_texts(data(DE, EN), base, model)
    ids = texts.calibrate.input_ids
    assert len(ids) == 20 and of_letter(model, ids, "d") == 6 and of_letter(model, ids, "e") == 14
    first, second, last = texts.records
    assert [(r.role, r.name, r.windows, r.share) for r in (first, second)] == [
        ("calibrate", "de/*.txt", 6, 0.3),
        ("calibrate", "en/*.txt", 14, 0.7),
    ]
    assert (last.role, last.share) == ("evaluate", 1.0) and not texts.findings
    assert len({r.sha256 for r in texts.records}) == 3
    assert texts.calibrate.documents == 2 and texts.calibrate.sha256 not in {r.sha256 for r in texts.records}


def test_windows_of_a_source_are_those_it_gives_alone(model: Model, base: Path) -> None:
    mixed = read_texts(data(DE, EN), base, model).calibrate
    alone = read_texts(data("de/*.txt", sequences=6), base, model).calibrate
    assert torch.equal(mixed.input_ids[:6], alone.input_ids)
    assert mixed.text_bytes[:6].tolist() == alone.text_bytes.tolist()


def test_one_source_is_the_same_as_its_files(model: Model, base: Path) -> None:
    a = read_texts(data("de/*.txt"), base, model)
    b = read_texts(data(Source(("de/*.txt",))), base, model)
    assert torch.equal(a.calibrate.input_ids, b.calibrate.input_ids) and a.records == b.records


def test_the_hash_pins_the_shares(model: Model, base: Path) -> None:
    half = [Source(s.files, 0.5) for s in (DE, EN)]
    hashes = {read_texts(data(*s), base, model).calibrate.sha256 for s in ([DE, EN], [EN, DE], half)}
    assert len(hashes) == 3


def test_the_evaluation_follows_shares_too(model: Model, base: Path) -> None:
    chosen = Data(calibrate=("x.txt",), evaluate=(DE, EN), sequences=2, length=32, tokens=32 * 10)
    texts = read_texts(chosen, base, model)
    assert [(r.windows, r.share) for r in texts.records] == [(2, 1.0), (3, 0.3), (7, 0.7)]
    assert of_letter(model, texts.evaluate.input_ids, "d") == 3 and len(texts.evaluate.input_ids) == 10
    assert texts.evaluate.name == "de/*.txt (0.3), en/*.txt (0.7)"


def test_a_source_with_too_little_text_is_a_finding(model: Model, base: Path) -> None:
    (base / "de" / "a.txt").write_text("".join(f"d {i}\n" for i in range(30)))
    (finding,) = read_texts(data(DE, EN), base, model).findings
    assert (finding.code, finding.where) == ("little-text", "de/*.txt")
    assert "6 were asked: its share is 0." in finding.message and "instead of 0.3" in finding.message


def test_text_that_repeats_is_a_finding_with_the_tokens_that_count(model: Model, base: Path) -> None:
    (base / "same.txt").write_text("abcdefg " * 20_000)
    texts = read_texts(data("same.txt"), base, model)
    (finding,) = texts.findings
    distinct = len({tuple(row) for row in texts.calibrate.input_ids.tolist()})
    assert finding.code == "repeated-text" and distinct < 18
    assert finding.message.startswith(
        f"only {distinct} of 20 calibration windows differ: {distinct * 32} tokens"
    )


def test_evaluation_text_in_the_calibration_text_is_a_finding(model: Model, base: Path) -> None:
    (finding,) = read_texts(data("x.txt"), base, model).findings
    assert finding.code == "overlap" and finding.message.startswith("100.0%")


def test_text_that_calibrates_and_trains_is_told_of_once(model: Model, base: Path) -> None:
    both = read_texts(data("x.txt", train=("x.txt",)), base, model, trains=True).findings
    assert [one.code for one in both] == ["overlap"] and "in the calibration text" in both[0].message
    (base / "y.txt").write_text("\n\n".join([(base / "x.txt").read_text(), "more of it"]))
    both = read_texts(data("x.txt", train=("y.txt",)), base, model, trains=True).findings
    assert [one.code for one in both] == ["overlap", "overlap"]
    assert "in the training text" in both[1].message


def test_chats_are_rendered_with_the_template_of_the_model(model: Model, base: Path) -> None:
    texts = read_texts(data("chat.jsonl", sequences=4), base, model)
    start = tokenizer_of(model).convert_tokens_to_ids("<|im_start|>")
    assert int((texts.calibrate.input_ids == start).sum()) >= 8


@pytest.mark.parametrize(
    ("sources", "family", "kind", "words"),
    [
        (
            [Source(("de/*.txt",), 0.01), Source(("en/*.txt",), 0.99)],
            "llama",
            UsageError,
            "0.01 of 20 windows",
        ),
        (["chat.jsonl"], "bert", UnsupportedError, "chat.jsonl: line 1: a chat, and the tokenizer in"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    sources: list[Source], family: str, kind: type[PocketsizeError], words: str, base: Path
) -> None:
    model = load(write_tiny(base / family, family))
    with pytest.raises(kind, match=words):
        read_texts(data(*sources), base, model)


def test_shares_do_not_apply_to_sentences(base: Path) -> None:
    model = load(write_tiny(base / "bert", "bert"))
    with pytest.raises(UnsupportedError, match="encoders are evaluated on sentences"):
        read_texts(Data(evaluate=(DE, EN), sequences=2, length=32), base, model)


def test_a_run_records_every_source(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny(base / "model", "llama")
    raw = {
        "model": "model",
        "data": {
            "calibrate": [{"files": "de/*.txt", "share": 0.25}, {"files": ["chat.jsonl"], "share": 0.75}],
            "evaluate": "x.txt",
            "sequences": 4,
            "length": 64,
            "tokens": 128,
        },
        "steps": ["gptq"],
        "export": ["folder"],
    }
    (base / "recipe.yaml").write_text(yaml.safe_dump(raw))
    assert main(["run", str(base / "recipe.yaml"), "-o", str(base / "out")]) == 0
    record = read_record(base / "out" / "record.json")
    assert [(t.role, t.windows, t.share) for t in record.texts] == [
        ("calibrate", 1, 0.25),
        ("calibrate", 3, 0.75),
        ("evaluate", 2, 1.0),
    ]
    assert all(len(t.sha256) == 64 for t in record.texts)
    card = (base / "out" / "README.md").read_text()
    assert "share 0.25, 1 windows" in card and card.count("SHA-256") == 5
    assert "shares" not in capsys.readouterr().err


def test_encoders_record_the_sentences_that_they_are_evaluated_on(base: Path) -> None:
    encoder = load(write_tiny(base / "encoder", "bert"))
    lines = (f"Sentence number {i} says something of its own here.\n" for i in range(400))
    (base / "x.txt").write_text("".join(lines))
    given = data("de/*.txt")
    *_, last = read_texts(given, base, encoder).records
    assert (last.role, last.windows, last.length, last.pieces) == ("evaluate", 256, 0, "256 sentences")
    assert last.tokens > 256 * 6
    (base / "x.txt").write_text("Too little to tell anything from.\n" * 40)
    with pytest.raises(PocketsizeError, match="sentences of 6 to 40 words, 16 are needed"):
        read_texts(given, base, encoder)


def test_text_of_a_few_tokens_again_and_again_is_told_of(model: Model, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Kido bala. " * 2000)
    (tmp_path / "b.txt").write_text("ab" * 20000)
    named = Data(("a.txt",), ("b.txt",), sequences=4, length=32, tokens=128)
    said = [f.message for f in read_texts(named, tmp_path, model).findings if f.code == "repeated-text"]
    assert len(said) == 2 and "calibration" in said[0] and "evaluation" in said[1]
