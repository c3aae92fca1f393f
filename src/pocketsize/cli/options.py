"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pocketsize.cli.setting import budget_of, with_set
from pocketsize.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from pocketsize.models.arch import Arch
    from pocketsize.recipes.qat import Qat
    from pocketsize.recipes.quantize import Gptq

F = Callable[..., Any]
# Steps that `--method` names.
METHODS = ("gptq", "awq", "smoothquant", "hqq", "rtn")


def output(function: F) -> F:
    """`-o DIR`."""
    return click.option(
        "-o",
        "--output",
        "out",
        type=click.Path(path_type=Path),
        required=True,
        help="Folder to write; absent or empty.",
    )(function)


def overwrite(function: F) -> F:
    """`--overwrite`."""
    return click.option(
        "--overwrite",
        is_flag=True,
        help="Replace a finished output folder, once the new one is verified and complete.",
    )(function)


def dtype(function: F) -> F:
    """`--dtype`."""
    return click.option(
        "--dtype",
        default="bf16",
        show_default=True,
        help="Type of what stays unquantized: bf16, fp16 or fp32; matrices of a GGUF are F16 but for fp32.",
    )(function)


def fetch(function: F) -> F:
    """`--fetch`."""
    return click.option(
        "--fetch",
        "fetch_",
        is_flag=True,
        help="First fetch what is named and not on this machine yet, in a process of its own.",
    )(function)


def as_json(function: F) -> F:
    """`--json`."""
    return click.option("--json", "json_", is_flag=True, help="Print one JSON object instead of text.")(
        function
    )


def threads(function: F) -> F:
    """`--threads N`."""
    return click.option(
        "--threads", type=click.IntRange(min=1), help="Threads for all work; recorded. Default: all cores."
    )(function)


def target(function: F) -> F:
    """`--target gguf,folder`."""
    return click.option(
        "--target",
        help="Formats, first the one sizes are meant for: of gguf, folder, gptq, gptq_v2, awq, "
        "bitsandbytes, sparse. Default: gguf,folder where llama.cpp runs the family, else folder; "
        "folder,sparse where weights are pruned.",
    )(function)


def texts(function: F) -> F:
    """The options that choose calibration and evaluation text."""
    function = click.option(
        "--evaluate", multiple=True, metavar="GLOB", help="Text to evaluate on (repeatable)."
    )(function)
    function = click.option(
        "--calibrate", multiple=True, metavar="GLOB", help="Text to calibrate on (repeatable)."
    )(function)
    function = click.option(
        "--sequences", type=int, default=64, show_default=True, help="Calibration windows."
    )(function)
    function = click.option("--length", type=int, default=512, show_default=True, help="Tokens per window.")(
        function
    )
    function = click.option(
        "--tokens",
        type=int,
        default=16384,
        show_default=True,
        help="Tokens to evaluate; encoders read sentences instead.",
    )(function)
    function = click.option(
        "--written",
        default="auto",
        show_default=True,
        help="Share of the calibration windows that the model writes itself, such as 0.5.",
    )(function)
    return click.option(
        "--seed", type=int, default=0, show_default=True, help="Picks the calibration windows."
    )(function)


def outcome(function: F) -> F:
    """What every command that makes an output has: formats, where it goes, texts, and how it talks."""
    for option in (as_json, fetch, threads, texts, overwrite, output, dtype, target):
        function = option(function)
    return function


def effort(function: F) -> F:
    """How much time quality is worth."""
    return click.option(
        "--effort",
        type=click.Choice(["fast", "balanced", "best"]),
        default="fast",
        show_default=True,
        help="What follows GPTQ: nothing; drift made up for and 20 steps of learning a block; 100 steps. "
        "Of encoders 80 and 200 steps.",
    )(function)


def tune(function: F) -> F:
    """What the whole model teaches its scales."""
    return click.option(
        "--tune",
        metavar="TOKENS",
        help="Tokens on which the scales are tuned last, by the KL of the whole model (256k, 1M). "
        "Default: none; with --effort best 128k, if MODEL writes text.",
    )(function)


