"""Windows: none overlap, the seed orders them, the tokenizer frames them."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pocketsize.data import calibration
from pocketsize.data.calibration import Windows, evaluation_windows, shortened, windows
from pocketsize.data.text import Corpus, Document
from pocketsize.errors import DataError, UsageError
from pocketsize.recipes.learn import judging_windows


def bytes_tokenizer(template: str | None = None, **special: str) -> PreTrainedTokenizerFast:
    """One token for each byte, framed by `template`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*alphabet, "<s>", "</s>"])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    if template:
        marks = [(mark, vocab[mark]) for mark in ("<s>", "</s>")]
        inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=marks)
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


PLAIN = bytes_tokenizer()


def numbered(lines: int, generated: bool = False) -> Corpus:
    """Every four bytes of its text occur once."""
    text = "".join(f"{i:03d} " for i in range(lines))
    return Corpus("numbered", (Document("a", text),), generated)


def starts(ids: torch.Tensor) -> list[str]:
    return [PLAIN.decode(row) for row in ids.tolist()]


def test_calibration_windows_do_not_overlap_and_follow_the_seed():
    take = [
        windows(numbered(100), PLAIN, count=20, length=16, seed=seed, special=False) for seed in (1, 1, 2)
    ]
    texts = [starts(w.input_ids) for w in take]
    assert len(set(texts[0])) == 20
    assert not set.intersection(*[{t[i : i + 4] for i in range(0, 16, 4)} for t in texts[0][:2]])
    assert texts[0] == texts[1] != texts[2]
    assert take[0].mask.all() and take[0].tokens == 320


FRAMED = bytes_tokenizer("<s> $A </s>", bos_token="<s>", eos_token="</s>", sep_token="</s>")


def cut(count: int, length: int, shortest: int) -> Windows:
    whole = windows(numbered(9000), FRAMED, count=count, length=length, seed=3, special=True)
    assert whole.mask.all() and len(whole.mask) == count
    return shortened(whole, FRAMED, shortest)


@pytest.mark.parametrize(
    ("length", "shortest", "lengths"), [(64, 8, [64, 32, 16, 8]), (100, 12, [100, 50, 25, 12])]
)
def test_each_length_has_as_many_tokens_as_every_other_but_the_longest(
    length: int, shortest: int, lengths: list[int]
) -> None:
    """Of 20 full windows two fifths stay whole, a fifth each becomes halves, quarters, eighths."""
    w = cut(20, length, shortest)
    counts = w.mask.sum(1).tolist()
    assert [counts.count(one) for one in lengths] == [8, 8, 16, 32] and len(counts) == 64
    assert w.input_ids.shape[1] == length and len(w.text_bytes) == 64
    ends = FRAMED.convert_tokens_to_ids(["<s>", "</s>"])
    whole = windows(numbered(9000), FRAMED, count=20, length=length, seed=3, special=True)
    joined = [FRAMED.decode(ids[1:-1]) for ids in whole.input_ids]
    for ids, real, size in zip(w.input_ids, w.mask, w.text_bytes, strict=True):
        own = ids[real].tolist()
        assert [own[0], own[-1]] == ends and real[: len(own)].all()
        text = FRAMED.decode(own[1:-1])
        assert len(text.encode()) == size and any(text in one for one in joined)


@pytest.mark.parametrize("length", [64, 128, 256, 512])
def test_all_lengths_come_to_judge(length: int) -> None:
    """Every fourth batch."""
    w = cut(64, length, 8)
    widths = w.mask.sum(1)
    judging = widths[judging_windows(w.mask)]
    shares = {
        one: int(judging[judging == one].sum()) / int(judging.sum()) for one in widths.unique().tolist()
    }
    whole = {one: int(widths[widths == one].sum()) / int(widths.sum()) for one in shares}
    assert all(0.4 * whole[one] < shares[one] < 2.5 * whole[one] for one in shares)


def test_few_windows_have_lengths_far_apart() -> None:
    assert {*cut(4, 512, 16).mask.sum(1).tolist()} == {512, 128, 32}
    assert {*cut(5, 512, 16).mask.sum(1).tolist()} == {512, 128, 32, 256}


def test_what_is_not_cut_stays_as_it_is() -> None:
    whole = windows(numbered(99), FRAMED, count=4, length=16, seed=0, special=True)
    assert shortened(whole, FRAMED, 9) is whole


def test_windows_too_short_for_their_frame_are_refused() -> None:
    with pytest.raises(UsageError, match="shortest: 3 leaves no room for text; give at least 4"):
        cut(4, 8, 3)


