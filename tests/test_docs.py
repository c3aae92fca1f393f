"""What the documents show is true: commands parse, recipes are read, names exist, links lead somewhere."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import click
import pytest
import yaml
from docs import check_site, generate

from documents import ROOT, Block, Names, anchors, blocks, commands, links, pages
from pocketsize.cli.main import WORDS
from pocketsize.errors import UsageError
from pocketsize.measurement import embedding, latency, quality
from pocketsize.recipes.recipe import parse_recipe

SHOWN = commands()
MEASURED = {
    *quality._TABLE,
    *embedding._TABLE,
    *latency._UNITS,
    *("bytes", "bf16_bytes", "ratio_to_download", "ratio_to_bf16", "bits_per_weight"),
}


def where(block: Block) -> str:
    return block.where


def parse(words: list[str]) -> None:
    """Let click read a command as it would, without running it."""
    word, *rest = words[1:]
    assert word in WORDS, f"no command {word!r}"
    command = importlib.import_module(f"pocketsize.cli.{word}").command
    with contextlib.suppress(click.exceptions.Exit):  # --help
        command.make_context(word, rest)


def test_generated_parts_are_fresh() -> None:
    assert generate.stale(write=False) == [], "run python -m docs.generate"


def test_a_stale_part_is_seen_and_mended(tmp_path: Path) -> None:
    page = "# Words\n\n<!-- generated: words -->\nstale words\n<!-- end of generated -->\n\nafter\n"
    fresh = generate.filled(page, tmp_path)
    assert "stale words" not in fresh and "[`shrink`](#shrink)" in fresh and fresh.endswith("\n\nafter\n")
    assert generate.filled(fresh, tmp_path) == fresh
    with pytest.raises(SystemExit, match="nothing generates 'wrods'"):
        generate.filled(page.replace("words", "wrods"), tmp_path)


@pytest.mark.parametrize(
    "mark", ["<!-- generated: words --> ", "<!-- generated: words a|b -->", "<!-- generated:words -->"]
)
def test_a_mark_that_generates_nothing_is_an_error(mark: str) -> None:
    page = "# Words\n\n<!-- generated: words -->\n<!-- end of generated -->\n\n{}\n{}\n"
    with pytest.raises(SystemExit, match=r"^words\.md:6: not "):
        generate.filled(page.format(mark, "<!-- end of generated -->"), Path("words.md"))


def test_a_mark_without_an_end_does_not_take_the_next_one() -> None:
    page = "<!-- generated: words -->\nkept\n<!-- generated: words -->\n<!-- end of generated -->\n"
    with pytest.raises(SystemExit, match=r"^words\.md:1: not "):
        generate.filled(page, Path("words.md"))


def test_arguments_may_be_paths() -> None:
    page = "<!-- generated: bars peers-gptq ../benchmarks.md -->\n<!-- end of generated -->\n"
    assert "(../benchmarks.md#" in generate.filled(page, Path("words.md"))


@pytest.mark.parametrize(("place", "words", "whole"), SHOWN, ids=lambda value: str(value)[:60])
def test_commands_parse(place: str, words: list[str], whole: bool) -> None:
    if words[0] == "pocketsize" and len(words) > 1 and words[1] not in ("COMMAND", "--help"):
        try:
            parse(words)
        except click.MissingParameter:
            assert not whole, f"{place}: {' '.join(words)}: something is missing"
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(words[1:]) <= set(targets), place
    elif words[0] == "python" and words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file(), f"{place}: no {words[1]}"
    elif words[:2] == ["python", "-m"] and words[2].split(".")[0] in ("docs", "benchmarks"):
        assert importlib.util.find_spec(words[2]), place


def test_enough_is_shown_to_be_checked() -> None:
    assert sum(words[0] == "pocketsize" and whole for _, words, whole in SHOWN) >= 20
    assert len({words[1] for _, words, _ in SHOWN if words[0] == "pocketsize"} & set(WORDS)) == len(WORDS)
    assert len(blocks("yaml")) >= 5 and len(blocks("python")) >= 8
    follow = Names()
    for block in blocks("python"):
        if not block.text.rstrip().splitlines()[-1].startswith(") -> "):
            follow.read(block.text)
    assert follow.followed >= 40, "calls and attributes of ours that were looked up"


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("pocketsize shrink m --fti 80MB -o small", click.NoSuchOption),
        ("pocketsize shrink m --fit 80MB", click.MissingParameter),
        ("pocketsize shrnk m", AssertionError),
        ("pocketsize chat small --tokens few", click.BadParameter),
    ],
)
def test_a_wrong_command_is_seen(line: str, error: type[BaseException]) -> None:
    with pytest.raises(error):
        parse(line.split())


@pytest.mark.parametrize("block", blocks("yaml"), ids=where)
def test_recipes_are_read(block: Block) -> None:
    raw = yaml.safe_load(block.text)
    parse_recipe({"model": "m", "steps": ["gptq"]} | raw, base=ROOT)
    with pytest.raises(UsageError):
        parse_recipe({"model": "m", "steps": ["gptq"]} | raw | {"stpes": []}, base=ROOT)


@pytest.mark.parametrize("block", blocks("python"), ids=where)
def test_python_names_what_exists(block: Block) -> None:
    if block.text.rstrip().splitlines()[-1].startswith(") -> "):
        compile(f"def {block.text.rstrip()}: ...", block.where, "exec")  # a signature of the reference
        return
    compile(block.text, block.where, "exec")
    assert Names().read(block.text) == [], block.where
    for name in re.findall(r'measurements\["([^"]+)"\]', block.text):
        assert name.split(" of ")[0] in MEASURED, f"{block.where}: no measurement {name!r}"


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import pocketsize as ps\nps.shrnk('m', out='o')", "has no shrnk"),
        (
            "import pocketsize as ps\nr = ps.shrink('m', out='o', fti='1MB')",
            "unexpected keyword argument 'fti'",
        ),
        ("import pocketsize as ps\nr = ps.shrink('m', out='o')\nr.measurement", "Result has no measurement"),
        ("import pocketsize as ps\nr = ps.shrink('m', out='o')\nr.measurements['a'].worth", "has no worth"),
        (
            "from pocketsize.api import result\nfor s in result('o').record.steps:\n    s.layers[0].fault",
            "LayerReport has no fault",
        ),
        ("from pocketsize.api import Data\nDate = Data(calibrat=())", "calibrat"),
    ],
)
def test_a_wrong_name_is_seen(code: str, said: str) -> None:
    (complaint,) = Names().read(code)
    assert said in complaint


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        parts = urlsplit(link)
        if parts.scheme:
            continue
        target = (page.parent / parts.path).resolve() if parts.path else page
        assert target.exists(), f"{link}: no such file"
        if parts.fragment:
            assert parts.fragment in anchors(target), f"{link}: no such heading"


def test_the_site_is_whole_and_sealed(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    build = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(tmp_path / "site"),
    ]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong, _ = check_site.complaints(tmp_path / "site")
    assert wrong == []
    built = {
        path.relative_to(tmp_path / "site").with_suffix(".md") for path in (tmp_path / "site").rglob("*.html")
    }
    written = {page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")}
    assert written <= built
    index = (tmp_path / "site" / "search.js").read_text().removeprefix("window.PAGES=").rstrip(";\n")
    entries = json.loads(index)
    assert any(
        "--fit" in entry["text"] and entry["url"] == "reference/commands.html#shrink" for entry in entries
    )


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('<a href="no.html">x</a>', "no.html: no such file"),
        ('<a href="#no">x</a>', "#no: no such anchor"),
        ('<a href="../../etc/hosts">x</a>', "leads out of the site"),
        ('<script src="https://cdn.example.com/a.js"></script>', "loads https://cdn.example.com/a.js"),
        ('<link rel="stylesheet" href="//fonts.example.com/css">', "loads //fonts.example.com/css"),
        ('<img src="http://example.com/a.png">', "loads http://example.com/a.png"),
        ('<p style="background: url(https://example.com/a.png)">x</p>', "loads https://example.com"),
        ('<b id="a"></b><i id="a"></i>', "the anchor 'a' twice"),
        ("<li>so:\n```python\nx</li>", "Markdown left unread: ```python"),
    ],
)
def test_what_is_wrong_with_a_site_is_seen(body: str, said: str, tmp_path: Path) -> None:
    sound = '<p id="a"><a href="index.html#a">x</a> <a href="https://example.com">out</a></p>'
    (tmp_path / "index.html").write_text(sound)
    (tmp_path / "style.css").write_text("p { color: red }")
    assert check_site.complaints(tmp_path) == ([], ["https://example.com"])
    (tmp_path / "index.html").write_text(body)
    (complaint,) = check_site.complaints(tmp_path)[0]
    assert said in complaint


@pytest.mark.parametrize(
    "text", ["@import url(https://example.com/a.css);", "src: url('//example.com/a.woff2')"]
)
def test_styles_that_load_from_elsewhere_are_seen(text: str, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<p>x</p>")
    (tmp_path / "style.css").write_text(text)
    (complaint,) = check_site.complaints(tmp_path)[0]
    assert complaint.startswith("style.css: names ")