def scheme(function: F) -> F:
    """The options that choose how one step quantizes."""
    function = click.option(
        "--damp",
        type=float,
        help="GPTQ's damping, a share of the mean Gram diagonal. Default: 0.01.",
    )(function)
    function = click.option(
        "--override",
        multiple=True,
        metavar="PATTERN=SCHEME[:GROUP]",
        help="Another scheme, with inputs per scale if you like, or none, for linears whose name matches: "
        "'*.down_proj=W5A16:32' (repeatable).",
    )(function)
    function = click.option(
        "--embeddings",
        default="auto",
        show_default=True,
        help="Width of embedding and head: 8, 5, 4, a name such as Q6_K, same (as linears), auto or none.",
    )(function)
    function = click.option(
        "--symmetric/--asymmetric",
        default=None,
        help="Grid without or with zeros. Default: what the exports store best.",
    )(function)
    function = click.option(
        "--float-zeros/--integer-zeros",
        default=None,
        help="Zeros that are any number, or codes. Default: what the exports store best.",
    )(function)
    function = click.option(
        "--group", default="auto", show_default=True, help="Inputs per scale: a number, auto, or row."
    )(function)
    function = click.option(
        "--scheme",
        help="W8A16, W5A16, W4A16, W3A16 or W2A16; a name that says all of a grid, such as Q4_0, NF4, W8A8 "
        "or FP8; or that of a mix, such as Q4_K_M. Default: W4A16; W8A8 for smoothquant.",
    )(function)
    function = click.option(
        "--rotate",
        type=click.Choice(["values", "residual", "both"]),
        help="First turn what attention reads of each head, what passes from block to block, or both.",
    )(function)
    return click.option(
        "--method", default="gptq", show_default=True, help=f"{', '.join(METHODS[:-1])} or {METHODS[-1]}."
    )(function)


def raw_steps(*, rotate: str | None, **rest: Any) -> list[dict[str, Any]]:
    """What these options say as a recipe's `steps`."""
    if rotate is None:
        return [raw_step(**rest)]
    turned = {"values": rotate != "residual", "residual": rotate != "values"}
    return [{"rotate": turned}, raw_step(**rest)]


def raw_step(
    *,
    method: str,
    scheme: str | None,
    group: str,
    symmetric: bool | None,
    float_zeros: bool | None,
    embeddings: str,
    damp: float | None,
    override: tuple[str, ...],
    effort: str,
    tune: str | None,
    arch: Callable[[], Arch],
    **_: Any,
) -> dict[str, Any]:
    """What these options say as an entry of a recipe's `steps`; `arch` tells of the model if that matters."""
    _require_method(method)
    if damp is not None and method != "gptq":
        raise click.UsageError(f"--damp: {method} has no damping; leave it out, or use --method gptq")
    if effort != "fast" and method != "gptq":
        raise click.UsageError(f"--effort: {method} learns no codes; leave it out, or use --method gptq")
    step: dict[str, Any] = {} if scheme is None else {"scheme": scheme}
    step |= {
        "group": _number(group, {"auto": "auto", "row": None}, "--group"),
        "symmetric": "auto" if symmetric is None else symmetric,
        "float_zeros": "auto" if float_zeros is None else float_zeros,
        "embeddings": _embeddings(embeddings),
    }
    if damp is not None:
        step["damp"] = damp
    if override:
        step["overrides"] = dict(map(_override, override))
    if effort == "fast" and tune is None:
        return {method: step}
    if method != "gptq":
        raise click.UsageError(f"--tune: the scales of {method} are not tuned; use --method gptq")
    from pocketsize.recipes.qat import of_effort

    return _taught(step, of_effort(effort, tune, arch, scheme))


def _require_method(method: str) -> None:
    if method not in METHODS:
        raise click.UsageError(
            f"--method: one of {', '.join(METHODS)}, got {method!r}{did_you_mean(method, METHODS)}; other "
            "steps have words or recipes of their own (`pocketsize --help`)"
        )


def _taught(step: dict[str, Any], whole: Gptq | Qat) -> dict[str, Any]:
    """A step of GPTQ with what corrects it and is learned once it is done."""
    names, usual = (key.name for key in fields(whole)), type(whole)()
    more = {name: own for name in names if (own := getattr(whole, name)) != getattr(usual, name)}
    return {whole.kind: step | more}


