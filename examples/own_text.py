"""Quantize a model on your own text, and say what was kept on text it has not seen.

python examples/own_text.py MODEL OUT --calibrate 'notes/*.md' --evaluate 'held-out/*.txt'
"""

import argparse

import pocketsize as ps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="sample:smollm2-135m")
    parser.add_argument("out", nargs="?", default="own-text")
    parser.add_argument("--calibrate", nargs="+", default=[], help="files or globs; default: Python's manual")
    parser.add_argument("--evaluate", nargs="+", default=[], help="files that calibrate nothing")
    parser.add_argument("--scheme", default="W4A16")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    given = parser.parse_args()

    texts = ps.Data(tuple(given.calibrate), tuple(given.evaluate), given.sequences, given.length)
    result = ps.run(given.model, [ps.Gptq(scheme=given.scheme)], out=given.out, data=texts)

    for text in result.record.texts:
        print(f"{text.role:<9}  {text.tokens:>7,} tokens  {text.name}")
    for m in result.record.measurements:
        if m.subject == "compressed":
            interval = "" if m.low is None else f"  ({m.low:.4g} .. {m.high:.4g})"
            print(f"{m.name:<16}  {m.value:.4g} {m.unit}{interval}")
    print(f"report: {result.folder / 'report.html'}")


if __name__ == "__main__":
    main()
