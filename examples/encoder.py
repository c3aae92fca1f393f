"""Quantize a sentence encoder at several widths and measure what search with it would notice.

python examples/encoder.py MODEL --schemes W8A16 W4A16 --evaluate 'articles/*.txt'
"""

import argparse
import tempfile
from pathlib import Path

import pocketsize as ps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", nargs="?", default="sample:minilm-l6")
    parser.add_argument("--schemes", nargs="+", default=["W8A16", "W4A16", "W3A16"])
    parser.add_argument("--evaluate", nargs="+", default=[], help="text whose sentences are compared")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    given = parser.parse_args()

    texts = ps.Data((), tuple(given.evaluate), given.sequences, given.length)
    print(f"{'scheme':<7} {'1 - cosine':>10} {'Spearman':>9} {'MB':>7}")
    with tempfile.TemporaryDirectory() as folder:
        for scheme in given.schemes:
            kept = ps.run(given.model, [ps.Gptq(scheme=scheme)], out=Path(folder, scheme), data=texts)
            cosine, spearman = (kept.measurements[name].value for name in ("one_minus_cosine", "spearman"))
            size = kept.record.artifacts[0].bytes / 1e6
            print(f"{scheme:<7} {cosine:10.5f} {spearman:9.4f} {size:7.2f}", flush=True)


if __name__ == "__main__":
    main()