def test_windows_do_not_touch_global_randomness():
    before = torch.random.get_rng_state()
    windows(numbered(50), PLAIN, count=2, length=8, seed=0, special=False)
    assert torch.equal(before, torch.random.get_rng_state())


def test_evaluation_windows_are_the_first_in_order():
    w = evaluation_windows(numbered(100), PLAIN, tokens=40, length=16, special=False)
    assert starts(w.input_ids) == ["000 001 002 003 ", "004 005 006 007 ", "008 009 010 011 "]
    assert (w.name, w.documents, w.sha256) == ("numbered", 1, numbered(100).sha256)


def test_a_short_text_gives_fewer_windows_and_none_is_an_error():
    assert len(windows(numbered(10), PLAIN, count=99, length=16, seed=0, special=False).input_ids) == 2
    assert len(evaluation_windows(numbered(10), PLAIN, tokens=9999, length=16, special=False).input_ids) == 2
    for call in (
        lambda: windows(numbered(10), PLAIN, count=1, length=64, seed=0, special=False),
        lambda: evaluation_windows(numbered(10), PLAIN, tokens=64, length=64, special=False),
    ):
        with pytest.raises(DataError, match="numbered: too short for one window of 64 tokens"):
            call()


def test_documents_are_parted_by_a_blank_line():
    corpus = Corpus("two", (Document("a", "one\n"), Document("b", "two")))
    w = evaluation_windows(corpus, PLAIN, tokens=10, length=10, special=False)
    assert starts(w.input_ids) == ["one\n\ntwo\n\n"]


@pytest.mark.parametrize(
    "template, special, frame",
    [
        ("<s> $A", {"bos_token": "<s>"}, ("<s>", "")),
        ("<s> $A </s>", {"bos_token": "<s>", "eos_token": "</s>"}, ("<s>", "")),
        ("<s> $A </s>", {"cls_token": "<s>", "sep_token": "</s>"}, ("<s>", "</s>")),
        ("<s> $A </s>", {"cls_token": "<s>", "sep_token": "</s>", "eos_token": "</s>"}, ("<s>", "</s>")),
        (None, {}, ("", "")),
    ],
)
def test_windows_are_framed_as_the_tokenizer_frames_texts(template, special, frame):
    tokenizer = bytes_tokenizer(template, **special)
    w = evaluation_windows(numbered(20), tokenizer, tokens=20, length=10, special=True)
    first, last = frame
    assert w.input_ids.shape == (2, 10) and w.prefix == bool(first)
    for text in (tokenizer.decode(row) for row in w.input_ids.tolist()):
        assert (
            text.startswith(first)
            and text.endswith(last)
            and text.count("<s>") + text.count("</s>") == sum(map(bool, frame))
        )
    bare = evaluation_windows(numbered(20), tokenizer, tokens=20, length=10, special=False)
    assert bare.prefix == 0 and tokenizer.decode(bare.input_ids[0]) == "000 001 00"


def test_bytes_count_what_is_predicted():
    corpus = Corpus("euro", (Document("a", "€" * 20),))
    assert evaluation_windows(corpus, PLAIN, tokens=30, length=15, special=False).text_bytes.tolist() == [
        18,
        18,
    ]
    framed = bytes_tokenizer("<s> $A", bos_token="<s>")
    assert evaluation_windows(corpus, framed, tokens=32, length=16, special=True).text_bytes.tolist() == [
        15,
        15,
    ]


def test_long_documents_are_cut_at_line_ends(monkeypatch):
    monkeypatch.setattr(calibration, "PIECE", 10)
    corpus = Corpus("long", (Document("a", "abc\ndefghi\n" + "x" * 25),))
    pieces = list(calibration._pieces(corpus))
    assert pieces == ["abc\n", "defghi\n", "x" * 10, "x" * 10, "x" * 5 + "\n\n"]


def test_generated_text_calibrates_and_does_not_evaluate():
    assert windows(numbered(20, True), PLAIN, count=1, length=8, seed=0, special=False).generated
    with pytest.raises(UsageError, match="never evaluate"):
        evaluation_windows(numbered(20, True), PLAIN, tokens=8, length=8, special=False)


@pytest.mark.parametrize("count, length, seen", [(0, 8, "sequences"), (1, 0, "length"), (1, 1, "no room")])
def test_impossible_sizes_are_refused(count, length, seen):
    with pytest.raises(UsageError, match=seen):
        windows(numbered(20), PLAIN, count=count, length=length, seed=0, special=False)