def _override(text: str) -> tuple[str, dict[str, Any] | None]:
    """`PATTERN=SCHEME` or `PATTERN=SCHEME:GROUP` as an entry of `overrides`."""
    pattern, sign, found = text.rpartition("=")
    scheme, colon, group = found.partition(":")
    if not sign or not pattern or not scheme or (colon and not group):
        raise click.UsageError(
            f"--override: PATTERN=SCHEME or PATTERN=SCHEME:GROUP, such as '*.down_proj=W5A16:64', "
            f"got {text!r}"
        )
    if found == "none":
        return pattern, None
    return pattern, {"scheme": scheme} | (
        {"group": _number(group, {"row": None}, "--override")} if colon else {}
    )


def _embeddings(text: str) -> Any:
    from pocketsize.quantization.scheme import named

    words = {"auto": "auto", "same": "same", "none": None}
    return text if named(text) is not None else _number(text, words, "--embeddings")


def recipe_in(word: str) -> Path | None:
    """The recipe file that a word names, None where it names a model."""
    if not word.endswith((".yaml", ".yml")):
        return None
    require_recipe(Path(word))
    return Path(word)


def require_recipe(path: Path) -> None:
    """Refuse a recipe that is not there, before anything that takes seconds is imported."""
    if not path.exists():
        raise DataError(f"{path}: cannot be read as a recipe: there is no such file")


def _number(text: str, words: dict[str, Any], option: str) -> Any:
    if text in words:
        return words[text]
    if not text.isdigit():
        raise click.UsageError(f"{option}: a number or one of {', '.join(words)}, got {text!r}")
    return int(text)


def raw_distill(
    *,
    layers: int | None,
    pick: str,
    budget: str | None,
    loss: str | None,
    teacher: tuple[str, ...],
    set_: tuple[str, ...],
    **_: Any,
) -> list[dict[str, Any]]:
    """The steps that the options of `distill` stand for, as a recipe has them."""
    own: dict[str, Any] = {} if budget is None else budget_of("--budget", budget)
    if loss is not None:
        own["loss"] = loss
    if teacher:
        own["teacher"] = teacher[0] if len(teacher) == 1 else list(teacher)
    cut = [] if layers is None else [{"layers": {"keep": layers, "pick": pick}}]
    return [*cut, {"distill": with_set(own, set_)}]


def raw_prune(
    *,
    sparsity: str | None,
    pattern: str | None,
    score: str | None,
    remove: str | None,
    by: str | None,
    recover: str | None,
    scheme: str | None,
    set_: tuple[str, ...],
    **_: Any,
) -> list[dict[str, Any]]:
    """The steps that the options of `prune` stand for, as a recipe has them."""
    from pocketsize.search.asked import parse_share

    words = {"sparsity": sparsity, "pattern": pattern, "score": score}
    given = [f"--{name}" for name, word in words.items() if word is not None]
    if remove is None:
        if by is not None:
            raise click.UsageError("--by: says what goes with --remove; give that too")
        keys: dict[str, Any] = {name: word for name, word in words.items() if word is not None}
        if sparsity is not None:
            keys["sparsity"] = parse_share(sparsity, "sparsity")
        steps = [{"prune": with_set(keys, set_)}]
    elif given:
        raise click.UsageError(f"{given[0]}: is of single weights, --remove of whole parts; leave one out")
    else:
        cut, chosen = ("layers", {"pick": "kl"}) if by == "depth" else ("student", {"importance": "taylor"})
        said = with_set({"remove": parse_share(remove, "remove")}, set_)
        steps = [{cut: chosen | said}]
    if recover is not None:
        steps.append({"distill": budget_of("--recover", recover)})
    return [*steps, {"gptq": {"scheme": scheme}}] if scheme is not None else steps


def raw_finetune(*, budget: str | None, set_: tuple[str, ...], **_: Any) -> list[dict[str, Any]]:
    """The step that the options of `finetune` stand for, as a recipe has it."""
    return [{"finetune": with_set({} if budget is None else budget_of("--budget", budget), set_)}]
